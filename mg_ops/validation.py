"""What `check=True` looks at: values that `mutual_match` would otherwise pass over in silence."""

from __future__ import annotations

import torch
from torch import Tensor

from mg_ops import reference
from mg_ops.boxes import BoxCoder
from mg_ops.checks import check_offsets


def check_values(
    anchors: Tensor,
    pred_boxes: Tensor,
    cls_scores: Tensor,
    box_coder: BoxCoder | None,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    gt_crowd: Tensor | None,
) -> None:
    """Raises ValueError naming the first value that `mutual_match` would otherwise pass over in silence.

    Args:
        box_coder: None where pred_boxes are boxes, which must not be inverted; else it must decode them to finite ones.
    """
    if anchors.is_meta:
        raise ValueError("check: tensors on the meta device have no values to check, pass check=False")
    check_offsets(gt_offsets, gt_boxes.shape[0])
    offsets = gt_offsets.tolist()
    anchors = anchors.float()
    num_classes = cls_scores.shape[2]

    ok = reference.is_object(anchors)
    if not bool(ok.all()):
        index = int((~ok).nonzero()[0])
        raise ValueError(
            f"anchors[{index}]: expected four finite coordinates with x2 > x1 and y2 > y1, "
            f"got {anchors[index].tolist()}"
        )
    for image in range(cls_scores.shape[0]):
        boxes = pred_boxes[image].float()
        ok = reference.is_object(boxes) if box_coder is None else boxes.isfinite().all(-1)
        if not bool(ok.all()):
            index = int((~ok).nonzero()[0])
            wanted = "four finite coordinates with x2 > x1 and y2 > y1" if box_coder is None else "four finite deltas"
            raise ValueError(
                f"pred_boxes: image {image}, anchor {index}: expected {wanted}, got {boxes[index].tolist()}"
            )
        if box_coder is not None:
            decoded = box_coder.decode(anchors, boxes)
            ok = decoded.isfinite().all(-1)
            if not bool(ok.all()):
                index = int((~ok).nonzero()[0])
                raise ValueError(
                    f"pred_boxes: image {image}, anchor {index}: the deltas {boxes[index].tolist()} decode to "
                    f"{decoded[index].tolist()}, expected finite coordinates; lower the clip of the box coder"
                )
        bad = cls_scores[image].isnan()
        if bool(bad.any()):
            index, class_index = bad.nonzero()[0].tolist()
            raise ValueError(f"cls_scores: image {image}, anchor {index}, class {class_index}: got NaN")
        objects = gt_boxes[offsets[image] : offsets[image + 1]].float()
        labels = gt_labels[offsets[image] : offsets[image + 1]]
        crowd = (
            torch.zeros_like(labels, dtype=torch.bool)
            if gt_crowd is None
            else gt_crowd[offsets[image] : offsets[image + 1]]
        )
        valid = reference.is_object(objects)
        if not bool(valid.all()):
            index = int((~valid).nonzero()[0])
            raise ValueError(
                f"gt_boxes: image {image}, object {index}: expected four finite coordinates with x2 > x1 and y2 > y1, "
                f"got {objects[index].tolist()}"
            )
        known = ((labels >= 0) & (labels < num_classes)) | crowd
        if not bool(known.all()):
            index = int((~known).nonzero()[0])
            raise ValueError(
                f"gt_labels: image {image}, object {index}: expected a label in [0, {num_classes}), "
                f"got {int(labels[index])}"
            )
        for index in (~crowd).nonzero().flatten().tolist():
            if not bool((reference.box_iou(anchors, objects[index : index + 1]) > 0).any()):
                raise ValueError(
                    f"gt_boxes: image {image}, object {index}: no anchor overlaps {objects[index].tolist()}; "
                    "are boxes and anchors in the same unit?"
                )
