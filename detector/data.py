"""Readers of folders laid out as VOC and COCO: images on disk, their objects, and the defects that were met."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from detector.annotations import (
    Defects,
    Identifier,
    ImageRecord,
    is_file,
    parse_coco,
    read_json,
    read_lines,
    read_voc_annotation,
    refuse_fractions,
)
from detector.images import IMAGE_SUFFIXES, DecodedImage, decode_image, place_annotation, read_image_size

__all__ = [
    "AnnotatedImage",
    "AnnotatedImages",
    "Defects",
    "LoadedImage",
    "decode_image",
    "load_image",
    "note_small_objects",
]
__all__ += ["default_splits", "read_coco", "read_data", "read_voc"]


@dataclass
class AnnotatedImage:
    """An image on disk and its G objects."""

    image_id: Identifier
    """COCO's id, or the position in a VOC split."""
    name: str
    """File name (COCO) or id (VOC), for messages."""
    path: Path
    width: int
    height: int
    """As annotated, in pixels; the file may be stored at another size (`detector.images.place_annotation`)."""
    boxes: Tensor
    """(G, 4) float32, (x1, y1, x2, y2) in pixels of the image as annotated."""
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
    category_ids: list[Identifier]
    """COCO's ids of the classes, which may leave gaps."""
    defects: Defects = field(default_factory=Defects)

    def num_objects(self) -> int:
        """How many there are to find or to learn; regions to ignore are none."""
        return sum(int((~image.crowd).sum()) for image in self.images)

    def summary(self) -> str:
        """Sizes and defects, to be printed once."""
        crowds = sum(int(image.crowd.sum()) for image in self.images)
        text = f"{self.name}: {len(self.images)} images, {self.num_objects()} objects, "
        text += f"{crowds} crowd regions, " if crowds else ""
        text += f"{len(self.class_names)} classes"
        return f"{text}\n{self.defects.report()}" if self.defects.found else text


class LoadedImage(NamedTuple):
    """An image's pixels, and its objects as they lie in them."""

    pixels: Tensor  # (3, H, W) uint8
    boxes: Tensor  # (G, 4) float32, in pixels of the image as decoded
    labels: Tensor  # (G,) int64
    crowd: Tensor  # (G,) bool
    notes: tuple[str, ...]


def load_image(annotated: AnnotatedImage, decoded: DecodedImage) -> LoadedImage | None:
    """Brings pixels and objects together; None where nobody can tell where in the image the objects are."""
    height, width = decoded.pixels.shape[-2:]
    placement = place_annotation((annotated.width, annotated.height), (width, height), decoded.orientation)
    if placement is None:
        return None
    boxes = placement.to_image(annotated.boxes)
    notes = decoded.notes + placement.notes
    return LoadedImage(decoded.pixels, boxes, annotated.labels, annotated.crowd, notes)


def note_small_objects(data: AnnotatedImages, image_size: int) -> None:
    """Counts the objects that are smaller than a pixel of the network's square input, from which nothing is learned."""
    for image in data.images:
        sides = (image.boxes[:, 2:] - image.boxes[:, :2]) * image_size / torch.tensor([image.width, image.height])
        for position in ((sides < 1).any(1) & ~image.crowd).nonzero().squeeze(1).tolist():
            kind = f"object under a pixel of the input of {image_size}: not trained on unless augmentation enlarges it"
            data.defects.add(kind, f"{image.name} object {position}")


def read_voc(root: Path, split: str, class_names: Sequence[str] | None = None) -> AnnotatedImages:
    """A split of a folder laid out as PASCAL VOC: Annotations, JPEGImages, ImageSets/Main.

    The image of an annotation is the file in JPEGImages that has its name; of several the one that `<filename>` names.

    Args:
        root: that folder, or one above VOC2007 and VOC2012.
        split: the name of a list in ImageSets/Main; "VOC2007/trainval+VOC2012/trainval" joins the lists of two folders.
        class_names: the classes to read, in this order; without them all that occur, in alphabetical order.

    Raises:
        ValueError: a list is missing; the message says which there are.
    """
    defects = Defects()
    found: dict[str, tuple[ImageRecord, str, Path]] = {}
    listed: set[tuple[Path, str]] = set()
    for part in split.split("+"):
        folder, _, list_name = part.rpartition("/")
        base = root / folder
        list_file = base / "ImageSets" / "Main" / f"{list_name}.txt"
        if not list_file.is_file():
            lists = sorted(path.relative_to(root).as_posix() for path in root.glob("**/ImageSets/Main/*.txt"))
            raise ValueError(
                f"No split {part!r} in {root}: there is no file {list_file}. Lists found: {lists[:20] or 'none'}"
            )
        image_files = _files_by_stem(base / "JPEGImages")
        for line in read_lines(list_file):
            name = _listed_name(line, base)
            place = f"{folder}/{name}" if folder else name
            if (base, name) in listed:
                defects.add("image listed twice: the second skipped", place)
                continue
            listed.add((base, name))
            record = read_voc_annotation(base / "Annotations" / f"{name}.xml", place, len(found), defects)
            if record is None:
                continue
            path = _voc_image_file(name, record, base / "JPEGImages", image_files, place, defects)
            if path is None:
                defects.add("image file missing: skipped", place)
                continue
            # Two folders may have images of one name.
            unique = name if name not in found else place
            found[unique] = record, unique, path
    if class_names is None:
        class_names = sorted({entry.class_name for record, _, _ in found.values() for entry in record.objects})
    refuse_fractions((record for record, _, _ in found.values()), str(root))
    return _annotated_images(root, split, found.values(), class_names, list(range(1, len(class_names) + 1)), defects)


