"""`python -m detector.export`: one command, and onnxruntime's boxes equal PyTorch's; so do those of `torch.export`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detector import Detector, export
from detector.checkpoint import save_atomically
from detector.detectors import make_detector
from detector.program import run_program

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZE = 128
"""Pixels. With three classes there are more than `MAX_CANDIDATES` (anchor, class) pairs."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with last.pt of a detector that finds something everywhere, and all that it is exported to."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = make_detector("fssd", "resnet18", SIZE, 3)
    for conv in model.head.classes:
        torch.nn.init.normal_(conv.weight, 0, 0.05)
        torch.nn.init.normal_(conv.bias, -3, 1)
    for conv in model.head.boxes:
        torch.nn.init.normal_(conv.weight, 0, 0.03)
    arguments = {"model": "fssd", "backbone": "resnet18", "image_size": SIZE, "strategy": "mutual"}
    content = {"step": 1, "model": model.state_dict(), "ema": None, "arguments": arguments}
    save_atomically({**content, "class_names": ["disc", "square", "Ä"]}, folder / "last.pt")
    files = [str(folder / name) for name in ("a.onnx", "a.pt2", "a.safetensors")]
    common = ["--checkpoint", str(folder), "--threshold", "0.2", "--max-detections", "40"]
    assert export.main([*common, "--out", *files]) == [Path(file) for file in files]
    export.main([*common, "--half", "--out", str(folder / "half.onnx"), str(folder / "half.pt2")])
    return folder


def some_images(count: int) -> Tensor:
    """Other images than those that the export itself compares on."""
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8))


def run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


