"""How a call is measured: its time in turns with others, its peak memory and, on a GPU, its replay in a CUDA graph."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

ONE_CALL_SECONDS = 2.0  # a call that takes longer is timed once
TURN_SECONDS = 0.25
ENOUGH_SECONDS = 2.5  # a method timed for so long takes no more turns
LEAST_CALLS = 32  # in a graph
REPLAYS, LEAST_REPLAYS = 50, 10
LONGEST_SECONDS = 2.0  # after so long, LEAST_REPLAYS are enough
LONG_ENOUGH = 0.05  # seconds: a graph that takes longer need not hold LEAST_CALLS


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    return [float(value) for value in np.quantile(values, (0.25, 0.5, 0.75))]


# ---------------------------------------------------------------------------------------------------------------------
# Time


@contextlib.contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Runs with so many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_call(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Wall seconds of a call, until the device has finished, and its answer."""
    wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    answer = call(*arguments)
    wait()
    return time.perf_counter() - start, answer


def best_threads(call: Callable[..., object], batch: object, most: int) -> int:
    """The thread count with which a call is fastest, of 1, 2, 4 and so on and `most`."""

    def least_seconds(threads: int) -> float:
        with thread_count(threads):
            first = time_call(call, batch)[0]
            return min([first, *(time_call(call, batch)[0] for _ in range(3 if first < 0.3 else 0))])

    return min(sorted({most, *(1 << power for power in range(most.bit_length()))}), key=least_seconds)


@dataclass
class Turns:
    """A call that takes turns with others, and the seconds it took each time."""

    call: Callable[..., object]
    threads: int
    first_seconds: float
    """Of a call made before."""
    seconds: list[float] = field(default_factory=list)


def take_turns(
    methods: dict[str, Turns], batches: Sequence[object], rounds: int, tick: Callable[[str], None] = lambda name: None
) -> None:
    """Rounds in which each method has its turn: as many calls as fit, the batches one after the other.

    Each call is timed by itself. `torch.utils.benchmark.Timer` takes means of several, whose quartiles are narrower.
    """
    for turn, (name, method) in itertools.product(range(rounds), methods.items()):
        tick(name)
        if method.first_seconds > ONE_CALL_SECONDS:
            method.seconds = [method.first_seconds]
        elif sum(method.seconds) < ENOUGH_SECONDS:
            turns = itertools.islice(itertools.cycle(batches), turn, None)
            with thread_count(method.threads):
                if method.first_seconds < 0.1:
                    method.call(next(turns))  # caches are the last method's, and threads start: not timed
                end = time.perf_counter() + TURN_SECONDS
                while time.perf_counter() < end:
                    method.seconds.append(time_call(method.call, next(turns))[0])


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> tuple[int, int, int]:
    """(bytes before a call, bytes at its peak, bytes of the tensors it returns), of the GPU or of this process.

    Raises:
        OSError: the system does not say.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        answer = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps of earlier calls goes back to the system
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
        answer = call()
        peak = _status_bytes("VmHWM")
    return before, peak, sum(t.untyped_storage().nbytes() for t in tree_leaves(answer) if isinstance(t, torch.Tensor))


def _status_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not found:
        raise OSError(f"/proc/self/status has no {name}")
    return 1024 * int(found[1])


def memory_resolution(threads: int) -> int:
    """How far the kernel's count of a process's pages may be off: it sums the processors' counts in batches."""
    return 4096 * max(32, 2 * (os.cpu_count() or 1)) * threads


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, in which freed memory goes back to the system at once.

    Raises:
        BrokenProcessPool: the process was killed.
    """
    settings = {
        "MALLOC_MMAP_THRESHOLD_": "16384",  # glibc reads them when the process starts
        "MALLOC_TRIM_THRESHOLD_": "16384",
        "PYTHONWARNINGS": "ignore::RuntimeWarning",  # what importing mg_ops warns of has been said by this process
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("forkserver")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---------------------------------------------------------------------------------------------------------------------
# What only a GPU shows


class GraphOfCalls:
    """Calls captured one after the other in a CUDA graph; no two of its `answers` share memory."""

    def __init__(self, calls: Sequence[Callable[[], object]], least_calls: int = LEAST_CALLS) -> None:
        """Captures all calls, again and again until there are `least_calls`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is made on first use must exist before the capture
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
        """Device seconds of one call, one number per replay."""
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


def copy_bandwidth(size: int = 1 << 30, replays: int = REPLAYS) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / quartiles(GraphOfCalls([lambda: target.copy_(source)], least_calls=4).time(replays))[1]


def launch_seconds(replays: int = REPLAYS) -> float:
    """Seconds of a launch in a graph that depends on the one before."""
    small = torch.zeros(32, device="cuda")
    return quartiles(GraphOfCalls([lambda: small.add_(1.0)] * 200).time(replays))[1]


def measure_on_gpu(
    call: Callable[[Any], object], batches: Sequence[object], replays: int, same: Callable[[Any, Any], bool] | None
) -> dict[str, Any]:
    """Launches, host synchronizations, and the device's time under graph replay.

    Args:
        call: takes one of the batches.
        batches: they take turns, also within the graph.
        replays: of the graph.
        same: whether a replay's answer is that of a plain call; None where a graph cannot hold the call, which
            copies from host memory that it frees.

    Raises:
        RuntimeError: a replay's answer is another one.
    """
    figures: dict[str, Any] = {"graph_replay_seconds": None, "graph_replay_quartiles": None, "graph_replay_note": ""}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call(batches[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    figures["host_synchronizations"] = sum("synchroniz" in str(warning.message) for warning in caught)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call(batches[0])
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    figures["launches"] = len(on_device)
    figures["device_busy_seconds"] = sum(event.device_time for event in on_device) / 1e6
    if same is None:
        return {**figures, "graph_replay_note": "not captured: a call copies from host memory that it frees"}
    if figures["host_synchronizations"]:
        return {**figures, "graph_replay_note": "not captured: the host waits for the device"}
    try:
        captured = GraphOfCalls([lambda batch=batch: call(batch) for batch in batches])  # type: ignore[misc]
    except RuntimeError as error:
        torch.cuda.synchronize()
        return {**figures, "graph_replay_note": f"not captured: {str(error).splitlines()[0]}"}
    figures["calls_per_graph"] = len(captured.answers)
    figures["graph_replay_quartiles"] = quartiles(captured.time(replays))
    figures["graph_replay_seconds"] = figures["graph_replay_quartiles"][1]
    for index in {0, len(batches) - 1}:
        if not same(captured.answers[index], call(batches[index])):
            raise RuntimeError("a replay of a captured call gives another answer than a plain call")
    return figures
