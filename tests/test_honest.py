"""Truncation, Waits and votes taken apart: each number against a slow and obvious twin."""

import math
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book.budget import budget_force, make_force
from s1book.config import Run, S1Error, project_root
from s1book.engine import ScriptedEngine
from s1book.evaluate import load_benchmarks, thought
from s1book.format import load_tokenizer, prompt_ids
from s1book.honest import (
    CLAIMS,
    LOOKS,
    NO_DATA,
    SPREAD,
    comes_back,
    critics,
    disagreement,
    effects,
    equal_tokens,
    flow_table,
    generated,
    honest_figure,
    honest_points,
    honest_words,
    length_gap,
    oscillation,
    per_wait,
    ratio,
    read_votes,
    same_questions,
    sample_cost,
    seed_spread,
    shortest_scores,
    shortest_vote,
    spread_samples,
    spread_steps,
    truncation_share,
    verdict,
    vote_scores,
)
from s1book.parallel import metered
from s1book.repeats import drawn_sets, vote
from s1book.stats import accuracy_table, holm, wilson

ORDER = ["max=0", "max=8", "natural", "newline=1", "wait=1", "wait=2"]
answers = st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=7)


def record(i, setting, answer, gold="3", benchmark="toy", **more):
    kind, _, value = setting.partition("=")
    waits = int(value) if kind in ("wait", "newline") else 0
    thinking = {"max": int(value or 0), "natural": 20}.get(kind, 20 + 11 * waits)
    return {"benchmark": benchmark, "id": f"q{i:02}", "setting": setting, "extracted": answer,
            "correct": answer == gold, "thinking_tokens": thinking, "forced_tokens": waits,
            "waits": waits, "answer_tokens": 2, "seconds": 0.0,
            "end_reason": "maximum" if kind == "max" else "natural"} | more


def curve(rows, benchmark="toy"):
    """One row of answers per question, in the order of ORDER."""
    return [record(i, s, a, benchmark=benchmark) for i, row in enumerate(rows)
            for s, a in zip(ORDER, row, strict=True)]


ROWS = (
    [["1", "1", "3", "3", "3", "3"]] * 5  # truncation repairs
    + [["1", "1", "2", "2", "3", "3"]] * 3  # the first Wait repairs
    + [["1", "3", "3", "3", "2", "3"]] * 2  # spoiled, and back: an answer returns
    + [["3", "3", "3", "3", "3", "1"]] * 1  # the second Wait spoils
    + [["1", "2", "1", "2", "1", "2"]] * 1  # never right, and it oscillates
)
VOTES = [
    {"id": f"q{i:02}", "temperature": 0.5, "answers": a, "right": ["3"] if "3" in a else [],
     "thinking": [10 + 3 * j for j in range(4)], "generated": 60}
    for i, a in enumerate([["3", "3", "1", "3"], ["1", "3", "3", None], ["1", "1", "2", "3"]] * 4)
]


def samples_of(settings_):
    """Samples as chapter 16 draws them: setting -> a list of answers for each question."""
    return pd.DataFrame([
        {"id": f"q{i:02}", "sample": str(k), "setting": name, "extracted": a, "correct": a == "3",
         "thinking_tokens": 20} for name, rows in settings_.items() for i, row in enumerate(rows)
        for k, a in enumerate(row)])


SAMPLES = samples_of({  # pairs that differ: a half at first, then none, then all
    "natural": [["3", "3", "3", "1"]] * 6, "wait=1": [["3"] * 4] * 6,
    "wait=2": [["3", "1", "2", None]] * 6})


@pytest.fixture(scope="module")
def recorded():
    frame = pd.read_json(project_root() / "data/reference/seeds/0/records.jsonl.gz", lines=True,
                         dtype=False)
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def test_effects_are_told_apart_by_hand():
    table = effects(curve(ROWS)).set_index("step")
    truncation, control, wait = (table.loc[s] for s in (
        "max=0 → natural", "natural → newline=1", "natural → wait=1"))
    assert (truncation.wrong_to_right, truncation.right_to_wrong) == (7, 0)
    assert truncation.n == 12 and truncation.difference == pytest.approx(7 / 12)
    assert (control.wrong_to_right, control.right_to_wrong) == (0, 0)
    assert (wait.wrong_to_right, wait.right_to_wrong) == (3, 2)
    assert "[" in wait.points and (table.p_holm >= table.p).all()


