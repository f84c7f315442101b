"""`atss_match`: each object selects by the mean and deviation of the IoU of the anchors nearest to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mg_ops.boxes import BoxCoder
from mg_ops.checks import join_levels
from mg_ops.matcher import Call, GroundTruth, Levels, Matcher, PerObject
from mg_ops.matching import call_operator
from mg_ops.rules.options import check_atss_options, check_level_sum
from mg_ops.rules.result import Match

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class AtssMatcher(Matcher[Match]):
    """How to match: the options of `atss_match`, to be set once and called with each batch as `MutualMatcher` is.

    Args:
        level_sizes: as of `atss_match`, like all that follow. None where calls have a list of the levels' anchors.
        k: candidates of an object in each level.
        center_margin: how far inside an object the center of its positives is, or None.
        crowd_overlap: threshold of crowd regions.
        box_coder: decodes `box_deltas`, which this rule takes and does not read.
        gt_box_format: of the objects' boxes.
        check: whether to raise on bad values.
        backend: None for the best one.

    Raises:
        TypeError, ValueError: an option that makes no sense; the message names it.

    Examples:
        >>> matcher = mg_ops.AtssMatcher()
        >>> match = matcher([anchors_p3, anchors_p4, anchors_p5], gt_boxes, gt_labels)
    """

    level_sizes: Sequence[int] | None = None
    k: int = 9
    center_margin: float | None = 0.01
    crowd_overlap: float = 0.5
    box_coder: BoxCoder | None = None
    gt_box_format: str = "xyxy"
    check: bool = False
    backend: str | None = None

    def _check_options(self) -> None:
        sizes = () if self.level_sizes is None else self.level_sizes
        sizes, *_ = check_atss_options(sizes, self.k, self.center_margin, self.crowd_overlap)
        if self.level_sizes is not None:
            object.__setattr__(self, "level_sizes", sizes)  # a tuple, so that equal matchers have one hash

    def _match(self, *arguments: Any, **options: Any) -> Match:
        return atss_match(*arguments, **options)


def atss_match(
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_labels: PerObject = None,
    gt_offsets: Tensor | None = None,
    *,
    level_sizes: Sequence[int] | None = None,
    k: int = 9,
    center_margin: float | None = 0.01,
    crowd_overlap: float = 0.5,
    **call: Unpack[Call],
) -> Match:
    """Assigns to each object the best of the anchors nearest to it: ATSS (Zhang et al., CVPR 2020, algorithm 1).

    The k anchors nearest to an object in each feature level are its candidates; those become its positives whose IoU
    reaches the mean plus the standard deviation of the candidates' IoU, and whose center lies inside. It gives the
    labels of mmdetection's `ATSSAssigner` and, in two dimensions, of MONAI's `ATSSMatcher`. Sizes and arguments that
    are not described here are those of `mutual_match`.

    Args:
        anchors: (A, 4) floating, the anchor boxes, one level after the other; or a list of one tensor per level.
        gt_boxes: the boxes of the objects.
        gt_labels: not read, but that of padded objects they, or gt_mask, tell the padding.
        gt_offsets: of packed objects.
        level_sizes: how many anchors each level has, A in all, at most 16 levels. None: anchors is a list of them.
        k: how many anchors of each level are candidates of an object, from 1 to 128.
        center_margin: the center of a positive is inside its object by more than this, in the unit of the boxes: at
            least 0. None: it may be anywhere.
        crowd_overlap: background whose overlap with a crowd region is at least this share of the anchor's area becomes
            ignored, in (0, 1].
        call: what else `mutual_match` takes: gt_crowd, gt_mask, gt_box_format, check, backend ("cuda", "cpp" or
            "eager"); and predictions with their box_coder, so that one call serves every rule, which are not read.

    Returns:
        `Match(cls_match, num_pos)`. The same integers on every backend.

    Raises:
        TypeError, ValueError, RuntimeError: as `mutual_match`.

    Examples:
        >>> levels = [torch.tensor([[0., 0., 10., 10.], [5., 0., 15., 10.]]), torch.tensor([[0., 0., 40., 40.]])]
        >>> mg_ops.atss_match(levels, [torch.tensor([[1., 0., 11., 10.]])], [torch.tensor([1])]).cls_match
        tensor([[ 0, -1, -1]])
    """
    if level_sizes is None:
        level_sizes = _sizes_of(anchors)
    options = check_atss_options(level_sizes, k, center_margin, crowd_overlap)
    result = call_operator(
        "atss_match",
        anchors,
        (gt_boxes, gt_labels, gt_offsets),
        options,
        lambda: check_level_sum(len(join_levels("anchors", anchors)), options[0]),
        reader="atss_match",
        reads_boxes=False,
        reads_scores=False,
        **call,
    )
    return Match(*result)


def _sizes_of(anchors: Levels) -> tuple[int, ...]:
    """How many anchors each level of a list has."""
    if isinstance(anchors, Tensor):
        raise ValueError(
            "level_sizes: expected the number of anchors of each level, or anchors as a list of one tensor per level, "
            "got one tensor without sizes; if all anchors are of one level pass [len(anchors)]"
        )
    # What is no list of tensors (A, 4) is for call_operator to refuse.
    levels = anchors if isinstance(anchors, (list, tuple)) else ()
    return tuple(int(level.shape[-2]) for level in levels if isinstance(level, Tensor) and level.dim() > 1)
