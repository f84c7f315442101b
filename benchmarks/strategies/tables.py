"""A study's records as the tables of docs/results.md, and how they get there."""

from __future__ import annotations

import statistics
from typing import Any

from detector.runs import METRICS, Study, join_flags
from detector.scores import AGREEMENT_METRICS
from detector.tables import (
    find_baseline,
    format_difference,
    format_differences,
    format_mean,
    format_seeds,
    format_table,
    label_strategy,
    pair_differences,
    read_values,
)

SCRIPT = "benchmarks/strategies/compare.py"
NAMES = {"fssd": "FSSD", "retinanet": "RetinaNet", "rfbnet": "RFBNet", "resnet18": "ResNet-18", "vgg16": "VGG-16"}


def label_model(row: dict[str, Any]) -> str:
    """As a table names it."""
    return f"{NAMES[row['model']]} {NAMES[row['backbone']]}"


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


def render(content: dict[str, Any], study: Study) -> str:
    """A study's part of docs/results.md, in Markdown."""
    pretrained = any(row.backbone in study.pretrained for row in study.rows)
    weights = " --backbone-weights VGG16_WEIGHTS" if pretrained else ""
    flags = " ".join(join_flags({**dict(study.setting.flags), **({} if pretrained else {"backbone-weights": "none"})}))
    parts = [
        [
            f"`python {SCRIPT} --study {study.name} --data {study.setting.data}{weights}`; each run is "
            f"`detector.train` with `{flags}` and the flags in its row's name; the JSON file has whole commands."
        ],
        format_provenance(content),
        format_scores(content),
        format_differences(content, study.baseline, label_model) if study.baseline is not None else [],
        format_classes(content),
        format_agreement(content, study.baseline),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def replace_section(document: str, name: str, text: str) -> str:
    """A document with what stands between the markers of a study replaced.

    Raises:
        ValueError: the document does not have the study's markers.
    """
    begin, end = f"<!-- begin {name}: written by {SCRIPT} -->\n", f"<!-- end {name} -->\n"
    before, found_begin, rest = document.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"expected the lines {begin.strip()!r} and {end.strip()!r} in the document")
    return f"{before}{begin}\n{text}\n{end}{after}"
