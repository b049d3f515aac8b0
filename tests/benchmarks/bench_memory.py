"""Peak memory of a training, counted and predicted, for three model sizes: data/reference/memory.csv.

Run: python tests/benchmarks/bench_memory.py   (about two minutes on one core; one process each)
"""

import csv
import json
import platform
import subprocess
import sys

from s1book.config import load_preset, parameters, project_root
from s1book.cost import measured_peak, memory

SIZES = {  # layers, hidden, intermediate, kv_heads, head_dim, vocabulary; tokens
    "5M": ((4, 256, 704, 2, 64, 4096), 1024),
    "32M": ((8, 512, 1408, 4, 64, 8192), 512),
    "70M": ((8, 640, 2560, 5, 64, 16384), 512),
}


def preset(size, recompute):
    """Tiny with another shape and length, two passes per step."""
    shape, length = SIZES[size]
    keys = ("layers", "hidden", "intermediate", "kv_heads", "head_dim", "vocabulary")
    return load_preset("tiny", [
        *(f"model.shape.{key}={value}" for key, value in zip(keys, shape)),
        "sft.epochs=1", "sft.batch_size=2", "sft.micro_batch_size=1",
        f"sft.max_length={length}", f"sft.gradient_checkpointing={str(recompute).lower()}"])


def row(size, recompute):
    """One line of the table."""
    p = preset(size, recompute)
    peak = measured_peak(p, str(project_root() / "data/tiny/base"))
    return dict(size=size, weights=parameters(p.model.shape), tokens=p.sft.max_length,
                recompute=recompute, predicted_mb=round(memory(p).total / 1e6, 1),
                measured_mb=round(peak / 1e6, 1), n=1,
                machine=f"{platform.machine()}, one CPU core")


def main():
    """Each size in a fresh process, so that none inherits memory from another."""
    if len(sys.argv) > 1:
        print("row", json.dumps(row(sys.argv[1], sys.argv[2] == "True")))
        return
    rows = []
    for size in SIZES:
        for recompute in (False, True):
            done = subprocess.run([sys.executable, __file__, size, str(recompute)],
                                  stdout=subprocess.PIPE, text=True, check=True).stdout
            rows += [json.loads(x[4:]) for x in done.splitlines() if x.startswith("row ")]
            print(rows[-1])
    with open(project_root() / "data/reference/memory.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
