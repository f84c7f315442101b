"""Checks and measures mg_ops on the GPU of this machine; `make gpu-check` runs it. Needs no network.

    python benchmarks/gpu_check.py             # build, tests, compute-sanitizer, benchmark: under 8 minutes
    python benchmarks/gpu_check.py --dry-run   # every step as far as a machine without a GPU allows

Needs nvcc and a Python with torch, torchvision, triton, setuptools, cmake, ninja, pytest, hypothesis, matplotlib, tqdm
and rich; installs nothing else. Writes a log of each step, the figures and summary.json to benchmarks/results/<gpu>/,
and prints a verdict last. A step that fails does not stop the others; one that the time budget cuts off counts as
failed and says so.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET_SECONDS = 460.0
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass
class Step:
    """What a step came to."""

    name: str
    passed: bool
    seconds: float
    detail: str
    """The line of its output that says most."""


class Check:
    """The steps, their logs and the clock."""

    def __init__(self, output: Path, dry_run: bool) -> None:
        self.output = output
        self.dry_run = dry_run
        self.started = time.monotonic()
        self.steps: list[Step] = []
        output.mkdir(parents=True, exist_ok=True)

    def seconds_left(self) -> float:
        """What the budget has left."""
        return BUDGET_SECONDS - (time.monotonic() - self.started)

    def run(
        self, name: str, command: list[str | Path], limit: float, telling: str, environment: dict[str, str]
    ) -> Step:
        """Runs a command, its output into <name>.log.

        Args:
            limit: seconds it may take; less if the budget has less left.
            telling: a regular expression for the line of the output to report; the last that matches.
        """
        text = [str(part) for part in command]
        limit = max(5.0, min(limit, self.seconds_left()))
        print(f"{name}: {shlex.join(text)}", flush=True)
        start = time.monotonic()
        log = self.output / f"{name}.log"
        with log.open("w") as file:
            try:
                result = subprocess.run(
                    text,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    check=False,
                )
                passed, ending = result.returncode == 0, f"exit status {result.returncode}"
            except subprocess.TimeoutExpired:
                passed, ending = False, f"cut off after {limit:.0f} s"
            except OSError as error:
                passed, ending = False, str(error)
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if re.search(telling, line)]
        detail = lines[-1] if lines else ending
        return Step(name, passed, time.monotonic() - start, detail if passed else f"{ending}: {detail}")

    def report(self, step: Step) -> bool:
        """Keeps and prints a step's outcome; whether it passed."""
        self.steps.append(step)
        print(f"  {'passed' if step.passed else 'FAILED'} in {step.seconds:.0f} s: {step.detail}", flush=True)
        return step.passed


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: each step by what can stand in for it")
    parser.add_argument("--output", type=Path, help="folder for logs and figures (default benchmarks/results/<gpu>)")
    parser.add_argument("--skip-build", action="store_true", help="use the library that is built already")
    return parser.parse_args()


