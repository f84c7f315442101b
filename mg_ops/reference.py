"""The definition of mutual matching in plain eager PyTorch, and what the definitions of the other rules share with it.

Read it beside the paper (Zhang et al., "Localize to Classify and Classify to Localize: Mutual Guidance in Object
Detection", ACCV 2020, sections 3.1 and 3.2). It runs on any device, and it is the oracle that every other backend must
equal bit for bit, so its arithmetic is spelled out: float32, one rounding an operation, and its own `exp`, `log2` and
`sigmoid` made of multiplies, adds and bit operations (the same as in `csrc/det_math.h`). It favors clarity over
memory: each image makes tensors of size anchors x objects.

Sizes: B images, A anchors, C classes, G objects of one image, N objects in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKGROUND = -1
"""In `cls_match`: the anchor is a negative sample. In `loc_match`: the anchor has no object."""

IGNORED = -2
"""In `cls_match`: the anchor takes no part in the classification loss."""


def autocast_type(device: torch.device) -> str:
    """The device type to switch autocast off for: "meta" has none, and torch refuses it."""
    return "cpu" if device.type == "meta" else device.type


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def exp(x: Tensor) -> Tensor:
    """e**x in float32, the same bits on every device. inf above 88.73, 0 below -104, NaN for NaN."""
    x = torch.where(x > 89.0, 89.0, x)
    x = torch.where(x < -104.5, -104.5, x)
    # Adding 1.5 * 2^23 rounds to an integer n and leaves n in the low bits.
    shifted = x * 1.442695041 + 12582912.0
    n = shifted - 12582912.0
    return exp_reduced((x - n * 0.693359375) - n * -2.12194440e-4, shifted)


def exp_reduced(r: Tensor, shifted: Tensor) -> Tensor:
    """2**n * e**r, with n in the low bits of `shifted` and r within half of ln 2."""
    p = torch.full_like(r, 0.0013814540579915047)
    for coefficient in (0.00836874544620514, 0.04166838899254799, 0.1666652113199234, 0.4999999403953552):
        p = p * r + coefficient
    p = (p * (r * r) + r) + 1.0
    # 2^n in two factors: n reaches 128 and -151, one float's exponent does not.
    exponent = shifted.view(torch.int32) - 0x4B400000
    half = exponent >> 1
    scale_1 = ((half + 127) << 23).view(torch.float32)
    scale_2 = ((exponent - half + 127) << 23).view(torch.float32)
    return (p * scale_1) * scale_2


def log2(x: Tensor) -> Tensor:
    """log2(x) in float32 of finite x > 0, subnormals included, the same bits on every device; exactly 0 at 1."""
    subnormal = x < 1.175494351e-38
    bits = torch.where(subnormal, x * 8388608.0, x).view(torch.int32)
    # x = 2^exponent * m with m in [sqrt(1/2), sqrt(2)); 0x3f3504f3 is sqrt(1/2).
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    return log2_reduced(f, torch.where(subnormal, exponent - 23, exponent))


def log2_reduced(f: Tensor, exponent: Tensor) -> Tensor:
    """exponent + log2(1 + f), with f from sqrt(1/2) - 1 to sqrt(2) - 1."""
    p = torch.full_like(f, -0.07634482532739639)
    for coefficient in (
        0.12761959433555603,
        -0.1316036432981491,
        0.14201720058918,
        -0.1662333607673645,
        0.20001228153705597,
        -0.250008225440979,
        0.3333333134651184,
    ):
        p = p * f + coefficient
    f2 = f * f
    tail = p * (f2 * f) - f2 * 0.5  # ln(1 + f) - f
    log2_m = f * 1.442695041 + tail * 1.442695041
    return log2_m + exponent.float()


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e**-x) in float32 without overflow, the same bits on every device. NaN for NaN."""
    negative = x < 0
    e = exp(torch.where(negative, x, -x))
    return torch.where(negative, e, torch.ones_like(e)) / (1.0 + e)


def positive_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator where that is finite and positive, else 0."""
    ratio = numerator / denominator
    return torch.where((ratio > 0) & ratio.isfinite(), ratio, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes, all (x1, y1, x2, y2) in one unit


def area(boxes: Tensor) -> Tensor:
    """(..., 4) boxes -> (...,) areas; meaningless where a box is inverted."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 - x1) * (y2 - y1)