def test_holm_is_made_for_each_benchmark():
    """Another benchmark in the same file makes no step of this one less certain."""
    both = effects(curve(ROWS) + curve(ROWS[:6], "other"))
    for _, part in both.groupby("benchmark"):
        assert np.allclose(part.p_holm, holm(part.p))
    mine, alone = both[both.benchmark == "toy"].set_index("step"), effects(curve(ROWS)).set_index("step")
    assert (mine.p_holm == alone.p_holm).all() and mine.p_holm.min() == pytest.approx(4 * 2 / 2**7)


def test_flips_per_wait_by_hand():
    table = per_wait(curve(ROWS)).set_index("step")
    first, second = table.loc["natural → wait=1"], table.loc["wait=1 → wait=2"]
    assert (first.flips, first.repaired, first.spoiled) == (5, 3 / 12, 2 / 12)
    assert (second.wrong_to_right, second.right_to_wrong) == (2, 1)
    assert second.wrong_way == pytest.approx(1 / 3)
    assert second.wrong_way_high == pytest.approx(wilson(1, 3).high)
    assert first.spoiled_low == pytest.approx(wilson(2, 12).low)
    words = flow_table(curve(ROWS))
    assert words.loc[("toy", "natural → wait=1"), "right → wrong"].startswith("16.7 % [")


def test_no_flip_says_nothing():
    still = per_wait(curve([["1", "1", "3", "3", "3", "3"]] * 4))
    assert (still[["wrong_way", "wrong_way_low", "wrong_way_high"]] == [0.5, 0, 1]).all(axis=None)


def test_share_of_truncation_by_hand_and_where_nothing_rises():
    table = truncation_share(curve(ROWS), resamples=500).set_index("to")
    assert table.share["wait=1"] == pytest.approx(7 / 8) and table.n.eq(12).all()
    assert table.low["wait=1"] < 7 / 8 < table.high["wait=1"]
    flat = truncation_share(curve([["3"] * 6] * 4), resamples=50)
    assert np.isinf(flat.share).all()


def test_a_fall_is_no_rise_to_share():
    assert np.isinf(ratio([1.0, 1.0], [0.0, -2.0])).all() and ratio([1.0], [2.0]) == [0.5]


def test_share_of_truncation_is_the_loop(recorded):
    """Both differences of a resample come from the same draw of questions."""
    mine = [r for r in recorded if r["benchmark"] == "tiny_hard" and r["model"] == "sft"]
    row = truncation_share(mine, resamples=4000).set_index("to").loc["wait=1"]
    right = {s: {r["id"]: r["correct"] for r in mine if r["setting"] == s}
             for s in ("max=0", "natural", "wait=1")}
    ids, draw = sorted(right["natural"]), np.random.default_rng(5)
    cut, rise = (np.array([right[s][i] - right["max=0"][i] for i in ids])
                 for s in ("natural", "wait=1"))
    shares = []
    for _ in range(4000):
        chosen = draw.integers(len(ids), size=len(ids))
        shares.append(cut[chosen].mean() / rise[chosen].mean())
    assert row.share == pytest.approx(cut.mean() / rise.mean())
    assert np.allclose([row.low, row.high], np.quantile(shares, [0.025, 0.975]), atol=0.04)


@given(st.lists(st.sampled_from("abc"), max_size=7))
def test_an_answer_comes_back(found):
    slow = any(found[i] == found[k] != found[j]
               for i, j, k in combinations(range(len(found)), 3))
    assert comes_back(found) == slow


def test_oscillation_by_hand():
    row = oscillation(curve(ROWS)).iloc[0]
    assert row.n == 12 and row.changed == pytest.approx(7 / 12)  # 3 + 2 + 1 + 1
    assert row.returned == pytest.approx(2 / 12)  # natural, Wait, Wait: 1-2-1 has to end as it began
    nothing = oscillation([r | {"extracted": None} for r in curve(ROWS)]).iloc[0]
    assert nothing.changed == 0 and nothing.changed_high > 0


@pytest.fixture(scope="module")
def force():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S1BOOK_RUN", "no-such-run")
        run = Run.open("tiny")
        tokenizer = load_tokenizer(run.read("sft"))
    return tokenizer, make_force(tokenizer, run.preset.budget)


