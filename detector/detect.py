"""Runs a trained detector over images: annotated images and a JSON file out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import font_manager
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from detector.checkpoint import load_detector
from detector.images import IMAGE_SUFFIXES, decode_image
from detector.inference import Detections, detect


def find_images(inputs: list[Path]) -> list[tuple[Path, Path]]:
    """Images and folders -> (image, its path in the output folder), each image once, folders in alphabetical order.

    Raises:
        ValueError: an input does not exist, or there is no image at all.
    """
    found: dict[Path, Path] = {}
    for given in inputs:
        if given.is_dir():
            files = sorted(
                path for path in given.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
            )
            for path in files:
                found.setdefault(path, path.relative_to(given))
        elif given.is_file():
            found.setdefault(given, Path(given.name))
        else:
            raise ValueError(f"expected an image or a folder, and there is no {given}")
    if not found:
        raise ValueError(
            f"no image with a suffix of {', '.join(sorted({s.lower() for s in IMAGE_SUFFIXES}))} was found"
        )
    # Two folders may hold images of the same name: none may overwrite another.
    taken: set[Path] = set()
    placed = []
    for path, place in found.items():
        number, free = 1, place
        while free in taken:
            number, free = number + 1, place.with_stem(f"{place.stem}-{number + 1}")
        taken.add(free)
        placed.append((path, free))
    return placed


def draw_detections(image: Tensor, detections: Detections, class_names: list[str]) -> Tensor:
    """The image (3, H, W) uint8 with a box and a label for each detection, a colour for each class."""
    if len(detections.labels) == 0:
        return image
    palette = mpl.colormaps["tab10" if len(class_names) <= 10 else "tab20"].colors
    colors = [tuple(int(255 * part) for part in palette[label % len(palette)]) for label in detections.labels.tolist()]
    captions = [
        f"{class_names[label]} {score:.2f}"
        for label, score in zip(detections.labels.tolist(), detections.scores.tolist(), strict=True)
    ]
    size = max(round(min(image.shape[1:]) / 32), 10)
    font = font_manager.findfont("DejaVu Sans")
    return draw_bounding_boxes(
        image, detections.boxes, captions, colors, width=max(size // 6, 1), font=font, font_size=size
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m detector.detect",
        description="Detects objects in images: annotated images and detections.json out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", type=Path, help="images, and folders of images")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint of detector.train, or its folder")
    parser.add_argument("--out", type=Path, default=Path("detections"), help="folder for the results")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score reported")
    parser.add_argument("--batch", type=int, default=16, help="images at once")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    args = parser.parse_args(argv)
    try:
        images = find_images(args.inputs)
        model, content = load_detector(args.checkpoint, args.device)
    except ValueError as error:
        parser.error(str(error))
    found, broken = detect(
        model,
        [path for path, _ in images],
        content["arguments"]["image_size"],
        args.device,
        batch_size=args.batch,
        num_workers=args.workers,
        score_threshold=args.threshold,
    )
    records = []
    for index, detections in sorted(found.items()):
        path, place = images[index]
        image = decode_image(path)
        annotated = (args.out / "images" / place).with_suffix(".jpg" if place.suffix.lower() != ".png" else ".png")
        annotated.parent.mkdir(parents=True, exist_ok=True)
        drawn = draw_detections(image, detections, content["class_names"])
        Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(annotated)
        objects = [
            {"class": content["class_names"][label], "score": score, "box": box}
            for box, score, label in zip(
                detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True
            )
        ]
        records.append({"file": str(path), "width": image.shape[2], "height": image.shape[1], "objects": objects})
    for index in broken:
        print(f"{images[index][0]}: cannot be decoded")
        records.append({"file": str(images[index][0]), "error": "cannot be decoded"})
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "detections.json").write_text(json.dumps(records, indent=1))
    count = sum(len(record.get("objects", [])) for record in records)
    print(f"{count} objects in {len(found)} images, {len(broken)} images cannot be decoded; written to {args.out}")


if __name__ == "__main__":
    main()
