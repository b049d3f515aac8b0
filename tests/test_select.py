"""Selection: properties that every draw must have, and the reference's rules to the letter."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from s1book.config import S1Error
from s1book.select import (
    ABLATIONS, ALGORITHMS, BY_BENCHMARK, CLEAN_QUALITY, DRAWN, FEATURES, PICK, QUALITY, S1_QUALITY, WHOLE_POOL, Rule,
    Trusted, ablation_set, apply_rules, benchmark_family, benchmark_weights, candidates, direct_picks, draw,
    draw_like_s1, funnel_rows, funnel_rules, longest_first, rank_at, select, slow_rank_at, trusted_sources,
)
from s1book.tiny import HARD

AIME, GPQA, OTHER = "qq8933/AIME_1983_2024", "Idavidrein/gpqa", "AI-MO/NuminaMath-CoT/aops_forum"


@st.composite
def hard_pools(draw_, least=1, most=40):
    "A hard pool with few domains and many ties, some picks, and a size that can be reached."
    n = draw_(st.integers(least, most))
    rows = [{"question_hash": f"{i:04x}", "domain": draw_(st.sampled_from("abc")),
             "source_type": draw_(st.sampled_from([AIME, GPQA, OTHER])), "cot_type": "math",
             "trace_tokens": draw_(st.integers(1, 6))} for i in range(n)]
    size = draw_(st.integers(1, n))
    picks = draw_(st.lists(st.sampled_from([row["question_hash"] for row in rows]), unique=True, max_size=size))
    return rows, picks, size


def names(rows):
    return [row["question_hash"] for row in rows]


def made(n, **fields):
    """n rows with the fields that a draw looks at; a field may be a function of the row's number."""
    plain = {"question_hash": lambda i: f"{i:05x}", "domain": "a", "trace_tokens": lambda i: i, "source_type": OTHER,
             "cot_type": "math"} | fields
    return [{name: value(i) if callable(value) else value for name, value in plain.items()} for i in range(n)]


