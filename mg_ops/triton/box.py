"""csrc/box.h in Triton: validity, decoding, IoU. min and max only meet finite numbers."""

# Triton compiles these functions, and takes no annotations on their tensors.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

from typing import NamedTuple

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from mg_ops.triton.det_math import exp, is_finite

MAX_FLOAT = tl.constexpr(3.402823466e38)


class Box(NamedTuple):
    """(x1, y1, x2, y2) of one box, or of a block of them."""

    x1: tl.tensor
    y1: tl.tensor
    x2: tl.tensor
    y2: tl.tensor


@triton.jit
def load_row(boxes, n):
    """Row n of float32 boxes that lie one after the other."""
    row = boxes + 4 * n.to(tl.int64)
    return Box(tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3))


@triton.jit
def load_rows(pointers, mask):
    """The four numbers from each pointer on, as float32, by one load a row; zeros where the mask is off."""
    rows = tl.load(pointers[:, None] + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0).to(tl.float32)
    x, y = tl.split(tl.reshape(rows, (rows.shape[0], 2, 2)))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    return Box(x1, y1, x2, y2)


@triton.jit
def load_columns(pointers, stride, mask):
    """The four numbers at each pointer, `stride` apart, as float32; zeros where the mask is off."""
    return Box(
        tl.load(pointers, mask=mask, other=0).to(tl.float32),
        tl.load(pointers + stride, mask=mask, other=0).to(tl.float32),
        tl.load(pointers + 2 * stride, mask=mask, other=0).to(tl.float32),
        tl.load(pointers + 3 * stride, mask=mask, other=0).to(tl.float32),
    )


@triton.jit
def is_finite_box(box):
    """Whether all four coordinates are finite."""
    return is_finite(box.x1) & is_finite(box.y1) & is_finite(box.x2) & is_finite(box.y2)


@triton.jit
def finite_or_empty(box):
    """A box that is not finite becomes the empty one at the origin, which overlaps nothing."""
    keep = is_finite_box(box)
    return Box(
        tl.where(keep, box.x1, 0.0),
        tl.where(keep, box.y1, 0.0),
        tl.where(keep, box.x2, 0.0),
        tl.where(keep, box.y2, 0.0),
    )


@triton.jit
def is_object(box):
    """A box the matching can look for: finite, x2 > x1, y2 > y1."""
    return is_finite_box(box) & (box.x2 > box.x1) & (box.y2 > box.y1)


@triton.jit
def box_area(box):
    """(x2 - x1) * (y2 - y1)."""
    return (box.x2 - box.x1) * (box.y2 - box.y1)


@triton.jit
def intersection_area(a, b):
    """Area of the intersection of finite boxes; 0 where they do not overlap."""
    w = tl.minimum(a.x2, b.x2) - tl.maximum(a.x1, b.x1)
    h = tl.minimum(a.y2, b.y2) - tl.maximum(a.y1, b.y1)
    return tl.where((w > 0) & (h > 0), w * h, 0.0)


@triton.jit
def positive_ratio(numerator, denominator):
    """numerator / denominator where that is finite and positive, else 0."""
    ratio = tl.div_rn(numerator, denominator)
    return tl.where((ratio > 0) & (ratio <= MAX_FLOAT), ratio, 0.0)


@triton.jit
def box_iou(a, area_a, b, area_b):
    """IoU of finite boxes whose areas are at hand."""
    intersection = intersection_area(a, b)
    return positive_ratio(intersection, (area_a + area_b) - intersection)


@triton.jit
def decode_interval(first, second, delta_center, delta_size, weight_center, weight_size, clip):
    """One axis of the decoding."""
    size = second - first
    center = first + 0.5 * size
    new_center = tl.div_rn(delta_center, weight_center) * size + center
    log_scale = tl.div_rn(delta_size, weight_size)
    half = 0.5 * (exp(tl.where(log_scale > clip, clip, log_scale)) * size)
    return new_center - half, new_center + half


@triton.jit
def decode_box(anchor, deltas, coder):
    """The box that deltas (dx, dy, dw, dh) make of an anchor; the coder is the weights of x, y, w, h, and the clip."""
    weight_x, weight_y, weight_w, weight_h, clip = coder
    dx, dy, dw, dh = deltas
    x1, x2 = decode_interval(anchor.x1, anchor.x2, dx, dw, weight_x, weight_w, clip)
    y1, y2 = decode_interval(anchor.y1, anchor.y2, dy, dh, weight_y, weight_h, clip)
    return Box(x1, y1, x2, y2)


@triton.jit
def bounds_of(box):
    """The smallest box around a block of boxes. An inverted or empty one has IoU 0 with everything: left out."""
    keep = (box.x2 > box.x1) & (box.y2 > box.y1)
    return Box(
        tl.min(tl.where(keep, box.x1, MAX_FLOAT), 0),
        tl.min(tl.where(keep, box.y1, MAX_FLOAT), 0),
        tl.max(tl.where(keep, box.x2, -MAX_FLOAT), 0),
        tl.max(tl.where(keep, box.y2, -MAX_FLOAT), 0),
    )


@triton.jit
def overlaps(a, b):
    """Comparisons do not round: false for the bounds of a tile means IoU 0 for each box in it."""
    return (tl.minimum(a.x2, b.x2) > tl.maximum(a.x1, b.x1)) & (tl.minimum(a.y2, b.y2) > tl.maximum(a.y1, b.y1))
