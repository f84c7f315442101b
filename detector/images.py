"""Reading image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".JPG", ".JPEG", ".PNG")


def read_image_size(path: Path) -> tuple[int, int] | None:
    """(width, height) from an image's header; None if it has none."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError):
        return None


def decode_image(path: Path) -> Tensor:
    """(3, H, W) uint8, RGB, as stored (EXIF rotation is not applied: annotations do not apply it either).

    Raises:
        OSError: the file is not an image, or ends early.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
