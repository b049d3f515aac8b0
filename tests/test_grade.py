"""Grading: extraction, rules, math-verify behind its wall, and text that wants to break it."""
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book.config import S1Error
from s1book.grade import (
    Grade, MathVerifier, answer_kind, audit, boxed, choice_letter, extract_answer, grade, grade_traces,
    is_correct, math_verifier, number, same_by_rule,
)

PIECES = st.sampled_from([
    "\\boxed{", "\\fbox{", "{", "}", "\\{", "\\", "Answer:", "Final Answer:", "(B)", "B", "7", "023", "\\frac{1}{2}",
    "\0", "\ud800", "\n", " ", "$", "<|im_start|>answer", "<|im_end|>", "9**9**9", "1e999", "1/0", "²", "٣", "é",
])
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join))
MATH = {"question": "", "answer": r"\sqrt{2}"}


@pytest.mark.parametrize("text, wanted", [
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{7}, no: \fbox{8}", "8"),
    (r"\boxed{7} and then \boxed{8", "7"),
    (r"\boxed{\boxed{3}}", "3"),
    (r"} \boxed{\{1\}} in {1, 2}", r"\{1\}"),
    ("\\boxed{7", None), ("no box", None), ("", None),
])
def test_boxed(text, wanted):
    assert boxed(text) == wanted


@pytest.mark.parametrize("text, kind, wanted", [
    ("Answer: 3", None, "3"), ("answer: 3\nAnswer: 4", None, "4"), ("Final Answer: 5", None, "5"),
    ("**Answer:** $023$.", None, "023"), ("Answer:\n\n 12 \nmore", None, "12"), ("Answer: 7<|im_end|>\n", None, "7"),
    ("Answer: 1 <|im_start|>answer\n2", None, "2"), ("Answer: \\boxed{9}", None, "9"), (" 7 ", None, "7"),
    ("two words", None, None), ("Answer:", None, None), ("", None, None), (None, None, None),
    ("\\boxed{7", None, None), ("Answer: \\boxed{7", None, None), ("Answer: " + "7" * 5000, None, None),
    ("Answer: (C)", "choice", "C"), ("so the option is (A), no, (D) it is", "choice", "D"), ("B 7", "choice", None),
    ("Answer: B 7", "choice", "B"), ("sorry", "choice", None), ("Answer: A dog", "choice", None), ("C", "choice", "C"),
])
def test_extract_answer(text, kind, wanted):
    assert extract_answer(text, kind) == wanted


def test_only_the_end_of_a_long_text_is_read():
    assert extract_answer("Answer: 3\n" + " so" * 100_000) is None
    assert extract_answer("so " * 100_000 + "Answer: 3") == "3"


def test_unparsable_choice_is_never_a_default_letter():
    row = {"question": "Which ? A 3 B 7 C 1 D 4", "answer": "A"}
    assert answer_kind(row) == "choice"
    for text in ("", "sorry", "I cannot say", "Answer:", "Answer: 3", "Answer: E"):
        assert grade(row, text) == Grade(None, False)


@pytest.mark.parametrize("answer, gold, kind, wanted", [
    ("023", "23", "integer", True), ("1,000", "1000", "integer", True), ("23.0", "23", "integer", True),
    ("4/2", "2", "integer", True), ("x = 25", "25", "integer", True), ("24", "23", "integer", False),
    ("23 or 24", "23", "integer", False), ("", "23", "integer", False), ("1e1", "10", "integer", False),
    ("tin", "nit", "word", False), ("NIT", "nit", "word", True), (r"\text{nit}", "nit", "word", True),
    ("(b)", "B", "choice", True), ("C", "B", "choice", False),
    (r"\dfrac{1}{2}", "0.5", "math", True), ("(x-1)(x+1)", "x^2-1", "math", True), ("x+1", "x-1", "math", False),
    (r"2\sqrt{2}", r"\sqrt{8}", "math", True), (r"\frac{1}{0}", "0.5", "math", False),
])
def test_is_correct(answer, gold, kind, wanted):
    assert is_correct(answer, gold, kind) is wanted


@pytest.mark.parametrize("gold, kind", [("23", "integer"), ("-4", "integer"), ("nit", "word"), ("B", "word"), ("0.5", "math")])
def test_answer_kind(gold, kind):
    assert answer_kind({"question": "How many ?", "answer": gold}) == kind


@given(st.integers(-10**30, 10**30), st.integers(1, 10**9))
def test_number_is_exact(top, bottom):
    value = number(f"{top}/{bottom}")
    assert value * bottom == top and number(f"{top:,}") == top
    assert number(rf"\frac{{{top}}}{{{bottom}}}") == value


