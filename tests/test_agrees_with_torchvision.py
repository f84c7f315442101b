"""strategy="iou" is torchvision's Matcher where the two definitions coincide.

torchvision: Matcher(0.5, 0.4, allow_low_quality_matches=True) on box_iou. They coincide for an image where
1. an anchor overlaps every object (torchvision matches every anchor of quality 0 to an object that none overlaps),
2. the best anchor of each object has that object as its own best (torchvision leaves a best anchor to the object it
   overlaps most; here each object gets its own), and
3. no two anchors share the best quality of an object below the threshold (torchvision takes all, here the first).
Any other image is left out, precisely by these three conditions.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Target

import mg_ops

detection = pytest.importorskip("torchvision.models.detection._utils")
ops = pytest.importorskip("torchvision.ops")


def definitions_coincide(iou: torch.Tensor) -> bool:
    """iou: (G, A)."""
    best, best_anchor = iou.max(dim=1)
    overlapped = bool((best > 0).all())
    first_choice = bool((iou.argmax(dim=0)[best_anchor] == torch.arange(len(iou))).all())
    alone = bool((((iou == best[:, None]).sum(dim=1) == 1) | (best >= 0.5)).all())
    return overlapped and first_choice and alone


def random_boxes(count: int, generator: torch.Generator, integers: bool) -> torch.Tensor:
    corner = torch.rand(count, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + 5 + 40 * torch.rand(count, 2, generator=generator)], dim=1)
    return boxes.round() if integers else boxes


@pytest.mark.parametrize("integers", [False, True])
def test_iou_strategy_is_torchvisions_matcher(target: Target, integers: bool) -> None:
    matcher = detection.Matcher(0.5, 0.4, allow_low_quality_matches=True)
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for _ in range(400):
        num_anchors = int(torch.randint(50, 600, (), generator=generator))
        num_objects = int(torch.randint(1, 6, (), generator=generator))
        anchors = random_boxes(num_anchors, generator, integers)
        gt_boxes = random_boxes(num_objects, generator, integers)
        iou = ops.box_iou(gt_boxes, anchors)
        if not definitions_coincide(iou):
            continue
        compared += 1
        expected = matcher(iou)
        match = mg_ops.mutual_match(
            anchors.to(target.device),
            [gt_boxes.to(target.device)],
            [torch.zeros(num_objects, dtype=torch.int64, device=target.device)],
            strategy="iou",
            backend=target.backend,
        )
        assert match.cls_match[0].tolist() == expected.tolist()
        assert match.loc_match[0].tolist() == expected.clamp(min=mg_ops.BACKGROUND).tolist()
    assert compared > 100
