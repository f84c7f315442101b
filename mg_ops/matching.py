"""`mutual_match`: packs the objects, picks a backend, runs it, and explains what was wrong with a call that failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mg_ops.backend_choice import operator_of
from mg_ops.boxes import BoxCoder, check_box_coder
from mg_ops.checks import (
    check_bool,
    check_levels_are_not_images,
    check_levels_are_of_one_image,
    check_predictions,
    check_tensor,
    check_thresholds,
    join_levels,
)
from mg_ops.matcher import Call, GroundTruth, Levels, Matcher, PerObject
from mg_ops.objects import Objects, as_packed, pack_objects
from mg_ops.reference import IGNORED
from mg_ops.rules.operators import RULES
from mg_ops.rules.result import DynamicMutualMatch, Match
from mg_ops.validation import check_values

if TYPE_CHECKING:
    from typing_extensions import Unpack

Strategy: TypeAlias = Literal["iou", "localize_to_classify", "classify_to_localize", "mutual"]
STRATEGIES: dict[str, tuple[bool, bool]] = {
    "iou": (False, False),
    "localize_to_classify": (True, False),
    "classify_to_localize": (False, True),
    "mutual": (True, True),
}
"""Strategy -> (classification by q_regressed, localization by q_amplified); the rows of the paper's Table 1."""

GivenObjects: TypeAlias = tuple[Any, Any, Any]
"""gt_boxes, gt_labels and gt_offsets, as given."""


class MutualMatch(NamedTuple):
    """The assignment of a batch: B images, A anchors, N objects in all."""

    cls_match: Tensor
    """(B, A) int64: the index of the object within its image, `BACKGROUND` (-1) or `IGNORED` (-2)."""
    loc_match: Tensor
    """(B, A) int64: the index of the object within its image, or -1."""
    num_pos: Tensor
    """(N,) int32, or (B, M) for padded objects: how many positives each object asks for (Np of the paper); 0 for one
    that cannot be matched, and for padding."""
    num_total: Tensor
    """Like num_pos: positives and ignored anchors each object asks for (Np + Ni)."""

    @property
    def cls_positive(self) -> Tensor:
        """(B, A) bool: the positives for classification."""
        return self.cls_match >= 0

    @property
    def loc_positive(self) -> Tensor:
        """(B, A) bool: the positives for localization, whose boxes are learned."""
        return self.loc_match >= 0

    @property
    def ignored(self) -> Tensor:
        """(B, A) bool: the anchors that the classification loss leaves out."""
        return self.cls_match == IGNORED

    @property
    def soft_targets(self) -> None:
        """None, as of `mg_ops.Match` where the classification target of a positive is 1."""
        return


@dataclass(frozen=True)
class MutualMatcher(Matcher[MutualMatch]):
    """How to match: the options of `mutual_match`, to be set once and called with each batch.

    Args:
        strategy: as of `mutual_match`, like all that follow.
        sigma: degree of amplification.
        iou_positive: threshold of positives.
        iou_ignored: threshold of ignored anchors.
        crowd_overlap: threshold of crowd regions.
        box_coder: decodes `box_deltas`.
        gt_box_format: of the objects' boxes.
        check: whether to raise on bad values.
        backend: None for the best one.

    Raises:
        TypeError, ValueError: an option that makes no sense; the message names it.

    Examples:
        >>> matcher = mg_ops.MutualMatcher(sigma=3.0, box_coder=mg_ops.BoxCoder())
        >>> match = matcher(anchors, gt_boxes, gt_labels, cls_logits=logits, box_deltas=deltas)
    """

    strategy: Strategy = "mutual"
    sigma: float = 2.0
    iou_positive: float = 0.5
    iou_ignored: float = 0.4
    crowd_overlap: float = 0.5
    box_coder: BoxCoder | None = None
    gt_box_format: str = "xyxy"
    check: bool = False
    backend: str | None = None

    def _check_options(self) -> None:
        check_strategy(self.strategy)
        check_thresholds(self.sigma, self.iou_positive, self.iou_ignored, self.crowd_overlap)

    def _match(self, *arguments: Any, **options: Any) -> MutualMatch:
        return mutual_match(*arguments, **options)


AnyMatch: TypeAlias = "MutualMatch | Match | DynamicMutualMatch"
AnyMatcher: TypeAlias = "Matcher[MutualMatch] | Matcher[Match] | Matcher[DynamicMutualMatch]"


