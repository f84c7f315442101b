"""Task-aligned matching: docs/definition/task_aligned_match.md in PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mg_ops.reference import (
    BACKGROUND,
    Image,
    box_iou,
    class_probabilities,
    finite_or_empty,
    first_argmax,
    float32_numbers,
    ignore_crowds,
    match_images,
    positive_ratio,
    split_arguments,
)
from mg_ops.rules.eager.arithmetic import arctangent, power
from mg_ops.rules.options import CONFLICT


class Options(NamedTuple):
    """Of the operator, in its order; numbers as float32 has them."""

    alpha: float
    beta: float
    k: int
    k_after_conflict: int  # 0: no such step
    by_ciou: bool
    inside_first: bool  # candidates="inside"
    conflict: int  # of CONFLICT
    minimum_side: float
    center_margin: float
    epsilon: float
    crowd_overlap: float


def box_ciou(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """(A, 4) and (G, 4) float32 boxes -> (A, G) CIoU, 0 where it is negative or the boxes do not overlap."""
    iou = box_iou(boxes_1, boxes_2)
    boxes_1, boxes_2 = finite_or_empty(boxes_1).unsqueeze(1), finite_or_empty(boxes_2)
    distance = (boxes_2[..., :2] + boxes_2[..., 2:]) - (boxes_1[..., :2] + boxes_1[..., 2:])
    around = torch.maximum(boxes_1[..., 2:], boxes_2[..., 2:]) - torch.minimum(boxes_1[..., :2], boxes_2[..., :2])
    rho2 = (distance[..., 0] * distance[..., 0] + distance[..., 1] * distance[..., 1]) * 0.25
    c2 = around[..., 0] * around[..., 0] + around[..., 1] * around[..., 1]

    def angle(boxes: Tensor) -> Tensor:
        x1, y1, x2, y2 = boxes.unbind(-1)
        return arctangent((x2 - x1) / (y2 - y1))

    difference = angle(boxes_2) - angle(boxes_1)
    v = (difference * difference) * 0.40528473456935109
    ciou = iou - (rho2 / c2 + v * (v / ((v - iou) + 1.0000001)))
    return torch.where((iou > 0) & (ciou > 0), ciou, 0.0)


def is_inside(image: Image, minimum_side: float, center_margin: float) -> Tensor:
    """(A, G) bool: the center of the anchor is inside the object."""
    center = (image.anchors[:, :2] + image.anchors[:, 2:]) * 0.5
    first, second = image.gt_boxes[:, :2], image.gt_boxes[:, 2:]
    middle, short = (first + second) * 0.5, second - first < minimum_side
    half = 0.5 * torch.tensor(minimum_side, device=first.device)
    first, second = torch.where(short, middle - half, first), torch.where(short, middle + half, second)
    center = center.unsqueeze(1)
    inside = (center - first > center_margin) & (second - center > center_margin) & center.isfinite()
    return inside.all(-1) & image.objects


def select_best(quality: Tensor, k: int) -> Tensor:
    """(A, G) -> bool: the k largest above 0 of each column, the lower index first on ties."""
    best = torch.sort(quality, dim=0, descending=True, stable=True).indices[:k]
    return torch.zeros_like(quality, dtype=torch.bool).scatter_(0, best, True) & (quality > 0)


def match_image(image: Image, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """One image: cls_match, soft_targets (A,), num_pos (G,)."""
    num_anchors, num_objects, device = len(image.anchors), len(image.gt_boxes), image.anchors.device
    match = torch.full((num_anchors,), BACKGROUND, device=device)
    targets = torch.zeros(num_anchors, device=device)
    if num_anchors == 0 or num_objects == 0:
        return match, targets, torch.zeros(num_objects, device=device)

    # Quality and gate.
    u = (box_ciou if options.by_ciou else box_iou)(image.pred_boxes, image.gt_boxes)
    t = power(class_probabilities(image), options.alpha) * power(u, options.beta)
    t = torch.where((u > 0) & image.objects, t, 0.0)
    inside = is_inside(image, options.minimum_side, options.center_margin)

    # Selection.
    selected = select_best(torch.where(inside, t, 0.0) if options.inside_first else t, options.k) & inside

    # Conflict.
    num_selecting = selected.sum(1)
    rivals = {"selecting": selected, "inside": inside, "all": image.objects}[CONFLICT[options.conflict]]
    owner = first_argmax(torch.where(rivals, u, -1.0), dim=1)
    owner = torch.where(num_selecting == 1, first_argmax(selected.long(), dim=1), owner)
    match = torch.where(num_selecting > 0, owner, BACKGROUND)
    owned = match.unsqueeze(1) == torch.arange(num_objects, device=device)
    if options.k_after_conflict > 0:
        owned = select_best(torch.where(owned, t, 0.0), options.k_after_conflict)
        match = torch.where(owned.any(1), match, BACKGROUND)

    # Soft targets.
    t_max, u_max = torch.where(owned, t, 0.0).amax(0), torch.where(owned, u, 0.0).amax(0)
    of_pairs = positive_ratio(t * u_max, t_max + options.epsilon)
    targets = torch.where(owned, of_pairs, 0.0).amax(1)
    return ignore_crowds(match, image, options.crowd_overlap), targets, owned.sum(0)


def task_aligned_match(*arguments: Any) -> tuple[Tensor, ...]:
    """cls_match (B, A) int64, soft_targets (B, A) float32, num_pos (N,) int32 of what the operator takes."""
    inputs, given = split_arguments(arguments)
    alpha, beta, *choices, minimum_side, center_margin, epsilon, crowd_overlap = given
    numbers = float32_numbers(alpha, beta, minimum_side, center_margin, epsilon, crowd_overlap)
    options = Options(*[*numbers[:2], *choices, *numbers[2:]])
    return match_images(lambda image: match_image(image, options), inputs, (torch.int64, torch.float32), num_counts=1)
