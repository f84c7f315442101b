"""Trains and evaluates the rows of the paper's Tables 1 and 2, and writes the tables with the paper's numbers beside.

Every row is one run of `detector.train`, in its own process and folder. A row that is complete is not run again, one
that was interrupted is resumed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from detector.batches import MAX_SEED
from detector.outputs import prepare_folder, whole_file, write_json
from detector.program import run_program, whole_number


class Row(NamedTuple):
    """A row of a table: what is trained, and the paper's AP, AP50 and AP75 in percent."""

    model: str
    backbone: str
    strategy: str
    paper: tuple[float, float, float]


TABLE_1 = [
    Row("fssd", "resnet18", "iou", (50.3, 75.5, 53.7)),
    Row("fssd", "resnet18", "localize_to_classify", (51.8, 76.1, 55.9)),
    Row("fssd", "resnet18", "classify_to_localize", (51.0, 76.1, 54.3)),
    Row("fssd", "resnet18", "mutual", (52.1, 76.2, 55.9)),
    Row("fssd", "vgg16_bn", "iou", (54.1, 80.1, 58.3)),
    Row("fssd", "vgg16_bn", "localize_to_classify", (56.0, 80.3, 60.6)),
    Row("fssd", "vgg16_bn", "classify_to_localize", (54.4, 79.9, 58.5)),
    Row("fssd", "vgg16_bn", "mutual", (56.2, 80.4, 61.4)),
    Row("retinanet", "resnet18", "iou", (51.1, 75.8, 54.8)),
    Row("retinanet", "resnet18", "localize_to_classify", (53.4, 76.5, 57.2)),
    Row("retinanet", "resnet18", "classify_to_localize", (51.9, 75.9, 55.8)),
    Row("retinanet", "resnet18", "mutual", (53.5, 76.9, 57.4)),
    Row("retinanet", "vgg16_bn", "iou", (55.2, 80.2, 59.6)),
    Row("retinanet", "vgg16_bn", "localize_to_classify", (57.4, 81.1, 62.6)),
    Row("retinanet", "vgg16_bn", "classify_to_localize", (56.2, 80.1, 61.7)),
    Row("retinanet", "vgg16_bn", "mutual", (57.7, 81.1, 62.9)),
    Row("rfbnet", "vgg16_bn", "iou", (55.6, 80.9, 59.6)),
    Row("rfbnet", "vgg16_bn", "localize_to_classify", (57.2, 80.9, 61.6)),
    Row("rfbnet", "vgg16_bn", "classify_to_localize", (55.9, 80.8, 60.2)),
    Row("rfbnet", "vgg16_bn", "mutual", (57.9, 81.5, 62.6)),
]
"""PASCAL VOC 07+12 trainval -> VOC 2007 test."""

TABLE_2 = [
    Row("fssd", "resnet18", "iou", (26.1, 42.8, 26.7)),
    Row("fssd", "resnet18", "mutual", (27.0, 42.9, 28.2)),
    Row("fssd", "vgg16_bn", "iou", (31.1, 48.9, 32.7)),
    Row("fssd", "vgg16_bn", "mutual", (32.0, 49.3, 33.9)),
    Row("retinanet", "resnet18", "iou", (27.8, 44.5, 28.6)),
    Row("retinanet", "resnet18", "mutual", (28.7, 44.9, 29.9)),
    Row("retinanet", "vgg16_bn", "iou", (32.3, 50.3, 34.0)),
    Row("retinanet", "vgg16_bn", "mutual", (33.6, 50.8, 35.7)),
    Row("rfbnet", "vgg16_bn", "iou", (33.4, 51.6, 35.1)),
    Row("rfbnet", "vgg16_bn", "mutual", (34.6, 52.0, 36.8)),
]
"""COCO train2017 -> val2017."""

RELEASED_LOSSES = ["--focal-gamma", "1", "--box-loss", "released_balanced_l1"]
"""Of the code released with the paper, from which its numbers come; the defaults of detector.train are the losses'
own papers'."""

METRICS = ("AP", "AP50", "AP75")


def format_mean(values: list[float], scale: float = 100, digits: int = 1) -> str:
    """Shares in percent as "51.0 ± 1.4": their mean, and their standard deviation if there are several."""
    if not values:
        return "-"
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread}"


