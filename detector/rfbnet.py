"""RFBNet (Liu et al., ECCV 2018): a pyramid of receptive field blocks, whose branches see dilated neighbourhoods."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from detector.anchors import BASE_SIZE, level_cells, make_anchors
from detector.backbone import VGG16
from detector.heads import Head, conv_bn_relu


def branch(in_channels: int, width: int, kernels: list[tuple[int, int]], stride: int, dilation: int) -> nn.Sequential:
    """1x1 reduction, convolutions of the given kernels (the last one strided), 3x3 dilated convolution, no ReLU."""
    layers: list[nn.Module] = [*conv_bn_relu(in_channels, width, 1)]
    for index, kernel in enumerate(kernels):
        step = stride if index == len(kernels) - 1 else 1
        padding = (kernel[0] // 2, kernel[1] // 2)
        layers += [
            nn.Conv2d(width, width, kernel, step, padding, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
    layers += [
        nn.Conv2d(width, width, 3, 1 if kernels else stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(width),
    ]
    return nn.Sequential(*layers)


class ReceptiveFieldBlock(nn.Module):
    """Branches of growing kernels and dilations, concatenated, mixed by a 1x1 convolution and added to a shortcut.

    Args:
        in_channels, out_channels: channels.
        stride: 1 or 2.
        branches: for each branch the kernels before its dilated convolution, and the dilation.
        scale: of the branches against the shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        branches: list[tuple[list[tuple[int, int]], int]],
        scale: float = 0.1,
    ) -> None:
        super().__init__()
        width = in_channels // 4
        self.branches = nn.ModuleList(
            branch(in_channels, width, kernels, stride, dilation) for kernels, dilation in branches
        )
        self.mix = nn.Sequential(
            nn.Conv2d(width * len(branches), out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(torch.cat([branch(x) for branch in self.branches], dim=1))
        return functional.relu(mixed * self.scale + self.shortcut(x))


# The blocks of the pyramid: thin kernels at the finest level, square ones in the middle, long ones on small maps.
RFB_A = [([], 1), ([(3, 1)], 3), ([(1, 3)], 3), ([(1, 3), (3, 1)], 5)]
RFB = [([], 1), ([(3, 3)], 3), ([(3, 3), (3, 3)], 5)]
RFB_C = [([], 1), ([(3, 3)], 3), ([(1, 7), (7, 1)], 7)]


class RFBNet(nn.Module):
    """Images (B, 3, S, S), RGB in 0..255, uint8 or floating -> cls_logits (B, A, C) and box_deltas (B, A, 4).

    `anchors` (A, 4) are boxes (x1, y1, x2, y2) in pixels of the input.

    Args:
        backbone: VGG-16, with feature maps at strides 8 and 16.
        image_size: S.
        num_classes: C.
        anchor_size: side in pixels of the smallest anchor.
    """

    anchors: Tensor

    def __init__(self, backbone: VGG16, image_size: int, num_classes: int, anchor_size: float = BASE_SIZE) -> None:
        super().__init__()
        if not isinstance(backbone, VGG16):
            raise ValueError(
                "RFBNet: expected a VGG-16 backbone (--backbone vgg16 or vgg16_bn); the paper pairs it with no other"
            )
        self.backbone = backbone
        self.reduce = nn.ModuleList(conv_bn_relu(channels, 256, 1) for channels in backbone.channels)
        blocks = [
            ReceptiveFieldBlock(512, 512, 1, RFB_A, scale=1.0),
            ReceptiveFieldBlock(512, 512, 2, RFB),
            ReceptiveFieldBlock(512, 512, 2, RFB),
            ReceptiveFieldBlock(512, 256, 2, RFB_C),
            ReceptiveFieldBlock(256, 256, 2, RFB_C),
        ]
        level_channels = [512, 512, 512, 256, 256]
        num_levels = len(level_cells(image_size))
        self.blocks = nn.ModuleList(blocks[:num_levels])
        self.head = Head(level_channels[:num_levels], num_classes)
        self.register_buffer("anchors", make_anchors(image_size, anchor_size), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        stride_8, stride_16 = self.backbone(images)
        fine, coarse = self.reduce[0](stride_8), self.reduce[1](stride_16)
        x = torch.cat(
            [fine, functional.interpolate(coarse, size=fine.shape[-2:], mode="nearest")], dim=1
        )  # (B, 512, S / 8, S / 8)
        pyramid = []
        for block in self.blocks:
            x = block(x)
            pyramid.append(x)
        return self.head(pyramid)
