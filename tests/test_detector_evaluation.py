"""Scores agree with answers worked out on paper; difficult objects, crowds and broken images count as they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import write_checkpoint, write_coco, write_voc

from detector.annotations import Defects
from detector.data import read_voc
from detector.detectors import make_detector
from detector.evaluate import evaluate, main
from detector.inference import Detections, select_detections
from detector.scores import format_metrics, score, to_coco_detections, to_coco_ground_truth


def annotation(number: int, image: int, box: list[float], **flags: int) -> dict[str, Any]:
    entry = {"id": number, "image_id": image, "category_id": 5, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
    return {**entry, **flags}


def detection(image: int, box: list[float], confidence: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": 5, "bbox": box, "score": confidence}


def ground_truth(*annotations: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 200, "height": 200} for number in (1, 2)]
    return {"images": images, "annotations": list(annotations), "categories": [{"id": 5, "name": "thing"}]}


TWO_OBJECTS = ground_truth(annotation(1, 1, [10, 10, 40, 40]), annotation(2, 2, [50, 50, 40, 40]))


def test_a_ranking_worked_out_by_hand() -> None:
    # Right (0.9), wrong (0.8), right (0.7): precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1.
    found = [
        detection(1, [10, 10, 40, 40], 0.9),
        detection(1, [100, 100, 40, 40], 0.8),
        detection(2, [50, 50, 40, 40], 0.7),
    ]
    overall = score(TWO_OBJECTS, found)
    of_class = overall["per_class"]["thing"]
    assert overall["VOC_AP50"] == of_class["VOC_AP50"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert overall["VOC07_AP50"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)  # recalls 0 to 0.5, and 0.6 to 1
    # COCO reads 101 recalls: 0 to 0.50 at precision 1, 0.51 to 1 at 2/3.
    assert overall["AP50"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)
    for value in (overall["AP75"], overall["AP"], overall["AP_medium"], of_class["AP"], of_class["AP75"]):
        assert value == pytest.approx(overall["AP50"])
    assert overall["AP_small"] is None and overall["AP_large"] is None


def test_the_overlap_decides() -> None:
    # IoU 40 * 32 / (40 * 40) = 0.8 with object 1: right up to the threshold 0.80, wrong from 0.85 on.
    overall = score(ground_truth(annotation(1, 1, [10, 10, 40, 40])), [detection(1, [10, 10, 40, 32], 0.9)])
    assert overall["AP50"] == pytest.approx(1) and overall["AP75"] == pytest.approx(1)
    assert overall["AP"] == pytest.approx(0.7)


def test_a_second_detection_of_an_object_is_wrong() -> None:
    found = [
        detection(1, [10, 10, 40, 40], 0.9),
        detection(1, [11, 10, 40, 40], 0.8),
        detection(2, [50, 50, 40, 40], 0.7),
    ]
    assert score(TWO_OBJECTS, found)["VOC_AP50"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


@pytest.mark.parametrize("flag", ["difficult", "iscrowd"])
def test_difficult_objects_and_crowds_are_neither_asked_for_nor_punished(flag: str) -> None:
    truth = ground_truth(annotation(1, 1, [10, 10, 40, 40]), annotation(2, 1, [100, 100, 60, 60], **{flag: 1}))
    right = detection(1, [10, 10, 40, 40], 0.5)
    over_it = detection(1, [100, 100, 60, 60], 0.9)
    for found in ([right], [over_it, right]):
        metrics = score(truth, found)
        for name in ("AP", "AP50", "VOC_AP50", "VOC07_AP50"):
            assert metrics[name] == pytest.approx(1)
        assert metrics["per_class"]["thing"]["objects"] == 1
    # Elsewhere it is a false positive ahead of the right one.
    metrics = score(truth, [detection(1, [140, 20, 40, 40], 0.9), right])
    assert metrics["AP50"] == pytest.approx(0.5) and metrics["VOC_AP50"] == pytest.approx(0.5)


def test_a_crowd_takes_any_number_of_detections_and_a_difficult_object_one() -> None:
    inside = [detection(1, [100, 100, 30, 60], 0.9), detection(1, [130, 100, 30, 60], 0.8)]
    right = detection(1, [10, 10, 40, 40], 0.5)
    crowd = ground_truth(annotation(1, 1, [10, 10, 40, 40]), annotation(2, 1, [100, 100, 60, 60], iscrowd=1))
    assert score(crowd, [*inside, right])["AP50"] == pytest.approx(1)
    difficult = ground_truth(annotation(1, 1, [10, 10, 40, 40]), annotation(2, 1, [100, 100, 60, 60], difficult=1))
    # Each overlaps it by exactly half; only the first may.
    assert score(difficult, [*inside, right])["AP50"] == pytest.approx(0.5)


def in_a_row(ious: list[float], scores: list[float]) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Objects of 20 x 20 pixels side by side, and one detection of each, so wide as to have the IoU."""
    objects = [annotation(number + 1, 1, [30 * number, 0, 20, 20]) for number in range(len(ious))]
    found = [
        detection(1, [30 * n, 0, 20 * iou, 20], score) for n, (iou, score) in enumerate(zip(ious, scores, strict=True))
    ]
    return ground_truth(*objects), found


