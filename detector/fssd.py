"""FSSD (Li and Zhou, 2017): one fused feature map, and a pyramid of stride-2 convolutions on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from detector.anchors import BASE_SIZE, level_cells, make_anchors
from detector.backbone import VGG16, ResNet18
from detector.heads import Head, conv_bn_relu


class FusionPyramid(nn.Module):
    """Backbone maps fused at stride 8, then halved level by level; 256 channels everywhere."""

    def __init__(self, in_channels: tuple[int, ...], num_levels: int) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(conv_bn_relu(channels, 256, 1) for channels in in_channels)
        self.fuse = conv_bn_relu(256 * len(in_channels), 256, 3)
        self.downsample = nn.ModuleList(conv_bn_relu(256, 256, 3, stride=2) for _ in range(num_levels - 1))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        size = features[0].shape[-2:]
        reduced = [conv(feature) for conv, feature in zip(self.reduce, features, strict=True)]
        enlarged = [reduced[0]] + [
            functional.interpolate(feature, size=size, mode="nearest") for feature in reduced[1:]
        ]
        pyramid = [self.fuse(torch.cat(enlarged, dim=1))]  # (B, 256, S / 8, S / 8)
        for conv in self.downsample:
            pyramid.append(conv(pyramid[-1]))  # (B, 256, half, half)
        return pyramid


class FSSD(nn.Module):
    """Images (B, 3, S, S), RGB in 0..255, uint8 or floating -> cls_logits (B, A, C) and box_deltas (B, A, 4).

    `anchors` (A, 4) are boxes (x1, y1, x2, y2) in pixels of the input.

    Args:
        backbone: gives the feature maps, the first at stride 8.
        image_size: S.
        num_classes: C.
        anchor_size: side in pixels of the smallest anchor.
    """

    anchors: Tensor

    def __init__(
        self, backbone: ResNet18 | VGG16, image_size: int, num_classes: int, anchor_size: float = BASE_SIZE
    ) -> None:
        super().__init__()
        num_levels = len(level_cells(image_size))
        self.backbone = backbone
        self.pyramid = FusionPyramid(backbone.channels, num_levels)
        self.head = Head([256] * num_levels, num_classes)
        self.register_buffer("anchors", make_anchors(image_size, anchor_size), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.pyramid(self.backbone(images)))
