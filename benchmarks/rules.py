"""Compares the rules with the libraries whose rules they are: every label that differs, and the time of a call.

    python benchmarks/rules.py --boxes instances.json --boxes annotations/  # labels, on the boxes of real images
    python benchmarks/rules.py --run RUN --data FOLDER --split val          # labels, on what a detector predicts
    python benchmarks/rules.py --time                                       # time, both taking turns

With --boxes predictions are made as those of the benchmark (cases.py), and rules of points are given the predicted
boxes of square anchors of five strides. The detector of --run, of `detector.train`, has one anchor per location. A
library that is not installed is left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from torch import Tensor

import mg_ops
from benchmarks import upstream
from benchmarks.cases import CASES, CODER, Batch, Case, make_batches, make_pyramid
from benchmarks.objects import read_objects

ONE_BATCH = 16  # images of a batch in the comparison of labels
CALLS_A_TURN = 10  # of ours, for one of theirs
MOST_NUMBERS = 500_000_000  # of an image's matrix, of which libraries keep several: anchors x objects (x classes)


class Image(NamedTuple):
    """What a library's rule is given of one image."""

    anchors: Tensor  # (A, 4)
    gt_boxes: Tensor  # (G, 4)
    gt_labels: Tensor  # (G,)
    pred_boxes: Tensor  # (A, 4)
    scores: Tensor  # (A, C) as the rule takes them
    level_sizes: list[int]  # of anchors by level, A in all; empty where the rule does not know levels


class Upstream(NamedTuple):
    """A library's rule, and the options that make it ours."""

    rule: str
    name: str
    options: dict[str, Any]
    labels: Callable[[Image], Tensor]
    """(A,) what it gives the anchors of an image, numbered as a match is."""
    of_points: bool = False
    """Whether it reads predictions, and anchors stand for points."""
    probabilities: bool = False
    """Whether it reads them rather than logits."""
    by_level: bool = False
    """Whether it is told how many anchors each level has."""
    unexplained: Callable[[Image, Tensor, Tensor], int] | None = None
    """How many of our labels (A,) and the library's differ, and are no near tie; None: nobody counts."""


POINT_STRIDES = (8, 16, 32)
POINT_ANCHOR = 5.0  # side of the anchors whose predicted boxes the points are given, in strides


LEVEL_STRIDES = (8, 16, 32, 64, 128)
LEVEL_ANCHOR = 8.0  # side of the one anchor of a location, in strides


def case_of(one: Upstream, case: Case) -> Case:
    """The case with the anchors of the rule."""
    if one.of_points:
        return points_case(case)
    if one.by_level:
        make_anchors = partial(make_levels, *case.image_size)
        return replace(case, make_anchors=make_anchors, name=f"{case.name} levels")
    return case


def make_levels(width: int, height: int) -> Tensor:
    """(A, 4) one square anchor a location, P3 to P7."""
    return make_pyramid(width, height, LEVEL_STRIDES, LEVEL_ANCHOR, [1.0])[1::3]  # those of ratio 1


def level_sizes(width: int, height: int) -> list[int]:
    """How many of them each level has."""
    return [math.ceil(width / stride) * math.ceil(height / stride) for stride in LEVEL_STRIDES]


def points_case(case: Case) -> Case:
    """The case with one square anchor for each point of an anchor-free detector."""
    return replace(case, make_anchors=partial(make_points, *case.image_size, POINT_ANCHOR), name=f"{case.name} points")


def make_points(width: int, height: int, size: float) -> Tensor:
    """(A, 4) a square of so many strides around each point."""
    levels = []
    for stride in POINT_STRIDES:
        boxes = make_pyramid(width, height, [stride], 1.0, [1.0])[1::3]  # those of ratio 1
        points = (boxes[:, :2] + boxes[:, 2:]) / 2
        levels.append(mg_ops.anchors_from_points(points, torch.full((len(points),), float(stride)), size))
    return torch.cat(levels)


