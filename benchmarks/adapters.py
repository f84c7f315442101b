"""What an adapter costs beside the framework's own assignment: time, its own share of it, and memory.

    python benchmarks/adapters.py

Batches of images of 640 pixels with random objects and predictions; the framework, and the adapter with the same rule
or with mutual guidance, take turns, and the fastest of each counts. "Own" is all of it that is not the matching. A
framework that is not installed is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

import mg_ops
from benchmarks.cases import make_pyramid
from benchmarks.measure import in_fresh_process, peak_bytes

SIZE = 640
CLASSES = 80
OBJECTS = (7, 100, 300)


class Timed:
    """A matcher that adds up its seconds."""

    def __init__(self, matcher: Any) -> None:
        self.matcher, self.seconds = matcher, 0.0

    def __getattr__(self, name: str) -> Any:
        """What an adapter reads of the matcher."""
        return getattr(self.matcher, name)

    def __call__(self, *arguments: Any, **batch: Any) -> Any:
        """Matches."""
        start = perf_counter()
        match = self.matcher(*arguments, **batch)
        self.seconds += perf_counter() - start
        return match


def random_batch(num_images: int, num_objects: int, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Objects (B, G, 4) and (B, G), predicted boxes (B, A, 4) and probabilities (B, A, C)."""
    random = torch.Generator().manual_seed(0)
    corners = torch.rand(num_images, num_objects, 2, generator=random) * (SIZE - 100)
    sides = 8 + 92 * torch.rand(num_images, num_objects, 2, generator=random) ** 2
    labels = torch.randint(0, CLASSES, (num_images, num_objects), generator=random)
    boxes = anchors + 16 * torch.rand(num_images, *anchors.shape, generator=random)
    scores = torch.rand(num_images, len(anchors), CLASSES, generator=random)
    return torch.cat([corners, corners + sides], dim=-1), labels, boxes, scores


def ultralytics_calls(num_objects: int) -> dict[str, Any]:
    """Its assigner and both of ours, on 16 images: (call, the matcher inside)."""
    from ultralytics.utils.tal import TaskAlignedAssigner

    from mg_ops.adapters.ultralytics import FusedAssigner, MutualAssigner

    points = torch.cat([make_pyramid(SIZE, SIZE, [step], 1.0, [1.0])[1::3] for step in (8, 16, 32)])
    centers = (points[:, :2] + points[:, 2:]) / 2
    gt_boxes, labels, boxes, scores = random_batch(16, num_objects, points)
    batch = scores, boxes, centers, labels.unsqueeze(-1), gt_boxes, torch.ones(16, num_objects, 1)
    own = TaskAlignedAssigner(topk=10, num_classes=CLASSES, alpha=0.5, beta=6.0)
    fused, mutual = FusedAssigner(CLASSES, Timed(mg_ops.TaskAlignedMatcher())), MutualAssigner(CLASSES)  # type: ignore[arg-type]
    mutual.matcher, mutual.level_sizes = Timed(mutual.matcher), [(80, 80), (40, 40), (20, 20)]  # type: ignore[assignment]
    return {
        "ultralytics' `TaskAlignedAssigner`": (partial(own, *batch), None),
        "`fuse_trainer`": (partial(fused, *batch), fused.matcher),
        "`guide_trainer`": (partial(mutual, *batch), mutual.matcher),
    }


def detectron2_calls(num_objects: int) -> dict[str, Any]:
    """The labels of its RetinaNet and of the adapter's, on 4 images."""
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.meta_arch import RetinaNet
    from detectron2.structures import Boxes, Instances

    from mg_ops.adapters import detectron2

    anchors = make_pyramid(SIZE, SIZE, (8, 16, 32, 64, 128), 4.0, [1.0, 2 ** (1 / 3), 2 ** (2 / 3)])
    gt_boxes, labels, boxes, scores = random_batch(4, num_objects, anchors)
    objects = [
        Instances((SIZE, SIZE), gt_boxes=Boxes(box), gt_classes=label)
        for box, label in zip(gt_boxes, labels, strict=True)
    ]
    model = SimpleNamespace(num_classes=CLASSES, loss_normalizer=1.0, anchor_generator=lambda _: [Boxes(anchors)])
    model.anchor_matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    model._transpose_dense_predictions = lambda predictions, _: predictions
    model.losses = lambda *_: {"loss_cls": 0.0, "loss_box_reg": 0.0}
    predictions = [scores.logit()], [boxes - anchors]

    def own() -> None:
        RetinaNet.label_anchors(model, [Boxes(anchors)], objects)
        for levels in predictions:  # as its loss does, and the adapter in its place
            torch.cat(levels, dim=1)

    calls: dict[str, Any] = {"detectron2's `label_anchors`": (own, None)}
    for name, matcher in (
        ("`MaxIouMatcher`", mg_ops.MaxIouMatcher(box_coder=mg_ops.BoxCoder())),
        ("`MutualMatcher`", mg_ops.MutualMatcher(box_coder=mg_ops.BoxCoder())),
    ):
        timed: Any = Timed(matcher)
        call = partial(detectron2._forward_training, model, timed, None, None, predictions, objects)
        calls[f"`use_mutual_guidance`, {name}"] = call, timed
    return calls


