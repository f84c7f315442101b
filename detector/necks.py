"""Necks of FSSD, RetinaNet and RFBNet: from a backbone's feature maps to the pyramid that a head predicts on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Convolution that keeps the size (but for its stride), batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def enlarge(features: Tensor, like: Tensor) -> Tensor:
    """A coarse map at the size of a finer one, each value repeated."""
    return functional.interpolate(features, size=like.shape[-2:], mode="nearest")


class FusionPyramid(nn.Module):
    """FSSD (Li and Zhou, 2017): the backbone's maps fused at stride 8, then halved level by level.

    Args:
        in_channels: of the backbone's maps.
        num_levels: of the pyramid.

    Attributes:
        channels: of each level.
    """

    def __init__(self, in_channels: Sequence[int], num_levels: int) -> None:
        super().__init__()
        self.channels = [256] * num_levels
        self.reduce = nn.ModuleList(conv_bn_relu(channels, 256, 1) for channels in in_channels)
        self.fuse = conv_bn_relu(256 * len(in_channels), 256, 3)
        self.downsample = nn.ModuleList(conv_bn_relu(256, 256, 3, stride=2) for _ in range(num_levels - 1))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        reduced = [conv(feature) for conv, feature in zip(self.reduce, features, strict=True)]
        enlarged = [reduced[0], *(enlarge(feature, reduced[0]) for feature in reduced[1:])]
        pyramid = [self.fuse(torch.cat(enlarged, dim=1))]  # (B, 256, S / 8, S / 8)
        for conv in self.downsample:
            pyramid.append(conv(pyramid[-1]))  # (B, 256, half, half)
        return pyramid


class TopDownPyramid(nn.Module):
    """RetinaNet as in the Mutual Guidance paper: the pyramid of FSSD with a top-down path (Lin et al., 2017) over it.

    1x1 laterals, each coarser level added to the finer one, 3x3 outputs. Arguments and attributes as `FusionPyramid`.
    """

    def __init__(self, in_channels: Sequence[int], num_levels: int) -> None:
        super().__init__()
        self.fusion = FusionPyramid(in_channels, num_levels)
        self.channels = self.fusion.channels
        self.lateral = nn.ModuleList(nn.Conv2d(256, 256, 1) for _ in range(num_levels))
        self.output = nn.ModuleList(nn.Conv2d(256, 256, 3, padding=1) for _ in range(num_levels))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        levels = [conv(level) for conv, level in zip(self.lateral, self.fusion(features), strict=True)]
        for finer in range(len(levels) - 2, -1, -1):
            levels[finer] = levels[finer] + enlarge(levels[finer + 1], levels[finer])
        return [functional.relu(conv(level)) for conv, level in zip(self.output, levels, strict=True)]


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


class ReceptiveFieldPyramid(nn.Module):
    """RFBNet (Liu et al., ECCV 2018): a receptive field block per level, whose branches see dilated neighbourhoods.

    Arguments and attributes as `FusionPyramid`; of the two maps of VGG-16, at strides 8 and 16.
    """

    def __init__(self, in_channels: Sequence[int], num_levels: int) -> None:
        super().__init__()
        self.channels = [512, 512, 512, 256, 256][:num_levels]
        self.reduce = nn.ModuleList(conv_bn_relu(channels, 256, 1) for channels in in_channels)
        blocks = [
            ReceptiveFieldBlock(512, 512, 1, RFB_A, scale=1.0),
            ReceptiveFieldBlock(512, 512, 2, RFB),
            ReceptiveFieldBlock(512, 512, 2, RFB),
            ReceptiveFieldBlock(512, 256, 2, RFB_C),
            ReceptiveFieldBlock(256, 256, 2, RFB_C),
        ]
        self.blocks = nn.ModuleList(blocks[:num_levels])

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        fine, coarse = (conv(feature) for conv, feature in zip(self.reduce, features, strict=True))
        x = torch.cat([fine, enlarge(coarse, fine)], dim=1)  # (B, 512, S / 8, S / 8)
        pyramid = []
        for block in self.blocks:
            x = block(x)
            pyramid.append(x)
        return pyramid
