"""What `check=True` looks at: values that `mutual_match` would otherwise pass over in silence."""

from __future__ import annotations

import itertools
import sys
import warnings

import torch
from torch import Tensor

from mg_ops import reference
from mg_ops.boxes import BoxCoder
from mg_ops.checks import check_offsets
from mg_ops.objects import Objects

CORNERS = "four finite coordinates with x2 > x1 and y2 > y1"


def check_values(
    anchors: Tensor,
    boxes: Tensor | None,
    scores: Tensor | None,
    objects: Objects,
    box_coder: BoxCoder | None,
    scores_name: str,
) -> None:
    """Raises ValueError naming the first value that `mutual_match` would otherwise pass over in silence.

    Args:
        anchors: (A, 4).
        boxes: (B, A, 4), pred_boxes or, with a box coder, box_deltas; None if not given.
        scores: (B, A, C); None if not given.
        objects: packed.
        box_coder: None where boxes are boxes, which must not be inverted; else it must decode them to finite ones.
        scores_name: "cls_logits" or "cls_probabilities".
    """
    if anchors.is_meta:
        raise ValueError("check: tensors on the meta device have no values to check, pass check=False")
    check_offsets(objects.gt_offsets, objects.gt_boxes.shape[0])
    anchors = anchors.float()
    _check_corners("anchors", anchors, "anchors[{index}]")
    if scores is not None:
        _check_scores(scores, scores_name)
    if boxes is not None and box_coder is None:
        _check_pred_boxes(boxes, anchors)
    elif boxes is not None and box_coder is not None:
        _check_box_deltas(boxes, anchors, box_coder)
    _check_objects(objects, anchors, None if scores is None else scores.shape[2])


def _warn(message: str) -> None:
    """A warning at the line that called into mg_ops, by whatever function."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("mg_ops."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def _first(bad: Tensor) -> list[int]:
    """The position of the first True."""
    return bad.nonzero()[0].tolist()


def _check_corners(name: str, boxes: Tensor, place: str, hint: str = "") -> None:
    bad = ~reference.is_object(boxes)
    if bool(bad.any()):
        (index,) = _first(bad)
        raise ValueError(f"{place.format(index=index)}: expected {CORNERS}, got {boxes[index].tolist()}{hint}")


def _check_scores(scores: Tensor, name: str) -> None:
    if bool(scores.isnan().any()):
        image, index, label = _first(scores.isnan())
        raise ValueError(f"{name}: image {image}, anchor {index}, class {label}: got NaN")
    if scores.numel() == 0:
        return
    within = bool((scores >= 0).all()) and bool((scores <= 1).all())
    if name == "cls_probabilities" and not within:
        image, index, label = _first((scores < 0) | (scores > 1))
        raise ValueError(
            f"{name}: image {image}, anchor {index}, class {label}: expected a probability in [0, 1], "
            f"got {float(scores[image, index, label])}; logits are passed as cls_logits"
        )
    if name == "cls_logits" and within and bool((scores != scores.flatten()[0]).any()):
        _warn("cls_logits: all values lie between 0 and 1: are they probabilities? Then pass them as cls_probabilities")


def _check_pred_boxes(boxes: Tensor, anchors: Tensor) -> None:
    for image in range(boxes.shape[0]):
        of_image = boxes[image].float()
        inverted = ((of_image[:, 2:] <= of_image[:, :2]).any(1) & of_image.isfinite().all(1)).float().mean()
        hint = "; are they deltas? Then pass them as box_deltas, with box_coder" if float(inverted) > 0.25 else ""
        _check_corners("pred_boxes", of_image, f"pred_boxes: image {image}, anchor {{index}}", hint)
    if boxes.numel() > 0 and float(boxes.abs().max()) < 0.1 * float(anchors.abs().max()):
        _warn(
            "pred_boxes: the largest coordinate is less than a tenth of the anchors': are they deltas, or fractions of "
            "the image? Deltas are passed as box_deltas, with box_coder; boxes need the anchors' unit"
        )


def _check_box_deltas(deltas: Tensor, anchors: Tensor, box_coder: BoxCoder) -> None:
    for image in range(deltas.shape[0]):
        of_image = deltas[image].float()
        if not bool(of_image.isfinite().all()):
            (index,) = _first(~of_image.isfinite().all(-1))
            raise ValueError(
                f"box_deltas: image {image}, anchor {index}: expected four finite deltas, "
                f"got {of_image[index].tolist()}"
            )
        decoded = box_coder.decode(anchors=anchors, deltas=of_image)
        if not bool(decoded.isfinite().all()):
            (index,) = _first(~decoded.isfinite().all(-1))
            raise ValueError(
                f"box_deltas: image {image}, anchor {index}: the deltas {of_image[index].tolist()} decode to "
                f"{decoded[index].tolist()}, expected finite coordinates; lower the clip of the box coder"
            )
    if deltas.numel() > 0 and float(deltas.float().abs().median()) > 20:
        _warn(
            "box_deltas: half of the values are above 20: are they boxes? Then pass them as pred_boxes, without coder"
        )


def _check_objects(objects: Objects, anchors: Tensor, num_classes: int | None) -> None:
    offsets = objects.gt_offsets.tolist()
    counted = torch.zeros(objects.gt_boxes.shape[0], dtype=torch.bool, device=anchors.device)
    counted[: offsets[-1]] = True
    if objects.is_object is not None:
        counted &= objects.is_object
    boxes = objects.gt_boxes.float()
    if bool(counted.any()) and len(anchors) > 0:
        largest, reach = float(boxes[counted].abs().max()), float(anchors.abs().max())
        if largest <= 1 and reach >= 16:
            raise ValueError(
                f"gt_boxes: no coordinate is above 1, and the anchors reach {reach:g}: expected both in one unit; "
                "multiply fractions of the image by its width and height"
            )
    for image, (start, end) in enumerate(itertools.pairwise(offsets)):
        for index in range(start, end):
            if not bool(counted[index]):
                continue
            place = f"image {image}, object {index - start}"
            box = boxes[index : index + 1]
            if not bool(reference.is_object(box)):
                hint = ""
                if not bool(box.any()):
                    hint = "; if it is padding, give it a negative label, or pass gt_mask"
                elif bool(box.isfinite().all()):
                    hint = "; other formats are named with gt_box_format, such as 'xywh'"
                raise ValueError(f"gt_boxes: {place}: expected {CORNERS}, got {box[0].tolist()}{hint}")
            if objects.gt_crowd is not None and bool(objects.gt_crowd[index]):
                continue
            label = int(objects.gt_labels[index])
            if objects.has_labels and num_classes is not None and not 0 <= label < num_classes:
                hint = "; labels number the classes of the scores from 0" if label == num_classes else ""
                hint = "; a floating label that is no whole number counts as -1" if label == -1 else hint
                raise ValueError(f"gt_labels: {place}: expected a label in [0, {num_classes}), got {label}{hint}")
            if not bool((reference.box_iou(anchors, box) > 0).any()):
                raise ValueError(
                    f"gt_boxes: {place}: no anchor overlaps {box[0].tolist()}; are boxes and anchors in the same unit?"
                )
