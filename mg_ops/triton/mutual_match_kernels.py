"""The kernels of mutual matching in Triton, for a GPU without a compiler, and a second implementation of the CUDA ones.

A call is one memset and four launches, whatever the number of anchors and objects. Launch sizes depend on shapes alone
and nothing is read back, so a call can be captured in a CUDA graph (after one call that compiles the kernels).

1. `claim_kernel`, a program for 128 anchors of an image. Decodes the predicted boxes, takes every quality against
   each object that the tile's union box overlaps, keeps each anchor's best object in registers, and proposes each
   object's best anchor by a 64-bit atomic maximum. A class score is read only where q_anchor > 0 and it can still
   decide something.
2. `settle_kernel`, a program an image. Which objects take part is known now. Gives every best pair quality 1 and lays
   out one list an object and ranking, so that all lists of an image together fit in its anchors.
3. `own_kernel`, a program for 512 anchors. Owners are final now: counts the anchors above the thresholds, appends
   each to its owner's lists, writes the labels of anchors that are not chosen.
4. `rank_kernel`, a program an (object, ranking). Finds the quality of the n-th best owned anchor by radix selection,
   8 bits a pass, and labels the anchors that reach it. The same loop runs over the object's list or, where the list is
   incomplete, over all anchors of the image.

Memory beyond the outputs: per anchor of an image one key a quality (8 bytes) and one list entry a ranking (4 bytes),
32 bytes for `strategy="mutual"`; per object 48 bytes of maxima and counters, which the memset zeroes, and 24 bytes of
lists.

Lists are incomplete only where anchors change hands after they were counted: when an object that no anchor overlaps
had claimed some by their predicted boxes. Radix selection over all anchors is slower, and exact for the same reason.

Why these sizes. A claiming program is one warp: its reductions over the tile, up to six an object, are then shuffles
without a barrier, and a tile of 128 neighboring anchors is small enough for its union box to rule most objects out. A
list of an ordinary object fits one or two blocks of 1024.
"""

# Triton compiles these functions, and takes no annotations on their tensors.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

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
    bounds_of,
    box_area,
    box_iou,
    decode_box,
    finite_or_empty,
    intersection_area,
    is_object,
    load_box,
    overlaps,
    positive_ratio,
)
from mg_ops.triton.det_math import log2

_BACKGROUND = tl.constexpr(BACKGROUND)
_IGNORED = tl.constexpr(IGNORED)
_CHUNK = tl.constexpr(32)  # objects tested against a tile at once; their hits are the bits of one integer

# Rows of the per-object counters.
_RESERVED = tl.constexpr(0)  # + list: entries kept for the object
_LISTED = tl.constexpr(2)  # + list: entries the object asked for
_COUNT_POS = tl.constexpr(4)
_COUNT_TOTAL = tl.constexpr(5)
NUM_COUNTERS = 6


@triton.jit
def _object_range(gt_offsets, image, num_gt):
    # The largest offset so far, within 0 and N: images share no object, and none leads out of bounds.
    lane = tl.arange(0, 32)
    largest = tl.zeros([32], tl.int64)
    for first in range(0, image + 1, 32):
        index = first + lane
        offset = tl.load(gt_offsets + index, mask=index <= image, other=0).to(tl.int64)
        largest = tl.maximum(largest, offset)
    start = tl.minimum(tl.max(largest, 0), num_gt)
    end = tl.load(gt_offsets + image + 1).to(tl.int64)
    end = tl.minimum(tl.maximum(end, start), num_gt)
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
def _load_pred_boxes(pred_boxes, image, anchor, mask, anchor_box, strides, coder, DECODE: tl.constexpr):
    """The predicted boxes of a tile, decoded where they are deltas; empty where they are not finite."""
    stride_image, stride_anchor, stride_column = strides
    pointers = pred_boxes + image * stride_image + anchor.to(tl.int64) * stride_anchor
    box = load_box(pointers, stride_column, mask)
    if DECODE:
        box = decode_box(anchor_box, box, coder)
    return finite_or_empty(box)


@triton.jit
def _load_object(gt_boxes, n, mask):
    return load_box(gt_boxes + 4 * n.to(tl.int64), 1, mask)


