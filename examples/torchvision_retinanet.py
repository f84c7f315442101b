"""Mutual guidance in torchvision's RetinaNet, on a COCO-style data set.

    python examples/torchvision_retinanet.py --steps 20
    python examples/torchvision_retinanet.py --images data/train --annotations data/train.json --size 512 --steps 1000

Without --images it makes a small data set of colored rectangles first. What matters is `use_mutual_guidance`. Images
and annotations are read as the detectors here read them. Needs torchvision. A torchvision built for another
torch ends in "operator torchvision::nms does not exist": install both at once, from one place.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import torchvision
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for the readers in detector/

import mg_ops
from detector.data import AnnotatedImages, LoadedImage, load_image, read_coco
from detector.images import OTHER_PROPORTIONS, decode
from mg_ops.adapters.torchvision import use_mutual_guidance


def make_small_data(folder: Path, num_images: int, size: int = 128) -> Path:
    """Writes images of one to three colored rectangles into a folder, and their COCO annotations beside them."""
    generator = torch.Generator().manual_seed(0)
    images, annotations = [], []
    for image_id in range(num_images):
        pixels = torch.randint(0, 60, (3, size, size), generator=generator, dtype=torch.uint8)
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            x, y = torch.randint(0, size // 2, (2,), generator=generator).tolist()
            w, h = torch.randint(size // 6, size // 2, (2,), generator=generator).tolist()
            category = int(torch.randint(1, 4, (), generator=generator))
            pixels[:, y : y + h, x : x + w] = 0
            pixels[category - 1, y : y + h, x : x + w] = 255
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category, **box})
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": size, "height": size})
        torchvision.io.write_png(pixels, str(folder / f"{image_id}.png"))
    categories = [{"id": index, "name": name} for index, name in enumerate(("red", "green", "blue"), start=1)]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def draw_batch(data: AnnotatedImages, count: int) -> list[LoadedImage]:
    """Random images and their objects; one that cannot be used is named and taken out."""
    batch: list[LoadedImage] = []
    while len(batch) < count:
        if not data.images:
            raise SystemExit("no image of this data set can be used")
        annotated = data.images[int(torch.randint(0, len(data.images), ()))]
        try:
            loaded = load_image(annotated, decode(annotated.path))
            problem = OTHER_PROPORTIONS
        except OSError as error:
            loaded, problem = None, str(error)
        if loaded is None:
            print(f"{annotated.name}: left out: {problem}")
            data.images.remove(annotated)
        else:
            batch.append(loaded)
    return batch


def main() -> None:
    """Trains and prints the losses and what `mg_ops.summarize` says of the last match."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images; none: a small data set is made")
    parser.add_argument("--annotations", type=Path, help="their COCO annotations")
    parser.add_argument("--strategy", default="mutual", choices=["mutual", "iou"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--size", type=int, default=128, help="shorter side of the resized images, in pixels")
    parser.add_argument("--pretrained-backbone", action="store_true", help="downloads ImageNet's weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if (arguments.images is None) != (arguments.annotations is None):
        parser.error("--images and --annotations: give both or none")

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        images = arguments.images or Path(made)
        annotations = arguments.annotations or make_small_data(images, num_images=16)
        try:
            data = read_coco(images, str(annotations.resolve()))
        except ValueError as error:
            parser.error(str(error))
        print(data.summary())
        model = torchvision.models.detection.retinanet_resnet50_fpn_v2(
            weights=None,
            weights_backbone="DEFAULT" if arguments.pretrained_backbone else None,
            num_classes=len(data.class_names) + 1,
            min_size=arguments.size,
            max_size=2 * arguments.size,
        )
        numbers: dict[str, float] = {}

        def keep_summary(match: mg_ops.MutualMatch, targets: list[dict[str, Tensor]]) -> None:
            if is_logged:
                numbers.update(mg_ops.summarize(match, targets).as_dict())

        matcher = mg_ops.MutualMatcher(strategy=arguments.strategy)
        use_mutual_guidance(model, matcher, crowd_key="iscrowd", on_match=keep_summary)
        model.to(arguments.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for step in range(1, arguments.steps + 1):
            is_logged = step == 1 or step % 10 == 0 or step == arguments.steps
            batch = draw_batch(data, arguments.batch_size)
            pictures = [image.pixels.to(arguments.device) / 255 for image in batch]
            targets = [
                {"boxes": image.boxes, "labels": image.labels + 1, "iscrowd": image.crowd}  # 0 is the background
                for image in batch
            ]
            targets = [{key: value.to(arguments.device) for key, value in target.items()} for target in targets]
            losses = model(pictures, targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            if is_logged:
                parts = ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items())
                print(
                    f"step {step}: {parts}; {numbers['objects/all']:.0f} objects, "
                    f"{numbers['without_cls_positive/all']:.0f} without a positive, "
                    f"disagreement {numbers['disagreement']:.2f}"
                )


if __name__ == "__main__":
    main()
