"""Grading: extraction, rules, math-verify behind its wall, and text that wants to break it."""
import os
import time
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s1book.choices import LETTERS, choice_letters
from s1book.columns import fill_column, record_key
from s1book.config import S1Error
from s1book.grade import (
    GRADERS, Grade, Grader, answer_kind, are_correct, arrange_choices, audit, boxed, disagreements, extract_answer,
    grade, grade_all, grade_traces, number, options_of, reference, rules_grader, same_by_rule,
)
from s1book.judge import ask_until_read, judge_grader, judge_question, read_verdict
from s1book.verifier import MathVerifier, end, is_tower, math_verifier, verdicts

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


@pytest.mark.parametrize("text, options, wanted", [
    ("Answer: 3", "", "3"), ("answer: 3\nAnswer: 4", "", "4"), ("Final Answer: 5", "", "5"),
    ("**Answer:** $023$.", "", "023"), ("Answer:\n\n 12 \nmore", "", "12"), ("Answer: 7<|im_end|>\n", "", "7"),
    ("Answer: 1 <|im_start|>answer\n2", "", "2"), ("Answer: \\boxed{9}", "", "9"), (" 7 ", "", "7"),
    ("two words", "", None), ("Answer:", "", None), ("", "", None), (None, "", None), (None, "ABCD", None),
    ("\\boxed{7", "", None), ("Answer: \\boxed{7", "", None), ("Answer: " + "7" * 5000, "", None),
    ("Answer: (C)", "ABCD", "C"), ("so the option is (A), no, (D) it is", "ABCD", "D"), ("B 7", "ABCD", None),
    ("think\n<|im_start|>answer\nx = 5<|im_end|>", "", "x = 5"), ("<|im_start|>answer\nfive\nor six", "", None),
    ("<|im_start|>answer\nthe option (B) it is", "ABCD", "B"), ("Answer: 3 <|im_start|>answer\n4", "", "4"),
    ("Answer: B 7", "ABCD", "B"), ("sorry", "ABCD", None), ("Answer: A dog", "ABCD", None), ("C", "ABCD", "C"),
    ("The answer is (E).", "ABCDE", "E"), ("The answer is (E).", "ABCD", None), ("Answer: E) 42", "ABCDE", "E"),
    ("it is (B), for (E) is a point", "ABCD", "B"), ("it is (B), for (E) is a point", "ABCDE", "E"),
    ("the options (A), (C) and (D) are right", "ABCD", "ACD"), ("Answer: A, C", "ABCD", "AC"), ("CA", "ABCD", "AC"),
    (r"\boxed{\text{A, B and D}}", "ABCD", "ABD"), ("Answer: A, E", "ABCD", "A"), ("Answer: AE", "ABCD", None),
    ("(A) and (C)", "ABCD", "AC"), ("(B) 42", "ABCD", "B"), ("<|im_start|>answer\nA and (C)", "ABCD", "AC"),
    ("Answer: Band", "ABCD", None), ("Answer: J", LETTERS, "J"), ("Answer: (i)", LETTERS, "I"), ("Answer: i", "ABCD", None),
])
def test_extract_answer(text, options, wanted):
    assert extract_answer(text, options) == wanted


def test_only_the_end_of_a_long_text_is_read():
    assert extract_answer("Answer: 3\n" + " so" * 100_000) is None
    assert extract_answer("so " * 100_000 + "Answer: 3") == "3"


def test_unparsable_choice_is_never_a_default_letter():
    row = {"question": "Which ? A)3 B)7 C)1 D)4", "answer": "A"}
    assert answer_kind(row) == "choice"
    for text in ("", "sorry", "I cannot say", "Answer:", "Answer: 3", "Answer: E"):
        assert grade(row, text) == Grade(None, False)


@pytest.mark.parametrize("answer, gold, kind, wanted", [
    ("023", "23", "integer", True), ("1,000", "1000", "integer", True), ("23.0", "23", "integer", True),
    ("4/2", "2", "integer", True), ("x = 25", "25", "integer", True), ("24", "23", "integer", False),
    ("23 or 24", "23", "integer", False), ("", "23", "integer", False), ("1e1", "10", "integer", False),
    ("tin", "nit", "word", False), ("NIT", "nit", "word", True), (r"\text{nit}", "nit", "word", True),
    ("(b)", "B", "choice", True), ("C", "B", "choice", False), ("E", "E", "choice", True), ("AC", "A", "choice", False),
    ("C, A", "AC", "choice", True), ("A", "AC", "choice", False), ("ABC", "AC", "choice", False),
    (r"\dfrac{1}{2}", "0.5", "math", True), ("(x-1)(x+1)", "x^2-1", "math", True), ("x+1", "x-1", "math", False),
    (r"2\sqrt{2}", r"\sqrt{8}", "math", True), (r"\frac{1}{0}", "0.5", "math", False),
])
def test_are_correct(answer, gold, kind, wanted):
    assert are_correct([(answer, gold, kind)]) == [wanted]


