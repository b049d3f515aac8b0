"""Traces: nothing lost, nothing doubled, whatever happens to the process, the line or the server."""

import asyncio
import email.utils
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from bad_server import PROMPT, REPLY, USD_IN, USD_OUT, BadServer
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book import traces
from s1book.asking import ask_server
from s1book.client import (
    Bill, Client, Purse, Reply, Stop, Transient, forecast, most_tokens, read_reply, refusal, scrub,
    seconds_until, split_thinking, usd_of,
)
from s1book.config import Run, S1Error, Server, item_seed, load_preset, read_jsonl
from s1book.pool import COLUMNS, write_rows
from s1book.preflight import doctor
from s1book.store import alone, duration, progress, put_aside, share_out
from s1book.traces import ask as ask_waiting
from s1book.traces import collect as collect_from
from s1book.traces import local, open_teacher, patient, recorded, settle, teacher_name

ROWS = [
    {"question_hash": f"{i:016x}", "question": f"question {i}", "answer": str(i % 10)}
    for i in range(300)
]


def teach(row, seed):
    """A teacher whose reply shows the row and the seed it was asked with."""
    return f"So {row['question']} {seed}", row["answer"]


def collect(rows, function, *args, **options):
    """Collect from a plain function."""
    return collect_from(rows, local(function), *args, **options)


def ask(function, row, seed, tries=4, wait=1.0, slept=None):
    """Ask a plain function once, without sleeping."""

    async def sleep(seconds):
        (slept if slept is not None else []).append(seconds)

    teacher = local(function)
    object.__setattr__(teacher, "retrying", patient(tries, wait, sleep))
    return asyncio.run(ask_waiting(teacher, row, seed))


# A child process that collects slowly and can be killed; prints nothing, imports no heavy library.
CHILD = """
import json, pathlib, sys, time
from s1book.traces import collect, local
rows = json.loads(pathlib.Path("rows.json").read_text())
def slowly(row, seed):
    time.sleep(60 if row is rows[250] else 0.003)  # still at work when the signal comes, however late
    return f"So {row['question']} {seed}", row["answer"]
collect(rows, local(slowly), pathlib.Path("traces.jsonl"), 7, "t")
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
    flaky = failing([ConnectionError("a"), TimeoutError("b")])
    assert ask(flaky, ROWS[0], 5, 3, 2.0, slept) == clean
    assert slept == [2.0, 4.0] and clean["error"] is None
    gone = ask(failing([OSError("x")] * 9), ROWS[0], 5, 3, 2.0, slept)
    assert gone["trace"] is gone["attempt"] is None
    assert "3 tries" in gone["error"] and len(slept) == 4


def test_the_server_is_not_asked_before_it_wants_to_be():
    slept = []
    ask(failing([Transient("busy", 7.0), Transient("busy", 0.5)]), ROWS[0], 5, 3, 1.0, slept)
    assert slept == [7.0, 2.0]


def test_refusal_is_final_and_a_bug_or_a_stop_stops():
    slept = []
    refused = ask(failing([S1Error("no")] * 9), ROWS[0], 5, slept=slept)
    assert refused["error"] == "S1Error: no" and refused["trace"] is None and not slept
    for error in (ZeroDivisionError(), Stop("no key")):
        with pytest.raises(type(error)):
            ask(failing([error]), ROWS[0], 5)


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


def test_the_presets_again_asks_failed_questions_anew_in_chapter_04(tmp_path, monkeypatch):
    """The chapter's own cell, with a file in which one question failed."""
    monkeypatch.setenv("S1BOOK_RUN", str(tmp_path))
    cells = json.loads((Path(__file__).parents[1] / "nbs/04_traces.ipynb").read_text())["cells"]
    [cell] = ["".join(c["source"]) for c in cells if "wanted.again" in "".join(c["source"])]
    write_rows([row | dict.fromkeys(COLUMNS[1:]) | {"question": row["question"], "metadata": json.dumps(
        {"deepseek_thinking_trajectory": "So", "deepseek_attempt": "3"})} for row in ROWS[:20]], tmp_path / "decontaminated.parquet")

    def asked(*more):
        overrides = ["teacher.kind=recorded", "teacher.model=deepseek-r1", *more]
        names = vars(traces) | {"run": Run.open("tiny", overrides), "pq": pq, "time": time, "live_line": lambda: print,
                                "forecast": forecast}
        exec(cell, names)
        return names["asked_now"]

    assert asked() == 20 and asked() == 0
    path = tmp_path / "traces.jsonl"
    first, *rest = read_jsonl(path)
    failed = first | {"trace": None, "attempt": None, "error": "TimeoutError: no answer"}
    path.write_text("".join(json.dumps(record) + "\n" for record in (failed, *rest)))
    assert asked() == 0 and asked("teacher.again=true") == 1
    assert [record["error"] for record in read_jsonl(path)] == [None] * 20


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
    assert settle(tmp_path / "none.jsonl", {"a": "t"}) == set()
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
    reply = asyncio.run(open_teacher(load_preset("h100")).ask(row, 0))
    assert reply == Reply("a", "t")
    assert recorded(row, 0, "gemini") == ("gt", "ga")
    for metadata in (None, "{}", '{"deepseek_attempt": "a"}'):
        with pytest.raises(S1Error, match="deepseek_thinking_trajectory"):
            partial(recorded, model="deepseek-r1")({"metadata": metadata}, 0)