def finite_or_empty(boxes: Tensor) -> Tensor:
    """Boxes with a non-finite coordinate become the empty box at the origin, which overlaps nothing."""
    return torch.where(boxes.isfinite().all(-1, keepdim=True), boxes, 0.0)


def is_object(boxes: Tensor) -> Tensor:
    """Which boxes the matching can look for: finite, x2 > x1 and y2 > y1."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return boxes.isfinite().all(-1) & (x2 > x1) & (y2 > y1)


def intersection_area(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """(..., 4) and (G, 4) finite boxes -> (..., G) areas of their intersections."""
    boxes_1 = boxes_1.unsqueeze(-2)
    size = torch.minimum(boxes_1[..., 2:], boxes_2[:, 2:]) - torch.maximum(boxes_1[..., :2], boxes_2[:, :2])
    w, h = size.unbind(-1)
    return torch.where((w > 0) & (h > 0), w * h, 0.0)


def box_iou(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """(M, 4) and (G, 4) float32 boxes -> (M, G) IoU; 0 with a box that is not finite, or inverted."""
    boxes_1, boxes_2 = finite_or_empty(boxes_1), finite_or_empty(boxes_2)
    intersection = intersection_area(boxes_1, boxes_2)
    union = (area(boxes_1).unsqueeze(-1) + area(boxes_2)) - intersection
    return positive_ratio(intersection, union)


def decode(anchors: Tensor, deltas: Tensor, weights: Sequence[float], clip: float) -> Tensor:
    """(A, 4) anchors moved by (..., A, 4) deltas (dx, dy, dw, dh); weights and clip as in `mg_ops.BoxCoder`."""
    # A division by a Python number becomes a multiplication by its reciprocal on CUDA: divide by a tensor.
    deltas = deltas / torch.tensor(weights, dtype=torch.float32, device=deltas.device)
    first, second = anchors[:, :2], anchors[:, 2:]
    size = second - first
    center = first + 0.5 * size
    new_center = deltas[..., :2] * size + center
    log_scale = deltas[..., 2:]
    half = 0.5 * (exp(torch.where(log_scale > clip, clip, log_scale)) * size)
    return torch.cat([new_center - half, new_center + half], dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# A batch


class Inputs(NamedTuple):
    """What every rule's operator takes first, a batch of packed objects; csrc/schema.cpp holds the contract."""

    anchors: Tensor  # (A, 4)
    pred_boxes: Tensor  # (B, A, 4): boxes, or with a box coder deltas
    cls_scores: Tensor  # (B, A, C)
    gt_boxes: Tensor  # (N, 4)
    gt_labels: Tensor  # (N,)
    gt_offsets: Tensor  # (B + 1,)
    gt_crowd: Tensor | None  # (N,)
    box_coder: Sequence[float] | None  # weights of x, y, w and h, and the clip
    scores_are_probabilities: bool


def split_arguments(arguments: Sequence[Any]) -> tuple[Inputs, Sequence[Any]]:
    """The arguments of an operator: its inputs, and the options of its rule."""
    return Inputs(*arguments[: len(Inputs._fields)]), arguments[len(Inputs._fields) :]


class Image(NamedTuple):
    """One image: A anchors, C classes, G objects."""

    anchors: Tensor  # (A, 4) float32
    pred_boxes: Tensor  # (A, 4) float32, decoded
    cls_scores: Tensor  # (A, C) as given
    scores_are_probabilities: bool
    gt_boxes: Tensor  # (G, 4) float32
    gt_labels: Tensor  # (G,)
    objects: Tensor  # (G,) bool: which objects take part
    crowds: Tensor  # (K, 4) float32: the crowd regions


def float32_numbers(*numbers: float) -> list[float]:
    """The numbers, rounded to float32."""
    rounded: list[float] = torch.tensor(numbers, dtype=torch.float32, device="cpu").tolist()
    return rounded


