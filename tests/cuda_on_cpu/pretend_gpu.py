"""Pretends that there is a GPU: a program written for CUDA tensors runs, unchanged, on CPU tensors.

    PYTHONPATH=.:tests python -m cuda_on_cpu.pretend_gpu benchmarks/match_speed.py --device cuda --quick
    PYTHONPATH=.:tests python -m pytest -p cuda_on_cpu.pretend_gpu tests/test_gpu.py

So `benchmarks/gpu_check.py --dry-run` tries every line that a GPU will run, without one. "cuda" means the CPU. The
backend "cuda" is the CUDA kernels on the CPU for small batches, else the C++ backend, which gives the same integers;
"triton" is Triton's interpreter where TRITON_INTERPRET=1, else also the C++ backend. A graph records what is run while
it is captured and runs it again; as on a GPU, whatever would read a number back from the device is an error meanwhile.
Times and bytes mean nothing.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cuda_on_cpu
import mg_ops
from cuda_on_cpu import rules
from mg_ops import matching

MOST_EMULATED_PAIRS = 1500  # of images, anchors and objects; more would take the emulator too long
NEEDS_A_GPU = {
    "test_wrong_offsets_are_clamped_and_check_reports_them": "offsets of CPU tensors are checked, not clamped",
    "test_at_most_four_launches": "the profiler sees no launches",
    "test_torch_compile_takes_the_whole_call": "the stand-in for the function cannot be traced",
    "test_compiled_calls_give_the_same_integers": "the stand-in for the function cannot be traced",
    "test_calls_from_several_threads_at_once": "the stand-in is there for one thread",
    "test_opcheck": "torch's check asks the device for its random state",
    "test_nothing_waits_for_the_gpu": "nothing can be asynchronous here",
    "test_a_step_as_a_cuda_graph_learns": "a process of its own, without this stand-in",
}
"""Tests that say nothing here, and why."""


def on_cpu(value: Any) -> Any:
    """A device argument, with the CPU in place of CUDA; anything else as it is."""
    if isinstance(value, (str, torch.device)) and str(value).split(":")[0] == "cuda":
        return torch.device("cpu")
    return value


class CudaMeansCpu(TorchFunctionMode):
    """Sends whatever goes to a CUDA device to the CPU; a copy to the device is a copy here too."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (Tensor.cuda, Tensor.pin_memory):
            return args[0].clone()
        moved = [on_cpu(value) for value in args]
        kwargs = {name: on_cpu(value) for name, value in kwargs.items()}
        result = function(*moved, **kwargs)
        to_device = function is Tensor.to and any(a is not b for a, b in zip(moved, args, strict=True))
        return result.clone() if to_device and result is args[0] else result


READS_BACK = ("_local_scalar_dense", "equal", "masked_select", "nonzero", "repeat_interleave.Tensor", "_unique2")
"""Operations that wait for the device: a number or a size depends on what it holds."""


def reads_back(function: Any, args: Any) -> bool:
    """Whether the operation would wait for the device: those, and indices by a mask but to fill one number in."""
    name = str(function).removeprefix("aten.")
    if name.startswith(("index.", "index_put")):
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return by_mask and (name.startswith("index.") or args[2].numel() != 1)
    return name.startswith(tuple(f"{operation}." if "." not in operation else operation for operation in READS_BACK))


def tensors_in(value: Any) -> list[Tensor]:
    """Those at its leaves."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class Record(TorchDispatchMode):
    """Every operation and what it returned, so that all can be run again into the same memory.

    They do run, for their shapes; `undo` puts back what they changed, since a capture runs nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []
        self.known: set[int] = set()
        self.before: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reads_back(function, args):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({function})")
        for storage in (tensor.untyped_storage() for tensor in tensors_in([args, kwargs])):
            if storage.data_ptr() not in self.known:
                self.known.add(storage.data_ptr())
                self.before.append((storage, storage.clone()))
        result = function(*args, **(kwargs or {}))
        self.known.update(tensor.untyped_storage().data_ptr() for tensor in tensors_in(result))
        self.runs.append((function, args, kwargs or {}, tree_leaves(result)))
        return result

    def undo(self) -> None:
        """Leaves what was there before the first operation as it was."""
        for storage, before in self.before:
            storage.copy_(before)


class PretendGraph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.record = Record()

    @torch.no_grad()
    def replay(self) -> None:
        """Runs all again; results go where the first ones are."""
        for function, args, kwargs, before in self.record.runs:
            for old, new in zip(before, tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


capturing = False


@contextlib.contextmanager
def capture(graph: PretendGraph, **options: Any) -> Iterator[None]:
    """In place of torch.cuda.graph."""
    global capturing
    capturing = True
    try:
        with graph.record:
            yield
    finally:
        capturing = False
        graph.record.undo()


class PretendStream:
    """In place of torch.cuda.Stream: all runs at once, so there is nothing to wait for."""

    cuda_stream = 0

    def is_capturing(self) -> bool:
        """There is one stream."""
        return capturing

    def wait_stream(self, other: PretendStream) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class PretendEvent:
    """In place of torch.cuda.Event, by the clock."""

    def __init__(self, **options: Any) -> None:
        self.time = 0.0

    def record(self) -> None:
        """Notes the time."""
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end: PretendEvent) -> float:
        """Milliseconds."""
        return 1000 * (end.time - self.time)