def check_counts(match: AnyMatch, num_gt: int, device: torch.device) -> None:
    """Raises unless the match was made for so many objects."""
    check_tensor("match.num_pos", match.num_pos, "integer", ("...",), device)
    if match.num_pos.numel() != num_gt:
        raise ValueError(
            f"match: made for {match.num_pos.numel()} objects, but gt_boxes has {num_gt}; "
            "pass the objects it was made with"
        )


def check_strategy(strategy: object) -> None:
    """Raises ValueError unless it is one of the four."""
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")


def mutual_match(
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_labels: PerObject = None,
    gt_offsets: Tensor | None = None,
    *,
    cls_logits: Levels | None = None,
    cls_probabilities: Levels | None = None,
    pred_boxes: Levels | None = None,
    box_deltas: Levels | None = None,
    box_coder: BoxCoder | None = None,
    gt_crowd: PerObject = None,
    gt_mask: Tensor | None = None,
    gt_box_format: str = "xyxy",
    strategy: Strategy = "mutual",
    sigma: float = 2.0,
    iou_positive: float = 0.5,
    iou_ignored: float = 0.4,
    crowd_overlap: float = 0.5,
    check: bool = False,
    backend: str | None = None,
) -> MutualMatch:
    """Assigns anchors to objects by what the network predicts: Mutual Guidance (Zhang et al., ACCV 2020, section 3).

    Anchors whose predicted boxes localize an object well become its positives for classification; anchors that classify
    it well become its positives for localization. Sizes: B images, A anchors, C classes, N objects in all. Boxes are
    (x1, y1, x2, y2) in any one unit (pixels, or fractions of the image), the same for all arguments. Floating inputs
    may be float16, bfloat16, float32 or float64; all are rounded to float32 first. Predictions are read in place,
    whatever their strides. Nothing is differentiated: inputs may require grad, and none flows.

    The objects may come in the form in which you hold them:

    - lists of one tensor per image, (G, 4) and (G,);
    - a list of one dictionary per image with "boxes", "labels" and, if any, "iscrowd" (torchvision, DETR), as gt_boxes;
    - padded, (B, M, 4) and (B, M), where a negative label, or gt_mask, tells what is padding;
    - packed, (N, 4) and (N,), with gt_offsets (B + 1,): image b has the objects gt_offsets[b] to gt_offsets[b + 1].
      Objects past gt_offsets[B] do not count, so buffers of a fixed capacity can be reused.

    What the strategy does not read need not be passed: "iou" reads no predictions, "localize_to_classify" the boxes,
    "classify_to_localize" the scores; and the labels are read with the scores alone. Without labels gt_mask must tell
    what is padding. Anchors and predictions may be lists of one tensor per feature level.

    Args:
        anchors: (A, 4) floating, the anchor boxes.
        gt_boxes: the boxes of the objects, floating, in one of the forms above.
        gt_labels: their classes, int64, int32 or whole floating numbers, in the same form.
        gt_offsets: (B + 1,) int64 or int32, for packed objects.
        cls_logits: (B, A, C) floating, the classification logits; p = sigmoid(logit).
        cls_probabilities: (B, A, C) floating in [0, 1], in place of cls_logits: p itself.
        pred_boxes: (B, A, 4) floating, the predicted boxes.
        box_deltas: (B, A, 4) floating, in place of pred_boxes: the regression deltas of the anchors.
        box_coder: decodes box_deltas, inside the kernel.
        gt_crowd: bool, in the form of the labels: regions to ignore rather than objects to find.
        gt_mask: (B, M) bool, for padded objects: True for an object, False for padding.
        gt_box_format: of gt_boxes, by torchvision's names: "xyxy", "xywh" or "cxcywh".
        strategy: by which quality each task ranks anchors, the rows of the paper's Table 1:
            "iou" (both by the anchors' IoU), "localize_to_classify" (classification by the predicted boxes' IoU),
            "classify_to_localize" (localization by the amplified IoU), "mutual" (both).
        sigma: degree of amplification, above 1 (Eq. 1): q_amplified = q_anchor ** ((sigma - p) / sigma).
        iou_positive: anchors an object owns with at least this IoU count as positives (Np), in (0, 1].
        iou_ignored: those with at least this IoU count as positive or ignored (Np + Ni), in (0, iou_positive].
        crowd_overlap: background whose overlap with a crowd region is at least this share of the anchor's area becomes
            ignored, in (0, 1].
        check: raise on values that are otherwise passed over: boxes that are not finite or inverted, NaN scores,
            unknown labels, objects that no anchor overlaps, wrong offsets; warn of logits that look like probabilities,
            and of boxes that look like deltas. Costs a device synchronization, and graph breaks under torch.compile.
        backend: None for the best one of the tensors' device, or one of `mg_ops.backends()`.

    Returns:
        `MutualMatch(cls_match, loc_match, num_pos, num_total)`. The same integers on every backend.

    Raises:
        TypeError: a wrong type or dtype; the message names the argument.
        ValueError: a wrong shape, device, length or number, a prediction that is missing or given twice, labels that
            are missing, a tensor whose memory has been freed, packed offsets (on the CPU) that do not start at 0,
            decrease or exceed N, or with `check=True` a bad value.
        RuntimeError: the backend asked for cannot be used; the message says why.

    Examples:
        >>> anchors = torch.tensor([[0., 0., 10., 10.], [5., 0., 15., 10.], [40., 40., 50., 50.]])
        >>> gt_boxes, gt_labels = [torch.tensor([[1., 0., 11., 10.]])], [torch.tensor([1])]
        >>> match = mg_ops.mutual_match(anchors, gt_boxes, gt_labels, cls_logits=torch.zeros(1, 3, 2),
        ...                             pred_boxes=anchors[None])
        >>> match.cls_match
        tensor([[ 0, -1, -1]])
    """
    check_strategy(strategy)
    if not (type(sigma) is type(iou_positive) is type(iou_ignored) is type(crowd_overlap) is float):
        # A bool or a tensor is no number here, whatever torch would make of it.
        numbers = check_thresholds(sigma, iou_positive, iou_ignored, crowd_overlap)
        sigma, iou_positive, iou_ignored, crowd_overlap = numbers
    by_regressed, by_amplified = STRATEGIES[strategy]
    result = call_operator(
        "mutual_match",
        anchors,
        (gt_boxes, gt_labels, gt_offsets),
        (by_regressed, by_amplified, sigma, iou_positive, iou_ignored, crowd_overlap),
        lambda: check_thresholds(sigma, iou_positive, iou_ignored, crowd_overlap),
        reader=f"strategy {strategy!r}",
        reads_boxes=by_regressed,
        reads_scores=by_amplified,
        cls_logits=cls_logits,
        cls_probabilities=cls_probabilities,
        pred_boxes=pred_boxes,
        box_deltas=box_deltas,
        box_coder=box_coder,
        gt_crowd=gt_crowd,
        gt_mask=gt_mask,
        gt_box_format=gt_box_format,
        check=check,
        backend=backend,
    )
    return MutualMatch(*result)


