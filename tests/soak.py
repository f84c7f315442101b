"""Many calls of `mg_ops.mutual_match` in a row: the process must not grow.

    python tests/soak.py --calls 100000

Shapes vary from call to call, and some calls raise. Prints the resident memory along the way and the growth over the
second half, and exits with 1 if that is more than --limit. No test framework in here.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from random_batches import RandomBatch, random_batch

import mg_ops

WRONG = ({"sigma": 0.5}, {"gt_boxes": None}, {"iou_positive": 2.0}, {"strategy": "best"})


def resident_bytes() -> int:
    """What the process has in memory now."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def call(batch: RandomBatch, number: int, backend: str) -> bool:
    """One call, every tenth of them wrong; whether it was answered."""
    if number % 10:
        batch.call(backend)
        return True
    try:
        mg_ops.mutual_match(**{**batch.arguments, **WRONG[number // 10 % len(WRONG)]}, backend=backend)
    except (TypeError, ValueError):
        return False
    raise AssertionError("a wrong call was answered")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000, help="how many (default 100,000)")
    parser.add_argument("--backend", default="cpp", help="default cpp")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--limit", type=float, default=4.0, help="MiB the second half may add (default 4)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batches = [random_batch(seed) for seed in range(150)]
    started = time.monotonic()
    sizes = []
    answered = 0
    for number in range(options.calls):
        answered += call(batches[number * 7 % len(batches)], number, options.backend)
        if (number + 1) % max(1, options.calls // 10) == 0:
            sizes.append(resident_bytes())
            print(f"{number + 1:,} calls: {sizes[-1] / 2**20:.1f} MiB", flush=True)
    growth = (sizes[-1] - sizes[len(sizes) // 2 - 1]) / 2**20
    print(
        f"{options.calls:,} calls of {options.backend}, {options.calls - answered:,} of them refused, on "
        f"{options.threads} threads in {time.monotonic() - started:.0f} s: the second half added {growth:.2f} MiB"
    )
    return 1 if growth > options.limit else 0


if __name__ == "__main__":
    sys.exit(main())