def test_progress_names_no_time_once_complete():
    assert progress(10, 10, 1, 3.2) == "10 asked, 1 failed"
    assert progress(10, 10, 1, 3.2, 1.234) == "10 asked, 1 failed, 1.23 US dollars"
    assert progress(5, 20, 1, 10.0) == "5 of 20 asked, 1 failed, about 30 s left"
    assert progress(5, 20, 1, 36_000.0, 0.5) == "5 of 20 asked, 1 failed, 0.50 US dollars, about 30 hours left"


@pytest.mark.parametrize(("seconds", "said"), [(0, "0 s"), (119.4, "119 s"), (120, "2 minutes"), (7_199, "120 minutes"),
                                               (7_200, "2 hours"), (172_800, "2 days")])  # fmt: skip
def test_a_duration_for_people(seconds, said):
    assert duration(seconds) == said


def test_the_slow_teacher_does_not_lose_what_is_under_way_when_another_stops():
    kept = []

    async def work(item):
        await asyncio.sleep(0.2 if item else 0.0)
        if not item:
            raise Stop("the end")
        return {"item": item}

    with pytest.raises(Stop):
        asyncio.run(share_out(range(50), work, kept.append, 4))
    assert [record["item"] for record in kept] == [1, 2, 3]


# -- reading replies --

TEXT = st.text(st.characters(blacklist_characters="<>", blacklist_categories=["Cs"]), max_size=40)


@given(TEXT, TEXT, st.sampled_from(["<think>", "<thought>"]), st.booleans())
def test_thinking_is_cut_at_the_closing_tag(thinking, text, tag, opened):
    content = f"{tag if opened else ''}{thinking}{tag.replace('<', '</')}\n\n{text}"
    assert split_thinking(content, tag) == (thinking.strip(), text.strip())
    assert split_thinking(text, tag) == ("", text)  # without a tag there is no thinking
    assert split_thinking(tag + thinking, tag) == (thinking.strip(), "")  # it ended while thinking


def body_of(message, usage=None, finish="stop"):
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def test_places_of_the_thinking_and_ways_to_count():
    def read(where, message, usage=None, finish="stop"):
        server = Server(like="vllm", thinking=where, usd_in=1.0, usd_out=10.0)
        return read_reply(body_of(message, usage, finish), server, 5.0)

    for name in ("reasoning_content", "reasoning"):
        assert read("field", {"content": "3", name: "So 3"}).thinking == "So 3"
    assert read("none", {"content": "<think>x</think>3"}).text == "<think>x</think>3"
    assert read("field", {"content": None}) == Reply("", "", usd=5.0)  # nothing counted: the most
    usage = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 125}
    assert read("none", {"content": "3"}, usage).tokens_out == 105  # Gemini's way of counting
    assert read("none", {"content": "3"}, usage).usd == pytest.approx(20e-6 + 1050e-6)
    assert read("none", {"content": "3"}, finish="length").cut
    for bad in ({}, {"choices": []}, {"choices": None}, "text"):
        with pytest.raises((LookupError, TypeError)):
            read_reply(bad, Server(like="vllm"), 0.0)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, S1Error), (422, S1Error), (413, S1Error), (401, Stop), (402, Stop), (403, Stop),
     (404, Stop), (408, Transient), (429, Transient), (500, Transient), (503, Transient),
     (529, Transient)],
)  # fmt: skip
def test_what_a_status_means(status, kind):
    assert type(refusal(status, "text")) is kind


