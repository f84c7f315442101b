"""Why one rule is ahead of another: chance, kinds of errors, calibration, and labels.

It reads what the runs of a study left: their detections on val and test, and their checkpoints. Nothing is trained.
TIDE's errors are counted by its authors' program, `pip install tidecv`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.optimize import isotonic_regression
from torch import Tensor
from torchvision.transforms import v2

import mg_ops
from detector.annotations import Defects, parse_coco, parse_coco_detections, read_json
from detector.checkpoint import load_detector
from detector.data import AnnotatedImages, read_data
from detector.rules import make_matcher
from detector.runs import Run, Study
from detector.scores import BoxEvaluation, scores_and_ious, to_coco_ground_truth
from detector.tables import (
    find_baseline,
    format_mean,
    format_seeds,
    format_table,
    label_model,
    label_strategy,
    pair_differences,
    read_values,
)
from detector.visualize import load

ERRORS = {"Cls": "class", "Loc": "box", "Both": "both", "Dupe": "duplicate", "Bkg": "background", "Miss": "missed"}
"""TIDE's names of its errors (Bolya et al., ECCV 2020), and ours."""
SIZES = ("small", "medium", "large")
SIZE_LIMITS = (16.0, 48.0)
"""Pixels of the input: BCCD's platelets, red cells and white cells at 160 pixels."""
NUM_BINS = 25
TOUCH = 1e-6
"""IoU from which a detection counts as right for its calibration: any overlap."""
RECALLS = np.linspace(0.0, 1.0, 101)
"""Those of COCO's AP."""
NUM_RESAMPLES = 2000
NUM_IMAGES = 64
"""Of the training split, whose labels are compared."""


# ---------------------------------------------------------------------------------------------------------------------
# Chance


class ClassMatches(NamedTuple):
    """The D detections of a class as COCO matches them at T thresholds, best first, in I images."""

    image: np.ndarray  # (D,) its position
    right: np.ndarray  # (T, D) bool
    counted: np.ndarray  # (T, D) bool: neither right nor wrong are those of difficult objects and crowds
    num_objects: np.ndarray  # (I,)


def matches_of(evaluation: BoxEvaluation) -> list[ClassMatches]:
    """What a precision-recall curve is made of, class by class."""
    numbers, (first_area, *_) = evaluation.params.imgIds, evaluation.params.areaRng
    found = [of for of in evaluation.evalImgs if of is not None and of["aRng"] == first_area]
    classes = []
    for category in evaluation.params.catIds:
        images = [of for of in found if of["category_id"] == category]
        if not images:
            continue
        num_objects = np.zeros(len(numbers))
        for of in images:
            num_objects[numbers.index(of["image_id"])] = np.count_nonzero(np.logical_not(of["gtIgnore"]))
        image = np.repeat([numbers.index(of["image_id"]) for of in images], [len(of["dtScores"]) for of in images])
        scores, ignored = (np.concatenate([of[name] for of in images], -1) for name in ("dtScores", "dtIgnore"))
        right = np.concatenate([of["dtMatches"] for of in images], -1) > 0
        order = np.argsort(-scores, kind="mergesort")  # COCO's
        last = np.flatnonzero(right[:, order].any(0))[-1:].sum() + 1  # no wrong one after it changes a precision
        order = order[:last]
        classes.append(ClassMatches(image[order].astype(int), right[:, order], ~ignored[:, order], num_objects))
    return classes


def resampled_average_precision(classes: Sequence[ClassMatches], counts: np.ndarray) -> float:
    """COCO's AP of a data set that has each image so often, counts (I,); nan if it has no object."""
    values = []
    for of_class in classes:
        num_objects = counts @ of_class.num_objects
        if num_objects == 0:
            continue
        weights = counts[of_class.image] * of_class.counted
        found = np.cumsum(weights * of_class.right, axis=1)
        precision = found / np.maximum(np.cumsum(weights, axis=1), 1)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        for recall, envelope in zip(found / num_objects, precision, strict=True):
            places = np.searchsorted(recall, RECALLS, side="left")
            values.append(np.append(envelope, 0.0)[places].mean())
    return float(np.mean(values)) if values else float("nan")


