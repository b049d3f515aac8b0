"""Features: asking that survives a kill, and missing kept apart from wrong."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from s1book.config import S1Error, read_jsonl
from s1book.features import (
    SCHEMA, ask_all, feature_rows, grade_answers, missing_because, model_fingerprint, read_domain, token_lengths,
)
from s1book.grade import rules_grader
from s1book.pool import question_hash, read_rows, write_rows
from s1book.rubric import CLASSIFIER, RUBRIC


def rows(n):
    return [{"question_hash": question_hash(q), "question": q, "answer": str(i % 10), "domain": "d"}
            for i in range(n) for q in [f"question {i}"]]


class Model:
    "Answers every question with its own number, the last one first, and remembers what it was asked."

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, done):
        for i in reversed(range(len(prompts))):
            self.asked.append(prompts[i])
            done(i, said(prompts[i]))


def said(prompt):
    return f"Answer: {prompt.split()[1][-1]}"


def as_is(row):
    return row["question"]


def test_everybody_is_asked_once_and_gets_their_own_answer(tmp_path):
    model, path = Model(), tmp_path / "attempts.jsonl"
    texts = ask_all(rows(25), as_is, model, path, "m")
    assert texts == {row["question_hash"]: said(row["question"]) for row in rows(25)}
    assert sorted(model.asked) == sorted(row["question"] for row in rows(25))
    correct = grade_answers(rows(25), texts, tmp_path / "correct.jsonl", rules_grader())
    assert correct == {row["question_hash"]: True for row in rows(25)}


def test_a_second_run_asks_nobody(tmp_path):
    path, model = tmp_path / "attempts.jsonl", Model()
    first = ask_all(rows(20), as_is, Model(), path, "m")
    assert ask_all(rows(20), as_is, model, path, "m") == first and model.asked == []


@pytest.mark.parametrize("stop", [0, 1, 14, 39])
def test_resume_after_an_interruption_asks_only_the_rest(tmp_path, stop):
    path, before, after = tmp_path / "attempts.jsonl", Model(), Model()

    def stops(prompts, done):
        def plugged(i, text):
            if len(before.asked) > stop:
                raise KeyboardInterrupt
            done(i, text)
        before(prompts, plugged)

    with pytest.raises(KeyboardInterrupt):
        ask_all(rows(40), as_is, stops, path, "m")
    path.open("a").write('{"key": "to')  # we were killed in the middle of a line
    texts = ask_all(rows(40), as_is, after, path, "m")
    assert sorted(before.asked[:-1] + after.asked) == sorted(row["question"] for row in rows(40))
    assert texts == ask_all(rows(40), as_is, Model(), tmp_path / "whole.jsonl", "m")
    assert len(read_jsonl(path)) == 40


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_features import Model, as_is, rows
from s1book.features import ask_all
def slow(prompts, done):
    def pause(i, text):
        done(i, text)
        time.sleep(60 if i == 300 else 0.01)  # it is still at work when the signal comes, however late
    Model()(prompts, pause)
ask_all(rows(400), as_is, slow, Path({path!r}), "m")
"""


def test_resume_after_a_real_kill_loses_nothing_that_was_finished(tmp_path):
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
    texts = ask_all(rows(400), as_is, model, path, "m")
    assert 12 <= kept < 400 and len(model.asked) == 400 - kept
    assert texts == {row["question_hash"]: said(row["question"]) for row in rows(400)}
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
    texts = ask_all(rows(3), lambda row: "q 1", model, tmp_path / "a.jsonl", "m")
    correct = grade_answers(rows(3), texts, tmp_path / "c.jsonl", rules_grader())
    assert list(correct.values()) == [False, True, False] and len(model.asked) == 3


def test_a_missing_answer_is_refused_and_the_others_are_kept(tmp_path):
    path, model = tmp_path / "attempts.jsonl", Model()
    with pytest.raises(S1Error, match="10 records were wanted, 9 are there"):
        ask_all(rows(10), as_is, lambda prompts, done: Model()(prompts[:-1], done), path, "m")
    assert len(ask_all(rows(10), as_is, model, path, "m")) == 10 and model.asked == ["question 9"]


def test_a_damaged_record_in_the_middle_stops_before_any_question(tmp_path):
    path, model = tmp_path / "attempts.jsonl", Model()
    path.write_text('{"key": "1"}\nnot json\n{"key": "2"}\n')
    with pytest.raises(S1Error, match="line 2"):
        ask_all(rows(3), as_is, model, path, "m")
    assert model.asked == []


