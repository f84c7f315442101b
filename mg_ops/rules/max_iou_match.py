"""`max_iou_match`: each anchor belongs to the object that it overlaps most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

from mg_ops.boxes import BoxCoder
from mg_ops.matcher import Call, GroundTruth, Levels, Matcher, PerObject
from mg_ops.matching import call_operator
from mg_ops.rules.options import LOW_QUALITY, check_choice, check_max_iou_options
from mg_ops.rules.result import Match

if TYPE_CHECKING:
    from typing_extensions import Unpack

LowQuality: TypeAlias = Literal["none", "keep_owner", "take_all", "take_first"]


@dataclass(frozen=True)
class MaxIouMatcher(Matcher[Match]):
    """How to match: the options of `max_iou_match`, to be set once and called with each batch as `MutualMatcher` is.

    Args:
        iou_positive: as of `max_iou_match`, like all that follow.
        iou_ignored: threshold of ignored anchors.
        low_quality: what an object does with its best anchors.
        iou_low_quality: the IoU that they must have.
        crowd_overlap: threshold of crowd regions.
        box_coder: decodes `box_deltas`, which this rule takes and does not read.
        gt_box_format: of the objects' boxes.
        check: whether to raise on bad values.
        backend: None for the best one.

    Raises:
        TypeError, ValueError: an option that makes no sense; the message names it.

    Examples:
        >>> matcher = mg_ops.MaxIouMatcher(low_quality="take_all")
        >>> match = matcher(anchors, gt_boxes)
    """

    iou_positive: float = 0.5
    iou_ignored: float = 0.4
    low_quality: LowQuality = "keep_owner"
    iou_low_quality: float = 0.0
    crowd_overlap: float = 0.5
    box_coder: BoxCoder | None = None
    gt_box_format: str = "xyxy"
    check: bool = False
    backend: str | None = None

    def _check_options(self) -> None:
        place = check_choice("low_quality", self.low_quality, LOW_QUALITY)
        check_max_iou_options(self.iou_positive, self.iou_ignored, place, self.iou_low_quality, self.crowd_overlap)

    def _match(self, *arguments: Any, **options: Any) -> Match:
        return max_iou_match(*arguments, **options)


def max_iou_match(
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_labels: PerObject = None,
    gt_offsets: Tensor | None = None,
    *,
    iou_positive: float = 0.5,
    iou_ignored: float = 0.4,
    low_quality: LowQuality = "keep_owner",
    iou_low_quality: float = 0.0,
    crowd_overlap: float = 0.5,
    **call: Unpack[Call],
) -> Match:
    """Assigns each anchor to the object that it overlaps most: the rule of Faster R-CNN, RetinaNet and SSD.

    It gives the labels of torchvision's and detectron2's `Matcher` and of mmdetection's `MaxIoUAssigner`, but for
    objects that no anchor overlaps, which there can make every anchor positive. Sizes and arguments that are not
    described here are those of `mutual_match`.

    Args:
        anchors: (A, 4) floating, the anchor boxes.
        gt_boxes: the boxes of the objects.
        gt_labels: not read, but that of padded objects they, or gt_mask, tell the padding.
        gt_offsets: of packed objects.
        iou_positive: an anchor whose largest IoU is at least this is a positive of that object, in (0, 1].
        iou_ignored: one that has at least this and is no positive is ignored, in (0, iou_positive].
        low_quality: of the anchors that have the largest IoU that an object has with any anchor, "none" becomes a
            positive for that; with "keep_owner" all do, of the object that each overlaps most (torchvision,
            detectron2); with "take_all" all do, of the object itself (mmdetection); with "take_first" the first does.
        iou_low_quality: for that IoUs must be at least this and above 0, in [0, 1].
        crowd_overlap: background whose overlap with a crowd region is at least this share of the anchor's area becomes
            ignored, in (0, 1].
        call: what else `mutual_match` takes: gt_crowd, gt_mask, gt_box_format, check, backend ("cuda", "cpp" or
            "eager"); and predictions with their box_coder, so that one call serves every rule, which are not read.

    Returns:
        `Match(cls_match, num_pos)`. The same integers on every backend.

    Raises:
        TypeError, ValueError, RuntimeError: as `mutual_match`.

    Examples:
        >>> anchors = torch.tensor([[0., 0., 10., 10.], [5., 0., 15., 10.], [40., 40., 50., 50.]])
        >>> mg_ops.max_iou_match(anchors, [torch.tensor([[1., 0., 11., 10.]])]).cls_match
        tensor([[ 0, -2, -1]])
    """
    place = check_choice("low_quality", low_quality, LOW_QUALITY)
    options = check_max_iou_options(iou_positive, iou_ignored, place, iou_low_quality, crowd_overlap)
    result = call_operator(
        "max_iou_match",
        anchors,
        (gt_boxes, gt_labels, gt_offsets),
        options,
        lambda: None,
        reader="max_iou_match",
        reads_boxes=False,
        reads_scores=False,
        **call,
    )
    return Match(*result)
