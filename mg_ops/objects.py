"""Objects in every form that users hold them in, as packed tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mg_ops.checks import (
    DTYPES,
    MAX_COUNT,
    check_boxes_of_image,
    check_count,
    check_objects,
    check_tensor,
    describe,
    is_readable,
)

BOX_FORMATS = ("xyxy", "xywh", "cxcywh")
"""Of objects' boxes, by torchvision's names: corners; a corner and the size; the center and the size."""


class Objects(NamedTuple):
    """The objects of a batch, one image after the other: B images, N objects in all."""

    gt_boxes: Tensor
    """(N, 4) floating, (x1, y1, x2, y2)."""
    gt_labels: Tensor
    """(N,) int64 or int32."""
    gt_offsets: Tensor
    """(B + 1,) int64 or int32: image b has the objects gt_offsets[b] to gt_offsets[b + 1]."""
    gt_crowd: Tensor | None
    """(N,) bool."""
    is_object: Tensor | None = None
    """(N,) bool, false for padding; None where there is none."""
    padded_shape: tuple[int, int] | None = None
    """(B, M) of padded objects, N = B * M."""
    has_labels: bool = True
    """Whether labels were given; else `gt_labels` mean nothing, and have no memory of their own."""


def pack_objects(
    gt_boxes: Any,
    gt_labels: Any,
    gt_offsets: Any = None,
    gt_crowd: Any = None,
    gt_mask: Any = None,
    gt_box_format: str = "xyxy",
    *,
    batch_size: int | None,
    device: torch.device,
    labels_reader: str | None,
) -> Objects:
    """Packs objects of any form; packed ones come back as they are, but for the format of their boxes.

    Args:
        gt_boxes: as `mg_ops.mutual_match` takes it, like the arguments after it.
        gt_labels: likewise.
        gt_offsets: likewise.
        gt_crowd: likewise.
        gt_mask: likewise.
        gt_box_format: likewise.
        batch_size: B; None where only the objects tell.
        device: where all of them must be.
        labels_reader: who reads the labels, for an error message; None where nobody does, and none need be given.

    Raises:
        TypeError, ValueError: naming the argument, and of a list the image.
    """
    check_box_format(gt_box_format)
    if not isinstance(gt_boxes, Tensor) and holds_dictionaries(gt_boxes, gt_labels):
        gt_boxes, gt_labels, gt_crowd = _split_targets(gt_boxes, gt_labels, gt_offsets, gt_crowd, labels_reader)
    if gt_labels is None and labels_reader is not None:
        raise ValueError(f"gt_labels: {labels_reader} reads the labels; pass them in the form of gt_boxes")
    if isinstance(gt_boxes, Tensor):
        if gt_boxes.dim() == 3 and gt_offsets is None:
            objects = _pack_padded(gt_boxes, gt_labels, gt_crowd, gt_mask, batch_size, device)
        else:
            _refuse_mask(gt_mask)
            if batch_size is None:
                batch_size = max(0, len(gt_offsets) - 1) if isinstance(gt_offsets, Tensor) and gt_offsets.dim() else 0
            check_objects(gt_boxes, gt_labels, gt_offsets, gt_crowd, batch_size, device)
            objects = as_packed(gt_boxes, gt_labels, gt_offsets, gt_crowd)
    else:
        _refuse_mask(gt_mask)
        objects = _pack_lists(gt_boxes, gt_labels, gt_offsets, gt_crowd, batch_size, device)
    if objects.gt_labels.is_floating_point() or gt_box_format != "xyxy":
        boxes = objects.gt_boxes if gt_box_format == "xyxy" else _to_corners(objects.gt_boxes, gt_box_format)
        objects = objects._replace(gt_boxes=boxes, gt_labels=_whole_labels(objects.gt_labels))
    return objects


def as_packed(gt_boxes: Tensor, gt_labels: Tensor | None, gt_offsets: Tensor, gt_crowd: Tensor | None) -> Objects:
    """Objects without padding, with or without labels."""
    if gt_labels is None:
        return Objects(gt_boxes, _no_labels(gt_boxes, gt_offsets), gt_offsets, gt_crowd, has_labels=False)
    return Objects(gt_boxes, gt_labels, gt_offsets, gt_crowd)


def check_box_format(value: object) -> None:
    """Raises ValueError unless it is one of the formats."""
    if not isinstance(value, str) or value not in BOX_FORMATS:
        raise ValueError(f"gt_box_format: expected one of {', '.join(map(repr, BOX_FORMATS))}, got {value!r}")


def holds_dictionaries(gt_boxes: object, gt_labels: object) -> bool:
    """Whether gt_boxes is a list of one dictionary per image, boxes and labels together; an empty one has no labels."""
    if not isinstance(gt_boxes, (list, tuple)):
        return False
    return isinstance(gt_boxes[0], dict) if gt_boxes else gt_labels is None


def _refuse_mask(gt_mask: object) -> None:
    if gt_mask is not None:
        raise ValueError("gt_mask: only padded gt_boxes (B, M, 4) take a mask of their padding; pass gt_mask=None")


def _no_labels(gt_boxes: Tensor, gt_offsets: Tensor) -> Tensor:
    """(N,) integers in place of labels, for which nothing is launched: the first offset again and again."""
    return gt_offsets.as_strided((gt_boxes.shape[0],), (0,))


def _split_targets(
    targets: Sequence[Any], gt_labels: object, gt_offsets: object, gt_crowd: object, labels_reader: str | None
) -> tuple[Any, ...]:
    """The lists of boxes, labels and crowd flags in a list of dictionaries, as torchvision and DETR have them."""
    for name, value in (("gt_labels", gt_labels), ("gt_offsets", gt_offsets), ("gt_crowd", gt_crowd)):
        if value is not None:
            raise ValueError(f"{name}: gt_boxes is a list of dictionaries, which hold it; pass {name}=None")
    # Where they are not read, all have labels or none has.
    has_labels = labels_reader is not None or any(isinstance(t, dict) and "labels" in t for t in targets)
    needed = {"boxes", "labels"} if has_labels else {"boxes"}
    for image, target in enumerate(targets):
        if not isinstance(target, dict) or not needed <= target.keys():
            got = f"one with {sorted(map(str, target))}" if isinstance(target, dict) else describe(target)
            wanted = '"boxes" and "labels"' if has_labels else '"boxes"'
            raise TypeError(f"gt_boxes[{image}]: expected a dictionary with {wanted}, got {got}")
    boxes = [target["boxes"] for target in targets]
    labels = [target["labels"] for target in targets] if has_labels else None
    if not any("iscrowd" in target for target in targets):
        return boxes, labels, None
    crowd = []
    for image, target in enumerate(targets):
        flags = target.get("iscrowd")
        if flags is None:
            of_image = check_boxes_of_image(image, boxes[image], None)
            crowd.append(torch.zeros(of_image.shape[0], dtype=torch.bool, device=of_image.device))
        else:
            crowd.append(check_tensor(f'gt_boxes[{image}]["iscrowd"]', flags, "flag", ("G",), None).bool())
    return boxes, labels, crowd


def _pack_lists(
    gt_boxes: Any, gt_labels: Any, gt_offsets: Any, gt_crowd: Any, batch_size: int | None, device: torch.device
) -> Objects:
    if batch_size is None:
        batch_size = len(gt_boxes) if isinstance(gt_boxes, Sequence) else 0
    obviously_right = not torch.compiler.is_compiling() and gt_offsets is None
    if not (obviously_right and _fit(gt_boxes, gt_labels, gt_crowd, batch_size, device)):
        check_objects(gt_boxes, gt_labels, gt_offsets, gt_crowd, batch_size, device)
    offsets = [0]
    for boxes in gt_boxes:
        offsets.append(offsets[-1] + boxes.shape[0])
    # The lengths are known here: a pinned, asynchronous copy brings them to a GPU without a synchronization.
    packed_offsets = torch.tensor(offsets, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    if device.type != "cpu":
        packed_offsets = packed_offsets.to(device, non_blocking=True)
    if batch_size == 0:
        return as_packed(torch.empty((0, 4), device=device), None, packed_offsets, None)
    packed_crowd = None if gt_crowd is None else _concatenate(gt_crowd, torch.bool)
    packed_labels = None
    if gt_labels is not None:
        labels = [_whole_labels(labels) if labels.is_floating_point() else labels for labels in gt_labels]
        packed_labels = _concatenate(labels, torch.int64)
    return as_packed(_concatenate(gt_boxes, torch.float32), packed_labels, packed_offsets, packed_crowd)


def _pack_padded(
    gt_boxes: Tensor, gt_labels: Any, gt_crowd: Any, gt_mask: Any, batch_size: int | None, device: torch.device
) -> Objects:
    """(B, M, 4) and (B, M): padding becomes boxes of no size, which take no part."""
    batch = "B" if batch_size is None else batch_size
    gt_boxes = check_tensor("gt_boxes", gt_boxes, "floating point", (batch, "M", 4), device)
    shape = gt_boxes.shape[0], gt_boxes.shape[1]
    if gt_labels is None and gt_mask is None:
        raise ValueError("gt_mask: of padded gt_boxes (B, M, 4), pass gt_mask or gt_labels to tell the padding")
    if gt_labels is not None:
        gt_labels = check_tensor("gt_labels", gt_labels, "label", shape, device)
    check_count("gt_boxes", shape[0] * shape[1])
    if gt_mask is not None:
        check_tensor("gt_mask", gt_mask, "bool", shape, device)
    if gt_crowd is not None:
        gt_crowd = check_tensor("gt_crowd", gt_crowd, "bool", shape, device).flatten()
    is_object = gt_labels >= 0 if gt_mask is None else gt_mask
    boxes = torch.where(is_object.unsqueeze(-1), gt_boxes, 0.0).flatten(0, 1)
    offsets = torch.arange(shape[0] + 1, device=device) * shape[1]
    labels = _no_labels(boxes, offsets) if gt_labels is None else gt_labels.flatten()
    return Objects(boxes, labels, offsets, gt_crowd, is_object.flatten(), shape, gt_labels is not None)


def _whole_labels(labels: Tensor) -> Tensor:
    """Labels as integers; a floating one that is none becomes -1, an unknown label."""
    if not labels.is_floating_point():
        return labels
    whole = (labels == labels.floor()) & (labels.abs() < MAX_COUNT)
    return torch.where(whole, labels, -1.0).long()


def _to_corners(boxes: Tensor, box_format: str) -> Tensor:
    """Boxes (N, 4) of another format as (x1, y1, x2, y2), float32, rounded as torchvision.ops.box_convert does."""
    place, size = boxes.float().split(2, dim=1)
    if box_format == "xywh":
        return torch.cat([place, place + size], dim=1)
    return torch.cat([place - 0.5 * size, place + 0.5 * size], dim=1)


def _concatenate(tensors: Sequence[Tensor], common_dtype: torch.dtype) -> Tensor:
    """One tensor of all images, of their dtype; of the common one where they have several.

    torch.cat would take the widest: a float64 image must not change how its neighbors are rounded.
    """
    if len(tensors) == 1:
        return tensors[0]
    dtype = tensors[0].dtype
    if any(tensor.dtype != dtype for tensor in tensors):
        tensors = [tensor.to(common_dtype) for tensor in tensors]
    return torch.cat(list(tensors))


def _fit(boxes: Any, labels: Any, crowd: Any, batch_size: int, device: torch.device) -> bool:
    """Whether these are obviously right lists; where it is False `check_objects` tells what is wrong, if anything.

    It asks each question of all tensors at once: one by one, with a name at hand for each, takes five times as long.
    """
    try:
        shapes = [tensor.shape for tensor in boxes]
        counts = [shape[0] for shape in shapes]
        return (
            len(counts) == batch_size
            and sum(counts) <= MAX_COUNT
            and shapes == [(count, 4) for count in counts]
            and _are_alike(boxes, "floating point", device)
            and (labels is None or _are_columns(labels, counts, "label", device))
            and (crowd is None or _are_columns(crowd, counts, "bool", device))
        )
    except (AttributeError, IndexError, TypeError, RuntimeError):
        return False


def _are_columns(tensors: Any, counts: list[int], kind: str, device: torch.device) -> bool:
    """Whether they are a list of tensors (counts[image],) of a kind."""
    shapes = [tensor.shape for tensor in tensors]
    return shapes == [(count,) for count in counts] and _are_alike(tensors, kind, device)


def _are_alike(tensors: Any, kind: str, device: torch.device) -> bool:
    """Whether they are a list of plain dense tensors of a kind, on this device, with memory for their elements."""
    return (
        type(tensors) in (list, tuple)
        and {type(tensor) for tensor in tensors} <= {Tensor}
        and {tensor.dtype for tensor in tensors} <= DTYPES[kind][0]
        and {tensor.layout for tensor in tensors} <= {torch.strided}
        and {tensor.device for tensor in tensors} <= {device}
        and all(map(is_readable, tensors))
    )
