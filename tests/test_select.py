"""Selection: properties that every draw must have, and the reference's rules to the letter."""

import random
import re
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from s1book.config import S1Error
from s1book.select import (
    DIFFICULTY, QUALITY, Rule, Trusted, ablation_set, apply_rules, benchmark_weights, by_domain, candidates,
    direct_picks, draw, draw_like_s1, longest_first, rank_at, select, slow_rank_at, trusted_sources,
)

ALGORITHMS = ("s1book", "paper", "code")


@st.composite
def hard_pools(draw_, least=1, most=40):
    "A hard pool with few domains and many ties, some picks, and a size that can be reached."
    n = draw_(st.integers(least, most))
    rows = [{"question_hash": f"{i:04x}", "domain": draw_(st.sampled_from("abc")),
             "trace_tokens": draw_(st.integers(1, 6))} for i in range(n)]
    size = draw_(st.integers(1, n))
    picks = draw_(st.lists(st.sampled_from([row["question_hash"] for row in rows]), unique=True, max_size=size))
    return rows, picks, size


def names(rows):
    return [row["question_hash"] for row in rows]


def run(rows, picks, size, seed, algorithm):
    late = {domain: 1.0 for domain in by_domain(rows)}
    return select(rows, picks, size, seed, algorithm, size // 2, late)


@given(hard_pools(), st.integers(0, 2**32), st.sampled_from(ALGORITHMS))
def test_exactly_size_rows_no_duplicates_all_picks(pool, seed, algorithm):
    rows, picks, size = pool
    chosen = run(rows, picks, size, seed, algorithm)
    assert len(chosen) == len(set(names(chosen))) == size and set(picks) <= set(names(chosen)) <= set(names(rows))
    assert {row["question_hash"] for row in chosen if row["how"] == "pick"} == set(picks)
    assert names(chosen) == sorted(names(chosen))


@given(hard_pools(), st.integers(0, 2**32), st.sampled_from(ALGORITHMS))
def test_the_same_seed_gives_the_same_set(pool, seed, algorithm):
    assert run(*pool, seed, algorithm) == run(*pool, seed, algorithm)


@given(hard_pools(), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_row_order_does_not_matter(pool, seed, shuffler):
    rows, picks, size = pool
    shuffled, turned = shuffler.sample(rows, len(rows)), picks[::-1]
    assert select(shuffled, turned, size, seed) == select(rows, picks, size, seed)
    for kind in ("random", "diverse", "longest"):
        assert names(ablation_set(shuffled, kind, size, seed)) == names(ablation_set(rows, kind, size, seed))


def test_another_seed_gives_another_set():
    rows = [{"question_hash": f"{i:04x}", "domain": "ab"[i % 2], "trace_tokens": i % 50} for i in range(400)]
    assert select(rows, [], 50, 1) != select(rows, [], 50, 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 99), min_size=4, max_size=9, unique=True), st.integers(0, 1000))
def test_a_longer_trace_is_never_selected_less_often(lengths, start):
    rows = [{"question_hash": f"{i:04x}", "domain": "a", "trace_tokens": n} for i, n in enumerate(lengths)]
    seen = Counter(name for seed in range(start, start + 400) for name in draw(rows, [], 2, seed))
    counts = [seen[row["question_hash"]] for row in sorted(rows, key=lambda row: -row["trace_tokens"])]
    # Neighbours may swap by chance where both are rare; the standard error of a count is at most 10.
    assert all(upper >= lower - 40 for upper, lower in zip(counts, counts[1:]))
    assert counts[0] > counts[2] and counts[0] > 240


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 1200))
def test_the_drawn_rank_is_that_of_the_written_out_weights(u, m):
    fast, slow = rank_at(u, m), min(slow_rank_at(u, m), m - 1)
    edge = abs(u - (1 - 2.0 ** -max(fast, slow)) / (1 - 2.0**-m))
    assert 0 <= fast < m and (fast == slow or edge < 1e-12)  # at an edge rounding may decide


def test_ranks_have_halving_weights():
    rng = np.random.default_rng(0)
    counts = np.bincount([rank_at(rng.random(), 5) for _ in range(31_000)], minlength=5)
    assert np.allclose(counts / 1000, [16, 8, 4, 2, 1], rtol=0.12)


