"""Losses of dense detectors, straight from the labels of an assignment.

Each classification loss is one pass over the logits, and its gradient another one. Nothing of the size of the logits is
made but that gradient: no one-hot targets, no probabilities, no loss per logit. Sums are equal from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mg_ops import library
from mg_ops.backend_choice import choose_backend
from mg_ops.boxes import BoxCoder, check_box_coder
from mg_ops.checks import MAX_FLOAT, check_bool, check_number, check_tensor, describe, join_levels
from mg_ops.loss_definitions import BOX_LOSSES, box_loss, class_loss, distribution_loss
from mg_ops.matcher import GroundTruth, Levels
from mg_ops.objects import pack_objects


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
        backend: None for the best one: "cpp" on the CPU, on a GPU "cuda" or else "triton", "eager" elsewhere.

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
    soft_targets: Tensor | None,
    *,
    beta: float = 2.0,
    normalizer: Tensor | float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Quality focal loss (Li et al., "Generalized Focal Loss", NeurIPS 2020, equation 3), added up.

    Args:
        cls_logits: as of `focal_loss`, like class_targets, normalizer and backend.
        class_targets: the labels.
        soft_targets: (B, A) floating in [0, 1]: the target at the label, such as the IoU of the predicted box; None: 1.
            Read at positives only; no gradient flows into it.
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
    soft_targets: Tensor | None,
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
            None: 1. Read at positives only; no gradient flows into it.
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
    soft_targets: Tensor | None,
    *,
    normalizer: Tensor | float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Binary cross-entropy with the soft targets of task-aligned assignment (Feng et al., "TOOD", ICCV 2021; YOLOv8).

    Args:
        cls_logits: as of `focal_loss`, like class_targets, normalizer and backend.
        class_targets: the labels.
        soft_targets: (B, A) floating in [0, 1]: the target at the label; all other classes have 0. None: 1. Read
            at positives only; no gradient flows into it.
        normalizer: what the sum is divided by, such as the sum of the soft targets.
        backend: None for the best one.

    Returns:
        () float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `focal_loss`.
    """
    return _class_loss(cls_logits, class_targets, soft_targets, (1.0, 0.0, 1.0, 0.0, False), normalizer, backend)


def smooth_l1_loss(
    box_deltas: Levels,
    loc_match: Tensor,
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_offsets: Tensor | None = None,
    *,
    box_coder: BoxCoder,
    beta: float = 1.0 / 9,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    gt_box_format: str = "xyxy",
    backend: str | None = None,
) -> Tensor:
    """Smooth L1 loss of the deltas of the positives (Girshick, "Fast R-CNN", ICCV 2015, equation 3), added up.

    Args:
        box_deltas: (B, A, 4) floating, the predicted deltas.
        loc_match: (B, A) int64, as in `MutualMatch.loc_match`: the index of a positive's object within its image.
            Anchors with a number below 0 are left out, and get no gradient.
        anchors: (A, 4) floating, (x1, y1, x2, y2).
        gt_boxes: the boxes of the objects, in any of the forms that `mutual_match` takes.
        gt_offsets: (B + 1,) int64 or int32, for packed objects.
        box_coder: encodes the objects' boxes as deltas.
        beta: the error in a coordinate from which on the loss is linear, above 0.
        weights: (B, A) floating, of the positives; None: all weigh 1. No gradient flows into them.
        normalizer: what the sum over positives and coordinates is divided by, such as 4 times the number of positives.
            A tensor stays on its device.
        gt_box_format: of gt_boxes: "xyxy", "xywh" or "cxcywh".
        backend: None for the best one: "cpp" on the CPU, on a GPU "cuda" or else "triton", "eager" elsewhere.

    Returns:
        () float32. The gradient of box_deltas comes in their dtype.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or number; the message names the argument.
        RuntimeError: the backend asked for cannot be used; the message says why.

    Examples:
        >>> num_positives = match.loc_positive.sum().clamp(min=1)
        >>> loss = mg_ops.losses.smooth_l1_loss(
        ...     box_deltas, match.loc_match, anchors, gt_boxes, box_coder=coder, normalizer=4 * num_positives)
    """
    objects = (loc_match, anchors, gt_boxes, gt_offsets, gt_box_format)
    numbers = ("smooth_l1", 1.0, 1.0, _check_positive("beta", beta))
    return _box_loss("box_deltas", box_deltas, *objects, box_coder, numbers, weights, normalizer, backend)


