"""The judge and the classifier of domains in front of a real HTTP server that says what it likes."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from bad_server import USD_IN, USD_OUT, BadServer

from s1book.asking import ask_server
from s1book.client import Bill
from s1book.config import S1Error, load_preset, read_jsonl
from s1book.features import classify
from s1book.grade import grade_traces
from s1book.judge import ask_judge, ask_until_read, open_grader, read_verdict
from s1book.store import alone


class Talker(BadServer):
    """`says` makes the reply: (last message, how often it was asked) -> text."""

    def __init__(self, says, odds=None, **more):
        self.says = says
        super().__init__(odds, **more)

    def completion(self, question, empty):
        reply = super().completion(question, empty)
        text = "" if empty else self.says(question, self.asked[question])
        reply["choices"][0]["message"] = {"role": "assistant", "content": text}
        return reply


def preset_for(server, *more):
    """The tiny preset with its judge at the server."""
    terms = {"url": server.url, "thinking": "none", "wait": 0.01, "timeout": 60.0, "tries": 3, "concurrency": 8}
    return load_preset("tiny", [*(f"judge.server.{key}={value}" for key, value in terms.items()),
                                "grade.grader=judge", "features.domain=llm", *more])


def rows(n):
    return [{"question_hash": f"h{i}", "question": f"What is 3 + {i} ?", "solution": None, "answer": str(3 + i)}
            for i in range(n)]


def attempts(n, who="model"):
    return [{"question_hash": f"h{i}", "attempt": f"I, {who}: I say {3 + i if i % 2 else 0}."} for i in range(n)]


def honest(question, number):
    """A judge that compares, and says a word too much the first time for every fifth question."""
    said, gold = question.split("I say ")[1].split(".")[0], question.split("## Correct answer\n")[1]
    return f"They are {said} and {gold}.\n{'Yes' if said == gold else 'No'}" + "." * (int(gold) % 5 == 0 and number == 1)


def verdicts(n, server, path, *more):
    """The verdicts on n attempts."""
    return [g["correct"] for g in grade_traces(rows(n), attempts(n), "m", path, open_grader(preset_for(server, *more)))]


def test_a_judge_grades_over_the_wire_and_is_never_asked_twice(tmp_path):
    wanted = [i % 2 == 1 for i in range(40)]
    with Talker(honest, hold=lambda server: server.peak < 8) as server:  # no reply before eight have asked
        assert verdicts(40, server, tmp_path / "c.jsonl") == wanted
        asked = sum(server.asked.values())
        assert asked == 40 + sum((3 + i) % 5 == 0 for i in range(40)) and server.peak == 8
        assert verdicts(40, server, tmp_path / "c.jsonl") == wanted and sum(server.asked.values()) == asked
        body = server.bodies[0]
        assert body["model"] == "judge" and body["temperature"] == 0.0
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert "## Problem" in body["messages"][1]["content"] and "## Correct answer" in body["messages"][1]["content"]


def test_other_instructions_ask_anew(tmp_path, monkeypatch):
    with Talker(honest) as server:
        verdicts(4, server, tmp_path / "c.jsonl")
        asked = sum(server.asked.values())
        name = open_grader(preset_for(server)).name
        monkeypatch.setattr("s1book.judge.JUDGE", "You check answers, and say Yes or No.")
        assert open_grader(preset_for(server)).name != name  # a part of the key of every grade
        verdicts(4, server, tmp_path / "c.jsonl")
        assert sum(server.asked.values()) == asked + 4


def test_whoever_watches_sees_how_far_the_judge_is_and_what_was_spent(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("s1book.judge.live_line", lambda: lines.append)
    prices = ["judge.server.usd_in=1.0", "judge.server.usd_out=10.0", "judge.server.usd_cap=1.0"]
    with Talker(honest) as server:
        verdicts(20, server, tmp_path / "c.jsonl", *prices)
    assert "20 asked, 0 failed, 0.02 US dollars" in lines and lines[-1] == "4 asked, 0 failed, 0.02 US dollars", lines


PRICED = [f"judge.server.{key}={value}" for key, value in
          dict(usd_in=USD_IN, usd_out=USD_OUT, max_tokens=200, tries=9).items()]


def test_the_cap_holds_for_all_rounds_of_all_columns_of_a_run(tmp_path):
    wanted, said = [i % 2 == 1 for i in range(40)], {}

    def of_a_run(server, cap):
        """Two columns of verdicts and one of domains, as chapters 05 and 06 fill them."""
        preset = preset_for(server, *PRICED, f"judge.server.usd_cap={cap}")
        for name in ("teacher", "small"):
            said[name] = [g["correct"] for g in grade_traces(rows(40), attempts(40, name), "m", tmp_path / f"{name}.jsonl",
                                                             open_grader(preset))]
        return classify({f"h{i}": f"question {4 * i}" for i in range(40)}, ask_judge(preset), tmp_path / "domain.jsonl")

    with Talker(honest_or_sorter, {"drop": 0.05, "half": 0.05}, seed=2) as server:
        for cap in (0.02, 0.05, 0.1):  # the first column, the second, the domains
            with pytest.raises(S1Error, match="usd_cap: found"):
                of_a_run(server, cap)
            assert cap / 2 < server.charged <= Bill(tmp_path / "judge.jsonl").usd <= cap
        assert set(of_a_run(server, 1.0).values()) == {"Number theory"} and said == {"teacher": wanted, "small": wanted}
        assert server.charged <= Bill(tmp_path / "judge.jsonl").usd <= 1.0
        asked, usd = sum(server.asked.values()), Bill(tmp_path / "judge.jsonl").usd
        of_a_run(server, 0.0)  # all is there: nothing is asked, and nothing counted again
        assert sum(server.asked.values()) == asked and Bill(tmp_path / "judge.jsonl").usd == usd
        delivered = [n for q, n in server.delivered.items() if "## Problem" in q and int(q.split("\n")[-1]) % 5]
        assert max(delivered) == 1  # what was paid for before a stop is not asked again
    assert [p.name for p in tmp_path.glob("*.paid.jsonl")] == ["judge.paid.jsonl"]


def test_one_purse_is_not_shared_by_two_programs(tmp_path):
    with Talker(honest) as server, alone(tmp_path / "judge.jsonl"):
        with pytest.raises(S1Error, match="judge.jsonl: found another program"):
            verdicts(4, server, tmp_path / "c.jsonl")
        assert not server.asked


def test_troubles_on_the_line_change_no_verdict(tmp_path):
    odds = {"500": 0.1, "html": 0.1, "drop": 0.1, "half": 0.1}
    with Talker(honest, odds, seed=3) as server:
        assert verdicts(40, server, tmp_path / "c.jsonl", "judge.server.tries=12") == [i % 2 == 1 for i in range(40)]
        assert len(server.troubles) >= 3


@pytest.mark.parametrize("reply", ["Maybe.", "Yes.", "I think so: Yes", "\u2028", "Yes\nor No", "YES", "{\"verdict\": \"Yes\"}"])
def test_an_unreadable_judge_ends_in_missing(tmp_path, reply):
    with Talker(lambda question, number: reply) as server:
        assert verdicts(4, server, tmp_path / "c.jsonl") == [None] * 4
        assert set(server.asked.values()) <= {1, 4}  # four readings; an empty text is a failed call
        asked = sum(server.asked.values())
        assert verdicts(4, server, tmp_path / "c.jsonl") == [None] * 4
        assert reply.isspace() or sum(server.asked.values()) == asked


@pytest.mark.parametrize("trouble", ["500", "empty", "html", "drop"])
def test_a_server_that_only_fails_ends_in_missing_and_recovers(tmp_path, trouble):
    with Talker(honest, {trouble: 1.0}) as server:
        assert verdicts(4, server, tmp_path / "c.jsonl") == [None] * 4
        assert max(server.asked.values()) <= 3
        server.odds = {}
        assert verdicts(4, server, tmp_path / "c.jsonl") == [False, True, False, True]


def test_hostile_attempts_reach_the_judge_as_plain_text(tmp_path):
    texts = ["\0 I say 3.", "\ud800 I say 0.", "x" * 10_000_000 + " I say 5.", "\\boxed{" * 10_000 + " I say 0."]
    with Talker(honest) as server:
        grades = grade_traces(rows(4), [{"question_hash": f"h{i}", "attempt": text} for i, text in enumerate(texts)], "m",
                              tmp_path / "c.jsonl", open_grader(preset_for(server)))
        assert [grade["correct"] for grade in grades] == [True, False, True, False]
        assert max(len(body["messages"][1]["content"]) for body in server.bodies) < 110_000


def test_a_dead_server_stops_the_work_and_keeps_what_was_judged(tmp_path):
    with Talker(honest) as server:
        assert verdicts(8, server, tmp_path / "c.jsonl") == [i % 2 == 1 for i in range(8)]
        server.odds = {"500": 1.0}
        with pytest.raises(S1Error):
            verdicts(60, server, tmp_path / "c.jsonl", "judge.server.fuse=5")
        server.odds, before = {}, dict(server.asked)
        assert verdicts(60, server, tmp_path / "c.jsonl") == [i % 2 == 1 for i in range(60)]
        again = {q for q in before if q in server.asked and server.asked[q] > before[q]}
        assert not {q for q in again if any(f"+ {i} ?" in q for i in range(8))}


def test_a_refused_key_is_said_at_once_and_no_key_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    with Talker(honest, {"401": 1.0}, echo="sk-very-secret") as server:
        with pytest.raises(S1Error) as error:
            verdicts(4, server, tmp_path / "c.jsonl", "judge.server.key=JUDGE_KEY")
        assert "sk-very-secret" not in str(error.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"sk-very-secret" in p.read_bytes()]


def sorter(question, number):
    """A classifier with the manners of real ones."""
    kind = int(question.split()[1])
    return {0: "Primes.\n11", 1: "11" if number == 3 else "It is 11.", 2: "99", 3: "Number theory"}[kind % 4]


def honest_or_sorter(question, number):
    """Both in one."""
    return (honest if "## Problem" in question else sorter)(question, number)


def test_domains_over_the_wire(tmp_path):
    questions = {f"h{i}": f"question {i}" for i in range(8)}
    with Talker(sorter, {"500": 0.2}, seed=1) as server:
        ask = ask_judge(preset_for(server, "judge.server.tries=9"))
        domains = classify(questions, ask, tmp_path / "domain.jsonl")
        asked = sum(server.asked.values())
        assert domains == classify(questions, ask, tmp_path / "domain.jsonl") and sum(server.asked.values()) == asked
    assert all(domains[f"h{i}"] is None for i in range(8) if i % 4 > 1)
    assert all(domains[f"h{i}"] == "Number theory" for i in (0, 4))
    assert list(domains) == list(questions)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_judge import *
class Known: url = {url!r}
print(verdicts(200, Known, Path({path!r})))
"""


