"""Assignment in ultralytics' detectors (YOLOv8 to YOLO26): their own rule fused, or mutual guidance in its place.

    model = YOLO("yolo11n.yaml")
    model.add_callback("on_pretrain_routine_end", mg_ops.adapters.ultralytics.fuse_trainer)  # the same labels
    model.add_callback("on_pretrain_routine_end", mg_ops.adapters.ultralytics.guide_trainer)  # mutual guidance
    model.train(data="your_data.yaml", epochs=100)

Needs ultralytics 8.4 or newer and imports nothing of it. What its losses are made for differs from the paper of mutual
guidance in three ways:

- They have anchor points, not anchor boxes: each point gets a square of `anchor_size` times its stride.
- They have one foreground mask. `MutualAssigner` answers for the two tasks apart all the same: `target_labels` and
  `target_scores` say what to classify, `fg_mask`, `target_bboxes` and `target_gt_idx` what to localize.
- Their box loss weighs each box by its class target, which a positive for localization alone does not have.
  `use_mutual_guidance` gives the box loss the weights it needs: 1 for each positive of localization, averaged over
  these; the soft target, or the weight, where the rule has one.

They have no ignored anchors either: an ignored anchor is trained as background; `MutualAssigner.match` keeps which are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mg_ops.boxes import anchors_from_points
from mg_ops.matching import AnyMatch, AnyMatcher, MutualMatcher
from mg_ops.rules.result import DynamicMutualMatch, Match
from mg_ops.rules.task_aligned_match import TaskAlignedMatcher


class FusedAssigner(nn.Module):
    """`mg_ops.task_aligned_match` with the call and the results of ultralytics' `TaskAlignedAssigner`.

    Args:
        num_classes: C.
        matcher: how to match.

    Attributes:
        match: the `Match` of the last batch, None before the first; its objects are all rows of gt_bboxes, padding too.
    """

    def __init__(self, num_classes: int, matcher: TaskAlignedMatcher) -> None:
        super().__init__()
        self.num_classes, self.matcher = num_classes, matcher
        self.match: Match | None = None

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
        """As `MutualAssigner.forward`, but that the positives of both tasks are the same.

        `target_scores` holds the soft targets. An anchor without an object has the label and the box of object 0, as
        there, and 0 in `target_scores`.
        """
        batch_size, max_objects = gt_bboxes.shape[:2]
        labels = gt_labels.reshape(batch_size, max_objects).long()
        points = anc_points.float()
        self.match = match = self.matcher(
            torch.cat([points, points], dim=1),  # the rule reads centers alone
            gt_bboxes,
            labels,
            gt_mask=mask_gt.reshape(batch_size, max_objects).bool(),
            cls_probabilities=pd_scores,
            pred_boxes=pd_bboxes,
        )
        assert match.soft_targets is not None  # the rule has them
        objects = match.cls_match.clamp(min=0)
        target_scores = torch.zeros_like(pd_scores)
        if max_objects == 0:
            return objects, gt_bboxes.new_zeros(*objects.shape, 4), target_scores, match.cls_positive, objects
        target_labels = labels.gather(1, objects)
        if self.num_classes > 0:
            known = target_labels.clamp(0, self.num_classes - 1).unsqueeze(-1)
            target_scores.scatter_(2, known, match.soft_targets.to(pd_scores.dtype).unsqueeze(-1))
        target_bboxes = gt_bboxes.gather(1, objects.unsqueeze(-1).expand(-1, -1, 4))
        return target_labels, target_bboxes, target_scores, match.cls_positive, objects


def use_fused_assigner(criterion: Any) -> Any:
    """Makes an ultralytics detection loss assign by `mg_ops.task_aligned_match`, with the options that it has.

    The labels and targets are those of its own `TaskAlignedAssigner`, but for ties and rounding
    (docs/definition/task_aligned_match.md). The memory does not grow with the number of objects.

    Args:
        criterion: a `v8DetectionLoss` (YOLOv8 to YOLO12), or the `E2ELoss` of an end-to-end detector (YOLOv10, YOLO26),
            both halves of which are fused. Changed in place.

    Returns:
        The criterion itself.

    Raises:
        TypeError: criterion is no detection loss of ultralytics 8.4 or newer with its own assigner.
    """
    if hasattr(criterion, "one2many"):
        use_fused_assigner(criterion.one2many)
        use_fused_assigner(criterion.one2one)
        return criterion
    assigner: Any = getattr(criterion, "assigner", None)
    if isinstance(assigner, FusedAssigner):
        return criterion
    if type(criterion).__name__ != "v8DetectionLoss" or type(assigner).__name__ != "TaskAlignedAssigner":
        raise TypeError(
            "criterion: expected the v8DetectionLoss or E2ELoss of ultralytics 8.4 or newer, with its own assigner, "
            f"got {type(criterion).__name__} with {type(assigner).__name__}"
        )
    topk2 = getattr(assigner, "topk2", assigner.topk)
    matcher = TaskAlignedMatcher(
        alpha=float(assigner.alpha),
        beta=float(assigner.beta),
        k=int(assigner.topk),
        k_after_conflict=None if topk2 == assigner.topk else int(topk2),
        minimum_side=float(getattr(assigner, "stride_val", 0.0)),
        epsilon=float(assigner.eps),
    )
    criterion.assigner = FusedAssigner(criterion.nc, matcher)
    return criterion


def fuse_trainer(trainer: Any) -> None:
    """Makes an ultralytics trainer assign by `mg_ops.task_aligned_match`; a callback for `on_pretrain_routine_end`.

    Args:
        trainer: as of `guide_trainer`.

    Raises:
        TypeError: as `use_fused_assigner`.

    Examples:
        >>> model.add_callback("on_pretrain_routine_end", mg_ops.adapters.ultralytics.fuse_trainer)
    """
    model = _model_of(trainer)
    model.criterion = use_fused_assigner(_criterion_of(model))


class MutualAssigner(nn.Module):
    """Assigns by mutual guidance, or another rule, with the call and the results of ultralytics' `TaskAlignedAssigner`.

    Args:
        num_classes: C.
        stride: the strides of the feature levels in pixels, in the order of the anchor points.
        anchor_size: side of a point's anchor box, in strides.
        matcher: how to match; `mg_ops.MutualMatcher()` by default.

    Attributes:
        loc_weights: (B, A) float32, the weight of each box in the box loss of the last batch, 0 where there is none.
        level_sizes: (height, width) of each level's feature map. Set it before each call: the anchor points do not
            tell, as bfloat16 cannot hold positions beyond 1024 pixels. `use_mutual_guidance` sets it.
        match: the match of the last batch, None before the first; its objects are all rows of gt_bboxes, padding too.

    Raises:
        ValueError: a stride or a size that is not positive.
    """

    def __init__(
        self,
        num_classes: int = 80,
        stride: Sequence[float] = (8, 16, 32),
        anchor_size: float = 4.0,
        matcher: AnyMatcher | None = None,
    ) -> None:
        super().__init__()
        strides = [float(step) for step in stride]
        if not strides or not all(step > 0 for step in strides):
            raise ValueError(f"stride: expected positive numbers of pixels, got {strides}")
        if not anchor_size > 0:
            raise ValueError(f"anchor_size: expected a positive number of strides, got {anchor_size}")
        self.num_classes = num_classes
        self.stride = strides
        self.anchor_size = anchor_size
        self.matcher = MutualMatcher() if matcher is None else matcher
        self.level_sizes: Sequence[tuple[int, int]] | None = None
        self.match: AnyMatch | None = None
        self.loc_weights: Tensor | None = None

    def anchors(self, device: torch.device | str = "cpu") -> list[Tensor]:
        """The anchor boxes of the levels in `level_sizes`: a square around the center of each cell.

        Args:
            device: where to put them.

        Returns:
            (A, 4) float32 for each level, (x1, y1, x2, y2) in pixels, row by row.

        Raises:
            ValueError: level_sizes is not set, or has not one size for each stride.
        """
        if self.level_sizes is None or len(self.level_sizes) != len(self.stride):
            raise ValueError(
                f"level_sizes: expected (height, width) for each of {len(self.stride)} levels, got {self.level_sizes}; "
                "set assigner.level_sizes before each call, or let use_mutual_guidance do it"
            )
        levels = []
        for (height, width), step in zip(self.level_sizes, self.stride, strict=True):
            y = torch.arange(0.5, height, device=device) * step
            x = torch.arange(0.5, width, device=device) * step
            points = torch.cartesian_prod(y, x).flip(1)
            levels.append(anchors_from_points(points, points.new_full((len(points),), step), self.anchor_size))
        return levels

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
            anc_points: (A, 2) floating; only their number is read, `level_sizes` says where they are.
            gt_labels: (B, M, 1) numbers, classes.
            gt_bboxes: (B, M, 4) floating, (x1, y1, x2, y2) in pixels.
            mask_gt: (B, M, 1) numbers or bool, which objects are not padding.

        Returns:
            target_labels: (B, A) int64, the class of a positive for classification; C elsewhere.
            target_bboxes: (B, A, 4) like gt_bboxes, the box of a positive for localization; 0 elsewhere.
            target_scores: (B, A, C) like pd_scores, the target of classification: one-hot, or soft where the rule is.
            fg_mask: (B, A) bool, the positives for localization.
            target_gt_idx: (B, A) int64, the object of a positive for localization; 0 elsewhere.

        Raises:
            ValueError: level_sizes does not fit the anchor points, or as `mg_ops.mutual_match`.
            TypeError: as `mg_ops.mutual_match`.
        """
        batch_size, max_objects = gt_bboxes.shape[:2]
        anchors = self.anchors(pd_bboxes.device)
        num_anchors = sum(map(len, anchors))
        if num_anchors != len(anc_points):
            raise ValueError(
                f"level_sizes: expected levels of {len(anc_points)} cells in all, one for each anchor point, "
                f"got {self.level_sizes} with {num_anchors}"
            )
        valid = mask_gt.reshape(batch_size, max_objects).bool()
        labels = gt_labels.reshape(batch_size, max_objects).long()
        self.match = match = self.matcher(
            anchors, gt_bboxes, labels, gt_mask=valid, cls_probabilities=pd_scores, pred_boxes=pd_bboxes
        )
        loc_match = match.loc_match
        # One object more than there are, for what has none: class C, an empty box.
        labels = torch.cat([labels, labels.new_full((batch_size, 1), self.num_classes)], dim=1)
        boxes = torch.cat([gt_bboxes, gt_bboxes.new_zeros(batch_size, 1, 4)], dim=1)
        target_labels = labels.gather(1, torch.where(match.cls_positive, match.cls_match, max_objects))
        fg_mask = loc_match >= 0
        objects = torch.where(fg_mask, loc_match, max_objects)
        target_bboxes = boxes.gather(1, objects.unsqueeze(-1).expand(-1, -1, 4))
        target_scores = self._targets_at(target_labels, match.soft_targets, pd_scores)
        if isinstance(match, DynamicMutualMatch):
            self.loc_weights = match.loc_weights
        else:
            self.loc_weights = fg_mask.float() if match.soft_targets is None else match.soft_targets
        return target_labels, target_bboxes, target_scores, fg_mask, loc_match.clamp(min=0)

    def _targets_at(self, labels: Tensor, soft_targets: Tensor | None, like: Tensor) -> Tensor:
        """(B, A) -> (B, A, C) of like's dtype: 1, or the soft target, at the label; all 0 for one outside [0, C)."""
        known = (labels >= 0) & (labels < self.num_classes)
        scores = torch.zeros_like(like)
        if self.num_classes == 0:
            return scores
        values = known if soft_targets is None else known * soft_targets
        return scores.scatter_(2, torch.where(known, labels, 0).unsqueeze(-1), values.unsqueeze(-1).to(like.dtype))


