"""The fused box losses: hand-made answers, the definition in float64, torchvision's, and what training asks of them."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import cuda_on_cpu
import pytest
import torch
from torch import Tensor

import mg_ops
from mg_ops import loss_definitions, losses

CODER = mg_ops.BoxCoder()
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of gradients, relative to the largest: targets are differences of float32 coordinates, and L1 losses steep near 0."""


class Batch(NamedTuple):
    """Three images with three, none and two objects."""

    predictions: Tensor
    loc_match: Tensor
    anchors: Tensor
    gt_boxes: list[Tensor]
    weights: Tensor

    @property
    def packed(self) -> tuple[Tensor, Tensor]:
        """The objects, and where those of each image begin."""
        counts = [len(boxes) for boxes in self.gt_boxes]
        return torch.cat(self.gt_boxes), torch.tensor([0, *counts]).cumsum(0)


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    """(count, 4), 5 to 45 wide and high."""
    corners = 100 * torch.rand(count, 2, generator=generator)
    return torch.cat([corners, corners + 5 + 40 * torch.rand(count, 2, generator=generator)], -1)


def random_batch(dtype: torch.dtype = torch.float32, num_anchors: int = 300) -> Batch:
    """One anchor in five is a positive."""
    generator = torch.Generator().manual_seed(num_anchors)
    counts = (3, 0, 2)
    match = torch.stack([torch.randint(-10, 3, (num_anchors,), generator=generator) for _ in counts])
    match = torch.minimum(match, torch.tensor(counts).unsqueeze(1) - 1)
    return Batch(
        torch.randn(3, num_anchors, 4, generator=generator).to(dtype),
        match,
        random_boxes(num_anchors, generator),
        [random_boxes(count, generator) for count in counts],
        torch.rand(3, num_anchors, generator=generator),
    )


Loss = Callable[..., Tensor]


def of_deltas(loss: Loss) -> Loss:
    """A loss of boxes, of deltas."""

    def call(deltas: Tensor, *objects: Any, **options: Any) -> Tensor:
        return loss(*objects, box_deltas=deltas, box_coder=CODER, **options)

    return call


def of_boxes(loss: Loss) -> Loss:
    """A loss of boxes, of the anchors moved by a few pixels."""

    def call(shifts: Tensor, loc_match: Tensor, anchors: Tensor, *objects: Any, **options: Any) -> Tensor:
        return loss(loc_match, anchors, *objects, pred_boxes=anchors + 2 * shifts, **options)

    return call


def with_coder(loss: Loss, **numbers: Any) -> Loss:
    """A loss of deltas."""

    def call(deltas: Tensor, *objects: Any, **options: Any) -> Tensor:
        return loss(deltas, *objects, box_coder=CODER, **numbers, **options)

    return call


LOSSES: dict[str, Loss] = {
    "smooth L1": with_coder(losses.smooth_l1_loss),
    "smooth L1, beta 1": with_coder(losses.smooth_l1_loss, beta=1.0),
    "balanced L1": with_coder(losses.balanced_l1_loss),
    "balanced L1 as released": with_coder(losses.balanced_l1_loss, as_released=True),
    "GIoU": of_boxes(losses.giou_loss),
    "GIoU of deltas": of_deltas(losses.giou_loss),
    "CIoU": of_boxes(losses.ciou_loss),
    "CIoU of deltas": of_deltas(losses.ciou_loss),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def value_and_gradient(loss: Loss, batch: Batch, **options: Any) -> tuple[float, Tensor]:
    """A loss and its gradient."""
    predictions = batch.predictions.detach().requires_grad_()
    value = loss(predictions, batch.loc_match, batch.anchors, batch.gt_boxes, **options)
    (gradient,) = torch.autograd.grad(value, predictions)
    return value.item(), gradient


@every_loss
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_anchors", [7, 300, 5000])
def test_equals_the_definition(loss: Loss, dtype: torch.dtype, num_anchors: int) -> None:
    batch = random_batch(dtype, num_anchors)
    value, gradient = value_and_gradient(loss, batch, weights=batch.weights)
    exact = batch._replace(predictions=batch.predictions.double())
    expected, wanted = value_and_gradient(loss, exact, weights=batch.weights, backend="eager")
    assert value == pytest.approx(expected, rel=1e-5)
    assert gradient.dtype == dtype
    assert (gradient.double() - wanted).abs().max() <= TOLERANCES[dtype] * wanted.abs().max()


@pytest.mark.parametrize("name", [name for name in LOSSES if "CIoU" not in name])
def test_the_definition_has_the_right_gradient(name: str) -> None:
    """But for CIoU, whose trade-off is a constant to the gradient: see torchvision's below."""
    loss = LOSSES[name]
    batch = random_batch(torch.float64, 12)
    rest = (batch.loc_match, batch.anchors.double(), [boxes.double() for boxes in batch.gt_boxes])
    torch.autograd.gradcheck(lambda x: loss(x, *rest, backend="eager"), batch.predictions.requires_grad_())


@pytest.mark.parametrize("name", ["generalized_box_iou_loss", "complete_box_iou_loss"])
def test_equals_torchvisions_loss_of_boxes(name: str) -> None:
    theirs = getattr(pytest.importorskip("torchvision.ops"), name)
    batch = random_batch()
    loss = of_boxes(losses.giou_loss if name.startswith("generalized") else losses.ciou_loss)
    value, gradient = value_and_gradient(loss, batch)
    shifts = batch.predictions.requires_grad_()
    gt_boxes, gt_offsets = batch.packed
    image, anchor = (batch.loc_match >= 0).nonzero(as_tuple=True)
    wanted = gt_boxes[gt_offsets[image] + batch.loc_match[image, anchor]]
    expected = theirs((batch.anchors + 2 * shifts)[image, anchor], wanted, reduction="sum")
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient, torch.autograd.grad(expected, shifts)[0], rtol=1e-4, atol=1e-5)


