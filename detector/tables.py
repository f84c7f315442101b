"""A study's records (see `detector.runs.collect`) as Markdown: what they all need."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from detector.runs import METRICS


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


def format_differences(
    content: dict[str, Any], baseline: tuple[str, str | None], label_model: Callable[[dict[str, Any]], str]
) -> list[str]:
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
