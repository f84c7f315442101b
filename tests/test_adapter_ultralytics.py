"""`MutualAssigner` is called as ultralytics' `TaskAlignedAssigner` is, and its detection loss trains with it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mg_ops
from mg_ops.adapters.ultralytics import MutualAssigner, use_mutual_guidance

CLASSES = 3


def anchor_points(size: int = 64, strides: tuple[int, ...] = (8, 16, 32)) -> tuple[Tensor, Tensor]:
    """The centres of the cells of all levels (A, 2) and their strides (A, 1), as ultralytics lays them."""
    points, steps = [], []
    for stride in strides:
        centers = (torch.arange(size // stride) + 0.5) * stride
        y, x = torch.meshgrid(centers, centers, indexing="ij")
        points.append(torch.stack([x, y], dim=-1).reshape(-1, 2))
        steps.append(torch.full((len(points[-1]), 1), float(stride)))
    return torch.cat(points), torch.cat(steps)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Two images of two and no objects, padded to three."""
    generator = torch.Generator().manual_seed(0)
    points, steps = anchor_points()
    scores = torch.rand(2, len(points), CLASSES, generator=generator)
    noise = torch.rand(2, len(points), 4, generator=generator) - 0.5
    boxes = torch.cat([points - 2 * steps, points + 2 * steps], dim=1) + 12 * noise
    labels, gt_boxes, mask = torch.zeros(2, 3, 1), torch.zeros(2, 3, 4), torch.zeros(2, 3, 1)
    gt_boxes[0, 0], gt_boxes[0, 1] = torch.tensor([2.0, 3.0, 35.0, 30.0]), torch.tensor([20.0, 8.0, 63.0, 60.0])
    labels[0, 0], labels[0, 1] = 2, 1
    mask[0, :2] = 1
    return scores.to(dtype), boxes.to(dtype), points, labels, gt_boxes, mask


def test_points_get_boxes_of_their_stride() -> None:
    points, steps = anchor_points(strides=(8, 16, 64))
    anchors = MutualAssigner(stride=[8, 16, 64], anchor_size=5.0).anchors(points)
    assert torch.equal(anchors[:, 2:] - anchors[:, :2], (5 * steps).expand(-1, 2))
    assert torch.equal((anchors[:, 2:] + anchors[:, :2]) / 2, points)


def test_the_results_say_the_mutual_match() -> None:
    scores, boxes, points, labels, gt_boxes, mask = batch()
    assigner = MutualAssigner(CLASSES, sigma=1.1)
    target_labels, target_bboxes, target_scores, fg_mask, target_gt_idx = assigner(
        scores, boxes, points, labels, gt_boxes, mask
    )
    match = mg_ops.mutual_match(
        assigner.anchors(points),
        boxes,
        torch.logit(scores),
        [gt_boxes[0, :2], gt_boxes[1, :0]],
        [labels[0, :2, 0].long(), labels[1, :0, 0].long()],
        sigma=1.1,
    )
    assert (match.cls_match != match.loc_match).any() and (match.cls_match == 1).any() and (match.loc_match == 1).any()
    for image in range(2):
        for anchor in range(len(points)):
            found = int(match.cls_match[image, anchor])
            label = [2, 1][found] if found >= 0 else CLASSES
            assert target_labels[image, anchor] == label
            assert target_scores[image, anchor].tolist() == [float(label == index) for index in range(CLASSES)]
            found = int(match.loc_match[image, anchor])
            assert bool(fg_mask[image, anchor]) == (found >= 0)
            assert target_gt_idx[image, anchor] == max(found, 0)
            assert target_bboxes[image, anchor].tolist() == (
                gt_boxes[image, found].tolist() if found >= 0 else [0.0] * 4
            )


def test_strides_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="stride: expected positive strides, each an even multiple"):
        MutualAssigner(stride=[8, 24])
    with pytest.raises(TypeError, match="criterion: expected ultralytics' v8DetectionLoss, got Linear"):
        use_mutual_guidance(nn.Linear(1, 1))


def test_the_call_and_the_results_are_those_of_the_real_assigner() -> None:
    tal = pytest.importorskip("ultralytics.utils.tal", reason="ultralytics is not installed")
    real = tal.TaskAlignedAssigner(num_classes=CLASSES)
    names = list(inspect.signature(real.forward).parameters)
    assert list(inspect.signature(MutualAssigner.forward).parameters)[1:] == names[:6]
    scores, boxes, points, *objects = batch()
    for padded_to in (3, 0):
        padded = [part[:, :padded_to] for part in objects]
        results = MutualAssigner(CLASSES)(scores, boxes, points, *padded)
        for actual, expected in zip(results, real(scores, boxes, points, *padded), strict=True):
            assert actual.shape == expected.shape
            # Without objects the real one's labels and indices have the dtype of the scores.
            assert actual.dtype == expected.dtype or padded_to == 0


@pytest.mark.parametrize("num_objects", [3, 0])
def test_the_real_detection_loss_trains(num_objects: int) -> None:
    loss_module = pytest.importorskip("ultralytics.utils.loss", reason="ultralytics is not installed")
    reg_max, size = 4, 64

    class Detect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stride, self.nc, self.reg_max = torch.tensor([8.0, 16.0, 32.0]), CLASSES, reg_max
            self.bias = nn.Parameter(torch.zeros(1))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleList([Detect()])
            self.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)

    criterion = use_mutual_guidance(loss_module.v8DetectionLoss(Model()))
    generator = torch.Generator().manual_seed(0)
    num_anchors = sum((size // stride) ** 2 for stride in (8, 16, 32))
    predictions: dict[str, Any] = {
        "boxes": torch.randn(2, 4 * reg_max, num_anchors, generator=generator).requires_grad_(),
        "scores": torch.randn(2, CLASSES, num_anchors, generator=generator).requires_grad_(),
        "feats": [torch.zeros(2, 1, size // stride, size // stride) for stride in (8, 16, 32)],
    }
    objects = {
        "batch_idx": torch.tensor([0.0, 0.0, 1.0])[:num_objects],
        "cls": torch.tensor([1.0, 2.0, 0.0])[:num_objects],
        "bboxes": torch.tensor([[0.4, 0.4, 0.5, 0.5], [0.7, 0.6, 0.3, 0.4], [0.5, 0.5, 0.9, 0.8]])[:num_objects],
    }
    loss, _ = criterion(predictions, objects)
    loss.sum().backward()
    assert loss.isfinite().all() and loss[1] > 0
    has_gradient = (predictions["boxes"].grad != 0).any(1)  # (B, A)
    # Every positive of localisation is trained, also one that is none for classification; nothing else is.
    assert torch.equal(has_gradient, criterion.assigner.match.loc_match >= 0)
    assert bool(has_gradient.any()) == (num_objects > 0)
    if num_objects:
        assert (has_gradient & (criterion.assigner.match.cls_match < 0)).any()
