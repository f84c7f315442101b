"""Batches of the usual kind, of any size, and the worst ones for ranking. No test framework in here."""

from __future__ import annotations

from typing import Any

import torch
from object_forms import in_form
from torch import Tensor

import mg_ops

WORST = ("all one box", "all scores equal", "one object over all", "every object over all", "garbage predictions")


def detector_batch(
    batch_size: int, num_anchors: int, num_objects: int, *, num_classes: int = 5, seed: int = 0, packed: bool = False
) -> dict[str, Any]:
    """Neighboring anchors are neighbors, there are objects of all sizes; num_objects of each image."""
    random = torch.Generator().manual_seed(seed)

    def boxes(center: Tensor) -> Tensor:
        size = torch.exp(3.5 + 0.7 * torch.randn(len(center), 2, generator=random))
        return torch.cat([center - size / 2, center + size / 2], dim=1)

    place = torch.arange(num_anchors) * (300.0 / max(1, num_anchors))
    gt_boxes = boxes(300 * torch.rand(batch_size * num_objects, 2, generator=random))
    gt_labels = torch.randint(0, num_classes, (batch_size * num_objects,), generator=random)
    counts = [num_objects] * batch_size
    objects, _ = in_form("packed" if packed else "lists", gt_boxes.split(counts), gt_labels.split(counts))
    return {
        "anchors": boxes(torch.stack([(place * 20) % 300, place], dim=1)),
        "box_deltas": 0.5 * torch.randn(batch_size, num_anchors, 4, generator=random),
        "cls_logits": 2 * torch.randn(batch_size, num_anchors, num_classes, generator=random) - 2,
        **objects,
        "box_coder": mg_ops.BoxCoder(),
    }


def worst_batch(kind: str, num_anchors: int) -> dict[str, Any]:
    """Two images in which nearly all anchors compete for one object, or all of them tie."""
    arguments = detector_batch(2, num_anchors, 6, packed=True)
    del arguments["box_coder"], arguments["box_deltas"]
    arguments["pred_boxes"] = arguments["anchors"].expand(2, -1, -1)
    if kind == "all one box":
        arguments["anchors"] = arguments["anchors"][:1].expand(num_anchors, 4)
        arguments["gt_boxes"] = arguments["anchors"][:1].expand(12, 4)
    elif kind == "all scores equal":
        arguments["cls_logits"] = torch.zeros(1, 1, 1).expand(2, num_anchors, 5)
    elif kind == "garbage predictions":
        bits = torch.randint(-(2**31), 2**31, (2, num_anchors, 4), generator=torch.Generator().manual_seed(1))
        arguments["pred_boxes"] = bits.to(torch.int32).view(torch.float32)
    else:
        covering = slice(0, None, 6) if kind == "one object over all" else slice(None)
        arguments["gt_boxes"][covering] = torch.tensor([-500.0, -500.0, 900.0, 900.0])
    return arguments
