"""Objects for benchmarks: read from annotation files, or generated with the statistics of VOC, COCO and dense scenes.

The generators draw, for each image, a number of objects, then for each object a relative side sqrt(w * h / (W * H)) and
a relative aspect (w / W) / (h / H), placed uniformly where it fits. What each rests on:

- `generate_voc`: the 21,503 images and 62,199 boxes of PASCAL VOC 2007 train, val, test and 2012 train, val. The counts
  are the data's own histogram; sides and aspects are quantile tables, one for each of five ranges of the count (crowded
  images have smaller objects). Commit 2482b00 has the program that measured the tables, `objects.py --fit`; its
  Kolmogorov-Smirnov distances between the data and as many generated images are count 0.000, side 0.006, aspect 0.023.
- `generate_coco`: 7.27 objects per image in COCO 2017 train (Liu et al., arXiv:1809.02165); 41 percent small (area
  below 32^2 pixels), 34 medium and 24 large (cocodataset.org/#detection-eval; to two more digits in Kisantal et al.,
  "Augmentation for small object detection", 2019; their areas are the masks', ours the boxes'). Our choices, not
  published: the count is log-normal and ends at 93; sides are log-uniform within each size class, from 6 to 448 pixels
  of a 640 x 480 image, and independent of the count. The aspect is log-normal with the median (0.82 in pixels) and the
  quartiles of the 830 boxes in the 100 images of COCO 2014 val that cocoapi ships with its tests. On those 100 images
  the Kolmogorov-Smirnov distances are count 0.10, side 0.13, aspect 0.04.
- `generate_dense`: a jittered grid of upright boxes, as on the shelves of SKU-110K (Goldman et al., CVPR 2019), with
  more objects than the 147 per image there. Counts, coverage (about 60 percent) and aspect (3 : 4) are our choices.

The counts of the images made together are spread evenly over their distribution, so that a batch of 32 has about its
mean. Labels are uniform over the classes.
"""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detector.annotations import Defects, parse_coco, read_json, read_voc_annotation, refuse_fractions


class ImageObjects(NamedTuple):
    """The objects of one image, G of them, in its own pixels."""

    width: float
    height: float
    boxes: NDArray[np.float32]
    """(G, 4), (x1, y1, x2, y2)."""
    labels: NDArray[np.int64]
    """(G,), from 0."""


def read_objects(path: Path) -> tuple[list[ImageObjects], list[str], str]:
    """Reads annotations as the detector does: boxes are clipped to their image.

    Args:
        path: a COCO-style JSON file, or a folder with VOC XML files in it or in its `Annotations/`.

    Returns:
        Every image with a size, in the order of the files; the names of the classes, which labels count (of COCO in the
        order of the categories, of VOC sorted); and what was left out, and why.

    Raises:
        ValueError: no annotations are there, or they are broken; the message names the file.
    """
    defects = Defects()
    if path.is_dir():
        files = sorted(path.glob("*.xml")) or sorted(path.glob("Annotations/*.xml"))
        found = [read_voc_annotation(file, file.name, number, defects) for number, file in enumerate(files)]
        records = [record for record in found if record is not None]
        classes = sorted({entry.class_name for record in records for entry in record.objects})
    else:
        annotations = parse_coco(read_json(path, "COCO-style JSON, or a folder of VOC XML files"), str(path), defects)
        records, classes = annotations.images, list(dict.fromkeys(annotations.categories.values()))
    refuse_fractions(records, str(path))
    images = []
    for record in records:
        if record.width is None or record.height is None:
            defects.add("image without a width and a height: left out", record.name)
            continue
        boxes, labels = [], []
        for entry in record.objects:
            box = entry.inside(record.width, record.height, defects)
            if entry.crowd:
                defects.add("crowd region: left out", entry.place)
            elif box is not None:
                boxes.append(box)
                labels.append(classes.index(entry.class_name))
        array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        images.append(ImageObjects(record.width, record.height, array, np.array(labels, dtype=np.int64)))
    if not images:
        raise ValueError(f"{path}: expected annotations of images with a width and a height\n{defects.report()}")
    return images, classes, defects.report()