def call_operator(
    name: str,
    anchors: Levels,
    given_objects: GivenObjects,
    options: tuple[Any, ...],
    check_options: Callable[[], object],
    *,
    reader: str,
    reads_boxes: bool,
    reads_scores: bool,
    **call: Unpack[Call],
) -> tuple[Tensor, ...]:
    """What every rule's function does with its arguments: packs, checks, picks the backend and runs it.

    Args:
        name: of the operator, and of the function.
        anchors: as given.
        given_objects: as given.
        options: what follows the inputs in the operator's signature.
        check_options: raises on a wrong one.
        reader: who reads predictions and labels, for an error message.
        reads_boxes: whether predicted boxes must be given.
        reads_scores: whether scores, and the labels, which say which of them is read, must be given.
        call: the function's other arguments.

    Returns:
        The operator's results, those of padded objects (B, M).
    """
    if not call.keys() <= _CALL:
        raise TypeError(f"{name}() got an unexpected keyword argument {min(call.keys() - _CALL)!r}")
    box_coder, check = call.get("box_coder"), call.get("check", False)
    of_objects = (*given_objects, call.get("gt_crowd"), call.get("gt_mask"), call.get("gt_box_format", "xyxy"))
    boxes_name, boxes = _one_of(call, "pred_boxes", "box_deltas")
    scores_name, scores = _one_of(call, "cls_logits", "cls_probabilities")
    check_box_coder(box_coder)
    if (box_coder is None) != (boxes_name != "box_deltas"):
        raise ValueError(
            "box_coder: expected one with box_deltas, such as mg_ops.BoxCoder(); a matcher is made with it"
            if box_coder is None
            else "box_coder: expected none without box_deltas; boxes that are already decoded are pred_boxes"
        )
    if reads_boxes and boxes is None:
        raise ValueError(f"pred_boxes: {reader} reads the predicted boxes; pass pred_boxes or box_deltas")
    if reads_scores and scores is None:
        raise ValueError(f"cls_logits: {reader} reads the scores; pass cls_logits or cls_probabilities")
    labels_reader = reader if reads_scores else None

    # The operator checks its arguments. Only where it, or what comes before it, fails are they looked at one by one,
    # for an error that says which one is wrong, and how.
    all_anchors = join_levels("anchors", anchors)
    boxes, scores = join_levels(boxes_name, boxes), join_levels(scores_name, scores)
    try:
        device = all_anchors.device
        given = scores if boxes is None else boxes
        num_images = None if given is None else given.shape[0]
        if check_bool("check", check) and num_images is not None:
            check_predictions(all_anchors, boxes, scores, boxes_name, scores_name)
        objects = _pack(*of_objects, batch_size=num_images, device=device, labels_reader=labels_reader)
        if num_images is None:
            num_images = objects.gt_offsets.shape[0] - 1
            check_levels_are_not_images(anchors, num_images, check)
        if check:
            check_values(all_anchors, boxes, scores, objects, box_coder, scores_name)
        # What is not read the operator is given in the shape it expects, without memory of its own.
        result = operator_of(call.get("backend"), device, name)(
            all_anchors,
            all_anchors.expand(num_images, *all_anchors.shape) if boxes is None else boxes,
            all_anchors.new_zeros(()).expand(num_images, all_anchors.shape[0], 1) if scores is None else scores,
            *objects[:4],
            None if box_coder is None else [*box_coder.weights, box_coder.clip],
            scores_name == "cls_probabilities",
            *options,
        )
        if objects.padded_shape is not None:
            num_per_anchor = len(RULES[name].per_anchor)
            per_object = (values.view(objects.padded_shape) for values in result[num_per_anchor:])
            result = (*result[:num_per_anchor], *per_object)
        return tuple(result)
    except Exception:
        # No error is kept in a variable: its frames would hold the call's tensors in a cycle.
        try:
            check_levels_are_of_one_image(anchors, scores_name, scores)
            check_levels_are_of_one_image(anchors, boxes_name, boxes)
            batch_size, device = check_predictions(all_anchors, boxes, scores, boxes_name, scores_name)
            pack_objects(*of_objects, batch_size=batch_size, device=device, labels_reader=labels_reader)
            check_options()
        except (TypeError, ValueError) as fault:
            raise fault from None
        raise


