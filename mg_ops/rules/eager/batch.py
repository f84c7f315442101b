"""What the eager definitions share: a batch of packed objects, image by image, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mg_ops.reference import (
    BACKGROUND,
    IGNORED,
    area,
    decode,
    finite_or_empty,
    intersection_area,
    is_object,
    positive_ratio,
)


class Image(NamedTuple):
    """One image: A anchors, C classes, G objects."""

    anchors: Tensor  # (A, 4) float32
    pred_boxes: Tensor  # (A, 4) float32, decoded
    cls_scores: Tensor  # (A, C) as given
    scores_are_probabilities: bool
    gt_boxes: Tensor  # (G, 4) float32
    gt_labels: Tensor  # (G,)
    objects: Tensor  # (G,) bool: which objects take part
    crowds: Tensor  # (K, 4) float32: the crowd regions


def float32_numbers(*numbers: float) -> list[float]:
    """The numbers, rounded to float32."""
    rounded: list[float] = torch.tensor(numbers, dtype=torch.float32, device="cpu").tolist()
    return rounded


def match_images(
    match_image: Callable[[Image], Sequence[Tensor]],
    dtypes: Sequence[torch.dtype],
    anchors: Tensor,
    pred_boxes: Tensor,
    cls_scores: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    gt_crowd: Tensor | None,
    box_coder: Sequence[float] | None,
    scores_are_probabilities: bool,
) -> tuple[Tensor, ...]:
    """`match_image` of each image, whose results (A,) have these dtypes; the first is the match, which is counted."""
    batch_size, num_anchors = cls_scores.shape[:2]
    num_gt, device = len(gt_boxes), anchors.device
    # Wide inputs are rounded once, here, so that every backend computes from the same float32 numbers.
    anchors, gt_boxes = anchors.float(), gt_boxes.float()
    coder = float32_numbers(*(box_coder or ()))
    crowd = torch.zeros(num_gt, dtype=torch.bool, device=device) if gt_crowd is None else gt_crowd
    results = [torch.empty((batch_size, num_anchors), dtype=dtype, device=device) for dtype in dtypes]
    num_pos = torch.zeros(num_gt, dtype=torch.int32, device=device)
    # Within 0 and N and never decreasing, so that images never share an object.
    offsets = list(accumulate((min(max(offset, 0), num_gt) for offset in gt_offsets.tolist()), max))
    with torch.autocast(device.type, enabled=False):
        for image in range(batch_size):
            objects = slice(offsets[image], offsets[image + 1])
            boxes, is_crowd = gt_boxes[objects], crowd[objects]
            decoded = pred_boxes[image].float()
            if box_coder is not None:
                decoded = decode(anchors, decoded, coder[:4], coder[4])
            of_image = match_image(
                Image(
                    anchors,
                    decoded,
                    cls_scores[image],
                    scores_are_probabilities,
                    boxes,
                    gt_labels[objects],
                    is_object(boxes) & ~is_crowd,
                    boxes[is_crowd],
                )
            )
            for result, value in zip(results, of_image, strict=True):
                result[image] = value
            matched = results[0][image]
            num_pos[objects] = torch.bincount(matched[matched >= 0], minlength=len(boxes)).to(torch.int32)
    return *results, num_pos


def ignore_crowds(match: Tensor, image: Image, crowd_overlap: float) -> Tensor:
    """(A,) the match, with the background that a crowd region covers ignored."""
    if len(image.crowds) == 0:
        return match
    crowds, anchors = finite_or_empty(image.crowds), finite_or_empty(image.anchors)
    coverage = positive_ratio(intersection_area(anchors, crowds), area(anchors).unsqueeze(1))
    covered = (coverage >= crowd_overlap).any(1)
    return torch.where(covered & (match == BACKGROUND), IGNORED, match)
