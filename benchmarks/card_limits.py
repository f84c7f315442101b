"""What a card does at best: copying, launching, dividing, counting in shared memory. The matching is held against it.

    nvcc -O3 -arch=sm_90 -shared -Xcompiler -fPIC benchmarks/card_limits.cu -o card_limits.so
    python benchmarks/card_limits.py --library card_limits.so --output card_limits.json

Each figure is that of a CUDA graph, replayed; the answers of the kernels of card_limits.cu are checked first.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

from benchmarks.machine import describe_machine, write  # noqa: E402
from benchmarks.measure import copy_bandwidth, graph_quartiles, launch_seconds  # noqa: E402

THREADS = 256  # as in card_limits.cu
BLOCKS_A_MULTIPROCESSOR = 4
CHECKED_ROUNDS = 7
COUNTING = {"count by 1 in 32 bits": "count_32", "add in 32 bits": "add_32", "add in 64 bits": "add_64"}


def questions(threads: int) -> dict[str, tuple[str, list[Tensor], Tensor]]:
    """What is asked: function, its arguments, the last one its output, and what CHECKED_ROUNDS of it must give."""
    asked = {}
    denominators = 1.5 + torch.arange(threads, device="cuda") % 32
    for number in (1.0, 0.0):
        numerators = torch.full((threads,), number, device="cuda")
        expected = torch.zeros_like(numerators)
        for round_number in range(CHECKED_ROUNDS):
            expected += numerators / (denominators + round_number)
        arguments = [numerators, denominators, torch.empty_like(numerators)]
        asked[f"divide {number:.0f} by x"] = "divide", arguments, expected
    own, one = torch.arange(32, device="cuda").int(), torch.zeros(32, dtype=torch.int32, device="cuda")
    for name, function in COUNTING.items():
        for lanes, slots in (("each lane its own", own), ("all lanes one", one)):
            expected = torch.bincount(slots.long(), minlength=32).repeat(threads // 32) * CHECKED_ROUNDS
            asked[f"{name}, {lanes}"] = function, [slots, torch.empty_like(expected)], expected
    return asked


def main() -> int:
    """Measures, writes after each figure, prints; the exit status is 1 if any answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="card_limits.cu as a shared library")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="little of each: a check, no figures")
    options = parser.parse_args()
    bandwidth, launch = copy_bandwidth(1 << 20 if options.quick else 1 << 30), launch_seconds()
    print(f"{bandwidth / 1e12:.3g} TB/s read and written by a copy; {1e6 * launch:.2f} us a launch in a graph")
    content: dict[str, Any] = {"machine": describe_machine("cuda"), "copy_bytes_per_second": bandwidth}
    content["seconds_per_launch_in_a_graph"] = launch
    library, failed = ctypes.CDLL(str(options.library.resolve())), False
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    blocks = BLOCKS_A_MULTIPROCESSOR * multiprocessors

    for name, (function, arguments, expected) in questions(blocks * THREADS).items():
        addresses = [ctypes.c_void_p(argument.data_ptr()) for argument in arguments]

        def run(rounds: int, function: str = function, addresses: list[ctypes.c_void_p] = addresses) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            getattr(library, function)(*addresses, blocks, rounds, stream)

        run(CHECKED_ROUNDS)
        torch.cuda.synchronize()
        wrong = int((arguments[-1] != expected).sum())
        if wrong:
            failed, content[name] = True, {"failed": f"wrong in {wrong} of {len(expected)} threads"}
            print(f"{name}: failed: wrong in {wrong} of {len(expected)} threads")
        else:
            rounds = 2 if options.quick else 4096
            operations = BLOCKS_A_MULTIPROCESSOR * THREADS / 32 * rounds  # of warps, on each multiprocessor
            nanoseconds = [1e9 * value / operations for value in graph_quartiles(run, [rounds], options.quick)]
            content[name] = {"nanoseconds": nanoseconds, "rounds": rounds}
            print(f"{name}: {nanoseconds[1]:.3g} ns a warp and multiprocessor", flush=True)
        write(content, options.output)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
