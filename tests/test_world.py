"""The questions of the tiny world: exact answers, and passes that cover every item."""

import random
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s1book.config import S1Error
from s1book.world import (
    FAMILIES, HEADERS, conclusion, from_row, item_word, join, make_problem, pass_words, spell, to_row, work,
)

# What each family asks, said a second time and differently.
OBVIOUS = {
    "letters": lambda p: p.values.count(p.target),
    "sum": lambda p: sum(map(int, p.values)) % 10,
    "max": lambda p: max(map(int, p.values)),
    "odd": lambda p: len([v for v in p.values if v in "13579"]) % 10,
    "nim": lambda p: reduce(lambda a, b: a ^ b, map(int, p.values)),
    "product": lambda p: reduce(lambda a, b: a * b, map(int, p.values)) % 7,
    "cups": lambda p: _follow(p),
    "compass": lambda p: _turn(p),
}


def _follow(problem):
    cups = [str(i) == problem.start for i in range(5)]
    for a, b in problem.values:
        cups[int(a)], cups[int(b)] = cups[int(b)], cups[int(a)]
    return cups.index(True)


def _turn(problem):
    degrees = {"N": 0, "E": 90, "S": 180, "W": 270}
    turned = sum({"R": 90, "L": -90, "U": 180}[v] for v in problem.values)
    return {d: name for name, d in degrees.items()}[(degrees[problem.start] + turned) % 360]


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 12), st.integers(0, 10**6), st.booleans())
def test_answers_are_exact(family, n, seed, choice):
    problem = make_problem(family, n, random.Random(seed), choice)
    right = str(OBVIOUS[family](problem))
    shown = dict(zip("ABCD", problem.options))
    assert (shown[problem.answer] if choice else problem.answer) == right
    assert len(set(problem.options)) == (4 if choice else 0)
    assert from_row(to_row(problem)) == problem
    assert f"Answer: {problem.answer}" in to_row(problem)["solution"]


def test_raspberry():
    assert spell("raspberry", "r").answer == "3"
    for word, letter in (("", "r"), ("raspberry", "rr"), ("quiz", "z"), ("a" * 13, "a")):
        with pytest.raises(S1Error, match="wanted at most 12 letters"):
            spell(word, letter)


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 12), st.sampled_from(list(HEADERS)),
       st.integers(0, 10**6))
def test_work_without_slips_is_right_and_covers_every_item(family, n, k, seed):
    problem = make_problem(family, n, random.Random(seed))
    lines = work(problem, k, random.Random(seed))
    assert lines[-1].words[-1] == problem.result
    items = [w for line in lines for w in line.words[1:-2]]
    assert items == [item_word(family, i, v) for i, v in enumerate(problem.values)]
    assert all(a.words[-1] == b.words[0] for a, b in zip(lines, lines[1:]))


def test_every_slip_is_wrong_and_carried_on():
    problem = make_problem("sum", 12, random.Random(1))
    lines = work(problem, 2, random.Random(2), slip=1.0)
    for i, line in enumerate(lines):
        part = problem.values[2 * i:2 * i + 2]
        assert line.slipped and FAMILIES["sum"].fold(line.words[0], part, "") != line.words[-1]


def test_a_first_pass_improves_the_best_result_and_a_later_one_replaces_it():
    problem = spell("raspberry", "r")
    first = pass_words(problem, 3, work(problem, 3, random.Random(0)))
    assert join(w.word for w in first).endswith("1 7r 8r 9y r= 3\nSo 3")
    results = [w.best for w, after in zip(first, first[1:]) if after.word == "\n"]
    assert results == ["", "1", "1", "3", "3"]
    later = pass_words(problem, 3, work(problem, 3, random.Random(0), slip=1.0), best="7")
    assert {w.best for w in later[:-3]} == {"7"} and later[-1].best == later[-2].word != "3"
    assert [w.learn for w, after in zip(later, later[1:]) if after.word == "\n"] == [True] + [False] * 3 + [True]


def test_the_conclusion_shows_the_option_if_there_is_one():
    problem = make_problem("sum", 6, random.Random(2), choice=True)
    assert conclusion(problem, problem.result) == ["So", problem.result, f"{problem.answer}){problem.result}"]
    absent = next(r for r in "0123456789" if r not in problem.options)
    assert conclusion(problem, absent) == ["So", absent] and problem.say(absent) == absent
