"""Compares the rules with the libraries whose rules they are: every label that differs, and the time of a call.

    python benchmarks/rules.py --boxes instances.json --boxes annotations/  # labels, on the boxes of real images
    python benchmarks/rules.py --time                                       # time, both taking turns

Predictions are made as those of the benchmark (cases.py). A library that is not installed is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from benchmarks.cases import CASES, Batch, make_batches
from benchmarks.objects import read_objects

ONE_BATCH = 16  # images of a batch in the comparison of labels
CALLS_A_TURN = 10  # of ours, for one of theirs


class Image(NamedTuple):
    """What a library's rule is given of one image."""

    anchors: Tensor  # (A, 4)
    gt_boxes: Tensor  # (G, 4)
    gt_labels: Tensor  # (G,)


class Upstream(NamedTuple):
    """A library's rule, and the options that make it ours."""

    rule: str
    name: str
    options: dict[str, Any]
    labels: Callable[[Image], Tensor]
    """(A,) what it gives the anchors of an image, numbered as a match is."""


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


def installed_rules(only: str | None) -> list[Upstream]:
    """All of them, or those that `only` is part of the name of; says which library is missing."""
    found: list[Upstream] = []
    for rules in (torchvision_rules, mmdet_rules):
        try:
            found += rules()
        except ImportError as error:
            print(f"left out: {error}")
    return [one for one in found if only is None or only in f"{one.rule} {one.name}"]


def match_batch(one: Upstream, batch: Batch) -> mg_ops.Match:
    """Our rule for a batch."""
    match: mg_ops.Match = getattr(mg_ops, one.rule)(**batch.arguments(), **one.options)
    return match


def images_of(batch: Batch) -> list[Image]:
    """What a library is given of each image."""
    return [Image(batch.anchors, *objects) for objects in zip(batch.boxes_list, batch.labels_list, strict=True)]


def overlapped(batch: Batch) -> Tensor:
    """(N,) bool: the objects that some anchor overlaps."""
    parts = batch.gt_boxes.split(256)
    return torch.cat([(mg_ops.box_iou(batch.anchors, boxes) > 0).any(0) for boxes in parts])


def compare_labels(rules: list[Upstream], paths: list[Path], most: int) -> None:
    """Prints a table of the labels that differ, for each file and each library."""
    print("| boxes | library | images | objects | left out | positives | labels that differ |")
    print("|---|---|---|---|---|---|---|")
    for path in paths:
        source = [image for image in read_objects(path)[0][: most or None] if len(image.labels) > 0]
        counts = {one.name: np.zeros(3, dtype=np.int64) for one in rules}
        num_objects = left_out = 0
        for first in range(0, len(source), ONE_BATCH):
            part = source[first : first + ONE_BATCH]
            case = replace(CASES["voc320"], batch_size=len(part), num_classes=80)
            batch = make_batches(case, part, 1, first, "cpu")[0]
            num_objects += len(batch.gt_boxes)
            alone = ~overlapped(batch)
            left_out += int(alone.sum())
            for one in rules:
                match = match_batch(one, batch)
                for index, image in enumerate(images_of(batch)):
                    kept = ~alone[batch.gt_offsets[index] : batch.gt_offsets[index + 1]]
                    if not bool(kept.all()):
                        continue
                    wanted = one.labels(image)
                    differ = match.cls_match[index] != wanted
                    counts[one.name] += [1, int((wanted >= 0).sum()), int(differ.sum())]
        for one in rules:
            images, positives, differ = counts[one.name]
            print(
                f"| {path.stem} | {one.name} | {images:,} | {num_objects:,} | {left_out} | {positives:,} | {differ} |"
            )


def time_calls(rules: list[Upstream], turns: int) -> None:
    """Prints the time of a call for a batch, ours and each library's in turns; the median of their ratios."""
    coco, dense = CASES["coco320"], replace(CASES["dense"], batch_size=1, objects_per_image=300)
    print("| batch | library | library | mg_ops | times as fast |")
    print("|---|---|---|---|---|")
    for name, case in (("coco320", coco), ("300 objects an image", dense)):
        batch = make_batches(case, None, 1, 0, "cpu")[0]
        images = images_of(batch)
        for one in rules:
            seconds = []
            for turn in range(turns + 1):
                start = perf_counter()
                for image in images:
                    one.labels(image)
                between = perf_counter()
                for _ in range(CALLS_A_TURN):
                    match_batch(one, batch)
                if turn > 0:  # the first warms up
                    seconds.append((between - start, (perf_counter() - between) / CALLS_A_TURN))
            theirs, ours = np.median(np.array(seconds), axis=0)
            ratio = float(np.median([a / b for a, b in seconds]))
            size = f"{len(images)} x {len(batch.anchors):,}"
            print(f"| {name}, {size} | {one.name} | {1e3 * theirs:.1f} ms | {1e3 * ours:.2f} ms | {ratio:.0f} |")


def main() -> None:
    """Reads the options, and prints the tables they ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=Path, action="append", help="COCO-style JSON or a folder of VOC XML files")
    parser.add_argument("--images", type=int, default=0, help="most images of each (default: all)")
    parser.add_argument("--time", action="store_true", help="time calls instead")
    parser.add_argument("--turns", type=int, default=7, help="how often both are timed (default 7)")
    parser.add_argument("--only", help="rules or libraries whose name has this")
    options = parser.parse_args()
    rules = installed_rules(options.only)
    if options.time:
        time_calls(rules, options.turns)
    else:
        compare_labels(rules, options.boxes or [], options.images)


if __name__ == "__main__":
    main()
