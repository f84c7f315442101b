"""Device time of a call under graph replay, for every case of the benchmark: what the CUDA kernels are tuned by.

    python benchmarks/graph_replay.py --output graph_replay.json

Batches are made on the GPU, and take turns so that the L2 cache holds nothing of one when its turn comes again. At
least 32 calls are captured one after the other in one CUDA graph, which is replayed 50 times. Before it is timed, the
answer on a whole batch is compared with the C++ backend's, integer by integer; after, what the graph wrote with a
plain call.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

import mg_ops  # noqa: E402
from benchmarks.cases import CASES, Batch, Case, batches_beyond_cache, make_batches  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402

CASE_NAMES = ("voc320", "coco320", "coco800", "dense", "dense5000")
LEAST_CALLS = 32
REPLAYS = 50
LEAST_REPLAYS = 10  # of a graph so slow that 50 would take longer than LONGEST_SECONDS
LONGEST_SECONDS = 2.0
LONG_ENOUGH = 0.05  # seconds: a graph that takes longer need not hold LEAST_CALLS


class GraphOfCalls:
    """Calls captured one after the other in a CUDA graph.

    What they return is kept in `answers`: no two calls write the same memory.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], least_calls: int = LEAST_CALLS) -> None:
        """Captures all calls, again and again until there are `least_calls`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:  # what is made on first use must exist before the capture
                call()
            stream.synchronize()
            start = time.perf_counter()
            for call in calls:
                call()
            stream.synchronize()
        torch.cuda.current_stream().wait_stream(stream)
        rounds = 1 if time.perf_counter() - start > LONG_ENOUGH else math.ceil(least_calls / len(calls))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.answers = [call() for _ in range(rounds) for call in calls]

    def time(self, replays: int = REPLAYS) -> list[float]:
        """Device seconds of one call, one number a replay."""
        self.graph.replay()
        seconds: list[float] = []
        started = time.perf_counter()
        while len(seconds) < replays:
            if len(seconds) >= LEAST_REPLAYS and time.perf_counter() - started > LONGEST_SECONDS:
                break
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3 / len(self.answers))
        return seconds


def quartiles(seconds: list[float]) -> list[float]:
    """The three quartiles, in microseconds."""
    return [1e6 * value for value in statistics.quantiles(seconds, n=4, method="inclusive")]


def time_plain_calls(calls: Sequence[Callable[[], object]], count: int) -> list[float]:
    """Wall seconds of each call, from Python until the device has finished."""
    seconds = []
    for index in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        calls[index % len(calls)]()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def compare(match: mg_ops.MutualMatch, expected: mg_ops.MutualMatch, what: str) -> None:
    """RuntimeError unless all integers are equal."""
    for name, value, wanted in zip(mg_ops.MutualMatch._fields, match, expected, strict=True):
        different = int((value.cpu() != wanted.cpu()).sum())
        if different:
            raise RuntimeError(f"{what}: {different} of {value.numel()} values of {name} differ")


def match(batch: Batch, backend: str) -> mg_ops.MutualMatch:
    """A plain call on a batch."""
    return mg_ops.mutual_match(**batch.arguments(), backend=backend)


def measure(case: Case, backend: str, replays: int, seed: int = 0) -> dict[str, Any]:
    """The figures of a case.

    Raises:
        RuntimeError: the answer is wrong.
    """
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    start = time.perf_counter()
    num_batches = batches_beyond_cache(case, cache, torch.cuda.mem_get_info()[0])
    batches = make_batches(case, None, num_batches, seed, "cuda")
    torch.cuda.synchronize()
    seconds_to_make = time.perf_counter() - start

    trusted = "cpp" if mg_ops.backends()["cpp"].usable else "eager"
    expected = mg_ops.mutual_match(**batches[0].arguments("cpu"), backend=trusted)
    compare(match(batches[0], backend), expected, f"{case.name}, {backend} against {trusted}")

    calls = [partial(match, batch, backend) for batch in batches]
    captured = GraphOfCalls(calls)
    device_seconds = captured.time(replays)
    for index in {0, len(batches) - 1}:
        answer = captured.answers[index]
        assert isinstance(answer, mg_ops.MutualMatch)
        compare(answer, match(batches[index], backend), f"{case.name}, a replay against a plain call")
    wall_seconds = time_plain_calls(calls, replays)
    return {
        "sizes": {
            "B": case.batch_size,
            "A": len(batches[0].anchors),
            "C": case.num_classes,
            "N": [sum(batch.counts) for batch in batches],
        },
        "batches": len(batches),
        "seconds_to_make_batches": round(seconds_to_make, 2),
        "calls_per_graph": len(captured.answers),
        "replays": len(device_seconds),
        "device_microseconds": {"quartiles": quartiles(device_seconds), "least": 1e6 * min(device_seconds)},
        "wall_microseconds": {"quartiles": quartiles(wall_seconds), "least": 1e6 * min(wall_seconds)},
        "checked": f"all integers of a batch equal {trusted}'s, and those of replays a plain call's",
    }


def main() -> int:
    """Measures, writes after each case, prints; the exit status is 1 if any case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASE_NAMES, metavar="CASE", help="what to run")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda", help="what is timed (default cuda)")
    parser.add_argument("--images", type=int, help="a batch has no more images than this")
    parser.add_argument("--replays", type=int, default=REPLAYS, help=f"of each graph (default {REPLAYS})")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the figures")
    options = parser.parse_args()
    status = mg_ops.backends()[options.backend]
    if not status.usable:
        parser.error(f"the backend {options.backend} cannot be used: {status.detail}")
    content: dict[str, Any] = {"machine": describe_machine("cuda"), "backend": options.backend, "cases": {}}
    content["l2_bytes"] = torch.cuda.get_device_properties(0).L2_cache_size
    failed = False
    for name in options.cases:
        try:
            result = measure(CASES[name].with_images(options.images), options.backend, options.replays)
        except RuntimeError as error:
            failed, result = True, {"failed": str(error)}
            print(f"{name}: failed: {error}", flush=True)
        else:
            low, median, high = result["device_microseconds"]["quartiles"]
            wall = result["wall_microseconds"]["quartiles"][1]
            calls = f"{result['calls_per_graph']} calls a graph, {result['batches']} batches in turn"
            print(
                f"{name}: {median:.1f} us on the device (quartiles {low:.1f} to {high:.1f}; {calls}), {wall:.0f} us "
                "from Python",
                flush=True,
            )
        content["cases"][name] = result
        if options.output:
            options.output.write_text(json.dumps(content, indent=1) + "\n")
        torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
