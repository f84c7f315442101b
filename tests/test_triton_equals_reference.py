"""The Triton backend returns the integers of the reference: compiled on a GPU, in Triton's interpreter on CPU tensors.

The interpreter is chosen for a whole process (TRITON_INTERPRET=1), so tests/test_triton_interpreted.py starts one for
this file. It runs programs one after the other: races show on a GPU only. Streams, graphs and synchronization are in
test_gpu.py.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import fuzz_cases
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from cases import CASES, Case  # noqa: E402
from comparison import assert_same  # noqa: E402
from random_batches import RandomBatch, random_batch, to_device  # noqa: E402

import mg_ops  # noqa: E402
from mg_ops import library, reference  # noqa: E402
from mg_ops.triton import det_math, mutual_match  # noqa: E402
from mg_ops.triton.mutual_match_kernels import listed_orders  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


def assert_equals_reference(arguments: dict[str, Any], what: object) -> None:
    expected = mg_ops.mutual_match(**arguments, backend="eager")
    assert_same(mg_ops.mutual_match(**to_device(arguments, DEVICE), backend="triton"), expected, what)


def small_batches(count: int, first_seed: int) -> Iterator[RandomBatch]:
    """Random batches; for the interpreter, which needs milliseconds for each object and tile, only small ones."""
    batches = (random_batch(seed) for seed in itertools.count(first_seed))
    if INTERPRETED:
        batches = (batch for batch in batches if batch.notes["A"] * sum([1, *batch.notes["objects"]]) <= 1500)
    return itertools.islice(batches, count)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a few anchors and objects already take several programs, and several turns of every loop."""
    for kernel in ("CLAIM", "SETTLE", "OWN", "RANK"):
        monkeypatch.setattr(mutual_match, f"{kernel}_WARPS", 1)
        monkeypatch.setattr(mutual_match, f"{kernel}_BLOCK", 8 if INTERPRETED else 32)


OPTIONS: dict[str, Any] = {
    "gt_crowd": None,
    "box_coder": None,
    "scores_are_probabilities": False,
    "classification_by_regressed": True,
    "localization_by_amplified": True,
    "sigma": 2.0,
    "iou_positive": 0.5,
    "iou_ignored": 0.4,
    "crowd_overlap": 0.5,
}
"""Of the operators, for strategy "mutual"."""


