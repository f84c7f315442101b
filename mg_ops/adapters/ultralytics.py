"""Mutual guidance in ultralytics' detectors (YOLOv8 to YOLO26), in place of their `TaskAlignedAssigner`.

    criterion = v8DetectionLoss(model)
    mg_ops.adapters.ultralytics.use_mutual_guidance(criterion)

Imports nothing of ultralytics. What its losses are made for differs from the paper in three ways:

- They have anchor points, not anchor boxes: each point gets a square of `anchor_size` times its stride.
- They have one foreground mask. `MutualAssigner` answers for the two tasks apart all the same: `target_labels` and
  `target_scores` say what to classify, `fg_mask`, `target_bboxes` and `target_gt_idx` what to localise.
- Their box loss weighs each box by its class target, which a positive for localisation alone does not have.
  `use_mutual_guidance` gives the box loss the weights it needs: 1 for each positive of localisation, averaged over
  these.

They have no ignored anchors either: an ignored anchor is trained as background; `MutualAssigner.match` keeps which are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mg_ops.matching import MutualMatch, mutual_match


class MutualAssigner(nn.Module):
    """Assigns by mutual guidance with the call and the results of ultralytics' `TaskAlignedAssigner`.

    Args:
        num_classes: C.
        stride: the strides of the feature levels in pixels, ascending, each an even multiple of the one before (8, 16,
            32), which is how the stride of an anchor point is told from its position.
        anchor_size: side of a point's anchor box, in strides.
        **options: strategy, sigma, iou_positive, iou_ignored and backend of `mg_ops.mutual_match`.

    Attributes:
        match: the `MutualMatch` of the last batch, None before the first; its objects are all rows of gt_bboxes,
            padding too.
        localization_scores: (B, A, C), the one-hot classes of the last batch's positives for localisation.

    Raises:
        ValueError: strides that are not even multiples of each other, or a size that is not positive.
    """

    def __init__(
        self,
        num_classes: int = 80,
        stride: Sequence[float] = (8, 16, 32),
        anchor_size: float = 4.0,
        **options: Any,
    ) -> None:
        super().__init__()
        strides = [float(step) for step in stride]
        if not strides or strides[0] <= 0 or any(b % (2 * a) != 0 or b <= a for a, b in itertools.pairwise(strides)):
            raise ValueError(
                f"stride: expected positive strides, each an even multiple of the one before, got {strides}"
            )
        if not anchor_size > 0:
            raise ValueError(f"anchor_size: expected a positive number of strides, got {anchor_size}")
        self.num_classes = num_classes
        self.stride = strides
        self.anchor_size = anchor_size
        self.options = options
        self.match: MutualMatch | None = None
        self.localization_scores: Tensor | None = None

    def anchors(self, anc_points: Tensor) -> Tensor:
        """The anchor boxes of anchor points.

        A level of stride s has points at odd multiples of s / 2, where no level of another stride has any.

        Args:
            anc_points: (A, 2) floating, (x, y) in pixels, the centres of the cells of all levels.

        Returns:
            (A, 4) float32, (x1, y1, x2, y2) in pixels; of no size where a point belongs to no level.
        """
        points = anc_points.float()
        side = torch.zeros_like(points[:, :1])
        for step in self.stride:
            cell = points[:, :1] / step - 0.5
            side = torch.where(cell == cell.round(), self.anchor_size * step, side)
        return torch.cat([points - side / 2, points + side / 2], dim=1)

    @torch.no_grad()
    def forward(
        self,
        pd_scores: Tensor,
        pd_bboxes: Tensor,
        anc_points: Tensor,
        gt_labels: Tensor,
        gt_bboxes: Tensor,
        mask_gt: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Matches a batch: B images of at most M objects, A anchor points.

        Args:
            pd_scores: (B, A, C) floating, probabilities.
            pd_bboxes: (B, A, 4) floating, predicted boxes (x1, y1, x2, y2) in pixels.
            anc_points: (A, 2) floating, in pixels.
            gt_labels: (B, M, 1) numbers, classes.
            gt_bboxes: (B, M, 4) floating, (x1, y1, x2, y2) in pixels.
            mask_gt: (B, M, 1) numbers or bool, which objects are not padding.

        Returns:
            target_labels: (B, A) int64, the class of a positive for classification; C elsewhere.
            target_bboxes: (B, A, 4) like gt_bboxes, the box of a positive for localisation; 0 elsewhere.
            target_scores: (B, A, C) like pd_scores, the one-hot target of classification.
            fg_mask: (B, A) bool, the positives for localisation.
            target_gt_idx: (B, A) int64, the object of a positive for localisation; 0 elsewhere.

        Raises:
            TypeError, ValueError: as `mg_ops.mutual_match`.
        """
        batch_size, max_objects = gt_bboxes.shape[:2]
        valid = mask_gt.reshape(batch_size, max_objects).bool()
        # Padding is a box of no size, which takes no part.
        boxes = torch.where(valid.unsqueeze(-1), gt_bboxes, 0.0)
        labels = gt_labels.reshape(batch_size, max_objects).long()
        self.match = mutual_match(
            self.anchors(anc_points),
            pd_bboxes,
            torch.logit(pd_scores.float()),
            boxes.flatten(0, 1),
            labels.flatten(),
            torch.arange(batch_size + 1, device=boxes.device) * max_objects,
            **self.options,
        )
        cls_match, loc_match = self.match.cls_match, self.match.loc_match
        # One object more than there are, for what has none: class C, an empty box.
        labels = torch.cat([labels, labels.new_full((batch_size, 1), self.num_classes)], dim=1)
        boxes = torch.cat([boxes, boxes.new_zeros(batch_size, 1, 4)], dim=1)
        target_labels = labels.gather(1, torch.where(cls_match >= 0, cls_match, max_objects))
        fg_mask = loc_match >= 0
        objects = torch.where(fg_mask, loc_match, max_objects)
        target_bboxes = boxes.gather(1, objects.unsqueeze(-1).expand(-1, -1, 4))
        self.localization_scores = self._one_hot(labels.gather(1, objects), pd_scores)
        return target_labels, target_bboxes, self._one_hot(target_labels, pd_scores), fg_mask, loc_match.clamp(min=0)

    def _one_hot(self, labels: Tensor, like: Tensor) -> Tensor:
        """(B, A) -> (B, A, C) of like's dtype; all 0 for a label outside [0, C)."""
        known = (labels >= 0) & (labels < self.num_classes)
        scores = torch.zeros_like(like)
        if self.num_classes == 0:
            return scores
        return scores.scatter_(2, torch.where(known, labels, 0).unsqueeze(-1), known.unsqueeze(-1).to(like.dtype))