# ---------------------------------------------------------------------------------------------------------------------
# Generators

LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""The levels of the quantile tables."""
COUNT_RANGES = ((1, 1), (2, 2), (3, 5), (6, 12), (13, 10**9))
"""Images are grouped by their number of objects: the more, the smaller."""


# fmt: off
VOC_COUNTS = {
    1: 8726, 2: 4851, 3: 2516, 4: 1646, 5: 1066, 6: 756, 7: 498, 8: 394, 9: 254, 10: 209, 11: 115, 12: 102,
    13: 97, 14: 54, 15: 50, 16: 34, 17: 20, 18: 23, 19: 21, 20: 17, 21: 8, 22: 7, 23: 8, 24: 6, 25: 3, 26: 4,
    27: 2, 28: 2, 30: 1, 32: 3, 34: 1, 35: 1, 37: 2, 38: 1, 39: 1, 41: 1, 42: 2, 56: 1,
}
"""Number of objects -> number of images."""
VOC_SIDES = (
    (0.0416, 0.0852, 0.1702, 0.2506, 0.445, 0.6627, 0.827, 0.9283, 0.9699, 1.0, 1.0),
    (0.0257, 0.0555, 0.0997, 0.1444, 0.2817, 0.469, 0.6644, 0.823, 0.9074, 0.999, 1.0),
    (0.0208, 0.0393, 0.0625, 0.0852, 0.1549, 0.295, 0.4879, 0.6733, 0.7828, 0.9448, 1.0),
    (0.0118, 0.032, 0.047, 0.0602, 0.0982, 0.1756, 0.3108, 0.467, 0.5707, 0.7935, 1.0),
    (0.016, 0.0253, 0.0365, 0.0456, 0.0712, 0.1173, 0.1929, 0.2973, 0.3968, 0.6455, 1.0),
)
"""For each of `COUNT_RANGES`, the quantiles at `LEVELS` of sqrt(w * h / (W * H))."""
VOC_ASPECTS = (
    (0.1757, 0.2895, 0.4473, 0.556, 0.764, 0.998, 1.2939, 1.8658, 2.2916, 3.3639, 9.0159),
    (0.0675, 0.2106, 0.3074, 0.3882, 0.5521, 0.8224, 1.1334, 1.5962, 1.9819, 3.17, 9.6535),
    (0.049, 0.1691, 0.2435, 0.2963, 0.4446, 0.6901, 1.0682, 1.5714, 1.9752, 3.2265, 15.451),
    (0.0518, 0.1569, 0.2173, 0.2561, 0.3711, 0.5801, 0.9375, 1.4619, 1.8948, 3.1589, 14.88),
    (0.0609, 0.1356, 0.2027, 0.2378, 0.3449, 0.5397, 0.8657, 1.3333, 1.7238, 2.9979, 8.2424),
)
"""The same of (w / W) / (h / H)."""
# fmt: on


def draw_levels(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one in each of `count` equal parts, shuffled: even a small batch is representative."""
    return np.minimum((rng.permutation(count) + rng.random(count)) / max(count, 1), np.nextafter(1.0, 0.0))


def generate_voc(num_images: int, num_classes: int, rng: np.random.Generator) -> list[ImageObjects]:
    """Images of 500 x 375 pixels with VOC's counts, sizes and aspects."""
    values = np.array(list(VOC_COUNTS))
    below = np.cumsum(list(VOC_COUNTS.values())) / sum(VOC_COUNTS.values())
    images = []
    for count in values[np.searchsorted(below, draw_levels(num_images, rng), side="right")].tolist():
        group = next(index for index, (_, high) in enumerate(COUNT_RANGES) if count <= high)
        side = np.exp(np.interp(rng.random(count), LEVELS, np.log(VOC_SIDES[group])))
        aspect = np.exp(np.interp(rng.random(count), LEVELS, np.log(VOC_ASPECTS[group])))
        images.append(_place(side, aspect, num_classes, rng, (500, 375)))
    return images


