"""Data as tools export it is recognized, read alike in every format, and parted where it has no splits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_data import train_flags, write_coco, write_voc

import detector.train
from detector import evaluate
from detector.checkpoint import read_checkpoint
from detector.data import AnnotatedImages, check_classes, default_splits, hold_out, read_data, recognize_format

SPLITS = {"train": 6, "val": 2}


def boxes_by_image(data: AnnotatedImages) -> dict[str, list[tuple[str, list[int]]]]:
    """What is in each image, by the stem of its file."""
    return {
        image.path.stem: sorted(
            (data.class_names[label], [round(value) for value in box])
            for label, box in zip(image.labels.tolist(), image.boxes.tolist(), strict=True)
        )
        for image in data.images
    }


def voc_lists(root: Path) -> Path:
    return write_voc(root, SPLITS)


def voc_lower_case(root: Path) -> Path:
    """CVAT's folders, and letters of another case."""
    write_voc(root, SPLITS)
    (root / "Annotations").rename(root / "annotations")
    (root / "JPEGImages").rename(root / "Images")
    (root / "ImageSets" / "Main").rename(root / "ImageSets" / "main")
    return root


def voc_beside(root: Path) -> Path:
    """Roboflow's: a folder for each split, images beside their XML."""
    write_voc(root, SPLITS)
    for split in SPLITS:
        (root / split).mkdir()
        for name in (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split():
            (root / "Annotations" / f"{name}.xml").rename(root / split / f"{name}.xml")
            (root / "JPEGImages" / f"{name}.png").rename(root / split / f"{name}.png")
    shutil.rmtree(root / "ImageSets")
    return root


def voc_folders_of_splits(root: Path) -> Path:
    """Annotations/train/*.xml and images/train/*."""
    voc_beside(root)
    for split in SPLITS:
        (root / "Annotations" / split).mkdir(parents=True)
        (root / "images" / split).mkdir(parents=True)
        for path in (root / split).iterdir():
            path.rename(root / ("Annotations" if path.suffix == ".xml" else "images") / split / path.name)
    shutil.rmtree(root / "JPEGImages")
    return root


def coco_instances(root: Path) -> Path:
    return write_coco(root, SPLITS)


def coco_roboflow(root: Path) -> Path:
    """Roboflow's: valid, annotations beside the images, and a first category over all others."""
    write_coco(root, SPLITS)
    for split, folder in (("train", "train"), ("val", "valid")):
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        for category in content["categories"]:
            category["supercategory"] = "shapes"
        content["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
        (root / split).rename(root / folder)
        (root / folder / "_annotations.coco.json").write_text(json.dumps(content))
    shutil.rmtree(root / "annotations")
    return root


def coco_label_studio(root: Path) -> Path:
    """Names with folders, Windows' separators, and a file named after its split."""
    write_coco(root, SPLITS)
    (root / "images").mkdir()
    for split in SPLITS:
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        for image in content["images"]:
            (root / split / image["file_name"]).rename(root / "images" / image["file_name"])
            image["file_name"] = f"images\\{image['file_name']}"
        (root / f"{split}_annotations.json").write_text(json.dumps(content))
    shutil.rmtree(root / "annotations")
    return root


def yolo_lines(data: AnnotatedImages) -> dict[str, str]:
    """The label files of a split, by the stem of the image."""
    lines = {}
    for image in data.images:
        corners = image.boxes / torch.tensor([image.width, image.height]).repeat(2)
        center, size = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        rows = zip(image.labels.tolist(), torch.cat([center, size], dim=1).tolist(), strict=True)
        lines[image.path.stem] = "".join(
            f"{label} {' '.join(f'{value:.6f}' for value in row)}\n" for label, row in rows
        )
    return lines


def yolo_roboflow(root: Path) -> Path:
    """Roboflow's: train/images and train/labels, and paths in data.yaml that lead out of the folder."""
    source = write_voc(root.with_name("source"), SPLITS)
    for split, folder in (("train", "train"), ("val", "valid")):
        data = read_data(source, "voc", split)
        for kind in ("images", "labels"):
            (root / folder / kind).mkdir(parents=True)
        for image in data.images:
            shutil.copy(image.path, root / folder / "images")
            (root / folder / "labels" / f"{image.path.stem}.txt").write_text(yolo_lines(data)[image.path.stem])
    names = "['disc ', square]"  # a blank that someone typed
    (root / "data.yaml").write_text(f"train: ../train/images\nval: ../valid/images\nnc: 2\nnames: {names}\n")
    return root


def yolo_ultralytics(root: Path) -> Path:
    """images/train and labels/train, names by number, a path of another machine."""
    yolo_roboflow(root)
    for split, folder in (("train", "train"), ("val", "valid")):
        for kind in ("images", "labels"):
            (root / kind).mkdir(exist_ok=True)
            (root / folder / kind).rename(root / kind / split)
        (root / folder).rmdir()
    names = "names:\n  1: square\n  0: disc\n"
    (root / "data.yaml").write_text(f"path: /elsewhere/data\ntrain: images/train\nval: images/val\n{names}")
    return root


def yolo_cvat(root: Path) -> Path:
    """CVAT's YOLO 1.1: obj.names, and lists of images with their labels beside."""
    yolo_roboflow(root)
    (root / "data.yaml").unlink()
    (root / "obj.names").write_text("disc\nsquare\n")
    for split, folder in (("train", "train"), ("val", "valid")):
        target = root / f"obj_{split}_data"
        target.mkdir()
        files = sorted((root / folder).rglob("*.*"))
        for path in files:
            path.rename(target / path.name)
        images = [f"data/obj_{split}_data/{path.name}\n" for path in files if path.suffix == ".png"]
        (root / f"{split}.txt").write_text("".join(images))
        shutil.rmtree(root / folder)
    return root


VOC = (voc_lists, voc_lower_case, voc_beside, voc_folders_of_splits)
COCO = (coco_instances, coco_roboflow, coco_label_studio)
YOLO = (yolo_roboflow, yolo_ultralytics, yolo_cvat)


@pytest.mark.parametrize("write", [*VOC, *COCO, *YOLO])
def test_every_export_is_recognized_and_reads_as_the_same_objects(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    root = write(tmp_path / "data")
    layout = recognize_format(root)
    assert layout == write.__name__.split("_")[0]
    source = coco_instances(tmp_path / "plain") if write in COCO else voc_lists(tmp_path / "plain")
    for split, plain in zip(default_splits(root, layout), SPLITS, strict=True):
        data = read_data(root, layout, split)
        expected = read_data(source, "coco" if write in COCO else "voc", plain)
        assert data.class_names == ["disc", "square"]
        assert boxes_by_image(data) == boxes_by_image(expected)
        assert data.defects.counts() == {}


def test_a_folder_that_is_none_or_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a folder laid out as VOC, COCO or YOLO, .*of none of them; pass"):
        recognize_format(tmp_path)
    yolo_roboflow(tmp_path / "data")
    write_coco(tmp_path / "data", {"train": 1})
    with pytest.raises(ValueError, match="looks like coco and yolo; pass --format"):
        recognize_format(tmp_path / "data")
    assert recognize_format(tmp_path / "data", "yolo") == "yolo"


def test_every_defect_of_yolo_is_counted(tmp_path: Path) -> None:
    root = yolo_roboflow(tmp_path / "data")
    labels = sorted((root / "train" / "labels").iterdir())
    labels[0].write_text(
        "0 0.5 0.5 0.25 0.25\n"
        "7 0.5 0.5 0.25 0.25\n"  # no such class
        "0 0.5 0.5 0.25\n"
        "0 0.5 nan 0.25 0.25\n"
        "1 60 40 20 20\n"  # pixels
        "1 0.5 0.5 0 0.5\n"
        "1.0 1.0 0.5 0.5 0.5\n"  # a class as NumPy and pandas write it
        "0 0.5 0.5 0.5 0.5 0.4 0.4 2 0.6 0.6 2\n"  # keypoints, which are no outline, though data.yaml has none
        "1 0.25 0.25 0.75 0.25 0.75 0.5 0.25 0.5\n"  # an outline
    )
    labels[1].unlink()
    labels[3].write_text("")
    labels[4].rename(labels[4].with_suffix(".TXT"))
    (root / "train" / "images" / f"{labels[2].stem}.png").write_bytes(b"")
    data = read_data(root, "yolo", "train")
    assert data.images[0].boxes.tolist() == [[48, 36, 80, 60], [96, 24, 128, 72], [32, 24, 96, 48]]
    assert data.defects.counts() == {
        "object of the unknown class '7': left out": 1,
        "line that is not a class and the numbers of a box or an outline: left out": 2,
        "object with a coordinate that is not a fraction of its image: left out": 2,
        "object without area inside its image: left out": 1,
        "box reaching out of its image by over a pixel: clipped": 1,
        "image without objects: kept as background": 1,
        "image without a label file: kept as background": 1,
        "image that cannot be decoded: skipped": 1,
    }


@pytest.mark.parametrize("visibility", ["", " 2"])
def test_keypoints_are_no_outline(tmp_path: Path, visibility: str) -> None:
    """Of data for pose estimation the boxes are read."""
    root = yolo_roboflow(tmp_path / "data")
    config = root / "data.yaml"
    config.write_text(f"{config.read_text()}\nkpt_shape: [2, {2 + bool(visibility)}]\n")
    for path in (root / "train" / "labels").iterdir():
        path.write_text(f"0 0.5 0.5 0.25 0.25 0.4 0.4{visibility} 0.6 0.9{visibility}\n")
    data = read_data(root, "yolo", "train")
    assert [image.boxes.tolist() for image in data.images] == [[[48, 36, 80, 60]]] * 6 and not data.defects.found


def test_what_is_held_out_is_a_share_of_every_class_and_of_the_seed_alone(tmp_path: Path) -> None:
    data = read_data(write_voc(tmp_path, {"train": 40}), "voc", "train")
    for position, image in enumerate(data.images):  # 10 images with a square, 30 with a disc
        keep = image.labels == (1 if position % 4 == 0 else 0)
        image.labels, image.boxes, image.crowd = image.labels[keep], image.boxes[keep], image.crowd[keep]
    for seed in range(5):
        train, held = hold_out(data, 0.2, seed)
        names = [{image.name for image in part.images} for part in (train, held)]
        assert len(names[1]) == 8 and not names[0] & names[1] and len(names[0] | names[1]) == 40
        assert sum(1 in image.labels.tolist() for image in held.images) == 2
    again = hold_out(data, 0.2, 4)[1]
    assert [image.name for image in again.images] == [image.name for image in held.images]
    assert [image.name for image in hold_out(data, 0.2, 0)[1].images] != [image.name for image in held.images]
    with pytest.raises(ValueError, match="leaves one part empty"):
        hold_out(data, 0.01, 0)


def test_a_class_that_is_not_there_and_a_set_without_objects_are_refused(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": 2, "val": 1})
    with pytest.raises(ValueError, match=r"--classes: no object of 'disk' in split 'train'; it has 'disc', 'square'"):
        check_classes(read_data(root, "voc", "train", ["disk", "square"]), ["disk", "square"])
    for path in (root / "Annotations").iterdir():
        path.write_text("<annotation><size><width>128</width><height>96</height></size></annotation>")
    with pytest.raises(ValueError, match="no object in split 'val'"):
        read_data(root, "voc", "val", ["disc"])


def test_classes_of_other_capitals_and_a_file_for_a_folder_say_what_is_there(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": 2})
    with pytest.raises(ValueError, match=r"no object of 'Disc' in split 'train'; it has 'disc', 'square'$"):
        read_data(root, "voc", "train", ["Disc"])
    (root / "data.yaml").write_text("names: [disc]")
    with pytest.raises(ValueError, match=rf"there is no folder .*data.yaml; pass {root}, which holds this file$"):
        recognize_format(root / "data.yaml")


def test_annotation_files_may_have_suffixes_of_upper_case(tmp_path: Path) -> None:
    for write in (voc_lists, voc_beside):
        root = write(tmp_path / write.__name__)
        for path in [*root.rglob("*.xml")]:
            path.rename(path.with_suffix(".XML"))
        data = read_data(root, "voc", "train")
        assert len(data.images) == 6 and data.defects.counts() == {}


@pytest.mark.parametrize("write", [yolo_roboflow, coco_roboflow, voc_beside])
def test_one_command_trains_and_evaluates_an_export(
    write: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write(tmp_path / "data"), tmp_path / "run"
    detector.train.main(train_flags(root, out))
    assert capsys.readouterr().out.startswith(f"{root}: recognized as {write.__name__.split('_')[0].upper()}\n")
    metrics = evaluate.main([*("--checkpoint", str(out), "--data", str(root), "--device", "cpu", "--workers", "0")])
    assert metrics["AP"] == json.loads((out / "results.json").read_text())["AP"]


def test_without_lists_a_share_is_held_out_and_evaluated_again(tmp_path: Path) -> None:
    root, out = voc_beside(tmp_path / "data"), tmp_path / "run"
    for path in (root / "val").iterdir():
        path.rename(root / "train" / path.name)
    (root / "val").rmdir()
    with pytest.raises(ValueError, match=r"no split 'val'.*--val-fraction 0.2 holds out"):
        detector.train.main(train_flags(root, out))
    trained = detector.train.main(train_flags(root, out, **{"val-fraction": 0.25}))
    names = json.loads((out / "held_out.json").read_text())
    assert len(names) == 2 and read_checkpoint(out)["held_out"] == names
    metrics = evaluate.main([*("--checkpoint", str(out), "--data", str(root), "--device", "cpu", "--workers", "0")])
    assert metrics["images"] == 2 and metrics["AP"] == trained["AP"]
