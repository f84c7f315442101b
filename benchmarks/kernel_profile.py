"""Why each CUDA kernel takes its time: issue slots, stall reasons and bytes, by Nsight Compute, predictions beside.

    python benchmarks/kernel_profile.py --ncu /usr/local/cuda/bin/ncu --output kernel_profile.json

One call of each case is profiled in a process of its own, with the caches flushed before every pass and the clocks left
as they are. All that ncu says goes to ncu-<case>.csv; the output holds what decisions are made by.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
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
from benchmarks.machine import describe_machine  # noqa: E402

CASE_NAMES = ("coco320", "coco800", "dense")
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
    "microseconds": "gpu__time_duration.sum",
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
UNITS = {
    **{"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6},
    **{"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9},
}
"""What a number in this unit is multiplied by: times become microseconds, sizes bytes."""

# Counted from the machine code of commit 6daf2b1 for sm_90 and from the batches, before anything was measured on a GPU:
# microseconds from floors at full issue rate on 132 multiprocessors, and for rank its serial tail.
PREDICTED_AT = "6daf2b1"
PREDICTED: dict[str, dict[str, dict[str, str]]] = {
    "coco320": {
        "claim": {"microseconds": "15 to 17 at least", "warp_instructions": "15.8 M"},
        "rank": {"microseconds": "7 to 8, and a tail of 30 to 50"},
        "all": {"microseconds": "75 to 110", "bytes": "19 to 25 MB"},
    },
    "coco800": {
        "claim": {"microseconds": "85 to 95 at least", "warp_instructions": "88 M"},
        "rank": {"microseconds": "45 to 51, and a tail of about 400"},
        "all": {"microseconds": "500 to 650", "bytes": "340 MB"},
    },
    "dense": {
        "claim": {"microseconds": "145 to 163 at least", "warp_instructions": "151 M"},
        "rank": {"microseconds": "34 to 38, and a tail of about 150"},
        "all": {"microseconds": "600 to 800", "bytes": "70 to 100 MB"},
    },
}


def read_raw_page(text: str) -> list[dict[str, Any]]:
    """The launches in what `ncu --csv --page raw` wrote, whatever stands around them.

    Returns:
        For each launch "kernel" and every metric by ncu's name, times in microseconds and sizes in bytes.

    Raises:
        ValueError: there is no table, or no launch in it.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(lines))
    if len(table) < 2 or "Kernel Name" not in table[0]:
        raise ValueError("ncu wrote no table")
    header, units = table[0], table[1]
    name_column = header.index("Kernel Name")
    launches = []
    for row in table[2:]:
        without_arguments = re.split(r"[<(]", row[name_column])[0]
        launch: dict[str, Any] = {"kernel": re.split(r"::| ", without_arguments)[-1]}
        for name, unit, cell in zip(header, units, row, strict=False):
            with contextlib.suppress(ValueError):  # commas stand between thousands; "n/a" is no number
                launch[name] = float(cell.replace(",", "")) * UNITS.get(unit, 1.0)
        launches.append(launch)
    if not launches:
        raise ValueError("ncu saw no kernel of mg_ops")
    return launches


def summarize(launch: dict[str, Any]) -> dict[str, Any]:
    """What matters of a launch; None for what ncu did not give. Stall reasons from the most frequent on."""
    stalls = {match[1]: value for name, value in launch.items() if (match := STALL.fullmatch(name)) and value > 0}
    return {
        "kernel": launch["kernel"],
        **{name: launch.get(metric) for name, metric in METRICS.items()},
        "stalls": dict(sorted(stalls.items(), key=lambda item: -item[1])),
    }


def describe_launch(name: str, summary: dict[str, Any]) -> str:
    """A line for the log."""
    predicted = PREDICTED.get(name, {}).get(summary["kernel"].removesuffix("_kernel"), {}).get("microseconds", "-")
    shown = {key: "?" if summary[key] is None else f"{summary[key]:.3g}" for key in METRICS}
    stalls = ", ".join(f"{reason} {value:.2f}" for reason, value in list(summary["stalls"].items())[:4])
    return (
        f"{name} {summary['kernel']}: {shown['microseconds']} us (predicted {predicted}), read "
        f"{shown['device_bytes_read']} and wrote {shown['device_bytes_written']} bytes, issue slots busy "
        f"{shown['issue_slots_busy_percent']}%, occupancy {shown['occupancy_percent']}%; waits: {stalls}"
    )


def profile(ncu: str, name: str, program: list[str], folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Runs ncu on a program that makes one call of a case; all metrics of each launch.

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
        with table.open("w") as file:  # and no pipe, which whatever ncu leaves behind would keep open
            process = subprocess.Popen([*command, *sections, *more, *program], stdout=file, stderr=subprocess.STDOUT)
            try:
                ending = f"exit status {process.wait(seconds)}"
            except subprocess.TimeoutExpired:
                process.kill()
                ending = f"cut off after {seconds:.0f} s"
        text = table.read_text(errors="replace")
        try:
            return read_raw_page(text)
        except ValueError as error:
            said = [line for line in text.splitlines() if line.strip()]
            problem = f"{error} ({ending}): {' / '.join(said[-5:])}"
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
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASE_NAMES, metavar="CASE", help="what to profile")
    parser.add_argument("--quick", action="store_true", help="small batches: a check, no figures")
    parser.add_argument("--seconds", type=float, default=120.0, help="for ncu on one case (default %(default)g)")
    parser.add_argument("--output", type=Path, default=Path("kernel_profile.json"), metavar="FILE.json")
    parser.add_argument("--tables", type=Path, default=Path(), metavar="FOLDER", help="for all that ncu says")
    parser.add_argument("--call", choices=CASES, help="only run one call of this case, for ncu to profile")
    options = parser.parse_args()
    if options.call:
        run_call(CASES[options.call].quick() if options.quick else CASES[options.call])
        return 0
    content: dict[str, Any] = {
        "machine": describe_machine("cuda"),
        "predicted": {"commit": PREDICTED_AT, **PREDICTED},
        "cases": {},
    }
    # This script again, run as it is being run: by whatever stands between Python and the script, too.
    program = [sys.executable, *sys.orig_argv[1 : sys.orig_argv.index(sys.argv[0]) + 1]]
    program += ["--quick"] if options.quick else []
    failed = False
    for name in options.cases:
        try:
            launches = profile(options.ncu, name, [*program, "--call", name], options.tables, options.seconds)
        except (RuntimeError, OSError) as error:
            failed, content["cases"][name] = True, {"failed": str(error)}
            print(f"{name}: failed: {error}", flush=True)
        else:
            content["cases"][name] = [summarize(launch) for launch in launches]
            for summary in content["cases"][name]:
                print(describe_launch(name, summary), flush=True)
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