def test_agreement_of_scores_and_boxes_worked_out_by_hand() -> None:
    # Ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * (1 + 1) / (4 * (16 - 1)) = 0.8.
    truth, found = in_a_row([0.6, 0.7, 0.8, 0.9], [0.1, 0.3, 0.2, 0.4])
    metrics = score(truth, found)
    assert metrics["score_iou_correlation"] == pytest.approx(0.8)
    assert metrics["matched_iou"] == pytest.approx(0.75)
    assert metrics["score_iou_correlation"] == metrics["per_class"]["thing"]["score_iou_correlation"]
    assert "mean IoU 0.750, its rank correlation with the score 0.800" in format_metrics(metrics)
    # Only the order of the scores counts, also that in which they come.
    for scores, correlation in (([0.1, 0.2, 0.3, 0.9], 1), ([0.9, 0.5, 0.4, 0.1], -1)):
        truth, found = in_a_row([0.6, 0.7, 0.8, 0.9], scores)
        assert score(truth, found[::-1])["score_iou_correlation"] == pytest.approx(correlation)


def test_agreement_is_of_right_detections_only() -> None:
    truth, found = in_a_row([0.6, 0.7, 0.8, 0.9], [0.1, 0.3, 0.2, 0.4])
    wrong = [
        detection(1, [0, 0, 9, 20], 0.99),  # IoU 0.45
        detection(1, [90, 0, 12, 20], 0.01),  # the last object again
        detection(2, [0, 0, 20, 20], 0.5),  # in an image without objects
    ]
    difficult = annotation(7, 1, [0, 100, 40, 40], difficult=1)
    truth["annotations"] += [difficult, annotation(8, 1, [60, 100, 40, 40], iscrowd=1)]
    wrong += [detection(1, [0, 100, 40, 40], 0.05), detection(1, [60, 100, 40, 40], 0.06)]
    metrics = score(truth, wrong + found)
    assert metrics["score_iou_correlation"] == pytest.approx(0.8)
    assert metrics["matched_iou"] == pytest.approx(0.75)


def test_agreement_over_classes_is_weighted_by_their_detections() -> None:
    truth, found = in_a_row([0.6, 0.7, 0.8, 0.9], [0.1, 0.2, 0.3, 0.4])
    truth["categories"].append({"id": 6, "name": "other"})
    truth["annotations"] += [annotation(8 + n, 2, [30 * n, 0, 20, 20], category_id=6) for n in range(2)]
    found += [{**detection(2, [30 * n, 0, 18 - n, 20], 0.5 + n / 4), "category_id": 6} for n in range(2)]  # 0.9, 0.85
    metrics = score(truth, found)
    assert metrics["per_class"]["thing"]["score_iou_correlation"] == pytest.approx(1)
    assert metrics["per_class"]["other"]["score_iou_correlation"] == pytest.approx(-1)
    assert metrics["score_iou_correlation"] == pytest.approx((4 - 2) / 6)
    assert metrics["matched_iou"] == pytest.approx((0.6 + 0.7 + 0.8 + 0.9 + 0.9 + 0.85) / 6)


