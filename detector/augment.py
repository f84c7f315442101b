"""SSD's augmentation (Liu et al., 2016), from torchvision.transforms.v2."""

from __future__ import annotations

from typing import Any

from torchvision import tv_tensors
from torchvision.transforms import v2

MEAN_COLOR = (124, 116, 104)
"""ImageNet's mean: what the canvas of the zoom-out is filled with becomes about 0 in the network."""


def make_training_transform(image_size: int) -> v2.Compose:
    """Expand up to 4 times, IoU crop, flip, resize, photometric distortion: a dict with image, boxes, labels, crowd -> the same.

    The photometric distortion comes last, not first as in SSD: at the input's size it costs a third of what it costs at
    640 x 480, and it commutes with the geometry up to rounding (but for the canvas, whose colour it changes too).

    Args:
        image_size: side of the square the network takes, in pixels.
    """
    return v2.Compose(
        [
            v2.RandomZoomOut(fill={tv_tensors.Image: MEAN_COLOR, "others": 0}, side_range=(1.0, 4.0), p=0.6),
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(0.5),
            v2.Resize((image_size, image_size), antialias=True),
            v2.ClampBoundingBoxes(),
            # Boxes cropped away, and slivers of under a pixel, go with their labels and crowd flags.
            v2.SanitizeBoundingBoxes(min_size=1.0, labels_getter=labels_and_crowd),
            v2.RandomPhotometricDistort(p=0.5),
        ]
    )


def labels_and_crowd(sample: dict[str, Any]) -> tuple[Any, Any]:
    return sample["labels"], sample["crowd"]
