"""An exported detector gives what PyTorch gives, in a program that knows nothing of this code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from detector import Detector, export

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def check_images(side: int, count: int) -> Tensor:
    """(count, 3, side, side) uint8, others than those that the export compares on."""
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (count, 3, side, side), np.uint8))


def assert_as_in_python(detector: Detector, images: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor) -> None:
    """The best detections, whose scores are well apart from where a rounding decides, are those of `Detector`."""
    for image, of_image in zip(images, zip(boxes, scores, labels, strict=True), strict=True):
        found = detector(image, score_threshold=0.05)
        count = int((of_image[1] > 0).sum())
        assert count == len(found["scores"]) > 0
        torch.testing.assert_close(of_image[1][:count], found["scores"], atol=1e-3, rtol=0)
        assert (of_image[2][count:] == -1).all() and (of_image[2][:count] >= 0).all()
        assert (of_image[0][count:] == 0).all()
        first = found["scores"].argmax()
        place = (of_image[0][:count] - found["boxes"][first]).abs().max(1).values.argmin()
        assert (of_image[0][place] - found["boxes"][first]).abs().max() < 0.1
        assert of_image[2][place] == found["labels"][first]


def test_onnx_and_torch_export_give_what_the_detector_gives(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "a.onnx", tmp_path / "a.pt2"]
    assert export.main(["--checkpoint", str(checkpoint), "--out", *map(str, files)]) == files
    assert capsys.readouterr().out.count("boxes equal PyTorch's") == 2
    detector = Detector.load(checkpoint, "cpu")
    session = onnxruntime.InferenceSession(files[0], providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == detector.class_names
    program = torch.export.load(files[1]).module()
    for count in (1, 3):
        images = check_images(detector.image_size, count)
        assert_as_in_python(detector, images, *map(torch.from_numpy, session.run(None, {"images": images.numpy()})))
        with torch.no_grad():
            assert_as_in_python(detector, images, *program(images))


def test_half_precision_and_weights_alone(checkpoint: Path, tmp_path: Path) -> None:
    half, weights = tmp_path / "half.onnx", tmp_path / "weights.safetensors"
    export.main(["--checkpoint", str(checkpoint), "--half", "--out", str(half), str(weights)])
    assert half.stat().st_size < 0.6 * weights.stat().st_size
    images = list(check_images(Detector.load(checkpoint, "cpu").image_size, 2))
    expected = Detector.load(checkpoint, "cpu")(images)
    for one, other in zip(Detector.load(weights, "cpu")(images), expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("boxes", "scores", "labels"))


def test_what_does_not_give_the_same_is_not_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "TOLERANCES", {False: (-1.0, -1.0), True: (-1.0, -1.0)})
    with pytest.raises(RuntimeError, match="differ from PyTorch's"):
        export.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "a.pt2")])
    assert not list(tmp_path.glob("*.pt2"))


def test_other_files_are_refused(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        export.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "a.engine")])
    assert (
        end.value.code == 2 and "--out: expected names that end in .onnx, .pt2, .safetensors" in capsys.readouterr().err
    )
