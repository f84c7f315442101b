"""Trains and evaluates the runs behind docs/results.md: which rule is best, on which data, by how much, and why?

    python benchmarks/strategies/compare.py --study bccd-fssd-resnet18 --data BCCD --parallel 2
    python benchmarks/strategies/compare.py --study bccd-fssd-resnet18 --data BCCD --dry-run   # the commands alone
    python benchmarks/strategies/compare.py --study bccd-rules --data BCCD --analyze   # of the runs that are there
    python benchmarks/strategies/compare.py --render   # the pages from the recorded JSON files
    python benchmarks/strategies/compare.py --plot docs/figures/leads.png   # and its first picture

A study is a list of rows (what is trained) in a setting (what all of them have in common); each row is trained once a
seed, by `detector.train`, and its last checkpoint is scored by `detector.evaluate`. Runs that are complete are not run
again, interrupted ones are resumed, and a run that several studies ask for is shared by them. After each run the
study's JSON file and its tables are written anew, beside the runs in runs/strategies/, which git ignores; with --record
to benchmarks/strategies/results/ and docs/results/, where the recorded runs of other seeds stay.

Whatever is tuned is chosen by the val split, for both strategies with the same budget, and reported on test.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks/strategies/results"
DOCS = ROOT / "docs"
"""results.md and the pages behind it, results/*.md."""
SUMMARIZED = "bccd-rules"
"""The study of the table in docs/results.md."""
sys.path.append(str(ROOT))

from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.strategies.analysis import (  # noqa: E402
    analyze,
    chance_cells,
    format_chance,
    format_reasons,
    read_matches,
    write_matches,
)
from benchmarks.strategies.figure import draw_leads, find_leads  # noqa: E402
from benchmarks.strategies.studies import STUDIES  # noqa: E402
from detector import tables  # noqa: E402
from detector.outputs import whole_file  # noqa: E402
from detector.program import run_program  # noqa: E402
from detector.runs import Study, add_arguments, collect, find_runs, join_flags, run_study, write_text  # noqa: E402

SCRIPT = "benchmarks/strategies/compare.py"


def render(content: dict[str, Any], study: Study, analysis: dict[str, Any] | None = None) -> str:
    """A study's part of its page, in Markdown; with the tables of its analysis if there is one."""
    pretrained = any(row.backbone in study.pretrained for row in study.rows)
    weights = " --backbone-weights VGG16_WEIGHTS" if pretrained else ""
    flags = " ".join(join_flags({**dict(study.setting.flags), **({} if pretrained else {"backbone-weights": "none"})}))
    parts = [
        [
            f"`python {SCRIPT} --study {study.name} --data {study.setting.data}{weights}`; each run is "
            f"`detector.train` with `{flags}` and the flags in its row's name; the JSON file has whole commands."
        ],
        tables.format_provenance(content),
        tables.format_scores(content),
        tables.format_differences(content, study.baseline) if study.baseline is not None else [],
        format_chance(content, analysis or {}, study.baseline) if study.baseline is not None else [],
        tables.format_classes(content),
        tables.format_agreement(content, study.baseline),
        *(format_reasons(content, analysis) if analysis is not None else ()),
        [f"Analyzed at commit {analysis['commit']}, {analysis['date']}."] if analysis is not None else [],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def render_summary(content: dict[str, Any], study: Study, analysis: dict[str, Any] | None = None) -> str:
    """The table of docs/results.md: what a reader wants to know first of a study."""
    chance = {cells[1]: cells for cells in chance_cells(content, analysis or {}, study.baseline or ("iou", ""))}
    rows = []
    for row in content["rows"]:
        means = [tables.format_mean(tables.read_values(row, "test", metric)) for metric in ("AP", "AP75")]
        correlation = tables.read_values(row, "test", "score_iou_correlation")
        *_, by_seed, p, interval = chance.get(f"{row['strategy']} - iou", ["", "", ""])
        cells = [row["strategy"], tables.format_seeds(run["seed"] for run in row["runs"]), *means]
        rows.append([*cells, by_seed, p, interval, tables.format_mean(correlation, scale=1, digits=3)])
    heads = ["rule", "seeds", "AP", "AP75", "AP over `iou`, by seed", "p over seeds", "95% over images"]
    return "\n".join(tables.format_table([*heads, "rank correlation of score and IoU"], rows)) + "\n"


def publish(content: dict[str, Any]) -> None:
    """Puts a study's recorded tables where its markers are."""
    name = content["study"]
    study, analysis = STUDIES[name], read_analysis(RECORDS, name)
    sections = {name: render(content, study, analysis)}
    if name == SUMMARIZED:
        sections["summary"] = render_summary(content, study, analysis)
    for of, text in sections.items():
        page = find_page(of)
        write_text(page, replace_section(page.read_text(), of, text))


def read_analysis(folder: Path, name: str) -> dict[str, Any] | None:
    """What --analyze wrote of a study beside its records, if it did."""
    file = folder / "analyses" / f"{name}.json"
    return dict(json.loads(file.read_text())) if file.is_file() else None


def join_records(content: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """The records of a study, and of rows that are run by the same command those recorded before of other seeds."""
    earlier = {(row["name"], row["command"]): row["runs"] for row in recorded["rows"]}
    rows = []
    for row in content["rows"]:
        runs = {run["seed"]: run for run in (*earlier.get((row["name"], row["command"]), ()), *row["runs"])}
        rows.append({**row, "runs": [runs[seed] for seed in sorted(runs)]})
    return {**content, "rows": rows}


def find_page(name: str) -> Path:
    """The page that has the markers of a study; ValueError if none has."""
    for page in (*sorted(DOCS.glob("results/*.md")), DOCS / "results.md"):
        if begin_marker(name) in page.read_text():
            return page
    raise ValueError(f"expected the line {begin_marker(name)!r} in a page of results: put it where the tables belong")


def begin_marker(name: str) -> str:
    """The line before a study's part of its page."""
    return f"<!-- begin {name}: written by {SCRIPT} -->"


def replace_section(document: str, name: str, text: str) -> str:
    """A document with new text between the markers of a study.

    Raises:
        ValueError: the document does not have the study's markers.
    """
    begin, end = f"{begin_marker(name)}\n", f"<!-- end {name} -->\n"
    before, found_begin, rest = document.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"expected the lines {begin.strip()!r} and {end.strip()!r} in the document")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, 1 if a run failed, 130 after a signal.

    Raises:
        ValueError: an option that makes no sense, or a run that does not fit its study.
    """
    parser = argparse.ArgumentParser(
        f"python {SCRIPT}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="studies:\n" + "\n".join(f"  {name:20} {study.title}" for name, study in STUDIES.items()),
    )
    parser.add_argument("--study", choices=STUDIES, help="which table; see below")
    add_arguments(parser)
    parser.add_argument("--runs", type=Path, default=Path("runs/strategies"), help="folder of the runs (%(default)s)")
    parser.add_argument("--record", action="store_true", help="write the results that docs/results/ shows")
    parser.add_argument("--collect", action="store_true", help="run nothing: read the runs that are there and write")
    analysis = "likewise: what of it could be chance, kinds of errors, calibration, labels (needs tidecv)"
    parser.add_argument("--analyze", action="store_true", help=analysis)
    parser.add_argument("--render", action="store_true", help="run and read nothing: tables from the JSON files")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="likewise: mutual less iou in every setting, drawn")
    args = parser.parse_args(argv)
    if args.render or args.plot is not None:
        files = [RECORDS / f"{name}.json" for name in STUDIES]
        contents = [json.loads(file.read_text()) for file in files if file.is_file()]
        for content in contents if args.render else ():
            publish(content)
        if args.plot is not None:
            draw_leads(find_leads(contents), args.plot)
        return 0
    if args.study is None:
        raise ValueError("--study is needed: one of " + ", ".join(STUDIES))
    study = STUDIES[args.study]
    if args.format is not None:
        study = study._replace(setting=study.setting._replace(layout=args.format))
    records = RECORDS if args.record else args.runs

    def write(content: dict[str, Any]) -> None:
        if any(row["runs"] for row in content["rows"]):  # else the results that are there stay
            file = records / f"{study.name}.json"
            if args.record and file.is_file():
                content = join_records(content, json.loads(file.read_text()))
            write_text(file, json.dumps(content, indent=1) + "\n")
            if args.record:
                publish(content)
            else:
                text = render(content, study, read_analysis(records, study.name))
                write_text(records / f"{study.name}.md", text)
            print(f"written to {file} and {find_page(study.name) if args.record else 'its .md'}")

    code = 0
    if args.analyze:
        if args.data is None:
            raise ValueError(f"--analyze: --data is needed: the folder of {study.setting.data}")
        runs = [run for run in find_runs(study, study.rows, None, args.runs) if run.is_complete]
        machine = describe_machine("cpu")
        known = (read_analysis(records, study.name) if args.record else None) or {}
        matches_file = records / "analyses" / f"{study.name}.npz"
        found, matches = analyze(study, runs, args.data, known, read_matches(matches_file) if known else {})
        analysis = {"commit": machine["commit"], "date": machine["date"][:10], **found}
        write_text(records / "analyses" / f"{study.name}.json", json.dumps(analysis, indent=1) + "\n")
        with whole_file(matches_file) as file:
            write_matches(file, matches)
    if args.collect or args.analyze:
        write(collect(study, args.runs))
    else:
        machine = describe_machine(args.device)
        provenance = {name: machine[name] for name in ("device", "torch", "mg_ops", "commit")}
        code = run_study(study, args, args.runs, provenance, write)
    if not args.dry_run:
        print(render(collect(study, args.runs), study, read_analysis(records, study.name)))
    return code


if __name__ == "__main__":
    run_program(main)
