"""Mutual guidance as an mmdetection assigner, with its `assign(pred_instances, gt_instances, gt_instances_ignore)`
contract.

    from mmdet.registry import TASK_UTILS
    TASK_UTILS.register_module(module=mg_ops.adapters.mmdet.MutualAssigner)
    # in the config: assigner=dict(type="MutualAssigner")

The head must hand over its predictions: `pred_instances` with `priors`, `bboxes` and `scores`. DDOD's head does, and
asks an assigner for each task, so that both matches are used; TOOD's, RTMDet's and YOLOX's do, and ask one for both. A
head that gives priors alone (RetinaNet's) cannot be guided. Importable without mmdetection.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mg_ops.adapters.labels import to_mmdet
from mg_ops.boxes import anchors_from_points
from mg_ops.matching import MutualMatcher

try:
    from mmdet.models.task_modules.assigners import AssignResult
except ImportError:

    class AssignResult:  # type: ignore[no-redef]
        """The attributes of mmdetection's `AssignResult`, which is used where it can be imported.

        Args:
            num_gts: number of objects.
            gt_inds: (A,) int64, 1-based objects, 0 background, -1 ignored.
            max_overlaps: (A,) float32, IoU of each regressed box with its object.
            labels: (A,) int64, the label of each anchor's object, -1 where there is none.
        """

        def __init__(self, num_gts: int, gt_inds: Tensor, max_overlaps: Tensor, labels: Tensor) -> None:
            self.num_gts = num_gts
            self.gt_inds = gt_inds
            self.max_overlaps = max_overlaps
            self.labels = labels
            self._extra_properties: dict[str, Any] = {}

        @property
        def num_preds(self) -> int:
            """Number of anchors."""
            return len(self.gt_inds)

        def set_extra_property(self, key: str, value: Any) -> None:
            """Attaches a value under a name."""
            self._extra_properties[key] = value

        def get_extra_property(self, key: str) -> Any:
            """The value attached under a name, or None."""
            return self._extra_properties.get(key)


class MutualAssigner:
    """Assigns the anchors of one image by mutual guidance.

    Args:
        scores_are_logits: whether `pred_instances.scores` are logits (DDOD, RTMDet) or probabilities (TOOD, YOLOX).
        task: which match `gt_inds`, `labels` and `max_overlaps` say, for heads that ask an assigner for each.
        anchor_size: for heads whose priors are points (cx, cy, stride, stride), as RTMDet's, YOLOX's and NanoDet's are:
            the side of a point's square anchor, in strides. None where priors are boxes.
        **options: those of `mg_ops.MutualMatcher`, by name, as a configuration file has them.

    Raises:
        ValueError: task is neither "classification" nor "localization", or anchor_size is not positive.
    """

    def __init__(
        self,
        scores_are_logits: bool = False,
        task: Literal["classification", "localization"] = "classification",
        anchor_size: float | None = None,
        **options: Any,
    ) -> None:
        if task not in ("classification", "localization"):
            raise ValueError(f"task: expected 'classification' or 'localization', got {task!r}")
        self.scores_name = "cls_logits" if scores_are_logits else "cls_probabilities"
        if anchor_size is not None and not anchor_size > 0:
            raise ValueError(f"anchor_size: expected a positive number of strides or None, got {anchor_size}")
        self.task = task
        self.anchor_size = anchor_size
        self.matcher = MutualMatcher(**options)

    def assign(
        self, pred_instances: Any, gt_instances: Any, gt_instances_ignore: Any = None, *args: Any, **kwargs: Any
    ) -> AssignResult:
        """Assigns the anchors of an image to its objects.

        Args:
            pred_instances: `priors` (A, 4), the anchors (x1, y1, x2, y2), or with `anchor_size` the points
                (cx, cy, stride, stride); `bboxes` (A, 4), the regressed boxes (x1, y1, x2, y2); `scores` (A, C).
            gt_instances: `bboxes` (G, 4) and `labels` (G,).
            gt_instances_ignore: `bboxes` (K, 4), crowd regions: background that they cover is ignored.
            *args: what else heads pass (alpha and beta of TOOD); not used.
            **kwargs: likewise (num_level_priors of DDOD).

        Returns:
            `AssignResult` for the task: `gt_inds` (A,) 1-based objects, 0 background, -1 ignored; `labels`, -1 where
            there is no object; `max_overlaps` and `assign_metrics` (A,), the IoU of the regressed box with its object,
            0 where there is none. So the class target of a positive is the IoU of its own box in TOOD's, RTMDet's and
            YOLOX's losses; it grows as the boxes do, up to 1. DDOD's loss reads neither. The match of localization, in
            the same convention, is `result.get_extra_property("loc_gt_inds")`, whatever the task.

        Raises:
            ValueError: pred_instances lacks priors, bboxes or scores, or has points where boxes are expected or boxes
                where points are, or as `mg_ops.mutual_match`.
            TypeError: as `mg_ops.mutual_match`.
        """
        missing = [name for name in ("priors", "bboxes", "scores") if not hasattr(pred_instances, name)]
        if missing:
            raise ValueError(
                f"pred_instances: expected priors, bboxes and scores, got no {', '.join(missing)}; "
                "mutual guidance needs a head that hands its predictions to its assigner"
            )
        anchors = self._anchors(_as_tensor(pred_instances.priors))
        pred_boxes = _as_tensor(pred_instances.bboxes)
        boxes, labels = _as_tensor(gt_instances.bboxes), gt_instances.labels
        num_gt = boxes.shape[0]
        crowd = None
        all_boxes, all_labels = boxes, labels
        if gt_instances_ignore is not None and len(gt_instances_ignore.bboxes) > 0:
            regions = _as_tensor(gt_instances_ignore.bboxes)
            all_boxes = torch.cat([boxes, regions])
            all_labels = torch.cat([labels, labels.new_zeros(len(regions))])
            crowd = [torch.arange(len(all_boxes), device=boxes.device) >= num_gt]
        predictions = {self.scores_name: pred_instances.scores.unsqueeze(0), "pred_boxes": pred_boxes.unsqueeze(0)}
        match = self.matcher(anchors, [all_boxes], [all_labels], gt_crowd=crowd, **predictions)
        cls_match, loc_match = match.cls_match[0], match.loc_match[0]
        # One object more than there are, for what has none: label -1, an empty box.
        task_match = cls_match if self.task == "classification" else loc_match
        objects = torch.where(task_match >= 0, task_match, num_gt)
        assigned = torch.cat([labels.long(), labels.new_full((1,), -1, dtype=torch.int64)])[objects]
        target = torch.cat([boxes.float(), boxes.new_zeros(1, 4, dtype=torch.float32)])[objects]
        overlaps = _overlaps(pred_boxes.detach().float(), target)
        result = AssignResult(num_gt, to_mmdet(task_match), overlaps, assigned)
        # TOOD scales an object's metrics to the largest of its overlaps: these metrics stay as they are.
        result.assign_metrics = overlaps.clone()
        result.set_extra_property("loc_gt_inds", to_mmdet(loc_match))
        return result

    def _anchors(self, priors: Tensor) -> Tensor:
        """The anchor boxes of priors; ValueError unless these are what `anchor_size` says."""
        if self.anchor_size is None:
            wrong = (priors[:, 2:] <= priors[:, :2]).any(1)
            wanted = "boxes (x1, y1, x2, y2) with x2 > x1 and y2 > y1"
            remedy = "for a head whose priors are points (RTMDet, YOLOX), pass anchor_size=4.0"
        else:
            wrong = (priors[:, 2] != priors[:, 3]) | (priors[:, 2] <= 0)
            wanted = "points (cx, cy, stride, stride)"
            remedy = "for a head whose priors are boxes, leave out anchor_size"
        if wrong.any():
            found = priors[wrong][0].tolist()
            raise ValueError(f"pred_instances.priors: expected {wanted}, got {found}; {remedy}")
        return (
            priors if self.anchor_size is None else anchors_from_points(priors[:, :2], priors[:, 2], self.anchor_size)
        )


def _as_tensor(boxes: Any) -> Tensor:
    """Boxes as a tensor; mmdetection may wrap them in `HorizontalBoxes`."""
    tensor: Tensor = boxes if isinstance(boxes, Tensor) else boxes.tensor
    return tensor


def _overlaps(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """IoU of each box with the box of the same row, 0 where they do not overlap."""
    size = (torch.minimum(boxes_1[:, 2:], boxes_2[:, 2:]) - torch.maximum(boxes_1[:, :2], boxes_2[:, :2])).clamp(min=0)
    intersection = size.prod(1)
    union = (boxes_1[:, 2:] - boxes_1[:, :2]).prod(1) + (boxes_2[:, 2:] - boxes_2[:, :2]).prod(1) - intersection
    return torch.where(intersection > 0, intersection / union, 0.0)
