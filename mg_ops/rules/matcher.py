"""What the matcher objects of all rules are: options set once, called as `mg_ops.MutualMatcher` is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from mg_ops.backend_choice import check_backend
from mg_ops.boxes import BoxCoder, check_box_coder
from mg_ops.checks import check_bool
from mg_ops.matching import GroundTruth, Levels
from mg_ops.objects import check_box_format
from mg_ops.rules.result import Match


class RuleMatcher:
    """The base of frozen dataclasses whose fields are the options of a rule's function."""

    box_coder: BoxCoder | None
    gt_box_format: str
    check: bool
    backend: str | None

    def _check_options(self) -> None:
        """Raises TypeError or ValueError on a wrong option of the rule's own."""
        raise NotImplementedError

    def _match(self, *arguments: Any, **options: Any) -> Match:
        """The rule's function."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        self._check_options()
        check_box_coder(self.box_coder)
        check_box_format(self.gt_box_format)
        check_bool("check", self.check)
        check_backend(self.backend)

    def __call__(
        self,
        anchors: Levels,
        gt_boxes: GroundTruth,
        gt_labels: Tensor | Sequence[Tensor] | None = None,
        gt_offsets: Tensor | None = None,
        *,
        cls_logits: Levels | None = None,
        cls_probabilities: Levels | None = None,
        pred_boxes: Levels | None = None,
        box_deltas: Levels | None = None,
        gt_crowd: Tensor | Sequence[Tensor] | None = None,
        gt_mask: Tensor | None = None,
    ) -> Match:
        """The rule's function with these options. The box coder decodes `box_deltas`, and leaves `pred_boxes` alone."""
        options = {option.name: getattr(self, option.name) for option in fields(self)}  # type: ignore[arg-type]
        if box_deltas is None:
            options["box_coder"] = None
        return self._match(
            anchors,
            gt_boxes,
            gt_labels,
            gt_offsets,
            cls_logits=cls_logits,
            cls_probabilities=cls_probabilities,
            pred_boxes=pred_boxes,
            box_deltas=box_deltas,
            gt_crowd=gt_crowd,
            gt_mask=gt_mask,
            **options,
        )
