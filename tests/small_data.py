"""Small data sets the detector's tests write: colored rectangles and discs on noise, laid out as VOC and as COCO."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {"disc": (40, 60, 220), "square": (220, 40, 30)}


def draw_image(
    path: Path, objects: list[tuple[str, tuple[int, int, int, int]]], size: tuple[int, int], seed: int
) -> None:
    """Saves an image of (width, height) pixels with its objects; boxes are (x1, y1, x2, y2), x2 and y2 exclusive."""
    noise = np.random.default_rng(seed).integers(90, 150, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    draw = ImageDraw.Draw(image)
    for name, (x1, y1, x2, y2) in objects:
        shape = draw.ellipse if name == "disc" else draw.rectangle
        shape((x1, y1, x2 - 1, y2 - 1), fill=COLORS[name])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def random_objects(size: tuple[int, int], seed: int) -> list[tuple[str, tuple[int, int, int, int]]]:
    """One square and one disc that do not touch: one in the left half, one in the right."""
    generator = np.random.default_rng(1000 + seed)
    width, height = size
    objects = []
    for half, name in enumerate(generator.permutation(["square", "disc"])):
        side = int(generator.integers(height // 4, height // 2))
        x = half * width // 2 + int(generator.integers(0, width // 2 - side))
        y = int(generator.integers(0, height - side))
        objects.append((str(name), (x, y, x + side, y + side)))
    return objects


def voc_object(name: str, box: tuple[float, float, float, float], difficult: bool = False) -> str:
    """One <object> of an annotation file; the box with VOC's 1-based inclusive corners."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, box, strict=True))
    return f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox>{corners}</bndbox></object>"


def write_voc_annotation(path: Path, size: tuple[int, int], objects: list[str]) -> None:
    """An annotation file of (width, height) and `voc_object`s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size_text = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    path.write_text(f"<annotation>{size_text}{''.join(objects)}</annotation>")


def write_voc(root: Path, splits: dict[str, int], size: tuple[int, int] = (128, 96)) -> Path:
    """A VOC folder with so many images in each split, a square and a disc in each."""
    number = 0
    for split, count in splits.items():
        names = []
        for _ in range(count):
            name, number = f"image_{number:03d}", number + 1
            objects = random_objects(size, number)
            draw_image(root / "JPEGImages" / f"{name}.png", objects, size, number)
            boxes = [voc_object(label, (box[0] + 1, box[1] + 1, box[2], box[3])) for label, box in objects]
            write_voc_annotation(root / "Annotations" / f"{name}.xml", size, boxes)
            names.append(name)
        split_file = root / "ImageSets" / "Main" / f"{split}.txt"
        split_file.parent.mkdir(parents=True, exist_ok=True)
        split_file.write_text("\n".join(names) + "\n")
    return root


def write_coco(root: Path, splits: dict[str, int], size: tuple[int, int] = (128, 96)) -> Path:
    """A COCO folder with so many images in each split; category ids leave gaps, as COCO's do."""
    category_ids = {"disc": 3, "square": 7}
    number = 0
    for split, count in splits.items():
        images, annotations = [], []
        for _ in range(count):
            number += 1
            objects = random_objects(size, number)
            file_name = f"{number:012d}.jpg"
            draw_image(root / split / file_name, objects, size, number)
            images.append({"id": number, "file_name": file_name, "width": size[0], "height": size[1]})
            for name, (x1, y1, x2, y2) in objects:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": category_ids[name],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": category_id, "name": name} for name, category_id in category_ids.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        annotation_file = root / "annotations" / f"instances_{split}.json"
        annotation_file.parent.mkdir(parents=True, exist_ok=True)
        annotation_file.write_text(json.dumps(content))
    return root
