"""What a card does at best: copying, launching, dividing, counting in shared memory. The matching is held against it.

    nvcc -O3 -arch=sm_90 -shared -Xcompiler -fPIC benchmarks/card_limits.cu -o card_limits.so
    python benchmarks/card_limits.py --library card_limits.so --output card_limits.json

Each figure is that of a CUDA graph, replayed; the answers of the kernels of card_limits.cu are checked first.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.measure import REPLAYS, GraphOfCalls, copy_bandwidth, launch_seconds, quartiles  # noqa: E402

THREADS = 256  # as in card_limits.cu
BLOCKS_A_MULTIPROCESSOR = 4
CHECKED_ROUNDS = 7


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
        return {"nanoseconds": [1e9 * value / operations for value in quartiles(seconds)], "rounds": rounds}


def main() -> int:
    """Measures, writes after each figure, prints; the exit status is 1 if any answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="card_limits.cu as a shared library")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="where to write the figures")
    parser.add_argument("--quick", action="store_true", help="little of each: a check, no figures")
    options = parser.parse_args()
    copied, rounds, replays = (1 << 20, 2, 2) if options.quick else (1 << 30, 4096, REPLAYS)
    content: dict[str, Any] = {"machine": describe_machine("cuda")}

    def keep(name: str, value: Any, text: str) -> None:
        content[name] = value
        print(f"{name}: {text}", flush=True)
        options.output.write_text(json.dumps(content, indent=1) + "\n")

    bandwidth, launch = copy_bandwidth(copied, replays), launch_seconds(replays)
    keep("copy_bytes_per_second", bandwidth, f"{bandwidth / 1e12:.3g} TB/s read and written")
    keep("seconds_per_launch_in_a_graph", launch, f"{1e6 * launch:.2f} us")
    kernels, failed = CardKernels(options.library), False
    questions = {f"divide {number} by x": kernels.divisions(float(number)) for number in (1, 0)}
    for name, function in (
        ("count by 1 in 32 bits", "count_32"),
        ("add in 32 bits", "add_32"),
        ("add in 64 bits", "add_64"),
    ):
        questions[f"{name}, each lane its own"] = kernels.counts(function, conflict=False)
        questions[f"{name}, all lanes one"] = kernels.counts(function, conflict=True)
    for name, (call, expected) in questions.items():
        try:
            result = kernels.measure(call, expected, rounds, replays)
        except RuntimeError as error:
            failed = True
            keep(name, {"failed": str(error)}, f"failed: {error}")
        else:
            keep(name, result, f"{result['nanoseconds'][1]:.3g} ns a warp and multiprocessor")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
