"""The box losses in Triton: csrc/box_loss.h, without duals. Each loss comes with its derivatives, worked out by hand.

torch.compile copies these functions, as those of class_loss_kernel.py: imported by their names, plain tuples.
"""

# Triton compiles these functions, and takes no annotations on their tensors.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from mg_ops.loss_definitions import BOX_LOSSES
from mg_ops.triton.det_math import exp

_SMOOTH_L1 = tl.constexpr(BOX_LOSSES.index("smooth_l1"))
_BALANCED_L1 = tl.constexpr(BOX_LOSSES.index("balanced_l1"))
_GIOU = tl.constexpr(BOX_LOSSES.index("giou"))
_CIOU = tl.constexpr(BOX_LOSSES.index("ciou"))
_EPSILON = tl.constexpr(1e-7)


@triton.jit
def load_four(pointers, stride, mask):
    """The four numbers at each pointer, `stride` apart, as float32; those of a unit square where the mask is off."""
    return (
        tl.load(pointers, mask=mask, other=0).to(tl.float32),
        tl.load(pointers + stride, mask=mask, other=0).to(tl.float32),
        tl.load(pointers + 2 * stride, mask=mask, other=1).to(tl.float32),
        tl.load(pointers + 3 * stride, mask=mask, other=1).to(tl.float32),
    )


@triton.jit
def load_positives(match, gt_offsets, weights, num_gt, image, row, inside, HAS_WEIGHTS: tl.constexpr):
    """Which of the anchors at rows (B * A) are positives, their objects (N), and their weights."""
    object_in_image = tl.load(match + row, mask=inside, other=-1)
    start = tl.load(gt_offsets + image, mask=inside, other=0)
    start = tl.minimum(tl.maximum(start, 0), num_gt)
    positive = (object_in_image >= 0) & (object_in_image < num_gt - start)
    if HAS_WEIGHTS:
        weight = tl.load(weights + row, mask=positive, other=0).to(tl.float32)
    else:
        weight = tl.where(positive, 1.0, 0.0)
    return positive, start + object_in_image, weight


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0: what 1 + x rounds away comes back as a factor."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))


@triton.jit
def arctangent(a, b):
    """atan(a / b): a minimax fit over [0, 1] in 40-digit arithmetic, relative error 1.5e-8 before rounding."""
    size_a, size_b = tl.abs(a), tl.abs(b)
    steep = size_a > size_b
    t = tl.where(steep, size_b, size_a) / tl.where(steep, size_a, size_b)
    z = t * t
    angle = z * 0.002849886892363429 - 0.01606861501932144
    angle = angle * z + 0.042691491544246674
    angle = angle * z - 0.07504291832447052
    angle = angle * z + 0.10640932619571686
    angle = angle * z - 0.14203643798828125
    angle = angle * z + 0.1999261975288391
    angle = angle * z - 0.3333307206630707
    angle = (angle * z + 1.0) * t
    angle = tl.where(steep, 1.570796327 - angle, angle)
    return tl.where((a < 0) != (b < 0), -angle, angle)


@triton.jit
def l1_loss(error, alpha, gamma, beta, balance, LOSS: tl.constexpr):
    """The loss of the error in a coordinate, and its derivative."""
    x = tl.abs(error)
    if LOSS == _SMOOTH_L1:
        inner = 0.5 * x * x / beta
        inner_slope = x / beta
        outer = x - 0.5 * beta
        outer_slope = x * 0.0 + 1.0
    else:
        log_ratio = log1p(balance * x / beta)
        if LOSS == _BALANCED_L1:
            inner = alpha * (beta / balance) * (balance * x / beta + 1.0) * log_ratio - alpha * x
            inner_slope = alpha * log_ratio
            outer = gamma * x + (gamma / balance - alpha) * beta
        else:
            inner = alpha / balance * (balance * x + 1.0) * log_ratio - alpha * x
            inner_slope = alpha * (log_ratio + (balance * x + 1.0) / (balance * x + beta) - 1.0)
            outer = gamma * x + gamma / balance - alpha * beta
        outer_slope = x * 0.0 + gamma
    slope = tl.where(x < beta, inner_slope, outer_slope)
    slope = tl.where(error < 0, -slope, tl.where(error > 0, slope, error * 0.0))
    return tl.where(x < beta, inner, outer), slope


