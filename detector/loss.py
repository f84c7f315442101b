"""Focal loss and Balanced L1 loss on a match, without one-hot targets. All in float32, whatever autocast says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from mg_ops import IGNORED, BoxCoder, MutualMatch, encode_targets

NEVER = -100.0
"""A logit whose focal loss as a negative, and its gradient, are 0 in float32."""


def focal_loss(cls_logits: Tensor, class_targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al., 2017) summed over all but the ignored anchors.

    Every (anchor, class) pair is a negative but those a positive anchor has with its own class. Writing NEVER over
    these leaves a sum of negatives alone, whose target is a single 0 expanded; their loss as positives is one number an
    anchor.

    Args:
        cls_logits: (B, A, C) floating.
        class_targets: (B, A) int64, a label in [0, C) or `mg_ops.BACKGROUND` or `mg_ops.IGNORED`.
        alpha: weight of positives; negatives weigh 1 - alpha.
        gamma: exponent of the modulating factor.

    Returns:
        () float32.
    """
    with torch.autocast(cls_logits.device.type, enabled=False):
        cls_logits = cls_logits.float()
        positive = class_targets >= 0  # (B, A)
        label = class_targets.clamp(min=0).unsqueeze(-1)  # (B, A, 1)
        at_label = cls_logits.gather(-1, label)  # (B, A, 1)
        negatives = cls_logits.scatter(-1, label, torch.where(positive.unsqueeze(-1), NEVER, at_label))  # (B, A, C)
        zero, one = cls_logits.new_zeros(()), cls_logits.new_ones(())
        as_negatives = sigmoid_focal_loss(negatives, zero.expand_as(negatives), alpha, gamma).sum(-1)  # (B, A)
        as_positive = sigmoid_focal_loss(at_label, one.expand_as(at_label), alpha, gamma).squeeze(-1)  # (B, A)
        loss = as_negatives + torch.where(positive, as_positive, 0.0)
        return torch.where(class_targets == IGNORED, 0.0, loss).sum()


def balanced_l1_loss(error: Tensor, alpha: float = 0.5, gamma: float = 1.5, beta: float = 0.11) -> Tensor:
    """Balanced L1 loss (Pang et al., "Libra R-CNN", CVPR 2019, section 3.3), elementwise.

    Its gradient is alpha * ln(b * |x| / beta + 1) for |x| < beta and gamma beyond, with b such that the two meet at
    beta: the paper's loss L_b stretched to beta * L_b(x / beta).

    Args:
        error: any shape, floating; predicted minus target.

    Returns:
        The shape of error, float32.
    """
    b = math.expm1(gamma / alpha)
    x = error.float().abs()
    inner = alpha * (beta / b) * (b * x / beta + 1) * torch.log1p(b * x / beta) - alpha * x
    outer = gamma * x + (gamma / b - alpha) * beta
    return torch.where(x < beta, inner, outer)


def released_balanced_l1_loss(error: Tensor, alpha: float = 0.5, gamma: float = 1.5, beta: float = 0.11) -> Tensor:
    """Balanced L1 loss as in the code released with Mutual Guidance.

    It equals `balanced_l1_loss` at beta = 1. At a smaller beta it is steeper below it: the size of its gradient jumps
    from 0 to alpha / beta - alpha at an error of 0, and down to gamma at beta. Source: utils/loss/balanced_l1_loss.py
    of github.com/zhanghengdev/MutualGuide, commit a24bbe4.

    Args:
        error: any shape, floating; predicted minus target.

    Returns:
        The shape of error, float32.
    """
    b = math.expm1(gamma / alpha)
    x = error.float().abs()
    inner = alpha / b * (b * x + 1) * torch.log1p(b * x / beta) - alpha * x
    outer = gamma * x + gamma / b - alpha * beta
    return torch.where(x < beta, inner, outer)


BOX_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "balanced_l1": balanced_l1_loss,
    "released_balanced_l1": released_balanced_l1_loss,
}
"""By their names in detector.train."""


class DetectionLoss(NamedTuple):
    """The two parts of a batch's loss, and the positives that normalize them."""

    cls_loss: Tensor
    """() float32: focal loss over the number of classification positives."""
    box_loss: Tensor
    """() float32: the box loss, mean over localization positives and the 4 coordinates."""
    num_cls_positives: Tensor
    """() float32, in this process's images."""
    num_loc_positives: Tensor
    """() float32, in this process's images."""


def detection_loss(
    cls_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    match: MutualMatch,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    box_coder: BoxCoder,
    *,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
    box_loss: str = "balanced_l1",
) -> DetectionLoss:
    """The loss of a batch. With several processes the normalizers are means over them, so that
    DistributedDataParallel's mean of gradients is the gradient of the whole batch, however positives are spread.

    Args:
        cls_logits: (B, A, C) floating.
        box_deltas: (B, A, 4) floating.
        anchors: (A, 4) float32.
        match: what `mg_ops.mutual_match` returned for these predictions and objects.
        gt_boxes: (N, 4), the boxes of all images, packed.
        gt_labels: (N,), their labels.
        gt_offsets: (B + 1,), where the objects of each image begin and end.
        box_coder: encodes the boxes to regress to.
        focal_alpha: weight of positives in the focal loss.
        focal_gamma: exponent of the focal loss.
        box_loss: one of BOX_LOSSES.
    """
    targets = encode_targets(
        match, anchors, gt_boxes, gt_labels, gt_offsets, num_classes=cls_logits.shape[-1], box_coder=box_coder
    )
    loc_positive = match.loc_match >= 0  # (B, A)
    num_positives = torch.stack([(targets.class_targets >= 0).sum(), loc_positive.sum()]).float()
    normalizers = num_positives.clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(normalizers)
        normalizers /= torch.distributed.get_world_size()
    # No object in the whole batch: the background alone makes the loss.
    normalizers = torch.where(normalizers > 0, normalizers, 1.0)

    cls_loss = focal_loss(cls_logits, targets.class_targets, focal_alpha, focal_gamma) / normalizers[0]
    # Anchors without an object are set to no error before the loss, so that no value of theirs reaches a gradient.
    error = torch.where(loc_positive.unsqueeze(-1), box_deltas.float() - targets.box_targets, 0.0)  # (B, A, 4)
    localization_loss = BOX_LOSSES[box_loss](error).sum() / (4 * normalizers[1])
    return DetectionLoss(cls_loss, localization_loss, num_positives[0], num_positives[1])
