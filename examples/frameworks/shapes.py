"""Makes the small data set of the trainings in this folder: squares, discs and triangles, for COCO and YOLO readers.

python examples/frameworks/shapes.py FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

NAMES = ("square", "disc", "triangle")
COLORS = ("crimson", "seagreen", "royalblue")


def make_shapes(folder: Path, num_images: int = 32, size: int = 128) -> Path:
    """Writes images/, annotations.json (COCO), labels/ and data.yaml (YOLO); every eighth image has no objects.

    Every other image is three quarters as high as it is wide.

    Args:
        folder: where to.
        num_images: how many images.
        size: their width, in pixels.

    Returns:
        The folder.
    """
    draw_number = random.Random(0).randint
    images, annotations = [], []
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index in range(num_images):
        height = size if index % 2 else size * 3 // 4
        image = Image.new("RGB", (size, height), (draw_number(90, 160),) * 3)
        canvas, lines = ImageDraw.Draw(image), []
        for _ in range(draw_number(1, 3) if index % 8 else 0):
            side, kind = draw_number(size // 6, size // 2), draw_number(0, 2)
            x, y = draw_number(0, size - side), draw_number(0, height - side)
            corners = [(x, y), (x + side - 1, y + side - 1)]
            if kind == 2:
                canvas.polygon([(x, y + side - 1), (x + side // 2, y), corners[1]], fill=COLORS[kind])
            else:
                (canvas.ellipse if kind else canvas.rectangle)(corners, fill=COLORS[kind])
            box = {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": index, "category_id": kind + 1, **box})
            lines.append(f"{kind} {(x + side / 2) / size} {(y + side / 2) / height} {side / size} {side / height}\n")
        image.save(folder / "images" / f"{index:03}.png")
        (folder / "labels" / f"{index:03}.txt").write_text("".join(lines))
        images.append({"id": index, "file_name": f"{index:03}.png", "width": size, "height": height})
    categories = [{"id": index, "name": name} for index, name in enumerate(NAMES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    names = "".join(f"  {index}: {name}\n" for index, name in enumerate(NAMES))
    (folder / "data.yaml").write_text(f"path: {folder.resolve()}\ntrain: images\nval: images\nnames:\n{names}")
    return folder


if __name__ == "__main__":
    make_shapes(Path(sys.argv[1]))
