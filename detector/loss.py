"""The loss of a batch: focal loss and Balanced L1 loss, each over its own match, in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mg_ops import BoxCoder, DynamicMutualMatch, Match, MutualMatch, encode_class_targets
from mg_ops.losses import balanced_l1_loss, focal_loss, quality_focal_loss, soft_bce_loss, varifocal_loss

SOFT_LOSSES: dict[str, Callable[..., Tensor]] = {
    "quality_focal": quality_focal_loss,
    "varifocal": varifocal_loss,
    "soft_bce": soft_bce_loss,
}
"""Those of classification that learn the soft targets of a match."""
CLS_LOSSES = ("focal", *SOFT_LOSSES)
"""By their names in detector.train, like those of boxes."""

BOX_LOSSES: dict[str, Callable[..., Tensor]] = {
    "balanced_l1": balanced_l1_loss,
    "released_balanced_l1": partial(balanced_l1_loss, as_released=True),
}


class DetectionLoss(NamedTuple):
    """The two parts of a batch's loss, and the positives that normalize them."""

    cls_loss: Tensor
    """() float32: the sum over the number of classification positives, or over the sum of their soft targets."""
    box_loss: Tensor
    """() float32: the box loss, mean over localization positives, weighted by soft targets, and the 4 coordinates."""
    num_cls_positives: Tensor
    """() float32, in this process's images."""
    num_loc_positives: Tensor
    """() float32, in this process's images."""


def detection_loss(
    cls_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    match: MutualMatch | Match | DynamicMutualMatch,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    box_coder: BoxCoder,
    *,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
    cls_loss: str = "focal",
    box_loss: str = "balanced_l1",
) -> DetectionLoss:
    """The loss of a batch. With several processes the normalizers are means over them, so that
    DistributedDataParallel's mean of gradients is the gradient of the whole batch, however positives are spread.

    Args:
        cls_logits: (B, A, C) floating.
        box_deltas: (B, A, 4) floating.
        anchors: (A, 4) float32.
        match: what `mg_ops.mutual_match` or another rule returned for these predictions and objects.
        gt_boxes: (N, 4), the boxes of all images, packed.
        gt_labels: (N,), their labels.
        gt_offsets: (B + 1,), where the objects of each image begin and end.
        box_coder: encodes the boxes to regress to.
        focal_alpha: weight of positives in the focal loss.
        focal_gamma: exponent of the focal loss.
        cls_loss: one of CLS_LOSSES; all but "focal" need a match with soft targets, which weigh the box loss too, as
            where these rules come from; of a match with weights of its own for boxes, these do.
        box_loss: one of BOX_LOSSES.
    """
    soft_targets = None if cls_loss == "focal" else match.soft_targets
    box_weights = soft_targets
    if isinstance(match, DynamicMutualMatch) and soft_targets is not None:
        box_weights = match.loc_weights
    class_targets = encode_class_targets(match, gt_boxes, gt_labels, gt_offsets, num_classes=cls_logits.shape[-1])
    num_positives = torch.stack([(class_targets >= 0).sum(), match.loc_positive.sum()]).float()
    normalizers = num_positives.clone()
    if soft_targets is not None and box_weights is not None:
        normalizers = torch.stack([soft_targets.sum(), box_weights.sum()])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(normalizers)
        normalizers /= torch.distributed.get_world_size()
    # No object in the whole batch, or hardly any target: the background alone makes the loss.
    normalizers = torch.where(normalizers > 0, normalizers, 1.0)
    if soft_targets is None:
        classification = partial(focal_loss, alpha=focal_alpha, gamma=focal_gamma)
    else:
        normalizers = normalizers.clamp(min=1.0)
        classification = partial(SOFT_LOSSES[cls_loss], soft_targets=soft_targets)
    return DetectionLoss(
        classification(cls_logits, class_targets, normalizer=normalizers[0]),
        BOX_LOSSES[box_loss](
            box_deltas,
            match.loc_match,
            anchors,
            gt_boxes,
            gt_offsets,
            box_coder=box_coder,
            weights=box_weights,
            normalizer=4 * normalizers[1],
        ),
        *num_positives,
    )
