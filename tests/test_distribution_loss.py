"""The fused distribution focal loss: hand-made answers, the definition in float64, mmdetection's and ultralytics'."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from typing import Any

import cuda_on_cpu
import pytest
import test_box_losses
import torch
from test_box_losses import TOLERANCES, Batch
from torch import Tensor
from torch.nn import functional

import mg_ops
from mg_ops import loss_definitions
from mg_ops.losses import distribution_focal_loss

NUM_BINS = (2, 16, 17)


def random_batch(dtype: torch.dtype = torch.float32, num_anchors: int = 300, num_bins: int = 16) -> Batch:
    """That of the box losses, with logits of distances for predictions."""
    batch = test_box_losses.random_batch(dtype, num_anchors)
    generator = torch.Generator().manual_seed(num_bins)
    return batch._replace(predictions=2 * torch.randn(3, num_anchors, 4 * num_bins, generator=generator).to(dtype))


def strides_of(batch: Batch) -> Tensor:
    """Such that some objects reach beyond the last bin, and some sides lie on the wrong side of the center."""
    return torch.tensor([2.0, 4.0, 8.0])[torch.arange(len(batch.anchors)) % 3]


def value_and_gradient(batch: Batch, strides: Tensor | float | None = None, **options: Any) -> tuple[float, Tensor]:
    """The loss and its gradient."""
    strides = strides_of(batch) if strides is None else strides
    predictions = batch.predictions.detach().requires_grad_()
    value = distribution_focal_loss(
        predictions, batch.loc_match, batch.anchors, batch.gt_boxes, strides=strides, **options
    )
    return value.item(), torch.autograd.grad(value, predictions)[0]


def test_by_hand() -> None:
    """The center is at (5, 5); the sides are 2.25, 2.5, 0 and (clamped to the last bin) 3 strides of 2 away."""
    anchors, gt_boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(2, 1), [torch.tensor([[0.5, 0.0, 4.0, 95.0]])]
    logits = torch.zeros(1, 2, 16)
    logits[0, 0, 2] = math.log(3)  # of the left side the bins have 1/6, 1/6, 3/6 and 1/6
    logits.requires_grad_()
    match = torch.tensor([[0, -1]])
    loss = distribution_focal_loss(logits, match, anchors, gt_boxes, strides=2.0, margin=0.0, normalizer=4)
    at_left = 0.75 * math.log(2) + 0.25 * math.log(6)
    assert loss.item() == pytest.approx((at_left + 3 * math.log(4)) / 4)
    loss.backward()
    wanted = [[1 / 6, 1 / 6, 1 / 2 - 0.75, 1 / 6 - 0.25], [0.25, 0.25, -0.25, -0.25]]
    wanted += [[-0.75, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, -0.75]]
    assert torch.allclose(logits.grad[0, 0].view(4, 4), torch.tensor(wanted) / 4, atol=1e-6)
    assert not bool(logits.grad[0, 1].any())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_bins", NUM_BINS)
@pytest.mark.parametrize("num_anchors", [7, 300, 5000])
def test_equals_the_definition(dtype: torch.dtype, num_bins: int, num_anchors: int) -> None:
    batch = random_batch(dtype, num_anchors, num_bins)
    value, gradient = value_and_gradient(batch, weights=batch.weights)
    exact = batch._replace(predictions=batch.predictions.double())
    expected, wanted = value_and_gradient(exact, weights=batch.weights, backend="eager")
    assert value == pytest.approx(expected, rel=1e-5)
    assert gradient.dtype == dtype
    assert (gradient.double() - wanted).abs().max() <= TOLERANCES[dtype] * wanted.abs().max()


def test_the_definition_has_the_right_gradient() -> None:
    batch = random_batch(torch.float64, 12, 5)
    rest = (batch.loc_match, batch.anchors.double(), [boxes.double() for boxes in batch.gt_boxes])
    options = {"strides": strides_of(batch), "weights": batch.weights, "backend": "eager"}
    torch.autograd.gradcheck(lambda x: distribution_focal_loss(x, *rest, **options), batch.predictions.requires_grad_())


def distances_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """(P, 4 * R) logits and (P, 4) distances in strides of the positives, one by one."""
    logits, distances = [], []
    for image, anchor in (batch.loc_match >= 0).nonzero().tolist():
        x1, y1, x2, y2 = batch.anchors[anchor].tolist()
        box = batch.gt_boxes[image][batch.loc_match[image, anchor]].tolist()
        x, y, stride = (x1 + x2) / 2, (y1 + y2) / 2, strides_of(batch)[anchor].item()
        distances.append([value / stride for value in (x - box[0], y - box[1], box[2] - x, box[3] - y)])
        logits.append(batch.predictions[image, anchor])
    return torch.stack(logits), torch.tensor(distances)


def assert_is_theirs(margin: float, theirs: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Value and gradient of a loss that takes (4 P, R) logits and distances, and returns a sum."""
    batch = random_batch(num_bins=16)
    value, gradient = value_and_gradient(batch, margin=margin)
    batch.predictions.requires_grad_()
    logits, distances = distances_of(batch)
    expected = theirs(logits.view(-1, 16), distances.clamp(0, 15 - margin).flatten())
    assert value == pytest.approx(expected.item(), rel=1e-5)
    wanted = torch.autograd.grad(expected, batch.predictions)[0]
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_equals_mmdetections() -> None:
    gfocal = pytest.importorskip("mmdet.models.losses.gfocal_loss", reason="mmdet is not installed")
    assert_is_theirs(0.1, gfocal.DistributionFocalLoss(reduction="sum"))


