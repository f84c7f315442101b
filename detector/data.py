"""Data sets in folders, as labeling tools export them: images on disk, their objects, and the defects that were met."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detector.annotations import (
    Defects,
    Identifier,
    ImageRecord,
    as_name,
    is_file,
    parse_coco,
    read_json,
    read_lines,
    read_voc_annotation,
    read_yolo_labels,
    refuse_fractions,
)
from detector.images import IMAGE_SUFFIXES, DecodedImage, decode_image, place_annotation, read_image_size

__all__ = ["AnnotatedImage", "AnnotatedImages", "Defects", "LoadedImage", "decode_image", "default_splits", "hold_out"]
__all__ += ["load_image", "note_small_objects", "read_coco", "read_data", "read_voc", "read_yolo", "recognize_format"]


@dataclass
class AnnotatedImage:
    """An image on disk and its G objects."""

    image_id: Identifier
    """COCO's id, or the position in a split."""
    name: str
    """Its name in the data set, for messages."""
    path: Path
    width: int
    height: int
    """As annotated, in pixels; the file may be stored at another size (`detector.images.place_annotation`)."""
    boxes: Tensor  # (G, 4) float32, (x1, y1, x2, y2) in pixels of the image as annotated
    labels: Tensor  # (G,) int64, in [0, C)
    crowd: Tensor  # (G,) bool: a region to ignore, not an object
    difficult: Tensor  # (G,) bool: trained on, but neither asked for nor punished in evaluation
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
    kind = f"object under a pixel of the input of {image_size}: not trained on unless augmentation enlarges it"
    for image in data.images:
        sides = (image.boxes[:, 2:] - image.boxes[:, :2]) * image_size / torch.tensor([image.width, image.height])
        for position in ((sides < 1).any(1) & ~image.crowd).nonzero().squeeze(1).tolist():
            data.defects.add(kind, f"{image.name} object {position}")


def hold_out(data: AnnotatedImages, fraction: float, seed: int) -> tuple[AnnotatedImages, AnnotatedImages]:
    """Parts a split in two, the second with this fraction of its images; seeded, and stratified by class.

    Each image counts for the rarest of its classes, so that rare ones come to both parts.
    """
    labels = [image.labels[~image.crowd] for image in data.images]
    frequency = torch.cat(labels).bincount(minlength=len(data.class_names))
    stratum = [int(of[frequency[of].argmin()]) if len(of) else -1 for of in labels]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda position: stratum[position])
    held = {position for place, position in enumerate(order) if int((place + 1) * fraction) > int(place * fraction)}
    if not 0 < len(held) < len(labels):
        raise ValueError(f"--val-fraction {fraction:g} of {len(labels)} images leaves one part empty")
    names = [image.name for position, image in enumerate(data.images) if position in held]
    return leave_out(data, names), select_images(data, names)


def select_images(data: AnnotatedImages, names: Sequence[str]) -> AnnotatedImages:
    """The images of a split with these names, as a split of its own."""
    images = [image for image in data.images if image.name in set(names)]
    return replace(data, name=f"{data.name}, held out", images=images, defects=Defects())


def leave_out(data: AnnotatedImages, names: Sequence[str]) -> AnnotatedImages:
    """A split without the images with these names."""
    images = [image for image in data.images if image.name not in set(names)]
    return replace(data, name=f"{data.name}, without what is held out", images=images)


# ---------------------------------------------------------------------------------------------------------------------
# Splits: where the images and the annotations of each format lie

ALL = "all"
"""The split of a folder that has none."""
TRAIN_SPLITS = ("train", "training", "trainval", "default", ALL)
EVAL_SPLITS = ("val", "valid", "validation", "test")
IMAGE_FOLDERS = ("JPEGImages", "images")


def child(folder: Path, name: str) -> Path:
    """What is below a folder by this name, whatever the case of its letters; as given where there is nothing."""
    for part in Path(name).parts:
        if not os.path.exists(folder / part) and folder.is_dir():  # noqa: PTH110  # no name makes it raise
            part = next((path.name for path in folder.iterdir() if path.name.lower() == part.lower()), part)
        folder = folder / part
    return folder


