"""Pixels are read the right way up and in 8 bits, and boxes lie where they were annotated, or are left out."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from small_data import write_coco, write_voc

from detector import visualize
from detector.augment import TrainingTransform
from detector.batches import EvaluationImages, TrainingImages, decode_all
from detector.data import load_image, read_coco, read_voc
from detector.detectors import make_detector
from detector.evaluate import evaluate
from detector.images import TURNS, Placement, decode, decode_image, place_annotation, read_image_size
from detector.inference import NOT_FINITE, detect

SIZE = (40, 30)
BOX = (4, 6, 14, 11)
"""Of the image as stored: (x1, y1, x2, y2), filled with white."""


def write_turned(path: Path, orientation: int, size: tuple[int, int] = SIZE) -> Path:
    """A PNG with a white box and an EXIF orientation."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    x1, y1, x2, y2 = BOX
    pixels[y1:y2, x1:x2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def white_box(pixels: torch.Tensor) -> list[int]:
    """(x1, y1, x2, y2) of what is white in an image (3, H, W)."""
    y, x = (pixels[0] > 127).nonzero().unbind(1)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_annotated_in_the_image_as_stored_turn_with_it(tmp_path: Path, orientation: int) -> None:
    """The pixels are turned by Pillow, the boxes by us: they must meet."""
    decoded = decode(write_turned(tmp_path / "a.png", orientation))
    assert decoded.orientation == orientation
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(decoded.pixels.permute(1, 2, 0).numpy(), np.array(ImageOps.exif_transpose(image)))
    height, width = decoded.pixels.shape[-2:]
    assert read_image_size(tmp_path / "a.png") == (width, height)
    placement = Placement(SIZE, (width, height), TURNS[orientation])
    boxes = torch.tensor([BOX], dtype=torch.float32)
    assert placement.to_image(boxes).tolist() == [white_box(decoded.pixels)]
    assert placement.to_annotation(placement.to_image(boxes)).equal(boxes)


def test_boxes_are_scaled_with_the_image_and_back() -> None:
    placement = Placement((80, 60), (30, 40), TURNS[6])
    box = torch.tensor([[8.0, 12.0, 28.0, 22.0]])  # twice (4, 6, 14, 11), in an image of 40 x 30 as stored
    assert placement.to_image(box).tolist() == [[30 - 11, 4, 30 - 6, 14]]
    torch.testing.assert_close(placement.to_annotation(placement.to_image(box)), box)


@pytest.mark.parametrize(
    ("annotated", "image", "orientation", "turned", "note"),
    [
        ((40, 30), (40, 30), 1, False, None),
        ((30, 40), (30, 40), 6, False, None),  # annotated the right way up
        ((40, 30), (30, 40), 6, True, "boxes turned with it"),  # annotated as stored
        ((40, 30), (40, 30), 3, False, "with boxes that may not be"),  # the size does not tell
        ((40, 40), (40, 40), 8, False, "with boxes that may not be"),
        ((80, 60), (40, 30), 1, False, "boxes scaled"),
        ((60, 80), (30, 40), 6, False, "boxes scaled"),
        ((80, 60), (30, 40), 6, True, "turned with it and scaled"),
        ((500, 333), (250, 166), 1, False, "boxes scaled"),  # 166.5, cut
        ((500, 333), (250, 167), 1, False, "boxes scaled"),
    ],
)
def test_the_annotated_size_says_where_the_boxes_are(
    annotated: tuple[int, int], image: tuple[int, int], orientation: int, turned: bool, note: str | None
) -> None:
    placement = place_annotation(annotated, image, orientation)
    assert placement is not None
    assert placement.turn == TURNS[orientation if turned else 1]
    assert (placement.notes == ()) if note is None else (note in placement.notes[0])


@pytest.mark.parametrize(
    ("annotated", "image", "orientation"),
    [((40, 30), (30, 40), 1), ((640, 480), (512, 512), 1), ((80, 60), (40, 30), 3), ((80, 80), (40, 40), 6)],
)
def test_where_the_sizes_do_not_tell_the_image_is_left_out(
    annotated: tuple[int, int], image: tuple[int, int], orientation: int
) -> None:
    assert place_annotation(annotated, image, orientation) is None


def test_training_sees_boxes_where_the_objects_are(tmp_path: Path) -> None:
    """Images stored at half the annotated size, turned, and at another shape."""
    root = write_coco(tmp_path, {"train": 4})
    half, turned, other = (root / "train" / f"{number:012d}.jpg" for number in (1, 2, 3))
    with Image.open(half) as image:
        image.resize((64, 48)).save(half)
    with Image.open(turned) as image:
        upright = image.copy()
    exif = Image.Exif()
    exif[0x0112] = 8
    upright.transpose(Image.Transpose.ROTATE_270).save(turned, exif=exif, quality=95)  # annotated the right way up
    with Image.open(other) as image:
        image.resize((64, 64)).save(other)
    data = read_coco(root, "train")
    loaded = [load_image(image, decode(image.path)) for image in data.images]
    assert loaded[0].boxes.equal(data.images[0].boxes / 2) and loaded[0].pixels.shape == (3, 48, 64)
    assert loaded[1].boxes.equal(data.images[1].boxes) and loaded[1].pixels.shape == (3, 96, 128)
    assert (loaded[1].pixels.float() - torch.from_numpy(np.array(upright)).permute(2, 0, 1)).abs().mean() < 8
    assert loaded[2] is None
    for decoded in (None, decode_all(data)):
        images = TrainingImages(data, TrainingTransform(64), 0, decoded)
        assert images[0, 0].defects == [("image of another size than annotated: boxes scaled", data.images[0].name)]
        assert images[1, 0].defects == []
        sample = images[2, 0]
        assert sample.image_name == data.images[3].name
        kind = "image of other proportions than annotated: the next one trained on in its place"
        assert sample.defects == [(kind, data.images[2].name)]


def test_detections_come_back_in_the_image_as_annotated(tmp_path: Path) -> None:
    """So that they can be scored against the annotation file; without annotations, in the image the right way up."""
    path = write_turned(tmp_path / "a.png", 6, (64, 48))  # 48 x 64 the right way up
    torch.manual_seed(0)
    model = make_detector("fssd", "resnet18", 64, 1).eval()
    for conv in model.head.classes:
        torch.nn.init.normal_(conv.bias, -1, 1)
    upright, left_out = detect(model, [path], 64, "cpu", num_workers=0, show_progress=False)
    assert left_out == {} and len(upright[0].boxes) > 0
    assert upright[0].boxes[:, 2].max() <= 48 < upright[0].boxes[:, 3].max() <= 64
    as_stored, _ = detect(model, [path], 64, "cpu", num_workers=0, show_progress=False, annotated_sizes=[(64, 48)])
    placement = Placement((64, 48), (48, 64), TURNS[6])
    torch.testing.assert_close(as_stored[0].boxes, placement.to_annotation(upright[0].boxes))
    assert as_stored[0].notes == ("image turned by EXIF, annotated as stored: boxes turned with it",)


def test_evaluation_and_pictures_say_what_they_scaled_and_left_out(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"val": 3})
    paths = [root / "JPEGImages" / f"image_{number:03d}.png" for number in range(3)]
    with Image.open(paths[0]) as image:
        image.resize((256, 192)).save(paths[0])
    with Image.open(paths[1]) as image:
        image.resize((96, 96)).save(paths[1])
    data = read_voc(root, "val")
    model = make_detector("fssd", "resnet18", 64, 2)
    metrics, _ = evaluate(model, data, 64, "cpu", num_workers=0, show_progress=False)
    assert metrics["images"] == 2 and metrics["images_left_out"] == ["image_001"]
    assert data.defects.counts() == {
        "image of another size than annotated: boxes scaled": 1,
        "image of other proportions than annotated: left out of the evaluation": 1,
    }
    assert visualize.load(data.images[0]).boxes.equal(data.images[0].boxes * 2)
    with pytest.raises(OSError, match=r"image_001\.png: image of other proportions than annotated"):
        visualize.load(data.images[1])


