"""The batches that match_speed.py times: anchors, objects, and predictions like a half-trained network's.

Predictions are made, not run through a network, so that every size is reproducible from a seed:

- Each anchor is paired with the object it overlaps most (IoU with the anchor). Where that IoU is at least 0.3, the
  anchor's deltas are t times the deltas that hit the object exactly, t uniform in [0.3, 1] (some anchors regress
  close, some hardly). All deltas have noise added: normal, 0.1 in units of the encoded deltas.
- Logits are normal around the usual prior -log(99), standard deviation 0.5. Where the IoU is at least 0.4, the logit
  of the object's class is raised by 8 (IoU - 0.4) / 0.6 times a uniform number in [0, 1], plus 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

import mg_ops
from benchmarks import anchors as anchor_grids
from benchmarks.objects import ImageObjects, generate_coco, generate_dense, generate_voc
from detector.anchors import make_anchors as make_detector_anchors

CODER = mg_ops.BoxCoder()


@dataclass(frozen=True)
class Case:
    """One row of the benchmark's table of cases."""

    name: str
    batch_size: int
    num_classes: int
    make_anchors: Callable[[], Tensor]
    image_size: tuple[int, int]
    """(width, height) in pixels."""
    keep_aspect: bool
    """Scale images to fit, placed at the top left (RetinaNet); else stretch them (SSD)."""
    objects: str
    """Which generator: "voc", "coco" or "dense"."""
    objects_per_image: int | None = None
    """For "dense"."""

    @property
    def takes_file(self) -> bool:
        """Whether --boxes replaces the generator."""
        return self.objects != "dense"

    def with_images(self, most: int | None) -> Case:
        """The same case with at most so many images a batch."""
        return self if most is None else replace(self, batch_size=min(self.batch_size, most))


def _case(
    name: str, batch_size: int, grid: str, objects: str, per_image: int | None = None, num_classes: int = 80
) -> Case:
    make_anchors, image_size, keep_aspect = {
        "ssd": (partial(make_detector_anchors, 320), (320, 320), False),
        "retinanet": (anchor_grids.make_retinanet_anchors, (1333, 800), True),
        "dense": (anchor_grids.make_dense_anchors, (608, 800), True),
    }[grid]
    return Case(name, batch_size, num_classes, make_anchors, image_size, keep_aspect, objects, per_image)


SWEEP = (5, 50, 500)
CASES = {
    case.name: case
    for case in (
        _case("voc320", 32, "ssd", "voc", num_classes=20),
        _case("coco320", 32, "ssd", "coco"),
        _case("coco800", 16, "retinanet", "coco"),
        _case("dense", 8, "dense", "dense", 500),
        _case("dense5000", 1, "dense", "dense", 5000),
        *(_case(f"sweep{count}", 1, "dense", "dense", count) for count in SWEEP),
    )
}


@dataclass
class Batch:
    """One batch on one device; B images, A anchors, C classes, N objects in all, G in the fullest image."""

    anchors: Tensor  # (A, 4)
    deltas: Tensor  # (B, A, 4)
    logits: Tensor  # (B, A, C)
    gt_boxes: Tensor  # (N, 4)
    gt_labels: Tensor  # (N,)
    gt_offsets: Tensor  # (B + 1,)
    gt_crowd: Tensor | None  # (N,)
    counts: list[int]
    padded_boxes: Tensor  # (B, G, 4), zeros where there is no object
    padded_labels: Tensor  # (B, G)
    padded_crowd: Tensor | None  # (B, G)

    def __post_init__(self) -> None:
        """Splits the packed objects into lists."""
        self.boxes_list = list(self.gt_boxes.split(self.counts))
        self.labels_list = list(self.gt_labels.split(self.counts))
        self.crowd_list = None if self.gt_crowd is None else list(self.gt_crowd.split(self.counts))

    def arguments(self, device: str | None = None) -> dict[str, Any]:
        """What `mg_ops.mutual_match` takes, objects packed; copied to a device if one is named."""
        arguments = {
            "anchors": self.anchors,
            "pred_boxes": self.deltas,
            "cls_scores": self.logits,
            "gt_boxes": self.gt_boxes,
            "gt_labels": self.gt_labels,
            "gt_offsets": self.gt_offsets,
            "gt_crowd": self.gt_crowd,
            "box_coder": CODER,
        }
        if device is None:
            return arguments
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}

    def head(self, num_images: int, most_objects: int) -> Batch:
        """The first images, with the first objects of each."""
        counts = [min(count, most_objects) for count in self.counts[:num_images]]
        kept = [slice(0, count) for count in counts]
        padded = max(counts, default=0)
        return Batch(
            self.anchors,
            self.deltas[:num_images],
            self.logits[:num_images],
            torch.cat([self.boxes_list[i][s] for i, s in enumerate(kept)]),
            torch.cat([self.labels_list[i][s] for i, s in enumerate(kept)]),
            torch.tensor([0, *np.cumsum(counts)]).to(self.gt_offsets.device),
            None if self.crowd_list is None else torch.cat([self.crowd_list[i][s] for i, s in enumerate(kept)]),
            counts,
            self.padded_boxes[:num_images, :padded],
            self.padded_labels[:num_images, :padded],
            None if self.padded_crowd is None else self.padded_crowd[:num_images, :padded],
        )


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
    has_crowd = any(image.crowd.any() for images in drawn for image in images)
    batches = []
    for images in drawn:
        boxes = [fit_to_case(image, case).to(device) for image in images]
        labels = [torch.from_numpy(image.labels).to(device) for image in images]
        crowds = [torch.from_numpy(image.crowd).to(device) for image in images]
        deltas = torch.empty(len(images), len(anchors), 4, device=device).normal_(0, 0.1, generator=generator)
        logits = torch.empty(len(images), len(anchors), case.num_classes, device=device).normal_(
            -math.log(99), 0.5, generator=generator
        )
        padded_boxes = torch.zeros(len(images), most, 4, device=device)
        padded_labels = torch.zeros(len(images), most, dtype=torch.int64, device=device)
        padded_crowd = torch.zeros(len(images), most, dtype=torch.bool, device=device)
        for index, (image_boxes, image_labels) in enumerate(zip(boxes, labels, strict=True)):
            count = len(image_labels)
            padded_boxes[index, :count] = image_boxes
            padded_labels[index, :count] = image_labels
            padded_crowd[index, :count] = crowds[index]
            if count == 0:
                continue
            quality, owner = best_overlaps(anchors, image_boxes)
            near = (quality >= 0.3).nonzero().squeeze(1)
            trained = torch.empty(len(near), 1, device=device).uniform_(0.3, 1.0, generator=generator)
            deltas[index, near] += trained * CODER.encode(anchors[near], image_boxes[owner[near]])
            near = (quality >= 0.4).nonzero().squeeze(1)
            raised = torch.empty(len(near), device=device).uniform_(0.0, 1.0, generator=generator)
            logits[index, near, image_labels[owner[near]]] += 2 + 8 * (quality[near] - 0.4) / 0.6 * raised
        counts = [len(image_labels) for image_labels in labels]
        batches.append(
            Batch(
                anchors,
                deltas,
                logits,
                torch.cat(boxes),
                torch.cat(labels),
                torch.tensor([0, *np.cumsum(counts)]).to(device),
                torch.cat(crowds) if has_crowd else None,
                counts,
                padded_boxes,
                padded_labels,
                padded_crowd if has_crowd else None,
            )
        )
    return batches
