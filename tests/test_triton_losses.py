"""The losses in Triton are those of the definition: compiled on a GPU, in Triton's interpreter on CPU tensors.

The interpreter is chosen for a whole process: tests/test_triton_interpreted.py starts one for this file. What the
compiler makes of the kernels, torch.compile's too, is in test_triton_compiles_offline.py.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import test_box_losses
import test_class_losses
import test_distribution_loss
import test_losses
import torch
from test_losses import assert_equal, every_loss, value_and_gradient
from torch import Tensor

pytest.importorskip("triton")

import mg_ops
from mg_ops import library, losses

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = [] if DEVICE == "cpu" else [pytest.mark.gpu]
DTYPES = list(test_class_losses.TOLERANCES)


def on_device(value: Any) -> Any:
    """Tensors in lists and tuples, on the device; a batch becomes its list."""
    return [on_device(element) for element in value] if isinstance(value, (list, tuple)) else value.to(DEVICE)


def run(loss: Any, arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """A loss and its gradient by the kernels, of arguments on the CPU."""
    return value_and_gradient(loss, on_device(arguments), backend="triton", **options)


def assert_is_the_definition(name: str, loss: Any, arguments: list[Any], **options: Any) -> None:
    """Value and gradient, against the definition in float64."""
    value, gradient = run(loss, arguments, **options)
    exact = [arguments[0].double(), *arguments[1:]]
    expected, wanted = value_and_gradient(loss, exact, backend="eager", **options)
    is_class_loss = name in test_class_losses.LOSSES
    tolerances = test_class_losses.TOLERANCES if is_class_loss else test_box_losses.TOLERANCES
    assert value.dtype == torch.float32 and value.device.type == DEVICE
    assert value.item() == pytest.approx(expected.item(), rel=2e-6 if is_class_loss else 1e-5)
    assert gradient.dtype == arguments[0].dtype and gradient.shape == wanted.shape and gradient.is_contiguous()
    if wanted.numel():
        error = (gradient.cpu().double() - wanted).abs().max()
        assert error <= 4 * tolerances[arguments[0].dtype] * wanted.abs().max()  # exp and 1 / x are the GPU's own


@every_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_definition(name: str, dtype: torch.dtype) -> None:
    loss, arguments, options = test_losses.arguments_of(name, dtype, num_anchors=130)
    assert_is_the_definition(name, loss, arguments, **options)


@pytest.mark.parametrize("name", test_class_losses.LOSSES)
@pytest.mark.parametrize("shape", [(3, 71, 1), (2, 9, 80), (2, 3, 2500), (1, 1, 1)], ids=str)
def test_any_number_of_classes(name: str, shape: tuple[int, int, int]) -> None:
    """Blocks that hold many anchors, and anchors that take several blocks."""
    loss, options = test_class_losses.LOSSES[name]
    assert_is_the_definition(name, loss, list(test_class_losses.random_batch(shape)), **options)


@pytest.mark.parametrize("num_bins", test_distribution_loss.NUM_BINS)
def test_any_number_of_bins(num_bins: int) -> None:
    batch = test_distribution_loss.random_batch(torch.float32, 90, num_bins)
    options = {"strides": test_distribution_loss.strides_of(batch), "weights": batch.weights}
    value, gradient = run(
        losses.distribution_focal_loss,
        [*batch[:3], *batch.packed],
        **{key: option.to(DEVICE) for key, option in options.items()},
    )
    expected, wanted = test_distribution_loss.value_and_gradient(batch, weights=batch.weights, backend="eager")
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(gradient.cpu(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", test_box_losses.LOSSES)
def test_positives_have_weights(name: str) -> None:
    loss, batch = test_box_losses.LOSSES[name], test_box_losses.random_batch(num_anchors=90)
    gt_boxes, gt_offsets = batch.packed
    arguments = [*batch[:3], gt_boxes, gt_offsets.int()]
    value, gradient = run(loss, arguments, weights=batch.weights.half().to(DEVICE))
    expected, wanted = value_and_gradient(loss, arguments, weights=batch.weights.half(), backend="eager")
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient.cpu(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


def test_by_hand() -> None:
    """Logits 0: p = 1/2, and every cross-entropy is ln 2. A box beside its object, of the same size: an IoU of 1/3."""
    arguments = on_device([torch.zeros(1, 3, 2), torch.tensor([[1, mg_ops.BACKGROUND, mg_ops.IGNORED]])])
    soft_targets = torch.tensor([[0.75, 0.3, 0.3]], device=DEVICE)
    ln2 = math.log(2)
    focal = losses.focal_loss(*arguments, backend="triton").item()
    assert focal == pytest.approx((0.25 * 0.25 + 3 * 0.75 * 0.25) * ln2)
    quality = losses.quality_focal_loss(*arguments, soft_targets, backend="triton").item()
    assert quality == pytest.approx((0.25**2 + 3 * 0.25) * ln2)
    varifocal = losses.varifocal_loss(*arguments, soft_targets, backend="triton").item()
    assert varifocal == pytest.approx((0.75 + 3 * 0.75 * 0.25) * ln2)
    assert losses.soft_bce_loss(*arguments, soft_targets, backend="triton").item() == pytest.approx(4 * ln2)

    anchors, match = torch.tensor([[0.0, 0, 10, 10]], device=DEVICE), torch.zeros(1, 1).long().to(DEVICE)
    objects = (match, anchors, [anchors + torch.tensor([5.0, 0, 5, 0], device=DEVICE)])
    boxes = anchors.expand(1, 1, 4)
    giou = losses.giou_loss(*objects, pred_boxes=boxes, backend="triton")
    ciou = losses.ciou_loss(*objects, pred_boxes=boxes, backend="triton")
    assert giou.item() == pytest.approx(1 - 1 / 3)
    assert ciou.item() == pytest.approx(1 - 1 / 3 + 25 / (15**2 + 10**2))


@every_loss
def test_without_a_positive_the_rest_still_counts(name: str) -> None:
    loss, arguments, options = test_losses.arguments_of(name, num_anchors=40)
    arguments[1] = torch.full_like(arguments[1], mg_ops.BACKGROUND)
    assert_is_the_definition(name, loss, arguments, **options)
    arguments[1] = torch.full_like(arguments[1], mg_ops.IGNORED)
    value, gradient = run(loss, arguments, **options)
    assert value.item() == 0 and not bool(gradient.any())


@every_loss
def test_what_does_not_count_never_shows(name: str) -> None:
    loss, arguments, options = test_losses.arguments_of(name, num_anchors=40)
    expected = run(loss, arguments, **options)
    is_class_loss = name in test_class_losses.LOSSES
    labels = arguments[1]
    left_out = (labels < -1) | (labels >= 20) if is_class_loss else labels < 0
    arguments[0][left_out] = math.nan
    if is_class_loss:
        arguments[2][labels < 0] = math.nan
    assert_equal(run(loss, arguments, **options), expected)
    assert not bool(expected[1][left_out.to(DEVICE)].any())


@pytest.mark.parametrize("name", test_class_losses.LOSSES)
def test_large_logits_stay_finite(name: str) -> None:
    loss, options = test_class_losses.LOSSES[name]
    logits = torch.tensor([-1e4, -200.0, -90.0, -40.0, 0.0, 40.0, 90.0, 200.0, 1e4]).reshape(1, 9, 1).repeat(3, 1, 2)
    class_targets = torch.tensor([-1, 0, 1]).reshape(3, 1).repeat(1, 9)
    assert_is_the_definition(name, loss, [logits, class_targets, torch.full((3, 9), 0.5)], **options)


@every_loss
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_predictions_that_are_not_finite(name: str, bad: float) -> None:
    """The loss is finite where the definition's is, and only there."""
    loss, arguments, options = test_losses.arguments_of(name, num_anchors=12)
    counts = (arguments[1] == 0).nonzero()[0].tolist()
    arguments[0][counts[0], counts[1]] = bad
    value, expected = run(loss, arguments, **options)[0], loss(*arguments, backend="eager", **options)
    assert value.isfinite().item() == expected.isfinite().item()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5) or not bool(expected.isfinite())


