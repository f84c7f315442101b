"""csrc/assignment.h in Triton: the amplified quality, and how qualities compare.

Qualities are compared as integers: the bits of an IoU, the inverted bits of an exponent. Both fit 31 bits here, because
a quality's sign is known, so that `order << 32 | (0x7fffffff - index)` is a positive int64. The maximum of such keys is
the largest quality, then the lowest index, in whatever order programs arrive. 0: no quality.
"""

# Triton compiles these functions, and takes no annotations on their tensors.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from mg_ops.triton.det_math import sigmoid

MAX_INDEX = tl.constexpr(0x7FFFFFFF)
FORCED_IOU_ORDER = tl.constexpr(0x3F800000)  # iou_order(1)
FORCED_EXPONENT_ORDER = tl.constexpr(0x7FFFFFFF)  # exponent_order(0)


@triton.jit
def class_probability(score, is_probability):
    """p of a score: sigmoid(score) of a logit, or the score itself, kept within [0, 1]. NaN counts as p = 0."""
    if is_probability != 0:
        p = tl.where(score > 1.0, 1.0, score)
    else:
        p = sigmoid(score)
    return tl.where(p > 0.0, p, 0.0)


@triton.jit
def amplification(p, sigma):
    """What log2(q_anchor) is multiplied by for the log2 of q_amplified (Eq. 1)."""
    return tl.div_rn(sigma - p, sigma)


@triton.jit
def iou_order(q):
    """The order of an IoU: its bits, 0 for 0."""
    return q.to(tl.int32, bitcast=True)


@triton.jit
def order_iou(order):
    """The IoU of an order."""
    return order.to(tl.float32, bitcast=True)


@triton.jit
def exponent_order(exponent):
    """The order of an exponent <= 0: its inverted bits without the sign, which also makes one of the two zeros."""
    return ~exponent.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def claim_key(order, index):
    """One integer that compares as (quality, then lower index first): the larger key wins."""
    return tl.where(order > 0, (order.to(tl.int64) << 32) | (index ^ MAX_INDEX).to(tl.int64), 0)


@triton.jit
def key_index(key):
    """The index in a key."""
    return ((key & MAX_INDEX) ^ MAX_INDEX).to(tl.int32)


@triton.jit
def key_order(key):
    """The order in a key."""
    return (key >> 32).to(tl.int32)