def test_smooth_l1_by_hand() -> None:
    """The object is the anchor moved by a tenth of its width: the delta of x is 1, all others are 0."""
    anchors, gt_boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(2, 1), [torch.tensor([[1.0, 0, 11, 10]])]
    deltas = torch.tensor([[[1.5, 0, 0, -0.05], [9.0, 9, 9, 9]]]).requires_grad_()
    loss_of = losses.smooth_l1_loss
    loss = loss_of(deltas, torch.tensor([[0, -1]]), anchors, gt_boxes, box_coder=CODER, beta=0.1, normalizer=4)
    assert loss.item() == pytest.approx((0.5 - 0.05 + 0.5 * 0.05**2 / 0.1) / 4)
    loss.backward()
    assert torch.allclose(deltas.grad, torch.tensor([[[0.25, 0, 0, -0.125], [0, 0, 0, 0]]]), atol=1e-6)


def slopes_of_balanced_l1(errors: Tensor, **options: Any) -> Tensor:
    """The gradient for errors of the first delta; the object is the anchor."""
    deltas = torch.zeros(1, len(errors), 4, dtype=errors.dtype)
    deltas[0, :, 0] = errors
    deltas.requires_grad_()
    anchors = torch.tensor([[0.0, 0, 10, 10]]).repeat(len(errors), 1)
    match = torch.zeros(1, len(errors)).long()
    loss = losses.balanced_l1_loss(deltas, match, anchors, [anchors[:1]], box_coder=CODER, **options)
    return torch.autograd.grad(loss, deltas)[0][0, :, 0]


def test_balanced_l1_has_the_gradient_of_its_definition() -> None:
    """alpha * ln(b x / beta + 1) below beta = 0.11, gamma beyond, and no jump between the two."""
    errors, b = torch.linspace(-0.3, 0.3, 101), math.exp(3) - 1
    expected = torch.where(errors.abs() < 0.11, 0.5 * torch.log(b * errors.abs() / 0.11 + 1), 1.5) * errors.sign()
    torch.testing.assert_close(slopes_of_balanced_l1(errors), expected, atol=1e-5, rtol=1e-4)
    below, beyond = slopes_of_balanced_l1(torch.tensor([0.11 - 1e-6, 0.11 + 1e-6])).tolist()
    assert below == pytest.approx(beyond, abs=1e-4)


def test_the_released_balanced_l1_is_the_papers_at_a_beta_of_1_and_steeper_below() -> None:
    errors = torch.linspace(-3, 3, 61)
    same = slopes_of_balanced_l1(errors, beta=1.0, as_released=True)
    torch.testing.assert_close(same, slopes_of_balanced_l1(errors, beta=1.0))
    errors = torch.tensor([1e-7, 0.05, 0.10999, 0.11001])
    released = slopes_of_balanced_l1(errors, as_released=True)
    # alpha / beta - alpha at 0; gamma + alpha * ((b * beta + 1) / (b * beta + beta) - 1) at beta; gamma beyond.
    assert released[0].item() == pytest.approx(0.5 / 0.11 - 0.5, rel=2e-4)
    assert released[2].item() == pytest.approx(1.5 + 0.5 * ((19.0855 * 0.11 + 1) / (20.0855 * 0.11) - 1), rel=2e-4)
    assert released[3].item() == 1.5
    assert bool((released[:3] > slopes_of_balanced_l1(errors)[:3]).all())


