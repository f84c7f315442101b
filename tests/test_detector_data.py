"""Folders laid out as VOC and COCO are read as they come: nothing crashes, nothing is lost uncounted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from small_data import draw_image, voc_object, write_coco, write_voc, write_voc_annotation
from torch.utils.data import DataLoader

from detector.augment import TrainingTransform
from detector.batches import TrainingImages, TrainingSampler, collate, decode_all
from detector.data import default_splits, read_coco, read_voc


def write_defective_voc(root: Path) -> Path:
    """A VOC folder whose every image but the first has something wrong with it."""
    size = (64, 48)
    good = [voc_object("square", (11, 11, 30, 30))]
    annotations: dict[str, list[str]] = {
        "good": [*good, voc_object("disc", (1, 1, 64, 48), difficult=True)],
        "no_area": [*good, voc_object("square", (20, 20, 20, 20)), voc_object("square", (30, 30, 20, 40))],
        "no_objects": [],
        "outside": [*good, voc_object("square", (100, 10, 120, 20)), voc_object("square", (50, 30, 90, 60))],
        "not_a_number": [*good, voc_object("square", (float("nan"), 1, 5, 5))],
        "no_box": [*good, "<object><name>square</name></object>"],
        "broken_image": good,
        "missing_image": good,
    }
    for name, objects in annotations.items():
        write_voc_annotation(root / "Annotations" / f"{name}.xml", size, objects)
        draw_image(root / "JPEGImages" / f"{name}.jpg", [("square", (10, 10, 30, 30))], size, 0)
    (root / "JPEGImages" / "missing_image.jpg").unlink()
    broken = root / "JPEGImages" / "broken_image.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    (root / "Annotations" / "not_xml.xml").write_text("<annotation><object>")
    (root / "Annotations" / "no_size.xml").write_text(f"<annotation>{good[0]}</annotation>")
    draw_image(root / "JPEGImages" / "no_size.jpg", [], size, 0)
    names = [*annotations, "not_xml", "no_size", "no_annotation"]
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n".join(names))
    return root


def test_voc_boxes_labels_and_difficult_flags(tmp_path: Path) -> None:
    data = read_voc(write_defective_voc(tmp_path), "train")
    assert data.class_names == ["disc", "square"]
    good = data.images[0]
    assert (good.width, good.height) == (64, 48)
    # VOC's corners are 1-based and inside the box.
    assert good.boxes.tolist() == [[10, 10, 30, 30], [0, 0, 64, 48]]
    assert good.labels.tolist() == [1, 0]
    assert good.difficult.tolist() == [False, True]


def test_every_voc_defect_is_counted_and_none_stops_the_reader(tmp_path: Path) -> None:
    data = read_voc(write_defective_voc(tmp_path), "train")
    assert data.defects.counts() == {
        "image file missing: skipped": 1,
        "annotation file that is not XML: image skipped": 1,
        "annotation without the image's size: read from the image": 1,
        "image without an annotation file: skipped": 1,
        "object without area inside its image: left out": 3,
        "image without objects: kept as background": 1,
        "box reaching out of its image by over a pixel: clipped": 1,
        "object with a coordinate that is not a number: left out": 1,
        "object without a name or a box: left out": 1,
    }
    by_name = {image.name: image for image in data.images}
    assert list(by_name) == [
        "good", "no_area", "no_objects", "outside", "not_a_number", "no_box", "broken_image", "no_size"
    ]  # fmt: skip
    assert by_name["no_objects"].boxes.shape == (0, 4)
    assert by_name["outside"].boxes.tolist() == [[10, 10, 30, 30], [49, 29, 64, 48]]
    assert (by_name["no_size"].width, by_name["no_size"].height) == (64, 48)
    assert "no_area object 1" in data.summary()


def test_unknown_classes_are_counted(tmp_path: Path) -> None:
    data = read_voc(write_defective_voc(tmp_path), "train", class_names=["square"])
    assert data.defects.counts()["object of the unknown class 'disc': left out"] == 1
    assert data.images[0].labels.tolist() == [0]


def test_a_broken_image_is_stood_in_for_and_reported(tmp_path: Path) -> None:
    data = read_voc(write_defective_voc(tmp_path), "train")
    broken = [image.name for image in data.images].index("broken_image")
    images = TrainingImages(data, TrainingTransform(64), seed=0)
    batch = collate([images[broken, 0], images[0, 0]])
    assert batch.image_names == ["no_size", "good"]
    assert batch.images.shape == (2, 3, 64, 64)
    assert ("image that cannot be decoded: the next one trained on in its place", "broken_image") in batch.defects


def test_only_broken_images_are_an_error_not_a_hang(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": 2})
    for path in (root / "JPEGImages").iterdir():
        path.write_bytes(b"")
    images = TrainingImages(read_voc(root, "train"), TrainingTransform(64), seed=0)
    with pytest.raises(OSError, match="not one of 2 images"):
        images[0, 0]


def test_voc_folders_of_several_years_are_joined(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2007", {"trainval": 2, "test": 1})
    write_voc(tmp_path / "VOC2012", {"trainval": 3})
    train_split, test_split = default_splits(tmp_path, "voc")
    assert len(read_voc(tmp_path, train_split).images) == 5
    assert len(read_voc(tmp_path, test_split).images) == 1


def test_a_missing_split_names_those_that_are_there(tmp_path: Path) -> None:
    write_voc(tmp_path, {"train": 1})
    with pytest.raises(ValueError, match=r"No split 'test'.*train\.txt"):
        read_voc(tmp_path, "test")
    with pytest.raises(ValueError, match=r"instances_val\.json"):
        read_coco(tmp_path, "val")


def test_coco_boxes_categories_crowds_and_areas(tmp_path: Path) -> None:
    root = write_coco(tmp_path, {"train": 2})
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 20, 30, 25], "area": 500, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 128, 10], "area": 1280, "iscrowd": 1},
    ]
    file.write_text(json.dumps(content))
    data = read_coco(root, "train")
    assert data.class_names == ["disc", "square"]
    assert data.category_ids == [3, 7]
    image = data.images[0]
    assert image.boxes.tolist() == [[10, 20, 40, 45], [0, 0, 128, 10]]
    assert image.labels.tolist() == [1, 0]
    assert image.crowd.tolist() == [False, True]
    assert image.areas.tolist() == [500, 1280]
    assert data.defects.counts() == {"image without objects: kept as background": 1}


@pytest.mark.parametrize(
    ("num_images", "epochs", "batch_size"), [(10, 3, 4), (7, 5, 7), (5, 1, 8), (64, 2, 32), (9, 4, 6)]
)
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_sampler_loses_nothing_and_repeats_nothing(
    num_images: int, epochs: int, batch_size: int, num_processes: int
) -> None:
    processes = [
        list(TrainingSampler(num_images, epochs, batch_size, 3, rank, num_processes)) for rank in range(num_processes)
    ]
    steps = [[key for batch in batches for key in batch] for batches in zip(*processes, strict=True)]
    seen = Counter(key for keys in steps for key in keys)
    assert seen == {(index, epoch): 1 for index in range(num_images) for epoch in range(epochs)}
    # Full batches, but the last two, which share what is left evenly; and every process has an image at every step.
    assert all(len(keys) == batch_size for keys in steps[:-2])
    if len(steps) > 1:
        assert 0 <= len(steps[-2]) - len(steps[-1]) <= 1
    assert all(len(batch) > 0 for batches in processes for batch in batches)
    # Epochs come in order, each in another order.
    order = [key for keys in ([sorted(keys, key=lambda key: key[1])] for keys in steps) for key in keys[0]]
    assert [epoch for _, epoch in order] == sorted(epoch for _, epoch in order)


def test_the_sampler_goes_on_at_any_step() -> None:
    whole = list(TrainingSampler(10, 5, 4, seed=1))
    for start in range(len(whole)):
        assert list(TrainingSampler(10, 5, 4, seed=1, start_step=start)) == whole[start:]


def test_the_sampler_refuses_a_split_that_leaves_a_process_idle() -> None:
    with pytest.raises(ValueError, match="without an image"):
        TrainingSampler(3, 1, 8, 0, 0, 4)


def test_neither_workers_nor_memory_change_a_batch(tmp_path: Path) -> None:
    data = read_voc(write_voc(tmp_path, {"train": 6}), "train")
    batches = []
    for num_workers, decoded in ((0, None), (2, None), (1, decode_all(data))):
        loader = DataLoader(
            TrainingImages(data, TrainingTransform(64), 5, decoded),
            batch_sampler=TrainingSampler(6, 2, 4, 5),
            collate_fn=collate,
            num_workers=num_workers,
        )
        torch.rand(num_workers + 1)  # the state of the process's own generator has no say
        batches.append(list(loader))
    for one, *others in zip(*batches, strict=True):
        for other in others:
            assert one.image_names == other.image_names
            assert all(torch.equal(a, b) for a, b in zip(one[:5], other[:5], strict=True))


def test_another_epoch_and_another_seed_augment_differently(tmp_path: Path) -> None:
    data = read_voc(write_voc(tmp_path, {"train": 1}), "train")
    samples = [TrainingImages(data, TrainingTransform(64), seed)[0, epoch] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(samples[0].image, samples[1].image)
    assert not torch.equal(samples[0].image, samples[2].image)