def test_a_killed_judge_goes_on_where_it_was(tmp_path):
    path = tmp_path / "c.jsonl"
    with Talker(honest, think=0.05, hold=lambda server: len(server.asked) > 150) as server:  # it cannot finish
        code = KILLED.format(tests=str(Path(__file__).parent), url=server.url, path=str(path))
        process = subprocess.Popen([sys.executable, "-c", code])
        first, deadline = path.with_name("c.1.jsonl"), time.monotonic() + 60
        while not (first.exists() and first.read_bytes().count(b"\n") > 20) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        server.hold, kept = lambda server: False, len(read_jsonl(first))
        assert 20 < kept < 200
        before = dict(server.asked)
        assert verdicts(200, server, path) == [i % 2 == 1 for i in range(200)]
        twice = sum(server.asked[q] > before[q] and (3 + int(q.split("+ ")[1].split()[0])) % 5 != 0 for q in before)
        assert twice <= 8  # what was in flight


def test_a_store_per_round_is_all_that_is_written(tmp_path):
    with Talker(lambda question, number: "Yes" if number > 1 else "?") as server:
        judge = preset_for(server).judge
        ask = partial(ask_server, server=judge.server, model="j")
        found = ask_until_read(tmp_path / "c.jsonl", {"a": "one", "b": "two"}, "Judge.",
                               lambda jobs, path: ask(jobs, path=path), read_verdict, 3)
    assert [each["value"] for each in found.values()] == [True, True]
    assert {p.name for p in tmp_path.glob("c.[0-9].jsonl")} == {"c.1.jsonl", "c.2.jsonl"}
    assert not list(tmp_path.glob("*aside*"))
