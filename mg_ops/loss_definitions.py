"""The definition of the losses in plain PyTorch: what the operators compute, differentiated by autograd."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mg_ops.reference import BACKGROUND, autocast_type

BOX_LOSSES = ("smooth_l1", "balanced_l1", "released_balanced_l1", "giou", "ciou")
"""As csrc/box_loss.h numbers them."""


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


def box_loss(
    predictions: Tensor,
    anchors: Tensor,
    match: Tensor,
    gt_boxes: Tensor,
    gt_offsets: Tensor,
    weights: Tensor | None,
    box_coder: list[float] | None,
    loss: int,
    alpha: float,
    gamma: float,
    beta: float,
) -> Tensor:
    """The definition of the box losses, in plain PyTorch: what csrc/box_loss.h says, and autograd differentiates it.

    Computes in float32, and in float64 where the predictions are.
    """
    with torch.autocast(autocast_type(predictions.device), enabled=False):
        dtype = torch.float64 if predictions.dtype == torch.float64 else torch.float32
        predictions, anchors, gt_boxes = predictions.to(dtype), anchors.to(dtype), gt_boxes.to(dtype)
        if gt_boxes.shape[0] == 0:
            return predictions[:0].sum()
        positive, owner = _positives(match, gt_boxes, gt_offsets)
        # An anchor that is no positive stands for itself, so that no value of its own reaches a gradient.
        unit = anchors.new_zeros(4)
        unit[2:] = 1.0
        at = positive.unsqueeze(-1)
        anchor, target = torch.where(at, anchors, unit), torch.where(at, owner, unit)
        predicted = torch.where(at, predictions, unit if box_coder is None else 0.0)
        if BOX_LOSSES[loss] in ("giou", "ciou"):
            if box_coder is not None:
                predicted = _decode(anchor, predicted, box_coder)
            losses = _iou_loss(BOX_LOSSES[loss] == "ciou", predicted, target)
        else:
            if box_coder is not None:
                target = _encode(anchor, target, box_coder)
            losses = _l1_loss(BOX_LOSSES[loss], (predicted - target).abs(), alpha, gamma, beta).sum(-1)
        return _sum_of_positives(losses, positive, weights)


def distribution_loss(
    logits: Tensor,
    anchors: Tensor,
    match: Tensor,
    gt_boxes: Tensor,
    gt_offsets: Tensor,
    weights: Tensor | None,
    strides: Tensor,
    margin: float,
) -> Tensor:
    """The definition of the distribution focal loss, as `box_loss`: of logits (B, A, 4 * bins)."""
    with torch.autocast(autocast_type(logits.device), enabled=False):
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        logits, anchors, gt_boxes = logits.to(dtype), anchors.to(dtype), gt_boxes.to(dtype)
        if gt_boxes.shape[0] == 0:
            return logits[:0].sum()
        positive, owner = _positives(match, gt_boxes, gt_offsets)
        at = positive.unsqueeze(-1)
        center = 0.5 * (anchors[:, :2] + anchors[:, 2:])
        sides = torch.cat([center - owner[..., :2], owner[..., 2:] - center], -1) / strides.to(dtype).unsqueeze(-1)
        num_bins = logits.shape[-1] // 4
        distance = torch.where(at, sides, 0.0).clamp(0, num_bins - 1 - margin)  # (B, A, 4), in bins
        low = distance.detach().long().clamp(max=num_bins - 2)
        upper = distance - low
        log_p = torch.where(at, logits, 0.0).unflatten(-1, (4, num_bins)).log_softmax(-1)
        at_low, at_upper = (log_p.gather(-1, bin.unsqueeze(-1)).squeeze(-1) for bin in (low, low + 1))
        return _sum_of_positives(-((1 - upper) * at_low + upper * at_upper).sum(-1), positive, weights)


def _positives(match: Tensor, gt_boxes: Tensor, gt_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Which anchors are positives (B, A), and the box of each one's object (B, A, 4); any box where it is none."""
    num_gt = gt_boxes.shape[0]
    index = gt_offsets[:-1].long().clamp(0, num_gt).unsqueeze(1) + match
    return (match >= 0) & (index < num_gt), gt_boxes[index.clamp(0, num_gt - 1)]


def _sum_of_positives(losses: Tensor, positive: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted, of losses (B, A)."""
    if weights is not None:
        losses = losses * torch.where(positive, weights, 0.0).to(losses.dtype)
    return torch.where(positive, losses, 0.0).sum()


def _l1_loss(name: str, x: Tensor, alpha: float, gamma: float, beta: float) -> Tensor:
    """Of the sizes of errors."""
    if name == "smooth_l1":
        return torch.where(x < beta, 0.5 * x * x / beta, x - 0.5 * beta)
    b = math.expm1(gamma / alpha)
    if name == "balanced_l1":
        inner = alpha * (beta / b) * (b * x / beta + 1) * torch.log1p(b * x / beta) - alpha * x
        return torch.where(x < beta, inner, gamma * x + (gamma / b - alpha) * beta)
    inner = alpha / b * (b * x + 1) * torch.log1p(b * x / beta) - alpha * x
    return torch.where(x < beta, inner, gamma * x + gamma / b - alpha * beta)


def _encode(anchors: Tensor, boxes: Tensor, box_coder: list[float]) -> Tensor:
    """The deltas (..., 4) that turn anchors into boxes."""
    anchor_size, size = anchors[..., 2:] - anchors[..., :2], boxes[..., 2:] - boxes[..., :2]
    shift = (boxes[..., :2] + 0.5 * size) - (anchors[..., :2] + 0.5 * anchor_size)
    deltas = torch.cat([shift / anchor_size, torch.log(size / anchor_size)], -1)
    return torch.stack([column * weight for column, weight in zip(deltas.unbind(-1), box_coder[:4], strict=True)], -1)


def _decode(anchors: Tensor, deltas: Tensor, box_coder: list[float]) -> Tensor:
    """The boxes (..., 4) that deltas make of anchors."""
    size = anchors[..., 2:] - anchors[..., :2]
    columns = [column / weight for column, weight in zip(deltas.unbind(-1), box_coder[:4], strict=True)]
    center = torch.stack(columns[:2], -1) * size + (anchors[..., :2] + 0.5 * size)
    half = 0.5 * size * torch.exp(torch.stack(columns[2:], -1).clamp(max=box_coder[4]))
    return torch.cat([center - half, center + half], -1)


def _iou_loss(complete: bool, a: Tensor, b: Tensor) -> Tensor:
    """1 - GIoU or 1 - CIoU of boxes (..., 4)."""
    epsilon = 1e-7
    size, wanted = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    intersection = torch.where((overlap > 0).all(-1), overlap.prod(-1), 0.0)
    union = size.prod(-1) + wanted.prod(-1) - intersection
    iou = intersection / (union + epsilon)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    if not complete:
        area = around.prod(-1)
        return 1 - iou + (area - union) / (area + epsilon)
    shift = 0.5 * (a[..., :2] + a[..., 2:]) - 0.5 * (b[..., :2] + b[..., 2:])
    distance = (shift * shift).sum(-1) / ((around * around).sum(-1) + epsilon)
    turn = torch.atan(wanted[..., 0] / wanted[..., 1]) - torch.atan(size[..., 0] / size[..., 1])
    shape = 4 / math.pi**2 * turn * turn
    trade_off = (shape / (1 - iou + shape + epsilon)).detach()
    return 1 - iou + distance + trade_off * shape