@given(st.integers(0, 4), st.integers(1, 60), st.integers(2, 40), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_generated_tokens_are_what_an_engine_gave(force, waits, most, period, answer):
    """A differential test: chapter 13 counts on the way, here the record is read."""
    tokenizer, force = force
    own = replace(force, ignore_end=waits, max_thinking=most, max_answer=answer)
    stop, spent = min(own.stop_ids & own.answer_stops), {}
    engine = ScriptedEngine(lambda ids: stop if len(ids) % period == 0 else 40)
    prompt = prompt_ids(tokenizer, "How many r in 1r 2y 3r")
    [result] = engine.run([metered(budget_force(prompt, own), spent)])
    row = pd.DataFrame([thought(tokenizer, own, len(prompt), result)])
    assert generated(row, answer)[0] == spent["generated"]


@given(st.lists(answers, min_size=1, max_size=4), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_votes_are_all_sets(rows, k):
    size = min(map(len, rows))
    votes = [{"answers": row[:size], "right": ["3"]} for row in rows]
    k = min(k, size)
    slow = []
    for v in votes:
        worth = []
        for chosen in combinations(v["answers"], k):
            counts = Counter(a for a in chosen if a is not None)
            best = [a for a in counts if counts[a] == max(counts.values())]
            worth.append(sum(a == "3" for a in best) / len(best) if best else 0.0)
        slow.append(np.mean(worth))
    assert vote_scores(votes, k) == pytest.approx(slow)


@given(answers, st.integers(2, 50), st.data())
@settings(max_examples=80, deadline=None)
def test_the_shortest_vote_and_its_slow_twin(given_, length, data):
    right = [a == "3" for a in given_]
    k = data.draw(st.integers(1, len(given_)))
    sets = drawn_sets(len(given_), k, 200, np.random.default_rng(0))
    same = {"answers": given_, "right": ["3"], "thinking": [length] * len(given_)}
    assert shortest_vote(same, sets) == pytest.approx(vote(given_, right, sets))  # equal lengths
    tokens = data.draw(st.lists(st.integers(2, 90), min_size=len(given_), max_size=len(given_)))
    worth = []
    for places in sets:
        groups = {}
        for place in places:
            if given_[place] is not None:
                groups.setdefault(given_[place], []).append(tokens[place])
        scores = {a: len(g) / math.log(sum(g) / len(g)) for a, g in groups.items()}
        best = [a for a in scores if math.isclose(scores[a], max(scores.values()), rel_tol=1e-5)]
        worth.append(sum(a == "3" for a in best) / len(best) if best else 0.0)
    assert shortest_vote(same | {"thinking": tokens}, sets) == pytest.approx(np.mean(worth))


def test_a_short_minority_can_win():
    vote_ = {"answers": ["3", "1", "1"], "right": ["3"], "thinking": [2, 90, 90]}
    assert shortest_scores([vote_], 3) == [1.0] and vote_scores([vote_], 3) == [0.0]


def test_lengths_are_compared_within_questions():
    votes = [{"answers": ["3", "1"], "right": ["3"], "thinking": [10, 14]},
             {"answers": ["3", "1", "1"], "right": ["3"], "thinking": [100, 104, 108]},
             {"answers": ["3", "3"], "right": ["3"], "thinking": [1, 999]},
             {"answers": ["1", None], "right": [], "thinking": [1, 999]}]
    gap, n = length_gap(votes)
    assert n == 2 and gap.value == pytest.approx((-4 - 6) / 2) and gap.low <= gap.value <= gap.high
    assert length_gap(votes[2:])[1] == 0


@pytest.fixture(scope="module")
def matched():
    return same_questions(curve(ROWS) + curve(ROWS[:2], "other"), VOTES[::-1], 16)


def test_only_questions_of_both_chapters_are_compared(matched):
    more = [record(99, s, "3", benchmark="far") for s in ORDER]
    frame, votes = same_questions(curve(ROWS) + more, VOTES, 16)
    assert set(frame.id) == {v["id"] for v in votes} and "newline=1" not in set(frame.setting)
    assert frame[frame.setting == "wait=2"].tokens.eq(42 - 2 + 2 + 2 + 1 + 1).all()
    assert frame[frame.setting == "max=8"].tokens.eq(8 + 2 + 1).all()
    with pytest.raises(S1Error, match="found 13 questions, of which 12"):
        same_questions(curve(ROWS), [*VOTES, VOTES[0] | {"id": "q99"}], 16)
    with pytest.raises(S1Error, match="found 0 questions"):
        same_questions(curve(ROWS), [], 16)


def test_three_series_of_the_same_questions():
    frame, votes = same_questions(curve(ROWS), VOTES, 16)
    points = honest_points(frame, votes)
    assert points.groupby("series", sort=False).label.apply(list).to_dict() == {
        "truncation": ["max=0", "max=8", "natural"], "Wait": ["natural", "wait=1", "wait=2"],
        "vote": ["k=1", "k=2", "k=3", "k=4"]}
    assert (points.n == 12).all() and sample_cost(votes) == 15
    table = accuracy_table(curve(ROWS)).set_index("setting")
    greedy = points[points.series != "vote"]
    assert np.allclose(greedy.accuracy, 100 * table.accuracy[greedy.label].to_numpy())
    assert np.allclose(greedy.low, 100 * table.low[greedy.label].to_numpy())
    assert points[points.series == "vote"].tokens.tolist() == [15, 30, 45, 60]
    one = np.mean([np.mean([a == "3" for a in v["answers"]]) for v in votes])
    assert points[points.label == "k=1"].accuracy.item() == pytest.approx(100 * one)


def test_equal_tokens_bracket_every_setting():
    frame, votes = same_questions(curve(ROWS), VOTES, 16)
    table = equal_tokens(frame, votes)
    few, many = table[table.vote == "at most"], table[table.vote == "at least"]
    assert (few.vote_tokens <= few.tokens).all() and (many.vote_tokens >= many.tokens).all()
    assert ((many.k.to_numpy() - few.k.to_numpy()) <= 1).all() and len(few) == len(many) == 3
    row = table[(table.setting == "wait=1") & (table.vote == "at most")].iloc[0]
    right = np.mean([r["correct"] for r in curve(ROWS) if r["setting"] == "wait=1"])
    assert row.difference == pytest.approx(right - vote_scores(votes, row.k).mean())
    dear = [v | {"generated": 4000} for v in VOTES]  # one sample costs more than any trace
    assert equal_tokens(frame, dear).vote.unique().tolist() == ["at least"]
    cheap = [v | {"generated": 4} for v in VOTES]  # all samples together cost less
    assert equal_tokens(frame, cheap).empty


def test_pairing_follows_the_questions_and_not_the_rows():
    frame, votes = same_questions(curve(ROWS), VOTES, 16)
    mixed = frame.sample(frac=1, random_state=3)
    pd.testing.assert_frame_equal(equal_tokens(mixed, votes), equal_tokens(frame, votes))
    again, turned = same_questions(curve(ROWS), VOTES[::-1], 16)
    assert turned == votes
    pd.testing.assert_frame_equal(equal_tokens(again, turned), equal_tokens(frame, votes))


@given(st.floats(-5, 5), st.floats(0, 5), st.floats(-5, 5), st.booleans())
def test_verdicts(low, width, than, more):
    said, high = verdict(low, low + width, than, more), low + width
    assert said == {True: "yes", False: "no"}.get(more if low > than else not more) or (
        said == "open" and low <= than <= high)
    assert (said == "open") == (low <= than <= high)


def test_critics_have_n_and_an_interval_or_say_why_not():
    frame, votes = same_questions(curve(ROWS), VOTES, 16)
    table = critics(curve(ROWS), frame, votes, SAMPLES)
    tested = table[table.here != "no data"]
    assert set(tested.claim) == set(CLAIMS.values()) and (tested.n > 0).all()
    assert tested.measured.str.fullmatch(r"-?[\d.]+ \[-?[\d.]+, -?[\d.]+\]").all()
    assert set(table.claim[table.here == "no data"]) == set(NO_DATA)
    fall = tested[tested.claim == CLAIMS["fall"]].iloc[0]
    assert fall.value == pytest.approx(100 / 12) and fall.here in ("open", "no")
    worse = [r | ({"correct": False} if r["setting"] == "wait=2" else {}) for r in curve(ROWS)]
    again = critics(worse, frame, votes, SAMPLES)
    assert again[again.claim == CLAIMS["fall"]].here.item() == "yes"


def test_claims_are_about_what_they_say():
    """Which step, which number of samples, and on which side of the limit the claim lies."""
    frame, votes = same_questions(curve(ROWS), VOTES, 16)
    table = critics(curve(ROWS), frame, votes, SAMPLES).set_index("claim")
    cut = table.loc[[CLAIMS["truncation"]]].iloc[0]
    assert (cut["on"], cut.limit) == ("toy, to wait=1", "> 50") and cut.value == pytest.approx(700 / 8)
    assert set(table.loc[[CLAIMS["fall"]]].limit) == set(table.loc[[CLAIMS["short"]]].limit) == {"< 0"}
    assert table.loc[[CLAIMS["fall"]]]["on"].tolist() == ["toy, wait=1 → wait=2"]
    assert table.loc[[CLAIMS["coin"]]]["on"].tolist() == ["toy, wait=1 → wait=2"]
    for said in table.loc[[CLAIMS["vote"]]]["on"]:
        k, setting = re.fullmatch(r"toy, k=(\d+) against (wait=\d)", said).groups()
        assert int(k) * sample_cost(votes) >= frame[frame.setting == setting].tokens.mean()


def test_a_better_vote_is_said_to_be_better():
    frame, votes = same_questions(curve(ROWS), VOTES, 16)
    poor = frame.assign(correct=False)
    sure = [v | {"answers": ["3"] * 4, "right": ["3"]} for v in votes]
    table = critics(curve(ROWS), poor, sure, SAMPLES)
    assert set(table[table.claim == CLAIMS["vote"]].here) == {"yes"}
    good = critics(curve(ROWS), frame.assign(correct=True), [v | {"right": []} for v in votes], SAMPLES)
    assert set(good[good.claim == CLAIMS["vote"]].here) == {"no"}


@given(st.lists(st.sampled_from(["1", "2", None]), min_size=2, max_size=7))
def test_disagreement_is_the_share_of_pairs(found):
    pairs = list(combinations(found, 2))
    assert disagreement(found) == pytest.approx(sum(a != b for a, b in pairs) / len(pairs))


def test_spread_and_gain_are_paired_and_told_apart():
    """A Wait that makes everybody right narrows the answers; one that scatters them does not."""
    table = spread_steps(SAMPLES).set_index("after")
    assert list(table.index) == ["wait=1", "wait=2"] and (table.n == 6).all() and (table.samples == 4).all()
    assert table.spread["wait=1"] == pytest.approx(-50) and table.gain["wait=1"] == pytest.approx(25)
    assert table.spread["wait=2"] == pytest.approx(50) and table.gain["wait=2"] == pytest.approx(-50)
    mixed = spread_steps(SAMPLES.sample(frac=1, random_state=1)).set_index("after")
    pd.testing.assert_frame_equal(mixed, table)
    frame, votes = same_questions(curve(ROWS), VOTES, 16)
    said = critics(curve(ROWS), frame, votes, SAMPLES).set_index("claim").loc[CLAIMS["spread"]]
    assert list(said.here) == ["no", "yes"] and said["on"].str.contains("toy, 4 samples").all()


def test_questions_differ_and_the_interval_says_so():
    """Half of the questions scatter, half draw together: the mean is nothing, its interval is wide."""
    before = [["3", "3", "1", "1"]] * 6
    both = samples_of({"natural": before, "wait=1": [["3"] * 4, ["1", "2", "3", None]] * 3})
    [row] = spread_steps(both).itertuples()
    assert row.spread_low < row.spread < row.spread_high and row.spread_high - row.spread_low > 30


def test_samples_are_drawn_apart_and_only_once(tmp_path, monkeypatch):
    """Every sample has its own seed, whatever stands beside it; what is recorded is not asked again."""
    import s1book.methods

    monkeypatch.setenv("S1BOOK_RUN", "no-such-run")
    there = Run.open("tiny")
    run, rows = Run("tiny", there.preset, tmp_path), load_benchmarks(there)[40:43]
    table = spread_samples(run, there.read("sft"), rows)
    assert set(table.setting) == {"natural", "wait=1", "wait=2", "wait=4"} and len(table) == 3 * SPREAD[0] * 4
    assert set(table.id) == {row["id"] for row in rows}
    thoughts = table.pivot(index=["id", "sample"], columns="setting", values="thinking_tokens")
    assert (thoughts["natural"] <= thoughts["wait=1"]).all() and (thoughts["wait=1"] <= thoughts["wait=4"]).all()
    assert thoughts.groupby("id").nunique().max(axis=None) > 1, "the samples of a question differ"
    monkeypatch.setattr(s1book.methods, "open_engine", lambda *a: pytest.fail("asked again"))
    pd.testing.assert_frame_equal(spread_samples(run, there.read("sft"), rows), table)
    monkeypatch.setattr("s1book.honest.SPREAD", (SPREAD[0], 0.9))
    with pytest.raises(pytest.fail.Exception, match="asked again"):   # another temperature is another sample
        spread_samples(run, there.read("sft"), rows)
    monkeypatch.undo()
    alone = spread_samples(Run("tiny", there.preset, tmp_path / "alone"), there.read("sft"), rows[1:2])
    other = table[table.id == rows[1]["id"]].reset_index(drop=True)
    assert (alone.thinking_tokens == other.thinking_tokens).mean() > 0.9   # ties fall as batches do


def test_seeds_lie_apart_as_far_as_they_do():
    rows = [{"run_seed": s, "benchmark": "toy", "setting": name, "n": 30, "accuracy": a}
            for s, pair in enumerate([(0.5, 0.6), (0.4, 0.7), (0.6, 0.5)])
            for name, a in zip(("natural", "wait=1"), pair)]
    row = seed_spread(pd.DataFrame(rows)).iloc[0]
    assert (row.lowest, row.highest) == pytest.approx((50, 70))
    assert (row["least gain"], row["most gain"]) == pytest.approx((-10, 30)) and row.runs == 3


def test_the_figure_reads_without_colour_and_has_words():
    frame, votes = same_questions(curve(ROWS), VOTES, 16)
    points = honest_points(frame, votes)
    axis = honest_figure(points, "tiny", "toy").axes[0]
    drawn = [line for line in axis.get_lines() if line.get_label() != "" and len(line.get_xdata())]
    looks = {(c[0].get_marker(), c[0].get_linestyle()) for c in axis.containers}
    assert len(looks) == len(LOOKS) == 3 and len(axis.containers) == 3
    assert sum(len(c[0].get_xdata()) for c in axis.containers) == len(points) and drawn
    notes = {t.get_text() for t in axis.texts}
    assert {"max=0", "natural", "×2", "k=1", "k=4"} <= notes and "k=3" not in notes
    assert len(axis.texts) == len(notes)  # no point is named twice
    words = honest_words(points)
    assert words.count("[") == 9 and "12 questions" in words
    assert "generated tokens" in axis.get_xlabel()


REFERENCE = project_root() / "data" / "reference"


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_recorded_votes_are_those_of_the_recorded_table(temperature):
    """data/reference holds no number on trust: chapter 13's table follows from the votes."""
    table = pd.read_csv(REFERENCE / "parallel" / "table.csv")
    part = table[table.method == f"majority, T={temperature}"].set_index("k")
    votes = read_votes(REFERENCE / "seeds" / "0" / "parallel" / "runs.parquet", temperature)
    assert len(votes) == part.n.iloc[0] and {len(v["thinking"]) for v in votes} == {16}
    assert sample_cost(votes) == pytest.approx(part.generated[1])
    for k in (1, 16):  # one way to take 1 or 16 of 16; chapter 13 cuts the others into groups
        assert vote_scores(votes, k).mean() == pytest.approx(part.accuracy[k])


def test_recorded_waits_cost_what_chapter_13_has_metered(recorded):
    """Two chapters decode and count on their own, and agree token for token."""
    path = REFERENCE / "seeds" / "0" / "parallel" / "runs.parquet"
    frame, _ = same_questions(recorded, read_votes(path), 16)
    rows = pd.read_parquet(path)
    for setting, name in (("natural", "wait 0"), ("wait=1", "wait 1"), ("wait=4", "wait 4")):
        ours = frame[frame.setting == setting].set_index("id")
        theirs = rows[rows.run == name].set_index("id").loc[ours.index]
        assert ours.tokens.tolist() == theirs.generated.tolist()
        assert ours.correct.tolist() == [a[0] in r for a, r in zip(theirs.answers, theirs.right)]


def test_samples_that_are_not_there_are_refused():
    with pytest.raises(S1Error, match="runs.parquet: found no samples at temperature 0.7"):
        read_votes(REFERENCE / "seeds" / "0" / "parallel" / "runs.parquet", 0.7)