def torchvision_rules() -> Iterator[Upstream]:
    """Its matchers, each on the IoU of one image."""
    from torchvision.models.detection import _utils as detection
    from torchvision.ops import box_iou

    def labels(matcher: Any) -> Callable[[Image], Tensor]:
        return lambda image: matcher(box_iou(image.gt_boxes, image.anchors))

    yield Upstream("max_iou_match", "torchvision RetinaNet", {}, labels(detection.Matcher(0.5, 0.4, True)))
    options: dict[str, Any] = {"iou_positive": 0.7, "iou_ignored": 0.3}
    yield Upstream("max_iou_match", "torchvision RPN", options, labels(detection.Matcher(0.7, 0.3, True)))
    options = {"iou_positive": 0.5, "iou_ignored": 0.5, "low_quality": "take_first"}
    yield Upstream("max_iou_match", "torchvision SSD", options, labels(detection.SSDMatcher(0.5)))


def mmdet_rules() -> Iterator[Upstream]:
    """Its assigners, each for one image."""
    make = upstream.mmdet_assigners()["MaxIoUAssigner"]

    def labels(assigner: Any) -> Callable[[Image], Tensor]:
        def assign(image: Image) -> Tensor:
            objects = upstream.instances(bboxes=image.gt_boxes, labels=image.gt_labels)
            return upstream.labels_of_mmdet(assigner.assign(upstream.instances(priors=image.anchors), objects).gt_inds)

        return assign

    yield Upstream("max_iou_match", "mmdetection RetinaNet", {"low_quality": "take_all"}, labels(make(0.5, 0.4)))
    options = {"iou_positive": 0.7, "iou_ignored": 0.3, "low_quality": "take_all", "iou_low_quality": 0.3}
    yield Upstream("max_iou_match", "mmdetection RPN", options, labels(make(0.7, 0.3, min_pos_iou=0.3)))
    options = {"iou_positive": 0.5, "iou_ignored": 0.5, "low_quality": "take_first"}
    yield Upstream("max_iou_match", "mmdetection SSD", options, labels(make(0.5, 0.5, gt_max_assign_all=False)))


def mmdet_level_rules() -> Iterator[Upstream]:
    """ATSS; the second time with k as MONAI's for nine anchors a location."""
    make = upstream.mmdet_assigners()["ATSSAssigner"]

    def rule(k: int) -> Upstream:
        assigner = make(k)

        def labels(image: Image) -> Tensor:
            objects = upstream.instances(bboxes=image.gt_boxes, labels=image.gt_labels)
            priors = upstream.instances(priors=image.anchors)
            return upstream.labels_of_mmdet(assigner.assign(priors, image.level_sizes, objects).gt_inds)

        def unexplained(image: Image, match: Tensor, wanted: Tensor) -> int:
            tied = upstream.near_ties_of_atss(image.anchors, image.level_sizes, image.gt_boxes, k)
            return upstream.count_unexplained(match, wanted, tied, image.anchors, image.gt_boxes)

        name = "mmdetection ATSS" if k == 9 else f"mmdetection ATSS, k = {k}"
        return Upstream("atss_match", name, {"k": k}, labels, by_level=True, unexplained=unexplained)

    yield rule(9)
    yield rule(36)


def mmdet_point_rules() -> Iterator[Upstream]:
    """Those that read predictions."""
    assigners = upstream.mmdet_assigners()

    def labels(assigner: Any) -> Callable[[Image], Tensor]:
        def assign(image: Image) -> Tensor:
            predictions = upstream.instances(
                bboxes=image.pred_boxes, scores=image.scores, priors=priors_of(image.anchors)
            )
            objects = upstream.instances(bboxes=image.gt_boxes, labels=image.gt_labels)
            return upstream.labels_of_mmdet(assigner.assign(predictions, objects).gt_inds)

        return assign

    simota, soft_label = assigners["SimOTAAssigner"](), assigners["DynamicSoftLabelAssigner"]()
    yield Upstream("simota_match", "mmdetection YOLOX", {}, labels(simota), of_points=True, probabilities=True)
    yield Upstream("dynamic_soft_label_match", "mmdetection RTMDet", {}, labels(soft_label), of_points=True)


def libreyolo_rules() -> Iterator[Upstream]:
    """YOLOX's own; the objectness of an anchor is 1, so that its probabilities are roots of those of the classes."""
    head = upstream.libreyolo_yolox_head()

    def labels(image: Image) -> Tensor:
        logits = (image.scores * image.scores).logit()
        sure = torch.full_like(logits[:, :1], torch.inf)
        boxes = image.gt_boxes, image.gt_labels, image.pred_boxes
        return upstream.labels_of_yolox(head, priors_of(image.anchors), *boxes, logits, sure)[0]

    options = {"candidates": "center", "center_radius": 1.5}
    yield Upstream("simota_match", "LibreYOLO YOLOX", options, labels, of_points=True, probabilities=True)


