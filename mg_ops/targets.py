"""From a match to what losses need: fixed shapes, no one-hot (B, A, C) tensor, no synchronization with the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mg_ops.boxes import BoxCoder, check_box_coder
from mg_ops.checks import check_num_classes, check_tensor, describe, join_levels
from mg_ops.matching import GroundTruth, Levels, MutualMatch, check_counts
from mg_ops.objects import pack_objects
from mg_ops.reference import BACKGROUND, IGNORED, autocast_type
from mg_ops.rules.result import Match


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
    match: MutualMatch | Match,
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
    if not isinstance(match, (MutualMatch, Match)):
        raise TypeError(f"match: expected what mg_ops.mutual_match or another rule returned, got {describe(match)}")
    if num_classes is not None:
        check_num_classes(num_classes)
    anchors = check_tensor("anchors", join_levels("anchors", anchors), "floating point", ("A", 4), None)
    device = anchors.device
    num_anchors = anchors.shape[0]
    check_tensor("match.cls_match", match.cls_match, "integer", ("B", num_anchors), device)
    batch_size = match.cls_match.shape[0]
    check_tensor("match.loc_match", match.loc_match, "integer", (batch_size, num_anchors), device)
    objects = pack_objects(
        gt_boxes, gt_labels, gt_offsets, None, gt_mask, gt_box_format, batch_size=batch_size, device=device
    )
    boxes, labels, offsets = objects.gt_boxes, objects.gt_labels.long(), objects.gt_offsets
    num_gt = boxes.shape[0]
    check_counts(match, num_gt, device)
    check_box_coder(box_coder)

    with torch.no_grad(), torch.autocast(autocast_type(device), enabled=False):
        if num_gt == 0:
            nothing = torch.full_like(match.loc_match, BACKGROUND, dtype=torch.int64)
            no_boxes = torch.zeros((*nothing.shape, 4), dtype=torch.float32, device=device)
            return Targets(match.cls_match.to(torch.int64, copy=True), nothing, no_boxes)
        start = offsets[:-1].long().unsqueeze(1)  # (B, 1)
        label_of = labels[(start + match.cls_match).clamp(0, num_gt - 1)]
        if num_classes is not None:
            label_of = torch.where((label_of >= 0) & (label_of < num_classes), label_of, IGNORED)
        class_targets = torch.where(match.cls_positive, label_of, match.cls_match)
        positive = match.loc_positive
        owner = (start + match.loc_match).clamp(0, num_gt - 1)
        loc_labels = torch.where(positive, labels[owner], BACKGROUND)
        box_targets = boxes.float()[owner]
        if box_coder is not None:
            box_targets = box_coder.encode(anchors=anchors, boxes=box_targets)
        box_targets = torch.where(positive.unsqueeze(-1), box_targets, 0.0)
    return Targets(class_targets, loc_labels, box_targets)