@pytest.mark.parametrize(
    ("ious", "scores"), [([], []), ([0.9], [0.5]), ([0.9, 0.8], [0.5, 0.5]), ([0.8, 0.8], [0.4, 0.5])]
)
def test_without_an_order_there_is_no_agreement(ious: list[float], scores: list[float]) -> None:
    truth, found = in_a_row(ious, scores)
    metrics = score(truth, found)
    assert metrics["score_iou_correlation"] is None
    assert metrics["matched_iou"] == (pytest.approx(sum(ious) / len(ious)) if ious else None)
    assert "score -" in format_metrics(metrics)


@pytest.mark.parametrize("ids", [[0, 1], [7, 7], [None, None], [2**60 + 1, 2**60 + 2], ["a", "b"], [0.0, "0"]])
def test_the_ids_of_annotations_do_not_matter(ids: list[Any]) -> None:
    truth = ground_truth(annotation(1, 1, [10, 10, 40, 40]), annotation(2, 2, [50, 50, 40, 40]))
    for entry, number in zip(truth["annotations"], ids, strict=True):
        entry["id"] = number
        if number is None:
            del entry["id"]
    found = [detection(1, [10, 10, 40, 40], 0.9), detection(2, [50, 50, 40, 40], 0.7)]
    metrics = score(truth, found)
    assert metrics["AP"] == metrics["VOC_AP50"] == pytest.approx(1)
    assert metrics["matched_iou"] == pytest.approx(1)


def test_what_annotations_may_leave_out_or_write_as_text() -> None:
    truth = ground_truth(annotation(1, 1, [10, 10, 40, 40]), annotation(2, 2, [50, 50, 40, 40], iscrowd="0"))
    del truth["annotations"][0]["area"], truth["annotations"][0]["iscrowd"]
    truth["images"][0]["id"] = "1"
    found = [{**detection(1, [10, 10, 40, 40], 0.9), "score": "0.9"}, detection(2, [50, 50, 40, 40], 0.7)]
    metrics = score(truth, found)
    assert metrics["AP"] == pytest.approx(1) and metrics["AP_medium"] == pytest.approx(1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "x"])
def test_a_detection_that_is_not_a_number_is_wrong(bad: Any) -> None:
    right = [detection(1, [10, 10, 40, 40], 0.9), detection(2, [50, 50, 40, 40], 0.7)]
    for wrong in ({**right[1], "bbox": [bad, 50, 40, 40], "score": 0.8}, {**right[1], "bbox": [50, 50, 40, bad]}):
        defects = Defects()
        metrics = score(TWO_OBJECTS, [right[0], wrong], defects)
        assert metrics["VOC_AP50"] == pytest.approx(0.5) and metrics["AP50"] == pytest.approx(51 / 101)
        assert sum(defects.counts().values()) == 1
        json.dumps(metrics, allow_nan=False)
    # A score that is no number comes after all others; a wrong detection before the right one costs precision.
    metrics = score(TWO_OBJECTS, [right[0], {**right[1], "score": bad}, right[1]])
    assert metrics["VOC_AP50"] == pytest.approx(1)
    metrics = score(TWO_OBJECTS, [{**right[0], "bbox": [bad] * 4, "score": 1.0}, *right])
    assert metrics["VOC_AP50"] == pytest.approx(2 / 3)


def test_detections_of_unknown_images_and_classes_are_left_out_and_counted() -> None:
    right = [detection(1, [10, 10, 40, 40], 0.9), detection(2, [50, 50, 40, 40], 0.7)]
    strangers = [detection(77, [10, 10, 40, 40], 1.0), {**detection(1, [10, 10, 40, 40], 1.0), "category_id": 6}]
    defects = Defects()
    assert score(TWO_OBJECTS, [*strangers, *right], defects)["AP"] == pytest.approx(1)
    assert defects.counts() == {
        "detection of an image that is not in the annotations: left out": 1,
        "detection of a class that is not in the annotations: left out": 1,
    }
    with pytest.raises(ValueError, match="none of the 2 detections is of an image and a category of the annotations"):
        score(TWO_OBJECTS, strangers)


