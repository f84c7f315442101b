"""Every example runs from the command line as its docstring says, here with few steps."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_data import write_coco

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def run_here(
    one_thread: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs an example without the seconds that a process of its own takes to begin; what it prints."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", list(words))
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        return capsys.readouterr().out

    return run


def losses(output: str) -> list[float]:
    """What follows the word loss on each line."""
    return [float(line.split("loss ")[1].split()[0].rstrip(",")) for line in output.splitlines() if "loss " in line]


def test_the_plain_loop_learns(run_here: Callable[..., str]) -> None:
    found = losses(run_here("examples/plain_loop.py", "--steps", "60", "--device", "cpu"))
    assert len(found) == 4 and found[-1] < found[0] / 2


@pytest.mark.slow
def test_torchvisions_retinanet_trains_on_a_small_set(run_here: Callable[..., str]) -> None:
    pytest.importorskip("torchvision")
    words = ("--steps", "2", "--size", "64", "--device", "cpu")
    lines = run_here("examples/torchvision_retinanet.py", *words).splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 2 and all("classification" in line and "0 without a positive" in line for line in steps)


@pytest.mark.slow
def test_torchvisions_retinanet_trains_on_annotations_as_people_have_them(
    run_here: Callable[..., str], tmp_path: Path
) -> None:
    """Flags as text, a box without a size, an image that is not there, one that cannot be decoded."""
    pytest.importorskip("torchvision")
    root = write_coco(tmp_path, {"train": 4})
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for entry in content["annotations"]:
        entry["iscrowd"] = "0"
    content["annotations"].append({"image_id": 1, "category_id": 3, "bbox": [5, 5, 0, 5]})
    content["images"].append({"id": 9, "file_name": "gone.jpg"})
    file.write_text(json.dumps(content))
    (root / "train" / "000000000002.jpg").write_bytes(b"")
    command = ["--images", str(root / "train"), "--annotations", str(file), "--steps", "3", "--size", "64"]
    printed = run_here("examples/torchvision_retinanet.py", *command, "--batch-size", "3", "--device", "cpu")
    assert "4 images, 8 objects, 2 classes" in printed
    assert "1 x object without area inside its image: left out" in printed
    assert "1 x image file missing: skipped (gone.jpg)" in printed
    assert "000000000002.jpg: left out: cannot identify image file" in printed
    assert len([line for line in printed.splitlines() if line.startswith("step ")]) == 2


@pytest.mark.slow
def test_torchrun_keeps_two_processes_equal() -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/torchrun_ddp.py"]
    finished = run(*command, "--steps", "5")
    assert finished.returncode == 0, finished.stderr
    assert "2 processes, equal parameters" in finished.stdout


def test_torchrun_ddp_says_how_to_start_it(run_here: Callable[..., str]) -> None:
    with pytest.raises(SystemExit, match="start it by: torchrun"):
        run_here("examples/torchrun_ddp.py")


ON_WHAT = [pytest.param([], marks=pytest.mark.gpu, id="a GPU")]
if shutil.which("g++") is not None:
    ON_WHAT.append(pytest.param(["-m", "cuda_on_cpu.pretend_gpu"], marks=pytest.mark.slow, id="a stand-in"))


@pytest.mark.parametrize("launcher", ON_WHAT)
def test_a_step_as_a_cuda_graph_learns(launcher: list[str]) -> None:
    finished = run(*launcher, "examples/cuda_graph_step.py", "--steps", "60")
    assert finished.returncode == 0, finished.stderr
    found = losses(finished.stdout)
    assert len(found) == 4 and found[-1] < found[0] / 2
    assert not finished.stdout.endswith(", 0 so far run eagerly\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_cuda_graph_says_that_it_needs_a_gpu(run_here: Callable[..., str]) -> None:
    with pytest.raises(SystemExit, match="no GPU here"):
        run_here("examples/cuda_graph_step.py")
