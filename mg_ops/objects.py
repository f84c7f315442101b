"""Objects in every form that users hold them in, as packed tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mg_ops.checks import DTYPES, MAX_COUNT, check_objects, is_readable


class Objects(NamedTuple):
    """The objects of a batch, one image after the other: B images, N objects in all."""

    gt_boxes: Tensor
    """(N, 4) floating."""
    gt_labels: Tensor
    """(N,) int64 or int32."""
    gt_offsets: Tensor
    """(B + 1,) int64 or int32: image b has the objects gt_offsets[b] to gt_offsets[b + 1]."""
    gt_crowd: Tensor | None
    """(N,) bool."""


def pack_objects(
    gt_boxes: Tensor | Sequence[Tensor],
    gt_labels: Tensor | Sequence[Tensor],
    gt_offsets: Tensor | None,
    gt_crowd: Tensor | Sequence[Tensor] | None,
    batch_size: int,
    device: torch.device,
) -> Objects:
    """Packs lists of one tensor per image; packed objects come back as they are.

    Args:
        gt_boxes: as `mg_ops.mutual_match` takes it, like the arguments after it.
        gt_labels: likewise.
        gt_offsets: likewise.
        gt_crowd: likewise.
        batch_size: B.
        device: where all of them must be.

    Raises:
        TypeError, ValueError: naming the argument, and of a list the image.
    """
    obviously_right = not isinstance(gt_boxes, Tensor) and not torch.compiler.is_compiling() and gt_offsets is None
    if not (obviously_right and _fit(gt_boxes, gt_labels, gt_crowd, batch_size, device)):
        check_objects(gt_boxes, gt_labels, gt_offsets, gt_crowd, batch_size, device)
    labels: Any = gt_labels
    crowd: Any = gt_crowd
    if isinstance(gt_boxes, Tensor):
        assert gt_offsets is not None
        return Objects(gt_boxes, labels, gt_offsets, crowd)
    offsets = [0]
    for boxes in gt_boxes:
        offsets.append(offsets[-1] + boxes.shape[0])
    # The lengths are known here: a pinned, asynchronous copy brings them to a GPU without a synchronisation.
    packed_offsets = torch.tensor(offsets, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    if device.type != "cpu":
        packed_offsets = packed_offsets.to(device, non_blocking=True)
    if batch_size == 0:
        no_labels = torch.empty((0,), dtype=torch.int64, device=device)
        return Objects(torch.empty((0, 4), device=device), no_labels, packed_offsets, None)
    return Objects(
        _concatenate(gt_boxes, torch.float32),
        _concatenate(labels, torch.int64),
        packed_offsets,
        None if crowd is None else _concatenate(crowd, torch.bool),
    )


def _concatenate(tensors: Sequence[Tensor], common_dtype: torch.dtype) -> Tensor:
    """One tensor of all images, of their dtype; of the common one where they have several.

    torch.cat would take the widest: a float64 image must not change how its neighbours are rounded.
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
            and _are_columns(labels, counts, "integer", device)
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
