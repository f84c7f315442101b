"""The batches that match_speed.py times: anchors, objects, and predictions like a half-trained network's.

Predictions are made, not run through a network, so that every size is reproducible from a seed:

- Each anchor is paired with the object it overlaps most (IoU with the anchor). Where that IoU is at least 0.3, the
  anchor's deltas are t times the deltas that hit the object exactly, t uniform in [0.3, 1] (some anchors regress
  close, some hardly). All deltas have noise added: normal, 0.1 in units of the encoded deltas.
- Logits are normal around the usual prior -log(99), standard deviation 0.5. Where the IoU is at least 0.4, the logit
  of the object's class is raised by 8 (IoU - 0.4) / 0.6 times a uniform number in [0, 1], plus 2.
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
    for band in gt_boxes[:, 1].argsort().split(32):
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
        deltas = torch.empty(len(images), len(anchors), 4, device=device).normal_(0, 0.1, generator=generator)
        logits = torch.empty(len(images), len(anchors), case.num_classes, device=device).normal_(
            -math.log(99), 0.5, generator=generator
        )
        for index, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
            if len(image_labels) == 0:
                continue
            quality, owner = best_overlaps(anchors, image_boxes)
            near = (quality >= 0.3).nonzero().squeeze(1)
            trained = torch.empty(len(near), 1, device=device).uniform_(0.3, 1.0, generator=generator)
            deltas[index, near] += trained * CODER.encode(anchors=anchors[near], boxes=image_boxes[owner[near]])
            near = (quality >= 0.4).nonzero().squeeze(1)
            raised = torch.empty(len(near), device=device).uniform_(0.0, 1.0, generator=generator)
            logits[index, near, image_labels[owner[near]]] += 2 + 8 * (quality[near] - 0.4) / 0.6 * raised
        batches.append(Batch(anchors, deltas, logits, boxes, labels, most))
    return batches
