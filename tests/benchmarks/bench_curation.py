"""How long curation takes at the paper's size; run by hand:

    python tests/benchmarks/bench_curation.py                          (everything; many minutes. Records its
                                            figures in data/reference/decontamination.csv for chapter 03)
    python tests/benchmarks/bench_curation.py time --method s1book     (ratios of one method, in turns)
    python tests/benchmarks/bench_curation.py memory --method s1book   (peaks of one method)
    python tests/benchmarks/bench_curation.py rest                     (the sequential variant, equal questions)

Decontamination: `slow_verdicts` (a dict from every run of words in the pool to the set of questions
with it, as the s1 repository does) against `find_leaks` with its evidence, in one process, on one core,
in turns; processor time, and the ratio inside each turn, as least / median / most. The peak of memory is measured
in a turn of its own, for a pass over the pool slows down under the tracer.
"""

import argparse
import csv
import platform
import random
import resource
import statistics
import time
import tracemalloc
from collections import defaultdict

from s1book.config import project_root
from s1book.decontaminate import (
    WORDS, build_index, decontaminate, find_leaks, item_words, slow_verdicts,
)
from s1book.plain import plain_words
from s1book.pool import first_of_each, question_hash

POOL, BENCHMARK, VOCABULARY = 59_029, 728, 30_000


def texts(n, seed):
    """Made-up questions of 25 to 95 words: frequencies of natural text (Zipf), commas, some LaTeX."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(VOCABULARY)]
    weights = [1 / (i + 1) for i in range(VOCABULARY)]
    flat = iter(rng.choices(words, weights, k=95 * n))
    forms = ["{0}"] * 17 + ["{0},", "${0}_{1}$", r"$\frac{{{0}}}{{{1}}}+{2}$"]
    number = lambda: int(10 ** rng.uniform(0, 3))
    word = lambda: rng.choice(forms).format(next(flat), number(), number())
    return [" ".join(word() for _ in range(rng.randint(25, 95))) for _ in range(n)]


def in_turns(works, turns):
    """Seconds of processor time of each piece of work, one number per turn, and its result."""
    seconds, results = {name: [] for name in works}, {}
    for _ in range(turns):
        for name, work in works.items():
            started = time.process_time()
            results[name] = work()
            seconds[name].append(time.process_time() - started)
    return seconds, results


def spread(numbers):
    """Least, median and most."""
    return " / ".join(f"{f(numbers):.2f}" for f in (min, statistics.median, max))


def peak(work):
    """The most memory that Python held while this ran, MiB."""
    tracemalloc.start()
    work()
    most = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return most


def slow_shares(pool, benchmark, n=8, coverage=0.75):
    """Method s1book the obvious way: an index of the pool for every length, then each item's coverage."""
    items = [item_words(text, "s1book", n) for text in benchmark]
    where = {length: defaultdict(set) for _, length in items}
    for number, question in enumerate(pool):
        words = plain_words(question)
        for length, cards in where.items():
            for start in range(len(words) - length + 1):
                cards[" ".join(words[start:start + length])].add(number)
    leaked = set()
    for words, length in items:
        inside = defaultdict(set)
        for start in range(len(words) - length + 1):
            for number in where[length].get(" ".join(words[start:start + length]), ()):
                inside[number].update(range(start, start + length))
        leaked |= {number for number, places in inside.items() if len(places) / len(words) >= coverage}
    return leaked


def material():
    """Pool and benchmark as texts and as rows; every 500th question holds 80 characters of an item, the next a whole one."""
    pool, benchmark = texts(POOL, 0), texts(BENCHMARK, 1)
    pool[::500] = [text + " " + benchmark[i % BENCHMARK][:80] for i, text in enumerate(pool[::500])]
    pool[1::500] = [text + " " + benchmark[i % BENCHMARK] for i, text in enumerate(pool[1::500])]
    rows = [{"question": text, "question_hash": question_hash(text), "source_type": f"made/up{i * 16 // POOL}"}
            for i, text in enumerate(pool)]
    named = [{"question": text, "benchmark": "b", "id": str(i)} for i, text in enumerate(benchmark)]
    print(f"{POOL:,} questions, {sum(map(len, pool)) / 1e6:.1f} million characters, against {BENCHMARK}", flush=True)
    return pool, benchmark, rows, named


def ways(method, pool, benchmark, rows, named):
    """The obvious way, ours with its evidence, and what any way must do: read the pool."""
    obvious = {"s1": slow_verdicts, "s1book": slow_shares}[method]
    read = WORDS[method]
    return {"obvious": lambda: obvious(pool, benchmark),
            "ours": lambda: find_leaks(rows, build_index(named, method)),
            "only its words": lambda: [read(text) and None for text in pool]}


def compare(method, turns, pool, benchmark, rows, named):
    """How long each way takes, one record a turn; the first two flag the same questions."""
    seconds, results = in_turns(ways(method, pool, benchmark, rows, named), turns)
    for way, taken in seconds.items():
        print(f"{method}, {way:20s} {spread(taken)} s in {turns} turns", flush=True)
    flagged = {leak.question_hash for leak in results["ours"]}
    assert {rows[i]["question_hash"] for i in results["obvious"]} == flagged
    ratios = [a / b for a, b in zip(seconds["obvious"], seconds["ours"])]
    print(f"{method}: {len(flagged)} flagged by both ways, {spread(ratios)} times as fast", flush=True)
    return [{"method": method, "way": way, "turn": turn, "seconds": round(each, 3)}
            for way, taken in seconds.items() for turn, each in enumerate(taken, 1)]


def peaks(method, *stuff):
    """The most memory of each way, MiB."""
    found = {(method, way): round(peak(work)) for way, work in ways(method, *stuff).items()}
    for (_, way), most in found.items():
        print(f"{method}, {way:20s} peak {most:6d} MiB", flush=True)
    return found


def others(rows, named, turns):
    """What has no obvious twin here: the sequential variant, exact duplicates."""
    works = {"s1-sequential, 16 sources": lambda: decontaminate(rows, named, "s1-sequential"),
             "exact duplicates": lambda: first_of_each(rows + rows[:5000])}
    for name, taken in in_turns(works, turns)[0].items():
        print(f"{name:45s} {spread(taken)} s", flush=True)


def record(timed, most):
    """Write the figures that chapter 03 shows."""
    also = {"questions": POOL, "items": BENCHMARK, "machine": f"{platform.machine()}, one CPU core"}
    rows = [each | {"peak_mib": most[each["method"], each["way"]]} | also for each in timed]
    with open(project_root() / "data/reference/decontamination.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def main():
    """Decontaminate and deduplicate at the paper's size (bench_select.py: the selection)."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("part", nargs="?", choices=["time", "memory", "rest", "all"], default="all")
    arguments.add_argument("--method", choices=["s1", "s1book", "both"], default="both")
    arguments.add_argument("--turns", type=int, default=5)
    given = arguments.parse_args()
    stuff, timed, most = material(), [], {}
    for method in ("s1", "s1book") if given.method == "both" else (given.method,):
        timed += compare(method, given.turns, *stuff) if given.part in ("time", "all") else []
        most |= peaks(method, *stuff) if given.part in ("memory", "all") else {}
    if given.part in ("rest", "all"):
        others(*stuff[2:], given.turns)
    if (given.part, given.method) == ("all", "both"):
        record(timed, most)
    print(f"largest resident size of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
