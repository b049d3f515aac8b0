"""Traces: nothing lost, nothing doubled, whatever happens to the process or to the line."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1book.config import S1Error, item_seed, load_preset, read_jsonl
from s1book.traces import (
    Retry,
    ask,
    collect,
    open_teacher,
    progress,
    put_aside,
    recorded,
    settle,
    teacher_name,
    trace_facts,
)

ROWS = [
    {"question_hash": f"{i:016x}", "question": f"question {i}", "answer": str(i % 10)}
    for i in range(300)
]


def teach(row, seed):
    """A teacher whose reply shows the row and the seed it was asked with."""
    return f"So {row['question']} {seed}", row["answer"]


# A child process that collects slowly and can be killed; prints nothing, imports no heavy library.
CHILD = """
import json, pathlib, sys, time
from s1book.traces import collect
rows = json.loads(pathlib.Path("rows.json").read_text())
def slowly(row, seed):
    time.sleep(0.003)
    return f"So {row['question']} {seed}", row["answer"]
collect(rows, slowly, pathlib.Path("traces.jsonl"), 7, "t")
"""


def kill_after(folder, size):
    """Start the child, SIGKILL it once its file has `size` bytes; True if it was still at work."""
    child = subprocess.Popen([sys.executable, "-c", CHILD], cwd=folder)
    path, deadline = folder / "traces.jsonl", time.monotonic() + 60
    while child.poll() is None and not (path.exists() and path.stat().st_size >= size):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    alive = child.poll() is None
    child.kill()
    assert child.wait() == (-signal.SIGKILL if alive else 0)
    return alive


def test_killed_twice_then_finished_equals_never_killed(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert kill_after(tmp_path, 3_000)
    first = (tmp_path / "traces.jsonl").read_bytes()
    assert kill_after(tmp_path, len(first) + 5_000)
    assert (
        (tmp_path / "traces.jsonl").read_bytes().startswith(first)
    )  # nothing written is touched again
    there = len(read_jsonl(tmp_path / "traces.jsonl"))
    assert 0 < there < len(ROWS)
    assert collect(ROWS, teach, tmp_path / "traces.jsonl", 7, "t") == len(ROWS) - there
    collect(ROWS, teach, tmp_path / "plain.jsonl", 7, "t")
    assert (tmp_path / "traces.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()


@pytest.mark.parametrize("cut", [1, 20, 70])
def test_torn_last_line_is_asked_again(tmp_path, cut):
    path, calls = tmp_path / "traces.jsonl", []
    collect(ROWS[:20], teach, path, 7, "t")
    whole = path.read_bytes()
    os.truncate(path, len(whole) - cut)

    def counting(row, seed):
        calls.append(row["question_hash"])
        return teach(row, seed)

    # A record that only lacks its newline is whole; any other is asked again, and only that one.
    assert collect(ROWS[:20], counting, path, 7, "t") == len(calls) == (0 if cut == 1 else 1)
    assert read_jsonl(path) == [json.loads(line) for line in whole.splitlines()]


def test_torn_middle_line_is_refused_with_its_place(tmp_path):
    path = tmp_path / "traces.jsonl"
    collect(ROWS[:3], teach, path, 7, "t")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:30] + b"\n" + lines[2])
    with pytest.raises(S1Error, match=r"traces.jsonl, line 2"):
        collect(ROWS[:3], teach, path, 7, "t")


def test_doubled_question_is_refused(tmp_path):
    path = tmp_path / "traces.jsonl"
    collect(ROWS[:3], teach, path, 7, "t")
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(S1Error, match="twice"):
        collect(ROWS[:3], teach, path, 7, "t")


@given(st.permutations(range(12)), st.integers(0, 12))
def test_a_trace_depends_on_seed_and_question_only(order, stop):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.jsonl"
        collect([ROWS[i] for i in order[:stop]], teach, path, 3, "t")
        collect([ROWS[i] for i in order], teach, path, 3, "t")
        got = {r["question_hash"]: r["trace"] for r in read_jsonl(path)}
    assert got == {
        r["question_hash"]: teach(r, item_seed(3, r["question_hash"]))[0] for r in ROWS[:12]
    }


def test_same_question_twice_in_the_pool_is_asked_once(tmp_path):
    assert collect(ROWS[:5] + ROWS[:5], teach, tmp_path / "t.jsonl", 0, "t") == 5


# -- failures --


def failing(errors):
    """A teacher that raises the errors one after the other and then answers."""
    left = list(errors)

    def teach_badly(row, seed):
        if left:
            raise left.pop(0)
        return teach(row, seed)

    return teach_badly


def test_transient_failures_end_and_do_not_change_the_record():
    slept = []
    clean = ask(teach, ROWS[0], 5)
    assert (
        ask(
            failing([ConnectionError("a"), TimeoutError("b")]),
            ROWS[0],
            5,
            Retry(3, 2.0),
            slept.append,
        )
        == clean
    )
    assert slept == [2.0, 4.0] and clean["error"] is None
    gone = ask(failing([OSError("x")] * 9), ROWS[0], 5, Retry(3, 2.0), slept.append)
    assert (
        gone["trace"] is gone["attempt"] is None and "3 tries" in gone["error"] and len(slept) == 4
    )


def test_refusal_is_final_and_a_bug_stops():
    slept = []
    refused = ask(failing([S1Error("no")] * 9), ROWS[0], 5, Retry(), slept.append)
    assert refused["error"] == "S1Error: no" and refused["trace"] is None and not slept
    with pytest.raises(ZeroDivisionError):
        ask(failing([ZeroDivisionError()]), ROWS[0], 5)


@pytest.mark.parametrize("reply", [("", "3"), ("So 3", " \n"), (None, "3"), ("So 3", None)])
def test_empty_reply_is_a_failure(reply):
    record = ask(lambda row, seed: reply, ROWS[0], 0)
    assert (
        record["error"].startswith("S1Error: empty")
        and record["trace"] is record["attempt"] is None
    )


def test_errors_are_records_and_can_be_asked_again(tmp_path):
    path = tmp_path / "t.jsonl"

    def bad(row, seed):
        if int(row["answer"]) % 5 == 0:
            raise S1Error("no")
        return teach(row, seed)

    assert collect(ROWS[:20], bad, path, 0, "t") == 20
    assert sum(r["error"] is not None for r in read_jsonl(path)) == 4
    assert collect(ROWS[:20], teach, path, 0, "t") == 0  # a failure is kept, not repeated unasked
    assert collect(ROWS[:20], teach, path, 0, "t", again=True) == 4
    records = read_jsonl(path)
    assert len(records) == 20 and not any(r["error"] for r in records)
    assert sum(bool(r["error"]) for r in read_jsonl(tmp_path / "t.aside.jsonl")) == 4


# -- what does not belong --


def test_other_teacher_or_pool_goes_aside_and_is_not_lost(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    collect(ROWS[:10], teach, path, 0, "old")
    assert collect(ROWS[:10], teach, path, 0, "new") == 10
    assert "10 records of another teacher" in capsys.readouterr().out
    assert {r["teacher"] for r in read_jsonl(path)} == {"new"}
    assert {r["teacher"] for r in read_jsonl(tmp_path / "t.aside.jsonl")} == {"old"}
    assert collect(ROWS[5:12], teach, path, 0, "new") == 2  # five questions left the pool
    assert {r["question_hash"] for r in read_jsonl(path)} == {
        r["question_hash"] for r in ROWS[5:12]
    }
    assert len(read_jsonl(tmp_path / "t.aside.jsonl")) == 15


def test_settle_of_nothing(tmp_path):
    assert settle(tmp_path / "none.jsonl", {"a"}, "t") == set()
    put_aside(tmp_path / "x.jsonl", [{"a": 1}], [])
    assert read_jsonl(tmp_path / "x.jsonl") == [] and read_jsonl(tmp_path / "x.aside.jsonl") == [
        {"a": 1}
    ]


def test_teacher_name_changes_with_seed_and_settings():
    names = {
        teacher_name(load_preset("h100", o)) for o in ([], ["seed=1"], ["teacher.temperature=0.5"])
    }
    assert len(names) == 3 and all(name.startswith("deepseek-r1@") for name in names)


# -- teachers and facts --


def test_recorded_teacher_reads_the_columns_of_its_model():
    row = {
        "metadata": json.dumps(
            {
                "deepseek_thinking_trajectory": "t",
                "deepseek_attempt": "a",
                "gemini_thinking_trajectory": "gt",
                "gemini_attempt": "ga",
            }
        )
    }
    assert open_teacher(load_preset("h100"))(row, 0) == ("t", "a")
    assert recorded(row, 0, "gemini") == ("gt", "ga")
    for metadata in (None, "{}", '{"deepseek_attempt": "a"}'):
        with pytest.raises(S1Error, match="deepseek_thinking_trajectory"):
            partial(recorded, model="deepseek-r1")({"metadata": metadata}, 0)


def test_unknown_teacher_is_refused():
    with pytest.raises(S1Error, match="teacher.kind: found 'openai'"):
        open_teacher(load_preset("tiny", ["teacher.kind=openai"]))


@pytest.mark.parametrize(
    ("attempt", "wrong"), [("3", False), ("Answer: 3", False), ("Answer: 4", True), ("3.", True)]
)
def test_facts(attempt, wrong):
    record = {
        "question_hash": "h",
        "trace": "In fours\nSo 4\nWait\nIn pairs\nWait, no.\nWaiting So 3",
        "attempt": attempt,
    }
    facts = trace_facts(record, "3", lambda text: len(text.split()))
    assert (facts.tokens, facts.waits, facts.wrong) == (12, 2, wrong)


def test_progress_names_no_time_once_complete():
    assert progress(10, 10, 1, 3.2) == "10 asked, 1 failed"
    assert progress(5, 20, 1, 10.0).endswith("about 30 s left")


def test_many_traces_take_seconds(tmp_path):
    rows = [{"question_hash": f"{i:016x}", "question": "q", "answer": "3"} for i in range(6_000)]
    started = time.process_time()
    collect(rows, teach, tmp_path / "t.jsonl", 0, "t")
    assert collect(rows, teach, tmp_path / "t.jsonl", 0, "t") == 0
    assert time.process_time() - started < 10  # a quarter of the tiny pool; measured: below 2 s
