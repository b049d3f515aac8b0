"""Near-duplicates at the paper's size: which library finds the candidates; run by hand:

    python tests/benchmarks/bench_duplicates.py all      (each candidate in a process of its own)
    python tests/benchmarks/bench_duplicates.py collect  (chapter 02's way from sixteen folders to the pool)

Only rensa is a dependency of the course; the other candidates must be installed for a comparison.

The pool is made up (bench_curation.texts) with planted copies: other case and commas, one word changed, two words
added, and decoys in which only a number changed. The truth is an exact join over all pairs. A candidate proposes
earlier rows; what it proposes is compared exactly in every case, so that only what it misses can differ.
"""

import argparse
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bench_curation import POOL, texts
from datasets import Dataset, disable_progress_bars
from s1book.pool import collect, jaccard, marks, shingles
from s1book.sources import Store, dataset_source

disable_progress_bars()

PLANTED, THRESHOLD, PERMUTATIONS, BANDS, SEED = 2_000, 0.8, 126, 42, 42
KINDS = {
    "case and commas": lambda words, rng: ["Please:", *(w.upper() if rng.random() < 0.3 else w for w in words)],
    "one word changed": lambda words, rng: words[:-9] + ["changed"] + words[-8:],
    "two words added": lambda words, rng: words + ["thank", "you"],
    "one number changed": lambda words, rng: words[:-1] + [str(rng.randint(1000, 9999))],
}


def pool(n=POOL, planted=PLANTED):
    """Texts in order, and for every planted copy its place, the place of its original and its kind."""
    rng, rows = random.Random(0), texts(n - planted, 0)
    letters = str.maketrans("0123456789", "abcdefghij")  # a word has no digits: those of a number matter
    rows = [re.sub(r"w\d+", lambda w: w[0].translate(letters), text) for text in rows]
    rows = [f"{text} {rng.randint(1000, 9999)}" for text in rows]
    copies = []
    for i in range(planted):
        kind = list(KINDS)[i % len(KINDS)]
        copies.append((len(rows), i, kind))
        rows.append(" ".join(KINDS[kind](rows[i].split(), rng)))
    return rows, copies


def similar(a, b, sets, rows):
    return jaccard(sets[a], sets[b]) >= THRESHOLD and marks(rows[a]) == marks(rows[b])


def exact(rows, sets):
    """All earlier rows that can reach the threshold: they share one of the rarest shingles (prefix filter)."""
    often = Counter(s for one in sets for s in one)
    cards = defaultdict(list)
    for i, one in enumerate(sets):
        rare = sorted(one, key=lambda s: (often[s], s))[:len(one) - -(-len(one) * 8 // 10) + 1]
        yield i, {j for s in rare for j in cards[s]}
        for s in rare:
            cards[s].append(i)


def by_datasketch(rows, sets):
    from datasketch import MinHash, MinHashLSH
    index = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, PERMUTATIONS // BANDS))
    for i, one in enumerate(sets):
        sketch = MinHash(num_perm=PERMUTATIONS, seed=SEED)
        sketch.update_batch([s.encode() for s in one])
        yield i, index.query(sketch)
        index.insert(i, sketch, check_duplication=False)


def by_rensa(rows, sets):
    from rensa import RMinHash, RMinHashLSH
    index = RMinHashLSH(threshold=0.0, num_perm=PERMUTATIONS, num_bands=BANDS)
    for i, one in enumerate(sets):
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
        sketch.update(list(one))
        yield i, index.query(sketch)
        index.insert(i, sketch)


def by_gaoya(rows, sets):
    from gaoya.minhash import MinHashStringIndex
    index = MinHashStringIndex(hash_size=32, jaccard_threshold=0.0, num_bands=BANDS, band_size=PERMUTATIONS // BANDS,
                               analyzer="word", lowercase=True, ngram_range=(3, 3))
    for i, row in enumerate(rows):
        yield i, index.query(row)
        index.insert_document(i, row)


def by_fastsketch(rows, sets):
    from FastSketchLSH import LSH, FastSimilaritySketch
    sketcher = FastSimilaritySketch(size=128, seed=SEED)  # it wants a power of two
    index = LSH(num_perm=128, num_bands=32, num_threads=1)
    for i, one in enumerate(sets):
        sketch = sketcher.batch([sorted(one)])
        yield i, index.query(sketch)[0]
        index.insert(sketch)


FINDERS = {"exact": exact, "datasketch": by_datasketch, "rensa": by_rensa, "gaoya": by_gaoya, "fastsketch": by_fastsketch}


def run(name, n):
    rows, copies = pool(n, min(PLANTED, n // 10))
    started = time.process_time()
    sets = [shingles(text) for text in rows]
    shingled = time.process_time() - started
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pairs, proposed = set(), 0
    for i, candidates in FINDERS[name](rows, sets):
        proposed += len(candidates)
        pairs |= {(int(j), i) for j in candidates if similar(int(j), i, sets, rows)}
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    hits = Counter(kind for i, j, kind in copies if (j, i) in pairs)
    due = Counter(kind for i, j, kind in copies if similar(j, i, sets, rows))
    found = ", ".join(f"{kind} {hits[kind]} of {due[kind]}" for kind in KINDS)
    print(f"{name:11s} {len(rows):,} rows: {seconds:6.1f} s ({shingled:.1f} s of them shingles), "
          f"{peak - before:5.0f} MiB more, {proposed:,} proposed, {len(pairs):,} pairs; {found}", flush=True)


def collected(n):
    """Write the rows into sixteen folders of the published shape, then read, hash and deduplicate them."""
    rows, copies = pool(n, min(PLANTED, n // 10))
    folder = Path(tempfile.mkdtemp())
    for i in range(16):
        part = [{"question": text, "solution": "s" * 400, "source_type": f"made/up{i}", "cot_type": "math"}
                for text in rows[i::16]]
        (folder / str(i)).mkdir()
        Dataset.from_list(part).to_parquet(folder / str(i) / "train.parquet")
    del part
    for streaming in (False, True):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        started, sources = time.process_time(), [dataset_source(str(folder / str(i)), Store("", streaming))
                                                 for i in range(16)]
        found = collect(sources, near=THRESHOLD)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{'streamed' if streaming else 'loaded'}: {len(rows):,} rows in, {len(found.rows):,} out, "
              f"{len(found.pairs):,} near-duplicates, {time.process_time() - started:.1f} s, peak {peak:.0f} MiB "
              f"({before:.0f} before)", flush=True)


def main():
    """One candidate, or all in turn."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("name", choices=[*FINDERS, "all", "collect"])
    arguments.add_argument("--rows", type=int, default=POOL)
    given = arguments.parse_args()
    if given.name == "collect":
        return collected(given.rows)
    if given.name != "all":
        return run(given.name, given.rows)
    for name in FINDERS:
        subprocess.run([sys.executable, __file__, name, "--rows", str(given.rows)], check=False)


if __name__ == "__main__":
    main()