def balanced_l1_loss(
    box_deltas: Levels,
    loc_match: Tensor,
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_offsets: Tensor | None = None,
    *,
    box_coder: BoxCoder,
    alpha: float = 0.5,
    gamma: float = 1.5,
    beta: float = 0.11,
    as_released: bool = False,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    gt_box_format: str = "xyxy",
    backend: str | None = None,
) -> Tensor:
    """Balanced L1 loss of the deltas of the positives (Pang et al., "Libra R-CNN", CVPR 2019, section 3.3), added up.

    The gradient of an error x is alpha * ln(b * abs(x) / beta + 1) below beta and gamma beyond, with b such that the
    two meet at beta: the paper's loss L_b stretched to beta * L_b(x / beta).

    Args:
        box_deltas: as of `smooth_l1_loss`, like all arguments but these.
        loc_match: which anchors are positive.
        anchors: the anchors.
        gt_boxes: the objects.
        gt_offsets: where the packed objects of each image begin.
        box_coder: encodes the objects' boxes as deltas.
        alpha: how much small errors count, above 0.
        gamma: the gradient of large errors, above 0.
        beta: where small errors end, above 0.
        as_released: the form in the code released with Mutual Guidance (utils/loss/balanced_l1_loss.py of
            github.com/zhanghengdev/MutualGuide, commit a24bbe4). It is the same at beta = 1. Below, it is steeper for
            small errors: its gradient jumps from 0 to alpha / beta - alpha at 0, and down to gamma at beta.
        weights: of the positives.
        normalizer: what the sum is divided by.
        gt_box_format: of gt_boxes.
        backend: None for the best one.

    Returns:
        () float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `smooth_l1_loss`.
    """
    objects = (loc_match, anchors, gt_boxes, gt_offsets, gt_box_format)
    numbers = (
        "released_balanced_l1" if check_bool("as_released", as_released) else "balanced_l1",
        _check_positive("alpha", alpha),
        _check_positive("gamma", gamma),
        _check_positive("beta", beta),
    )
    return _box_loss("box_deltas", box_deltas, *objects, box_coder, numbers, weights, normalizer, backend)


def giou_loss(
    loc_match: Tensor,
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_offsets: Tensor | None = None,
    *,
    pred_boxes: Levels | None = None,
    box_deltas: Levels | None = None,
    box_coder: BoxCoder | None = None,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    gt_box_format: str = "xyxy",
    backend: str | None = None,
) -> Tensor:
    """1 - GIoU of the positives (Rezatofighi et al., CVPR 2019), as torchvision's generalized_box_iou_loss, added up.

    Args:
        loc_match: as of `smooth_l1_loss`, like anchors, gt_boxes, gt_offsets, weights, normalizer and backend.
        anchors: (A, 4) floating.
        gt_boxes: the objects.
        gt_offsets: where the packed objects of each image begin.
        pred_boxes: (B, A, 4) floating, the predicted boxes, in the anchors' unit.
        box_deltas: (B, A, 4) floating, in place of pred_boxes.
        box_coder: decodes box_deltas.
        weights: of the positives.
        normalizer: what the sum over the positives is divided by.
        gt_box_format: of gt_boxes.
        backend: None for the best one.

    Returns:
        () float32. The gradient of the predictions comes in their dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `smooth_l1_loss`.
    """
    objects = (loc_match, anchors, gt_boxes, gt_offsets, gt_box_format)
    name, predictions = _boxes_or_deltas(pred_boxes, box_deltas, box_coder)
    return _box_loss(name, predictions, *objects, box_coder, ("giou", 1.0, 1.0, 1.0), weights, normalizer, backend)


