"""Does handing prompts over in sorted waves pay, and how long does grading take? By hand: python tests/benchmarks/bench_features.py

The ways to ask are interleaved and must give the same tokens; ratios inside a repetition scatter less than times.
"""

import json
import statistics
import time

from s1book import tiny
from s1book.config import Run
from s1book.engine import Continuation, Sampling, open_engine
from s1book.grade import grade_all
from s1book.verifier import math_verifier, verdicts

QUESTIONS, LIMIT, REPETITIONS = 4096, 96, 5


def ask_once(ids, stop_ids):
    """One greedy continuation."""
    [got] = yield [Continuation(ids, LIMIT, stop_ids, Sampling())]
    return got.new_ids


def answer(engine, ids, stop_ids, wave, in_order):
    """All prompts in waves, shortest first or as they come."""
    order = range(len(ids)) if in_order else sorted(range(len(ids)), key=lambda i: len(ids[i]))
    new = {}
    for part in (order[k:k + wave] for k in range(0, len(ids), wave)):
        new |= zip(part, engine.run([ask_once(ids[i], stop_ids) for i in part]))
    return [new[i] for i in range(len(ids))]


def seconds(work):
    """A result and the time it took."""
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def main():
    """Print the ratio of all at once over waves, then the speed of grading."""
    run = Run.open("tiny")
    engine, tokenizer = open_engine(run.preset, run.model("base"))
    rows = [row for row, _ in zip(tiny.questions(2 * QUESTIONS, 7), range(QUESTIONS))]
    ids = tokenizer([tiny.plain_prompt(row) for row in rows], add_special_tokens=False)["input_ids"]
    stop_ids, slots = frozenset({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")}), engine.slots
    ratios = []
    for _ in range(REPETITIONS):
        plain, slow = seconds(lambda: answer(engine, ids, stop_ids, QUESTIONS, True))
        waves, fast = seconds(lambda: answer(engine, ids, stop_ids, slots, False))
        assert plain == waves
        ratios.append(slow / fast)
    print(json.dumps({"slots": slots, "all at once / waves": [round(f(ratios), 2) for f in (min, statistics.median, max)]}))
    texts = tokenizer.batch_decode(waves)
    _, spent = seconds(lambda: grade_all(zip(rows, texts)))
    print(json.dumps({"tiny answers graded per second": round(QUESTIONS / spent)}))
    pairs = [(f"{i}+x", f"x+{i + i % 2}") for i in range(4000)]
    for number in range(2):
        math_verifier(number).same("1", "1")
    ratios = []
    for repetition in range(3):
        one, slow = seconds(lambda: verdicts(pairs, 1))
        two, fast = seconds(lambda: verdicts(pairs, 2))
        assert one == two
        ratios.append(slow / fast)
    print(json.dumps({"one process / two": round(statistics.median(ratios), 2), "pairs per second, one": round(4000 / slow)}))


if __name__ == "__main__":
    main()