def first_folder(folder: Path, *names: str) -> Path:
    """The first of these folders below a folder that is there; else the folder itself."""
    return next((place for name in names if (place := child(folder, name)).is_dir()), folder)


def files_below(folder: Path, *suffixes: str) -> list[Path]:
    """Its files, and those of folders in it, with one of these suffixes (in lower case)."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)


def annotation_file(path: Path) -> Path:
    """The path, or the same with its suffix in upper case where only that is a file."""
    upper = path.with_suffix(path.suffix.upper())
    return upper if not is_file(path) and is_file(upper) else path


class VocSplit(NamedTuple):
    """Names of images, and the folders of their annotations and files."""

    names: list[str]
    annotations: Path
    images: Path


def _find_voc(base: Path, split: str) -> VocSplit | None:
    """A list in ImageSets/Main; or a folder with annotations, images in it or beside it; or all annotations."""
    list_file, annotations = child(base, f"ImageSets/Main/{split}.txt"), first_folder(base, "Annotations")
    if list_file.is_file():
        names = [_listed_name(line, annotations) for line in read_lines(list_file)]
        return VocSplit(names, annotations, first_folder(base, *IMAGE_FOLDERS))
    folder = base if split == ALL else child(base, split)
    places = [(first_folder(folder, "Annotations"), first_folder(folder, *IMAGE_FOLDERS))]
    if split != ALL:
        places.append((child(annotations, split), child(first_folder(base, *IMAGE_FOLDERS), split)))
    for xml_folder, images in places:
        names = [path.relative_to(xml_folder).with_suffix("").as_posix() for path in files_below(xml_folder, ".xml")]
        if names:
            return VocSplit(names, xml_folder, images)
    return None


def _find_coco(root: Path, split: str) -> Path | None:
    """The annotation file of a split."""
    names = [split, f"annotations/instances_{split}.json", f"annotations/{split}.json", f"coco/instances_{split}.json"]
    names += [f"{split}/_annotations.coco.json", f"{split}.json"]
    found = next((place for name in names if (place := child(root, name)).is_file()), None)
    if found is None:
        # train_annotations.json, annotations_train.json; or, of a folder without splits, its only file.
        files = [path for folder in (root, child(root, "annotations")) for path in folder.glob("*.json")]
        files = [path for path in files if split == ALL or split in re.split("[^a-z0-9]+", path.stem.lower())]
        files = [
            path for path in files if b'"annotations"' in (content := path.read_bytes()) and b'"images"' in content
        ]
        found = files[0] if len(files) == 1 else None
    return found


def _read_yolo_config(root: Path) -> dict[str, Any] | None:
    """What data.yaml says, or obj.names or classes.txt in its place; the names of the classes under "names"."""
    for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        import yaml

        try:
            content = yaml.safe_load(path.read_bytes())
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: expected YAML: {' '.join(str(error).split())}") from None
        if isinstance(content, dict) and "names" in content:
            names = content["names"]
            names = [names[key] for key in sorted(names)] if isinstance(names, dict) else names
            if not isinstance(names, list) or not all(as_name(name) for name in names):
                raise ValueError(f"{path}: names: expected a list of class names, got {names!r}")
            return {**content, "names": [as_name(name) for name in names]}
    found = next((path for name in ("obj.names", "classes.txt") if (path := child(root, name)).is_file()), None)
    return {"names": read_lines(found)} if found is not None else None


def _find_yolo(root: Path, config: dict[str, Any], split: str) -> list[Path] | None:
    """The images of a split: what data.yaml says, or a list, or a folder."""
    bases = [root / str(config.get("path") or "."), root]

    def resolve(entry: object, *folders: Path) -> Path | None:
        name = str(entry).strip().replace("\\", "/")
        # Roboflow writes ../train/images where it means train/images, CVAT data/obj_train_data.
        names = [name, re.sub(r"^((\.\./|\./)+|data/)", "", name)]
        places = [child(folder, name) for folder in folders for name in names]
        return next((place for place in places if place.exists()), None)

    given = config.get(split)
    entries = given if isinstance(given, list) else [given] if given else []
    fallback = ["images", "obj_train_data"] if split == ALL else [f"{split}.txt", f"images/{split}", f"{split}/images"]
    places = [place for entry in entries if (place := resolve(entry, *bases)) is not None]
    places = places or [place for entry in fallback if (place := resolve(entry, root)) is not None][:1]
    images: list[Path] = []
    for place in places:
        if place.is_dir():
            images += files_below(place, *IMAGE_SUFFIXES)
        else:
            images += [resolve(line, place.parent, *bases) or root / line for line in read_lines(place)]
    return images or None


def has_split(root: Path, layout: str, split: str) -> bool:
    """Whether a folder has a split."""
    if layout == "coco":
        return _find_coco(root, split) is not None
    if layout == "yolo":
        return _find_yolo(root, _read_yolo_config(root) or {}, split) is not None
    parts = (part.rpartition("/") for part in split.split("+"))
    return all(_find_voc(child(root, folder), name) is not None for folder, _, name in parts)


FORMATS = ("auto", "voc", "coco", "yolo")


def recognize_format(root: Path, layout: str = "auto") -> str:
    """ "voc", "coco" or "yolo", by the files in a folder, unless `layout` is one of these.

    Raises:
        ValueError: there is no such folder, or it looks like none of them or several.
    """
    if not root.is_dir():
        hint = f"; pass {root.parent}, which holds this file" if root.is_file() else ""
        raise ValueError(f"--data: expected a folder, and there is no folder {root}{hint}")
    if layout != "auto":
        return layout
    splits = (*TRAIN_SPLITS, *EVAL_SPLITS, "train2017", "val2017")
    found = ["coco"] if any(_find_coco(root, split) for split in splits) else []
    found += ["yolo"] if _read_yolo_config(root) is not None else []
    has_lists = any(child(place, "ImageSets/Main").is_dir() for place in (root, *root.glob("VOC2*")))
    found += ["voc"] if has_lists or (not found and any(_find_voc(root, split) for split in splits)) else []
    if len(found) != 1:
        looks = f"looks like {' and '.join(found)}" if found else "has annotations of none of them"
        raise ValueError(f"--data: expected a folder laid out as VOC, COCO or YOLO, and {root} {looks}; pass --format")
    return found[0]


def default_splits(root: Path, layout: str) -> tuple[str, str]:
    """The splits to train and to evaluate on where none are asked for; for VOC and COCO themselves the paper's."""
    if layout == "voc" and (root / "VOC2007").is_dir():
        joined = "VOC2007/trainval+VOC2012/trainval" if (root / "VOC2012").is_dir() else "VOC2007/trainval"
        return joined, "VOC2007/test"
    if layout == "coco" and (root / "annotations" / "instances_val2017.json").is_file():
        return "train2017", "val2017"

    def first(splits: tuple[str, ...]) -> str:
        return next((split for split in splits if has_split(root, layout, split)), splits[0])

    return first(TRAIN_SPLITS), first(EVAL_SPLITS)


