"""Other controls: budgets said truly, countdowns that end, an acceptance rule exact to the token."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book import engine as engine_module
from s1book.budget import Trace, budget_force, make_force
from s1book.config import Run, S1Error, load_preset, project_root, read_jsonl
from s1book.controls import (
    S1_WORDING, STEPS, TINY_WORDING, ControlError, Method, bucket, conditional_model, count_down, count_steps,
    draw_of, fields, fits, made_with, measure_method, recorded_seeds, reject, rejected, run_rows, step_sample, stepped, swept,
    token_sample, wording_of,
)
from s1book.backends import EngineStopped
from s1book.engine import Continuation, Continued, Sampling, ScriptedEngine
from s1book.format import IGNORE, prompt_ids, text_ids
from s1book.pretraining import Size, make_model, make_tokenizer
from s1book.world import make_problem, spell, to_row

from test_budget import END, FORCE, NEWLINE, OPEN, PROMPT, START, dice

WARM = replace(FORCE, sampling=Sampling(1.0, 5))
ZERO = (10,)
OPENED = [*PROMPT, START]


class DiceEngine(ScriptedEngine):
    """A scripted engine whose replies depend on the seed of the request, as samples do."""

    def __init__(self, seed, stop):
        super().__init__(None)
        self.seed, self.stop = seed, stop

    def write(self, ask: Continuation) -> Continued:
        self.script = dice((self.seed, ask.sampling.seed), self.stop)
        return super().write(ask)


engines = st.builds(DiceEngine, st.integers(0, 10_000), st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]))
@pytest.fixture(scope="module")
def tokenizer():
    """The real tokenizer of the tiny world."""
    return make_tokenizer()


@pytest.fixture(scope="module")
def small_model():
    """Its vocabulary in an untrained model."""
    return make_model(Size(32, 1, 2, 0), 0).eval()


row_of = {"question_hash": "x", **to_row(spell("raspberry", "r"))}
TRACE = "fours:\n0 1r 2a 3s 4p r= 1\nSo 1\nWait\nthrees:\n0 1r 2a 3s r= 1\nSo 1\nWait\nSo 1"


@given(st.integers(1, 100_000))
def test_a_bucket_is_the_next_power_of_two(n):
    size = bucket(n)
    assert n <= size < 2 * n or n == size == 1
    assert bin(size).count("1") == 1


def test_a_token_sample_announces_its_own_length(tokenizer):
    row = row_of | {"trace": TRACE, "attempt": "1"}
    sample = token_sample(tokenizer, row, TINY_WORDING)
    used = len(text_ids(tokenizer, TRACE + "\n"))
    text = tokenizer.decode(sample.input_ids)
    assert f"think in {' '.join(str(bucket(used)))}<|im_end|>" in text
    first = next(i for i, label in enumerate(sample.labels) if label != IGNORE)
    assert "think in" not in tokenizer.decode(sample.input_ids[first:]), "the announcement carries no loss"


def test_a_step_sample_counts_down_from_what_it_announces(tokenizer):
    row = row_of | {"trace": TRACE, "attempt": "1"}
    sample = step_sample(tokenizer, row, TINY_WORDING)
    text = tokenizer.decode(sample.input_ids)
    said = text.split("<|im_start|>assistant\n")[1]
    assert said == ("<|im_start|>4\nfours:\n0 1r 2a 3s 4p r= 1\nSo 1\n<|im_start|>3\nWait\nthrees:\n0 1r 2a 3s r= 1\n"
                    "So 1\n<|im_start|>2\nWait\nSo 1\n<|im_start|>answer\nAnswer: 1<|im_end|>")
    chat = len(prompt_ids(tokenizer, row["question"] + TINY_WORDING.say(TINY_WORDING.steps, 4), STEPS)) - 1
    assert sample.labels == [IGNORE] * chat + sample.input_ids[chat:]


@pytest.mark.parametrize("count, limit", [(1, 1), (2, 2), (3, 4), (5, 8)])
def test_the_papers_steps_are_paragraphs(count, limit):
    found, text = count_steps("\n\n".join(["Some step."] * count), S1_WORDING)
    assert found == limit and text.count("steps left\nSome step.") == count
    assert text.startswith(f"<|im_start|>{limit} steps left\n") and f"{limit - count} steps left" not in text


def test_a_trace_with_a_control_token_is_refused(tokenizer):
    with pytest.raises(S1Error, match="im_start"):
        step_sample(tokenizer, row_of | {"trace": "So <|im_start|> 1", "attempt": "1"}, TINY_WORDING)


def token_by_token(next_ids, force, last):
    """A second implementation of the countdown: one token at a time, headers found by looking back."""
    text, ended, wish = [], None, None
    while ended is None and len(text) < force.max_thinking:
        wish = next_ids(OPENED + text)[0]
        marks = [-1, *[i for i, t in enumerate(text) if t == START]]
        header = text[marks[-1] + 1:]
        in_header = NEWLINE not in header and 9 not in header   # 9 ends a line as well
        if in_header and (wish in force.stop_ids | force.line_ends) and tuple(header) in {(OPEN,), last} - {()}:
            ended, text = tuple(header) == (OPEN,), text[:marks[-1] + 1]
        elif wish == END:
            ended = True
        else:
            text.append(wish)
    while text and text[-1] == START:
        text.pop()
    return text, bool(ended), (END if wish == END else START) if ended else None


def header_dice(seed, stop):
    """Like dice, but the answer's name and the zero are likely words after a mark."""
    plain = dice(seed, stop)

    def next_ids(ids):
        ranked = plain(ids)
        luck = hash((seed, *ids)) % 3
        return [(OPEN, ZERO[0], 11)[luck], *ranked] if ids[-1] == START else ranked

    return next_ids


