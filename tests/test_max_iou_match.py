"""Max-IoU matching: answers worked out by hand, and every label of the libraries whose rule it is.

torchvision's SSD and RPN, detectron2 (whose `Matcher` is torchvision's) and mmdetection's `MaxIoUAssigner`. Left out of
the comparison are the images in which no anchor overlaps some object: there those make positives of every anchor that
does not overlap it. No label may differ in any other, ties included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Target, fuzz_cases
from torch import Tensor

import mg_ops
from benchmarks import upstream

BACKGROUND, IGNORED = mg_ops.BACKGROUND, mg_ops.IGNORED
LOW_QUALITY = ("none", "keep_owner", "take_all", "take_first")

WITHOUT_TRITON = True


def box(width: float, x: float = 0.0) -> list[float]:
    """Of height 10, at x: its IoU with box(10, x) is width / 10."""
    return [x, 0.0, x + width, 10.0]


def labels(target: Target, anchors: list[list[float]], gt_boxes: list[list[float]], **options: Any) -> list[int]:
    match = mg_ops.max_iou_match(
        torch.tensor(anchors, device=target.device).reshape(-1, 4),
        [torch.tensor(gt_boxes, device=target.device).reshape(-1, 4)],
        [torch.zeros(len(gt_boxes), dtype=torch.int64, device=target.device)],
        backend=target.backend,
        **options,
    )
    assert match.num_pos.tolist() == [match.cls_match[0].tolist().count(index) for index in range(len(gt_boxes))]
    return match.cls_match[0].tolist()


def test_thresholds_are_part_of_what_they_begin(target: Target) -> None:
    anchors = [box(10), box(5), box(4.9), box(4), box(3.9), box(10, 50)]
    wanted = [0, 0, IGNORED, IGNORED, BACKGROUND, BACKGROUND]
    assert labels(target, anchors, [box(10)]) == wanted
    wanted = [0, 0, BACKGROUND, BACKGROUND, BACKGROUND, BACKGROUND]
    assert labels(target, anchors, [box(10)], iou_ignored=0.5) == wanted


def test_the_lower_object_owns_a_tie(target: Target) -> None:
    assert labels(target, [box(10)], [box(5), box(10), box(10)]) == [1]


@pytest.mark.parametrize(
    ("low_quality", "wanted"),
    [
        ("none", [BACKGROUND, BACKGROUND, BACKGROUND]),
        ("keep_owner", [0, 0, BACKGROUND]),
        ("take_all", [0, 0, BACKGROUND]),
        ("take_first", [0, BACKGROUND, BACKGROUND]),
    ],
)
def test_an_object_without_a_good_anchor_gets_its_best(target: Target, low_quality: str, wanted: list[int]) -> None:
    assert labels(target, [box(3), box(3), box(2)], [box(10)], low_quality=low_quality) == wanted
    assert labels(target, [box(3), box(3), box(2)], [box(10)], low_quality=low_quality, iou_low_quality=0.3) == wanted
    nothing = labels(target, [box(3), box(3), box(2)], [box(10)], low_quality=low_quality, iou_low_quality=0.31)
    assert nothing == [BACKGROUND] * 3


def test_a_best_anchor_keeps_its_owner_or_is_taken(target: Target) -> None:
    """Object 1 lies in object 0, whose anchor is its best too."""
    anchors, objects = [box(10), box(10, 50)], [box(10), box(6)]
    assert labels(target, anchors, objects) == [0, BACKGROUND]
    for low_quality in ("take_all", "take_first"):
        assert labels(target, anchors, objects, low_quality=low_quality) == [1, BACKGROUND]
        assert labels(target, anchors, objects[::-1], low_quality=low_quality) == [1, BACKGROUND]  # the later one


def test_objects_that_no_anchor_overlaps_match_nothing(target: Target) -> None:
    anchors = [box(10), box(10, 50), box(10, 70)]
    bad = [
        [5.0, 5.0, 5.0, 5.0],
        [9.0, 0.0, 3.0, 9.0],
        [float("nan"), 0.0, 5.0, 5.0],
        box(5, 200),
        [0.0, 0.0, float("inf"), 9.0],
    ]
    for low_quality in LOW_QUALITY:
        assert labels(target, anchors, [*bad, box(10)], low_quality=low_quality) == [5, BACKGROUND, BACKGROUND]
        assert labels(target, anchors, bad, low_quality=low_quality) == [BACKGROUND] * 3
        assert labels(target, anchors, [], low_quality=low_quality) == [BACKGROUND] * 3
        assert labels(target, [], [box(10)], low_quality=low_quality) == []


def test_bad_anchors_are_background(target: Target) -> None:
    anchors = [[float("nan")] * 4, [0.0, 0.0, float("inf"), 10.0], [10.0, 10.0, 0.0, 0.0], box(10)]
    for low_quality in LOW_QUALITY:
        assert labels(target, anchors, [box(10)], low_quality=low_quality) == [BACKGROUND] * 3 + [0]


def test_crowd_regions_ignore_background_and_match_nothing(target: Target) -> None:
    anchors = torch.tensor([box(10), box(10, 20), box(10, 24), box(10, 40)], device=target.device)
    for low_quality in LOW_QUALITY:
        match = mg_ops.max_iou_match(
            anchors,
            [torch.tensor([box(10), box(10, 20)], device=target.device)],
            [torch.zeros(2, dtype=torch.int64, device=target.device)],
            gt_crowd=[torch.tensor([False, True], device=target.device)],
            low_quality=low_quality,
            backend=target.backend,
        )
        assert match.cls_match.tolist() == [[0, IGNORED, IGNORED, BACKGROUND]]
        assert match.num_pos.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"low_quality": "best"}, ValueError, "^low_quality: expected one of 'none', 'keep_owner', .*got 'best'"),
        ({"low_quality": True}, ValueError, "^low_quality: expected one of"),
        ({"iou_positive": 1.5}, ValueError, "^iou_positive: expected a threshold"),
        ({"iou_positive": 0.3}, ValueError, "^iou_ignored: must not exceed iou_positive"),
        ({"iou_low_quality": -0.1}, ValueError, "^iou_low_quality: expected a threshold"),
        ({"iou_low_quality": False}, TypeError, "^iou_low_quality: expected a number"),
        ({"iou_low_quality": None}, TypeError, "^iou_low_quality: expected a number"),
        ({"crowd_overlap": 0}, ValueError, "^crowd_overlap: expected a threshold"),
    ],
)
def test_a_wrong_option_raises(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mg_ops.MaxIouMatcher(**options)
    with pytest.raises(error, match=message):
        mg_ops.max_iou_match(torch.zeros(1, 4), [torch.zeros(0, 4)], [torch.zeros(0).long()], **options)


# ---------------------------------------------------------------------------------------------------------------------
# The libraries' own


def random_image(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Anchors (A, 4) and objects (G, 4); half of them of whole numbers, with which many pairs tie."""

    def boxes(count: int, least: float, spread: float) -> Tensor:
        corner = torch.rand(count, 2, generator=generator) * 100
        size = least + spread * torch.rand(count, 2, generator=generator)
        return torch.cat([corner, corner + size], dim=1)

    num_anchors = int(torch.randint(1, 400, (), generator=generator))
    num_objects = int(torch.randint(1, 12, (), generator=generator))
    kind = int(torch.randint(0, 4, (), generator=generator))
    anchors, gt_boxes = boxes(num_anchors, 5, 40), boxes(num_objects, 5, 40)
    if kind == 1:  # squares of one size on a grid, and small objects in several of them
        corner = (torch.rand(num_anchors, 2, generator=generator) * 12).floor() * 8
        anchors, gt_boxes = torch.cat([corner, corner + 32], dim=1), boxes(num_objects, 2, 6)
    elif kind == 2:
        anchors, gt_boxes = anchors.round(), gt_boxes.round()
    elif kind == 3:
        anchors, gt_boxes = (anchors / 10).round(), (gt_boxes / 10).round()
    has_size = (gt_boxes[:, 2:] > gt_boxes[:, :2]).all(1)
    return anchors, gt_boxes[has_size]