@given(TEXTS)
@settings(max_examples=300, deadline=1000)
def test_extraction_never_raises(text):
    for kind in (None, "choice", "integer"):
        answer = extract_answer(text, kind)
        assert answer is None or (isinstance(answer, str) and answer and answer.encode("utf-8"))
        assert kind != "choice" or answer in (None, "A", "B", "C", "D")


@given(TEXTS, st.sampled_from(["integer", "word", "choice"]))
@settings(deadline=1000)
def test_rules_never_raise(text, kind):
    assert same_by_rule(text, "B" if kind == "choice" else "7", kind) in (True, False)
    choice_letter(text)


@given(TEXTS)
@settings(max_examples=40, deadline=5000)
def test_grading_mathematics_never_raises(text):
    assert isinstance(grade(MATH, text), Grade)


@pytest.mark.parametrize("text", [
    "x" * 10_000_000, "\\boxed{" * 1_400_000, "\\" * 1_000_000, "{" * 1_000_000, "answer " * 1_000_000,
    "\\boxed{" + "{" * 10_000 + "7" + "}" * 10_000 + "}", "\\boxed{7", "Answer: 9**9**9", "\\boxed{9^{9^{9}}}",
    "\\boxed{" + "(" * 400 + "x" + ")" * 400 + "}", "\\boxed{" + "\\sqrt{" * 120 + "2" + "}" * 121, "Answer: \0\ud800",
    "Answer: 10**10**10", "Answer: \\boxed{2^{2^{2^{2^{2^{2}}}}}}", "\\boxed{1000000!}", "Answer: __import__('os')",
])
def test_hostile_text_gets_no_credit_quickly(text):
    verifier = math_verifier()
    assert verifier.same("1", "1") is True  # the process is up
    started = time.perf_counter()
    result = grade(MATH, text)
    seconds = time.perf_counter() - started
    assert result.correct is False
    assert seconds < 3 + verifier.cpu_seconds  # a second of work; the rest for a busy machine


@pytest.fixture
def verifier(request):
    """A verifier of the test's own, closed afterwards."""
    verifier = MathVerifier(**request.param)
    yield verifier
    verifier.close()


@pytest.mark.parametrize("verifier", [{"cpu_seconds": 0.3, "wall_seconds": 60}], indirect=True)
def test_towers_are_killed_and_are_no_answer(verifier):
    started = time.perf_counter()
    assert verifier.same("9^{9^{9}}", "7") is None and verifier.process is None
    assert time.perf_counter() - started < 20
    assert verifier.same("1/2", "0.5") is True  # a new process has taken over
    assert grade(MATH, "\\boxed{9^{9^{9}}}") == Grade(None, False)
    assert is_correct("9^{9^{9}}", r"\sqrt{2}", "math") is False


# 0 processor seconds: no limit there
@pytest.mark.parametrize("verifier", [{"cpu_seconds": 0, "wall_seconds": 0.5}], indirect=True)
def test_a_hanging_process_is_killed_by_the_clock_on_the_wall(verifier):
    assert verifier.same("1", "1") is True
    started = time.perf_counter()
    assert verifier.same("9^{9^{9}}", "7") is None
    assert time.perf_counter() - started < 5


def test_a_process_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/true")
    with pytest.raises(S1Error, match="math-verify"):
        MathVerifier().same("1", "1")


def test_missing_attempts_and_references_are_null():
    row = {"question": "", "answer": "3"}
    assert grade(row, None) == Grade(None, None) and grade(row, "nothing here") == Grade(None, False)
    assert grade({"question": "", "answer": None}, "Answer: 3") == Grade(None, None)
    assert grade({"question": "", "answer": float("nan")}, "Answer: 3") == Grade(None, None)  # from Parquet
    assert grade(row, float("nan")) == Grade(None, None) and grade({"question": "", "answer": 0}, "0").correct


def test_grade_traces():
    rows = [{"question_hash": name, "question": "", "answer": "3"} for name in "abc"]
    attempts = [
        {"question_hash": "b", "attempt": "Answer: 3", "error": None},
        {"question_hash": "a", "attempt": None, "error": "timeout"},
        {"question_hash": "b", "attempt": None, "error": "timeout"},
    ]
    grades = grade_traces(rows, attempts, "teacher")
    assert [(g["question_hash"], g["model"], g["correct"]) for g in grades] == [
        ("a", "teacher", None), ("b", "teacher", True), ("c", "teacher", None)]
    with pytest.raises(S1Error, match="'zz'.*different runs"):
        grade_traces(rows, [{"question_hash": "zz", "attempt": "3"}], "teacher")


def test_audit_names_disagreements():
    found = audit([("tin", "nit", "word"), ("tin", "nit", "word"), ("023", "23", "integer")])
    assert found == [{"answer": "tin", "gold": "nit", "kind": "word", "by_rule": False, "by_math_verify": True}]