countdowns = st.builds(header_dice, st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.3, 0.7]))


@settings(max_examples=300, deadline=None)
@given(countdowns, st.integers(0, 30), st.sampled_from([(), ZERO]))
def test_a_countdown_is_what_one_token_at_a_time_gives(model, maximum, last):
    force, engine = replace(FORCE, max_thinking=maximum), ScriptedEngine(model)
    [result] = engine.run([count_down(OPENED, force, last)])
    ids, ended, mark = token_by_token(model, force, last)
    if any(len(ask.ids) + ask.max_new_tokens > len(OPENED) + maximum for ask, _ in engine.log[:-1]):
        raise AssertionError("more tokens asked for than the maximum leaves")
    assert len(result.trace.ids) <= maximum
    assert (result.trace.ids, result.trace.ended, result.trace.end_mark) == (ids, ended, mark)
    assert engine.log[-1][0].ids == (OPENED if ids else PROMPT) + ids + list(result.closing)


@settings(max_examples=200, deadline=None)
@given(engines, st.integers(1, 12), st.integers(1, 6))
def test_rejection_sampling_ends_and_accepts_exactly_what_fits(engine, limit, tries):
    [found] = engine.run([reject(PROMPT, WARM, [limit], tries)])
    drawn, d = [reply for _, reply in engine.log[:-1]], found[limit]
    assert 1 <= d.tries == len(drawn) <= tries and len({ask.sampling.seed for ask, _ in engine.log}) == len(engine.log)
    assert all(reply.stop_id is None or len(reply.new_ids) > limit for reply in drawn[:-1]), "went on too long"
    last = drawn[-1]
    assert d.accepted == (last.stop_id is not None and len(last.new_ids) <= limit)
    assert d.accepted or d.tries == tries, "gave up early"
    assert d.forced.trace.ended == d.accepted and len(d.forced.trace.ids) <= limit
    assert d.forced.trace.ids == list(last.new_ids[:limit])
    assert d.spent == sum(len(reply.new_ids) for reply in drawn)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.2, 0.5]), st.lists(st.integers(1, 15), min_size=1, max_size=4),
       st.integers(1, 6))
def test_one_series_gives_what_a_series_per_limit_gives(seed, stop, limits, tries):
    [together] = DiceEngine(seed, stop).run([reject(PROMPT, WARM, limits, tries)])
    for limit in limits:
        [alone] = DiceEngine(seed, stop).run([reject(PROMPT, WARM, [limit], tries)])
        assert together[limit] == alone[limit]


def test_the_edge_of_the_limit():
    assert fits(Continued([7] * 4, START), 4) and not fits(Continued([7] * 5, START), 4)
    assert not fits(Continued([7] * 4, None), 4), "nobody saw it end"
    trace, accepted, tries, spent = draw_of([Continued([7] * 9, None), Continued([], END)], 4)
    assert (trace, accepted, tries, spent) == (Trace((), True), True, 2, 5)


@pytest.mark.parametrize("limits, tries, temperature", [([], 1, 1.0), ([0], 1, 1.0), ([4], 0, 1.0), ([4], 1, 0.0)])
def test_pointless_rejection_is_refused(limits, tries, temperature):
    force = replace(FORCE, sampling=Sampling(temperature))
    with pytest.raises(ControlError, match="wanted limits"):
        next(reject(PROMPT, force, limits, tries))


