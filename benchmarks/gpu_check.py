"""Checks and measures mg_ops on the GPU of this machine, in three calls; `make gpu-check` makes all three.

    python benchmarks/gpu_check.py right           # are the answers right, and how fast do they come
    python benchmarks/gpu_check.py why             # what each kernel spends its time on, by Nsight Compute
    python benchmarks/gpu_check.py rest            # Triton, the baselines, training steps, also captured
    python benchmarks/gpu_check.py --dry-run       # every step on stand-ins, without a GPU

Each call ends within 9 minutes, and keeps what it has when it is ended before: every result and log is written to the
output folder as soon as it exists. A step that fails or is cut off does not stop the others. Needs a Python with torch,
torchvision, triton, numpy, pillow, rich, tqdm, cmake, ninja, pytest and hypothesis, pytest-xdist if there is one; g++;
and of the CUDA toolkit, wherever it is, nvcc 12.8 or newer, compute-sanitizer and ncu. No network, no git:
MG_OPS_COMMIT names the commit where there is none. The verdict comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.machine import MEASUREMENTS, RECORDS, describe_machine, machine_folder  # noqa: E402

CALL_SECONDS = 520.0
"""A call ends itself after so long: within 9 minutes, whatever hangs."""
CUDA_TESTS = (
    "tests/test_gpu.py",
    "tests/test_agrees_with_torchvision.py",
    "tests/test_atss_match.py",
    "tests/test_bounds_change_nothing.py",
    "tests/test_captured_step.py",
    "tests/test_cpp_equals_reference.py",
    "tests/test_dynamic_k_backends.py",
    "tests/test_dynamic_mutual_match.py",
    "tests/test_dynamic_soft_label_match.py",
    "tests/test_every_clause_of_the_definition.py",
    "tests/test_examples.py",
    "tests/test_losses.py",
    "tests/test_matcher.py",
    "tests/test_max_iou_match.py",
    "tests/test_object_forms.py",
    "tests/test_probabilities.py",
    "tests/test_rules.py",
    "tests/test_simota_match.py",
    "tests/test_task_aligned_match.py",
    "tests/test_torch_integration.py",
)
"""All files with tests that need a GPU but no Triton. Named, so that no other file's imports can stop them."""
TRITON_TESTS = ("tests/test_triton_equals_reference.py", "tests/test_triton_losses.py")
TOOLS = ("g++", "cmake", "ninja", "nvcc", "compute-sanitizer", "ncu")
TOOL_FOLDERS = (
    "usr/local/cuda/bin",
    "usr/local/cuda*/bin",
    "opt/cuda/bin",
    "opt/nvidia/nsight-compute/*",
    "usr/lib/nvidia-cuda-toolkit/bin",
)


def find_tool(name: str) -> str:
    """The path of a program: on the PATH, or where the CUDA toolkit and Python's packages put theirs.

    Raises:
        FileNotFoundError: there is none.
    """
    folders = [Path(os.environ[home]) / "bin" for home in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(home)]
    folders += [path for pattern in TOOL_FOLDERS for path in sorted(Path("/").glob(pattern), reverse=True)]
    folders.append(Path(sysconfig.get_path("scripts")))
    for packages in {Path(sysconfig.get_path("purelib")), Path(torch.__file__).parents[1]}:  # wheels of NVIDIA
        folders += sorted(packages.glob("nvidia/*/bin")) + sorted(packages.glob("triton/backends/nvidia/bin"))
    places = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    if found := shutil.which(name, path=places):
        return found
    raise FileNotFoundError(f"expected {name} on the PATH or in a folder of the CUDA toolkit, found none in {places}")


def describe_tool(name: str) -> str:
    """Where a program is, or that it was not found."""
    try:
        return find_tool(name)
    except FileNotFoundError as error:
        return str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Running

Command = tuple[list[str], dict[str, str]]
"""What a step runs: its words, and environment variables."""


class Step(NamedTuple):
    """One row of a call's table."""

    name: str
    seconds: float
    """What it may take."""
    command: Callable[[Check], Command]


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all it has started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, how)
            process.wait(3.0)
    process.wait()