def sign_flip_p(differences: Sequence[float]) -> float:
    """Of the 2^n ways to sign n paired differences, the share whose mean is at least as far from 0 (two-sided)."""
    test = stats.permutation_test((list(differences),), np.mean, permutation_type="samples", n_resamples=np.inf)
    return float(test.pvalue)


def bootstrap_difference(
    ours: Sequence[Sequence[ClassMatches]], theirs: Sequence[Sequence[ClassMatches]], num_images: int
) -> dict[str, float]:
    """Mean over seeds of a paired difference in AP, and its 95% BCa interval over images (the same for all seeds).

    Args:
        ours: the matches of one row, seed by seed.
        theirs: those of the baseline, of the same seeds.
        num_images: I.
    """

    @functools.cache
    def difference(counts: bytes) -> float:
        repeats = np.frombuffer(counts, dtype=np.int64)
        pairs = zip(ours, theirs, strict=True)
        return float(
            np.mean([np.subtract(*(resampled_average_precision(of, repeats) for of in pair)) for pair in pairs])
        )

    def statistic(images: np.ndarray) -> float:
        return difference(np.bincount(images.astype(np.int64), minlength=num_images).tobytes())

    images = np.arange(num_images)
    found = stats.bootstrap(
        (images,), statistic, n_resamples=NUM_RESAMPLES, vectorized=False, method="BCa", rng=np.random.default_rng(0)
    )
    low, high = found.confidence_interval
    return {"AP": statistic(images), "low": float(low), "high": float(high)}


# ---------------------------------------------------------------------------------------------------------------------
# Errors and calibration


def evaluate_boxes(data: AnnotatedImages, detections: Any, source: str) -> BoxEvaluation:
    """COCO's evaluation of detections on a split."""
    annotations = parse_coco(to_coco_ground_truth(data), data.name, Defects())
    ids = [image.image_id for image in annotations.images]
    return BoxEvaluation(annotations, parse_coco_detections(detections, source, ids, annotations.categories, Defects()))


def tide_errors(data: AnnotatedImages, detections: Iterable[dict[str, Any]]) -> dict[str, float]:
    """What AP50 would gain, as a share of 1, if all errors of one kind were repaired."""
    from tidecv import TIDE, Data

    truth, found = Data("objects"), Data("detections")
    for one in to_coco_ground_truth(data)["annotations"]:
        add = truth.add_ignore_region if one["iscrowd"] or one["difficult"] else truth.add_ground_truth
        add(one["image_id"], one["category_id"], one["bbox"])
    for one in detections:
        found.add_detection(one["image_id"], one["category_id"], one["score"], one["bbox"])
    tide = TIDE()
    tide.evaluate(truth, found, name="run")
    return {ERRORS[name]: value / 100 for name, value in tide.get_main_errors()["run"].items()}


