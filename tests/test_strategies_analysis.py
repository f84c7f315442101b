"""What is said of chance, errors, calibration and labels is what its definitions say of hand-made detections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import write_voc

from benchmarks.strategies import analysis, compare
from benchmarks.strategies.studies import STUDIES
from detector.data import AnnotatedImage, AnnotatedImages
from detector.runs import Row, Setting, Study, parse_flags
from detector.scores import score, to_coco_ground_truth

BOX = (10.0, 10.0, 30.0, 30.0)


def split(*objects: list[tuple[int, tuple[float, float, float, float]]], difficult: bool = False) -> AnnotatedImages:
    """Images of 100 x 100 pixels with (label, box) each, of classes a and b."""
    images = []
    for number, of_image in enumerate(objects):
        boxes = torch.tensor([box for _, box in of_image]).reshape(-1, 4)
        labels, no = torch.tensor([label for label, _ in of_image], dtype=torch.int64), torch.zeros(len(boxes)).bool()
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        images.append(AnnotatedImage(number, f"{number}", Path(), 100, 100, boxes, labels, no, no | difficult, areas))
    return AnnotatedImages("test", images, ["a", "b"], [1, 2])


def detection(image: int, label: int, box: tuple[float, ...], confidence: float) -> dict[str, Any]:
    """As COCO has it, of a box by its corners."""
    x1, y1, x2, y2 = box
    return {"image_id": image, "category_id": label + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": confidence}


def random_split(
    seed: int, difficult: bool = False, num_images: int = 5, fewest: int = 0
) -> tuple[AnnotatedImages, list[dict[str, Any]]]:
    """Images of up to 3 objects, and detections: some right, some near, some of the other class, some anywhere."""
    random = np.random.default_rng(seed)

    def box() -> tuple[float, float, float, float]:
        x, y, width, height = random.uniform((0, 0, 10, 10), (60, 60, 40, 40))
        return x, y, x + width, y + height

    data = split(
        *([(int(random.integers(2)), box()) for _ in range(random.integers(fewest, 4))] for _ in range(num_images))
    )
    found = []
    for image in data.images:
        image.difficult[: len(image.boxes) // 2] = difficult
        for label, corners in zip(image.labels.tolist(), image.boxes.numpy(), strict=True):
            for _ in range(2):
                near = corners + random.normal(0, 3, 4) * random.integers(2)
                found.append(detection(image.image_id, label ^ int(random.random() < 0.2), near, random.random()))
        found += [detection(image.image_id, int(random.integers(2)), box(), random.random()) for _ in range(3)]
    return data, found


# ---- Chance


@pytest.mark.parametrize("difficult", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_the_ap_of_a_resample_is_cocos_of_a_data_set_that_has_its_images_so_often(seed: int, difficult: bool) -> None:
    data, found = random_split(seed, difficult)
    classes = analysis.matches_of(analysis.evaluate_boxes(data, found, "detections"))
    ground_truth = to_coco_ground_truth(data)
    for counts in ([1] * 5, np.random.default_rng(seed).multinomial(5, [0.2] * 5).tolist()):
        copies = [(image, 10 * copy + image) for image, count in enumerate(counts) for copy in range(count)]
        truth = {
            "images": [{**ground_truth["images"][image], "id": number} for image, number in copies],
            "annotations": [
                {**one, "image_id": number, "id": 100 * number + one["id"]}
                for image, number in copies
                for one in ground_truth["annotations"]
                if one["image_id"] == image
            ],
            "categories": ground_truth["categories"],
        }
        detections = [
            {**one, "image_id": number} for image, number in copies for one in found if one["image_id"] == image
        ]
        expected = score(truth, detections)["AP"]
        ap = analysis.resampled_average_precision(classes, np.array(counts))
        assert ap == pytest.approx(float("nan") if expected is None else expected, abs=1e-12, nan_ok=True)


def test_p_is_the_share_of_signs_that_are_as_extreme() -> None:
    assert analysis.sign_flip_p([0.01, 0.02, 0.03]) == 2 / 8
    assert analysis.sign_flip_p([1, 2, 3, 4, 5, 6]) == 2 / 64
    assert analysis.sign_flip_p([1, -1, 2]) == 6 / 8  # sums of 2 or more, or of -2 or less


def test_the_interval_holds_the_mean_difference_of_the_seeds() -> None:
    data, found = random_split(3, num_images=12, fewest=1)
    worse = [{**one, "bbox": [one["bbox"][0] + 2, *one["bbox"][1:]]} for one in found]
    ours, theirs = (analysis.matches_of(analysis.evaluate_boxes(data, of, "detections")) for of in (found, worse))
    interval = analysis.bootstrap_difference([ours, theirs], [theirs, theirs], 12)
    everything = np.ones(12, dtype=np.int64)
    difference = np.subtract(*(analysis.resampled_average_precision(of, everything) for of in (ours, theirs)))
    assert difference > 0.05 and interval["AP"] == pytest.approx(difference / 2)
    assert 0 < interval["low"] < interval["AP"] < interval["high"] < difference


def test_matches_are_kept_for_other_seeds_to_come(tmp_path: Path) -> None:
    data, found = random_split(3)
    runs = {("fssd", 0): analysis.matches_of(analysis.evaluate_boxes(data, found, "detections")), ("fssd", 1): []}
    runs["ssd", 0] = runs["fssd", 0][1:]
    with (tmp_path / "matches.npz").open("wb") as file:
        analysis.write_matches(file, runs)
    read = analysis.read_matches(tmp_path / "matches.npz")
    assert read.keys() == runs.keys() - {("fssd", 1)} and len(read["ssd", 0]) == len(runs["fssd", 0]) - 1
    for run, classes in read.items():
        for ours, theirs in zip(classes, runs[run], strict=True):
            assert all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))
    assert analysis.read_matches(tmp_path / "none.npz") == {}


# ---- Errors


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (detection(0, 1, BOX, 0.9), "class"),
        (detection(0, 0, (20, 10, 40, 30), 0.9), "box"),  # IoU 1/3
        (detection(0, 1, (20, 10, 40, 30), 0.97), "both"),
        (detection(0, 0, (11, 10, 31, 30), 0.8), "duplicate"),
        (detection(0, 0, (70, 70, 90, 90), 0.9), "background"),
        (None, "missed"),
    ],
)
def test_an_error_is_of_the_kind_that_tide_says(found: dict[str, Any] | None, kind: str) -> None:
    pytest.importorskip("tidecv")
    data = split([(0, BOX)], [(0, BOX)], [(1, BOX)])
    detections = [detection(1, 0, BOX, 0.5), detection(2, 1, BOX, 0.95)] + ([found] if found else [])
    if kind in ("duplicate", "background"):
        detections.append(detection(0, 0, BOX, 0.9 if kind == "duplicate" else 0.4))
    errors = analysis.tide_errors(data, detections)
    assert set(errors) == set(analysis.ERRORS.values())
    costly = {name for name, cost in errors.items() if cost > 0}
    # What is near in the wrong class cannot be moved to the object, which stays missed.
    assert costly == ({"both", "missed"} if kind == "both" else {kind} | ({"missed"} & costly))


# ---- Calibration


def test_scores_that_say_the_iou_have_no_calibration_error() -> None:
    ious = np.array([0.0, 0.0, 0.5, 0.9, 1.0])
    assert analysis.calibration_error(ious, ious) == 0
    assert analysis.calibration_error(np.full(4, 0.99), np.array([1.0, 1.0, 0.0, 0.0])) == pytest.approx(0.49)
    # Two bins: half of the detections 0.1 too low, half 0.2 too high.
    assert analysis.calibration_error(np.array([0.3, 0.9]), np.array([0.4, 0.7])) == pytest.approx(0.15)


def test_the_best_threshold_weighs_what_is_wrong_what_is_missed_and_what_is_inexact() -> None:
    scores, ious = np.array([0.9, 0.8, 0.7, 0.6]), np.array([0.9, 0.8, 0.0, 0.1])
    # From 0.9 on: (0.1 + 0 + 2) / 3; 0.8: (0.3 + 0 + 1) / 3; 0.7: (0.3 + 1 + 1) / 4; 0.6: (1.2 + 1 + 0) / 4
    assert analysis.best_threshold(scores, ious, 3) == 0.8
    assert analysis.best_threshold(np.zeros(0), np.zeros(0), 3) == 1.0


def test_isotonic_regression_on_val_repairs_the_scores_of_test() -> None:
    """Every score is twice the IoU that it stands for; a detection that only touches its object is right."""
    boxes = [(10.0, 10.0, 10 + 20 * share, 30.0) for share in (0.2, 0.3, 0.4, 0.5)]  # IoU with BOX: the share
    data = split(*([(0, BOX)] for _ in boxes))
    found = [detection(image, 0, box, 2 * (box[2] - 10) / 20) for image, box in enumerate(boxes)]
    evaluations = [analysis.evaluate_boxes(data, found, "detections") for _ in range(2)]
    errors = analysis.calibration_errors(*evaluations)
    assert errors["laece"] == pytest.approx(0.35) and errors["laece_isotonic"] == pytest.approx(0)
    for one in found:
        one["score"] = 0.9
    errors = analysis.calibration_errors(*(analysis.evaluate_boxes(data, found, "detections") for _ in range(2)))
    assert errors["laece"] == pytest.approx(0.9 - 0.35) and errors["laece_isotonic"] == pytest.approx(0)


def test_nothing_that_is_found_has_no_calibration_error() -> None:
    data = split([(0, BOX)])
    evaluation = analysis.evaluate_boxes(data, [], "detections")
    assert analysis.calibration_errors(evaluation, evaluation) == {}


# ---- Labels


def test_shared_labels_are_positives_of_one_object_in_both() -> None:
    one = torch.tensor([[0, 0, 1, -1, -2]])
    assert analysis.shared_labels(one, one) == 1
    assert analysis.shared_labels(one, torch.tensor([[0, 1, -1, 0, -1]])) == 1 / 4
    assert analysis.shared_labels(torch.full((1, 5), -1), torch.full((1, 5), -2)) == 0


# ---- A study


@pytest.mark.slow
def test_a_study_is_analyzed_from_what_its_runs_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tidecv")
    torch.set_num_threads(1)
    setting = Setting(
        "tiny-64",
        "Tiny",
        "voc",
        parse_flags("--train-split train --eval-split val --image-size 64 --batch 4 --epochs 2"),
    )
    rows = tuple(Row("fssd", "resnet18", strategy) for strategy in ("iou", "mutual"))
    monkeypatch.setitem(STUDIES, "tiny", Study("tiny", "Tiny", setting, rows, (0,), words=("--keep-every", "1")))
    monkeypatch.setattr(analysis, "NUM_RESAMPLES", 20)
    data = ["--data", str(write_voc(tmp_path / "voc", {"train": 8, "val": 2, "test": 3})), "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    assert compare.main(["--study", "tiny", *data]) == 0
    assert compare.main(["--study", "tiny", *data, "--analyze"]) == 0
    content = json.loads(Path("runs/strategies/analyses/tiny.json").read_text())
    (iou,), (mutual,) = content["rows"].values()
    assert iou["labels"]["iou"] == mutual["labels"]["mutual"] == 1 > mutual["labels"]["iou"] > 0
    assert iou["changed_labels"] == {"2": 0.0} and 0 < mutual["changed_labels"]["2"] < 1  # static matching is static
    text = Path("runs/strategies/tiny.md").read_text()
    for title in ("Could it be chance?", "TIDE", "LaECE", "Whom does the rule make learn?", "Do rules agree?"):
        assert title in text
    assert "| FSSD ResNet-18 | iou | 0 | 0.00 |" in text
    # With the runs gone, what they showed can be analyzed again, and added to.
    matches = analysis.read_matches(Path("runs/strategies/analyses/tiny.npz"))
    again, kept = analysis.analyze(STUDIES["tiny"], [], tmp_path / "voc", content, matches)
    assert again == {name: content[name] for name in again} and kept.keys() == matches.keys()