_CALL = frozenset(Call.__annotations__)


def _one_of(call: Call, name: str, other_name: str) -> tuple[str, Any]:
    """The prediction given, and its name; two forms of one prediction are an error."""
    value, other_value = call.get(name), call.get(other_name)
    if value is not None and other_value is not None:
        raise ValueError(f"{other_name}: expected {name} or {other_name}, got both; pass the one the network gives")
    return (name, value) if other_value is None else (other_name, other_value)


def _pack(
    gt_boxes: Any,
    gt_labels: Any,
    gt_offsets: Any,
    gt_crowd: Any,
    gt_mask: Any,
    gt_box_format: str,
    batch_size: int | None,
    device: torch.device,
    labels_reader: str | None,
) -> Objects:
    """`pack_objects`, but that packed ones are left to the operator's own checks."""
    if (
        isinstance(gt_offsets, Tensor)
        and isinstance(gt_boxes, Tensor)
        and (labels_reader is None if gt_labels is None else isinstance(gt_labels, Tensor))
        and (gt_labels is None or not gt_labels.is_floating_point())
        and gt_mask is None
        and gt_box_format == "xyxy"
    ):
        return as_packed(gt_boxes, gt_labels, gt_offsets, gt_crowd)
    return pack_objects(
        gt_boxes,
        gt_labels,
        gt_offsets,
        gt_crowd,
        gt_mask,
        gt_box_format,
        batch_size=batch_size,
        device=device,
        labels_reader=labels_reader,
    )
