"""Scores detections: pycocotools' metrics, VOC's AP at IoU 0.5, and how well the scores rank the boxes.

Records are COCO's: ground truth {"images", "annotations", "categories"}, detections a list of {"image_id",
"category_id", "bbox": [x, y, width, height], "score"}.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.stats import spearmanr
from torchvision.ops import box_iou

from detector.annotations import (
    AnnotatedObject,
    Box,
    CocoAnnotations,
    Defects,
    DetectionRecord,
    Identifier,
    parse_coco,
    parse_coco_detections,
    refuse_fractions,
)
from detector.data import AnnotatedImages
from detector.inference import Detections

AGREEMENT_METRICS = ("score_iou_correlation", "matched_iou")
COCO_LIMIT = 100
"""Detections per image and class that COCO's metrics look at."""
CROWDED_LIMIT = 300
"""The same where an image has more objects of a class than that."""

Scores = dict[str, float | None]
"""By the name of the metric; None where there is no object to find."""


def to_xywh(box: Iterable[float]) -> list[float]:
    """(x1, y1, x2, y2) as COCO has it."""
    x1, y1, x2, y2 = box
    return [x1, y1, x2 - x1, y2 - y1]


def to_coco_ground_truth(data: AnnotatedImages, leave_out: Iterable[int] = ()) -> dict[str, list[dict[str, Any]]]:
    """A split as COCO's ground truth; `leave_out` are positions of images that could not be read."""
    left_out = set(leave_out)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image in (image for position, image in enumerate(data.images) if position not in left_out):
        images.append({"id": image.image_id, "file_name": image.name, "width": image.width, "height": image.height})
        columns = (image.boxes, image.labels, image.crowd, image.difficult, image.areas)
        for box, label, crowd, difficult, area in zip(*(column.tolist() for column in columns), strict=True):
            entry = {"id": len(annotations) + 1, "image_id": image.image_id, "category_id": data.category_ids[label]}
            entry |= {"bbox": to_xywh(box), "area": area, "iscrowd": int(crowd), "difficult": int(difficult)}
            annotations.append(entry)
    names = zip(data.category_ids, data.class_names, strict=True)
    categories = [{"id": category_id, "name": name} for category_id, name in names]
    return {"images": images, "annotations": annotations, "categories": categories}


def to_coco_detections(found: dict[int, Detections], data: AnnotatedImages) -> list[dict[str, Any]]:
    """Detections by position as COCO's result records."""
    records = []
    for position, detections in sorted(found.items()):
        image_id, columns = data.images[position].image_id, detections[:3]
        for box, score, label in zip(*(column.tolist() for column in columns), strict=True):
            ids = {"image_id": image_id, "category_id": data.category_ids[label]}
            records.append({**ids, "bbox": to_xywh(box), "score": score})
    return records


