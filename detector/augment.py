"""SSD's augmentation (Liu et al., 2016, section 2.2): expand, IoU crop, flip, resize, photometric distortion.

The geometry is drawn first, as one region of the image's plane, and the pixels are touched once: only the part of the
image that the network will see is resized. torchvision's RandomZoomOut and RandomIoUCrop, which this replaces, fill a
canvas of up to 16 times the image and try their crops one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

MEAN_COLOR = (124, 116, 104)
"""ImageNet's mean: the canvas around a zoomed-out image becomes about 0 in the network."""

MIN_IOUS = (None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
"""What the IoU of a crop and some object must reach, one drawn an image; None leaves the image whole."""


def uniform(low: float, high: float) -> float:
    """A number drawn between low and high."""
    return low + (high - low) * torch.rand(()).item()


def zoom_out(width: int, height: int) -> Tensor:
    """A region up to 4 times the image's size that holds the image, in 60% of the calls; else the image itself.

    Returns:
        (4,) float32 (x1, y1, x2, y2) in pixels of the image; x1 and y1 may be negative.
    """
    if torch.rand(()).item() >= 0.6:
        return torch.tensor([0.0, 0.0, width, height])
    ratio = uniform(1, 4)
    left, top = uniform(0, width * (ratio - 1)), uniform(0, height * (ratio - 1))
    return torch.tensor([-left, -top, width * ratio - left, height * ratio - top])


def crop_by_iou(region: Tensor, boxes: Tensor, num_trials: int = 40) -> Tensor:
    """A part of the region that holds the center of an object and overlaps one by the IoU drawn.

    Args:
        region: (4,) what may be cropped.
        boxes: (G, 4) the objects, in the same pixels.
        num_trials: crops tried for an IoU before another is drawn.
    """
    if len(boxes) == 0:
        return region
    center = (boxes[:, :2] + boxes[:, 2:]) / 2  # (G, 2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)  # (G,)
    size = region[2:] - region[:2]  # (2,)
    while True:
        min_iou = MIN_IOUS[int(torch.randint(len(MIN_IOUS), ()))]
        if min_iou is None:
            return region
        draw = torch.rand(num_trials, 4)
        crop_size = size * (0.3 + 0.7 * draw[:, :2])  # (T, 2)
        first = region[:2] + (size - crop_size) * draw[:, 2:]
        crops = torch.cat([first, first + crop_size], dim=1)  # (T, 4)
        aspect = crop_size[:, 0] / crop_size[:, 1]
        inside = ((center > crops[:, None, :2]) & (center < crops[:, None, 2:])).all(-1)  # (T, G)
        overlap = torch.minimum(crops[:, None, 2:], boxes[:, 2:]) - torch.maximum(crops[:, None, :2], boxes[:, :2])
        overlap = overlap.clamp(min=0).prod(-1)  # (T, G)
        iou = overlap / (crop_size.prod(1)[:, None] + area - overlap)
        accepted = (aspect > 0.5) & (aspect < 2) & (inside & (iou >= min_iou)).any(1)
        if accepted.any():
            return crops[accepted.nonzero()[0, 0]]


class TrainingTransform:
    """Augments an image and its objects.

    Args:
        image_size: S, side of the square the network takes, in pixels.
    """

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self.distort = v2.RandomPhotometricDistort(p=0.5)

    def __call__(
        self, image: Tensor, boxes: Tensor, labels: Tensor, crowd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image (3, H, W) uint8, boxes (G, 4), labels (G,), crowd (G,) -> the same of the input (3, S, S)."""
        height, width = image.shape[-2:]
        region = crop_by_iou(zoom_out(width, height), boxes[~crowd])
        # Whole pixels: what is cut out of the image is then exactly what the boxes are scaled by.
        region = torch.cat([region[:2].floor(), region[2:].ceil()])
        flip = torch.rand(()).item() < 0.5

        # Objects whose center was cropped away leave; a crowd region stays as far as it is seen.
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((center > region[:2]) & (center < region[2:])).all(1)
        scale = self.image_size / (region[2:] - region[:2])  # (2,)
        boxes = ((boxes - region[:2].repeat(2)) * scale.repeat(2)).clamp(0, self.image_size)
        if flip:
            boxes = torch.stack(
                [self.image_size - boxes[:, 2], boxes[:, 1], self.image_size - boxes[:, 0], boxes[:, 3]], 1
            )
        seen = (inside | crowd) & ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)

        # The part of the image inside the region, and where it lands in the input.
        limit = torch.tensor([width, height], dtype=torch.float32)
        first, last = region[:2].clamp(min=0), torch.minimum(region[2:], limit)
        left, top, right, bottom = [int(value) for value in torch.cat([first, last])]
        place = ((torch.cat([first, last]) - region[:2].repeat(2)) * scale.repeat(2)).round().clamp(0, self.image_size)
        to_left, to_top, to_right, to_bottom = [int(value) for value in place]
        to_right, to_bottom = max(to_right, to_left + 1), max(to_bottom, to_top + 1)
        part = image[:, top:bottom, left:right]
        part = functional.resize(part, [to_bottom - to_top, to_right - to_left], antialias=True)
        part = self.distort(part)
        canvas = torch.tensor(MEAN_COLOR, dtype=torch.uint8).view(3, 1, 1).repeat(1, self.image_size, self.image_size)
        canvas[:, to_top:to_bottom, to_left:to_right] = part[:, : self.image_size - to_top, : self.image_size - to_left]
        if flip:
            canvas = canvas.flip(-1)
        return canvas, boxes[seen], labels[seen], crowd[seen]