def task_aligned_rule(name: str, labels: Callable[[Image], Tensor], **options: Any) -> Upstream:
    """A library's form of task-aligned matching."""
    matcher = mg_ops.TaskAlignedMatcher(**options)

    def unexplained(image: Image, match: Tensor, wanted: Tensor) -> int:
        predictions = priors_of(image.anchors)[:, :2], image.scores, image.pred_boxes
        return len(
            upstream.unexplained_of_task_aligned(match, wanted, matcher, *predictions, image.gt_boxes, image.gt_labels)
        )

    return Upstream(
        "task_aligned_match", name, options, labels, of_points=True, probabilities=True, unexplained=unexplained
    )


def ultralytics_rules() -> Iterator[Upstream]:
    """The assigners of YOLOv8 to YOLO12, and of the one-to-one head of YOLO26."""
    from ultralytics.utils.tal import TaskAlignedAssigner

    def labels(**options: Any) -> Callable[[Image], Tensor]:
        assigners: dict[int, Any] = {}

        def assign(image: Image) -> Tensor:
            num_classes, num_objects = image.scores.shape[1], len(image.gt_boxes)
            assigner = assigners.setdefault(
                num_classes,
                TaskAlignedAssigner(
                    num_classes=num_classes, alpha=0.5, beta=6.0, stride=list(POINT_STRIDES), **options
                ),
            )
            objects = image.gt_labels.reshape(1, num_objects, 1), image.gt_boxes[None], torch.ones(1, num_objects, 1)
            points = priors_of(image.anchors)[:, :2]
            *_, positive, index = assigner(image.scores[None], image.pred_boxes[None], points, *objects)
            return torch.where(positive[0].bool(), index[0].long(), mg_ops.BACKGROUND)

        return assign

    minimum_side = float(POINT_STRIDES[1])
    yield task_aligned_rule("ultralytics YOLO11", labels(topk=10), minimum_side=minimum_side)
    one_to_one = {"k": 7, "k_after_conflict": 1, "minimum_side": minimum_side}
    yield task_aligned_rule("ultralytics YOLO26, one-to-one", labels(topk=7, topk2=1), **one_to_one)


def tood_rules() -> Iterator[Upstream]:
    """TOOD."""
    assigner = upstream.mmdet_assigners()["TaskAlignedAssigner"](topk=13)

    def labels(image: Image) -> Tensor:
        predictions = upstream.instances(priors=image.anchors, bboxes=image.pred_boxes, scores=image.scores)
        objects = upstream.instances(bboxes=image.gt_boxes, labels=image.gt_labels)
        return upstream.labels_of_mmdet(assigner.assign(predictions, objects, alpha=1, beta=6).gt_inds)

    options = {"alpha": 1.0, "k": 13, "overlap": "iou", "candidates": "all", "conflict": "selecting"}
    yield task_aligned_rule("mmdetection TOOD", labels, **options, center_margin=0.01)


def priors_of(anchors: Tensor) -> Tensor:
    """(A, 4) center and stride, twice."""
    return torch.cat([(anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]], dim=1)


def installed_rules(only: str | None) -> list[Upstream]:
    """All of them, or those that `only` is part of the name of; says which library is missing."""
    found: list[Upstream] = []
    for rules in (
        torchvision_rules,
        mmdet_rules,
        mmdet_level_rules,
        tood_rules,
        ultralytics_rules,
        mmdet_point_rules,
        libreyolo_rules,
    ):
        try:
            found += rules()
        except ImportError as error:
            print(f"left out: {error}")
    return [one for one in found if only is None or only in f"{one.rule} {one.name}"]


class Setting(NamedTuple):
    """Where the batches of a comparison come from."""

    name: str
    batches: Callable[[Upstream], Iterator[Batch]]
    """With the anchors of a rule."""
    points: Tensor
    """(A, 4) the anchors of rules of points: their sides are strides."""
    level_sizes: list[int]
    """Of rules by level."""


