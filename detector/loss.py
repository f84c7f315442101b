"""The loss of a batch: focal loss and Balanced L1 loss, each over its own match, in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mg_ops import BoxCoder, MutualMatch, encode_class_targets
from mg_ops.losses import balanced_l1_loss, focal_loss

BOX_LOSSES: dict[str, Callable[..., Tensor]] = {
    "balanced_l1": balanced_l1_loss,
    "released_balanced_l1": partial(balanced_l1_loss, as_released=True),
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
    class_targets = encode_class_targets(match, gt_boxes, gt_labels, gt_offsets, num_classes=cls_logits.shape[-1])
    num_positives = torch.stack([(class_targets >= 0).sum(), match.loc_positive.sum()]).float()
    normalizers = num_positives.clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(normalizers)
        normalizers /= torch.distributed.get_world_size()
    # No object in the whole batch: the background alone makes the loss.
    normalizers = torch.where(normalizers > 0, normalizers, 1.0)
    return DetectionLoss(
        focal_loss(cls_logits, class_targets, alpha=focal_alpha, gamma=focal_gamma, normalizer=normalizers[0]),
        BOX_LOSSES[box_loss](
            box_deltas,
            match.loc_match,
            anchors,
            gt_boxes,
            gt_offsets,
            box_coder=box_coder,
            normalizer=4 * normalizers[1],
        ),
        *num_positives,
    )