@pytest.mark.parametrize("gold, kind", [("23", "integer"), ("-4", "integer"), ("nit", "word"), ("B", "word"), ("0.5", "math")])
def test_answer_kind(gold, kind):
    assert answer_kind({"question": "How many ?", "answer": gold}) == kind


@pytest.mark.parametrize("question, gold, options", [
    ("Facing N , turns aU bL ?", "E", ""), ("Largest of a7 b1 ? A)7 B)2 C)0 D)4", "A", "ABCD"),  # the tiny world
    ("Which?\n(A)21\n(B)2\n(C)3\n(D)4\n(E)None of these", "E", "ABCDE"),  # AGIEval
    ("Which?\n\n(A) $1$\n\n(B) $2$\n\n(C) $3$\n\n(D) $4$", "ACD", "ABCD"),  # JEEBench
    ("Which?\n\nA. one\n\nB. two\n\nC. three", "C", "ABC"), (r"\textbf{(A)}\ 1\qquad\textbf{(B)}\ 2", "B", "AB"),
    ("A: 1\nB: 2", "B", "AB"), ("[A] 1 [B] 2", "A", "AB"),
    ("If P (A) = 0.2 and P(B) = 0.8?\n(A)0.2\n(B)0.4\n(C)1", "C", "ABC"),  # what looks like an option stands before
    ("J. D. asks about vitamin E.\n(A)1\n(B)2", "B", "AB"), ("(A)H, P. L\n(B)F, G, H\n(C)A.", "C", "ABC"),
    ("Which?\n(A)1\n(B)2\n(C)3\n(D)4", "E", ""), ("(A) 1 (B) 2 (C) 3", "CA", ""), ("(B) 2 (A) 1", "B", ""),
    ("The point A or B ?", "A", ""), ("(A) only", "A", ""), ("(A) no (B) yes", "yes", ""), ("(A) 1 (B) 2", "AA", ""),
    ("Does (DNA) bind (AB)?", "A", ""),
    ("(A) 1 (B) 2", None, ""), (None, "A", ""), ("(A) 1 (B) 2", float("nan"), ""),
])
def test_multiple_choice_lists_its_options(question, gold, options):
    row = {"question": question, "answer": gold}
    assert options_of(row) == options and (answer_kind(row) == "choice") == bool(options)


FORMS = st.sampled_from(["({0}) {1}", "({0}){1}", "{0}){1}", "{0}. {1}", "{0}: {1}", "[{0}] {1}"])
SAYINGS = st.sampled_from(["Answer: {}", "Answer: ({})", "\\boxed{{{}}}", "so it is ({})", "{}", "<|im_start|>answer\n({})."])


@given(FORMS, st.integers(2, 10), st.sampled_from(["\n", " ", "\n\n"]), SAYINGS, st.data())
@settings(deadline=None)
def test_any_number_of_options_up_to_ten(form, size, gap, saying, data):
    listed, letter = LETTERS[:size], st.sampled_from(LETTERS)
    question = gap.join(["Which one?", *(form.format(letter, i) for i, letter in enumerate(listed))])
    gold, said = data.draw(letter), data.draw(letter)
    row = {"question": question, "answer": gold}
    assert options_of(row) == (listed if gold in listed else "")
    if gold in listed:
        assert grade(row, saying.format(said)) == Grade(said if said in listed else None, said == gold)


@given(st.sets(st.sampled_from("ABCDE"), min_size=1), st.sets(st.sampled_from("ABCDE"), min_size=1), st.randoms(),
       st.sampled_from(["", ", ", " and ", " ", "&", ","]), st.sampled_from(["{}", "({})"]))
def test_several_letters_are_right_when_they_are_the_same_in_any_order(gold, said, rng, gap, form):
    row = {"question": "Which? (A)1 (B)2 (C)3 (D)4 (E)5", "answer": "".join(sorted(gold))}
    order = rng.sample(sorted(said), len(said))
    text = "Answer: " + gap.join(form.format(letter) for letter in order)
    assert grade(row, text) == Grade("".join(sorted(said)), said == gold)


