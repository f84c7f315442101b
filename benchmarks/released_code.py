"""Holds mg_ops.mutual_match against the code released with the paper: the same training targets? How much faster?

    git clone https://github.com/zhanghengdev/MutualGuide && git -C MutualGuide checkout a24bbe4
    python benchmarks/released_code.py --code MutualGuide

The released matching (utils/box/box_utils.py) is run as it is, image by image as its loss does. What the losses would
see is compared anchor by anchor: the class, background or ignored; whether the box is learned, and which. The two may
differ where qualities are equal or nearly so, and where two objects have the same best anchor, which the released code
lets both keep. Each is timed at its best number of threads, and they take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

import mg_ops  # noqa: E402
from benchmarks import measure, report  # noqa: E402
from benchmarks.cases import CASES, Batch, make_batches  # noqa: E402
from benchmarks.machine import begin, check_options, make_parser, write  # noqa: E402
from benchmarks.methods import match  # noqa: E402

DEFAULT_CASES = ("voc320", "coco320", "coco800")
NUM_BATCHES = 3
ROUNDS = 6
FILE = Path("utils/box/box_utils.py")
POSITIVE, IGNORED = 3.0, 2.0
"""From which score on an anchor is a positive, and from which it is ignored, in what the released matching returns."""


class Targets(NamedTuple):
    """What the losses of a batch see."""

    class_targets: Tensor
    """(B, A) int64: a class, or mg_ops.BACKGROUND or mg_ops.IGNORED."""
    learns_box: Tensor
    """(B, A) bool."""
    boxes: Tensor
    """(B, A, 4): of its object where an anchor learns its box, 0 elsewhere."""


def load_released_matching(folder: Path) -> Callable[..., None]:
    """`mutual_match` of a checkout of the released code.

    Raises:
        ValueError: it is not there.
    """
    file = folder / FILE
    specification = importlib.util.spec_from_file_location("released_box_utils", file)
    if not file.is_file() or specification is None or specification.loader is None:
        raise ValueError(f"--code: expected a checkout of zhanghengdev/MutualGuide at a24bbe4, but there is no {file}")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    matching: Callable[..., None] = module.mutual_match
    return matching


def center_size(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) as (center, size), which the released code takes for anchors."""
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)


def run_released(matching: Callable[..., None], priors: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loop over images of the released loss: boxes (B, A, 4), labels (B, A) from 1 on, scores (B, A) of both."""
    boxes = priors.new_zeros(len(batch.counts), len(priors), 4)
    labels = torch.zeros(boxes.shape[:2], dtype=torch.int64, device=priors.device)
    cls_scores, loc_scores = boxes.new_zeros(boxes.shape[:2]), boxes.new_zeros(boxes.shape[:2])
    for image, count in enumerate(batch.counts):
        if count > 0:  # it takes the maximum over the objects
            truths, classes = batch.boxes_list[image], batch.labels_list[image] + 1  # 0 is its background
            predictions = batch.deltas[image], batch.logits[image]
            matching(truths, priors, *predictions, classes, boxes, labels, cls_scores, loc_scores, image)
    return boxes, labels, cls_scores, loc_scores


def released_targets(answer: tuple[Tensor, Tensor, Tensor, Tensor]) -> Targets:
    """As the released loss reads them."""
    boxes, labels, cls_scores, loc_scores = answer
    classes = torch.where(cls_scores >= POSITIVE, labels - 1, mg_ops.BACKGROUND)
    classes = torch.where((cls_scores >= IGNORED) & (cls_scores < POSITIVE), mg_ops.IGNORED, classes)
    learns_box = loc_scores >= POSITIVE
    return Targets(classes, learns_box, torch.where(learns_box.unsqueeze(-1), boxes, 0.0))


def our_targets(batch: Batch) -> Targets:
    """Of mg_ops."""
    answer, objects = match(batch), (batch.gt_boxes, batch.gt_labels, batch.gt_offsets)
    targets = mg_ops.encode_targets(answer, batch.anchors, *objects, num_classes=batch.logits.shape[-1])
    return Targets(targets.class_targets, answer.loc_positive, targets.box_targets)


def count_differences(ours: Targets, theirs: Targets) -> dict[str, int]:
    """Anchors that take part in either answer, and those of them that differ."""
    classes_differ = ours.class_targets != theirs.class_targets
    labelled = (ours.class_targets != mg_ops.BACKGROUND) | (theirs.class_targets != mg_ops.BACKGROUND)
    boxes_differ = (ours.learns_box != theirs.learns_box) | (ours.boxes != theirs.boxes).any(-1)
    return {
        "labelled": int(labelled.sum()),
        "classes_differ": int(classes_differ.sum()),
        "learn_a_box": int((ours.learns_box | theirs.learns_box).sum()),
        "boxes_differ": int(boxes_differ.sum()),
    }


def run_case(name: str, matching: Callable[..., None], options: argparse.Namespace) -> dict[str, Any]:
    """Targets compared and calls timed, in one case of match_speed.py."""
    case = CASES[name].quick() if options.quick else CASES[name]
    batches = make_batches(case, None, NUM_BATCHES, 0, options.device)
    released = partial(run_released, matching, center_size(batches[0].anchors))
    totals: Counter[str] = Counter()
    for batch in batches:
        totals.update(count_differences(our_targets(batch), released_targets(released(batch))))
    turns = {
        label: (call, measure.best_threads(call, batches[0], options.threads) if options.device == "cpu" else 1)
        for label, call in (("released code", released), ("mutual_match", match))
    }
    seconds = measure.take_turns(turns, batches, 1 if options.quick else ROUNDS)
    timed = {
        label: {"seconds": measure.quartiles(seconds[label])[1], "threads": threads}
        for label, (_, threads) in turns.items()
    }
    return {"batches": len(batches), "differences": dict(totals), "timed": timed}


def cases_table(cases: dict[str, dict[str, Any]]) -> report.Table:
    """A row per case."""
    header = ["", "classes that differ", "boxes that differ", "released code", "mutual_match"]
    rows = []
    for name, case in cases.items():
        counts, timed = case["differences"], case["timed"]
        seconds = [timed[method]["seconds"] for method in header[3:]]
        classes = f"{counts['classes_differ']:,} of {counts['labelled']:,}"
        boxes = f"{counts['boxes_differ']:,} of {counts['learn_a_box']:,}"
        ratio = report.format_number(seconds[0] / seconds[-1])
        rows.append([name, classes, boxes, *map(report.format_seconds, seconds), ratio])
    text = "objects packed; medians, each method at its best number of threads"
    return report.Table("The code released with the paper", text, [*header, "times as fast"], rows, [])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--code", type=Path, required=True, metavar="FOLDER", help="checkout of the released code")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=DEFAULT_CASES, metavar="CASE", help="what to run")
    parser.add_argument("--quick", action="store_true", help="small batches: a check, no figures")
    options = parser.parse_args(argv)
    if options.record and options.quick:
        parser.error("--record: expected a run without --quick")
    check_options(parser, options)
    try:
        matching = load_released_matching(options.code)
    except ValueError as error:
        parser.error(str(error))
    console, content, output = begin(options, "released_code_quick" if options.quick else "released_code")
    cases: dict[str, dict[str, Any]] = {}
    for name in options.cases:
        with console.status(name):
            cases[name] = run_case(name, matching, options)
    write({**content, "seed": 0, "cases": cases}, output)
    report.print_table(cases_table(cases), console)
    console.print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
