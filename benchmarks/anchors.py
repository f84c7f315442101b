"""The anchor grids of the benchmark's cases: (A, 4) float32, (x1, y1, x2, y2) in pixels, level by level, row by row.

SSD's is the detectors' own, `detector.anchors.make_anchors(320)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def make_grid(height: int, width: int, stride: int, sizes: Sequence[tuple[float, float]]) -> Tensor:
    """One pyramid level: anchors of each size (w, h) centred in every cell of stride x stride pixels."""
    center_y = (torch.arange(math.ceil(height / stride)) + 0.5) * stride
    center_x = (torch.arange(math.ceil(width / stride)) + 0.5) * stride
    centers = torch.stack(torch.meshgrid(center_x, center_y, indexing="xy"), dim=-1)  # (rows, columns, 2)
    half = 0.5 * torch.tensor(sizes, dtype=torch.float32)
    boxes = torch.cat([centers.unsqueeze(2) - half, centers.unsqueeze(2) + half], dim=-1)  # (rows, columns, sizes, 4)
    return boxes.reshape(-1, 4)


def make_retinanet_anchors() -> Tensor:
    """RetinaNet's grid at 800 x 1333, padded to 800 x 1344: P3 to P7, 9 anchors a cell: 201,600 anchors.

    Base size 4 strides; scales 1, 2^(1/3), 2^(2/3); ratios 1/2, 1 and 2. Not clipped.
    """
    levels = []
    for stride in (8, 16, 32, 64, 128):
        sizes = []
        for scale in (1.0, 2 ** (1 / 3), 2 ** (2 / 3)):
            side = 4 * stride * scale
            sizes += [(side / math.sqrt(ratio), side * math.sqrt(ratio)) for ratio in (0.5, 1.0, 2.0)]
        levels.append(make_grid(800, 1344, stride, sizes))
    return torch.cat(levels)


def make_dense_anchors() -> Tensor:
    """A grid for many small objects at 608 x 800 (width x height): P2 to P6, 3 anchors a cell: 121,515 anchors.

    Base size 3 strides (12 pixels on P2); ratios 1/2, 1 and 2. Not clipped.
    """
    levels = []
    for stride in (4, 8, 16, 32, 64):
        sizes = [(3 * stride / math.sqrt(ratio), 3 * stride * math.sqrt(ratio)) for ratio in (0.5, 1.0, 2.0)]
        levels.append(make_grid(800, 608, stride, sizes))
    return torch.cat(levels)
