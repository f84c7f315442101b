"""Runs the CUDA kernels on the CPU against the reference; `--help` says with what."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402

import cuda_on_cpu  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/cuda_on_cpu", description=__doc__)
    parser.add_argument("--threads", type=int, default=64, help="threads of a block (a multiple of 32; default 64)")
    parser.add_argument("--staged-keys", type=int, default=8, help="longest list ranked in shared memory (default 8)")
    parser.add_argument("--batches", type=int, default=50, help="how many random batches (default 50)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (default 0)")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--mistake", type=int, default=0, help="run the kernel with this mistake instead (1 to 5)")
    options = parser.parse_args()
    if options.sanitize and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        environment = cuda_on_cpu.sanitizer_environment()
        raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
    torch.set_num_threads(1)
    emulator = cuda_on_cpu.build(options.threads, options.staged_keys, options.sanitize)
    if options.mistake:
        print(emulator.run_mistake(options.mistake))
        return
    batches = range(options.first, options.first + options.batches)
    compared = cuda_on_cpu.check_against_reference(emulator, batches, options.first)
    print(
        f"{compared} batches equal to the reference, blocks of {options.threads} threads, sanitizers {options.sanitize}"
    )


main()
