"""Mutual matching in Triton: the CUDA backend's contract for a GPU without a compiler, and a second implementation.

A call is one memset and four launches, whatever the number of anchors and objects. Launch sizes depend on shapes alone
and nothing is read back, so a call can be captured in a CUDA graph (after one call that compiles the kernels).

1. `_claim_kernel`, a program for 128 anchors of an image. Decodes the predicted boxes, takes every quality against
   each object that the tile's union box overlaps, keeps each anchor's best object in registers, and proposes each
   object's best anchor by a 64-bit atomic maximum. A class score is read only where q_anchor > 0 and it can still
   decide something.
2. `_settle_kernel`, a program an image. Which objects take part is known now. Gives every best pair quality 1 and lays
   out one list an object and ranking, so that all lists of an image together fit in its anchors.
3. `_own_kernel`, a program for 512 anchors. Owners are final now: counts the anchors above the thresholds, appends
   each to its owner's lists, writes the labels of anchors that are not chosen.
4. `_rank_kernel`, a program an (object, ranking). Finds the quality of the n-th best owned anchor by radix selection,
   8 bits a pass, and labels the anchors that reach it. The same loop runs over the object's list or, where the list is
   incomplete, over all anchors of the image.

Keys. Qualities are compared as integers (`csrc/assignment.h`): the bits of an IoU, the inverted bits of an exponent.
Both fit 31 bits here, because a quality's sign is known, so that `order << 32 | (0x7fffffff - index)` is a positive
int64. The maximum of such keys is the largest quality, then the lowest index, in whatever order programs arrive. 0: no
quality.

Memory beyond the outputs: per anchor of an image one key a quality (8 bytes) and one list entry a ranking (4 bytes),
32 bytes for `strategy="mutual"`; per object 48 bytes of maxima and counters, which the memset zeroes, and 24 bytes of
lists.

Lists are incomplete only where anchors change hands after they were counted: when an object that no anchor overlaps
had claimed some by their predicted boxes. Radix selection over all anchors is slower, and exact for the same reason.

Arithmetic. As in `csrc/det_math.h` and `reference.py`, operation by operation: launched with `enable_fp_fusion=False`,
divided by `tl.div_rn`. min and max only meet finite numbers.

Why these sizes. A claiming program is one warp: its reductions over the tile, up to six an object, are then shuffles
without a barrier, and a tile of 128 neighbouring anchors is small enough for its union box to rule most objects out. A
list of an ordinary object fits one or two blocks of 1024.
"""

# Triton compiles the kernels, and takes no annotations on their tensors.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from mg_ops.reference import BACKGROUND, IGNORED

CLAIM_BLOCK, CLAIM_WARPS = 128, 1
OWN_BLOCK, OWN_WARPS = 512, 4
RANK_BLOCK, RANK_WARPS = 1024, 4
SETTLE_BLOCK, SETTLE_WARPS = 256, 4

_BACKGROUND = tl.constexpr(BACKGROUND)
_IGNORED = tl.constexpr(IGNORED)
_MAX_INDEX = tl.constexpr(0x7FFFFFFF)
_MAX_FLOAT = tl.constexpr(3.402823466e38)
_FORCED_IOU_ORDER = tl.constexpr(0x3F800000)  # _iou_order(1)
_FORCED_EXPONENT_ORDER = tl.constexpr(0x7FFFFFFF)  # _exponent_order(0)
_CHUNK = tl.constexpr(32)  # objects tested against a tile at once; their hits are the bits of one integer

# Rows of the per-object counters.
_RESERVED = tl.constexpr(0)  # + list: entries kept for the object
_LISTED = tl.constexpr(2)  # + list: entries the object asked for
_COUNT_POS = tl.constexpr(4)
_COUNT_TOTAL = tl.constexpr(5)
NUM_COUNTERS = 6


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic: csrc/det_math.h


@triton.jit
def _exp(x):
    x = tl.where(x > 89.0, 89.0, x)
    x = tl.where(x < -104.5, -104.5, x)
    shifted = x * 1.442695041 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * 0.0013814540579915047 + 0.00836874544620514
    p = p * r + 0.04166838899254799
    p = p * r + 0.1666652113199234
    p = p * r + 0.4999999403953552
    p = (p * (r * r) + r) + 1.0
    exponent = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = exponent >> 1
    scale_1 = ((half + 127) << 23).to(tl.float32, bitcast=True)
    scale_2 = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
    return (p * scale_1) * scale_2


@triton.jit
def _log2(x):
    subnormal = x < 1.175494351e-38
    bits = tl.where(subnormal, x * 8388608.0, x).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = f * -0.07634482532739639 + 0.12761959433555603
    p = p * f + -0.1316036432981491
    p = p * f + 0.14201720058918
    p = p * f + -0.1662333607673645
    p = p * f + 0.20001228153705597
    p = p * f + -0.250008225440979
    p = p * f + 0.3333333134651184
    f2 = f * f
    tail = p * (f2 * f) - f2 * 0.5
    log2_m = f * 1.442695041 + tail * 1.442695041
    return log2_m + tl.where(subnormal, exponent - 23, exponent).to(tl.float32)


