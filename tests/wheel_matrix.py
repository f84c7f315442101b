"""Runs the tests with one wheel in fresh environments, one for each pair of torch and Python: `make test-wheels`.

Each environment is made from nothing (venv, pip install), used and deleted, so a few GB of disk are enough. The tests
run from a copy outside the checkout: what they import is what pip installed. Results are kept in
docs/wheel_matrix.json, one entry an environment, and in the table of the README.

    python tests/wheel_matrix.py dist/mg_ops-*.whl                # all of it
    python tests/wheel_matrix.py dist/mg_ops-*.whl --only 2.13.0  # one torch
    python tests/wheel_matrix.py --table                          # only write the README's table again
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "wheel_matrix.json"
README = ROOT / "README.md"


class Environment(NamedTuple):
    """What one run installs."""

    torch: str
    """The torch release: a minor version for its newest patch, a full version, or "newest"."""
    python: str

    @property
    def packages(self) -> list[str]:
        """What pip is asked for beside the wheel."""
        if self.torch == "newest":
            return ["torch", "torchvision"]
        if self.torch.count(".") == 2:
            # There are builds of 2.13.0 without CUDA; torchvision's has it, so this one goes without torchvision.
            return [f"torch=={self.torch}"]
        return [f"torch=={self.torch}.*", "torchvision"]


# Every torch once and every Python at least once.
MATRIX = [
    Environment("2.10", "3.10"),
    Environment("2.11", "3.12"),
    Environment("2.12", "3.12"),
    Environment("2.13.0", "3.11"),
    Environment("2.14", "3.12"),
    Environment("newest", "3.13"),
]
TEST_PACKAGES = ["pytest", "hypothesis", "numpy", "pillow"]

# A new test file is run unless it is named here.
LEFT_OUT = {
    "test_benchmark_*": "benchmarks/ is not in the wheel",
    "test_build": "looks at the build and its folders; run by `make test`",
    "test_cuda_build": "disassembles the library, the same under every torch; run by `make test`",
    "test_cuda_on_cpu": "compiles csrc/",
    "test_det_math": "compiles csrc/",
    "test_detector_*": "detector/ is not in the wheel",
    "test_docs": "docs/ is not in the wheel",
    "test_gpu_check": "benchmarks/ is not in the wheel",
    "test_strategies": "benchmarks/ is not in the wheel",
    "test_training_step": "benchmarks/ is not in the wheel",
    "test_vector_loops": "compiles csrc/",
}


def find_python(version: str) -> str | None:
    """An interpreter of this version that can make environments: on PATH, or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]
    question = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for candidate in filter(None, candidates):
        answer = subprocess.run([candidate, "-c", question], capture_output=True, text=True, check=False)
        if answer.stdout.strip() == version:
            return str(candidate)
    return None


def copy_tests(folder: Path) -> None:
    """The tests that make sense without the checkout, the examples they run, and pytest's settings."""
    left_out = shutil.ignore_patterns("__pycache__", "cuda_on_cpu", *(f"{pattern}.py" for pattern in LEFT_OUT))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=left_out)
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def count_outcomes(report: Path) -> dict[str, Any]:
    """Passed, failed and skipped tests of a JUnit report, and why tests were skipped."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = [skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None]
    return {
        "passed": len(cases) - len(failed) - len(skips),
        "failed": len(failed),
        "skipped": len(skips),
        "failures": sorted(f"{case.get('classname')}::{case.get('name')}" for case in failed),
        "skip_reasons": dict(Counter(skips).most_common()),
    }


class Runner(NamedTuple):
    """Runs commands in the folder of one environment, with all they say in its log."""

    folder: Path
    log: Path
    fuzz: str

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.folder / "venv" / "bin" / "python"

    @property
    def variables(self) -> dict[str, str]:
        """Nothing of the caller's Python or of mg_ops reaches the environment."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MG_OPS_"))}
        return inherited | {"MG_OPS_FUZZ": self.fuzz, "OMP_NUM_THREADS": "1"}

    def __call__(self, *command: str | Path) -> bool:
        """Whether the command succeeds."""
        words = [str(word) for word in command]
        with self.log.open("a") as log_file:
            print("$", *words, file=log_file, flush=True)
            finished = subprocess.run(
                words, cwd=self.folder, env=self.variables, stdout=log_file, stderr=subprocess.STDOUT, check=False
            )
        return finished.returncode == 0