def run(rows, picks, size, seed, algorithm):
    """The selection, or None where the code's benchmark domains are used up before the end."""
    try:
        return select(rows, picks, size, seed, algorithm, size // 2)
    except S1Error as error:
        assert algorithm == "code" and "used up" in str(error)


@given(hard_pools(), st.integers(0, 2**32), st.sampled_from(ALGORITHMS))
def test_exactly_size_rows_no_duplicates_all_picks(pool, seed, algorithm):
    rows, picks, size = pool
    chosen = run(rows, picks, size, seed, algorithm)
    if chosen is None:
        return
    assert len(chosen) == len(set(names(chosen))) == size and set(picks) <= set(names(chosen)) <= set(names(rows))
    assert {row["question_hash"] for row in chosen if row["how"] == PICK} == set(picks)
    assert names(chosen) == sorted(names(chosen))


@given(hard_pools(), st.integers(0, 2**32), st.sampled_from(ALGORITHMS))
def test_the_same_seed_gives_the_same_set(pool, seed, algorithm):
    assert run(*pool, seed, algorithm) == run(*pool, seed, algorithm)


@given(hard_pools(), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_row_order_does_not_matter(pool, seed, shuffler):
    rows, picks, size = pool
    shuffled, turned = shuffler.sample(rows, len(rows)), picks[::-1]
    assert select(shuffled, turned, size, seed) == select(rows, picks, size, seed)
    for kind in ABLATIONS:
        assert names(ablation_set(shuffled, kind, size, seed)) == names(ablation_set(rows, kind, size, seed))


def test_another_seed_gives_another_set():
    rows = made(400, domain=lambda i: "ab"[i % 2], trace_tokens=lambda i: i % 50)
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
    rows = made(9000, domain=lambda i: "big" if i > 300 else "little")
    counts = Counter(row["domain"] for row in select(rows, [], 400, 0))
    assert abs(counts["big"] - 200) < 50


def test_picks_are_not_drawn_again():
    rows = [{"question_hash": f"{i}", "domain": "a", "trace_tokens": 9 - i} for i in range(9)]
    chosen = draw(rows, ["8"], 9, 0)
    assert next(iter(chosen)) == "8" and chosen["8"] == PICK and Counter(chosen.values())[DRAWN] == 8


def literal_code(rows, seeds, size, uniform_until, rng):
    """The notebook's sampler, sentence by sentence as in the reference facts (section 4.3), with a given generator."""
    chosen, lists = set(seeds), {}
    for domain in sorted({row["domain"] for row in rows}):  # the notebook takes them in the order of a set
        lists[domain] = [row for row in rows if row["domain"] == domain]  # seeds stay listed
    gpqa, aime = {}, {}
    for row in rows:
        if row["source_type"].startswith(GPQA):
            gpqa[row["domain"]] = gpqa.get(row["domain"], 0) + 1
        if row["source_type"].startswith(AIME):
            aime[row["domain"]] = aime.get(row["domain"], 0) + 1
    benchmark = {}
    if gpqa:
        ratio = 0.5 * (sum(aime.values()) / sum(gpqa.values()))
        benchmark = {domain: int(count * ratio) for domain, count in gpqa.items()}
    for domain, count in aime.items():
        benchmark[domain] = benchmark.get(domain, 0) + count
    while len(chosen) < size:
        if len(chosen) < uniform_until:
            open_, weights = list(lists), [1] * len(lists)
        else:
            open_ = [domain for domain in lists if benchmark.get(domain)]
            weights = [benchmark[domain] for domain in open_]
        if not open_:
            return None  # the notebook would divide by zero
        total = sum(weights)
        domain = open_[rng.choice(len(open_), p=[weight / total for weight in weights])]
        lengths = np.array([row["trace_tokens"] for row in lists[domain]])
        rank = len(lengths) - 1 - np.argsort(np.argsort(lengths))
        p = 2.0 ** (-rank)
        at = rng.choice(len(lengths), p=p / p.sum())
        chosen.add(lists[domain][at]["question_hash"])  # a seed drawn again adds nothing
        lists[domain] = [row for i, row in enumerate(lists[domain]) if i != at]
        if not lists[domain]:
            del lists[domain]
    return chosen


@settings(max_examples=200, deadline=None)
@given(hard_pools(most=60), st.integers(0, 2**32), st.integers(0, 60))
def test_the_code_draws_what_the_notebook_draws(pool, seed, uniform_until):
    rows, picks, size = pool
    wanted = literal_code(rows, picks, size, uniform_until, np.random.default_rng(seed))
    late = benchmark_weights(rows)
    if wanted is None:
        with pytest.raises(S1Error, match="used up"):
            draw_like_s1(rows, picks, size, seed, uniform_until, late)
    else:
        chosen = draw_like_s1(rows, picks, size, seed, uniform_until, late)
        assert set(chosen) == wanted
        if size < len(rows):
            assert set(names(select(rows, picks, size, seed, "code", uniform_until))) == wanted
            paper = literal_code(rows, picks, size, size, np.random.default_rng(seed))
            assert set(names(select(rows, picks, size, seed, "paper"))) == paper


def test_the_code_at_the_papers_size_with_ties_and_393_picks():
    rng = random.Random(5)
    rows = [{"question_hash": f"{i:05x}", "domain": f"d{int(51 * rng.random() ** 2):02}",
             "trace_tokens": rng.randrange(300, 1500), "cot_type": "math",
             "source_type": rng.choice([AIME, GPQA, OTHER, OTHER])} for i in range(24_517)]
    picks = names(rng.sample(rows, 393))
    wanted = literal_code(rows, picks, 1000, 700, np.random.default_rng(9))
    chosen = select(rows, picks, 1000, 9, "code", 700)
    assert set(names(chosen)) == wanted
    assert Counter(row["how"] for row in chosen) == {PICK: 393, DRAWN: 307, BY_BENCHMARK: 300}


def test_the_code_turns_to_the_benchmark_domains():
    rows = made(4000, domain=lambda i: "abcd"[i % 4], source_type=lambda i: [AIME, GPQA, OTHER, OTHER][i % 4])
    chosen = select(rows, [], 1000, 0, "code", 700)  # AIME : GPQA = 2 : 1
    counts = Counter(row["domain"] for row in chosen)
    assert abs(counts["c"] - 175) < 40 and abs(counts["a"] - 375) < 50 and abs(counts["b"] - 275) < 50


def test_the_reference_ranks_as_its_double_argsort():
    rows = [{"question_hash": f"{i}", "domain": "a", "trace_tokens": n} for i, n in enumerate([5, 9, 7])]
    first = Counter(next(iter(draw_like_s1(rows, [], 1, seed, 1, {}))) for seed in range(2000))
    assert first["1"] > 1000 and 450 < first["2"] < 700 and 180 < first["0"] < 400


@pytest.mark.parametrize("size, picks, algorithm, words", [
    (11, [], "s1book", "cannot select 11 of 10"), (2, ["00000", "00001", "00002"], "s1book", "cannot select 2"),
    (2, ["unknown"], "s1book", "cannot select"), (5, [], "best", "'best' is unknown; wanted one of s1book, paper, code")])
def test_what_cannot_be_done_is_refused(size, picks, algorithm, words):
    with pytest.raises(S1Error, match=words):
        select(made(10), picks, size, 0, algorithm)


@pytest.mark.parametrize("change, words", [
    ({"question_hash": "00000"}, "00000 stands twice"), ({"domain": None}, "no domain or no trace_tokens"),
    ({"trace_tokens": None}, "no domain or no trace_tokens")])
def test_a_pool_that_no_draw_can_use_is_refused(change, words):
    rows = made(10)
    rows[7] |= change
    for work in (lambda: select(rows, [], 3, 0), lambda: ablation_set(rows, "longest", 3, 0)):
        with pytest.raises(S1Error, match=words):
            work()


def test_used_up_benchmark_domains_are_refused():
    rows = made(10, domain=lambda i: "ab"[i % 2], source_type=lambda i: [AIME, OTHER][i % 2])
    with pytest.raises(S1Error, match="used up at 5 of 9"):
        select(rows, [], 9, 0, "code", 0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_where_nothing_can_be_drawn_the_pool_is_taken_whole(algorithm):
    chosen = select(made(9), ["00003"], 9, 0, algorithm, 0)
    assert Counter(row["how"] for row in chosen) == {WHOLE_POOL: 8, PICK: 1}


def test_benchmark_weights_cut_small_domains():
    kinds = [(GPQA, "b", 99), (GPQA, "l", 1), (AIME, "g", 50), (OTHER, "x", 9)]
    rows = [{"source_type": source, "domain": domain} for source, domain, n in kinds for _ in range(n)]
    assert benchmark_weights(rows) == {"b": 24 / 74, "g": 50 / 74}
    assert benchmark_weights(rows[:100]) == {} == benchmark_weights([])
    assert benchmark_weights(rows[100:]) == {"g": 1.0}


def test_the_tiny_world_has_relatives_of_both_benchmarks():
    tiny = {"source_type": "tiny/sum", "domain": "sum", "cot_type": "open"}
    assert "sum" in HARD and "letters" not in HARD
    assert [benchmark_family(tiny | change) for change in
            ({}, {"cot_type": "choice"}, {"domain": "letters"})] == ["aime", "gpqa", ""]


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
    strings = S1_QUALITY[2:]
    assert [rule.name[:3] for rule in strings] == ["no "] * 4
    assert all(rule.keep(row) for rule in strings) == (not weird(question, source))


CLEAN = {  # a question -> the clean rule that drops it, or None
    "Find x with 3 < x < 5.": None, "Add 1 in step2. Then stop at exp3. Is it 7?": None, "Is **this** 7 odd?": None,
    "Let p1 and p2 be primes with p1 < p2. Find p2.": None, "p1.5 and p2.5 are prices": None, "What is 5![x+1]?": None,
    "Draw the graph of y = x and find its slope.": None, "**7** apples, **9** pears. How many?": None,
    "Figure out x. The picture frame is 3 by 5.": None, "Problem 4. Find x.": None, "Find 2 of the 3.\nWhy?\t": None,
    "[asy] draw((0,0)); [/asy] Find x.": "no drawing in any notation", "[ASY]": "no drawing in any notation",
    "See ![](a.png) now": "no drawing in any notation", "![Image]": "no drawing in any notation",
    "\\begin{tikzpicture}": "no drawing in any notation", "<img src=a.png>": "no drawing in any notation",
    "\\includegraphics{a}": "no drawing in any notation", "In the figure below, x is?": "no words about a picture",
    "as shown in the\ndiagram, x is?": "no words about a picture", "See the sketch.": "no words about a picture",
    "**p1.** Find x.\n\n**p2.** Find y.": "one problem, not several", "p1. x? p2. y?": "one problem, not several",
    "Problem 1: x?\nProblem 2: y?": "one problem, not several", "Find \ufffd.": "no damaged text, no link",
    "See https://a.b for x": "no damaged text, no link", "a\x00b": "no damaged text, no link",
}


@pytest.mark.parametrize("question", CLEAN)
@pytest.mark.parametrize("source", ["maths", AIME])
def test_clean_rules_drop_what_they_name_and_nothing_else(question, source):
    row = {"question": question, "source_type": source}
    assert [rule.name for rule in CLEAN_QUALITY[2:] if not rule.keep(row)] == ([CLEAN[question]] if CLEAN[question] else [])


def test_the_preset_names_every_quality_and_algorithm():
    from s1book.config import Select
    allowed = {name: field.annotation.__args__ for name, field in Select.model_fields.items() if name in ("quality", "algorithm")}
    assert allowed == {"quality": tuple(QUALITY), "algorithm": ALGORITHMS}
    assert funnel_rules("s1")[:6] == S1_QUALITY and funnel_rules("clean")[:6] == CLEAN_QUALITY
    with pytest.raises(S1Error, match="found 'best', wanted one of s1, clean"):
        funnel_rules("best")


def candidate(**changes):
    return {"question_hash": "0", "question": "q", "source_type": "s", "domain": "d", "trace": "t", "attempt": "a",
            "error": None, "trace_tokens": 5, "teacher_correct": True, "small_correct": False,
            "base_correct": False} | changes


@pytest.mark.parametrize("changes", [
    {"trace": None}, {"trace": " "}, {"attempt": ""}, {"error": "timeout"}, {"domain": None}, {"trace_tokens": None},
    *({name: None} for name in FEATURES), {"teacher_correct": None}, {"small_correct": None}, {"base_correct": None}, {"small_correct": True},
    {"base_correct": True}])
@pytest.mark.parametrize("quality", QUALITY)
def test_each_reason_drops_a_row(changes, quality):
    rules = funnel_rules(quality)
    assert apply_rules([candidate()], rules)[0] and not apply_rules([candidate(**changes)], rules)[0]


def test_a_wrong_teacher_is_kept():
    assert apply_rules([candidate(teacher_correct=False)], funnel_rules())[0]


@given(st.lists(st.integers(0, 9), max_size=30))
def test_the_account_adds_up(numbers):
    rows = [{"question_hash": str(i), "question": f"Is  {n}\nodd?" * 9, "n": n} for i, n in enumerate(numbers)]
    rules = [Rule("s", "even", lambda row: row["n"] % 2 == 0), Rule("s", "small", lambda row: row["n"] < 5)]
    kept, steps = apply_rules(rows, rules)
    assert kept == [row for row in rows if row["n"] in (0, 2, 4)]
    assert [steps[0].rows_in, steps[0].rows_out] == [len(rows), steps[1].rows_in] and steps[1].rows_out == len(kept)
    assert len(steps[0].dropped) == min(3, steps[0].rows_in - steps[0].rows_out)
    for step, line in zip(steps, funnel_rows(steps, rows)):
        assert tuple(line["dropped"].split()) == step.dropped and line["rows_out"] == step.rows_out
        assert len(line["example"]) <= 60 and "\n" not in line["example"] and bool(line["example"]) == bool(step.dropped)


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
    rows = made(1000, domain=lambda i: "rare" if i < 20 else "common", trace_tokens=lambda i: i % 97)
    longest = ablation_set(rows, "longest", 100, 0)
    assert min(r["trace_tokens"] for r in longest) >= sorted(r["trace_tokens"] for r in rows)[-100]
    assert Counter(r["domain"] for r in ablation_set(rows, "diverse", 30, 0))["rare"] > 8
    assert Counter(r["domain"] for r in ablation_set(rows, "random", 100, 0))["rare"] < 8
    assert sorted(names(ablation_set(rows, "full", 1, 0))) == names(rows)
    for kind in ("random", "diverse", "longest"):
        chosen = ablation_set(rows, kind, 100, 0)
        assert len(set(names(chosen))) == 100 and {row["how"] for row in chosen} == {f"ablation: {kind}"}
        assert names(chosen) != names(ablation_set(rows, kind, 100, 1))
    for kind, size, words in (("best", 1, "unknown; wanted one of random"), ("random", 1001, "cannot select 1001")):
        with pytest.raises(S1Error, match=words):
            ablation_set(rows, kind, size, 0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_pool_of_the_papers_size(algorithm):
    rng = random.Random(0)
    rows = made(59_029, domain=lambda i: f"d{int(51 * rng.random() ** 2)}", source_type=lambda i: [AIME, GPQA, OTHER][i % 3],
                trace_tokens=lambda i: rng.randrange(300, 9000))
    chosen = select(rows, names(rows[:393]), 1000, 0, algorithm)
    assert len(set(names(chosen))) == 1000 and sum(row["how"] == PICK for row in chosen) == 393
