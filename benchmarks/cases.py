"""The batches that match_speed.py times: anchors, objects, and predictions like those of a trained network.

Predictions are made, not run through a network, so that every size is reproducible from a seed. Their statistics are
those of FSSD with ResNet-18, trained for 40 epochs on BCCD by mutual matching, on the 87 images of its val split
(`prediction_statistics.py` prints them), and depend on the IoU of an anchor with the object that it overlaps most:

- The deltas are a share of those that hit this object exactly, plus normal noise, in units of the encoded deltas.
- Logits are normal. That of the object's class has a mean and a deviation of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

import mg_ops
from benchmarks.objects import ImageObjects, generate_coco, generate_dense, generate_voc
from detector.anchors import make_anchors

CODER = mg_ops.BoxCoder()

BY_OVERLAP = (
    # The share and its deviation; the noise of centers and of sides; the logit and its deviation.
    (0.00, 0.05, 0.70, 1.29, -4.45, 1.15),
    (0.08, 0.10, 0.73, 1.08, -3.99, 1.06),
    (0.24, 0.14, 0.81, 0.89, -2.89, 0.85),
    (0.42, 0.19, 0.81, 0.71, -2.04, 0.74),
    (0.66, 0.22, 0.73, 0.58, -1.25, 0.72),
    (0.81, 0.22, 0.61, 0.51, -0.72, 0.67),
    (0.92, 0.28, 0.56, 0.51, -0.40, 0.62),
)
"""Of the anchors of each tenth of IoU; the last row is of 0.6 and above."""
OTHER_LOGITS = (-4.0, 0.9)
"""Mean and deviation of all other logits."""


@dataclass(frozen=True)
class Case:
    """One row of the benchmark's table of cases."""

    name: str
    batch_size: int
    num_classes: int
    objects: str
    """Which generator: "voc", "coco" or "dense"."""
    make_anchors: Callable[[], Tensor]
    image_size: tuple[int, int]
    """(width, height) in pixels."""
    keep_aspect: bool = False
    """Scale images to fit, placed at the top left (RetinaNet); else stretch them (SSD)."""
    objects_per_image: int | None = None
    """For "dense"."""

    @property
    def takes_file(self) -> bool:
        """Whether --boxes replaces the generator."""
        return self.objects != "dense"

    def quick(self) -> Case:
        """The same case small enough for a check in seconds."""
        objects = None if self.objects_per_image is None else min(self.objects_per_image, 20)
        return replace(self, batch_size=min(self.batch_size, 4 if objects is None else 1), objects_per_image=objects)


def make_pyramid(width: int, height: int, strides: Sequence[int], side: float, scales: Sequence[float]) -> Tensor:
    """Anchors (A, 4) at every cell of each stride, level by level and row by row: `side` strides at each scale.

    Of ratios 1/2, 1 and 2; float32, (x1, y1, x2, y2) in pixels, not clipped.
    """
    levels = []
    for stride in strides:
        shapes = [
            (side * stride * scale / math.sqrt(ratio), side * stride * scale * math.sqrt(ratio))
            for scale in scales
            for ratio in (0.5, 1.0, 2.0)
        ]
        center_y = (torch.arange(math.ceil(height / stride)) + 0.5) * stride
        center_x = (torch.arange(math.ceil(width / stride)) + 0.5) * stride
        centers = torch.stack(torch.meshgrid(center_x, center_y, indexing="xy"), dim=-1).unsqueeze(2)
        half = 0.5 * torch.tensor(shapes)
        levels.append(torch.cat([centers - half, centers + half], dim=-1).reshape(-1, 4))
    return torch.cat(levels)