def test_a_spent_account_or_a_day_long_pause_stops():
    assert type(refusal(429, "{'code': 'insufficient_quota'}")) is Stop
    assert type(refusal(429, "x", "86400")) is Stop
    assert refusal(429, "x", "3").after == 3.0


def test_retry_after_is_seconds_or_a_date():
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < seconds_until(soon) <= 31
    past = email.utils.formatdate(time.time() - 30, usegmt=True)
    assert [seconds_until(text) for text in ("2", "0.5", "", "soon", "-3", past)] == [2, 0.5] + [0] * 4


@given(TEXT, TEXT)
def test_no_key_survives_scrubbing(before, after):
    key = "sk-a+b/c=1234567"
    quoted = urllib.request.quote(key, safe="")
    clean = scrub(f"{before}{key}{after}{quoted}", key)
    assert key not in clean and quoted not in clean and clean.startswith(before)


# -- money --


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0.01, 3), st.floats(0, 1)), max_size=30), st.integers(1, 6))
def test_the_cap_holds_and_a_kill_is_counted_at_its_worst(requests, workers):
    import tempfile

    async def session(purse):
        left = iter(requests)

        async def worker():
            for most, share in left:
                number = await purse.promise(most)
                assert purse.usd + sum(purse.promised.values()) <= 5.0 + 1e-9
                assert Bill(store).usd == pytest.approx(purse.usd + sum(purse.promised.values()))
                await asyncio.sleep(0)
                purse.settle(number, most * share)

        await asyncio.gather(*(worker() for _ in range(workers)), return_exceptions=True)

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "t.jsonl"
        purse = Purse(store, 5.0)
        asyncio.run(session(purse))
        # Worst case and outcome are different sums, but neither may pass the cap.
        assert purse.usd <= 5.0 + 1e-9 and Bill(store).usd <= 5.0 + 1e-9


def test_a_prompt_has_no_more_tokens_than_bytes_and_a_template():
    assert most_tokens([{"role": "user", "content": "é" * 10}]) == 256 + 20


def test_forecast():
    server = Server(like="vllm", usd_in=2.0, usd_out=4.0, mean_out=100, per_minute=30.0)
    plan = forecast(server, ["abcd" * 25] * 60)
    assert (plan.requests, plan.tokens_in, plan.tokens_out, plan.minutes) == (60, 1500, 6000, 2.0)
    assert plan.usd == pytest.approx(0.027) == usd_of(server, 1500, 6000)


# -- a real server that misbehaves --


def wire(url, **terms):
    """A preset that asks a server on this machine, with prices that the server charges."""
    terms = dict(url=url, usd_in=USD_IN, usd_out=USD_OUT, max_tokens=200, timeout=2.0, wait=0.02,
                 usd_cap=1000.0, concurrency=16, tries=6) | terms  # fmt: skip
    sets = [f"teacher.server.{key}={value}" for key, value in terms.items()]
    return load_preset("tiny", ["teacher.kind=openai", "teacher.model=m", *sets])


def gather(rows, preset, path, **options):
    """Collect from the server of a preset; returns the teacher, which knows what it spent."""
    teacher = open_teacher(preset, path)
    collect_from(rows, teacher, path, 0, teacher_name(preset), **options)
    return teacher


def questions(count):
    return [{"question_hash": f"{i:016x}", "question": f"question {i}"} for i in range(count)]


