"""Runs a trained detector over images: annotated images and a JSON file out."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from detector.annotations import is_file
from detector.checkpoint import load_detector
from detector.images import IMAGE_SUFFIXES, decode_image
from detector.inference import Detections, detect_each
from detector.outputs import prepare_folder, write_json
from detector.program import default_device, device_name, explain, real_number, run_program, whole_number

MAX_JPEG_SIDE = 65500
"""Pixels of the widest and highest image that JPEG holds, in libjpeg."""


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
    """Images and folders -> (image, path of its picture in the output folder), each image once, folders in order.

    PNG becomes PNG, everything else JPEG; no two have the same path.

    Args:
        inputs: images and folders.
        pictures: the folder of the pictures. Where a folder has it in it, what earlier calls drew there is left out.

    Raises:
        ValueError: an input does not exist, or there is no image at all.
    """
    found: dict[Path, tuple[Path, Path]] = {}
    drawn = whole_path(pictures) if pictures is not None else None
    for given in inputs:
        if given.is_dir():
            named = (path for path in given.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            # A link to nothing is an image that is missing, which the results then say.
            files = sorted(path for path in named if path.is_file() or (path.is_symlink() and not path.exists()))
            if drawn is not None and whole_path(given) in drawn.parents:
                earlier = [path for path in files if drawn in whole_path(path).parents]
                if earlier:
                    print(f"pictures of earlier calls, left out: {len(earlier)} in {pictures}")
                files = [path for path in files if path not in set(earlier)]
            for path in files:
                found.setdefault(whole_path(path), (path, path.relative_to(given)))
        elif is_file(given):
            found.setdefault(whole_path(given), (given, Path(given.name)))
        else:
            raise ValueError(f"expected an image or a folder, and there is no {given}")
    if not found:
        raise ValueError(
            f"no image with a suffix of {', '.join(sorted({s.lower() for s in IMAGE_SUFFIXES}))} was found"
        )
    taken: set[Path] = set()
    return [
        (path, claim_name(place.with_suffix(".png" if place.suffix.lower() == ".png" else ".jpg"), taken))
        for path, place in found.values()
    ]


def draw_detections(image: Tensor, detections: Detections, class_names: list[str]) -> Tensor:
    """The image (3, H, W) uint8 with a box and a label for each detection, a color for each class."""
    if len(detections.labels) == 0:
        return image
    palette = [to_rgb(color) for color in mpl.color_sequences["tab10" if len(class_names) <= 10 else "tab20"]]
    colors = [tuple(int(255 * part) for part in palette[label % len(palette)]) for label in detections.labels.tolist()]
    captions = [
        f"{class_names[label]} {score:.2f}"
        for label, score in zip(detections.labels.tolist(), detections.scores.tolist(), strict=True)
    ]
    size = max(round(min(image.shape[1:]) / 32), 10)
    font = font_manager.findfont("DejaVu Sans")
    drawn: Tensor = draw_bounding_boxes(
        image, detections.boxes, captions, colors, width=max(size // 6, 1), font=font, font_size=size
    )
    return drawn


def save_picture(picture: Tensor, path: Path) -> None:
    """Writes a picture (3, H, W) uint8.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns how many pictures could not be made."""
    parser = argparse.ArgumentParser(
        "python -m detector.detect",
        description="Detects objects in images: annotated images and detections.json out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", type=Path, help="images, and folders of images")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint of detector.train, or its folder")
    parser.add_argument("--out", type=Path, default=Path("detections"), help="folder for the results")
    parser.add_argument("--threshold", type=real_number(0, 1), default=0.3, help="lowest score reported")
    parser.add_argument("--batch", type=whole_number(1), default=16, help="images at once")
    parser.add_argument("--workers", type=whole_number(0), default=2, help="processes that decode images")
    parser.add_argument("--device", type=device_name, default=default_device(), help="cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    images = find_images(args.inputs, args.out / "images")
    taken = {place for _, place in images}
    originals = {path.resolve() for path, _ in images}
    for _, place in images:
        if (args.out / "images" / place).resolve() in originals:
            raise ValueError(f"--out: the picture {args.out / 'images' / place} would overwrite an image that is given")
    prepare_folder(args.out, ["detections.json"])
    model, content = load_detector(args.checkpoint, args.device)
    class_names = content["class_names"]

    records: dict[int, dict[str, Any]] = {}
    num_broken = num_without_picture = 0
    results = detect_each(
        model,
        [path for path, _ in images],
        content["arguments"]["image_size"],
        args.device,
        batch_size=args.batch,
        num_workers=args.workers,
        score_threshold=args.threshold,
    )
    try:
        for index, detections in results:
            path, place = images[index]
            if isinstance(detections, str):
                print(f"{path}: {detections}")
                records[index] = {"file": str(path), "error": "cannot be decoded"}
                num_broken += 1
                continue
            objects = [
                {"class": class_names[label], "score": score, "box": box}
                for box, score, label in zip(
                    detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
                )
            ]
            record: dict[str, Any] = {"file": str(path), "objects": objects}
            records[index] = record
            for note in detections.notes:
                print(f"{path}: {note}")
            try:
                image = decode_image(path)
                record |= {"width": image.shape[2], "height": image.shape[1]}
                if max(image.shape[1:]) > MAX_JPEG_SIDE and place.suffix == ".jpg":
                    place = claim_name(place.with_suffix(".png"), taken)
                save_picture(draw_detections(image, detections, class_names), args.out / "images" / place)
                record["picture"] = (Path("images") / place).as_posix()
            except Exception as error:  # whatever one picture meets, the results and the other pictures go on
                print(f"{path}: no picture: {explain(error)}")
                record["picture_error"] = explain(error)
                num_without_picture += 1
    finally:
        # Also when detecting ends early: then of the images that it came to.
        not_reached = [index for index in range(len(images)) if index not in records]
        records |= {index: {"file": str(images[index][0]), "error": "not reached"} for index in not_reached}
        ordered = sorted(records.items(), key=lambda item: ("error" in item[1], item[0]))
        write_json(args.out / "detections.json", [record for _, record in ordered], indent=1)
    count = sum(len(record.get("objects", [])) for record in records.values())
    print(f"{count} objects in {len(images) - num_broken} images, {num_broken} images cannot be decoded", end="")
    print(f", {num_without_picture} pictures cannot be made" if num_without_picture else "", end="")
    print(f"; written to {args.out}")
    return num_without_picture


if __name__ == "__main__":
    run_program(main)
