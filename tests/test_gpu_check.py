"""`make gpu-check` can be trusted where nobody watches: every step runs, failures show, the verdict comes last."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


def run(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do() -> None:
    result = run()
    assert result.returncode == 2
    assert "--dry-run" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_dry_run_goes_through_every_step(tmp_path: Path) -> None:
    """All but the build, which `make build` has done and whose test is the library under test."""
    result = run("--dry-run", "--skip-build", "--output", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    names = ["tests", "sanitizer", "benchmark", "training-step"]
    assert [step["name"] for step in summary["steps"]] == names
    assert summary["passed"] and summary["dry_run"]
    assert re.search(r"\d+/?\d* tests? collected|\d+/\d+ tests collected", summary["steps"][0]["detail"])
    assert "equal to the reference" in summary["steps"][1]["detail"]
    assert (tmp_path / "quick.json").exists() and (tmp_path / "training_step.json").exists()
    verdict = result.stdout.split("Verdict")[1]
    assert all(f"passed  {step['name']}" in verdict for step in summary["steps"])
    assert "All passed" in verdict.strip().splitlines()[-1]


def test_a_failing_step_is_reported_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import gpu_check

    check = gpu_check.Check(tmp_path, dry_run=True)
    program = "print('before'); print('3 failed'); raise SystemExit(3)"
    failed = check.run("tests", [sys.executable, "-c", program], 60.0, "failed", {})
    assert not failed.passed and failed.detail == "exit status 3: 3 failed"
    assert (tmp_path / "tests.log").read_text().splitlines() == ["before", "3 failed"]
    missing = check.run("sanitizer", ["no-such-program-anywhere"], 60.0, "x", {})
    assert not missing.passed and "no-such-program-anywhere" in missing.detail
    good = check.run("benchmark", [sys.executable, "-c", "print('2 times faster')"], 60.0, "times", {})
    assert good.passed and good.detail == "2 times faster"


def test_a_step_that_takes_too_long_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import gpu_check

    check = gpu_check.Check(tmp_path, dry_run=True)
    check.started -= gpu_check.BUDGET_SECONDS  # nothing left but the least a step gets
    step = check.run("tests", [sys.executable, "-c", "import time; time.sleep(600)"], 60.0, "x", {})
    assert not step.passed and "cut off after 5 s" in step.detail
