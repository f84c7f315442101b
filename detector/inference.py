"""Runs a detector over images: from its logits and deltas to boxes in pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms
from tqdm import tqdm

from detector.batches import EvaluationImages, collate_evaluation, load_batches
from detector.detectors import OneStageDetector
from mg_ops import BoxCoder

SCORE_THRESHOLD = 0.005
NMS_IOU = 0.5
MAX_DETECTIONS = 300
MAX_CANDIDATES = 5000
"""(anchor, class) pairs of an image that enter its NMS, the best by score."""

NOT_FINITE = "image for which the network gives numbers that are not finite"


class Detections(NamedTuple):
    """What was found in one image, best first."""

    boxes: Tensor  # (D, 4) float32, (x1, y1, x2, y2) in pixels
    scores: Tensor  # (D,) float32
    labels: Tensor  # (D,) int64
    notes: tuple[str, ...] = ()
    """What was changed in reading the image, for messages."""


def select_detections(
    cls_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    image_size: int,
    score_threshold: float = SCORE_THRESHOLD,
    max_detections: int = MAX_DETECTIONS,
) -> list[Detections]:
    """Scores over the threshold, boxes clipped to the input, NMS class by class, the best of each image.

    Args:
        cls_logits: (B, A, C).
        box_deltas: (B, A, 4).
        anchors: (A, 4) in pixels of the input.
        image_size: side of the input in pixels.
        score_threshold: what a score must exceed.
        max_detections: per image, over all classes.
    """
    boxes = BoxCoder().decode(anchors=anchors, deltas=box_deltas).clamp(0, image_size)  # (B, A, 4)
    scores = cls_logits.float().sigmoid()  # (B, A, C)
    num_classes = scores.shape[-1]
    found = []
    for image_boxes, image_scores in zip(boxes, scores, strict=True):
        flat = image_scores.flatten()  # (A * C,)
        candidates = (flat > score_threshold).nonzero().squeeze(1)
        if len(candidates) > MAX_CANDIDATES:
            candidates = candidates[flat[candidates].topk(MAX_CANDIDATES).indices]
        candidate_boxes, candidate_scores = image_boxes[candidates // num_classes], flat[candidates]
        labels = candidates % num_classes
        solid = ((candidate_boxes[:, 2:] - candidate_boxes[:, :2]) > 0).all(1)
        candidate_boxes, candidate_scores, labels = candidate_boxes[solid], candidate_scores[solid], labels[solid]
        keep = batched_nms(candidate_boxes, candidate_scores, labels, NMS_IOU)[:max_detections]
        found.append(Detections(candidate_boxes[keep], candidate_scores[keep], labels[keep]))
    return found


def detect(
    model: OneStageDetector, paths: list[Path], image_size: int, device: torch.device | str, **options: Any
) -> tuple[dict[int, Detections], dict[int, str]]:
    """What `detect_each` gives with these arguments: the detections by index, and by index why others were left out."""
    found: dict[int, Detections] = {}
    left_out: dict[int, str] = {}
    for index, result in detect_each(model, paths, image_size, device, **options):
        if isinstance(result, Detections):
            found[index] = result
        else:
            left_out[index] = result
    return found, left_out


def detect_each(
    model: OneStageDetector,
    paths: list[Path],
    image_size: int,
    device: torch.device | str,
    *,
    batch_size: int = 32,
    num_workers: int = 2,
    indices: list[int] | None = None,
    annotated_sizes: list[tuple[int, int]] | None = None,
    score_threshold: float = SCORE_THRESHOLD,
    max_detections: int = MAX_DETECTIONS,
    amp: torch.dtype | None = None,
    show_progress: bool = True,
) -> Iterator[tuple[int, Detections | str]]:
    """Runs a detector over images, and gives the results of each batch as soon as they are there.

    Args:
        model: FSSD, RetinaNet or RFBNet; its mode is left as it is found.
        paths: of the images.
        image_size: side of the model's input.
        device: where the model is.
        batch_size, num_workers: of the loader.
        indices: which of the paths; all by default.
        annotated_sizes: (width, height) of each image as annotated, if it is.
        score_threshold: what a score must exceed.
        max_detections: per image, over all classes.
        amp: autocast to this type.
        show_progress: a progress bar.

    Yields:
        The index of a path with its detections, on the CPU, in pixels of the image as annotated, or else of the image
        the right way up; or with the reason why the image was left out.
    """
    device = torch.device(device)
    was_training = model.training
    model.eval()
    indices = list(range(len(paths))) if indices is None else indices
    keys = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    batches = load_batches(
        EvaluationImages(paths, image_size, annotated_sizes),
        keys,
        collate_evaluation,
        num_workers,
        pin_memory=device.type == "cuda",
    )
    try:
        for images, samples in tqdm(
            batches, "detecting", len(keys), leave=False, disable=None if show_progress else True
        ):
            yield from ((sample.position, sample.notes[0]) for sample in samples if sample.placement is None)
            if images is None:
                continue
            with torch.no_grad(), torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                cls_logits, box_deltas = model(images.to(device, non_blocking=True))
            finite = (cls_logits.isfinite().flatten(1).all(1) & box_deltas.isfinite().flatten(1).all(1)).tolist()
            detections = select_detections(
                cls_logits, box_deltas, model.anchors, image_size, score_threshold, max_detections
            )
            usable = [sample for sample in samples if sample.placement is not None]
            for sample, of_image, is_finite in zip(usable, detections, finite, strict=True):
                width, height = sample.placement.image
                boxes = of_image.boxes.cpu() * torch.tensor([width / image_size, height / image_size]).repeat(2)
                notes = sample.notes + (() if is_finite else (NOT_FINITE,))
                boxes = sample.placement.to_annotation(boxes)
                yield sample.position, Detections(boxes, of_image.scores.cpu(), of_image.labels.cpu(), notes)
    finally:
        batches.close()
        model.train(was_training)
