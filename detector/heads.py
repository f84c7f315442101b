"""The prediction head every detector here shares, and the layer its pyramids are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detector.anchors import ANCHORS_PER_CELL


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Convolution that keeps the size (but for its stride), batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Head(nn.Module):
    """One 3x3 convolution a level for the boxes and one for the classes; a sigmoid per class, no background class.

    Args:
        level_channels: channels of each pyramid level.
        num_classes: C.
    """

    def __init__(self, level_channels: list[int], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.classes = nn.ModuleList(
            nn.Conv2d(channels, ANCHORS_PER_CELL * num_classes, 3, padding=1) for channels in level_channels
        )
        self.boxes = nn.ModuleList(
            nn.Conv2d(channels, ANCHORS_PER_CELL * 4, 3, padding=1) for channels in level_channels
        )
        for conv in [*self.classes, *self.boxes]:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        for conv in self.classes:
            nn.init.constant_(conv.bias, -math.log(99))  # every class starts at p = 0.01

    def forward(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The pyramid -> cls_logits (B, A, C) and box_deltas (B, A, 4), in the order of `make_anchors`."""
        logits = [conv(level) for conv, level in zip(self.classes, pyramid, strict=True)]  # (B, 6 * C, H, W)
        deltas = [conv(level) for conv, level in zip(self.boxes, pyramid, strict=True)]  # (B, 6 * 4, H, W)
        return flatten_levels(logits, self.num_classes), flatten_levels(deltas, 4)


def flatten_levels(levels: list[Tensor], size: int) -> Tensor:
    """L maps (B, 6 * size, H, W) -> (B, A, size): level by level, row by row, cell by cell, anchor by anchor."""
    # In channels-last memory the permutation and the reshape move nothing; the concatenation is the only copy.
    return torch.cat([level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, size) for level in levels], dim=1)
