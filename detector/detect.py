"""Runs a trained detector over images: annotated images and a JSON file out."""

from __future__ import annotations

import argparse
import functools
import glob
import os
import threading
import warnings
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from detector.annotations import is_file
from detector.checkpoint import load_detector
from detector.images import IMAGE_SUFFIXES
from detector.inference import Detections, detect_each
from detector.outputs import growing_list, prepare_folder
from detector.program import default_device, device_name, explain, real_number, run_program, whole_number

MAX_JPEG_SIDE = 65500
"""Pixels of the widest and highest image that JPEG holds, in libjpeg."""

LEGIBLE_SIDE = 320
"""Pixels that a picture's longer side is enlarged to, at most."""

COLORS = ["#0072b2", "#b33c00", "#00704f", "#9c3f75", "#7a5c00", "#4b4fc4", "#a3262a", "#2f6f7a", "#5d5d5d", "#7b3fa0"]
"""Of the classes, in turn: dark enough for white text on them."""


def claim_name(place: Path, taken: set[Path]) -> Path:
    """This path, or with a number if it is taken; takes it."""
    number, free = 1, place
    while free in taken:
        number += 1
        free = place.with_stem(f"{place.stem}-{number}")
    taken.add(free)
    return free


def whole_path(path: Path) -> Path:
    """The same for every way to write a path; links are not followed."""
    return Path(os.path.normpath(path.absolute()))


