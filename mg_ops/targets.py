"""From a match to what losses need: fixed shapes, no one-hot (B, A, C) tensor, no synchronization with the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mg_ops.boxes import BoxCoder, check_box_coder
from mg_ops.checks import check_num_classes, check_tensor, describe, join_levels
from mg_ops.matcher import GroundTruth, Levels
from mg_ops.matching import MutualMatch, check_counts
from mg_ops.objects import Objects, pack_objects
from mg_ops.reference import BACKGROUND, IGNORED, autocast_type
from mg_ops.rules.result import DynamicMutualMatch, Match


class Targets(NamedTuple):
    """What the losses of a batch need: B images, A anchors. `match.loc_positive` says which boxes count."""

    class_targets: Tensor
    """(B, A) int64: the label of each classification positive, `BACKGROUND` (-1) or `IGNORED` (-2)."""
    loc_labels: Tensor
    """(B, A) int64: the label of each localization positive's object, as given (for class-specific heads), or -1."""
    box_targets: Tensor
    """(B, A, 4) float32: the box (x1, y1, x2, y2) of each localization positive's object; with a box coder the deltas
    from its anchor. 0 where there is none."""


def encode_targets(
    match: MutualMatch | Match | DynamicMutualMatch,
    anchors: Levels,
    gt_boxes: GroundTruth,
    gt_labels: Tensor | Sequence[Tensor] | None = None,
    gt_offsets: Tensor | None = None,
    *,
    gt_mask: Tensor | None = None,
    gt_box_format: str = "xyxy",
    num_classes: int | None = None,
    box_coder: BoxCoder | None = None,
) -> Targets:
    """Gathers the targets of a match: class targets with the ignore mask, and the encoded boxes of the positives.

    Args:
        match: what `mutual_match`, or another rule, returned for these objects.
        anchors: (A, 4) floating, (x1, y1, x2, y2); or a list of one tensor per feature level.
        gt_boxes: the boxes, as given to `mutual_match`, like the arguments after it.
        gt_labels: the labels.
        gt_offsets: the offsets of packed objects.
        gt_mask: the mask of padded objects.
        gt_box_format: the format of gt_boxes.
        num_classes: C. A positive whose object's label is outside [0, C) is then `IGNORED`, so that no loss indexes out
            of bounds; without it labels are copied as they are.
        box_coder: encodes the boxes as regression deltas of their anchors; without it they are the boxes themselves.

    Returns:
        `Targets`, every tensor of a shape known beforehand: nothing is read back from the device.

    Raises:
        TypeError, ValueError: as `mutual_match`, or the match was made for another number of objects.

    Examples:
        >>> targets = mg_ops.encode_targets(match, anchors, gt_boxes, gt_labels, box_coder=coder)
        >>> error = torch.nn.functional.smooth_l1_loss(deltas, targets.box_targets, reduction="none")
        >>> positive = match.loc_positive.unsqueeze(-1)
        >>> loss = (error * positive).sum() / (4 * positive.sum()).clamp(min=1)
    """
    anchors = check_tensor("anchors", join_levels("anchors", anchors), "floating point", ("A", 4), None)
    check_box_coder(box_coder)
    objects = _objects_of(
        match, gt_boxes, gt_labels, gt_offsets, gt_mask, gt_box_format, anchors.shape[0], anchors.device
    )
    class_targets = _class_targets(match, objects, num_classes)
    num_gt = objects.gt_boxes.shape[0]
    if num_gt == 0:
        nothing = torch.full_like(match.loc_match, BACKGROUND, dtype=torch.int64)
        no_boxes = torch.zeros((*nothing.shape, 4), dtype=torch.float32, device=anchors.device)
        return Targets(class_targets, nothing, no_boxes)
    with torch.no_grad(), torch.autocast(autocast_type(anchors.device), enabled=False):
        positive = match.loc_positive
        owner = _owners(match.loc_match, objects)
        loc_labels = torch.where(positive, objects.gt_labels.long()[owner], BACKGROUND)
        box_targets = objects.gt_boxes.float()[owner]
        if box_coder is not None:
            box_targets = box_coder.encode(anchors=anchors, boxes=box_targets)
        box_targets = torch.where(positive.unsqueeze(-1), box_targets, 0.0)
    return Targets(class_targets, loc_labels, box_targets)


def encode_class_targets(
    match: MutualMatch | Match | DynamicMutualMatch,
    gt_boxes: GroundTruth,
    gt_labels: Tensor | Sequence[Tensor] | None = None,
    gt_offsets: Tensor | None = None,
    *,
    gt_mask: Tensor | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """The class targets alone: what the losses of `mg_ops.losses` need, which encode the boxes themselves.

    Args:
        match: as of `encode_targets`, like all arguments.
        gt_boxes: the boxes.
        gt_labels: the labels.
        gt_offsets: the offsets of packed objects.
        gt_mask: the mask of padded objects.
        num_classes: C.

    Returns:
        (B, A) int64: `Targets.class_targets`.

    Raises:
        TypeError, ValueError: as `encode_targets`.
    """
    objects = _objects_of(match, gt_boxes, gt_labels, gt_offsets, gt_mask, "xyxy", "A", None)
    return _class_targets(match, objects, num_classes)


def _objects_of(
    match: object,
    gt_boxes: Any,
    gt_labels: Any,
    gt_offsets: Any,
    gt_mask: Any,
    gt_box_format: str,
    num_anchors: int | str,
    device: torch.device | None,
) -> Objects:
    """The packed objects, once they fit the match; the match's device if none is given."""
    if not isinstance(match, (MutualMatch, Match, DynamicMutualMatch)):
        raise TypeError(f"match: expected what mg_ops.mutual_match or another rule returned, got {describe(match)}")
    cls_match = check_tensor("match.cls_match", match.cls_match, "integer", ("B", num_anchors), device)
    check_tensor("match.loc_match", match.loc_match, "integer", tuple(cls_match.shape), cls_match.device)
    objects = pack_objects(
        gt_boxes,
        gt_labels,
        gt_offsets,
        None,
        gt_mask,
        gt_box_format,
        batch_size=cls_match.shape[0],
        device=cls_match.device,
        labels_reader="encode_targets",
    )
    check_counts(match, objects.gt_boxes.shape[0], cls_match.device)
    return objects


def _owners(match: Tensor, objects: Objects) -> Tensor:
    """(B, A): the number of each positive's object among the packed ones, at least one; anything for other anchors."""
    start = objects.gt_offsets[:-1].long().unsqueeze(1)  # (B, 1)
    return (start + match).clamp(0, objects.gt_boxes.shape[0] - 1)


def _class_targets(
    match: MutualMatch | Match | DynamicMutualMatch, objects: Objects, num_classes: int | None
) -> Tensor:
    if num_classes is not None:
        check_num_classes(num_classes)
    if objects.gt_boxes.shape[0] == 0:
        return match.cls_match.to(torch.int64, copy=True)
    label_of = objects.gt_labels.long()[_owners(match.cls_match, objects)]
    if num_classes is not None:
        label_of = torch.where((label_of >= 0) & (label_of < num_classes), label_of, IGNORED)
    return torch.where(match.cls_positive, label_of, match.cls_match)
