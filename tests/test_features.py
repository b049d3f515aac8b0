"""Features: asking that survives a kill, and missing kept apart from wrong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s1book.config import S1Error, read_jsonl
from s1book.features import SCHEMA, ask_all, feature_rows, judge, model_fingerprint
from s1book.pool import question_hash, read_rows, write_rows


def rows(n):
    return [{"question_hash": question_hash(q), "question": q, "answer": str(i % 10), "domain": "d"}
            for i in range(n) for q in [f"question {i}"]]


class Model:
    "Answers every question with its own number, and remembers what it was asked."

    def __init__(self):
        self.asked = []

    def __call__(self, prompts):
        self.asked += prompts
        return [f"Answer: {prompt.split()[1][-1]}" for prompt in prompts]


def as_is(row):
    return row["question"]


def test_everybody_is_asked_once_and_graded(tmp_path):
    model, path = Model(), tmp_path / "attempts.jsonl"
    correct = ask_all(rows(25), as_is, model, path, "m", chunk=10)
    assert correct == {row["question_hash"]: True for row in rows(25)}
    assert model.asked == [row["question"] for row in rows(25)]
    assert [record["extracted"] for record in read_jsonl(path)] == [row["answer"] for row in rows(25)]


def test_a_second_run_asks_nobody(tmp_path):
    path, model = tmp_path / "attempts.jsonl", Model()
    first = ask_all(rows(20), as_is, Model(), path, "m")
    assert ask_all(rows(20), as_is, model, path, "m") == first and model.asked == []


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_resume_after_an_interruption_asks_only_the_rest(tmp_path, chunk):
    path, before, after = tmp_path / "attempts.jsonl", Model(), Model()

    def stops(prompts):
        if len(before.asked) >= 14:
            raise KeyboardInterrupt
        return before(prompts)

    try:
        ask_all(rows(40), as_is, stops, path, "m", chunk=chunk)
    except KeyboardInterrupt:
        path.open("a").write('{"key": "to')  # we were killed in the middle of a line
    correct = ask_all(rows(40), as_is, after, path, "m", chunk=chunk)
    assert before.asked + after.asked == [row["question"] for row in rows(40)]
    assert correct == ask_all(rows(40), as_is, Model(), tmp_path / "whole.jsonl", "m")
    assert len(read_jsonl(path)) == 40


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_features import Model, as_is, rows
from s1book.features import ask_all
model = Model()
def slow(prompts):
    time.sleep(0.05)
    return model(prompts)
ask_all(rows(400), as_is, slow, Path({path!r}), "m", chunk=5)
"""


def test_resume_after_a_real_kill_loses_at_most_one_chunk(tmp_path):
    path = tmp_path / "attempts.jsonl"
    code = SLOW.format(tests=str(Path(__file__).parent), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (path.exists() and len(path.read_bytes().splitlines()) > 12) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(read_jsonl(path))
    model = Model()
    correct = ask_all(rows(400), as_is, model, path, "m", chunk=50)
    assert 12 <= kept < 400 and len(model.asked) == 400 - kept
    assert len(correct) == 400 and all(correct.values())
    keys = [record["key"] for record in read_jsonl(path)]
    assert len(keys) == len(set(keys)) == 400


def test_attempts_of_another_model_or_prompt_do_not_count(tmp_path):
    path, other, reworded = tmp_path / "attempts.jsonl", Model(), Model()
    ask_all(rows(5), as_is, Model(), path, "m")
    ask_all(rows(5), as_is, other, path, "n")
    ask_all(rows(5), lambda row: row["question"] + "?0", reworded, path, "m")
    assert len(other.asked) == len(reworded.asked) == 5


def test_two_rows_with_one_prompt_are_two_questions(tmp_path):
    model = Model()
    correct = ask_all(rows(3), lambda row: "q 1", model, tmp_path / "a.jsonl", "m")
    assert list(correct.values()) == [False, True, False] and len(model.asked) == 3


def test_too_few_answers_are_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "attempts.jsonl"
    with pytest.raises(S1Error, match="10 questions were asked, 9 came back"):
        ask_all(rows(10), as_is, lambda prompts: ["Answer: 1"] * 9, path, "m")
    assert not path.exists()


def test_a_damaged_record_in_the_middle_stops_before_any_question(tmp_path):
    path, model = tmp_path / "attempts.jsonl", Model()
    path.write_text('{"key": "1"}\nnot json\n{"key": "2"}\n')
    with pytest.raises(S1Error, match="line 2"):
        ask_all(rows(3), as_is, model, path, "m")
    assert model.asked == []


@pytest.mark.parametrize("text, answer, correct", [
    ("Answer: 3", "3", True), ("Answer: 4", "3", False), ("no idea at all", "3", False), ("", "3", False),
    (None, "3", None), ("Answer: 3", None, None), ("Answer: 3", "", None)])
def test_wrong_is_not_missing(text, answer, correct):
    assert judge({"question": "q", "answer": answer}, text)["correct"] is correct


def test_features_keep_missing_apart_from_wrong(tmp_path):
    names = [row["question_hash"] for row in rows(4)]
    correct = {"teacher": {names[0]: True, names[1]: False, names[3]: None}, "small": {names[0]: False}, "base": {}}
    traced = {names[0]: "a b", names[3]: "a b c"}
    features = feature_rows(rows(4), traced, correct, lambda texts: [len(text.split()) for text in texts])
    assert [row["trace_tokens"] for row in features] == [2, None, None, 3]
    assert [row["teacher_correct"] for row in features] == [True, False, None, None]
    assert [row["small_correct"] for row in features] == [False, None, None, None]
    assert all(row["base_correct"] is None for row in features)
    assert read_rows(write_rows(features, tmp_path / "f.parquet", SCHEMA)) == features


def test_a_model_is_known_by_its_weights(tmp_path):
    prints = set()
    for name, weights in (("a", b"x" * 50), ("b", b"y" * 50), ("c", b"x" * 51)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        prints.add(model_fingerprint(str(tmp_path / name)))
    assert len(prints) == 3 and model_fingerprint("owner/name") == "owner/name"
    assert model_fingerprint(str(tmp_path / "a")) == model_fingerprint(str(tmp_path / "a"))


def test_records_are_plain_json(tmp_path):
    path = tmp_path / "attempts.jsonl"
    ask_all(rows(2), as_is, Model(), path, "m")
    assert set(json.loads(path.read_text().splitlines()[0])) == {"key", "question_hash", "text", "extracted", "correct"}