def test_settings_of_one_question_are_asked_in_turn_and_seconds_are_shared():
    from s1book.engine import Continuation
    from s1book.methods import each_of, seconds_of

    def one(tokenizer, force, letter, n, row):
        [reply] = yield [Continuation([row["start"]], n, frozenset())]
        return {f"{letter}/{n}": {"ids": reply.new_ids}}

    engine = ScriptedEngine(lambda ids: ids[-1] + 1)
    [found] = engine.run([each_of(one)(None, None, ("A", 1), ("B", 2), {"start": 5})])
    assert found == {"A/1": {"ids": [6]}, "B/2": {"ids": [6, 7]}} and len(engine.log) == 2
    records = [{"id": i, "seconds": 0.5, "runs": found} for i in range(3)] + [{"id": 9, "seconds": 2.0, "runs": {"B/1": {}}}]
    assert seconds_of(records) == {"A": 1.5, "B": 3.5}


def test_the_worlds_have_their_words():
    assert wording_of(load_preset("tiny")) == TINY_WORDING and wording_of(load_preset("h100")) == S1_WORDING
    assert S1_WORDING.say(S1_WORDING.tokens, 2048) == "\n\nThink for up to 2048 tokens."
    assert TINY_WORDING.say(TINY_WORDING.header, 12) == "<|im_start|>1 2\n"


@pytest.fixture
def world(tmp_path, small_model, tokenizer):
    """A run whose model is an untrained one, and three questions."""
    import random
    folder = tmp_path / "model"
    small_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tiny = load_preset("tiny", ["budget.max_thinking_tokens=12", "budget.maxima=[4, 8]", "engine.slots=4"])
    rows = [to_row(make_problem("sum", 6, random.Random(i))) | {"id": f"q{i}"} for i in range(3)]
    return Run("tiny", tiny, tmp_path / "run"), folder, rows


def methods(folder):
    names = {"TCC/4": "natural", "TCC+BF/4": "max=4", "W/1": "wait=1"}
    yield Method("TCC", folder, lambda t, f: lambda row: swept(t, f, TINY_WORDING.say(TINY_WORDING.tokens, 4), names, row), "4")
    yield Method("SCC", folder, lambda t, f: lambda row: stepped(t, f, TINY_WORDING, 2, row), "2")
    warm = Sampling(1.0, 0)
    yield Method("RS", folder, lambda t, f: lambda row: rejected(t, replace(f, sampling=warm), (4, 8), 2, row), "4 8")


def test_records_are_kept_per_question_and_never_asked_twice(world, monkeypatch):
    run, folder, rows = world
    found = {m.name: measure_method(run, m, rows[:2], "controls/records.jsonl") for m in methods(folder)}
    assert {name: sorted(r[0]["runs"]) for name, r in found.items()} == {
        "TCC": ["TCC+BF/4", "TCC/4", "W/1"], "SCC": ["SCC+BF/2", "SCC/2"],
        "RS": ["RS+BF/4", "RS+BF/8", "RS/4", "RS/8"]}
    for r in found["RS"]:
        assert not (r["runs"]["RS/4"]["correct"] and not r["runs"]["RS/4"]["accepted"])
    path = run.dir / "controls/records.jsonl"
    with open(path, "a") as file:
        file.write('{"made": "torn')   # killed while writing
    for m in methods(folder):
        assert measure_method(run, m, rows, "controls/records.jsonl")[:2] == found[m.name]
    monkeypatch.setattr("s1book.methods.open_engine", None)
    for m in methods(folder):
        assert len(measure_method(run, m, rows, "controls/records.jsonl")) == 3
    assert len(read_jsonl(path)) == 9


def test_an_engine_that_dies_half_way_leaves_what_is_finished(world, monkeypatch):
    run, folder, rows = world
    [method] = [m for m in methods(folder) if m.name == "TCC"]
    rows = [rows[0] | {"id": f"q{i}"} for i in range(9)]
    wanted = measure_method(run, method, rows, "controls/whole.jsonl")
    real, left = engine_module.step, [90]

    def failing(rack):
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("out of memory")
        return real(rack)

    monkeypatch.setattr(engine_module, "step", failing)
    with pytest.raises(EngineStopped, match=r"stopped after [1-8] of 9 strategies \(RuntimeError: out of memory\)"):
        measure_method(run, method, rows, "controls/records.jsonl")
    kept = len(read_jsonl(run.dir / "controls/records.jsonl"))
    assert 1 <= kept < 9
    begun = []
    again = replace(method, prepare=lambda t, f: lambda row: begun.append(row["id"]) or method.prepare(t, f)(row))
    found = measure_method(run, again, rows, "controls/records.jsonl")
    assert len(begun) == 9 - kept, "only the rest is asked for"
    assert [r["runs"] for r in found] == [r["runs"] for r in wanted]


