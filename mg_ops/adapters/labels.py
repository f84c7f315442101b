"""Assignments in the conventions of other libraries.

| library | object k | background | ignored |
|---|---|---|---|
| mg_ops (`cls_match`, `loc_match`) | k | -1 | -2 |
| torchvision (`Matcher`) | k | -1 | -2 |
| mmdetection (`AssignResult.gt_inds`) | k + 1 | 0 | -1 |
| detectron2 (`Matcher`) | index k, label 1 | any index, label 0 | any index, label -1 |

k is the index of the object within its image. torchvision's is the same as `mg_ops`' and needs no conversion. All
functions take tensors of any shape, on any device, without a synchronization.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mg_ops.checks import describe


class Detectron2Match(NamedTuple):
    """What detectron2's `Matcher` returns for an image."""

    matched_idxs: Tensor
    """int64: the object of each anchor; 0 where there is none."""
    match_labels: Tensor
    """int8: 1 positive, 0 background, -1 ignored."""


def to_mmdet(match: Tensor) -> Tensor:
    """`gt_inds` of mmdetection's `AssignResult`.

    Args:
        match: integer, an object, `BACKGROUND` or `IGNORED`.

    Returns:
        int64 of the same shape: 1-based objects, 0 background, -1 ignored.

    Raises:
        TypeError: match is not an integer tensor.
    """
    # -2, -1, 0, 1, ... -> -1, 0, 1, 2, ...
    return _integers("match", match) + 1


def to_detectron2(match: Tensor) -> Detectron2Match:
    """The two tensors of detectron2's `Matcher`.

    Args:
        match: integer, an object, `BACKGROUND` or `IGNORED`.

    Returns:
        `Detectron2Match(matched_idxs, match_labels)` of the same shape.

    Raises:
        TypeError: match is not an integer tensor.
    """
    match = _integers("match", match)
    # Positive 1, background 0, ignored -1.
    match_labels = (match + 1).clamp(-1, 1).to(torch.int8)
    return Detectron2Match(match.clamp(min=0), match_labels)


def _integers(name: str, value: Tensor) -> Tensor:
    """The tensor as int64; raises unless it holds signed integers."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise TypeError(f"{name}: expected a signed integer tensor, got {describe(value)}")
    return value.long()
