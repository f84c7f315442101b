"""`task_aligned_match`: each object takes the anchors that both classify and localize it best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor

from mg_ops.boxes import BoxCoder
from mg_ops.matcher import Call, GroundTruth, Levels, Matcher, PerObject
from mg_ops.matching import call_operator
from mg_ops.rules.options import CONFLICT, MAX_K, check_choice, check_count, check_task_aligned_options
from mg_ops.rules.result import Match

if TYPE_CHECKING:
    from typing_extensions import Unpack

Overlap: TypeAlias = Literal["iou", "ciou"]
Candidates: TypeAlias = Literal["all", "inside"]
Conflict: TypeAlias = Literal["selecting", "inside", "all"]


def _operator_options(
    alpha: float,
    beta: float,
    k: int,
    k_after_conflict: int | None,
    overlap: Overlap,
    candidates: Candidates,
    conflict: Conflict,
    *lengths: float,
) -> tuple[Any, ...]:
    """The options as the operator takes them; raises on a wrong one."""
    if k_after_conflict is not None:
        check_count("k_after_conflict", k_after_conflict, 1, MAX_K)
    return check_task_aligned_options(
        alpha,
        beta,
        k,
        k_after_conflict or 0,
        check_choice("overlap", overlap, ("iou", "ciou")) == 1,
        check_choice("candidates", candidates, ("all", "inside")) == 1,
        check_choice("conflict", conflict, CONFLICT),
        *lengths,
    )


@dataclass(frozen=True)
class TaskAlignedMatcher(Matcher[Match]):
    """How to match: the options of `task_aligned_match`, to be set once and called with each batch.

    Args:
        alpha: as of `task_aligned_match`, like all that follow.
        beta: exponent of the overlap.
        k: anchors that an object selects.
        k_after_conflict: anchors that an object keeps.
        overlap: of the predicted boxes with the objects.
        candidates: which anchors an object selects from.
        conflict: which objects an anchor that several have selected may belong to.
        minimum_side: of the objects, where it is tested which anchors are inside.
        center_margin: of that test.
        epsilon: of the soft targets.
        crowd_overlap: threshold of crowd regions.
        box_coder: decodes `box_deltas`.
        gt_box_format: of the objects' boxes.
        check: whether to raise on bad values.
        backend: None for the best one.

    Raises:
        TypeError, ValueError: an option that makes no sense; the message names it.

    Examples:
        >>> matcher = mg_ops.TaskAlignedMatcher(alpha=1.0, k=13, overlap="iou")
        >>> match = matcher(anchors, gt_boxes, gt_labels, cls_logits=cls_logits, pred_boxes=pred_boxes)
    """

    alpha: float = 0.5
    beta: float = 6.0
    k: int = 10
    k_after_conflict: int | None = None
    overlap: Overlap = "ciou"
    candidates: Candidates = "inside"
    conflict: Conflict = "inside"
    minimum_side: float = 0.0
    center_margin: float = 0.0
    epsilon: float = 1e-9
    crowd_overlap: float = 0.5
    box_coder: BoxCoder | None = None
    gt_box_format: str = "xyxy"
    check: bool = False
    backend: str | None = None

    def _check_options(self) -> None:
        _operator_options(
            self.alpha,
            self.beta,
            self.k,
            self.k_after_conflict,
            self.overlap,
            self.candidates,
            self.conflict,
            *(self.minimum_side, self.center_margin, self.epsilon, self.crowd_overlap),
        )

    def _match(self, *arguments: Any, **options: Any) -> Match:
        return task_aligned_match(*arguments, **options)


def task_aligned_match(
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_labels: PerObject = None,
    gt_offsets: Tensor | None = None,
    *,
    alpha: float = 0.5,
    beta: float = 6.0,
    k: int = 10,
    k_after_conflict: int | None = None,
    overlap: Overlap = "ciou",
    candidates: Candidates = "inside",
    conflict: Conflict = "inside",
    minimum_side: float = 0.0,
    center_margin: float = 0.0,
    epsilon: float = 1e-9,
    crowd_overlap: float = 0.5,
    **call: Unpack[Call],
) -> Match:
    """Gives each object the anchors of largest p**alpha * overlap**beta: the rule of TOOD and of YOLOv8 to YOLO26.

    It is the task alignment learning of Feng et al., ICCV 2021, section 3.2. The defaults are those of YOLOv8;
    docs/definition/task_aligned_match.md has the options of the others. Anchors stand for their centers. Sizes and
    arguments that are not described here are those of `mutual_match`.

    Args:
        anchors: (A, 4) floating, the anchor boxes; for points `mg_ops.anchors_from_points` makes them.
        gt_boxes: the boxes of the objects.
        gt_labels: their classes.
        gt_offsets: of packed objects.
        alpha: exponent of the probability p of the object's class, in [0, 64].
        beta: exponent of the overlap of the predicted box with the object, in [0, 64].
        k: how many anchors each object selects, from 1 to 128.
        k_after_conflict: how many of these each keeps once an anchor belongs to one object, from 1 to 128; None: all.
        overlap: "iou", or "ciou" (Zheng et al., AAAI 2020), negative ones counting as 0.
        candidates: "inside": an object selects from the anchors whose centers are inside of it; "all": from all, and
            those that are not inside are dropped afterwards (TOOD).
        conflict: an anchor that several objects have selected belongs to the one that its predicted box overlaps most,
            of the "selecting" ones, of those that it is "inside" of, or of "all" (PP-YOLOE).
        minimum_side: shorter sides of objects are lengthened to this for the test of which anchors are inside, in the
            unit of the boxes.
        center_margin: how far from each side a center must lie to be inside, in the unit of the boxes.
        epsilon: added to the divisor of the soft targets.
        crowd_overlap: background whose overlap with a crowd region is at least this share of the anchor's area becomes
            ignored, in (0, 1].
        call: what else `mutual_match` takes: cls_logits or cls_probabilities; pred_boxes, or box_deltas with box_coder;
            gt_crowd, gt_mask, gt_box_format, check, backend ("cuda", "cpp" or "eager").

    Returns:
        `Match(cls_match, num_pos, soft_targets)`. The same bits on every backend.

    Raises:
        TypeError, ValueError, RuntimeError: as `mutual_match`.

    Examples:
        >>> points, strides = torch.tensor([[4., 4.], [12., 4.], [60., 60.]]), torch.full((3,), 8.)
        >>> anchors = mg_ops.anchors_from_points(points, strides, size=1.0)
        >>> gt_boxes, gt_labels = [torch.tensor([[0., 0., 16., 8.]])], [torch.tensor([1])]
        >>> match = mg_ops.task_aligned_match(anchors, gt_boxes, gt_labels, cls_logits=torch.zeros(1, 3, 2),
        ...                                   pred_boxes=anchors[None], k=1)
        >>> match.cls_match
        tensor([[ 0, -1, -1]])
    """
    result = call_operator(
        "task_aligned_match",
        anchors,
        (gt_boxes, gt_labels, gt_offsets),
        _operator_options(
            alpha,
            beta,
            k,
            k_after_conflict,
            overlap,
            candidates,
            conflict,
            *(minimum_side, center_margin, epsilon, crowd_overlap),
        ),
        lambda: None,
        reader="task_aligned_match",
        reads_boxes=True,
        reads_scores=True,
        **call,
    )
    cls_match, soft_targets, num_pos = result
    return Match(cls_match, num_pos, soft_targets.detach())
