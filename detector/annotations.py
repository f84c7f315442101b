"""Annotation files, read and checked in one place: COCO's JSON, VOC's XML and COCO's results.

Training, evaluation and the benchmarks all read through here. A file becomes typed records; whatever in it is dropped
or changed is counted in a `Defects`. What makes the whole file useless is a ValueError of one line, which names the
file, the entry, what was expected and what to do. Boxes are (x1, y1, x2, y2) in pixels of the image as annotated, x2
and y2 exclusive: a VOC box, whose 1-based corners are both inside, becomes (xmin - 1, ymin - 1, xmax, ymax).
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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

    def report(self, but: Collection[str] = ()) -> str:
        """One line per kind, with its first places; without the kinds in `but`."""
        lines = []
        for kind, places in self.found.items():
            if kind in but:
                continue
            shown = ", ".join(list(places)[:3]) + (", ..." if len(places) > 3 else "")
            lines.append(f"  {len(places)} x {kind} ({shown})")
        return "\n".join(lines)


Box = tuple[float, float, float, float]
Identifier = int | str
"""Of an image or a category: an integer, also where the file has it as text, else the text."""


@dataclass(frozen=True)
class AnnotatedObject:
    """One object of an annotation file. Its coordinates are finite; its box may be empty or reach out of the image."""

    place: str
    """Where it stands, for messages."""
    class_name: str
    category_id: Identifier | None
    """COCO's; None in VOC."""
    box: Box
    crowd: bool
    """A region to ignore, not an object."""
    difficult: bool
    """Neither asked for nor punished in evaluation."""
    area: float | None
    """As annotated, in pixels; None where it is not."""

    def inside(self, width: float, height: float, defects: Defects) -> Box | None:
        """The box clipped to an image of this size; None, and counted, if nothing of it is left."""
        x1, y1, x2, y2 = self.box
        clipped = (min(max(x1, 0.0), width), min(max(y1, 0.0), height), min(x2, float(width)), min(y2, float(height)))
        if x2 <= x1 or y2 <= y1 or clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            defects.add("object without area inside its image: left out", self.place)
            return None
        if max(abs(a - b) for a, b in zip(clipped, self.box, strict=True)) > 1:
            defects.add("box reaching out of its image by over a pixel: clipped", self.place)
        return clipped


@dataclass
class ImageRecord:
    """One image of an annotation file, and its objects."""

    image_id: Identifier
    file_name: str | None
    """As the file has it; None where it has none."""
    width: int | None
    height: int | None
    """As annotated, in pixels; both None where either is missing or not positive."""
    objects: list[AnnotatedObject] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For messages."""
        return self.file_name or f"image {self.image_id}"


@dataclass
class CocoAnnotations:
    """A COCO annotation file."""

    images: list[ImageRecord]
    categories: dict[Identifier, str]
    """Names by id, in the order of the ids."""


@dataclass(frozen=True)
class DetectionRecord:
    """One detection of a COCO result file."""

    image_id: Identifier
    category_id: Identifier
    box: Box
    """Empty, so that it overlaps nothing, where the file has no box that is one."""
    score: float
    """-inf where the file has none that is a number: after all others."""


# ---------------------------------------------------------------------------------------------------------------------
# Values: what a number, a flag, an id and a name may be written as


def as_number(value: object) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and "_" in value:  # Python reads 1_0 as 10
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


MAX_SIDE = 2**31 - 1
"""Pixels of the widest and highest image that a format can hold."""

MAX_COORDINATE = 1e18
"""Pixels; the area of a box of this size still is a number of 32 bits."""

FLAGS = {"0": False, "1": True, "false": False, "true": True, "no": False, "yes": True, "": False}


def as_coordinate(value: object) -> float | None:
    """A number that is small enough to reckon with as a part of a box; None for anything else."""
    number = as_number(value)
    return number if number is not None and abs(number) <= MAX_COORDINATE else None


def as_flag(value: object, defects: Defects, place: str) -> bool:
    """A flag, also one written as text ("0" is false); anything but 0 and 1 counts as not set, and is counted."""
    if value is None or isinstance(value, bool):
        return bool(value)
    number = as_number(value)
    flag = FLAGS.get(value.strip().lower()) if isinstance(value, str) else None
    if number in (0.0, 1.0):
        flag = bool(number)
    if flag is None:
        defects.add("flag that is neither 0 nor 1: taken as 0", place)
    return bool(flag)


def as_identifier(value: object) -> Identifier | None:
    """An id: 7, 7.0 and "7" are the same; "007" and "street_7" are text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value == int(value) else None
    # Beyond 4,300 digits Python does not turn text into a number.
    if isinstance(value, str) and re.fullmatch("0|-?[1-9][0-9]{0,99}", value):
        return int(value)
    return value