class BoxEvaluation(COCOeval):  # type: ignore[misc]  # pycocotools has no types
    """COCO's box evaluation, which leaves difficult objects out as it leaves those of another size out.

    A difficult object is not missed when it is not found, and a detection that matches it is neither right nor wrong.
    Images, categories and annotations are numbered from 1: pycocotools takes an annotation whose id is 0 for a missed
    one, loses all but one of those that share an id, and rounds ids beyond 2^53.

    Args:
        annotations: the objects.
        detections: of these images and categories.
        max_detections: per image and class, the best by score.
    """

    def __init__(
        self, annotations: CocoAnnotations, detections: list[DetectionRecord], max_detections: int = COCO_LIMIT
    ) -> None:
        self.category_ids = list(annotations.categories)
        number_of_image = {image.image_id: number for number, image in enumerate(annotations.images, start=1)}
        number_of_category = {category: number for number, category in enumerate(self.category_ids, start=1)}

        def entry(image_id: Identifier, category_id: Identifier, box: Box, **values: Any) -> dict[str, Any]:
            bbox = to_xywh(box)
            ids = {"image_id": number_of_image[image_id], "category_id": number_of_category[category_id]}
            return {**ids, "bbox": bbox, "iscrowd": 0, **values, "area": values.get("area") or bbox[2] * bbox[3]}

        def index(entries: list[dict[str, Any]]) -> COCO:
            coco = COCO()
            coco.dataset = {
                "images": [{"id": number} for number in number_of_image.values()],
                "categories": [{"id": number} for number in number_of_category.values()],
                "annotations": [{**values, "id": number} for number, values in enumerate(entries, start=1)],
            }
            coco.createIndex()
            return coco

        objects = [
            entry(image.image_id, one.category_id, one.box, area=one.area, iscrowd=int(one.crowd), out=one.difficult)
            for image in annotations.images
            for one in image.objects
            if one.category_id is not None
        ]
        found = [entry(*record[:3], score=record.score) for record in detections]
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(index(objects), index(found), "bbox")
            self.params.maxDets = sorted({1, 10, COCO_LIMIT, max_detections})
            self.limit = self.params.maxDets.index(max_detections)
            self.evaluate()
            self.accumulate()

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for annotation in objects:
                annotation["ignore"] = bool(annotation["iscrowd"]) or bool(annotation["out"])

    def average_precision(
        self, iou: float | None = None, area: str = "all", category: int | None = None, limit: int | None = None
    ) -> float | None:
        """The mean of the precision at 101 recalls; None where there is no object to find.

        Args:
            iou: 0.5, 0.75, ...; the mean over 0.5 to 0.95 by default.
            area: all, small, medium or large.
            category: its position in `category_ids`; the mean over all by default.
            limit: position in params.maxDets; by default that of `max_detections`.
        """
        precision = self.eval["precision"]  # (IoU thresholds, recalls, categories, areas, limits)
        precision = precision[:, :, :, self.params.areaRngLbl.index(area), self.limit if limit is None else limit]
        if iou is not None:
            precision = precision[np.isclose(self.params.iouThrs, iou)]
        return _known_mean(precision if category is None else precision[:, :, category])

    def average_recall(self, max_detections: int) -> float | None:
        """The mean recall with at most so many detections per image and class (1, 10 or 100)."""
        return _known_mean(self.eval["recall"][:, :, 0, self.params.maxDets.index(max_detections)])


def _known_mean(values: np.ndarray) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def coco_scores(evaluation: BoxEvaluation) -> tuple[Scores, dict[Identifier, Scores]]:
    """COCO's metrics in all, and AP, AP50 and AP75 by category id."""
    ious = {"AP": None, "AP50": 0.5, "AP75": 0.75}
    precision = evaluation.average_precision
    overall = {name: precision(iou) for name, iou in ious.items()}
    overall |= {f"AP_{area}": precision(area=area) for area in ("small", "medium", "large")}
    overall |= {f"AR{limit}": evaluation.average_recall(limit) for limit in (1, 10, COCO_LIMIT)}
    per_category = {
        category_id: {name: precision(iou, category=position) for name, iou in ious.items()}
        for position, category_id in enumerate(evaluation.category_ids)
    }
    return overall, per_category


def scores_and_ious(evaluation: BoxEvaluation) -> dict[Identifier, np.ndarray]:
    """Of each category's detections, as COCO matches them at the first IoU threshold: (D, 2) of score and IoU with the
    object, 0 for those that are wrong. Those that match difficult objects and crowds are left out."""
    found: dict[Identifier, list[tuple[float, float]]] = {category: [] for category in evaluation.category_ids}
    for of_image in evaluation.evalImgs:
        if of_image is None or of_image["aRng"] != evaluation.params.areaRng[0]:
            continue
        key = of_image["image_id"], of_image["category_id"]
        ious = evaluation.ious[key]  # (detections best first, objects in the order of the annotations)
        position = {entry["id"]: place for place, entry in enumerate(evaluation._gts[key])}
        columns = of_image["dtScores"], of_image["dtMatches"][0], of_image["dtIgnore"][0]
        found[evaluation.category_ids[key[1] - 1]] += [
            (confidence, float(ious[place, position[int(object_id)]]) if object_id > 0 else 0.0)
            for place, (confidence, object_id, ignored) in enumerate(zip(*columns, strict=True))
            if not ignored
        ]
    return {category: np.array(pairs).reshape(-1, 2) for category, pairs in found.items()}