def compare(
    target: Target,
    upstream_labels: Callable[[Tensor, Tensor], Tensor],
    options: dict[str, Any],
    unmatched: bool = False,
) -> None:
    """Compares with the labels that a library gives for anchors and objects, on random images.

    Args:
        unmatched: whether to compare images in which no anchor overlaps some object.
    """
    generator = torch.Generator().manual_seed(0)
    compared = positives = 0
    for _ in range(fuzz_cases(120)):
        anchors, gt_boxes = random_image(generator)
        overlapped = (mg_ops.box_iou(anchors, gt_boxes) > 0).any(0)
        if len(gt_boxes) == 0 or not (unmatched or bool(overlapped.all())):
            continue
        compared += 1
        match = mg_ops.max_iou_match(
            anchors.to(target.device),
            [gt_boxes.to(target.device)],
            [torch.zeros(len(gt_boxes), dtype=torch.int64, device=target.device)],
            backend=target.backend,
            **options,
        )
        wanted = upstream_labels(anchors, gt_boxes)
        assert match.cls_match[0].tolist() == wanted.tolist()
        positives += int((wanted >= 0).sum())
    assert compared > fuzz_cases(60) and positives > compared // 4


@pytest.mark.parametrize(("high", "low"), [(0.5, 0.4), (0.7, 0.3), (0.5, 0.5)])
@pytest.mark.parametrize("allow_low_quality_matches", [False, True])
def test_torchvisions_matcher(target: Target, high: float, low: float, allow_low_quality_matches: bool) -> None:
    detection = pytest.importorskip("torchvision.models.detection._utils")
    ops = pytest.importorskip("torchvision.ops")
    matcher = detection.Matcher(high, low, allow_low_quality_matches)
    options = {
        "iou_positive": high,
        "iou_ignored": low,
        "low_quality": "keep_owner" if allow_low_quality_matches else "none",
    }
    compare(
        target,
        lambda anchors, gt_boxes: matcher(ops.box_iou(gt_boxes, anchors)),
        options,
        unmatched=not allow_low_quality_matches,
    )