class Check:
    """One call: its steps, their logs and the clock."""

    def __init__(self, call: str, output: Path, dry_run: bool, machine: dict[str, Any], seconds: float) -> None:
        self.call, self.output, self.dry_run, self.machine = call, output, dry_run, machine
        self.deadline = time.monotonic() + seconds
        self.ended_by: str | None = None
        """The signal that ends this call early."""
        self.complete = False
        self.steps: list[dict[str, Any]] = []
        """What they came to: name, passed, seconds, and what the last line of the log said or why it failed."""
        self.logs = output / call
        self.logs.mkdir(parents=True, exist_ok=True)
        self.keep()

    def run_side_by_side(self, steps: tuple[Step, ...]) -> bool:
        """Runs the steps at once, each as long as it may; whether all passed."""
        running = {step: self.start(step) for step in steps}
        began = time.monotonic()
        while running:
            for step, process in list(running.items()):
                seconds = time.monotonic() - began
                late = time.monotonic() > self.deadline or (seconds > step.seconds and not self.dry_run)
                if isinstance(process, subprocess.Popen) and process.poll() is None and not (late or self.ended_by):
                    continue
                del running[step]
                detail = process if isinstance(process, str) else self.finish(step, process, seconds)
                passed = not isinstance(process, str) and process.returncode == 0
                self.steps.append({"name": step.name, "passed": passed, "seconds": seconds, "detail": detail})
                print(describe(self.steps[-1]), flush=True)
                self.keep()
            time.sleep(0.1)
        return all(outcome["passed"] for outcome in self.steps[-len(steps) :])

    def start(self, step: Step) -> subprocess.Popen[bytes] | str:
        """Starts a step, its output into a log; or says why it is not run."""
        if self.ended_by or self.deadline - time.monotonic() < 1.0:
            return f"not run: {self.ended_by or 'the time of this call is over'}"
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        try:
            words, variables = step.command(self)
            line = shlex.join(words).replace("\n", " ")
            print(f"{step.name}: {line}", flush=True)
            with (self.logs / f"{step.name}.log").open("w") as log:
                print(f"$ {line}", file=log, flush=True)
                # A session of its own, so that all it starts can be ended with it.
                return subprocess.Popen(
                    words, cwd=ROOT, env=environment | variables, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            return str(error)

    def finish(self, step: Step, process: subprocess.Popen[bytes], seconds: float) -> str:
        """Ends a step and what it left behind; how it ended, if not well, and the last line of its log."""
        reason = f"exit status {process.returncode}: " if process.returncode else ""
        if process.returncode is None:
            reason = f"{self.ended_by or f'cut off after {seconds:.0f} s'}: "
        end_session(process)
        lines = (self.logs / f"{step.name}.log").read_text(errors="replace").splitlines()[1:]
        return reason + next((line.strip() for line in reversed(lines) if line.strip()), "")[-200:]

    def keep(self) -> None:
        """Writes the summary of what there is so far."""
        passed = self.complete and all(outcome["passed"] for outcome in self.steps)
        summary = {"call": self.call, "machine": self.machine, "dry_run": self.dry_run, "passed": passed}
        summary |= {"complete": self.complete, "steps": self.steps}
        (self.output / f"{self.call}.json").write_text(json.dumps(summary, indent=1) + "\n")


def describe(outcome: dict[str, Any]) -> str:
    """A line of the verdict."""
    passed = "passed" if outcome["passed"] else "FAILED"
    return f"  {passed}  {outcome['name']:14} {outcome['seconds']:4.0f} s  {outcome['detail']}"


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def in_a_row(*commands: list[str]) -> list[str]:
    """Commands of which each runs if the one before it succeeded."""
    return ["sh", "-c", " && ".join(map(shlex.join, commands))]


def script(check: Check, name: str, *words: str, output: str = "", dry: str = "", real: str = "") -> Command:
    """A benchmark that writes a JSON file; in a dry run on the GPU that is not there."""
    stand_in = ["-m", "cuda_on_cpu.pretend_gpu"] if check.dry_run else []
    words = (*words, "--output", str(check.output / f"{output or name}.json"))
    return [sys.executable, *stand_in, f"benchmarks/{name}.py", *words, *(dry if check.dry_run else real).split()], {}


def pytest_command(*words: str) -> list[str]:
    """A run of tests, with their names in the log."""
    return [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *words]


def gpu_tests(check: Check, *words: str) -> list[str]:
    """Tests that need a GPU, on 8 processes where pytest-xdist is there; in a dry run a variant of each."""
    options = ["-m", "gpu", "--durations=15", "-o", "faulthandler_timeout=60"]
    options += ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    if check.dry_run:
        return ["env", "MG_OPS_VARIANTS=1", *pytest_command("-p", "cuda_on_cpu.pretend_gpu", *options, *words)]
    return pytest_command(*options, *words)


def architecture(check: Check) -> str:
    """What nvcc is told of this GPU, as torch says it; in a dry run a Hopper's."""
    major, minor = (9, 0) if check.dry_run else torch.cuda.get_device_capability(0)
    return f"{major}{minor}"


def build(check: Check) -> Command:
    """The library for this GPU alone, by the CMakeLists.txt that all builds use, into the checkout.

    A dry run builds what it can; where a library is there already, it only configures.
    """
    folder, cmake = ROOT / "build" / "gpu-check", find_tool("cmake")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder / "library"), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DMG_OPS_TORCH_DIR={Path(torch.__file__).parent}"]
    environment = {"CXX": find_tool("g++"), "CUDAHOSTCXX": find_tool("g++")}
    try:
        environment["CUDACXX"] = find_tool("nvcc")
        configure += ["-DMG_OPS_CUDA=ON", f"-DMG_OPS_CUDA_ARCHITECTURES={architecture(check)}"]
    except FileNotFoundError:
        if not check.dry_run:
            raise
        configure += ["-DMG_OPS_CUDA=OFF"]
    if check.dry_run and (ROOT / "mg_ops" / "libmg_ops.so").exists():
        return configure, environment
    compile_all = [cmake, "--build", str(folder / "library"), "--target", "mg_ops"]
    return in_a_row(
        configure, compile_all, [cmake, "--install", str(folder / "library"), "--prefix", str(ROOT)]
    ), environment