@contextmanager
def other_process(odds, think=0.0):
    """A bad server in a process of its own: its address, and a function that returns its counts."""
    folder = Path(__file__).parent
    command = [sys.executable, "bad_server.py", json.dumps(odds), str(think)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
    try:
        url = server.stdout.readline().strip()
        yield url, lambda: SimpleNamespace(**json.load(urllib.request.urlopen(url)))
    finally:
        server.kill()
        server.wait()


def whole(path, rows):
    """The records of a store, which must hold every question exactly once."""
    records = read_jsonl(path)
    assert sorted(r["question_hash"] for r in records) == [r["question_hash"] for r in rows]
    return records


def test_five_thousand_requests_to_a_server_that_misbehaves(tmp_path):
    odds = {"429": 0.004, "500": 0.03, "html": 0.01, "drop": 0.02, "half": 0.02, "empty": 0.01,
            "hang": 0.001}  # fmt: skip
    rows, path = questions(5_000), tmp_path / "traces.jsonl"
    with other_process(odds) as (url, counts):
        preset = wire(url, timeout=10.0)  # so long that only a hang exceeds it, also on a busy machine
        teacher = gather(rows, preset, path)
        seen = counts()
        assert set(seen.troubles) == set(odds)  # everything has happened
        gather(rows, preset, path)
        assert counts().asked == seen.asked  # a second call asks nothing
    records = whole(path, rows)
    failed = [r for r in records if r["error"]]
    assert len(failed) == seen.troubles["empty"]  # all others came in the end
    assert {r["error"] for r in failed} == {"S1Error: empty thinking"}
    for r in (r for r in records if not r["error"]):
        question = f"question {int(r['question_hash'], 16)}"
        assert r["trace"] == f"So {question} has {len(question)} characters"
        assert r["attempt"] == f"Answer: {len(question)}"
    assert max(seen.delivered.values()) == 1 and len(seen.delivered) == len(rows)
    assert seen.peak <= 16 and seen.too_soon == 0
    exact = (PROMPT * USD_IN + REPLY * USD_OUT) / 1e6
    assert sum(r["usd"] for r in records) == pytest.approx(exact * len(rows))
    lost = sum(seen.troubles[name] for name in ("html", "drop", "half", "hang"))
    assert seen.charged == pytest.approx(exact * (len(rows) + lost))
    worst = (256 * USD_IN + 200 * USD_OUT) / 1e6  # of a reply that was lost: the bill assumes no less
    assert teacher.spent() >= exact * len(rows) + worst * lost
    assert seen.charged <= teacher.spent() == pytest.approx(Bill(path).usd)


CHILD_OF_A_SERVER = """
import json, pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets jobs in the background ignore it
from s1book.config import load_preset
from s1book.traces import collect, open_teacher, teacher_name
preset, path = load_preset("tiny", json.loads(sys.argv[1])), pathlib.Path("traces.jsonl")
rows = json.loads(pathlib.Path("rows.json").read_text())
collect(rows, open_teacher(preset, path), path, 0, teacher_name(preset))
"""


def interrupted(folder, server, how, **terms):
    """Start a collection of rows.json in another process, end it with a signal in the middle."""
    terms = dict(url=server.url, usd_in=USD_IN, usd_out=USD_OUT, max_tokens=200, usd_cap=1000.0,
                 concurrency=8) | terms  # fmt: skip
    sets = ["teacher.kind=openai", "teacher.model=m",
            *(f"teacher.server.{key}={value}" for key, value in terms.items())]  # fmt: skip
    child = subprocess.Popen([sys.executable, "-c", CHILD_OF_A_SERVER, json.dumps(sets)], cwd=folder,
                             stderr=subprocess.PIPE)  # fmt: skip
    path, deadline = folder / "traces.jsonl", time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 4_000):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(how)
    child.communicate(timeout=60)
    server.hold = lambda server: False   # not before: a child that hears late could finish
    return load_preset("tiny", sets)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_resumed_pays_twice_for_what_was_under_way_only(tmp_path, how):
    rows, path = questions(400), tmp_path / "traces.jsonl"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with BadServer(think=0.05, hold=lambda server: len(server.asked) > 300) as server:  # it cannot finish
        preset = interrupted(tmp_path, server, how)
        before = len(read_jsonl(path))
        assert 0 < before < 400
        exact = (PROMPT * USD_IN + REPLY * USD_OUT) / 1e6
        assert server.charged <= Bill(path).usd  # what was under way is counted at its worst
        assert Bill(path).usd > before * exact
        teacher = gather(rows, preset, path)
    whole(path, rows)
    assert sum(server.asked.values()) - len(rows) <= 8  # concurrency
    assert set(server.asked.values()) <= {1, 2}
    assert server.charged <= teacher.spent()


