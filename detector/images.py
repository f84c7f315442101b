"""Image files: pixels the right way up, and where the boxes annotated in them lie.

EXIF's orientation is applied, as viewers and most labeling tools do. The annotated size says whether a tool did not:
the boxes are then turned with the image. Where an image is stored at another size than annotated, they are scaled.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".ppm", ".pgm")
"""In lower case; files may have them in any case."""

EXIF_ORIENTATION = 0x0112
TIFF_SIZE = (256, 257)
"""Tags of the width and the height as stored."""

TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
"""What turns the image as stored into the image the right way up, by EXIF's orientation: x and y change places; then
left and right; then top and bottom."""


class DecodedImage(NamedTuple):
    """An image the right way up."""

    pixels: Tensor
    """(3, H, W) uint8, RGB."""
    orientation: int
    """EXIF's, from 1 to 8, already applied; 1 where the file has none."""
    notes: tuple[str, ...]
    """What was changed beyond that, for messages."""


def decode_image(path: Path) -> Tensor:
    """The pixels (3, H, W) uint8, RGB, the right way up. Raises as `decode`."""
    return decode(path).pixels


def decode(path: Path) -> DecodedImage:
    """Reads an image file.

    Of 16 bits per channel the upper 8 are kept. Floating values must lie between 0 and 1, and become 0 to 255.

    Raises:
        OSError: there is no such file, it is not an image, it ends early, it has more pixels than Pillow reads
            (`PIL.Image.MAX_IMAGE_PIXELS`), or values that have no place between 0 and 255.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice the limit is an error
            with Image.open(path) as image:
                return decode_pillow(image)
    except Image.DecompressionBombError as error:
        raise OSError(f"more pixels than Pillow reads (PIL.Image.MAX_IMAGE_PIXELS): {error}") from None
    except (OSError, MemoryError) as error:
        raise OSError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
    except (
        Exception
    ) as error:  # plug-ins raise what they like at a damaged file: RuntimeError, SyntaxError, struct.error
        raise OSError(f"{type(error).__name__}: {error}") from error


def decode_pillow(image: Image.Image) -> DecodedImage:
    """An image of Pillow's as `decode` gives that of its file; OSError for values that have no place in 0 to 255."""
    is_deep, orientation = _is_deep(image), _orientation(image)  # in this order: the second may read it
    pixels, notes = _to_rgb(ImageOps.exif_transpose(image), is_deep)
    return DecodedImage(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), orientation, notes)


def _orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    return orientation if orientation in TURNS else 1


def _is_deep(image: Image.Image) -> bool:
    """Whether a file, not yet read, has 16 bits per channel of several, of which Pillow keeps the upper 8 itself."""
    layouts = [(tile[0], tile[3]) for tile in getattr(image, "tile", ())]  # codec and its arguments
    return not image.mode.startswith("I") and any(
        ";16" in str(args) or (codec == "ppm" and isinstance(args, tuple) and args[-1] > 255) for codec, args in layouts
    )


DEEP = "image of 16 bits per channel: scaled to 8 bits"
DEEP_AND_DARK = "image of 16 bits per channel that uses less than 12 of them: scaled to 8 bits, and nearly black"