@every_loss
def test_objects_in_any_form(loss: Loss) -> None:
    batch = random_batch()
    expected = value_and_gradient(loss, batch)[0]
    gt_boxes, gt_offsets = batch.packed
    padded = torch.full((3, 4, 4), math.nan)
    for image, boxes in enumerate(batch.gt_boxes):
        padded[image, : len(boxes)] = boxes
    targets = [{"boxes": boxes, "labels": torch.zeros(len(boxes)).long()} for boxes in batch.gt_boxes]
    centers = [torch.cat([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], 1) for b in batch.gt_boxes]
    arguments = (batch.predictions, batch.loc_match, batch.anchors)
    assert loss(*arguments, gt_boxes, gt_offsets).item() == expected
    assert loss(*arguments, padded).item() == expected
    assert loss(*arguments, targets).item() == expected
    assert loss(*arguments, [{"boxes": boxes} for boxes in batch.gt_boxes]).item() == expected
    assert loss(*arguments, centers, gt_box_format="cxcywh").item() == pytest.approx(expected, rel=1e-5)


@every_loss
def test_what_is_no_positive_never_shows(loss: Loss) -> None:
    batch = random_batch()
    value, gradient = value_and_gradient(loss, batch, weights=batch.weights)
    none = batch.loc_match < 0
    assert not bool(gradient[none].any()) and bool((gradient[~none] != 0).any(-1).all())
    batch.predictions[none], batch.weights[none] = math.nan, math.nan
    for backend, relative in ((None, 0.0), ("eager", 1e-5)):
        other, other_gradient = value_and_gradient(loss, batch, weights=batch.weights, backend=backend)
        assert other == pytest.approx(value, rel=relative) and not bool(other_gradient.isnan().any())


@every_loss
@pytest.mark.parametrize("backend", [None, "eager"])
def test_without_objects_or_anchors_the_loss_is_0_and_has_a_gradient(loss: Loss, backend: str | None) -> None:
    for num_anchors, batch_size in ((5, 2), (0, 2), (5, 0)):
        match = torch.full((batch_size, num_anchors), -1)
        predictions = torch.zeros(batch_size, num_anchors, 4)
        batch = Batch(predictions, match, torch.rand(num_anchors, 4), [torch.zeros(0, 4)] * batch_size, match)
        value, gradient = value_and_gradient(loss, batch, backend=backend)
        assert value == 0.0 and gradient.shape == predictions.shape and not bool(gradient.any())


@pytest.mark.skipif(bool(mg_ops.library.load_error), reason="the library is not built")
def test_opcheck_and_the_operators_own_checks() -> None:
    batch = random_batch(num_anchors=20)
    gt_boxes, gt_offsets = batch.packed
    tensors = (batch.predictions.requires_grad_(), batch.anchors, batch.loc_match, gt_boxes, gt_offsets, batch.weights)
    numbers = ([10.0, 10.0, 5.0, 5.0, 4.0], 3, 0.5, 1.5, 0.11)
    torch.library.opcheck(torch.ops.mg_ops.box_loss.default, (*tensors, *numbers))
    wrong = [
        ((tensors[0][:, :, :3], *tensors[1:]), numbers),
        ((tensors[0], batch.anchors[1:], *tensors[2:]), numbers),
        ((*tensors[:2], batch.loc_match.int(), *tensors[3:]), numbers),
        ((*tensors[:4], torch.tensor([0, 3, 2, 5]), batch.weights), numbers),
        ((*tensors[:4], torch.tensor([0, 3, 3, 6]), batch.weights), numbers),
        ((*tensors[:5], batch.weights[:2]), numbers),
        (tensors, ([10.0] * 4, *numbers[1:])),
        (tensors, (numbers[0], 5, *numbers[2:])),
        (tensors, (*numbers[:4], 0.0)),
    ]
    for changed, options in wrong:
        with pytest.raises(RuntimeError, match=r"expected|must"):
            torch.ops.mg_ops.box_loss(*changed, *options)


