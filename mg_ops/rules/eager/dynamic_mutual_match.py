"""Dynamic mutual matching: docs/definition/dynamic_mutual_match.md in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mg_ops.reference import (
    BACKGROUND,
    Image,
    box_iou,
    class_probabilities,
    exp,
    first_argmax,
    float32_numbers,
    ignore_crowds,
    match_images,
    split_arguments,
)


def amplify(iou: Tensor, p: Tensor, sigma: float) -> Tensor:
    """(A, G) the quality of localization."""
    # A division by a Python number becomes a multiplication by its reciprocal on CUDA: divide by a tensor.
    overlapping = iou > 0
    factor = exp(p / torch.full_like(p, sigma))
    return torch.where(overlapping, (torch.where(overlapping, iou, 1.0) * factor).clamp(max=1.0), 0.0)


def match_by(quality: Tensor, objects: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """One task of one image: the match and the qualities of its positives (A,), how many each object has (G,)."""
    num_anchors, num_objects = quality.shape
    if num_anchors == 0 or num_objects == 0:
        match = torch.full((num_anchors,), BACKGROUND, device=quality.device)
        return match, quality.new_zeros(num_anchors), torch.zeros(num_objects, device=quality.device)

    # Claim.
    quality = torch.where(objects, quality, 0.0)
    owner = first_argmax(quality, dim=1)
    owned = torch.where(owner.unsqueeze(1) == torch.arange(num_objects, device=quality.device), quality, 0.0)

    # How many each object selects. Added one after the other, the largest first.
    ranked, order = torch.sort(owned, dim=0, descending=True, stable=True)
    total = quality.new_zeros(num_objects)
    for largest in ranked[:k]:
        total = total + largest
    num_selected = total.floor().clamp(min=1.0)

    # Selection.
    places = torch.arange(num_anchors, device=quality.device).unsqueeze(1).expand_as(order)
    selected = (torch.empty_like(order).scatter_(0, order, places) < num_selected) & (owned > 0)
    match = torch.where(selected.any(1), owner, BACKGROUND)
    return match, torch.where(selected, owned, 0.0).amax(1), selected.sum(0)


def match_image(
    image: Image,
    classification_by_regressed: bool,
    localization_by_amplified: bool,
    k: int,
    sigma: float,
    crowd_overlap: float,
) -> tuple[Tensor, ...]:
    """One image: cls_match, loc_match, soft_targets, loc_weights (A,), num_pos, num_loc_pos (G,)."""
    of_classes = of_boxes = box_iou(image.anchors, image.gt_boxes)
    if classification_by_regressed:
        of_classes = box_iou(image.pred_boxes, image.gt_boxes)
    if localization_by_amplified:
        of_boxes = amplify(of_boxes, class_probabilities(image), sigma)
    cls_match, soft_targets, num_pos = match_by(of_classes, image.objects, k)
    loc_match, loc_weights, num_loc_pos = match_by(of_boxes, image.objects, k)
    return ignore_crowds(cls_match, image, crowd_overlap), loc_match, soft_targets, loc_weights, num_pos, num_loc_pos


def dynamic_mutual_match(*arguments: Any) -> tuple[Tensor, ...]:
    """cls_match, loc_match (B, A) int64, soft_targets, loc_weights (B, A) float32, num_pos, num_loc_pos (N,) int32."""
    inputs, (by_regressed, by_amplified, k, sigma, crowd_overlap) = split_arguments(arguments)
    sigma, crowd_overlap = float32_numbers(sigma, crowd_overlap)

    def match(image: Image) -> tuple[Tensor, ...]:
        return match_image(image, by_regressed, by_amplified, k, sigma, crowd_overlap)

    return match_images(match, inputs, (torch.int64, torch.int64, torch.float32, torch.float32), num_counts=2)