def test_the_cap_is_never_exceeded_and_a_higher_one_goes_on(tmp_path):
    rows, path = questions(200), tmp_path / "traces.jsonl"
    odds = {"drop": 0.1, "half": 0.1}
    with BadServer(odds, think=0.002) as server:
        for cap in (0.02, 0.05):
            with pytest.raises(Stop, match="usd_cap: found"):
                gather(rows, wire(server.url, usd_cap=cap), path)
            assert 0 < server.charged <= Bill(path).usd <= cap
        gather(rows, wire(server.url), path)
        whole(path, rows)
        assert max(server.delivered.values()) == 1
    with BadServer() as server, pytest.raises(Stop, match="usd_cap"):
        gather(rows, wire(server.url, usd_cap=0.0001), tmp_path / "none.jsonl")
    assert not server.asked


@pytest.mark.parametrize("trouble", ["hang", "drip"])
def test_a_server_that_never_finishes_is_left(tmp_path, trouble):
    path = tmp_path / "t.jsonl"
    with BadServer({trouble: 1.0}) as server:
        gather(questions(2), wire(server.url, timeout=0.4, tries=2), path)
        errors = {r["error"] for r in whole(path, questions(2))}
        assert errors == {"Transient: no reply in time (after 2 tries)"}
        assert server.charged <= Bill(path).usd


def test_busy_servers_are_obeyed(tmp_path):
    with BadServer({"429": 0.4}) as server:
        gather(questions(12), wire(server.url, tries=9, timeout=60.0), tmp_path / "t.jsonl")  # also on a busy machine
        assert server.troubles["429"] > 2 and server.too_soon == 0
    assert not any(r["error"] for r in whole(tmp_path / "t.jsonl", questions(12)))
    assert Bill(tmp_path / "t.jsonl").usd == pytest.approx(server.charged)  # refusals are free


def test_a_dead_or_hopeless_server_is_not_asked_for_every_item(tmp_path):
    with BadServer({"500": 1.0}) as server, pytest.raises(Stop, match="failed in a row, the last"):
        gather(questions(500), wire(server.url, fuse=5, tries=2, concurrency=4), tmp_path / "a.jsonl")
    assert sum(server.asked.values()) <= (5 + 4) * 2
    with BadServer({"401": 1.0}) as server, pytest.raises(Stop, match="refuses all requests"):
        gather(questions(500), wire(server.url, concurrency=4), tmp_path / "b.jsonl")
    assert sum(server.asked.values()) <= 4 and not (tmp_path / "b.jsonl").exists()
    with pytest.raises(Stop, match="ConnectError"):  # nobody listens there any more
        gather(questions(9), wire(server.url, fuse=3, tries=1), tmp_path / "c.jsonl")
    assert Bill(tmp_path / "c.jsonl").usd == 0


def test_an_error_of_one_item_is_kept_and_can_be_asked_again(tmp_path):
    path, rows = tmp_path / "t.jsonl", questions(40)
    with BadServer({"400": 0.2, "cut": 0.2}) as server:
        gather(rows, wire(server.url), path)
        errors = [r for r in whole(path, rows) if r["error"]]
        kinds = {r["error"].split(":")[1].split()[0] for r in errors}
        assert kinds == {"Error", "cut"} and 4 < len(errors) < 36
        cut = next(r for r in errors if "cut" in r["error"])
        assert cut["usd"] > 0 and cut["rejected"][1].startswith("Answer")  # paid, so not thrown away
        server.odds = {}
        gather(rows, wire(server.url), path, again=True)
        assert sum(server.asked.values()) == len(rows) + len(errors)
    assert not any(r["error"] for r in whole(path, rows))