# ---------------------------------------------------------------------------------------------------------------------
# Readers


def read_voc(root: Path, split: str, class_names: Sequence[str] | None = None) -> AnnotatedImages:
    """A split of a folder laid out as PASCAL VOC: Annotations, JPEGImages, ImageSets/Main; or images beside their XML.

    The image of an annotation is the file that has its name; of several the one that `<filename>` names.

    Args:
        root: that folder, or one above VOC2007 and VOC2012.
        split: the name of a list in ImageSets/Main; "VOC2007/trainval+VOC2012/trainval" joins the lists of two folders.
            Without lists, the name of a folder, or "all".
        class_names: the classes to read, in this order; without them all that occur, in alphabetical order.

    Raises:
        ValueError: a list is missing; the message says which there are.
    """
    defects = Defects()
    found: dict[str, tuple[ImageRecord, str, Path]] = {}
    listed: set[tuple[Path, str]] = set()
    for part in split.split("+"):
        folder, _, list_name = part.rpartition("/")
        base = child(root, folder)
        here = _find_voc(base, list_name)
        if here is None:
            lists = sorted(path.relative_to(root).as_posix() for path in root.glob("**/ImageSets/Main/*.txt"))
            list_file = base / "ImageSets" / "Main" / f"{list_name}.txt"
            raise ValueError(
                f"No split {part!r} in {root}: there is no file {list_file}. Lists found: {lists[:20] or 'none'}"
            )
        image_files: dict[str, list[Path]] = {}
        for path in files_below(here.images, *IMAGE_SUFFIXES):
            image_files.setdefault(path.relative_to(here.images).with_suffix("").as_posix(), []).append(path)
        for name in here.names:
            place = f"{folder}/{name}" if folder else name
            if (base, name) in listed:
                defects.add("image listed twice: the second skipped", place)
                continue
            listed.add((base, name))
            record = read_voc_annotation(annotation_file(here.annotations / f"{name}.xml"), place, len(found), defects)
            if record is None:
                continue
            file = _voc_image_file(name, record, here.images, image_files, place, defects)
            if file is None:
                defects.add("image file missing: skipped", place)
                continue
            # Two folders may have images of one name.
            unique = name if name not in found else place
            found[unique] = record, unique, file
    if class_names is None:
        class_names = sorted({entry.class_name for record, _, _ in found.values() for entry in record.objects})
    refuse_fractions((record for record, _, _ in found.values()), str(root))
    return _annotated_images(root, split, found.values(), class_names, list(range(1, len(class_names) + 1)), defects)