_STRIDES = ("stride_pred_b", "stride_pred_a", "stride_pred_x", "stride_scores_b", "stride_scores_a", "stride_scores_c")
_UNSPECIALIZED = [*_STRIDES, "num_anchors", "num_gt", "num_classes", "num_tiles", "batch_size", "longest_list"]
"""Integers that would otherwise compile a kernel anew when they happen to be 1 or a multiple of 16. In a tuple they
always would, so strides are not in one. Inputs that have no strides here are contiguous."""


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def claim_kernel(
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
    stride_pred_b: tl.int64,
    stride_pred_a: tl.int64,
    stride_pred_x: tl.int64,
    stride_scores_b: tl.int64,
    stride_scores_a: tl.int64,
    stride_scores_c: tl.int64,
    coder,
    sigma,
    DECODE: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    REGRESSED: tl.constexpr,
    AMPLIFIED: tl.constexpr,
    CROWD: tl.constexpr,
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
    image = (tl.program_id(0) // num_tiles).to(tl.int64)
    anchor = (tl.program_id(0) % num_tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = anchor < num_anchors
    start, end = _object_range(gt_offsets, image, num_gt)

    given_box = _load_object(anchors, anchor, inside)
    anchor_box = finite_or_empty(given_box)
    anchor_area = box_area(anchor_box)
    anchor_bounds = bounds_of(anchor_box)
    anchor_order = tl.zeros([BLOCK], tl.int32)
    anchor_owner = tl.zeros([BLOCK], tl.int32)
    if REGRESSED:
        pred_strides = (stride_pred_b, stride_pred_a, stride_pred_x)
        pred_box = _load_pred_boxes(pred_boxes, image, anchor, inside, given_box, pred_strides, coder, DECODE)
        pred_area = box_area(pred_box)
        pred_bounds = bounds_of(pred_box)
        regressed_order = tl.zeros([BLOCK], tl.int32)
        regressed_owner = tl.zeros([BLOCK], tl.int32)
    if AMPLIFIED:
        scores = cls_scores + image * stride_scores_b + anchor.to(tl.int64) * stride_scores_a
        # The exponent of p = 1 bounds that of every p from above, after rounding too: each operation is monotone.
        least_amplification = amplification(1.0, sigma)
        amplified_order = tl.zeros([BLOCK], tl.int32)
        amplified_owner = tl.zeros([BLOCK], tl.int32)

    bit = tl.arange(0, _CHUNK)
    for first in range(start, end, _CHUNK):
        candidate = first + bit
        mask = candidate < end
        candidate_box = _load_object(gt_boxes, candidate, mask)
        valid = mask & is_object(candidate_box)
        if CROWD:
            valid &= tl.load(gt_crowd + candidate, mask=mask, other=0) == 0
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
            gt_box = _load_object(gt_boxes, n, n < end)
            gt_area = box_area(gt_box)

            if (by_anchor & lowest) != 0:
                order = iou_order(box_iou(anchor_box, anchor_area, gt_box, gt_area))
                largest = tl.max(order, 0)
                if largest > 0:
                    _propose_best(best + n, order, largest, anchor)
                    better = order > anchor_order
                    anchor_order = tl.where(better, order, anchor_order)
                    anchor_owner = tl.where(better, g, anchor_owner)
                    if AMPLIFIED:
                        best_of_object = best + (1 + REGRESSED) * num_gt.to(tl.int64) + n
                        label = tl.load(gt_labels + n).to(tl.int64)
                        overlapping = order > 0
                        log2_q = log2(tl.where(overlapping, order_iou(order), 1.0))
                        bound = exponent_order(least_amplification * log2_q)
                        needed = overlapping & (
                            (bound > amplified_order) | (bound >= key_order(tl.load(best_of_object, volatile=True)))
                        )
                        p = tl.zeros([BLOCK], tl.float32)
                        if (label >= 0) & (label < num_classes):
                            p = class_probability(
                                tl.load(scores + label * stride_scores_c, mask=needed, other=0).to(tl.float32),
                                PROBABILITIES,
                            )
                        order = tl.where(needed, exponent_order(amplification(p, sigma) * log2_q), 0)
                        largest = tl.max(order, 0)
                        if largest > 0:
                            _propose_best(best_of_object, order, largest, anchor)
                            better = order > amplified_order
                            amplified_order = tl.where(better, order, amplified_order)
                            amplified_owner = tl.where(better, g, amplified_owner)

            if REGRESSED:
                if (by_pred & lowest) != 0:
                    order = iou_order(box_iou(pred_box, pred_area, gt_box, gt_area))
                    largest = tl.max(order, 0)
                    if largest > 0:
                        _propose_best(best + num_gt.to(tl.int64) + n, order, largest, anchor)
                        better = order > regressed_order
                        regressed_order = tl.where(better, order, regressed_order)
                        regressed_owner = tl.where(better, g, regressed_owner)

    # Owners that win no best pair later are counted here, so that lists have room for them.
    row = batch_size * num_anchors.to(tl.int64)
    tile_keys = keys + image * num_anchors + anchor
    tl.store(tile_keys, claim_key(anchor_order, anchor_owner), mask=inside)
    if REGRESSED:
        tl.store(tile_keys + row, claim_key(regressed_order, regressed_owner), mask=inside)
        tl.atomic_add(counters + start + regressed_owner, 1, mask=regressed_order > 0, sem="relaxed")
    else:
        tl.atomic_add(counters + start + anchor_owner, 1, mask=anchor_order > 0, sem="relaxed")
    if AMPLIFIED:
        tl.store(tile_keys + (1 + REGRESSED) * row, claim_key(amplified_order, amplified_owner), mask=inside)
        tl.atomic_add(
            counters + num_gt.to(tl.int64) + start + amplified_owner, 1, mask=amplified_order > 0, sem="relaxed"
        )
    elif REGRESSED:
        tl.atomic_add(counters + num_gt.to(tl.int64) + start + anchor_owner, 1, mask=anchor_order > 0, sem="relaxed")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def settle_kernel(
    keys,
    best,
    counters,
    list_starts,
    images_to_redo,
    gt_offsets,
    batch_size,
    num_anchors,
    num_gt,
    REGRESSED: tl.constexpr,
    AMPLIFIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """q[best[g], g] = 1 for every object, of two the lower; room for a list of the anchors that each object owns.

    Finds the images where an object that no anchor overlaps owns anchors.
    """
    # Concurrent programs: none shares an image or an object. Two objects may claim one anchor: an atomic maximum of
    # their keys, the lower object wins in either order.
    image = tl.program_id(0).to(tl.int64)
    start, end = _object_range(gt_offsets, image, num_gt)
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
        forced = claim_key(tl.where(takes_part, FORCED_IOU_ORDER, 0), g)
        tl.atomic_max(image_keys + key_index(by_anchor), forced, mask=takes_part, sem="relaxed")
        if REGRESSED:
            by_pred = tl.load(best + gt_row + n, mask=mask, other=0)
            redo = tl.maximum(redo, tl.max(((by_pred != 0) & (by_anchor == 0)).to(tl.int32), 0))
            index = key_index(tl.where(by_pred != 0, by_pred, by_anchor))
            tl.atomic_max(image_keys + row + index, forced, mask=takes_part, sem="relaxed")
        if AMPLIFIED:
            # Never 0 for an object that takes part: its exponent is finite wherever q_anchor > 0.
            by_score = tl.load(best + (1 + REGRESSED) * gt_row + n, mask=mask, other=0)
            forced = claim_key(tl.where(takes_part, FORCED_EXPONENT_ORDER, 0), g)
            index = (1 + REGRESSED) * row + key_index(by_score)
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
    n = start + key_index(key)
    place = tl.atomic_add(listed + n, 1, mask=owned, sem="relaxed")
    room = tl.load(reserved + n, mask=owned, other=0) + 1
    position = tl.load(list_starts + n, mask=owned, other=0) + place
    tl.store(list_entries + position, anchor, mask=owned & (place < room))


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def own_kernel(
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
    stride_pred_b: tl.int64,
    stride_pred_a: tl.int64,
    stride_pred_x: tl.int64,
    coder,
    iou_positive,
    iou_ignored,
    crowd_overlap,
    DECODE: tl.constexpr,
    REGRESSED: tl.constexpr,
    AMPLIFIED: tl.constexpr,
    CROWD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Final owners: counts, lists, and the labels of anchors that no object will choose.

    n_pos[g]   = |{a owned by g: q_anchor[a, g] >= iou_positive}|
    n_total[g] = |{a owned by g: q_anchor[a, g] >= iou_ignored}|
    cls_match[a] = ignored where intersection(a, crowd) / area(a) >= crowd_overlap, else background
    """
    # Concurrent programs: a tile's keys and labels are read and written by its one program. Counters see atomic
    # additions only; what an addition returns is a place in a list that no other anchor gets. Which anchor gets which
    # place changes from run to run: the ranking does not depend on it.
    image = (tl.program_id(0) // num_tiles).to(tl.int64)
    anchor = (tl.program_id(0) % num_tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = anchor < num_anchors
    start, end = _object_range(gt_offsets, image, num_gt)
    row = batch_size * num_anchors.to(tl.int64)
    gt_row = num_gt.to(tl.int64)
    tile_keys = keys + image * num_anchors + anchor

    by_anchor = tl.load(tile_keys, mask=inside, other=0)
    n = start + key_index(by_anchor)
    q_anchor = order_iou(key_order(by_anchor))
    owned = by_anchor != 0
    tl.atomic_add(counters + _COUNT_POS * gt_row + n, 1, mask=owned & (q_anchor >= iou_positive), sem="relaxed")
    tl.atomic_add(counters + _COUNT_TOTAL * gt_row + n, 1, mask=owned & (q_anchor >= iou_ignored), sem="relaxed")

    by_cls = by_anchor
    if REGRESSED:
        by_cls = tl.load(tile_keys + row, mask=inside, other=0)
        if tl.load(images_to_redo + image) != 0:
            # Objects that no anchor overlaps have natural owners here: take the anchors from them.
            owner_best = tl.load(best + start + key_index(by_cls), mask=by_cls != 0, other=1)
            stolen = owner_best == 0
            if tl.max(stolen.to(tl.int32), 0) != 0:
                given_box = _load_object(anchors, anchor, inside)
                pred_strides = (stride_pred_b, stride_pred_a, stride_pred_x)
                pred_box = _load_pred_boxes(pred_boxes, image, anchor, inside, given_box, pred_strides, coder, DECODE)
                pred_area = box_area(pred_box)
                order = tl.zeros([BLOCK], tl.int32)
                owner = tl.zeros([BLOCK], tl.int32)
                for g in range(0, end - start):
                    m = start + g
                    best_by_anchor = tl.load(best + m)
                    if best_by_anchor != 0:
                        gt_box = _load_object(gt_boxes, m, m < end)
                        quality = iou_order(box_iou(pred_box, pred_area, gt_box, box_area(gt_box)))
                        best_by_pred = tl.load(best + gt_row + m)
                        best_by_pred = tl.where(best_by_pred != 0, best_by_pred, best_by_anchor)
                        quality = tl.where(anchor == key_index(best_by_pred), FORCED_IOU_ORDER, quality)
                        better = quality > order
                        order = tl.where(better, quality, order)
                        owner = tl.where(better, g, owner)
                by_cls = tl.where(stolen, claim_key(order, owner), by_cls)
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
        anchor_box = finite_or_empty(_load_object(anchors, anchor, inside))
        anchor_area = box_area(anchor_box)
        for g in range(0, end - start):
            m = start + g
            if tl.load(gt_crowd + m) != 0:
                crowd_box = finite_or_empty(_load_object(gt_boxes, m, m < end))
                covered = positive_ratio(intersection_area(anchor_box, crowd_box), anchor_area)
                label = tl.where(covered >= crowd_overlap, _IGNORED, label)
    tl.store(cls_match + image * num_anchors + anchor, label, mask=inside)


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


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def rank_kernel(
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
    gt_row = num_gt.to(tl.int64)

    # The first offset above n ends its image; none does for capacity beyond the last one.
    end_of = batch_size + 1
    for first in range(0, batch_size + 1, 128):
        index = first + tl.arange(0, 128)
        offset = tl.load(gt_offsets + index, mask=index <= batch_size, other=0).to(tl.int64)
        end_of = tl.minimum(end_of, tl.min(tl.where(offset > n, index, MAX_INDEX), 0))
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
        start, _ = _object_range(gt_offsets, image.to(tl.int64), num_gt)
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
