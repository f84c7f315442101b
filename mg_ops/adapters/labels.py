"""Assignments in the conventions of other libraries, and back.

| library | object k | background | ignored |
|---|---|---|---|
| mg_ops (`cls_match`, `loc_match`) | k | -1 | -2 |
| torchvision (`Matcher`) | k | -1 | -2 |
| mmdetection (`AssignResult.gt_inds`) | k + 1 | 0 | -1 |
| detectron2 (`Matcher`) | index k, label 1 | any index, label 0 | any index, label -1 |
| ultralytics (`TaskAlignedAssigner`) | index k, foreground | any index, not foreground | has none |

k is the index of the object within its image. torchvision's is the same as `mg_ops`' and needs no conversion. All
functions take tensors of any shape, on any device, without a synchronisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mg_ops.checks import describe
from mg_ops.reference import BACKGROUND, IGNORED


class Detectron2Match(NamedTuple):
    """What detectron2's `Matcher` returns for an image."""

    matched_idxs: Tensor
    """int64: the object of each anchor; 0 where there is none."""
    match_labels: Tensor
    """int8: 1 positive, 0 background, -1 ignored."""


class UltralyticsMatch(NamedTuple):
    """The last two results of ultralytics' `TaskAlignedAssigner`, and what they cannot say."""

    fg_mask: Tensor
    """bool: whether the anchor is positive."""
    target_gt_idx: Tensor
    """int64: the object of each anchor; 0 where there is none."""
    ignored: Tensor
    """bool: whether the anchor is ignored. The library has no such state: a loss that is not told trains it as
    background."""


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


def from_mmdet(gt_inds: Tensor) -> Tensor:
    """The match of mmdetection's `gt_inds`; the inverse of `to_mmdet`.

    Args:
        gt_inds: integer, 1-based objects, 0 background, -1 ignored.

    Returns:
        int64 of the same shape: an object, `BACKGROUND` or `IGNORED`.

    Raises:
        TypeError: gt_inds is not an integer tensor.
    """
    return _integers("gt_inds", gt_inds) - 1


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


def from_detectron2(matched_idxs: Tensor, match_labels: Tensor) -> Tensor:
    """The match of detectron2's two tensors; the inverse of `to_detectron2`.

    Args:
        matched_idxs: integer, objects; read where the label is 1.
        match_labels: integer of the same shape, 1 positive, 0 background, -1 ignored.

    Returns:
        int64 of the same shape: an object, `BACKGROUND` or `IGNORED`.

    Raises:
        TypeError: one is not an integer tensor.
        ValueError: the shapes differ.
    """
    matched_idxs, match_labels = _integers("matched_idxs", matched_idxs), _integers("match_labels", match_labels)
    _check_shape("match_labels", match_labels, matched_idxs)
    return torch.where(match_labels > 0, matched_idxs, match_labels.clamp(max=0) + BACKGROUND)


def to_ultralytics(match: Tensor) -> UltralyticsMatch:
    """`fg_mask` and `target_gt_idx` of ultralytics' assigner, and which anchors are ignored.

    Args:
        match: integer, an object, `BACKGROUND` or `IGNORED`.

    Returns:
        `UltralyticsMatch(fg_mask, target_gt_idx, ignored)` of the same shape.

    Raises:
        TypeError: match is not an integer tensor.
    """
    match = _integers("match", match)
    return UltralyticsMatch(match >= 0, match.clamp(min=0), match == IGNORED)


def from_ultralytics(fg_mask: Tensor, target_gt_idx: Tensor, ignored: Tensor | None = None) -> Tensor:
    """The match of ultralytics' two tensors; the inverse of `to_ultralytics` if given all three.

    Args:
        fg_mask: bool, whether the anchor is positive.
        target_gt_idx: integer of the same shape, objects; read where fg_mask is true.
        ignored: bool of the same shape, whether an anchor that is not positive is ignored; None if none is.

    Returns:
        int64 of the same shape: an object, `BACKGROUND` or `IGNORED`.

    Raises:
        TypeError: a wrong dtype.
        ValueError: the shapes differ.
    """
    target_gt_idx = _integers("target_gt_idx", target_gt_idx)
    for name, mask in (("fg_mask", fg_mask), ("ignored", ignored)):
        if mask is None and name == "ignored":
            continue
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{name}: expected a bool tensor, got {describe(mask)}")
        _check_shape(name, mask, target_gt_idx)
    unmatched = torch.full_like(target_gt_idx, BACKGROUND)
    if ignored is not None:
        unmatched = torch.where(ignored, IGNORED, unmatched)
    return torch.where(fg_mask, target_gt_idx, unmatched)


def _integers(name: str, value: Tensor) -> Tensor:
    """The tensor as int64; raises unless it holds signed integers."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise TypeError(f"{name}: expected a signed integer tensor, got {describe(value)}")
    return value.long()


def _check_shape(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)}, got {tuple(value.shape)}")