def test_ties_favour_nobody():
    tied = [{"question_hash": name, "trace_tokens": 7} for name in "abcde"]
    first = Counter(longest_first(tied, seed)[0] for seed in range(5000))
    assert len(first) == 5 and max(first.values()) < 1.2 * min(first.values())
    assert longest_first([*tied, {"question_hash": "z", "trace_tokens": 8}], 3)[0] == "z"


def test_domains_are_drawn_alike_whatever_their_size():
    rows = [{"question_hash": f"{i:05x}", "domain": "big" if i > 300 else "little", "trace_tokens": i}
            for i in range(9000)]
    counts = Counter(row["domain"] for row in select(rows, [], 400, 0))
    assert abs(counts["big"] - 200) < 50


def test_picks_are_not_drawn_again():
    rows = [{"question_hash": f"{i}", "domain": "a", "trace_tokens": 9 - i} for i in range(9)]
    assert draw(rows, ["8"], 9, 0).count("8") == 1 and draw(rows, ["8"], 9, 0)[0] == "8"


def test_the_code_turns_to_the_benchmark_domains():
    rows = [{"question_hash": f"{i:04x}", "domain": "abcd"[i % 4], "trace_tokens": i} for i in range(4000)]
    chosen = select(rows, [], 1000, 0, "code", 700, {"a": 2 / 3, "b": 1 / 3})
    counts = Counter(row["domain"] for row in chosen)
    assert abs(counts["c"] - 175) < 40 and abs(counts["a"] - 375) < 50 and abs(counts["b"] - 275) < 50


def test_the_reference_ranks_as_its_double_argsort():
    rows = [{"question_hash": f"{i}", "domain": "a", "trace_tokens": n} for i, n in enumerate([5, 9, 7])]
    first = Counter(draw_like_s1(rows, [], 1, seed, 1, {})[0] for seed in range(2000))
    assert first["1"] > 1000 and 450 < first["2"] < 700 and 180 < first["0"] < 400


@pytest.mark.parametrize("size, picks, algorithm, words", [
    (11, [], "s1book", "cannot select 11 of 10"), (2, ["0", "1", "2"], "s1book", "cannot select 2"),
    (2, ["unknown"], "s1book", "cannot select"), (5, [], "best", "'best' is unknown")])
def test_what_cannot_be_done_is_refused(size, picks, algorithm, words):
    rows = [{"question_hash": f"{i}", "domain": "a", "trace_tokens": i} for i in range(10)]
    with pytest.raises(S1Error, match=words):
        select(rows, picks, size, 0, algorithm)


def test_used_up_benchmark_domains_are_refused():
    rows = [{"question_hash": f"{i}", "domain": "ab"[i % 2], "trace_tokens": i} for i in range(10)]
    with pytest.raises(S1Error, match="used up"):
        select(rows, [], 9, 0, "code", 0, {"a": 1.0})


def test_benchmark_weights_cut_small_domains():
    assert benchmark_weights(["b"] * 99 + ["l"], ["g"] * 50) == {"b": 24 / 74, "g": 50 / 74}


TEXTS = st.lists(st.sampled_from(["[asy]", "![Image]", "p1.", "p0.", "step12.", "p1000.", "p999.", "p", "12.", ".",
                                  "**", "**a**", "**a b**", "]", "7", " ", "\n", "x"]), max_size=7).map("".join)


def weird(question, source):
    "The reference's filter, written out as in data/filter.ipynb."
    if "[asy]" in question and "AIME" in source:
        return False
    return ("[asy]" in question or "![Image]" in question
            or any(f"p{i}." in question for i in range(1, 1000))
            or re.search(r"\*\*(?=.*\d)[^\s\]]*\*\*", question) is not None)


@settings(max_examples=400)
@given(TEXTS, st.sampled_from(["maths", "qq8933/AIME_1983_2024"]))
def test_string_patterns_are_the_references(question, source):
    row = {"question": question, "source_type": source}
    strings = [rule for rule in QUALITY if rule.name.startswith("no ") and "feature" not in rule.name]
    assert all(rule.keep(row) for rule in strings) == (not weird(question, source))


def candidate(**changes):
    return {"question_hash": "0", "question": "q", "source_type": "s", "domain": "d", "trace": "t", "attempt": "a",
            "error": None, "trace_tokens": 5, "teacher_correct": True, "small_correct": False,
            "base_correct": False} | changes


