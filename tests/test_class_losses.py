"""The fused losses: hand-made answers, the definition in float64, torchvision's, and what training asks of them."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from typing import Any

import cuda_on_cpu
import pytest
import torch
from torch import Tensor

import mg_ops
from mg_ops import loss_definitions, losses

Loss = Callable[..., Tensor]


def focal(cls_logits: Tensor, class_targets: Tensor, soft_targets: Tensor, **options: Any) -> Tensor:
    """The focal loss with the arguments of the others."""
    return losses.focal_loss(cls_logits, class_targets, **options)


LOSSES: dict[str, tuple[Loss, dict[str, Any]]] = {
    "focal": (focal, {}),
    "focal, alpha None, gamma 1.5": (focal, {"alpha": None, "gamma": 1.5}),
    "focal, gamma 1": (focal, {"gamma": 1.0}),
    "quality focal": (losses.quality_focal_loss, {}),
    "quality focal, beta 1.5": (losses.quality_focal_loss, {"beta": 1.5}),
    "varifocal": (losses.varifocal_loss, {}),
    "soft BCE": (losses.soft_bce_loss, {}),
}
every_loss = pytest.mark.parametrize(("loss", "options"), LOSSES.values(), ids=LOSSES)
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of gradients, relative to the largest: they come in the dtype of the logits."""


