"""Figures as people read them: one way to write a time, a size and a table, for the terminal and the documentation.

Imports neither torch nor what draws: the documentation is built without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console

LOOP = "loop"
"""The baseline that all ratios are to."""


def format_quantity(value: float, unit: str) -> str:
    """Three digits, a prefix and the unit: "1.73 ms", "4.2 MB", "0 B"."""
    steps = {"": 1.0, "m": 1e-3, "u": 1e-6} if unit == "s" else {"G": 1e9, "M": 1e6, "k": 1e3}
    prefix, scale = next((step for step in steps.items() if value >= step[1]), ("", 1.0))
    return f"{format_number(value / scale)} {prefix}{unit}"


def format_number(value: float) -> str:
    """Three digits, or all of them before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_seconds(seconds: float | None) -> str:
    """A time; nothing for None."""
    return "" if seconds is None else format_quantity(seconds, "s")


def format_memory(method: dict[str, Any], parts: int = 1) -> str:
    """Extra memory, divided by `parts`; "<" where it is under what the measurement can tell."""
    if method["extra_bytes"] is None:
        return "not measured"
    extra, least = method["extra_bytes"] / parts, method["extra_bytes_resolution"] / parts
    return format_quantity(extra, "B") if extra >= least else f"< {format_quantity(least, 'B')}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables


class Table(NamedTuple):
    """A table before it is laid out."""

    title: str
    text: str
    """What it is about, above it."""
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def print_table(table: Table, console: Console) -> None:
    """To the terminal."""
    from rich.markdown import Markdown

    console.print(Markdown("\n".join(table_as_markdown(table))))


def table_as_markdown(table: Table) -> list[str]:
    """Lines of a page."""
    rule = f"---{'|---:' * (len(table.header) - 1)}"
    lines = [f"| {' | '.join(row)} |" for row in table.rows]
    lines = [f"#### {table.title}", "", f"{table.text}.", "", f"| {' | '.join(table.header)} |", f"|{rule}|", *lines]
    return [*lines, "", *(f"- {note}" for note in table.notes), ""]


def format_label(label: str, subject: bool) -> str:
    """The first cell of a row; bold for mg_ops."""
    return f"**{label}**" if subject else label


def case_table(name: str, case: dict[str, Any]) -> Table:
    """A row for each method of match_speed.py that ran; in the notes which did not, and why."""
    sizes, objects = case["sizes"], case["objects_per_image"]
    on_gpu = any("cuda" in method for method in case["methods"].values())
    header = ["", "median", "quartiles", "against (a)"]
    header += ["on the device", "/ floor", "launches", "waits"] if on_gpu else ["threads"]
    rows, notes = [], []
    for method in case["methods"].values():
        if method["skipped"]:
            notes.append(f"{method['label']}: skipped, {method['skipped']}")
            continue
        spread, ratio, cuda = method["quartile_seconds"], method["loop_over_this"], method.get("cuda", {})
        row = [format_label(method["label"], method["subject"]), format_seconds(method["median_seconds"])]
        row.append(" to ".join(map(format_seconds, spread)) if spread else "one call")
        row.append(format_number(ratio) if ratio else "")
        if on_gpu:
            row += [format_seconds(cuda["graph_replay_seconds"])]
            row += [f"{cuda['ratio_to_floor']:.2f}" if cuda["ratio_to_floor"] else ""]
            row += [str(cuda["launches"]), str(cuda["host_synchronizations"])]
        else:
            row.append(str(method["threads"]))
        equal = method["share_of_labels_equal"]
        rows.append([*row, format_memory(method), "" if equal is None else f"{100 * equal:.5g}%"])
        remarks = [method["note"], cuda.get("graph_replay_note", "")]
        notes += [f"{method['label']}: {remark}" for remark in remarks if remark]
    text = f"B = {sizes['B']} images, A = {sizes['A']:,} anchors, C = {sizes['C']} classes; "
    text += f"{format_number(objects['mean'])} objects per image, at most {objects['max']:,} ({case['objects_from']}). "
    text += f"Checked first: {case['checked']}"
    return Table(name, text, [*header, "extra memory", "equal"], rows, notes)