def cuda_tests(check: Check) -> Command:
    """All that the CUDA backend promises, without Triton's compilations."""
    # Several processes: few threads each for the reference on the CPU.
    environment = {"OMP_NUM_THREADS": "2", **({"MG_OPS_FUZZ": "0.01"} if check.dry_run else {})}
    # On stand-ins, what the reference says of CPU tensors and what takes longest would show nothing new.
    left_out = ("triton", "eager", "matcher", "large") if check.dry_run else ("triton",)
    return gpu_tests(check, *CUDA_TESTS, "-k", " and ".join(f"not {word}" for word in left_out)), environment


def sanitize(tool: str, check: Check) -> Command:
    """A tool of compute-sanitizer on a short selection; in a dry run the kernels on the CPU, under sanitizers for one.

    No initcheck: it takes whatever torch's own kernels wrote, which the filter by name leaves out, as never written.
    tests/cuda_on_cpu starts from memory that holds anything instead.
    """
    if check.dry_run:
        words = {
            "memcheck": "--sanitize --wrong-offsets --batches 8",
            "synccheck": "--batches 2",
            "racecheck": "--wrong-offsets --batches 8 --first 100",
        }
        return [sys.executable, "tests/cuda_on_cpu", "--threads", "32", *words[tool].split()], {}
    command = [find_tool("compute-sanitizer"), "--tool", tool, "--error-exitcode", "99"]
    command += [
        "--kernel-name",
        "kernel_substring=mg_ops",
        *pytest_command("tests/test_gpu.py", "-k", "short_selection"),
    ]
    # torch's cache would hide a write past the end of a tensor from memcheck.
    return command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def graph_replay(check: Check) -> Command:
    """Device times of every case, mg_ops alone."""
    cases = ["voc320", "coco320", "coco800", "dense", "dense5000"]
    words = ["--device", "cuda", "--backends", "cuda", "--no-baselines", "--cases", *cases]
    return script(check, "match_speed", *words, output="graph_replay", dry="--quick")


def card_limits(check: Check) -> Command:
    """Copying, launching, dividing and counting on this card."""
    library, source = str(check.logs / "card_limits.so"), "benchmarks/card_limits.cu"
    if check.dry_run:
        compiler = [find_tool("g++"), "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-x", "c++"]
        compiler += ["-include", "tests/cuda_on_cpu/cuda_on_cpu.h", source, "-o", library]
    else:
        compiler = [find_tool("nvcc"), "-O3", "-std=c++17", f"-arch=sm_{architecture(check)}", "-fmad=false"]
        compiler += ["-ccbin", find_tool("g++"), "-shared", "-Xcompiler", "-fPIC", source, "-o", library]
    words, environment = script(check, "card_limits", "--library", library, dry="--quick")
    return in_a_row(compiler, words), environment


def kernel_profile(check: Check) -> Command:
    """Nsight Compute on every kernel of three cases; its whole tables lie beside the logs."""
    ncu = "tests/cuda_on_cpu/pretend_ncu.py" if check.dry_run else find_tool("ncu")
    return script(check, "kernel_profile", "--ncu", ncu, "--tables", str(check.logs), dry="--quick")


def triton_tests(check: Check) -> Command:
    """The Triton backend, with few random batches, and the losses of float32: each may be a variant to compile.

    In a dry run other kernels stand in, and then Triton's interpreter runs its own.
    """
    chosen = "triton and not (losses and (float16 or float64))"
    command = gpu_tests(check, *([] if check.dry_run else TRITON_TESTS), "tests/test_gpu.py", "-k", chosen)
    if check.dry_run:
        command = in_a_row(command, pytest_command("tests/test_triton_interpreted.py", "-k", "small"))
    return command, {"OMP_NUM_THREADS": "2", "MG_OPS_FUZZ": "0.02"}


