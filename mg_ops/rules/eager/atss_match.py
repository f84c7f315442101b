"""ATSS: docs/definition/atss_match.md in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mg_ops.reference import (
    BACKGROUND,
    Image,
    box_iou,
    first_argmax,
    float32_numbers,
    ignore_crowds,
    match_images,
    split_arguments,
)
from mg_ops.rules.eager.arithmetic import square_root, sum_rows


def centers(boxes: Tensor) -> Tensor:
    """(..., 4) boxes -> (..., 2) their centers."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def center_distance(anchors: Tensor, gt_boxes: Tensor) -> Tensor:
    """(A, 4) and (G, 4) boxes -> (A, G) distances of their centers; infinite where that is not a number."""
    x, y = (centers(anchors).unsqueeze(1) - centers(gt_boxes)).unbind(-1)
    distance = square_root(x * x + y * y)
    return torch.where(distance.isnan(), torch.inf, distance)


def mean_plus_deviation(iou: Tensor) -> Tensor:
    """(n, G) IoUs of candidates -> (G,) their mean plus their unbiased standard deviation, of one alone 0."""
    # A division by a Python number becomes a multiplication by its reciprocal on CUDA: divide by a tensor.
    count = torch.full_like(iou[0], len(iou))
    mean = sum_rows(iou.T) / count
    deviation = iou - mean
    return mean + square_root(sum_rows((deviation * deviation).T) / (count - 1).clamp(min=1))


def match_image(
    image: Image, level_sizes: Sequence[int], k: int, center_margin: float | None, crowd_overlap: float
) -> tuple[Tensor, Tensor]:
    """One image: cls_match (A,), num_pos (G,)."""
    anchors, gt_boxes = image.anchors, image.gt_boxes
    num_anchors, num_objects = len(anchors), len(gt_boxes)
    match = torch.full((num_anchors,), BACKGROUND, device=anchors.device)
    if num_anchors == 0 or num_objects == 0:
        return match, torch.zeros(num_objects, device=match.device)

    # Candidates: (n, G), level by level, the nearest first.
    nearest, first = [], 0
    for distance in center_distance(anchors, gt_boxes).split(list(level_sizes)):
        nearest.append(first + torch.sort(distance, dim=0, stable=True).indices[:k])
        first += len(distance)
    candidates = torch.cat(nearest)

    # Selection by each object.
    iou = torch.where(image.objects, box_iou(anchors, gt_boxes), 0.0).gather(0, candidates)
    selected = (iou >= mean_plus_deviation(iou)) & (iou > 0)
    if center_margin is not None:
        center = centers(anchors)[candidates]
        first_corner, second_corner = gt_boxes[:, :2], gt_boxes[:, 2:]
        selected &= (torch.minimum(center - first_corner, second_corner - center) > center_margin).all(-1)

    # Conflict.
    quality = iou.new_zeros(num_anchors, num_objects).scatter(0, candidates, torch.where(selected, iou, 0.0))
    match = torch.where(quality.amax(1) > 0, first_argmax(quality, dim=1), match)

    num_pos = torch.bincount(match[match >= 0], minlength=num_objects)
    return ignore_crowds(match, image, crowd_overlap), num_pos


def atss_match(*arguments: Any) -> tuple[Tensor, ...]:
    """cls_match (B, A) int64 and num_pos (N,) int32 of what the operator takes."""
    inputs, (level_sizes, k, center_margin, crowd_overlap) = split_arguments(arguments)
    margin = None if center_margin is None else float32_numbers(center_margin)[0]
    (overlap,) = float32_numbers(crowd_overlap)
    return match_images(
        lambda image: match_image(image, level_sizes, k, margin, overlap), inputs, (torch.int64,), num_counts=1
    )