@pytest.mark.parametrize(
    ("detections", "message"),
    [
        ({"annotations": []}, "expected COCO's results, a list of .* got an object"),
        ([{"image_id": 1, "category_id": 5, "bbox": [1, 2, 3, 4]}], r"\[0\]: score: expected a number"),
        ([{"image_id": 1, "category_id": 5, "score": 1}], r"\[0\]: expected a box as bbox, and there is none"),
        ([detection(1, [1, 2, 3], 1.0)], r"\[0\]: bbox: expected \[x, y, width, height\], got \[1, 2, 3\]"),
        ([detection(1, [1, 2, 3, 4], 1.0), 7], r"\[1\]: expected an id as image_id"),
        ([{**detection(1, [1, 2, 3, 4], 1.0), "image_id": 1.5}], r"expected an id as image_id, got 1\.5"),
    ],
)
def test_results_that_are_not_cocos_are_named_in_one_line(detections: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        score(TWO_OBJECTS, detections, sources=("a.json", "d.json"))
    assert str(raised.value).startswith("d.json") and "\n" not in str(raised.value)


def crowded(count: int) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """So many objects of one class in an image, and each found exactly."""
    boxes = [[10 * (k % 20), 10 * (k // 20), 8, 8] for k in range(count)]
    truth = ground_truth(*[annotation(k + 1, 1, box) for k, box in enumerate(boxes)])
    return truth, [detection(1, box, 1 - k / 1000) for k, box in enumerate(boxes)]


def test_cocos_limit_of_100_detections_is_said_where_it_matters() -> None:
    metrics = score(*crowded(100))
    assert metrics["AP"] == pytest.approx(1) and metrics["max_detections"] == 100 and "AP_at_100" not in metrics
    truth, found = crowded(250)
    metrics = score(truth, found)
    # 100 of 250: recall 0.4, so 41 of the 101 recalls that COCO reads have precision 1.
    assert metrics["AP"] == pytest.approx(1) and metrics["AP_at_100"] == pytest.approx(41 / 101)
    assert metrics["AR100"] == pytest.approx(0.4) and metrics["max_detections"] == 300
    text = format_metrics(metrics)
    assert "the best 300 detections per image and class (an image has 250 objects of one class)" in text
    assert "with the best 100, COCO's limit, it is 40.6" in text
    as_coco = score(truth, found, max_detections=100)
    assert as_coco["AP"] == pytest.approx(41 / 101)
    assert "no detector can find them all" in format_metrics(as_coco)


def test_the_command_line_says_what_is_wrong_with_its_files(tmp_path: Path) -> None:
    good, cut, absent = tmp_path / "a.json", tmp_path / "cut.json", tmp_path / "none.json"
    good.write_text(json.dumps(TWO_OBJECTS))
    cut.write_text(json.dumps([detection(1, [10, 10, 40, 40], 0.9)])[:30])
    for truth, found in ((good, cut), (good, absent), (absent, cut), (good, good)):
        wrong = truth if truth == absent else found
        with pytest.raises(ValueError, match=f"^{wrong}: expected"):
            main(["--annotations", str(truth), "--detections", str(found)])


def test_no_detection_and_no_object() -> None:
    nothing = score(TWO_OBJECTS, [])
    assert nothing["AP"] == nothing["AP50"] == nothing["VOC_AP50"] == 0
    assert score(ground_truth(), [])["AP"] is None
    assert score(ground_truth(), [])["VOC_AP50"] is None


def test_nms_is_class_by_class_and_scores_must_exceed_the_threshold() -> None:
    anchors = torch.tensor([[10.0, 10, 50, 50], [12, 10, 52, 50], [60, 60, 90, 90]])
    logits = torch.full((1, 3, 2), -20.0)
    logits[0, 0, 0], logits[0, 1, 0], logits[0, 1, 1], logits[0, 2, 0] = 2, 3, 1, -5.4  # 0.0045 is under 0.005
    found = select_detections(logits, torch.zeros(1, 3, 4), anchors, 64)[0]
    assert found.labels.tolist() == [0, 1]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 1.0]).sigmoid())
    assert found.boxes.tolist() == [[12, 10, 52, 50], [12, 10, 52, 50]]
    logits[0, 2, 0] = -5
    found = select_detections(logits, torch.zeros(1, 3, 4), anchors, 64)[0]
    assert found.boxes[-1].tolist() == [60, 60, 64, 64]  # clipped to the image


def test_at_most_300_detections_an_image() -> None:
    anchors = torch.arange(400.0).reshape(-1, 1) * torch.ones(4) + torch.tensor([0.0, 0, 0.5, 0.5])
    found = select_detections(torch.randn(1, 400, 1), torch.zeros(1, 400, 4), anchors, 512)[0]
    assert len(found.labels) == 300
    assert (found.scores.diff() <= 0).all()


def test_perfect_detections_score_one_and_a_broken_image_is_left_out(tmp_path: Path) -> None:
    data = read_voc(write_voc(tmp_path, {"val": 3}), "val")
    found = {
        position: Detections(image.boxes, torch.full((len(image.labels),), 0.9), image.labels)
        for position, image in enumerate(data.images)
        if position != 1
    }
    detections = to_coco_detections(found, data)
    assert score(to_coco_ground_truth(data), detections)["AP"] < 0.8
    metrics = score(to_coco_ground_truth(data, leave_out=[1]), detections)
    assert metrics["AP"] == pytest.approx(1) and metrics["VOC_AP50"] == pytest.approx(1)
    assert metrics["images"] == 2

    data.images[2].path.write_bytes(b"broken")
    model = make_detector("fssd", "resnet18", 64, 2)
    metrics, _ = evaluate(model, data, 64, "cpu", num_workers=0, show_progress=False)
    assert metrics["images"] == 2 and metrics["images_left_out"] == [data.images[2].name]
    assert data.defects.counts()["image that cannot be decoded: left out of the evaluation"] == 1
    assert model.training  # its mode is left as it was found


def test_the_command_line_scores_a_checkpoint_on_voc_and_coco_alike(tmp_path: Path) -> None:
    """The same images laid out both ways give the same scores; the detections written score the same again."""
    write_checkpoint(tmp_path)
    voc = write_voc(tmp_path / "voc", {"val": 3})
    coco = write_coco(tmp_path / "coco", {"val": 3})
    for image in (coco / "val").iterdir():  # the same pixels: COCO's were saved as JPEG
        number = int(image.stem) - 1
        (voc / "JPEGImages" / f"image_{number:03d}.png").unlink()
        (voc / "JPEGImages" / f"image_{number:03d}.jpg").write_bytes(image.read_bytes())
    common = ["--checkpoint", str(tmp_path), "--workers", "0", "--device", "cpu"]
    of_voc = main(["--data", str(voc), "--format", "voc", *common])
    of_coco = main(["--data", str(coco), "--format", "coco", "--out", str(tmp_path / "out"), *common])
    assert of_voc["AP"] is not None and of_voc["AP50"] >= of_voc["AP"]
    for name in ("AP", "AP50", "AP75", "VOC_AP50", "VOC07_AP50"):
        assert of_voc[name] == pytest.approx(of_coco[name], abs=1e-9)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["per_class"].keys() == {"disc", "square"}
    annotations = str(coco / "annotations" / "instances_val.json")
    again = main(["--annotations", annotations, "--detections", str(tmp_path / "out" / "detections.json")])
    assert again["AP"] == pytest.approx(of_coco["AP"], abs=1e-6)


def test_categories_of_one_name_are_scored_as_the_one_class_they_are_read_as() -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [1, 1, 20, 20]},
            {"image_id": 1, "category_id": 2, "bbox": [30, 10, 20, 20]},
        ],
        "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "cell"}],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": entry["bbox"], "score": 0.5} for entry in content["annotations"]]
    metrics = score(content, found)
    assert metrics["AP"] == pytest.approx(1) and metrics["VOC_AP50"] == pytest.approx(1)
    assert list(metrics["per_class"]) == ["cell"] and metrics["per_class"]["cell"]["objects"] == 2


def test_annotations_that_are_fractions_are_not_scored() -> None:
    content = {
        "images": [{"id": 1}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0.1, 0.1, 0.5, 0.5]}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    with pytest.raises(ValueError, match=r"a\.json: expected boxes in pixels"):
        score(content, [], sources=("a.json", "b.json"))