def generate_coco(num_images: int, num_classes: int, rng: np.random.Generator) -> list[ImageObjects]:
    """Images of 640 x 480 pixels with COCO's mean count, and its shares of small, medium and large."""
    width, height = 640, 480
    normal = NormalDist(float(np.log(COCO_COUNT_MEDIAN)), COCO_COUNT_SPREAD)
    counts = np.exp([normal.inv_cdf(level) for level in draw_levels(num_images, rng).clip(1e-12).tolist()])
    images = []
    for count in counts.round().clip(1, COCO_COUNT_MAX).astype(np.int64).tolist():
        size_class = rng.choice(3, size=count, p=np.array(COCO_SIZE_SHARES) / sum(COCO_SIZE_SHARES))
        low, high = np.log(np.array(COCO_SIDES[:-1])), np.log(np.array(COCO_SIDES[1:]))
        side = np.exp(rng.uniform(low[size_class], high[size_class])) / np.sqrt(width * height)
        pixel_aspect = np.exp(rng.normal(np.log(COCO_ASPECT_MEDIAN), COCO_ASPECT_SPREAD, size=count))
        images.append(_place(side, pixel_aspect * height / width, num_classes, rng, (width, height)))
    return images


COCO_SIZE_SHARES = (0.4143, 0.3432, 0.2424)
COCO_SIDES = (6.0, 32.0, 96.0, 448.0)
"""Sides in pixels of 640 x 480 between which objects are small, medium and large."""
COCO_COUNT_MEDIAN, COCO_COUNT_SPREAD, COCO_COUNT_MAX = 4.5, 0.99, 93
COCO_ASPECT_MEDIAN, COCO_ASPECT_SPREAD = 0.82, 0.73


DENSE_COVERAGE = 0.6
DENSE_ASPECT = 0.75
"""Width over height, so that a grid of equal rows and columns has this share of cells."""


def generate_dense(
    num_images: int, objects_per_image: int, num_classes: int, rng: np.random.Generator
) -> list[ImageObjects]:
    """Images of 608 x 800 pixels packed with upright boxes on a jittered grid, objects_per_image in each."""
    width, height = 608, 800
    num_rows = max(1, round(np.sqrt(objects_per_image * DENSE_ASPECT * height / width)))
    num_columns = -(-objects_per_image // num_rows)
    cell_w, cell_h = width / num_columns, height / num_rows
    images = []
    for _ in range(num_images):
        cells = rng.permutation(num_rows * num_columns)[:objects_per_image]
        center_x = (cells % num_columns + 0.5 + rng.uniform(-0.1, 0.1, objects_per_image)) * cell_w
        center_y = (cells // num_columns + 0.5 + rng.uniform(-0.1, 0.1, objects_per_image)) * cell_h
        scale = np.sqrt(DENSE_COVERAGE) * np.exp(rng.normal(0, 0.15, size=(2, objects_per_image)))
        w, h = cell_w * scale[0], cell_h * scale[1]
        boxes = np.stack([center_x - w / 2, center_y - h / 2, center_x + w / 2, center_y + h / 2], axis=1)
        boxes = boxes.clip(0, [width, height, width, height]).astype(np.float32)
        labels = rng.integers(num_classes, size=objects_per_image)
        images.append(ImageObjects(width, height, boxes, labels))
    return images


def _place(
    side: NDArray[np.float64],
    aspect: NDArray[np.float64],
    num_classes: int,
    rng: np.random.Generator,
    size: tuple[int, int],
) -> ImageObjects:
    """Boxes of these relative sides and aspects, uniformly where they fit; an aspect that does not fit is cut."""
    side = side.clip(max=1.0)
    w = np.clip(side * np.sqrt(aspect), side**2, 1.0)
    h = side**2 / w
    x1, y1 = rng.random(len(side)) * (1 - w), rng.random(len(side)) * (1 - h)
    boxes = np.stack([x1, y1, x1 + w, y1 + h], axis=1) * np.array([*size, *size])
    labels = rng.integers(num_classes, size=len(side))
    return ImageObjects(*size, boxes.astype(np.float32), labels)
