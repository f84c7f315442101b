"""The CUDA kernels equal the reference, and no order of their threads shows: run on the CPU, thread by thread.

The same source as on a GPU, compiled by g++ against tests/cuda_on_cpu/cuda_on_cpu.h. MG_OPS_FUZZ scales the number of
random batches.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_on_cpu
import pytest
import torch
from comparison import assert_same
from conftest import fuzz_cases
from detector_batches import WORST, detector_batch, worst_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_batches import random_batch
from small_batches import small_batches

import mg_ops

SMALL_BLOCKS = {"threads": 32, "list_room": 8}
"""One warp a block and tiny lists: on inputs of a few hundred anchors most objects are ranked from all anchors."""


@pytest.fixture(scope="module", params=[{"threads": 64}, SMALL_BLOCKS], ids=["64 threads", "32 threads, tiny lists"])
def emulator(request: pytest.FixtureRequest) -> cuda_on_cpu.Emulator:
    return cuda_on_cpu.build(**request.param)


@pytest.fixture(scope="module")
def small_blocks() -> cuda_on_cpu.Emulator:
    return cuda_on_cpu.build(**SMALL_BLOCKS)


def run_by_itself(*options: str) -> subprocess.CompletedProcess[str]:
    """The emulator in a process of its own, which sanitizers need."""
    command = [sys.executable, str(Path(cuda_on_cpu.__file__).parent), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------------------------------------------------------------
# The emulator notices mistakes


def test_a_kernel_without_mistakes_passes(small_blocks: cuda_on_cpu.Emulator) -> None:
    for seed in range(10):
        assert small_blocks.run_mistake(0, seed) == list(range(small_blocks.threads))[::-1]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [(1, "left the kernel"), (2, "warp operation|deadlock|barrier"), (3, "different warp operations")],
    ids=["a thread leaves before a barrier", "a divergent barrier", "a divergent warp operation"],
)
def test_divergence_is_reported(small_blocks: cuda_on_cpu.Emulator, mistake: int, message: str) -> None:
    for seed in range(10):
        with pytest.raises(RuntimeError, match=message):
            small_blocks.run_mistake(mistake, seed)


def test_a_missing_barrier_shows(small_blocks: cuda_on_cpu.Emulator) -> None:
    right = list(range(small_blocks.threads))[::-1]
    assert all(small_blocks.run_mistake(4, seed) != right for seed in range(10))


def test_a_read_past_shared_memory_is_reported() -> None:
    result = run_by_itself("--sanitize", "--threads", "32", "--mistake", "5")
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The kernels equal the reference


def test_named_cases_and_random_batches(emulator: cuda_on_cpu.Emulator) -> None:
    count = fuzz_cases(30)
    first = 1000 * emulator.threads
    assert cuda_on_cpu.check_against_reference(emulator, range(first, first + count), first) >= count


def test_blocks_as_on_a_gpu() -> None:
    emulator = cuda_on_cpu.build()
    assert emulator.threads == 256
    cuda_on_cpu.check_against_reference(emulator, range(fuzz_cases(8)), 0)


def test_under_sanitizers() -> None:
    result = run_by_itself("--sanitize", "--threads", "32", "--batches", str(fuzz_cases(8)))
    assert result.returncode == 0, result.stderr
    assert "equal to the reference" in result.stdout


@settings(max_examples=fuzz_cases(150))
@given(arguments=small_batches(), seed=st.integers(0, 2**32))
def test_small_batches(small_blocks: cuda_on_cpu.Emulator, arguments: dict[str, Any], seed: int) -> None:
    match = small_blocks.mutual_match(**arguments, seed=seed)
    assert_same(match, mg_ops.mutual_match(**arguments, backend="eager"), str(arguments))


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_threads_does_not_matter(small_blocks: cuda_on_cpu.Emulator, seed: int) -> None:
    """Many objects compete for few anchors, so that every block adds to every list."""
    arguments = detector_batch(2, 150, 40)
    match = small_blocks.mutual_match(**arguments, seed=seed)
    assert_same(match, mg_ops.mutual_match(**arguments, backend="eager"), f"seed {seed}")


@pytest.mark.parametrize("iou_positive", [0.5, 1e-6], ids=["few positives", "nearly all positive"])
@pytest.mark.parametrize("kind", WORST)
def test_worst_cases_of_ranking(emulator: cuda_on_cpu.Emulator, kind: str, iou_positive: float) -> None:
    """When hundreds of anchors compete for one object, and when all of them tie."""
    arguments = worst_batch(kind, 500) | {"iou_positive": iou_positive, "iou_ignored": iou_positive / 2}
    match = emulator.mutual_match(**arguments, seed=3)
    assert_same(match, mg_ops.mutual_match(**arguments, backend="eager"), kind)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("whole_rows", [True, False], ids=["aligned rows", "odd strides"])
def test_every_dtype_is_rounded_to_float32(
    small_blocks: cuda_on_cpu.Emulator, dtype: torch.dtype, whole_rows: bool
) -> None:
    """All finite numbers of the small dtypes pass through: subnormals, infinities and NaN too."""
    arguments = detector_batch(2, 100, 5)
    for name in ("anchors", "box_deltas", "cls_logits"):
        arguments[name] = arguments[name].to(dtype)
        if not whole_rows:
            wide = torch.full((*arguments[name].shape[:-1], 7), math.nan, dtype=dtype)
            wide[..., 1 : 1 + arguments[name].shape[-1]] = arguments[name]
            arguments[name] = wide[..., 1 : 1 + arguments[name].shape[-1]]
        assert cuda_on_cpu.rows(arguments[name]).whole_rows == (whole_rows and name != "cls_logits")
    arguments["gt_boxes"] = [boxes.to(dtype) for boxes in arguments["gt_boxes"]]
    match = small_blocks.mutual_match(**arguments)
    assert_same(match, mg_ops.mutual_match(**arguments, backend="eager"), str(dtype))


def test_every_float16_is_converted_exactly(small_blocks: cuda_on_cpu.Emulator) -> None:
    """65,536 scores, one of each, for an object that all anchors share: the localization positives are the largest."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    for part in halves.split(2**13):  # in parts, which an emulator can do
        arguments = {
            "anchors": torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(part), 4),
            "pred_boxes": torch.zeros(1, len(part), 4),
            "cls_logits": part.reshape(1, -1, 1),
            "gt_boxes": [torch.tensor([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.3, 1.0]])],
            "gt_labels": [torch.tensor([0, 0])],
            "iou_positive": 0.9,
            "iou_ignored": 0.5,
        }
        match = small_blocks.mutual_match(**arguments)
        assert_same(match, mg_ops.mutual_match(**arguments, backend="eager"), str(part[0]))