def find_images(inputs: list[Path], pictures: Path | None = None) -> list[tuple[Path, Path]]:
    """Images, folders and patterns -> (image, path of its picture in the output folder), each image once, in order.

    PNG becomes PNG, everything else JPEG; no two have the same path.

    Args:
        inputs: images, folders of images, and patterns of image files such as `photos/**/*.jpg`.
        pictures: the folder of the pictures. Where a folder has it in it, what earlier calls drew there is left out.

    Raises:
        ValueError: an input does not exist, or there is no image at all.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    drawn = whole_path(pictures) if pictures is not None else None
    for given in inputs:
        if is_file(given):
            found.setdefault(whole_path(given), (given, Path(given.name)))
            continue
        folder, pattern = given, "**/*"
        if not given.is_dir():
            is_fixed = [not glob.has_magic(part) for part in given.parts]
            if all(is_fixed):
                raise ValueError(
                    f"expected an image, a folder or a pattern such as 'photos/*.jpg'; there is no {given}"
                )
            split = is_fixed.index(False)
            folder, pattern = Path(*given.parts[:split]), str(Path(*given.parts[split:]))
        named = (path for path in folder.glob(pattern) if path.suffix.lower() in IMAGE_SUFFIXES)
        # A link to nothing is an image that is missing, which the results then say.
        files = sorted({path for path in named if path.is_file() or (path.is_symlink() and not path.exists())})
        if not files and pattern != "**/*":
            raise ValueError(f"no image matches {given}")
        if drawn is not None and whole_path(folder) in drawn.parents:
            earlier = {path for path in files if drawn in whole_path(path).parents}
            if earlier:
                print(f"pictures of earlier calls, left out: {len(earlier)} in {pictures}")
            files = [path for path in files if path not in earlier]
        for path in files:
            found.setdefault(whole_path(path), (path, path.relative_to(folder)))
    if not found:
        raise ValueError(
            f"no image with a suffix of {', '.join(sorted({s.lower() for s in IMAGE_SUFFIXES}))} was found"
        )
    taken: set[Path] = set()
    return [
        (path, claim_name(place.with_suffix(".png" if place.suffix.lower() == ".png" else ".jpg"), taken))
        for path, place in found.values()
    ]


@functools.cache
def make_annotators(font_size: int) -> tuple[Any, Any]:
    """What draws boxes, and labels beside them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends OpenCV, which draws these boxes no better
        import supervision

    from matplotlib import font_manager

    palette, font = supervision.ColorPalette.from_hex(COLORS), font_manager.findfont("DejaVu Sans")
    labels = supervision.RichLabelAnnotator(
        palette, font_path=font, font_size=font_size, text_padding=max(font_size // 6, 1), smart_position=True
    )
    return supervision.BoxAnnotator(palette, thickness=max(font_size // 6, 1)), labels


def draw_detections(image: Image.Image, detections: Detections, class_names: list[str]) -> Image.Image:
    """The image with a box and a label for each detection, a color for each class.

    A small one is enlarged by a whole factor: labels that can be read would hide what is in it.
    """
    factor = max(LEGIBLE_SIDE // max(image.size), 1)
    image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    if len(detections.labels) == 0:
        return image
    boxes, labels = make_annotators(max(round(min(image.size) / 32), 12))
    from supervision import Detections as Drawn

    # Best last, on top of the others.
    drawn = Drawn(factor * detections.boxes.flip(0).numpy(), class_id=detections.labels.flip(0).numpy())
    captions = [
        f"{class_names[label]} {score:.2f}"
        for label, score in zip(detections.labels.tolist(), detections.scores.tolist(), strict=True)
    ]
    picture: Image.Image = labels.annotate(boxes.annotate(image, drawn), drawn, captions[::-1])
    return picture


def main(argv: list[str] | None = None) -> int:
    """The command line; returns how many pictures could not be made."""
    parser = argparse.ArgumentParser(
        "python -m detector.detect",
        description="Detects objects in images: annotated images and detections.json out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", type=Path, help="images, folders of images, patterns ('photos/**/*.jpg')")
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pt, last.pt or a run's folder")
    parser.add_argument("--out", type=Path, default=Path("detections"), help="folder for the results")
    parser.add_argument("--threshold", type=real_number(0, 1), default=0.3, help="lowest score reported")
    parser.add_argument("--batch", type=whole_number(1), default=16, help="images at once")
    parser.add_argument(
        "--workers", type=whole_number(0), default=min(os.cpu_count() or 1, 8), help="threads, each with a batch"
    )
    parser.add_argument("--device", type=device_name, default=default_device(), help="cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    images = find_images(args.inputs, args.out / "images")
    taken, naming = {place for _, place in images}, threading.Lock()
    originals = {path.resolve() for path, _ in images}
    for _, place in images:
        if (args.out / "images" / place).resolve() in originals:
            raise ValueError(f"--out: the picture {args.out / 'images' / place} would overwrite an image that is given")
    prepare_folder(args.out, ["detections.json", "detections.jsonl"])
    make_annotators(12)  # without the library that draws, nothing is begun
    model, content = load_detector(args.checkpoint, args.device)
    class_names = content["class_names"]

    def record_and_draw(index: int, detections: Detections, pixels: Tensor) -> dict[str, Any]:
        path, place = images[index]
        found = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
        record: dict[str, Any] = {"file": str(path), "width": pixels.shape[2], "height": pixels.shape[1]}
        record["objects"] = [{"class": class_names[label], "score": score, "box": box} for box, score, label in found]
        for note in detections.notes:
            print(f"{path}: {note}")
        try:
            if max(pixels.shape) > MAX_JPEG_SIDE and place.suffix == ".jpg":
                with naming:
                    place = claim_name(place.with_suffix(".png"), taken)
            file = args.out / "images" / place
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            draw_detections(picture, detections, class_names).save(file)
            record["picture"] = (Path("images") / place).as_posix()
        except Exception as error:  # whatever one picture meets, the results and the other pictures go on
            print(f"{path}: no picture: {explain(error)}")
            record["picture_error"] = explain(error)
        return record

    reached: set[int] = set()
    num_objects = num_broken = num_without_picture = 0
    with growing_list(args.out / "detections.json") as add:
        try:
            for index, result in detect_each(
                model,
                [path for path, _ in images],
                content["arguments"]["image_size"],
                args.device,
                batch_size=args.batch,
                num_workers=args.workers,
                score_threshold=args.threshold,
                use=record_and_draw,
            ):
                if isinstance(result, str):
                    print(f"{images[index][0]}: {result}")
                    result = {"file": str(images[index][0]), "error": "cannot be decoded"}
                add(result)
                reached.add(index)
                num_objects += len(result.get("objects", []))
                num_broken += "error" in result
                num_without_picture += "picture_error" in result
        finally:  # also when detecting ends early
            for index in range(len(images)):
                if index not in reached:
                    add({"file": str(images[index][0]), "error": "not reached"})
    print(f"{num_objects} objects in {len(images) - num_broken} images, {num_broken} images cannot be decoded", end="")
    print(f", {num_without_picture} pictures cannot be made" if num_without_picture else "", end="")
    print(f"; written to {args.out}")
    return num_without_picture


if __name__ == "__main__":
    run_program(main)
