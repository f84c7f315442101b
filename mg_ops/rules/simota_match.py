"""`simota_match`: each object takes the anchors that cost it least, as many as its IoUs add up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

from mg_ops.boxes import BoxCoder
from mg_ops.matcher import Call, GroundTruth, Levels, Matcher, PerObject
from mg_ops.matching import call_operator
from mg_ops.rules.options import SIMOTA_CANDIDATES, check_choice, check_simota_options
from mg_ops.rules.result import Match

if TYPE_CHECKING:
    from typing_extensions import Unpack

SimOtaCandidates: TypeAlias = Literal["box_or_center", "center"]


@dataclass(frozen=True)
class SimOtaMatcher(Matcher[Match]):
    """How to match: the options of `simota_match`, to be set once and called with each batch.

    Args:
        k: as of `simota_match`, like all that follow.
        center_radius: how far from an object's center its candidates lie, in strides.
        iou_weight: of the IoU in the cost.
        cls_weight: of the classification in the cost.
        candidates: which anchors are candidates.
        crowd_overlap: threshold of crowd regions.
        box_coder: decodes `box_deltas`.
        gt_box_format: of the objects' boxes.
        check: whether to raise on bad values.
        backend: None for the best one.

    Raises:
        TypeError, ValueError: an option that makes no sense; the message names it.

    Examples:
        >>> matcher = mg_ops.SimOtaMatcher(candidates="center", center_radius=1.5)
        >>> match = matcher(anchors, gt_boxes, gt_labels, cls_probabilities=scores, pred_boxes=pred_boxes)
    """

    k: int = 10
    center_radius: float = 2.5
    iou_weight: float = 3.0
    cls_weight: float = 1.0
    candidates: SimOtaCandidates = "box_or_center"
    crowd_overlap: float = 0.5
    box_coder: BoxCoder | None = None
    gt_box_format: str = "xyxy"
    check: bool = False
    backend: str | None = None

    def _check_options(self) -> None:
        place = check_choice("candidates", self.candidates, SIMOTA_CANDIDATES)
        check_simota_options(self.k, self.center_radius, self.iou_weight, self.cls_weight, place, self.crowd_overlap)

    def _match(self, *arguments: Any, **options: Any) -> Match:
        return simota_match(*arguments, **options)


def simota_match(
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_labels: PerObject = None,
    gt_offsets: Tensor | None = None,
    *,
    k: int = 10,
    center_radius: float = 2.5,
    iou_weight: float = 3.0,
    cls_weight: float = 1.0,
    candidates: SimOtaCandidates = "box_or_center",
    crowd_overlap: float = 0.5,
    **call: Unpack[Call],
) -> Match:
    """Gives each object the anchors that cost it least in class and IoU: SimOTA, the rule of YOLOX.

    It is section 2.1 of Ge et al., 2021 (arXiv 2107.08430). The defaults are those of mmdetection;
    docs/definition/simota_match.md has the options of YOLOX. An anchor stands for its center, and its width is the
    stride of its level. Sizes and arguments that are not described here are those of `mutual_match`.

    Args:
        anchors: (A, 4) floating, one for each location, `mg_ops.anchors_from_points(points, strides, size=1.0)`.
        gt_boxes: the boxes of the objects.
        gt_labels: their classes.
        gt_offsets: of packed objects.
        k: an object selects as many anchors as its k largest IoUs add up to, and at least one; from 1 to 128.
        center_radius: an anchor is near the center of an object if it is nearer than this on both axes, in strides.
        iou_weight: weight of -log(IoU) in the cost, at least 0.
        cls_weight: weight of the binary cross-entropy over all classes in the cost, at least 0.
        candidates: "box_or_center": anchors inside of some object or near its center, and those that are both first
            (mmdetection, and YOLOX as first released); "center": anchors near the center of some object (YOLOX since
            then).
        crowd_overlap: background whose overlap with a crowd region is at least this share of the anchor's area becomes
            ignored, in (0, 1].
        call: what else `mutual_match` takes: cls_logits or cls_probabilities, which with an objectness are its product
            or the root of that; pred_boxes, or box_deltas with box_coder; gt_crowd, gt_mask, gt_box_format, check,
            backend ("cuda", "cpp" or "eager").

    Returns:
        `Match(cls_match, num_pos, soft_targets)`, with the IoU of the predicted box as the target of a positive. The
        same bits on every backend.

    Raises:
        TypeError, ValueError, RuntimeError: as `mutual_match`.

    Examples:
        >>> points = torch.tensor([[4., 4.], [12., 4.], [60., 60.]])
        >>> anchors = mg_ops.anchors_from_points(points, torch.full((3,), 8.), size=1.0)
        >>> gt_boxes, gt_labels = [torch.tensor([[0., 0., 16., 8.]])], [torch.tensor([1])]
        >>> match = mg_ops.simota_match(anchors, gt_boxes, gt_labels, cls_logits=torch.zeros(1, 3, 2),
        ...                             pred_boxes=anchors[None])
        >>> match.cls_match
        tensor([[ 0, -1, -1]])
    """
    place = check_choice("candidates", candidates, SIMOTA_CANDIDATES)
    options = check_simota_options(k, center_radius, iou_weight, cls_weight, place, crowd_overlap)
    cls_match, soft_targets, num_pos = call_operator(
        "simota_match",
        anchors,
        (gt_boxes, gt_labels, gt_offsets),
        options,
        lambda: None,
        reader="simota_match",
        reads_boxes=True,
        reads_scores=True,
        **call,
    )
    return Match(cls_match, num_pos, soft_targets.detach())