def overlaps_of(evaluation: BoxEvaluation) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Class by class: scores (D,), best first, IoU with the object (D,), 0 without one, and the number of objects."""
    evaluation.params.iouThrs = np.array([TOUCH])
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    numbers = dict.fromkeys(evaluation.params.catIds, 0)
    for (_, category), objects in evaluation._gts.items():
        numbers[category] += sum(not one["ignore"] for one in objects)
    pairs = [values[np.argsort(-values[:, 0])] for values in scores_and_ious(evaluation).values()]
    return [(*values.T, number) for values, number in zip(pairs, numbers.values(), strict=True)]


def best_threshold(scores: np.ndarray, ious: np.ndarray, num_objects: int) -> float:
    """The score with the least localization-recall-precision error (Oksuz et al., TPAMI 2022): of detections, best
    first, the loss of IoU, the wrong ones and the objects not found, over the number of these and of the right ones."""
    if len(scores) == 0:
        return 1.0
    found, wrong, loss = np.cumsum(ious > 0), np.cumsum(ious == 0), np.cumsum(np.where(ious > 0, 1 - ious, 0))
    return float(scores[np.argmin((loss + wrong + num_objects - found) / (num_objects + wrong))])


def calibration_error(scores: np.ndarray, ious: np.ndarray) -> float:
    """How far scores are from the IoU that they should say, 0 where a detection is wrong: LaECE of a class, the mean
    over bins of the distance of both means, weighted by detections."""
    bins = np.clip(np.ceil(scores * NUM_BINS) - 1, 0, NUM_BINS - 1).astype(int)
    return float(np.abs(np.bincount(bins, scores - ious)).sum() / len(scores))


def calibration_errors(val: BoxEvaluation, test: BoxEvaluation) -> dict[str, float]:
    """LaECE of test, as Kuzucu et al. (ECCV 2024) have it: the mean over classes, of the detections from the best
    threshold of val on; of the scores as they are, and after the isotonic regression of IoU on score in val."""
    before, after = [], []
    for (val_scores, val_ious, num_objects), (scores, ious, _) in zip(overlaps_of(val), overlaps_of(test), strict=True):
        threshold = best_threshold(val_scores, val_ious, num_objects)
        kept = val_scores >= threshold
        # Equal scores, of which bfloat16 makes many, have one mean IoU.
        val_scores, places, counts = np.unique(val_scores[kept], return_inverse=True, return_counts=True)
        val_ious = np.bincount(places, val_ious[kept]) / counts
        scores, ious = (values[scores >= threshold] for values in (scores, ious))
        if len(scores) and len(val_scores):
            fitted = isotonic_regression(val_ious, weights=counts).x
            before.append(calibration_error(scores, ious))
            after.append(calibration_error(np.interp(scores, val_scores, fitted), ious))
    if not before:
        return {}
    return {"laece": float(np.mean(before)), "laece_isotonic": float(np.mean(after))}


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def shared_labels(one: Tensor, other: Tensor) -> float:
    """Of the anchors that are positive in either match (B, A), the share that has the same object in both."""
    either = (one >= 0) | (other >= 0)
    return float(((one == other) & either).sum() / either.sum().clamp(min=1))


@torch.no_grad()
def labels_of(
    checkpoint: Path, run: Run, data: AnnotatedImages, strategies: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """How rules match the first training images, as they are, by the predictions of a checkpoint.

    Returns:
        cls_match (B, A) by strategy, and by size of objects the positives that the run's own rule gives each.
    """
    arguments = run.arguments()
    size, images = arguments["image_size"], [load(image) for image in data.images[:NUM_IMAGES]]
    scales = [torch.tensor([size / image.pixels.shape[-1], size / image.pixels.shape[-2]] * 2) for image in images]
    boxes = [image.boxes * scale for image, scale in zip(images, scales, strict=True)]
    objects: dict[str, Any] = {"gt_crowd": [image.crowd for image in images]}
    model, _ = load_detector(checkpoint, "cpu")
    resize = v2.Resize((size, size), antialias=True)
    cls_logits, box_deltas = model(torch.stack([resize(image.pixels) for image in images]))
    matches = {
        strategy: make_matcher(argparse.Namespace(**{**arguments, "strategy": strategy}), torch.device("cpu"))(
            model.anchors,
            boxes,
            [image.labels for image in images],
            cls_logits=cls_logits,
            box_deltas=box_deltas,
            **objects,
        )
        for strategy in (*strategies, run.row.strategy)
    }
    summary = mg_ops.summarize(matches[run.row.strategy], boxes, size_limits=SIZE_LIMITS, **objects).as_dict()
    positives = {size: summary[f"cls_positives_per_object/{size}"] for size in SIZES}
    return {strategy: match.cls_match for strategy, match in matches.items()}, positives


# ---------------------------------------------------------------------------------------------------------------------
# A study


Matches = dict[tuple[str, int], list[ClassMatches]]
"""Of the test split, by row and seed."""


def write_matches(file: IO[bytes], matches: Matches) -> None:
    """Keeps matches as a compressed archive of NumPy's."""
    arrays = {
        f"{row}/{seed}/{position}/{name}": array
        for (row, seed), classes in matches.items()
        for position, of_class in enumerate(classes)
        for name, array in of_class._asdict().items()
    }
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # taken for an option of the function