def format_table(rows: list[Row], results: dict[tuple[str, str, str], list[dict[str, float]]]) -> str:
    """The rows in Markdown: what was measured (mean and standard deviation over seeds) and the paper's number."""
    lines = ["| model | strategy | seeds | AP (paper) | AP50 (paper) | AP75 (paper) |", "|---|---|---|---|---|---|"]
    for row in rows:
        runs = results.get((row.model, row.backbone, row.strategy), [])
        cells = []
        for metric, published in zip(METRICS, row.paper, strict=True):
            values = [run[metric] for run in runs if run[metric] is not None]
            cells.append(f"{format_mean(values)} ({published})")
        lines.append(f"| {row.model} {row.backbone} | {row.strategy} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read_scores(path: Path) -> dict[str, float]:
    """AP, AP50 and AP75 of a results.json.

    Raises:
        ValueError: it is something else, or cut off.
    """
    try:
        measured = json.loads(path.read_text())
        return {metric: measured[metric] for metric in METRICS}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the results of detector.train, delete it to train anew ({error!r})"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """The command line; returns how many runs failed."""
    parser = argparse.ArgumentParser(
        "python -m detector.reproduce",
        description="Trains and evaluates rows of the paper's Table 1 (VOC) or Table 2 (COCO), with the losses of its "
        "released code, and writes the table. Flags it does not know go to detector.train, such as --amp bf16 --cache "
        "--image-size 160.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("table", choices=("table1", "table2"), help="Table 1: VOC, Table 2: COCO")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of VOC or COCO, or of any set to run the rows on"
    )
    parser.add_argument("--format", choices=("voc", "coco"), help="how it is laid out; by default as the table's")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of the runs and the table")
    parser.add_argument(
        "--models", nargs="+", choices=("fssd", "retinanet", "rfbnet"), help="rows of these models only"
    )
    parser.add_argument("--backbones", nargs="+", choices=("resnet18", "vgg16_bn"), help="rows of these backbones only")
    parser.add_argument("--strategies", nargs="+", help="rows of these strategies only")
    parser.add_argument("--seeds", nargs="+", type=whole_number(0, MAX_SEED), default=[0], help="each row once a seed")
    parser.add_argument("--processes", type=whole_number(1), default=1, help="GPUs a run takes, through torchrun")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and the table, run nothing")
    args, train_flags = parser.parse_known_args(argv)

    rows = [
        row
        for row in (TABLE_1 if args.table == "table1" else TABLE_2)
        if (args.models is None or row.model in args.models)
        and (args.backbones is None or row.backbone in args.backbones)
        and (args.strategies is None or row.strategy in args.strategies)
    ]
    if not rows:
        parser.error("no row of the table has these models, backbones and strategies")
    layout = args.format or ("voc" if args.table == "table1" else "coco")
    launcher = [sys.executable, "-m"]
    if args.processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}", "-m"]
    folder = args.out / args.table
    prepare_folder(folder, ("table.md", "table.json"))
    failed = []
    results: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for seed in args.seeds:
        for row in rows:
            out = folder / f"{row.model}-{row.backbone}-{row.strategy}-seed{seed}"
            flags = {"data": args.data, "format": layout, "model": row.model, "backbone": row.backbone}
            flags |= {"strategy": row.strategy, "seed": seed, "out": out}
            command = [*launcher, "detector.train", "--resume", *RELEASED_LOSSES, *train_flags]
            command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
            if not (out / "results.json").is_file():
                print(shlex.join(command), flush=True)
                if not args.dry_run:
                    code = subprocess.run(command, check=False).returncode
                    if code in (130, 143, -2, -15):  # a signal: meant for all of it
                        print(f"interrupted in {out}; the same command continues")
                        return 1
                    if code != 0:
                        failed.append(out)
            if (out / "results.json").is_file():
                results.setdefault((row.model, row.backbone, row.strategy), []).append(
                    read_scores(out / "results.json")
                )
            # After every run, so that a table is there whenever one looks.
            with whole_file(folder / "table.md") as file:
                file.write(format_table(rows, results).encode())
    measured_rows = [
        {**row._asdict(), "paper": dict(zip(METRICS, row.paper, strict=True)), "runs": results.get(row[:3], [])}
        for row in rows
    ]
    write_json(folder / "table.json", measured_rows, indent=1)
    print(format_table(rows, results))
    for out in failed:
        print(f"failed: {out}")
    return len(failed)


if __name__ == "__main__":
    run_program(main)
