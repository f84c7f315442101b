"""detectron2's matcher by mutual guidance: the tensors its anchor-based heads label their anchors with.

detectron2's `RetinaNet.label_anchors` matches one image at a time from a matrix of IoUs, before there are predictions,
and gives both losses one match; mutual guidance needs the predictions and gives two. `match_anchors` makes the tensors
of all images at once, for the body of an overridden `losses`. Imports nothing of detectron2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mg_ops.adapters.labels import Detectron2Match, to_detectron2
from mg_ops.matcher import Matcher
from mg_ops.matching import MutualMatch
from mg_ops.rules.result import DynamicMutualMatch, Match


class Detectron2Matches(NamedTuple):
    """The match of a batch in detectron2's convention: B images, A anchors."""

    classification: Detectron2Match
    """(B, A) each: the objects and labels of the classification loss."""
    localization: Detectron2Match
    """(B, A) each: the objects and labels of the box loss; no label is -1."""
    match: MutualMatch | Match | DynamicMutualMatch
    """The same in `mg_ops`' convention, for `mg_ops.summarize`."""


def match_anchors(
    anchors: Tensor,
    gt_boxes: Sequence[Tensor],
    gt_classes: Sequence[Tensor],
    *,
    matcher: Matcher[MutualMatch] | Matcher[Match] | Matcher[DynamicMutualMatch],
    **predictions: Tensor,
) -> Detectron2Matches:
    """Matches a batch by mutual guidance and says it as detectron2's `Matcher` does.

    Args:
        anchors: (A, 4) floating, (x1, y1, x2, y2): `Boxes.cat(anchors).tensor`.
        gt_boxes: a list of B tensors (G, 4): `instances.gt_boxes.tensor`.
        gt_classes: a list of B tensors (G,): `instances.gt_classes`.
        matcher: how to match, `mg_ops.MutualMatcher` or that of another rule; its box coder decodes `box_deltas`.
            detectron2's `Box2BoxTransform` is `mg_ops.BoxCoder` with its weights and scale_clamp.
        **predictions: cls_logits (B, A, C) and box_deltas or pred_boxes (B, A, 4), as of `mg_ops.mutual_match`.

    Returns:
        `Detectron2Matches(classification, localization, match)`. detectron2's RetinaNet wants class targets that are
        the class where the label is 1, C where it is 0, and -1 where it is -1.

    Raises:
        TypeError, ValueError: as `mg_ops.mutual_match`.
    """
    match = matcher(anchors, gt_boxes, gt_classes, **predictions)
    return Detectron2Matches(to_detectron2(match.cls_match), to_detectron2(match.loc_match), match)
