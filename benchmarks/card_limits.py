"""What a card does at best: copying, launching, dividing, counting in shared memory. The matching is held against it.

    nvcc -O3 -arch=sm_90 -shared -Xcompiler -fPIC benchmarks/card_limits.cu -o card_limits.so
    python benchmarks/card_limits.py --library card_limits.so --output card_limits.json

Each figure is that of a CUDA graph, replayed; the answers of the kernels of card_limits.cu are checked first.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

from benchmarks.graph_replay import REPLAYS, GraphOfCalls, quartiles  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

THREADS = 256  # as in card_limits.cu
BLOCKS_A_MULTIPROCESSOR = 4
CHECKED_ROUNDS = 7


def copy_bandwidth(size: int = 1 << 30, replays: int = REPLAYS) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / statistics.median(GraphOfCalls([lambda: target.copy_(source)], least_calls=4).time(replays))


def launch_seconds(replays: int = REPLAYS) -> float:
    """Seconds of a launch in a graph that depends on the one before."""
    small = torch.zeros(32, device="cuda")
    return statistics.median(GraphOfCalls([lambda: small.add_(1.0)] * 200).time(replays))


class CardKernels:
    """The compiled kernels of card_limits.cu, filling the card."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library.resolve()))
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        self.blocks = BLOCKS_A_MULTIPROCESSOR * self.multiprocessors
        self.threads = self.blocks * THREADS

    def run(self, function: str, *arguments: Tensor, rounds: int) -> Tensor:
        """Launches on the current stream and returns the last argument, the output."""
        addresses = [ctypes.c_void_p(argument.data_ptr()) for argument in arguments]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        getattr(self.library, function)(*addresses, self.blocks, rounds, stream)
        return arguments[-1]

    def divisions(self, numerator: float) -> tuple[Callable[[int], Tensor], Tensor]:
        """(a call of so many rounds, what CHECKED_ROUNDS of them must give): numerator / 1.5, / 2.5, ..."""
        numerators = torch.full((self.threads,), numerator, device="cuda")
        denominators = 1.5 + torch.arange(self.threads, device="cuda") % 32
        expected = torch.zeros_like(numerators)
        for round_number in range(CHECKED_ROUNDS):
            expected += numerators / (denominators + round_number)
        sums = torch.empty_like(numerators)
        return lambda rounds: self.run("divide", numerators, denominators, sums, rounds=rounds), expected

    def counts(self, function: str, conflict: bool) -> tuple[Callable[[int], Tensor], Tensor]:
        """The same for 32 lanes that add to one counter, or each to its own."""
        slots = torch.zeros(32, dtype=torch.int32, device="cuda")
        if not conflict:
            slots = torch.arange(32, device="cuda").int()
        expected = torch.bincount(slots.long(), minlength=32).repeat(self.threads // 32) * CHECKED_ROUNDS
        totals = torch.empty(self.threads, dtype=torch.int64, device="cuda")
        return lambda rounds: self.run(function, slots, totals, rounds=rounds), expected

    def measure(self, call: Callable[[int], Tensor], expected: Tensor, rounds: int, replays: int) -> dict[str, Any]:
        """Nanoseconds a multiprocessor needs for one operation of a warp.

        Raises:
            RuntimeError: the answer is wrong.
        """
        answer = call(CHECKED_ROUNDS)
        torch.cuda.synchronize()
        if not torch.equal(answer, expected):
            raise RuntimeError(f"wrong in {int((answer != expected).sum())} of {len(expected)} threads")
        operations = self.threads / 32 / self.multiprocessors * rounds
        seconds = GraphOfCalls([lambda: call(rounds)], least_calls=4).time(replays)
        return {"nanoseconds": [1e3 * value / operations for value in quartiles(seconds)], "rounds": rounds}


def main() -> int:
    """Measures, writes after each figure, prints; the exit status is 1 if any answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="card_limits.cu as a shared library")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the figures")
    parser.add_argument("--copy-bytes", type=int, default=1 << 30, help="size of the copy (default 2^30)")
    parser.add_argument("--rounds", type=int, default=4096, help="operations of a thread (default 4096)")
    parser.add_argument("--replays", type=int, default=REPLAYS, help=f"of each graph (default {REPLAYS})")
    options = parser.parse_args()
    content: dict[str, Any] = {"machine": describe_machine("cuda")}

    def keep(name: str, value: Any, text: str) -> None:
        content[name] = value
        print(f"{name}: {text}", flush=True)
        if options.output:
            options.output.write_text(json.dumps(content, indent=1) + "\n")

    bandwidth = copy_bandwidth(options.copy_bytes, options.replays)
    keep("copy_bytes_per_second", bandwidth, f"{bandwidth / 1e12:.3g} TB/s read and written")
    launch = launch_seconds(options.replays)
    keep("seconds_per_launch_in_a_graph", launch, f"{1e6 * launch:.2f} us")
    kernels = CardKernels(options.library)
    failed = False
    for name, (call, expected) in {
        "divide 1 by x": kernels.divisions(1.0),
        "divide 0 by x": kernels.divisions(0.0),
        "count by 1 in 32 bits, each lane its own": kernels.counts("count_32", conflict=False),
        "count by 1 in 32 bits, all lanes one": kernels.counts("count_32", conflict=True),
        "add in 32 bits, each lane its own": kernels.counts("add_32", conflict=False),
        "add in 32 bits, all lanes one": kernels.counts("add_32", conflict=True),
        "add in 64 bits, each lane its own": kernels.counts("add_64", conflict=False),
        "add in 64 bits, all lanes one": kernels.counts("add_64", conflict=True),
    }.items():
        try:
            result = kernels.measure(call, expected, options.rounds, options.replays)
        except RuntimeError as error:
            failed = True
            keep(name, {"failed": str(error)}, f"failed: {error}")
        else:
            keep(name, result, f"{result['nanoseconds'][1]:.3g} ns a warp and multiprocessor")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
