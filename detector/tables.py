"""A study's records (see `detector.runs.collect`) as tables in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from detector.runs import METRICS
from detector.scores import AGREEMENT_METRICS

NAMES = {"fssd": "FSSD", "retinanet": "RetinaNet", "rfbnet": "RFBNet"}
NAMES |= {"resnet18": "ResNet-18", "vgg16": "VGG-16", "vgg16_bn": "VGG-16 BN"}


def format_table(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> list[str]:
    """The lines of a table, below its title; none if it has no rows."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]
    return [*([title, ""] if title else []), *lines] if rows else []


def format_mean(values: dict[int, float], scale: float = 100, digits: int = 1) -> str:
    """Shares by seed in percent as "51.0 ± 1.4": their mean, and their standard deviation if there are several."""
    if not values:
        return "-"
    spread = f" ± {scale * statistics.stdev(values.values()):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values.values()):.{digits}f}{spread}"


def format_seeds(seeds: Iterable[int]) -> str:
    """Seeds as "0, 1, 2"; "-" for none."""
    return ", ".join(str(seed) for seed in sorted(seeds)) or "-"


def label_model(row: dict[str, Any]) -> str:
    """As a table names it."""
    return f"{NAMES[row['model']]} {NAMES[row['backbone']]}"


def label_strategy(row: dict[str, Any]) -> str:
    """As a table names it."""
    return f"{row['strategy']}, {row['note']}" if row["note"] else str(row["strategy"])


def read_values(row: dict[str, Any], split: str, metric: str, class_name: str | None = None) -> dict[int, float]:
    """A metric by seed, of the runs that have it."""
    values = {}
    for run in row["runs"]:
        scores = run[split] if class_name is None else run[split]["per_class"].get(class_name, {})
        if scores.get(metric) is not None:
            values[run["seed"]] = scores[metric]
    return values


def pair_differences(values: dict[int, float], baseline: dict[int, float]) -> dict[int, float]:
    """What each seed that both have gains over the baseline."""
    return {seed: values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())}


def mean_and_error(differences: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error (None for a single value)."""
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return statistics.mean(differences), error


def format_difference(differences: dict[int, float], scale: float = 100.0, digits: int = 1) -> str:
    """Signed mean ± standard error; "-" without a common seed."""
    if not differences:
        return "-"
    mean, error = mean_and_error(list(differences.values()))
    return f"{scale * mean:+.{digits}f}" + ("" if error is None else f" ± {scale * error:.{digits}f}")


def find_baseline(content: dict[str, Any], row: dict[str, Any], baseline: tuple[str, str | None]) -> dict[str, Any]:
    """The row that another is compared with: of its model, and of its note where the baseline names none."""
    strategy, note = baseline
    wanted = {**row, "strategy": strategy, "note": row["note"] if note is None else note}
    keys = ("model", "backbone", "strategy", "note")
    return next(other for other in content["rows"] if all(other[key] == wanted[key] for key in keys))


def format_scores(content: dict[str, Any]) -> list[str]:
    """The main table: mean and standard deviation over seeds; "-" where nothing was run."""
    split, rows = content["split"], []
    shown = [(split, metric) for metric in METRICS] + ([("val", "AP")] if split != "val" else [])
    for row in content["rows"]:
        minutes = [run["training_seconds"] / 60 for run in row["runs"] if run["training_seconds"] is not None]
        cells = [label_model(row), label_strategy(row), format_seeds(run["seed"] for run in row["runs"])]
        cells += [format_mean(read_values(row, where, metric)) for where, metric in shown]
        rows.append([*cells, f"{statistics.mean(minutes):.1f}" if minutes else "-", f"`{row['name']}`"])
    heads = [f"{metric} on {where}" for where, metric in shown]
    return format_table(["detector", "strategy", "seeds", *heads, "minutes a run", "`--rows`"], rows)


def format_differences(content: dict[str, Any], baseline: tuple[str, str | None]) -> list[str]:
    """Each row less the baseline of its model (and note), seed by seed; rows without a common seed are left out."""
    split, rows = content["split"], []
    for row in content["rows"]:
        against = find_baseline(content, row, baseline)
        differences = [
            pair_differences(read_values(row, split, metric), read_values(against, split, metric)) for metric in METRICS
        ]
        if row is not against and differences[0]:
            name = f"{label_strategy(row)} - {label_strategy(against)}"
            cells = [label_model(row), name, format_seeds(differences[0])]
            rows.append([*cells, *map(format_difference, differences)])
    title = (
        "Paired differences in points: mean over seeds ± its standard error (one seed has none). The runs of one seed "
        "start from the same weights and see the same images."
    )
    return format_table(["detector", "difference", "seeds", *METRICS], rows, title)


def format_classes(content: dict[str, Any]) -> list[str]:
    """AP class by class, of the rows with runs."""
    split, with_runs = content["split"], [row for row in content["rows"] if row["runs"]]
    classes = list(dict.fromkeys(name for row in with_runs for run in row["runs"] for name in run[split]["per_class"]))
    rows = [
        [label_model(row), label_strategy(row), *(format_mean(read_values(row, split, "AP", name)) for name in classes)]
        for row in with_runs
    ]
    return format_table(["detector", "strategy", *classes], rows, f"AP on {split}, class by class:")


def format_agreement(content: dict[str, Any], baseline: tuple[str, str | None] | None) -> list[str]:
    """How the scores agree with the boxes, of the rows that know it; the difference is as in `format_differences`."""
    split, rows = content["split"], []
    for row in content["rows"]:
        correlation, matched_iou = (read_values(row, split, metric) for metric in AGREEMENT_METRICS)
        against = find_baseline(content, row, baseline) if baseline is not None else row
        difference = pair_differences(correlation, read_values(against, split, AGREEMENT_METRICS[0]))
        if correlation and matched_iou:
            paired = format_difference(difference, scale=1, digits=3) if against is not row else ""
            means = [format_mean(values, scale=1, digits=3) for values in (correlation, matched_iou)]
            rows.append([label_model(row), label_strategy(row), means[0], paired, means[1]])
    heads = ["rank correlation of score and IoU", "paired difference", "mean IoU of these"]
    title = (
        f"Do the scores know which boxes are good? Of the detections on {split} that are right at IoU 0.5, class by "
        "class, and averaged by their number:"
    )
    return format_table(["detector", "strategy", *heads], rows, title)


def format_provenance(content: dict[str, Any]) -> list[str]:
    """On which machines, when, and from which commits the runs are."""
    days: dict[tuple[Any, ...], list[str]] = {}
    for run in (run for row in content["rows"] for run in row["runs"]):
        days.setdefault((run["device"], run["threads"], run["torch"], run["commit"]), []).append(run["date"][:10])
    sentences = []
    for (device, threads, torch_version, commit), dates in sorted(days.items(), key=lambda item: str(item[0])):
        when = dates[0] if len({*dates}) == 1 else f"{min(dates)} to {max(dates)}"
        with_threads = f" ({threads} thread{'' if threads == 1 else 's'} a run)" if threads is not None else ""
        runs = f"{len(dates)} run{'' if len(dates) == 1 else 's'} on {device}{with_threads}"
        sentences.append(f"{runs}, torch {torch_version}, commit {commit}, {when}.")
    return [" ".join(sentences)] if sentences else []
