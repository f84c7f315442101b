"""The kernels of mutual matching in Triton, for a GPU without a compiler, and a second implementation of the CUDA ones.

A call is one memset and four launches, whatever the number of anchors and objects. Launch sizes depend on shapes alone
and nothing is read back, so a call can be captured in a CUDA graph (after one call that compiles the kernels).

1. `claim_kernel`, a program for 128 anchors of an image. Decodes the predicted boxes, takes every quality against each
   object that the tile's union box overlaps, keeps each anchor's best object in registers, and proposes each object's
   best anchor by a 64-bit atomic maximum. A class score is read only where q_anchor > 0 and it can still decide
   something.
2. `settle_kernel`, a program an image. Which objects take part is known now. Gives every best pair quality 1, which
   makes the counts final, and lays out one list an object and ranking, so that all lists of an image together fit in
   its anchors.
3. `own_kernel`, a program for 512 anchors. Owners are final now: appends anchors to their owner's lists, writes the
   labels of anchors that are not chosen.
4. `rank_kernel`, a program an (object, ranking). Finds the quality of the n-th best owned anchor by radix selection,
   8 bits a pass, and labels the anchors that reach it. The same loop runs over the object's list or, where the list
   does not suffice, over all anchors of the image.

An object owns up to a fifth of an image's anchors, most of which overlap it so little that it never chooses them. Its
list holds those of at least half of `iou_ignored`: where there are as many as it chooses, the ones it chooses are among
them, whatever the threshold. Where claiming finds too few of them, everything the object owns is listed, in what room
the others leave. A list does not suffice where anchors change hands after they were counted: when another object's best
pair takes one, or an object that no anchor overlaps had claimed some by their predicted boxes. Radix selection over all
anchors is slower, and exact for the same reason.

Memory beyond the outputs: per anchor of an image one key a quality (8 bytes) and one list entry a ranking (4 bytes),
32 bytes for `strategy="mutual"`; per object 48 bytes of maxima and counters, which the memset zeroes, and 32 bytes of
lists.

Arguments are addresses, integers and float32 numbers, none of which Triton specializes a kernel for: each kernel
compiles once a strategy, for all dtypes, strides, alignments and options.

Why these sizes. A claiming program is one warp: its reductions over the tile, up to six an object, are then shuffles
without a barrier. Its tile of 128 neighboring anchors is small enough for its union box to rule most objects out. Half
the tile takes two thirds of the registers and a sixth to a third more instructions an anchor, so that fewer anchors are
under way on a multiprocessor at a time. A list of an ordinary object fits one block of 1024.
"""

# Triton compiles these functions, and takes no annotations on their tensors.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import math
import struct

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from mg_ops.reference import BACKGROUND, IGNORED
from mg_ops.triton.assignment import (
    FORCED_EXPONENT_ORDER,
    FORCED_IOU_ORDER,
    MAX_INDEX,
    amplification,
    claim_key,
    class_probability,
    exponent_order,
    iou_order,
    key_index,
    key_order,
    order_iou,
)
from mg_ops.triton.box import (
    Box,
    bounds_of,
    box_area,
    box_iou,
    decode_box,
    finite_or_empty,
    intersection_area,
    is_object,
    load_columns,
    load_row,
    load_rows,
    overlaps,
    positive_ratio,
)
from mg_ops.triton.det_math import log2
from mg_ops.triton.inputs import array, load_boxes, load_numbers

_BACKGROUND = tl.constexpr(BACKGROUND)
_IGNORED = tl.constexpr(IGNORED)
_CHUNK = tl.constexpr(32)  # objects tested against a tile at once; their hits are the bits of one integer
_EVERYTHING = tl.constexpr(1)  # the order that every anchor of an object has

# Rows of the per-object counters.
_NUM_FRONT = tl.constexpr(0)  # + list: anchors the object owns, before best pairs get quality 1, that a list is for
_LISTED = tl.constexpr(2)  # + list: entries the object asked for
_NUM_POS = tl.constexpr(4)
_NUM_TOTAL = tl.constexpr(5)
NUM_COUNTERS = 6


@triton.jit
def _object_range(gt_offsets, image, num_gt):
    # The largest offset so far, within 0 and N: images share no object, and none leads out of bounds.
    lane = tl.arange(0, 32)
    largest = tl.zeros([32], tl.int64)
    for first in range(0, image + 1, 32):
        index = first + lane
        largest = tl.maximum(largest, tl.load(gt_offsets + index, mask=index <= image, other=0))
    start = tl.minimum(tl.max(largest, 0), num_gt)
    end = tl.minimum(tl.maximum(tl.load(gt_offsets + image + 1), start), num_gt)
    return start.to(tl.int32), end.to(tl.int32)