def test_torchvisions_ssd_matcher(target: Target) -> None:
    detection = pytest.importorskip("torchvision.models.detection._utils")
    ops = pytest.importorskip("torchvision.ops")
    matcher = detection.SSDMatcher(0.5)
    options = {"iou_positive": 0.5, "iou_ignored": 0.5, "low_quality": "take_first"}
    compare(target, lambda anchors, gt_boxes: matcher(ops.box_iou(gt_boxes, anchors)), options)


@pytest.mark.parametrize(
    ("high", "low", "least"), [(0.5, 0.4, 0.0), (0.7, 0.3, 0.3), (0.5, 0.5, 0.0)], ids=["RetinaNet", "RPN", "SSD"]
)
@pytest.mark.parametrize("low_quality", ["none", "take_all", "take_first"])
def test_mmdetections_assigner(target: Target, high: float, low: float, least: float, low_quality: str) -> None:
    try:
        make = upstream.mmdet_assigners()["MaxIoUAssigner"]
    except ImportError as error:
        pytest.skip(str(error))
    assigner = make(
        high,
        low,
        min_pos_iou=least,
        match_low_quality=low_quality != "none",
        gt_max_assign_all=low_quality == "take_all",
    )

    def assign(anchors: Tensor, gt_boxes: Tensor) -> Tensor:
        objects = upstream.instances(bboxes=gt_boxes, labels=torch.zeros(len(gt_boxes), dtype=torch.int64))
        return upstream.labels_of_mmdet(assigner.assign(upstream.instances(priors=anchors), objects).gt_inds)

    options = {"iou_positive": high, "iou_ignored": low, "low_quality": low_quality, "iou_low_quality": least}
    compare(target, assign, options, unmatched=low_quality == "none" or least > 0)
