"""The operators of the rules: signatures, checks, fakes and eager definitions, for mg_ops/library.py to register."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mg_ops.checks import NUM_INPUTS, check_operator_inputs
from mg_ops.rules.eager import max_iou_match
from mg_ops.rules.options import check_max_iou_options

INPUTS = (
    "Tensor anchors, Tensor pred_boxes, Tensor cls_scores, "
    "Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets, Tensor? gt_crowd, "
    "float[]? box_coder, bool scores_are_probabilities"
)
"""What every operator takes first; csrc/schema.cpp says the same and holds the contract."""


class Rule(NamedTuple):
    """An operator as torch is told of it."""

    signature: str
    check_options: Callable[..., object]
    """Raises on a wrong option, as csrc/check.h does."""
    eager: Callable[..., tuple[Tensor, ...]]
    outputs_per_anchor: tuple[torch.dtype, ...]
    """Of the outputs (B, A); one more is (N,) int32."""

    def check(self, *arguments: Any) -> None:
        """Raises unless the arguments are as the signature's contract says, but for the offsets' values."""
        check_operator_inputs(*arguments[:NUM_INPUTS])
        self.check_options(*arguments[NUM_INPUTS:])

    def fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Shapes and dtypes of the result, for torch.compile and torch.export."""
        self.check(*arguments)
        anchors, _, cls_scores, gt_boxes = arguments[:4]
        per_anchor = (anchors.new_empty(cls_scores.shape[:2], dtype=dtype) for dtype in self.outputs_per_anchor)
        return (*per_anchor, anchors.new_empty(gt_boxes.shape[0], dtype=torch.int32))


RULES = {
    "max_iou_match": Rule(
        f"({INPUTS}, float iou_positive, float iou_ignored, int low_quality, float iou_low_quality, "
        "float crowd_overlap) -> (Tensor, Tensor)",
        check_max_iou_options,
        max_iou_match.max_iou_match,
        (torch.int64,),
    )
}
"""Operator -> what it is."""
