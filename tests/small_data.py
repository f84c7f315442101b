"""What the detector's tests work on: colored rectangles and discs on noise, laid out as VOC and as COCO, small runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from detector.checkpoint import save_atomically
from detector.detectors import make_detector

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
                ids = {"id": len(annotations) + 1, "image_id": number, "category_id": category_ids[name]}
                width, height = x2 - x1, y2 - y1
                annotations.append({**ids, "bbox": [x1, y1, width, height], "area": width * height, "iscrowd": 0})
        categories = [{"id": category_id, "name": name} for name, category_id in category_ids.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        annotation_file = root / "annotations" / f"instances_{split}.json"
        annotation_file.parent.mkdir(parents=True, exist_ok=True)
        annotation_file.write_text(json.dumps(content))
    return root


def write_checkpoint(folder: Path) -> Path:
    """An untrained detector of 64 pixels that finds something everywhere, and the log of a few steps, the last cut."""
    torch.manual_seed(0)
    model = make_detector("fssd", "resnet18", 64, 2)
    for conv in model.head.classes:
        torch.nn.init.normal_(conv.bias, -1, 1)
    arguments = {"model": "fssd", "backbone": "resnet18", "image_size": 64, "strategy": "mutual"}
    content = {"step": 1, "model": model.state_dict(), "ema": None, "arguments": arguments}
    save_atomically({**content, "class_names": ["disc", "square"]}, folder / "last.pt")
    losses = {"cls_loss": 1, "box_loss": 2, "lr": 0.1}
    lines: list[dict[str, float]] = [{"step": step, "epoch": step / 2, "loss": 3 - step, **losses} for step in (0, 1)]
    lines.append({"step": 2, "epoch": 1, "eval_AP": 0.4, "eval_AP50": 0.6, "eval_AP75": 0.5, "eval_VOC_AP50": 0.6})
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    return folder


def train_flags(data: Path, out: Path, **changes: object) -> list[str]:
    """The command line of a training of seconds: 64 pixels, batches of 2, one epoch; None leaves a flag out."""
    values: dict[str, object] = {
        **{"data": data, "out": out, "model": "fssd", "backbone": "resnet18", "backbone-weights": "none"},
        **{"image-size": 64, "batch": 2, "epochs": 1, "log-every": 1, "device": "cpu", "workers": 0},
        **changes,
    }
    given = [(f"--{name}", value) for name, value in values.items() if value is not None]
    return [word for name, value in given for word in ([name] if value is True else [name, str(value)])]
