"""Losses of dense detectors, straight from the labels of an assignment.

Each classification loss is one pass over the logits, and its gradient another one. Nothing of the size of the logits is
made but that gradient: no one-hot targets, no probabilities, no loss per logit. Sums are equal from run to run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mg_ops import library
from mg_ops.backend_choice import choose_backend
from mg_ops.checks import MAX_FLOAT, check_number, check_tensor, describe
from mg_ops.reference import BACKGROUND, autocast_type


def focal_loss(
    cls_logits: Tensor,
    class_targets: Tensor,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    normalizer: Tensor | float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sigmoid focal loss (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 5), added up.

    Args:
        cls_logits: (B, A, C) floating, any strides.
        class_targets: (B, A) int64, as `encode_targets` gives them: a label in [0, C), or `BACKGROUND` (-1). Anchors
            with any other number, such as `IGNORED`, are left out.
        alpha: weight of the positives, in [0, 1]; the negatives weigh 1 - alpha. None: all weigh 1.
        gamma: exponent of the modulating factor, at least 0.
        normalizer: what the sum is divided by, such as the number of positives. A tensor stays on its device.
        backend: None for the best one: "cpp" on the CPU, "cuda" on a GPU, "eager" elsewhere.

    Returns:
        () float32. The gradient of cls_logits comes in their dtype.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or number; the message names the argument.
        RuntimeError: the backend asked for cannot be used; the message says why.

    Examples:
        >>> targets = mg_ops.encode_targets(match, anchors, gt_boxes, gt_labels, num_classes=80)
        >>> num_positives = match.cls_positive.sum().clamp(min=1)
        >>> loss = mg_ops.losses.focal_loss(cls_logits, targets.class_targets, normalizer=num_positives)
    """
    weights = (1.0, 1.0)
    if alpha is not None:
        alpha = _check_factor("alpha", alpha, most=1.0)
        weights = (alpha, 1.0 - alpha)
    gamma = _check_factor("gamma", gamma)
    numbers = (weights[0], gamma, weights[1], gamma, False)
    return _class_loss(cls_logits, class_targets, None, numbers, normalizer, backend)


