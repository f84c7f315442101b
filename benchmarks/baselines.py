"""What people run today for the same job, written with torch's own operators, to measure `mg_ops` against.

(a) `match_per_image`: mutual matching image by image and object by object, written plainly.
(b) `match_batched`: mutual matching of the whole batch in padded (B, G, A) tensors, without a data-dependent shape.
(c) (b) under torch.compile: see methods.py.
(d) `match_by_torchvision`: torchvision's box_iou and Matcher, the classic IoU assignment (classification only).
(e) `make_task_aligned_assigner`: ultralytics' assigner, a different algorithm of the same family, where it is
    installed.

(a) and (b) follow the definition independently of mg_ops: native exp, sigmoid and pow, sort and topk. Their
    answers differ from mg_ops only where two qualities are equal or nearly so. Sizes: B images, A anchors, C classes,
    G objects in an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

BACKGROUND, IGNORED = -1, -2
SIGMA, IOU_POSITIVE, IOU_IGNORED, CROWD_OVERLAP = 2.0, 0.5, 0.4, 0.5


class Match(NamedTuple):
    """Classification and localization matches (B, A) int64, in mg_ops' meaning; None where a baseline has none."""

    cls_match: Tensor
    loc_match: Tensor | None


def decode(anchors: Tensor, deltas: Tensor, weights: Sequence[float], clip: float) -> Tensor:
    """Boxes (..., A, 4) from anchors (A, 4) and deltas (..., A, 4)."""
    size = anchors[:, 2:] - anchors[:, :2]
    center = anchors[:, :2] + 0.5 * size
    center = center + deltas[..., :2] / weights[0] * size
    half = 0.5 * torch.exp((deltas[..., 2:] / weights[2]).clamp(max=clip)) * size
    return torch.cat([center - half, center + half], dim=-1)