def read_matches(path: Path) -> Matches:
    """What `write_matches` kept; nothing where there is no file."""
    parts: dict[tuple[str, int], dict[int, dict[str, np.ndarray]]] = {}
    if path.is_file():
        with np.load(path) as arrays:
            for key, array in arrays.items():
                row, seed, position, name = key.split("/")
                parts.setdefault((row, int(seed)), {}).setdefault(int(position), {})[name] = array
    return {run: [ClassMatches(**classes[position]) for position in sorted(classes)] for run, classes in parts.items()}


def analyze(
    study: Study, runs: Sequence[Run], data_folder: Path, known: dict[str, Any], matches: Matches
) -> tuple[dict[str, Any], Matches]:
    """What a study's complete runs show, as JSON keeps it, and the differences from its baseline.

    Args:
        study: whose rows they are.
        runs: those to analyze.
        data_folder: what they were trained and tested on.
        known: an earlier analysis; what it says of other runs stays.
        matches: those of the earlier analysis.

    Returns:
        The analysis, and the matches of all runs in it.
    """
    layout, flags = study.setting.layout, dict(study.setting.flags)
    train = read_data(data_folder, layout, flags["train-split"])
    val, test = (read_data(data_folder, layout, name, train.class_names) for name in (flags["eval-split"], "test"))
    strategies = list(dict.fromkeys(row.strategy for row in study.rows))
    matches = dict(matches)
    earlier = known.get("rows", {})
    records = {row.name: {record["seed"]: record for record in earlier.get(row.name, ())} for row in study.rows}
    for run in runs:
        files = [run.folder / "detections.json", run.folder / "test/detections.json"]
        found = [read_json(file, "COCO's list of results") for file in files]
        on_val, on_test = (
            evaluate_boxes(data, of, str(file)) for data, of, file in zip((val, test), found, files, strict=True)
        )
        matches[run.row.name, run.seed] = matches_of(on_test)
        labels, positives = labels_of(run.folder, run, train, strategies)
        own = labels[run.row.strategy]
        record = {"seed": run.seed, "errors": tide_errors(test, found[1]), **calibration_errors(on_val, on_test)}
        record |= {"positives": positives, "labels": {name: shared_labels(own, labels[name]) for name in strategies}}
        kept = sorted(run.folder.glob("epoch*.pt"), key=lambda path: int(path.stem.removeprefix("epoch")))
        by_epoch = [labels_of(path, run, train, [])[0][run.row.strategy] for path in kept]
        names = [path.stem.removeprefix("epoch") for path in kept[1:]]
        changed = [1 - shared_labels(*pair) for pair in itertools.pairwise(by_epoch)]
        record["changed_labels"] = dict(zip(names, changed, strict=True))
        records[run.row.name][run.seed] = record

    rows = [{**row._asdict(), "name": row.name} for row in study.rows]
    differences = []
    for row in rows if study.baseline is not None else ():
        against = find_baseline({"rows": rows}, row, study.baseline)
        seeds = sorted({seed for name, seed in matches if name == row["name"] and (against["name"], seed) in matches})
        if row is not against and seeds:
            pair = [[matches[name, seed] for seed in seeds] for name in (row["name"], against["name"])]
            interval = bootstrap_difference(*pair, len(test.images))
            differences.append({"row": row["name"], "baseline": against["name"], "seeds": seeds, **interval})
    found_of = {name: [of[seed] for seed in sorted(of)] for name, of in records.items() if of}
    return {"study": study.name, "rows": found_of, "differences": differences}, matches


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def chance_cells(
    content: dict[str, Any], analysis: dict[str, Any], baseline: tuple[str, str | None]
) -> list[list[str]]:
    """Of each paired difference in AP: detector, difference, seeds, AP by seed, p over seeds, interval over images."""
    split, rows = content["split"], []
    intervals = {(of["row"], of["baseline"], *of["seeds"]): of for of in analysis.get("differences", ())}
    for row in content["rows"]:
        against = find_baseline(content, row, baseline)
        differences = pair_differences(read_values(row, split, "AP"), read_values(against, split, "AP"))
        if row is against or not differences:
            continue
        of = intervals.get((row["name"], against["name"], *differences))
        interval = "-" if of is None else f"{100 * of['low']:+.1f} to {100 * of['high']:+.1f}"
        p = f"{sign_flip_p(list(differences.values())):.2g}" if len(differences) > 1 else "-"
        by_seed = ", ".join(f"{100 * difference:+.1f}" for difference in differences.values())
        name = f"{label_strategy(row)} - {label_strategy(against)}"
        rows.append([label_model(row), name, format_seeds(differences), by_seed, p, interval])
    return rows


