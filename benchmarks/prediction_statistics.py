"""How the predictions of a trained detector depend on the overlap of anchor and object: the numbers in cases.py.

    python benchmarks/prediction_statistics.py --checkpoint RUN --data BCCD --split val

For the anchors of each tenth of IoU with the object that they overlap most, the last from 0.6 on: by what share the
deltas go the way to the object, how much this share varies, what is left as noise in the centers and in the sides, and
the logit of the object's class.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import box_iou

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.cases import BY_OVERLAP, CODER  # noqa: E402
from detector.batches import EvaluationImages  # noqa: E402
from detector.checkpoint import load_detector  # noqa: E402
from detector.data import read_data  # noqa: E402
from detector.program import run_program  # noqa: E402


def statistics_of(deltas: Tensor, exact: Tensor, logits: Tensor) -> list[float]:
    """Of the anchors of a tenth: deltas (N, 4), those that hit the object exactly (N, 4), logits of its class (N,)."""
    share = (deltas * exact).sum(dim=1) / (exact * exact).sum(dim=1).clamp(min=1e-9)
    lower, middle, upper = share.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    noise = (deltas - middle * exact).std(dim=0)
    spread = (upper - lower) / 1.349  # the standard deviation of a normal distribution with these quartiles
    return [middle, spread, *noise.view(2, 2).mean(dim=1).tolist(), logits.mean().item(), logits.std().item()]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's folder, or a checkpoint")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    options = parser.parse_args()
    model, content = load_detector(options.checkpoint, "cpu")
    size = content["arguments"]["image_size"]
    data = read_data(options.data, "auto", options.split, content["class_names"])
    images = [image for image in data.images if len(image.boxes)]
    found: list[tuple[Tensor, ...]] = []
    for image, sample in zip(images, EvaluationImages([image.path for image in images], size), strict=True):
        assert sample.image is not None
        with torch.inference_mode():
            cls_logits, box_deltas = model(sample.image.unsqueeze(0))
        boxes = image.boxes * (size / torch.tensor([image.width, image.height] * 2))
        overlap, owner = box_iou(model.anchors, boxes).max(dim=1)
        exact = CODER.encode(anchors=model.anchors, boxes=boxes[owner])
        own_logits = cls_logits[0, torch.arange(len(owner)), image.labels[owner]]
        found.append((overlap, box_deltas[0], exact, own_logits, cls_logits[0].mean(dim=1), cls_logits[0].std(dim=1)))
    overlap, deltas, exact, own_logits, means, deviations = (torch.cat(parts) for parts in zip(*found, strict=True))
    far = overlap == 0
    others = f"{means[far].mean():.1f}, +- {deviations[far].mean():.1f}"
    print(f"{len(images)} images; logits of anchors that overlap no object: {others}")
    print("IoU from: share, +-, noise of centers, of sides, logit, +-")
    for tenth in range(len(BY_OVERLAP)):
        last = tenth == len(BY_OVERLAP) - 1
        inside = (overlap > tenth / 10) & (overlap <= (1.0 if last else (tenth + 1) / 10))
        row = statistics_of(deltas[inside], exact[inside], own_logits[inside])
        print(f"{tenth / 10:.1f}: " + ", ".join(f"{value:.2f}" for value in row))


if __name__ == "__main__":
    run_program(main)
