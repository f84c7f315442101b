"""Dynamic soft label matching: docs/definition/dynamic_soft_label_match.md in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mg_ops.reference import Image, float32_numbers, split_arguments
from mg_ops.rules.eager.arithmetic import exp10, sum_rows
from mg_ops.rules.eager.dynamic_k import (
    anchor_centers,
    cost_of,
    is_between,
    make_pairs,
    match_batch,
    match_pairs,
)


def match_image(
    image: Image, k: int, soft_center_radius: float, iou_weight: float, crowd_overlap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One image: cls_match, soft_targets (A,), num_pos (G,)."""
    # Gate.
    center, width = anchor_centers(image)
    pairs = make_pairs(image, is_between(center.unsqueeze(1), image.gt_boxes))

    # Cost.
    p, of_target, of_other = pairs.labels
    if_no_class = sum_rows(pairs.classes.of_other * (pairs.classes.p * pairs.classes.p)).unsqueeze(1)
    cross_entropy = pairs.iou * of_target + (1.0 - pairs.iou) * of_other
    difference = pairs.iou - p
    cls_cost = if_no_class + (cross_entropy * (difference * difference) - of_other * (p * p))
    cost = cost_of(cls_cost, pairs, 1.0, iou_weight, 1e-7)
    middle = (image.gt_boxes[:, :2] + image.gt_boxes[:, 2:]) * 0.5
    x, y = (center[pairs.anchors].unsqueeze(1) - middle[pairs.objects]).unbind(-1)
    distance = exp10((x * x + y * y).sqrt() / width[pairs.anchors] - soft_center_radius)
    cost = cost + torch.where(distance.isfinite(), distance, torch.inf)
    return match_pairs(image, pairs, cost, k, crowd_overlap)


def dynamic_soft_label_match(*arguments: Any) -> tuple[Tensor, ...]:
    """cls_match (B, A) int64, soft_targets (B, A) float32, num_pos (N,) int32 of what the operator takes."""
    inputs, (k, *numbers) = split_arguments(arguments)
    soft_center_radius, iou_weight, crowd_overlap = float32_numbers(*numbers)

    def match(image: Image) -> tuple[Tensor, Tensor, Tensor]:
        return match_image(image, k, soft_center_radius, iou_weight, crowd_overlap)

    return match_batch(match, inputs)
