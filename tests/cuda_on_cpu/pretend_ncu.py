#!/usr/bin/env python3
"""In place of Nsight Compute's ncu: runs the program it is given, and prints a table like ncu's, its numbers made up.

Options that the real one does not have are errors, as they are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

KERNELS = ("prepare_kernel", "object_kernel", "claim_kernel", "rank_kernel")
# ncu's name, its unit, and a number for each kernel as ncu writes it.
COLUMNS = (
    ("dram__bytes_read.sum", "byte", ("1,024", "204,800", "7,340,032", "3,145,728")),
    ("dram__bytes_write.sum", "byte", ("512", "65,536", "5,242,880", "6,553,600")),
    ("gpu__time_duration.sum", "ns", ("2,048", "9,216", "64,000", "41,500")),
    ("launch__registers_per_thread", "register/thread", ("32", "50", "64", "88")),
    ("smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio", "inst", ("0", "1.25", "0.31", "6.40")),
    (
        "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
        "inst",
        ("1.5", "3.75", "2.25", "1.10"),
    ),
    ("smsp__inst_executed.sum", "inst", ("9,000", "2,300,000", "15,812,345", "8,100,000")),
    ("smsp__issue_active.avg.pct_of_peak_sustained_active", "%", ("11.5", "23.5", "71.2", "n/a")),
)


def main() -> int:
    """Runs the program and prints the table; the program's exit status."""
    parser = argparse.ArgumentParser(prog="ncu")
    parser.add_argument("--clock-control", choices=("base", "none"))
    parser.add_argument("--profile-from-start", choices=("on", "off"))
    parser.add_argument("--csv", action="store_true", required=True)
    parser.add_argument("--page", choices=("details", "raw", "source", "session"))
    parser.add_argument("--print-units", choices=("auto", "base"))
    parser.add_argument("--kernel-name-base", choices=("function", "demangled", "mangled"))
    parser.add_argument("--kernel-name")
    parser.add_argument("--section", action="append")
    parser.add_argument("--metrics")
    parser.add_argument("program", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    status = subprocess.run(options.program, check=False).returncode
    print("==PROF== Connected to process 4242")
    rows = [
        ("ID", "Process ID", "Kernel Name", *(name for name, _, _ in COLUMNS)),
        ("", "", "", *(unit for _, unit, _ in COLUMNS)),
        *(
            (
                str(index),
                "4242",
                f"mg_ops::cuda::{kernel}(mg_ops::cuda::MatchProblem)",
                *(row[index] for *_, row in COLUMNS),
            )
            for index, kernel in enumerate(KERNELS)
        ),
    ]
    for row in rows:
        print(",".join(f'"{cell}"' for cell in row))
    return status


if __name__ == "__main__":
    sys.exit(main())
