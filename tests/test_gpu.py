"""What only a GPU can show: the same integers from every backend, on any stream, in a graph, without synchronizing.

The cases on paper and torch's own checks are in files that run on every device. `make gpu-check` runs this one too, and
of it `-k short_selection` under compute-sanitizer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES
from comparison import assert_same
from conftest import fuzz_cases
from detector_batches import WORST, detector_batch, worst_batch
from random_batches import random_batch
from torch import Tensor

import mg_ops

pytestmark = pytest.mark.gpu

BACKENDS = ["cuda", "triton", "eager"]
COMPILED = ["cuda", "triton"]


@pytest.fixture(autouse=True)
def usable(request: pytest.FixtureRequest) -> None:
    """The CUDA backend must be usable wherever these tests run; Triton may be missing."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if backend == "triton" and not mg_ops.backends()["triton"].usable:
        pytest.skip(mg_ops.backends()["triton"].detail)


def to_gpu(value: Any) -> Any:
    """The same arguments on the GPU, with the same strides and offsets in memory."""
    if isinstance(value, dict):
        return {name: to_gpu(element) for name, element in value.items()}
    if isinstance(value, list):
        return [to_gpu(element) for element in value]
    if not isinstance(value, Tensor):
        return value
    length = value.untyped_storage().nbytes() // value.element_size()
    memory = torch.as_strided(value, (length,), (1,), 0).cuda()
    return torch.as_strided(memory, value.shape, value.stride(), value.storage_offset())


def packed_batch(*sizes: int, **options: int) -> dict[str, Any]:
    """A detector's batch on the CPU, packed."""
    return detector_batch(*sizes, **{"num_classes": 20, **options}, packed=True)


# ---------------------------------------------------------------------------------------------------------------------
# The same integers