@pytest.mark.parametrize("text, answer, correct", [
    ("Answer: 3", "3", True), ("Answer: 4", "3", False), ("no idea at all", "3", False), ("", "3", False),
    (None, "3", None), ("Answer: 3", None, None), ("Answer: 3", "", None)])
def test_wrong_is_not_missing(tmp_path, text, answer, correct):
    row = {"question_hash": "a", "question": "q", "answer": answer}
    assert grade_answers([row], {"a": text}, tmp_path / "c.jsonl", rules_grader()) == {"a": correct}


def test_a_better_grader_grades_anew_and_asks_nobody(tmp_path):
    texts, path = ask_all(rows(5), as_is, Model(), tmp_path / "a.jsonl", "m"), tmp_path / "c.jsonl"
    harsh = replace(rules_grader(), name="harsh", fill=lambda path, attempts: {
        key: {"extracted": None, "correct": False} for key in attempts})
    assert not any(grade_answers(rows(5), texts, path, harsh).values())
    assert all(grade_answers(rows(5), texts, path, rules_grader()).values())


def test_lengths_are_counted_once_per_tokenizer(tmp_path):
    counted, path, texts = [], tmp_path / "l.jsonl", {str(i): "a " * i for i in range(25)}

    def lengths(part):
        counted.extend(part)
        return [len(text.split()) for text in part]

    wanted = {str(i): i for i in range(25)}
    assert token_lengths(texts, lengths, path, "t", chunk=4) == wanted == token_lengths(texts, lengths, path, "t")
    assert len(counted) == 25
    assert token_lengths(texts | {"3": "b"}, lengths, path, "t")["3"] == 1 and len(counted) == 26
    token_lengths(texts, lengths, path, "another")
    assert len(counted) == 51


def test_the_rubric_is_one_line_for_each_of_61_classes():
    assert len(RUBRIC) == 61 and list(RUBRIC) == sorted(RUBRIC) and all(len(code) == 2 for code in RUBRIC)
    titles = [text.split(": ")[0] for text in RUBRIC.values()]
    assert len(set(titles)) == 61 and all(": " in text for text in RUBRIC.values())
    assert all(f"{code} {text}" in CLASSIFIER for code, text in RUBRIC.items())


@pytest.mark.parametrize("reply, domain", [
    ("11", "Number theory"), ("About primes.\n\n 11 \n", "Number theory"), ("11\n60", "Probability"), ("11.", None),
    ("Class 11", None), ("99", None), ("00", None), ("born in 1911", None), ("", None), ("\n", None), ("1", None),
    ("Number theory", None), ("11\nI am sure", None), ("\u0661\u0661", None)])
def test_a_domain_is_read_strictly(reply, domain):
    assert read_domain(reply) == domain


def test_features_keep_missing_apart_from_wrong(tmp_path):
    names = [row["question_hash"] for row in rows(4)]
    columns = {"domain": dict.fromkeys(names, "d"), "trace_tokens": {names[0]: 2, names[3]: 3},
               "teacher_correct": {names[0]: True, names[1]: False, names[3]: None}, "small_correct": {names[0]: False}}
    features = feature_rows(rows(4), columns)
    assert [row["trace_tokens"] for row in features] == [2, None, None, 3]
    assert [row["teacher_correct"] for row in features] == [True, False, None, None]
    assert [row["small_correct"] for row in features] == [False, None, None, None]
    assert all(row["base_correct"] is None and row["domain"] == "d" for row in features)
    assert read_rows(write_rows(features, tmp_path / "f.parquet", SCHEMA)) == features


def test_the_cause_of_a_hole_is_named():
    whole = dict.fromkeys(SCHEMA.names, 1) | {"question_hash": "a"}
    ungraded = whole | {"teacher_correct": None}
    assert missing_because(whole, {"a": "3"}) is None and missing_because(whole, {"a": None}) is None
    assert missing_because(ungraded, {"a": None}) == "no reference answer" and missing_because(ungraded, {"a": "3"}) == "no teacher_correct"
    assert missing_because(whole | {"trace_tokens": None}, {}) == "no trace"
    assert missing_because(whole | {"domain": None}, {"a": "3"}) == "no domain"


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
    assert set(json.loads(path.read_text().splitlines()[0])) == {"key", "question_hash", "text"}
