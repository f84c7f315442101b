"""From a match to what losses need, without one-hot (B, A, C) tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mg_ops.boxes import BoxCoder
from mg_ops.checks import check_objects, check_tensor
from mg_ops.matching import MutualMatch
from mg_ops.reference import BACKGROUND, IGNORED


class Targets(NamedTuple):
    """What the losses of a batch need: B images, A anchors, P localisation positives in the batch."""

    class_targets: Tensor
    """(B, A) int64: the label of each classification positive, `BACKGROUND` (-1) or `IGNORED` (-2)."""
    loc_index: Tensor
    """(P,) int64: the localisation positives, as indices into predictions flattened to (B * A, ...), ascending."""
    loc_labels: Tensor
    """(P,) int64: the labels of their objects, as given (for class-specific box heads)."""
    box_targets: Tensor
    """(P, 4) float32: their objects' boxes (x1, y1, x2, y2); with a box coder the deltas from their anchors."""


def encode_targets(
    match: MutualMatch,
    anchors: Tensor,
    gt_boxes: Tensor | Sequence[Tensor],
    gt_labels: Tensor | Sequence[Tensor],
    gt_offsets: Tensor | None = None,
    *,
    num_classes: int | None = None,
    box_coder: BoxCoder | None = None,
) -> Targets:
    """Gathers the targets of a match: class targets with the ignore mask, and encoded boxes of the positives.

    Args:
        match: what `mutual_match` returned for these objects.
        anchors: (A, 4) floating, (x1, y1, x2, y2).
        gt_boxes, gt_labels, gt_offsets: the objects, as given to `mutual_match`.
        num_classes: C. A positive whose object's label is outside [0, C) is then `IGNORED`, so that no loss indexes out of
            bounds; without it labels are copied as they are.
        box_coder: encodes the boxes as regression deltas of their anchors; without it they are the boxes themselves.

    Returns:
        `Targets`. The number of positives P is read from the device (one synchronisation on a GPU).

    Example:
        >>> targets = mg_ops.encode_targets(match, anchors, gt_boxes, gt_labels, box_coder=coder)
        >>> positive = deltas.reshape(-1, 4)[targets.loc_index]
        >>> loss = torch.nn.functional.smooth_l1_loss(positive, targets.box_targets)
    """
    check_tensor("anchors", anchors, "floating point", ("A", 4), None)
    device = anchors.device
    num_anchors = anchors.shape[0]
    check_tensor("match.cls_match", match.cls_match, "integer", ("B", num_anchors), device)
    batch_size = match.cls_match.shape[0]
    check_tensor("match.loc_match", match.loc_match, "integer", (batch_size, num_anchors), device)
    boxes, labels, offsets, _ = check_objects(gt_boxes, gt_labels, gt_offsets, None, batch_size, device)
    labels = labels.long()
    num_gt = boxes.shape[0]
    if match.num_pos.shape != (num_gt,):
        raise ValueError(
            f"match: made for {match.num_pos.shape[0]} objects, but gt_boxes has {num_gt}; pass the objects it was made with"
        )
    if box_coder is not None and not isinstance(box_coder, BoxCoder):
        raise TypeError(f"box_coder: expected mg_ops.BoxCoder or None, got {type(box_coder).__name__}")

    with torch.no_grad():
        start = offsets[:-1].long().unsqueeze(1)
        if num_gt == 0:
            class_targets = match.cls_match.clone()
        else:
            label_of = labels[(start + match.cls_match).clamp(0, num_gt - 1)]
            if num_classes is not None:
                label_of = torch.where((label_of >= 0) & (label_of < num_classes), label_of, IGNORED)
            class_targets = torch.where(match.cls_match >= 0, label_of, match.cls_match)
        loc_index = (match.loc_match > BACKGROUND).flatten().nonzero().squeeze(1)
        objects = (start + match.loc_match).flatten()[loc_index]
        box_targets = boxes[objects].float()
        if box_coder is not None:
            box_targets = box_coder.encode(anchors[loc_index % max(num_anchors, 1)], box_targets)
    return Targets(class_targets, loc_index, labels[objects], box_targets)
