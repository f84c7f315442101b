"""MkDocs hook: tables made from JSON files, of times that `make bench` wrote and of the wheels that nox tested.

They stand in for the lines `<!-- measured -->` and `<!-- tested wheels -->` of a page. Nothing is rounded but for
display, and nothing left out: methods that were skipped say why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the tests make the tables without MkDocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import report  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
MARK = "<!-- measured -->"
WHEELS = Path(__file__).with_name("wheel_matrix.json")
WHEELS_MARK = "<!-- tested wheels -->"


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
    tables = [report.case_table(name, case) for name, case in cases.items() if not name.startswith("sweep")]
    if swept := report.swept_cases(cases):
        tables.append(report.sweep_table(swept))
    return "\n".join(lines + [line for table in tables for line in report.table_as_markdown(table)])


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