def format_chance(content: dict[str, Any], analysis: dict[str, Any], baseline: tuple[str, str | None]) -> list[str]:
    """`chance_cells` as a table."""
    title = (
        "Could it be chance? p is exact, over all ways to sign the paired differences in AP (two-sided): with n seeds "
        "it is at least 2 / 2^n, 0.25 for three and 0.031 for six. The interval is of the mean over these seeds, over "
        f'images: 95%, BCa, {NUM_RESAMPLES:,} resamples of the test images, the same for both; "-" has not been '
        "computed."
    )
    heads = ["detector", "difference", "seeds", "AP by seed, points", "p over seeds", "interval over images, points"]
    return format_table(heads, chance_cells(content, analysis, baseline), title)


def read(record: dict[str, Any], keys: Iterable[str]) -> float | None:
    """A number in a record, by the keys on the way to it; None where there is none."""
    found: Any = record
    for key in keys:
        found = found.get(key, {})
    return None if found == {} else found


def format_reasons(content: dict[str, Any], analysis: dict[str, Any]) -> list[list[str]]:
    """The tables of errors, calibration and labels, of the rows that were analyzed."""
    rows = [(row, analysis["rows"][row["name"]]) for row in content["rows"] if row["name"] in analysis["rows"]]
    strategies = list(dict.fromkeys(row["strategy"] for row in content["rows"]))

    def table(title: str, columns: dict[str, tuple[str, ...]], scale: float = 1.0, digits: int = 2) -> list[str]:
        """A row of the study a row, and a column for each way into the record of a run."""
        lines = []
        for row, runs in rows:
            values = [
                {run["seed"]: found for run in runs if (found := read(run, keys)) is not None}
                for keys in columns.values()
            ]
            means = [format_mean(of, scale, digits) for of in values]
            lines.append([label_model(row), label_strategy(row), format_seeds(run["seed"] for run in runs), *means])
        return format_table(["detector", "strategy", "seeds", *columns], lines, title)

    changes = list(dict.fromkeys(epoch for _, runs in rows for run in runs for epoch in run["changed_labels"]))
    low, high = SIZE_LIMITS
    tables = [
        table(
            "What AP50 on test would gain, in points, if all errors of a kind were repaired (TIDE):",
            {name: ("errors", name) for name in ERRORS.values()},
            scale=100,
            digits=1,
        ),
        table(
            "Do the scores say the IoU? LaECE on test in points (Kuzucu et al., ECCV 2024; 25 bins, lower is better), "
            "of the detections above the threshold that is best on val, before and after isotonic regression on val:",
            {"LaECE": ("laece",), "after isotonic regression": ("laece_isotonic",)},
            scale=100,
            digits=1,
        ),
        table(
            f"Whom does the rule make learn? By the last checkpoint's predictions on the first {NUM_IMAGES} training "
            "images: positives for classification per object, by size in pixels of the input:",
            {
                f"below {low:g}": ("positives", "small"),
                f"{low:g} to {high:g}": ("positives", "medium"),
                f"from {high:g}": ("positives", "large"),
            },
            digits=1,
        ),
        table(
            "Do rules agree? Of the anchors that are positive by the run's own rule or by another, on the same "
            "predictions of the run, the share that both give one object:",
            {f"as {strategy}": ("labels", strategy) for strategy in strategies},
        ),
    ]
    title = (
        "Do the labels stay? Of the anchors that are positive at the end of an epoch or of the one before, on the same "
        "images, the share whose object changed, by epoch:"
    )
    return [*tables, table(title, {epoch: ("changed_labels", epoch) for epoch in changes})] if changes else tables