def torchvision_calls(num_objects: int) -> dict[str, Any]:
    """The match of its RetinaNet and the adapter's, on 4 images."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import box_iou

    from mg_ops.adapters import torchvision

    anchors = make_pyramid(SIZE, SIZE, (8, 16, 32, 64, 128), 4.0, [1.0, 2 ** (1 / 3), 2 ** (2 / 3)])
    gt_boxes, labels, boxes, scores = random_batch(4, num_objects, anchors)
    targets = [{"boxes": box, "labels": label} for box, label in zip(gt_boxes, labels, strict=True)]
    matcher, model = Matcher(0.5, 0.4, True), SimpleNamespace(anchor_generator=AnchorGenerator())
    calls: dict[str, Any] = {
        "torchvision's `Matcher`": (lambda: [matcher(box_iou(target["boxes"], anchors)) for target in targets], None)
    }
    for name, ours in (("`MaxIouMatcher`", mg_ops.MaxIouMatcher()), ("`MutualMatcher`", mg_ops.MutualMatcher())):
        timed: Any = Timed(ours)
        guidance = torchvision._Guidance(timed, 4.0, None, None)
        predictions = {"pred_boxes": boxes, "cls_logits": scores.logit()}
        call = partial(torchvision._match, model, guidance, targets, [anchors] * 4, None, **predictions)  # type: ignore[arg-type]
        calls[f"`use_mutual_guidance`, {name}"] = call, timed
    return calls


def mmdet_calls(num_objects: int) -> dict[str, Any]:
    """Its assigners and ours, on 4 images one by one, with the anchors of RetinaNet or of ATSS."""
    from mmengine.structures import InstanceData

    from benchmarks.upstream import mmdet_assigners
    from mg_ops.adapters.mmdet import RuleAssigner

    own, strides = mmdet_assigners(), (8, 16, 32, 64, 128)
    calls: dict[str, Any] = {}

    def add(name: str, options: dict[str, Any], rule: str, scales: list[float], *rest: Any) -> None:
        anchors = make_pyramid(SIZE, SIZE, strides, 4.0 if len(scales) > 1 else 8.0, scales)
        if len(scales) == 1:
            anchors = anchors[1::3]  # the square of each location
        gt_boxes, labels, boxes, scores = random_batch(4, num_objects, anchors)
        predictions = [
            InstanceData(priors=anchors, bboxes=box, scores=score) for box, score in zip(boxes, scores, strict=True)
        ]
        objects = [InstanceData(bboxes=box, labels=label) for box, label in zip(gt_boxes, labels, strict=True)]
        levels = [[(SIZE // stride) ** 2 for stride in strides]] if rule == "atss" else []

        def assign(assigner: Any) -> None:
            for image in range(4):
                assigner.assign(predictions[image], *levels, objects[image], None, *rest)

        ours: Any = RuleAssigner(rule)
        if rule in ("atss", "task_aligned"):
            ours.assign(predictions[0], *levels, objects[0], None, *rest)  # sets what the head says in each call
        timed = ours.matcher = Timed(ours.matcher)
        if name:
            calls[f"mmdetection's `{name}`"] = partial(assign, own[name](**options)), None
        calls[f"`RuleAssigner`, `{type(timed.matcher).__name__}`"] = partial(assign, ours), timed

    retina = [1.0, 2 ** (1 / 3), 2 ** (2 / 3)]
    add("MaxIoUAssigner", {"pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0}, "max_iou", retina)
    add("ATSSAssigner", {"topk": 9}, "atss", [1.0])
    add("TaskAlignedAssigner", {"topk": 13}, "task_aligned", [1.0], 1.0, 6.0)
    add("", {}, "mutual", retina)
    return calls


FRAMEWORKS: tuple[Callable[[int], dict[str, Any]], ...] = (
    ultralytics_calls,
    torchvision_calls,
    detectron2_calls,
    mmdet_calls,
)


def peak_of(make_calls: Callable[[int], dict[str, Any]], num_objects: int, name: str) -> int:
    """Bytes beyond inputs and results at the peak of a second call."""
    torch.set_num_threads(1)
    call, _ = make_calls(num_objects)[name]
    call()
    return peak_bytes(call)[1]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="how often each is timed (default 7)")
    parser.add_argument("--framework", choices=[name.__name__[:-6] for name in FRAMEWORKS], help="only this one")
    options = parser.parse_args()
    print("| assignment | " + " | ".join(f"{count} objects" for count in OBJECTS) + " |")
    print("|---|" + "---|" * len(OBJECTS))
    for make_calls in FRAMEWORKS:
        if options.framework not in (None, make_calls.__name__[:-6]):
            continue
        try:
            make_calls(1)
        except ImportError:
            continue
        rows: dict[str, list[str]] = {}
        for count in OBJECTS:
            calls = make_calls(count)
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
            for turn in range(options.turns + 1):
                for name, (call, timed) in calls.items():
                    before, start = timed.seconds if timed else 0.0, perf_counter()
                    call()
                    taken = perf_counter() - start
                    if turn > 0:  # the first warms up
                        seconds[name].append((taken, timed.seconds - before if timed else taken))
            for name in calls:
                # The fastest turn: other work on the machine makes turns longer, and none shorter.
                taken, matching = min(seconds[name])
                own = f", own {1e3 * (taken - matching):.2g} ms" if calls[name][1] else ""
                peak = in_fresh_process(peak_of, make_calls, count, name) / 2**20
                rows.setdefault(name, []).append(f"{1e3 * taken:.3g} ms{own}; {peak:.0f} MiB")
        for name, cells in rows.items():
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
