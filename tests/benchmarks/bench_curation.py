"""How long curation takes at the paper's size; run by hand: python tests/benchmarks/bench_curation.py"""

import random
import resource
import time
import tracemalloc

from s1book.decontaminate import build_index, find_leaks, slow_verdicts
from s1book.pool import first_of_each, question_hash

POOL, BENCHMARK, VOCABULARY = 59_029, 728, 30_000


def texts(n, seed):
    """Made-up questions of about sixty words with the word frequencies of natural text (Zipf)."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(VOCABULARY)]
    weights = [1 / (i + 1) for i in range(VOCABULARY)]
    flat = iter(rng.choices(words, weights, k=95 * n))
    return [" ".join(next(flat) for _ in range(rng.randint(25, 95))) for _ in range(n)]


def timed(name, work, memory=False):
    """Print seconds of processor time, and the peak of memory that Python held, measured apart."""
    started = time.process_time()
    result = work()
    seconds, peak = time.process_time() - started, ""
    if memory:
        tracemalloc.start()
        work()
        peak = f", peak {tracemalloc.get_traced_memory()[1] / 2**20:.0f} MiB"
        tracemalloc.stop()
    print(f"{name:45s} {seconds:7.2f} s{peak}")
    return result, seconds


def main():
    """Decontaminate and deduplicate at the paper's size (bench_select.py: the selection)."""
    pool, benchmark = texts(POOL, 0), texts(BENCHMARK, 1)
    pool[::500] = [text + " " + benchmark[i % BENCHMARK][:80] for i, text in enumerate(pool[::500])]
    rows = [{"question": text, "question_hash": question_hash(text)} for text in pool]
    named = [{"question": text, "benchmark": "b", "id": str(i)} for i, text in enumerate(benchmark)]
    slow, slow_s = timed("decontaminate, dict of sets over the pool", lambda: slow_verdicts(pool, benchmark), memory=True)
    fast, fast_s = timed("decontaminate, inverted index, with evidence", lambda: find_leaks(rows, build_index(named)), memory=True)
    assert {rows[i]["question_hash"] for i in slow} == {leak.question_hash for leak in fast}
    print(f"{len(fast)} flagged by both; {slow_s / fast_s:.1f} times as fast")
    timed("exact duplicates", lambda: first_of_each(rows + rows[:5000]))
    print(f"largest resident size of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


if __name__ == "__main__":
    main()