@triton.jit
def encode_interval(first, second, target_first, target_second, weight_center, weight_size):
    """One axis of the deltas that turn an anchor into a box."""
    size, target_size = second - first, target_second - target_first
    shift = (target_first + 0.5 * target_size) - (first + 0.5 * size)
    return weight_center * (shift / size), weight_size * tl.log(target_size / size)


@triton.jit
def decode_interval(first, second, delta_center, delta_size, weight_center, weight_size, clip):
    """One axis of a box made of deltas; then the derivatives of its center and of half its size."""
    size = second - first
    center = delta_center / weight_center * size + (first + 0.5 * size)
    log_size = delta_size / weight_size
    half = 0.5 * size * exp(tl.where(log_size > clip, clip, log_size))
    return center - half, center + half, size / weight_center, tl.where(log_size > clip, 0.0, half / weight_size)


@triton.jit
def share(a, b):
    """The derivative of min(a, b) with respect to a, half of it where both are equal."""
    return tl.where(a < b, 1.0, tl.where(a > b, 0.0, 0.5))


@triton.jit
def iou_loss(a, b, COMPLETE: tl.constexpr):
    """1 - GIoU or 1 - CIoU of boxes, and its derivatives with respect to the coordinates of `a`."""
    x1, y1, x2, y2 = a
    b_x1, b_y1, b_x2, b_y2 = b
    w, h, b_w, b_h = x2 - x1, y2 - y1, b_x2 - b_x1, b_y2 - b_y1
    overlap_w = tl.minimum(x2, b_x2) - tl.maximum(x1, b_x1)
    overlap_h = tl.minimum(y2, b_y2) - tl.maximum(y1, b_y1)
    around_w = tl.maximum(x2, b_x2) - tl.minimum(x1, b_x1)
    around_h = tl.maximum(y2, b_y2) - tl.minimum(y1, b_y1)
    overlap = (overlap_w > 0) & (overlap_h > 0)
    intersection = tl.where(overlap, overlap_w * overlap_h, 0.0)
    joined = (w * h + b_w * b_h) - intersection
    iou = intersection / (joined + _EPSILON)
    # What the loss changes by with each part of it, from the last one computed to the first.
    by_joined = iou / (joined + _EPSILON)
    by_intersection = -1.0 / (joined + _EPSILON)
    if COMPLETE:
        shift_x, shift_y = 0.5 * (x1 + x2) - 0.5 * (b_x1 + b_x2), 0.5 * (y1 + y2) - 0.5 * (b_y1 + b_y2)
        diagonal = (around_w * around_w + around_h * around_h) + _EPSILON
        distance = (shift_x * shift_x + shift_y * shift_y) / diagonal
        turn = arctangent(b_w, b_h) - arctangent(w, h)
        shape = 0.405284735 * (turn * turn)  # 4 / pi^2
        trade_off = shape / ((1.0 - iou) + shape + _EPSILON)  # not differentiated
        loss = ((1.0 - iou) + distance) + trade_off * shape
        by_around_w = -2.0 * distance * around_w / diagonal
        by_around_h = -2.0 * distance * around_h / diagonal
        by_both_x, by_both_y = shift_x / diagonal, shift_y / diagonal
        by_angle = -2.0 * 0.405284735 * trade_off * turn / (w * w + h * h)
        by_w, by_h = by_angle * h, -by_angle * w
    else:
        around = around_w * around_h
        excess = (around - joined) / (around + _EPSILON)
        loss = (1.0 - iou) + excess
        by_joined -= 1.0 / (around + _EPSILON)
        by_around = (1.0 - excess) / (around + _EPSILON)
        by_around_w, by_around_h = by_around * around_h, by_around * around_w
        by_both_x, by_both_y, by_w, by_h = 0.0, 0.0, 0.0, 0.0
    by_intersection -= by_joined
    by_w += by_joined * h
    by_h += by_joined * w
    by_overlap_w = tl.where(overlap, by_intersection * overlap_h, 0.0)
    by_overlap_h = tl.where(overlap, by_intersection * overlap_w, 0.0)
    by_x1 = by_both_x - by_w - by_overlap_w * share(b_x1, x1) - by_around_w * share(x1, b_x1)
    by_y1 = by_both_y - by_h - by_overlap_h * share(b_y1, y1) - by_around_h * share(y1, b_y1)
    by_x2 = by_both_x + by_w + by_overlap_w * share(x2, b_x2) + by_around_w * share(b_x2, x2)
    by_y2 = by_both_y + by_h + by_overlap_h * share(y2, b_y2) + by_around_h * share(b_y2, y2)
    return loss, (by_x1, by_y1, by_x2, by_y2)


