"""Random arguments for `mg_ops.mutual_match`, made to break backends apart: ties, garbage, odd sizes, odd strides.

`random_batch(seed)` always makes the same batch for the same seed. No test framework in here: benchmarks of correctness
on a GPU, emulators and shell one-liners use it as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mg_ops

# Sizes around what kernels cut their work into.
NUM_ANCHORS = (
    *(0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 500, 1023, 1025),
)
MORE_ANCHORS = (2047, 2049, 3000, 4096, 5003, 8191)
NUM_OBJECTS = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 17, 33, 64, 65, 100, 128, 129, 300)
NUM_CLASSES = (0, 1, 1, 2, 3, 5, 16, 20, 33, 80, 90)
BATCH_SIZES = (1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 5, 9, 0)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
STRATEGIES = ("mutual", "mutual", "mutual", "iou", "localize_to_classify", "classify_to_localize")
ORDINARY_SCALES = (1.0, 1.0, 300.0, 1e-3)
EXTREME_SCALES = (1e-19, 3e-20, 1e-22, 1e-30, 1e-42, 1e18, 1e19, 1e30, 3e38)
SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 1e30, 1e-30)


@dataclass
class RandomBatch:
    """Arguments for one call, and what they were made of (for the message of a failing test)."""

    seed: int
    arguments: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)

    def call(self, backend: str, device: str = "cpu") -> mg_ops.MutualMatch:
        return mg_ops.mutual_match(**to_device(self.arguments, device), backend=backend)

    def __str__(self) -> str:
        return f"random_batch({self.seed}): {self.notes}"


def to_device(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """The same arguments on another device; strides may become contiguous on the way."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, list):
            return [move(element) for element in value]
        return value

    return {name: move(value) for name, value in arguments.items()}


