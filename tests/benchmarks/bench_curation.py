"""How long curation takes at the paper's size; run by hand: python tests/benchmarks/bench_curation.py

Decontamination: `slow_verdicts` (a dict from every run of words in the pool to the set of questions
with it, as the s1 repository does) against `find_leaks` with its evidence, in one process, on one core,
in turns; medians of processor time. The peak of memory is measured in a turn of its own.
"""

import random
import resource
import statistics
import time
import tracemalloc
from collections import defaultdict

from s1book.decontaminate import (
    build_index, decontaminate, find_leaks, item_words, slow_verdicts, words_of,
)
from s1book.plain import plain_words
from s1book.pool import first_of_each, question_hash

POOL, BENCHMARK, VOCABULARY, TURNS = 59_029, 728, 30_000, 3


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


def in_turns(works):
    """Median seconds of processor time of each piece of work, and its result."""
    seconds, results = {name: [] for name in works}, {}
    for _ in range(TURNS):
        for name, work in works.items():
            started = time.process_time()
            results[name] = work()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}, results


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


def bench_decontaminate():
    """s1's verdicts and s1book's, the obvious way and ours."""
    pool, benchmark = texts(POOL, 0), texts(BENCHMARK, 1)
    pool[::500] = [text + " " + benchmark[i % BENCHMARK][:80] for i, text in enumerate(pool[::500])]
    pool[1::500] = [text + " " + benchmark[i % BENCHMARK] for i, text in enumerate(pool[1::500])]
    rows = [{"question": text, "question_hash": question_hash(text), "source_type": f"made/up{i * 16 // POOL}"}
            for i, text in enumerate(pool)]
    named = [{"question": text, "benchmark": "b", "id": str(i)} for i, text in enumerate(benchmark)]
    works = {"s1, the obvious way (slow_verdicts)": lambda: slow_verdicts(pool, benchmark),
             "s1, ours with evidence": lambda: find_leaks(rows, build_index(named, "s1")),
             "s1book, the obvious way": lambda: slow_shares(pool, benchmark),
             "s1book, ours with evidence": lambda: find_leaks(rows, build_index(named, "s1book")),
             "lower-case and split the pool, no more": lambda: [words_of(text) and None for text in pool]}
    seconds, results = in_turns(works)
    print(f"{POOL:,} questions, {sum(map(len, pool)) / 1e6:.1f} million characters, against {BENCHMARK}")
    for name, work in works.items():
        print(f"{name:45s} {seconds[name]:7.2f} s, peak {peak(work):6.0f} MiB")
    names = list(works)
    for slow, fast in (names[:2], names[2:4]):
        flagged = {leak.question_hash for leak in results[fast]}
        assert {rows[i]["question_hash"] for i in results[slow]} == flagged
        print(f"{fast}: {len(flagged)} flagged by both ways, {seconds[slow] / seconds[fast]:.1f} times as fast")
    started = time.process_time()
    print(f"s1-sequential: {len(decontaminate(rows, named, 's1-sequential'))} flagged in 16 sources, "
          f"{time.process_time() - started:.2f} s")
    return rows


def main():
    """Decontaminate and deduplicate at the paper's size (bench_select.py: the selection)."""
    rows = bench_decontaminate()
    seconds, _ = in_turns({"exact duplicates": lambda: first_of_each(rows + rows[:5000])})
    print(f"{'exact duplicates':45s} {seconds['exact duplicates']:7.2f} s")
    print(f"largest resident size of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