WRONG = {
    "box_deltas: expected shape (B, 5, 4)": {"box_deltas": torch.zeros(1, 4, 4)},
    "loc_match: expected dtype int64": {"loc_match": torch.zeros(1, 5)},
    "loc_match: expected shape (1, 5)": {"loc_match": torch.zeros(1, 4).long()},
    "anchors: expected shape (A, 4)": {"anchors": torch.zeros(5, 5)},
    "gt_boxes": {"gt_boxes": 3},
    "gt_boxes[0]": {"gt_boxes": [torch.zeros(2, 5)]},
    "gt_box_format: expected one of": {"gt_box_format": "yxyx"},
    "BoxCoder": {"box_coder": (10, 10, 5, 5)},
    "beta: expected a finite number above 0, got 0": {"beta": 0},
    "beta: expected a number, got str": {"beta": "0.1"},
    "weights: expected shape (1, 5)": {"weights": torch.zeros(5)},
    "normalizer: expected a finite number above 0": {"normalizer": -1.0},
    "backend: expected None": {"backend": "fused"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    arguments = {
        "box_deltas": torch.zeros(1, 5, 4),
        "loc_match": torch.zeros(1, 5).long(),
        "anchors": torch.rand(5, 4),
        "gt_boxes": [torch.rand(2, 4)],
        "box_coder": CODER,
        **WRONG[message],
    }
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        losses.smooth_l1_loss(**arguments)


def test_boxes_and_deltas_cannot_be_confused() -> None:
    objects = (torch.zeros(1, 5).long(), torch.rand(5, 4), [torch.rand(2, 4)])
    predictions = torch.zeros(1, 5, 4)
    for wrong in (
        {},
        {"pred_boxes": predictions, "box_deltas": predictions, "box_coder": CODER},
        {"box_deltas": predictions},
        {"pred_boxes": predictions, "box_coder": CODER},
    ):
        with pytest.raises(ValueError, match=r"^(pred_boxes|box_coder): expected"):
            losses.giou_loss(*objects, **wrong)


# ---------------------------------------------------------------------------------------------------------------------
# The CUDA kernels, run on the CPU


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return ctypes.CDLL(str(cuda_on_cpu.compile_kernels("box_loss_on_cpu.cpp")))


@pytest.mark.parametrize("name", loss_definitions.BOX_LOSSES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("deltas", [True, False], ids=["deltas", "boxes"])
def test_the_cuda_kernels_equal_the_definition(
    kernels: ctypes.CDLL, name: str, dtype: torch.dtype, deltas: bool
) -> None:
    batch = random_batch(dtype, 1001)
    predictions = batch.predictions if deltas else (batch.anchors + 0.5 * batch.predictions).to(dtype)
    gt_boxes, gt_offsets = batch.packed
    coder = [*CODER.weights, CODER.clip] if deltas else None
    loss, gradient = torch.full((), math.nan), torch.full((3, 1001, 4), math.nan, dtype=dtype)
    message = ctypes.create_string_buffer(500)
    number, numbers = loss_definitions.BOX_LOSSES.index(name), (0.5, 1.5, 0.11)
    objects = (batch.anchors, batch.loc_match, gt_boxes, gt_offsets, batch.weights)
    failed = kernels.box_loss_on_cpu(
        *(ctypes.c_void_p(predictions.data_ptr()), cuda_on_cpu.FLOAT_TYPES[dtype]),
        (ctypes.c_int64 * 3)(3, 1001, len(gt_boxes)),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in objects),
        *(None if coder is None else (ctypes.c_float * 5)(*coder), ctypes.c_int64(number)),
        *((ctypes.c_float * 3)(*numbers), ctypes.c_float(3.0), ctypes.c_uint64(number)),
        *(ctypes.c_void_p(loss.data_ptr()), ctypes.c_void_p(gradient.data_ptr()), message, len(message)),
    )
    assert not failed, message.value
    exact = predictions.double().requires_grad_()
    tensors = (exact, batch.anchors, batch.loc_match, gt_boxes, gt_offsets, batch.weights)
    expected = loss_definitions.box_loss(*tensors, coder, number, *numbers)
    expected.backward()
    assert exact.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    apart = (gradient.double() / 3 - exact.grad).abs() > TOLERANCES[dtype] * exact.grad.abs().max()
    # The gradient of the released form jumps, and rounding decides on which side an error is.
    assert apart.sum() <= (2 if name == "released_balanced_l1" else 0)