def run_torch(path: Path, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(torch.export.load(path).module()(images))


def assert_found(outputs: list[Tensor], expected: list[dict[str, Tensor]]) -> None:
    """What was exported gives the boxes, scores and labels of `Detector`, and nothing after them."""
    boxes, scores, labels = outputs
    assert boxes.shape == (len(expected), 40, 4) and scores.shape == labels.shape == (len(expected), 40)
    for image, found in enumerate(expected):
        count = len(found["labels"])
        torch.testing.assert_close(scores[image, :count], found["scores"], rtol=0, atol=1e-4)
        torch.testing.assert_close(boxes[image, :count], found["boxes"], rtol=0, atol=0.01)
        assert labels[image, :count].equal(found["labels"])
        assert (scores[image, count:] == 0).all() and (labels[image, count:] == -1).all()
        assert (boxes[image, count:] == 0).all()


@pytest.mark.parametrize(("run", "name"), [(run_onnx, "a.onnx"), (run_torch, "a.pt2")])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_an_exported_detector_finds_what_the_detector_finds(run: Any, name: str, batch: int, exported: Path) -> None:
    images = some_images(batch)
    expected = Detector.load(exported, "cpu")(images, score_threshold=0.2, max_detections=40)
    assert isinstance(expected, list) and all(len(found["labels"]) > 10 for found in expected)
    assert_found(run(exported / name, images), expected)


@pytest.mark.parametrize(("run", "name"), [(run_onnx, "half.onnx"), (run_torch, "half.pt2")])
def test_a_half_precision_file_is_half_as_large_and_nearly_as_right(run: Any, name: str, exported: Path) -> None:
    full = (exported / name.replace("half", "a")).stat().st_size
    assert 0.45 < (exported / name).stat().st_size / full < 0.55
    images = some_images(2)
    _, scores, labels = run(exported / name, images)
    expected = Detector.load(exported, "cpu")(images, score_threshold=0.2, max_detections=40)
    for image, found in enumerate(expected):
        count = int((labels[image] >= 0).sum())
        assert abs(count - len(found["labels"])) <= 2
        common = min(count, len(found["labels"]))
        assert (scores[image, :common] - found["scores"][:common]).abs().max() < 0.03


@pytest.mark.parametrize("few", [0, 1, 2, 3])
def test_a_torch_program_takes_images_in_which_it_finds_little(few: int, exported: Path) -> None:
    """torchvision says of its NMS that it keeps at least two boxes."""
    program, images = torch.export.load(exported / "a.pt2").module(), some_images(2)
    with torch.no_grad():
        best = program(images)[1].flatten().sort(descending=True).values
        program.get_buffer("score_threshold").fill_(best[few].item())
        _, scores, labels = program(images)
    assert (scores > 0).sum() == (labels >= 0).sum() == few
    assert scores.flatten().sort(descending=True).values[:few].equal(best[:few])


def test_a_torch_program_runs_without_this_code(exported: Path, tmp_path: Path) -> None:
    program = (
        "import sys, torch, torchvision\n"
        "extra = {'class_names': '', 'image_size': ''}\n"
        "module = torch.export.load(sys.argv[1], extra_files=extra).module()\n"
        "boxes, scores, labels = module(torch.load(sys.argv[2]))\n"
        "assert not {'detector', 'mg_ops'} & sys.modules.keys()\n"
        "print(extra['class_names'], extra['image_size'], boxes.shape[0], int((labels >= 0).sum()))"
    )
    images = some_images(3)
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-W", "ignore", "-c", program, str(exported / "a.pt2"), str(tmp_path / "images.pt")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    count = int((run_onnx(exported / "a.onnx", images)[2] >= 0).sum())
    assert printed.split("] ")[1].split() == [str(SIZE), "3", str(count)]


def test_an_onnx_file_says_what_it_is(exported: Path) -> None:
    session = onnxruntime.InferenceSession(str(exported / "a.onnx"), providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == ["disc", "square", "Ä"] and about["image_size"] == str(SIZE)
    assert (about["score_threshold"], about["precision"]) == ("0.2", "float32")
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [3, SIZE, SIZE])
    outputs = [(output.name, output.type, output.shape[1:]) for output in session.get_outputs()]
    assert outputs == [
        ("boxes", "tensor(float)", [40, 4]),
        ("scores", "tensor(float)", [40]),
        ("labels", "tensor(int64)", [40]),
    ]
    assert b"detector/export.py" not in (exported / "a.onnx").read_bytes()


def test_exported_weights_are_the_detector(exported: Path) -> None:
    images = some_images(1)
    one, other = (Detector.load(exported / name, "cpu")(images)[0] for name in ("last.pt", "a.safetensors"))
    assert all(one[name].equal(other[name]) for name in one)


# ---- The comparison


def reference_and_images(exported: Path) -> tuple[export.ExportedDetector, Tensor]:
    reference = export.ExportedDetector(Detector.load(exported, "cpu").model, SIZE, 0.2, 40)
    return reference, export.make_check_images(SIZE, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda outputs, boxes, scores: (outputs, boxes, scores), None),
        (lambda outputs, boxes, scores: (outputs, boxes + 1, scores), "differ from PyTorch's by 1 pixels"),
        (lambda outputs, boxes, scores: (outputs, boxes, scores * 0.9), "scores by 0.0"),
        (lambda outputs, boxes, scores: (outputs, boxes, scores * torch.nan), "other candidates"),
        (lambda outputs, boxes, scores: (outputs, boxes * torch.nan, scores), "by nan pixels"),
        (lambda outputs, boxes, scores: ((outputs[0], outputs[1], outputs[2].roll(1, 1)), boxes, scores), "its NMS"),
        (lambda outputs, boxes, scores: ((outputs[0] + 1e-3, *outputs[1:]), boxes, scores), "its NMS"),
    ],
    ids=["same", "boxes", "scores", "NaN scores", "NaN boxes", "labels", "selected boxes"],
)
def test_a_difference_from_pytorch_is_an_error(change: Any, message: str | None, exported: Path) -> None:
    reference, images = reference_and_images(exported)

    def run(batch: Tensor, threshold: float) -> Any:
        assert reference.score_threshold == threshold
        decoded = reference.decode(batch)
        return change(reference.select(*decoded), *decoded)

    with torch.no_grad():
        if message is None:
            found = export.compare(reference, False, run, images)
            assert int(found.split()[0]) >= 40 and "in batches of 1 and 3" in found
        else:
            with pytest.raises(RuntimeError, match=message):
                export.compare(reference, False, run, images)


def test_what_differs_is_not_written(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differs(*arguments: Any) -> str:
        raise RuntimeError("boxes differ")

    monkeypatch.setattr(export, "compare", differs)
    words = ["--checkpoint", str(exported), "--out", str(tmp_path / "a.pt2")]
    with pytest.raises(SystemExit) as end:
        run_program(lambda: export.main(words))
    assert end.value.code == 1 and list(tmp_path.iterdir()) == []
    assert f"{tmp_path / 'a.pt2'} is not written: boxes differ" in capsys.readouterr().err


def test_images_that_are_given_are_compared_on(tmp_path: Path) -> None:
    for number in range(2):
        Image.new("RGB", (40 + number, 30), (number * 90, 10, 200)).save(tmp_path / f"{number}.png")
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    images = export.make_check_images(64, paths)
    assert images.shape == (2, 3, 64, 64) and images[1, :, 0, 0].tolist() == [90, 10, 200]


def test_a_format_that_is_not_known_is_refused_before_the_work(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        export.main(["--checkpoint", str(exported), "--out", str(tmp_path / "a.engine")])
    assert end.value.code == 2 and "expected names that end in .onnx, .pt2, .safetensors" in capsys.readouterr().err
