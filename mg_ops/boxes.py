"""Box coding and IoU with the matching's arithmetic: float32, one rounding per operation, equal on every device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mg_ops import reference
from mg_ops.checks import MAX_FLOAT, check_number, check_tensor, describe, is_in_range


@dataclass(frozen=True)
class BoxCoder:
    """Regression deltas (dx, dy, dw, dh) <-> boxes (x1, y1, x2, y2), in torchvision's convention.

    Tensors go by name: torchvision's class of this name takes them in the opposite order.

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
        >>> coder.encode(anchors=anchors, boxes=torch.tensor([[5.0, 0.0, 15.0, 10.0]]))
        tensor([[5., 0., 0., 0.]])
    """

    weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    clip: float = math.log(1000.0 / 16)

    def __post_init__(self) -> None:
        wanted = f"BoxCoder: weights must be four finite non-zero numbers (in float32), got {self.weights!r}"
        try:
            weights = tuple(float(weight) for weight in self.weights)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise TypeError(wanted) from error
        if len(weights) == 2:
            raise ValueError(f"{wanted}; weights are 1 / variances: SSD's (0.1, 0.2) are (10, 10, 5, 5)")
        if len(weights) != 4 or not all(is_in_range(abs(weight), 0.0, MAX_FLOAT) for weight in weights):
            raise ValueError(wanted)
        try:
            clip = float(self.clip)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise TypeError(f"BoxCoder: clip must be a number, got {self.clip!r}") from error
        if math.isnan(clip):
            raise ValueError("BoxCoder: clip must be a number, got NaN")
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "clip", clip)

    def encode(self, *, anchors: Tensor, boxes: Tensor) -> Tensor:
        """The deltas that turn anchors into boxes.

        Args:
            anchors: (..., 4) floating, (x1, y1, x2, y2).
            boxes: (..., 4) floating, the same unit, broadcastable with anchors.

        Returns:
            (..., 4) float32 deltas. Differentiable.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or device; the message names the argument.
        """
        anchors = check_tensor("anchors", anchors, "floating point", ("...", 4), None).float()
        boxes = check_tensor("boxes", boxes, "floating point", ("...", 4), anchors.device).float()
        try:
            torch.broadcast_shapes(anchors.shape, boxes.shape)
        except RuntimeError:
            raise ValueError(
                f"boxes: expected a shape that broadcasts with anchors {tuple(anchors.shape)}, got {describe(boxes)}"
            ) from None
        anchor_size = anchors[..., 2:] - anchors[..., :2]
        anchor_center = anchors[..., :2] + 0.5 * anchor_size
        size = boxes[..., 2:] - boxes[..., :2]
        center = boxes[..., :2] + 0.5 * size
        shift = (center - anchor_center) / anchor_size
        deltas = torch.cat([shift, torch.log(size / anchor_size)], dim=-1)
        # Weights as numbers, not as a tensor: copying one to a GPU cannot be captured in a CUDA graph.
        columns = zip(deltas.unbind(-1), self.weights, strict=True)
        return torch.stack([column * weight for column, weight in columns], dim=-1)

    def decode(self, *, anchors: Tensor, deltas: Tensor) -> Tensor:
        """The boxes that deltas make of anchors; the exact arithmetic `mutual_match` decodes with.

        Args:
            anchors: (A, 4) floating, (x1, y1, x2, y2).
            deltas: (..., A, 4) floating.

        Returns:
            (..., A, 4) float32 boxes in the anchors' unit. Not differentiable: exp is evaluated by bit operations.

        Raises:
            TypeError, ValueError: a wrong dtype, shape or device; the message names the argument.
        """
        anchors = check_tensor("anchors", anchors, "floating point", ("A", 4), None).float()
        deltas = check_tensor("deltas", deltas, "floating point", ("...", len(anchors), 4), anchors.device).float()
        # As the kernels have it, in float32: torch takes no number beyond its range.
        clip = self.clip if abs(self.clip) <= MAX_FLOAT else math.copysign(math.inf, self.clip)
        with torch.no_grad():
            return reference.decode(anchors, deltas, self.weights, clip)


def anchors_from_points(points: Tensor, strides: Tensor, size: float) -> Tensor:
    """The square anchor boxes of the points of an anchor-free detector, for `mutual_match`.

    Args:
        points: (A, 2) floating, their centers (x, y) in pixels.
        strides: (A,) floating, the stride of each point's feature level in pixels.
        size: side of an anchor box, in strides.

    Returns:
        (A, 4) float32, (x1, y1, x2, y2) in pixels.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number; the message names the argument.

    Examples:
        >>> mg_ops.anchors_from_points(torch.tensor([[4.0, 4.0]]), torch.tensor([8.0]), size=4.0)
        tensor([[-12., -12.,  20.,  20.]])
    """
    points = check_tensor("points", points, "floating point", ("A", 2), None)
    strides = check_tensor("strides", strides, "floating point", (len(points),), points.device, "points")
    size = check_number("size", size, 0.0, MAX_FLOAT, "a finite number of strides above 0")
    half = (strides.float() * (size / 2)).unsqueeze(1)
    return torch.cat([points.float() - half, points.float() + half], dim=1)


def check_box_coder(value: object) -> None:
    """Raises TypeError unless value is a box coder or None."""
    if value is not None and not isinstance(value, BoxCoder):
        raise TypeError(f"box_coder: expected mg_ops.BoxCoder or None, got {describe(value)}")


def box_iou(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """IoU of every pair of boxes, exactly as the matching computes it.

    Args:
        boxes_1: (M, 4) floating, (x1, y1, x2, y2).
        boxes_2: (G, 4) floating, the same unit.

    Returns:
        (M, G) float32 in [0, 1]. A box with a non-finite coordinate or x2 <= x1 or y2 <= y1 has IoU 0 with everything.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; the message names the argument.
    """
    boxes_1 = check_tensor("boxes_1", boxes_1, "floating point", ("M", 4), None).float()
    boxes_2 = check_tensor("boxes_2", boxes_2, "floating point", ("G", 4), boxes_1.device, "boxes_1").float()
    return reference.box_iou(boxes_1, boxes_2)
