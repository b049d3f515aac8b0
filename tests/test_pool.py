"""The pool: names, sources, duplicates, the ledger, files."""

import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings, strategies as st

from s1book.config import S1Error, load_preset
from s1book.pool import (
    COLUMNS, SCHEMA, Collected, Source, check_row, collect, first_of_each, jaccard, marks, near_duplicates,
    question_hash, read_rows, read_source, shingles, write_account, write_rows,
)
from s1book.sources import dataset_source, sources_for


def row(question, **fields):
    return dict.fromkeys(COLUMNS) | {"question": question, "source_type": "test"} | fields


def named(questions):
    return [{"question_hash": question_hash(q), **row(q)} for q in questions]


def source(name, rows):
    return Source(name, lambda: rows, ("question",), lambda raw: row(raw["question"], source_type=name))


def test_hash_is_the_start_of_sha256():
    # FIPS 180-2 gives the digest of "abc".
    assert question_hash("abc") == "ba7816bf8f01cfea"
    assert question_hash("\u00e9") != question_hash("e\u0301")  # the same letter, composed and not


@given(st.lists(st.text(alphabet="ab", max_size=2), max_size=30))
def test_first_of_each_agrees_with_the_double_loop(texts):
    rows = [{"question": text, "question_hash": question_hash(text), "at": i} for i, text in enumerate(texts)]
    slow = [r for i, r in enumerate(rows) if r["question"] not in [other["question"] for other in rows[:i]]]
    assert first_of_each(rows) == slow
    assert first_of_each(first_of_each(rows)) == slow


QUESTIONS = st.lists(st.text(alphabet="abc", min_size=1, max_size=2), min_size=1, max_size=12)


@given(st.lists(QUESTIONS, min_size=1, max_size=4), st.randoms())
def test_order_within_a_source_changes_no_question_and_no_credit(texts, rng):
    """Equal questions only: near-duplicates may depend on the order."""
    def pool(lists):
        found = collect([source(str(i), [{"question": q} for q in qs]) for i, qs in enumerate(lists)])
        return {r["question"]: r["source_type"] for r in found.rows}, [line["after_exact"] for line in found.ledger]

    mixed = [rng.sample(qs, len(qs)) for qs in texts]
    assert pool(texts) == pool(mixed)
    credited, _ = pool(texts)
    assert all(q in texts[int(name)] and not any(q in qs for qs in texts[:int(name)]) for q, name in credited.items())


def test_the_ledger_counts_every_step_and_credits_the_first():
    longer = "please find the sum of all made up numbers below twelve and say why"
    found = collect([source("one", [{"question": q} for q in ("a", "a", "b", longer)]),
                     source("two", [{"question": q} for q in ("b", "c", longer.upper())])], near=0.8)
    assert [(r["question"], r["source_type"]) for r in found.rows] == [("a", "one"), ("b", "one"), (longer, "one"), ("c", "two")]
    lines = [{k: line[k] for k in ("rows_in", "after_filters", "after_exact", "after_near")} for line in found.ledger]
    assert lines == [{"rows_in": 4, "after_filters": 4, "after_exact": 3, "after_near": 3},
                     {"rows_in": 3, "after_filters": 3, "after_exact": 2, "after_near": 1}]
    [pair] = found.pairs
    assert pair == {"kept": question_hash(longer), "dropped": question_hash(longer.upper()), "similarity": 1.0,
                    "kept_source": "one", "dropped_source": "two"}


def test_a_mapper_may_leave_rows_out():
    odd = Source("odd", lambda: [{"n": n} for n in range(5)], ("n",),
                 lambda raw: row(str(raw["n"])) if raw["n"] % 2 else None)
    rows, raw = read_source(odd)
    assert [r["question"] for r in rows] == ["1", "3"] and raw == 5


def test_a_source_may_choose_among_its_rows():
    some = Source("some", lambda: [{"n": n} for n in range(5)], ("n",), lambda raw: row(str(raw["n"])),
                  lambda rows: list(rows)[-2:])
    rows, raw = read_source(some)
    assert [r["question"] for r in rows] == ["3", "4"] and raw == 5


@pytest.mark.parametrize("bad, words", [
    ({"question": "  "}, "no question text"), ({"question": None}, "no question text"),
    ({"answer": 3}, "field answer"), ({"surprise": "x"}, "surprise")])