class _GuidedBoxLoss(nn.Module):
    """ultralytics' box loss, weighing its boxes by the match of localisation instead of the class targets."""

    def __init__(self, bbox_loss: nn.Module, assigner: MutualAssigner) -> None:
        super().__init__()
        self.bbox_loss = bbox_loss
        self.assigner = assigner

    def forward(
        self,
        pred_dist: Tensor,
        pred_bboxes: Tensor,
        anchor_points: Tensor,
        target_bboxes: Tensor,
        target_scores: Tensor,
        target_scores_sum: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        weights = self.assigner.localization_scores
        assert weights is not None, "the criterion calls its assigner before its box loss"
        total = weights.sum().clamp(min=1)
        losses: tuple[Tensor, Tensor] = self.bbox_loss(
            pred_dist, pred_bboxes, anchor_points, target_bboxes, weights, total, *rest
        )
        return losses


def use_mutual_guidance(criterion: Any, *, anchor_size: float = 4.0, **options: Any) -> Any:
    """Makes an ultralytics detection loss assign by mutual guidance.

    Args:
        criterion: a `v8DetectionLoss` (YOLOv8 to YOLO11; of an end-to-end detector its `one2many`), changed in place.
        anchor_size: side of a point's anchor box, in strides.
        **options: strategy, sigma, iou_positive, iou_ignored and backend of `mg_ops.mutual_match`.

    Returns:
        The criterion itself.

    Raises:
        TypeError: criterion is no detection loss with a `TaskAlignedAssigner`; those of masks, poses and rotated boxes
            are not supported.
    """
    if type(criterion).__name__ != "v8DetectionLoss":
        raise TypeError(f"criterion: expected ultralytics' v8DetectionLoss, got {type(criterion).__name__}")
    assigner = MutualAssigner(criterion.nc, [float(step) for step in criterion.stride], anchor_size, **options)
    bbox_loss = criterion.bbox_loss
    criterion.assigner = assigner
    criterion.bbox_loss = _GuidedBoxLoss(
        bbox_loss.bbox_loss if isinstance(bbox_loss, _GuidedBoxLoss) else bbox_loss, assigner
    )
    return criterion
