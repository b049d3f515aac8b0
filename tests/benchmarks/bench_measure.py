"""How long do bootstraps and grading take? By hand: python tests/benchmarks/bench_measure.py

Both ways to grade get the same answers; ratios inside a repetition scatter less than times.
"""

import json
import random
import statistics
import time

import numpy as np
from math_verify import parse, verify

from s1book.grade import grade_all
from s1book.stats import paired_bootstrap
from s1book.verifier import math_verifier

ANSWERS, ONE_BY_ONE, REPETITIONS, CORES = 10_000, 500, 3, 2
Q, K = 728, 16


def seconds(work):
    """A result and the time it took."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def spread(values):
    """Least, median, most."""
    return [round(f(values), 3) for f in (min, statistics.median, max)]


def loop(before, after, resamples, seed):
    """The obvious bootstrap, one resample after the other."""
    rng, difference = np.random.default_rng(seed), (after - before).mean(axis=1).tolist()
    means = []
    for _ in range(resamples):
        means.append(sum(difference[i] for i in rng.integers(Q, size=Q, dtype=np.int32)) / Q)
    return np.quantile(means, [0.025, 0.975])


def bootstraps():
    """10,000 paired bootstraps over 728 questions with 16 samples each."""
    rng = np.random.default_rng(0)
    before, after = rng.random((2, Q, K)) < 0.5
    before, after = before.astype(float), after.astype(float)
    ours, times, ratios = None, [], []
    for seed in range(REPETITIONS):
        ours, fast = seconds(lambda: paired_bootstrap(before, after, 10_000, seed))
        theirs, slow = seconds(lambda: loop(before, after, 500, seed))
        assert np.allclose([ours.low, ours.high], theirs, atol=0.004)
        times.append(fast)
        ratios.append(20 * slow / fast)
    print(
        json.dumps(
            {
                "10,000 paired bootstraps, 728 x 16, seconds": spread(times),
                "obvious loop / ours": spread(ratios),
                "n": REPETITIONS,
            }
        )
    )


def made_up(seed):
    """A question and what a model wrote: numbers, fractions, expressions, half of them right."""
    rng = random.Random(seed)
    a, b = rng.randrange(2, 999), rng.randrange(2, 99)
    gold = rng.choice(
        [f"{a}", f"\\frac{{{a}}}{{{b}}}", f"{a}\\sqrt{{{b}}}", f"x^2+{a}x+{b}", f"({a}, {b})"]
    )
    shown = (
        gold
        if rng.random() < 0.5
        else gold.replace(str(a), str(a + 1)).replace("\\frac", "\\dfrac")
    )
    return {"question": "made up", "answer": gold}, f"So the result is $\\boxed{{{shown}}}$."


def one_by_one(attempts):
    """math-verify on text after text, as its README shows it."""
    return [
        verify(
            parse(f"${row['answer']}$", parsing_timeout=None),
            parse(text, parsing_timeout=None),
            timeout_seconds=None,
        )
        for row, text in attempts
    ]


def grading():
    """10,000 answers on two cores, against math-verify called one by one."""
    for number in range(CORES):
        math_verifier(number).same("1", "1")  # start the processes
    rates, ratios, differ = [], [], 0
    for repetition in range(REPETITIONS):
        attempts = [made_up(f"{repetition} {i}") for i in range(ANSWERS)]
        ours, fast = seconds(lambda: grade_all(attempts, CORES))
        theirs, slow = seconds(lambda: one_by_one(attempts[:ONE_BY_ONE]))
        differ += sum(bool(a.correct) != b for a, b in zip(ours, theirs))
        rates.append(fast)
        ratios.append(slow / ONE_BY_ONE * ANSWERS / fast)
    print(
        json.dumps(
            {
                f"{ANSWERS} answers graded, seconds": spread(rates),
                "math-verify one by one / ours": spread(ratios),
                f"verdicts that differ, of {REPETITIONS * ONE_BY_ONE}": differ,
                "cores": CORES,
                "n": REPETITIONS,
            }
        )
    )


if __name__ == "__main__":
    bootstraps()
    grading()
