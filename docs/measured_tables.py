"""MkDocs hook: tables made from JSON files, of times that `make bench` wrote and of the wheels that nox tested.

They stand in for the lines `<!-- measured -->` and `<!-- tested wheels -->` of a page. Nothing is rounded but for
display, and nothing left out: methods that were skipped say why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the tests make the tables without MkDocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MARK = "<!-- measured -->"
WHEELS = Path(__file__).with_name("wheel_matrix.json")
WHEELS_MARK = "<!-- tested wheels -->"
SWEEP = "sweep"


def format_seconds(seconds: float) -> str:
    """Three significant digits in s, ms or us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"


def format_bytes(count: float) -> str:
    """Three significant digits in B, kB, MB or GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def format_ratio(ratio: float | None) -> str:
    """How many times as fast as the loop."""
    if ratio is None:
        return ""
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def method_row(method: dict[str, Any]) -> str:
    """One method of a case as a row of its table."""
    label = f"**{method['label']}**" if method["subject"] else method["label"]
    if method["skipped"]:
        return f"| {label} | | | | | skipped: {method['skipped']} |"
    quartiles = method["quartile_seconds"]
    spread = "one call" if quartiles is None else " - ".join(format_seconds(value) for value in quartiles)
    memory = "" if method["extra_bytes"] is None else format_bytes(method["extra_bytes"])
    notes = "; ".join(note for note in (method["note"], method["memory_note"]) if note)
    ratio = format_ratio(method["loop_over_this"])
    return f"| {label} | {format_seconds(method['median_seconds'])} | {spread} | {ratio} | {memory} | {notes} |"


def case_section(name: str, case: dict[str, Any]) -> list[str]:
    """The table of one case."""
    sizes, objects = case["sizes"], case["objects_per_image"]
    mean = f"{objects['mean']:,.0f}" if objects["mean"] >= 100 else f"{objects['mean']:.3g}"
    return [
        f"#### {name}",
        "",
        f"B = {sizes['B']} images, A = {sizes['A']:,} anchors, C = {sizes['C']} classes; {mean} "
        f"objects per image (at most {objects['max']:,}), {case['objects_from']}. "
        f"Checked before it was timed: {case['checked']}.",
        "",
        "| method | median | quartiles | against (a) | extra memory | notes |",
        "|---|---:|---:|---:|---:|---|",
        *(method_row(method) for method in case["methods"].values()),
        "",
    ]


def sweep_section(cases: dict[str, dict[str, Any]]) -> list[str]:
    """Time and memory of each method against the number of objects: one table for all cases of the sweep."""
    counts = [case["sizes"]["N"] for case in cases.values()]
    sizes = next(iter(cases.values()))["sizes"]
    methods = {name: method["label"] for case in cases.values() for name, method in case["methods"].items()}
    lines = [
        "#### Against the number of objects",
        "",
        f"One image, A = {sizes['A']:,}, C = {sizes['C']}: median time of a call, peak memory beyond inputs and "
        "outputs.",
        "",
        f"| method | {' | '.join(f'{count:,} objects' for count in counts)} |",
        f"|---|{'---:|' * len(counts)}",
    ]
    for name, label in methods.items():
        cells = []
        for case in cases.values():
            method = case["methods"].get(name)
            if method is None or method["skipped"]:
                cells.append("skipped" if method else "")
                continue
            memory = method["extra_bytes"]
            cells.append(format_seconds(method["median_seconds"]) + (f", {format_bytes(memory)}" if memory else ""))
        if any(cell not in ("", "skipped") for cell in cells):
            shown = f"**{label}**" if label.startswith("mg_ops") else label
            lines.append(f"| {shown} | {' | '.join(cells)} |")
    return [*lines, ""]


def machine_section(path: Path) -> str:
    """All that was measured on one machine."""
    measured = json.loads(path.read_text())
    machine, cases = measured["machine"], measured["cases"]
    lines = [
        f"### {machine['device']}",
        "",
        f"torch {machine['torch']}, Python {machine['python']}, mg_ops at commit {machine['commit']}, "
        f"{machine['date'][:10]}; backends {', '.join(measured['options']['backends'])}, "
        f"{measured['options']['threads']} threads on the CPU.",
        "",
    ]
    plot = path.with_suffix(".png")
    if plot.is_file():
        alt = "Time of one call and peak memory against the number of objects in an image"
        lines += [f"![{alt}](../benchmarks/results/{path.parent.name}/{plot.name})", ""]
    for name, case in cases.items():
        if not name.startswith(SWEEP):
            lines += case_section(name, case)
    swept = {name: case for name, case in cases.items() if name.startswith(SWEEP) or name == "dense5000"}
    swept = dict(sorted(swept.items(), key=lambda item: item[1]["sizes"]["N"]))
    if swept:
        lines += sweep_section(swept)
    return "\n".join(lines)


def wheel_table() -> str:
    """What the tests said of the wheel, a row per environment."""
    lines = ["| torch | Python | passed | failed | skipped | when |", "|---|---|---:|---:|---:|---|"]
    for tested in json.loads(WHEELS.read_text()):
        counts = " | ".join(f"{tested[outcome]:,}" for outcome in ("passed", "failed", "skipped"))
        when = f"{tested['date']}, commit {tested['commit']}"
        lines.append(f"| {tested['torch']} | {tested['python']} | {counts} | {when} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the tables in place of their marks: those of all machines, GPUs among them once one is measured."""
    if MARK in markdown:
        sections = [machine_section(path) for path in sorted(RESULTS.glob("*/match_speed.json"))]
        markdown = markdown.replace(MARK, "\n\n".join(sections))
    if WHEELS_MARK in markdown:
        markdown = markdown.replace(WHEELS_MARK, wheel_table())
    return markdown.replace(" ± ", "\u00a0±\u00a0")  # a value and its error stay on one line