def test_the_cuda_backend_is_usable_and_the_default() -> None:
    assert mg_ops.backends()["cuda"].usable, mg_ops.backends()["cuda"].detail
    arguments = to_gpu(packed_batch(1, 50, 2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mg_ops.mutual_match(**arguments)
    assert "mg_ops::mutual_match" in {event.name for event in profile.events()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", range(8))
def test_random_batches(part: int, backend: str) -> None:
    """Against the reference on the CPU: ties, garbage, odd sizes, all dtypes, odd strides."""
    count = fuzz_cases(300 if backend == "cuda" else 60)
    for seed in range(part * count, (part + 1) * count):
        batch = random_batch(seed)
        expected = mg_ops.mutual_match(**batch.arguments, backend="eager")
        assert_same(mg_ops.mutual_match(**to_gpu(batch.arguments), backend=backend), expected, batch)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(
    ("batch_size", "num_anchors", "num_objects"),
    [(32, 12750, 7), (2, 201600, 30), (1, 120000, 500), (1, 30000, 5000), (100, 300, 20), (3, 70000, 1)],
)
def test_realistic_sizes(backend: str, batch_size: int, num_anchors: int, num_objects: int) -> None:
    arguments = packed_batch(batch_size, num_anchors, num_objects, num_classes=4)
    expected = mg_ops.mutual_match(**arguments, backend="cpp")
    assert_same(
        mg_ops.mutual_match(**to_gpu(arguments), backend=backend), expected, (batch_size, num_anchors, num_objects)
    )


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("kind", WORST)
def test_worst_cases_of_ranking(backend: str, kind: str) -> None:
    for iou_positive in (0.5, 1e-6):
        arguments = worst_batch(kind, 40000) | {"iou_positive": iou_positive, "iou_ignored": iou_positive / 2}
        expected = mg_ops.mutual_match(**arguments, backend="cpp")
        assert_same(mg_ops.mutual_match(**to_gpu(arguments), backend=backend), expected, kind)


@pytest.mark.parametrize("backend", COMPILED)
def test_every_run_gives_the_same(backend: str) -> None:
    arguments = to_gpu(packed_batch(8, 12750, 20))
    first = mg_ops.mutual_match(**arguments, backend=backend)
    for _ in range(30):
        assert_same(mg_ops.mutual_match(**arguments, backend=backend), first, "another run")


@pytest.mark.parametrize("backend", COMPILED)
def test_deterministic_mode_and_autocast_change_nothing(backend: str) -> None:
    arguments = packed_batch(2, 3000, 6)
    expected = mg_ops.mutual_match(**arguments, backend="eager")
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cuda", dtype=torch.float16):
            assert_same(mg_ops.mutual_match(**to_gpu(arguments), backend=backend), expected, "deterministic, autocast")
    finally:
        torch.use_deterministic_algorithms(False)


def test_short_selection() -> None:
    """What compute-sanitizer runs: it makes every kernel many times slower."""
    for case in CASES[::4]:
        match = mg_ops.mutual_match(**case.arguments("cuda", packed=True, slack=2), backend="cuda")
        assert_same(match, case.expected(slack=2), case.name)
    for seed in range(24):
        batch = random_batch(seed)
        expected = mg_ops.mutual_match(**batch.arguments, backend="eager")
        assert_same(mg_ops.mutual_match(**to_gpu(batch.arguments), backend="cuda"), expected, batch)
    arguments = packed_batch(2, 5000, 9)
    expected = mg_ops.mutual_match(**arguments, backend="eager")
    assert_same(mg_ops.mutual_match(**to_gpu(arguments), backend="cuda"), expected, "a detector's batch")


# ---------------------------------------------------------------------------------------------------------------------
# Streams, graphs, synchronization, memory


@pytest.mark.parametrize("backend", COMPILED)
def test_it_runs_on_the_current_stream(backend: str) -> None:
    """The inputs are filled late on a side stream: a launch on any other stream would read zeros."""
    arguments = to_gpu(packed_batch(4, 5000, 8))
    expected = mg_ops.mutual_match(**arguments, backend=backend)
    late = {name: torch.zeros_like(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for name, value in late.items():
            if isinstance(value, Tensor):
                value.copy_(arguments[name])
        match = mg_ops.mutual_match(**late, backend=backend)
    stream.synchronize()
    assert_same(match, expected, "side stream")


@pytest.mark.parametrize("backend", COMPILED)
def test_two_streams_at_once(backend: str) -> None:
    batches = [to_gpu(packed_batch(16, 12750, 7 + seed, seed=seed)) for seed in range(2)]
    expected = [mg_ops.mutual_match(**batch, backend=backend) for batch in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    matches = []
    for _ in range(20):
        for stream, batch, wanted in zip(streams, batches, expected, strict=True):
            with torch.cuda.stream(stream):
                matches.append((mg_ops.mutual_match(**batch, backend=backend), wanted))
    torch.cuda.synchronize()
    for match, wanted in matches:
        assert_same(match, wanted, "two streams")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_is_used_not_the_current_one() -> None:
    arguments = packed_batch(2, 3000, 5)
    expected = mg_ops.mutual_match(**arguments, backend="eager")
    second = {name: value.to("cuda:1") if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with torch.cuda.device(0):
        match = mg_ops.mutual_match(**second, backend="cuda")
        assert torch.cuda.current_device() == 0
    assert match.cls_match.device == torch.device("cuda:1")
    assert_same(match, expected, "second GPU")


@pytest.mark.parametrize("backend", COMPILED)
def test_a_graph_is_replayed_with_other_objects(backend: str) -> None:
    """Buffers for 40 objects; each replay has other predictions and other numbers of objects, none at all too."""
    capacity, batch_size = 40, 4
    buffers = packed_batch(batch_size, 5000, capacity // batch_size)
    static = to_gpu(buffers)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            mg_ops.mutual_match(**static, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        match = mg_ops.mutual_match(**static, backend=backend)
    for seed, offsets in enumerate(
        [[0, 10, 20, 30, 40], [0, 0, 0, 0, 0], [0, 1, 1, 2, 40], [0, 40, 40, 40, 40], [0, 3, 5, 6, 9]]
    ):
        fresh = packed_batch(batch_size, 5000, capacity // batch_size, seed=seed)
        fresh["gt_offsets"] = torch.tensor(offsets)
        for name, value in fresh.items():
            if isinstance(value, Tensor):
                static[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(match, mg_ops.mutual_match(**fresh, backend="eager"), offsets)


@pytest.mark.parametrize("backend", COMPILED)
def test_nothing_synchronizes(backend: str) -> None:
    packed = to_gpu(packed_batch(2, 3000, 5))
    listed = {**packed, "gt_boxes": list(packed["gt_boxes"].split(5)), "gt_labels": list(packed["gt_labels"].split(5))}
    del listed["gt_offsets"]
    for arguments in (packed, listed):
        mg_ops.mutual_match(**arguments, backend=backend)  # loads, and for Triton compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for arguments in (packed, listed):
            mg_ops.mutual_match(**arguments, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("num_anchors", "num_objects"), [(200_000, 7), (200_000, 2_500), (12_750, 0)])
def test_memory_stays_within_the_bound(num_anchors: int, num_objects: int) -> None:
    """40 bytes an image and anchor beyond the outputs, whatever the number of objects."""
    batch_size = 2
    arguments = to_gpu(packed_batch(batch_size, num_anchors, num_objects, num_classes=2))
    mg_ops.mutual_match(**arguments, backend="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    match = mg_ops.mutual_match(**arguments, backend="cuda")
    outputs = sum(value.untyped_storage().nbytes() for value in match)
    extra = torch.cuda.max_memory_allocated() - before - outputs
    assert extra <= 40 * batch_size * num_anchors + 4096  # the allocator rounds up


@pytest.mark.parametrize("num_objects", [0, 7, 700])
def test_at_most_four_launches(num_objects: int) -> None:
    """Kernels, copies and fills together."""
    arguments = to_gpu(packed_batch(2, 5000, num_objects))
    mg_ops.mutual_match(**arguments, backend="cuda")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        mg_ops.mutual_match(**arguments, backend="cuda")
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(on_device) <= 4, on_device


@pytest.mark.parametrize("offsets", [[-5, 2, 10], [0, 4, 1000], [3, 8, 10], [10, 12, 14], [6, 2, 9]], ids=str)
def test_wrong_offsets_are_clamped_and_check_reports_them(offsets: list[int]) -> None:
    arguments = to_gpu({**packed_batch(2, 3000, 5), "gt_offsets": torch.tensor(offsets)})
    match = mg_ops.mutual_match(**arguments, backend="cuda")
    assert_same(match, mg_ops.mutual_match(**arguments, backend="eager"), offsets)
    with pytest.raises(ValueError, match="gt_offsets"):
        mg_ops.mutual_match(**arguments, backend="cuda", check=True)


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("backend", COMPILED)
def test_torch_compile_takes_the_whole_call(backend: str) -> None:
    arguments = to_gpu(packed_batch(2, 3000, 5))
    compiled = torch.compile(mg_ops.mutual_match, fullgraph=True)
    match = compiled(**arguments, backend=backend)
    assert_same(match, mg_ops.mutual_match(**arguments, backend=backend), "torch.compile")