def test_a_bad_row_is_refused_with_source_and_field(bad, words):
    with pytest.raises(S1Error, match=f"source here.*{words}"):
        check_row(row("q") | bad, "here")


def test_a_column_that_vanishes_half_way_is_refused():
    rows = [{"question": "a"}, {"text": "b"}]
    with pytest.raises(S1Error, match="source half: column question is missing"):
        read_source(source("half", rows))


@pytest.mark.parametrize("where", ["load", "choose", "to_row"])
def test_whatever_breaks_bears_the_name_of_its_source(where):
    def broken(*_):
        raise KeyError("level")
    parts = dict(load=lambda: [{"question": "a"}], to_row=lambda raw: row(raw["question"]), choose=iter) | {where: broken}
    with pytest.raises(S1Error, match="source here: cannot be read; after [01] rows: KeyError: 'level'"):
        read_source(Source("here", columns=("question",), **parts))


def test_an_interrupted_read_is_not_a_refusal():
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        collect([Source("here", interrupted, (), row)], missing="skip")


def test_a_source_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(S1Error, match="nowhere: cannot be read"):
        read_source(dataset_source(str(tmp_path / "nowhere")))


# Near-duplicates.

WORDS = "red green blue six ten walls stones build find lay the a of in day how many".split()


def slow_near(rows, threshold):
    """Every later row against every row that stays."""
    kept, pairs = [], []
    for r in rows:
        own, its = shingles(r["question"]), marks(r["question"])
        same = [name for name, theirs, other in kept if its == other and jaccard(own, theirs) >= threshold]
        pairs += [(same[0], r["question_hash"])] if same else []
        kept += [] if same else [(r["question_hash"], own, its)]
    return pairs


def changed(text, rng):
    """A text with some words replaced, dropped or added."""
    words = text.split()
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(words) or 1)
        words[at:at + rng.randint(0, 1)] = rng.choices(WORDS, k=rng.randint(0, 1))
    return " ".join(words) or "a"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.7, 0.8, 0.9]))
def test_near_duplicates_are_those_of_the_double_loop(seed, threshold):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(15)]
    texts += [changed(rng.choice(texts), rng) for _ in range(30)]
    rows = first_of_each(named(rng.sample(texts, len(texts))))
    found = near_duplicates(rows, threshold)
    assert [(p["kept"], p["dropped"]) for p in found] == slow_near(rows, threshold)
    gone = {p["dropped"] for p in found}
    left = [r for r in rows if r["question_hash"] not in gone]
    assert not near_duplicates(left, threshold)  # a second time finds nothing
    place = {r["question_hash"]: i for i, r in enumerate(rows)}
    assert all(place[p["kept"]] < place[p["dropped"]] and p["kept"] not in gone for p in found)
    assert all(p["similarity"] >= threshold for p in found)


def test_the_search_misses_nothing_in_a_larger_pool():
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(20, 60))) for _ in range(400)]
    rows = first_of_each(named(texts + [changed(text, rng) for text in texts]))
    found = near_duplicates(rows, 0.8)
    assert [(p["kept"], p["dropped"]) for p in found] == slow_near(rows, 0.8) and len(found) > 100


@pytest.mark.parametrize("other, same", [
    ("find X, please: the sum of all made up walls below 12 + 3", True), ("FIND x please the sum of all made-up walls below 12 + 3", False),
    ("find x please the sum of all made up walls below 13 + 3", False), ("find x please the sum of all made up walls below 12 - 3", False),
    ("find $x$ please the sum of all made up walls below 12+3.", True), ("find y please the sum of all those walls below 12 + 3", False)])
def test_what_counts_as_nearly_equal(other, same):
    text = "find x please the sum of all made up walls below 12 + 3"
    assert bool(near_duplicates(named([text, other]), 0.8)) == same


@pytest.mark.parametrize("texts", [["?", "!"], ["?!", "?!?"], ["\u2211", "\u222b"], ["two words", "two wards"], ["a", "b"]])
def test_short_texts_and_texts_without_words_are_not_alike(texts):
    assert near_duplicates(named(texts), 0.6) == []
    assert all(shingles(text) for text in texts)


def test_the_same_pairs_in_every_process():
    """Python's own hash of a text changes from process to process; the sketches must not."""
    code = ("import sys; sys.path.insert(0, 'tests'); from test_pool import *; rng = random.Random(3);"
            "texts = [' '.join(rng.choices(WORDS[:3], k=9)) for _ in range(300)];"
            "print([(p['kept'], p['dropped'], p['similarity']) for p in near_duplicates(named(texts), 0.7)])")
    outputs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert len(outputs) == 1 and len(outputs.pop()) > 10