@given(TEXTS, st.text("ABCDEFGHIJ", min_size=1, max_size=3))
@settings(deadline=None)
def test_only_listed_letters_are_answers(text, gold):
    row = {"question": "Which? A)1 B)2 C)3", "answer": gold}
    assert set(grade(row, text).extracted or "") <= set("ABC") or answer_kind(row) != "choice"


@given(st.integers(-10**30, 10**30), st.integers(1, 10**9))
def test_number_is_exact(top, bottom):
    value = number(f"{top}/{bottom}")
    assert value * bottom == top and number(f"{top:,}") == top
    assert number(rf"\frac{{{top}}}{{{bottom}}}") == value


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_extraction_never_raises(text):
    for options in ("", "ABCD", LETTERS):
        answer = extract_answer(text, options)
        assert answer is None or (isinstance(answer, str) and answer and answer.encode("utf-8"))
        assert not options or answer is None or answer == "".join(c for c in options if c in answer)


@given(TEXTS, st.sampled_from(["integer", "word", "choice"]))
@settings(deadline=None)
def test_rules_never_raise(text, kind):
    assert same_by_rule(text, "B" if kind == "choice" else "7", kind) in (True, False)
    choice_letters(text)


@given(TEXTS)
@settings(max_examples=40, deadline=None)
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
    started, used = time.perf_counter(), time.process_time()
    result = grade(MATH, text)
    seconds, ours = time.perf_counter() - started, time.process_time() - used
    assert result.correct is False
    assert verifier.cpu_seconds < 1 and ours < 1 - verifier.cpu_seconds  # a second of work in both processes
    assert seconds < verifier.wall_seconds  # and on the wall, however busy the machine
    assert verifier.process.poll() is None  # what died was a child: the next text finds a warm process


@pytest.mark.parametrize("text", ["Answer: 9**9**9", "\\boxed{9^{9^{9}}}", "Answer: 2^{3^9}+1", "Answer: 10 ** 10 ** 10"])
@pytest.mark.parametrize("gold", ["7", r"\sqrt{2}", "word"])
def test_towers_are_no_answer(text, gold):
    assert grade({"question": "", "answer": gold}, text) == Grade(None, False)


def test_a_tower_that_can_be_written_out_is_compared():
    assert not is_tower("2^{3^2}") and not is_tower("x^{9^9}") and not is_tower("9**9") and is_tower("9**9**9")
    assert are_correct([("2^{3^{2}}", "511+1", "math"), ("9^{9^{9}}", "9^{9^{9}}", "math")]) == [True, True]


@pytest.fixture
def verifier(request):
    """A verifier of the test's own, closed afterwards."""
    verifier = MathVerifier(**request.param)
    yield verifier
    verifier.close()


@pytest.mark.parametrize("verifier", [{"cpu_seconds": 0.3, "wall_seconds": 60}], indirect=True)
def test_towers_are_killed_and_are_no_answer(verifier):
    for _ in range(3):
        assert verifier.same("9^{9^{9}}", "7") is None and verifier.process.poll() is None
        assert verifier.same("1/2", "0.5") is True  # a new child has taken over


@pytest.mark.parametrize("verifier", [{}], indirect=True)
def test_a_process_that_died_between_two_answers_costs_no_verdict(verifier):
    assert verifier.same("1/2", "0.5") is True
    end(verifier.process)
    verifier.process.wait()
    assert verifier.same("1/2", "0.5") is True


# 0 processor seconds: no limit there, so that only the clock on the wall ends the work
@pytest.mark.parametrize("verifier", [{"cpu_seconds": 0, "wall_seconds": 60}], indirect=True)
def test_nobody_survives_the_clock_on_the_wall(verifier):
    assert verifier.same("1", "1") is True
    group, verifier.wall_seconds = verifier.process.pid, 0.5
    assert verifier.same("9^{9^{9}}", "7") is None
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(os.getpgid(int(p)) == group for p in living()):
        time.sleep(0.05)
    assert not [p for p in living() if os.getpgid(int(p)) == group]


