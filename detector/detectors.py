"""One-stage detectors: a backbone, a neck, a head and their anchors. FSSD, RetinaNet and RFBNet differ in the neck."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from detector.anchors import ANCHORS_PER_LOCATION, BASE_SIZE, level_cells, make_anchors
from detector.backbone import VGG16, make_backbone
from detector.necks import FusionPyramid, ReceptiveFieldPyramid, TopDownPyramid

Neck = FusionPyramid | TopDownPyramid | ReceptiveFieldPyramid
NECKS: dict[str, type[Neck]] = {"fssd": FusionPyramid, "retinanet": TopDownPyramid, "rfbnet": ReceptiveFieldPyramid}
MODELS = tuple(NECKS)


class OneStageDetector(nn.Module):
    """Images (B, 3, S, S), RGB in 0..255, uint8 or floating -> cls_logits (B, A, C) and box_deltas (B, A, 4).

    `anchors` (A, 4) are boxes (x1, y1, x2, y2) in pixels of the input.

    Args:
        backbone: gives the feature maps, the first at stride 8.
        neck: makes them a pyramid.
        head: predicts on each level of it.
        anchors: of all levels.
    """

    anchors: Tensor

    def __init__(self, backbone: nn.Module, neck: nn.Module, head: nn.Module, anchors: Tensor) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head
        self.register_buffer("anchors", anchors, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        cls_logits, box_deltas = self.head(self.neck(self.backbone(images)))
        return cls_logits, box_deltas


def make_detector(
    model: str,
    backbone: str,
    image_size: int,
    num_classes: int,
    anchor_size: float = BASE_SIZE,
    anchors_per_location: int = ANCHORS_PER_LOCATION,
) -> OneStageDetector:
    """A detector with random weights, in channels-last memory.

    Args:
        model: one of MODELS.
        backbone: one of `detector.backbone.BACKBONES`.
        image_size: side of its input in pixels, a multiple of 32.
        num_classes: C.
        anchor_size: side in pixels of the smallest anchor.
        anchors_per_location: 6 or 1, as of `make_anchors`.

    Raises:
        ValueError: there is no such model or backbone, or the numbers are out of range.
    """
    if model not in NECKS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    features = make_backbone(backbone)
    if model == "rfbnet" and not isinstance(features, VGG16):
        raise ValueError(
            "RFBNet: expected a VGG-16 backbone (--backbone vgg16 or vgg16_bn); the paper pairs it with no other"
        )
    neck = NECKS[model](features.channels, len(level_cells(image_size)))
    head = Head(neck.channels, num_classes, anchors_per_location)
    anchors = make_anchors(image_size, anchor_size, anchors_per_location)
    detector = OneStageDetector(features, neck, head, anchors)
    return detector.to(memory_format=torch.channels_last)


class Head(nn.Module):
    """One 3x3 convolution a level for the boxes and one for the classes; a sigmoid per class, no background class.

    Args:
        level_channels: channels of each pyramid level.
        num_classes: C.
        anchors_per_location: K.
    """

    def __init__(self, level_channels: list[int], num_classes: int, anchors_per_location: int) -> None:
        super().__init__()
        self.num_classes, self.anchors_per_location = num_classes, anchors_per_location
        classes = [nn.Conv2d(channels, anchors_per_location * num_classes, 3, padding=1) for channels in level_channels]
        boxes = [nn.Conv2d(channels, anchors_per_location * 4, 3, padding=1) for channels in level_channels]
        for convs, bias in ((classes, -math.log(99)), (boxes, 0.0)):  # every class starts at p = 0.01
            for conv in convs:
                assert conv.bias is not None  # none is left out above
                nn.init.normal_(conv.weight, std=0.01)
                nn.init.constant_(conv.bias, bias)
        self.classes, self.boxes = nn.ModuleList(classes), nn.ModuleList(boxes)

    def forward(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The pyramid -> cls_logits (B, A, C) and box_deltas (B, A, 4), in the order of `make_anchors`."""
        logits = [conv(level) for conv, level in zip(self.classes, pyramid, strict=True)]  # (B, K * C, H, W)
        deltas = [conv(level) for conv, level in zip(self.boxes, pyramid, strict=True)]  # (B, K * 4, H, W)
        return flatten_levels(logits, self.num_classes), flatten_levels(deltas, 4)


def flatten_levels(levels: list[Tensor], size: int) -> Tensor:
    """L maps (B, K * size, H, W) -> (B, A, size): level by level, row by row, cell by cell, anchor by anchor."""
    # In channels-last memory the permutation and the reshape move nothing; the concatenation is the only copy.
    return torch.cat([level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, size) for level in levels], dim=1)
