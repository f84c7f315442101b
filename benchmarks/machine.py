"""The machine a figure was measured on, as every figure must name it, and the file it is kept in."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import mg_ops
from detector.program import whole_number

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks/results"
"""The figures that README and documentation quote, a folder a machine: git keeps them, `--record` alone writes them."""
MEASUREMENTS = ROOT / "runs/benchmarks"
"""All other figures, likewise: git ignores them."""


def describe_commit() -> str:
    """The checkout's commit, with "-dirty" if a tracked file other than documentation and results differs from it.

    Where there is no git, or no repository, the environment variable MG_OPS_COMMIT can name it; else "unknown".
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        # A benchmark writes its results before it ends: they do not make the next one's code another.
        code = [".", ":(exclude)docs", ":(exclude)*.md", ":(exclude,glob)benchmarks/**/results/**"]
        changed = git("status", "--porcelain", "-uno", "--", *code)
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return os.environ.get("MG_OPS_COMMIT", "unknown")


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, software, commit and date; the GPU too where device is "cuda"."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = found[1].strip() if found else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: dict[str, Any] = {
        "device": f"{cpu}, {cores} cores",
        "cores": cores,
        "load_average_at_start": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mg_ops": mg_ops.__version__,
        "commit": describe_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device != "cpu":
        machine |= {"device": torch.cuda.get_device_properties(0).name, "cuda": torch.version.cuda}
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
            machine["driver"] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    return machine


def machine_folder(machine: dict[str, Any]) -> str:
    """The name of a machine's folder."""
    return re.sub(r"[^a-z0-9]+", "-", str(machine["device"]).lower()).strip("-")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (%(default)s)")
    parser.add_argument(
        "--threads", type=whole_number(1), default=torch.get_num_threads(), help="CPU threads (%(default)s)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--output", type=Path, metavar="FILE.json", help="if not given: in runs/benchmarks/MACHINE/, which git ignores"
    )
    where.add_argument(
        "--record", action="store_true", help="write to benchmarks/results/MACHINE/, which the documentation quotes"
    )
    return parser


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program, and says why, where the machine has not what was asked for."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")


def begin(options: argparse.Namespace, name: str) -> tuple[Console, dict[str, Any], Path]:
    """(the terminal, what its file begins with, the file, in a folder that is there); before anything is measured."""
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    machine = describe_machine(options.device)
    console.print(
        f"[bold]{machine['device']}[/], torch {machine['torch']}, mg_ops {machine['mg_ops']} at {machine['commit']}; "
        f"load average {machine['load_average_at_start']:.1f}"
    )
    folder = (RECORDS if options.record else MEASUREMENTS) / machine_folder(machine)
    output: Path = options.output or folder / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    shown = {name: value for name, value in vars(options).items() if name not in ("output", "record")}
    return console, {"machine": machine, "options": shown}, output


def write(content: dict[str, Any], output: Path) -> None:
    """The figures so far."""
    output.write_text(json.dumps(content, indent=1, default=str) + "\n")
