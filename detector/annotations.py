"""Annotation files, read and checked in one place: COCO's JSON, VOC's XML, YOLO's text and COCO's results.

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
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


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
        shown = {
            kind: [*list(places)[:3], *(["..."] if len(places) > 3 else [])] for kind, places in self.found.items()
        }
        lines = (f"  {len(self.found[kind])} x {kind} ({', '.join(shown[kind])})" for kind in shown if kind not in but)
        return "\n".join(lines)


Box = tuple[float, float, float, float]
Identifier = int | str
"""Of an image or a category: an integer, also where the file has it as text, else the text."""


@dataclass(frozen=True)
class AnnotatedObject:
    """One object of an annotation file. Its coordinates are finite; its box may be empty or reach out of the image."""

    place: str  # for messages
    class_name: str
    category_id: Identifier | None  # COCO's
    box: Box
    crowd: bool = False  # a region to ignore, not an object
    difficult: bool = False  # neither asked for nor punished in evaluation
    area: float | None = None  # as annotated, in pixels

    def inside(self, width: float, height: float, defects: Defects) -> Box | None:
        """The box clipped to an image of this size; None, and counted, if nothing of it is left."""
        x1, y1, x2, y2 = self.box
        clipped = (min(max(x1, 0.0), width), min(max(y1, 0.0), height), min(x2, float(width)), min(y2, float(height)))
        if x2 <= x1 or y2 <= y1 or clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            defects.add(NO_AREA, self.place)
            return None
        if max(abs(a - b) for a, b in zip(clipped, self.box, strict=True)) > 1:
            defects.add("box reaching out of its image by over a pixel: clipped", self.place)
        return clipped


@dataclass
class ImageRecord:
    """One image of an annotation file, and its objects."""

    image_id: Identifier
    file_name: str | None
    width: int | None  # as annotated, in pixels; both None where either is missing or not positive
    height: int | None
    objects: list[AnnotatedObject] = field(default_factory=list)
    is_annotated: bool = True  # False where a file of its own would have said so, and there is none

    @property
    def name(self) -> str:
        """For messages."""
        return self.file_name or f"image {self.image_id}"


class CocoAnnotations(NamedTuple):
    """A COCO annotation file."""

    images: list[ImageRecord]
    categories: dict[Identifier, str]  # names by id, in the order of the ids


class DetectionRecord(NamedTuple):
    """One detection of a COCO result file."""

    image_id: Identifier
    category_id: Identifier
    box: Box
    """Empty, so that it overlaps nothing, where the file has no box that is one."""
    score: float
    """-inf where the file has none that is a number: after all others."""


NO_AREA = "object without area inside its image: left out"
NO_BOX = "object without a name or a box: left out"
NO_NUMBER = "object with a coordinate that is not a number: left out"


# ---------------------------------------------------------------------------------------------------------------------
# Values: what a number, a flag, an id and a name may be written as

MAX_SIDE = 2**31 - 1
"""Pixels of the widest and highest image that a format can hold."""
MAX_COORDINATE = 1e18
"""Pixels; the area of a box of this size still is a number of 32 bits."""
FLAGS = {"false": False, "true": True, "no": False, "yes": True, "": False}


def as_number(value: object) -> float | None:
    """A finite number, also one written as text; None for anything else."""
    is_text = isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or (is_text and "_" in str(value)):
        return None  # Python reads "1_0" as 10
    with contextlib.suppress(ValueError, OverflowError):
        return number if math.isfinite(number := float(value)) else None
    return None


def as_flag(value: object, defects: Defects, place: str) -> bool:
    """A flag, also one written as text ("0" is false); anything but 0 and 1 counts as not set, and is counted."""
    if value is None or isinstance(value, bool):
        return bool(value)
    number = as_number(value)
    flag = FLAGS.get(value.strip().lower()) if isinstance(value, str) and number is None else None
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
    return int(value) if isinstance(value, int) or re.fullmatch("0|-?[1-9][0-9]{0,99}", value) else value


def as_name(value: object) -> str | None:
    """A name without the blanks around it; a number is a name too. None for anything else, and for blanks."""
    is_name = isinstance(value, (int, float, str)) and not isinstance(value, bool)
    return (str(value).strip() or None) if is_name else None


def as_size(width: object, height: object) -> tuple[int, int] | tuple[None, None]:
    """(width, height) in pixels; None twice unless both are at least 1, and few enough for an image."""
    sides = [side for side in (as_number(width), as_number(height)) if side is not None and 1 <= side <= MAX_SIDE]
    return (round(sides[0]), round(sides[1])) if len(sides) == 2 else (None, None)


def as_box(values: Sequence[object]) -> Box | None:
    """Four numbers that are small enough to reckon with; None for anything else."""
    x1, y1, x2, y2 = (
        number if number is not None and abs(number) <= MAX_COORDINATE else None for number in map(as_number, values)
    )
    return None if x1 is None or y1 is None or x2 is None or y2 is None else (x1, y1, x2, y2)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def is_file(path: Path) -> bool:
    """Whether a file is there; False also for a name that no file can have, for which Path.is_file raises."""
    return os.path.isfile(path)  # noqa: PTH113


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
            f"{path}: expected text in UTF-8 or, with a byte order mark, UTF-16, and it holds zero bytes; save it as "
            "UTF-8"
        )
    try:
        text = content.decode(encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8 or UTF-16, and it breaks off: {error}") from None
    # Not `splitlines`, which also ends a line at characters that a file name may have.
    return [line.strip() for line in re.split("\r\n|\r|\n", text) if line.strip()]


def read_json(path: Path, meaning: str) -> Any:
    """A JSON file in UTF-8, UTF-16 or UTF-32.

    Raises:
        ValueError: there is no such file, or it is not JSON, or it is cut off; it says the `meaning` of the file.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        reason = f", and it cannot be read: {error.strerror}"
    except RecursionError:
        reason = ", and it nests too deeply"
    except UnicodeDecodeError as error:
        reason = f" in UTF-8, UTF-16 or UTF-32: {error}"
    except json.JSONDecodeError as error:
        end = " (is the file cut off?)" if error.pos >= len(error.doc.rstrip()) - 1 else ""
        reason = f", and it is not JSON: {error}{end}"
    except ValueError as error:  # a whole number of more digits than Python reads
        reason = f", and it cannot be read: {error}"
    raise ValueError(f"{path}: expected {meaning}{reason}")