def match_images(
    match_image: Callable[[Image], Sequence[Tensor]],
    inputs: Inputs,
    per_anchor: Sequence[torch.dtype],
    num_counts: int,
) -> tuple[Tensor, ...]:
    """Matches the images one by one.

    Args:
        match_image: the rule; its results are (A,) of the dtypes of `per_anchor`, then `num_counts` counts (G,).
        inputs: the batch.
        per_anchor: dtypes of the results (B, A).
        num_counts: how many results (N,) int32 follow.
    """
    batch_size, num_anchors = inputs.cls_scores.shape[:2]
    num_gt, device = len(inputs.gt_boxes), inputs.anchors.device
    # Wide inputs are rounded once, here, so that every backend computes from the same float32 numbers.
    anchors, gt_boxes = inputs.anchors.float(), inputs.gt_boxes.float()
    coder = float32_numbers(*(inputs.box_coder or ()))
    gt_crowd = inputs.gt_crowd
    if gt_crowd is None:
        gt_crowd = torch.zeros(num_gt, dtype=torch.bool, device=device)
    of_anchors = [torch.empty((batch_size, num_anchors), dtype=dtype, device=device) for dtype in per_anchor]
    counts = [torch.zeros(num_gt, dtype=torch.int32, device=device) for _ in range(num_counts)]
    # Within 0 and N and never decreasing, so that images never share an object.
    offsets = list(accumulate((min(max(offset, 0), num_gt) for offset in inputs.gt_offsets.tolist()), max))
    with torch.autocast(device.type, enabled=False):
        for image in range(batch_size):
            own = slice(offsets[image], offsets[image + 1])
            boxes, is_crowd = gt_boxes[own], gt_crowd[own]
            decoded = inputs.pred_boxes[image].float()
            if inputs.box_coder is not None:
                decoded = decode(anchors, decoded, coder[:4], coder[4])
            results = match_image(
                Image(
                    anchors,
                    decoded,
                    inputs.cls_scores[image],
                    inputs.scores_are_probabilities,
                    boxes,
                    inputs.gt_labels[own],
                    is_object(boxes) & ~is_crowd,
                    boxes[is_crowd],
                )
            )
            for whole, part in zip(of_anchors, results[: len(of_anchors)], strict=True):
                whole[image] = part
            for whole, part in zip(counts, results[len(of_anchors) :], strict=True):
                whole[own] = part
    return *of_anchors, *counts


def ignore_crowds(match: Tensor, image: Image, crowd_overlap: float) -> Tensor:
    """(A,) the match, with the background that a crowd region covers ignored."""
    if len(image.crowds) == 0:
        return match
    crowds, anchors = finite_or_empty(image.crowds), finite_or_empty(image.anchors)
    coverage = positive_ratio(intersection_area(anchors, crowds), area(anchors).unsqueeze(1))
    covered = (coverage >= crowd_overlap).any(1)
    return torch.where(covered & (match == BACKGROUND), IGNORED, match)


