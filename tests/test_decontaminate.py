"""Decontamination: s1's verdicts exactly, and the evidence for each."""

import json
import re

import pytest
from hypothesis import given, strategies as st

from s1book.config import S1Error
from s1book.decontaminate import (
    build_index, coverage, find_leak, find_leaks, ngrams, shared_runs, slow_verdicts, words_of, write_leaks,
)

# Few words, so that runs are shared often; odd spaces and capitals, so that normalising matters.
TEXT = st.lists(st.sampled_from(["a", "A", "b", "b?", "c", " ", "\t", "\n", "\u00a0", "\u2003"]), max_size=14).map(" ".join)


def rows(texts, benchmark="bench"):
    return [{"question": text, "benchmark": benchmark, "id": f"{benchmark}-{i}"} for i, text in enumerate(texts)]


def pool_row(text, name="0"):
    return {"question": text, "question_hash": name}


@given(st.text())
def test_words_are_the_reference_normalisation(text):
    reference = re.sub(r"\s+", " ", text.lower().strip())
    assert words_of(text) == reference.split()


@given(st.lists(TEXT, max_size=8), st.lists(TEXT, min_size=1, max_size=4), st.integers(2, 5))
def test_the_index_gives_the_verdicts_of_the_slow_twin(pool, benchmark, n):
    index = build_index(rows(benchmark), n)
    fast = {number for number, question in enumerate(pool) if shared_runs(question, index)}
    assert fast == slow_verdicts(pool, benchmark, n)
    leaks = find_leaks([pool_row(text, str(i)) for i, text in enumerate(pool)], index)
    assert {int(leak.question_hash) for leak in leaks if leak.rule == "n-gram"} == fast


@given(st.lists(TEXT, max_size=8), st.lists(TEXT, min_size=1, max_size=4), st.integers(2, 5))
def test_every_verdict_carries_evidence_that_holds(pool, benchmark, n):
    named = rows(benchmark)
    text_of = {row["id"]: row["question"] for row in named}
    for text in pool:
        leak = find_leak(pool_row(text), build_index(named, n))
        if leak is None:
            continue
        words, item = words_of(text), words_of(text_of[leak.id])
        if leak.rule == "exact":
            assert words == item and len(words) < n and leak.coverage == 1
            continue
        assert words[leak.start:leak.start + n] == leak.ngram.split(" ")
        shared = set(ngrams(words, n)) & {run for row in named for run in ngrams(words_of(row["question"]), n)}
        best = max(coverage(words_of(row["question"]), shared, n) for row in named if row["question"].strip())
        assert leak.coverage == round(best, 4) and 0 < leak.coverage <= 1
        assert leak.items == sum(bool(shared & set(ngrams(words_of(row["question"]), n))) for row in named)


def test_one_shared_run_is_enough_and_seven_words_are_not():
    index = build_index(rows(["one two three four five six seven eight nine"]))
    assert find_leak(pool_row("so ONE two  three four\nfive six seven eight"), index)
    assert find_leak(pool_row("one two three four five six seven other nine"), index) is None


def test_a_short_question_has_no_run_but_an_exact_copy_goes():
    short = "What is 2 + 2 ?"
    index = build_index(rows([short]))
    assert slow_verdicts([short], [short]) == set()
    assert find_leak(pool_row("what IS 2  + 2 ?"), index).rule == "exact"
    assert find_leak(pool_row("What is 2 + 3 ?"), index) is None


def test_punctuation_stays_on_its_word():
    words = [f"w{i}" for i in range(9)]
    index = build_index(rows([" ".join(words)]))
    assert find_leak(pool_row(" ".join(words[:4]) + ", " + " ".join(words[4:])), index) is None


def test_evidence_names_the_item_that_is_covered_most():
    words = [f"w{i}" for i in range(20)]
    index = build_index(rows([" ".join(words[:8] + ["x"] * 9), " ".join(words[:10])]))
    leak = find_leak(pool_row("please " + " ".join(words)), index)
    assert (leak.id, leak.start, leak.items, leak.coverage) == ("bench-1", 1, 2, 1.0)


def test_the_verdicts_do_not_depend_on_the_order_of_the_pool():
    index = build_index(rows(["a b c d e f g h i", "q r s t u v w x y"]))
    pool = [pool_row("a b c d e f g h", "1"), pool_row("z", "2"), pool_row("r s t u v w x y z", "3")]
    assert find_leaks(pool[::-1], index) == find_leaks(pool, index)[::-1] and len(find_leaks(pool, index)) == 2


@pytest.mark.parametrize("bad, words", [
    ([], "no benchmark questions"), ([{"question": "q", "benchmark": "b"}], "row 0 has no id"),
    ([{"question": None, "benchmark": "b", "id": "1"}], "row 0 has no question")])
def test_benchmarks_that_cannot_be_named_are_refused(bad, words):
    with pytest.raises(S1Error, match=words):
        build_index(bad)


def test_leaks_are_written_one_per_line(tmp_path):
    leak = find_leak(pool_row("a b c d e f g \u00e9"), build_index(rows(["a b c d e f g \u00e9"])))
    lines = write_leaks([leak, leak], tmp_path / "leaks.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["ngram"] == "a b c d e f g \u00e9"