@every_loss
def test_nothing_is_zero(name: str) -> None:
    loss, arguments, options = test_losses.arguments_of(name, num_anchors=0)
    value, gradient = run(loss, arguments, **options)
    assert value.item() == 0 and gradient.shape == arguments[0].shape
    if name in test_class_losses.LOSSES:
        for shape in ((0, 5, 3), (2, 5, 0)):
            arguments = [torch.zeros(shape), torch.zeros(shape[:2]).long(), torch.ones(shape[:2])]
            value, gradient = run(loss, arguments, **options)
            assert value.item() == 0 and gradient.shape == shape
    else:
        _, arguments, _ = test_losses.arguments_of(name, num_anchors=5)
        arguments[1].fill_(-1)
        arguments[3:] = [torch.zeros(0, 4), torch.zeros(4).long()]
        value, gradient = run(loss, arguments, **options)
        assert value.item() == 0 and gradient.shape == arguments[0].shape and not bool(gradient.any())


@every_loss
def test_any_strides_are_read_in_place(name: str) -> None:
    loss, (predictions, *rest), options = test_losses.arguments_of(name, num_anchors=60)
    expected = run(loss, [predictions, *rest], **options)
    channels_first = predictions.transpose(1, 2).contiguous().transpose(1, 2)
    a_part = torch.randn(len(predictions), 80, 99)[:, 10:70, 2 : 2 + predictions.shape[2]].copy_(predictions)
    of_anchors = predictions.shape[:2]
    strided = [value.repeat_interleave(2, 1)[:, ::2] if value.shape == of_anchors else value for value in rest]
    for other in (channels_first, a_part):
        device = on_device([other, *strided])
        assert not device[0].is_contiguous()
        assert_equal(value_and_gradient(loss, device, backend="triton", **options), expected)


