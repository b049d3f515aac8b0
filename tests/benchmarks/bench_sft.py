"""How much faster is the fine-tuning packed than padded? Tokens per second, one ratio per pair.

Run it alone: `OMP_NUM_THREADS=1 python tests/benchmarks/bench_sft.py`. Both ways train the
same base on the same samples in the same order, interleaved; "padded" is TRL with the recipe and
nothing else, "packed" is `sft.packing=true`. The losses of every step must agree to
1e-4, or the script fails.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from transformers.utils import logging

from s1book.config import Run, load_preset
from s1book.sft import load_samples, make_trainer
from s1book.training_files import vocabulary

WAYS = {"padded": "sft.packing=false", "packed": "sft.packing=true"}


def once(run, samples, epochs, setting):
    """Seconds and losses of one training."""
    preset = load_preset("tiny", [f"sft.epochs={epochs}", setting])
    trainer = make_trainer(preset, run.model("base"), samples, Path(tempfile.mkdtemp()))
    trainer.args.save_strategy = "no"
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    return seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main():
    """Print tokens per second of both ways, and the ratio of each pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    logging.set_verbosity_error()
    run = Run.open("tiny")
    samples = load_samples(run.read("sft_tokens.parquet"), vocabulary(run.model("base")))
    tokens = options.epochs * sum(map(len, samples["input_ids"]))
    speeds, apart, finals = {way: [] for way in WAYS}, 0.0, {}
    for _ in range(options.repeats):
        curves = {}
        for way, setting in WAYS.items():
            seconds, curves[way] = once(run, samples, options.epochs, setting)
            speeds[way].append(tokens / seconds)
            finals[way] = curves[way][-1]
        apart = max(apart, *(abs(a - b) for a, b in zip(*curves.values(), strict=True)))
    assert apart < 1e-4, f"the losses differ by {apart}"
    ratios = [b / a for a, b in zip(speeds["padded"], speeds["packed"])]
    print(json.dumps({
        "samples": len(samples), "steps": len(curves["padded"]), "repeats": options.repeats,
        "tokens per second": {way: round(statistics.median(s)) for way, s in speeds.items()},
        "ratio, median": round(statistics.median(ratios), 2),
        "ratio, range": [round(min(ratios), 2), round(max(ratios), 2)],
        "largest difference of a loss": apart, "final loss": finals}, indent=1))


if __name__ == "__main__":
    main()
