"""`Detector.load(path)(images)`: any form of images in, torchvision's dictionaries out; wrong ones are named."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detector import Detector, inference
from detector.checkpoint import read_checkpoint, save_atomically, save_best, save_weights
from detector.inference import detect, run_ahead
from mg_ops.boxes import BoxCoder

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def best(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pt and best.safetensors of a detector that finds something everywhere."""
    folder = tmp_path_factory.mktemp("run")
    save_best({**read_checkpoint(checkpoint), "step": 7, "optimizer": {}, "data": None}, 0.5, folder)
    return folder / "best.pt"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 50 x 40 pixels."""
    path = tmp_path_factory.mktemp("images") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


def assert_same(found: Any, expected: dict[str, Tensor]) -> None:
    assert found.keys() == {"boxes", "scores", "labels"}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_every_form_of_an_image_gives_the_same(best: Path, picture: Path) -> None:
    detector = Detector.load(best, "cpu")
    assert detector.class_names == ["disc", "square"] and detector.image_size == 64
    image = Image.open(picture).convert("RGB")
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = detector(picture)
    assert isinstance(expected, dict) and len(expected["labels"]) > 5
    assert [expected[name].dtype for name in ("boxes", "scores", "labels")] == [torch.float32] * 2 + [torch.int64]
    for form in (
        str(picture),
        image,
        image.convert("RGBA"),
        array,
        array[::-1][::-1],
        tensor,
        tensor / 255,
        array / 255,
    ):
        assert_same(detector(form), expected)
    for batch in ([picture, tensor], (array, image), np.stack([array] * 2), torch.stack([tensor] * 2)):
        for batch_size in (1, 16):
            found = detector(batch, batch_size=batch_size)
            assert isinstance(found, list) and len(found) == 2
            for of_image in found:
                assert_same(of_image, expected)
    assert detector([]) == []


def test_an_image_of_pillows_is_seen_as_its_file_is(best: Path, tmp_path: Path) -> None:
    """Turned as EXIF says, and of 16 bits the upper 8."""
    detector, random = Detector.load(best, "cpu"), np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(random.integers(0, 65536, (40, 50), dtype=np.uint16)).save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        found = detector(tmp_path / name)
        assert isinstance(found, dict) and len(found["labels"]) > 5
        with Image.open(tmp_path / name) as image:
            assert_same(detector(image), found)
    with pytest.raises(ValueError, match=r"^images: floating values from 5 to 5: expected 0 to 1"):
        detector(Image.new("F", (4, 4), 5.0))


@pytest.mark.filterwarnings("error")
def test_an_array_that_cannot_be_written_to_is_an_image(best: Path, picture: Path) -> None:
    with Image.open(picture) as image:
        array = np.asarray(image)
    assert not array.flags.writeable
    assert_same(Detector.load(best, "cpu")(array), Detector.load(best, "cpu")(picture))  # type: ignore[arg-type]


def test_boxes_are_in_pixels_of_each_image(best: Path, picture: Path) -> None:
    """Of the image as given, not of the network's input: the same as `detector.detect` finds, and within the image."""
    detector = Detector.load(best, "cpu")
    with Image.open(picture) as image:
        large = image.resize((500, 120))
    found = detector([picture, large], score_threshold=0.1, max_detections=20)
    assert isinstance(found, list)
    by_path, _ = detect(
        detector.model, [picture], 64, "cpu", score_threshold=0.1, max_detections=20, show_progress=False
    )
    assert_same(found[0], {name: getattr(by_path[0], name) for name in ("boxes", "scores", "labels")})
    for of_image, size in zip(found, ((50, 40), (500, 120)), strict=True):
        assert len(of_image["scores"]) == 20 and (of_image["scores"].diff() <= 0).all()
        assert of_image["boxes"].min() >= 0 and (of_image["boxes"][:, 2:] <= torch.tensor(size)).all()
    assert found[1]["boxes"][:, 2].max() > 200


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (
            torch.zeros(40, 50, 3, dtype=torch.uint8),
            ValueError,
            r"tensor \(3, H, W\), RGB, got the shape \(40, 50, 3\)",
        ),
        (np.zeros((3, 40, 50), np.uint8), ValueError, r"array \(H, W, 3\), RGB, got the shape \(3, 40, 50\)"),
        (np.zeros((40, 50), np.uint8), ValueError, r"array \(H, W, 3\).* got the shape \(40, 50\)"),
        (np.zeros((40, 50, 4), np.uint8), ValueError, r"got the shape \(40, 50, 4\)"),
        (torch.zeros(3, 0, 5, dtype=torch.uint8), ValueError, r"got the shape \(3, 0, 5\)"),
        (
            torch.full((3, 4, 5), 255.0),
            ValueError,
            r"from 0 to 1, got 255 to 255; values up to 255 are expected as uint8",
        ),
        (torch.full((3, 4, 5), -0.5), ValueError, r"from 0 to 1, got -0\.5"),
        (torch.full((3, 4, 5), torch.nan), ValueError, "from 0 to 1, got nan"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), ValueError, r"expected uint8.*got torch\.int64"),
        (np.zeros((4, 5, 3), np.int16), ValueError, r"expected uint8.*got torch\.int16"),
        (np.zeros((4, 5, 3), object), ValueError, "expected an array of uint8.*got object"),
        (3, TypeError, "paths, PIL images, arrays or tensors, got int"),
        ([None], TypeError, "got NoneType"),
        ("absent.png", OSError, "^absent.png: No such file"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, error: type[Exception], message: str, best: Path) -> None:
    with pytest.raises(error, match=message) as raised:
        Detector.load(best, "cpu")(image)
    assert "\n" not in str(raised.value)