# ---------------------------------------------------------------------------------------------------------------------
# COCO


def parse_coco(content: Any, source: str, defects: Defects) -> CocoAnnotations:
    """COCO's images, annotations and categories, from the content of the JSON file `source`.

    Raises:
        ValueError: a list is missing, or an id means two categories.
    """
    images, annotations = _entries(content, "images", source), _entries(content, "annotations", source)
    categories = _parse_categories(content, annotations, source, defects)
    records = _parse_images(images, defects)
    listed = {as_identifier(_get(entry, "id")) for entry in images} - {None}
    for position, entry in enumerate(annotations):
        image_id, number = as_identifier(_get(entry, "image_id")), _get(entry, "id")
        place = f"annotations[{position}]" + (f" (id {number})" if number is not None else "")
        image = records.get(image_id) if image_id is not None else None
        if image is not None:
            found = parse_coco_object(entry, f"{image.name} {place}", categories, defects)
            image.objects += [found] if found is not None else []
        elif image_id not in listed:
            defects.add("annotation of an image that is not listed: left out", place)
    return CocoAnnotations(list(records.values()), categories)


def parse_coco_object(
    entry: Any, place: str, categories: dict[Identifier, str], defects: Defects
) -> AnnotatedObject | None:
    """One annotation; None, and counted, if it is not an object that can be used."""
    category_id, values = as_identifier(_get(entry, "category_id")), _get(entry, "bbox")
    problem = box = None
    if category_id is None or category_id not in categories:
        problem = f"object of the unknown class {_get(entry, 'category_id')!r}: left out"
    elif not isinstance(values, (list, tuple)) or len(values) != 4:
        problem = NO_BOX
    elif (box := as_box(values)) is None:
        problem = NO_NUMBER
    elif min(box[2:]) < 0:
        problem = NO_AREA
    if problem is not None or category_id is None or box is None:
        defects.add(str(problem), place)
        return None
    area = as_number(entry.get("area"))
    crowd, ignore, difficult = (as_flag(entry.get(key), defects, place) for key in ("iscrowd", "ignore", "difficult"))
    corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    area = area if area is not None and area > 0 else None
    return AnnotatedObject(place, categories[category_id], category_id, corners, crowd, ignore or difficult, area)