def _listed_name(line: str, base: Path) -> str:
    """The image of a line of a split: all of it, but for the flag of VOC's lists of one class, or an image's suffix."""
    stem = line[: -len(Path(line).suffix)] if Path(line).suffix.lower() in IMAGE_SUFFIXES else line
    flag = re.fullmatch(r"(.*\S)\s+(-1|0|1)", line)
    candidates = [line, stem, *([flag[1]] if flag else [])]
    return next((name for name in candidates if is_file(base / "Annotations" / f"{name}.xml")), line)


def _files_by_stem(folder: Path) -> dict[str, list[Path]]:
    """The image files of a folder and those below it, by their path without suffix."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            files.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    return files


def _voc_image_file(
    name: str, record: ImageRecord, folder: Path, image_files: dict[str, list[Path]], place: str, defects: Defects
) -> Path | None:
    """The image of an annotation, or None."""
    of_name = [path for path in image_files.get(name, []) if is_file(path)]
    named = folder / record.file_name if record.file_name else None
    if named is not None and (named in of_name or (not of_name and is_file(named))):
        return named
    if len(of_name) > 1:
        defects.add(f"several image files of one name: {of_name[0].suffix} taken", place)
    elif of_name and named is not None and is_file(named):
        defects.add("annotation that names another image: the image of its own name taken", place)
    return of_name[0] if of_name else None


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
    content = read_json(annotation_file, "COCO's images, annotations and categories")
    annotations = parse_coco(content, str(annotation_file), defects)
    refuse_fractions(annotations.images, str(annotation_file))

    id_of: dict[str, Identifier] = {}
    for category_id, name in annotations.categories.items():
        id_of.setdefault(name, category_id)
    if class_names is None:
        class_names = list(id_of)
    next_id = max((key for key in annotations.categories if isinstance(key, int)), default=0) + 1
    for class_name in class_names:  # a class this file does not know still needs an id of its own
        if class_name not in id_of:
            id_of[class_name], next_id = next_id, next_id + 1

    folders = [root / split, root / "images" / split, root / "images", root / "JPEGImages"]
    folders += [annotation_file.parent, root]
    found: dict[Path, tuple[ImageRecord, str, Path]] = {}
    ambiguous: set[Path] = set()
    for record in annotations.images:
        if record.file_name is None:
            defects.add("image without a file name: skipped", record.name)
            continue
        # One file is one path, also where a name goes up and down again (../train/a.jpg).
        places = (Path(os.path.normpath(folder / record.file_name)) for folder in folders)
        path = next((place for place in places if is_file(place)), None)
        if path is None:
            defects.add("image file missing: skipped", record.name)
        elif path not in found:
            found[path] = record, record.name, path
        elif _same_objects(found[path][0], record):
            defects.add("image listed twice: the second skipped", f"{record.name} (id {record.image_id})")
        else:
            ambiguous.add(path)
            defects.add("image listed twice with other objects: left out", record.name)
    usable = [entry for path, entry in found.items() if path not in ambiguous]
    return _annotated_images(root, split, usable, class_names, [id_of[name] for name in class_names], defects)


def _same_objects(one: ImageRecord, other: ImageRecord) -> bool:
    return sorted((entry.class_name, entry.box, entry.crowd) for entry in one.objects) == sorted(
        (entry.class_name, entry.box, entry.crowd) for entry in other.objects
    )


def _annotated_images(
    root: Path,
    split: str,
    found: Iterable[tuple[ImageRecord, str, Path]],
    class_names: Sequence[str],
    category_ids: list[Identifier],
    defects: Defects,
) -> AnnotatedImages:
    """The records with their objects checked and labeled; found holds (record, name, image file)."""
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    images = []
    for record, name, path in found:
        size = record.width, record.height
        if size[0] is None or size[1] is None:
            size = read_image_size(path) or (None, None)
            kind = "annotation without the image's size: read from the image"
            defects.add(kind if size[0] is not None else "image that cannot be decoded: skipped", name)
        width, height = size
        if width is None or height is None:
            continue
        kept = []
        for entry in record.objects:
            if entry.class_name not in label_of:
                defects.add(f"object of the unknown class {entry.class_name!r}: left out", entry.place)
            elif (box := entry.inside(width, height, defects)) is not None:
                kept.append((entry, box))
        if all(entry.crowd for entry, _ in kept):
            kind = "image with nothing but crowd regions" if kept else "image without objects: kept as background"
            defects.add(kind, name)
        images.append(
            AnnotatedImage(
                record.image_id,
                name,
                path,
                width,
                height,
                torch.tensor([box for _, box in kept], dtype=torch.float32).reshape(-1, 4),
                torch.tensor([label_of[entry.class_name] for entry, _ in kept], dtype=torch.int64),
                torch.tensor([entry.crowd for entry, _ in kept], dtype=torch.bool),
                torch.tensor([entry.difficult for entry, _ in kept], dtype=torch.bool),
                torch.tensor(
                    [entry.area or (box[2] - box[0]) * (box[3] - box[1]) for entry, box in kept], dtype=torch.float32
                ),
            )
        )
    if not images:
        raise ValueError(f"{root}: no usable image in split {split!r}\n{defects.report()}")
    if not class_names:
        raise ValueError(f"{root}: no object of any class in split {split!r}\n{defects.report()}")
    return AnnotatedImages(split, images, list(class_names), category_ids, defects)


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
