"""Trains and evaluates the runs behind docs/results.md: does Mutual Guidance help, on which data, by how much?

    python benchmarks/strategies/compare.py --study bccd-fssd-resnet18 --data BCCD --parallel 2
    python benchmarks/strategies/compare.py --study bccd-fssd-resnet18 --data BCCD --dry-run   # the commands alone
    python benchmarks/strategies/compare.py --render   # docs/results.md from the recorded JSON files
    python benchmarks/strategies/compare.py --plot docs/figures/leads.png   # and its first picture

A study is a list of rows (what is trained) in a setting (what all of them have in common); each row is trained once a
seed, by `detector.train`, and its last checkpoint is scored by `detector.evaluate`. Runs that are complete are not run
again, interrupted ones are resumed, and a run that several studies ask for is shared by them. After each run the
study's JSON file and its tables are written anew, beside the runs in runs/strategies/, which git ignores; with --record
to benchmarks/strategies/results/ and docs/results.md.

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
DOCUMENT = ROOT / "docs/results.md"
sys.path.append(str(ROOT))

from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.strategies.figure import draw_leads, find_leads  # noqa: E402
from benchmarks.strategies.studies import STUDIES  # noqa: E402
from detector import tables  # noqa: E402
from detector.program import run_program  # noqa: E402
from detector.runs import Study, add_arguments, collect, join_flags, run_study, write_text  # noqa: E402

SCRIPT = "benchmarks/strategies/compare.py"


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
        tables.format_provenance(content),
        tables.format_scores(content),
        tables.format_differences(content, study.baseline) if study.baseline is not None else [],
        tables.format_classes(content),
        tables.format_agreement(content, study.baseline),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def replace_section(document: str, name: str, text: str) -> str:
    """A document with new text between the markers of a study.

    Raises:
        ValueError: the document does not have the study's markers.
    """
    begin, end = f"<!-- begin {name}: written by {SCRIPT} -->\n", f"<!-- end {name} -->\n"
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
    parser.add_argument("--record", action="store_true", help="write the results that docs/results.md shows")
    parser.add_argument("--collect", action="store_true", help="run nothing: read the runs that are there and write")
    parser.add_argument("--render", action="store_true", help="run and read nothing: tables from the JSON files")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="likewise: mutual less iou in every setting, drawn")
    args = parser.parse_args(argv)
    if args.render or args.plot is not None:
        files = [RECORDS / f"{name}.json" for name in STUDIES]
        contents = [json.loads(file.read_text()) for file in files if file.is_file()]
        for content in contents if args.render else ():
            name = content["study"]
            write_text(DOCUMENT, replace_section(DOCUMENT.read_text(), name, render(content, STUDIES[name])))
        if args.plot is not None:
            draw_leads(find_leads(contents), args.plot)
        return 0
    if args.study is None:
        raise ValueError("--study is needed: one of " + ", ".join(STUDIES))
    study = STUDIES[args.study]
    if args.format is not None:
        study = study._replace(setting=study.setting._replace(layout=args.format))
    files = [RECORDS / f"{study.name}.json", DOCUMENT]
    if not args.record:
        files = [args.runs / f"{study.name}.json", args.runs / f"{study.name}.md"]

    def write(content: dict[str, Any]) -> None:
        if any(row["runs"] for row in content["rows"]):  # else the results that are there stay
            text = render(content, study)
            write_text(files[0], json.dumps(content, indent=1) + "\n")
            write_text(files[1], replace_section(DOCUMENT.read_text(), study.name, text) if args.record else text)
            print(f"written to {files[0]} and {files[1]}")

    code = 0
    if args.collect:
        write(collect(study, args.runs))
    else:
        machine = describe_machine(args.device)
        provenance = {name: machine[name] for name in ("device", "torch", "mg_ops", "commit")}
        code = run_study(study, args, args.runs, provenance, write)
    if not args.dry_run:
        print(render(collect(study, args.runs), study))
    return code


if __name__ == "__main__":
    run_program(main)