@triton.jit
def _sigmoid(x):
    negative = x < 0
    e = _exp(tl.where(negative, x, -x))
    return tl.div_rn(tl.where(negative, e, 1.0), 1.0 + e)


@triton.jit
def _class_probability(logit):
    p = _sigmoid(logit)
    return tl.where(p == p, p, 0.0)


@triton.jit
def _positive_ratio(numerator, denominator):
    ratio = tl.div_rn(numerator, denominator)
    return tl.where((ratio > 0) & (ratio <= _MAX_FLOAT), ratio, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes: csrc/box.h


@triton.jit
def _is_finite(x):
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def _load_box(pointers, stride_coordinate, mask):
    x1 = tl.load(pointers, mask=mask, other=0).to(tl.float32)
    y1 = tl.load(pointers + stride_coordinate, mask=mask, other=0).to(tl.float32)
    x2 = tl.load(pointers + 2 * stride_coordinate, mask=mask, other=0).to(tl.float32)
    y2 = tl.load(pointers + 3 * stride_coordinate, mask=mask, other=0).to(tl.float32)
    return x1, y1, x2, y2


@triton.jit
def _finite_or_empty(x1, y1, x2, y2):
    keep = _is_finite(x1) & _is_finite(y1) & _is_finite(x2) & _is_finite(y2)
    return tl.where(keep, x1, 0.0), tl.where(keep, y1, 0.0), tl.where(keep, x2, 0.0), tl.where(keep, y2, 0.0)


@triton.jit
def _decode_interval(first, second, delta_center, delta_size, weight_center, weight_size, clip):
    size = second - first
    center = first + 0.5 * size
    new_center = tl.div_rn(delta_center, weight_center) * size + center
    log_scale = tl.div_rn(delta_size, weight_size)
    half = 0.5 * (_exp(tl.where(log_scale > clip, clip, log_scale)) * size)
    return new_center - half, new_center + half


@triton.jit
def _intersection_area(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    w = tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1)
    h = tl.minimum(ay2, by2) - tl.maximum(ay1, by1)
    return tl.where((w > 0) & (h > 0), w * h, 0.0)


@triton.jit
def _iou_order(ax1, ay1, ax2, ay2, area_a, bx1, by1, bx2, by2, area_b):
    # The order of an IoU: its bits, 0 for 0.
    intersection = _intersection_area(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    return _positive_ratio(intersection, (area_a + area_b) - intersection).to(tl.int32, bitcast=True)


@triton.jit
def _exponent_order(exponent):
    # The order of an exponent <= 0: its inverted bits without the sign, which also makes one of the two zeros.
    return ~exponent.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _union(x1, y1, x2, y2):
    # The smallest box around the tile's boxes. An inverted or empty box has IoU 0 with everything: left out.
    keep = (x2 > x1) & (y2 > y1)
    return (
        tl.min(tl.where(keep, x1, _MAX_FLOAT), 0),
        tl.min(tl.where(keep, y1, _MAX_FLOAT), 0),
        tl.max(tl.where(keep, x2, -_MAX_FLOAT), 0),
        tl.max(tl.where(keep, y2, -_MAX_FLOAT), 0),
    )


@triton.jit
def _overlaps(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    # Comparisons do not round: false for a tile's union box means that w <= 0 or h <= 0 for each box in it.
    return (tl.minimum(ax2, bx2) > tl.maximum(ax1, bx1)) & (tl.minimum(ay2, by2) > tl.maximum(ay1, by1))


# ---------------------------------------------------------------------------------------------------------------------
# Objects of an image, keys


@triton.jit
def _object_range(gt_offsets, stride_offset, image, num_gt):
    # The largest offset so far, within 0 and N: images share no object, and none leads out of bounds.
    lane = tl.arange(0, 32)
    largest = tl.zeros([32], tl.int64)
    for first in range(0, image + 1, 32):
        index = first + lane
        offset = tl.load(gt_offsets + index * stride_offset, mask=index <= image, other=0).to(tl.int64)
        largest = tl.maximum(largest, offset)
    start = tl.minimum(tl.max(largest, 0), num_gt)
    end = tl.load(gt_offsets + (image + 1) * stride_offset).to(tl.int64)
    end = tl.minimum(tl.maximum(end, start), num_gt)
    return start.to(tl.int32), end.to(tl.int32)


@triton.jit
def _lowest_bit(bits):
    # Index of the lowest bit set: a power of two is its own float's exponent.
    lowest = bits & -bits
    return lowest, (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _claim_key(order, index):
    return tl.where(order > 0, (order.to(tl.int64) << 32) | (index ^ _MAX_INDEX).to(tl.int64), 0)


@triton.jit
def _key_index(key):
    return ((key & _MAX_INDEX) ^ _MAX_INDEX).to(tl.int32)


@triton.jit
def _key_order(key):
    return (key >> 32).to(tl.int32)


@triton.jit
def _propose_best(best_of_object, order, largest, anchor):
    first = tl.min(tl.where(order == largest, anchor, _MAX_INDEX), 0)
    tl.atomic_max(best_of_object, _claim_key(largest, first), sem="relaxed")


@triton.jit
def _load_pred_boxes(
    pred_boxes,
    image,
    anchor,
    mask,
    ax1,
    ay1,
    ax2,
    ay2,
    stride_image,
    stride_anchor,
    stride_coordinate,
    weight_x,
    weight_y,
    weight_w,
    weight_h,
    clip,
    DECODE: tl.constexpr,
):
    pointers = pred_boxes + image * stride_image + anchor.to(tl.int64) * stride_anchor
    x1, y1, x2, y2 = _load_box(pointers, stride_coordinate, mask)
    if DECODE:
        new_x1, new_x2 = _decode_interval(ax1, ax2, x1, x2, weight_x, weight_w, clip)
        new_y1, new_y2 = _decode_interval(ay1, ay2, y1, y2, weight_y, weight_h, clip)
        x1, y1, x2, y2 = new_x1, new_y1, new_x2, new_y2
    return _finite_or_empty(x1, y1, x2, y2)


_STRIDES = (
    "stride_anchors_a",
    "stride_anchors_x",
    "stride_pred_b",
    "stride_pred_a",
    "stride_pred_x",
    "stride_scores_b",
    "stride_scores_a",
    "stride_scores_c",
    "stride_gt_g",
    "stride_gt_x",
    "stride_labels",
    "stride_offsets",
    "stride_crowd",
)
_UNSPECIALIZED = [*_STRIDES, "num_anchors", "num_gt", "num_classes", "num_tiles", "batch_size", "longest_list"]
"""Integers that would otherwise compile a kernel anew when they happen to be 1 or a multiple of 16."""


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _claim_kernel(
    keys,
    best,
    counters,
    anchors,
    pred_boxes,
    cls_scores,
    gt_boxes,
    gt_labels,
    gt_offsets,
    gt_crowd,
    batch_size,
    num_anchors,
    num_gt,
    num_classes,
    num_tiles,
    stride_anchors_a: tl.int64,
    stride_anchors_x: tl.int64,
    stride_pred_b: tl.int64,
    stride_pred_a: tl.int64,
    stride_pred_x: tl.int64,
    stride_scores_b: tl.int64,
    stride_scores_a: tl.int64,
    stride_scores_c: tl.int64,
    stride_gt_g: tl.int64,
    stride_gt_x: tl.int64,
    stride_labels: tl.int64,
    stride_offsets: tl.int64,
    stride_crowd: tl.int64,
    weight_x,
    weight_y,
    weight_w,
    weight_h,
    clip,
    sigma,
    DECODE: tl.constexpr,
    REGRESSED: tl.constexpr,
    AMPLIFIED: tl.constexpr,
    CROWD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Natural owners of a tile's anchors (before best pairs get quality 1), and proposals for each object's best anchor.
    #
    # Concurrent programs: a tile's keys are written by its one program. `best` and `counters` only see atomic maxima
    # and additions, whose result does not depend on their order. `best` is also read while others raise it: whatever is
    # seen (an aligned 64-bit load is never torn), an old value included, is a lower bound of the final one. It decides
    # nothing but which scores that lose to it are left unread: an anchor's own lane compares it, no branch depends on
    # it, so that lanes that see different values do no harm.
    image = (tl.program_id(0) // num_tiles).to(tl.int64)
    anchor = (tl.program_id(0) % num_tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = anchor < num_anchors
    start, end = _object_range(gt_offsets, stride_offsets, image, num_gt)

    rx1, ry1, rx2, ry2 = _load_box(anchors + anchor.to(tl.int64) * stride_anchors_a, stride_anchors_x, inside)
    ax1, ay1, ax2, ay2 = _finite_or_empty(rx1, ry1, rx2, ry2)
    area_a = (ax2 - ax1) * (ay2 - ay1)
    ux1, uy1, ux2, uy2 = _union(ax1, ay1, ax2, ay2)
    anchor_order = tl.zeros([BLOCK], tl.int32)
    anchor_owner = tl.zeros([BLOCK], tl.int32)
    if REGRESSED:
        px1, py1, px2, py2 = _load_pred_boxes(
            pred_boxes,
            image,
            anchor,
            inside,
            rx1,
            ry1,
            rx2,
            ry2,
            stride_pred_b,
            stride_pred_a,
            stride_pred_x,
            weight_x,
            weight_y,
            weight_w,
            weight_h,
            clip,
            DECODE,
        )
        area_p = (px2 - px1) * (py2 - py1)
        vx1, vy1, vx2, vy2 = _union(px1, py1, px2, py2)
        regressed_order = tl.zeros([BLOCK], tl.int32)
        regressed_owner = tl.zeros([BLOCK], tl.int32)
    if AMPLIFIED:
        scores = cls_scores + image * stride_scores_b + anchor.to(tl.int64) * stride_scores_a
        # The exponent of p = 1 bounds that of every p from above, after rounding too: each operation is monotone.
        largest_amplification = tl.div_rn(sigma - 1.0, sigma)
        amplified_order = tl.zeros([BLOCK], tl.int32)
        amplified_owner = tl.zeros([BLOCK], tl.int32)

    bit = tl.arange(0, _CHUNK)
    for first in range(start, end, _CHUNK):
        candidate = first + bit
        mask = candidate < end
        x1, y1, x2, y2 = _load_box(gt_boxes + candidate.to(tl.int64) * stride_gt_g, stride_gt_x, mask)
        valid = mask & _is_finite(x1) & _is_finite(y1) & _is_finite(x2) & _is_finite(y2) & (x2 > x1) & (y2 > y1)
        if CROWD:
            valid &= tl.load(gt_crowd + candidate.to(tl.int64) * stride_crowd, mask=mask, other=0) == 0
        x1, y1, x2, y2 = _finite_or_empty(x1, y1, x2, y2)
        power = tl.full([_CHUNK], 1, tl.int64) << bit.to(tl.int64)
        by_anchor = tl.sum(tl.where(valid & _overlaps(ux1, uy1, ux2, uy2, x1, y1, x2, y2), power, 0), 0)
        hits = by_anchor
        if REGRESSED:
            by_pred = tl.sum(tl.where(valid & _overlaps(vx1, vy1, vx2, vy2, x1, y1, x2, y2), power, 0), 0)
            hits = by_anchor | by_pred

        # Ascending, so that the first object to reach a quality keeps the anchor.
        while hits != 0:
            lowest, index = _lowest_bit(hits)
            hits ^= lowest
            n = first + index
            g = n - start
            gx1, gy1, gx2, gy2 = _load_box(gt_boxes + n.to(tl.int64) * stride_gt_g, stride_gt_x, n < end)
            area_g = (gx2 - gx1) * (gy2 - gy1)

            if (by_anchor & lowest) != 0:
                order = _iou_order(ax1, ay1, ax2, ay2, area_a, gx1, gy1, gx2, gy2, area_g)
                largest = tl.max(order, 0)
                if largest > 0:
                    _propose_best(best + n, order, largest, anchor)
                    better = order > anchor_order
                    anchor_order = tl.where(better, order, anchor_order)
                    anchor_owner = tl.where(better, g, anchor_owner)
                    if AMPLIFIED:
                        best_of_object = best + (1 + REGRESSED) * num_gt.to(tl.int64) + n
                        label = tl.load(gt_labels + n.to(tl.int64) * stride_labels).to(tl.int64)
                        overlapping = order > 0
                        log2_q = _log2(tl.where(overlapping, order.to(tl.float32, bitcast=True), 1.0))
                        bound = _exponent_order(largest_amplification * log2_q)
                        needed = overlapping & (
                            (bound > amplified_order) | (bound >= _key_order(tl.load(best_of_object, volatile=True)))
                        )
                        p = tl.zeros([BLOCK], tl.float32)
                        if (label >= 0) & (label < num_classes):
                            p = _class_probability(
                                tl.load(scores + label * stride_scores_c, mask=needed, other=0).to(tl.float32)
                            )
                        exponent = tl.div_rn(sigma - p, sigma) * log2_q
                        order = tl.where(needed, _exponent_order(exponent), 0)
                        largest = tl.max(order, 0)
                        if largest > 0:
                            _propose_best(best_of_object, order, largest, anchor)
                            better = order > amplified_order
                            amplified_order = tl.where(better, order, amplified_order)
                            amplified_owner = tl.where(better, g, amplified_owner)

            if REGRESSED:
                if (by_pred & lowest) != 0:
                    order = _iou_order(px1, py1, px2, py2, area_p, gx1, gy1, gx2, gy2, area_g)
                    largest = tl.max(order, 0)
                    if largest > 0:
                        _propose_best(best + num_gt.to(tl.int64) + n, order, largest, anchor)
                        better = order > regressed_order
                        regressed_order = tl.where(better, order, regressed_order)
                        regressed_owner = tl.where(better, g, regressed_owner)

    # Owners that win no best pair later are counted here, so that lists have room for them.
    row = batch_size * num_anchors.to(tl.int64)
    tile_keys = keys + image * num_anchors + anchor
    tl.store(tile_keys, _claim_key(anchor_order, anchor_owner), mask=inside)
    if REGRESSED:
        tl.store(tile_keys + row, _claim_key(regressed_order, regressed_owner), mask=inside)
        tl.atomic_add(counters + start + regressed_owner, 1, mask=regressed_order > 0, sem="relaxed")
    else:
        tl.atomic_add(counters + start + anchor_owner, 1, mask=anchor_order > 0, sem="relaxed")
    if AMPLIFIED:
        tl.store(tile_keys + (1 + REGRESSED) * row, _claim_key(amplified_order, amplified_owner), mask=inside)
        tl.atomic_add(
            counters + num_gt.to(tl.int64) + start + amplified_owner, 1, mask=amplified_order > 0, sem="relaxed"
        )
    elif REGRESSED:
        tl.atomic_add(counters + num_gt.to(tl.int64) + start + anchor_owner, 1, mask=anchor_order > 0, sem="relaxed")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _settle_kernel(
    keys,
    best,
    counters,
    list_starts,
    images_to_redo,
    gt_offsets,
    batch_size,
    num_anchors,
    num_gt,
    stride_offsets: tl.int64,
    REGRESSED: tl.constexpr,
    AMPLIFIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Gives every best pair quality 1, places the lists, and finds the images where an object that no anchor overlaps
    # owns anchors.
    #
    # Concurrent programs: none shares an image or an object. Two objects may claim one anchor: an atomic maximum of
    # their keys, the lower object wins in either order.
    image = tl.program_id(0).to(tl.int64)
    start, end = _object_range(gt_offsets, stride_offsets, image, num_gt)
    row = batch_size * num_anchors.to(tl.int64)
    gt_row = num_gt.to(tl.int64)
    image_keys = keys + image * num_anchors
    # An object's list has room for its natural owners and its best anchor: all lists fit in A + G_b entries.
    place_0 = image * num_anchors + start
    place_1 = place_0
    redo = 0
    for first in range(start, end, BLOCK):
        n = first + tl.arange(0, BLOCK)
        mask = n < end
        g = n - start
        by_anchor = tl.load(best + n, mask=mask, other=0)
        takes_part = by_anchor != 0
        forced = _claim_key(tl.where(takes_part, _FORCED_IOU_ORDER, 0), g)
        tl.atomic_max(image_keys + _key_index(by_anchor), forced, mask=takes_part, sem="relaxed")
        if REGRESSED:
            by_pred = tl.load(best + gt_row + n, mask=mask, other=0)
            redo = tl.maximum(redo, tl.max(((by_pred != 0) & (by_anchor == 0)).to(tl.int32), 0))
            index = _key_index(tl.where(by_pred != 0, by_pred, by_anchor))
            tl.atomic_max(image_keys + row + index, forced, mask=takes_part, sem="relaxed")
        if AMPLIFIED:
            # Never 0 for an object that takes part: its exponent is finite wherever q_anchor > 0.
            by_score = tl.load(best + (1 + REGRESSED) * gt_row + n, mask=mask, other=0)
            forced = _claim_key(tl.where(takes_part, _FORCED_EXPONENT_ORDER, 0), g)
            index = (1 + REGRESSED) * row + _key_index(by_score)
            tl.atomic_max(image_keys + index, forced, mask=takes_part, sem="relaxed")

        room = tl.load(counters + n, mask=mask, other=-1) + 1
        tl.store(list_starts + n, place_0 + tl.cumsum(room, 0) - room, mask=mask)
        place_0 += tl.sum(room, 0)
        if REGRESSED or AMPLIFIED:
            room = tl.load(counters + gt_row + n, mask=mask, other=-1) + 1
            tl.store(list_starts + gt_row + n, place_1 + tl.cumsum(room, 0) - room, mask=mask)
            place_1 += tl.sum(room, 0)
    tl.store(images_to_redo + image, redo)


@triton.jit
def _append(key, list_entries, list_starts, reserved, listed, start, anchor):
    owned = key != 0
    n = start + _key_index(key)
    place = tl.atomic_add(listed + n, 1, mask=owned, sem="relaxed")
    room = tl.load(reserved + n, mask=owned, other=0) + 1
    position = tl.load(list_starts + n, mask=owned, other=0) + place
    tl.store(list_entries + position, anchor, mask=owned & (place < room))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _own_kernel(
    cls_match,
    loc_match,
    keys,
    best,
    counters,
    list_starts,
    list_entries,
    images_to_redo,
    anchors,
    pred_boxes,
    gt_boxes,
    gt_offsets,
    gt_crowd,
    batch_size,
    num_anchors,
    num_gt,
    num_tiles,
    stride_anchors_a: tl.int64,
    stride_anchors_x: tl.int64,
    stride_pred_b: tl.int64,
    stride_pred_a: tl.int64,
    stride_pred_x: tl.int64,
    stride_gt_g: tl.int64,
    stride_gt_x: tl.int64,
    stride_offsets: tl.int64,
    stride_crowd: tl.int64,
    weight_x,
    weight_y,
    weight_w,
    weight_h,
    clip,
    iou_positive,
    iou_ignored,
    crowd_overlap,
    DECODE: tl.constexpr,
    REGRESSED: tl.constexpr,
    AMPLIFIED: tl.constexpr,
    CROWD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Final owners: counts, lists, and the labels of anchors that no object will choose.
    #
    # Concurrent programs: a tile's keys and labels are read and written by its one program. Counters see atomic
    # additions only; what an addition returns is a place in a list that no other anchor gets. Which anchor gets which
    # place changes from run to run: the ranking does not depend on it.
    image = (tl.program_id(0) // num_tiles).to(tl.int64)
    anchor = (tl.program_id(0) % num_tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = anchor < num_anchors
    start, end = _object_range(gt_offsets, stride_offsets, image, num_gt)
    row = batch_size * num_anchors.to(tl.int64)
    gt_row = num_gt.to(tl.int64)
    tile_keys = keys + image * num_anchors + anchor

    by_anchor = tl.load(tile_keys, mask=inside, other=0)
    n = start + _key_index(by_anchor)
    q_anchor = _key_order(by_anchor).to(tl.float32, bitcast=True)
    owned = by_anchor != 0
    tl.atomic_add(counters + _COUNT_POS * gt_row + n, 1, mask=owned & (q_anchor >= iou_positive), sem="relaxed")
    tl.atomic_add(counters + _COUNT_TOTAL * gt_row + n, 1, mask=owned & (q_anchor >= iou_ignored), sem="relaxed")

    by_cls = by_anchor
    if REGRESSED:
        by_cls = tl.load(tile_keys + row, mask=inside, other=0)
        if tl.load(images_to_redo + image) != 0:
            # Objects that no anchor overlaps have natural owners here: take the anchors from them.
            owner_best = tl.load(best + start + _key_index(by_cls), mask=by_cls != 0, other=1)
            stolen = owner_best == 0
            if tl.max(stolen.to(tl.int32), 0) != 0:
                ax1, ay1, ax2, ay2 = _load_box(
                    anchors + anchor.to(tl.int64) * stride_anchors_a, stride_anchors_x, inside
                )
                px1, py1, px2, py2 = _load_pred_boxes(
                    pred_boxes,
                    image,
                    anchor,
                    inside,
                    ax1,
                    ay1,
                    ax2,
                    ay2,
                    stride_pred_b,
                    stride_pred_a,
                    stride_pred_x,
                    weight_x,
                    weight_y,
                    weight_w,
                    weight_h,
                    clip,
                    DECODE,
                )
                area_p = (px2 - px1) * (py2 - py1)
                order = tl.zeros([BLOCK], tl.int32)
                owner = tl.zeros([BLOCK], tl.int32)
                for g in range(0, end - start):
                    m = start + g
                    best_by_anchor = tl.load(best + m)
                    if best_by_anchor != 0:
                        gx1, gy1, gx2, gy2 = _load_box(gt_boxes + m.to(tl.int64) * stride_gt_g, stride_gt_x, m < end)
                        area_g = (gx2 - gx1) * (gy2 - gy1)
                        quality = _iou_order(px1, py1, px2, py2, area_p, gx1, gy1, gx2, gy2, area_g)
                        best_by_pred = tl.load(best + gt_row + m)
                        best_by_pred = tl.where(best_by_pred != 0, best_by_pred, best_by_anchor)
                        quality = tl.where(anchor == _key_index(best_by_pred), _FORCED_IOU_ORDER, quality)
                        better = quality > order
                        order = tl.where(better, quality, order)
                        owner = tl.where(better, g, owner)
                by_cls = tl.where(stolen, _claim_key(order, owner), by_cls)
                tl.store(tile_keys + row, by_cls, mask=inside)
    list_size = row + gt_row
    _append(by_cls, list_entries, list_starts, counters, counters + _LISTED * gt_row, start, anchor)
    if REGRESSED or AMPLIFIED:
        by_loc = by_anchor
        if AMPLIFIED:
            by_loc = tl.load(tile_keys + (1 + REGRESSED) * row, mask=inside, other=0)
        _append(
            by_loc,
            list_entries + list_size,
            list_starts + gt_row,
            counters + gt_row,
            counters + (_LISTED + 1) * gt_row,
            start,
            anchor,
        )

    label = tl.full([BLOCK], _BACKGROUND, tl.int64)
    tl.store(loc_match + image * num_anchors + anchor, label, mask=inside)
    if CROWD:
        bx1, by1, bx2, by2 = _load_box(anchors + anchor.to(tl.int64) * stride_anchors_a, stride_anchors_x, inside)
        bx1, by1, bx2, by2 = _finite_or_empty(bx1, by1, bx2, by2)
        area = (bx2 - bx1) * (by2 - by1)
        for g in range(0, end - start):
            m = start + g
            if tl.load(gt_crowd + m.to(tl.int64) * stride_crowd) != 0:
                gx1, gy1, gx2, gy2 = _load_box(gt_boxes + m.to(tl.int64) * stride_gt_g, stride_gt_x, m < end)
                gx1, gy1, gx2, gy2 = _finite_or_empty(gx1, gy1, gx2, gy2)
                covered = _positive_ratio(_intersection_area(bx1, by1, bx2, by2, gx1, gy1, gx2, gy2), area)
                label = tl.where(covered >= crowd_overlap, _IGNORED, label)
    tl.store(cls_match + image * num_anchors + anchor, label, mask=inside)


@triton.jit
def _load_owned(image_keys, entries, listed, first, length, local, BLOCK: tl.constexpr):
    # A block of the anchors to rank: of the object's list, or (listed = 0) of the image, of which its own count.
    position = first + tl.arange(0, BLOCK)
    anchor = tl.where(listed > 0, tl.load(entries + position, mask=position < listed, other=0), position)
    key = tl.load(image_keys + anchor, mask=position < length, other=0)
    owned = (key != 0) & (_key_index(key) == local)
    # 62 bits: the order, then the lower anchor first. Different for different anchors.
    return anchor, (_key_order(key).to(tl.int64) << 31) | (anchor ^ _MAX_INDEX).to(tl.int64), owned


@triton.jit
def _nth_largest(n, image_keys, entries, listed, length, local, BLOCK: tl.constexpr):
    # A number that exactly n of the object's ranking keys reach (all of them, if it owns fewer).
    # Radix selection from the top: one histogram of 8 bits a pass, over the keys that agree with the bits found so far.
    bins = tl.arange(0, 256)
    found = tl.zeros([], tl.int64)
    threshold = tl.zeros([], tl.int64)
    shift = tl.full([], 56, tl.int64)
    missing = n
    while shift >= 0:
        histogram = tl.zeros([256], tl.int32)
        for first in range(0, length, BLOCK):
            _, key, owned = _load_owned(image_keys, entries, listed, first, length, local, BLOCK)
            agrees = owned & (((key >> shift) >> 8) == found)
            histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=agrees)
        # reach[d]: keys whose digit is at least d.
        reach = tl.sum(histogram, 0) - tl.cumsum(histogram, 0) + histogram
        digit = tl.sum((reach >= missing).to(tl.int32), 0) - 1
        if digit < 0:
            shift = tl.full([], -1, tl.int64)  # fewer keys than n: all of them reach 0
        else:
            missing -= tl.sum(tl.where(bins > digit, histogram, 0), 0)
            found = (found << 8) | digit.to(tl.int64)
            threshold = found << shift
            enough = tl.sum(tl.where(bins == digit, histogram, 0), 0) == missing
            shift = tl.where(enough, -1, shift - 8)
    return threshold


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _rank_kernel(
    cls_match,
    loc_match,
    num_pos,
    num_total,
    keys,
    best,
    counters,
    list_starts,
    list_entries,
    gt_offsets,
    batch_size,
    num_anchors,
    num_gt,
    longest_list,
    stride_offsets: tl.int64,
    REGRESSED: tl.constexpr,
    AMPLIFIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Ranks the anchors of one object for one task (for both where both rank by q_anchor) and labels those it chooses.
    #
    # Concurrent programs: keys, lists and counters are only read. An anchor has one owner in each ranking, and only its
    # owner's program for that ranking writes its label.
    n = tl.program_id(0) % num_gt
    ranking = tl.program_id(0) // num_gt
    row = batch_size * num_anchors.to(tl.int64)
    gt_row = num_gt.to(tl.int64)

    # The first offset above n ends its image; none does for capacity beyond the last one.
    end_of = batch_size + 1
    for first in range(0, batch_size + 1, 128):
        index = first + tl.arange(0, 128)
        offset = tl.load(gt_offsets + index * stride_offsets, mask=index <= batch_size, other=0).to(tl.int64)
        end_of = tl.minimum(end_of, tl.min(tl.where(offset > n, index, _MAX_INDEX), 0))
    image = end_of - 1

    positives = tl.zeros([], tl.int32)
    total = tl.zeros([], tl.int32)
    takes_part = (image >= 0) & (image < batch_size) & (tl.load(best + n) != 0)
    if takes_part:
        positives = tl.maximum(tl.load(counters + _COUNT_POS * gt_row + n), 1)
        total = tl.maximum(tl.load(counters + _COUNT_TOTAL * gt_row + n), positives)
    if ranking == 0:
        tl.store(num_pos + n, positives)
        tl.store(num_total + n, total)

    if takes_part:
        start, _ = _object_range(gt_offsets, stride_offsets, image.to(tl.int64), num_gt)
        local = n - start
        in_image = image.to(tl.int64) * num_anchors
        quality_row = tl.where(ranking == 0, 1 if REGRESSED else 0, 1 + REGRESSED if AMPLIFIED else 0)
        image_keys = keys + quality_row * row + in_image
        list_size = row + gt_row
        list_start = tl.load(list_starts + ranking * gt_row + n)
        length = tl.load(counters + (_LISTED + ranking) * gt_row + n)
        room = tl.load(counters + (_RESERVED + ranking) * gt_row + n) + 1
        complete = (length <= room) & (length <= longest_list)
        listed = tl.where(complete, length, 0)
        length = tl.where(complete, length, num_anchors)
        entries = list_entries + ranking * list_size + list_start

        least_positive = _nth_largest(positives, image_keys, entries, listed, length, local, BLOCK)
        least_chosen = least_positive
        if (ranking == 0) & (total > positives):
            least_chosen = _nth_largest(total, image_keys, entries, listed, length, local, BLOCK)
        for first in range(0, length, BLOCK):
            anchor, key, owned = _load_owned(image_keys, entries, listed, first, length, local, BLOCK)
            positive = owned & (key >= least_positive)
            label = tl.where(positive, local, _IGNORED).to(tl.int64)
            if ranking == 0:
                tl.store(cls_match + in_image + anchor, label, mask=owned & (key >= least_chosen))
            if (ranking == 1) | (not (REGRESSED or AMPLIFIED)):
                tl.store(loc_match + in_image + anchor, label, mask=positive)


# ---------------------------------------------------------------------------------------------------------------------
# Launch


def mutual_match(
    anchors: Tensor,
    pred_boxes: Tensor,
    cls_scores: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    gt_crowd: Tensor | None,
    box_coder: Sequence[float] | None,
    classification_by_regressed: bool,
    localization_by_amplified: bool,
    sigma: float,
    iou_positive: float,
    iou_ignored: float,
    crowd_overlap: float,
    longest_list: int = 0x7FFFFFFF,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of packed objects on the current stream of their device; takes what the operators take (csrc/schema.cpp).

    Args:
        longest_list: objects with a longer list than this rank by scanning all anchors; the result is the same.

    Returns:
        cls_match (B, A) int64, loc_match (B, A) int64, num_pos (N,) int32, num_total (N,) int32.

    Raises:
        ValueError: anchors or objects that 31 bits cannot number.
    """
    batch_size, num_anchors, num_classes = cls_scores.shape
    num_gt = gt_boxes.shape[0]
    device = anchors.device
    if max(num_anchors, num_gt) > 0x7FFFFFFF - RANK_BLOCK:
        raise ValueError(f"backend 'triton' numbers anchors and objects with 31 bits, got {num_anchors} and {num_gt}")
    if batch_size == 0 or num_anchors == 0 or num_gt == 0:
        cls_match = torch.full((batch_size, num_anchors), BACKGROUND, dtype=torch.int64, device=device)
        counts = torch.zeros(num_gt, dtype=torch.int32, device=device)
        return cls_match, cls_match.clone(), counts, counts.clone()

    cls_match = torch.empty((batch_size, num_anchors), dtype=torch.int64, device=device)
    loc_match = torch.empty_like(cls_match)
    num_pos = torch.empty(num_gt, dtype=torch.int32, device=device)
    num_total = torch.empty_like(num_pos)

    num_qualities = 1 + classification_by_regressed + localization_by_amplified
    num_rankings = 2 if num_qualities > 1 else 1
    per_object = torch.zeros((3 + NUM_COUNTERS // 2, num_gt), dtype=torch.int64, device=device)
    best, counters = per_object[:3], per_object[3:].view(torch.int32)
    keys = torch.empty((num_qualities, batch_size, num_anchors), dtype=torch.int64, device=device)
    list_entries = torch.empty((num_rankings, batch_size * num_anchors + num_gt), dtype=torch.int32, device=device)
    list_starts = torch.empty((num_rankings, num_gt), dtype=torch.int64, device=device)
    images_to_redo = torch.empty(batch_size, dtype=torch.int32, device=device)

    coder = box_coder or (1.0, 1.0, 1.0, 1.0, 0.0)  # without one it is never used
    # Without crowds the pointer is never read.
    crowd = gt_labels if gt_crowd is None else gt_crowd.view(torch.uint8)
    variant = {
        "REGRESSED": classification_by_regressed,
        "AMPLIFIED": localization_by_amplified,
        "enable_fp_fusion": False,
    }
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        num_tiles = triton.cdiv(num_anchors, CLAIM_BLOCK)
        _claim_kernel[(batch_size * num_tiles,)](
            keys,
            best,
            counters,
            anchors,
            pred_boxes,
            cls_scores,
            gt_boxes,
            gt_labels,
            gt_offsets,
            crowd,
            batch_size,
            num_anchors,
            num_gt,
            num_classes,
            num_tiles,
            *anchors.stride(),
            *pred_boxes.stride(),
            *cls_scores.stride(),
            *gt_boxes.stride(),
            gt_labels.stride(0),
            gt_offsets.stride(0),
            crowd.stride(0),
            *coder,
            sigma,
            DECODE=box_coder is not None,
            CROWD=gt_crowd is not None,
            BLOCK=CLAIM_BLOCK,
            num_warps=CLAIM_WARPS,
            **variant,
        )
        _settle_kernel[(batch_size,)](
            keys,
            best,
            counters,
            list_starts,
            images_to_redo,
            gt_offsets,
            batch_size,
            num_anchors,
            num_gt,
            gt_offsets.stride(0),
            BLOCK=SETTLE_BLOCK,
            num_warps=SETTLE_WARPS,
            **variant,
        )
        num_tiles = triton.cdiv(num_anchors, OWN_BLOCK)
        _own_kernel[(batch_size * num_tiles,)](
            cls_match,
            loc_match,
            keys,
            best,
            counters,
            list_starts,
            list_entries,
            images_to_redo,
            anchors,
            pred_boxes,
            gt_boxes,
            gt_offsets,
            crowd,
            batch_size,
            num_anchors,
            num_gt,
            num_tiles,
            *anchors.stride(),
            *pred_boxes.stride(),
            *gt_boxes.stride(),
            gt_offsets.stride(0),
            crowd.stride(0),
            *coder,
            iou_positive,
            iou_ignored,
            crowd_overlap,
            DECODE=box_coder is not None,
            CROWD=gt_crowd is not None,
            BLOCK=OWN_BLOCK,
            num_warps=OWN_WARPS,
            **variant,
        )
        _rank_kernel[(num_gt * num_rankings,)](
            cls_match,
            loc_match,
            num_pos,
            num_total,
            keys,
            best,
            counters,
            list_starts,
            list_entries,
            gt_offsets,
            batch_size,
            num_anchors,
            num_gt,
            longest_list,
            gt_offsets.stride(0),
            BLOCK=RANK_BLOCK,
            num_warps=RANK_WARPS,
            **variant,
        )
    return cls_match, loc_match, num_pos, num_total
