"""Random batches as detectors have them: pyramids of anchors, crowded objects, predictions from raw to trained.

The fused kernels leave out what their bounds say cannot matter, and look again where they were too hopeful. Here,
unlike in random_batches.py, boxes have the sizes for which that happens.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

import mg_ops


def make_pyramid(image_size: int, num_levels: int, per_cell: int) -> Tensor:
    """Anchors (A, 4) of a pyramid with strides 8, 16, ...: 1 to 6 a cell, of three ratios and two sizes."""
    levels = []
    for level in range(num_levels):
        stride, base = 8 * 2**level, 24.0 * 2**level
        center = (torch.arange(image_size // stride) + 0.5) * stride
        y, x = torch.meshgrid(center, center, indexing="ij")
        sizes = torch.tensor(
            [
                [base * scale * ratio**0.5, base * scale / ratio**0.5]
                for scale in (1.0, 2**0.5)
                for ratio in (1.0, 2.0, 0.5)
            ]
        )[:per_cell]
        centers = torch.stack([x, y], -1).reshape(-1, 1, 2)
        levels.append(torch.cat([centers - sizes / 2, centers + sizes / 2], -1).reshape(-1, 4))
    return torch.cat(levels)


def pyramid_batch(seed: int) -> dict[str, Any]:
    """Arguments of `mg_ops.mutual_match`, the same for the same seed."""
    choose = random.Random(seed).choice
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    image_size = choose([64, 96, 128, 200])
    anchors = make_pyramid(image_size, choose([1, 2, 3]), choose([1, 3, 6]))
    if choose([True, False]):
        anchors = anchors.clamp(0, image_size)
    if choose([True, False, False, False, False]):
        anchors = anchors[torch.randperm(len(anchors), generator=generator)]
    num_anchors, batch_size, num_classes = len(anchors), choose([1, 2, 4]), choose([1, 3, 20])
    gt_boxes, gt_labels = [], []
    for _ in range(batch_size):
        count, num_clusters = choose([1, 2, 5, 10, 30, 80, 200]), choose([0, 1, 3])
        center = torch.rand(count, 2, generator=generator) * image_size
        if num_clusters:
            center = center[:num_clusters].repeat(count // num_clusters + 1, 1)[:count] + normal(count, 2) * choose(
                [0.5, 3, 10]
            )
        size = torch.exp(normal(count, 2) * choose([0.1, 0.5, 1.0]) + math.log(choose([8, 16, 30, 60])))
        gt_boxes.append(torch.cat([center - size / 2, center + size / 2], -1))
        gt_labels.append(torch.randint(0, num_classes, (count,), generator=generator))
    cls_logits = normal(batch_size, num_anchors, num_classes) * choose([0.1, 1, 4, 20]) + choose([-4.6, 0, 3])
    if choose([True, False, False]):  # a few that the network is sure of
        cls_logits[torch.rand(cls_logits.shape, generator=generator) < 0.02] += 12
    iou_positive, iou_ignored = choose([(0.5, 0.4), (0.5, 0.4), (0.9, 0.1), (0.7, 0.7), (0.3, 0.3), (0.05, 0.01)])
    gt_crowd = None
    if choose([True, False, False, False, False]):
        gt_crowd = [torch.rand(len(boxes), generator=generator) < 0.3 for boxes in gt_boxes]
    return {
        "anchors": anchors,
        "box_deltas": normal(batch_size, num_anchors, 4) * choose([0, 0.1, 0.3, 2, 20]),
        "cls_logits": cls_logits,
        "gt_boxes": gt_boxes,
        "gt_labels": gt_labels,
        "gt_crowd": gt_crowd,
        "box_coder": mg_ops.BoxCoder(),
        "strategy": choose(["mutual", "mutual", "mutual", "iou", "localize_to_classify", "classify_to_localize"]),
        "sigma": choose([2.0, 2.0, 2.0, 1.5, 1.1, 1.03, 3.3, 10.0]),
        "iou_positive": iou_positive,
        "iou_ignored": iou_ignored,
    }