def _to_rgb(image: Image.Image, is_deep: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """(H, W, 3) uint8, and notes. Pillow itself would cut values over 255, and fractions to 0."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        pixels = np.array(image.convert("RGB"))
        return pixels, ((DEEP if pixels.max() >= 16 else DEEP_AND_DARK,) if is_deep else ())
    values = np.asarray(image)
    low, high = values.min(), values.max()  # NaN if there is one
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise OSError(
                f"floating values from {low:g} to {high:g}: expected 0 to 1; convert it to 8 bits per channel"
            )
        grey, note = (values * 255).round(), "image of floating values from 0 to 1: scaled to 8 bits"
    else:
        if not (low >= 0 and high <= 65535):
            raise OSError(f"values from {low} to {high}: expected at most 16 bits; convert it to 8 bits per channel")
        grey, note = values // 256, DEEP if high >= 4096 else DEEP_AND_DARK
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2), (note,)


def read_image_size(path: Path) -> tuple[int, int] | None:
    """(width, height) the right way up, from an image's header; None if it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
                if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow may have turned its size already
                    width, height = (int(image.tag_v2[tag]) for tag in TIFF_SIZE)
                return (height, width) if TURNS[_orientation(image)][0] else (width, height)
    except Exception:  # as `decode`
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Boxes of an annotation in the image as decoded


@dataclass(frozen=True)
class Placement:
    """How an image as annotated became the image as decoded: turned, then scaled."""

    annotated: tuple[int, int]
    """(width, height) as annotated."""
    image: tuple[int, int]
    """(width, height) as decoded."""
    turn: tuple[bool, bool, bool] = TURNS[1]
    """As `TURNS`."""
    notes: tuple[str, ...] = ()
    """What was changed, for messages."""

    def to_image(self, boxes: Tensor) -> Tensor:
        """Boxes (G, 4) of the annotation, (x1, y1, x2, y2), as they lie in the image."""
        swap, mirror_x, mirror_y = self.turn
        if swap:
            boxes = boxes[:, [1, 0, 3, 2]]
        boxes = boxes * self._scale(boxes)
        return self._mirror(boxes, mirror_x, mirror_y)

    def to_annotation(self, boxes: Tensor) -> Tensor:
        """Boxes (G, 4) of the image as they lie in the annotation: the inverse."""
        swap, mirror_x, mirror_y = self.turn
        boxes = self._mirror(boxes, mirror_x, mirror_y)
        boxes = boxes / self._scale(boxes)
        return boxes[:, [1, 0, 3, 2]] if swap else boxes

    def _scale(self, boxes: Tensor) -> Tensor:
        width, height = self.annotated[::-1] if self.turn[0] else self.annotated
        return boxes.new_tensor([self.image[0] / width, self.image[1] / height]).repeat(2)

    def _mirror(self, boxes: Tensor, mirror_x: bool, mirror_y: bool) -> Tensor:
        x1, y1, x2, y2 = boxes.unbind(1)
        if mirror_x:
            x1, x2 = self.image[0] - x2, self.image[0] - x1
        if mirror_y:
            y1, y2 = self.image[1] - y2, self.image[1] - y1
        return torch.stack([x1, y1, x2, y2], dim=1)


CANNOT_BE_DECODED = "image that cannot be decoded"
OTHER_PROPORTIONS = "image of other proportions than annotated"
"""Why an image is left out, for messages."""


def place_annotation(annotated: tuple[int, int], image: tuple[int, int], orientation: int) -> Placement | None:
    """Where the boxes of an annotation lie in an image.

    The annotated size decides. It is that of the image the right way up, or that of the image as stored, or one of the
    two at another scale. Where both would do, the right way up is taken, as viewers show it; at another scale neither.

    Args:
        annotated: (width, height) of the annotation.
        image: (width, height) as decoded, the right way up.
        orientation: EXIF's, which decoding applied.

    Returns:
        None where the sizes do not tell: nobody knows where the boxes are, and the image must be left out.
    """
    turn = TURNS[orientation]
    stored = image[::-1] if turn[0] else image
    if annotated == image:
        unsure = orientation != 1 and stored == image
        note = "image turned by EXIF, with boxes that may not be: taken as the image the right way up has them"
        return Placement(annotated, image, notes=(note,) if unsure else ())
    if annotated == stored:
        return Placement(annotated, image, turn, ("image turned by EXIF, annotated as stored: boxes turned with it",))
    upright_fits, stored_fits = _same_proportions(annotated, image), _same_proportions(annotated, stored)
    if upright_fits and stored_fits and orientation != 1:
        return None
    if upright_fits:
        return Placement(annotated, image, notes=("image of another size than annotated: boxes scaled",))
    if stored_fits:
        note = "image turned by EXIF, annotated as stored at another size: boxes turned with it and scaled"
        return Placement(annotated, image, turn, (note,))
    return None


def _same_proportions(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether one size is the other at another scale, its sides rounded up or down."""
    low = max((other[side] - 1) / one[side] for side in (0, 1))
    high = min((other[side] + 1) / one[side] for side in (0, 1))
    return low <= high