class PretendGenerator(torch.Generator):
    """In place of torch.Generator: of the CPU, whatever is asked for."""

    def __new__(cls, device: Any = "cpu") -> PretendGenerator:
        return super().__new__(cls, on_cpu(device))


def install() -> None:
    """Puts the stand-ins in place, for the rest of this process."""
    nothing = lambda *arguments, **options: None  # noqa: E731
    stands_in: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *arguments: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda *arguments: "no GPU, but a stand-in",
        "get_device_capability": lambda *arguments: (9, 0),
        "get_device_properties": lambda *arguments: SimpleNamespace(
            name="no GPU, but a stand-in", L2_cache_size=1 << 17, multi_processor_count=2, total_memory=8 << 30
        ),
        "mem_get_info": lambda *arguments: (8 << 30, 8 << 30),
        "memory_allocated": lambda *arguments: 0,
        "max_memory_allocated": lambda *arguments: 0,
        "is_current_stream_capturing": lambda: capturing,
        "current_stream": lambda *arguments: PretendStream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": PretendStream,
        "Event": PretendEvent,
        "CUDAGraph": PretendGraph,
        "graph": capture,
        "make_graphed_callables": lambda network, samples: network,
        **dict.fromkeys(
            ("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode", "empty_cache", "_sleep"),
            nothing,
        ),
    }
    for name, value in stands_in.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.current_stream = lambda *arguments: PretendStream()
    torch.accelerator.synchronize = torch.cuda.profiler.start = torch.cuda.profiler.stop = nothing
    profile, activities = torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU]
    torch.profiler.profile = lambda **options: profile(**{**options, "activities": activities})  # type: ignore[misc]
    torch.Generator = PretendGenerator  # type: ignore[misc]

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    real_match, real_backends = mg_ops.mutual_match, mg_ops.backends
    emulator = cuda_on_cpu.build(threads=64)

    def backends() -> dict[str, Any]:
        status = real_backends()
        stand_in = status["eager"]._replace(usable=True, detail="a stand-in")
        return {**status, "cuda": stand_in, "triton": status["triton"] if interpreted else stand_in}

    def mutual_match(*arguments: Any, backend: str | None = None, **options: Any) -> mg_ops.MutualMatch:
        if backend == "eager" or (backend == "triton" and interpreted):
            return real_match(*arguments, backend=backend, **options)
        match = real_match(*arguments, backend="cpp", **options)  # which checks the arguments too
        pairs = match.cls_match.numel() * max(1, len(match.num_pos))
        if backend == "cuda" and pairs <= MOST_EMULATED_PAIRS and not capturing:
            options.pop("check", None)
            with torch.device("cpu"):
                return emulator.mutual_match(*arguments, **options)
        return match

    real_operator_of, rule_emulator = matching.operator_of, rules.build(threads=64)

    def operator_of(backend: str | None, device: torch.device, operator: str = "mutual_match") -> Callable[..., Any]:
        """Of the other rules the kernels on the CPU, too."""
        if backend != "cuda" or operator == "mutual_match":
            return real_operator_of(backend, device, operator)

        def run(*arguments: Any) -> Any:
            match = real_operator_of("cpp", device, operator)(*arguments)  # which checks the arguments too
            pairs = arguments[2].shape[0] * arguments[2].shape[1] * max(1, len(arguments[3]))
            if pairs > MOST_EMULATED_PAIRS or capturing:
                return match
            with torch.device("cpu"):
                return rule_emulator.operator(
                    operator,
                    *(argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments),
                )

        return run

    matching.operator_of = operator_of  # type: ignore[assignment]
    mg_ops.mutual_match, mg_ops.backends = mutual_match, backends  # type: ignore[assignment]
    CudaMeansCpu().__enter__()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """As a plugin of pytest: before conftest.py asks which devices there are."""
    install()


@pytest.hookimpl(trylast=True)  # after what the command line leaves out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what says nothing here; with MG_OPS_VARIANTS all but so many variants of each test, too."""
    seen: Counter[str] = Counter()
    most = int(os.environ.get("MG_OPS_VARIANTS", len(items)))
    for item in list(items):
        name = item.nodeid.split("[")[0]
        seen[name] += 1
        if seen[name] > most:
            items.remove(item)
    for item in items:
        reason = NEEDS_A_GPU.get(getattr(item, "originalname", item.name))
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


if __name__ == "__main__":
    from cuda_on_cpu import pretend_gpu

    pretend_gpu.install()  # of the module, not of __main__: one flag says whether a graph is being captured
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