def test_equals_ultralytics() -> None:
    loss = pytest.importorskip("ultralytics.utils.loss", reason="ultralytics is not installed").DFLoss(16)
    assert_is_theirs(0.01, lambda logits, distances: 4 * loss(logits, distances.view(-1, 4)).sum())


def test_equals_cross_entropies() -> None:
    """Equation 6 by torch's own functions."""

    def equation(logits: Tensor, distances: Tensor) -> Tensor:
        low = distances.long()
        at_low, at_upper = (functional.cross_entropy(logits, bins, reduction="none") for bins in (low, low + 1))
        return ((low + 1 - distances) * at_low + (distances - low) * at_upper).sum()

    assert_is_theirs(0.01, equation)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_what_is_no_positive_never_shows(backend: str | None) -> None:
    batch = random_batch(num_anchors=40)
    value, gradient = value_and_gradient(batch, weights=batch.weights)
    none = batch.loc_match < 0
    assert not bool(gradient[none].any()) and bool((gradient[~none] != 0).any(-1).all())
    batch.predictions[none], batch.weights[none] = math.nan, math.nan
    other, other_gradient = value_and_gradient(batch, weights=batch.weights, backend=backend)
    assert other == pytest.approx(value, rel=1e-5) and not bool(other_gradient.isnan().any())
    nothing = batch._replace(loc_match=torch.full_like(batch.loc_match, -1), gt_boxes=[torch.zeros(0, 4)] * 3)
    value, gradient = value_and_gradient(nothing, backend=backend)
    assert value == 0 and gradient.shape == batch.predictions.shape and not bool(gradient.any())


def test_large_logits_stay_finite() -> None:
    batch = random_batch(num_anchors=30)
    batch.predictions.mul_(1e4)
    value, gradient = value_and_gradient(batch)
    exact, wanted = value_and_gradient(batch._replace(predictions=batch.predictions.double()), backend="eager")
    assert value == pytest.approx(exact, rel=1e-5)
    assert torch.allclose(gradient.double(), wanted, atol=1e-4)


@pytest.mark.skipif(bool(mg_ops.library.load_error), reason="the library is not built")
def test_opcheck_and_the_operators_own_checks() -> None:
    batch = random_batch(num_anchors=20)
    tensors = (batch.predictions.requires_grad_(), batch.anchors, batch.loc_match, *batch.packed, batch.weights)
    torch.library.opcheck(torch.ops.mg_ops.distribution_loss.default, (*tensors, strides_of(batch), 0.01))
    wrong = [
        (batch.predictions[..., :63], *tensors[1:], strides_of(batch), 0.01),
        (batch.predictions[..., :4], *tensors[1:], strides_of(batch), 0.01),
        (*tensors, strides_of(batch)[1:], 0.01),
        (*tensors, strides_of(batch), -0.01),
        (*tensors, strides_of(batch), math.nan),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.mg_ops.distribution_loss(*arguments)


WRONG = {
    "distance_logits: expected shape (B, A, 4 * R) with R >= 2": {"distance_logits": torch.zeros(1, 5, 4)},
    "distance_logits: expected shape (B, 5, 8)": {"distance_logits": torch.zeros(1, 4, 8)},
    "strides: expected shape (5,)": {"strides": torch.ones(5, 1)},
    "strides: expected a finite number above 0": {"strides": 0.0},
    "strides: expected a number": {"strides": [8.0] * 5},
    "margin: expected a number in [0, 1]": {"margin": 2.0},
    "weights: expected shape (1, 5)": {"weights": torch.zeros(5)},
    "backend: expected None": {"backend": "fused"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    arguments = {
        "distance_logits": torch.zeros(1, 5, 8),
        "loc_match": torch.zeros(1, 5).long(),
        "anchors": torch.rand(5, 4),
        "gt_boxes": [torch.rand(2, 4)],
        "strides": 8.0,
        **WRONG[message],
    }
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        distribution_focal_loss(**arguments)


# ---------------------------------------------------------------------------------------------------------------------
# The CUDA kernels, run on the CPU


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return ctypes.CDLL(str(cuda_on_cpu.compile_kernels("box_loss_on_cpu.cpp")))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_bins", NUM_BINS)
def test_the_cuda_kernels_equal_the_definition(kernels: ctypes.CDLL, dtype: torch.dtype, num_bins: int) -> None:
    batch = random_batch(dtype, 301, num_bins)
    gt_boxes, gt_offsets = batch.packed
    loss, gradient = torch.full((), math.nan), torch.full((3, 301, 4 * num_bins), math.nan, dtype=dtype)
    message = ctypes.create_string_buffer(500)
    tensors = (batch.anchors, batch.loc_match, gt_boxes, gt_offsets, batch.weights, strides_of(batch))
    failed = kernels.distribution_loss_on_cpu(
        *(ctypes.c_void_p(batch.predictions.data_ptr()), cuda_on_cpu.FLOAT_TYPES[dtype]),
        (ctypes.c_int64 * 3)(3, 301, len(gt_boxes)),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        *(ctypes.c_int64(num_bins), ctypes.c_float(0.01), ctypes.c_float(3.0), ctypes.c_uint64(num_bins)),
        *(ctypes.c_void_p(loss.data_ptr()), ctypes.c_void_p(gradient.data_ptr()), message, len(message)),
    )
    assert not failed, message.value
    exact = batch.predictions.double().requires_grad_()
    positives = (batch.anchors, batch.loc_match, gt_boxes, gt_offsets, batch.weights)
    expected = loss_definitions.distribution_loss(exact, *positives, strides_of(batch), 0.01)
    expected.backward()
    assert exact.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient.double() / 3 - exact.grad).abs().max() <= TOLERANCES[dtype] * exact.grad.abs().max()
