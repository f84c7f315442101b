"""Max-IoU matching: docs/definition/max_iou_match.md in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mg_ops.reference import (
    BACKGROUND,
    IGNORED,
    Image,
    box_iou,
    first_argmax,
    float32_numbers,
    ignore_crowds,
    match_images,
    split_arguments,
)
from mg_ops.rules.options import LOW_QUALITY


def match_image(
    image: Image,
    iou_positive: float,
    iou_ignored: float,
    low_quality: str,
    iou_low_quality: float,
    crowd_overlap: float,
) -> tuple[Tensor, Tensor]:
    """One image: cls_match (A,), num_pos (G,)."""
    num_anchors, num_objects = len(image.anchors), len(image.gt_boxes)
    match = torch.full((num_anchors,), BACKGROUND, device=image.anchors.device)
    if num_anchors == 0 or num_objects == 0:
        return match, torch.zeros(num_objects, device=match.device)

    # By threshold.
    iou = torch.where(image.objects, box_iou(image.anchors, image.gt_boxes), 0.0)
    owner, owner_iou = first_argmax(iou, dim=1), iou.amax(1)
    match = torch.where(owner_iou >= iou_ignored, IGNORED, match)
    match = torch.where(owner_iou >= iou_positive, owner, match)

    # Low-quality matches.
    if low_quality != "none":
        best = iou.amax(0)
        is_best = (iou == best) & (best > 0) & (best >= iou_low_quality)
        if low_quality == "take_first":
            first = first_argmax(iou, dim=0)
            is_best &= torch.arange(num_anchors, device=iou.device).unsqueeze(1) == first
        largest_index = torch.where(is_best, torch.arange(num_objects, device=iou.device), BACKGROUND).amax(1)
        match = torch.where(is_best.any(1), owner if low_quality == "keep_owner" else largest_index, match)

    num_pos = torch.bincount(match[match >= 0], minlength=num_objects)
    return ignore_crowds(match, image, crowd_overlap), num_pos


def max_iou_match(*arguments: Any) -> tuple[Tensor, ...]:
    """cls_match (B, A) int64 and num_pos (N,) int32 of what the operator takes."""
    inputs, (iou_positive, iou_ignored, low_quality, iou_low_quality, crowd_overlap) = split_arguments(arguments)
    thresholds = float32_numbers(iou_positive, iou_ignored, iou_low_quality, crowd_overlap)
    iou_positive, iou_ignored, iou_low_quality, crowd_overlap = thresholds

    def match(image: Image) -> tuple[Tensor, Tensor]:
        return match_image(image, iou_positive, iou_ignored, LOW_QUALITY[low_quality], iou_low_quality, crowd_overlap)

    return match_images(match, inputs, (torch.int64,), num_counts=1)