@every_loss
def test_the_same_bits_from_run_to_run_and_a_normalizer_that_stays(name: str) -> None:
    loss, arguments, options = test_losses.arguments_of(name, num_anchors=100)
    arguments = on_device(arguments)
    normalizer = torch.tensor(4, device=DEVICE)
    value, gradient = value_and_gradient(loss, arguments, backend="triton", **options)
    for _ in range(3):
        again = value_and_gradient(loss, arguments, backend="triton", normalizer=normalizer, **options)
        assert_equal(again, (value / 4, gradient / 4))


OPERATORS: dict[str, tuple[str, list[Any]]] = {
    "class_loss": ("varifocal", [1.0, 2.0, 0.5, 2.0, True]),
    "box_loss": ("CIoU of deltas", [None, [10.0, 10.0, 5.0, 5.0, 4.0], 4, 0.5, 1.5, 0.11]),
    "distribution_loss": ("distribution focal", [None, torch.ones(20), 0.01]),
}
"""A loss of each, and what the operator takes after the tensors; weights are None."""


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_are_what_torch_expects(name: str) -> None:
    import mg_ops.triton.losses  # noqa: F401  # registers them

    loss_name, numbers = OPERATORS[name]
    predictions, labels, *rest = on_device(test_losses.arguments_of(loss_name, num_anchors=20)[1])
    numbers = [number.to(DEVICE) if isinstance(number, Tensor) else number for number in numbers]
    tensors = [labels, *rest] if name == "class_loss" else [rest[0], labels, *rest[1:]]
    checks = ["test_schema", "test_autograd_registration"]
    if DEVICE == "cuda":  # the interpreter takes no fake tensors
        checks += ["test_faketensor", "test_aot_dispatch_dynamic"]
    operator = getattr(torch.ops.mg_ops, f"{name}_triton").default
    torch.library.opcheck(operator, (predictions.requires_grad_(), *tensors, *numbers), test_utils=checks)
    wrong = [predictions[:, 1:], *([predictions[..., :3]] if name != "class_loss" else [])]
    for given in wrong:
        with pytest.raises(ValueError, match="expected shape"):
            operator(given, *tensors, *numbers)
    with pytest.raises(ValueError, match="grad_output: expected shape"):
        gradient_of = getattr(torch.ops.mg_ops, f"{name}_triton_backward")
        gradient_of(predictions.detach(), predictions.detach(), *tensors, *numbers)


def test_it_is_the_default_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the devices of Triton, but for the CPU, where its interpreter is not meant."""
    monkeypatch.setattr(library, "load_error", "not built")
    loss, arguments, options = test_losses.arguments_of("focal", num_anchors=20)
    taken = loss(*on_device(arguments), **options)
    wanted = loss(*on_device(arguments), backend="eager" if DEVICE == "cpu" else "triton", **options)
    assert torch.equal(taken, wanted)


@pytest.mark.skipif(DEVICE == "cpu", reason="interpreted kernels cannot be captured or compiled")
@every_loss
def test_nothing_waits_for_the_gpu_and_a_graph_holds_it(name: str) -> None:
    test_losses.assert_a_graph_holds(name, backend="triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="interpreted kernels cannot be captured or compiled")
@pytest.mark.parametrize("name", ["varifocal", "GIoU of deltas", "distribution focal"])
def test_torch_compile_takes_the_whole_call(name: str) -> None:
    loss, arguments, options = test_losses.arguments_of(name, num_anchors=200)

    def step(predictions: Tensor, *rest: Any) -> Tensor:
        return loss(2 * predictions, *rest, backend="triton", **options)

    expected = value_and_gradient(step, on_device(arguments))
    found = value_and_gradient(torch.compile(step, fullgraph=True), on_device(arguments))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
