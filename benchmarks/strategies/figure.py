"""The lead of Mutual Guidance over static matching in every setting that was run, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.strategies.studies import STUDIES
from detector.tables import label_model, mean_and_error, pair_differences, read_values

PANELS = (
    ("AP", "AP, points", 100.0, 0),
    ("AP75", "AP75, points", 100.0, 0),
    ("score_iou_correlation", "rank correlation", 1.0, 2),
)
"""Metric, its title, the factor from the metric to what is drawn, and how many decimals the axis has."""


class Lead(NamedTuple):
    """`mutual` less `iou` in one setting."""

    data: str
    """The data set, and the size of its images."""
    label: str
    """What was trained on it, and how."""
    differences: dict[str, dict[int, float]]
    """By metric and seed."""


def find_leads(contents: Sequence[dict[str, Any]]) -> list[Lead]:
    """Every row of `mutual` that has an `iou` row with the same flags and a seed in common, each row once: of the study
    that has the most seeds of it.

    Args:
        contents: of the studies' JSON files. Those that report val have tuned something, and are left out.
    """
    rows: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
    for content in (content for content in contents if content["split"] == "test"):
        setting = f"{content['setting']['data']} {content['setting']['flags']}"
        for row in content["rows"]:
            key = setting, row["name"]
            if key not in rows or len(row["runs"]) > len(rows[key][1]["runs"]):
                rows[key] = content, row
    leads = []
    for (setting, name), (content, row) in rows.items():
        _, against = rows.get((setting, name.replace("-mutual", "-iou", 1)), (None, None))
        if row["strategy"] == "mutual" and against is not None:
            pairs = [[read_values(each, "test", metric) for each in (row, against)] for metric, *_ in PANELS]
            differences = {metric: pair_differences(*pair) for (metric, *_), pair in zip(PANELS, pairs, strict=True)}
            pretrained = "pretrained" if row["backbone"] in STUDIES[content["study"]].pretrained else ""
            label = ", ".join(filter(None, [label_model(row), pretrained, row["note"]]))
            data = f"{content['setting']['data']} {content['setting']['flags']['image-size']}"
            leads += [Lead(data, label, differences)] if differences["AP"] else []
    return leads


def draw_leads(leads: Sequence[Lead], path: Path) -> None:
    """A row a setting: a dot a seed, their mean, and a bar from one standard error below it to one above.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not leads:
        raise ValueError("expected runs of mutual and iou with a common seed, got none: run a study first")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rc = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False}
    with pyplot.rc_context(rc):
        figure, all_axes = pyplot.subplots(
            1, len(PANELS), figsize=(12, 1.3 + 0.42 * len(leads)), dpi=130, sharey=True, layout="constrained"
        )
        for axes, (metric, title, scale, digits) in zip(all_axes, PANELS, strict=True):
            axes.axvline(0, color="#888888", linewidth=1)
            for height, lead in enumerate(leads):
                values = [scale * value for value in lead.differences[metric].values()]
                if not values:
                    continue
                mean, error = mean_and_error(values)
                axes.plot(values, [height] * len(values), "o", color="#555555", alpha=0.55, markersize=4.5, zorder=4)
                axes.errorbar(
                    mean, height, xerr=error, fmt="D", color="#00798c", markersize=8, elinewidth=3.5, zorder=5
                )
            axes.set_title(title, loc="left", fontweight="bold")
            axes.grid(axis="x", color="#dddddd", linewidth=0.8)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(lambda value, _, digits=digits: f"{value:+.{digits}f}" if value else "0")
        several = len({lead.data for lead in leads}) > 1
        labels = [f"{lead.data}: {lead.label}" if several else lead.label for lead in leads]
        all_axes[0].set_yticks(range(len(leads)), labels)
        all_axes[0].set_ylim(len(leads) - 0.5, -0.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)
