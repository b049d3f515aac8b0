"""The pool: names, sources, duplicates, files."""

import json

import pytest
from hypothesis import given, strategies as st

from s1book.config import S1Error
from s1book.pool import (
    COLUMNS, SCHEMA, Source, check_row, collect, dataset_source, first_of_each, from_s1k,
    question_hash, read_rows, rows_of, sources_for, write_rows,
)

PUBLISHED = {"question": "What is 1 plus 1?", "solution": "2", "source_type": "made/up", "cot_type": "math",
             "deepseek_thinking_trajectory": "one and one", "deepseek_attempt": "Answer: 2"}


def row(question, **fields):
    return dict.fromkeys(COLUMNS) | {"question": question, "source_type": "test"} | fields


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


def test_collect_counts_per_source_and_credits_the_first():
    pool, ledger = collect([source("one", [{"question": q} for q in "aab"]),
                            source("two", [{"question": q} for q in "bc"])])
    assert [(r["question"], r["source_type"]) for r in pool] == [("a", "one"), ("b", "one"), ("c", "two")]
    assert ledger == [{"source": "one", "rows_in": 3, "rows_out": 2},
                      {"source": "two", "rows_in": 2, "rows_out": 1}]


def test_a_mapper_may_leave_rows_out():
    odd = Source("odd", lambda: [{"n": n} for n in range(5)], ("n",),
                 lambda raw: row(str(raw["n"])) if raw["n"] % 2 else None)
    assert [r["question"] for r in rows_of(odd)] == ["1", "3"]


@pytest.mark.parametrize("bad, words", [
    ({"question": "  "}, "no question text"), ({"question": None}, "no question text"),
    ({"answer": 3}, "field answer"), ({"surprise": "x"}, "surprise")])
def test_a_bad_row_is_refused_with_source_and_field(bad, words):
    with pytest.raises(S1Error, match=f"source here.*{words}"):
        check_row(row("q") | bad, "here")


@pytest.mark.parametrize("lost", ["question", "solution", "cot_type", "source_type"])
def test_a_changed_column_is_refused_by_name(tmp_path, lost):
    changed = {("renamed" if name == lost else name): value for name, value in PUBLISHED.items()}
    (tmp_path / "rows.jsonl").write_text(json.dumps(changed) + "\n")
    with pytest.raises(S1Error, match=f"column {lost} is missing; found .*renamed"):
        list(rows_of(dataset_source(str(tmp_path))))


def test_a_column_that_vanishes_half_way_is_refused():
    rows = [{"question": "a"}, {"text": "b"}]
    with pytest.raises(S1Error, match="source half: column question is missing"):
        list(rows_of(source("half", rows)))


def test_a_source_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(S1Error, match="nowhere: cannot be loaded"):
        list(rows_of(dataset_source(str(tmp_path / "nowhere"))))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "save_to_disk"])
def test_published_rows_from_a_local_folder(tmp_path, kind):
    from datasets import Dataset

    data = Dataset.from_list([PUBLISHED, PUBLISHED | {"question": "What is 2 plus 2?", "solution": "4"}])
    if kind == "save_to_disk":
        data.save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        data.to_parquet(tmp_path / "set" / "x.parquet") if kind == "parquet" else data.to_json(tmp_path / "set" / "x.jsonl")
    [hub] = sources_for(str(tmp_path / "set"), 2, 0)
    first, second = rows_of(hub)
    assert first["answer"] == first["solution"] == "2" and first["domain"] == "math"
    assert first["question_hash"] == question_hash(PUBLISHED["question"]) and second["answer"] == "4"
    assert json.loads(first["metadata"])["deepseek_attempt"] == "Answer: 2"


def test_from_s1k_keeps_text_as_it_is():
    assert from_s1k(PUBLISHED | {"question": "a\r\nb  "})["question"] == "a\r\nb  "


def test_rows_come_back_with_their_missing_values(tmp_path):
    rows = [{"question_hash": question_hash(q), **row(q)} for q in ("a", "b\n")]
    assert read_rows(write_rows(rows, tmp_path / "pool.parquet")) == rows
    assert read_rows(tmp_path / "pool.parquet")[0]["solution"] is None


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_rows([{"question_hash": "0", **row("old")}], tmp_path / "pool.parquet")
    with pytest.raises(Exception):
        write_rows([{"question_hash": "1", **row("new", answer=3)}], path)
    assert [r["question"] for r in read_rows(path)] == ["old"] and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_torn_file_is_refused_by_name(tmp_path, keep):
    path = write_rows([{"question_hash": "0", **row("q")}], tmp_path / "pool.parquet")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(S1Error, match="pool.parquet cannot be read"):
        read_rows(path)


def test_a_missing_column_is_refused_by_name(tmp_path):
    path = write_rows([], tmp_path / "pool.parquet", SCHEMA)
    with pytest.raises(S1Error, match="pool.parquet: column trace is missing"):
        read_rows(path, wanted=("question", "trace"))


def test_the_tiny_source_depends_on_nothing_but_its_seed():
    [tiny] = sources_for("tiny", 300, 5)
    [other] = sources_for("tiny", 300, 6)
    assert list(rows_of(tiny)) == list(rows_of(tiny)) != list(rows_of(other))
    assert all(r["domain"] for r in rows_of(tiny))