def test_importing_the_package_imports_nothing_large() -> None:
    program = "import sys, detector; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)
    with pytest.raises(ImportError, match="cannot import name 'Absent'"):
        from detector import Absent  # type: ignore[attr-defined]  # noqa: F401


# ---- best.pt and safetensors


def test_safetensors_hold_the_same_detector(best: Path, picture: Path) -> None:
    expected = Detector.load(best, "cpu")(picture)
    detector = Detector.load(best.with_suffix(".safetensors"), "cpu")
    assert detector.class_names == ["disc", "square"]
    assert isinstance(expected, dict)
    assert_same(detector(picture), expected)
    content = read_checkpoint(best.with_suffix(".safetensors"))
    assert (content["step"], content["AP"]) == (7, 0.5) and content["arguments"]["strategy"] == "mutual"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"no weights",
        lambda data: b"",
        lambda data: data.replace(b'"detector"', b'"detectof"'),
        lambda data: data.replace(b"class_names", b"class_nemes"),
    ],
    ids=["cut", "other", "empty", "no description", "no classes"],
)
def test_other_safetensors_are_one_line_that_names_the_file(
    spoil: Callable[[bytes], bytes], best: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(spoil(best.with_suffix(".safetensors").read_bytes()))
    with pytest.raises(ValueError, match=f"^checkpoint: {re.escape(str(path))}") as raised:
        Detector.load(path, "cpu")
    assert "\n" not in str(raised.value)


def test_best_is_the_highest_ap_and_holds_the_weights_that_were_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    for step, (ap, kept) in enumerate([(None, 0), (0.0, 1), (0.4, 2), (0.3, 2), (0.4, 2), (None, 2), (0.5, 6)]):
        content = {"model": {"weight": torch.zeros(2)}, "ema": {"weight": torch.full((2,), float(step))}, "data": None}
        content |= {"step": step, "arguments": {}, "class_names": ["a"], "optimizer": {}, "scaler": {}, "held_out": [1]}
        save_best(content, ap, tmp_path)
        for file in (path, path.with_suffix(".safetensors")):
            best = read_checkpoint(file)
            assert best["step"] == kept and best["model"]["weight"].tolist() == [kept, kept]
    best = read_checkpoint(path)
    assert not best.keys() & {"optimizer", "scaler"} and best["ema"] is None and best["held_out"] == [1]
    path.write_bytes(b"cut off")
    save_best(content, 0.1, tmp_path)
    assert read_checkpoint(path)["AP"] == 0.1


def test_saving_weights_leaves_the_old_file_when_it_fails(
    best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    content = read_checkpoint(best)
    save_weights(content, path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=re.escape(str(path))):
        save_weights({**content, "step": 8}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ---- How detecting goes


def test_threads_give_results_in_order_and_the_first_error_in_its_place() -> None:
    def square(number: int) -> int:
        if number == 7:
            raise RuntimeError("seven")
        return number * number

    threads = torch.get_num_threads()
    for num_threads in (0, 1, 3):
        results = run_ahead(square, range(20), num_threads)
        assert [next(results) for _ in range(7)] == [number * number for number in range(7)]
        with pytest.raises(RuntimeError, match="seven"):
            next(results)
        assert torch.get_num_threads() == threads
        results = run_ahead(square, range(6), num_threads)
        assert next(results) == 0
        results.close()
        assert torch.get_num_threads() == threads


def test_nothing_depends_on_threads_batches_and_large_images(
    best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(1)
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for number, path in enumerate(paths):
        Image.fromarray(random.integers(0, 256, (30 + number, 60, 3), dtype=np.uint8)).save(path)
    paths[3].write_bytes(b"no image")
    model = Detector.load(best, "cpu").model.train()
    seen: list[tuple[int, tuple[int, ...]]] = []

    def look(index: int, detections: inference.Detections, pixels: Tensor) -> inference.Detections:
        seen.append((index, tuple(pixels.shape)))
        return detections

    options: dict[str, Any] = {"score_threshold": 0.1, "show_progress": False, "use": look}
    one_by_one = list(inference.detect_each(model, paths, 64, "cpu", batch_size=1, num_workers=0, **options))
    assert [index for index, _ in one_by_one] == list(range(7)) and model.training
    assert seen == [(number, (3, 30 + number, 60)) for number in range(7) if number != 3]
    assert one_by_one[3][1].startswith("image that cannot be decoded: ")
    for num_workers, batch_size, held in ((2, 3, 2**28), (3, 7, 2**28), (1, 7, 12_000)):
        monkeypatch.setattr(inference, "MAX_HELD", held)
        seen.clear()
        found = inference.detect_each(
            model, paths, 64, "cpu", batch_size=batch_size, num_workers=num_workers, **options
        )
        for (index, detections), (expected_index, expected) in zip(found, one_by_one, strict=True):
            assert index == expected_index
            if index == 3:
                assert detections == expected
            else:
                torch.testing.assert_close(detections.boxes, expected.boxes)
                assert detections.labels.equal(expected.labels)
        assert len(seen) == 6


def test_only_candidates_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding every anchor took longer than the rest of the selection."""
    decoded = []
    decode = BoxCoder.decode

    def counting(self: BoxCoder, *, anchors: Tensor, deltas: Tensor) -> Tensor:
        decoded.append(len(anchors))
        return decode(self, anchors=anchors, deltas=deltas)

    monkeypatch.setattr(BoxCoder, "decode", counting)
    logits = torch.full((2, 1000, 3), -9.0)
    logits[0, 5, 1] = logits[1, 9, 2] = logits[1, 9, 0] = 2
    anchors = torch.tensor([1.0, 1, 20, 20]) + torch.arange(1000.0)[:, None] / 50
    found = inference.select_detections(logits, torch.zeros(2, 1000, 4), anchors, 64)
    assert [image.labels.tolist() for image in found] == [[1], [0, 2]] and decoded == [3]


def test_the_candidates_of_an_image_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "MAX_CANDIDATES", 3)
    logits = torch.tensor([[[0.0], [1], [2], [3], [1]], [[0.0], [-99], [-99], [5], [-99]]])
    anchors = torch.arange(5.0)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    found = inference.select_detections(logits, torch.zeros(2, 5, 4), anchors, 64)
    # The third and the fourth have one score.
    assert [image.boxes[:, 0].tolist() for image in found] == [[30, 20, 10, 40], [30, 0]]


def test_a_checkpoint_that_is_no_best_is_loaded_from_its_folder(best: Path, tmp_path: Path) -> None:
    save_atomically(read_checkpoint(best), tmp_path / "last.pt")
    assert Detector.load(tmp_path, "cpu").class_names == ["disc", "square"]
