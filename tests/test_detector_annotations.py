"""Annotation files as people have them: read as they are meant, or left out and counted; never wrong in silence."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_data import draw_image, voc_object, write_coco, write_voc, write_voc_annotation

from detector.annotations import (
    Defects,
    as_flag,
    as_identifier,
    as_name,
    as_number,
    as_size,
    parse_coco,
    parse_coco_detections,
    parse_xml,
    read_json,
)
from detector.data import AnnotatedImages, note_small_objects, read_coco, read_voc


@pytest.mark.parametrize(
    ("value", "number"),
    [(3, 3), (2.5, 2.5), ("3", 3), (" 2.5 ", 2.5), ("1e2", 100), (0, 0)]
    + [(value, None) for value in (True, None, "", "x", [1], float("nan"), "inf", 10**400, "1,5", "1_0")],
)
def test_a_number_may_be_text_and_must_be_finite(value: object, number: float | None) -> None:
    assert as_number(value) == number


@pytest.mark.parametrize(
    ("value", "flag", "counted"),
    [(value, False, 0) for value in (0, "0", False, None, 0.0, "false", "No", " 0 ", "")]
    + [(value, True, 0) for value in (1, "1", True, 1.0, "true", "Yes")]
    + [(value, False, 1) for value in (2, -1, "maybe", [1], "0.5")],
)
def test_a_flag_may_be_text(value: object, flag: bool, counted: int) -> None:
    defects = Defects()
    assert as_flag(value, defects, "here") is flag
    assert sum(defects.counts().values()) == counted


@pytest.mark.parametrize(
    ("value", "identifier"),
    [(7, 7), ("7", 7), (7.0, 7), (0, 0), ("0", 0), ("007", "007"), ("street_7", "street_7"), (2**60 + 1, 2**60 + 1)]
    + [("-3", -3), ("9" * 5000, "9" * 5000)]
    + [(value, None) for value in (None, True, 7.5, float("nan"), [7], {})],
)
def test_an_id_is_the_same_as_number_and_as_text(value: object, identifier: int | str | None) -> None:
    assert as_identifier(value) == identifier


def test_names_and_sizes() -> None:
    assert as_name(" cell ") == "cell" and as_name(3) == "3" and as_name("  ") is None and as_name(None) is None
    assert as_size("640", 480.0) == (640, 480)
    for width, height in ((0, 480), (640, None), (float("nan"), 480), ("wide", 480), (-5, 5), (1e30, 480)):
        assert as_size(width, height) == (None, None)


# ---------------------------------------------------------------------------------------------------------------------
# COCO


def patch(content: Any, change: dict[Any, Any]) -> None:
    """Changes parts of JSON: by key, or place in a list, what they become or what changes in them; ... is no entry."""
    for key, value in change.items():
        if value is ...:
            del content[key]
        elif isinstance(value, dict):
            patch(content[key], value)
        else:
            content[key] = value


def change_coco(root: Path, change: dict[str, Any], count: int = 2) -> Path:
    """A COCO folder of `count` training images, each with a disc (category 3) and a square (7), its file changed."""
    write_coco(root, {"train": count})
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    patch(content, change)
    file.write_text(json.dumps(content))
    return root


def changed_coco(root: Path, change: dict[str, Any], count: int = 2) -> AnnotatedImages:
    return read_coco(change_coco(root, change, count), "train")


def test_flags_and_numbers_that_are_text(tmp_path: Path) -> None:
    plain = read_coco(write_coco(tmp_path / "plain", {"train": 2}), "train")
    root = write_coco(tmp_path / "text", {"train": 2})
    file = root / "annotations" / "instances_train.json"
    # Every number.
    file.write_text(re.sub(r"(?<=[ \[])(\d+)(?=[,}\]])", r'"\1"', file.read_text()))
    data = read_coco(root, "train")
    assert data.defects.counts() == {}
    for one, other in zip(data.images, plain.images, strict=True):
        assert one.image_id == other.image_id and one.boxes.equal(other.boxes) and one.labels.equal(other.labels)
        assert not one.crowd.any() and one.areas.equal(other.areas)


FIRST = "000000000001.jpg"
CLASSES = {3: "disc", 7: "square"}
BOX = {"image_id": 1, "category_id": 3, "bbox": [1, 1, 9, 9]}
BAD_ANNOTATIONS = [
    *(BOX | {"image_id": n} for n in (1, 2, 3)),
    *(*[{"image_id": 1, "category_id": 3}] * 5, *[BOX | {"bbox": [1, 2, None, 4], "id": 1}] * 3),
    *(None, 7, {"category_id": 3, "bbox": [1, 1, 5, 5]}, BOX | {"image_id": 77}),
    *(BOX | {"category_id": 99}, BOX | {"bbox": [1, 1, 0, 5]}, BOX | {"bbox": [1, 1, float("inf"), 5]}),
]
NO_FILE, OTHERS = "image file missing: skipped", "image listed twice with other objects: left out"
NO_CATEGORIES = "no list of categories: classes are named by their ids"


@pytest.mark.parametrize(
    ("change", "image_ids", "num_objects", "classes", "defects"),
    [
        (  # the second image's own id is no longer listed
            {"images": {1: {"id": 1}}},
            *([3], 2, CLASSES),
            {"images that share an id: left out": 2, "annotation of an image that is not listed: left out": 2},
        ),
        (  # one file under two ids: with the same objects it is read once; with others nobody knows which are right
            {"images": {1: {"file_name": FIRST}}, "annotations": {n: BOX | {"image_id": n // 2 + 1} for n in range(4)}},
            *([1, 3], 4, CLASSES, {"image listed twice: the second skipped": 1}),
        ),
        (  # one entry twice
            {"images": {1: {"id": 1, "file_name": FIRST}}},
            *([1, 3], 4, CLASSES),
            {"image listed twice: the second skipped": 1, "annotation of an image that is not listed: left out": 2},
        ),
        ({"images": {1: {"file_name": FIRST}}}, [3], 2, CLASSES, {OTHERS: 1}),
        ({"images": {1: {"file_name": f"../train/{FIRST}"}}}, [3], 2, CLASSES, {OTHERS: 1}),
        (
            {"annotations": BAD_ANNOTATIONS},
            *([1, 2, 3], 3, CLASSES),
            {
                "object without a name or a box: left out": 5,
                "object with a coordinate that is not a number: left out": 4,
                "annotation of an image that is not listed: left out": 4,
                "object of the unknown class 99: left out": 1,
                "object without area inside its image: left out": 1,
            },
        ),
        (
            {"annotations": {n: {"iscrowd": 1} for n in range(6)}},
            *([1, 2, 3], 0, CLASSES, {"image with nothing but crowd regions": 3}),
        ),
        (
            {"categories": [{"id": "7", "name": 1}, {"id": 3}, {"name": "lost"}]},
            *([1, 2, 3], 6, {3: "3", 7: "1"}),
            {"category without a name: named by its id": 1, "category without an id: left out": 1},
        ),
        ({"categories": ...}, [1, 2, 3], 6, {3: "3", 7: "7"}, {NO_CATEGORIES: 1}),
        (
            {"categories": ..., "annotations": {n: {"category_id": n % 2} for n in range(6)}},
            *([1, 2, 3], 6, {0: "0", 1: "1"}, {NO_CATEGORIES: 1}),
        ),
        (
            {"categories": {0: {"name": "square"}}},
            *([1, 2, 3], 6, {3: "square"}, {"category ids that share the name 'square': one class": 1}),
        ),
        *(
            ({"images": {0: {"file_name": no}}}, [2, 3], 4, CLASSES, {NO_FILE: 1})
            for no in ("gone.jpg", "x" * 300 + ".jpg", "a\0b.jpg")
        ),
    ],
)
def test_what_is_wrong_in_cocos_file_is_left_out_and_counted(
    change: dict[str, Any],
    image_ids: list[int],
    num_objects: int,
    classes: dict[int, str],
    defects: dict[str, int],
    tmp_path: Path,
) -> None:
    data = changed_coco(tmp_path, change, count=3)
    assert [image.image_id for image in data.images] == image_ids and data.num_objects() == num_objects
    assert dict(zip(data.category_ids, data.class_names, strict=True)) == classes
    assert data.defects.counts() == defects


def test_crowds_are_counted_apart(tmp_path: Path) -> None:
    data = changed_coco(tmp_path, {"annotations": {n: {"iscrowd": 1} for n in range(4)}})
    assert data.summary().startswith("train: 2 images, 0 objects, 4 crowd regions, 2 classes")


def test_a_category_id_of_two_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"categories\[1\]: id 7 is 'square' and 'disc'"):
        changed_coco(tmp_path, {"categories": {0: {"id": 7}}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON.*cut off"),
        (b'{"images": [{"id": 1', "is not JSON.*cut off"),
        (b"[]", "expected COCO's object with images, annotations and categories, got a list"),
        (b'{"images": []}', r"annotations: expected COCO's list of annotations, and it has only \['images'\]"),
        (b'{"images": {}, "annotations": []}', "images: expected COCO's list of images, got an object"),
        (b"\xff\xfe\x00", "expected COCO's"),
        (b"[" * 100_000, "nests too deeply"),
    ],
)
def test_a_file_that_is_not_cocos_is_named_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    root = write_coco(tmp_path, {"train": 1})
    file = root / "annotations" / "instances_train.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_coco(root, "train")
    assert str(raised.value).startswith(str(file)) and "\n" not in str(raised.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_every_encoding_of_unicode(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.json").write_bytes(json.dumps({"name": "Zürich"}, ensure_ascii=False).encode(encoding))
    assert read_json(tmp_path / "a.json", "a name") == {"name": "Zürich"}


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: expected a name, and it cannot be read: No such file"):
        read_json(tmp_path / "none.json", "a name")


def test_random_values_anywhere_never_crash_the_reader() -> None:
    """Whatever a value is replaced by, the answer is annotations, or a ValueError of one line that names the file."""
    rng = np.random.default_rng(0)
    values = [None, True, -1, 2**70, 0.5, float("nan"), float("inf"), "", "x", "1", [], [1, 2, 3, 4], {}, {"id": 1}]
    for _ in range(3000):
        content: Any = {
            "images": [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 48} for n in (1, 2)],
            "annotations": [
                {"id": n, "image_id": n, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 9} for n in (1, 2)
            ],
            "categories": [{"id": 3, "name": "thing"}, {"id": 4, "name": "other"}],
        }
        for _ in range(int(rng.integers(1, 4))):
            place = content
            while isinstance(place, (dict, list)) and len(place) > 0:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                key = keys[rng.integers(len(keys))]
                if rng.random() < 0.4 or not isinstance(place[key], (dict, list)):
                    place[key] = values[rng.integers(len(values))]
                    break
                place = place[key]
        try:
            parsed = parse_coco(content, "file.json", Defects())
        except ValueError as error:
            assert str(error).startswith("file.json: ") and "\n" not in str(error)
            continue
        for image in parsed.images:
            for entry in image.objects:
                assert np.isfinite(entry.box).all() and entry.category_id in parsed.categories


# ---------------------------------------------------------------------------------------------------------------------
# VOC


def test_names_with_blanks_flags_and_suffixes_in_a_list(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": 4})
    for folder, suffix in (("JPEGImages", "png"), ("Annotations", "xml")):
        (root / folder / f"image_001.{suffix}").rename(root / folder / f"image 1 copy.{suffix}")
        (root / folder / f"image_002.{suffix}").rename(root / folder / f"image (1).{suffix}")
    lines = ["image_000 -1", "  image 1 copy ", "image (1)", "image_003.png", "", "image (2)"]
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n".join(lines))
    data = read_voc(root, "train")
    assert [image.name for image in data.images] == ["image_000", "image 1 copy", "image (1)", "image_003"]
    assert data.defects.counts() == {"image without an annotation file: skipped": 1}
    assert "image (2)" in data.summary()


def test_images_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        root = write_voc(tmp_path / year, {"trainval": 1})
        write_voc_annotation(root / "Annotations" / "image_000.xml", (128, 96), [voc_object("disc", (9, 9, 9, 9))])
    data = read_voc(tmp_path, "VOC2007/trainval+VOC2012/trainval", ["disc"])
    assert [image.name for image in data.images] == ["image_000", "VOC2012/image_000"]
    assert data.defects.counts()["object without area inside its image: left out"] == 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    root = write_voc(tmp_path, {"train": 2})
    (root / "ImageSets" / "Main" / "train.txt").write_bytes("image_000\r\nimage_001\r\n".encode(encoding))
    assert len(read_voc(root, "train").images) == 2


def test_a_name_that_is_not_utf_8_is_the_same_file(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": 1})
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    (root / "JPEGImages" / "image_000.png").rename(root / "JPEGImages" / f"{name}.png")
    (root / "Annotations" / "image_000.xml").rename(root / "Annotations" / f"{name}.xml")
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(b"caf\xe9\n")
    assert [image.name for image in read_voc(root, "train").images] == [name]


def test_of_several_image_files_the_one_that_the_annotation_names(tmp_path: Path) -> None:
    root, size = tmp_path, (64, 48)
    objects = voc_object("disc", (1, 1, 9, 9))
    for name, file_name in (("a", "a.png"), ("b", None), ("c", "stale.jpg"), ("d", "elsewhere.png"), ("e", "E.PNG")):
        tag = f"<filename>{file_name}</filename>" if file_name else ""
        (root / "Annotations").mkdir(exist_ok=True)
        sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{tag}{sides}{objects}</annotation>")
    for file in ("a.jpg", "a.png", "b.png", "b.JPG", "c.png", "stale.jpg", "elsewhere.png", "e.PNG"):
        draw_image(root / "JPEGImages" / file, [], size, 0)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\nd\ne\n")
    data = read_voc(root, "train")
    assert [image.path.name for image in data.images] == ["a.png", "b.JPG", "c.png", "elsewhere.png", "e.PNG"]
    assert data.defects.counts() == {
        "several image files of one name: .JPG taken": 1,
        "annotation that names another image: the image of its own name taken": 1,
    }


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ('<?xml version="1.0" encoding="gb2312"?>\n<annotation><a>猫</a></annotation>'.encode("gb2312"), "猫"),
        ("<?xml version='1.0' encoding='Shift_JIS'?><annotation><a>猫</a></annotation>".encode("shift_jis"), "猫"),
        (b'<?xml version="1.0" encoding="ANSI"?><annotation><a>cat</a></annotation>', "cat"),
        ('<?xml version="1.0" encoding="latin-1"?><annotation><a>é</a></annotation>'.encode("latin-1"), "é"),
        (codecs.BOM_UTF8 + b"<annotation><a>cat</a></annotation>", "cat"),
        ('<?xml version="1.0" encoding="utf-16"?><annotation><a>cat</a></annotation>'.encode("utf-16"), "cat"),
        (b'\n  <?xml version="1.0"?><annotation><a>cat</a></annotation>', "cat"),
        # Not the one it declares:
        (codecs.BOM_UTF16_BE + "<annotation><a>é</a></annotation>".encode("utf-16-be"), "é"),
        ("<annotation><a>é</a></annotation>".encode("utf-32"), "é"),
        ('<?xml version="1.0" encoding="utf-16"?><annotation><a>é</a></annotation>'.encode(), "é"),
        ('<?xml version="1.0" encoding="utf-8"?><annotation><a>é</a></annotation>'.encode("utf-16"), "é"),
        ('<?xml version="1.0" encoding="gb2312"?><annotation><a>é</a></annotation>'.encode("utf-8-sig"), "é"),
        # In none:
        (b'<?xml version="1.0" encoding="ANSI"?><annotation><a>\xff</a></annotation>', None),
        ('<?xml version="1.0" encoding="gb2312"?><annotation><a>猫</a>'.encode("gb2312"), None),
        (b'<?xml version="1.0" encoding="hex"?><annotation/>', None),
        (b"", None),
        (b"\x00" * 20, None),
    ],
)
def test_xml_in_the_encoding_it_has(content: bytes, name: str | None) -> None:
    root = parse_xml(content)
    assert (root.findtext("a") if root is not None else None) == name


# ---------------------------------------------------------------------------------------------------------------------
# Boxes


def test_boxes_that_are_fractions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected boxes in pixels, and all 4 lie between 0 and 1"):
        changed_coco(tmp_path / "coco", {"annotations": {n: {"bbox": [0.1, 0.2, 0.5, 0.6]} for n in range(4)}})
    root = write_voc(tmp_path / "voc", {"train": 1})
    write_voc_annotation(root / "Annotations" / "image_000.xml", (128, 96), [voc_object("disc", (0.1, 0.1, 0.5, 0.6))])
    with pytest.raises(ValueError, match="expected boxes in pixels"):
        read_voc(root, "train")


def test_objects_under_a_pixel_of_the_input_are_counted(tmp_path: Path) -> None:
    # At 64 x 64 pixels a box of 2 x 2 in 128 x 96 is 1 x 1.33, one of 1.9 x 40 is under a pixel wide.
    boxes = [BOX | {"bbox": [10, 10, 2, 2]}, BOX | {"bbox": [10, 10, 1.9, 40]}]
    boxes.append(BOX | {"bbox": [10, 10, 1, 1], "iscrowd": 1})
    data = changed_coco(tmp_path, {"annotations": boxes}, count=1)
    note_small_objects(data, 64)
    assert data.defects.counts() == {
        "object under a pixel of the input of 64: not trained on unless augmentation enlarges it": 1
    }
    assert "000000000001.jpg object 1" in data.summary()


def test_an_image_without_a_size_is_measured_the_right_way_up(tmp_path: Path) -> None:
    root = change_coco(tmp_path, {"images": {0: {"width": ...}}}, count=1)
    path = root / "train" / FIRST
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=exif)
    (image,) = read_coco(root, "train").images
    assert (image.width, image.height) == (96, 128)


def test_a_name_in_a_list_or_in_an_annotation_that_no_file_can_have_costs_only_itself(tmp_path: Path) -> None:
    write_voc(tmp_path, {"train": 2})
    annotation = tmp_path / "Annotations" / "image_000.xml"
    annotation.write_text(annotation.read_text().replace("<size>", f"<filename>{'x' * 300}.jpg</filename><size>"))
    list_file = tmp_path / "ImageSets" / "Main" / "train.txt"
    list_file.write_text(f"{list_file.read_text()}{'y' * 300}\n")
    data = read_voc(tmp_path, "train")
    assert [image.name for image in data.images] == ["image_000", "image_001"]
    assert data.defects.counts() == {"image without an annotation file: skipped": 1}


def test_a_list_in_utf_16_without_a_mark_is_refused_by_name(tmp_path: Path) -> None:
    write_voc(tmp_path, {"train": 2})
    list_file = tmp_path / "ImageSets" / "Main" / "train.txt"
    list_file.write_bytes(list_file.read_text().encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"train\.txt: expected text in UTF-8 .* zero bytes"):
        read_voc(tmp_path, "train")


def test_a_folder_with_the_name_of_an_image_is_no_image(tmp_path: Path) -> None:
    write_voc(tmp_path, {"train": 2})
    (tmp_path / "JPEGImages" / "image_000.jpg").mkdir()
    (tmp_path / "JPEGImages" / "image_001.png").unlink()
    (tmp_path / "JPEGImages" / "image_001.png").mkdir()
    data = read_voc(tmp_path, "train")
    assert [image.path.name for image in data.images] == ["image_000.png"]
    assert data.defects.counts() == {"image file missing: skipped": 1}


@pytest.mark.parametrize("folder", ["", "VOC2007"])
def test_an_image_in_two_lists_of_one_folder_is_read_once(tmp_path: Path, folder: str) -> None:
    write_voc(tmp_path / folder, {"train": 2})
    lists = tmp_path / folder / "ImageSets" / "Main"
    (lists / "more.txt").write_text((lists / "train.txt").read_text())
    data = read_voc(tmp_path, f"{folder}/train+{folder}/more".replace("+/", "+").lstrip("/"))
    assert [image.name for image in data.images] == ["image_000", "image_001"]
    assert data.defects.counts() == {"image listed twice: the second skipped": 2}
    (lists / "train.txt").write_text("image_000\nimage_001\nimage_000\n")
    assert len(read_voc(tmp_path, f"{folder}/train".lstrip("/")).images) == 2


def test_a_size_that_no_image_has_is_read_from_the_image(tmp_path: Path) -> None:
    data = changed_coco(tmp_path, {"images": {0: {"width": 1e30}}})
    note_small_objects(data, 64)
    assert (data.images[0].width, data.images[0].height) == (128, 96)
    assert data.defects.counts() == {"annotation without the image's size: read from the image": 1}


def test_a_number_of_thousands_of_digits_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f'{{"images": {"9" * 5000}}}')
    with pytest.raises(ValueError, match=r"a\.json: expected COCO's file, and it cannot be read"):
        read_json(tmp_path / "a.json", "COCO's file")


@pytest.mark.parametrize("box", [[1e308, 1, 1e308, 5], [1, 1e39, 5, 5]])
def test_a_box_too_large_to_reckon_with_is_left_out_and_a_detection_of_it_is_wrong(box: list[float]) -> None:
    defects = Defects()
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": [{"image_id": 1, "category_id": 3, "bbox": box}],
        "categories": [{"id": 3, "name": "thing"}],
    }
    assert parse_coco(content, "file.json", defects).images[0].objects == []
    results = [{"image_id": 1, "category_id": 3, "bbox": box, "score": 0.5}]
    (detection,) = parse_coco_detections(results, "results.json", [1], [3], defects)
    assert detection.box == (0, 0, 0, 0)
    assert defects.counts() == {
        "object with a coordinate that is not a number: left out": 1,
        "detection with a box or a score that is not a number: counted as wrong": 1,
    }