def baselines(check: Check) -> Command:
    """The matching against what people use today, on this GPU."""
    words = ["--device", "cuda", "--backends", "cuda", "triton"]
    return script(check, "match_speed", *words, dry="--cases voc320 --quick", real="--cases coco320 coco800")


def training_steps(check: Check) -> Command:
    """Training steps of two detectors with each matching."""
    words = ["--device", "cuda", "--amp", "bf16", "--detectors", "fssd-resnet18", "retinanet-resnet18"]
    sizes = {"dry": "--image-size 64 --batch 2 --steps 1", "real": "--image-size 320 --batch 32 --steps 20 --warmup 5"}
    return script(check, "training_step", *words, **sizes)


def captured_steps(check: Check) -> Command:
    """Training steps as they are, with the network captured, and captured whole."""
    words = ["--device", "cuda", "--amp", "bf16"]
    return script(check, "captured_step", *words, dry="--image-size 64 --batch 2 4 --steps 1", real="--steps 20")


BUILD = Step("build", 120.0, build)
"""Without it no other step of a call runs."""
CALLS: dict[str, tuple[tuple[Step, ...], ...]] = {
    "right": (
        (BUILD,),
        (
            Step("tests", 190.0, cuda_tests),
            *(Step(tool, 190.0, partial(sanitize, tool)) for tool in ("memcheck", "synccheck", "racecheck")),
        ),
        (Step("graph-replay", 120.0, graph_replay),),
        (Step("card-limits", 60.0, card_limits),),
    ),
    "why": ((BUILD,), (Step("kernel-profile", 390.0, kernel_profile),)),
    "rest": (
        (BUILD,),
        (Step("triton-tests", 130.0, triton_tests),),
        (Step("baselines", 140.0, baselines),),
        (Step("training-steps", 65.0, training_steps),),
        (Step("captured-steps", 65.0, captured_steps),),
    ),
}
"""Call -> its steps in order, those in one row side by side."""


# ---------------------------------------------------------------------------------------------------------------------


def run_call(call: str, options: argparse.Namespace, machine: dict[str, Any]) -> Check:
    """Runs the steps of a call, until the build fails or a signal comes."""
    seconds = math.inf if options.dry_run else CALL_SECONDS
    check = Check(call, options.output, options.dry_run, machine, seconds)

    def end(number: int, frame: object) -> None:
        check.ended_by = f"ended by {signal.Signals(number).name}"

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    for steps in CALLS[call]:
        if not check.run_side_by_side(steps) and steps[0] is BUILD:
            break
    check.complete = check.ended_by is None
    check.keep()
    return check


def main() -> int:
    """Makes the calls; the exit status is 0 if all passed, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", nargs="*", metavar="CALL", help=f"of {', '.join(CALLS)}; all if none is named")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: every step on stand-ins")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help="folder for the results (default runs/benchmarks/<gpu>)")
    where.add_argument("--record", action="store_true", help="the default is benchmarks/results/<gpu>, which is kept")
    options = parser.parse_args()
    if unknown := set(options.calls) - set(CALLS):
        parser.error(f"expected calls of {', '.join(CALLS)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available() and not options.dry_run:
        print("gpu-check: torch finds no GPU here. `--dry-run` tries every step without one.")
        return 2
    machine = describe_machine("cpu" if options.dry_run else "cuda")
    machine["tools"] = {name: describe_tool(name) for name in TOOLS}
    folder = (RECORDS if options.record else MEASUREMENTS) / machine_folder(machine)
    folder = ROOT / "build" / "gpu-check" / "dry-run" if options.dry_run else folder
    options.output = (options.output or folder).resolve()
    print("gpu-check" + (" (dry run: no figure below is of a GPU)" if options.dry_run else ""))
    print(json.dumps(machine, indent=1))
    calls, checks = options.calls or list(CALLS), []
    for call in calls:
        print(f"\n{call}", flush=True)
        checks.append(run_call(call, options, machine))
        if checks[-1].ended_by:
            break
    outcomes = [outcome for check in checks for outcome in check.steps]
    passed = all(outcome["passed"] for outcome in outcomes) and len(checks) == len(calls)
    print(f"\nVerdict on {machine['device']}{' (dry run)' if options.dry_run else ''}:")
    print(*map(describe, outcomes), sep="\n")
    print(f"  {'All passed' if passed else 'Not all passed'}; results and logs in {options.output}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
