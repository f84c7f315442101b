"""The classification losses in Triton: csrc/class_loss.h, one pass over the logits.

torch.compile copies the kernel and every function of Triton that it calls into a file of its own. So the functions are
imported by their names, and take and return plain tuples.
"""

# Triton compiles these functions, and takes no annotations on their tensors.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from mg_ops.reference import BACKGROUND, IGNORED
from mg_ops.triton.box import MAX_FLOAT
from mg_ops.triton.det_math import exp, log2

_MIN_NORMAL = tl.constexpr(1.175494351e-38)
_NEVER_POSITIVE = tl.constexpr(-1000.0)  # a logit whose loss and gradient as a negative are 0
_BACKGROUND = tl.constexpr(BACKGROUND)
_IGNORED = tl.constexpr(IGNORED)


@triton.jit
def sigmoid_and_logs(x):
    """p, 1 - p and their logarithms without cancellation; csrc/class_loss.h derives the series."""
    negative = x < 0
    e = tl.exp(tl.where(negative, x, -x))
    reciprocal = 1.0 / ((1.0 + e) * (2.0 + e))
    larger = reciprocal * (2.0 + e)
    smaller = e * larger
    s = e * (reciprocal * (1.0 + e))
    z = s * s
    series = z * 0.2817833423614502 + 0.27960601449012756
    series = series * z + 0.40024909377098083
    series = series * z + 0.6666631698608398
    log_one_plus_e = (series * z + 2.0) * s
    p = tl.where(negative, smaller, larger)
    one_minus_p = tl.where(negative, larger, smaller)
    return p, one_minus_p, tl.where(negative, x, 0.0) - log_one_plus_e, tl.where(negative, 0.0, -x) - log_one_plus_e


@triton.jit
def negative_value(sigmoid, gamma, EXPONENT: tl.constexpr, GRADIENT: tl.constexpr):
    """The loss of classes that are not the anchor's, or its derivative, unweighted; EXPONENT: gamma, 3 for any."""
    p, one_minus_p, log_p, log_one_minus_p = sigmoid
    if EXPONENT == 0:
        modulator = 1.0
    elif EXPONENT == 1:
        modulator = p
    elif EXPONENT == 2:
        modulator = p * p
    else:
        modulator = exp(gamma * log_p)
    if GRADIENT:
        value = modulator * (p - gamma * (one_minus_p * log_one_minus_p))
    else:
        value = modulator * -log_one_minus_p
    return value


@triton.jit
def positive_value(sigmoid, target, weight, gamma, WEIGH_BY_TARGET: tl.constexpr, GRADIENT: tl.constexpr):
    """The loss at labels with a target above 0, or its derivative."""
    p, one_minus_p, log_p, log_one_minus_p = sigmoid
    hard = target == 1.0
    distance = tl.where(hard, -one_minus_p, p - target)
    size = tl.abs(distance)
    cross_entropy = tl.where(hard, -log_p, -(target * log_p + (1.0 - target) * log_one_minus_p))
    log_size = tl.where(size > 0, log2(size) * 0.693147181, -MAX_FLOAT)
    modulator = exp(gamma * tl.where(hard, log_one_minus_p, log_size))
    if WEIGH_BY_TARGET:
        modulator *= target
    if GRADIENT:
        # The derivative of size ** gamma; 0 where the target is met.
        slope = tl.where(size >= _MIN_NORMAL, gamma * modulator * (p * one_minus_p / distance), 0.0)
        value = weight * (modulator * distance + slope * cross_entropy)
    else:
        value = weight * modulator * cross_entropy
    return value


@triton.jit(do_not_specialize=("num_anchors", "num_classes", "stride_b", "stride_a", "stride_c"))
def class_loss_kernel(
    logits,
    class_targets,
    soft_targets,
    grad_output,
    result,
    total: tl.int64,
    num_anchors: tl.int32,
    num_classes: tl.int32,
    stride_b: tl.int64,
    stride_a: tl.int64,
    stride_c: tl.int64,
    positive_weight: tl.float32,
    positive_gamma: tl.float32,
    negative_weight: tl.float32,
    negative_gamma: tl.float32,
    HAS_SOFT_TARGETS: tl.constexpr,
    WEIGH_BY_TARGET: tl.constexpr,
    EXPONENT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the losses of BLOCK logits into result[program], or with GRADIENT the gradient of each of them.

    Targets (B, A) lie one after the other; so do logits (B, A, C) that are CONTIGUOUS, and the gradient.
    """
    # torch.compile has numbers in float64.
    positive_weight, positive_gamma = tl.cast(positive_weight, tl.float32), tl.cast(positive_gamma, tl.float32)
    negative_weight, negative_gamma = tl.cast(negative_weight, tl.float32), tl.cast(negative_gamma, tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = start + lane < total
    # The first anchor by a division of 64 bits, all others by ones of 32.
    classes = tl.cast(num_classes, tl.int32)
    first_anchor = start // classes
    label = (start - first_anchor * classes).to(tl.int32) + lane
    anchor = label // classes
    label -= anchor * classes
    if CONTIGUOUS:
        x = tl.load(logits + start + lane, mask=inside, other=0).to(tl.float32)
    else:
        anchors = tl.cast(num_anchors, tl.int32)
        first_image = first_anchor // anchors
        in_image = (first_anchor - first_image * anchors).to(tl.int32) + anchor
        image = in_image // anchors
        row = (first_image + image) * stride_b + (in_image - image * anchors).to(tl.int64) * stride_a
        x = tl.load(logits + row + label.to(tl.int64) * stride_c, mask=inside, other=0).to(tl.float32)

    class_target = tl.load(class_targets + first_anchor + anchor, mask=inside, other=_IGNORED)
    at_label = (class_target == label) & inside
    counts = ((class_target >= 0) & (class_target < classes)) | (class_target == _BACKGROUND)
    sigmoid = sigmoid_and_logs(tl.where(counts, x, _NEVER_POSITIVE))
    value = negative_weight * negative_value(sigmoid, negative_gamma, EXPONENT, GRADIENT)
    # Few blocks hold a label.
    if tl.max(at_label.to(tl.int32), 0) != 0:
        if HAS_SOFT_TARGETS:
            target = tl.load(soft_targets + first_anchor + anchor, mask=at_label, other=0).to(tl.float32)
        else:
            target = tl.full([BLOCK], 1.0, tl.float32)
        positive = positive_value(sigmoid, target, positive_weight, positive_gamma, WEIGH_BY_TARGET, GRADIENT)
        value = tl.where(at_label & (target != 0), positive, value)
    if GRADIENT:
        tl.store(result + start + lane, value * tl.load(grad_output), mask=inside)
    else:
        tl.store(result + tl.program_id(0), tl.sum(value, 0))
