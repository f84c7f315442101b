"""Why each CUDA kernel takes its time: issue slots, stall reasons and bytes, by Nsight Compute.

    python benchmarks/kernel_profile.py --ncu /usr/local/cuda/bin/ncu --output kernel_profile.json

One call of each case is profiled in a process of its own, with the caches flushed before every pass and the clocks left
as they are. All that ncu says goes to ncu-<case>.csv; the output holds what decisions are made by.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

import mg_ops  # noqa: E402
from benchmarks.cases import CASES, Case, make_batches  # noqa: E402
from benchmarks.machine import describe_machine, write  # noqa: E402

CASE_NAMES = ("coco320", "coco800", "dense")
CASE_SECONDS = 120.0
SECTIONS = (
    "SpeedOfLight",
    "LaunchStats",
    "Occupancy",
    "SchedulerStats",
    "WarpStateStats",
    "InstructionStats",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
)
METRICS = {
    "nanoseconds": "gpu__time_duration.sum",
    "warp_instructions": "smsp__inst_executed.sum",
    "issue_slots_busy_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "instructions_per_cycle": "sm__inst_executed.avg.per_cycle_active",
    "multiprocessor_busy_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "waves": "launch__waves_per_multiprocessor",
    "device_bytes_read": "dram__bytes_read.sum",
    "device_bytes_written": "dram__bytes_write.sum",
    "device_memory_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_sectors_read": "lts__t_sectors_op_read.sum",
    "l2_sectors_written": "lts__t_sectors_op_write.sum",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
}
"""Names in the summary -> ncu's."""
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
"""Warps that wait for a reason whenever an instruction is issued."""
NUMBER = re.compile(r"-?[\d,]+(\.\d+)?")


def read_raw_page(text: str) -> list[dict[str, Any]]:
    """What `ncu --csv --page raw --print-units base` says of each launch, whatever stands around its table.

    Returns:
        For each launch its "kernel", METRICS, None for what ncu did not give, and "stalls", the most frequent first.

    Raises:
        ValueError: there is no table, or no launch in it.
    """
    table = list(csv.DictReader(line for line in text.splitlines() if line.startswith('"')))
    launches = []
    for row in table[1:]:  # the first has the units
        values = {name: float(cell.replace(",", "")) for name, cell in row.items() if NUMBER.fullmatch(cell or "")}
        stalls = [(match[1], value) for name, value in values.items() if (match := STALL.fullmatch(name)) and value]
        kernel = re.split(r"[<(]", row["Kernel Name"])[0]
        launches.append(
            {
                "kernel": re.split(r"::| ", kernel)[-1],
                **{name: values.get(metric) for name, metric in METRICS.items()},
                "stalls": dict(sorted(stalls, key=lambda stall: -stall[1])),
            }
        )
    if not launches:
        raise ValueError("ncu saw no kernel of mg_ops")
    return launches


def profile(ncu: str, name: str, program: list[str], folder: Path, seconds: float | None) -> list[dict[str, Any]]:
    """Runs ncu on a program that makes one call of a case; what it says of each launch.

    Raises:
        RuntimeError: ncu gave nothing, in its own words, or took longer than `seconds`.
    """
    table = folder / f"ncu-{name}.csv"
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--print-units", "base", "--kernel-name-base", "demangled", "--kernel-name", "regex:mg_ops"]
    sections = [word for section in SECTIONS for word in ("--section", section)]
    problem = ""
    # A metric that this ncu does not know ends it: then again with the sections alone, which are its own.
    for more in (["--metrics", ",".join(METRICS.values())], []):
        try:
            with table.open("w") as file:  # and no pipe, which whatever ncu leaves behind would keep open
                words = [*command, *sections, *more, *program]
                subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False)
            return read_raw_page(table.read_text(errors="replace"))
        except (ValueError, subprocess.TimeoutExpired) as error:
            said = [line for line in table.read_text(errors="replace").splitlines() if line.strip()]
            problem = f"{error}: {' / '.join(said[-5:])}"
            print(f"{name}: {problem}", flush=True)
    raise RuntimeError(problem)


def run_call(case: Case) -> None:
    """What ncu profiles: one call, after others have loaded all there is to load."""
    arguments = make_batches(case, None, 1, 0, "cuda")[0].arguments()
    for _ in range(3):
        mg_ops.mutual_match(**arguments, backend="cuda")
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    mg_ops.mutual_match(**arguments, backend="cuda")
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> int:
    """Profiles, writes after each case, prints; the exit status is 1 if any case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ncu", default="ncu", help="Nsight Compute's command line program (default: ncu on the PATH)")
    parser.add_argument("--quick", action="store_true", help="small batches: a check, no figures")
    parser.add_argument("--output", type=Path, default=Path("kernel_profile.json"), metavar="FILE.json")
    parser.add_argument("--tables", type=Path, default=Path(), metavar="FOLDER", help="for all that ncu says")
    parser.add_argument("--call", choices=CASES, help="only run one call of this case, for ncu to profile")
    options = parser.parse_args()
    if options.call:
        run_call(CASES[options.call].quick() if options.quick else CASES[options.call])
        return 0
    content: dict[str, Any] = {"machine": describe_machine("cuda"), "cases": {}}
    # This script again, run as it is being run: by whatever stands between Python and the script, too.
    program = [sys.executable, *sys.orig_argv[1 : sys.orig_argv.index(sys.argv[0]) + 1]]
    program += ["--quick"] if options.quick else []
    failed = False
    for name in CASE_NAMES:
        try:
            seconds = None if options.quick else CASE_SECONDS
            content["cases"][name] = profile(options.ncu, name, [*program, "--call", name], options.tables, seconds)
        except (RuntimeError, OSError) as error:
            failed, content["cases"][name] = True, {"failed": str(error)}
            print(f"{name}: failed: {error}", flush=True)
        else:
            for launch in content["cases"][name]:
                print(name, *(f"{key}: {value}" for key, value in launch.items()), sep="  ", flush=True)
        write(content, options.output)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
