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
            # The build of 2.13.0 for the CPU; torchvision's build is for CUDA, so it goes without.
            return [f"torch=={self.torch}"]
        return [f"torch=={self.torch}.*", "torchvision"]


# Every torch once and every Python at least once.
MATRIX = [
    Environment("2.10", "3.10"),
    Environment("2.11", "3.11"),
    Environment("2.12", "3.12"),
    Environment("2.13.0", "3.13"),
    Environment("2.14", "3.12"),
    Environment("newest", "3.11"),
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
    "test_gpu_check": "benchmarks/ is not in the wheel",
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


def run_environment(environment: Environment, wheel: Path, fuzz: str, log: Path) -> dict[str, Any]:
    """Installs, runs and deletes one environment; what came of it."""
    interpreter = find_python(environment.python)
    if interpreter is None:
        return {"not_run": f"no Python {environment.python} on PATH or in pyenv"}
    with tempfile.TemporaryDirectory(prefix="mg_ops_wheel_") as name, log.open("w") as log_file:
        folder = Path(name)
        python = folder / "venv" / "bin" / "python"
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MG_OPS_"))}
        variables |= {"MG_OPS_FUZZ": fuzz, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

        def run(*command: str | Path) -> bool:
            print("$", *command, file=log_file, flush=True)
            words = [str(word) for word in command]
            finished = subprocess.run(
                words, cwd=folder, env=variables, stdout=log_file, stderr=subprocess.STDOUT, check=False
            )
            return finished.returncode == 0

        copy_tests(folder)
        install = [python, "-m", "pip", "install", "--no-cache-dir", "--progress-bar", "off"]
        started = time.monotonic()
        # torch first, then the wheel with its dependencies: if it did not accept this torch, pip would replace it.
        installed = (
            run(interpreter, "-m", "venv", folder / "venv")
            and run(*install, *environment.packages, *TEST_PACKAGES)
            and run(*install, wheel)
        )
        if not installed:
            last_line = log.read_text().strip().splitlines()[-1]
            return {"not_run": f"pip could not install {' '.join(environment.packages)}: {last_line}"}
        print(f"  installed in {time.monotonic() - started:.0f} s", flush=True)
        question = (
            "import json, platform, torch, importlib.metadata as metadata\n"
            "def version(name):\n"
            "    try: return metadata.version(name)\n"
            "    except metadata.PackageNotFoundError: return None\n"
            "names = ('torchvision', 'triton', 'numpy')\n"
            "print(json.dumps({'python': platform.python_version(), 'torch': torch.__version__,\n"
            "                  'cuda': torch.version.cuda, **{name: version(name) for name in names}}))"
        )
        asked = subprocess.run(
            [python, "-I", "-c", question], cwd=folder, env=variables, capture_output=True, text=True, check=False
        )
        if asked.returncode != 0:
            return {"not_run": f"torch does not start: {asked.stderr.strip().splitlines()[-1]}"}
        result: dict[str, Any] = json.loads(asked.stdout)
        started = time.monotonic()
        works = run(python, "-I", folder / "tests" / "try_installed_wheel.py")
        report = folder / "report.xml"
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=20"]
        passed = run(*pytest, f"--junitxml={report}", "tests")
        result["seconds"] = round(time.monotonic() - started)
        if not report.exists():
            return result | {"not_run": "pytest did not start: see the log"}
        result |= count_outcomes(report)
        if not works:
            result["failed"] += 1
            result["failures"].insert(0, "tests/try_installed_wheel.py")
        assert passed == (result["failed"] == int(not works)), f"pytest's exit status and its report disagree: {log}"
        return result


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
        if "torch" in result:
            torch_version += f" (CUDA {result['cuda']})" if result["cuda"] else " (CPU build)"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path, help="the wheel to test")
    parser.add_argument("--only", nargs="+", metavar="TORCH", help=f"some of {', '.join(e.torch for e in MATRIX)}")
    parser.add_argument("--fuzz", default="0.1", help="share of the random cases to run (default: 0.1)")
    parser.add_argument(
        "--logs", type=Path, default=ROOT / "build" / "wheel_matrix", help="folder for pip's and pytest's output"
    )
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
    revision, good = commit(), True
    for environment in chosen:
        print(f"torch {environment.torch}, Python {environment.python}", flush=True)
        log = arguments.logs / f"torch-{environment.torch}-python-{environment.python}.log"
        result = run_environment(environment, arguments.wheel.resolve(), arguments.fuzz, log)
        result |= {
            "environment": list(environment),
            "wheel": arguments.wheel.name,
            "fuzz": float(arguments.fuzz),
            "commit": revision,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }
        good &= result.get("failed") == 0
        print(f"  {result.get('not_run') or {key: result[key] for key in ('passed', 'failed', 'skipped', 'seconds')}}")
        print(*(f"  FAILED {failure}" for failure in result.get("failures", [])), sep="\n", end="", flush=True)
        if not arguments.no_record:
            known = (
                [known for known in read_results() if known["environment"] != list(environment)]
                if RESULTS.exists()
                else []
            )
            RESULTS.write_text(json.dumps([*known, result], indent=1) + "\n")
            results = read_results()
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            write_table(results)
    if not good:
        sys.exit(f"Not every environment passed; the logs are in {arguments.logs}")


if __name__ == "__main__":
    main()