def ciou_loss(
    loc_match: Tensor,
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_offsets: Tensor | None = None,
    *,
    pred_boxes: Levels | None = None,
    box_deltas: Levels | None = None,
    box_coder: BoxCoder | None = None,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    gt_box_format: str = "xyxy",
    backend: str | None = None,
) -> Tensor:
    """1 - CIoU of the positives (Zheng et al., AAAI 2020), as torchvision's complete_box_iou_loss, added up.

    Arguments, result and errors are those of `giou_loss`.
    """
    objects = (loc_match, anchors, gt_boxes, gt_offsets, gt_box_format)
    name, predictions = _boxes_or_deltas(pred_boxes, box_deltas, box_coder)
    return _box_loss(name, predictions, *objects, box_coder, ("ciou", 1.0, 1.0, 1.0), weights, normalizer, backend)


def distribution_focal_loss(
    distance_logits: Levels,
    loc_match: Tensor,
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_offsets: Tensor | None = None,
    *,
    strides: Tensor | float,
    margin: float = 0.01,
    weights: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    gt_box_format: str = "xyxy",
    backend: str | None = None,
) -> Tensor:
    """Distribution focal loss of the positives (Li et al., "Generalized Focal Loss", NeurIPS 2020, eq. 6), added up.

    The distances from an anchor's center to the left, top, right and bottom side of its object, in strides, are learned
    as distributions over the whole numbers 0 to R - 1. Each loss is the cross-entropy of the two numbers around the
    distance, weighted by how near each is.

    Args:
        distance_logits: (B, A, 4 * R) floating, R >= 2: the R logits of the left side, then those of the other sides.
        loc_match: as of `smooth_l1_loss`, like anchors, gt_boxes, gt_offsets, weights, normalizer and backend.
        anchors: (A, 4) floating; only their centers count.
        gt_boxes: the objects.
        gt_offsets: where the packed objects of each image begin.
        strides: (A,) floating, or a number: the length of one, in the anchors' unit.
        margin: distances are clamped to [0, R - 1 - margin]; in [0, 1]. Ultralytics has 0.01, mmdetection 0.1.
        weights: (B, A) of the positives.
        normalizer: what the sum over positives and sides is divided by.
        gt_box_format: of gt_boxes.
        backend: None for the best one.

    Returns:
        () float32. The gradient of distance_logits comes in their dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as `smooth_l1_loss`.
    """
    logits = join_levels("distance_logits", distance_logits)
    width = logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() else 0
    if width < 8 or width % 4:
        raise ValueError(f"distance_logits: expected shape (B, A, 4 * R) with R >= 2, got {describe(logits)}")
    margin = _check_factor("margin", margin, most=1.0)
    positives = _positives(
        "distance_logits", logits, width, loc_match, anchors, gt_boxes, gt_offsets, gt_box_format, weights
    )
    num_anchors, device = positives[1].shape[0], positives[1].device
    if isinstance(strides, Tensor):
        strides = check_tensor("strides", strides, "floating point", (num_anchors,), device).detach()
    else:
        length = torch.full((), _check_positive("strides", strides), dtype=torch.float32, device=device)
        strides = length.expand(num_anchors)
    compute = _computation("distribution_loss", distribution_loss, backend, device)
    return _normalize(compute(*positives, strides, margin), normalizer)


def _boxes_or_deltas(pred_boxes: Any, box_deltas: Any, box_coder: object) -> tuple[str, Any]:
    """The name and the value of the one that is given."""
    if (pred_boxes is None) == (box_deltas is None):
        raise ValueError(
            "pred_boxes: expected either pred_boxes or box_deltas, got " + ("none", "both")[box_deltas is not None]
        )
    if (box_deltas is None) != (box_coder is None):
        raise ValueError("box_coder: expected one with box_deltas, to decode them, and none with pred_boxes")
    return ("pred_boxes", pred_boxes) if box_deltas is None else ("box_deltas", box_deltas)


def _check_positive(name: str, value: object) -> float:
    return check_number(name, value, 0.0, MAX_FLOAT, "a finite number above 0")


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
    compute = _computation("class_loss", class_loss, backend, device)
    return _normalize(compute(cls_logits, class_targets, soft_targets, *numbers), normalizer)