def boxes_around(random: np.random.Generator, count: int, kind: str) -> np.ndarray:
    """(count, 4) float64 boxes of one kind, of about unit scale."""
    if kind == "smooth":
        center = random.random((count, 2))
        size = np.exp(random.normal(-1.5, 0.8, (count, 2)))
        boxes = np.concatenate([center - size / 2, center + size / 2], axis=1)
    elif kind == "integer":  # few distinct values: many exact ties, shared edges, zero areas
        corner = random.integers(0, 6, (count, 2))
        boxes = np.concatenate([corner, corner + random.integers(0, 5, (count, 2))], axis=1).astype(np.float64)
    elif kind == "equal":
        boxes = np.tile([0.25, 0.25, 0.75, 1.0], (count, 1))
    elif kind == "few":  # copies of a few boxes
        few = boxes_around(random, 3, "smooth")
        boxes = few[random.integers(0, 3, count)]
    elif kind == "grid":  # anchors of a detector: one size at regular steps
        steps = max(1, int(np.ceil(np.sqrt(count))))
        index = np.arange(count)
        center = np.stack([(index % steps + 0.5) / steps, (index // steps + 0.5) / steps], axis=1)
        size = random.choice([0.1, 0.25, 0.5], (count, 1)) * np.array([[1.0, random.choice([0.5, 1.0, 2.0])]])
        boxes = np.concatenate([center - size / 2, center + size / 2], axis=1)
    elif kind == "nested":  # a ladder of IoUs
        size = (np.arange(count) % 50 + 1) / 50
        boxes = np.stack([np.zeros(count), np.zeros(count), size, np.ones(count)], axis=1)
    else:
        raise ValueError(kind)
    return boxes


def sprinkle(random: np.random.Generator, values: np.ndarray, share: float) -> np.ndarray:
    """Replaces a share of the rows by special values, random bit patterns or inverted boxes."""
    values = values.astype(np.float32)
    rows = np.flatnonzero(random.random(len(values)) < share)
    for row in rows:
        kind = random.integers(0, 4)
        if kind == 0:
            values[row, random.integers(0, values.shape[1])] = random.choice(SPECIAL)
        elif kind == 1:
            values[row] = random.choice(SPECIAL, values.shape[1])
        elif kind == 2:
            values[row] = random.integers(0, 2**32, values.shape[1], dtype=np.uint32).view(np.float32)
        else:
            values[row] = values[row, ::-1]
    return values


def odd_strides(random: np.random.Generator, tensor: Tensor) -> Tensor:
    """The same values behind other strides: permuted, a slice of something larger, or (where equal) expanded."""
    kind = random.integers(0, 5)
    if kind == 0 and tensor.dim() > 1:
        dim = int(random.integers(0, tensor.dim() - 1))
        return tensor.transpose(dim, -1).contiguous().transpose(dim, -1)
    if kind == 1:  # every second element of a buffer of garbage
        shape = [size * 2 + 1 for size in tensor.shape]
        buffer = torch.full(shape, 77, dtype=torch.float64).to(tensor.dtype)
        view = buffer[tuple(slice(1, None, 2) for _ in shape)]
        view.copy_(tensor)
        return view
    if kind == 2 and tensor.dim() > 1:  # rows with a gap, at an offset that no vector load likes
        buffer = torch.full((math.prod(tensor.shape[:-1]), tensor.shape[-1] + 3), 55).to(tensor.dtype)
        view = buffer[:, 1 : tensor.shape[-1] + 1].unflatten(0, tensor.shape[:-1])
        view.copy_(tensor)
        return view
    if kind == 3 and tensor.numel() > 0 and random.random() < 0.5:  # stride 0: all equal along one dimension
        dim = int(random.integers(0, tensor.dim()))
        return tensor.narrow(dim, 0, 1).expand(tensor.shape)
    return tensor


@np.errstate(over="ignore", invalid="ignore")
def random_batch(seed: int, *, large: bool = False) -> RandomBatch:
    """Arguments of one call, all from the seed.

    Args:
        large: draw the number of anchors from MORE_ANCHORS.
    """
    random = np.random.default_rng([seed, int(large)])
    num_anchors = int(random.choice(MORE_ANCHORS if large else NUM_ANCHORS))
    batch_size = int(random.choice(BATCH_SIZES))
    num_classes = int(random.choice(NUM_CLASSES))
    scale = float(random.choice(ORDINARY_SCALES if random.random() < 0.8 else EXTREME_SCALES))
    garbage = random.random() < 0.35

    def a_kind() -> str:
        return str(random.choice(["smooth", "smooth", "integer", "integer", "equal", "few", "grid", "nested"]))

    anchor_kind = a_kind()
    anchors = boxes_around(random, num_anchors, anchor_kind) * scale
    anchors = sprinkle(random, anchors, 0.05 if garbage else 0.0)

    # Objects
    object_kind = random.choice(["smooth", "smooth", "integer", "few", "equal", "anchors", "nested"])
    counts = [int(random.choice(NUM_OBJECTS)) for _ in range(batch_size)]
    if batch_size * max(counts, default=0) * num_anchors > 400_000 and not large:
        counts = [min(count, 17) for count in counts]
    gt_boxes, gt_labels, gt_crowd = [], [], []
    label_dtype = torch.int32 if random.random() < 0.3 else torch.int64
    bad_labels = random.random() < 0.3
    for count in counts:
        if object_kind == "anchors" and num_anchors > 0:  # exact overlaps
            boxes = anchors[random.integers(0, num_anchors, count)].astype(np.float64)
        else:
            boxes = boxes_around(random, count, str(object_kind) if object_kind != "anchors" else "integer") * scale
        labels = random.integers(0, max(1, num_classes), count)
        if count > 1 and random.random() < 0.3:  # one place, other labels
            copies = random.integers(0, count, count // 2)
            boxes[: count // 2] = boxes[copies]
        if bad_labels:
            bad = random.random(count) < 0.2
            labels = np.where(
                bad, random.choice([-1, num_classes, num_classes + 1, 2**31 - 1, -(2**31)], count), labels
            )
        boxes = sprinkle(random, boxes, 0.2 if random.random() < 0.3 else 0.0)
        gt_boxes.append(torch.from_numpy(boxes.astype(np.float32)))
        gt_labels.append(torch.from_numpy(labels).to(label_dtype))
        gt_crowd.append(torch.from_numpy(random.random(count) < random.choice([0.0, 0.2, 1.0], p=[0.3, 0.6, 0.1])))

    # Predictions
    with_coder = random.random() < 0.5
    pred_kind = random.choice(["near anchors", "near anchors", "anchors", "objects", "far", "equal", "noise"])
    shape = (batch_size, num_anchors, 4)
    if with_coder:
        spread = random.choice([0.0, 0.1, 1.0, 10.0])
        predictions = np.zeros(shape) + (spread * random.standard_normal(shape) if pred_kind != "equal" else spread)
        if pred_kind == "noise":
            predictions = np.round(predictions)
    elif pred_kind == "near anchors":
        predictions = anchors.astype(np.float64) + 0.05 * scale * random.standard_normal(shape)
    elif pred_kind == "anchors":
        predictions = np.zeros(shape) + anchors
    elif pred_kind == "objects" and any(counts):
        pool = torch.cat(gt_boxes).numpy().astype(np.float64)
        predictions = pool[random.integers(0, len(pool), shape[:2])]
    elif pred_kind == "far":
        predictions = np.zeros(shape) + anchors.astype(np.float64) + 50 * scale
    elif pred_kind == "equal":
        predictions = np.tile(np.array([0.2, 0.2, 0.8, 0.9]) * scale, (batch_size, num_anchors, 1))
    else:
        predictions = boxes_around(random, batch_size * num_anchors, "smooth").reshape(shape) * scale
    predictions = sprinkle(random, predictions.reshape(-1, 4), 0.1 if garbage else 0.0).reshape(shape)

    # Scores
    score_kind = random.choice(["normal", "normal", "equal", "quantised", "saturated", "bits"])
    shape = (batch_size, num_anchors, num_classes)
    if score_kind == "normal":
        scores = random.normal(-1.0, 2.0, shape)
    elif score_kind == "equal":
        scores = np.full(shape, random.choice([0.0, -4.0, 100.0, np.nan, -np.inf]))
    elif score_kind == "quantised":
        scores = random.integers(-2, 3, shape).astype(np.float64)
    elif score_kind == "saturated":
        scores = random.choice([-np.inf, -200.0, -20.0, 0.0, 17.0, 90.0, np.inf], shape)
    else:
        scores = random.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)
    scores_name = str(random.choice(["cls_logits", "cls_logits", "cls_probabilities"]))
    if scores_name == "cls_probabilities" and score_kind in ("normal", "quantised"):
        scores = np.clip(scores / 4 + 0.5, -0.1, 1.1)
    scores = sprinkle(random, scores.reshape(-1, max(1, num_classes)), 0.02 if garbage else 0.0).reshape(shape)

    # float16 holds unit-scale boxes only: at other scales everything would be inf or 0.
    dtypes = [dtype for dtype in DTYPES if scale == 1.0 or dtype != torch.float16]

    def a_tensor(values: np.ndarray | Tensor) -> Tensor:
        tensor = torch.as_tensor(values)
        if random.random() < 0.4:
            dtype = dtypes[random.integers(0, len(dtypes))]
            tensor = tensor.to(dtype)
            if dtype == torch.float64:  # digits that float32 rounds away, ties to even included
                digits = random.choice([0.0, 2.0**-25, 2.0**-24, -(2.0**-25)], tuple(tensor.shape))
                tensor = tensor * torch.from_numpy(1.0 + digits)
        return odd_strides(random, tensor) if random.random() < 0.4 else tensor

    arguments: dict[str, Any] = {
        "anchors": a_tensor(anchors),
        "box_deltas" if with_coder else "pred_boxes": a_tensor(predictions.astype(np.float32)),
        scores_name: a_tensor(scores.astype(np.float32)),
    }
    crowds = random.random() < 0.4
    packed = random.random() < 0.5
    if packed:
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        slack = int(random.choice([0, 0, 1, 5, 40]))
        filler = torch.from_numpy((boxes_around(random, slack, "smooth") * scale).astype(np.float32))
        no_labels = torch.zeros(slack, dtype=label_dtype)
        arguments["gt_boxes"] = a_tensor(torch.cat([*gt_boxes, filler]))
        arguments["gt_labels"] = odd_strides(random, torch.cat([*gt_labels, no_labels]))
        arguments["gt_offsets"] = torch.from_numpy(offsets).to(torch.int32 if random.random() < 0.3 else torch.int64)
        if crowds:
            arguments["gt_crowd"] = torch.cat([*gt_crowd, no_labels.bool()])
    else:
        arguments["gt_boxes"] = [a_tensor(boxes) for boxes in gt_boxes]
        arguments["gt_labels"] = gt_labels
        if crowds:
            arguments["gt_crowd"] = gt_crowd

    if with_coder:
        weights = [(10.0, 10.0, 5.0, 5.0), (1.0, 1.0, 1.0, 1.0), (0.3, 7.0, 3.0, -1.7)][random.integers(0, 3)]
        clip = float(random.choice([np.log(1000 / 16), np.inf, 0.0, 100.0, -1.0]))
        arguments["box_coder"] = mg_ops.BoxCoder(weights=weights, clip=clip)
    arguments["strategy"] = str(random.choice(STRATEGIES))
    arguments["sigma"] = float(random.choice([2.0, 2.0, 1.0000002, 1.01, 1.5, 3.0, 1e3, 1e30]))
    iou_positive = float(random.choice([0.5, 0.5, 0.3, 0.7, 1.0, 1e-6, 0.05]))
    arguments["iou_positive"] = iou_positive
    arguments["iou_ignored"] = iou_positive * float(random.choice([0.8, 0.8, 0.5, 1.0, 0.1]))
    arguments["crowd_overlap"] = float(random.choice([0.5, 0.5, 0.1, 1.0, 1e-6]))
    notes = {
        **{"B": batch_size, "A": num_anchors, "C": num_classes, "objects": counts, "anchors": anchor_kind},
        **{"gt_boxes": str(object_kind), "pred_boxes": f"{pred_kind}{' as deltas' if with_coder else ''}"},
        **{"scores": f"{score_kind} {scores_name}", "scale": scale, "garbage": garbage, "packed": packed},
    }
    return RandomBatch(seed, arguments, notes)