def random_batch(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, A, C) around -2, labels of all kinds (B, A), and soft targets (B, A), some 0 or 1."""
    generator = torch.Generator().manual_seed(sum(shape))
    logits = (3 * torch.randn(shape, generator=generator) - 2).to(dtype)
    class_targets = torch.randint(-3, shape[2] + 1, shape[:2], generator=generator)
    soft_targets = torch.rand(shape[:2], generator=generator)
    soft_targets[:, ::3], soft_targets[:, 1::5] = 0.0, 1.0
    return logits, class_targets, soft_targets


def value_and_gradient(loss: Loss, logits: Tensor, *targets: Tensor, **options: Any) -> tuple[float, Tensor]:
    """A loss and its gradient."""
    logits = logits.detach().requires_grad_()
    value = loss(logits, *targets, **options)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient


def assert_close_to_the_definition(loss: Loss, logits: Tensor, *targets: Tensor, **options: Any) -> None:
    """The loss and its gradient, against the definition in float64."""
    value, gradient = value_and_gradient(loss, logits, *targets, **options)
    expected, wanted = value_and_gradient(loss, logits.double(), *targets, backend="eager", **options)
    assert value == pytest.approx(expected, rel=2e-6)
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    error = (gradient.double() - wanted).abs().max() if wanted.numel() else torch.zeros(())
    assert error <= TOLERANCES[logits.dtype] * wanted.abs().max().clamp(min=1e-30) if wanted.numel() else True


def test_by_hand() -> None:
    """Two anchors, two classes, logits 0: p = 1/2, and every cross-entropy is ln 2."""
    logits, ln2 = torch.zeros(1, 3, 2), math.log(2)
    class_targets = torch.tensor([[1, mg_ops.BACKGROUND, mg_ops.IGNORED]])
    soft_targets = torch.tensor([[0.75, 0.3, 0.3]])
    focal_by_hand = (0.25 * 0.25 + 3 * 0.75 * 0.25) * ln2
    assert losses.focal_loss(logits, class_targets).item() == pytest.approx(focal_by_hand)
    quality_by_hand = (0.25**2 + 3 * 0.25) * ln2
    assert losses.quality_focal_loss(logits, class_targets, soft_targets).item() == pytest.approx(quality_by_hand)
    varifocal_by_hand = (0.75 + 3 * 0.75 * 0.25) * ln2
    assert losses.varifocal_loss(logits, class_targets, soft_targets).item() == pytest.approx(varifocal_by_hand)
    assert losses.soft_bce_loss(logits, class_targets, soft_targets).item() == pytest.approx(4 * ln2)


@every_loss
@pytest.mark.parametrize("num_classes", [1, 3, 16, 80, 2500])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_equals_the_definition(loss: Loss, options: dict[str, Any], num_classes: int, dtype: torch.dtype) -> None:
    shape = (2, 9, num_classes) if num_classes > 1000 else (3, 71, num_classes)
    assert_close_to_the_definition(loss, *random_batch(shape, dtype), **options)


@every_loss
def test_the_definition_has_the_right_gradient(loss: Loss, options: dict[str, Any]) -> None:
    logits, *targets = random_batch((2, 5, 3), torch.float64)
    torch.autograd.gradcheck(lambda x: loss(x, *targets, backend="eager", **options), logits.requires_grad_())


def test_equals_torchvisions_focal_loss() -> None:
    ops = pytest.importorskip("torchvision.ops")
    logits, class_targets, _ = random_batch((2, 300, 20))
    class_targets = class_targets.clamp(-1, 19)
    one_hot = torch.zeros(2, 300, 20)
    one_hot.scatter_(-1, class_targets.clamp(min=0).unsqueeze(-1), (class_targets >= 0).float().unsqueeze(-1))
    for alpha, gamma in ((0.25, 2.0), (0.6, 1.0), (None, 0.0), (0.25, 3.5)):
        mine, gradient = value_and_gradient(losses.focal_loss, logits, class_targets, alpha=alpha, gamma=gamma)
        arguments = {"alpha": -1 if alpha is None else alpha, "gamma": gamma, "reduction": "sum"}
        theirs, wanted = value_and_gradient(ops.sigmoid_focal_loss, logits, one_hot, **arguments)
        assert mine == pytest.approx(theirs, rel=1e-5)
        assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


@every_loss
def test_what_does_not_count_never_shows(loss: Loss, options: dict[str, Any]) -> None:
    logits, class_targets, soft_targets = random_batch((2, 40, 4))
    expected, gradient = value_and_gradient(loss, logits, class_targets, soft_targets, **options)
    ignored = (class_targets < -1) | (class_targets >= 4)
    logits[ignored] = math.nan
    soft_targets[class_targets < 0] = math.nan
    value, other_gradient = value_and_gradient(loss, logits, class_targets, soft_targets, **options)
    assert value == expected and torch.equal(gradient, other_gradient)
    assert not bool(other_gradient[ignored].any())


@every_loss
def test_large_logits_stay_finite(loss: Loss, options: dict[str, Any]) -> None:
    logits = torch.tensor([-1e4, -200.0, -90.0, -40.0, 0.0, 40.0, 90.0, 200.0, 1e4]).reshape(1, 9, 1).repeat(3, 1, 2)
    class_targets = torch.tensor([-1, 0, 1]).reshape(3, 1).repeat(1, 9)
    assert_close_to_the_definition(loss, logits, class_targets, torch.full((3, 9), 0.5), **options)


@every_loss
def test_nothing_is_zero(loss: Loss, options: dict[str, Any]) -> None:
    for shape in ((0, 5, 3), (2, 0, 3), (2, 5, 0)):
        logits, class_targets, soft_targets = torch.zeros(shape), torch.zeros(shape[:2]).long(), torch.ones(shape[:2])
        value, gradient = value_and_gradient(loss, logits, class_targets, soft_targets, **options)
        assert value == 0.0 and gradient.shape == shape


def test_memory_is_that_of_the_gradient() -> None:
    """No tensor but the gradient is made: autograd keeps the arguments alone, and targets get none."""
    logits, class_targets, soft_targets = random_batch((2, 50, 4))
    logits.requires_grad_(), soft_targets.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        losses.quality_focal_loss(logits, class_targets, soft_targets).backward()
    pointers = {tensor.data_ptr() for tensor in (logits, class_targets, soft_targets)}
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() > 1} <= pointers
    assert soft_targets.grad is None


@pytest.mark.skipif(bool(mg_ops.library.load_error), reason="the library is not built")
def test_opcheck() -> None:
    logits, class_targets, soft_targets = random_batch((2, 20, 3))
    arguments = (logits.requires_grad_(), class_targets, soft_targets, 1.0, 2.0, 0.5, 2.0, False)
    torch.library.opcheck(torch.ops.mg_ops.class_loss.default, arguments)


WRONG = {
    "cls_logits: expected a floating point tensor, got list": {"cls_logits": [1.0]},
    "cls_logits: expected dtype": {"cls_logits": torch.zeros(2, 5, 3).long()},
    "cls_logits: expected shape (B, A, C)": {"cls_logits": torch.zeros(5, 3)},
    "class_targets: expected dtype int64": {"class_targets": torch.zeros(2, 5).int()},
    "class_targets: expected shape (2, 5)": {"class_targets": torch.zeros(2, 4).long()},
    "soft_targets: expected shape (2, 5)": {"soft_targets": torch.zeros(5)},
    "beta: expected a number": {"beta": "2"},
    "beta: expected a finite number of at least 0, got -1": {"beta": -1},
    "beta: expected a finite number of at least 0, got nan": {"beta": math.nan},
    "normalizer: expected a finite number above 0": {"normalizer": 0},
    "normalizer: expected one number": {"normalizer": torch.ones(2)},
    "backend: expected None or one of 'cuda', 'triton'": {"backend": "fused"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    arguments = {"cls_logits": torch.zeros(2, 5, 3), "class_targets": torch.zeros(2, 5).long()}
    arguments |= {"soft_targets": torch.zeros(2, 5), **WRONG[message]}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        losses.quality_focal_loss(**arguments)


@pytest.mark.skipif(bool(mg_ops.library.load_error), reason="the library is not built")
def test_the_operator_checks_by_itself() -> None:
    numbers = (1.0, 2.0, 0.5, 2.0, False)
    good = (torch.zeros(2, 5, 3), torch.zeros(2, 5).long(), None, *numbers)
    torch.ops.mg_ops.class_loss(*good)
    wrong = [
        (torch.zeros(2, 5, 3).int(), *good[1:]),
        (good[0], torch.zeros(2, 4).long(), *good[2:]),
        (good[0], torch.zeros(2, 5).int(), *good[2:]),
        (*good[:2], torch.zeros(4), *numbers),
        (*good[:3], -1.0, *numbers[1:]),
        (*good[:4], math.nan, *numbers[2:]),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="expected"):
            torch.ops.mg_ops.class_loss(*arguments)
    with pytest.raises(RuntimeError, match="grad_output"):
        torch.ops.mg_ops.class_loss_backward(torch.zeros(3), *good)


# ---------------------------------------------------------------------------------------------------------------------
# The CUDA kernels, run on the CPU


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return ctypes.CDLL(str(cuda_on_cpu.compile_kernels("class_loss_on_cpu.cpp")))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(2, 700, 8), (3, 41, 5), (1, 9, 2500), (2, 4200, 1)], ids=str)
@pytest.mark.parametrize("numbers", [(0.25, 2.0, 0.75, 2.0), (1.0, 0.0, 1.0, 0.0), (1.0, 1.5, 1.0, 1.5)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels first"])
def test_the_cuda_kernels_equal_the_definition(
    kernels: ctypes.CDLL, dtype: torch.dtype, shape: tuple[int, int, int], numbers: tuple[float, ...], layout: str
) -> None:
    logits, class_targets, soft_targets = random_batch(shape, dtype)
    if layout == "channels first":
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    loss, gradient = torch.full((), math.nan), torch.full(shape, math.nan, dtype=dtype)
    message = ctypes.create_string_buffer(500)
    failed = kernels.class_loss_on_cpu(
        *(ctypes.c_void_p(logits.data_ptr()), (ctypes.c_int64 * 3)(*logits.stride())),
        *(cuda_on_cpu.FLOAT_TYPES[dtype], (ctypes.c_int64 * 3)(*shape)),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (class_targets, soft_targets)),
        *((ctypes.c_float * 4)(*numbers), 0, ctypes.c_float(3.0), ctypes.c_uint64(sum(shape))),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (loss, gradient)),
        *(message, len(message)),
    )
    assert not failed, message.value
    exact = logits.double().requires_grad_()
    expected = loss_definitions.class_loss(exact, class_targets, soft_targets, *numbers, False)
    expected.backward()
    assert exact.grad is not None
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    error = (gradient.double() / 3 - exact.grad).abs().max()
    assert error <= TOLERANCES[dtype] * exact.grad.abs().max()
