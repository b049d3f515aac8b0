"""Published benchmarks: the hub's columns, from a local copy, whole and in a fixed order."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book.benchmarks import BENCHMARKS, CHOICES, benchmark_rows, read_benchmark, write_benchmarks
from s1book.cli import main
from s1book.config import Run, S1Error, read_jsonl
from s1book.evaluate import check_rows
from s1book.grade import grade
from s1book.pool import question_hash
from s1book.sources import Store


def raw(name, i):
    """A made-up row with the columns that the hub has."""
    if name == "gpqa_diamond":
        return {
            "Question": f"Made-up question {i}?",
            "Explanation": "why",
            "Subdomain": "Genetics",
            "High-level domain": "Biology",
            "Record ID": f"rec{i}",
            **{column: f"option {i} {j}" for j, column in enumerate(CHOICES)},
        }
    row = {
        "id": i,
        "problem": f"Made-up problem {i}",
        "solution": "so",
        "answer": str(i),
        "url": "u",
    }
    if name == "aime25":
        return {"question": row["problem"], "answer": i}
    return row | (
        {"subject": "Algebra", "level": 3, "unique_id": f"test/{i}"} if name == "math500" else {}
    )


def raws(name):
    return [raw(name, i) for i in range(BENCHMARKS[name].questions)]


@pytest.fixture
def copies(tmp_path):
    """A folder with copies of the four datasets, as files that the datasets library reads."""
    for name, wanted in BENCHMARKS.items():
        folder = tmp_path / "copies" / wanted.part.path / (wanted.part.config or "")
        folder.mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in raws(name))
        (folder / f"{wanted.part.split}.jsonl").write_text(text)
    return str(tmp_path / "copies")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_are_ready_to_be_asked_and_graded(name):
    rows = benchmark_rows(name, raws(name))
    assert check_rows(name, rows) == rows and len(rows) == BENCHMARKS[name].questions
    assert all(grade(row, f"Answer: {row['answer']}").correct for row in rows[:5])
    asked = raw(name, 3).get("Question") or f"Made-up problem {3}"
    assert rows[3]["id"] == f"{name}-{question_hash(asked)}"
    domains = {"math500": "Algebra", "gpqa_diamond": "Genetics"}
    assert rows[0]["domain"] == domains.get(name, "mathematics")


def test_the_right_letter_is_spread_and_follows_from_the_texts():
    rows = benchmark_rows("gpqa_diamond", raws("gpqa_diamond"))
    letters = Counter(row["answer"] for row in rows)
    assert (
        set(letters) == set("ABCD") and max(letters.values()) < 75
    )  # a quarter of 198, five sigma
    for i, row in enumerate(rows):
        assert f"({row['answer']}) option {i} 0" in row["question"]
    assert {r["id"]: r["question"] for r in rows} == {
        r["id"]: r["question"] for r in benchmark_rows("gpqa_diamond", raws("gpqa_diamond")[::-1])
    }


@given(st.permutations(CHOICES[1:]))
@settings(max_examples=6)
def test_the_order_of_the_wrong_options_changes_nothing(order):
    rows = raws("gpqa_diamond")
    shuffled = [row | {a: row[b] for a, b in zip(CHOICES[1:], order)} for row in rows]
    assert benchmark_rows("gpqa_diamond", rows) == benchmark_rows("gpqa_diamond", shuffled)


def test_a_fault_is_refused_in_one_sentence():
    rows = raws("aime24")
    for bad, said in (
        (rows[:-1], "found 29 questions"),
        ([*rows[:-1], rows[0]], "1 of them more than once"),
        ([*rows[:2], {"problem": "x"}], "row 3: found no answer"),
    ):
        with pytest.raises(S1Error, match=f"aime24_nofigures.*{said}"):
            benchmark_rows("aime24", bad)
    with pytest.raises(S1Error, match="wanted aime24, aime25"):
        read_benchmark("aime23")


def test_the_command_writes_what_chapters_read(copies, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("S1BOOK_RUN", str(tmp_path / "run"))
    try:
        main(["benchmarks", "--copies", copies])
    except SystemExit as end:
        assert not end.code
    assert capsys.readouterr().out.splitlines() == [
        "aime24: 30 questions",
        "math500: 500 questions",
        "gpqa_diamond: 198 questions",
    ]
    run = Run.open("h100")
    assert len(read_jsonl(run.read("benchmarks/gpqa_diamond.jsonl"))) == 198
    assert write_benchmarks(Run.open("h100", ["evaluate.benchmarks=[aime25]"]), Store(copies)) == {
        "aime25": 30
    }


def test_a_missing_copy_writes_nothing(copies, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setenv("S1BOOK_RUN", str(tmp_path / "run"))
    shutil.rmtree(f"{copies}/Idavidrein")
    with pytest.raises(S1Error, match="Idavidrein/gpqa: the folder gave no split train"):
        write_benchmarks(Run.open("h100"), Store(copies))
    assert not list((tmp_path / "run").rglob("*.jsonl"))