SSD = (partial(make_anchors, 320), (320, 320))
"""The detectors' own anchors: 12,750."""
RETINANET_SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
RETINANET = (partial(make_pyramid, 1344, 800, (8, 16, 32, 64, 128), 4, RETINANET_SCALES), (1333, 800), True)
"""RetinaNet's, P3 to P7: 201,600."""
DENSE = (partial(make_pyramid, 608, 800, (4, 8, 16, 32, 64), 3, (1.0,)), (608, 800), True)
"""For many small objects, P2 to P6: 121,515."""
SWEEP = (5, 50, 500)
SWEEP_CASES = tuple(f"sweep{count}" for count in SWEEP)
CASES = {
    case.name: case
    for case in (
        Case("voc320", 32, 20, "voc", *SSD),
        Case("coco320", 32, 80, "coco", *SSD),
        Case("coco800", 16, 80, "coco", *RETINANET),
        Case("dense", 8, 80, "dense", *DENSE, 500),
        Case("dense5000", 1, 80, "dense", *DENSE, 5000),
        *(Case(f"sweep{count}", 1, 80, "dense", *DENSE, count) for count in SWEEP),
    )
}


@dataclass
class Batch:
    """One batch on one device, its objects in every form; B images, A anchors, C classes, N objects in all."""

    anchors: Tensor  # (A, 4)
    deltas: Tensor  # (B, A, 4)
    logits: Tensor  # (B, A, C)
    boxes_list: list[Tensor]  # B times (G, 4)
    labels_list: list[Tensor]  # B times (G,)
    padded_to: int

    def __post_init__(self) -> None:
        """Packs and pads the objects; a place without an object holds a box of zeros."""
        self.counts = [len(labels) for labels in self.labels_list]
        self.gt_offsets = torch.tensor([0, *accumulate(self.counts)]).to(self.anchors.device)
        self.gt_boxes, self.padded_boxes = self._pack_and_pad(self.boxes_list)
        self.gt_labels, self.padded_labels = self._pack_and_pad(self.labels_list)

    def _pack_and_pad(self, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        padded = values[0].new_zeros(len(values), self.padded_to, *values[0].shape[1:])
        for row, of_image in zip(padded, values, strict=True):
            row[: len(of_image)] = of_image
        return torch.cat(values), padded

    def arguments(self, lists: bool = False) -> dict[str, Any]:
        """What `mg_ops.mutual_match` takes, objects packed or as lists."""
        arguments = {"anchors": self.anchors, "cls_logits": self.logits, "box_deltas": self.deltas, "box_coder": CODER}
        if lists:
            return {**arguments, "gt_boxes": self.boxes_list, "gt_labels": self.labels_list}
        packed = {"gt_boxes": self.gt_boxes, "gt_labels": self.gt_labels, "gt_offsets": self.gt_offsets}
        return {**arguments, **packed}

    def with_predictions(self, anchors: Tensor, deltas: Tensor, logits: Tensor) -> Batch:
        """The same objects, not packed and padded again."""
        batch = copy.copy(self)
        batch.anchors, batch.deltas, batch.logits = anchors, deltas, logits
        return batch

    def head(self, num_images: int, most_objects: int) -> Batch:
        """The first images, with the first objects of each."""
        boxes, labels = (
            [of_image[:most_objects] for of_image in values[:num_images]]
            for values in (self.boxes_list, self.labels_list)
        )
        padded_to = max(1, *map(len, boxes))
        return Batch(self.anchors, self.deltas[:num_images], self.logits[:num_images], boxes, labels, padded_to)


def fit_to_case(image: ImageObjects, case: Case) -> Tensor:
    """Boxes (G, 4) of an image in the pixels of the case."""
    width, height = case.image_size
    scale_x, scale_y = width / image.width, height / image.height
    if case.keep_aspect:
        scale_x = scale_y = min(scale_x, scale_y)
    return torch.from_numpy(image.boxes * np.array([scale_x, scale_y, scale_x, scale_y], dtype=np.float32))


def draw_images(
    case: Case, source: list[ImageObjects] | None, num_images: int, rng: np.random.Generator
) -> list[ImageObjects]:
    """Images from the file given, or from the case's generator."""
    if source is not None and case.takes_file:
        return [source[index] for index in rng.integers(len(source), size=num_images)]
    if case.objects == "dense":
        assert case.objects_per_image is not None
        return generate_dense(num_images, case.objects_per_image, case.num_classes, rng)
    return {"voc": generate_voc, "coco": generate_coco}[case.objects](num_images, case.num_classes, rng)


def best_overlaps(anchors: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """For each anchor the largest IoU (A,) with an object, and which object (A,).

    Objects are taken in bands from top to bottom, each against the anchors that reach its rows, so that 5,000 objects
    on 120,000 anchors need neither the memory nor the time of all pairs.
    """
    quality = torch.zeros(len(anchors), device=anchors.device)
    owner = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    bands = gt_boxes[:, 1].argsort().split(32) if len(gt_boxes) else ()
    for band in bands:
        boxes = gt_boxes[band]
        near = ((anchors[:, 3] > boxes[:, 1].min()) & (anchors[:, 1] < boxes[:, 3].max())).nonzero().squeeze(1)
        if len(near) == 0:
            continue
        value, row = box_iou(boxes, anchors[near]).nan_to_num(0.0).max(dim=0)
        better = value > quality[near]
        quality[near[better]], owner[near[better]] = value[better], band[row[better]]
    return quality, owner


def batches_beyond_cache(case: Case, cache_bytes: int, free_bytes: float) -> int:
    """How many batches must take turns so that a cache of this size holds nothing of one when its turn comes again.

    They touch four times the cache, deltas and outputs alone; fewer where their predictions would fill more than a
    sixth of the memory that is free.
    """
    anchors = case.batch_size * len(case.make_anchors())
    predictions = anchors * (4 + case.num_classes) * 4
    return max(1, min(math.ceil(4 * cache_bytes / (32 * anchors)), int(free_bytes / 6 / predictions)))


def predict(
    anchors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, num_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Deltas (A, 4) and logits (A, C) of an image."""

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device=anchors.device).normal_(generator=generator)

    mean, deviation = OTHER_LOGITS
    deltas, logits = normal(len(anchors), 4), mean + deviation * normal(len(anchors), num_classes)
    overlap, owner = best_overlaps(anchors, gt_boxes)
    table = torch.tensor(BY_OVERLAP, device=anchors.device)
    rows = table[(10 * overlap).long().clamp(max=len(table) - 1)]
    deltas *= rows[:, [2, 2, 3, 3]]
    near = (overlap > 0).nonzero().squeeze(1)
    share, spread, _, _, own_mean, own_deviation = rows[near].unbind(dim=1)
    exact = CODER.encode(anchors=anchors[near], boxes=gt_boxes[owner[near]])
    deltas[near] += (share + spread * normal(len(near))).unsqueeze(1) * exact
    logits[near, gt_labels[owner[near]]] = own_mean + own_deviation * normal(len(near))
    return deltas, logits


def make_batches(
    case: Case, source: list[ImageObjects] | None, num_batches: int, seed: int, device: str
) -> list[Batch]:
    """Batches of a case, made on the device they are for; they share anchors and padding.

    The same for the same seed on the same kind of device: objects are the same everywhere, predictions follow the
    device's own random numbers.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device).manual_seed(seed)
    anchors = case.make_anchors().to(device)
    drawn = [draw_images(case, source, case.batch_size, rng) for _ in range(num_batches)]
    most = max(len(image.labels) for images in drawn for image in images)
    batches = []
    for images in drawn:
        boxes = [fit_to_case(image, case).to(device) for image in images]
        labels = [torch.from_numpy(image.labels).to(device) for image in images]
        made = [
            predict(anchors, image_boxes, image_labels, case.num_classes, generator)
            for image_boxes, image_labels in zip(boxes, labels, strict=True)
        ]
        deltas, logits = (torch.stack(parts) for parts in zip(*made, strict=True))
        batches.append(Batch(anchors, deltas, logits, boxes, labels, most))
    return batches