def score_iou_agreement(evaluation: BoxEvaluation) -> tuple[Scores, dict[Identifier, Scores]]:
    """Whether the scores know which boxes are good, which is what Mutual Guidance is for.

    Of the detections that are right at IoU 0.5, as COCO matches them: Spearman's rank correlation of their score with
    their IoU ("score_iou_correlation"), and the mean of that IoU ("matched_iou"). Difficult objects and crowds are left
    out.

    Returns:
        The means over classes, weighted by these detections, and both by category id. None where they are too few, or
        all of one score or IoU.
    """
    found = scores_and_ious(evaluation)
    matched = {category: values[values[:, 1] > 0] for category, values in found.items()}

    by_category: dict[Identifier, Scores] = {}
    for category, pairs in matched.items():
        confidences, ious = pairs.T
        varied = len(np.unique(confidences)) > 1 and len(np.unique(ious)) > 1
        correlation = float(spearmanr(confidences, ious).statistic) if varied else None
        values = correlation, float(ious.mean()) if len(pairs) else None
        by_category[category] = dict(zip(AGREEMENT_METRICS, values, strict=True))

    def weighted_mean(metric: str) -> float | None:
        known = {category: value for category, of in by_category.items() if (value := of[metric]) is not None}
        counts = [len(matched[category]) for category in known]
        return float(np.average(list(known.values()), weights=counts)) if known else None

    return {metric: weighted_mean(metric) for metric in AGREEMENT_METRICS}, by_category


def voc_average_precision(
    annotations: CocoAnnotations, detections: list[DetectionRecord], iou_threshold: float = 0.5
) -> dict[Identifier, tuple[float | None, float | None]]:
    """PASCAL VOC's AP of each category id: (area under the curve, as from 2010 on; at 11 recalls, as in 2007).

    A detection takes the object it overlaps most, if by iou_threshold or more: it is right if that object was not taken
    yet, wrong if it was, and neither if the object is difficult (or a crowd region).
    """
    objects: dict[tuple[Identifier | None, Identifier], list[AnnotatedObject]] = {}
    for image in annotations.images:
        for entry in image.objects:
            objects.setdefault((entry.category_id, image.image_id), []).append(entry)
    boxes = {
        key: torch.tensor([entry.box for entry in entries], dtype=torch.float64) for key, entries in objects.items()
    }
    skip = {key: [entry.difficult or entry.crowd for entry in entries] for key, entries in objects.items()}
    right: dict[Identifier, list[float]] = {category_id: [] for category_id in annotations.categories}
    taken: set[tuple[Any, ...]] = set()
    for record in sorted(detections, key=lambda record: -record.score):
        key, is_right = (record.category_id, record.image_id), 0.0
        if key in boxes:
            box = torch.tensor([record.box], dtype=torch.float64)
            overlap, index = box_iou(box, boxes[key])[0].nan_to_num().max(0)
            if overlap >= iou_threshold:
                if skip[key][int(index)]:
                    continue
                is_right = float((key, int(index)) not in taken)
                taken.add((key, int(index)))
        right[record.category_id].append(is_right)

    scores: dict[Identifier, tuple[float | None, float | None]] = {}
    for category_id, flags in right.items():
        num_objects = sum(flags.count(False) for key, flags in skip.items() if key[0] == category_id)
        found = np.cumsum(np.array(flags, dtype=float))
        if num_objects == 0:
            scores[category_id] = (None, None)
            continue
        recall, precision = found / num_objects, found / np.arange(1, len(found) + 1)
        at_recalls = [precision[recall >= level].max(initial=0.0) for level in np.linspace(0, 1, 11)]
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        area = float(np.sum(np.diff(recall, prepend=0.0) * envelope))
        scores[category_id] = area, float(np.mean(at_recalls))
    return scores


def merge_categories(
    annotations: CocoAnnotations, detections: list[DetectionRecord]
) -> tuple[CocoAnnotations, list[DetectionRecord]]:
    """Both with the categories of one name as one class, as `detector.data` reads them: under the first id."""
    first: dict[str, Identifier] = {}
    id_of = {category_id: first.setdefault(name, category_id) for category_id, name in annotations.categories.items()}
    if len(first) == len(id_of):
        return annotations, detections
    for image in annotations.images:
        known = [entry for entry in image.objects if entry.category_id is not None]
        image.objects = [replace(entry, category_id=id_of[entry.category_id or 0]) for entry in known]
    detections = [record._replace(category_id=id_of[record.category_id]) for record in detections]
    return CocoAnnotations(annotations.images, {category_id: name for name, category_id in first.items()}), detections