class Prepared(NamedTuple):
    """A batch as a rule takes it, ours and a library's."""

    arguments: dict[str, Any]
    images: list[Image]

    def match(self, one: Upstream) -> mg_ops.Match:
        """Our rule for the batch."""
        match: mg_ops.Match = getattr(mg_ops, one.rule)(**self.arguments, **one.options)
        return match


def prepare(one: Upstream, batch: Batch, points: Tensor, sizes: list[int]) -> Prepared:
    """The batch for a rule, of these points or levels."""
    arguments, anchors = batch.arguments(), batch.anchors
    pred_boxes, scores = CODER.decode(anchors=anchors, deltas=batch.deltas), batch.logits
    if one.of_points:
        anchors = points
        scores = scores.sigmoid() if one.probabilities else scores
        for name in ("cls_logits", "box_deltas", "box_coder"):
            del arguments[name]
        scores_name = "cls_probabilities" if one.probabilities else "cls_logits"
        arguments |= {"anchors": anchors, "pred_boxes": pred_boxes, scores_name: scores}
    if one.by_level:
        arguments["level_sizes"] = sizes
    objects = zip(batch.boxes_list, batch.labels_list, pred_boxes, scores, strict=True)
    return Prepared(arguments, [Image(anchors, *of_image, sizes) for of_image in objects])


def overlapped(batch: Batch) -> Tensor:
    """(N,) bool: the objects that some anchor overlaps."""
    parts = batch.gt_boxes.split(256)
    return torch.cat([(mg_ops.box_iou(batch.anchors, boxes) > 0).any(0) for boxes in parts])


def setting_of_boxes(path: Path, most: int) -> Setting:
    """The objects of a file, with predictions made for them."""
    source = [image for image in read_objects(path)[0][: most or None] if len(image.labels) > 0]

    def batches(one: Upstream) -> Iterator[Batch]:
        for first in range(0, len(source), ONE_BATCH):
            part = source[first : first + ONE_BATCH]
            case = case_of(one, replace(CASES["voc320"], batch_size=len(part), num_classes=80))
            yield make_batches(case, part, 1, first, "cpu")[0]

    size = CASES["voc320"].image_size
    return Setting(
        path.parent.name if path.is_dir() else path.stem, batches, make_points(*size, 1.0), level_sizes(*size)
    )


@torch.no_grad()
def setting_of_run(run: Path, folder: Path, split: str, most: int) -> Setting:
    """The objects of a split, with what a trained detector of one anchor per location predicts for them."""
    from detector.anchors import level_cells, make_anchors
    from detector.checkpoint import load_detector
    from detector.data import read_data
    from detector.visualize import load

    detector, content = load_detector(run, "cpu")
    size = content["arguments"]["image_size"]
    points = make_anchors(size, size / level_cells(size)[0], 1)
    if len(points) != len(detector.anchors):
        raise ValueError(f"{run}: expected a detector of --anchors-per-location 1")
    data = read_data(folder, "auto", split, content["class_names"])
    made = []
    for image in [image for image in data.images if len(image.labels) > 0][: most or None]:
        loaded = load(image)
        pixels = torch.nn.functional.interpolate(loaded.pixels[None].float(), (size, size), mode="area")
        logits, deltas = detector(pixels)
        height, width = loaded.pixels.shape[-2:]
        boxes = loaded.boxes * torch.tensor([size / width, size / height]).repeat(2)
        made.append(Batch(detector.anchors, deltas, logits, [boxes], [loaded.labels], len(boxes)))
    return Setting(
        f"{folder.name}, predicted", lambda _: iter(made), points, [cells * cells for cells in level_cells(size)]
    )