@triton.jit(
    do_not_specialize=("num_rows", "num_anchors", "num_gt", "stride_b", "stride_a", "stride_x"),
    do_not_specialize_on_alignment=("predictions", "anchors", "match", "gt_boxes", "gt_offsets", "weights"),
)
def box_loss_kernel(
    predictions,
    anchors,
    match,
    gt_boxes,
    gt_offsets,
    weights,
    grad_output,
    result,
    num_rows: tl.int64,
    num_anchors: tl.int64,
    num_gt: tl.int64,
    stride_b: tl.int64,
    stride_a: tl.int64,
    stride_x: tl.int64,
    weight_x: tl.float32,
    weight_y: tl.float32,
    weight_w: tl.float32,
    weight_h: tl.float32,
    clip: tl.float32,
    alpha: tl.float32,
    gamma: tl.float32,
    beta: tl.float32,
    balance: tl.float32,
    HAS_WEIGHTS: tl.constexpr,
    DECODE: tl.constexpr,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the losses of BLOCK anchors into result[program], or with GRADIENT the gradient of each prediction.

    All but the predictions (B, A, 4) lie one after the other, boxes as float32.
    """
    # torch.compile has numbers in float64.
    weight_x, weight_y = tl.cast(weight_x, tl.float32), tl.cast(weight_y, tl.float32)
    weight_w, weight_h = tl.cast(weight_w, tl.float32), tl.cast(weight_h, tl.float32)
    clip, balance = tl.cast(clip, tl.float32), tl.cast(balance, tl.float32)
    alpha, gamma, beta = tl.cast(alpha, tl.float32), tl.cast(gamma, tl.float32), tl.cast(beta, tl.float32)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    image = row // num_anchors
    anchor = row - image * num_anchors
    positive, owner, weight = load_positives(match, gt_offsets, weights, num_gt, image, row, inside, HAS_WEIGHTS)
    a_x1, a_y1, a_x2, a_y2 = load_four(anchors + 4 * anchor, 1, positive)
    gt_box = load_four(gt_boxes + 4 * owner, 1, positive)
    x1, y1, x2, y2 = load_four(predictions + image * stride_b + anchor * stride_a, stride_x, positive)
    if LOSS == _GIOU or LOSS == _CIOU:
        if DECODE:
            dx, dy, dw, dh = x1, y1, x2, y2
            x1, x2, center_x, half_w = decode_interval(a_x1, a_x2, dx, dw, weight_x, weight_w, clip)
            y1, y2, center_y, half_h = decode_interval(a_y1, a_y2, dy, dh, weight_y, weight_h, clip)
        loss, slopes = iou_loss((x1, y1, x2, y2), gt_box, LOSS == _CIOU)
        s1, s2, s3, s4 = slopes
        if DECODE:
            s1, s3 = (s1 + s3) * center_x, (s3 - s1) * half_w
            s2, s4 = (s2 + s4) * center_y, (s4 - s2) * half_h
    else:
        t1, t2, t3, t4 = gt_box
        if DECODE:
            b_x1, b_y1, b_x2, b_y2 = gt_box
            t1, t3 = encode_interval(a_x1, a_x2, b_x1, b_x2, weight_x, weight_w)
            t2, t4 = encode_interval(a_y1, a_y2, b_y1, b_y2, weight_y, weight_h)
        loss_1, s1 = l1_loss(x1 - t1, alpha, gamma, beta, balance, LOSS)
        loss_2, s2 = l1_loss(y1 - t2, alpha, gamma, beta, balance, LOSS)
        loss_3, s3 = l1_loss(x2 - t3, alpha, gamma, beta, balance, LOSS)
        loss_4, s4 = l1_loss(y2 - t4, alpha, gamma, beta, balance, LOSS)
        loss = loss_1 + loss_2 + loss_3 + loss_4
    if GRADIENT:
        scale = tl.load(grad_output) * weight
        place = result + 4 * row
        tl.store(place, tl.where(positive, scale * s1, 0.0), mask=inside)
        tl.store(place + 1, tl.where(positive, scale * s2, 0.0), mask=inside)
        tl.store(place + 2, tl.where(positive, scale * s3, 0.0), mask=inside)
        tl.store(place + 3, tl.where(positive, scale * s4, 0.0), mask=inside)
    else:
        tl.store(result + tl.program_id(0), tl.sum(tl.where(positive, weight * loss, 0.0), 0))


@triton.jit(
    do_not_specialize=("num_rows", "num_anchors", "num_gt", "num_bins", "stride_b", "stride_a", "stride_x"),
    do_not_specialize_on_alignment=("predictions", "anchors", "match", "gt_boxes", "gt_offsets", "weights", "strides"),
)
def distribution_loss_kernel(
    predictions,
    anchors,
    match,
    gt_boxes,
    gt_offsets,
    weights,
    strides,
    grad_output,
    result,
    num_rows: tl.int64,
    num_anchors: tl.int64,
    num_gt: tl.int64,
    num_bins: tl.int32,
    stride_b: tl.int64,
    stride_a: tl.int64,
    stride_x: tl.int64,
    margin: tl.float32,
    HAS_WEIGHTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """As `box_loss_kernel`: of BLOCK sides, whose logits are the rows of a tile of at least `num_bins` columns."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # of (B, A, 4)
    inside = row < num_rows
    side = row % 4
    image = row // 4 // num_anchors
    anchor = row // 4 - image * num_anchors
    positive, owner, weight = load_positives(match, gt_offsets, weights, num_gt, image, row // 4, inside, HAS_WEIGHTS)
    low_side = anchors + 4 * anchor + side % 2
    center = 0.5 * (tl.load(low_side, mask=positive, other=0) + tl.load(low_side + 2, mask=positive, other=0))
    distance = tl.load(gt_boxes + 4 * owner + side, mask=positive, other=0) - center
    distance = tl.where(side < 2, -distance, distance) / tl.load(strides + anchor, mask=positive, other=1)
    bins = tl.cast(num_bins, tl.int32)
    most = (bins - 1).to(tl.float32) - tl.cast(margin, tl.float32)
    distance = tl.where(distance > 0, tl.where(distance < most, distance, most), 0.0)  # NaN counts as 0
    low = tl.minimum(distance.to(tl.int32), bins - 2)
    upper = distance - low.to(tl.float32)

    bin = tl.arange(0, BINS)[None, :]
    is_bin = bin < bins
    place = image * stride_b + anchor * stride_a + side * bins * stride_x
    logits = predictions + place[:, None] + bin.to(tl.int64) * stride_x
    logits = tl.load(logits, mask=positive[:, None] & is_bin, other=0).to(tl.float32)
    wanted = tl.where(bin == low[:, None], 1.0 - upper[:, None], tl.where(bin == low[:, None] + 1, upper[:, None], 0.0))
    shifted = logits - tl.max(tl.where(is_bin, logits, float("-inf")), 1)[:, None]
    power = tl.where(is_bin, exp(shifted), 0.0)
    total = tl.sum(power, 1)
    if GRADIENT:
        scale = tl.where(positive, tl.load(grad_output) * weight, 0.0)[:, None]
        slope = tl.where(positive[:, None], scale * (power / total[:, None] - wanted), 0.0)
        place = result + row[:, None] * bins + bin
        tl.store(place, slope, mask=inside[:, None] & is_bin)
    else:
        near = (bin >= low[:, None]) & (bin <= low[:, None] + 1)
        loss = tl.log(total) - tl.sum(tl.where(near, wanted * shifted, 0.0), 1)
        tl.store(result + tl.program_id(0), tl.sum(tl.where(positive, weight * loss, 0.0), 0))
