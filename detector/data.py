"""Readers of VOC and COCO folders, and the defects they met.

Boxes are (x1, y1, x2, y2) in pixels of the image as stored, x2 and y2 exclusive: a VOC box, whose 1-based corners are
both inside, becomes (xmin - 1, ymin - 1, xmax, ymax).
"""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from detector.images import IMAGE_SUFFIXES, read_image_size


class Defects:
    """What was found wrong with a data set: kinds of defects, and where each was met, once each."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, None]] = {}

    def add(self, kind: str, where: str) -> bool:
        """Whether this is news."""
        places = self.found.setdefault(kind, {})
        is_new = where not in places
        places[where] = None
        return is_new

    def counts(self) -> dict[str, int]:
        """How many places each kind was met at."""
        return {kind: len(places) for kind, places in self.found.items()}

    def report(self) -> str:
        """One line a kind, with its first places."""
        lines = []
        for kind, places in self.found.items():
            shown = ", ".join(list(places)[:3]) + (", ..." if len(places) > 3 else "")
            lines.append(f"  {len(places)} x {kind} ({shown})")
        return "\n".join(lines)


@dataclass
class AnnotatedImage:
    """An image on disk and its G objects."""

    image_id: int
    """COCO's id, or the position in a VOC split."""
    name: str
    """File name (COCO) or id (VOC), for messages."""
    path: Path
    width: int
    height: int
    boxes: Tensor
    """(G, 4) float32, (x1, y1, x2, y2) in pixels."""
    labels: Tensor
    """(G,) int64, in [0, C)."""
    crowd: Tensor
    """(G,) bool: a region to ignore, not an object."""
    difficult: Tensor
    """(G,) bool: trained on, but neither asked for nor punished in evaluation."""
    areas: Tensor
    """(G,) float32, in pixels: COCO's annotated area, by which it splits small, medium and large; else the box's."""


@dataclass
class AnnotatedImages:
    """A split of a data set."""

    name: str
    images: list[AnnotatedImage]
    class_names: list[str]
    """The classes in the order of the labels, and of `category_ids`."""
    category_ids: list[int]
    """COCO's ids of the classes, which may leave gaps."""
    defects: Defects = field(default_factory=Defects)

    def summary(self) -> str:
        """Sizes and defects, to be printed once."""
        objects = sum(len(image.labels) for image in self.images)
        text = f"{self.name}: {len(self.images)} images, {objects} objects, {len(self.class_names)} classes"
        return f"{text}\n{self.defects.report()}" if self.defects.found else text


class ObjectList:
    """Collects the objects of one image, refusing and counting what is not one."""

    def __init__(self, name: str, width: int, height: int, defects: Defects) -> None:
        self.name, self.width, self.height, self.defects = name, width, height, defects
        self.rows: list[tuple[list[float], int, bool, bool, float]] = []

    def add(
        self, number: int, box: Sequence[float], label: int, crowd: bool, difficult: bool, area: float | None
    ) -> None:
        """Takes an object (x1, y1, x2, y2) in pixels, clipped to the image, or counts why not."""
        where = f"{self.name} object {number}"
        if not all(math.isfinite(value) for value in box):
            self.defects.add("object with a coordinate that is not a number: left out", where)
            return
        clipped = [
            min(max(box[0], 0.0), self.width),
            min(max(box[1], 0.0), self.height),
            min(max(box[2], 0.0), self.width),
            min(max(box[3], 0.0), self.height),
        ]
        if box[2] <= box[0] or box[3] <= box[1] or clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            self.defects.add("object without area inside its image: left out", where)
            return
        if max(abs(a - b) for a, b in zip(clipped, box, strict=True)) > 1:
            self.defects.add("box reaching out of its image by over a pixel: clipped", where)
        if area is None or not math.isfinite(area) or area <= 0:
            area = (clipped[2] - clipped[0]) * (clipped[3] - clipped[1])
        self.rows.append((clipped, label, crowd, difficult, area))

    def image(self, image_id: int, path: Path) -> AnnotatedImage:
        """The image with the objects taken."""
        if not any(not crowd for _, _, crowd, _, _ in self.rows):
            self.defects.add("image without objects: kept as background", self.name)
        return AnnotatedImage(
            image_id,
            self.name,
            path,
            self.width,
            self.height,
            torch.tensor([row[0] for row in self.rows], dtype=torch.float32).reshape(-1, 4),
            torch.tensor([row[1] for row in self.rows], dtype=torch.int64),
            torch.tensor([row[2] for row in self.rows], dtype=torch.bool),
            torch.tensor([row[3] for row in self.rows], dtype=torch.bool),
            torch.tensor([row[4] for row in self.rows], dtype=torch.float32),
        )


