"""What the rules beside mutual matching return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mg_ops.reference import BACKGROUND, IGNORED


class Match(NamedTuple):
    """The assignment of a batch, the same for classification and localization: B images, A anchors, N objects in all.

    It is read as `mg_ops.MutualMatch` is.
    """

    cls_match: Tensor
    """(B, A) int64: the index of the object within its image, `BACKGROUND` (-1) or `IGNORED` (-2)."""
    num_pos: Tensor
    """(N,) int32, or (B, M) for padded objects: how many anchors each object has; 0 for padding."""
    soft_targets: Tensor | None = None
    """(B, A) float32: the classification target of each positive at its label, 0 elsewhere. None where it is 1."""

    @property
    def loc_match(self) -> Tensor:
        """(B, A) int64: the index of the object within its image, or -1; made at each access."""
        return self.cls_match.clamp(min=BACKGROUND)

    @property
    def cls_positive(self) -> Tensor:
        """(B, A) bool: the positives for classification."""
        return self.cls_match >= 0

    @property
    def loc_positive(self) -> Tensor:
        """(B, A) bool: the same, for localization."""
        return self.cls_match >= 0

    @property
    def ignored(self) -> Tensor:
        """(B, A) bool: the anchors that the classification loss leaves out."""
        return self.cls_match == IGNORED


class DynamicMutualMatch(NamedTuple):
    """The assignment of a batch, a match for each task: B images, A anchors, N objects in all.

    It is read as `mg_ops.MutualMatch` is.
    """

    cls_match: Tensor
    """(B, A) int64: the index of the object within its image, `BACKGROUND` (-1) or `IGNORED` (-2)."""
    loc_match: Tensor
    """(B, A) int64: the index of the object within its image, or -1."""
    num_pos: Tensor
    """(N,) int32, or (B, M) for padded objects: how many anchors each object has in `cls_match`; 0 for padding."""
    num_loc_pos: Tensor
    """Like num_pos, in `loc_match`."""
    soft_targets: Tensor
    """(B, A) float32: the classification target of each positive at its label, its quality; 0 elsewhere."""
    loc_weights: Tensor
    """(B, A) float32: the weight of the box loss of each localization positive, its quality; 0 elsewhere."""

    @property
    def cls_positive(self) -> Tensor:
        """(B, A) bool: the positives for classification."""
        return self.cls_match >= 0

    @property
    def loc_positive(self) -> Tensor:
        """(B, A) bool: the positives for localization, whose boxes are learned."""
        return self.loc_match >= 0

    @property
    def ignored(self) -> Tensor:
        """(B, A) bool: the anchors that the classification loss leaves out."""
        return self.cls_match == IGNORED