def _parse_categories(
    content: dict[str, Any], annotations: list[Any], source: str, defects: Defects
) -> dict[Identifier, str]:
    """Names by id, in the order of the ids; where the file names no categories, the ids of its annotations."""
    names: dict[Identifier, str] = {}
    used = {as_identifier(_get(entry, "category_id")) for entry in annotations} - {None}
    if "categories" not in content:
        defects.add("no list of categories: classes are named by their ids", source)
        names = {identifier: str(identifier) for identifier in used if identifier is not None}
    entries = _entries(content, "categories", source) if "categories" in content else []
    groups = {_get(entry, "supercategory") for entry in entries}
    for position, entry in enumerate(entries):
        category_id, name = as_identifier(_get(entry, "id")), as_name(_get(entry, "name"))
        if category_id is None:
            defects.add("category without an id: left out", f"categories[{position}]")
            continue
        if name is None:
            defects.add("category without a name: named by its id", f"categories[{position}]")
            name = str(category_id)
        if category_id not in used and entry.get("supercategory") == "none" and entry.get("name") in groups:
            continue  # Roboflow's first category: the name of the project, over all others
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
        size = as_size(entry.get("width"), entry.get("height"))
        record = ImageRecord(image_id, as_name(entry.get("file_name")), *size)
        known = records.setdefault(image_id, record)
        if known is not record and known.file_name == record.file_name:
            defects.add("image listed twice: the second skipped", f"{record.name}, images[{position}]")
        elif known is not record:
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


def parse_coco_detections(
    content: Any,
    source: str,
    image_ids: Collection[Identifier],
    category_ids: Collection[Identifier],
    defects: Defects,
) -> list[DetectionRecord]:
    """COCO's results, a list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}, from the content
    of the JSON file `source`. Detections of other images and categories than those given are left out.

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
    values = _get(entry, "bbox")
    for key, given in (("image_id", image_id), ("category_id", category_id), ("bbox", values)):
        if given is None:
            got = f"got {entry[key]!r}" if isinstance(entry, dict) and key in entry else "and there is none"
            raise ValueError(f"{source}: expected {'an id' if key != 'bbox' else 'a box'} as {key}, {got}")
    if not isinstance(values, (list, tuple)) or len(values) != 4:
        raise ValueError(f"{source}: bbox: expected [x, y, width, height], got {values!r}")
    if "score" not in entry:
        raise ValueError(f"{source}: score: expected a number, and there is none")
    box, score = as_box(values), as_number(entry["score"])
    assert image_id is not None and category_id is not None
    if box is None or score is None:
        defects.add("detection with a box or a score that is not a number: counted as wrong", place)
        return DetectionRecord(image_id, category_id, (0.0, 0.0, 0.0, 0.0), -math.inf if score is None else score)
    x, y, width, height = box
    if width < 0 or height < 0:
        defects.add("detection with a box of negative size: counted as wrong", place)
        width = height = 0.0
    return DetectionRecord(image_id, category_id, (x, y, x + width, y + height), score)


# ---------------------------------------------------------------------------------------------------------------------
# VOC


def read_voc_annotation(path: Path, place: str, image_id: Identifier, defects: Defects) -> ImageRecord | None:
    """One annotation file of VOC, in any encoding that it declares and Python knows; None, and counted, if it is none.

    `place` is its name in messages.
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
    size = as_size(root.findtext("size/width"), root.findtext("size/height"))
    record = ImageRecord(image_id, as_name(root.findtext("filename")), *size)
    for position, element in enumerate(root.findall("object")):
        found = parse_voc_object(element, f"{place} object {position}", defects)
        record.objects += [found] if found is not None else []
    return record


