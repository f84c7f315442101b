"""Box coding and IoU with the arithmetic of the matching: float32, one rounding an operation, equal on every device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mg_ops import reference

_MIN_FLOAT = torch.finfo(torch.float32).tiny
_MAX_FLOAT = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class BoxCoder:
    """Regression deltas (dx, dy, dw, dh) <-> boxes (x1, y1, x2, y2), in torchvision's convention.

    Args:
        weights: what the deltas of x, y, w and h are multiplied by when encoding. The SSD variances (0.1, 0.2) are the
            default weights (10, 10, 5, 5).
        clip: upper limit of the log scales dw / weight and dh / weight when decoding, so that exp cannot overflow.

    Raises:
        TypeError: if weights is not a sequence of numbers, or clip not a number.
        ValueError: if weights are not four finite non-zero numbers, also when rounded to float32, or clip is NaN.

    Examples:
        >>> coder = BoxCoder()
        >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> coder.encode(anchors, torch.tensor([[5.0, 0.0, 15.0, 10.0]]))
        tensor([[5., 0., 0., 0.]])
    """

    weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    clip: float = math.log(1000.0 / 16)

    def __post_init__(self) -> None:
        wanted = f"BoxCoder: weights must be four finite non-zero numbers (in float32), got {self.weights!r}"
        try:
            weights = tuple(float(weight) for weight in self.weights)
        except (TypeError, ValueError) as error:
            raise TypeError(wanted) from error
        # Rounding to float32 must leave something to divide by.
        if len(weights) != 4 or not all(_MIN_FLOAT <= abs(weight) <= _MAX_FLOAT for weight in weights):
            raise ValueError(wanted)
        try:
            clip = float(self.clip)
        except (TypeError, ValueError) as error:
            raise TypeError(f"BoxCoder: clip must be a number, got {self.clip!r}") from error
        if math.isnan(clip):
            raise ValueError("BoxCoder: clip must be a number, got NaN")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "clip", clip)

    def encode(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """The deltas that turn anchors into boxes.

        Args:
            anchors: (..., 4) floating, (x1, y1, x2, y2).
            boxes: (..., 4) floating, the same unit, broadcastable with anchors.

        Returns:
            (..., 4) float32 deltas. Differentiable.
        """
        anchors, boxes = _check_boxes("anchors", anchors, ("...", 4)), _check_boxes("boxes", boxes, ("...", 4))
        anchor_size = anchors[..., 2:] - anchors[..., :2]
        anchor_center = anchors[..., :2] + 0.5 * anchor_size
        size = boxes[..., 2:] - boxes[..., :2]
        center = boxes[..., :2] + 0.5 * size
        shift = (center - anchor_center) / anchor_size
        deltas = torch.cat([shift, torch.log(size / anchor_size)], dim=-1)
        # Weights as numbers, not as a tensor: copying one to a GPU cannot be captured in a CUDA graph.
        columns = zip(deltas.unbind(-1), self.weights, strict=True)
        return torch.stack([column * weight for column, weight in columns], dim=-1)

    def decode(self, anchors: Tensor, deltas: Tensor) -> Tensor:
        """The boxes that deltas make of anchors; the exact arithmetic `mutual_match` decodes with.

        Args:
            anchors: (A, 4) floating, (x1, y1, x2, y2).
            deltas: (..., A, 4) floating.

        Returns:
            (..., A, 4) float32 boxes in the anchors' unit. Not differentiable: exp is evaluated by bit operations.
        """
        anchors = _check_boxes("anchors", anchors, ("A", 4))
        deltas = _check_boxes("deltas", deltas, ("...", anchors.shape[0], 4))
        with torch.no_grad():
            return reference.decode(anchors, deltas, self.weights, self.clip)


def box_iou(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """IoU of every pair of boxes, exactly as the matching computes it.

    Args:
        boxes_1: (M, 4) floating, (x1, y1, x2, y2).
        boxes_2: (G, 4) floating, the same unit.

    Returns:
        (M, G) float32 in [0, 1]. A box with a non-finite coordinate or x2 <= x1 or y2 <= y1 has IoU 0 with everything.
    """
    return reference.box_iou(_check_boxes("boxes_1", boxes_1, ("M", 4)), _check_boxes("boxes_2", boxes_2, ("G", 4)))


def _check_boxes(name: str, boxes: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    """The tensor in float32; raises unless it has this shape. A name stands for any size, "..." for any more."""
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
        kind = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"{name}: expected a floating point tensor, got {kind}")
    last = shape[1:] if shape[0] == "..." else shape
    dims_fit = boxes.dim() >= len(last) if shape[0] == "..." else boxes.dim() == len(last)
    if not dims_fit or any(
        isinstance(size, int) and size != actual
        for size, actual in zip(reversed(last), reversed(boxes.shape), strict=False)
    ):
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(boxes.shape)}")
    return boxes.float()
