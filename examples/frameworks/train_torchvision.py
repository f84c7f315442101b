"""Trains torchvision's RetinaNet, SSD or FCOS by mutual guidance, on images of shapes or on yours in COCO's layout.

    python examples/frameworks/train_torchvision.py --model fcos_resnet50_fpn
    python examples/frameworks/train_torchvision.py --images train --annotations train.json --size 512 --steps 1000

What matters is `use_mutual_guidance`. Needs torchvision and pycocotools. A torchvision built for another torch ends in
"operator torchvision::nms does not exist": install both at once, from one place.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from shapes import make_shapes
from torchvision.datasets import CocoDetection
from torchvision.models import detection
from torchvision.ops import box_convert
from torchvision.transforms.functional import to_tensor

import mg_ops
from mg_ops.adapters.torchvision import use_mutual_guidance

MODELS = ("retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large")


def as_target(annotations: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The objects of an image as torchvision's detectors take them; crowds and empty boxes are left out."""
    kept = [entry for entry in annotations if not entry.get("iscrowd") and min(entry["bbox"][2:]) > 0]
    boxes = torch.tensor([entry["bbox"] for entry in kept], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([entry["category_id"] for entry in kept], dtype=torch.int64)
    return {"boxes": box_convert(boxes, "xywh", "xyxy"), "labels": labels}


def main() -> None:
    """Trains, prints the losses and what the last match did, and saves the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--images", type=Path, help="folder of images; none: images of shapes are made")
    parser.add_argument("--annotations", type=Path, help="their COCO annotations")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=128, help="shorter side of the resized images; SSD has its own")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where to save the weights")
    arguments = parser.parse_args()
    if (arguments.images is None) != (arguments.annotations is None):
        parser.error("--images and --annotations: give both or none")

    torch.manual_seed(0)
    made = tempfile.TemporaryDirectory()
    if arguments.images is None:
        root = make_shapes(Path(made.name))
        arguments.images, arguments.annotations = root / "images", root / "annotations.json"
    data = CocoDetection(arguments.images, str(arguments.annotations), to_tensor, as_target)
    sampler = torch.utils.data.RandomSampler(data, num_samples=arguments.steps * arguments.batch_size)
    loader = torch.utils.data.DataLoader(data, arguments.batch_size, sampler=sampler, collate_fn=list)

    sizes = {} if "ssd" in arguments.model else {"min_size": arguments.size, "max_size": 2 * arguments.size}
    num_classes = max(data.coco.cats) + 1  # 0 is the background
    model = getattr(detection, arguments.model)(weights=None, weights_backbone=None, num_classes=num_classes, **sizes)
    last: dict[str, Any] = {}
    use_mutual_guidance(model, on_match=lambda match, targets: last.update(match=match, targets=targets))
    model.to(arguments.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step, batch in enumerate(loader, start=1):
        images = [image.to(arguments.device) for image, _ in batch]
        targets = [{key: value.to(arguments.device) for key, value in target.items()} for _, target in batch]
        with torch.autocast(images[0].device.type, torch.bfloat16, enabled=arguments.amp):
            losses = model(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        if step == 1 or step % 10 == 0 or step == arguments.steps:
            numbers = mg_ops.summarize(last["match"], last["targets"]).as_dict()
            found = (
                f"{numbers['objects/all']:.0f} objects, {numbers['without_cls_positive/all']:.0f} without a positive"
            )
            print(f"step {step}: loss {loss.item():.3f}; {found}; disagreement {numbers['disagreement']:.2f}")
    if arguments.out is not None:
        torch.save(model.state_dict(), arguments.out)
    made.cleanup()


if __name__ == "__main__":
    main()