def _computation(
    name: str, definition: Callable[..., Tensor], backend: str | None, device: torch.device
) -> Callable[..., Tensor]:
    """The operator of the backend that takes a call, or the definition."""
    chosen = choose_backend(backend, device.type, device.index, name)
    if chosen == "eager":
        return definition
    if chosen == "triton":
        import mg_ops.triton.losses  # noqa: F401  # registers the operators

        name = f"{name}_triton"
    operator: Callable[..., Tensor] = getattr(torch.ops.mg_ops, name).default
    return operator


def _normalize(total: Tensor, normalizer: Tensor | float | None) -> Tensor:
    """The total over the normalizer."""
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1 or normalizer.device != total.device:
            raise ValueError(f"normalizer: expected one number on {total.device}, got {describe(normalizer)}")
        return total / normalizer.detach().reshape(())
    return total if normalizer is None else total / _check_positive("normalizer", normalizer)


def _box_loss(
    name: str,
    predictions: Any,
    loc_match: Tensor,
    anchors: Any,
    gt_boxes: Any,
    gt_offsets: Tensor | None,
    gt_box_format: str,
    box_coder: BoxCoder | None,
    numbers: tuple[str, float, float, float],
    weights: Tensor | None,
    normalizer: Tensor | float | None,
    backend: str | None,
) -> Tensor:
    """The sum over the normalizer; `numbers` are the last arguments of `box_loss`, the loss by its name."""
    check_box_coder(box_coder)
    positives = _positives(name, predictions, 4, loc_match, anchors, gt_boxes, gt_offsets, gt_box_format, weights)
    total = _computation("box_loss", box_loss, backend, positives[0].device)(
        *positives,
        None if box_coder is None else [*box_coder.weights, box_coder.clip],
        BOX_LOSSES.index(numbers[0]),
        *numbers[1:],
    )
    return _normalize(total, normalizer)


def _positives(
    name: str,
    predictions: Any,
    width: int,
    loc_match: Tensor,
    anchors: Any,
    gt_boxes: Any,
    gt_offsets: Tensor | None,
    gt_box_format: str,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The first arguments of the operators, checked: predictions, anchors, match, objects and weights."""
    anchors = check_tensor("anchors", join_levels("anchors", anchors), "floating point", ("A", 4), None)
    device, num_anchors = anchors.device, anchors.shape[0]
    predictions = check_tensor(
        name, join_levels(name, predictions), "floating point", ("B", num_anchors, width), device
    )
    batch_size = predictions.shape[0]
    check_tensor("loc_match", loc_match, "int64", (batch_size, num_anchors), device)
    if weights is not None:
        weights = check_tensor("weights", weights, "floating point", (batch_size, num_anchors), device).detach()
    # The match says which objects count: padding need not be told.
    is_padded = isinstance(gt_boxes, Tensor) and gt_boxes.dim() == 3
    objects = pack_objects(
        gt_boxes,
        None,
        gt_offsets,
        gt_mask=torch.ones(gt_boxes.shape[:2], dtype=torch.bool, device=gt_boxes.device) if is_padded else None,
        gt_box_format=gt_box_format,
        batch_size=batch_size,
        device=device,
        labels_reader=None,
    )
    return predictions, anchors.detach(), loc_match, objects.gt_boxes.detach(), objects.gt_offsets, weights


def _fake_loss(predictions: Tensor, *rest: Any) -> Tensor:
    return predictions.new_empty((), dtype=torch.float32)


def _fake_gradient(grad_output: Tensor, predictions: Tensor, *rest: Any) -> Tensor:
    return predictions.new_empty(predictions.shape)


def register_autograd(name: str) -> None:
    """A loss operator gets NAME_backward as its derivative with respect to its first argument."""

    def keep_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [value for value in inputs if not isinstance(value, Tensor)]

    def differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        arguments = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
        gradient = getattr(torch.ops.mg_ops, f"{name}_backward")(grad_output, *arguments)
        return (gradient, *[None] * (len(arguments) - 1))

    torch.library.register_autograd(f"mg_ops::{name}", differentiate, setup_context=keep_arguments)


if not library.load_error:
    for _name in ("class_loss", "box_loss", "distribution_loss"):
        torch.library.register_fake(f"mg_ops::{_name}")(_fake_loss)
        torch.library.register_fake(f"mg_ops::{_name}_backward")(_fake_gradient)
        register_autograd(_name)
