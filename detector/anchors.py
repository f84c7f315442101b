"""Anchor boxes of every pyramid level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BASE_SIZE = 24.0
"""Side in pixels of the smallest anchor at the finest level (stride 8) in the published setting, at 320 pixels."""

FINEST_STRIDE = 8
"""Pixels between the cells of the finest level."""

ANCHORS_PER_LOCATION = 6
"""Two areas, s^2 and (s * sqrt 2)^2, times three shapes, 1:1, 2:1 and 1:2."""


def level_cells(image_size: int) -> list[int]:
    """Cells a side of each pyramid level: 4 levels (strides 8 to 64) below 512 pixels, 5 (to 128) from 512 on.

    Raises:
        ValueError: image_size is not a multiple of 32 from 64 on.
    """
    if image_size < 64 or image_size % 32:
        raise ValueError(f"image_size: expected a multiple of 32, at least 64, got {image_size}")
    cells = [image_size // FINEST_STRIDE]
    for _ in range(3 if image_size < 512 else 4):
        cells.append(math.ceil(cells[-1] / 2))
    return cells


def make_anchors(
    image_size: int, base_size: float = BASE_SIZE, anchors_per_location: int = ANCHORS_PER_LOCATION
) -> Tensor:
    """The anchors of a square image, level by level, row by row, cell by cell.

    Args:
        image_size: side of the image in pixels.
        base_size: side in pixels of the smallest anchor at the finest level; it doubles with each level.
        anchors_per_location: 6, clipped to the image; or 1, the square around the center of each cell, as it is: that
            of an anchor-free detector, whose anchors stand for points.

    Returns:
        (A, 4) float32 boxes (x1, y1, x2, y2) in pixels. 12,750 of them at 320, 2,125 with one a location.

    Raises:
        ValueError: image_size is not a multiple of 32 from 64 on, base_size not between 0 and image_size, or
            anchors_per_location neither 1 nor 6.
    """
    cells_of_levels = level_cells(image_size)
    if not 0 < base_size <= image_size:
        raise ValueError(f"anchor size: expected a side above 0 and within the image's {image_size}, got {base_size}")
    if anchors_per_location not in (1, ANCHORS_PER_LOCATION):
        raise ValueError(f"anchors_per_location: expected 1 or {ANCHORS_PER_LOCATION}, got {anchors_per_location}")
    levels = []
    for level, cells in enumerate(cells_of_levels):
        shapes = []
        for side in (base_size * 2**level, base_size * 2**level * math.sqrt(2)):
            for ratio in (1.0, 2.0, 0.5):
                shapes.append((side * math.sqrt(ratio), side / math.sqrt(ratio)))
        half = torch.tensor(shapes[:anchors_per_location], dtype=torch.float64) / 2  # (1 or 6, 2)
        center = (torch.arange(cells, dtype=torch.float64) + 0.5) * (image_size / cells)
        y, x = torch.meshgrid(center, center, indexing="ij")
        centers = torch.stack([x, y], dim=-1).reshape(-1, 1, 2)  # (cells * cells, 1, 2)
        levels.append(torch.cat([centers - half, centers + half], dim=-1).reshape(-1, 4))
    anchors = torch.cat(levels)
    return (anchors if anchors_per_location == 1 else anchors.clamp(0, image_size)).float()
