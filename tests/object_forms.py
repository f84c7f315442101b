"""Objects in every form that `mg_ops.mutual_match` takes, and what a match of padded ones must be.

No test framework in here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import mg_ops

FORMS = ("lists", "dictionaries", "padded, labels tell", "padded, a mask tells", "packed")


def in_form(
    form: str, boxes: Sequence[Tensor], labels: Sequence[Tensor], crowd: Sequence[Tensor] | None = None, seed: int = 0
) -> tuple[dict[str, Any], Tensor | None]:
    """Objects in lists, none with a negative label, in one of the forms.

    Args:
        seed: of the places that padded objects have in their rows.

    Returns:
        The arguments of `mg_ops.mutual_match`; and of padded objects (B, M) bool, which of them are objects.
    """
    if form == "lists":
        return {"gt_boxes": boxes, "gt_labels": labels} | ({} if crowd is None else {"gt_crowd": crowd}), None
    if form == "dictionaries":
        targets = [{"boxes": b, "labels": c, "image_id": i} for i, (b, c) in enumerate(zip(boxes, labels, strict=True))]
        if crowd is not None:  # as COCO's datasets have it; an image may lack it
            for target, flags in zip(targets, crowd, strict=True):
                target |= {"iscrowd": flags.long()} if flags.any() else {}
        return {"gt_boxes": targets}, None
    counts = [len(image) for image in boxes]
    device = boxes[0].device if boxes else torch.device("cpu")
    all_boxes = torch.cat([*(image.float() for image in boxes), torch.zeros(0, 4, device=device)])
    all_labels = torch.cat([*(image.long() for image in labels), torch.zeros(0, dtype=torch.int64, device=device)])
    flags = None if crowd is None else torch.cat([*crowd, torch.zeros(0, dtype=torch.bool, device=device)])
    if form == "packed":
        offsets = torch.tensor([0, *itertools.accumulate(counts)], device=device)
        packed = {"gt_boxes": all_boxes, "gt_labels": all_labels, "gt_offsets": offsets}
        return packed | ({} if flags is None else {"gt_crowd": flags}), None
    random = torch.Generator().manual_seed(seed)
    capacity = max(counts, default=0) + int(torch.randint(0, 3, (), generator=random))
    is_object = torch.zeros(len(counts), capacity, dtype=torch.bool)
    for row, count in zip(is_object, counts, strict=True):
        row[torch.randperm(capacity, generator=random)[:count]] = True
    is_object = is_object.to(device)
    # What padding holds must not matter: boxes that would win everything, crowds that would cover it, no numbers.
    shape = tuple(is_object.shape)
    padded_boxes = torch.full((*shape, 4), torch.nan, device=device)
    if len(all_boxes) > 0:
        padded_boxes[:, ::2] = all_boxes[0]
    padded_boxes[is_object] = all_boxes
    padded_labels = torch.full(shape, 0 if form == "padded, a mask tells" else -1, device=device)
    padded_labels[is_object] = all_labels
    padded = {"gt_boxes": padded_boxes, "gt_labels": padded_labels}
    if flags is not None:
        padded["gt_crowd"] = torch.ones(shape, dtype=torch.bool, device=device)
        padded["gt_crowd"][is_object] = flags
    if form == "padded, a mask tells":
        padded["gt_mask"] = is_object
    return padded, is_object


def without_labels(objects: dict[str, Any]) -> dict[str, Any]:
    """Objects in one of the forms, less their labels."""
    objects = {name: value for name, value in objects.items() if name != "gt_labels"}
    if isinstance(objects["gt_boxes"], list) and isinstance(next(iter(objects["gt_boxes"]), None), dict):
        targets = objects["gt_boxes"]
        objects["gt_boxes"] = [{key: value for key, value in of.items() if key != "labels"} for of in targets]
    return objects


def known_or_beyond(labels: Sequence[Tensor]) -> list[Tensor]:
    """Negative labels, which mean padding in some forms, as another unknown one."""
    return [torch.where(of_image < 0, 2**31 - 1, of_image) for of_image in labels]


def of_padded(match: mg_ops.MutualMatch, is_object: Tensor) -> mg_ops.MutualMatch:
    """A match of objects in lists, as it must be where they are padded: indices are positions in the padded row."""

    def positions(of_image: Tensor, row: Tensor) -> Tensor:
        if not row.any():
            return of_image
        return torch.where(of_image >= 0, row.nonzero().flatten()[of_image.clamp(min=0)], of_image)

    cls_match, loc_match = (
        torch.stack([positions(*pair) for pair in zip(value, is_object, strict=True)]) if len(value) > 0 else value
        for value in match[:2]
    )
    counts = []
    for of_objects in match[2:]:
        padded = torch.zeros(is_object.shape, dtype=torch.int32, device=is_object.device)
        padded[is_object] = of_objects
        counts.append(padded)
    return mg_ops.MutualMatch(cls_match, loc_match, *counts)