def _listed_name(line: str, annotations: Path) -> str:
    """The image of a line of a split: all of it, but for the flag of VOC's lists of one class, or an image's suffix."""
    stem = line[: -len(Path(line).suffix)] if Path(line).suffix.lower() in IMAGE_SUFFIXES else line
    flag = re.fullmatch(r"(.*\S)\s+(-1|0|1)", line)
    candidates = [line, stem, *([flag[1]] if flag else [])]
    return next((name for name in candidates if is_file(annotation_file(annotations / f"{name}.xml"))), line)


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
            `coco`, or the split's own folder) and whose images lie in train2017, images/train2017, images, JPEGImages
            or data; or the path of an annotation file in root.
        class_names: the classes to read, in this order; without them all categories, by their ids.

    Raises:
        ValueError: no annotation file, or one that is not COCO's; the message says what was looked for.
    """
    defects = Defects()
    annotation_file = _find_coco(root, split)
    if annotation_file is None:
        raise ValueError(
            f"No split {split!r} in {root}: expected {root}/annotations/instances_{split}.json, "
            f"{root}/{split}/_annotations.coco.json or one JSON file named after it"
        )
    content = read_json(annotation_file, "COCO's images, annotations and categories")
    annotations = parse_coco(content, str(annotation_file), defects)
    refuse_fractions(annotations.images, str(annotation_file))

    id_of: dict[str, Identifier] = {}
    for category_id, name in annotations.categories.items():
        id_of.setdefault(name, category_id)
    class_names = list(id_of) if class_names is None else class_names
    next_id = max((key for key in annotations.categories if isinstance(key, int)), default=0) + 1
    for class_name in class_names:  # a class this file does not know still needs an id of its own
        if class_name not in id_of:
            id_of[class_name], next_id = next_id, next_id + 1

    folders = [child(root, name) for name in (split, f"images/{split}", "images", "JPEGImages", "data")]
    folders += [annotation_file.parent, root]
    found: dict[Path, tuple[ImageRecord, str, Path]] = {}
    ambiguous: set[Path] = set()
    for record in annotations.images:
        if record.file_name is None:
            defects.add("image without a file name: skipped", record.name)
            continue
        # One file is one path, also where a name goes up and down again (../train/a.jpg).
        names = [record.file_name, record.file_name.replace("\\", "/")]
        names += [names[1].rpartition("/")[2]] if re.match(r"/|[A-Za-z]:", names[1]) else []  # of another machine
        places = (Path(os.path.normpath(folder / name)) for name in dict.fromkeys(names) for folder in folders)
        path = next((place for place in places if is_file(place)), None)
        if path is None:
            defects.add("image file missing: skipped", record.name)
        elif path not in found:
            found[path] = record, record.name, path
        elif _objects_of(found[path][0]) == _objects_of(record):
            defects.add("image listed twice: the second skipped", f"{record.name} (id {record.image_id})")
        else:
            ambiguous.add(path)
            defects.add("image listed twice with other objects: left out", record.name)
    usable = [entry for path, entry in found.items() if path not in ambiguous]
    return _annotated_images(root, split, usable, class_names, [id_of[name] for name in class_names], defects)


def _objects_of(record: ImageRecord) -> list[Any]:
    return sorted((entry.class_name, entry.box, entry.crowd) for entry in record.objects)


def read_yolo(root: Path, split: str, class_names: Sequence[str] | None = None) -> AnnotatedImages:
    """A split of a folder laid out as YOLO: data.yaml, and a text file in `labels` (or beside) for each of `images`.

    Args:
        root: the folder with data.yaml, or with obj.names or classes.txt.
        split: an entry of data.yaml, a list, or a folder; or "all".
        class_names: the classes to read, in this order; without them those of data.yaml.

    Raises:
        ValueError: there are no names or no images.
    """
    defects, config = Defects(), _read_yolo_config(root)
    images = _find_yolo(root, config or {}, split)
    if config is None or images is None:
        lacking = "names of the classes (data.yaml, obj.names or classes.txt)" if config is None else "images"
        raise ValueError(f"No split {split!r} in {root}: there are no {lacking}")
    found: dict[str, tuple[ImageRecord, str, Path]] = {}
    for path in images:
        name = os.path.relpath(path, root)
        size = read_image_size(path)
        if name in found or size is None:
            kind = "image that cannot be decoded: skipped" if is_file(path) else "image file missing: skipped"
            defects.add("image listed twice: the second skipped" if name in found else kind, name)
            continue
        *parts, file_name = path.with_suffix(".txt").parts
        last = max((place for place, part in enumerate(parts) if part.lower() == "images"), default=None)
        beside = Path(*parts, file_name)
        candidates = [beside] if last is None else [child(Path(*parts[:last]), "labels"), beside]
        if last is not None:
            candidates[0] = candidates[0].joinpath(*parts[last + 1 :], file_name)
        record = ImageRecord(len(found), name, *size)
        labels = next((place for place in map(annotation_file, candidates) if is_file(place)), None)
        record.is_annotated = labels is not None
        if labels is not None:
            record.objects = read_yolo_labels(labels, name, size, config["names"], defects, "kpt_shape" in config)
        found[name] = record, name, path
    names = list(dict.fromkeys(config["names"])) if class_names is None else class_names
    return _annotated_images(root, split, found.values(), names, list(range(1, len(names) + 1)), defects)


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
            kind = "without objects" if record.is_annotated else "without a label file"
            kind = "with nothing but crowd regions" if kept else f"{kind}: kept as background"
            defects.add(f"image {kind}", name)
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


READERS = {"voc": read_voc, "coco": read_coco, "yolo": read_yolo}


def read_data(root: Path, layout: str, split: str, class_names: Sequence[str] | None = None) -> AnnotatedImages:
    """`read_voc`, `read_coco` or `read_yolo`, by layout "voc", "coco" or "yolo" ("auto" for what is there).

    Raises:
        ValueError: the split is not there, or has no object to learn or to find.
    """
    data = READERS[recognize_format(root, layout)](root, split, class_names)
    if data.num_objects() == 0:
        if class_names is not None and (others := classes_left_out(data)):
            wanted = ", ".join(map(repr, class_names))
            raise ValueError(f"{root}: no object of {wanted} in split {split!r}; it has {', '.join(sorted(others))}")
        raise ValueError(f"{root}: no object in split {split!r}\n{data.defects.report()}")
    return data


def classes_left_out(data: AnnotatedImages) -> list[str]:
    """The classes, quoted, whose objects were not read."""
    known = "object of the unknown class "
    return [kind.removeprefix(known).split(":")[0] for kind in data.defects.found if kind.startswith(known)]


def check_classes(data: AnnotatedImages, class_names: Sequence[str]) -> None:
    """Raises a ValueError if there is no object of one of these classes in a split."""
    counts = torch.cat([image.labels for image in data.images]).bincount(minlength=len(data.class_names)).tolist()
    lacking = [name for name, count in zip(data.class_names, counts, strict=True) if count == 0 and name in class_names]
    if lacking:
        others = classes_left_out(data)
        others += [repr(name) for name, count in zip(data.class_names, counts, strict=True) if count]
        raise ValueError(
            f"--classes: no object of {', '.join(map(repr, lacking))} in split {data.name!r}; "
            f"it has {', '.join(sorted(others))}"
        )
