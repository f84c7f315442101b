"""Scores detections: pycocotools' metrics, VOC's AP at IoU 0.5, and how well the scores rank the boxes."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.stats import spearmanr
from torch import Tensor
from torchvision.ops import box_iou

from detector.data import AnnotatedImages
from detector.inference import Detections

AGREEMENT_METRICS = ("score_iou_correlation", "matched_iou")
COCO_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100")


# ---------------------------------------------------------------------------------------------------------------------
# Scores of COCO-style records: ground truth {"images", "annotations", "categories"}, detections a list of {"image_id",
# "category_id", "bbox": [x, y, width, height], "score"}.


def to_coco_ground_truth(data: AnnotatedImages, leave_out: list[int] | None = None) -> dict[str, list[dict[str, Any]]]:
    """A split as COCO's ground truth; `leave_out` are positions of images that could not be read."""
    left_out = set(leave_out or ())
    images, annotations = [], []
    for position, image in enumerate(data.images):
        if position in left_out:
            continue
        images.append({"id": image.image_id, "file_name": image.name, "width": image.width, "height": image.height})
        for box, label, crowd, difficult, area in zip(
            image.boxes.tolist(),
            image.labels.tolist(),
            image.crowd.tolist(),
            image.difficult.tolist(),
            image.areas.tolist(),
            strict=True,
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image.image_id,
                    "category_id": data.category_ids[label],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": area,
                    "iscrowd": int(crowd),
                    "difficult": int(difficult),
                }
            )
    categories = [
        {"id": category_id, "name": name} for category_id, name in zip(data.category_ids, data.class_names, strict=True)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def to_coco_detections(found: dict[int, Detections], data: AnnotatedImages) -> list[dict[str, Any]]:
    """Detections by position as COCO's result records."""
    records = []
    for position in sorted(found):
        detections = found[position]
        for box, score, label in zip(
            detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
        ):
            records.append(
                {
                    "image_id": data.images[position].image_id,
                    "category_id": data.category_ids[label],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "score": score,
                }
            )
    return records


class BoxEvaluation(COCOeval):
    """COCO's box evaluation, which leaves difficult objects out as it leaves those of another size out.

    A difficult object is not missed when it is not found, and a detection that matches it is neither right nor wrong.
    """

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for annotation in objects:
                annotation["ignore"] = bool(annotation.get("iscrowd", 0)) or bool(annotation.get("difficult", 0))


def _coco(content: dict[str, list[dict[str, Any]]]) -> COCO:
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    return coco


def evaluate_boxes(ground_truth: dict[str, list[dict[str, Any]]], detections: list[dict[str, Any]]) -> BoxEvaluation:
    """COCO's evaluation, accumulated and summarised."""
    results = [
        {**record, "id": index + 1, "iscrowd": 0, "area": record["bbox"][2] * record["bbox"][3]}
        for index, record in enumerate(detections)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        annotated = _coco(ground_truth)
        detected = _coco(
            {"images": ground_truth["images"], "categories": ground_truth["categories"], "annotations": results}
        )
        evaluation = BoxEvaluation(annotated, detected, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def coco_scores(
    evaluation: BoxEvaluation,
) -> tuple[dict[str, float | None], dict[int, dict[str, float | None]]]:
    """COCO's metrics in all, and AP, AP50 and AP75 by category id. None where there is no object to find."""

    def known(value: float) -> float | None:
        return None if value < 0 else float(value)

    overall = {name: known(value) for name, value in zip(COCO_METRICS, evaluation.stats, strict=False)}
    precision = evaluation.eval["precision"]  # (IoU thresholds, recalls, categories, areas, limits)
    per_category = {}
    for position, category_id in enumerate(evaluation.params.catIds):
        of_category = precision[:, :, position, 0, -1]
        means = [
            row[row > -1].mean() if (row > -1).any() else -1.0 for row in (of_category, of_category[0], of_category[5])
        ]
        per_category[int(category_id)] = {name: known(mean) for name, mean in zip(COCO_METRICS, means, strict=False)}
    return overall, per_category


def score_iou_agreement(
    evaluation: BoxEvaluation,
) -> tuple[dict[str, float | None], dict[int, dict[str, float | None]]]:
    """Whether the scores know which boxes are good, which is what Mutual Guidance is for.

    Of the detections that are right at IoU 0.5, as COCO matches them: Spearman's rank correlation of their score with
    their IoU ("score_iou_correlation"), and the mean of that IoU ("matched_iou"). Difficult objects and crowds are left
    out.

    Returns:
        The means over classes, weighted by these detections, and both by category id. None where they are too few, or
        all of one score or IoU.
    """
    matched: dict[int, list[tuple[float, float]]] = {category: [] for category in evaluation.params.catIds}
    for of_image in evaluation.evalImgs:
        if of_image is None or of_image["aRng"] != evaluation.params.areaRng[0]:
            continue
        image_id, category = of_image["image_id"], of_image["category_id"]
        ious = evaluation.ious[image_id, category]  # (detections best first, objects in the order of the annotations)
        position = {entry["id"]: place for place, entry in enumerate(evaluation._gts[image_id, category])}
        for place, (confidence, object_id, ignored) in enumerate(
            zip(of_image["dtScores"], of_image["dtMatches"][0], of_image["dtIgnore"][0], strict=True)
        ):
            if object_id > 0 and not ignored:
                matched[category].append((confidence, float(ious[place, position[int(object_id)]])))

    by_category: dict[int, dict[str, float | None]] = {}
    for category, pairs in matched.items():
        scores, ious = np.array(pairs).reshape(-1, 2).T
        varied = len(np.unique(scores)) > 1 and len(np.unique(ious)) > 1
        correlation = float(spearmanr(scores, ious).statistic) if varied else None
        by_category[category] = {
            "score_iou_correlation": correlation,
            "matched_iou": float(ious.mean()) if pairs else None,
        }

    def weighted_mean(metric: str) -> float | None:
        known = [(values[metric], len(matched[category])) for category, values in by_category.items()]
        known = [(value, count) for value, count in known if value is not None]
        total = sum(count for _, count in known)
        return sum(value * count for value, count in known) / total if total else None

    return {metric: weighted_mean(metric) for metric in AGREEMENT_METRICS}, by_category


def voc_average_precision(
    ground_truth: dict[str, list[dict[str, Any]]], detections: list[dict[str, Any]], iou_threshold: float = 0.5
) -> dict[int, tuple[float | None, float | None]]:
    """PASCAL VOC's AP of each category id: (area under the curve, as from 2010 on; at 11 recalls, as in 2007).

    A detection takes the object it overlaps most, if by iou_threshold or more: it is right if that object was not taken
    yet, wrong if it was, and neither if the object is difficult (or a crowd region).
    """
    objects: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for annotation in ground_truth["annotations"]:
        objects.setdefault((annotation["category_id"], annotation["image_id"]), []).append(annotation)
    by_category: dict[int, list[dict[str, Any]]] = {}
    for record in detections:
        by_category.setdefault(record["category_id"], []).append(record)

    def corners(records: list[dict[str, Any]]) -> Tensor:
        xywh = torch.tensor([record["bbox"] for record in records], dtype=torch.float64).reshape(-1, 4)
        return torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)

    scores = {}
    for category in ground_truth["categories"]:
        category_id = category["id"]
        boxes = {
            image_id: corners(found) for (of_category, image_id), found in objects.items() if of_category == category_id
        }
        skip = {
            image_id: [bool(entry.get("difficult") or entry.get("iscrowd")) for entry in objects[category_id, image_id]]
            for image_id in boxes
        }
        num_objects = sum(len(flags) - sum(flags) for flags in skip.values())
        if num_objects == 0:
            scores[category_id] = (None, None)
            continue
        ranked = sorted(by_category.get(category_id, []), key=lambda record: -record["score"])
        taken = {image_id: [False] * len(flags) for image_id, flags in skip.items()}
        right = np.zeros(len(ranked))
        wrong = np.zeros(len(ranked))
        for place, record in enumerate(ranked):
            image_id = record["image_id"]
            if image_id not in boxes:
                wrong[place] = 1
                continue
            overlap, index = box_iou(corners([record]), boxes[image_id])[0].max(0)
            if overlap < iou_threshold:
                wrong[place] = 1
            elif skip[image_id][index]:
                continue
            elif taken[image_id][index]:
                wrong[place] = 1
            else:
                right[place] = 1
                taken[image_id][index] = True
        recall = right.cumsum() / num_objects
        precision = right.cumsum() / np.maximum(right.cumsum() + wrong.cumsum(), 1e-12)
        at_recalls = [precision[recall >= level].max(initial=0.0) for level in np.linspace(0, 1, 11)]
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        area = float(np.sum(np.diff(recall, prepend=0.0) * envelope))
        scores[category_id] = area, float(np.mean(at_recalls))
    return scores


def score(ground_truth: dict[str, list[dict[str, Any]]], detections: list[dict[str, Any]]) -> dict[str, Any]:
    """Every metric, overall and by class, as written to JSON."""
    evaluation = evaluate_boxes(ground_truth, detections)
    overall, per_category = coco_scores(evaluation)
    agreement, agreement_per_category = score_iou_agreement(evaluation)
    voc = voc_average_precision(ground_truth, detections)
    num_objects: dict[int, int] = {}
    for annotation in ground_truth["annotations"]:
        if not annotation.get("iscrowd") and not annotation.get("difficult"):
            num_objects[annotation["category_id"]] = num_objects.get(annotation["category_id"], 0) + 1
    areas = [area for area, _ in voc.values() if area is not None]
    elevens = [eleven for _, eleven in voc.values() if eleven is not None]
    per_class = {}
    for category in ground_truth["categories"]:
        area, eleven = voc[category["id"]]
        per_class[category["name"]] = {
            "objects": num_objects.get(category["id"], 0),
            **per_category[category["id"]],
            "VOC_AP50": area,
            "VOC07_AP50": eleven,
            **agreement_per_category[category["id"]],
        }
    return {
        **overall,
        "VOC_AP50": sum(areas) / len(areas) if areas else None,
        "VOC07_AP50": sum(elevens) / len(elevens) if elevens else None,
        **agreement,
        "images": len(ground_truth["images"]),
        "per_class": per_class,
    }


def format_metrics(metrics: dict[str, Any]) -> str:
    """The metrics as a table, class by class and overall."""
    columns = ("AP", "AP50", "AP75", "VOC_AP50", "VOC07_AP50")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    def cells(row: dict[str, Any]) -> str:
        return "".join(f"{percent(row[name]):>12}" for name in columns)

    width = max([len(name) for name in metrics["per_class"]] + [8])
    lines = [f"{'':{width}}{'objects':>9}" + "".join(f"{name:>12}" for name in columns)]
    for name, row in metrics["per_class"].items():
        lines.append(f"{name:{width}}{row['objects']:>9}{cells(row)}")
    objects = sum(row["objects"] for row in metrics["per_class"].values())
    lines.append(f"{'all':{width}}{objects:>9}{cells(metrics)}")
    small, medium, large = (percent(metrics[f"AP_{size}"]) for size in ("small", "medium", "large"))
    lines.append(f"AP of small objects {small}, medium {medium}, large {large}; {metrics['images']} images")
    correlation, matched_iou = ("-" if metrics[name] is None else f"{metrics[name]:.3f}" for name in AGREEMENT_METRICS)
    lines.append(
        f"detections right at IoU 0.5: mean IoU {matched_iou}, its rank correlation with the score {correlation}"
    )
    return "\n".join(lines)