class _GuidedBoxLoss(nn.Module):
    """ultralytics' box loss, weighing its boxes by the match of localization instead of the class targets."""

    def __init__(self, bbox_loss: nn.Module, assigner: MutualAssigner) -> None:
        super().__init__()
        self.bbox_loss, self.assigner = bbox_loss, assigner

    def forward(
        self,
        pred_dist: Tensor,
        pred_bboxes: Tensor,
        anchor_points: Tensor,
        target_bboxes: Tensor,
        target_scores: Tensor,
        target_scores_sum: Tensor,
        fg_mask: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        # It sums the class targets of each anchor: one column of weights says the same as C columns.
        assert self.assigner.loc_weights is not None  # the loss has just called the assigner
        weights = self.assigner.loc_weights.unsqueeze(-1).to(target_scores.dtype)
        total = self.assigner.loc_weights.sum().clamp(min=1)
        losses: tuple[Tensor, Tensor] = self.bbox_loss(
            pred_dist, pred_bboxes, anchor_points, target_bboxes, weights, total, fg_mask, *rest
        )
        return losses


def use_mutual_guidance(criterion: Any, matcher: AnyMatcher | None = None, *, anchor_size: float = 4.0) -> Any:
    """Makes an ultralytics detection loss assign by mutual guidance.

    Args:
        criterion: a `v8DetectionLoss` (YOLOv8 to YOLO12), or the `E2ELoss` of an end-to-end detector (YOLOv10, YOLO26),
            whose `one2many` half is guided. Its `one2one` half keeps its own assigner: it learns one box per object,
            which inference without NMS needs. Changed in place.
        matcher: how to match; `mg_ops.MutualMatcher()` by default, or the matcher of another rule.
        anchor_size: side of a point's anchor box, in strides. `mg_ops.SimOtaMatcher` and
            `mg_ops.DynamicSoftLabelMatcher` want 1.0, `mg_ops.AtssMatcher` its authors' 8.0.

    Returns:
        The criterion itself.

    Raises:
        TypeError: criterion is no detection loss of ultralytics 8.4 or newer; those of masks, poses and rotated boxes
            are not supported.
        ValueError: criterion is the `one2one` half of an end-to-end detector.
    """
    if hasattr(criterion, "one2many"):
        use_mutual_guidance(criterion.one2many, matcher, anchor_size=anchor_size)
        return criterion
    if type(criterion).__name__ != "v8DetectionLoss" or not hasattr(criterion, "get_assigned_targets_and_loss"):
        raise TypeError(
            "criterion: expected the v8DetectionLoss or E2ELoss of ultralytics 8.4 or newer, "
            f"got {type(criterion).__name__}"
        )
    if 1 in (getattr(criterion.assigner, "topk", None), getattr(criterion.assigner, "topk2", None)):
        raise ValueError(
            "criterion: expected a loss that learns many boxes per object, got the one2one half of an end-to-end "
            "detector; pass the whole criterion, or its one2many"
        )
    strides = [float(step) for step in criterion.stride]
    criterion.assigner = MutualAssigner(criterion.nc, strides, anchor_size, matcher)
    own = criterion.bbox_loss
    own = own.bbox_loss if isinstance(own, _GuidedBoxLoss) else own
    criterion.bbox_loss = _GuidedBoxLoss(own, criterion.assigner)
    # A partial, unlike a closure, belongs to the copy when the criterion is copied.
    criterion.get_assigned_targets_and_loss = functools.partial(_guided_loss, criterion)
    return criterion


def _guided_loss(criterion: Any, preds: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The criterion's own `get_assigned_targets_and_loss`, its assigner told what the loss does not pass."""
    criterion.assigner.level_sizes = [tuple(features.shape[-2:]) for features in preds["feats"]]
    return type(criterion).get_assigned_targets_and_loss(criterion, preds, *args, **kwargs)


def guide_trainer(trainer: Any, matcher: AnyMatcher | None = None, *, anchor_size: float = 4.0) -> None:
    """Makes an ultralytics trainer assign by mutual guidance; a callback for `on_pretrain_routine_end`.

    Checkpoints hold nothing of it: they load where mg_ops is not installed. Add the callback again to resume one. The
    losses that validation reports are those of ultralytics' own assigner.

    Args:
        trainer: a `DetectionTrainer` whose model is made, also inside DDP or torch.compile.
        matcher: how to match; `functools.partial` binds it, and the next.
        anchor_size: side of a point's anchor box, in strides.

    Raises:
        TypeError: as `use_mutual_guidance`.

    Examples:
        >>> callback = functools.partial(guide_trainer, matcher=mg_ops.MutualMatcher(sigma=3.0), anchor_size=5.0)
        >>> model.add_callback("on_pretrain_routine_end", callback)
    """
    model = _model_of(trainer)
    model.criterion = use_mutual_guidance(_criterion_of(model), matcher, anchor_size=anchor_size)


def _model_of(trainer: Any) -> Any:
    """The detector itself."""
    model = trainer.model
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model


def _criterion_of(model: Any) -> Any:
    """A resumed end-to-end detector has its criterion already, which knows the epoch."""
    criterion = getattr(model, "criterion", None)
    return model.init_criterion() if criterion is None else criterion
