"""What `mutual_match` accepts, and the messages of what it does not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mg_ops import reference
from mg_ops.boxes import BoxCoder

_MAX_FLOAT = torch.finfo(torch.float32).max


def describe(value: object) -> str:
    """A value as an error message shows it: a tensor by dtype, shape and device, anything else by its type."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__}"


def check_tensor(
    name: str, value: object, kind: str, shape: tuple[int | str, ...], device: torch.device | None
) -> Tensor:
    """Raises unless value is a tensor of this kind ("floating point", "integer" or "bool"), shape and device.

    A string in shape names a size that may be anything.
    """
    if not isinstance(value, Tensor):
        article = "an" if kind == "integer" else "a"
        raise TypeError(f"{name}: expected {article} {kind} tensor, got {describe(value)}")
    dtype = value.dtype
    fits = {
        "floating point": dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64),
        "integer": dtype in (torch.int64, torch.int32),
        "bool": dtype == torch.bool,
    }[kind]
    if not fits:
        allowed = {
            "floating point": "float16, bfloat16, float32 or float64",
            "integer": "int64 or int32",
            "bool": "bool",
        }[kind]
        raise TypeError(f"{name}: expected dtype {allowed}, got {describe(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.dim() != len(shape) or any(
        isinstance(size, int) and size != actual for size, actual in zip(shape, value.shape, strict=True)
    ):
        wanted = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name}: expected shape ({wanted}), got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, like anchors, got {describe(value)}")
    return value


def check_number(name: str, value: object, low: float, high: float, low_text: str) -> float:
    """Raises unless low < value <= high holds, also after rounding to float32; returns the float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    number = float(value)
    # Below 2^-24 above `low` float32 cannot tell the number from `low`; NaN fails both comparisons.
    in_range = low < number <= high and (low == 0.0 or number >= low * (1 + 2.0**-23)) and number >= 2.0**-126
    if not in_range:
        raise ValueError(f"{name}: expected {low_text}, got {value!r}")
    return number


def check_objects(
    gt_boxes: Tensor | Sequence[Tensor],
    gt_labels: Tensor | Sequence[Tensor],
    gt_offsets: Tensor | None,
    gt_crowd: Tensor | Sequence[Tensor] | None,
    batch_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The objects of a batch as packed tensors (N, 4), (N,), offsets (B + 1,) and crowd flags (N,) or None."""
    if isinstance(gt_boxes, Tensor):
        if gt_offsets is None:
            raise ValueError(
                "gt_offsets: packed gt_boxes (N, 4) need gt_offsets (B + 1,); "
                "without offsets pass gt_boxes as a list of B tensors (G, 4)"
            )
        check_tensor("gt_boxes", gt_boxes, "floating point", ("N", 4), device)
        num_gt = gt_boxes.shape[0]
        check_tensor("gt_labels", gt_labels, "integer", (num_gt,), device)
        check_tensor("gt_offsets", gt_offsets, "integer", (batch_size + 1,), device)
        if gt_crowd is not None:
            check_tensor("gt_crowd", gt_crowd, "bool", (num_gt,), device)
        assert isinstance(gt_labels, Tensor) and (gt_crowd is None or isinstance(gt_crowd, Tensor))
        if device.type == "cpu" and not torch.compiler.is_compiling():
            _check_offsets(gt_offsets, num_gt)
        return gt_boxes, gt_labels, gt_offsets, gt_crowd

    if gt_offsets is not None:
        raise ValueError(
            "gt_offsets: only packed gt_boxes (N, 4) take offsets, got gt_boxes as a list; pass gt_offsets=None"
        )
    boxes = _check_list("gt_boxes", gt_boxes, batch_size)
    labels = _check_list("gt_labels", gt_labels, batch_size)
    crowd = None if gt_crowd is None else _check_list("gt_crowd", gt_crowd, batch_size)
    offsets = [0]
    for image in range(batch_size):
        check_tensor(f"gt_boxes[{image}]", boxes[image], "floating point", ("G", 4), device)
        num_objects = boxes[image].shape[0]
        check_tensor(f"gt_labels[{image}]", labels[image], "integer", (num_objects,), device)
        if crowd is not None:
            check_tensor(f"gt_crowd[{image}]", crowd[image], "bool", (num_objects,), device)
        offsets.append(offsets[-1] + num_objects)
    if batch_size == 0:
        packed_boxes = torch.empty((0, 4), device=device)
        packed_labels = torch.empty((0,), dtype=torch.int64, device=device)
        packed_crowd = None
    else:
        # Rounded before packing: a float64 image must not change how its neighbours are rounded.
        packed_boxes = torch.cat([box.float() for box in boxes])
        packed_labels = torch.cat([label.long() for label in labels])
        packed_crowd = None if crowd is None else torch.cat(list(crowd))
    # The lengths are known here: a pinned, asynchronous copy brings them to a GPU without a synchronisation.
    packed_offsets = torch.tensor(offsets, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    if device.type != "cpu":
        packed_offsets = packed_offsets.to(device, non_blocking=True)
    return packed_boxes, packed_labels, packed_offsets, packed_crowd


def _check_list(name: str, value: object, batch_size: int) -> Sequence[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(
            f"{name}: expected a list of {batch_size} tensors, one an image, like gt_boxes, got {describe(value)}"
        )
    if len(value) != batch_size:
        raise ValueError(f"{name}: expected a list of {batch_size} tensors, one an image, got {len(value)}")
    return value


def _check_offsets(gt_offsets: Tensor, num_gt: int) -> None:
    offsets = gt_offsets.tolist()
    if offsets[0] != 0:
        raise ValueError(f"gt_offsets: must start at 0, got {offsets[0]}")
    for image, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end < start:
            raise ValueError(f"gt_offsets: must not decrease, got {start} then {end} for image {image}")
    if offsets[-1] > num_gt:
        raise ValueError(f"gt_offsets: must not exceed the {num_gt} packed objects, got {offsets[-1]}")


def check_values(
    anchors: Tensor,
    pred_boxes: Tensor,
    cls_scores: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    gt_crowd: Tensor | None,
    box_coder: BoxCoder | None,
) -> None:
    """Raises ValueError naming the first value that `mutual_match` would otherwise pass over in silence.

    Args:
        box_coder: None where pred_boxes are boxes, which must not be inverted; else it must decode them to finite ones.
    """
    _check_offsets(gt_offsets, gt_boxes.shape[0])
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
