"""Ablations: the same cost for every arm, one decode for many words, every contrast paired and corrected."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

import s1book.methods
import s1book.sft
from s1book.ablations import (
    Arm, arm_sizes, as_many_steps, clean_pool, cut_arm, cut_length, distinct_strings, families, make_arm, measure_arm, other_sets, save_arm,
    string_forces, string_name, thought_on, together, train_arm,
)
from s1book.budget import budget_force, make_force
from s1book.config import PresetError, Run, S1Error, load_preset, project_root, recorded_files, training_flops
from s1book.contrasts import (
    ANSWER, FAMILY, accuracies, check_answers, contrast_figure, contrasts, in_points, paired, points_table,
    read_answers, recorded_answers, save_answers, seed_contrasts,
)
from s1book.engine import ScriptedEngine
from s1book.pretraining import Size, make_model, make_tokenizer
from s1book.runner import KEPT_ONCE, KEPT_PER_SEED, all_needs, collect, find_chapters
from s1book.select import ABLATIONS
from s1book.sft import total_steps
from s1book.stats import holm, mcnemar, paired_bootstrap, recorded
from s1book.world import spell, to_row

from test_budget import FORCE, PROMPT, dice

REFERENCE = project_root() / "data" / "reference"
NATURAL = "natural"
PAIR = (("a", NATURAL), ("b", NATURAL))


# What is compared: answers, pairs, families


def answers_of(rights, benchmark="x", tokens=5):
    """Answers of several arms to questions '1', '2', ..., '10', ...: some ids begin like others."""
    return pd.DataFrame([(benchmark, str(i), arm, NATURAL, bool(right), tokens) for arm, given_ in rights.items()
                         for i, right in enumerate(given_, 1)], columns=list(ANSWER))


pairs_of_rights = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=130)


@given(pairs_of_rights, st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_answers_are_joined_by_question_whatever_their_order(both, rng):
    """Each side is shuffled on its own; the counts of flips are those of the aligned lists."""
    frame = answers_of({"a": [x for x, _ in both], "b": [y for _, y in both]})
    shuffled = frame.iloc[rng.sample(range(len(frame)), len(frame))]
    row = contrasts(shuffled, [PAIR]).iloc[0]
    assert row.n == len(both)
    assert row.wrong_to_right == sum(y and not x for x, y in both)
    assert row.right_to_wrong == sum(x and not y for x, y in both)
    assert row.difference == pytest.approx(np.mean([y - x for x, y in both]))
    assert row.p == mcnemar(row.right_to_wrong, row.wrong_to_right)


def test_an_id_that_begins_like_another_is_another():
    """'1' is right in both arms and '10' in none: joined by their beginnings they would flip."""
    frame = answers_of({"a": [i == 1 for i in range(1, 13)], "b": [i == 1 for i in range(1, 13)]})
    frame = pd.concat([frame[frame.arm == "a"], frame[frame.arm == "b"][::-1]])
    first, second = paired(frame, *PAIR)
    assert len(first) == 12 and (first == second).all() and first.sum() == 1
    assert contrasts(frame, [PAIR]).iloc[0][["wrong_to_right", "right_to_wrong"]].sum() == 0


def test_the_same_id_in_two_benchmarks_is_two_questions():
    both = pd.concat([answers_of({"a": [1, 0], "b": [1, 1]}, "x"), answers_of({"a": [1, 1], "b": [0, 0]}, "y")])
    table = contrasts(both, [PAIR]).set_index("benchmark")
    assert list(table.n) == [2, 2] and table.wrong_to_right["x"] == 1 and table.right_to_wrong["y"] == 2


@pytest.mark.parametrize("use", [
    lambda frame, path: contrasts(frame, [PAIR]), lambda frame, path: save_answers(frame, path),
    lambda frame, path: (frame.to_parquet(path), read_answers(path)),
])
def test_an_answer_that_counts_twice_is_refused(tmp_path, use):
    frame = answers_of({"a": [1, 0, 1], "b": [1, 1, 0]})
    frame = pd.concat([frame, frame.tail(1)], ignore_index=True)
    with pytest.raises(S1Error, match="found the answer x 3 b natural twice"):
        use(frame, tmp_path / "answers.parquet")


@pytest.mark.parametrize("lost", ["1", "10"])
def test_a_question_that_one_side_lacks_is_refused(lost):
    frame = answers_of({"a": [1] * 10, "b": [1] * 10})
    with pytest.raises(S1Error, match="found 1 questions on one side only"):
        contrasts(frame[(frame.arm == "a") | (frame.id != lost)], [PAIR])
    with pytest.raises(S1Error, match="wanted the same questions"):
        contrasts(frame, [(("a", NATURAL), ("c", NATURAL))])
    with pytest.raises(S1Error, match="no question"):
        contrasts(frame, [(("d", NATURAL), ("c", NATURAL))])


@pytest.mark.parametrize("spoil, words", [
    (lambda f: f.drop(columns="arm"), "found no column arm"), (lambda f: f.head(0), "no answer"),
    (lambda f: f.astype({"correct": object}).assign(correct=None), "empty cells"),
])
def test_a_table_that_is_none_of_answers_is_refused(spoil, words):
    with pytest.raises(S1Error, match=words):
        check_answers(spoil(answers_of({"a": [1]})), "here")


@given(st.lists(st.lists(st.booleans(), min_size=40, max_size=40), min_size=2, max_size=4))
@settings(max_examples=6)
def test_holm_counts_every_contrast_of_the_family(rights):
    """All benchmarks and all pairs are one family, as statsmodels has it."""
    arms = {str(i): right for i, right in enumerate(rights)}
    frame = pd.concat([answers_of(arms, "x"), answers_of({a: r[::-1] for a, r in arms.items()}, "y")])
    table = contrasts(frame, [(("0", NATURAL), (arm, NATURAL)) for arm in list(arms)[1:]])
    assert len(table) == 2 * (len(arms) - 1)
    assert np.allclose(table.p_holm, multipletests(table.p, method="holm")[1])


def test_holm_counts_the_benchmarks_too():
    """Ten flips in one benchmark, none in five others: one family of six, not six of one."""
    base, better = [0] * 12 + [1] * 12, [1] * 10 + [0] * 2 + [1] * 12
    frame = pd.concat([answers_of({"a": base, "b": better if name == "x" else base}, name) for name in "xuvwyz"])
    table = contrasts(frame, [PAIR]).set_index("benchmark")
    assert len(table) == 6 and table.p["x"] == pytest.approx(2 / 1024)
    assert table.p_holm["x"] == pytest.approx(6 * table.p["x"]) and (table.p_holm.drop("x") == 1).all()


def test_holm_is_really_applied():
    """Ten flips, all for the better, are convincing alone; in a family of thirty-nine they are not."""
    base, better = [0] * 12 + [1] * 12, [1] * 10 + [0] * 2 + [1] * 12
    arms = {"a": base, "b": better} | {f"same{i}": base for i in range(38)}
    pairs = [PAIR] + [(("a", NATURAL), (f"same{i}", NATURAL)) for i in range(38)]
    alone, among = contrasts(answers_of(arms), pairs[:1]).iloc[0], contrasts(answers_of(arms), pairs).iloc[0]
    assert alone.p == among.p == alone.p_holm < 0.05 < among.p_holm == pytest.approx(39 * alone.p)
    table = contrasts(answers_of(arms), pairs)
    assert points_table(table[:1], "arm").iloc[0, 0].endswith("]"), "no star after the correction"
    assert points_table(contrasts(answers_of(arms), pairs[:1]), "arm").iloc[0, 0].endswith("] *")


def test_intervals_are_those_of_the_paired_bootstrap():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 2, (2, 200))
    row, found = contrasts(answers_of({"a": a, "b": b}), [PAIR]).iloc[0], paired_bootstrap(a[:, None], b[:, None])
    assert (row.difference, row.low, row.high) == (found.value, found.low, found.high)
    assert (row.accuracy_before, row.accuracy) == (a.mean(), b.mean())


def test_no_contrasts_are_an_empty_family_with_its_columns():
    assert list(contrasts(answers_of({"a": [1]}), []).columns) == FAMILY
    assert seed_contrasts(pd.DataFrame(columns=[*ANSWER, "run_seed"]), [PAIR]).empty


@given(st.lists(st.tuples(st.sampled_from(["x", "y"]), st.text(max_size=6), st.booleans(), st.integers(0, 9_999)),
                min_size=1, max_size=40, unique_by=lambda t: t[:2]))
@settings(max_examples=25)
def test_answers_come_back_from_their_file(tmp_path_factory, rows):
    frame = pd.DataFrame([(b, i, "arm", NATURAL, c, t) for b, i, c, t in rows], columns=list(ANSWER))
    path = tmp_path_factory.mktemp("answers") / "answers.parquet"
    save_answers(frame, path)
    pd.testing.assert_frame_equal(read_answers(path), frame)


def test_a_seed_is_small(tmp_path):
    """728 questions under ten cells: what the repository grows by for each recorded seed."""
    rng = np.random.default_rng(0)
    frame = pd.concat([answers_of({str(a): rng.integers(0, 2, 728) for a in range(10)})])
    save_answers(frame.assign(thinking_tokens=rng.integers(20, 200, len(frame))), tmp_path / "answers.parquet")
    assert (tmp_path / "answers.parquet").stat().st_size < 60_000


@pytest.mark.parametrize("bytes_", [b"", b"PAR1 and nothing", b"not at all"])
def test_a_damaged_file_of_answers_is_one_sentence(tmp_path, bytes_):
    (tmp_path / "answers.parquet").write_bytes(bytes_)
    with pytest.raises(S1Error, match="answers.parquet: found no readable table") as error:
        read_answers(tmp_path / "answers.parquet")
    assert "\n" not in str(error.value)


def test_the_figure_has_a_row_for_each_name_and_a_marker_for_each_benchmark():
    frame = pd.concat([answers_of({"a": [0, 1] * 9, "b": [1, 1] * 9, "c": [1, 0] * 9}, name) for name in "xyz"])
    table = contrasts(frame, [(("a", NATURAL), (arm, NATURAL)) for arm in "bc"])
    figure = contrast_figure({"here": in_points(table, "arm")}, in_points(table.head(0), "arm"), ["black"])
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["b", "c"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["x", "y", "z"]
    assert len({container[0].get_marker() for container in axis.containers}) == 3
    assert any(list(line.get_xdata()) == [0, 0] for line in axis.lines), "the line of no difference"


# Many words out of one decode


words = st.dictionaries(st.text("ab", min_size=1, max_size=2),
                        st.lists(st.sampled_from([4, 5, 11, 12]), max_size=3).map(tuple), min_size=1, max_size=4)


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.2, 0.5, 1.0]), words, st.integers(1, 3))
@settings(max_examples=60)
def test_together_is_what_each_would_have_been_alone(seed, stop, strings, times):
    forces = string_forces(FORCE, strings, times)
    start = lambda: {s: budget_force(PROMPT, force) for s, force in forces.items()}
    shared, alone = ScriptedEngine(dice(seed, stop)), ScriptedEngine(dice(seed, stop))
    found = shared.run([together(start())])[0]
    assert found == dict(zip(forces, alone.run(list(start().values()))))
    made = [(tuple(ask.ids), ask.max_new_tokens, ask.min_new_tokens) for ask, _ in shared.log]
    assert len(made) <= len(alone.log) - len(strings), "the way to the first end is asked for once"


def asks_alone(asks):
    """A strategy with given requests that returns the replies."""
    found = []
    for ask in asks:
        found += (yield [ask])
    return found


def test_only_equal_requests_are_shared():
    """Another limit, another stop, another seed: another request, even with the same ids."""
    from s1book.engine import Continuation, Sampling

    ask = Continuation([1, 2], 3, frozenset({9}))
    others = [replace(ask, max_new_tokens=4), replace(ask, stop_ids=frozenset({8})),
              replace(ask, sampling=Sampling(0.0, 1)), replace(ask, min_new_tokens=1), replace(ask, ids=[1, 3])]
    engine = ScriptedEngine(lambda ids: 7)
    engine.run([together({str(i): asks_alone([a]) for i, a in enumerate([ask, *others, ask])})])
    assert len(engine.log) == 6
    engine = ScriptedEngine(lambda ids: 7)
    engine.run([together({"a": asks_alone([ask]), "b": asks_alone([replace(ask, phase="answer", ours=1)])})])
    assert len(engine.log) == 1, "what is told to watchers is no part of the request"


def test_strategies_of_different_length_and_none_at_all():
    from s1book.engine import Continuation

    ask = Continuation([1], 1, frozenset())
    engine = ScriptedEngine(lambda ids: len(ids))
    found = engine.run([together({"two": asks_alone([ask, replace(ask, ids=[1, 1])]), "one": asks_alone([ask])})])[0]
    assert list(found) == ["two", "one"] and len(found["two"]) == 2 and len(found["one"]) == 1
    assert engine.run([together({"none": asks_alone([])})])[0] == {"none": []}


@pytest.fixture(scope="module")
def tokenizer():
    """The real tokenizer of the tiny world."""
    return make_tokenizer()


def test_words_that_the_tokenizer_cannot_tell_apart_are_one(tokenizer):
    found = distinct_strings(tokenizer, load_preset("tiny").ablations.strings)
    assert list(found) == ["nothing", "Alternatively = Hmm", "Wait", "line break", "So"]
    assert found["nothing"] == () and found["Alternatively = Hmm"] == (tokenizer.unk_token_id,)
    assert tokenizer.unk_token_id not in {i for name, ids in found.items() if "=" not in name for i in ids}
    assert string_name("") == "nothing" and string_name("Hmm") == "Hmm"


def test_a_setting_writes_its_word_as_often_as_asked():
    forces = string_forces(replace(FORCE, ignore_end=7), {"a": (4,), "nothing": ()}, 2)
    assert {s: (f.ignore_end, f.wait_ids) for s, f in forces.items() if s != NATURAL} == {
        "2 x a": (2, (4,)), "2 x nothing": (2, ())}
    assert forces[NATURAL].ignore_end == 0


# Arms: their rows, their cost, their training


def rows_of(n, domains=4):
    """Candidates as chapter 07 has them, with something to train on."""
    trace = "ones:\n0 1r 2a 3s r= 1\nSo 1"
    row = to_row(spell("ras", "r"))
    return [{"question_hash": f"{i:04d}", "question": row["question"], "trace": trace, "attempt": "Answer: 1",
             "domain": f"d{i % domains}", "trace_tokens": i, "teacher_correct": True} for i in range(n)]


def small(*changes):
    """A preset of a few rows and steps."""
    return load_preset("tiny", ["select.size=16", "select.uniform_until=0", "sft.epochs=2", "sft.batch_size=8",
                                "sft.micro_batch_size=8", *changes])


@given(n=st.integers(1, 3000), size=st.integers(1, 400), epochs=st.integers(1, 6),
       batch=st.sampled_from([1, 4, 16, 64]))
def test_the_full_pool_never_gets_more_steps_than_the_selected_set(n, size, epochs, batch):
    preset = load_preset("tiny", [f"select.size={size}", "select.uniform_until=0", f"sft.epochs={epochs}",
                                  f"sft.batch_size={batch}", "sft.micro_batch_size=1"])
    rows, passes = as_many_steps(list(range(max(n, size))), preset)
    steps = total_steps(len(rows), batch, passes)
    assert len(set(rows)) == len(rows) and passes >= 1 and steps <= preset.steps
    assert steps + total_steps(len(rows), batch, 1) > preset.steps, "one pass more would be too much"


@pytest.mark.parametrize("kind", ABLATIONS)
def test_an_arm_has_the_settings_of_the_run(kind):
    preset = small()
    arm = make_arm(rows_of(60), kind, preset)
    assert len(arm.rows) == (32 if kind == "full" else 16) and arm.steps == preset.steps == 4
    same = arm.preset.sft.model_dump() | {"epochs": 0, "packing": False}
    assert same == preset.sft.model_dump() | {"epochs": 0} and arm.preset.sft.packing
    assert arm.preset.seed == preset.seed and arm.preset.model == preset.model
    assert {r["how"] for r in arm.rows} == {f"ablation: {kind}"}


def test_the_paper_pays_for_all_passes_over_the_full_pool():
    arm = make_arm(rows_of(60), "full", small("ablations.full_epochs=5"))
    assert (len(arm.rows), arm.preset.sft.epochs, arm.steps) == (60, 5, 40)
    assert training_flops(arm.preset.model.shape, 100, 5) == 5 * training_flops(arm.preset.model.shape, 100, 1)


def test_a_published_thousand_leaves_nothing_to_choose(capsys):
    assert other_sets(load_preset("h100")) == ()
    assert "every set would be the same one" in capsys.readouterr().out
    sources = ["pool.source=s1-sources", "pool.size=59029", "teacher.kind=openai", "features.domain=llm"]
    assert other_sets(load_preset("h100", sources)) == other_sets(load_preset("tiny")) == ABLATIONS


def test_flops_by_hand():
    """Two forward and four backward for each weight and token; recomputation adds two."""
    shape = load_preset("tiny").model.shape
    assert training_flops(shape, 7, 3) == 6 * 21 * s1book.config.parameters(shape)
    assert training_flops(shape, 7, 3, recompute=True) == 8 * 21 * s1book.config.parameters(shape)


def test_a_limit_cuts_as_many_as_asked_and_their_answers(run):
    """Table 8: the end goes, the question and the number of samples stay, and so do all other settings."""
    assert [cut_length(range(1, 101), share) for share in (0.74, 0.5)] == [26, 50]
    lengths = [10, 10, 20, 30]
    assert sum(n > cut_length(lengths, 0.5) for n in lengths) == 2
    rows = rows_of(16)
    whole, arm = Arm("whole", rows, small()), cut_arm(rows, 30, small("ablations.cut=0.5"))
    assert save_arm(run, arm) == 30 * 16 < save_arm(run, whole)
    cut, kept = (pd.read_parquet(run.dir / f"ablations/{name}.parquet") for name in ("cut", "whole"))
    assert all(list(a) == list(b[:30]) for a, b in zip(cut.input_ids, kept.input_ids))
    assert arm.steps == whole.steps and arm.rows == rows and arm.name == "cut"
    same = arm.preset.sft.model_dump() | {"max_length": 512, "truncate": "drop", "packing": False}
    assert same == whole.preset.sft.model_dump()


@pytest.mark.parametrize("changes", [[], ["ablations.cut=0.5"], ["ablations.sets=[full, random]"],
                                     ["ablations.full_epochs=3"], ["pool.size=16"], ["pool.size=17"]])
def test_sizes_are_those_of_the_arms(changes):
    preset = small("pool.size=60", *changes)
    pool = rows_of(preset.pool.size)
    arms = [make_arm(pool, kind, preset) for kind in other_sets(preset)]
    arms += [cut_arm(pool[:16], 30, preset)] if preset.ablations.cut else []
    assert arm_sizes(preset) == {arm.name: (len(arm.rows), arm.preset.sft.epochs) for arm in arms}


def test_the_pool_has_passed_the_rules_of_quality():
    pool = clean_pool(Run("tiny", load_preset("tiny"), Path("nowhere")))
    assert len(pool) > 1000 and not any("[Image]" in row["question"] or row["error"] for row in pool)
    assert len({row["question_hash"] for row in pool}) == len(pool)


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run with a base of its own."""
    opened = Run("tiny", small(), tmp_path)
    make_model(Size(32, 1, 2, 0), 0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return opened


def test_an_arm_is_trained_once(run, monkeypatch, capsys):
    arm = make_arm(rows_of(60), "random", run.preset)
    assert save_arm(run, arm) > 16 * 20
    model = train_arm(run, arm)
    weights = (model / "model.safetensors").read_bytes()
    assert len(pd.read_csv(run.dir / "ablations/random_log.csv")) == arm.steps
    monkeypatch.setattr(s1book.sft, "make_trainer", lambda *a: pytest.fail("trained a second time"))
    save_arm(run, arm)
    assert train_arm(run, arm) == model and (model / "model.safetensors").read_bytes() == weights
    assert "holds this very training" in capsys.readouterr().out


def test_other_samples_are_another_training(run, monkeypatch):
    arm = make_arm(rows_of(60), "random", run.preset)
    save_arm(run, arm)
    train_arm(run, arm)
    class Begun(Exception):
        """A training has begun."""

    def begin(*a):
        raise Begun

    monkeypatch.setattr(s1book.sft, "make_trainer", begin)
    other = [row | {"trace": "ones:\n0 1r 2a r= 1\nSo 1"} for row in arm.rows]
    for change in (Arm("random", other, arm.preset),
                   replace(arm, preset=small("sft.packing=true", "sft.epochs=3")),
                   replace(arm, preset=small("sft.packing=true", "seed=1"))):
        save_arm(run, change)
        with pytest.raises(Begun):
            train_arm(run, change)


def test_a_missing_or_damaged_training_file_is_one_sentence(run):
    arm = make_arm(rows_of(60), "diverse", run.preset)
    with pytest.raises(S1Error, match="diverse.parquet does not exist yet: chapter 17 makes it"):
        train_arm(run, arm)
    save_arm(run, arm)
    path = run.dir / "ablations/diverse.parquet"
    whole = path.read_bytes()
    for broken in (whole[:100], b"", whole[:50] + whole[90:-40] + whole[-4:]):
        path.write_bytes(broken)
        with pytest.raises(S1Error, match="diverse.parquet") as error:
            train_arm(run, arm)
        assert "\n" not in str(error.value) and not (run.dir / "ablations/diverse").exists()
    save_arm(run, arm)
    assert path.read_bytes() == whole, "saved again, it is the same file"


def questions(*benchmarks):
    """A few questions; ids repeat across benchmarks, and some begin like others."""
    row = to_row(spell("ras", "r"))
    return [row | {"benchmark": b, "id": i, "domain": "letters"} for b in benchmarks for i in ("1", "10", "a/1")]


def test_asking_goes_on_where_it_was(run, tokenizer, monkeypatch):
    strings = {"nothing": (), "Wait": tuple(tokenizer("Wait").input_ids)}
    rows = questions("x", "y")
    first = measure_arm(run, "random", run.dir / "base", rows, strings)
    assert len(first) == 6 * 3 and set(first.setting) == {NATURAL, "2 x nothing", "2 x Wait"}
    assert not first.duplicated(["benchmark", "id", "setting"]).any() and set(first.id) == {"1", "10", "a/1"}
    path = run.dir / "ablations/records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]))
    asked, real = [], s1book.methods.open_engine
    monkeypatch.setattr(s1book.methods, "open_engine", lambda *a: asked.append(a) or real(*a))
    again = measure_arm(run, "random", run.dir / "base", rows, strings)
    assert len(asked) == 1 and len(path.read_text().splitlines()) == 6
    pd.testing.assert_frame_equal(again, first)
    measure_arm(run, "random", run.dir / "base", rows, strings)
    assert len(asked) == 1, "everything is recorded, so no model is loaded"
    measure_arm(run, "random", run.dir / "base", rows, {"nothing": ()})
    assert len(asked) == 2, "other strings are another measurement"


def test_a_question_is_asked_for_all_settings_at_once(tokenizer):
    row = questions("x")[0]
    stop, answer = tokenizer.eos_token_id, tokenizer("Answer: 1").input_ids
    forces = string_forces(make_force(tokenizer, load_preset("tiny").budget), {"nothing": ()}, 1)
    engine = ScriptedEngine(lambda ids: [stop, answer[len(ids) % 2]] if len(ids) % 7 == 0 else answer[len(ids) % 2])
    found = engine.run([thought_on(tokenizer, forces, row)])[0]
    assert list(found) == list(forces) == [NATURAL, "1 x nothing"]
    assert found["1 x nothing"]["thinking_tokens"] == found[NATURAL]["thinking_tokens"] + 7
    assert len(engine.log) == 4, "one first end for both, one more, an answer for each"


# What is compared with what, and what is recorded


def made_answers(seed=0, questions_=40):
    """Answers as chapter 17 makes them."""
    rng = np.random.default_rng(seed)
    cells = [("selected", s) for s in (NATURAL, "2 x nothing", "2 x Wait")] + [(a, NATURAL) for a in ABLATIONS]
    return pd.concat([answers_of({"_": rng.integers(0, 2, questions_)}, b).assign(arm=arm, setting=setting)
                      for arm, setting in cells for b in ("hard", "mixed")], ignore_index=True)


def test_families():
    found = families(made_answers())
    natural = ("selected", NATURAL)
    assert found["strings"] == [(natural, ("selected", "2 x nothing")), (natural, ("selected", "2 x Wait"))]
    assert found["data"] == [(natural, (a, NATURAL)) for a in ABLATIONS] + [
        (("selected", "2 x Wait"), ("longest", NATURAL))]
    alone = made_answers()
    assert families(alone[alone.arm == "selected"])["data"] == []
    assert "length" not in found
    longer = alone[alone.setting == "2 x Wait"].assign(setting="2 x So Wait")
    assert families(pd.concat([alone, longer]))["data"] == found["data"], "another string that ends alike"
    cut = alone[alone.arm == "random"].assign(arm="cut")
    more = families(pd.concat([alone, cut]))
    assert more == found | {"length": [(natural, ("cut", NATURAL))]}, "a family of its own, the others as before"
    table = contrasts(pd.concat([alone, cut]), more["length"])
    assert len(table) == 2 and np.allclose(table.p_holm, holm(table.p))


def test_recorded_seeds_are_read_and_told_apart(tmp_path, capsys):
    assert recorded_answers("tiny", tmp_path).empty and "No seeds are recorded" in capsys.readouterr().out
    for seed in (0, 2, 10):
        (tmp_path / "seeds" / str(seed) / "ablations").mkdir(parents=True)
        save_answers(made_answers(seed), tmp_path / "seeds" / str(seed) / "ablations/answers.parquet")
    (tmp_path / "seeds" / "1").mkdir()   # an older seed, recorded without
    found = recorded_answers("tiny", tmp_path)
    assert list(found.run_seed.unique()) == [0, 2, 10]
    pairs = families(made_answers())["data"]
    table = seed_contrasts(found, pairs)
    for seed, part in table.groupby("run_seed"):
        own = contrasts(made_answers(seed), pairs)
        pd.testing.assert_frame_equal(part.drop(columns="run_seed").reset_index(drop=True), own)


def test_a_seed_without_a_cell_leaves_its_row_out():
    frame = made_answers().assign(run_seed=0)
    table = seed_contrasts(frame[frame.arm != "longest"], families(frame)["data"])
    assert "longest" not in set(table.arm) and len(table) == 3 * 2


def run_folder(folder, seed, ablated):
    """Everything that collect wants of a run, in small."""
    for name in {*KEPT_ONCE, *KEPT_PER_SEED, "base", "small"}:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if "." in name:
            path.write_text("family,items,right\nsum,1,1\n")
        else:
            path.mkdir()
            (path / "config.json").write_text("{}")
    answers = made_answers(seed)
    save_answers(answers, folder / "ablations/answers.parquet")
    contrasts(answers, families(answers)["data"]).to_csv(folder / "ablations/table.csv", index=False)
    if not ablated:
        shutil.rmtree(folder / "ablations")
    return folder


def test_collect_keeps_the_ablations_and_refuses_a_run_without(tmp_path, monkeypatch):
    monkeypatch.setenv("S1BOOK_ROOT", str(tmp_path))
    runs = [run_folder(tmp_path / f"seed{seed}", seed, seed != 1) for seed in (0, 1, 2)]
    with pytest.raises(S1Error, match=r"seed1/ablations/\w+\.\w+ is missing: run: make reference"):
        collect(runs, tmp_path / "data")
    reference = tmp_path / "data" / "reference"
    assert not reference.exists(), "nothing is kept of runs that are not whole"
    collect([runs[0], runs[2]], tmp_path / "data")
    assert (reference / "ablations/table.csv").exists() and (reference / "seeds/1/accuracy.csv").exists()
    found = recorded_answers("tiny", reference)
    assert list(found.run_seed.unique()) == [0, 1]
    pd.testing.assert_frame_equal(found[found.run_seed == 1].drop(columns="run_seed").reset_index(drop=True),
                                  made_answers(2))


def test_a_seed_that_lacks_a_cell_leaves_its_row_out():
    """An older recording has no such arm; what it has is a family of its own."""
    whole = made_answers()
    part, pairs = whole[whole.arm != "full"], families(whole)["data"]
    table = seed_contrasts(pd.concat([whole.assign(run_seed=0), part.assign(run_seed=1)]), pairs)
    assert set(table[table.run_seed == 0].arm) == set(ABLATIONS)
    old = table[table.run_seed == 1].drop(columns="run_seed").reset_index(drop=True)
    pd.testing.assert_frame_equal(old, contrasts(part, [p for p in pairs if p[1][0] != "full"]))


def test_tables_keep_the_order_of_what_was_compared():
    frame = pd.concat([answers_of({"a": [1, 0], "z": [1, 1], "b": [0, 0]}, name) for name in ("y", "x")])
    table = contrasts(frame, [(("a", NATURAL), (arm, NATURAL)) for arm in "zb"])
    shown = points_table(table, "arm")
    assert list(shown.index) == ["z", "b"] and list(shown) == ["y, n = 2", "x, n = 2"]


def test_figures_are_in_points_and_named():
    table = contrasts(answers_of({"a": [0, 0, 1, 1], "b": [1, 0, 1, 1]}), [PAIR])
    row, raw = in_points(table, "arm").iloc[0], table.iloc[0]
    assert (row["name"], row.difference) == ("b", 25.0)
    assert (row.low, row.high) == pytest.approx((100 * raw.low, 100 * raw.high))


def test_one_way_leads_to_the_recorded_files(tmp_path, monkeypatch):
    """Chapters 12, 15 and 17 read the same seeds, in the order of their numbers, and no stray folder."""
    from s1book.methods import recorded_seeds as of_methods

    monkeypatch.setenv("S1BOOK_ROOT", str(tmp_path))
    for seed in ("0", "2", "10", "old"):
        folder = tmp_path / "data" / "reference" / "seeds" / seed / "ablations"
        folder.mkdir(parents=True)
        save_answers(made_answers(), folder / "answers.parquet")
        (folder.parent / "accuracy.csv").write_text("benchmark,accuracy\nb,0.5\n")
    (tmp_path / "data/reference/seeds/2/accuracy.csv").unlink()
    assert list(recorded_files("ablations/answers.parquet")) == [0, 2, 10]
    assert list(of_methods(Run("tiny", load_preset("tiny"), tmp_path), "accuracy.csv")) == ["seed 0", "seed 10"]
    assert list(recorded("accuracy.csv").run_seed) == [0, 10]
    assert list(recorded_answers().run_seed.unique()) == [0, 2, 10]
    assert recorded_files("accuracy.csv", "h100") == {} and recorded("accuracy.csv", "h100").empty


def recorded_seeds():
    """Seeds whose ablations are in data/reference."""
    return sorted(int(path.parts[-3]) for path in REFERENCE.glob("seeds/[0-9]*/ablations/answers.parquet"))


@pytest.mark.skipif(0 not in recorded_seeds(), reason="no ablations are recorded yet")
def test_the_recorded_table_follows_from_the_recorded_answers():
    answers = read_answers(REFERENCE / "seeds/0/ablations/answers.parquet")
    table, found = pd.read_csv(REFERENCE / "ablations/table.csv"), families(answers)
    made = pd.concat([contrasts(answers, found[name]).assign(family=name) for name in found], ignore_index=True)
    assert list(made.columns) == list(table.columns) and len(made) == len(table)
    numbers = [name for name in made if made[name].dtype.kind in "if"]
    assert np.allclose(made[numbers].astype(float), table[numbers].astype(float), atol=1e-6)
    assert (made.drop(columns=numbers) == table.drop(columns=numbers)).all(axis=None)


@pytest.mark.parametrize("seed", recorded_seeds() or [pytest.param(0, marks=pytest.mark.skip("none recorded"))])
def test_chapter_14_measured_the_selected_model_alike(seed):
    """Its own records of the same model, end and questions agree with the answers kept here."""
    answers = read_answers(REFERENCE / f"seeds/{seed}/ablations/answers.parquet")
    records = pd.read_json(REFERENCE / f"seeds/{seed}/records.jsonl.gz", lines=True, dtype=False)
    for ours, theirs in ((NATURAL, NATURAL), ("2 x Wait", "wait=2")):
        one = answers[(answers.arm == "selected") & (answers.setting == ours)].set_index(["benchmark", "id"])
        other = records[records.setting == theirs].set_index(["benchmark", "id"])
        assert len(one) == len(other)
        assert (one.correct == other.correct.reindex(one.index)).mean() > 0.99   # ties fall as batches do


# Presets, and the chapter's place in the course


@pytest.mark.parametrize("change, words", [
    ("ablations.sets=[random, random]", "each set once"), ("ablations.sets=[best]", "'diverse'"),
    ("ablations.strings=[]", "at least 1 item"), ("ablations.strings=[Wait, Wait]", "each string once"),
    ("ablations.strings=['<|im_end|>']", "a control token would end the thinking"),
    ("ablations.times=0", "greater than 0"), ("ablations.full_epochs=-1", "greater than or equal to 0"),
    ("ablations.word=Hmm", "unknown key"), ("ablations.times=two", "ablations.times"),
])
def test_a_nonsensical_ablation_is_one_sentence(change, words):
    with pytest.raises(PresetError, match=re.escape(words)) as error:
        load_preset("tiny", [change])
    assert "\n" not in str(error.value)


def test_both_presets_carry_the_papers_cells():
    tiny, h100 = (load_preset(name).ablations for name in ("tiny", "h100"))
    assert h100.strings == ("", "Alternatively", "Hmm", "Wait") and set(h100.strings) <= set(tiny.strings)
    assert tiny.sets == h100.sets == ABLATIONS and tiny.times == h100.times == 2
    assert (tiny.full_epochs, h100.full_epochs) == (0, 5)


def test_the_chapter_waits_for_what_it_reads_and_for_no_more():
    found = {name[:2]: {c.name[:2] for c in before} for name, before in all_needs(find_chapters()).items()}
    assert {"01", "03", "04", "06", "08", "09"} <= found["17"]
    assert not found["17"] & {"10", "11", "12", "13", "14", "15", "16"}


def test_accuracies_of_every_cell():
    table = accuracies(made_answers()).set_index(["benchmark", "arm", "setting"])
    row = table.loc[("hard", "random", NATURAL)]
    own = made_answers().query("benchmark == 'hard' and arm == 'random'")
    assert row.n == 40 and row.accuracy == pytest.approx(100 * own.correct.mean()) and row.low < row.accuracy < row.high


def test_the_papers_tables_say_what_the_chapter_says_of_them():
    table = pd.read_csv(project_root() / "data/paper/table2.csv")
    weak = table[table.set.isin(["1K-random", "1K-diverse", "1K-longest"])]
    below = weak[weak.difference_high < 0].groupby("benchmark").size().to_dict()
    assert below == {"aime24": 2, "math500": 1}
    aime = table[table.benchmark == "aime24"].set_index("set").accuracy
    drops = aime["s1K"] - aime[["1K-random", "1K-diverse", "1K-longest"]]
    assert list(drops.round(1)) == [13.3, 23.3, 16.7] and round(drops.mean(), 1) == 17.8
    assert round(394 / 7) == 56


def test_the_page_of_tables_shows_ours_beside_table_2(tmp_path):
    from s1book.tables import our_side

    run = Run("own", load_preset("tiny"), tmp_path)
    assert "chapter 17 makes it" in our_side(2, run)
    answers = made_answers()
    found = families(answers)
    table = pd.concat([contrasts(answers, found[name]).assign(family=name) for name in found])
    table.round(6).to_csv(run.write("ablations/table.csv"), index=False)
    shown = our_side(2, run)
    assert list(shown) == ["set", "hard, n = 40", "mixed, n = 40"] and list(shown.set) == ["selected", *ABLATIONS]
    own, change = r"\d+\.\d \[\d+\.\d, \d+\.\d\]", r"[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\]"
    assert all(re.fullmatch(f"{own}; difference to selected {change}", cell)
               for cell in shown.iloc[1:, 1:].to_numpy().ravel())
    table = accuracies(answers).set_index(["benchmark", "arm", "setting"])
    for place, arm in enumerate(shown.set):
        row = table.loc[("hard", arm, NATURAL)]
        assert shown["hard, n = 40"][place].startswith(f"{row.accuracy:.1f} [{row.low:.1f}, {row.high:.1f}]")