def is_object(boxes: Tensor) -> Tensor:
    """Which boxes (..., 4) are finite and have an area."""
    return boxes.isfinite().all(-1) & (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def area(boxes: Tensor) -> Tensor:
    """Areas of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(columns_1: Tensor, columns_2: Tensor) -> Tensor:
    """Areas of intersection of boxes given as (4, ...) columns that broadcast against each other."""
    w = torch.minimum(columns_1[2], columns_2[2]) - torch.maximum(columns_1[0], columns_2[0])
    h = torch.minimum(columns_1[3], columns_2[3]) - torch.maximum(columns_1[1], columns_2[1])
    return w.clamp(min=0) * h.clamp(min=0)


def ignore_crowds(
    match: Tensor, anchor_columns: Tensor, anchor_area: Tensor, gt_boxes: Tensor, gt_crowd: Tensor
) -> Tensor:
    """A match (A,) of one image whose background under a crowd region is ignored."""
    crowds = gt_boxes[gt_crowd & is_object(gt_boxes)]
    if len(crowds) == 0:
        return match
    coverage = intersection(anchor_columns.unsqueeze(1), crowds.T.unsqueeze(2)) / anchor_area
    covered = (coverage >= CROWD_OVERLAP).any(dim=0)
    return torch.where(covered & (match == BACKGROUND), IGNORED, match)


# ---------------------------------------------------------------------------------------------------------------------
# (a) image by image, object by object


def match_per_image(
    anchors: Tensor,
    deltas: Tensor,
    logits: Tensor,
    gt_boxes: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
    gt_crowd: Sequence[Tensor] | None,
    weights: Sequence[float],
    clip: float,
) -> Match:
    """Mutual matching with a loop over images and, within one, over its objects, on torchvision's `box_iou`.

    Args:
        anchors: (A, 4). deltas: (B, A, 4). logits: (B, A, C).
        gt_boxes, gt_labels, gt_crowd: lists of B tensors (G, 4), (G,), (G,) bool.
        weights, clip: of the box coder.
    """
    pred_boxes = (decode(anchors, of_image, weights, clip) for of_image in deltas)
    crowds = gt_crowd or [None] * len(deltas)
    images = zip(pred_boxes, logits, gt_boxes, gt_labels, crowds, strict=True)
    cls_matches, loc_matches = zip(*(_match_image(anchors, *image) for image in images), strict=True)
    return Match(torch.stack(cls_matches), torch.stack(loc_matches))


def _match_image(
    anchors: Tensor, pred_boxes: Tensor, logits: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_crowd: Tensor | None
) -> tuple[Tensor, Tensor]:
    num_anchors, device = len(anchors), anchors.device
    cls_match = torch.full((num_anchors,), BACKGROUND, device=device)
    loc_match = torch.full((num_anchors,), BACKGROUND, device=device)
    # Of each of the three qualities: the best of each anchor, and the object it is for.
    best_quality = torch.zeros(3, num_anchors, device=device)
    owner = torch.full((3, num_anchors), -1, device=device)
    objects = is_object(gt_boxes)
    if gt_crowd is not None:
        objects &= ~gt_crowd
    for index in objects.nonzero().squeeze(1).tolist():
        box = gt_boxes[index : index + 1]
        q_anchor = box_iou(box, anchors).squeeze(0)
        if q_anchor.max() == 0:
            continue  # an object that no anchor overlaps takes no part
        q_regressed = box_iou(box, pred_boxes).squeeze(0).nan_to_num(0.0)
        p = logits[:, gt_labels[index]].sigmoid()
        q_amplified = q_anchor ** ((SIGMA - p) / SIGMA)
        best_regressed = q_regressed.argmax() if q_regressed.max() > 0 else q_anchor.argmax()
        # The best anchor of each quality is the object's, whatever others offer.
        claimed = torch.stack([q_anchor.argmax(), best_regressed, q_amplified.argmax()])
        quality = torch.stack([q_anchor, q_regressed, q_amplified]).scatter(1, claimed.unsqueeze(1), 1.0)
        better = quality > best_quality
        best_quality = torch.where(better, quality, best_quality)
        owner = torch.where(better, index, owner)

    for index in objects.nonzero().squeeze(1).tolist():
        by_anchor = owner[0] == index
        positive = max(int((by_anchor & (best_quality[0] >= IOU_POSITIVE)).sum()), 1)
        total = max(int((by_anchor & (best_quality[0] >= IOU_IGNORED)).sum()), positive)
        competing = (owner[1] == index).nonzero().squeeze(1)
        ranked = best_quality[1, competing].topk(min(total, len(competing))).indices
        cls_match[competing[ranked]] = IGNORED
        cls_match[competing[ranked[:positive]]] = index
        competing = (owner[2] == index).nonzero().squeeze(1)
        ranked = best_quality[2, competing].topk(min(positive, len(competing))).indices
        loc_match[competing[ranked]] = index

    if gt_crowd is not None:
        cls_match = ignore_crowds(cls_match, anchors.T, area(anchors), gt_boxes, gt_crowd)
    return cls_match, loc_match


# ---------------------------------------------------------------------------------------------------------------------
# (b) the batch in padded tensors


def match_batched(
    anchors: Tensor,
    deltas: Tensor,
    logits: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_crowd: Tensor | None,
    weights: Sequence[float],
    clip: float,
) -> Match:
    """Mutual matching of a batch at once.

    Args:
        anchors: (A, 4). deltas: (B, A, 4). logits: (B, A, C).
        gt_boxes, gt_labels, gt_crowd: (B, G, 4), (B, G), (B, G) bool; a place without an object holds a box of zeros.
        weights, clip: of the box coder.
    """
    batch_size, num_anchors = deltas.shape[:2]
    num_objects = gt_boxes.shape[1]
    objects = is_object(gt_boxes)
    if gt_crowd is not None:
        objects = objects & ~gt_crowd
    anchor_columns = anchors.T.reshape(4, 1, 1, num_anchors)
    box_columns = gt_boxes.permute(2, 0, 1).unsqueeze(3)  # (4, B, G, 1)
    box_area = area(gt_boxes).unsqueeze(2)
    pred_boxes = decode(anchors, deltas, weights, clip)

    inter = intersection(anchor_columns, box_columns)
    q_anchor = torch.where(objects.unsqueeze(2), inter / (area(anchors) + box_area - inter), 0.0)
    best_quality, best = q_anchor.max(dim=2)
    objects = objects & (best_quality > 0)
    inter = intersection(pred_boxes.permute(2, 0, 1).unsqueeze(2), box_columns)
    q_regressed = torch.where(objects.unsqueeze(2), inter / (area(pred_boxes).unsqueeze(1) + box_area - inter), 0.0)
    p = logits.transpose(1, 2).gather(1, gt_labels.unsqueeze(2).expand(-1, -1, num_anchors)).sigmoid()
    q_amplified = q_anchor ** ((SIGMA - p) / SIGMA)

    def claim(quality: Tensor, claimed: Tensor) -> tuple[Tensor, Tensor]:
        """Owners (B, A), -1 for none, and their qualities, once every object holds the anchor it claimed."""
        quality = quality.scatter(2, claimed.unsqueeze(2), objects.to(quality.dtype).unsqueeze(2))
        value, owner = quality.max(dim=1)
        return torch.where(value > 0, owner, -1), value

    anchor_owner, anchor_quality = claim(q_anchor, best)
    regressed_quality, best_regressed = q_regressed.max(dim=2)
    cls_owner, cls_quality = claim(q_regressed, torch.where(regressed_quality > 0, best_regressed, best))
    loc_owner, loc_quality = claim(q_amplified, q_amplified.argmax(dim=2))

    def count(threshold: float) -> Tensor:
        counts = torch.zeros((batch_size, num_objects + 1), dtype=torch.int64, device=anchors.device)
        return counts.scatter_add(1, anchor_owner + 1, (anchor_quality >= threshold).long())[:, 1:]

    num_pos = count(IOU_POSITIVE).clamp(min=1)
    num_total = count(IOU_IGNORED).maximum(num_pos)

    place = torch.arange(num_anchors, device=anchors.device).expand(batch_size, -1)

    def rank(owner: Tensor, quality: Tensor) -> Tensor:
        """(B, A) place of each anchor among those of its owner."""
        order = quality.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, owner.gather(1, order).argsort(dim=1, stable=True))
        grouped = owner.gather(1, order)
        start = torch.searchsorted(grouped, grouped)
        return torch.zeros_like(order).scatter(1, order, place - start)

    cls_rank, owner = rank(cls_owner, cls_quality), cls_owner.clamp(min=0)
    cls_match = torch.where((cls_owner >= 0) & (cls_rank < num_total.gather(1, owner)), IGNORED, BACKGROUND)
    cls_match = torch.where((cls_owner >= 0) & (cls_rank < num_pos.gather(1, owner)), cls_owner, cls_match)
    loc_rank, owner = rank(loc_owner, loc_quality), loc_owner.clamp(min=0)
    loc_match = torch.where((loc_owner >= 0) & (loc_rank < num_pos.gather(1, owner)), loc_owner, BACKGROUND)

    if gt_crowd is not None:
        crowds = torch.where((gt_crowd & is_object(gt_boxes)).unsqueeze(2), gt_boxes, 0.0)
        coverage = intersection(anchor_columns, crowds.permute(2, 0, 1).unsqueeze(3)) / area(anchors)
        covered = (coverage >= CROWD_OVERLAP).any(dim=1)
        cls_match = torch.where(covered & (cls_match == BACKGROUND), IGNORED, cls_match)
    return Match(cls_match, loc_match)


# ---------------------------------------------------------------------------------------------------------------------
# (d) the classic assignment, (e) another algorithm of the family


def match_by_torchvision(anchors: Tensor, gt_boxes: Sequence[Tensor], gt_crowd: Sequence[Tensor] | None) -> Match:
    """torchvision's assignment, as its RetinaNet runs it.

    Boxes without an area are taken out first. Crowd regions too; the background they cover is ignored, as in mg_ops.

    Args:
        anchors: (A, 4). gt_boxes, gt_crowd: lists of B tensors (G, 4), (G,) bool.
    """
    matcher = Matcher(IOU_POSITIVE, IOU_IGNORED, allow_low_quality_matches=True)
    matches = []
    for image, boxes in enumerate(gt_boxes):
        objects = is_object(boxes)
        if gt_crowd is not None:
            objects &= ~gt_crowd[image]
        index = objects.nonzero().squeeze(1)
        if len(index) == 0:
            match = torch.full((len(anchors),), BACKGROUND, device=anchors.device)
        else:
            match = matcher(box_iou(boxes[index], anchors))
            match = torch.where(match >= 0, index[match.clamp(min=0)], match)
        if gt_crowd is not None:
            match = ignore_crowds(match, anchors.T, area(anchors), boxes, gt_crowd[image])
        matches.append(match)
    return Match(torch.stack(matches), None)


def make_task_aligned_assigner(
    anchors: Tensor, num_classes: int, weights: Sequence[float], clip: float
) -> Callable[[Tensor, Tensor, Tensor, Tensor], object]:
    """ultralytics' TaskAlignedAssigner with its training settings, as a call on (deltas, logits, gt_boxes, gt_labels).

    Its job is a relative of ours: it scores each (object, anchor) pair by classification and regressed IoU, takes the
    10 best for each object, and also gathers the targets. Objects are padded as for `match_batched`.

    Raises:
        ImportError: ultralytics is not installed.
    """
    from ultralytics.utils.tal import TaskAlignedAssigner

    assigner = TaskAlignedAssigner(topk=10, num_classes=num_classes, alpha=0.5, beta=6.0)
    centers = 0.5 * (anchors[:, :2] + anchors[:, 2:])

    def assign(deltas: Tensor, logits: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> object:
        mask = is_object(gt_boxes).unsqueeze(2).float()
        pred_boxes = decode(anchors, deltas, weights, clip)
        return assigner(logits.sigmoid(), pred_boxes, centers, gt_labels.unsqueeze(2), gt_boxes, mask)

    return assign
