"""What SimOTA and dynamic soft label matching share: each object takes as many anchors as their IoUs add up to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mg_ops.reference import (
    BACKGROUND,
    Image,
    Inputs,
    box_iou,
    exp,
    first_argmax,
    ignore_crowds,
    is_object,
    match_images,
)
from mg_ops.rules.eager.arithmetic import log, log1p

MOST_LOSS = 100.0
"""No cross-entropy of a class is more."""


class ClassLosses(NamedTuple):
    """What the scores of classes say, each at most `MOST_LOSS`."""

    p: Tensor
    of_target: Tensor  # -ln p
    of_other: Tensor  # -ln(1 - p)


class Pairs(NamedTuple):
    """The pairs of an image: M anchors that are candidates, and the G objects that take part."""

    anchors: Tensor  # (M,) their indices
    objects: Tensor  # (G,) their indices
    iou: Tensor  # (M, G) of the predicted box
    classes: ClassLosses  # (M, C)
    labels: ClassLosses  # (M, G) of each object's class


def class_losses(scores: Tensor, are_probabilities: bool) -> ClassLosses:
    """Of scores in float32. NaN counts as p = 0."""
    if are_probabilities:
        p = torch.where(scores.isnan(), 0.0, scores).clamp(0.0, 1.0)
        positive, below_one = p > 0, p < 1
        of_target = torch.where(positive, (-log(torch.where(positive, p, 1.0))).clamp(max=MOST_LOSS), MOST_LOSS)
        return ClassLosses(p, of_target, torch.where(below_one, -log1p(torch.where(below_one, -p, 0.0)), MOST_LOSS))
    x = torch.where(scores.isnan(), -MOST_LOSS, scores).clamp(-MOST_LOSS, MOST_LOSS)
    e = exp(-x.abs())
    tail = log1p(e)
    p = torch.where(x < 0, e, 1.0) / (1.0 + e)
    return ClassLosses(p, (-x).clamp(min=0.0) + tail, x.clamp(min=0.0) + tail)


def anchor_centers(image: Image) -> tuple[Tensor, Tensor]:
    """(A, 2) their centers, (A, 1) their widths."""
    first, second = image.anchors[:, :2], image.anchors[:, 2:]
    return (first + second) * 0.5, (second - first)[:, :1]


def is_between(points: Tensor, boxes: Tensor) -> Tensor:
    """(A, 1, 2) points and (..., G, 4) boxes -> (A, G) bool: inside, and not on a side."""
    return ((points > boxes[..., :2]) & (points < boxes[..., 2:])).all(-1)


def make_pairs(image: Image, near: Tensor) -> Pairs:
    """The pairs, where `near` (A, G) says which anchors are near which object."""
    objects = image.objects.nonzero().flatten()
    near = near[:, objects] & is_object(image.anchors).unsqueeze(1)
    anchors = near.any(1).nonzero().flatten()
    scores, labels = image.cls_scores[anchors].float(), image.gt_labels[objects].long()
    unknown = scores.new_full((len(scores), 1), torch.nan)
    labels = torch.where((labels >= 0) & (labels < scores.shape[1]), labels, scores.shape[1])
    return Pairs(
        anchors,
        objects,
        box_iou(image.pred_boxes[anchors], image.gt_boxes[objects]),
        class_losses(scores, image.scores_are_probabilities),
        class_losses(torch.cat([scores, unknown], dim=1)[:, labels], image.scores_are_probabilities),
    )


def cost_of(cls_cost: Tensor, pairs: Pairs, cls_weight: float, iou_weight: float, epsilon: float) -> Tensor:
    """(M, G) what a pair costs for the class, and for the IoU."""
    return cls_cost.clamp(min=0.0) * cls_weight + -log(pairs.iou + epsilon) * iou_weight


def match_pairs(
    image: Image, pairs: Pairs, cost: Tensor, k: int, crowd_overlap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One image: cls_match, soft_targets (A,), num_pos (G,); cost is of the pairs (M, G)."""
    num_anchors, num_objects, device = len(image.anchors), len(image.gt_boxes), image.anchors.device
    match = torch.full((num_anchors,), BACKGROUND, device=device)
    targets = image.anchors.new_zeros(num_anchors)
    num_candidates = len(pairs.anchors)
    if num_candidates > 0:
        # How many each object selects. Added one after the other, the largest first.
        total = pairs.iou.new_zeros(len(pairs.objects))
        for iou in torch.sort(pairs.iou, dim=0, descending=True).values[:k]:
            total = total + iou
        num_selected = total.floor().clamp(1, num_candidates)

        # Selection, conflict.
        order = torch.sort(cost, dim=0, stable=True).indices
        places = torch.arange(num_candidates, device=device).unsqueeze(1).expand_as(order)
        selected = torch.empty_like(order).scatter_(0, order, places) < num_selected
        num_selecting = selected.sum(1)
        owner = torch.where(num_selecting > 1, first_argmax(-cost, dim=1), first_argmax(selected.long(), dim=1))
        taken = num_selecting > 0
        owner = owner[taken]
        match[pairs.anchors[taken]] = pairs.objects[owner]
        targets[pairs.anchors[taken]] = pairs.iou[taken].gather(1, owner.unsqueeze(1)).squeeze(1)

    num_pos = torch.bincount(match[match >= 0], minlength=num_objects)
    return ignore_crowds(match, image, crowd_overlap), targets, num_pos


def match_batch(match_image: Callable[[Image], tuple[Tensor, Tensor, Tensor]], inputs: Inputs) -> tuple[Tensor, ...]:
    """cls_match (B, A) int64, soft_targets (B, A) float32, num_pos (N,) int32."""
    return match_images(match_image, inputs, (torch.int64, torch.float32), num_counts=1)