def as_name(value: object) -> str | None:
    """A name without the blanks around it; a number is a name too. None for anything else, and for blanks."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    return str(value).strip() or None


def as_size(width: object, height: object) -> tuple[int, int] | tuple[None, None]:
    """(width, height) in pixels; None twice unless both are at least 1, and few enough for an image."""
    sides = [side for side in (as_number(width), as_number(height)) if side is not None and 1 <= side <= MAX_SIDE]
    return (round(sides[0]), round(sides[1])) if len(sides) == 2 else (None, None)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def is_file(path: Path) -> bool:
    """Whether a file is there; False also for a name that no file can have, for which Path.is_file raises."""
    return os.path.isfile(path)  # noqa: PTH113


def read_bytes(path: Path, meaning: str) -> bytes:
    """The content of a file; a ValueError of one line if there is none."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: expected {meaning}, and it cannot be read: {error.strerror}") from None


def encoding_by_mark(content: bytes) -> str | None:
    """The encoding that a byte order mark declares; None without one."""
    # UTF-32's little-endian mark begins with that of UTF-16.
    marks = [(codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")]
    marks += [(codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")]
    return next((encoding for mark, encoding in marks if content.startswith(mark)), None)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8 or, with a byte order mark, UTF-16 or UTF-32, without blanks around them.

    Bytes that are not UTF-8 are kept as Python keeps them in file names, so that they name the same files.
    """
    content = path.read_bytes()
    encoding = encoding_by_mark(content) or "utf-8-sig"
    if encoding == "utf-8-sig" and b"\0" in content:
        raise ValueError(
            f"{path}: expected text in UTF-8 or, with a byte order mark, UTF-16, and it holds zero bytes; "
            "save it as UTF-8"
        )
    try:
        text = content.decode(encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8 or UTF-16, and it breaks off: {error}") from None
    # Not `splitlines`, which also ends a line at characters that a file name may have.
    return [line.strip() for line in re.split("\r\n|\r|\n", text) if line.strip()]


def read_json(path: Path, meaning: str) -> Any:
    """A JSON file in UTF-8, UTF-16 or UTF-32.

    Args:
        path: the file.
        meaning: what it should hold, for the message.

    Raises:
        ValueError: there is no such file, or it is not JSON, or it is cut off.
    """
    try:
        return json.loads(read_bytes(path, meaning))
    except RecursionError:
        raise ValueError(f"{path}: expected {meaning}, and it nests too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected {meaning} in UTF-8, UTF-16 or UTF-32: {error}") from None
    except json.JSONDecodeError as error:
        end = " (is the file cut off?)" if error.pos >= len(error.doc.rstrip()) - 1 else ""
        raise ValueError(f"{path}: expected {meaning}, and it is not JSON: {error}{end}") from None
    except ValueError as error:  # a whole number of more digits than Python reads
        raise ValueError(f"{path}: expected {meaning}, and it cannot be read: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# COCO


def parse_coco(content: Any, source: str, defects: Defects) -> CocoAnnotations:
    """COCO's images, annotations and categories.

    Args:
        content: of the JSON file.
        source: the file, for messages.
        defects: takes what is dropped or changed.

    Raises:
        ValueError: a list is missing, or an id means two categories.
    """
    images, annotations = _entries(content, "images", source), _entries(content, "annotations", source)
    categories = _parse_categories(content, annotations, source, defects)
    records = _parse_images(images, defects)
    listed = {identifier for entry in images if (identifier := as_identifier(_get(entry, "id"))) is not None}
    for position, entry in enumerate(annotations):
        image_id = as_identifier(_get(entry, "image_id"))
        image = records.get(image_id) if image_id is not None else None
        if image is None:
            if image_id not in listed:
                place = _annotation_place(position, entry, None)
                defects.add("annotation of an image that is not listed: left out", place)
            continue
        found = parse_coco_object(entry, _annotation_place(position, entry, image), categories, defects)
        if found is not None:
            image.objects.append(found)
    return CocoAnnotations(list(records.values()), categories)


def parse_coco_object(
    entry: Any, place: str, categories: dict[Identifier, str], defects: Defects
) -> AnnotatedObject | None:
    """One annotation; None, and counted, if it is not an object that can be used."""
    category_id = as_identifier(_get(entry, "category_id"))
    if category_id is None or category_id not in categories:
        defects.add(f"object of the unknown class {_get(entry, 'category_id')!r}: left out", place)
        return None
    box = _get(entry, "bbox")
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        defects.add("object without a name or a box: left out", place)
        return None
    x, y, width, height = (as_coordinate(value) for value in box)
    if x is None or y is None or width is None or height is None:
        defects.add("object with a coordinate that is not a number: left out", place)
        return None
    if width < 0 or height < 0:
        defects.add("object without area inside its image: left out", place)
        return None
    area = as_number(entry.get("area"))
    ignore, difficult = (as_flag(entry.get(key), defects, place) for key in ("ignore", "difficult"))
    return AnnotatedObject(
        place=place,
        class_name=categories[category_id],
        category_id=category_id,
        box=(x, y, x + width, y + height),
        crowd=as_flag(entry.get("iscrowd"), defects, place),
        difficult=ignore or difficult,
        area=area if area is not None and area > 0 else None,
    )


def _parse_categories(
    content: dict[str, Any], annotations: list[Any], source: str, defects: Defects
) -> dict[Identifier, str]:
    """Names by id, in the order of the ids; where the file names no categories, the ids of its annotations."""
    names: dict[Identifier, str] = {}
    if "categories" not in content:
        found = {as_identifier(_get(entry, "category_id")) for entry in annotations} - {None}
        defects.add("no list of categories: classes are named by their ids", source)
        names = {identifier: str(identifier) for identifier in found if identifier is not None}
    for position, entry in enumerate(_entries(content, "categories", source) if "categories" in content else []):
        category_id, name = as_identifier(_get(entry, "id")), as_name(_get(entry, "name"))
        if category_id is None:
            defects.add("category without an id: left out", f"categories[{position}]")
            continue
        if name is None:
            defects.add("category without a name: named by its id", f"categories[{position}]")
            name = str(category_id)
        if names.setdefault(category_id, name) != name:
            raise ValueError(
                f"{source}: categories[{position}]: id {category_id!r} is {name!r} and {names[category_id]!r}; "
                "expected one category per id"
            )
    seen: dict[str, Identifier] = {}
    for category_id, name in names.items():
        if seen.setdefault(name, category_id) != category_id:
            defects.add(f"category ids that share the name {name!r}: one class", f"{seen[name]} and {category_id}")
    return dict(sorted(names.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _parse_images(entries: list[Any], defects: Defects) -> dict[Identifier, ImageRecord]:
    """Images by id. Of two images with one id neither is kept: nobody can tell whose the annotations are."""
    records: dict[Identifier, ImageRecord] = {}
    ambiguous: set[Identifier] = set()
    for position, entry in enumerate(entries):
        image_id = as_identifier(_get(entry, "id"))
        if image_id is None:
            defects.add("image without an id: left out", f"images[{position}]")
            continue
        file_name = entry.get("file_name")
        record = ImageRecord(
            image_id,
            file_name.strip() or None if isinstance(file_name, str) else as_name(file_name),
            *as_size(entry.get("width"), entry.get("height")),
        )
        known = records.get(image_id)
        if known is None:
            records[image_id] = record
        elif known.file_name == record.file_name:
            defects.add("image listed twice: the second skipped", f"{record.name}, images[{position}]")
        else:
            ambiguous.add(image_id)
            for one in (known, record):
                defects.add("images that share an id: left out", f"{one.name} (id {image_id})")
    return {image_id: record for image_id, record in records.items() if image_id not in ambiguous}


def _entries(content: Any, key: str, source: str) -> list[Any]:
    """One of the lists of a COCO file."""
    if not isinstance(content, dict):
        raise ValueError(
            f"{source}: expected COCO's object with images, annotations and categories, got {_kind(content)}"
        )
    if not isinstance(content.get(key), list):
        got = f"got {_kind(content[key])}" if key in content else f"and it has only {sorted(content)[:8]}"
        raise ValueError(f"{source}: {key}: expected COCO's list of {key}, {got}")
    return content[key]  # type: ignore[no-any-return]


def _get(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _annotation_place(position: int, entry: Any, image: ImageRecord | None) -> str:
    identifier = _get(entry, "id")
    number = f"annotations[{position}]" + (f" (id {identifier})" if identifier is not None else "")
    return number if image is None else f"{image.name} {number}"


def parse_coco_detections(
    content: Any,
    source: str,
    image_ids: Collection[Identifier],
    category_ids: Collection[Identifier],
    defects: Defects,
) -> list[DetectionRecord]:
    """COCO's results: a list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}.

    Args:
        content: of the JSON file.
        source: the file, for messages.
        image_ids, category_ids: those of the annotations. Detections of others are left out.
        defects: takes what is dropped or changed.

    Raises:
        ValueError: not a list, an entry lacks something, or no detection at all is of the images and categories given.
    """
    if not isinstance(content, list):
        raise ValueError(
            f"{source}: expected COCO's results, a list of "
            f'{{"image_id", "category_id", "bbox", "score"}}, got {_kind(content)}'
        )
    known_images, known_categories = set(image_ids), set(category_ids)
    found = []
    for position, entry in enumerate(content):
        record = parse_coco_detection(entry, f"{source}: [{position}]", f"detections[{position}]", defects)
        if record.image_id not in known_images:
            kind, where = "detection of an image that is not in the annotations: left out", f"image {record.image_id}"
        elif record.category_id not in known_categories:
            kind, where = "detection of a class that is not in the annotations: left out", f"id {record.category_id}"
        else:
            found.append(record)
            continue
        defects.add(kind, f"detections[{position}], {where}")
    if content and not found:
        raise ValueError(
            f"{source}: none of the {len(content)} detections is of an image and a category of the annotations; "
            f"the first is of image {content[0]['image_id']!r} and category {content[0]['category_id']!r}: "
            "expected the ids of the annotation file"
        )
    return found


def parse_coco_detection(entry: Any, source: str, place: str, defects: Defects) -> DetectionRecord:
    """One detection. A box or a score that is not a number makes it a wrong detection, as a diverged network's are."""
    image_id, category_id = as_identifier(_get(entry, "image_id")), as_identifier(_get(entry, "category_id"))
    box = _get(entry, "bbox")
    for key, given in (("image_id", image_id), ("category_id", category_id), ("bbox", box)):
        if given is None:
            got = f"got {entry[key]!r}" if isinstance(entry, dict) and key in entry else "and there is none"
            raise ValueError(f"{source}: expected {'an id' if key != 'bbox' else 'a box'} as {key}, {got}")
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        raise ValueError(f"{source}: bbox: expected [x, y, width, height], got {box!r}")
    if "score" not in entry:
        raise ValueError(f"{source}: score: expected a number, and there is none")
    x, y, width, height = (as_coordinate(value) for value in box)
    score = as_number(entry["score"])
    assert image_id is not None and category_id is not None
    if x is None or y is None or width is None or height is None or score is None:
        defects.add("detection with a box or a score that is not a number: counted as wrong", place)
        return DetectionRecord(image_id, category_id, (0.0, 0.0, 0.0, 0.0), -math.inf if score is None else score)
    if width < 0 or height < 0:
        defects.add("detection with a box of negative size: counted as wrong", place)
        width = height = 0.0
    return DetectionRecord(image_id, category_id, (x, y, x + width, y + height), score)


# ---------------------------------------------------------------------------------------------------------------------
# VOC


def read_voc_annotation(path: Path, place: str, image_id: Identifier, defects: Defects) -> ImageRecord | None:
    """One annotation file of VOC; None, and counted, if it is not one.

    Args:
        path: the XML file, in any encoding that it declares and Python knows.
        place: its name in messages.
        image_id: of the image.
        defects: takes what is dropped or changed.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError):  # a name that no file can have is a ValueError
        defects.add("image without an annotation file: skipped", place)
        return None
    root = parse_xml(content)
    if root is None or root.tag != "annotation":
        kind = "annotation file that is not XML" if root is None else "XML file that is not a VOC annotation"
        defects.add(f"{kind}: image skipped", place)
        return None
    record = ImageRecord(
        image_id,
        (root.findtext("filename") or "").strip() or None,
        *as_size(root.findtext("size/width"), root.findtext("size/height")),
    )
    for position, element in enumerate(root.findall("object")):
        found = parse_voc_object(element, f"{place} object {position}", defects)
        if found is not None:
            record.objects.append(found)
    return record


def parse_voc_object(element: ElementTree.Element, place: str, defects: Defects) -> AnnotatedObject | None:
    """One object; None, and counted, if it cannot be used."""
    class_name, box = (element.findtext("name") or "").strip(), element.find("bndbox")
    if not class_name or box is None:
        defects.add("object without a name or a box: left out", place)
        return None
    x1, y1, x2, y2 = (as_coordinate(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
    if x1 is None or y1 is None or x2 is None or y2 is None:
        defects.add("object with a coordinate that is not a number: left out", place)
        return None
    if x2 <= x1 or y2 <= y1:
        # Corners that coincide are a slip of the mouse, not a box of one pixel.
        defects.add("object without area inside its image: left out", place)
        return None
    difficult = as_flag(element.findtext("difficult"), defects, place)
    return AnnotatedObject(place, class_name, None, (x1 - 1, y1 - 1, x2, y2), False, difficult, None)


def parse_xml(content: bytes) -> ElementTree.Element | None:
    """The root of an XML document; None if it is no XML.

    A byte order mark goes before the declared encoding, which may be one that the parser lacks (GBK, Shift_JIS). Where
    it does not fit, as in what .NET writes as UTF-8 and declares as UTF-16, the document is read as UTF-8.
    """
    content, mark = content.lstrip(), encoding_by_mark(content)
    encodings = ["utf-8"] if mark is None else [mark]
    if mark is None:
        try:
            return ElementTree.fromstring(content)
        except (ElementTree.ParseError, LookupError, ValueError):
            declared = re.match(rb"""<\?xml[^>]*?encoding\s*=\s*["']([^"']+)["'][^>]*\?>""", content)
            encodings = [*([declared[1].decode("ascii", errors="replace")] if declared else []), *encodings]
    for encoding in encodings:
        with contextlib.suppress(ElementTree.ParseError, LookupError, ValueError):
            return ElementTree.fromstring(content.decode(encoding).lstrip())
    return None


def refuse_fractions(images: Iterable[ImageRecord], source: str) -> None:
    """Raises a ValueError where every box lies between 0 and 1: fractions of the image, not pixels."""
    corners = [max(entry.box[2:]) for image in images for entry in image.objects]
    if corners and max(corners) <= 1:
        raise ValueError(
            f"{source}: expected boxes in pixels, and all {len(corners)} lie between 0 and 1: "
            "multiply them by the width and the height of their image"
        )
