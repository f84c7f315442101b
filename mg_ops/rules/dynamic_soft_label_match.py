"""`dynamic_soft_label_match`: SimOTA with the IoU as the target of the classification, and a soft center."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mg_ops.boxes import BoxCoder
from mg_ops.matcher import Call, GroundTruth, Levels, Matcher, PerObject
from mg_ops.matching import call_operator
from mg_ops.rules.options import check_dynamic_soft_label_options
from mg_ops.rules.result import Match

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class DynamicSoftLabelMatcher(Matcher[Match]):
    """How to match: the options of `dynamic_soft_label_match`, to be set once and called with each batch.

    Args:
        k: as of `dynamic_soft_label_match`, like all that follow.
        soft_center_radius: from where on the distance to an object's center weighs, in strides.
        iou_weight: of the IoU in the cost.
        crowd_overlap: threshold of crowd regions.
        box_coder: decodes `box_deltas`.
        gt_box_format: of the objects' boxes.
        check: whether to raise on bad values.
        backend: None for the best one.

    Raises:
        TypeError, ValueError: an option that makes no sense; the message names it.

    Examples:
        >>> matcher = mg_ops.DynamicSoftLabelMatcher()
        >>> match = matcher(anchors, gt_boxes, gt_labels, cls_logits=cls_logits, pred_boxes=pred_boxes)
    """

    k: int = 13
    soft_center_radius: float = 3.0
    iou_weight: float = 3.0
    crowd_overlap: float = 0.5
    box_coder: BoxCoder | None = None
    gt_box_format: str = "xyxy"
    check: bool = False
    backend: str | None = None

    def _check_options(self) -> None:
        check_dynamic_soft_label_options(self.k, self.soft_center_radius, self.iou_weight, self.crowd_overlap)

    def _match(self, *arguments: Any, **options: Any) -> Match:
        return dynamic_soft_label_match(*arguments, **options)


def dynamic_soft_label_match(
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_labels: PerObject = None,
    gt_offsets: Tensor | None = None,
    *,
    k: int = 13,
    soft_center_radius: float = 3.0,
    iou_weight: float = 3.0,
    crowd_overlap: float = 0.5,
    **call: Unpack[Call],
) -> Match:
    """Gives each object the anchors that cost it least in class, IoU and distance: the rule of RTMDet.

    It is section 3.3 of Lyu et al., 2022 (arXiv 2212.07784), mmdetection's `DynamicSoftLabelAssigner`. An anchor stands
    for its center, and its width is the stride of its level. Sizes and arguments that are not described here are those
    of `mutual_match`.

    Args:
        anchors: (A, 4) floating, one for each location, `mg_ops.anchors_from_points(points, strides, size=1.0)`.
        gt_boxes: the boxes of the objects.
        gt_labels: their classes.
        gt_offsets: of packed objects.
        k: an object selects as many anchors as its k largest IoUs add up to, and at least one; from 1 to 128.
        soft_center_radius: the distance to an object's center adds 10**(distance - soft_center_radius) to the cost, in
            strides, at least 0.
        iou_weight: weight of -log(IoU) in the cost, at least 0.
        crowd_overlap: background whose overlap with a crowd region is at least this share of the anchor's area becomes
            ignored, in (0, 1].
        call: what else `mutual_match` takes: cls_logits or cls_probabilities; pred_boxes, or box_deltas with box_coder;
            gt_crowd, gt_mask, gt_box_format, check, backend ("cuda", "cpp" or "eager").

    Returns:
        `Match(cls_match, num_pos, soft_targets)`, with the IoU of the predicted box as the target of a positive. The
        same bits on every backend.

    Raises:
        TypeError, ValueError, RuntimeError: as `mutual_match`.

    Examples:
        >>> points = torch.tensor([[4., 4.], [12., 4.], [60., 60.]])
        >>> anchors = mg_ops.anchors_from_points(points, torch.full((3,), 8.), size=1.0)
        >>> gt_boxes, gt_labels = [torch.tensor([[0., 0., 16., 8.]])], [torch.tensor([1])]
        >>> match = mg_ops.dynamic_soft_label_match(anchors, gt_boxes, gt_labels, cls_logits=torch.zeros(1, 3, 2),
        ...                                         pred_boxes=anchors[None])
        >>> match.cls_match
        tensor([[ 0, -1, -1]])
    """
    options = check_dynamic_soft_label_options(k, soft_center_radius, iou_weight, crowd_overlap)
    cls_match, soft_targets, num_pos = call_operator(
        "dynamic_soft_label_match",
        anchors,
        (gt_boxes, gt_labels, gt_offsets),
        options,
        lambda: None,
        reader="dynamic_soft_label_match",
        reads_boxes=True,
        reads_scores=True,
        **call,
    )
    return Match(cls_match, num_pos, soft_targets.detach())