def test_records_of_other_weights_words_or_budgets_are_not_taken(world, tmp_path):
    run, folder, _ = world
    method = next(methods(folder))
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"different")
    budget = load_preset("tiny", ["budget.max_thinking_tokens=100"])
    kind = load_preset("tiny", ["engine.kind=vllm"])
    assert made_with(kind, method) != made_with(load_preset("tiny"), method)
    keys = {made_with(run.preset, method), made_with(budget, method), made_with(run.preset, replace(method, model=other)),
            made_with(run.preset, replace(method, says="8")), made_with(run.preset, replace(method, name="x")),
            made_with(run.preset, replace(method, model="owner/name"))}
    assert len(keys) == 6
    moved = load_preset("tiny", ["engine.slots=3", "engine.server={like: vllm, url: http://127.0.0.1:9/v1}"])
    assert made_with(moved, method) == made_with(load_preset("tiny"), method), "another address, the same tokens"


def test_a_conditional_model_is_trained_once(world, tokenizer, monkeypatch):
    run, folder, rows = world
    trained = []

    def fine_tune(preset, model, tokens, target, log):
        trained.append(target)
        Path(target).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr("s1book.controls.fine_tune", fine_tune)
    monkeypatch.setattr(Run, "model", lambda self, which="base": str(folder))
    made = [step_sample(tokenizer, row_of | {"trace": TRACE, "attempt": "1"}, TINY_WORDING)]
    for _ in range(2):
        conditional_model(run, "controls/steps", made)
    assert len(trained) == 1
    conditional_model(run, "controls/steps", made * 2)
    assert len(trained) == 2, "other samples, another model"


class Words:
    """A tokenizer for the scripts: words are their numbers, and headers are one digit."""

    ids = {"<|im_start|>": START, "\n": NEWLINE, "0": ZERO[0]}

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


