"""What a match did to its objects, as numbers to log while training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mg_ops.checks import check_num_classes, check_tensor, describe
from mg_ops.matcher import GroundTruth
from mg_ops.matching import MutualMatch, check_counts
from mg_ops.objects import holds_dictionaries, pack_objects
from mg_ops.reference import area, autocast_type, is_object
from mg_ops.rules.result import DynamicMutualMatch, Match

_SIZES = ("all", "small", "medium", "large")


class MatchSummary(NamedTuple):
    """Counts of a batch, on the device of the match. (4,) stands for all objects, small, medium and large ones.

    Crowd regions are no objects. An object whose box has no size, or is not finite, counts among all only.
    """

    num_objects: Tensor
    """(4,) int64."""
    unmatchable: Tensor
    """(4,) int64: objects that cannot be matched, as no anchor overlaps them or their box is not one."""
    without_cls_positive: Tensor
    """(4,) int64: objects without a positive for classification, the unmatchable ones among them."""
    without_loc_positive: Tensor
    """(4,) int64: objects without a positive for localization, the unmatchable ones among them."""
    cls_positives: Tensor
    """(4,) int64: positives for classification."""
    loc_positives: Tensor
    """(4,) int64: positives for localization."""
    ignored_share: Tensor
    """() float32: the share of all anchors that classification ignores."""
    disagreement: Tensor
    """() float32: of the anchors that are positive for some task, the share that is not positive for the same object in
    both; 0 without positives. The misalignment of the two tasks that Mutual Guidance answers to: 0 with strategy
    "iou"."""
    class_counts: Tensor | None
    """(C, 3) int64: objects, those without a positive for classification, and for localization, of each class; None
    unless labels and their number were given."""

    def as_dict(self) -> dict[str, float]:
        """The scalars by name for a logger, in one copy from the device (which waits for it).

        Returns:
            "objects/small", "unmatchable/small", "without_cls_positive/small", "without_loc_positive/small",
            "cls_positives_per_object/small", "loc_positives_per_object/small" (0 without objects), the same for "all",
            "medium" and "large", and "ignored_share", "disagreement". Not the classes.
        """
        objects = self.num_objects.clamp(min=1)
        counts = [self.num_objects, self.unmatchable, self.without_cls_positive, self.without_loc_positive]
        counts += [self.cls_positives / objects, self.loc_positives / objects]
        shares = torch.stack([self.ignored_share, self.disagreement])
        values = torch.cat([count.double() for count in counts] + [shares.double()]).tolist()
        names = ["objects", "unmatchable", "without_cls_positive", "without_loc_positive"]
        names += ["cls_positives_per_object", "loc_positives_per_object"]
        keys = [f"{name}/{size}" for name in names for size in _SIZES] + ["ignored_share", "disagreement"]
        return dict(zip(keys, values, strict=True))


def summarize(
    match: MutualMatch | Match | DynamicMutualMatch,
    gt_boxes: GroundTruth,
    gt_labels: Tensor | Sequence[Tensor] | None = None,
    gt_offsets: Tensor | None = None,
    *,
    gt_crowd: Tensor | Sequence[Tensor] | None = None,
    gt_mask: Tensor | None = None,
    gt_box_format: str = "xyxy",
    num_classes: int | None = None,
    size_limits: tuple[float, float] = (32.0, 96.0),
) -> MatchSummary:
    """Counts which objects found anchors, by size and class, and how far the two tasks disagree.

    A few element-wise operations on (B, A) and (N,) tensors, nothing read back from the device: cheap enough for every
    hundredth step.

    Args:
        match: what `mutual_match`, or another rule, returned for these objects.
        gt_boxes: the boxes, as given to `mutual_match`, like the arguments after it.
        gt_labels: the labels, for the counts by class; needs `num_classes`.
        gt_offsets: the offsets of packed objects.
        gt_crowd: the crowd regions.
        gt_mask: the mask of padded objects.
        gt_box_format: the format of gt_boxes.
        num_classes: C. Objects with other labels are in no class.
        size_limits: an object is small if the square root of its area is below the first, large if not below the
            second, in the boxes' unit: COCO's sizes for boxes in the pixels of its images.

    Returns:
        `MatchSummary`, every tensor of a shape known beforehand.

    Raises:
        TypeError, ValueError: as `mutual_match`; or the match was made for another number of objects, or only one of
            gt_labels and num_classes is given.

    Examples:
        >>> if step % 100 == 0:
        ...     for name, value in mg_ops.summarize(match, gt_boxes).as_dict().items():
        ...         writer.add_scalar(f"match/{name}", value, step)
    """
    if not isinstance(match, (MutualMatch, Match, DynamicMutualMatch)):
        raise TypeError(f"match: expected what mg_ops.mutual_match or another rule returned, got {describe(match)}")
    in_dictionaries = holds_dictionaries(gt_boxes, gt_labels)
    if not in_dictionaries and (gt_labels is None) != (num_classes is None):
        raise ValueError("gt_labels, num_classes: the counts by class need both, got only one")
    if num_classes is not None:
        check_num_classes(num_classes)
    low, high = _check_size_limits(size_limits)
    check_tensor("match.cls_match", match.cls_match, "integer", ("B", "A"), None)
    batch_size, num_anchors = match.cls_match.shape
    device = match.cls_match.device
    check_tensor("match.loc_match", match.loc_match, "integer", (batch_size, num_anchors), device)
    objects = pack_objects(
        gt_boxes,
        gt_labels,
        gt_offsets,
        gt_crowd,
        gt_mask,
        gt_box_format,
        batch_size=batch_size,
        device=device,
        labels_reader=None if num_classes is None else "num_classes",
    )
    boxes, labels, offsets = objects.gt_boxes, objects.gt_labels, objects.gt_offsets
    num_gt = boxes.shape[0]
    check_counts(match, num_gt, device)

    with torch.no_grad(), torch.autocast(autocast_type(device), enabled=False):
        boxes = boxes.float()
        # Packed buffers may hold more objects than count.
        counted = torch.arange(num_gt, device=device) < offsets[-1]
        if objects.gt_crowd is not None:
            counted = counted & ~objects.gt_crowd
        if objects.is_object is not None:
            counted = counted & objects.is_object
        size = area(boxes)
        box = is_object(boxes)
        groups = torch.stack(
            [torch.ones_like(box), box & (size < low * low), box & (size >= low * low), box & (size >= high * high)]
        )
        groups[2] &= size < high * high
        groups = groups & counted  # (4, N)

        starts = offsets[:-1].long().unsqueeze(1)
        cls_count = _count_positives(match.cls_match, starts, num_gt)
        loc_count = _count_positives(match.loc_match, starts, num_gt)

        either = match.cls_positive | match.loc_positive
        differ = either & (match.cls_match != match.loc_match)
        class_counts = None
        if num_classes is not None:
            labels = torch.where(counted & (labels >= 0) & (labels < num_classes), labels.long(), num_classes)
            columns = torch.stack([torch.ones_like(cls_count), cls_count == 0, loc_count == 0], dim=1).long()
            class_counts = columns.new_zeros(num_classes + 1, 3).index_add_(0, labels, columns)[:num_classes]
        return MatchSummary(
            num_objects=groups.sum(1),
            unmatchable=(groups & (match.num_pos.flatten() == 0)).sum(1),
            without_cls_positive=(groups & (cls_count == 0)).sum(1),
            without_loc_positive=(groups & (loc_count == 0)).sum(1),
            cls_positives=(groups * cls_count).sum(1),
            loc_positives=(groups * loc_count).sum(1),
            ignored_share=match.ignored.sum() / max(1, match.cls_match.numel()),
            disagreement=differ.sum() / either.sum().clamp(min=1),
            class_counts=class_counts,
        )


def _check_size_limits(size_limits: object) -> tuple[float, float]:
    wanted = f"size_limits: expected two numbers, 0 <= small <= large, got {size_limits!r}"
    if not isinstance(size_limits, (tuple, list)) or len(size_limits) != 2:
        raise TypeError(wanted)
    if not all(isinstance(limit, (int, float)) and not isinstance(limit, bool) for limit in size_limits):
        raise TypeError(wanted)
    if not 0 <= size_limits[0] <= size_limits[1]:
        raise ValueError(wanted)
    return size_limits[0], size_limits[1]


def _count_positives(match: Tensor, starts: Tensor, num_gt: int) -> Tensor:
    """(B, A) matches -> (N,) int64, how many anchors each object has."""
    objects = torch.where(match >= 0, starts + match, num_gt).clamp(0, num_gt).flatten()
    counts = torch.zeros(num_gt + 1, dtype=torch.int64, device=match.device)
    return counts.scatter_add_(0, objects, torch.ones_like(objects))[:num_gt]
