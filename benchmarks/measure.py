"""How a call is measured: its time in turns with others, its peak memory and, on a GPU, its time in a CUDA graph."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

TURN_SECONDS = 0.25
ENOUGH_SECONDS = 2.5  # a method timed for so long takes no more turns


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile."""
    return [float(value) for value in np.quantile(values, (0.25, 0.5, 0.75))]


# ---------------------------------------------------------------------------------------------------------------------
# Time


def time_calls(call: Callable[..., object], batches: Iterable[object], threads: int, seconds: float) -> list[float]:
    """Seconds of a call, until the device has finished: timed so long, those under a millisecond several at a time."""
    from torch.utils.benchmark import Timer  # here: it logs that there is no GPU, in the fresh processes too

    timer = Timer("call(next(turns))", globals={"call": call, "turns": itertools.cycle(batches)}, num_threads=threads)
    return list(timer.blocked_autorange(min_run_time=seconds).times)


def best_threads(call: Callable[..., object], batch: object, most: int) -> int:
    """The thread count with which a call is fastest, of 1, 2, 4 and so on and `most`."""
    counts = sorted({most, *(1 << power for power in range(most.bit_length()))})
    return min(counts, key=lambda threads: min(time_calls(call, [batch], threads, 0.0)))


def take_turns(
    methods: dict[str, tuple[Callable[..., object], int]],
    batches: Sequence[object],
    rounds: int,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of calls, by name: in each round each method, with its number of threads, has its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _, (name, (call, threads)) in itertools.product(range(rounds), methods.items()):
        tick(name)
        if sum(seconds[name]) < ENOUGH_SECONDS:
            seconds[name] += time_calls(call, batches, threads, TURN_SECONDS)
    return seconds


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> tuple[int, int]:
    """(bytes at the peak of a call, those beyond what was there before and what it returns), of GPU or process.

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
    returned = sum(leaf.untyped_storage().nbytes() for leaf in tree_leaves(answer) if isinstance(leaf, torch.Tensor))
    return peak, max(0, peak - before - returned)


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
    with (
        mock.patch.dict(os.environ, settings),
        ProcessPoolExecutor(max_workers=1, mp_context=get_context("forkserver")) as pool,
    ):
        return pool.submit(function, *arguments).result()


# ---------------------------------------------------------------------------------------------------------------------
# What only a GPU shows


def graph_quartiles(call: Callable[[Any], object], batches: Sequence[object], quick: bool = False) -> list[float]:
    """Device seconds of a call when a CUDA graph of calls, the batches in turns, is replayed."""
    import triton.testing

    def call_all() -> None:
        for batch in batches:
            call(batch)

    milliseconds = triton.testing.do_bench_cudagraph(call_all, rep=1 if quick else 20, quantiles=(0.25, 0.5, 0.75))
    return [1e-3 * value / len(batches) for value in milliseconds]


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / graph_quartiles(target.copy_, [source])[1]


def launch_seconds() -> float:
    """Seconds of a launch in a graph that depends on the one before."""
    return graph_quartiles(torch.zeros(32, device="cuda").add_, [1.0] * 200)[1]


def measure_on_gpu(
    call: Callable[[Any], object], batches: Sequence[object], captured: bool, quick: bool
) -> dict[str, Any]:
    """Launches, host synchronizations and, if it may be captured and can be, the device's time in a graph."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call(batches[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call(batches[0])
        torch.cuda.synchronize()
    launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    figures = {"host_synchronizations": waits, "launches": launches}
    figures |= {"graph_replay_seconds": None, "graph_replay_quartiles": None, "graph_replay_note": ""}
    try:
        if waits or not captured:
            raise RuntimeError("the host waits for the device" if waits else "it reads host memory that a call frees")
        figures["graph_replay_quartiles"] = graph_quartiles(call, batches, quick)
        figures["graph_replay_seconds"] = figures["graph_replay_quartiles"][1]
    except RuntimeError as error:
        torch.cuda.synchronize()
        figures["graph_replay_note"] = f"not captured: {str(error).splitlines()[0]}"
    return figures
