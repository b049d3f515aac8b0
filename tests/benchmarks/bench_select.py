"""How long the selection takes at the paper's size; run by hand: python tests/benchmarks/bench_select.py

The twins do the same work the obvious way: the rules with pandas, the draws with all weights written out by numpy.
"""

import random
import statistics
import time

import numpy as np
import pandas as pd

from s1book.select import apply_rules, direct_picks, funnel_rules, select, trusted_sources

POOL, SIZE, REPETITIONS = 59_029, 1000, 7
SOURCES = ["AI-MO/NuminaMath-CoT/aops_forum"] * 9 + ["qq8933/AIME_1983_2024", "Idavidrein/gpqa", "qfq/openaimath/Algebra"]
ODD = ["[asy] draw(); [/asy]", "![Image](x.png)", "p1. One. p2. Two.", "**p3.**"]


def pool(n):
    """Made-up candidates: 51 domains of uneven size, 4 % with an odd string, two models that solve a third each."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(5000)]
    flat = rng.choices(words, k=60 * n)
    odd = lambda: rng.choice(ODD) if rng.random() < 0.04 else "Find $x$."
    return [{"question_hash": f"{i:016x}", "question": " ".join([*flat[60 * i:60 * i + rng.randint(20, 60)], odd()]),
             "source_type": rng.choice(SOURCES), "cot_type": "math", "domain": f"d{int(51 * rng.random() ** 2):02}",
             "trace": "t", "attempt": "a", "error": None, "trace_tokens": rng.randrange(300, 9000),
             "teacher_correct": None if rng.random() < 0.08 else rng.random() < 0.6,
             "small_correct": rng.random() < 0.33, "base_correct": rng.random() < 0.33} for i in range(n)]


def ours(rows, quality="s1"):
    """Rules, picks and draw of s1book."""
    hard, _ = apply_rules(rows, funnel_rules(quality))
    return select(hard, direct_picks(hard, trusted_sources(8000))[:393], SIZE, 0)


def pandas_funnel(rows):
    """The same rules as masks over a data frame."""
    frame = pd.DataFrame(rows)
    text, spared = frame["question"], frame["question"].str.contains("[asy]", regex=False) & frame["source_type"].str.contains("AIME")
    odd = (text.str.contains("[asy]", regex=False) | text.str.contains("![Image]", regex=False)
           | text.str.contains(r"p[1-9][0-9]{0,2}\.") | text.str.contains(r"\*\*(?=.*\d)[^\s\]]*\*\*"))
    whole = frame[["domain", "trace_tokens", "teacher_correct", "small_correct", "base_correct"]].notna().all(axis=1)
    answered = frame["error"].isna() & frame["trace"].str.strip().ne("") & frame["attempt"].str.strip().ne("")
    solved = frame["small_correct"].astype(bool) | frame["base_correct"].astype(bool)
    return frame[answered & whole & (~odd | spared) & ~solved]


def pandas_select(frame, picks):
    """Algorithm 1 with a data frame per domain and all weights formed at every draw."""
    rng, chosen = np.random.default_rng(0), list(picks)
    left = frame[~frame["question_hash"].isin(picks)]
    domains = {name: group.sort_values("trace_tokens", ascending=False)["question_hash"].to_numpy()
               for name, group in left.groupby("domain")}
    while len(chosen) < SIZE:
        name = rng.choice(sorted(domains))
        weights = 2.0 ** -np.arange(len(domains[name]))
        at = rng.choice(len(weights), p=weights / weights.sum())
        chosen.append(domains[name][at])
        domains[name] = np.delete(domains[name], at)
        if not len(domains[name]):
            del domains[name]
    return chosen


def theirs(rows):
    """Rules, picks and draw of the twin."""
    frame = pandas_funnel(rows)
    right = frame["teacher_correct"].astype(bool)
    source, tokens = frame["source_type"], frame["trace_tokens"]
    trusted = source.str.startswith(("Idavidrein/gpqa", "qq8933/AIME_1983_2024")) & (tokens > 0)
    trusted |= source.str.startswith(("qfq/openaimath", "simplescaling/openaimath")) & (tokens > 8000)
    return pandas_select(frame, sorted(frame["question_hash"][right & trusted])[:393])


def seconds(works, argument):
    """Median seconds of each work, taken in turn so that a busy machine is busy for all of them."""
    taken = {name: [] for name in works}
    for _ in range(REPETITIONS):
        for name, work in works.items():
            started = time.perf_counter()
            work(argument)
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def report(title, works, argument):
    """Print medians and ratios to the first."""
    medians = seconds(works, argument)
    first = next(iter(medians.values()))
    for name, value in medians.items():
        print(f"{title:28s} {name:22s} {value:7.3f} s   {value / first:5.2f} x")


def main():
    """The whole way, the draw alone with each algorithm, and a check that both ways keep the same hard pool."""
    rows = pool(POOL)
    hard, _ = apply_rules(rows, funnel_rules())
    assert [row["question_hash"] for row in hard] == pandas_funnel(rows)["question_hash"].tolist()
    assert len(ours(rows)) == len(set(theirs(rows))) == SIZE
    print(f"{POOL:,} rows, {len(hard):,} hard, {SIZE:,} selected; medians of {REPETITIONS}, in turn")
    report("rules, picks and draw", {"s1book": ours, "pandas and numpy": theirs,
                                     "s1book, clean rules": lambda r: ours(r, "clean")}, rows)
    frame = pd.DataFrame(rows)
    report(f"draw from {POOL:,}", {
        "s1book": lambda r: select(r, [], SIZE, 0), "paper": lambda r: select(r, [], SIZE, 0, "paper"),
        "code": lambda r: select(r, [], SIZE, 0, "code"), "pandas and numpy": lambda r: pandas_select(frame, [])}, rows)
    report("rules alone", {"s1book": lambda r: apply_rules(r, funnel_rules()), "pandas": pandas_funnel}, rows)


if __name__ == "__main__":
    main()
