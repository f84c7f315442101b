"""The libraries whose rules are ours to reproduce, loaded as far as the rules go.

mmdetection imports its compiled companion mmcv in every `__init__`, and LibreYOLO all of its models. The rules need
none of that: their packages are stood in for by empty ones that lead to their own files, mmdetection's where mmcv is
not installed with its operators.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from mg_ops import BACKGROUND, IGNORED, TaskAlignedMatcher, box_iou
from mg_ops.rules.eager.atss_match import center_distance

MMDET_ASSIGNERS = {
    "ATSSAssigner": "atss_assigner",
    "DynamicSoftLabelAssigner": "dynamic_soft_label_assigner",
    "MaxIoUAssigner": "max_iou_assigner",
    "SimOTAAssigner": "sim_ota_assigner",
    "TaskAlignedAssigner": "task_aligned_assigner",
}
"""Class -> module of mmdet.models.task_modules.assigners."""


@contextlib.contextmanager
def stand_ins(packages: list[str]) -> Iterator[None]:
    """Empty packages of these names, the first the outermost, in the place of a library's; ImportError without it."""
    name = packages[0]
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{name} is not installed")
    root = Path(spec.submodule_search_locations[0])
    before = {module: sys.modules[module] for module in list(sys.modules) if module.split(".")[0] == name}
    for module in before:
        del sys.modules[module]
    try:
        for package in packages:
            stand_in = ModuleType(package)
            stand_in.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
            sys.modules[package] = stand_in
        yield
    finally:
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[module]
        sys.modules.update(before)


@functools.cache
def mmdet_assigners() -> dict[str, Any]:
    """What makes each of mmdetection's assigners, by the class's name; ImportError says what is not installed."""
    assigners = "mmdet.models.task_modules.assigners"
    if importlib.util.find_spec("mmcv") and importlib.util.find_spec("mmcv._ext"):
        module = importlib.import_module(assigners)
        return {name: getattr(module, name) for name in MMDET_ASSIGNERS}
    packages = ["mmdet", "mmdet.models", "mmdet.models.task_modules", assigners]
    packages += ["mmdet.structures", "mmdet.structures.bbox", "mmdet.utils"]
    with stand_ins(packages):
        importlib.import_module("mmengine.structures")
        sys.modules["mmdet.utils"].ConfigType = dict  # type: ignore[attr-defined]
        bbox: Any = sys.modules["mmdet.structures.bbox"]
        bbox.bbox_overlaps = importlib.import_module("mmdet.structures.bbox.bbox_overlaps").bbox_overlaps
        bbox.get_box_tensor = lambda boxes: boxes
        bbox.BaseBoxes = type("BaseBoxes", (), {})
        calculator = importlib.import_module(f"{assigners}.iou2d_calculator").BboxOverlaps2D
        # By its name the calculator would be looked up in all of mmdetection.
        return {
            name: functools.partial(
                getattr(importlib.import_module(f"{assigners}.{module}"), name), iou_calculator={"type": calculator}
            )
            for name, module in MMDET_ASSIGNERS.items()
        }


@functools.cache
def libreyolo_yolox_head() -> Any:
    """The class of LibreYOLO's head of YOLOX, which has the original's rule; ImportError where it is not installed."""
    with stand_ins(["libreyolo", "libreyolo.models", "libreyolo.models.yolox", "libreyolo.training"]):
        return importlib.import_module("libreyolo.models.yolox.nn").YOLOXHead


def instances(**tensors: Any) -> Any:
    """mmengine's InstanceData of these."""
    return importlib.import_module("mmengine.structures").InstanceData(**tensors)


def labels_of_mmdet(inds: Any) -> Any:
    """Indices that count objects from 1, with 0 for background and -1 for ignored, as a match numbers them."""
    return torch.where(inds > 0, inds - 1, torch.where(inds == 0, BACKGROUND, IGNORED))