def for_operator(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Packed arguments of `mg_ops.mutual_match` as an operator takes them, past its checks."""
    arguments = OPTIONS | arguments
    arguments["cls_scores"] = arguments.pop("cls_logits")
    names = (*reference.Inputs._fields, *list(OPTIONS)[-6:])
    return tuple(arguments[name] for name in names)


def run_operator(arguments: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    """Straight to the launches; strategy "mutual"."""
    return mutual_match.mutual_match(*for_operator(to_device(arguments, DEVICE)), **options)


def run_reference(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The definition."""
    return reference.mutual_match(*for_operator(arguments))


def packed_batch(objects: list[int], num_anchors: int = 40, num_classes: int = 3, seed: int = 0) -> dict[str, Any]:
    """Overlapping boxes in a unit square, packed: image b has objects[b] objects."""
    random = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        corner, size = torch.rand(*shape, 2, generator=random), torch.rand(*shape, 2, generator=random)
        return torch.cat([corner, corner + 0.1 + size], dim=-1)

    batch_size, num_gt = len(objects), sum(objects)
    return {
        "anchors": boxes(num_anchors),
        "pred_boxes": boxes(batch_size, num_anchors),
        "cls_logits": torch.randn(batch_size, num_anchors, num_classes, generator=random),
        "gt_boxes": boxes(num_gt),
        "gt_labels": torch.randint(num_classes, (num_gt,), generator=random),
        "gt_offsets": torch.tensor([0, *itertools.accumulate(objects)]),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The definition


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_clause_of_the_definition(case: Case) -> None:
    match = mg_ops.mutual_match(**case.arguments(DEVICE, packed=True, slack=2), backend="triton")
    assert match.cls_match.device.type == DEVICE
    assert_same(match, case.expected(slack=2), case.clause)


@pytest.mark.parametrize("part", range(4))
def test_random_batches(part: int) -> None:
    for batch in small_batches(fuzz_cases(8 if INTERPRETED else 250), first_seed=10_000 * (part + 1)):
        assert_equals_reference(batch.arguments, batch)


@pytest.mark.parametrize("part", range(2))
def test_random_batches_in_small_blocks(small_blocks: None, part: int) -> None:
    for batch in small_batches(fuzz_cases(6 if INTERPRETED else 100), first_seed=100_000 * (part + 1)):
        assert_equals_reference(batch.arguments, batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_wide_and_narrow_inputs_are_rounded_once(dtype: torch.dtype) -> None:
    arguments = packed_batch([2, 0, 3])
    for name in ("anchors", "pred_boxes", "cls_logits", "gt_boxes"):
        arguments[name] = arguments[name].to(dtype)
    arguments["gt_labels"], arguments["gt_offsets"] = arguments["gt_labels"].int(), arguments["gt_offsets"].int()
    assert_equals_reference(arguments, dtype)


def test_any_strides_are_read_in_place() -> None:
    arguments = packed_batch([2, 3])
    expected = mg_ops.mutual_match(**arguments, backend="eager")
    strided = to_device(arguments, DEVICE)
    strided["anchors"] = strided["anchors"].T.contiguous().T
    strided["pred_boxes"] = strided["pred_boxes"].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    strided["cls_logits"] = strided["cls_logits"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["gt_boxes"] = strided["gt_boxes"].flip(1).repeat_interleave(2, 0)[::2].flip(1)
    for name in ("gt_labels", "gt_offsets"):
        strided[name] = strided[name].repeat_interleave(3)[::3]
    assert not any(value.is_contiguous() for name, value in strided.items() if name not in ("gt_boxes",))
    assert_same(mg_ops.mutual_match(**strided, backend="triton"), expected, "strides")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_any_alignment_is_read_in_place(dtype: torch.dtype, first: int) -> None:
    """Rows that are aligned are read by one load each; memory may begin anywhere."""
    arguments = packed_batch([2, 3], num_anchors=9)
    for name in ("anchors", "pred_boxes", "cls_logits", "gt_boxes"):
        arguments[name] = arguments[name].to(dtype)
    expected = mg_ops.mutual_match(**arguments, backend="eager")
    moved = to_device(arguments, DEVICE)
    for name in ("anchors", "pred_boxes", "cls_logits", "gt_boxes"):
        given = moved[name]
        moved[name] = given.new_zeros(first + given.numel())[first:].view(given.shape).copy_(given)
    assert_same(mg_ops.mutual_match(**moved, backend="triton"), expected, (dtype, first))


# ---------------------------------------------------------------------------------------------------------------------
# Ranking: lists and their fallback


@pytest.mark.parametrize("longest_list", [0, 1, 5])
def test_ranking_without_lists_is_the_same(small_blocks: None, longest_list: int) -> None:
    """Objects whose list is too long, here almost any, rank by scanning all anchors."""
    arguments = packed_batch([3, 1, 2])
    assert_same(run_operator(arguments, longest_list=longest_list), run_reference(arguments), longest_list)


@pytest.mark.parametrize("num_anchors", [1, 300])
@pytest.mark.parametrize("longest_list", [0, 0x7FFFFFFF])
def test_ties_over_all_anchors(num_anchors: int, longest_list: int) -> None:
    """All qualities equal: the index alone decides, down to its last digit."""
    arguments = packed_batch([2, 1], num_anchors)
    arguments["anchors"] = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(num_anchors, 4)
    arguments["pred_boxes"] = arguments["anchors"].expand(2, num_anchors, 4)
    arguments["cls_logits"] = torch.zeros(1, 1, 1).expand(2, num_anchors, 3)
    # 0.45 of the anchors' box: ignored, but for the best one; then all positive.
    for width in (0.45, 0.75):
        arguments["gt_boxes"] = torch.tensor([[0.0, 0.0, width, 1.0]]).expand(3, 4)
        assert_same(run_operator(arguments, longest_list=longest_list), run_reference(arguments), width)


@pytest.mark.parametrize("least_iou", [0.0, 1e-4, 0.2, 0.5, 0.999])
def test_any_threshold_of_lists_gives_the_same(
    small_blocks: None, monkeypatch: pytest.MonkeyPatch, least_iou: float
) -> None:
    """From lists of all that an object owns to lists of almost nothing."""
    orders = listed_orders(2 * least_iou) if least_iou else (1, 1)
    monkeypatch.setattr(mutual_match, "listed_orders", lambda iou_ignored: orders)
    for by_regressed, by_amplified in itertools.product((False, True), repeat=2):
        arguments = packed_batch([3, 1, 2, 9, 0])
        arguments |= {"classification_by_regressed": by_regressed, "localization_by_amplified": by_amplified}
        assert_same(run_operator(arguments), run_reference(arguments), (least_iou, by_regressed, by_amplified))


def test_predicted_boxes_that_overlap_nothing() -> None:
    """No object has anything to list but its best anchor."""
    arguments = packed_batch([5, 1])
    arguments["pred_boxes"] = arguments["pred_boxes"] + 50
    assert_same(run_operator(arguments), run_reference(arguments), "far")


def test_best_pairs_of_others_take_anchors_from_a_list() -> None:
    """Claiming finds one anchor more than object 0 chooses; then two of them go to objects 1 and 2."""
    arguments = packed_batch([3], num_anchors=20)
    arguments["anchors"] = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(20, 1)
    arguments["anchors"][12:, 3] = 0.3  # less than iou_ignored: object 0 chooses 12
    arguments["gt_boxes"] = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.9, 0.0, 1.9, 1.0], [-0.9, 0.0, 0.1, 1.0]])
    pred_boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(20, 1)
    pred_boxes[11] += torch.tensor([0.4, 0.0, 0.4, 0.0])  # the best of objects 1 and 2, but better for object 0
    pred_boxes[12] -= torch.tensor([0.4, 0.0, 0.4, 0.0])
    pred_boxes[13:, 2] = 0.15  # less than half of iou_ignored: not listed
    arguments["pred_boxes"] = pred_boxes[None]
    expected = run_reference(arguments)
    assert (expected[0] == 0).sum() == 12 and expected[0][0, 13] == 0
    assert_same(run_operator(arguments), expected, "taken")


def test_anchors_taken_back_overflow_a_list() -> None:
    """An object that no anchor overlaps must not keep the anchors whose predicted boxes claim it best.

    They go to the next best object, whose list has no room for them.
    """
    num_anchors = 40
    arguments = packed_batch([2], num_anchors)
    # Object 0 over all anchors, object 1 far from them; the predicted boxes cover object 1 and a bit of object 0.
    arguments["anchors"] = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(num_anchors, 1)
    arguments["gt_boxes"] = torch.tensor([[0.0, 0.0, 1.2, 1.0], [1.5, 0.0, 2.5, 1.0]])
    left = 1.19 - 0.02 * (torch.arange(num_anchors) * 7 % num_anchors)
    ones = torch.ones(num_anchors)
    arguments["pred_boxes"] = torch.stack([left, 0 * ones, 2.5 * ones, ones], dim=1).unsqueeze(0)
    by_pred = mg_ops.box_iou(arguments["pred_boxes"][0], arguments["gt_boxes"])
    assert (by_pred[:, 1] > by_pred[:, 0]).all() and (by_pred[:, 0] > 0).all()
    expected = run_reference(arguments)
    assert expected[2].tolist() == [num_anchors, 0]
    assert_same(run_operator(arguments), expected, "taken back")


def test_more_objects_than_anchors(small_blocks: None) -> None:
    arguments = packed_batch([33, 1], num_anchors=9)
    assert_same(run_operator(arguments), run_reference(arguments), "33 objects")


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and offsets


@pytest.mark.parametrize("objects", [[], [0], [0, 0], [2]])
@pytest.mark.parametrize(("num_anchors", "num_classes"), [(0, 2), (5, 0), (0, 0)])
def test_empty_sizes(objects: list[int], num_anchors: int, num_classes: int) -> None:
    arguments = packed_batch(objects, num_anchors, max(num_classes, 1))
    arguments["cls_logits"] = arguments["cls_logits"][..., :num_classes]
    assert_same(run_operator(arguments), run_reference(arguments), (objects, num_anchors, num_classes))


@pytest.mark.parametrize(
    "offsets",
    [
        *([-3, 2, 99, 99], [2, 2, 5, 5], [1, 3, 4, 5], [9, 9, 9, 9], [-(2**40), 2**40, 2**62, 0]),  # clamped
        *([0, 5, 3, 4], [5, 2, 4, 1], [0, 3, 1, 5], [4, -(2**62), 3, 2**62]),  # kept from decreasing
    ],
    ids=str,
)
def test_wrong_offsets_never_share_objects(offsets: list[int]) -> None:
    arguments = packed_batch([2, 3, 0])
    arguments["gt_offsets"] = torch.tensor(offsets)
    match = run_operator(arguments)
    assert_same(match, run_reference(arguments), offsets)
    arguments["gt_offsets"] = arguments["gt_offsets"].clamp(0, 5).cummax(0).values
    assert_same(match, run_reference(arguments), offsets)


def test_an_image_far_into_a_batch() -> None:
    """Offsets are read 32 and 128 at a time."""
    counts = [0] * 135
    for image in (0, 31, 32, 127, 128, 134):
        counts[image] = 1
    arguments = packed_batch(counts, num_anchors=3)
    assert_same(run_operator(arguments), run_reference(arguments), "135 images")


def test_numbers_that_31_bits_cannot_hold_are_refused() -> None:
    arguments = packed_batch([1])
    arguments["anchors"] = arguments["anchors"][:1].expand(2**31, 4)
    arguments["cls_logits"] = arguments["cls_logits"][:, :1, :1].expand(1, 2**31, 1)
    arguments["pred_boxes"] = arguments["pred_boxes"][:, :1].expand(1, 2**31, 4)
    with pytest.raises(ValueError, match="31 bits"):
        run_operator(arguments)


class CountAllocations(TorchDispatchMode):
    """Sums the bytes of all tensors that are made."""

    allocated = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result._base is None and "view" not in function.name():
            self.allocated += result.nbytes
        return result


class NoLaunch:
    """Stands in for a kernel."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        return lambda *arguments, **options: None


def test_memory_does_not_grow_with_anchors_times_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("claim_kernel", "settle_kernel", "own_kernel", "rank_kernel"):
        monkeypatch.setattr(mutual_match, kernel, NoLaunch())  # the interpreter makes copies of its own
    num_anchors, objects = 5000, [60, 80]
    arguments = to_device(packed_batch(objects, num_anchors), DEVICE)
    with CountAllocations() as count:
        outputs = run_operator(arguments)
    extra = count.allocated - sum(output.nbytes for output in outputs)
    assert 0 < extra <= 40 * len(objects) * num_anchors + 100 * sum(objects)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


@triton.jit
def _evaluate_kernel(x_pointer, exp_pointer, log2_pointer, sigmoid_pointer, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_pointer + index, mask=index < size, other=0)
    tl.store(exp_pointer + index, det_math.exp(x), mask=index < size)
    tl.store(sigmoid_pointer + index, det_math.sigmoid(x), mask=index < size)
    positive = tl.where((x > 0) & (x <= 3.402823466e38), x, 1.0)
    tl.store(log2_pointer + index, det_math.log2(positive), mask=index < size)


def test_polynomials_have_the_bits_of_the_reference() -> None:
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0)).int()
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 1.0, 88.7, 89.0, -103.9, -104.6, 0.70710677]
    )
    near_one = 1 + torch.arange(-4000, 4000) * 2.0**-24
    x = torch.cat([bits.view(torch.float32), special, near_one, torch.linspace(-110, 95, 20001)])
    on_device = x.to(DEVICE)
    exp, log2, sigmoid = (torch.empty_like(on_device) for _ in range(3))
    _evaluate_kernel[(triton.cdiv(len(x), 1024),)](
        on_device, exp, log2, sigmoid, len(x), BLOCK=1024, enable_fp_fusion=False
    )
    positive = torch.where((x > 0) & x.isfinite(), x, 1.0)
    for name, value, expected in (
        ("exp", exp, reference.exp(x)),
        ("log2", log2, reference.log2(positive)),
        ("sigmoid", sigmoid, reference.sigmoid(x)),
    ):
        value = value.cpu()
        same = (value.view(torch.int32) == expected.view(torch.int32)) | (value.isnan() & expected.isnan())
        assert same.all(), (
            f"{name}({x[~same][0].item()!r}) = {value[~same][0].item()!r}, not {expected[~same][0].item()!r}"
        )


def test_the_operator_is_what_torch_expects() -> None:
    """Schema, fake and dispatch of torch.ops.mg_ops.mutual_match_triton agree."""
    arguments = to_device(packed_batch([2, 1]), DEVICE)
    operator = torch.ops.mg_ops.mutual_match_triton.default
    assert DEVICE in library.TRITON_DEVICES
    torch.library.opcheck(operator, for_operator(arguments))
