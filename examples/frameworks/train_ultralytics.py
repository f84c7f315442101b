"""Trains a YOLO of ultralytics with its own rule fused, or by mutual guidance, on images of shapes that it makes.

    python examples/frameworks/train_ultralytics.py --model yolo26n
    python examples/frameworks/train_ultralytics.py --assigner mutual epochs=20 rect=True multi_scale=0.25

What matters is the callback. Needs ultralytics 8.4 or newer.
"""

from __future__ import annotations

import argparse
import ast
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from shapes import make_shapes
from ultralytics import YOLO

import mg_ops
from mg_ops.adapters.ultralytics import fuse_trainer, guide_trainer

ASSIGNERS = {
    "own": None,
    "fused": fuse_trainer,
    "mutual": guide_trainer,
    "max_iou": functools.partial(guide_trainer, matcher=mg_ops.MaxIouMatcher()),
    "atss": functools.partial(guide_trainer, matcher=mg_ops.AtssMatcher(), anchor_size=8.0),
    "simota": functools.partial(guide_trainer, matcher=mg_ops.SimOtaMatcher(), anchor_size=1.0),
    "dynamic_soft_label": functools.partial(guide_trainer, matcher=mg_ops.DynamicSoftLabelMatcher(), anchor_size=1.0),
    "dynamic_mutual": functools.partial(guide_trainer, matcher=mg_ops.DynamicMutualMatcher()),
}


def say_losses(trainer: Any) -> None:
    """Prints the mean losses of an epoch."""
    losses = trainer.label_loss_items(trainer.tloss, prefix="train")
    parts = ", ".join(f"{name} {float(value):.3f}" for name, value in losses.items())
    print(f"\nepoch {trainer.epoch + 1}: loss {float(sum(losses.values())):.3f}; {parts}")


def main() -> None:
    """Trains; checkpoints are in OUT/train/weights, and load where mg_ops is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolo11n", help="yolov8n to yolo26n, or a checkpoint to resume: last.pt")
    parser.add_argument("--assigner", choices=ASSIGNERS, default="fused")
    parser.add_argument("--out", type=Path, help="folder of the run; none: it is not kept")
    parser.add_argument("options", nargs="*", help="of YOLO.train: epochs=20")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as made:
        folder = arguments.out or Path(made)
        data = make_shapes(folder / "shapes") / "data.yaml"
        options = {"data": str(data), "project": str(folder.resolve()), "imgsz": 128, "epochs": 10, "batch": 4}
        options |= {"optimizer": "AdamW", "lr0": 0.002, "warmup_epochs": 1.0, "mosaic": 0.0}
        options |= {"workers": 0, "plots": False, "device": 0 if torch.cuda.is_available() else "cpu"}
        for option in arguments.options:
            name, value = option.split("=", 1)
            options[name] = ast.literal_eval(value)
        model = YOLO(arguments.model if arguments.model.endswith(".pt") else f"{arguments.model}.yaml")
        callback = ASSIGNERS[arguments.assigner]
        if callback is not None:
            model.add_callback("on_pretrain_routine_end", callback)
        model.add_callback("on_train_epoch_end", say_losses)
        model.train(**options)


if __name__ == "__main__":
    main()
