"""Images as SimOTA and RTMDet see them, and what explains a label that differs from a library's. No test framework."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import mg_ops


class DynamicKImage(NamedTuple):
    """One image: A anchors of three levels, G objects, C classes."""

    priors: Tensor  # (A, 4) x, y of the center, and the stride twice
    anchors: Tensor  # (A, 4)
    gt_boxes: Tensor  # (G, 4)
    gt_labels: Tensor  # (G,)
    cls_logits: Tensor  # (A, C)
    pred_boxes: Tensor  # (A, 4)


def random_image(generator: torch.Generator) -> DynamicKImage:
    """Half of them of whole numbers and few different scores, with which many pairs tie."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    width, height = 32 * integer(1, 6), 32 * integer(1, 6)
    levels = []
    for stride in (8, 16, 32):
        y, x = torch.meshgrid(torch.arange(height // stride), torch.arange(width // stride), indexing="ij")
        center = (torch.stack([x.flatten(), y.flatten()], 1) + 0.5 * integer(0, 2)) * stride
        levels.append(torch.cat([center, torch.full_like(center, stride)], dim=1))
    priors = torch.cat(levels)
    points, strides = priors[:, :2], priors[:, 2:]
    num_objects, num_classes = integer(1, 12), integer(1, 40)
    corner = uniform(num_objects, 2) * torch.tensor([width, height]) * 0.9
    gt_boxes = torch.cat([corner, corner + 2 + uniform(num_objects, 2) ** 2 * 100], dim=1)
    gt_labels = torch.randint(0, num_classes, (num_objects,), generator=generator)

    # Predictions between an object near by and a box of the level's size, some of them good.
    middle = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
    nearest = gt_boxes[torch.cdist(points, middle).argmin(1)]
    own = torch.cat([points - 2 * strides, points + 2 * strides], dim=1)
    good = uniform(len(points), 1) ** integer(1, 3)
    pred_boxes = nearest * good + own * (1 - good) + torch.randn(len(points), 4, generator=generator)
    cls_logits = 2 * torch.randn(len(points), num_classes, generator=generator) - integer(0, 5)
    if integer(0, 2) == 1:
        gt_boxes, pred_boxes, cls_logits = gt_boxes.round(), (pred_boxes / 4).round() * 4, cls_logits.round()
    anchors = mg_ops.anchors_from_points(points, strides[:, 0], size=1.0)
    return DynamicKImage(priors, anchors, gt_boxes, gt_labels, cls_logits, pred_boxes)


def random_batch_of_points(seed: int) -> dict[str, Any]:
    """What a rule's function takes, of one to three images with the anchors of the first, and poor predictions or good.

    Few of the boxes of some images overlap an object, so that objects select anchors that are far away.
    """
    generator = torch.Generator().manual_seed(seed)
    first = random_image(generator)
    images = [first]
    for _ in range(int(torch.randint(0, 3, (), generator=generator))):
        image = random_image(generator)
        rows = torch.randint(0, len(image.anchors), (len(first.anchors),), generator=generator)
        columns = torch.randint(0, image.cls_logits.shape[1], (first.cls_logits.shape[1],), generator=generator)
        images.append(image._replace(pred_boxes=image.pred_boxes[rows], cls_logits=image.cls_logits[rows][:, columns]))
    pred_boxes = torch.stack([image.pred_boxes for image in images])
    num_poor = int(torch.randint(0, 3, (), generator=generator)) * len(first.anchors) // 2
    pred_boxes[:, torch.randperm(len(first.anchors), generator=generator)[:num_poor]] += 1000.0
    logits = torch.stack([image.cls_logits for image in images])
    scores = {"cls_logits": logits} if seed % 2 == 0 else {"cls_probabilities": logits.sigmoid()}
    return {
        "anchors": first.anchors,
        "gt_boxes": [image.gt_boxes for image in images],
        "gt_labels": [image.gt_labels for image in images],
        "pred_boxes": pred_boxes,
        **scores,
    }


class Costs(NamedTuple):
    """Of an image's candidates, in float64."""

    candidates: Tensor  # (A,) bool
    iou: Tensor  # (A, G)
    cost: Tensor  # (A, G)
    slack: Tensor  # (A, G) by how much it may be wrong in float32


def explained(costs: Costs, k: int) -> Tensor:
    """(A,) bool: whose label a change of the costs within their slack, or of the sums of IoUs by 1e-6, may change."""
    rows = costs.candidates.nonzero().flatten()
    cost, slack = costs.cost[rows], costs.slack[rows]
    total = costs.iou[rows].sort(dim=0, descending=True).values[:k].sum(0)
    least, most = (total * (1 - 1e-6)).floor().clamp(min=1), (total * (1 + 1e-6)).floor().clamp(min=1)
    # One that few are surely better than may be selected, and one that few may be no worse than must be.
    better = (cost + slack < (cost - slack).unsqueeze(1)).sum(1)
    no_worse = (cost - slack <= (cost + slack).unsqueeze(1)).sum(1)
    may, must = better < most, no_worse <= least
    doubtful = (may & ~must).any(1)
    best = (cost + slack).amin(1, keepdim=True)
    several_owners = (cost - slack <= best).sum(1) > 1
    result = torch.zeros(len(costs.candidates), dtype=torch.bool)
    result[rows] = doubtful | (several_owners & (may.sum(1) > 1))
    return result


def pair_geometry(image: DynamicKImage, radius: float) -> tuple[Tensor, Tensor, Tensor]:
    """(A, G): whether the center is inside the object, whether it is near its center, and the IoU of the prediction."""
    center = image.priors[:, None, :2]
    middle, reach = (image.gt_boxes[:, :2] + image.gt_boxes[:, 2:]) / 2, radius * image.priors[:, None, 2:]
    inside = (center > image.gt_boxes[:, :2]) & (center < image.gt_boxes[:, 2:])
    near_center = (center > middle - reach) & (center < middle + reach)
    return inside.all(-1), near_center.all(-1), mg_ops.box_iou(image.pred_boxes, image.gt_boxes)