def describe_machine() -> dict[str, str]:
    """What every figure must name."""
    import torch

    def first_line(*command: str) -> str:
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=30)
        except (OSError, subprocess.SubprocessError) as error:
            return f"unknown ({type(error).__name__})"
        return result.stdout.strip().splitlines()[-1] if result.stdout.strip() else "unknown"

    return {
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "torch_cuda": str(torch.version.cuda),
        "nvcc": first_line("nvcc", "--version"),
        "commit": first_line("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def build(check: Check) -> Step:
    """Installs into a folder of its own, so that the machine's Python stays as it is; the checkout gets the library."""
    site = ROOT / "build" / "gpu-check" / "site"
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"]
    command += ["--target", str(site), "--verbose", str(ROOT)]
    # For this GPU only: a build for all takes minutes. Without a GPU, one that every newer GPU can run.
    architecture = "90" if check.dry_run else "native"
    environment = {
        "CMAKE_ARGS": f"-DMG_OPS_CUDA=ON -DMG_OPS_CUDA_ARCHITECTURES={architecture}",
        "MG_OPS_REQUIRE_LIBRARY": "1",
    }
    step = check.run("build", list(command), 200.0, r"Successfully installed|rror", environment)
    library = site / "mg_ops" / "libmg_ops.so"
    if step.passed and not library.exists():
        return Step(step.name, False, step.seconds, "pip was content, but installed no libmg_ops.so")
    if step.passed:
        # Replaced, not written over: a process that has the old one loaded would crash.
        fresh = shutil.copy(library, ROOT / "mg_ops" / f"{library.name}.new")
        Path(fresh).replace(ROOT / "mg_ops" / library.name)
    return step


def run_tests(check: Check) -> Step:
    """The GPU tests; without a GPU their names, so that at least every test file must load."""
    command: list[str | Path] = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    command += ["--ignore", "tests/test_det_math.py"]  # of the headers on the CPU, whose bindings are not built here
    if check.dry_run:
        return check.run("tests", [*command, "--collect-only"], 120.0, r"tests? collected|error", {})
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    # Several processes: few threads each for the reference on the CPU.
    return check.run("tests", command, 180.0, r"passed|failed|error", {"OMP_NUM_THREADS": "2"})


def sanitize(check: Check) -> list[Step]:
    """compute-sanitizer, its tools side by side; without a GPU the kernels run on the CPU under AddressSanitizer."""
    if check.dry_run:
        command: list[str | Path] = [
            sys.executable,
            "tests/cuda_on_cpu",
            "--sanitize",
            "--threads",
            "32",
            "--batches",
            "2",
        ]
        return [check.run("sanitizer", command, 240.0, r"equal to the reference|ERROR|rror:", {})]
    if shutil.which("compute-sanitizer") is None:
        return [Step("sanitizer", False, 0.0, "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit")]
    test = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_gpu.py",
        "-k",
        "short_selection",
    ]

    def run_tool(tool: str) -> Step:
        command: list[str | Path] = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99"]
        command += ["--kernel-name", "kernel_substring=mg_ops", *test]
        # torch's cache would hide a write past the end of a tensor from memcheck.
        return check.run(
            f"sanitizer-{tool}",
            command,
            150.0,
            r"ERROR SUMMARY|RACECHECK SUMMARY",
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )

    with ThreadPoolExecutor(len(SANITIZER_TOOLS)) as pool:
        return list(pool.map(run_tool, SANITIZER_TOOLS))


def measure(check: Check) -> Step:
    """The benchmark on all cases and baselines; without a GPU a quick one on the CPU."""
    command: list[str | Path] = [
        sys.executable,
        "benchmarks/match_speed.py",
        "--output",
        check.output / "match_speed.json",
    ]
    if check.dry_run:
        command[-1] = check.output / "quick.json"
        command += ["--quick", "--cases", "voc320", "--no-plot"]
    else:
        command += ["--device", "cuda"]
    return check.run("benchmark", command, 240.0, r"times as fast|failed|rror", {})


def time_training_steps(check: Check) -> Step:
    """Training steps of every detector with each matching; without a GPU a tiny one on the CPU."""
    command: list[str | Path] = [sys.executable, "benchmarks/training_step.py"]
    command += ["--output", check.output / "training_step.json"]
    if check.dry_run:
        command += ["--detectors", "fssd-resnet18", "--image-size", "64", "--batch", "2", "--steps", "1"]
    else:
        command += ["--device", "cuda", "--amp", "bf16", "--image-size", "320", "--batch", "32"]
        command += ["--steps", "20", "--warmup", "5"]
    return check.run("training-step", command, 120.0, r"images/s with|failed|rror", {})


def main() -> int:
    """Runs the steps; the exit status is 0 if all passed, 2 without a GPU."""
    options = parse_options()
    machine = describe_machine()
    if machine["gpu"] == "none" and not options.dry_run:
        print("gpu-check: torch finds no GPU here. `--dry-run` tries every step as far as this machine allows.")
        return 2
    slug = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    output = options.output or ROOT / ("build/gpu-check/dry-run" if options.dry_run else f"benchmarks/results/{slug}")
    check = Check(output.resolve(), options.dry_run)
    print("gpu-check" + (" (dry run: no figure below is of a GPU)" if options.dry_run else ""))
    for name, value in machine.items():
        print(f"  {name}: {value}")

    if options.skip_build or check.report(build(check)):
        check.report(run_tests(check))
        for step in sanitize(check):
            check.report(step)
        check.report(measure(check))
        check.report(time_training_steps(check))

    passed = all(step.passed for step in check.steps)
    summary = {
        "machine": machine,
        "dry_run": options.dry_run,
        "passed": passed,
        "steps": [asdict(s) for s in check.steps],
    }
    (check.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\nVerdict on {machine['gpu']}{' (dry run)' if options.dry_run else ''}:")
    for step in check.steps:
        print(f"  {'passed' if step.passed else 'FAILED'}  {step.name:20} {step.seconds:4.0f} s  {step.detail}")
    print(f"  {'All passed' if passed else 'Not all passed'}; logs and figures in {check.output}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
