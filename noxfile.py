"""Tests the wheel in dist/ in fresh environments, one per pair of torch and Python: `make test-wheels`.

The tests run from a copy outside the checkout, so what they import is the wheel. Each environment is deleted after its
tests: a few GB of disk are enough.

    nox                                   # all of them
    nox --session "wheel(torch-2.13.0)"   # one of them
    nox -- -k crowd                       # with options for pytest
    nox -- --record                       # writes the results to docs/wheel_matrix.json, which the documentation shows
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nox

ROOT = Path(__file__).parent
RESULTS = ROOT / "docs" / "wheel_matrix.json"

# Every torch once and every Python at least once. A minor version of torch stands for its newest patch.
ENVIRONMENTS = [
    ("2.10", "3.10"),
    ("2.11", "3.12"),
    ("2.12", "3.12"),
    ("2.13.0", "3.11"),
    ("2.14", "3.12"),
    ("newest", "3.13"),
]

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

INSTALLED = """
import importlib.metadata, json, platform, torch
versions = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
                  "glibc": platform.libc_ver()[1],
                  **{name: versions.get(name) for name in ("mg_ops", "torchvision", "triton", "numpy")}}))
"""

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"  # pip takes several times as long over the gigabytes of torch and CUDA
nox.options.error_on_missing_interpreters = True
nox.options.envdir = "build/nox"


def torch_requirements(torch: str) -> list[str]:
    """What is installed beside the wheel."""
    if torch == "newest":
        return ["torch", "torchvision"]
    # 2.13.0 has builds without CUDA. torchvision's is with CUDA, so this one goes without torchvision.
    return [f"torch=={torch}"] if torch.count(".") == 2 else [f"torch=={torch}.*", "torchvision"]


def copy_tests(folder: Path) -> None:
    """The tests that make sense without the checkout, the examples they run, and pytest's settings."""
    left_out = shutil.ignore_patterns("__pycache__", "cuda_on_cpu", *(f"{pattern}.py" for pattern in LEFT_OUT))
    shutil.rmtree(folder)  # of an earlier run
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=left_out)
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def count_outcomes(report: Path) -> dict[str, Any]:
    """Passed, failed and skipped tests of a JUnit report, and why tests were skipped."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skips = Counter(skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None)
    return {
        "passed": len(cases) - failed - skips.total(),
        "failed": failed,
        "skipped": skips.total(),
        "skip_reasons": dict(skips.most_common()),
    }


def commit() -> str:
    """The commit under test, marked where the files that decide the result have changed since."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", "-C", str(ROOT), *arguments], text=True).strip()

    changed = git("status", "--porcelain", "--", "csrc", "mg_ops", "tests", "CMakeLists.txt")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def record(result: dict[str, Any]) -> None:
    """Replaces what was known of this environment."""
    known = {tuple(other["environment"]): other for other in json.loads(RESULTS.read_text())}
    known[tuple(result["environment"])] = result
    RESULTS.write_text(json.dumps([known[pair] for pair in ENVIRONMENTS if pair in known], indent=1) + "\n")


@nox.session
@nox.parametrize("python,torch", [nox.param(python, torch, id=f"torch-{torch}") for torch, python in ENVIRONMENTS])
def wheel(session: nox.Session, torch: str) -> None:
    """Tests the wheel in dist/ under one torch and one Python."""
    wheels = list((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        session.error(f"expected one wheel in dist/, got {len(wheels)}: run `make wheel`")
    recorded = session.posargs == ["--record"]
    fuzz = os.environ.get("MG_OPS_FUZZ", "0.1")
    # Nothing of the caller's Python or of mg_ops reaches the environment, and nothing is left of it in uv's cache.
    session.env.update({key: None for key in os.environ if key.startswith(("PYTHON", "MG_OPS_"))})
    session.env.update({"MG_OPS_FUZZ": fuzz, "OMP_NUM_THREADS": "1", "UV_NO_CACHE": "1"})
    # torch first, then the wheel with its dependencies, which must find this torch good enough.
    session.install(*torch_requirements(torch), "pytest", "hypothesis", "numpy", "pillow")
    session.install(str(wheels[0]))
    folder = Path(session.create_tmp())
    copy_tests(folder)
    with session.chdir(folder):
        installed = json.loads(session.run("python", "-I", "-c", INSTALLED, silent=True))
        session.run("python", "-I", "tests/try_installed_wheel.py")
        started = time.monotonic()
        pytest = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=20", "--junitxml=report.xml"]
        options = ["-m", "not slow"] if recorded or not session.posargs else session.posargs
        session.run(*pytest, *options, "tests", success_codes=[0, 1])
    outcomes = count_outcomes(folder / "report.xml")
    if recorded:
        record(
            installed
            | {"seconds": round(time.monotonic() - started)}
            | outcomes
            | {"environment": [torch, str(session.python)], "wheel": wheels[0].name, "fuzz": float(fuzz)}
            | {"commit": commit(), "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
        )
    shutil.rmtree(session.virtualenv.location)
    if outcomes["failed"]:
        session.error(f"{outcomes['failed']} tests failed")
