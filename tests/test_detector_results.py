"""What is shown of a trained detector: annotated images and figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from small_data import write_voc

from detector import detect, visualize
from detector.run_log import read_log

pytestmark = pytest.mark.usefixtures("one_thread")


def test_detect_annotates_every_image_it_can_read_and_names_those_it_cannot(
    voc: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    image = voc / "JPEGImages" / "image_000.png"
    (tmp_path / "in" / "deeper" / "image_000.png").write_bytes(image.read_bytes())
    (tmp_path / "in" / "broken.png").write_bytes(b"broken")
    out = tmp_path / "out"
    common = ["--checkpoint", str(checkpoint), "--out", str(out), "--workers", "0", "--device", "cpu"]
    detect.main([str(tmp_path / "in"), str(image), str(image), *common])
    broken, *records = sorted(
        json.loads((out / "detections.json").read_text()), key=lambda record: "error" not in record
    )
    assert Path(broken["file"]).name == "broken.png" and broken["error"] == "cannot be decoded"
    assert [Path(record["file"]).name for record in records] == ["image_000.png", "image_000.png"]
    assert records[0]["objects"] == records[1]["objects"] != []
    for found in records[0]["objects"]:
        assert found["class"] in ("disc", "square") and found["score"] > 0.3
        x1, y1, x2, y2 = found["box"]
        assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 96
    for place in ("deeper/image_000.png", "image_000.png"):
        with Image.open(out / "images" / place) as annotated:
            assert annotated.size == (2 * 128, 2 * 96)  # enlarged, so that the labels can be read
    assert "1 images cannot be decoded" in capsys.readouterr().out


def test_images_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    """In several folders, or of several kinds in one."""
    for name in ("a/x.png", "b/x.png", "c/x.png", "d/y.bmp", "d/y.jpeg", "d/y.jpg", "d/y-2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    placed = [str(place) for _, place in detect.find_images([tmp_path / folder for folder in "abcd"])]
    assert placed[:3] == ["x.png", "x-2.png", "x-3.png"]
    assert len(set(placed)) == 7


@pytest.mark.parametrize(
    "figure",
    [
        "amplification --sigmas 1.5 2 3",
        "assignment --checkpoint {checkpoint} --data {voc} --count 2",
        "assignment --checkpoint {checkpoint} --data {voc} --split train --images image_001",
        "detections --checkpoints {checkpoint} {checkpoint} --data {voc} --count 2",
        "curves --runs {checkpoint}",
    ],
)
def test_figures_are_drawn(figure: str, voc: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "figure.png"
    words = [word.format(voc=voc, checkpoint=checkpoint) for word in figure.split()]
    visualize.main([*words, "--out", str(out), "--dpi", "60"])
    with Image.open(out) as image:
        assert min(image.size) > 150
        colors = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert len(colors) > 20  # not an empty sheet


@pytest.mark.parametrize(("suffix", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("jpg", b"\xff\xd8\xff")])
def test_figures_are_of_the_kind_their_suffix_says(suffix: str, start: bytes, tmp_path: Path) -> None:
    visualize.main(["amplification", "--out", str(tmp_path / f"figure.{suffix}")])
    assert (tmp_path / f"figure.{suffix}").read_bytes().startswith(start)


def test_a_run_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no log"):
        visualize.main(["curves", "--runs", str(tmp_path), "--out", str(tmp_path / "figure.png")])


def curve_labels(*runs: Path) -> list[str]:
    """The names in the legend of the curves of these runs."""
    figure = visualize.plot_curves(list(runs))
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_every_run_has_its_curve_also_in_folders_of_one_name(tmp_path: Path) -> None:
    runs = [tmp_path / folder / "mutual" for folder in ("seed0", "seed1")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "log.jsonl").write_text('{"step": 0, "epoch": 1, "loss": 3}\n')
    assert curve_labels(*runs) == [str(run) for run in runs]
    assert curve_labels(runs[0]) == ["mutual"]


def test_entries_of_a_log_that_are_not_whole_are_left_out_of_its_curve(tmp_path: Path) -> None:
    entries = ['{"step": 0, "epoch": 1, "loss": 3}', '{"step": 1, "loss": 2}', '{"step": 2, "epoch": 2, "loss": "x"}']
    (tmp_path / "log.jsonl").write_text("\n".join([*entries, '{"step": "3"}']))
    (line,) = visualize.plot_curves([tmp_path]).axes[0].lines
    assert line.get_xydata().tolist() == [[1, 3]]
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl")] == [0, 1, 2]


def test_names_with_dollar_signs_are_no_formulas(checkpoint: Path, tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"val": 1})
    for folder, suffix in (("JPEGImages", "png"), ("Annotations", "xml")):
        (root / folder / f"image_000.{suffix}").rename(root / folder / f"$1_$.{suffix}")
    (root / "ImageSets" / "Main" / "val.txt").write_text("$1_$")
    out = tmp_path / "figure.png"
    visualize.main(["assignment", "--checkpoint", str(checkpoint), "--data", str(root), "--out", str(out)])
    assert out.is_file()


def test_a_figure_names_the_image_that_cannot_be_decoded(checkpoint: Path, tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"val": 1})
    image = root / "JPEGImages" / "image_000.png"
    image.write_bytes(image.read_bytes()[:3000])
    with pytest.raises(OSError, match=r"image_000\.png: image that cannot be decoded: .*truncated"):
        visualize.main(
            ["assignment", "--checkpoint", str(checkpoint), "--data", str(root), "--out", str(tmp_path / "a.png")]
        )
