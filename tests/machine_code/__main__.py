"""Counts what the machine code of mutual matching does for a benchmark batch, and prints it as a table.

The labels are compared with the C++ backend's first. Modelled times are not calibrated: compare them with each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from comparison import assert_same  # noqa: E402

import machine_code  # noqa: E402
import mg_ops  # noqa: E402
from benchmarks.cases import CASES, make_batches  # noqa: E402

CYCLES_A_MICROSECOND = 1755
COLUMNS = (
    *("launch", "warp instructions", "a pair", "an anchor", "longest warp", "sectors read", "sectors written"),
    *("global atomics", "at one address", "shared atomics", "at one address", "barriers", "slow divisions"),
    *("modelled time, us", "longest block, us", "registers", "resident warps"),
)


def row(name: str, counts: machine_code.Counts, pairs: int, anchors: int) -> list[str]:
    return [
        name,
        f"{counts.instructions:,}",
        f"{counts.instructions / max(1, pairs):.1f}",
        f"{counts.instructions / max(1, anchors):.2f}",
        *(f"{number:,}" for number in (counts.longest_warp, counts.sectors_read, counts.sectors_written)),
        *(f"{number:,}" for number in (counts.global_atomics, counts.worst_global_atomic)),
        *(f"{number:,}" for number in (counts.shared_atomics, counts.worst_shared_atomic)),
        *(f"{number:,}" for number in (counts.barriers, counts.slow_divisions)),
        *(f"{cycles / CYCLES_A_MICROSECOND:.1f}" for cycles in (counts.cycles, counts.longest_block)),
        *(f"{number}" for number in (counts.registers, counts.resident_warps)),
    ]


def all_launches(launches: list[machine_code.Counts]) -> machine_code.Counts:
    """Sums, and the largest of what no sum means anything of."""
    largest = ("longest_warp", "longest_block", "worst_global_atomic", "worst_shared_atomic", "registers")
    return machine_code.Counts(
        **{
            name: (max if name in largest else sum)(getattr(counts, name) for counts in launches)
            for name, _ in machine_code.Counts._fields_
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/machine_code", description=__doc__)
    parser.add_argument("case", choices=sorted(CASES), help="of benchmarks/cases.py")
    parser.add_argument("--images", type=int, help="of the batch (default: as many as the benchmark's)")
    parser.add_argument("--listing", metavar="KERNEL", help="also print its instructions, and how often each ran")
    options = parser.parse_args()
    torch.set_num_threads(1)
    case = CASES[options.case]
    case = dataclasses.replace(case, batch_size=options.images or case.batch_size)
    batch = make_batches(case, None, 1, 0, "cpu")[0]
    arguments = batch.arguments()
    interpreter = machine_code.build()
    match = interpreter.mutual_match(**arguments)
    backend = "cpp" if mg_ops.backends()["cpp"].usable else "eager"
    assert_same(match, mg_ops.mutual_match(**arguments, backend=backend), case.name)

    pairs = sum(int((mg_ops.box_iou(batch.anchors, box[None]) > 0).sum()) for box in batch.gt_boxes)
    anchors = len(batch.anchors)
    print(
        f"{case.name}: {case.batch_size} images, {anchors:,} anchors, {len(batch.gt_boxes)} objects, {pairs:,} "
        "overlapping pairs\n"
    )
    launches = interpreter.counts()
    totals = row("all", all_launches(list(launches.values())), pairs, case.batch_size * anchors)
    rows = [
        *(
            row(name.removesuffix("_kernel"), counts, pairs, case.batch_size * anchors)
            for name, counts in launches.items()
        ),
        [*totals[:-2], "", ""],
    ]
    for line in (COLUMNS, ["---"] * len(COLUMNS), *rows):
        print(f"| {' | '.join(line)} |")
    if options.listing:
        print(f"\n{interpreter.issued(options.listing)}")


main()