def test_exact_only_is_what_tiny_says_and_changes_nothing():
    preset = load_preset("tiny")
    sources = sources_for(preset.pool, 0)
    assert preset.pool.near == 0 == load_preset("h100").pool.near
    found = collect([type(sources[0])(sources[0].name, lambda: list(sources[0].load())[:3000], *[
        getattr(sources[0], f) for f in ("columns", "to_row", "choose")])], preset.pool.near)
    assert found.pairs == [] and found.ledger[0]["after_exact"] == found.ledger[0]["after_near"] == len(found.rows)


def test_the_recorded_pool_is_the_pool_of_the_preset():
    from s1book.config import project_root
    found = collect(sources_for(load_preset("tiny").pool, 0))
    assert found.rows == read_rows(project_root() / "data/reference/pool.parquet")


def test_collecting_does_not_slow_down_with_the_number_of_sources():
    import time

    def seconds(parts):
        texts = [{"question": f"q {i}"} for i in range(20_000)]
        started = time.process_time()
        collect([source(str(i), texts[i::parts]) for i in range(parts)])
        return time.process_time() - started

    assert seconds(400) < 5 * seconds(2) + 0.5


# Files.

def test_rows_come_back_with_their_missing_values(tmp_path):
    rows = named(("a", "b\n"))
    assert read_rows(write_rows(rows, tmp_path / "pool.parquet")) == rows
    assert read_rows(tmp_path / "pool.parquet")[0]["solution"] is None


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_rows(named(["old"]), tmp_path / "pool.parquet")
    with pytest.raises(Exception):
        write_rows([{"question_hash": "1", **row("new", answer=3)}], path)
    assert [r["question"] for r in read_rows(path)] == ["old"] and len(list(tmp_path.iterdir())) == 1


def test_the_account_is_written_and_a_failed_one_leaves_the_old(tmp_path):
    found = collect([source("one", [{"question": q} for q in ("a b c d e f g h", "A b c d e f g h")])], near=0.6)
    ledger, pairs = tmp_path / "ledger.csv", tmp_path / "pairs.csv"
    write_account(found, ledger, pairs)
    assert ledger.read_text().splitlines() == ["source,rows_in,after_filters,after_exact,after_near,refused", "one,2,2,2,1,"]
    head, line = pairs.read_text().splitlines()
    assert dict(zip(head.split(","), line.split(","), strict=True)) == {k: str(v) for k, v in found.pairs[0].items()}
    before = {path: path.read_bytes() for path in (ledger, pairs)}
    with pytest.raises(ValueError):
        write_account(Collected([], found.ledger, [{"surprise": 1}]), ledger, pairs)
    with pytest.raises(ValueError):
        write_account(Collected([], [*found.ledger, {"surprise": 1}], []), ledger, pairs)
    assert {path: path.read_bytes() for path in (ledger, pairs)} == before and len(list(tmp_path.iterdir())) == 2
    write_account(collect([source("one", [{"question": "a"}])]), ledger, pairs)
    assert pairs.read_text() == head + "\n"  # no pairs, but no empty file either: that would count as damaged


def test_a_full_disk_is_said_in_a_sentence(tmp_path, monkeypatch):
    import errno

    path = write_rows(named(["old"]), tmp_path / "pool.parquet")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(S1Error, match="the disk is full"):
        write_rows(named(["new"]), path)
    assert [r["question"] for r in read_rows(path)] == ["old"] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_torn_file_is_refused_by_name(tmp_path, keep):
    path = write_rows(named(["q"]), tmp_path / "pool.parquet")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(S1Error, match="pool.parquet cannot be read"):
        read_rows(path)


def test_a_missing_column_is_refused_by_name(tmp_path):
    path = write_rows([], tmp_path / "pool.parquet", SCHEMA)
    with pytest.raises(S1Error, match="pool.parquet: column trace is missing"):
        read_rows(path, wanted=("question", "trace"))


def test_the_tiny_source_depends_on_nothing_but_its_seed():
    pools = {seed: sources_for(load_preset("tiny", ["pool.size=1000"]).pool, seed)[0] for seed in (5, 6)}
    assert read_source(pools[5]) == read_source(pools[5]) != read_source(pools[6])
    assert all(r["domain"] for r in read_source(pools[5])[0])
