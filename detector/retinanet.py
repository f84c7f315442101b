"""RetinaNet as in the Mutual Guidance paper: the fused pyramid of FSSD with a top-down path over it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from detector.anchors import BASE_SIZE, level_cells, make_anchors
from detector.backbone import VGG16, ResNet18
from detector.fssd import FusionPyramid
from detector.heads import Head


class TopDown(nn.Module):
    """1x1 laterals, each coarser level added to the finer one, 3x3 outputs: a feature pyramid (Lin et al., 2017)."""

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(256, 256, 1) for _ in range(num_levels))
        self.output = nn.ModuleList(nn.Conv2d(256, 256, 3, padding=1) for _ in range(num_levels))

    def forward(self, pyramid: list[Tensor]) -> list[Tensor]:
        levels = [conv(level) for conv, level in zip(self.lateral, pyramid, strict=True)]
        for finer in range(len(levels) - 2, -1, -1):
            size = levels[finer].shape[-2:]
            levels[finer] = levels[finer] + functional.interpolate(levels[finer + 1], size=size, mode="nearest")
        return [functional.relu(conv(level)) for conv, level in zip(self.output, levels, strict=True)]


class RetinaNet(nn.Module):
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
        self.top_down = TopDown(num_levels)
        self.head = Head([256] * num_levels, num_classes)
        self.register_buffer("anchors", make_anchors(image_size, anchor_size), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.top_down(self.pyramid(self.backbone(images))))
