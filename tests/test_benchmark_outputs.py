"""Whoever measures leaves the checkout as it was: figures go where git ignores them, unless they are to be recorded."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torchvision")

from test_benchmark_released_code import STAND_IN, write_code

from benchmarks import machine, match_speed, released_code, training_step

RECORDED = "amd-epyc-2-cores"
"""A machine whose figures are in the repository."""
ONE_STEP = ["--detectors", "fssd-resnet18", "--image-size", "64", "--batch", "2", "--steps", "1"]
ONE_CASE = ["--quick", "--cases", "voc320"]


def changes(folder: Path) -> list[str]:
    """What git sees in a folder."""
    command = ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=all"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the recorded figures, on a machine of the same name, where the benchmarks write."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path / "clone"
    shutil.copytree(machine.RECORDS, folder / machine.RECORDS.relative_to(machine.ROOT))
    shutil.copy(machine.ROOT / ".gitignore", folder)
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    for name in ("RECORDS", "MEASUREMENTS"):
        monkeypatch.setattr(machine, name, folder / getattr(machine, name).relative_to(machine.ROOT))
    monkeypatch.setattr(machine, "machine_folder", lambda _: RECORDED)
    assert all(line.startswith("A  ") for line in changes(folder))
    return folder


@pytest.mark.parametrize(
    ("benchmark", "arguments", "file"),
    [
        (match_speed, [*ONE_CASE, "--threads", "1"], "quick.json"),
        (training_step, [*ONE_STEP, "--threads", "1"], "training_step.json"),
        (released_code, [*ONE_CASE, "--threads", "1", "--code", "CODE"], "released_code_quick.json"),
    ],
)
def test_a_benchmark_changes_nothing_that_git_keeps(
    benchmark: ModuleType, arguments: list[str], file: str, clone: Path, tmp_path: Path
) -> None:
    code = write_code(tmp_path / "code", STAND_IN)
    before = changes(clone)
    assert benchmark.main([str(code) if word == "CODE" else word for word in arguments]) == 0
    assert changes(clone) == before
    assert [path.name for path in clone.glob(f"runs/benchmarks/{RECORDED}/*")] == [file]


def test_figures_to_be_recorded_replace_those_that_git_keeps(clone: Path) -> None:
    assert training_step.main([*ONE_STEP, "--threads", "1", "--record"]) == 0
    assert f"AM benchmarks/results/{RECORDED}/training_step.json" in changes(clone)


@pytest.mark.parametrize("flags", ["--quick", "--boxes boxes.json", "--cases voc320", "--no-baselines"])
def test_a_part_of_the_benchmark_is_not_recorded(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        match_speed.parse_options(["--record", *flags.split()])
    assert "--record: expected all cases" in capsys.readouterr().err