def living():
    """Processes that are not zombies, from the process file system."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z" and os.getpgid(int(folder.name)):
                yield folder.name
        except OSError:
            continue


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


def test_a_worked_solution_is_reduced_to_its_answer():
    assert reference({"answer": "Three turns.\nSo it is \\boxed{12}."}) == "12" and reference({"answer": " 12 "}) == "12"
    assert reference({"answer": "A proof.\nIt ends here."}) is None and reference({"answer": " "}) is None
    assert grade({"question": "", "answer": "long\nAnswer: 12"}, "Answer: 12") == Grade("12", True)
    assert grade({"question": "", "answer": "A proof.\nIt ends here."}, "Answer: 12") == Grade(None, None)


def test_many_processes_give_the_verdicts_of_one():
    pairs = [(f"{i}+x", f"x+{i + i % 3}") for i in range(500)]
    assert verdicts(pairs, 1) == verdicts(pairs, 3) == {(a, g): i % 3 == 0 for i, (a, g) in enumerate(pairs)}


def test_grading_together_is_grading_one_by_one():
    rows = [({"question": "", "answer": gold}, text) for gold in ("3", r"\sqrt{2}", "nit", None, "x-1")
            for text in ("Answer: 3", r"\boxed{2^{0.5}}", "Answer: tin", "Answer: -1+x", None, "\\boxed{1000000!}", "?")]
    assert grade_all(rows, 2) == [grade(row, text) for row, text in rows]


@given(st.text(), st.lists(st.text(), min_size=2, max_size=10, unique=True), st.randoms())
def test_options_are_arranged_by_the_hash_alone(question, options, rng):
    right, wrong = options[0], options[1:]
    first = arrange_choices(question, right, wrong)
    rng.shuffle(wrong)
    assert arrange_choices(question, right, wrong) == first
    assert first[0].startswith(question) and f"({first[1]}) {right}" in first[0]


def test_the_same_options_stand_in_another_order_under_another_question():
    letters = {arrange_choices(f"Question {i}?", "3", ["1", "2", "4"])[1] for i in range(40)}
    assert letters == set("ABCD")


def test_options_are_refused_when_they_cannot_be_told_apart():
    for wrong in (["3"], [], list("124567890a")):
        with pytest.raises(S1Error, match="two to ten different"):
            arrange_choices("How many r in raspberry?", "3", wrong)


ROWS = [{"question_hash": name, "question": f"Q {name}", "answer": "3"} for name in "abc"]
ATTEMPTS = [
    {"question_hash": "b", "attempt": "Answer: 3", "error": None},
    {"question_hash": "a", "attempt": None, "error": "timeout"},
    {"question_hash": "b", "attempt": None, "error": "timeout"},
]


def test_grade_traces(tmp_path):
    grades = grade_traces(ROWS, ATTEMPTS, "teacher", tmp_path / "a.jsonl")
    assert grades == [{"question_hash": name, "model": "teacher", "extracted": "3" if right else None, "correct": right}
                      for name, right in (("a", None), ("b", True), ("c", None))]
    with pytest.raises(S1Error, match="'zz'.*different runs"):
        grade_traces(ROWS, [{"question_hash": "zz", "attempt": "3"}], "teacher", tmp_path / "a.jsonl")


def test_grades_are_kept_until_attempt_reference_or_grader_changes(tmp_path):
    graded = []

    def counting(name):
        def work(attempts, done):
            graded.extend(text for _, text in attempts)
            for i, each in enumerate(grade_all(attempts)):
                done(i, {"extracted": each.extracted, "correct": each.correct})
        return Grader(name, partial(fill_column, work=work), reference)

    attempts, path = [{"question_hash": n, "attempt": f"Answer: {n}"} for n in "abc"], tmp_path / "a.jsonl"
    first = grade_traces(ROWS, attempts, "m", path, counting("x"))
    assert grade_traces(ROWS, attempts, "m", path, counting("x")) == first and len(graded) == 3
    grade_traces(ROWS, attempts, "m", path, counting("y"))
    assert len(graded) == 6
    grade_traces(ROWS, [*attempts[:2], {"question_hash": "c", "attempt": "Answer: 3"}], "m", path, counting("y"))
    assert len(graded) == 7
    grade_traces([ROWS[0] | {"answer": "4"}, *ROWS[1:]], attempts, "m", path, counting("y"))
    assert len(graded) == 8


@pytest.mark.parametrize("module", ["grade", "choices", "verifier"])
def test_the_graders_name_changes_with_its_program(monkeypatch, module):
    name, read = rules_grader().name, Path.read_bytes
    assert rules_grader(3).name == name and "@" in name and module in GRADERS
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.stem == module))
    assert rules_grader().name != name


@pytest.mark.parametrize("stop", range(5))
def test_a_column_resumes_where_it_stopped(tmp_path, stop):
    path, worked = tmp_path / "c.jsonl", []

    def work(items, done):
        for i in reversed(range(len(items))):
            if len(worked) == stop:
                raise KeyboardInterrupt
            worked.append(items[i])
            done(i, {"value": items[i] * 2})

    wanted = {f"k{i}": i for i in range(5)}
    with pytest.raises(KeyboardInterrupt):
        fill_column(path, wanted, work)
    path.open("a").write('{"key": "k')
    before, stop = list(worked), 99
    column = fill_column(path, wanted, work)
    assert [record["value"] for record in column.values()] == [0, 2, 4, 6, 8] and sorted(worked) == list(range(5))
    assert len(before) < 5 and list(column) == list(wanted)


def test_a_hole_in_a_column_is_refused_and_the_rest_is_kept(tmp_path):
    with pytest.raises(S1Error, match="3 records were wanted, 2 are there"):
        fill_column(tmp_path / "c.jsonl", {"a": 1, "b": 2, "c": 3}, lambda items, done: [done(0, {}), done(2, {})])
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 2


def test_keys_do_not_run_together():
    assert len({record_key("a", "b"), record_key("ab"), record_key("a b"), record_key("a", None, "b"), record_key("b", "a")}) == 5


@pytest.mark.parametrize("reply, verdict", [
    ("Yes", True), ("No", False), ("They agree.\n\n Yes \n", True), ("Yes\nNo", False), ("Yes.", None), ("yes", None),
    ("**Yes**", None), ("Yes or No", None), ("I say Yes", None), ("", None), ("\n", None), ("Yes\nbecause", None)])
def test_a_verdict_is_read_strictly(reply, verdict):
    assert read_verdict(reply) is verdict


def test_the_judge_sees_problem_attempt_and_solution():
    text = judge_question({"question": "Why ?", "solution": "Because.", "answer": "B"}, "I think so.")
    assert text == "## Problem\nWhy ?\n\n## Attempt\nI think so.\n\n## Correct answer\nBecause."
    assert judge_question({"question": "Why ?", "solution": None, "answer": "B"}, "x").endswith("## Correct answer\nB")


def test_asking_ends_and_asks_only_what_could_not_be_read(tmp_path):
    asked = []

    def ask(jobs, store):
        number = int(store.name.split(".")[1])
        asked.extend((name, number) for name in jobs)
        return {name: {"text": "Yes" if name == "a" or (name, number) == ("b", 3) else "?",
                       "error": "timeout" if name == "d" else None} for name in jobs}

    found = ask_until_read(tmp_path / "c.jsonl", {n: n for n in "abcd"}, "judge", ask, read_verdict, 4)
    assert {n: each["value"] for n, each in found.items()} == {"a": True, "b": True, "c": None, "d": None}
    assert found["d"]["error"] == "timeout" and "reply 4" in found["c"]["error"] and found["a"]["error"] is None
    assert asked == [("a", 1), ("b", 1), ("c", 1), ("d", 1), ("b", 2), ("c", 2), ("b", 3), ("c", 3), ("c", 4)]


def test_a_question_without_any_solution_is_not_judged(tmp_path):
    grader = judge_grader(lambda jobs, store: {name: {"text": "Yes", "error": None} for name in jobs}, "j")
    rows = [{"question_hash": "a", "question": "Q", "answer": None, "solution": None},
            {"question_hash": "b", "question": "R", "answer": None, "solution": "because"}]
    attempts = [{"question_hash": n, "attempt": "so"} for n in "ab"]
    grades = grade_traces(rows, attempts, "m", tmp_path / "a.jsonl", grader)
    assert [grade["correct"] for grade in grades] == [None, True]


def test_audit_counts_and_names_disagreements():
    audited = audit([("tin", "nit", "word"), ("3 apples", "3", "integer"), ("tin", "nit", "word"), ("023", "23", "integer")])
    assert [(each["answer"], each["times"]) for each in disagreements(audited)] == [("tin", 2), ("3 apples", 1)]
    assert len(audited) == 3 and sum(each["times"] for each in audited) == 4
    assert disagreements(audited)[0] == {"answer": "tin", "gold": "nit", "kind": "word", "times": 2,
                                         "by_rule": False, "by_math_verify": True}