@pytest.mark.parametrize("changes", [
    {"trace": None}, {"trace": " "}, {"attempt": ""}, {"error": "timeout"}, {"domain": None}, {"trace_tokens": None},
    {"teacher_correct": None}, {"small_correct": None}, {"base_correct": None}, {"small_correct": True},
    {"base_correct": True}])
def test_each_reason_drops_a_row(changes):
    rules = [rule for rule in (*QUALITY, *DIFFICULTY) if "format" not in rule.name]
    assert apply_rules([candidate()], rules)[0] and not apply_rules([candidate(**changes)], rules)[0]


def test_a_wrong_teacher_is_kept():
    rules = [rule for rule in (*QUALITY, *DIFFICULTY) if "format" not in rule.name]
    assert apply_rules([candidate(teacher_correct=False)], rules)[0]


@given(st.lists(st.integers(0, 9), max_size=30))
def test_the_account_adds_up(numbers):
    rows = [{"question_hash": str(i), "n": n} for i, n in enumerate(numbers)]
    rules = [Rule("s", "even", lambda row: row["n"] % 2 == 0), Rule("s", "small", lambda row: row["n"] < 5)]
    kept, steps = apply_rules(rows, rules)
    assert kept == [row for row in rows if row["n"] in (0, 2, 4)]
    assert [steps[0].rows_in, steps[0].rows_out] == [len(rows), steps[1].rows_in] and steps[1].rows_out == len(kept)
    assert len(steps[0].dropped) == min(3, steps[0].rows_in - steps[0].rows_out)


def test_candidates_join_by_hash_and_keep_what_is_missing():
    questions = [{"question_hash": "a", "domain": "x"}, {"question_hash": "b", "domain": "y"}]
    traces = [{"question_hash": "b", "trace": "old", "attempt": "1", "error": None},
              {"question_hash": "b", "trace": "new", "attempt": "2", "error": None}]
    features = [{"question_hash": "b", "domain": "y", "trace_tokens": 3, "teacher_correct": False,
                 "small_correct": None, "base_correct": True}]
    first, second = candidates(questions, traces, features)
    assert first["trace"] is None and first["trace_tokens"] is None
    assert second["trace"] == "new" and second["teacher_correct"] is False and second["small_correct"] is None


def test_direct_picks_want_a_trusted_source_a_right_teacher_and_length():
    rows = [candidate(question_hash=str(i), source_type=source, trace_tokens=n, teacher_correct=right)
            for i, (source, n, right) in enumerate([
                ("qfq/openaimath/Algebra", 5601, True), ("simplescaling/openaimath/Algebra", 5601, True),
                ("qfq/openaimath/Algebra", 5600, True), ("Idavidrein/gpqa", 1, True), ("Idavidrein/gpqa", 1, False),
                ("qq8933/AIME_1983_2024", 1, True), ("AI-MO/NuminaMath-CoT/aops", 9999, True)])]
    assert direct_picks(rows, trusted_sources(5600)) == ["0", "1", "3", "5"]
    assert direct_picks(rows, (Trusted("AI-MO", 0), Trusted("AI", 0))) == ["6"]


def test_ablation_sets():
    rows = [{"question_hash": f"{i:04x}", "domain": "rare" if i < 20 else "common", "trace_tokens": i % 97}
            for i in range(1000)]
    longest = ablation_set(rows, "longest", 100, 0)
    assert min(r["trace_tokens"] for r in longest) >= sorted(r["trace_tokens"] for r in rows)[-100]
    assert Counter(r["domain"] for r in ablation_set(rows, "diverse", 30, 0))["rare"] > 8
    assert Counter(r["domain"] for r in ablation_set(rows, "random", 100, 0))["rare"] < 8
    for kind in ("random", "diverse", "longest"):
        chosen = names(ablation_set(rows, kind, 100, 0))
        assert len(set(chosen)) == 100 and chosen != names(ablation_set(rows, kind, 100, 1)) or kind == "longest"
    with pytest.raises(S1Error, match="unknown"):
        ablation_set(rows, "best", 1, 0)


def test_a_pool_of_the_papers_size_is_no_burden():
    rng = random.Random(0)
    rows = [{"question_hash": f"{i:08x}", "domain": f"d{int(51 * rng.random() ** 2)}",
             "trace_tokens": rng.randrange(300, 9000)} for i in range(59_029)]
    started = time.perf_counter()
    assert len(select(rows, names(rows[:393]), 1000, 0)) == 1000
    assert time.perf_counter() - started < 10  # measured: well under a second; the limit is for busy machines