def parse_voc_object(element: ElementTree.Element, place: str, defects: Defects) -> AnnotatedObject | None:
    """One object; None, and counted, if it cannot be used."""
    class_name, corners = as_name(element.findtext("name")), element.find("bndbox")
    if class_name is None or corners is None:
        defects.add(NO_BOX, place)
        return None
    box = as_box([corners.findtext(key) for key in ("xmin", "ymin", "xmax", "ymax")])
    if box is None or box[2] <= box[0] or box[3] <= box[1]:
        # Corners that coincide are a slip of the mouse, not a box of one pixel.
        defects.add(NO_NUMBER if box is None else NO_AREA, place)
        return None
    difficult = as_flag(element.findtext("difficult"), defects, place)
    return AnnotatedObject(place, class_name, None, (box[0] - 1, box[1] - 1, *box[2:]), difficult=difficult)


def parse_xml(content: bytes) -> ElementTree.Element | None:
    """The root of an XML document; None if it is no XML.

    A byte order mark goes before the declared encoding, which may be one that the parser lacks (GBK, Shift_JIS). Where
    it does not fit, as in what .NET writes as UTF-8 and declares as UTF-16, the document is read as UTF-8.
    """
    content, mark = content.lstrip(), encoding_by_mark(content)
    encodings = ["utf-8"] if mark is None else [mark]
    if mark is None:
        with contextlib.suppress(ElementTree.ParseError, LookupError, ValueError):
            return ElementTree.fromstring(content)
        declared = re.match(rb"""<\?xml[^>]*?encoding\s*=\s*["']([^"']+)["'][^>]*\?>""", content)
        encodings = [*([declared[1].decode("ascii", errors="replace")] if declared else []), *encodings]
    for encoding in encodings:
        with contextlib.suppress(ElementTree.ParseError, LookupError, ValueError):
            return ElementTree.fromstring(content.decode(encoding).lstrip())
    return None


# ---------------------------------------------------------------------------------------------------------------------
# YOLO


def read_yolo_labels(
    path: Path,
    place: str,
    size: tuple[int, int],
    class_names: Sequence[str],
    defects: Defects,
    has_keypoints: bool = False,
) -> list[AnnotatedObject]:
    """The objects of a text file with a line for each: its class, then center, width and height of its box, or the
    corners of its outline, as fractions of the image's `size` (width, height). Keypoints, and a score, follow the box.
    """
    objects = []
    for position, line in enumerate(read_lines(path)):
        where, (label, *words) = f"{place} line {position + 1}", line.split()
        numbers = [number for word in words if (number := as_number(word)) is not None]
        kind, index = None, as_identifier(as_number(label))  # 1.0 is class 1
        is_outline = len(words) > 5 and not has_keypoints
        if len(numbers) < len(words) or len(words) < 4 or (is_outline and len(words) % 2):
            kind = "line that is not a class and the numbers of a box or an outline: left out"
        elif not isinstance(index, int) or not 0 <= index < len(class_names):
            kind = f"object of the unknown class {label!r}: left out"
        elif max(map(abs, numbers if is_outline else numbers[:4])) >= 2:
            kind = "object with a coordinate that is not a fraction of its image: left out"
        if kind is not None or not isinstance(index, int):
            defects.add(str(kind), where)
            continue
        if is_outline:
            x1, y1, x2, y2 = min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
        else:
            x, y, width, height = numbers[:4]
            x1, y1, x2, y2 = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        box = (x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1])
        objects.append(AnnotatedObject(where, class_names[index], None, box))
    return objects


def refuse_fractions(images: Iterable[ImageRecord], source: str) -> None:
    """Raises a ValueError where every box lies between 0 and 1: fractions of the image, not pixels."""
    corners = [max(entry.box[2:]) for image in images for entry in image.objects]
    if corners and max(corners) <= 1:
        raise ValueError(
            f"{source}: expected boxes in pixels, and all {len(corners)} lie between 0 and 1: "
            "multiply them by the width and the height of their image"
        )