@triton.jit
def _lowest_bit(bits):
    # Index of the lowest bit set: a power of two is its own float's exponent.
    lowest = bits & -bits
    return lowest, (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _propose_best(best_of_object, order, largest, anchor):
    first = tl.min(tl.where(order == largest, anchor, MAX_INDEX), 0)
    tl.atomic_max(best_of_object, claim_key(largest, first), sem="relaxed")


@triton.jit
def _load_pred_boxes(pred_boxes, boxes_type, image, anchor, mask, anchor_box, strides, decode, coder):
    """The predicted boxes of a tile, decoded where they are deltas; empty where they are not finite."""
    x1, y1, x2, y2 = load_boxes(pred_boxes, image, anchor, strides, mask, boxes_type)
    if decode != 0:
        x1, y1, x2, y2 = decode_box(anchor_box, (x1, y1, x2, y2), coder)
    return finite_or_empty(Box(x1, y1, x2, y2))


@triton.jit
def _load_anchors(anchors, anchor, mask):
    return load_rows(array(anchors, tl.float32, 16) + 4 * anchor.to(tl.int64), mask)


_INTEGERS = (
    *("scratch", "per_object", "cls_match", "loc_match", "num_pos", "num_total"),
    *("anchors", "pred_boxes", "cls_scores", "gt_boxes", "gt_labels", "gt_offsets", "gt_crowd"),
    *("batch_size", "num_anchors", "num_gt", "num_classes", "longest_list"),
    *("boxes_type", "scores_type", "decode", "are_probabilities", "listed_iou", "listed_exponent"),
    *("stride_boxes_b", "stride_boxes_a", "stride_boxes_x", "stride_scores_b", "stride_scores_a", "stride_scores_c"),
)
"""Every integer argument: none compiles a kernel anew when it happens to be 1 or a multiple of 16. In a tuple they
would, so strides are not in one."""


# ---------------------------------------------------------------------------------------------------------------------
# Memory between the launches. `per_object`, zeroed before: maxima, then counters. `scratch`: all else.


@triton.jit
def _maxima(per_object):
    # (qualities, N) int64: claim_key(quality, anchor) of each object's best anchor; 0: every quality is 0.
    return array(per_object, tl.int64)


@triton.jit
def _counters(per_object, num_gt):
    # (NUM_COUNTERS, N) int32.
    return array(per_object + 24 * num_gt.to(tl.int64), tl.int32)


@triton.jit
def _keys(scratch):
    # (qualities, B, A) int64: claim_key(quality, owner) of each anchor; 0: none.
    return array(scratch, tl.int64)


@triton.jit
def _list_starts(scratch, num_keys, num_gt):
    # (rankings, N) int64: the object's first entry.
    return array(scratch + 8 * num_keys, tl.int64)


@triton.jit
def _list_rooms(scratch, num_keys, num_gt):
    # (rankings, N) int32: how many entries fit.
    return array(scratch + 8 * num_keys + 16 * num_gt.to(tl.int64), tl.int32)


@triton.jit
def _list_orders(scratch, num_keys, num_gt):
    # (rankings, N) int32: the least order of an anchor in the list.
    return array(scratch + 8 * num_keys + 24 * num_gt.to(tl.int64), tl.int32)


@triton.jit
def _images_to_redo(scratch, num_keys, num_gt):
    # (B,) int32: whether an object that no anchor overlaps owns anchors.
    return array(scratch + 8 * num_keys + 32 * num_gt.to(tl.int64), tl.int32)


@triton.jit
def _list_entries(scratch, num_keys, num_gt, batch_size):
    # (rankings, B * A + N) int32: anchors. An image's lists have A + G entries.
    return array(scratch + 8 * num_keys + 32 * num_gt.to(tl.int64) + 4 * batch_size.to(tl.int64), tl.int32)


def listed_orders(iou_ignored: float) -> tuple[int, int]:
    """The least IoU and the least exponent of an anchor for a list, as orders: those of half of `iou_ignored`."""
    least = max(iou_ignored / 2, 2.0**-126)  # a normal number, so never _EVERYTHING
    bits = struct.unpack("<2i", struct.pack("<2f", least, math.log2(least)))
    return bits[0], ~bits[1] & 0x7FFFFFFF


def scratch_bytes(batch_size: int, num_anchors: int, num_gt: int, num_qualities: int) -> int:
    """What the kernels keep in `scratch`."""
    num_lists = 2 if num_qualities > 1 else 1
    entries = num_lists * (batch_size * num_anchors + num_gt)
    return 8 * num_qualities * batch_size * num_anchors + 32 * num_gt + 4 * batch_size + 4 * entries


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=_INTEGERS)
def claim_kernel(
    scratch: tl.int64,
    per_object: tl.int64,
    anchors: tl.int64,
    pred_boxes: tl.int64,
    cls_scores: tl.int64,
    gt_boxes: tl.int64,
    gt_labels: tl.int64,
    gt_offsets: tl.int64,
    gt_crowd: tl.int64,
    batch_size: tl.int32,
    num_anchors: tl.int32,
    num_gt: tl.int32,
    num_classes: tl.int64,
    boxes_type: tl.int32,
    scores_type: tl.int32,
    decode: tl.int32,
    are_probabilities: tl.int32,
    stride_boxes_b: tl.int64,
    stride_boxes_a: tl.int64,
    stride_boxes_x: tl.int64,
    stride_scores_b: tl.int64,
    stride_scores_a: tl.int64,
    stride_scores_c: tl.int64,
    weight_x: tl.float32,
    weight_y: tl.float32,
    weight_w: tl.float32,
    weight_h: tl.float32,
    clip: tl.float32,
    sigma: tl.float32,
    iou_positive: tl.float32,
    iou_ignored: tl.float32,
    listed_iou: tl.int32,
    listed_exponent: tl.int32,
    REGRESSED: tl.constexpr,
    AMPLIFIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Natural owners of a tile's anchors (before best pairs get quality 1), and proposals for objects' best anchors.

    owner[a] = argmax_g q[a, g] and best[g] = argmax_a q[a, g], ties to the lower index, for each q of

        q_anchor    = IoU(anchor a, object g)
        q_regressed = IoU(predicted box a, object g)
        q_amplified = q_anchor ** ((sigma - p[a, label g]) / sigma), compared by ((sigma - p) / sigma) * log2(q_anchor)
    """
    # Concurrent programs: a tile's keys are written by its one program. `best` and `counters` only see atomic maxima
    # and additions, whose result does not depend on their order. `best` is also read while others raise it: whatever is
    # seen (an aligned 64-bit load is never torn), an old value included, is a lower bound of the final one. It decides
    # nothing but which scores that lose to it are left unread: an anchor's own lane compares it, no branch depends on
    # it, so that lanes that see different values do no harm.
    num_tiles = tl.cdiv(num_anchors, BLOCK)
    image = (tl.program_id(0) // num_tiles).to(tl.int64)
    anchor = (tl.program_id(0) % num_tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = anchor < num_anchors
    start, end = _object_range(array(gt_offsets, tl.int64), image, num_gt)
    best = _maxima(per_object)
    counters = _counters(per_object, num_gt)
    objects = array(gt_boxes, tl.float32, 16)
    gt_row = num_gt.to(tl.int64)

    given_box = _load_anchors(anchors, anchor, inside)
    anchor_box = finite_or_empty(given_box)
    anchor_area = box_area(anchor_box)
    anchor_bounds = bounds_of(anchor_box)
    anchor_order = tl.zeros([BLOCK], tl.int32)
    anchor_owner = tl.zeros([BLOCK], tl.int32)
    if REGRESSED:
        strides = (stride_boxes_b, stride_boxes_a, stride_boxes_x)
        coder = (weight_x, weight_y, weight_w, weight_h, clip)
        pred_box = _load_pred_boxes(pred_boxes, boxes_type, image, anchor, inside, given_box, strides, decode, coder)
        pred_area = box_area(pred_box)
        pred_bounds = bounds_of(pred_box)
        regressed_order = tl.zeros([BLOCK], tl.int32)
        regressed_owner = tl.zeros([BLOCK], tl.int32)
    if AMPLIFIED:
        # The exponent of p = 1 bounds that of every p from above, after rounding too: each operation is monotone.
        least_amplification = amplification(1.0, sigma)
        amplified_order = tl.zeros([BLOCK], tl.int32)
        amplified_owner = tl.zeros([BLOCK], tl.int32)

    # The largest order of the tile, so that a tile that has nothing to count does not.
    largest_by_anchor = 0
    largest_by_pred = 0
    largest_by_score = 0
    bit = tl.arange(0, _CHUNK)
    for first in range(start, end, _CHUNK):
        candidate = first + bit
        mask = candidate < end
        candidate_box = load_columns(objects + 4 * candidate.to(tl.int64), 1, mask)
        valid = mask & is_object(candidate_box)
        if gt_crowd != 0:
            valid &= tl.load(array(gt_crowd, tl.uint8) + candidate, mask=mask, other=0) == 0
        candidate_box = finite_or_empty(candidate_box)
        power = tl.full([_CHUNK], 1, tl.int64) << bit.to(tl.int64)
        by_anchor = tl.sum(tl.where(valid & overlaps(anchor_bounds, candidate_box), power, 0), 0)
        hits = by_anchor
        if REGRESSED:
            by_pred = tl.sum(tl.where(valid & overlaps(pred_bounds, candidate_box), power, 0), 0)
            hits = by_anchor | by_pred

        # Ascending, so that the first object to reach a quality keeps the anchor.
        while hits != 0:
            lowest, index = _lowest_bit(hits)
            hits ^= lowest
            n = first + index
            g = n - start
            gt_box = load_row(objects, n)
            gt_area = box_area(gt_box)

            if (by_anchor & lowest) != 0:
                order = iou_order(box_iou(anchor_box, anchor_area, gt_box, gt_area))
                largest = tl.max(order, 0)
                if largest > 0:
                    largest_by_anchor = tl.maximum(largest_by_anchor, largest)
                    _propose_best(best + n, order, largest, anchor)
                    better = order > anchor_order
                    anchor_order = tl.where(better, order, anchor_order)
                    anchor_owner = tl.where(better, g, anchor_owner)
                    if AMPLIFIED:
                        best_of_object = best + (1 + REGRESSED) * gt_row + n
                        label = tl.load(array(gt_labels, tl.int64) + n)
                        overlapping = order > 0
                        log2_q = log2(tl.where(overlapping, order_iou(order), 1.0))
                        bound = exponent_order(least_amplification * log2_q)
                        # From the L2 cache, where the maxima are made.
                        best_so_far = key_order(tl.load(best_of_object, cache_modifier=".cg"))
                        needed = overlapping & ((bound > amplified_order) | (bound >= best_so_far))
                        p = tl.zeros([BLOCK], tl.float32)
                        if (label >= 0) & (label < num_classes):
                            scores = image * stride_scores_b + label * stride_scores_c
                            scores += anchor.to(tl.int64) * stride_scores_a
                            score = load_numbers(cls_scores, scores, needed, scores_type)
                            p = class_probability(score, are_probabilities)
                        order = tl.where(needed, exponent_order(amplification(p, sigma) * log2_q), 0)
                        largest = tl.max(order, 0)
                        if largest > 0:
                            largest_by_score = tl.maximum(largest_by_score, largest)
                            _propose_best(best_of_object, order, largest, anchor)
                            better = order > amplified_order
                            amplified_order = tl.where(better, order, amplified_order)
                            amplified_owner = tl.where(better, g, amplified_owner)

            if REGRESSED:
                if (by_pred & lowest) != 0:
                    order = iou_order(box_iou(pred_box, pred_area, gt_box, gt_area))
                    largest = tl.max(order, 0)
                    if largest > 0:
                        largest_by_pred = tl.maximum(largest_by_pred, largest)
                        _propose_best(best + gt_row + n, order, largest, anchor)
                        better = order > regressed_order
                        regressed_order = tl.where(better, order, regressed_order)
                        regressed_owner = tl.where(better, g, regressed_owner)

    row = batch_size * num_anchors.to(tl.int64)
    tile_keys = _keys(scratch) + image * num_anchors + anchor
    tl.store(tile_keys, claim_key(anchor_order, anchor_owner), mask=inside)
    if (largest_by_anchor > 0) & (order_iou(largest_by_anchor) >= iou_ignored):
        q_anchor = order_iou(anchor_order)
        owned = anchor_order > 0
        _count(counters + _NUM_POS * gt_row + start, anchor_owner, owned & (q_anchor >= iou_positive))
        _count(counters + _NUM_TOTAL * gt_row + start, anchor_owner, owned & (q_anchor >= iou_ignored))
    fronts = counters + _NUM_FRONT * gt_row + start
    if REGRESSED:
        tl.store(tile_keys + row, claim_key(regressed_order, regressed_owner), mask=inside)
        if largest_by_pred >= listed_iou:
            _count(fronts, regressed_owner, regressed_order >= listed_iou)
    elif largest_by_anchor >= listed_iou:
        _count(fronts, anchor_owner, anchor_order >= listed_iou)
    if AMPLIFIED:
        tl.store(tile_keys + (1 + REGRESSED) * row, claim_key(amplified_order, amplified_owner), mask=inside)
        if largest_by_score >= listed_exponent:
            _count(fronts + gt_row, amplified_owner, amplified_order >= listed_exponent)
    elif REGRESSED:
        if largest_by_anchor >= listed_iou:
            _count(fronts + gt_row, anchor_owner, anchor_order >= listed_iou)


@triton.jit
def _count(counters, owner, mask):
    tl.atomic_add(counters + owner, 1, mask=mask, sem="relaxed")


@triton.jit
def _lists_to_lay_out(counters, ranking, n, mask, gt_row):
    # How many entries objects need, and whether that is enough for what they choose, from what claiming counted.
    front = tl.load(counters + (_NUM_FRONT + ranking) * gt_row + n, mask=mask, other=-1) + 1
    chosen = tl.load(counters + (_NUM_TOTAL - ranking) * gt_row + n, mask=mask, other=0)
    return front, mask & (front <= chosen + 1)


@triton.jit(do_not_specialize=_INTEGERS)
def settle_kernel(
    scratch: tl.int64,
    per_object: tl.int64,
    gt_offsets: tl.int64,
    batch_size: tl.int32,
    num_anchors: tl.int32,
    num_gt: tl.int32,
    iou_positive: tl.float32,
    iou_ignored: tl.float32,
    listed_iou: tl.int32,
    listed_exponent: tl.int32,
    REGRESSED: tl.constexpr,
    AMPLIFIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """q[best[g], g] = 1 for every object, of two the lower; room for a list of the anchors that an object may choose.

    n_pos[g]   = |{a owned by g: q_anchor[a, g] >= iou_positive}|
    n_total[g] = |{a owned by g: q_anchor[a, g] >= iou_ignored}|

    Finds the images where an object that no anchor overlaps owns anchors.
    """
    # Concurrent programs: none shares an image or an object. Two objects may claim one anchor: an atomic maximum of
    # their keys, the lower object wins in either order. Whoever raises an anchor's key learns from whom it takes the
    # anchor: each step of a chain moves it from one object's count to the next one's, so the last one's has it.
    image = tl.program_id(0).to(tl.int64)
    start, end = _object_range(array(gt_offsets, tl.int64), image, num_gt)
    row = batch_size * num_anchors.to(tl.int64)
    num_keys = (1 + REGRESSED + AMPLIFIED) * row
    gt_row = num_gt.to(tl.int64)
    best = _maxima(per_object)
    counters = _counters(per_object, num_gt)
    list_starts = _list_starts(scratch, num_keys, num_gt)
    list_rooms = _list_rooms(scratch, num_keys, num_gt)
    list_orders = _list_orders(scratch, num_keys, num_gt)

    two_lists: tl.constexpr = REGRESSED or AMPLIFIED
    num_entries = num_anchors + end - start
    fronts_0 = tl.zeros([BLOCK], tl.int32)
    fronts_1 = tl.zeros([BLOCK], tl.int32)
    num_short_0 = tl.zeros([BLOCK], tl.int32)
    num_short_1 = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        n = first + tl.arange(0, BLOCK)
        takes_part = tl.load(best + n, mask=n < end, other=0) != 0
        front, short = _lists_to_lay_out(counters, 0, n, takes_part, gt_row)
        fronts_0 += front
        num_short_0 += short.to(tl.int32)
        if two_lists:
            front, short = _lists_to_lay_out(counters, 1, n, takes_part, gt_row)
            fronts_1 += front
            num_short_1 += short.to(tl.int32)
    # What the others leave, in equal parts for those that need more than their front.
    more_0 = (num_entries - tl.sum(fronts_0, 0)) // tl.maximum(tl.sum(num_short_0, 0), 1)
    more_1 = (num_entries - tl.sum(fronts_1, 0)) // tl.maximum(tl.sum(num_short_1, 0), 1)
    place_0 = image * num_anchors + start
    place_1 = place_0
    for first in range(start, end, BLOCK):
        n = first + tl.arange(0, BLOCK)
        mask = n < end
        takes_part = tl.load(best + n, mask=mask, other=0) != 0
        front, short = _lists_to_lay_out(counters, 0, n, takes_part, gt_row)
        room = front + tl.where(short, more_0, 0)
        tl.store(list_starts + n, place_0 + tl.cumsum(room, 0) - room, mask=mask)
        tl.store(list_rooms + n, room, mask=mask)
        tl.store(list_orders + n, tl.where(short, _EVERYTHING, listed_iou), mask=mask)
        place_0 += tl.sum(room, 0)
        if two_lists:
            front, short = _lists_to_lay_out(counters, 1, n, takes_part, gt_row)
            room = front + tl.where(short, more_1, 0)
            order = listed_exponent if AMPLIFIED else listed_iou
            tl.store(list_starts + gt_row + n, place_1 + tl.cumsum(room, 0) - room, mask=mask)
            tl.store(list_rooms + gt_row + n, room, mask=mask)
            tl.store(list_orders + gt_row + n, tl.where(short, _EVERYTHING, order), mask=mask)
            place_1 += tl.sum(room, 0)

    # What is read above changes below.
    tl.debug_barrier()
    redo = tl.zeros([BLOCK], tl.int32)
    image_keys = _keys(scratch) + image * num_anchors
    for first in range(start, end, BLOCK):
        n = first + tl.arange(0, BLOCK)
        mask = n < end
        g = n - start
        by_anchor = tl.load(best + n, mask=mask, other=0)
        takes_part = by_anchor != 0
        forced = claim_key(tl.where(takes_part, FORCED_IOU_ORDER, 0), g)
        before = tl.atomic_max(image_keys + key_index(by_anchor), forced, mask=takes_part, sem="relaxed")
        raised = takes_part & (forced > before)
        _count(counters + _NUM_POS * gt_row, n, raised)
        _count(counters + _NUM_TOTAL * gt_row, n, raised)
        taken = raised & (before != 0)
        q_before = order_iou(key_order(before))
        loser = start + key_index(before)
        pos = counters + _NUM_POS * gt_row + loser
        tl.atomic_add(pos, -1, mask=taken & (q_before >= iou_positive), sem="relaxed")
        total = counters + _NUM_TOTAL * gt_row + loser
        tl.atomic_add(total, -1, mask=taken & (q_before >= iou_ignored), sem="relaxed")
        if REGRESSED:
            by_pred = tl.load(best + gt_row + n, mask=mask, other=0)
            redo |= ((by_pred != 0) & (by_anchor == 0)).to(tl.int32)
            index = key_index(tl.where(by_pred != 0, by_pred, by_anchor))
            tl.atomic_max(image_keys + row + index, forced, mask=takes_part, sem="relaxed")
        if AMPLIFIED:
            # Never 0 for an object that takes part: its exponent is finite wherever q_anchor > 0.
            by_score = tl.load(best + (1 + REGRESSED) * gt_row + n, mask=mask, other=0)
            forced = claim_key(tl.where(takes_part, FORCED_EXPONENT_ORDER, 0), g)
            index = (1 + REGRESSED) * row + key_index(by_score)
            tl.atomic_max(image_keys + index, forced, mask=takes_part, sem="relaxed")
    tl.store(_images_to_redo(scratch, num_keys, num_gt) + image, tl.max(redo, 0))


@triton.jit
def _append(key, list_entries, list_starts, list_rooms, list_orders, listed, start, anchor):
    owned = key != 0
    n = start + key_index(key)
    wanted = owned & (key_order(key) >= tl.load(list_orders + n, mask=owned, other=0))
    place = tl.atomic_add(listed + n, 1, mask=wanted, sem="relaxed")
    room = tl.load(list_rooms + n, mask=wanted, other=0)
    position = tl.load(list_starts + n, mask=wanted, other=0) + place
    tl.store(list_entries + position, anchor, mask=wanted & (place < room))


@triton.jit(do_not_specialize=_INTEGERS)
def own_kernel(
    cls_match: tl.int64,
    loc_match: tl.int64,
    scratch: tl.int64,
    per_object: tl.int64,
    anchors: tl.int64,
    pred_boxes: tl.int64,
    gt_boxes: tl.int64,
    gt_offsets: tl.int64,
    gt_crowd: tl.int64,
    batch_size: tl.int32,
    num_anchors: tl.int32,
    num_gt: tl.int32,
    boxes_type: tl.int32,
    decode: tl.int32,
    stride_boxes_b: tl.int64,
    stride_boxes_a: tl.int64,
    stride_boxes_x: tl.int64,
    weight_x: tl.float32,
    weight_y: tl.float32,
    weight_w: tl.float32,
    weight_h: tl.float32,
    clip: tl.float32,
    crowd_overlap: tl.float32,
    REGRESSED: tl.constexpr,
    AMPLIFIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Final owners: lists, and the labels of anchors that no object will choose.

    cls_match[a] = ignored where intersection(a, crowd) / area(a) >= crowd_overlap, else background
    """
    # Concurrent programs: a tile's keys and labels are read and written by its one program. Counters see atomic
    # additions only; what an addition returns is a place in a list that no other anchor gets. Which anchor gets which
    # place changes from run to run: the ranking does not depend on it.
    num_tiles = tl.cdiv(num_anchors, BLOCK)
    image = (tl.program_id(0) // num_tiles).to(tl.int64)
    anchor = (tl.program_id(0) % num_tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = anchor < num_anchors
    start, end = _object_range(array(gt_offsets, tl.int64), image, num_gt)
    row = batch_size * num_anchors.to(tl.int64)
    num_keys = (1 + REGRESSED + AMPLIFIED) * row
    gt_row = num_gt.to(tl.int64)
    tile_keys = _keys(scratch) + image * num_anchors + anchor
    best = _maxima(per_object)
    listed = _counters(per_object, num_gt) + _LISTED * gt_row
    list_starts = _list_starts(scratch, num_keys, num_gt)
    list_rooms = _list_rooms(scratch, num_keys, num_gt)
    list_orders = _list_orders(scratch, num_keys, num_gt)
    list_entries = _list_entries(scratch, num_keys, num_gt, batch_size)
    objects = array(gt_boxes, tl.float32, 16)

    by_cls = tl.load(tile_keys + (row if REGRESSED else 0), mask=inside, other=0)
    if REGRESSED:
        if tl.load(_images_to_redo(scratch, num_keys, num_gt) + image) != 0:
            # Objects that no anchor overlaps have natural owners here: take the anchors from them.
            owner_best = tl.load(best + start + key_index(by_cls), mask=by_cls != 0, other=1)
            stolen = owner_best == 0
            if tl.max(stolen.to(tl.int32), 0) != 0:
                given_box = _load_anchors(anchors, anchor, inside)
                strides = (stride_boxes_b, stride_boxes_a, stride_boxes_x)
                coder = (weight_x, weight_y, weight_w, weight_h, clip)
                pred_box = _load_pred_boxes(
                    pred_boxes, boxes_type, image, anchor, inside, given_box, strides, decode, coder
                )
                pred_area = box_area(pred_box)
                order = tl.zeros([BLOCK], tl.int32)
                owner = tl.zeros([BLOCK], tl.int32)
                for g in range(0, end - start):
                    m = start + g
                    best_by_anchor = tl.load(best + m)
                    if best_by_anchor != 0:
                        gt_box = load_row(objects, m)
                        quality = iou_order(box_iou(pred_box, pred_area, gt_box, box_area(gt_box)))
                        best_by_pred = tl.load(best + gt_row + m)
                        best_by_pred = tl.where(best_by_pred != 0, best_by_pred, best_by_anchor)
                        quality = tl.where(anchor == key_index(best_by_pred), FORCED_IOU_ORDER, quality)
                        better = quality > order
                        order = tl.where(better, quality, order)
                        owner = tl.where(better, g, owner)
                by_cls = tl.where(stolen, claim_key(order, owner), by_cls)
                tl.store(tile_keys + row, by_cls, mask=inside)
    _append(by_cls, list_entries, list_starts, list_rooms, list_orders, listed, start, anchor)
    if REGRESSED or AMPLIFIED:
        by_loc = by_cls
        if REGRESSED:
            by_loc = tl.load(tile_keys + (2 * row if AMPLIFIED else 0), mask=inside, other=0)
        elif AMPLIFIED:
            by_loc = tl.load(tile_keys + row, mask=inside, other=0)
        list_entries += row + gt_row
        _append(
            by_loc,
            list_entries,
            list_starts + gt_row,
            list_rooms + gt_row,
            list_orders + gt_row,
            listed + gt_row,
            start,
            anchor,
        )

    label = tl.full([BLOCK], _BACKGROUND, tl.int64)
    tl.store(array(loc_match, tl.int64) + image * num_anchors + anchor, label, mask=inside)
    if gt_crowd != 0:
        anchor_box = finite_or_empty(_load_anchors(anchors, anchor, inside))
        anchor_area = box_area(anchor_box)
        for g in range(0, end - start):
            m = start + g
            if tl.load(array(gt_crowd, tl.uint8) + m) != 0:
                crowd_box = finite_or_empty(load_row(objects, m))
                covered = positive_ratio(intersection_area(anchor_box, crowd_box), anchor_area)
                label = tl.where(covered >= crowd_overlap, _IGNORED, label)
    tl.store(array(cls_match, tl.int64) + image * num_anchors + anchor, label, mask=inside)


@triton.jit
def _load_owned(image_keys, entries, listed, first, length, local, BLOCK: tl.constexpr):
    # A block of the anchors to rank: of the object's list, or (listed = 0) of the image, of which its own count.
    position = first + tl.arange(0, BLOCK)
    anchor = tl.where(listed > 0, tl.load(entries + position, mask=position < listed, other=0), position)
    key = tl.load(image_keys + anchor, mask=position < length, other=0)
    owned = (key != 0) & (key_index(key) == local)
    # 62 bits: the order, then the lower anchor first. Different for different anchors.
    return anchor, (key_order(key).to(tl.int64) << 31) | (anchor ^ MAX_INDEX).to(tl.int64), owned


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


@triton.jit(do_not_specialize=_INTEGERS)
def rank_kernel(
    cls_match: tl.int64,
    loc_match: tl.int64,
    num_pos: tl.int64,
    num_total: tl.int64,
    scratch: tl.int64,
    per_object: tl.int64,
    gt_offsets: tl.int64,
    batch_size: tl.int32,
    num_anchors: tl.int32,
    num_gt: tl.int32,
    longest_list: tl.int32,
    REGRESSED: tl.constexpr,
    AMPLIFIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Ranks the anchors of one object for one task (for both where both rank by q_anchor) and labels those it chooses.

    Of the anchors it owns the max(n_pos, 1) of largest quality are positive; for classification the next, up to
    n_total, are ignored. Ties to the lower anchor.
    """
    # Concurrent programs: keys, lists and counters are only read. An anchor has one owner in each ranking, and only its
    # owner's program for that ranking writes its label.
    n = tl.program_id(0) % num_gt
    ranking = tl.program_id(0) // num_gt
    row = batch_size * num_anchors.to(tl.int64)
    num_keys = (1 + REGRESSED + AMPLIFIED) * row
    gt_row = num_gt.to(tl.int64)
    offsets = array(gt_offsets, tl.int64)
    best = _maxima(per_object)
    counters = _counters(per_object, num_gt)
    list_n = ranking * gt_row + n

    # The first offset above n ends its image; none does for capacity beyond the last one.
    end_of = batch_size + 1
    for first in range(0, batch_size + 1, 128):
        index = first + tl.arange(0, 128)
        offset = tl.load(offsets + index, mask=index <= batch_size, other=0)
        end_of = tl.minimum(end_of, tl.min(tl.where(offset > n, index, MAX_INDEX), 0))
    image = end_of - 1

    positives = tl.zeros([], tl.int32)
    total = tl.zeros([], tl.int32)
    takes_part = (image >= 0) & (image < batch_size) & (tl.load(best + n) != 0)
    if takes_part:
        positives = tl.maximum(tl.load(counters + _NUM_POS * gt_row + n), 1)
        total = tl.maximum(tl.load(counters + _NUM_TOTAL * gt_row + n), positives)
    if ranking == 0:
        tl.store(array(num_pos, tl.int32) + n, positives)
        tl.store(array(num_total, tl.int32) + n, total)

    if takes_part:
        start, _ = _object_range(offsets, image.to(tl.int64), num_gt)
        local = n - start
        in_image = image.to(tl.int64) * num_anchors
        quality_row = tl.where(ranking == 0, 1 if REGRESSED else 0, 1 + REGRESSED if AMPLIFIED else 0)
        image_keys = _keys(scratch) + quality_row * row + in_image
        list_start = tl.load(_list_starts(scratch, num_keys, num_gt) + list_n)
        room = tl.load(_list_rooms(scratch, num_keys, num_gt) + list_n)
        holds_all = tl.load(_list_orders(scratch, num_keys, num_gt) + list_n) == _EVERYTHING
        length = tl.load(counters + _LISTED * gt_row + list_n)
        chosen = tl.where(ranking == 0, total, positives)
        suffices = (length <= room) & (length <= longest_list) & (holds_all | (length >= chosen))
        listed = tl.where(suffices, length, 0)
        length = tl.where(suffices, length, num_anchors)
        entries = _list_entries(scratch, num_keys, num_gt, batch_size) + ranking * (row + gt_row) + list_start

        least_positive = _nth_largest(positives, image_keys, entries, listed, length, local, BLOCK)
        least_chosen = least_positive
        if (ranking == 0) & (total > positives):
            least_chosen = _nth_largest(total, image_keys, entries, listed, length, local, BLOCK)
        for first in range(0, length, BLOCK):
            anchor, key, owned = _load_owned(image_keys, entries, listed, first, length, local, BLOCK)
            positive = owned & (key >= least_positive)
            label = tl.where(positive, local, _IGNORED).to(tl.int64)
            if ranking == 0:
                tl.store(array(cls_match, tl.int64) + in_image + anchor, label, mask=owned & (key >= least_chosen))
            if (ranking == 1) | (not (REGRESSED or AMPLIFIED)):
                tl.store(array(loc_match, tl.int64) + in_image + anchor, label, mask=positive)
