"""Trains and evaluates the rows of the paper's Tables 1 and 2; writes the tables with the paper's numbers beside."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import mg_ops
from detector.checkpoint import FREE_ON_RESUME
from detector.data import default_splits
from detector.program import run_program
from detector.runs import METRICS, Row, Setting, Study, add_arguments, choose_rows, collect, run_study, write_text
from detector.tables import format_differences, format_mean, format_table, read_values
from detector.train import parse_arguments

STRATEGIES = ("iou", "localize_to_classify", "classify_to_localize", "mutual")
TABLES: dict[str, dict[tuple[str, str], tuple[tuple[float, float, float], ...]]] = {
    "table1": {  # PASCAL VOC 07+12 trainval -> VOC 2007 test: AP, AP50 and AP75 in percent, strategy by strategy
        ("fssd", "resnet18"): ((50.3, 75.5, 53.7), (51.8, 76.1, 55.9), (51.0, 76.1, 54.3), (52.1, 76.2, 55.9)),
        ("fssd", "vgg16_bn"): ((54.1, 80.1, 58.3), (56.0, 80.3, 60.6), (54.4, 79.9, 58.5), (56.2, 80.4, 61.4)),
        ("retinanet", "resnet18"): ((51.1, 75.8, 54.8), (53.4, 76.5, 57.2), (51.9, 75.9, 55.8), (53.5, 76.9, 57.4)),
        ("retinanet", "vgg16_bn"): ((55.2, 80.2, 59.6), (57.4, 81.1, 62.6), (56.2, 80.1, 61.7), (57.7, 81.1, 62.9)),
        ("rfbnet", "vgg16_bn"): ((55.6, 80.9, 59.6), (57.2, 80.9, 61.6), (55.9, 80.8, 60.2), (57.9, 81.5, 62.6)),
    },
    "table2": {  # COCO train2017 -> val2017: iou and mutual only
        ("fssd", "resnet18"): ((26.1, 42.8, 26.7), (27.0, 42.9, 28.2)),
        ("fssd", "vgg16_bn"): ((31.1, 48.9, 32.7), (32.0, 49.3, 33.9)),
        ("retinanet", "resnet18"): ((27.8, 44.5, 28.6), (28.7, 44.9, 29.9)),
        ("retinanet", "vgg16_bn"): ((32.3, 50.3, 34.0), (33.6, 50.8, 35.7)),
        ("rfbnet", "vgg16_bn"): ((33.4, 51.6, 35.1), (34.6, 52.0, 36.8)),
    },
}
RELEASED_LOSSES = ("--focal-gamma", "1", "--box-loss", "released_balanced_l1")
"""Of the code released with the paper, from which its numbers come; the defaults of detector.train are the losses'
own papers'."""
PAPER_SPLITS = {
    "table1": ("VOC2007/trainval+VOC2012/trainval", "VOC2007/test"),
    "table2": ("train2017", "val2017"),
}
SAME_SETTING = {"amp", "compile", "deterministic", "sync_batch_norm"}
"""Flags whose change keeps the paper's numbers comparable."""


def make_study(args: argparse.Namespace, train_words: list[str]) -> Study:
    """One of the tables as a study, with flags for detector.train."""
    is_first = args.table == "table1"
    layout = args.format or ("voc" if is_first else "coco")
    splits = default_splits(args.data, layout)
    own = ("--format", layout, "--train-split", splits[0], "--eval-split", splits[1], *RELEASED_LOSSES)
    before, after = (vars(parse_arguments(["--data", ".", *own, *words])) for words in ((), train_words))
    changed = {name: after[name] for name in after if after[name] != before[name] and name not in FREE_ON_RESUME}
    repeats = changed.keys() <= SAME_SETTING and splits == PAPER_SPLITS[args.table] and args.backbone_weights != "none"
    # Runs with other flags have a folder, and a table, of their own.
    folder = args.table + "".join(f"-{name.replace('_', '-')}{value}" for name, value in sorted(changed.items()))
    rows = (
        Row(*detector, strategy, paper=scores if repeats else None)
        for detector, row in TABLES[args.table].items()
        for strategy, scores in zip(STRATEGIES if is_first else STRATEGIES[::3], row, strict=True)
    )
    return Study(
        args.table,
        f"The paper's {args.table}",
        Setting(folder, "VOC" if is_first else "COCO", layout, ()),
        tuple(rows),
        seeds=(0,),
        split="val",
        pretrained=() if args.backbone_weights == "none" else ("resnet18", "vgg16_bn"),
        words=(*own[2:], *train_words),
    )


def render(content: dict[str, Any], asked: set[str]) -> str:
    """What was measured (mean and standard deviation over seeds) and paired differences; beside them the paper's
    numbers, if the runs repeat its setting. Of the rows whose names were asked for, and those that were run before.
    """
    rows, has_paper = [], all("paper" in row for row in content["rows"])
    for row in content["rows"]:
        if row["runs"] or row["name"] in asked:
            paper = {metric: f" ({row['paper'][metric]})" if has_paper else "" for metric in METRICS}
            cells = [f"{format_mean(read_values(row, 'val', metric))}{paper[metric]}" for metric in METRICS]
            rows.append([f"{row['model']} {row['backbone']}", row["strategy"], str(len(row["runs"])), *cells])
    heads = ["model", "strategy", "seeds", *(f"{metric} (paper)" if has_paper else metric for metric in METRICS)]
    note = "The paper's numbers are of another setting: they are not shown."
    differences = format_differences(content, ("iou", ""))
    parts = [format_table(heads, rows), differences, [] if has_paper else [note]]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, 1 if a run failed, 130 after a signal."""
    parser = argparse.ArgumentParser(
        "python -m detector.reproduce",
        description="Trains and evaluates rows of the paper's Table 1 (VOC) or Table 2 (COCO), with the losses of its "
        "released code, and writes the table. Flags it does not know go to detector.train, such as --amp bf16 --cache "
        "--image-size 160.",
    )
    parser.add_argument("table", choices=TABLES, help="Table 1: VOC, Table 2: COCO")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="of runs and table (%(default)s)")
    add_arguments(parser)
    args, train_words = parser.parse_known_args(argv)
    if args.data is None:
        parser.error("--data is needed: the folder of the data set")
    study = make_study(args, train_words)
    asked, folder = {row.name for row in choose_rows(study, args)}, args.out / study.setting.name

    def write(content: dict[str, Any]) -> None:
        write_text(folder / "table.json", json.dumps(content, indent=1))
        write_text(folder / "table.md", render(content, asked))

    code = run_study(study, args, args.out, {"torch": torch.__version__, "mg_ops": mg_ops.__version__}, write)
    print(render(collect(study, args.out), asked))
    return code


if __name__ == "__main__":
    run_program(main)
