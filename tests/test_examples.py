"""Every example runs from the command line as its docstring says, here with few steps."""

from __future__ import annotations

import os
import re
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


@pytest.fixture
def run_framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs the training of a framework, in a process of its own, where it is installed; what it prints."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")

    def run_it(framework: str, *words: str) -> str:
        pytest.importorskip(framework, reason=f"{framework} is not installed")
        finished = run(f"examples/frameworks/train_{framework}.py", *words)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    return run_it


def losses(output: str) -> list[float]:
    """What follows the word loss."""
    return [float(number) for number in re.findall(r"\bloss ([\d.]+)", output)]


def test_the_plain_loop_learns(run_here: Callable[..., str]) -> None:
    found = losses(run_here("examples/plain_loop.py", "--steps", "60", "--device", "cpu"))
    assert len(found) == 4 and found[-1] < found[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("model", ["retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
def test_torchvisions_detectors_learn_shapes(run_framework: Callable[..., str], model: str, tmp_path: Path) -> None:
    out = tmp_path / "weights.pt"
    found = losses(run_framework("torchvision", "--model", model, "--size", "96", "--steps", "30", "--out", str(out)))
    assert len(found) == 4 and found[-1] < 0.8 * found[0]
    loaded = "from torchvision.models import detection as d; import torch, sys; sys.modules['mg_ops'] = None; "
    loaded += f"m = d.{model}(weights=None, weights_backbone=None, num_classes=4); "
    loaded += f"print(m.load_state_dict(torch.load({str(out)!r})))"
    assert "All keys matched" in run("-c", loaded).stdout


@pytest.mark.slow
def test_torchvisions_retinanet_trains_on_your_images(run_framework: Callable[..., str], tmp_path: Path) -> None:
    root = write_coco(tmp_path, {"train": 4})
    given = ["--images", str(root / "train"), "--annotations", str(root / "annotations/instances_train.json")]
    assert len(losses(run_framework("torchvision", *given, "--size", "64", "--steps", "2", "--batch-size", "2"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("model", "assigner"), [("yolo11n", "fused"), ("yolo26n", "mutual")])
def test_yolos_learn_shapes(run_framework: Callable[..., str], model: str, assigner: str) -> None:
    found = losses(run_framework("ultralytics", "--model", model, "--assigner", assigner, "epochs=8"))
    assert len(found) == 8 and found[-1] < found[0]


@pytest.mark.slow
def test_detectron2s_retinanet_learns_shapes(run_framework: Callable[..., str]) -> None:
    found = losses(run_framework("detectron2"))
    assert found[-1] < found[0]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ddod", "tood"])
def test_mmdetections_heads_learn_shapes(run_framework: Callable[..., str], model: str) -> None:
    pytest.importorskip("mmcv.ops", reason="mmcv is not installed with its operators")
    found = losses(run_framework("mmdet", "--model", model, "--steps", "20"))
    assert len(found) == 2 and found[-1] < found[0]


@pytest.mark.slow
def test_mmdetections_retinanet_resumes_and_its_checkpoint_loads_without_mg_ops(
    run_framework: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("mmcv.ops", reason="mmcv is not installed with its operators")
    first = losses(run_framework("mmdet", "--steps", "16", "--out", str(tmp_path)))
    found = losses(run_framework("mmdet", "--steps", "40", "--out", str(tmp_path), "--resume"))
    assert len(first) == 2 and len(found) == 4 and found[0] == first[0] and found[-1] < found[0]
    file, weights = tmp_path / "retinanet_r18_fpn_1x_coco.py", tmp_path / "iter_40.pth"
    loaded = "import sys; sys.modules['mg_ops'] = None; import torch; from mmdet.apis import init_detector as init; "
    loaded += "own = {'model.bbox_head.type': 'RetinaHead'}; "
    loaded += f"model = init({str(file)!r}, device='cpu', palette='random', cfg_options=own); "
    loaded += f"print(model.load_state_dict(torch.load({str(weights)!r}, weights_only=False)['state_dict']))"
    assert "All keys matched" in run("-c", loaded).stdout


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
