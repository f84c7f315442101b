"""SimOTA: docs/definition/simota_match.md in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mg_ops.reference import Image, float32_numbers, split_arguments
from mg_ops.rules.eager.arithmetic import sum_rows
from mg_ops.rules.eager.dynamic_k import (
    anchor_centers,
    cost_of,
    is_between,
    make_pairs,
    match_batch,
    match_pairs,
)
from mg_ops.rules.options import SIMOTA_CANDIDATES


def match_image(
    image: Image,
    k: int,
    center_radius: float,
    iou_weight: float,
    cls_weight: float,
    candidates: str,
    crowd_overlap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One image: cls_match, soft_targets (A,), num_pos (G,)."""
    # Gate.
    center, width = anchor_centers(image)
    center, radius = center.unsqueeze(1), (center_radius * width).unsqueeze(1)
    middle = (image.gt_boxes[:, :2] + image.gt_boxes[:, 2:]) * 0.5
    near_center = is_between(center, torch.cat([middle - radius, middle + radius], dim=-1))
    if candidates == "center":
        near = preferred = near_center
        penalty, epsilon = 1e6, 1e-8
    else:
        inside = is_between(center, image.gt_boxes)
        near, preferred = inside | near_center, inside & near_center
        penalty, epsilon = 1e5, 1e-7
    pairs = make_pairs(image, near)

    # Cost.
    if_no_class = sum_rows(pairs.classes.of_other).unsqueeze(1)
    cls_cost = if_no_class + (pairs.labels.of_target - pairs.labels.of_other)
    cost = cost_of(cls_cost, pairs, cls_weight, iou_weight, epsilon)
    cost = cost + torch.where(preferred[pairs.anchors][:, pairs.objects], 0.0, penalty)
    return match_pairs(image, pairs, cost, k, crowd_overlap)


def simota_match(*arguments: Any) -> tuple[Tensor, ...]:
    """cls_match (B, A) int64, soft_targets (B, A) float32, num_pos (N,) int32 of what the operator takes."""
    inputs, (k, center_radius, iou_weight, cls_weight, candidates, crowd_overlap) = split_arguments(arguments)
    center_radius, iou_weight, cls_weight, crowd_overlap = float32_numbers(
        center_radius, iou_weight, cls_weight, crowd_overlap
    )

    def match(image: Image) -> tuple[Tensor, Tensor, Tensor]:
        return match_image(
            image, k, center_radius, iou_weight, cls_weight, SIMOTA_CANDIDATES[candidates], crowd_overlap
        )

    return match_batch(match, inputs)
