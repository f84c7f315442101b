"""`python -m detector.detect`: patterns, one decoding an image, pictures off the main thread, results as they come."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("supervision")

from detector import batches, detect
from detector.inference import Detections


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images in two folders, and what is no image."""
    random = np.random.default_rng(0)
    for name in ("a.jpg", "b.PNG", "c.jpg", "deep/a.jpg", "deep/er/d.jpg", "deep/e.bmp"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "deep" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def run(checkpoint: Path, out: Path, *inputs: object, **options: object) -> list[dict[str, Any]]:
    words = [*map(str, inputs), "--checkpoint", str(checkpoint), "--out", str(out), "--device", "cpu"]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    assert detect.main(words) == 0
    return list(json.loads((out / "detections.json").read_text()))


def test_patterns_name_images_and_nothing_else(photos: Path) -> None:
    def found(*inputs: Path) -> list[tuple[str, str]]:
        images = detect.find_images(list(inputs))
        return [(path.relative_to(photos).as_posix(), place.as_posix()) for path, place in images]

    assert found(photos / "*.jpg") == [("a.jpg", "a.jpg"), ("c.jpg", "c.jpg")]
    assert found(photos / "**" / "*") == found(photos)
    assert found(photos / "**" / "[ad].*") == [
        ("a.jpg", "a.jpg"),
        ("deep/a.jpg", "deep/a.jpg"),
        ("deep/er/d.jpg", "deep/er/d.jpg"),
    ]
    assert found(photos / "deep" / "*") == [("deep/a.jpg", "a.jpg"), ("deep/e.bmp", "e.jpg")]
    assert found(photos / "c.jpg", photos / "*.jpg") == [("c.jpg", "c.jpg"), ("a.jpg", "a.jpg")]
    with pytest.raises(ValueError, match=r"no image matches .*\*\.gif"):
        detect.find_images([photos / "*.gif"])
    with pytest.raises(ValueError, match=r"expected an image, a folder or a pattern .*there is no .*absent"):
        detect.find_images([photos / "absent"])
    odd = photos / "[1]"
    odd.mkdir()
    (photos / "a.jpg").rename(odd / "a.jpg")
    assert found(odd, odd / "a.jpg") == [("[1]/a.jpg", "a.jpg")]


@pytest.mark.parametrize(("pattern", "count"), [("", 6), ("**/*.jpg", 4)], ids=["folder", "pattern"])
def test_the_pictures_of_earlier_calls_are_no_images(
    pattern: str, count: int, photos: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(checkpoint, photos / "out", photos / pattern)
    capsys.readouterr()
    assert run(checkpoint, photos / "out", photos / pattern) == first and len(first) == count
    assert f"pictures of earlier calls, left out: {count} in" in capsys.readouterr().out


def test_each_image_is_decoded_once_and_drawn_off_the_main_thread(
    photos: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    drawn: list[threading.Thread] = []
    decode, draw = batches.decode, detect.draw_detections

    def counting_decode(path: Path) -> Any:
        decoded.append(path)
        return decode(path)

    def watching_draw(*arguments: Any) -> Image.Image:
        drawn.append(threading.current_thread())
        return draw(*arguments)

    monkeypatch.setattr(batches, "decode", counting_decode)
    monkeypatch.setattr("detector.images.decode", counting_decode)
    monkeypatch.setattr(detect, "draw_detections", watching_draw)
    records = run(checkpoint, tmp_path / "out", photos, workers=2, batch=2)
    assert sorted(decoded) == sorted(Path(record["file"]) for record in records) and len(decoded) == 6
    assert len(drawn) == 6 and threading.main_thread() not in drawn
    assert all((tmp_path / "out" / record["picture"]).is_file() for record in records)


def test_results_are_written_as_they_come(
    photos: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "out" / "detections.jsonl"
    detect_each, counts = detect.detect_each, []

    def looking(*arguments: Any, **options: Any) -> Iterator[Any]:
        for result in detect_each(*arguments, **options):
            counts.append(len([json.loads(line) for line in lines.read_text().splitlines()]))
            yield result

    monkeypatch.setattr(detect, "detect_each", looking)
    records = run(checkpoint, tmp_path / "out", photos, workers=0, batch=2)
    assert counts == list(range(6)) and len(records) == 6 and not lines.exists()


def test_a_small_picture_is_enlarged_so_that_its_labels_can_be_read() -> None:
    image = Image.new("RGB", (96, 80), (200, 200, 200))
    boxes = torch.tensor([[10.0, 40, 40, 70], [50, 45, 90, 75]])
    found = Detections(boxes, torch.tensor([0.9, 0.8]), torch.tensor([1, 0]))
    picture = detect.draw_detections(image.copy(), found, ["disc", "ÄÖ 红"])
    assert picture.size == (288, 240)
    pixels = np.array(picture).astype(int)
    for (x1, y1, x2, y2), label in zip((3 * boxes).int().tolist(), (1, 0), strict=True):
        color = np.array([int(detect.COLORS[label][place : place + 2], 16) for place in (1, 3, 5)])
        is_color = (abs(pixels - color) < 8).all(-1)
        assert is_color[y1 + 20 : y2, x1 - 1 : x1 + 2].any(1).all()  # the left edge, and the right
        assert is_color[y1 + 20 : y2, x2 - 2 : x2 + 2].any(1).all()
        above = is_color[y1 - 16 : y1, x1 : x1 + 40]  # the label, with white letters in it
        assert above.mean() > 0.25 and (pixels[y1 - 16 : y1, x1 : x1 + 40] > 225).all(-1).sum() > 10
    large = Image.new("RGB", (640, 400))
    assert detect.draw_detections(large, found, ["disc", "square"]).size == (640, 400)
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert detect.draw_detections(image, nothing, ["disc", "square"]).size == (288, 240)
    assert detect.draw_detections(Image.new("RGB", (66000, 8)), found, ["disc", "square"]).size == (66000, 8)


def test_the_colors_carry_white_text() -> None:
    """WCAG's contrast of 4.5 for text."""
    for color in detect.COLORS:
        parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 4.5, color
