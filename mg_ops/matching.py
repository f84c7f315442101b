"""`mutual_match`: packs the objects, picks a backend, runs it, and explains what was wrong with a call that failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mg_ops.backend_choice import operator_of
from mg_ops.boxes import BoxCoder
from mg_ops.checks import check_arguments, check_bool, check_thresholds
from mg_ops.objects import pack_objects
from mg_ops.validation import check_values


class MutualMatch(NamedTuple):
    """The assignment of a batch: B images, A anchors, N objects in all."""

    cls_match: Tensor
    """(B, A) int64: the index of the object within its image, `BACKGROUND` (-1) or `IGNORED` (-2)."""
    loc_match: Tensor
    """(B, A) int64: the index of the object within its image, or -1."""
    num_pos: Tensor
    """(N,) int32: how many positives each object asks for (Np of the paper); 0 for one that cannot be matched."""
    num_total: Tensor
    """(N,) int32: positives and ignored anchors each object asks for (Np + Ni); 0 for one that cannot be matched."""


STRATEGIES = {
    "iou": (False, False),
    "localize_to_classify": (True, False),
    "classify_to_localize": (False, True),
    "mutual": (True, True),
}
"""Strategy -> (classification by q_regressed, localisation by q_amplified); the rows of the paper's Table 1."""


def mutual_match(
    anchors: Tensor,
    pred_boxes: Tensor,
    cls_scores: Tensor,
    gt_boxes: Tensor | Sequence[Tensor],
    gt_labels: Tensor | Sequence[Tensor],
    gt_offsets: Tensor | None = None,
    *,
    gt_crowd: Tensor | Sequence[Tensor] | None = None,
    box_coder: BoxCoder | None = None,
    strategy: str = "mutual",
    sigma: float = 2.0,
    iou_positive: float = 0.5,
    iou_ignored: float = 0.4,
    crowd_overlap: float = 0.5,
    check: bool = False,
    backend: str | None = None,
) -> MutualMatch:
    """Assigns anchors to objects by what the network predicts: Mutual Guidance (Zhang et al., ACCV 2020, section 3).

    Anchors whose regressed boxes localise an object well become its positives for classification; anchors that classify
    it well become its positives for localisation. Sizes: B images, A anchors, C classes, N objects in all. Boxes are
    (x1, y1, x2, y2) in any one unit (pixels, or fractions of the image), the same for all arguments. Floating inputs
    may be float16, bfloat16, float32 or float64; all are rounded to float32 first. Predictions are read in place,
    whatever their strides. Nothing is differentiated: inputs may require grad, and none flows.

    Args:
        anchors: (A, 4) floating, the anchor boxes.
        pred_boxes: (B, A, 4) floating, the regressed boxes; with `box_coder` the raw regression deltas instead.
        cls_scores: (B, A, C) floating, the classification logits; p = sigmoid(logit).
        gt_boxes: a list of B tensors (G, 4), floating; or one packed tensor (N, 4) with `gt_offsets`.
        gt_labels: a list of B tensors (G,), int64 or int32; or packed (N,).
        gt_offsets: (B + 1,) int64 or int32, for packed objects: image b has objects gt_offsets[b] to gt_offsets[b + 1].
            Objects past gt_offsets[B] do not count, so buffers of a fixed capacity can be reused.
        gt_crowd: bool, like the labels: regions to ignore rather than objects to find.
        box_coder: decodes `pred_boxes` as deltas of the anchors, inside the kernel.
        strategy: by which quality each task ranks anchors, the rows of the paper's Table 1:
            "iou" (both by the anchors' IoU), "localize_to_classify" (classification by the regressed boxes' IoU),
            "classify_to_localize" (localisation by the amplified IoU), "mutual" (both).
        sigma: degree of amplification, above 1 (Eq. 1): q_amplified = q_anchor ** ((sigma - p) / sigma).
        iou_positive: anchors an object owns with at least this IoU count as positives (Np), in (0, 1].
        iou_ignored: those with at least this IoU count as positive or ignored (Np + Ni), in (0, iou_positive].
        crowd_overlap: background whose overlap with a crowd region is at least this share of the anchor's area becomes
            ignored, in (0, 1].
        check: raise on values that are otherwise passed over: boxes that are not finite or inverted, NaN scores,
            unknown labels, objects that no anchor overlaps, wrong offsets. Costs a device synchronisation.
        backend: None for the best one of the tensors' device, or one of `mg_ops.backends()`.

    Returns:
        `MutualMatch(cls_match, loc_match, num_pos, num_total)`. The same integers on every backend.

    Raises:
        TypeError: a wrong type or dtype; the message names the argument.
        ValueError: a wrong shape, device, length or number, a tensor whose memory has been freed, packed offsets (on
            the CPU) that do not start at 0, decrease or exceed N, or with `check=True` a bad value.
        RuntimeError: the backend asked for cannot be used; the message says why.

    Examples:
        >>> anchors = torch.tensor([[0., 0., 10., 10.], [5., 0., 15., 10.], [40., 40., 50., 50.]])
        >>> logits = torch.zeros(1, 3, 2)
        >>> match = mg_ops.mutual_match(anchors, anchors[None], logits, [torch.tensor([[1., 0., 11., 10.]])],
        ...                             [torch.tensor([1])])
        >>> match.cls_match
        tensor([[ 0, -1, -1]])
    """
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    if box_coder is not None and not isinstance(box_coder, BoxCoder):
        raise TypeError(f"box_coder: expected mg_ops.BoxCoder or None, got {type(box_coder).__name__}")
    if not (type(sigma) is type(iou_positive) is type(iou_ignored) is type(crowd_overlap) is float):
        # A bool or a tensor is no number here, whatever torch would make of it.
        numbers = check_thresholds(sigma, iou_positive, iou_ignored, crowd_overlap)
        sigma, iou_positive, iou_ignored, crowd_overlap = numbers
    # The operator checks its arguments. Only where it, or what comes before it, fails are they looked at one by one,
    # for an error that says which one is wrong, and how.
    try:
        device = anchors.device
        if check_bool("check", check):
            check_arguments(anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd)
        objects: tuple[Any, ...] = (gt_boxes, gt_labels, gt_offsets, gt_crowd)
        if not isinstance(gt_boxes, Tensor):
            objects = pack_objects(gt_boxes, gt_labels, gt_offsets, gt_crowd, cls_scores.shape[0], device)
        operator = operator_of(backend, device)
        if check:
            check_values(anchors, pred_boxes, cls_scores, box_coder, *objects)
        result = operator(
            anchors,
            pred_boxes,
            cls_scores,
            *objects,
            None if box_coder is None else [*box_coder.weights, box_coder.clip],
            *STRATEGIES[strategy],
            sigma,
            iou_positive,
            iou_ignored,
            crowd_overlap,
        )
        return MutualMatch(*result)
    except Exception:
        try:
            check_arguments(anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd)
            check_thresholds(sigma, iou_positive, iou_ignored, crowd_overlap)
        except (TypeError, ValueError) as fault:
            raise fault from None
        raise
