"""`dynamic_mutual_match`: Mutual Guidance as its authors continued it after the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mg_ops.boxes import BoxCoder
from mg_ops.matcher import Call, GroundTruth, Levels, Matcher, PerObject
from mg_ops.matching import STRATEGIES, Strategy, call_operator, check_strategy
from mg_ops.rules.options import check_dynamic_mutual_options
from mg_ops.rules.result import DynamicMutualMatch

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class DynamicMutualMatcher(Matcher[DynamicMutualMatch]):
    """How to match: the options of `dynamic_mutual_match`, to be set once and called with each batch.

    Args:
        strategy: as of `dynamic_mutual_match`, like all that follow.
        k: how many qualities of an object are added up.
        sigma: degree of amplification.
        crowd_overlap: threshold of crowd regions.
        box_coder: decodes `box_deltas`.
        gt_box_format: of the objects' boxes.
        check: whether to raise on bad values.
        backend: None for the best one.

    Raises:
        TypeError, ValueError: an option that makes no sense; the message names it.

    Examples:
        >>> matcher = mg_ops.DynamicMutualMatcher(box_coder=mg_ops.BoxCoder())
        >>> match = matcher(anchors, gt_boxes, gt_labels, cls_logits=logits, box_deltas=deltas)
    """

    strategy: Strategy = "mutual"
    k: int = 15
    sigma: float = 2.0
    crowd_overlap: float = 0.5
    box_coder: BoxCoder | None = None
    gt_box_format: str = "xyxy"
    check: bool = False
    backend: str | None = None

    def _check_options(self) -> None:
        check_strategy(self.strategy)
        check_dynamic_mutual_options(*STRATEGIES[self.strategy], self.k, self.sigma, self.crowd_overlap)

    def _match(self, *arguments: Any, **options: Any) -> DynamicMutualMatch:
        return dynamic_mutual_match(*arguments, **options)


def dynamic_mutual_match(
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_labels: PerObject = None,
    gt_offsets: Tensor | None = None,
    *,
    strategy: Strategy = "mutual",
    k: int = 15,
    sigma: float = 2.0,
    crowd_overlap: float = 0.5,
    **call: Unpack[Call],
) -> DynamicMutualMatch:
    """Assigns anchors by what the network predicts, as many as it predicts well: Mutual Guidance as continued.

    It is the matching of the authors' repository (zhanghengdev/MutualGuide) after the paper: each anchor competes for
    the object for which it is best, and each object takes as many of those that it won as their largest qualities add
    up to. Sizes and arguments that are not described here are those of `mutual_match`.

    Args:
        anchors: (A, 4) floating, the anchor boxes.
        gt_boxes: the boxes of the objects.
        gt_labels: their classes.
        gt_offsets: of packed objects.
        strategy: by which quality each task ranks anchors, as of `mutual_match`; what it does not read need not be
            passed.
        k: an object takes as many anchors as its k largest qualities add up to, and at least one; from 1 to 128.
        sigma: degree of amplification, above 0: the IoU of an anchor counts exp(p / sigma) times for localization, and
            at most 1.
        crowd_overlap: background whose overlap with a crowd region is at least this share of the anchor's area becomes
            ignored, in (0, 1].
        call: what else `mutual_match` takes: cls_logits or cls_probabilities; pred_boxes, or box_deltas with box_coder;
            gt_crowd, gt_mask, gt_box_format, check, backend ("cuda", "cpp" or "eager").

    Returns:
        `DynamicMutualMatch`, with the qualities of the positives as soft targets of classification and as weights of
        localization. The same bits on every backend.

    Raises:
        TypeError, ValueError, RuntimeError: as `mutual_match`.

    Examples:
        >>> anchors = torch.tensor([[0., 0., 10., 10.], [5., 0., 15., 10.], [40., 40., 50., 50.]])
        >>> gt_boxes, gt_labels = [torch.tensor([[1., 0., 11., 10.]])], [torch.tensor([1])]
        >>> match = mg_ops.dynamic_mutual_match(anchors, gt_boxes, gt_labels, cls_logits=torch.zeros(1, 3, 2),
        ...                                     pred_boxes=anchors[None])
        >>> match.cls_match
        tensor([[ 0, -1, -1]])
    """
    check_strategy(strategy)
    by_regressed, by_amplified = STRATEGIES[strategy]
    cls_match, loc_match, soft_targets, loc_weights, num_pos, num_loc_pos = call_operator(
        "dynamic_mutual_match",
        anchors,
        (gt_boxes, gt_labels, gt_offsets),
        check_dynamic_mutual_options(by_regressed, by_amplified, k, sigma, crowd_overlap),
        lambda: None,
        reader=f"dynamic_mutual_match with strategy {strategy!r}",
        reads_boxes=by_regressed,
        reads_scores=by_amplified,
        **call,
    )
    return DynamicMutualMatch(cls_match, loc_match, num_pos, num_loc_pos, soft_targets.detach(), loc_weights.detach())