def test_perfect_detections_of_images_of_another_size_score_one(tmp_path: Path) -> None:
    """A detector that sees the image as it is stored: what it finds is scored in the annotation's pixels."""
    root = write_coco(tmp_path, {"val": 1})
    file = root / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["images"][0].update(width=256, height=192)
    for entry in content["annotations"]:
        entry["bbox"] = [2 * value for value in entry["bbox"]]
    file.write_text(json.dumps(content))
    data = read_coco(root, "val")
    sample = EvaluationImages([data.images[0].path], 64, [(256, 192)])[0]
    loaded = load_image(data.images[0], decode(data.images[0].path))
    torch.testing.assert_close(sample.placement.to_annotation(loaded.boxes), data.images[0].boxes)


# ---------------------------------------------------------------------------------------------------------------------
# Depth


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 96 * 128).reshape(96, 128).astype(np.uint16)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        decoded = decode(tmp_path / name)
        assert decoded.pixels.shape == (3, 96, 128) and decoded.notes == (
            "image of 16 bits per channel: scaled to 8 bits",
        )
        assert np.array_equal(decoded.pixels[1].numpy(), (ramp // 256).astype(np.uint8))
    Image.fromarray(ramp // 32).save(tmp_path / "dark.png")
    assert "nearly black" in decode(tmp_path / "dark.png").notes[0]


def test_fractions_become_eight_bits_and_other_floats_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.25], [0.5, 1]], dtype=np.float32)).save(tmp_path / "a.tif")
    assert decode(tmp_path / "a.tif").pixels[0].tolist() == [[0, 64], [128, 255]]
    for name, value in (("kelvin.tif", 300.0), ("negative.tif", -0.5), ("nan.tif", float("nan"))):
        Image.fromarray(np.array([[0, value]], dtype=np.float32)).save(tmp_path / name)
        with pytest.raises(OSError, match="expected 0 to 1; convert it to 8 bits"):
            decode(tmp_path / name)
    Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(OSError, match="expected at most 16 bits"):
        decode(tmp_path / "wide.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_eight_bits_in_every_mode_are_what_pillow_makes_of_them(tmp_path: Path, mode: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    noise.save(path)
    with Image.open(path) as image:
        expected = np.array(image.convert("RGB"))
    decoded = decode(path)
    assert decoded.notes == () and np.array_equal(decoded.pixels.permute(1, 2, 0).numpy(), expected)


def test_whatever_a_decoder_raises_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "a.png"
    write_turned(picture, 1)
    content = picture.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(300):
        damaged = bytearray(content[: rng.integers(1, len(content) + 1)])
        for _ in range(int(rng.integers(0, 6))):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        (tmp_path / f"{trial}.png").write_bytes(damaged)
        try:
            assert decode_image(tmp_path / f"{trial}.png").dtype == torch.uint8
        except OSError:
            pass
    for error in (RuntimeError("codec"), SyntaxError("chunk"), MemoryError(), KeyError(7)):

        def fail(path: Path, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image, "open", fail)
        with pytest.raises(OSError):
            decode(picture)
        assert read_image_size(picture) is None


def test_an_image_beyond_pillows_limit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_turned(tmp_path / "a.png", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # the image has 1200
    with pytest.raises(OSError, match="more pixels than Pillow reads"):
        decode(tmp_path / "a.png")


def test_a_network_that_has_diverged_is_named(tmp_path: Path) -> None:
    path = write_turned(tmp_path / "a.png", 1, (64, 48))
    model = make_detector("fssd", "resnet18", 64, 1)
    torch.nn.init.constant_(model.head.classes[0].bias, float("nan"))
    found, _ = detect(model, [path], 64, "cpu", num_workers=0, show_progress=False)
    assert found[0].notes == (NOT_FINITE,)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_has_the_size_that_it_is_decoded_in(tmp_path: Path, orientation: int) -> None:
    """Pillow turns a TIFF itself, and its size before it is read."""
    path = write_turned(tmp_path / "a.tif", orientation)
    decoded = decode(path)
    assert decoded.orientation == orientation
    assert read_image_size(path) == (decoded.pixels.shape[2], decoded.pixels.shape[1])


def write_png_of_16_bits(path: Path, value: int, color_type: int, channels: int) -> None:
    """A PNG of 4 x 4 pixels of one value; Pillow writes none of several channels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = 4 * (b"\0" + struct.pack(">H", value) * 4 * channels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, color_type, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_in_any_channels_are_8_and_noted(tmp_path: Path, color_type: int, channels: int) -> None:
    for value, note in ((30 * 256 + 200, "scaled to 8 bits"), (4095, "nearly black")):
        write_png_of_16_bits(tmp_path / "a.png", value, color_type, channels)
        decoded = decode(tmp_path / "a.png")
        assert decoded.pixels.unique().tolist() == [value // 256]
        assert [text.endswith(note) for text in decoded.notes] == [True]


def test_a_color_image_of_16_bits_in_netpbm_is_noted(tmp_path: Path) -> None:
    (tmp_path / "a.ppm").write_bytes(b"P6 4 4 65535\n" + b"\x40\x00" * 48)
    decoded = decode(tmp_path / "a.ppm")
    assert decoded.pixels.unique().tolist() == [64] and len(decoded.notes) == 1
    (tmp_path / "a.ppm").write_bytes(b"P6 4 4 255\n" + b"\x40" * 48)
    assert decode(tmp_path / "a.ppm").notes == ()