# ---------------------------------------------------------------------------------------------------------------------
# What a GPU must never do


def test_wrong_offsets_are_read_as_the_reference_does(small_blocks: cuda_on_cpu.Emulator) -> None:
    """CPU tensors with such offsets raise; on a GPU nothing may be read or written out of bounds."""
    cuda_on_cpu.check_wrong_offsets(small_blocks, range(7000, 7000 + fuzz_cases(30)))


def test_launches_and_memory(small_blocks: cuda_on_cpu.Emulator) -> None:
    """At most four launches, and scratch of about 12 bytes an image and anchor, 17 an anchor and 476 an object."""
    for batch_size, num_anchors, num_objects in [(3, 200, 5), (1, 40, 300), (2, 0, 3), (0, 50, 0), (2, 100, 0)]:
        small_blocks.mutual_match(**detector_batch(batch_size, num_anchors, num_objects))
        call = small_blocks.last_call
        assert call.launches <= 4
        pairs, tiles, objects = batch_size * num_anchors, -(-num_anchors // 64), batch_size * num_objects
        of_tiles, of_images = tiles * (16 * batch_size + 64), 4 * batch_size
        assert call.scratch_bytes <= 12 * pairs + 16 * num_anchors + of_tiles + 476 * objects + of_images + 500
    small_blocks.mutual_match(**detector_batch(2, 100, 0))
    assert small_blocks.last_call.launches == 1  # nothing but the background


def test_lists_are_enough_for_ordinary_batches(emulator: cuda_on_cpu.Emulator) -> None:
    """With predictions near their anchors hardly an object is ranked from all anchors; tiny lists send many there."""
    ranked_from_all = 0
    for seed in range(3):
        arguments = detector_batch(2, 2000, 6, seed=seed)
        arguments["box_deltas"] = 0.2 * arguments["box_deltas"]
        emulator.mutual_match(**arguments)
        ranked_from_all += sum(emulator.notes().values())
    assert ranked_from_all > 30 if emulator.list_room < 100 else ranked_from_all <= 1


def test_each_reason_to_rank_from_all_anchors() -> None:
    """More pairs than a list may have; more predictions near an object than it has room for; all of an object lost."""
    boxes = torch.tensor([[100.0, 100.0, 140.0, 140.0]])
    too_many_pairs = worst_batch("all one box", 300)
    too_many_fronts = detector_batch(1, 300, 1) | {"gt_boxes": [boxes], "pred_boxes": boxes.expand(1, 300, 4)}
    del too_many_fronts["box_coder"], too_many_fronts["box_deltas"]
    all_lost = detector_batch(1, 300, 2) | {"gt_boxes": [boxes.expand(2, 4)]}
    for why, list_room, arguments in [
        ("pairs not kept", 8, too_many_pairs),
        ("front not kept", 2048, too_many_fronts),
        ("too few left", 2048, all_lost),
    ]:
        emulator = cuda_on_cpu.build(threads=64, list_room=list_room)
        match = emulator.mutual_match(**arguments)
        assert emulator.notes().get(f"rank_all: {why}", 0) > 0, why
        assert_same(match, mg_ops.mutual_match(**arguments, backend="eager"), why)


@pytest.mark.parametrize("rival_overlaps", [False, True])
def test_an_object_of_bad_predictions_lists_them(rival_overlaps: bool) -> None:
    """Object 1 loses its best anchor to object 0, and has another of quality 0.06, unless object 2 claims that at 0.07.

    Object 2 has a perfect anchor, so that claiming leaves out its pair of 0.07.
    """
    third = torch.tensor([44.0, 0.0, 76.0, 32.0]) + (0.0 if rival_overlaps else 100.0)
    anchors = torch.stack([torch.tensor([0.0, 0.0, 32.0, 32.0]), torch.tensor([16.0, 0.0, 48.0, 32.0]), third])
    objects = torch.stack([torch.tensor([18.0, 14.0, 24.0, 20.0]), torch.tensor([17.0, 13.0, 25.0, 21.0]), third])
    arguments = {
        "anchors": anchors,
        "pred_boxes": anchors[None],
        "cls_logits": torch.zeros(1, 3, 1),
        "gt_boxes": [objects],
        "gt_labels": [torch.zeros(3, dtype=torch.int64)],
    }
    emulator = cuda_on_cpu.build(threads=64)
    match = emulator.mutual_match(**arguments)
    assert match.cls_match.tolist() == [[0, -1 if rival_overlaps else 1, 2]]
    assert_same(match, mg_ops.mutual_match(**arguments, backend="eager"), "")
    assert bool(emulator.notes()) == rival_overlaps  # where an object gets nothing, all anchors are looked at


def test_areas_near_the_largest_float(small_blocks: cuda_on_cpu.Emulator) -> None:
    """Bounds of a pair do not overflow where its IoU does not."""
    batch = random_batch(120150)
    match = small_blocks.mutual_match(**batch.arguments)
    assert_same(match, mg_ops.mutual_match(**batch.arguments, backend="eager"), batch)


def test_scores_are_read_rarely() -> None:
    """Of the classes of all overlapping pairs, which the definition asks for, few are read; without overlap none."""
    emulator = cuda_on_cpu.build(threads=64)
    arguments = detector_batch(2, 2000, 6)
    emulator.mutual_match(**arguments)
    overlapping = sum(int((mg_ops.box_iou(arguments["anchors"], boxes) > 0).sum()) for boxes in arguments["gt_boxes"])
    assert overlapping > 1000
    assert 0 < emulator.last_call.scores_read < 0.6 * overlapping
    emulator.mutual_match(**arguments, strategy="localize_to_classify")
    assert emulator.last_call.scores_read == 0
    arguments["gt_boxes"] = [boxes + 10000 for boxes in arguments["gt_boxes"]]
    emulator.mutual_match(**arguments)
    assert emulator.last_call.scores_read == 0