def install(environment: Environment, wheel: Path, find_links: str | None, run: Runner) -> str:
    """Makes the environment; the reason why not, or an empty string."""
    interpreter = find_python(environment.python)
    if interpreter is None:
        return f"no Python {environment.python} on PATH or in pyenv"
    # uv, since pip takes several times as long over the gigabytes of torch and CUDA.
    uv_install = [sys.executable, "-m", "uv", "pip", "install", "--no-cache", "--python", str(run.python)]
    uv_install += ["--find-links", find_links] if find_links else []
    if not run(interpreter, "-m", "venv", run.folder / "venv"):
        return f"{interpreter} -m venv failed"
    # torch first, then the wheel with its dependencies, which must find this torch good enough.
    if not run(*uv_install, *environment.packages, *TEST_PACKAGES) or not run(*uv_install, wheel):
        return (
            f"{' '.join(environment.packages)} could not be installed: {run.log.read_text().strip().splitlines()[-1]}"
        )
    return ""


def run_tests(run: Runner, slow: bool) -> dict[str, Any]:
    """What is installed, and what the tests say of it."""
    copy_tests(run.folder)
    question = (
        "import importlib.metadata, json, platform, torch\n"
        "installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}\n"
        "versions = {name: installed.get(name) for name in ('mg_ops', 'torchvision', 'triton', 'numpy')}\n"
        "print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda,\n"
        "                  'python': platform.python_version(), 'glibc': platform.libc_ver()[1], **versions}))"
    )
    command = [str(run.python), "-I", "-c", question]
    asked = subprocess.run(command, cwd=run.folder, env=run.variables, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        return {"not_run": f"torch does not start: {asked.stderr.strip().splitlines()[-1]}"}
    result: dict[str, Any] = json.loads(asked.stdout)
    report = run.folder / "report.xml"
    started = time.monotonic()
    works = run(run.python, "-I", run.folder / "tests" / "try_installed_wheel.py")
    selection = [] if slow else ["-m", "not slow"]
    pytest = [run.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=20", *selection]
    passed = run(*pytest, f"--junitxml={report}", "tests")
    result["seconds"] = round(time.monotonic() - started)
    if not report.exists():
        return result | {"not_run": f"pytest did not finish: {run.log.read_text().strip().splitlines()[-1]}"}
    result |= count_outcomes(report)
    if passed != (result["failed"] == 0):
        raise RuntimeError(f"pytest's exit status and its report disagree: {run.log}")
    if not works:
        result["failed"] += 1
        result["failures"].insert(0, "tests/try_installed_wheel.py")
    return result


def run_environment(
    environment: Environment, wheel: Path, find_links: str | None, fuzz: str, slow: bool, log: Path
) -> dict[str, Any]:
    """Installs, tests and deletes one environment; what came of it."""
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="mg_ops_wheel_") as name:
        run = Runner(Path(name), log, fuzz)
        error = install(environment, wheel, find_links, run)
        if error:
            return {"not_run": error}
        print("  installed", flush=True)
        return run_tests(run, slow)


def commit() -> str:
    """The commit under test, marked where the files that decide the result have changed since."""
    describe = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    changed = ["git", "-C", str(ROOT), "status", "--porcelain", "--", "csrc", "mg_ops", "tests", "CMakeLists.txt"]
    revision = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    dirty = subprocess.run(changed, capture_output=True, text=True, check=False).stdout.strip()
    return f"{revision} with changes" if dirty else revision


def render_table(results: list[dict[str, Any]]) -> str:
    """The README's table."""
    lines = ["| torch | Python | passed | failed | skipped | when |", "|---|---|---|---|---|---|"]
    for result in results:
        torch_version = result.get("torch", result["environment"][0])
        python_version = result.get("python", result["environment"][1])
        if "torch" in result and "+" not in torch_version:  # most builds say it themselves: +cu130, +cpu
            torch_version += f" (CUDA {result['cuda']})" if result["cuda"] else " (without CUDA)"
        counts = f"| {result.get('passed')} | {result.get('failed')} | {result.get('skipped')} |"
        if "not_run" in result:
            counts = f"| not run: {result['not_run'].replace('|', '/')} | | |"
        lines.append(f"| {torch_version} | {python_version} {counts} {result['date']}, commit {result['commit']} |")
    return "\n".join(lines)


def write_table(results: list[dict[str, Any]]) -> None:
    """Puts the table between its two marks in the README."""
    marks = r"(<!-- wheel matrix[^>]*-->\n).*?(<!-- end of wheel matrix -->)"
    text, count = re.subn(
        marks, lambda found: f"{found[1]}{render_table(results)}\n{found[2]}", README.read_text(), flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{README} has no place for the table: expected the marks <!-- wheel matrix --> once")
    README.write_text(text)


def read_results() -> list[dict[str, Any]]:
    """What is known so far, in the order of MATRIX."""
    known = {tuple(result["environment"]): result for result in json.loads(RESULTS.read_text())}
    return [known[environment] for environment in MATRIX if environment in known]


def record(result: dict[str, Any]) -> None:
    """Replaces what was known of this environment, and the README's table."""
    known = read_results() if RESULTS.exists() else []
    others = [other for other in known if other["environment"] != result["environment"]]
    RESULTS.write_text(json.dumps([*others, result], indent=1) + "\n")
    RESULTS.write_text(json.dumps(read_results(), indent=1) + "\n")  # in the order of MATRIX
    write_table(read_results())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path, help="the wheel to test")
    parser.add_argument("--only", nargs="+", metavar="TORCH", help=f"some of {', '.join(e.torch for e in MATRIX)}")
    parser.add_argument("--fuzz", default="0.1", help="share of the random cases to run (default: 0.1)")
    parser.add_argument("--slow", action="store_true", help="run the tests marked slow too")
    parser.add_argument(
        "--find-links", metavar="FOLDER", help="a folder of further wheels, a torch without CUDA perhaps"
    )
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "wheel_matrix", metavar="FOLDER")
    parser.add_argument("--no-record", action="store_true", help="leave docs/wheel_matrix.json and the README alone")
    parser.add_argument("--table", action="store_true", help="only write the README's table again")
    arguments = parser.parse_args()
    if arguments.table:
        write_table(read_results())
        return
    if arguments.wheel is None or not arguments.wheel.exists():
        parser.error(f"expected a wheel, got {arguments.wheel}: run `make wheel`")
    chosen = [environment for environment in MATRIX if not arguments.only or environment.torch in arguments.only]
    if not chosen:
        parser.error(f"--only: expected some of {', '.join(e.torch for e in MATRIX)}, got {' '.join(arguments.only)}")
    arguments.logs.mkdir(parents=True, exist_ok=True)
    wheel, revision, good = arguments.wheel.resolve(), commit(), True
    for environment in chosen:
        print(f"torch {environment.torch}, Python {environment.python}", flush=True)
        log = arguments.logs / f"torch-{environment.torch}-python-{environment.python}.log"
        result = run_environment(environment, wheel, arguments.find_links, arguments.fuzz, arguments.slow, log)
        result |= {
            "environment": list(environment),
            "wheel": wheel.name,
            "fuzz": float(arguments.fuzz),
            "slow": arguments.slow,
            "commit": revision,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }
        counts = {key: result.get(key) for key in ("passed", "failed", "skipped", "seconds")}
        print(f"  not run: {result['not_run']}" if "not_run" in result else f"  {counts}", flush=True)
        for failure in result.get("failures", []):
            print(f"  FAILED {failure}", flush=True)
        good = good and result.get("failed") == 0
        if not arguments.no_record:
            record(result)
    if not good:
        sys.exit(f"Not every environment passed; the logs are in {arguments.logs}")


if __name__ == "__main__":
    main()