def score(
    ground_truth: Any,
    detections: Any,
    defects: Defects | None = None,
    *,
    max_detections: int | None = None,
    sources: tuple[str, str] = ("annotations", "detections"),
) -> dict[str, Any]:
    """Every metric, overall and by class, as written to JSON.

    Args:
        ground_truth: COCO's object with images, annotations and categories, as read from JSON. An annotation may be
            "difficult" or "ignore": it is then neither asked for nor punished.
        detections: COCO's list of results. One with a box or a score that is not a number counts as wrong.
        defects: takes what is dropped or changed in both.
        max_detections: per image and class, the best by score; by default 100, as COCO has it, and 300 where an image
            has more than 100 objects of a class. The metrics then say COCO's AP too ("AP_at_100").
        sources: the two files, for messages.

    Raises:
        ValueError: one is not what COCO has, or no detection is of an image and a class of the annotations.
    """
    defects = defects if defects is not None else Defects()
    annotations = parse_coco(ground_truth, sources[0], defects)
    image_ids = [image.image_id for image in annotations.images]
    records = parse_coco_detections(detections, sources[1], image_ids, annotations.categories, defects)
    refuse_fractions(annotations.images, sources[0])
    annotations, records = merge_categories(annotations, records)
    num_objects: Counter[Identifier | None] = Counter()
    most_objects = 0
    for image in annotations.images:
        wanted = Counter(entry.category_id for entry in image.objects if not entry.crowd and not entry.difficult)
        most_objects = max(most_objects, *wanted.values(), 0)
        num_objects.update(wanted)
    if max_detections is None:
        max_detections = COCO_LIMIT if most_objects <= COCO_LIMIT else CROWDED_LIMIT
    evaluation = BoxEvaluation(annotations, records, max_detections)
    overall, per_category = coco_scores(evaluation)
    agreement, agreement_per_category = score_iou_agreement(evaluation)
    voc = {
        category_id: dict(zip(("VOC_AP50", "VOC07_AP50"), values, strict=True))
        for category_id, values in voc_average_precision(annotations, records).items()
    }
    for name in ("VOC_AP50", "VOC07_AP50"):
        known = [value for of in voc.values() if (value := of[name]) is not None]
        overall[name] = sum(known) / len(known) if known else None
    per_class = {
        name: {"objects": num_objects[of], **per_category[of], **voc[of], **agreement_per_category[of]}
        for of, name in annotations.categories.items()
    }
    limits: Scores = {"max_detections": max_detections, "most_objects_of_a_class": most_objects}
    if max_detections != COCO_LIMIT:
        limits["AP_at_100"] = evaluation.average_precision(limit=evaluation.params.maxDets.index(COCO_LIMIT))
    return {**overall, **agreement, **limits, "images": len(annotations.images), "per_class": per_class}


def format_metrics(metrics: dict[str, Any]) -> str:
    """The metrics as a table, class by class and overall."""
    columns = ("AP", "AP50", "AP75", "VOC_AP50", "VOC07_AP50")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    width = max([len(name) for name in metrics["per_class"]] + [8])
    lines = [f"{'':{width}}{'objects':>9}" + "".join(f"{name:>12}" for name in columns)]
    objects = sum(row["objects"] for row in metrics["per_class"].values())
    for name, row in [*metrics["per_class"].items(), ("all", {**metrics, "objects": objects})]:
        lines.append(f"{name:{width}}{row['objects']:>9}" + "".join(f"{percent(row[key]):>12}" for key in columns))
    small, medium, large = (percent(metrics[f"AP_{size}"]) for size in ("small", "medium", "large"))
    lines.append(f"AP of small objects {small}, medium {medium}, large {large}; {metrics['images']} images")
    correlation, matched_iou = ("-" if metrics[name] is None else f"{metrics[name]:.3f}" for name in AGREEMENT_METRICS)
    lines.append(
        f"detections right at IoU 0.5: mean IoU {matched_iou}, its rank correlation with the score {correlation}"
    )
    limit, most = metrics["max_detections"], metrics["most_objects_of_a_class"]
    if "AP_at_100" in metrics:
        lines.append(
            f"AP counts the best {limit} detections per image and class (an image has {most} objects of one class); "
            f"with the best 100, COCO's limit, it is {percent(metrics['AP_at_100'])}"
        )
    if most > limit:
        lines.append(
            f"An image has {most} objects of one class, and the best {limit} detections per image and class count: "
            "no detector can find them all. --max-detections raises the limit"
        )
    return "\n".join(lines)
