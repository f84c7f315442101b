"""The definition of mutual matching in plain eager PyTorch.

Read it beside the paper (Zhang et al., "Localize to Classify and Classify to Localize: Mutual Guidance in Object
Detection", ACCV 2020, sections 3.1 and 3.2). It runs on any device, and it is the oracle that every other backend must
equal bit for bit, so its arithmetic is spelled out: float32, one rounding an operation, and its own `exp`, `log2` and
`sigmoid` made of multiplies, adds and bit operations (the same as in `csrc/det_math.h`). It favors clarity over
memory: each image makes tensors of size anchors x objects.

Sizes: B images, A anchors, C classes, G objects of one image, N objects in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

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
    r = (x - n * 0.693359375) - n * -2.12194440e-4
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
    return log2_m + torch.where(subnormal, exponent - 23, exponent).float()


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
# Matching


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
    anchors: Tensor,
    pred_boxes: Tensor,
    cls_scores: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_crowd: Tensor,
    scores_are_probabilities: bool,
    classification_by_regressed: bool,
    localization_by_amplified: bool,
    sigma: float,
    iou_positive: float,
    iou_ignored: float,
    crowd_overlap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One image: (A, 4), (A, 4), (A, C), (G, 4), (G,), (G,) -> cls_match, loc_match (A,), num_pos, num_total (G,)."""
    num_anchors, num_classes = cls_scores.shape
    num_objects = len(gt_boxes)
    cls_match = torch.full((num_anchors,), BACKGROUND, device=anchors.device)
    loc_match = torch.full((num_anchors,), BACKGROUND, device=anchors.device)
    if num_anchors == 0 or num_objects == 0:
        counts = torch.zeros(num_objects, dtype=torch.int32, device=anchors.device)
        return cls_match, loc_match, counts, counts.clone()

    # Quality of every pair, and the objects that take part: those an anchor overlaps.
    q_anchor = box_iou(anchors, gt_boxes)
    objects = is_object(gt_boxes) & ~gt_crowd & (q_anchor > 0).any(0)
    by_anchor = claim(q_anchor, objects, zero=0.0, one=1.0, best_if_zero=None)

    # Counts: Np and Np + Ni of the paper, section 3.1.
    owned = by_anchor.owner.unsqueeze(1) == torch.arange(num_objects, device=anchors.device)
    num_pos = (owned & (by_anchor.quality >= iou_positive).unsqueeze(1)).sum(0).clamp(min=1)
    num_total = (owned & (by_anchor.quality >= iou_ignored).unsqueeze(1)).sum(0).maximum(num_pos)
    num_pos, num_total = num_pos * objects, num_total * objects

    # Localize to Classify: rank by the IoU of the regressed boxes (section 3.1).
    by_cls = by_anchor
    if classification_by_regressed:
        q_regressed = box_iou(pred_boxes, gt_boxes)
        by_cls = claim(q_regressed, objects, zero=0.0, one=1.0, best_if_zero=by_anchor.best)
    rank, owner = rank_among_owned(by_cls), by_cls.owner.clamp(min=0)
    cls_match = torch.where((by_cls.owner >= 0) & (rank < num_total[owner]), IGNORED, cls_match)
    cls_match = torch.where((by_cls.owner >= 0) & (rank < num_pos[owner]), by_cls.owner, cls_match)

    # Classify to Localize: rank by the amplified IoU (section 3.2, Eq. 1), compared by its exponent.
    by_loc = by_anchor
    if localization_by_amplified:
        known_label = (gt_labels >= 0) & (gt_labels < num_classes)
        p = torch.zeros_like(q_anchor)
        if num_classes > 0:
            score = cls_scores[:, torch.where(known_label, gt_labels, 0)].float()
            p = score.clamp(0, 1) if scores_are_probabilities else sigmoid(score)
            p = torch.where(known_label & ~p.isnan(), p, 0.0)
        # A division by a Python number becomes a multiplication by its reciprocal on CUDA: divide by a tensor.
        amplification = (sigma - p) / torch.full_like(p, sigma)
        overlapping = q_anchor > 0
        exponent = torch.where(overlapping, amplification * log2(torch.where(overlapping, q_anchor, 1.0)), -torch.inf)
        by_loc = claim(exponent, objects, zero=-torch.inf, one=0.0, best_if_zero=by_anchor.best)
    rank, owner = rank_among_owned(by_loc), by_loc.owner.clamp(min=0)
    loc_match = torch.where((by_loc.owner >= 0) & (rank < num_pos[owner]), by_loc.owner, loc_match)

    # Crowd regions: background that a crowd covers is ignored.
    if bool(gt_crowd.any()):
        crowds = finite_or_empty(gt_boxes[gt_crowd])
        boxes = finite_or_empty(anchors)
        coverage = positive_ratio(intersection_area(boxes, crowds), area(boxes).unsqueeze(1))
        covered = (coverage >= crowd_overlap).any(1)
        cls_match = torch.where(covered & (cls_match == BACKGROUND), IGNORED, cls_match)

    return cls_match, loc_match, num_pos.to(torch.int32), num_total.to(torch.int32)


def mutual_match(
    anchors: Tensor,
    pred_boxes: Tensor,
    cls_scores: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    gt_crowd: Tensor | None,
    box_coder: Sequence[float] | None,
    scores_are_probabilities: bool,
    classification_by_regressed: bool,
    localization_by_amplified: bool,
    sigma: float,
    iou_positive: float,
    iou_ignored: float,
    crowd_overlap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of packed objects, image by image; takes what the operators take (csrc/schema.cpp)."""
    batch_size, num_anchors = cls_scores.shape[:2]
    num_gt = len(gt_boxes)
    device = anchors.device
    # Wide inputs are rounded once, here, so that every backend computes from the same float32 numbers.
    anchors, gt_boxes = anchors.float(), gt_boxes.float()
    sigma, iou_positive, iou_ignored, crowd_overlap, *coder = torch.tensor(
        [sigma, iou_positive, iou_ignored, crowd_overlap, *(box_coder or ())], dtype=torch.float32, device="cpu"
    ).tolist()
    if gt_crowd is None:
        gt_crowd = torch.zeros(num_gt, dtype=torch.bool, device=device)

    cls_match = torch.empty((batch_size, num_anchors), dtype=torch.int64, device=device)
    loc_match = torch.empty((batch_size, num_anchors), dtype=torch.int64, device=device)
    num_pos = torch.zeros(num_gt, dtype=torch.int32, device=device)
    num_total = torch.zeros(num_gt, dtype=torch.int32, device=device)
    # Within 0 and N and never decreasing, so that images never share an object.
    offsets = list(accumulate((min(max(offset, 0), num_gt) for offset in gt_offsets.tolist()), max))
    with torch.autocast(device.type, enabled=False):
        for image in range(batch_size):
            start, end = offsets[image], offsets[image + 1]
            boxes = pred_boxes[image].float()
            if box_coder is not None:
                boxes = decode(anchors, boxes, coder[:4], coder[4])
            cls_match[image], loc_match[image], num_pos[start:end], num_total[start:end] = match_image(
                anchors,
                boxes,
                cls_scores[image],
                gt_boxes[start:end],
                gt_labels[start:end],
                gt_crowd[start:end],
                scores_are_probabilities,
                classification_by_regressed,
                localization_by_amplified,
                sigma,
                iou_positive,
                iou_ignored,
                crowd_overlap,
            )
    return cls_match, loc_match, num_pos, num_total