def class_probabilities(image: Image) -> Tensor:
    """(A, G) the score p of every anchor for the class of every object; 0 for NaN, and for an unknown class."""
    num_classes = image.cls_scores.shape[1]
    known_label = (image.gt_labels >= 0) & (image.gt_labels < num_classes)
    if num_classes == 0:
        return image.anchors.new_zeros(len(image.anchors), len(image.gt_boxes))
    score = image.cls_scores[:, torch.where(known_label, image.gt_labels, 0)].float()
    p = score.clamp(0, 1) if image.scores_are_probabilities else sigmoid(score)
    return torch.where(known_label & ~p.isnan(), p, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Mutual matching


class Claim(NamedTuple):
    """Which object each anchor competes for under one quality, and how good it is for it."""

    best: Tensor  # (G,) the anchor each object claims with quality 1
    owner: Tensor  # (A,) the object each anchor competes for; -1 none
    quality: Tensor  # (A,) the anchor's quality for its owner


def first_argmax(x: Tensor, dim: int) -> Tensor:
    """Index of the largest value along dim; the lowest index on ties."""
    size = x.shape[dim]
    shape = [1] * x.dim()
    shape[dim] = size
    index = torch.arange(size, device=x.device).reshape(shape)
    return torch.where(x == x.amax(dim, keepdim=True), index, size).amin(dim)


def claim(quality: Tensor, objects: Tensor, zero: float, one: float, best_if_zero: Tensor | None) -> Claim:
    """Every object claims its best anchor, then every anchor its best object.

    Args:
        quality: (A, G) the quality of every pair, `zero` where there is none.
        objects: (G,) bool, which objects take part.
        zero, one: what stands for quality 0 and quality 1 (an exponent has -inf and 0).
        best_if_zero: (G,) the anchor of an object whose every quality is 0.
    """
    quality = torch.where(objects, quality, zero)
    best = first_argmax(quality, dim=0)
    if best_if_zero is not None:
        best = torch.where(quality.amax(0) == zero, best_if_zero, best)
    anchor_index = torch.arange(quality.shape[0], device=quality.device)
    forced = (anchor_index.unsqueeze(1) == best) & objects
    quality = torch.where(forced, one, quality)
    owner = first_argmax(quality, dim=1)
    value = quality.amax(1)
    return Claim(best, torch.where(value > zero, owner, -1), value)


def rank_among_owned(owned: Claim) -> Tensor:
    """(A,) place of each anchor among those of its owner: 0 the best quality, lower anchor index first on ties."""
    by_quality = torch.sort(owned.quality, descending=True, stable=True).indices
    order = by_quality[torch.sort(owned.owner[by_quality], stable=True).indices]
    place = torch.arange(len(order), device=order.device)
    grouped_owner = owned.owner[order]
    group_start = torch.searchsorted(grouped_owner, grouped_owner)
    return torch.empty_like(place).scatter_(0, order, place - group_start)


def match_image(
    image: Image,
    classification_by_regressed: bool,
    localization_by_amplified: bool,
    sigma: float,
    iou_positive: float,
    iou_ignored: float,
    crowd_overlap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One image: cls_match, loc_match (A,), num_pos, num_total (G,)."""
    anchors, gt_boxes = image.anchors, image.gt_boxes
    num_objects = len(gt_boxes)
    cls_match = torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    loc_match = torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    if len(anchors) == 0 or num_objects == 0:
        counts = torch.zeros(num_objects, dtype=torch.int32, device=anchors.device)
        return cls_match, loc_match, counts, counts.clone()

    # Quality of every pair, and the objects that take part: those an anchor overlaps.
    q_anchor = box_iou(anchors, gt_boxes)
    objects = image.objects & (q_anchor > 0).any(0)
    by_anchor = claim(q_anchor, objects, zero=0.0, one=1.0, best_if_zero=None)

    # Counts: Np and Np + Ni of the paper, section 3.1.
    owned = by_anchor.owner.unsqueeze(1) == torch.arange(num_objects, device=anchors.device)
    num_pos = (owned & (by_anchor.quality >= iou_positive).unsqueeze(1)).sum(0).clamp(min=1)
    num_total = (owned & (by_anchor.quality >= iou_ignored).unsqueeze(1)).sum(0).maximum(num_pos)
    num_pos, num_total = num_pos * objects, num_total * objects

    # Localize to Classify: rank by the IoU of the regressed boxes (section 3.1).
    by_cls = by_anchor
    if classification_by_regressed:
        q_regressed = box_iou(image.pred_boxes, gt_boxes)
        by_cls = claim(q_regressed, objects, zero=0.0, one=1.0, best_if_zero=by_anchor.best)
    rank, owner = rank_among_owned(by_cls), by_cls.owner.clamp(min=0)
    cls_match = torch.where((by_cls.owner >= 0) & (rank < num_total[owner]), IGNORED, cls_match)
    cls_match = torch.where((by_cls.owner >= 0) & (rank < num_pos[owner]), by_cls.owner, cls_match)

    # Classify to Localize: rank by the amplified IoU (section 3.2, Eq. 1), compared by its exponent.
    by_loc = by_anchor
    if localization_by_amplified:
        p = class_probabilities(image)
        # A division by a Python number becomes a multiplication by its reciprocal on CUDA: divide by a tensor.
        amplification = (sigma - p) / torch.full_like(p, sigma)
        overlapping = q_anchor > 0
        exponent = torch.where(overlapping, amplification * log2(torch.where(overlapping, q_anchor, 1.0)), -torch.inf)
        by_loc = claim(exponent, objects, zero=-torch.inf, one=0.0, best_if_zero=by_anchor.best)
    rank, owner = rank_among_owned(by_loc), by_loc.owner.clamp(min=0)
    loc_match = torch.where((by_loc.owner >= 0) & (rank < num_pos[owner]), by_loc.owner, loc_match)

    cls_match = ignore_crowds(cls_match, image, crowd_overlap)
    return cls_match, loc_match, num_pos.to(torch.int32), num_total.to(torch.int32)


def mutual_match(*arguments: Any) -> tuple[Tensor, ...]:
    """cls_match, loc_match (B, A) int64, num_pos, num_total (N,) int32 of what the operator takes."""
    inputs, (by_regressed, by_amplified, *numbers) = split_arguments(arguments)
    numbers = float32_numbers(*numbers)

    def match(image: Image) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return match_image(image, by_regressed, by_amplified, *numbers)

    return match_images(match, inputs, (torch.int64, torch.int64), num_counts=2)