def swept_cases(cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One image with more and more objects."""
    swept = [case for name, case in cases.items() if name.startswith("sweep") or name == "dense5000"]
    return sorted(swept, key=lambda case: case["sizes"]["N"])


def sweep_table(swept: list[dict[str, Any]]) -> Table:
    """Time and memory of each method against the number of objects."""
    sizes, counts = swept[0]["sizes"], [f"{case['sizes']['N']:,}" for case in swept]
    rows, reasons = [], {}
    for name, of_first in swept[0]["methods"].items():
        cells = [format_label(of_first["label"], of_first["subject"])]
        for case, count in zip(swept, counts, strict=True):
            method = case["methods"][name]
            if method["skipped"]:
                cells.append("skipped")
                reasons.setdefault(f"{method['label']}: skipped, {method['skipped']}", []).append(count)
            else:
                cells.append(f"{format_seconds(method['median_seconds'])}, {format_memory(method)}")
        if set(cells[1:]) != {"skipped"}:
            rows.append(cells)
    notes = [f"{', '.join(where)} objects, {reason}" for reason, where in reasons.items()]
    text = f"One image, A = {sizes['A']:,}, C = {sizes['C']}: median time, and peak memory beyond inputs and outputs"
    header = ["", *(f"{count} objects" for count in counts)]
    return Table("Against the number of objects", text, header, rows, notes)


def verdict_lines(cases: dict[str, dict[str, Any]]) -> list[str]:
    """One line per case: the default backend, on a GPU its time on the device, and how it compares with the loop."""
    lines = []
    for name, case in cases.items():
        ours = next(method for method in case["methods"].values() if method["subject"])
        text = f"{name}: {ours['label']} {format_seconds(ours['median_seconds'])}"
        if replay := ours.get("cuda", {}).get("graph_replay_seconds"):
            text += f" ({format_seconds(replay)} on the device)"
        if ours["loop_over_this"]:
            text += f", {format_number(ours['loop_over_this'])} times as fast as the loop (a)"
        extra = format_memory(ours, case["sizes"]["B"] * case["sizes"]["A"])
        lines.append(f"{text}; extra memory {extra} per anchor of the batch")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The plot

COLORS = {LOOP: "#d1495b", "batched": "#8d6a9f", "torchvision": "#edae49"}


def plot_sweep(swept: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """Time and memory of one image against its number of objects."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = next(name for name, method in swept[0]["methods"].items() if method["subject"])
    counts, sizes = [case["sizes"]["N"] for case in swept], swept[0]["sizes"]
    with pyplot.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, both = pyplot.subplots(1, 2, figsize=(11, 4.8), dpi=160)
        panels = zip(both, ("Time of one call", "Peak memory beyond inputs and outputs"), ("s", "B"), strict=True)
        for axes, title, unit in panels:
            for name, color in {ours: "#00798c", **COLORS}.items():
                methods = [case["methods"][name] for case in swept if name in case["methods"]]
                if any(not method["skipped"] for method in methods):
                    width, front = (3, 5) if name == ours else (1.6, 3)
                    heights = [_height(method, unit) for method in methods]
                    label = methods[0]["label"]
                    axes.loglog(counts, heights, "o-", label=label, color=color, linewidth=width, zorder=front)
            axes.set_xlabel("objects in the image")
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_xticks(counts, [f"{count:,}" for count in counts])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda value, _, unit=unit: format_quantity(value, unit))
            axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        figure.legend(*both[0].get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False, borderaxespad=2)
        where = f"{machine['device']}, torch {machine['torch']}, mg_ops {machine['commit']}, {machine['date'][:10]}"
        words = f"one image, {sizes['A']:,} anchors, {sizes['C']} classes; {where}"
        figure.text(0.5, 0.015, words, ha="center", color="#666666", fontsize=9)
        figure.tight_layout(rect=(0, 0.16, 1, 1))
        figure.savefig(path)
        pyplot.close(figure)


def _height(method: dict[str, Any], unit: str) -> float:
    """What the plot shows of a method; NaN, which leaves a gap, if it was not measured."""
    if method["skipped"] or (unit == "B" and method["extra_bytes"] is None):
        return float("nan")
    return float(
        method["median_seconds"] if unit == "s" else max(method["extra_bytes"], method["extra_bytes_resolution"], 1)
    )