def compare_labels(rules: list[Upstream], settings: list[Setting]) -> None:
    """Prints a table of the labels that differ, for each setting and each library."""
    print("| boxes | library | images | objects | left out | positives | labels that differ | and are no near tie |")
    print("|---|---|---|---|---|---|---|---|")
    for setting in settings:
        for one in rules:
            num_images = num_objects = left_out = positives = differ = unexplained = 0
            for batch in setting.batches(one):
                num_objects += len(batch.gt_boxes)
                prepared = prepare(one, batch, setting.points, setting.level_sizes if one.by_level else [])
                match = prepared.match(one)
                # Of the others each library has its own idea, and a rule of points none.
                alone = torch.zeros(len(batch.gt_boxes), dtype=torch.bool) if one.of_points else ~overlapped(batch)
                left_out += int(alone.sum())
                for index, image in enumerate(prepared.images):
                    if bool(alone[batch.gt_offsets[index] : batch.gt_offsets[index + 1]].any()):
                        continue
                    wanted = one.labels(image)
                    num_images += 1
                    positives += int((wanted >= 0).sum())
                    label = match.cls_match[index]
                    differ += int((label != wanted).sum())
                    if one.unexplained is not None:
                        unexplained += one.unexplained(image, label, wanted)
            of_these = "-" if one.unexplained is None else unexplained
            print(
                f"| {setting.name} | {one.name} | {num_images:,} | {num_objects:,} | {left_out} | {positives:,} "
                f"| {differ} | {of_these} |",
                flush=True,
            )


def time_calls(rules: list[Upstream], turns: int) -> None:
    """Prints the time of a call for a batch, ours and each library's in turns; the median of their ratios."""
    coco, dense = CASES["coco320"], replace(CASES["dense"], batch_size=1)
    # The batch of ultralytics' issue 25240.
    many_classes = replace(dense, batch_size=16, num_classes=365, objects_per_image=300, image_size=(640, 640))
    print("| batch | library | library | mg_ops | times as fast |")
    print("|---|---|---|---|---|")
    for name, case in (
        ("coco320", coco),
        ("100 objects an image", replace(dense, objects_per_image=100)),
        ("300 objects an image", replace(dense, objects_per_image=300)),
        ("5,000 objects an image", replace(dense, objects_per_image=5000)),
        ("300 objects an image, 365 classes", many_classes),
    ):
        for one in rules:
            own_case = case_of(one, case)
            num_numbers = len(own_case.make_anchors()) * (case.objects_per_image or 0)
            if one.rule in ("simota_match", "dynamic_soft_label_match"):
                num_numbers *= case.num_classes
            if num_numbers > MOST_NUMBERS or (case is many_classes and not one.of_points):
                continue
            sizes = level_sizes(*case.image_size) if one.by_level else []
            batch = make_batches(own_case, None, 1, 0, "cpu")[0]
            prepared = prepare(one, batch, make_points(*case.image_size, 1.0), sizes)
            seconds = []
            for turn in range(turns + 1):
                start = perf_counter()
                for image in prepared.images:
                    one.labels(image)
                times = [perf_counter()]
                for _ in range(CALLS_A_TURN):
                    prepared.match(one)
                    times.append(perf_counter())
                if turn > 0:  # the first warms up
                    seconds.append((times[0] - start, float(np.median(np.diff(times)))))
            theirs, ours = np.median(np.array(seconds), axis=0)
            ratio = float(np.median([a / b for a, b in seconds]))
            size = f"{len(prepared.images)} x {len(prepared.images[0].anchors):,}"
            print(f"| {name}, {size} | {one.name} | {1e3 * theirs:.1f} ms | {1e3 * ours:.2f} ms | {ratio:.0f} |")


def main() -> None:
    """Reads the options, and prints the tables they ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=Path, action="append", help="COCO-style JSON or a folder of VOC XML files")
    parser.add_argument("--run", type=Path, help="folder of a detector.train run with --anchors-per-location 1")
    parser.add_argument("--data", type=Path, help="the data whose images it sees")
    parser.add_argument("--split", default="val", help="of them (default val)")
    parser.add_argument("--images", type=int, default=0, help="most images of each (default: all)")
    parser.add_argument("--time", action="store_true", help="time calls instead")
    parser.add_argument("--turns", type=int, default=7, help="how often both are timed (default 7)")
    parser.add_argument("--only", help="rules or libraries whose name has this")
    options = parser.parse_args()
    rules = installed_rules(options.only)
    if options.time:
        time_calls(rules, options.turns)
        return
    settings = [setting_of_boxes(path, options.images) for path in options.boxes or []]
    if options.run is not None:
        if options.data is None:
            parser.error("--run: expected --data too, the images that the detector is to see")
        settings.append(setting_of_run(options.run, options.data, options.split, options.images))
    compare_labels(rules, settings)


if __name__ == "__main__":
    main()