def read_voc(root: Path, split: str, class_names: Sequence[str] | None = None) -> AnnotatedImages:
    """A split of a folder laid out as PASCAL VOC: Annotations, JPEGImages, ImageSets/Main.

    Args:
        root: that folder, or one above VOC2007 and VOC2012.
        split: the name of a list in ImageSets/Main; "VOC2007/trainval+VOC2012/trainval" joins the lists of two folders.
        class_names: the classes to read, in this order; without them all that occur, in alphabetical order.

    Raises:
        ValueError: a list is missing; the message says which there are.
    """
    defects = Defects()
    parsed: list[tuple[str, Path, int, int, list[tuple[int, str, list[float], bool]]]] = []
    for part in split.split("+"):
        folder, _, list_name = part.rpartition("/")
        base = root / folder
        list_file = base / "ImageSets" / "Main" / f"{list_name}.txt"
        if not list_file.is_file():
            lists = sorted(path.relative_to(root).as_posix() for path in root.glob("**/ImageSets/Main/*.txt"))
            raise ValueError(
                f"No split {part!r} in {root}: there is no file {list_file}. Lists found: {lists[:20] or 'none'}"
            )
        for line in list_file.read_text().splitlines():
            if not line.strip():
                continue
            name = line.split()[0]
            annotation = base / "Annotations" / f"{name}.xml"
            try:
                tree = ElementTree.parse(annotation).getroot()
            except OSError:
                defects.add("image without an annotation file: skipped", name)
                continue
            except ElementTree.ParseError:
                defects.add("annotation file that is not XML: image skipped", name)
                continue
            candidates = [base / "JPEGImages" / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES]
            candidates.append(base / "JPEGImages" / (tree.findtext("filename") or name))
            path = next((path for path in candidates if path.is_file()), None)
            if path is None:
                defects.add("image file missing: skipped", name)
                continue
            size = (_number(tree.findtext("size/width")), _number(tree.findtext("size/height")))
            if not (size[0] >= 1 and size[1] >= 1):  # also NaN
                defects.add("annotation without the image's size: read from the image", name)
                size = read_image_size(path) or (0, 0)
                if size == (0, 0):
                    defects.add("image that cannot be decoded: skipped", name)
                    continue
            objects = []
            for number, element in enumerate(tree.findall("object")):
                class_name, box = (element.findtext("name") or "").strip(), element.find("bndbox")
                if not class_name or box is None:
                    defects.add("object without a name or a box: left out", f"{name} object {number}")
                    continue
                x1, y1, x2, y2 = (_number(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
                if x2 <= x1 or y2 <= y1:
                    # Corners that coincide are a slip of the mouse, not a box of one pixel.
                    defects.add("object without area inside its image: left out", f"{name} object {number}")
                    continue
                difficult = (element.findtext("difficult") or "0").strip() == "1"
                objects.append((number, class_name, [x1 - 1, y1 - 1, x2, y2], difficult))
            parsed.append((name, path, int(size[0]), int(size[1]), objects))
    if class_names is None:
        class_names = sorted({class_name for *_, objects in parsed for _, class_name, _, _ in objects})
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    images = []
    for name, path, width, height, objects in parsed:
        collected = ObjectList(name, width, height, defects)
        for number, class_name, box, difficult in objects:
            if class_name not in label_of:
                defects.add(f"object of the unknown class {class_name!r}: left out", f"{name} object {number}")
                continue
            collected.add(number, box, label_of[class_name], False, difficult, None)
        images.append(collected.image(len(images), path))
    return _checked(
        AnnotatedImages(split, images, list(class_names), list(range(1, len(class_names) + 1)), defects), root
    )


def _number(text: str | None) -> float:
    try:
        return float(text) if text is not None else math.nan
    except ValueError:
        return math.nan


def read_coco(root: Path, split: str, class_names: Sequence[str] | None = None) -> AnnotatedImages:
    """A split of a folder laid out as COCO.

    Args:
        root: the folder of images and annotations.
        split: "train2017" and the like, whose annotations are annotations/instances_train2017.json (or in a folder
            `coco`, or the split's own folder) and whose images lie in train2017, images/train2017, images or
            JPEGImages; or the path of an annotation file in root.
        class_names: the classes to read, in this order; without them all categories, by their ids.

    Raises:
        ValueError: no annotation file, or one that is not COCO's; the message says what was tried.
    """
    defects = Defects()
    tried = [
        root / split,
        root / "annotations" / f"instances_{split}.json",
        root / "annotations" / f"{split}.json",
        root / "coco" / f"instances_{split}.json",
        root / split / "_annotations.coco.json",
        root / f"{split}.json",
    ]
    annotation_file = next((path for path in tried if path.is_file()), None)
    if annotation_file is None:
        raise ValueError(f"No split {split!r} in {root}: none of these files is there: {', '.join(map(str, tried))}")
    try:
        content = json.loads(annotation_file.read_text())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        listed_images, annotations = content["images"], content["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{annotation_file}: expected COCO's images, annotations and categories, got {error!r}"
        ) from error

    name_of = {category["id"]: category["name"] for category in categories}
    if class_names is None:
        class_names = [category["name"] for category in categories]
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    id_of = {name: category_id for category_id, name in name_of.items()}
    next_id = max(name_of, default=0) + 1
    category_ids = []
    for class_name in class_names:  # a class this file does not know still needs an id of its own
        if class_name not in id_of:
            id_of[class_name], next_id = next_id, next_id + 1
        category_ids.append(id_of[class_name])

    folders = [
        root / split,
        root / "images" / split,
        root / "images",
        root / "JPEGImages",
        annotation_file.parent,
        root,
    ]
    collected: dict[int, tuple[ObjectList, Path]] = {}
    skipped: set[int] = set()
    for entry in listed_images:
        name, image_id = str(entry["file_name"]), entry["id"]
        if image_id in collected:
            defects.add("image listed twice: the second skipped", name)
            continue
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            defects.add("image file missing: skipped", name)
            skipped.add(image_id)
            continue
        width, height = entry.get("width") or 0, entry.get("height") or 0
        if width < 1 or height < 1:
            defects.add("annotation without the image's size: read from the image", name)
            width, height = read_image_size(path) or (0, 0)
            if (width, height) == (0, 0):
                defects.add("image that cannot be decoded: skipped", name)
                skipped.add(image_id)
                continue
        collected[image_id] = ObjectList(name, int(width), int(height), defects), path
    for annotation in annotations:
        where = f"annotation {annotation.get('id')}"
        image_id, box, category = annotation.get("image_id"), annotation.get("bbox"), annotation.get("category_id")
        if image_id not in collected:
            if image_id not in skipped:
                defects.add("annotation of an image that is not listed: left out", where)
            continue
        class_name = name_of.get(category)
        if class_name not in label_of:
            defects.add(f"object of the unknown class {class_name or category!r}: left out", where)
            continue
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
            defects.add("object without a name or a box: left out", where)
            continue
        x, y, width, height = (float(value) for value in box)
        collected[image_id][0].add(
            annotation.get("id", -1),
            [x, y, x + width, y + height],
            label_of[class_name],
            bool(annotation.get("iscrowd", 0)),
            bool(annotation.get("ignore", 0)) or bool(annotation.get("difficult", 0)),
            annotation.get("area"),
        )
    images = [objects.image(image_id, path) for image_id, (objects, path) in collected.items()]
    return _checked(AnnotatedImages(split, images, list(class_names), category_ids, defects), root)


def _checked(data: AnnotatedImages, root: Path) -> AnnotatedImages:
    if not data.images:
        raise ValueError(f"{root}: no usable image in split {data.name!r}\n{data.defects.report()}")
    if not data.class_names:
        raise ValueError(f"{root}: no object of any class in split {data.name!r}\n{data.defects.report()}")
    return data


def read_data(root: Path, layout: str, split: str, class_names: Sequence[str] | None = None) -> AnnotatedImages:
    """`read_voc` or `read_coco`, by layout "voc" or "coco"."""
    if not root.is_dir():
        raise ValueError(f"--data: expected a folder, and there is no folder {root}")
    return read_voc(root, split, class_names) if layout == "voc" else read_coco(root, split, class_names)


def default_splits(root: Path, layout: str) -> tuple[str, str]:
    """The splits to train and to evaluate on where none are asked for; for VOC and COCO themselves the paper's."""
    if layout == "voc" and (root / "VOC2007").is_dir():
        return (
            "VOC2007/trainval+VOC2012/trainval" if (root / "VOC2012").is_dir() else "VOC2007/trainval"
        ), "VOC2007/test"
    if layout == "coco" and (root / "annotations" / "instances_val2017.json").is_file():
        return "train2017", "val2017"
    return "train", "val"
