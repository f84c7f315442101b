"""A study's records as the tables of docs/results.md, and how they get there."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.strategies.records import join_flags
from benchmarks.strategies.studies import PRETRAINED, STUDIES, Study
from detector.reproduce import METRICS, format_mean
from detector.scores import AGREEMENT_METRICS

SCRIPT = "benchmarks/strategies/compare.py"
MODEL_NAMES = {"fssd": "FSSD", "retinanet": "RetinaNet", "rfbnet": "RFBNet"}
BACKBONE_NAMES = {"resnet18": "ResNet-18", "vgg16": "VGG-16"}


def label_model(row: dict[str, Any]) -> str:
    """As a table names it."""
    return f"{MODEL_NAMES[row['model']]} {BACKBONE_NAMES[row['backbone']]}"


def label_strategy(row: dict[str, Any]) -> str:
    """As a table names it."""
    return f"{row['strategy']}, {row['note']}" if row["note"] else row["strategy"]


def read_values(row: dict[str, Any], split: str, metric: str, class_name: str | None = None) -> dict[int, float]:
    """A metric by seed, of the runs that have it."""
    values = {}
    for run in row["runs"]:
        scores = run[split] if class_name is None else run[split]["per_class"].get(class_name, {})
        if scores.get(metric) is not None:
            values[run["seed"]] = scores[metric]
    return values


def format_seeds(seeds: Sequence[int]) -> str:
    """Seeds as "0, 1, 2"; "-" for none."""
    return ", ".join(str(seed) for seed in sorted(seeds)) or "-"


def format_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def format_scores(content: dict[str, Any]) -> list[str]:
    """The main table: mean and standard deviation over seeds; "-" where nothing was run."""
    split = content["split"]
    shown = [(split, metric) for metric in METRICS] + ([("val", "AP")] if split != "val" else [])
    heads = [f"{metric} on {where}" for where, metric in shown]
    lines = [
        format_row(["detector", "strategy", "seeds", *heads, "minutes a run", "`--rows`"]),
        format_row(["---"] * (len(heads) + 5)),
    ]
    for row in content["rows"]:
        cells = [format_mean(list(read_values(row, where, metric).values())) for where, metric in shown]
        minutes = [run["training_seconds"] / 60 for run in row["runs"] if run["training_seconds"] is not None]
        seeds = format_seeds([run["seed"] for run in row["runs"]])
        time_cell = f"{statistics.mean(minutes):.1f}" if minutes else "-"
        lines.append(format_row([label_model(row), label_strategy(row), seeds, *cells, time_cell, f"`{row['name']}`"]))
    return lines


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
    spread = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * mean:+.{digits}f}{spread}"


def find_baseline(content: dict[str, Any], row: dict[str, Any], baseline: tuple[str, str | None]) -> dict[str, Any]:
    """The row that another is compared with: of its model, and of its note where the baseline names none."""
    strategy, note = baseline
    wanted = (row["model"], row["backbone"], strategy, row["note"] if note is None else note)
    return next(
        other
        for other in content["rows"]
        if (other["model"], other["backbone"], other["strategy"], other["note"]) == wanted
    )


def format_differences(content: dict[str, Any], baseline: tuple[str, str | None]) -> list[str]:
    """Each row less the baseline of its model (and note), seed by seed; rows without a common seed are left out."""
    split = content["split"]
    lines = []
    for row in content["rows"]:
        against = find_baseline(content, row, baseline)
        if row is against:
            continue
        differences = [
            pair_differences(read_values(row, split, metric), read_values(against, split, metric)) for metric in METRICS
        ]
        if differences[0]:
            cells = [format_difference(by_seed) for by_seed in differences]
            difference = f"{label_strategy(row)} - {label_strategy(against)}"
            lines.append(format_row([label_model(row), difference, format_seeds(list(differences[0])), *cells]))
    if not lines:
        return []
    return [
        "Paired differences in points: mean over seeds ± its standard error (one seed has none). The runs of one seed "
        "start from the same weights and see the same images.",
        "",
        format_row(["detector", "difference", "seeds", *METRICS]),
        format_row(["---"] * 6),
        *lines,
    ]


def format_classes(content: dict[str, Any]) -> list[str]:
    """AP class by class, of the rows with runs."""
    split = content["split"]
    classes = list(
        dict.fromkeys(name for row in content["rows"] for run in row["runs"] for name in run[split]["per_class"])
    )
    if not classes:
        return []
    lines = [
        f"AP on {split}, class by class:",
        "",
        format_row(["detector", "strategy", *classes]),
        format_row(["---"] * (len(classes) + 2)),
    ]
    for row in content["rows"]:
        if row["runs"]:
            cells = [format_mean(list(read_values(row, split, "AP", name).values())) for name in classes]
            lines.append(format_row([label_model(row), label_strategy(row), *cells]))
    return lines


def format_agreement(content: dict[str, Any], baseline: tuple[str, str | None] | None) -> list[str]:
    """How the scores agree with the boxes, of the rows that know it; the difference is as in `format_differences`."""
    split = content["split"]
    lines = []
    for row in content["rows"]:
        values = [read_values(row, split, metric) for metric in AGREEMENT_METRICS]
        if not all(values):
            continue
        cells = [format_mean(list(by_seed.values()), scale=1, digits=3) for by_seed in values]
        against = find_baseline(content, row, baseline) if baseline is not None else row
        if against is not row:
            baseline_values = read_values(against, split, AGREEMENT_METRICS[0])
            cells.insert(1, format_difference(pair_differences(values[0], baseline_values), scale=1, digits=3))
        else:
            cells.insert(1, "")
        lines.append(format_row([label_model(row), label_strategy(row), *cells]))
    if not lines:
        return []
    return [
        f"Do the scores know which boxes are good? Of the detections on {split} that are right at IoU 0.5, class by "
        "class, and averaged by their number:",
        "",
        format_row(
            ["detector", "strategy", "rank correlation of score and IoU", "paired difference", "mean IoU of these"]
        ),
        format_row(["---"] * 5),
        *lines,
    ]


def format_provenance(content: dict[str, Any]) -> list[str]:
    """On which machines, when, and from which commits the runs are."""
    runs = [run for row in content["rows"] for run in row["runs"]]
    if not runs:
        return []
    lines = []
    for kind in sorted({(run["device"], run["threads"], run["torch"], run["commit"]) for run in runs}, key=str):
        of_kind = [run for run in runs if (run["device"], run["threads"], run["torch"], run["commit"]) == kind]
        days = sorted({run["date"][:10] for run in of_kind})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        device, threads, torch_version, commit = kind
        with_threads = f" ({threads} thread{'' if threads == 1 else 's'} a run)" if threads is not None else ""
        lines.append(
            f"{len(of_kind)} run{'' if len(of_kind) == 1 else 's'} on {device}{with_threads}, torch {torch_version}, "
            f"commit {commit}, {when}."
        )
    return [" ".join(lines)]


def render(content: dict[str, Any], study: Study) -> str:
    """A study's part of docs/results.md, in Markdown."""
    weights = " --backbone-weights VGG16_WEIGHTS" if any(row.backbone in PRETRAINED for row in study.rows) else ""
    command = f"python {SCRIPT} --study {content['study']} --data {study.setting.data}{weights}"
    flags = " ".join(join_flags({**study.setting.flags, **({} if weights else {"backbone-weights": "none"})}))
    parts = [
        [
            f"`{command}`; each run is `detector.train` with `{flags}` and the flags in its row's name; the JSON file "
            "has whole commands."
        ],
        format_provenance(content),
        format_scores(content),
        format_differences(content, study.baseline) if study.baseline is not None else [],
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


def write_atomically(path: Path, text: str) -> None:
    """The file is the old one or the new one, always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def write_study(name: str, content: dict[str, Any], results: Path, document: Path | None) -> list[Path]:
    """The JSON file, and the tables in their section of the document, or in a file of their own; both paths."""
    written, tables = results / f"{name}.json", render(content, STUDIES[name])
    write_atomically(written, json.dumps(content, indent=1) + "\n")
    if document is None:
        document = results / f"{name}.md"
    else:
        tables = replace_section(document.read_text(), name, tables)
    write_atomically(document, tables)
    return [written, document]
