"""Calls of the C++ backend on several threads under ThreadSanitizer, which reports every data race it sees.

`make races` builds a library with ThreadSanitizer in it and runs this with it. Batches are random and take both ways of
sharing work out, images and tiles; every answer must be that of one thread. No test framework in here.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from comparison import assert_same
from random_batches import random_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=3000, help="random batches, each matched twice (default 3,000)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (default 0)")
    parser.add_argument("--threads", type=int, default=4, help="default 4")
    options = parser.parse_args()
    if not hasattr(ctypes.CDLL(None), "__tsan_init"):
        parser.error("ThreadSanitizer is not loaded: run `make races`")
    started = time.monotonic()
    for seed in range(options.first, options.first + options.batches):
        batch = random_batch(seed)
        torch.set_num_threads(1)
        expected = batch.call("cpp")
        torch.set_num_threads(options.threads)
        assert_same(batch.call("cpp"), expected, f"{options.threads} threads, and one: {batch}")
    print(f"{options.batches:,} batches on {options.threads} threads in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
