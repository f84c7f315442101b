"""Small arguments for `mg_ops.mutual_match` as a hypothesis strategy: when one fails, hypothesis shrinks it."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

import mg_ops

NUMBERS = st.one_of(
    st.integers(0, 4).map(float),
    st.sampled_from([0.5, 1.5, -1.0, float("nan"), float("inf"), float("-inf"), 1e30, 3e38, 1e-20, 1e-45, -0.0]),
    st.floats(width=32),
)
SCORES = st.one_of(st.sampled_from([0.0, 0.25, 1.0, -1.0, 100.0, -100.0]), st.floats(width=32))


@st.composite
def small_batches(draw: st.DrawFn) -> dict[str, Any]:
    def rows(count: int, width: int, numbers: st.SearchStrategy[float]) -> torch.Tensor:
        values = [[draw(numbers) for _ in range(width)] for _ in range(count)]
        return torch.tensor(values, dtype=torch.float32).reshape(count, width)

    num_anchors, num_classes = draw(st.integers(0, 6)), draw(st.integers(0, 2))
    batch_size = draw(st.integers(0, 2))
    counts = [draw(st.integers(0, 4)) for _ in range(batch_size)]
    numbers = draw(st.sampled_from([NUMBERS, st.integers(0, 4).map(float)]))
    boxes_name = draw(st.sampled_from(["pred_boxes", "box_deltas"]))
    scores_name = draw(st.sampled_from(["cls_logits", "cls_probabilities"]))
    label = st.one_of(st.integers(0, 1), st.integers(-(2**63), 2**63 - 1))
    arguments: dict[str, Any] = {
        "anchors": rows(num_anchors, 4, numbers),
        boxes_name: rows(batch_size * num_anchors, 4, numbers).reshape(batch_size, num_anchors, 4),
        scores_name: rows(batch_size * num_anchors, num_classes, SCORES).reshape(batch_size, num_anchors, num_classes),
        "gt_boxes": [rows(count, 4, numbers) for count in counts],
        "gt_labels": [torch.tensor([draw(label) for _ in range(count)], dtype=torch.int64) for count in counts],
        "strategy": draw(st.sampled_from(["mutual", "iou", "localize_to_classify", "classify_to_localize"])),
        "sigma": draw(st.one_of(st.just(2.0), st.floats(1.0000002, 1e38))),
    }
    if draw(st.booleans()):
        arguments["gt_crowd"] = [
            torch.tensor([draw(st.booleans()) for _ in range(count)], dtype=torch.bool) for count in counts
        ]
    if boxes_name == "box_deltas":
        clip = draw(st.sampled_from([4.135, float("inf"), 0.0]))
        arguments["box_coder"] = mg_ops.BoxCoder(weights=(1.0, 1.0, 1.0, 1.0), clip=clip)
    arguments["iou_positive"] = draw(st.sampled_from([0.5, 1.0, 0.25, 1e-30]))
    arguments["iou_ignored"] = arguments["iou_positive"] * draw(st.sampled_from([1.0, 0.8, 0.5]))
    return arguments
