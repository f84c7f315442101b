"""What people run today for the same job, written with torch's own operators, to measure `mg_ops` against.

(a) `match_loop`: mutual matching image by image and object by object, written plainly.
(b) `match_padded`: mutual matching of the whole batch in padded (B, G, A) tensors, without a data-dependent shape.
(c) `match_compiled`: (b) under torch.compile.
(d) `match_by_torchvision`: torchvision's box_iou and Matcher, the classic IoU assignment (classification only).

(a) and (b) follow the definition independently of mg_ops: native exp, sigmoid and pow, sort and topk. Their
    answers differ from mg_ops only where two qualities are equal or nearly so. Sizes: B images, A anchors, C classes,
    G objects in an image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from benchmarks.cases import CODER, Batch

BACKGROUND, IGNORED = -1, -2
SIGMA, IOU_POSITIVE, IOU_IGNORED = 2.0, 0.5, 0.4


class Match(NamedTuple):
    """Classification and localization matches (B, A) int64, in mg_ops' meaning; None where a baseline has none."""

    cls_match: Tensor
    loc_match: Tensor | None


def decode(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (..., A, 4) from anchors (A, 4) and deltas (..., A, 4)."""
    size = anchors[:, 2:] - anchors[:, :2]
    center = anchors[:, :2] + 0.5 * size
    center = center + deltas[..., :2] / CODER.weights[0] * size
    half = 0.5 * torch.exp((deltas[..., 2:] / CODER.weights[2]).clamp(max=CODER.clip)) * size
    return torch.cat([center - half, center + half], dim=-1)


def area(boxes: Tensor) -> Tensor:
    """Areas of boxes (..., 4)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(columns_1: Tensor, columns_2: Tensor) -> Tensor:
    """Areas of intersection of boxes given as (4, ...) columns that broadcast against each other."""
    w = torch.minimum(columns_1[2], columns_2[2]) - torch.maximum(columns_1[0], columns_2[0])
    h = torch.minimum(columns_1[3], columns_2[3]) - torch.maximum(columns_1[1], columns_2[1])
    return w.clamp(min=0) * h.clamp(min=0)


# ---------------------------------------------------------------------------------------------------------------------
# (a) image by image, object by object


def match_loop(batch: Batch) -> Match:
    """Mutual matching with a loop over images and, within one, over its objects, on torchvision's `box_iou`."""
    images = zip(batch.deltas, batch.logits, batch.boxes_list, batch.labels_list, strict=True)
    cls_matches, loc_matches = zip(*(_match_image(batch.anchors, *image) for image in images), strict=True)
    return Match(torch.stack(cls_matches), torch.stack(loc_matches))


def _match_image(
    anchors: Tensor, deltas: Tensor, logits: Tensor, gt_boxes: Tensor, gt_labels: Tensor
) -> tuple[Tensor, Tensor]:
    num_anchors, device = len(anchors), anchors.device
    pred_boxes = decode(anchors, deltas)
    cls_match = torch.full((num_anchors,), BACKGROUND, device=device)
    loc_match = torch.full((num_anchors,), BACKGROUND, device=device)
    # Of each of the three qualities: the best of each anchor, and the object it is for.
    best_quality = torch.zeros(3, num_anchors, device=device)
    owner = torch.full((3, num_anchors), -1, device=device)
    for index in range(len(gt_boxes)):
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

    for index in range(len(gt_boxes)):
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
    return cls_match, loc_match


# ---------------------------------------------------------------------------------------------------------------------
# (b) the batch in padded tensors, (c) compiled


def match_padded(batch: Batch) -> Match:
    """Mutual matching of a batch at once."""
    return _match_padded(batch.anchors, batch.deltas, batch.logits, batch.padded_boxes, batch.padded_labels)


def match_compiled(batch: Batch) -> Match:
    """The same under torch.compile: compiled once for all cases."""
    compiled = compile_match_padded(batch.anchors.device.type)
    return compiled(batch.anchors, batch.deltas, batch.logits, batch.padded_boxes, batch.padded_labels)


@functools.cache
def compile_match_padded(device: str) -> Callable[..., Match]:
    """What compiles at its first call."""
    return torch.compile(_match_padded, fullgraph=True, dynamic=device == "cpu")


def _match_padded(anchors: Tensor, deltas: Tensor, logits: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> Match:
    batch_size, num_anchors = deltas.shape[:2]
    num_objects = gt_boxes.shape[1]
    box_area = area(gt_boxes).unsqueeze(2)
    objects = area(gt_boxes) > 0
    anchor_columns = anchors.T.reshape(4, 1, 1, num_anchors)
    box_columns = gt_boxes.permute(2, 0, 1).unsqueeze(3)  # (4, B, G, 1)
    pred_boxes = decode(anchors, deltas)

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
    return Match(cls_match, loc_match)


# ---------------------------------------------------------------------------------------------------------------------
# (d) the classic assignment


def match_by_torchvision(batch: Batch) -> Match:
    """torchvision's assignment, as its RetinaNet runs it."""
    matcher = Matcher(IOU_POSITIVE, IOU_IGNORED, allow_low_quality_matches=True)
    background = torch.full((len(batch.anchors),), BACKGROUND, device=batch.anchors.device)
    matches = [matcher(box_iou(boxes, batch.anchors)) if len(boxes) else background for boxes in batch.boxes_list]
    return Match(torch.stack(matches), None)