def test_the_key_reaches_the_server_and_no_file(tmp_path, monkeypatch, capsys):
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("A_KEY", key)
    rows = questions(60)
    with BadServer({"400": 0.3, "500": 0.1}, echo=key) as server:
        preset = wire(server.url, key="A_KEY", fuse=60)
        gather(rows, preset, tmp_path / "t.jsonl")
        jobs = {"a": [{"role": "user", "content": "hello"}]}
        ask_server(jobs, preset.teacher.server, "m", tmp_path / "jobs.jsonl")
        assert all(h["authorization"] == f"bearer {key}" for h in server.headers)
        server.odds = {"401": 1.0}
        with pytest.raises(Stop) as stopped:
            gather(rows, preset, tmp_path / "u.jsonl")
    records = whole(tmp_path / "t.jsonl", rows)
    assert any("no ***" in (r["error"] or "") for r in records)
    assert any("***" in (r["trace"] or "") for r in records)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) >= 4 and not any(key.encode() in p.read_bytes() for p in files)
    assert key not in str(stopped.value) and key not in "".join(capsys.readouterr())
    assert key not in teacher_name(preset) + preset.model_dump_json()


def test_a_missing_key_is_noticed_before_the_first_request(tmp_path, monkeypatch):
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    preset = load_preset("h100", ["teacher.kind=openai", "teacher.model=deepseek-reasoner"])
    with pytest.raises(S1Error, match="Environment variable DEEPSEEK_API_KEY: found nothing"):
        open_teacher(preset, tmp_path / "t.jsonl")
    with pytest.raises(S1Error, match="found no store"):
        open_teacher(preset)


@pytest.mark.parametrize("pasted", ["sk-two words-0123", "sk-two\nlines-0123", "sk-\u00fcmlaut-0123"])
def test_a_key_that_no_header_can_carry_is_refused_before_the_first_request(tmp_path, monkeypatch, pasted):
    monkeypatch.setenv("A_KEY", pasted)
    path = tmp_path / "t.jsonl"
    with BadServer() as server:
        with pytest.raises(Stop, match="A_KEY: found spaces, line breaks or letters") as stopped:
            gather(questions(3), wire(server.url, key="A_KEY"), path)
        monkeypatch.setenv("A_KEY", "sk-0123456789\n")  # as a careless paste leaves it
        gather(questions(3), wire(server.url, key="A_KEY"), path)
        assert {h["authorization"] for h in server.headers} == {"bearer sk-0123456789"}
    assert pasted not in str(stopped.value) and len(whole(path, questions(3))) == 3


@pytest.mark.parametrize("field", ["reasoning", "<think>", "<thought>"])
def test_every_place_of_the_thinking_over_the_wire(tmp_path, field):
    where = field if field.startswith("<") else "field"
    with BadServer(field=field) as server:
        gather(questions(3), wire(server.url, thinking=where), tmp_path / "t.jsonl")
    traces = {r["trace"] for r in whole(tmp_path / "t.jsonl", questions(3))}  # in any order
    assert traces == {f"So question {i} has 10 characters" for i in range(3)}


def test_what_a_request_holds(tmp_path):
    row = questions(1)[0]
    with BadServer() as server:
        gather([row], wire(server.url, extra='{"extra_body": {"a": 1}}'), tmp_path / "t.jsonl")
        gather([row], wire(server.url, seeded="false"), tmp_path / "u.jsonl")
    body, other = server.bodies
    assert body["messages"] == [{"role": "user", "content": "question 0"}]  # the bare question
    assert body["seed"] == item_seed(0, row["question_hash"]) and "seed" not in other
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 200, 0.0)
    assert body["extra_body"] == {"a": 1}


def test_requests_a_minute_and_at_a_time(tmp_path):
    started = time.monotonic()
    with BadServer() as server:
        gather(questions(11), wire(server.url, per_minute=600.0), tmp_path / "t.jsonl")
        assert time.monotonic() - started >= 0.99  # ten gaps of a tenth of a second
    with BadServer(think=0.05, hold=lambda server: server.peak < 3) as server:
        gather(questions(30), wire(server.url, concurrency=3, timeout=60.0), tmp_path / "u.jsonl")
        assert server.peak == 3


def test_inside_a_running_event_loop_as_in_a_notebook(tmp_path):
    async def cell():
        with BadServer() as server:
            return gather(questions(5), wire(server.url), tmp_path / "t.jsonl")

    asyncio.run(cell())
    whole(tmp_path / "t.jsonl", questions(5))


