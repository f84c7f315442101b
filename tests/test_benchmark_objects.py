"""The benchmark's objects are what its documentation says, and its baselines do the job they are timed for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import mg_ops

pytest.importorskip("torchvision")

from benchmarks import baselines, match_speed, report
from benchmarks.cases import CASES, Batch, best_overlaps, fit_to_case, make_batches
from benchmarks.machine import RECORDS
from benchmarks.methods import match, share_equal
from benchmarks.objects import ImageObjects, generate_coco, generate_dense, generate_voc, read_objects
from detector.checkpoint import make_detector

LEVELS = [0.1, 0.25, 0.5, 0.75, 0.9]


class Shapes(NamedTuple):
    """Of all objects, each relative to its image."""

    image_counts: np.ndarray
    counts: np.ndarray  # of the image of each object
    sides: np.ndarray
    aspects: np.ndarray


def measure_shapes(images: list[ImageObjects]) -> Shapes:
    image_counts = np.array([len(image.boxes) for image in images])
    w, h = np.concatenate([(i.boxes[:, 2:] - i.boxes[:, :2]) / [i.width, i.height] for i in images]).T
    return Shapes(image_counts, np.repeat(image_counts, image_counts), np.sqrt(w * h), w / h)


def test_generated_voc_has_the_quantiles_of_voc() -> None:
    shapes = measure_shapes(generate_voc(8000, 20, np.random.default_rng(0)))
    # Measured on VOC 2007 and 2012: 62,199 boxes in 21,503 images.
    assert shapes.image_counts.mean() == pytest.approx(2.893, rel=0.04)
    assert shapes.image_counts.max() <= 56
    np.testing.assert_allclose(np.quantile(shapes.image_counts, LEVELS), [1, 1, 2, 4, 6])
    np.testing.assert_allclose(np.quantile(shapes.sides, LEVELS), [0.074, 0.134, 0.282, 0.524, 0.751], rtol=0.06)
    np.testing.assert_allclose(np.quantile(shapes.aspects, LEVELS), [0.293, 0.447, 0.713, 1.076, 1.576], rtol=0.08)


def test_generated_voc_has_smaller_objects_in_fuller_images() -> None:
    shapes = measure_shapes(generate_voc(8000, 20, np.random.default_rng(1)))
    alone, crowded = shapes.sides[shapes.counts == 1], shapes.sides[shapes.counts >= 13]
    assert np.median(alone) == pytest.approx(0.663, abs=0.03)
    assert np.median(crowded) == pytest.approx(0.117, abs=0.02)


def test_generated_coco_has_the_published_counts_and_shares_of_sizes() -> None:
    shapes = measure_shapes(generate_coco(20_000, 80, np.random.default_rng(0)))
    assert shapes.image_counts.mean() == pytest.approx(7.3, rel=0.03)
    assert shapes.image_counts.min() == 1 and shapes.image_counts.max() == 93
    pixels = shapes.sides**2 * 640 * 480
    assert (pixels < 32**2).mean() == pytest.approx(0.414, abs=0.01)
    assert ((pixels >= 32**2) & (pixels < 96**2)).mean() == pytest.approx(0.343, abs=0.01)
    assert np.median(shapes.aspects) * 640 / 480 == pytest.approx(0.82, rel=0.05)


@pytest.mark.parametrize("count", [1, 3, 500, 5000])
def test_generated_dense_images_have_as_many_objects_as_asked_side_by_side(count: int) -> None:
    images = generate_dense(3, count, 80, np.random.default_rng(0))
    assert [len(image.boxes) for image in images] == [count] * 3
    if count >= 500:
        assert (measure_shapes(images).sides ** 2).sum() / 3 == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("generate", [generate_voc, generate_coco, lambda n, c, rng: generate_dense(n, 40, c, rng)])
def test_generated_boxes_lie_in_the_image_and_have_an_area_and_a_label(generate: object) -> None:
    for image in generate(300, 7, np.random.default_rng(2)):  # type: ignore[operator]
        low, high = image.boxes[:, :2], image.boxes[:, 2:]
        assert (high > low).all() and (low >= -1e-3).all() and (high <= [image.width + 1e-2, image.height + 1e-2]).all()
        assert ((image.labels >= 0) & (image.labels < 7)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Files

COCO = {
    "images": [{"id": 7, "width": 100, "height": 50}, {"id": 8, "width": 20, "height": 20}, {"id": 9}],
    "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
    "annotations": [
        {"image_id": 7, "category_id": 18, "bbox": [10, 20, 30, 5]},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 100, 50], "iscrowd": 1},
    ],
}
FRACTION = {"image_id": 7, "category_id": 3, "bbox": [0.1, 0.1, 0.5, 0.5]}
VOC = """<annotation><size><width>60</width><height>40</height><depth>3</depth></size>
<object><name>dog</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>
<object><name>cat</name><bndbox><xmin>5.5</xmin><ymin>6</ymin><xmax>7</xmax><ymax>8</ymax></bndbox></object></annotation>"""


def test_coco_json_is_read_with_empty_images_and_labels_by_category_id(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_text(json.dumps(COCO))
    (first, second), classes, notes = read_objects(file)
    assert classes == ["car", "dog"]
    assert "image without a width and a height: left out (image 9)" in notes and "1 x crowd region: left out" in notes
    assert (first.width, first.height) == (100, 50)
    assert first.boxes.tolist() == [[10, 20, 40, 25]] and first.labels.tolist() == [1]
    assert second.boxes.shape == (0, 4) and second.labels.shape == (0,)


@pytest.mark.parametrize("folder", ["", "Annotations"])
def test_voc_xml_is_read_from_its_folder_or_the_one_above(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "000001.xml").write_text(VOC)
    (image,), classes, _ = read_objects(tmp_path)
    assert classes == ["cat", "dog"]
    assert (image.width, image.height) == (60, 40)
    assert image.boxes.tolist() == [[0, 1, 30, 40], [4.5, 5, 7, 8]] and image.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "{}", "expected COCO's list of images"),
        ("a.json", '{"images": [], "annotations": []}', "expected annotations of images with a width"),
        ("a.json", json.dumps({**COCO, "annotations": [FRACTION]}), r"a\.json: expected boxes in pixels"),
        ("a.xml", "<annotation>", "annotation file that is not XML"),
        ("a.xml", "<svg/>", "XML file that is not a VOC annotation"),
        ("a.txt", "", "expected annotations"),
    ],
)
def test_what_is_not_annotations_is_refused_by_name(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_objects(tmp_path / name if name.endswith("json") else tmp_path)
    with pytest.raises(ValueError, match="nowhere: expected COCO-style JSON"):
        read_objects(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# Cases and baselines


def test_anchor_grids_have_the_sizes_the_cases_state() -> None:
    retinanet, dense = CASES["coco800"].make_anchors(), CASES["dense"].make_anchors()
    assert (len(retinanet), len(dense)) == (201_600, 121_515)
    # The second cell of stride 8, its anchor of ratio 1: center (12, 4), side 32.
    torch.testing.assert_close(retinanet[9 + 1], torch.tensor([12.0 - 16, 4.0 - 16, 12.0 + 16, 4.0 + 16]))


def test_the_cases_at_320_have_the_anchors_that_the_detectors_train_with() -> None:
    trained = make_detector("fssd", "resnet18", 320, 20).anchors
    for name in ("voc320", "coco320"):
        assert torch.equal(CASES[name].make_anchors(), trained)


def test_objects_are_stretched_to_the_square_and_fitted_to_the_large_image() -> None:
    image = ImageObjects(640, 480, np.array([[64, 48, 128, 96]], dtype=np.float32), np.zeros(1, dtype=np.int64))
    torch.testing.assert_close(fit_to_case(image, CASES["coco320"]), torch.tensor([[32.0, 32.0, 64.0, 64.0]]))
    scale = 800 / 480
    torch.testing.assert_close(fit_to_case(image, CASES["coco800"]), scale * torch.tensor([[64.0, 48.0, 128.0, 96.0]]))


def test_best_overlaps_in_bands_are_those_of_all_pairs() -> None:
    grid = CASES["coco320"].make_anchors()
    image = generate_dense(1, 300, 5, np.random.default_rng(4))[0]
    boxes = fit_to_case(image, CASES["coco320"])
    quality, owner = best_overlaps(grid, boxes)
    iou = baselines.box_iou(boxes, grid)
    torch.testing.assert_close(quality, iou.max(dim=0).values)
    torch.testing.assert_close(iou[owner, torch.arange(len(grid))], quality)


def test_the_same_seed_makes_the_same_batch_and_another_seed_another() -> None:
    case = replace(CASES["voc320"], batch_size=2)
    first, again, other = (make_batches(case, None, 1, seed, "cpu")[0] for seed in (5, 5, 6))
    assert torch.equal(first.logits, again.logits) and torch.equal(first.gt_boxes, again.gt_boxes)
    assert not torch.equal(first.logits, other.logits)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """COCO-like images, some of them without objects."""
    images = generate_coco(5, 80, np.random.default_rng(7))
    images.append(ImageObjects(640, 480, np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64)))
    return make_batches(replace(CASES["coco320"], batch_size=24), images, 1, 0, "cpu")[0]


@pytest.mark.parametrize("baseline", [baselines.match_loop, baselines.match_padded])
def test_a_baseline_agrees_with_mg_ops(baseline: Callable[[Batch], baselines.Match], batch: Batch) -> None:
    expected, answer = match(batch), baseline(batch)
    assert (expected.cls_match == mg_ops.IGNORED).any() and (expected.cls_match >= 0).any()
    # Equal but for qualities so close that native arithmetic orders them otherwise.
    for mine, theirs in ((expected.cls_match, answer.cls_match), (expected.loc_match, answer.loc_match)):
        assert theirs is not None
        labeled = (mine != mg_ops.BACKGROUND) | (theirs != mg_ops.BACKGROUND)
        assert (mine == theirs)[labeled].double().mean() >= 0.999


def test_torchvision_agrees_with_mg_ops_strategy_iou_but_for_tied_best_anchors(batch: Batch) -> None:
    assert share_equal(match(batch, strategy="iou"), baselines.match_by_torchvision(batch)) >= 0.999


def test_the_head_of_a_batch_is_its_first_images_and_objects(batch: Batch) -> None:
    head = batch.head(2, 2)
    assert batch.counts[0] == 0 and batch.counts[1] > 2
    assert head.counts == [0, 2] and head.gt_offsets.tolist() == [0, 0, 2]
    assert torch.equal(head.boxes_list[1], batch.boxes_list[1][:2])
    assert torch.equal(head.padded_boxes[1], head.boxes_list[1])
    assert torch.equal(head.deltas, batch.deltas[:2])


def test_objects_packed_as_lists_and_padded_are_the_same(batch: Batch) -> None:
    assert 0 in batch.counts and batch.gt_offsets.diff().tolist() == batch.counts
    for packed, lists, padded in (
        (batch.gt_boxes, batch.boxes_list, batch.padded_boxes),
        (batch.gt_labels, batch.labels_list, batch.padded_labels),
    ):
        rows = list(zip(padded, batch.counts, strict=True))
        assert torch.equal(torch.cat(lists), packed)
        assert torch.equal(torch.cat([row[:count] for row, count in rows]), packed)
        assert not any(row[count:].any() for row, count in rows)


def test_the_benchmark_runs_checks_and_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    (tmp_path / "boxes.json").write_text(json.dumps(COCO))
    command = ["--quick", "--cases", "coco320", "--threads", "1", "--boxes", str(tmp_path / "boxes.json")]
    assert match_speed.main([*command, "--output", str(output)]) == 0
    assert "Verdict" in capsys.readouterr().out
    figures = json.loads(output.read_text())
    methods = figures["cases"]["coco320"]["methods"]
    for name in ("loop", "batched", "torchvision"):
        assert methods[name]["median_seconds"] > 0 and methods[name]["share_of_labels_equal"] >= 0.999
        assert "cuda" not in methods[name]
    assert methods["loop"]["loop_over_this"] == 1 and methods["batched"]["extra_bytes"] > 0


def test_a_backend_that_cannot_run_here_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        match_speed.parse_options(["--backends", "eager", "abacus"])
    assert "--backends: expected some of" in (said := capsys.readouterr().err) and "got abacus" in said


@pytest.mark.parametrize("file", sorted(RECORDS.glob("*/match_speed.json")), ids=lambda file: file.parent.name)
def test_the_plot_and_the_verdict_are_made_of_the_figures(file: Path, tmp_path: Path) -> None:
    content = json.loads(file.read_text())
    swept = report.swept_cases(content["cases"])
    assert [case["sizes"]["N"] for case in swept] == [5, 50, 500, 5000]
    report.plot_sweep(swept, content["machine"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    lines = report.verdict_lines(content["cases"])
    assert len(lines) == len(content["cases"]) and sum("times as fast as the loop" in line for line in lines) >= 4
