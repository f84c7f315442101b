"""The eager reference against a second reading of the definition: plain loops over float32 scalars.

Slow and simple on purpose, a sentence at a time, and written from docs/definition.md, not from the reference.
Only exp, sigmoid and log2 are the reference's own, because the definition fixes them by their bits; test_det_math.py
checks those against float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES
from comparison import assert_same
from conftest import fuzz_cases
from hypothesis import given, settings
from random_batches import random_batch
from small_batches import small_batches

import mg_ops
from mg_ops import reference

Float = np.float32
ZERO, HALF, ONE = Float(0), Float(0.5), Float(1)
Quality = list[list[Float]]  # [anchor][object]


def scalar(function: Any, x: Float) -> Float:
    return Float(function(torch.tensor([x], dtype=torch.float32)).item())


def is_finite(box: list[Float]) -> bool:
    return all(np.isfinite(coordinate) for coordinate in box)


def is_valid(box: list[Float]) -> bool:
    return is_finite(box) and box[2] > box[0] and box[3] > box[1]


def area(box: list[Float]) -> Float:
    return (box[2] - box[0]) * (box[3] - box[1])


def intersection(a: list[Float], b: list[Float]) -> Float:
    iw = min(a[2], b[2]) - max(a[0], b[0])
    ih = min(a[3], b[3]) - max(a[1], b[1])
    if iw <= 0 or ih <= 0:
        return ZERO
    return iw * ih


def iou(a: list[Float], b: list[Float]) -> Float:
    """A non-finite or inverted box has IoU 0 with everything."""
    if not is_valid(a) or not is_valid(b):
        return ZERO
    inter = intersection(a, b)
    if inter == 0:
        return ZERO
    union = (area(a) + area(b)) - inter
    if union == 0:
        return ZERO
    result = inter / union
    return result if np.isfinite(result) and result > 0 else ZERO


def decode(anchor: list[Float], deltas: list[Float], coder: mg_ops.BoxCoder) -> list[Float]:
    low, high = [], []
    for axis in (0, 1):
        size = anchor[axis + 2] - anchor[axis]
        center = anchor[axis] + HALF * size
        shift = deltas[axis] / Float(coder.weights[axis])
        log_scale = deltas[axis + 2] / Float(coder.weights[axis + 2])
        if log_scale > Float(coder.clip):
            log_scale = Float(coder.clip)
        new_center = shift * size + center
        new_size = scalar(reference.exp, log_scale) * size
        low.append(new_center - HALF * new_size)
        high.append(new_center + HALF * new_size)
    return low + high


def probability(scores: list[Float], label: int, are_probabilities: bool) -> Float:
    if label < 0 or label >= len(scores):
        return ZERO
    if are_probabilities:
        p = min(max(scores[label], ZERO), ONE)
    else:
        p = scalar(reference.sigmoid, scores[label])
    return ZERO if np.isnan(p) else p


class Claims:
    """Steps 1 to 3 of the claim, for one quality; `zero` and `one` are the values that stand for quality 0 and 1."""

    def __init__(
        self, quality: Quality, objects: list[int], zero: float, one: float, fallback: dict[int, int] | None = None
    ) -> None:
        anchors = range(len(quality))
        quality = [list(row) for row in quality]
        self.best: dict[int, int] = {}
        for g in objects:
            best, best_quality = None, zero
            for a in anchors:
                if quality[a][g] > best_quality:  # strictly: the lowest anchor stays on ties
                    best, best_quality = a, quality[a][g]
            if best is None and fallback is not None:
                best = fallback[g]
            if best is not None:
                self.best[g] = best
        for g, a in self.best.items():
            quality[a][g] = one
        self.owner: list[int | None] = []
        self.quality: list[float] = []
        for a in anchors:
            owner, owner_quality = None, zero
            for g in objects:
                if quality[a][g] > owner_quality:
                    owner, owner_quality = g, quality[a][g]
            self.owner.append(owner)
            self.quality.append(owner_quality)

    def ranking(self, g: int) -> list[int]:
        """The anchors object g owns, best first."""
        owned = [a for a, owner in enumerate(self.owner) if owner == g]
        return sorted(owned, key=lambda a: (-self.quality[a], a))


NUMBERS = (("sigma", 2.0), ("iou_positive", 0.5), ("iou_ignored", 0.4), ("crowd_overlap", 0.5))
"""And their defaults."""


def match_image(
    anchors: list[list[Float]],
    pred_boxes: list[list[Float]],
    cls_scores: list[list[Float]],
    gt_boxes: list[list[Float]],
    gt_labels: list[int],
    gt_crowd: list[bool],
    arguments: dict[str, Any],
) -> tuple[list[int], list[int], list[int], list[int]]:
    sigma, iou_positive, iou_ignored, crowd_overlap = (Float(arguments.get(*option)) for option in NUMBERS)
    strategy = arguments.get("strategy", "mutual")
    q_anchor = [[iou(anchor, box) for box in gt_boxes] for anchor in anchors]
    q_regressed = [[iou(pred, box) for box in gt_boxes] for pred in pred_boxes]
    # Compared by its exponent: -inf stands for quality 0, and 0 for quality 1.
    exponent = [[-np.inf] * len(gt_boxes) for _ in anchors]
    for a in range(len(anchors)):
        for g in range(len(gt_boxes)):
            if q_anchor[a][g] > 0:
                p = probability(cls_scores[a], gt_labels[g], "cls_probabilities" in arguments)
                exponent[a][g] = ((sigma - p) / sigma) * scalar(reference.log2, q_anchor[a][g])

    objects = [
        g
        for g, box in enumerate(gt_boxes)
        if is_valid(box) and not gt_crowd[g] and any(q_anchor[a][g] > 0 for a in range(len(anchors)))
    ]
    by_anchor = Claims(q_anchor, objects, 0.0, 1.0)
    by_regressed = Claims(q_regressed, objects, 0.0, 1.0, by_anchor.best)
    by_amplified = Claims(exponent, objects, -np.inf, 0.0, by_anchor.best)

    num_pos, num_total = [0] * len(gt_boxes), [0] * len(gt_boxes)
    for g in objects:
        qualities = [by_anchor.quality[a] for a in by_anchor.ranking(g)]
        num_pos[g] = max(1, sum(bool(quality >= iou_positive) for quality in qualities))
        num_total[g] = max(num_pos[g], sum(bool(quality >= iou_ignored) for quality in qualities))

    for_classification = by_regressed if strategy in ("mutual", "localize_to_classify") else by_anchor
    for_localization = by_amplified if strategy in ("mutual", "classify_to_localize") else by_anchor
    cls_match, loc_match = [mg_ops.BACKGROUND] * len(anchors), [-1] * len(anchors)
    for g in objects:
        ranking = for_classification.ranking(g)
        for a in ranking[: num_pos[g]]:
            cls_match[a] = g
        for a in ranking[num_pos[g] : num_total[g]]:
            cls_match[a] = mg_ops.IGNORED
        for a in for_localization.ranking(g)[: num_pos[g]]:
            loc_match[a] = g

    for a, anchor in enumerate(anchors):
        for g, box in enumerate(gt_boxes):
            if gt_crowd[g] and cls_match[a] == mg_ops.BACKGROUND and is_valid(box) and is_valid(anchor):
                anchor_area = area(anchor)
                # Both infinite is NaN, which compares false; infinite over finite is no overlap anyone can mean.
                share = intersection(anchor, box) / anchor_area if anchor_area > 0 else ZERO
                if np.isfinite(share) and share >= crowd_overlap:
                    cls_match[a] = mg_ops.IGNORED
    return cls_match, loc_match, num_pos, num_total


def rows(tensor: torch.Tensor) -> list[list[Float]]:
    return [list(row) for row in tensor.float().numpy()]


def match_batch(arguments: dict[str, Any]) -> mg_ops.MutualMatch:
    """`mg_ops.mutual_match` for objects in lists or packed, one scalar at a time."""
    anchors = rows(arguments["anchors"])
    cls_scores = arguments["cls_probabilities" if "cls_probabilities" in arguments else "cls_logits"]
    pred_boxes = arguments["box_deltas" if "box_coder" in arguments else "pred_boxes"]
    batch_size, num_anchors = cls_scores.shape[:2]
    if "gt_offsets" in arguments:
        offsets = arguments["gt_offsets"].tolist()
        pieces = [slice(offsets[image], offsets[image + 1]) for image in range(batch_size)]
        objects = [(arguments["gt_boxes"][piece], arguments["gt_labels"][piece]) for piece in pieces]
        crowds = [arguments["gt_crowd"][piece] for piece in pieces] if "gt_crowd" in arguments else None
        slack = len(arguments["gt_boxes"]) - offsets[-1]
    else:
        objects = list(zip(arguments["gt_boxes"], arguments["gt_labels"], strict=True))
        crowds = arguments.get("gt_crowd")
        slack = 0
    matched = []
    for image, (gt_boxes, gt_labels) in enumerate(objects):
        boxes = rows(pred_boxes[image])
        if "box_coder" in arguments:
            boxes = [decode(*pair, arguments["box_coder"]) for pair in zip(anchors, boxes, strict=True)]
        crowd = crowds[image].tolist() if crowds is not None else [False] * len(gt_labels)
        predictions = (anchors, boxes, rows(cls_scores[image]))
        matched.append(match_image(*predictions, rows(gt_boxes), gt_labels.tolist(), crowd, arguments))
    matches = [torch.tensor([of_image[task] for of_image in matched], dtype=torch.int64) for task in (0, 1)]
    counts = [[count for of_image in matched for count in of_image[which]] + [0] * slack for which in (2, 3)]
    return mg_ops.MutualMatch(
        *(match.reshape(batch_size, num_anchors) for match in matches),
        *(torch.tensor(of_objects, dtype=torch.int32) for of_objects in counts),
    )


def assert_reference_agrees(arguments: dict[str, Any], what: object) -> None:
    with np.errstate(all="ignore"):
        expected = match_batch(arguments)
    assert_same(mg_ops.mutual_match(**arguments, backend="eager"), expected, what)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_this_reading_agrees_with_the_cases_on_paper(case: Any) -> None:
    with np.errstate(all="ignore"):
        assert_same(match_batch(case.arguments()), case.expected(), case.clause)


@settings(max_examples=fuzz_cases(400))
@given(arguments=small_batches())
def test_small_batches(arguments: dict[str, Any]) -> None:
    assert_reference_agrees(arguments, arguments)


def test_random_batches() -> None:
    """Those of the first thousands of seeds that plain loops can do in time."""
    tried = 0
    for seed in range(fuzz_cases(1500)):
        batch = random_batch(seed)
        pairs = batch.notes["A"] * max(1, sum(batch.notes["objects"]))
        if pairs <= 300:
            tried += 1
            assert_reference_agrees(batch.arguments, batch)
    assert tried >= fuzz_cases(200)