def test_a_teacher_can_be_used_for_two_collections(tmp_path):
    path = tmp_path / "t.jsonl"
    with BadServer({"500": 0.3}) as server:
        preset = wire(server.url)
        teacher = open_teacher(preset, path)
        for count in (10, 40):
            collect_from(questions(count), teacher, path, 0, teacher_name(preset))
    whole(path, questions(40))


def test_only_what_changes_a_reply_changes_the_name():
    base = teacher_name(wire("http://h/v1"))
    same = [dict(usd_cap=3.0), dict(concurrency=2), dict(usd_out=1.0), dict(timeout=9.0), dict(fuse=3)]
    other = [dict(max_tokens=3), dict(thinking="<think>"), dict(extra='{"a": 1}')]
    assert {teacher_name(wire("http://h/v1", **terms)) for terms in same} == {base}
    names = {teacher_name(wire("http://h/v1", **terms)) for terms in other}
    assert len(names | {base, teacher_name(wire("http://other/v1"))}) == 5


def test_two_programs_at_a_time_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    with alone(path), pytest.raises(S1Error, match="found another program"):
        collect(ROWS[:3], teach, path, 0, "t")
    assert collect(ROWS[:3], teach, path, 0, "t") == 3


# -- any messages --


def test_ask_server_keeps_resumes_and_notices_changed_messages(tmp_path):
    path = tmp_path / "jobs.jsonl"
    jobs = {f"j{i}": [{"role": "user", "content": f"hello {i}"}] for i in range(20)}
    with BadServer({"500": 0.2, "drop": 0.1, "empty": 0.2}) as server:
        ask_them = partial(ask_server, server=wire(server.url).teacher.server, model="m", path=path)
        first = ask_them(jobs)
        assert list(first) == list(jobs) and not any(r["error"] for r in first.values())
        assert first["j3"]["text"] == "Answer: 7" and first["j3"]["tokens_out"] == REPLY
        asked = sum(server.asked.values())
        assert ask_them(jobs) == first and sum(server.asked.values()) == asked
        jobs["j3"] = [{"role": "user", "content": "hello, dear"}]
        second = ask_them(jobs)
        assert second["j3"]["text"] == "Answer: 11" and second["j4"] == first["j4"]
        assert server.delivered["hello, dear"] == 1 == server.delivered["hello 4"]
        warm = ask_them({"j4": jobs["j4"]}, options={"temperature": 0.7})
        assert warm["j4"]["by"] != first["j4"]["by"] and server.bodies[-1]["temperature"] == 0.7
    assert ask_server({}, wire("http://h/v1").teacher.server, "m", tmp_path / "no.jsonl") == {}


def test_ask_server_keeps_failures(tmp_path):
    jobs = {"a": [{"role": "user", "content": "hello"}]}
    with BadServer({"400": 1.0}) as server:
        record = ask_server(jobs, wire(server.url).teacher.server, "m", tmp_path / "j.jsonl")["a"]
    assert record["text"] is None and "S1Error" in record["error"]


# -- presets and preflight --


@pytest.mark.parametrize("like", ["deepseek", "gemini", "vllm"])
def test_described_servers_are_valid_and_can_be_opened(tmp_path, monkeypatch, like):
    server = Server(like=like)
    if server.key:
        monkeypatch.setenv(server.key, "sk-0123456789")
    client = Client(server, "m", Purse(tmp_path / "t.jsonl", server.usd_cap))

    async def connect():
        client.open()
        assert client.api.base_url.host in server.url
        await client.close()

    asyncio.run(connect())


def test_the_preflight_looks_at_key_and_bill(monkeypatch):
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    sets = ["teacher.kind=openai", "teacher.server.like=deepseek", "pool.size=2000"]
    rows = {check.what: check for check in doctor(Run.open("tiny", sets))}
    assert rows["DEEPSEEK_API_KEY"].stops and not rows["DEEPSEEK_API_KEY"].ok
    assert rows["price of replies"].found == "about 43.80 US dollars" and not rows["price of replies"].ok
    monkeypatch.setenv("DEEPSEEK_API_KEY", "sk-0123456789")
    rows = {check.what: check for check in doctor(Run.open("tiny", [*sets, "teacher.server.usd_cap=50.0"]))}
    assert rows["DEEPSEEK_API_KEY"].ok and rows["price of replies"].ok
    assert "sk-0123456789" not in str(rows)