@settings(max_examples=300, deadline=None)
@given(countdowns, st.integers(0, 30))
def test_one_decode_gives_the_countdown_with_and_without_a_forced_end(model, maximum):
    force, row = replace(FORCE, max_thinking=maximum), {"question": "q", "id": "q", "answer": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("s1book.controls.prompt_ids", lambda *_: OPENED)
        patch.setattr("s1book.controls.text_ids", lambda *_: [START, *ZERO, NEWLINE])
        patch.setattr("s1book.controls.grade", lambda row, text: type("G", (), {"correct": len(text) % 2 == 0}))
        engine = ScriptedEngine(model)
        [both] = engine.run([stepped(Words(), force, TINY_WORDING, 2, row)])
    for name, last in (("SCC/2", ()), ("SCC+BF/2", ZERO)):
        [alone] = ScriptedEngine(model).run([count_down(OPENED, force, last)])
        found = (both[name]["thinking_tokens"], both[name]["end_reason"], both[name]["end_mark"])
        mark = "" if alone.trace.end_mark is None else str(alone.trace.end_mark)
        assert found == (len(alone.trace.ids), alone.trace.end_reason, mark)
        assert both[name]["steps"] == alone.trace.ids.count(START) + bool(alone.trace.ids)
        assert alone.trace.end_mark in ({START, END} if alone.trace.ended else {None})


def test_a_record_says_what_it_cost_and_who_ended_it(world):
    run, folder, rows = world
    for m in methods(folder):
        records = measure_method(run, m, rows, "controls/records.jsonl")
        assert all(r["seconds"] > 0 for r in records)
        for row in run_rows(records):
            limit = None if row["setting"] == "1" else int(row["setting"])
            assert (row["end_mark"] != "") == (row["end_reason"] == "natural")
            assert row["end_reason"] in ("natural", "maximum") and row["generated_tokens"] >= row["thinking_tokens"] - 1
            if row["method"] in ("TCC+BF", "RS+BF"):
                assert row["thinking_tokens"] <= limit
            if row["method"].startswith("RS"):
                assert row["accepted"] == (row["end_reason"] == "natural") and row["spent"] >= row["thinking_tokens"]
    assert len(run_rows(records)) == 3 * 4 and {r["id"] for r in run_rows(records)} == {row["id"] for row in rows}


@pytest.mark.parametrize("waits", [0, 1, 2])
@pytest.mark.parametrize("often", [3, 5, 40])
def test_generated_tokens_are_those_that_the_model_wrote(world, tokenizer, waits, often):
    """Ends count, those that we suppressed as well; what we wrote does not."""
    run, _, rows = world
    force = replace(make_force(tokenizer, run.preset.budget), ignore_end=waits)
    stop, word = min(force.stop_ids & force.answer_stops), text_ids(tokenizer, "So")[0]
    engine = ScriptedEngine(lambda ids: [stop, word] if len(ids) % often == 0 else word)
    [forced] = engine.run([budget_force(prompt_ids(tokenizer, rows[0]["question"]), force)])
    wrote = sum(len(reply.new_ids) + (reply.stop_id is not None) for _, reply in engine.log)
    assert fields(tokenizer, force, rows[0], forced)["generated_tokens"] == wrote
    assert forced.trace.waits == (waits if often == 3 else forced.trace.waits)


# ---------------------------------------------------------------- the recorded table

RECORDED = sorted((project_root() / "data" / "reference" / "seeds").glob("*/controls/runs.parquet"))
each_seed = pytest.mark.parametrize("file", RECORDED, ids=lambda p: f"seed {p.parts[-3]}")


def wilson(right, n, z=1.959963984540054):
    """The interval by its formula."""
    p, d = right / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return (p + z * z / (2 * n)) / d - half, (p + z * z / (2 * n)) / d + half


def points(rows, method):
    """setting -> mean thinking tokens of what counts, right ones, questions."""
    found = {}
    for row in rows:
        if row["method"] == method:
            found.setdefault(row["setting"], []).append(row)
    for setting, part in found.items():
        kept = [r["thinking_tokens"] for r in part if method != "RS" or r["accepted"]]
        if kept:
            yield setting, sum(kept) / len(kept), sum(r["correct"] for r in part), len(part)


def inside(method, setting, tokens, natural, per_step):
    """Whether a run thought as long as it was asked to."""
    kind = method.split("+")[0]
    if setting.startswith("wait") or setting == "long":
        return tokens >= natural
    if setting in ("natural", "short"):
        return setting == "natural" or tokens <= natural
    return tokens <= float(setting.split("=")[-1]) * (per_step if kind == "SCC" else 1)


def test_runs_are_recorded_and_found():
    assert RECORDED, "no seed has recorded its runs"
    assert list(recorded_seeds(Run.open("tiny"), "controls/runs.parquet").values()) == RECORDED
    assert recorded_seeds(Run.open("h100"), "controls/runs.parquet") == {}
    assert all(file.stat().st_size < 100_000 for file in RECORDED)


@each_seed
def test_the_recorded_table_follows_from_the_recorded_runs(file):
    rows, table = pd.read_parquet(file).to_dict("records"), pd.read_csv(file.with_name("table.csv")).set_index("method")
    assert set(table.index) == {r["method"] for r in rows} and (table.seconds > 0).all() and table.device.notna().all()
    natural = round(next(tokens for s, tokens, *_ in points(rows, "BF") if s == "natural"))
    for method, line in table.iterrows():
        found = list(points(rows, method))
        kept = [inside(method, setting, tokens, natural, line.per_step) for setting, tokens, *_ in found]
        xy = [(math.log2(tokens), 100 * right / n) for _, tokens, right, n in found]
        slopes = [(d - b) / (c - a) for i, (a, b) in enumerate(xy) for c, d in xy[i + 1:] if a != c]
        best = max(right for *_, right, _ in found)
        low, high = wilson(best, found[0][-1])
        wanted = [100 * sum(kept) / len(kept), sum(slopes) / len(slopes), 100 * best / found[0][-1], 100 * low, 100 * high,
                  found[0][-1], len(found)]
        assert line[["control", "scaling", "performance", "low", "high", "n", "runs"]].tolist() == pytest.approx(wanted, abs=1e-3)


@each_seed
def test_every_recorded_run_has_every_question_once(file):
    frame = pd.read_parquet(file)
    assert not frame.duplicated(["id", "method", "setting"]).any()
    assert frame.groupby(["method", "setting"]).id.nunique().eq(frame.id.nunique()).all()
    forced = frame[frame.method.isin(["TCC+BF", "RS+BF"]) | frame.setting.str.startswith("max=")]
    assert (forced.thinking_tokens <= forced.setting.str.removeprefix("max=").astype(int)).all()
    cut = frame[(frame.method == "TCC+BF") & (frame.end_reason == "maximum")]
    assert (cut.thinking_tokens == cut.setting.astype(int)).all(), "who is cut has used the maximum up"
    drawn = frame[frame.method == "RS"]
    assert (drawn.accepted == (drawn.end_reason == "natural")).all() and not (drawn.correct & ~drawn.accepted).any()
