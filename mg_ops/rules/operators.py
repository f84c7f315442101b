"""The operators: their signatures, checks, fakes and definitions, for mg_ops/library.py to register."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mg_ops import reference
from mg_ops.checks import check_offsets, check_operator_inputs, check_thresholds
from mg_ops.reference import split_arguments
from mg_ops.rules.eager import (
    atss_match,
    dynamic_mutual_match,
    dynamic_soft_label_match,
    max_iou_match,
    simota_match,
    task_aligned_match,
)
from mg_ops.rules.options import (
    check_atss_options,
    check_dynamic_mutual_options,
    check_dynamic_soft_label_options,
    check_level_sum,
    check_max_iou_options,
    check_simota_options,
    check_task_aligned_options,
)

INPUTS = (
    "Tensor anchors, Tensor pred_boxes, Tensor cls_scores, "
    "Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets, Tensor? gt_crowd, "
    "float[]? box_coder, bool scores_are_probabilities"
)
"""What every rule's operator takes first; csrc/schema.cpp says the same and holds the contract."""


class Rule(NamedTuple):
    """The operator of a rule as torch is told of it; what it takes is checked as csrc/check.h does."""

    options: str
    """The arguments after the inputs, of the same signature for every backend."""
    check_options: Callable[..., object]
    """Raises on a wrong option."""
    definition: Callable[..., tuple[Tensor, ...]]
    """The eager backend."""
    per_anchor: tuple[torch.dtype, ...]
    """Of the results (B, A)."""
    num_counts: int
    """How many results (N,) int32 follow."""
    check_sizes: Callable[..., object] = lambda num_anchors, *options: None
    """Raises on an option that does not fit the number of anchors."""

    @property
    def signature(self) -> str:
        """Of the operator."""
        results = ", ".join(["Tensor"] * (len(self.per_anchor) + self.num_counts))
        return f"({INPUTS}, {self.options}) -> ({results})"

    def check(self, *arguments: Any) -> None:
        """Raises unless the arguments are as the signature's contract says."""
        self._check_but_offsets(*arguments)
        inputs, _ = split_arguments(arguments)
        if inputs.gt_offsets.device.type == "cpu":
            check_offsets(inputs.gt_offsets, len(inputs.gt_boxes))

    def _check_but_offsets(self, *arguments: Any) -> None:
        inputs, options = split_arguments(arguments)
        check_operator_inputs(inputs)
        self.check_options(*options)
        self.check_sizes(inputs.anchors.shape[0], *options)

    def fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Shapes and dtypes of the results, for torch.compile and torch.export; also where some tensors are "meta"."""
        self._check_but_offsets(*arguments)
        inputs, _ = split_arguments(arguments)
        empty, shape, num_gt = inputs.anchors.new_empty, inputs.cls_scores.shape[:2], inputs.gt_boxes.shape[0]
        per_anchor = [empty(shape, dtype=dtype) for dtype in self.per_anchor]
        return *per_anchor, *(empty(num_gt, dtype=torch.int32) for _ in range(self.num_counts))

    def eager(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The definition, of arguments that have been checked."""
        self.check(*arguments)
        return self.definition(*arguments)


RULES = {
    "mutual_match": Rule(
        "bool classification_by_regressed, bool localization_by_amplified, "
        "float sigma, float iou_positive, float iou_ignored, float crowd_overlap",
        lambda by_regressed, by_amplified, *numbers: check_thresholds(*numbers),
        reference.mutual_match,
        (torch.int64, torch.int64),
        num_counts=2,
    ),
    "dynamic_mutual_match": Rule(
        "bool classification_by_regressed, bool localization_by_amplified, int k, float sigma, float crowd_overlap",
        check_dynamic_mutual_options,
        dynamic_mutual_match.dynamic_mutual_match,
        (torch.int64, torch.int64, torch.float32, torch.float32),
        num_counts=2,
    ),
    "max_iou_match": Rule(
        "float iou_positive, float iou_ignored, int low_quality, float iou_low_quality, float crowd_overlap",
        check_max_iou_options,
        max_iou_match.max_iou_match,
        (torch.int64,),
        num_counts=1,
    ),
    "task_aligned_match": Rule(
        "float alpha, float beta, int k, int k_after_conflict, bool by_ciou, bool inside_first, "
        "int conflict, float minimum_side, float center_margin, float epsilon, float crowd_overlap",
        check_task_aligned_options,
        task_aligned_match.task_aligned_match,
        (torch.int64, torch.float32),
        num_counts=1,
    ),
    "simota_match": Rule(
        "int k, float center_radius, float iou_weight, float cls_weight, int candidates, float crowd_overlap",
        check_simota_options,
        simota_match.simota_match,
        (torch.int64, torch.float32),
        num_counts=1,
    ),
    "dynamic_soft_label_match": Rule(
        "int k, float soft_center_radius, float iou_weight, float crowd_overlap",
        check_dynamic_soft_label_options,
        dynamic_soft_label_match.dynamic_soft_label_match,
        (torch.int64, torch.float32),
        num_counts=1,
    ),
    "atss_match": Rule(
        "int[] level_sizes, int k, float? center_margin, float crowd_overlap",
        check_atss_options,
        atss_match.atss_match,
        (torch.int64,),
        num_counts=1,
        check_sizes=lambda num_anchors, level_sizes, *_: check_level_sum(num_anchors, level_sizes),
    ),
}
"""Operator -> what it is."""