def quality_focal_loss(
    cls_logits: Tensor,
    class_targets: Tensor,
    soft_targets: Tensor,
    *,
    beta: float = 2.0,
    normalizer: Tensor | float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Quality focal loss (Li et al., "Generalized Focal Loss", NeurIPS 2020, equation 3), added up.

    Args:
        cls_logits: as of `focal_loss`, like class_targets, normalizer and backend.
        class_targets: the labels.
        soft_targets: (B, A) floating in [0, 1]: the target at the label, such as the IoU of the predicted box. Read at
            positives only; no gradient flows into it.
        beta: exponent of the modulating factor abs(target - p), at least 0.
        normalizer: what the sum is divided by.
        backend: None for the best one.

    Returns:
        () float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `focal_loss`.
    """
    beta = _check_factor("beta", beta)
    numbers = (1.0, beta, 1.0, beta, False)
    return _class_loss(cls_logits, class_targets, soft_targets, numbers, normalizer, backend)


def varifocal_loss(
    cls_logits: Tensor,
    class_targets: Tensor,
    soft_targets: Tensor,
    *,
    alpha: float = 0.75,
    gamma: float = 2.0,
    normalizer: Tensor | float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Varifocal loss (Zhang et al., "VarifocalNet", CVPR 2021, equation 2), added up.

    Args:
        cls_logits: as of `focal_loss`, like class_targets, normalizer and backend.
        class_targets: the labels.
        soft_targets: (B, A) floating in [0, 1]: target and weight at the label; an anchor with 0 counts as background.
            Read at positives only; no gradient flows into it.
        alpha: weight of the negatives, at least 0.
        gamma: exponent of the modulating factor of the negatives, at least 0.
        normalizer: what the sum is divided by.
        backend: None for the best one.

    Returns:
        () float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `focal_loss`.
    """
    numbers = (1.0, 0.0, _check_factor("alpha", alpha), _check_factor("gamma", gamma), True)
    return _class_loss(cls_logits, class_targets, soft_targets, numbers, normalizer, backend)


def soft_bce_loss(
    cls_logits: Tensor,
    class_targets: Tensor,
    soft_targets: Tensor,
    *,
    normalizer: Tensor | float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Binary cross-entropy with the soft targets of task-aligned assignment (Feng et al., "TOOD", ICCV 2021; YOLOv8).

    Args:
        cls_logits: as of `focal_loss`, like class_targets, normalizer and backend.
        class_targets: the labels.
        soft_targets: (B, A) floating in [0, 1]: the target at the label; all other classes have 0. Read at positives
            only; no gradient flows into it.
        normalizer: what the sum is divided by, such as the sum of the soft targets.
        backend: None for the best one.

    Returns:
        () float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `focal_loss`.
    """
    return _class_loss(cls_logits, class_targets, soft_targets, (1.0, 0.0, 1.0, 0.0, False), normalizer, backend)


def _check_factor(name: str, value: object, most: float = MAX_FLOAT) -> float:
    """Raises unless the value is a number from 0 to the most; returns the float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not 0 <= value <= most:
        expected = "a finite number of at least 0" if most == MAX_FLOAT else f"a number in [0, {most:g}]"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def _class_loss(
    cls_logits: Tensor,
    class_targets: Tensor,
    soft_targets: Tensor | None,
    numbers: tuple[float, float, float, float, bool],
    normalizer: Tensor | float | None,
    backend: str | None,
) -> Tensor:
    """The sum over the normalizer; `numbers` are the last arguments of `class_loss`."""
    device = check_tensor("cls_logits", cls_logits, "floating point", ("B", "A", "C"), None).device
    shape = cls_logits.shape[:2]
    check_tensor("class_targets", class_targets, "int64", shape, device, "cls_logits")
    if soft_targets is not None:
        check_tensor("soft_targets", soft_targets, "floating point", shape, device, "cls_logits")
        soft_targets = soft_targets.detach()
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1 or normalizer.device != device:
            raise ValueError(f"normalizer: expected one number on {device}, got {describe(normalizer)}")
        normalizer = normalizer.detach().reshape(())
    elif normalizer is not None:
        normalizer = check_number("normalizer", normalizer, 0.0, MAX_FLOAT, "a finite number above 0")
    if backend == "triton":
        raise ValueError(
            "backend: expected None, 'cpp', 'cuda' or 'eager', which torch.compile turns into a Triton kernel"
        )
    fused = choose_backend(backend, device.type, device.index) in ("cpp", "cuda")
    compute = torch.ops.mg_ops.class_loss.default if fused else class_loss
    total: Tensor = compute(cls_logits, class_targets, soft_targets, *numbers)
    return total if normalizer is None else total / normalizer


def class_loss(
    cls_logits: Tensor,
    class_targets: Tensor,
    soft_targets: Tensor | None,
    positive_weight: float,
    positive_gamma: float,
    negative_weight: float,
    negative_gamma: float,
    weigh_by_target: bool,
) -> Tensor:
    """The definition of the four losses, in plain PyTorch: what csrc/class_loss.h says, and autograd differentiates it.

    Computes in float32, and in float64 where the logits are.
    """
    with torch.autocast(autocast_type(cls_logits.device), enabled=False):
        logits = cls_logits if cls_logits.dtype == torch.float64 else cls_logits.float()
        num_classes = logits.shape[-1]
        has_label = (class_targets >= 0) & (class_targets < num_classes)  # (B, A)
        counts = has_label | (class_targets == BACKGROUND)
        target = torch.ones_like(class_targets, dtype=logits.dtype)
        if soft_targets is not None:
            target = torch.where(has_label, soft_targets, 0.0).to(logits.dtype)
            has_label = has_label & (target != 0)
        label = torch.where(has_label, class_targets, 0).unsqueeze(-1)  # (B, A, 1)
        is_label = has_label.unsqueeze(-1) & (label == torch.arange(num_classes, device=logits.device))  # (B, A, C)

        # What does not count gets a logit without loss, so that no value of its own reaches a gradient.
        negatives = torch.where(is_label | ~counts.unsqueeze(-1), -math.inf, logits)
        negative_losses = negative_weight * _power(negatives.sigmoid(), negative_gamma) * -F.logsigmoid(-negatives)
        positives = torch.where(is_label, logits, 0.0).sum(-1)  # (B, A)
        modulator = _power((target - positives.sigmoid()).abs(), positive_gamma)
        cross_entropy = F.binary_cross_entropy_with_logits(positives, target, reduction="none")
        positive_losses = positive_weight * modulator * cross_entropy * (target if weigh_by_target else 1.0)
        total = negative_losses.sum() + torch.where(has_label, positive_losses, 0.0).sum()
        return total.float() if logits.dtype == torch.float32 else total


def _power(base: Tensor, gamma: float) -> Tensor:
    """base ** gamma, whose gradient is finite at 0."""
    return base**gamma if gamma >= 1 or gamma == 0 else base.clamp(min=1e-30) ** gamma


def _fake_class_loss(cls_logits: Tensor, *rest: Any) -> Tensor:
    return cls_logits.new_empty((), dtype=torch.float32)


def _fake_backward(grad_output: Tensor, cls_logits: Tensor, *rest: Any) -> Tensor:
    return cls_logits.new_empty(cls_logits.shape)


def _keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    cls_logits, class_targets, soft_targets, *numbers = inputs
    ctx.save_for_backward(cls_logits, class_targets, soft_targets)
    ctx.numbers = numbers


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.mg_ops.class_loss_backward(grad_output, *ctx.saved_tensors, *ctx.numbers)
    return (gradient, *[None] * 7)


if not library.load_error:
    torch.library.register_fake("mg_ops::class_loss")(_fake_class_loss)
    torch.library.register_fake("mg_ops::class_loss_backward")(_fake_backward)
    torch.library.register_autograd("mg_ops::class_loss", _differentiate, setup_context=_keep_arguments)