def labels_of_yolox(
    head: Any,
    priors: torch.Tensor,
    gt_boxes: torch.Tensor,
    gt_labels: torch.Tensor,
    pred_boxes: torch.Tensor,
    cls_logits: torch.Tensor,
    objectness: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A,) the labels that YOLOX's head gives one image, numbered as a match is, and the IoUs of its positives.

    Args:
        head: its class.
        priors: (A, 4) centers, and strides twice.
        gt_boxes: (G, 4), at least one.
        gt_labels: (G,).
        pred_boxes: (A, 4).
        cls_logits: (A, C).
        objectness: (A, 1) its logits.
    """

    def center_and_size(boxes: torch.Tensor) -> torch.Tensor:
        return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)

    this = SimpleNamespace(num_classes=cls_logits.shape[1])
    this.get_geometry_constraint = functools.partial(head.get_geometry_constraint, this)
    this.simota_matching = functools.partial(head.simota_matching, this)
    strides = priors[:, 2]
    shifts = priors[:, :2] / priors[:, 2:] - 0.5
    _, positive, ious, objects, _ = head.get_assignments(
        *(this, 0, len(gt_boxes), center_and_size(gt_boxes), gt_labels, center_and_size(pred_boxes)),
        *(strides[None], shifts[None, :, 0], shifts[None, :, 1], cls_logits[None], objectness[None]),
    )
    labels = torch.full((len(priors),), BACKGROUND)
    labels[positive] = objects
    overlaps = torch.zeros(len(priors))
    overlaps[positive] = ious
    return labels, overlaps


def near_ties_of_atss(
    anchors: torch.Tensor, level_sizes: Sequence[int], gt_boxes: torch.Tensor, k: int, tolerance: float = 1e-6
) -> torch.Tensor:
    """(G,) bool: the objects whose labels may depend on the order of equal numbers, or on the last digits of others.

    Their k-th nearest anchor of some level is as far as the next, or the IoU of a candidate is as large as the
    threshold, to about six digits.
    """
    nearest, first = [], 0
    tied = torch.zeros(len(gt_boxes), dtype=torch.bool)
    for distance in center_distance(anchors, gt_boxes).split(list(level_sizes)):
        ordered = distance.sort(dim=0, stable=True)
        if len(distance) > k:
            tied |= ordered.values[k] - ordered.values[k - 1] <= tolerance * ordered.values[k]
        nearest.append(ordered.indices[:k] + first)
        first += len(distance)
    iou = box_iou(anchors, gt_boxes).gather(0, torch.cat(nearest)).double()
    return tied | ((iou - (iou.mean(0) + iou.std(0))).abs().amin(0) < tolerance)


def count_unexplained(
    match: torch.Tensor, wanted: torch.Tensor, tied: torch.Tensor, anchors: torch.Tensor, gt_boxes: torch.Tensor
) -> int:
    """How many labels (A,) differ that neither object of near ties explains, nor that they overlap an anchor equally.

    Args:
        tied: (G,) bool.
    """
    count = 0
    for anchor in (match != wanted).nonzero().flatten().tolist():
        objects = [int(label) for label in (match[anchor], wanted[anchor]) if label >= 0]
        iou = box_iou(anchors[anchor : anchor + 1], gt_boxes[objects])[0]
        contest = len(objects) == 2 and bool((iou[0] - iou[1]).abs() < 1e-6)
        count += not (contest or bool(tied[objects].any()))
    return count


def ciou64(boxes: torch.Tensor, gt_boxes: torch.Tensor) -> torch.Tensor:
    """(A, G) CIoU in float64, from the paper's formula (Zheng et al., AAAI 2020)."""
    boxes, gt_boxes = boxes.double()[:, None], gt_boxes.double()
    low, high = torch.minimum(boxes, gt_boxes), torch.maximum(boxes, gt_boxes)
    inner, outer = (low[..., 2:] - high[..., :2]).clamp(0), high[..., 2:] - low[..., :2]
    size, gt_size = boxes[..., 2:] - boxes[..., :2], gt_boxes[..., 2:] - gt_boxes[..., :2]
    iou = inner.prod(-1) / (size.prod(-1) + gt_size.prod(-1) - inner.prod(-1))
    distance = (boxes[..., :2] + boxes[..., 2:] - gt_boxes[..., :2] - gt_boxes[..., 2:]) / 2
    angles = torch.atan(size[..., 0] / size[..., 1]) - torch.atan(gt_size[..., 0] / gt_size[..., 1])
    v = 4 / torch.pi**2 * angles**2
    return iou - distance.square().sum(-1) / outer.square().sum(-1) - v * v / (1 - iou + v)


def unexplained_of_task_aligned(
    match: torch.Tensor,
    wanted: torch.Tensor,
    rule: TaskAlignedMatcher,
    points: torch.Tensor,
    probabilities: torch.Tensor,
    pred_boxes: torch.Tensor,
    gt_boxes: torch.Tensor,
    gt_labels: torch.Tensor,
) -> list[str]:
    """The labels (A,) that differ for another reason than these three.

    A near tie: numbers that agree to six digits decide, t of one of the two objects, or u of both. An edge: a candidate
    of one of them lies on its side, to six digits; ultralytics takes sizes from corners, and corners from sizes. A
    filled place: an object has fewer than k candidates with t > 0, and the anchor, inside of it, has t = 0; it may be
    selected there.
    """
    iou = box_iou(pred_boxes, gt_boxes).double()
    u = ciou64(pred_boxes, gt_boxes).clamp(0) if rule.overlap == "ciou" else iou
    t = torch.where(u > 0, probabilities.double()[:, gt_labels] ** rule.alpha * u**rule.beta, 0.0)
    center, side = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2, gt_boxes[:, 2:] - gt_boxes[:, :2]
    to_edge = (side.clamp(min=rule.minimum_side) / 2 - (points[:, None] - center).abs()).amin(-1)  # (A, G)
    inside = to_edge > 0
    has_edge = ((to_edge.abs() < 1e-6 * gt_boxes.abs().amax()) & (t > 0)).any(0)
    has_places = (inside & (t > 0)).sum(0) < rule.k
    found = []
    for anchor in (match != wanted).nonzero().flatten().tolist():
        objects = [int(label) for label in (match[anchor], wanted[anchor]) if label >= 0]
        gaps = (t[:, objects] - t[anchor, objects]).abs() / t[anchor, objects]
        gaps[anchor] = torch.inf
        own = u[anchor, objects]
        near = bool((gaps[:, t[anchor, objects] > 0] < 1e-6).any())
        near |= bool(has_edge[objects].any())
        near |= len(objects) == 2 and bool((own[0] - own[1]).abs() < 1e-6 * own.max())
        if not near and not bool((has_places & inside[anchor] & (t[anchor] == 0)).any()):
            found.append(f"anchor {anchor}: {int(match[anchor])}, expected {int(wanted[anchor])}")
    return found
