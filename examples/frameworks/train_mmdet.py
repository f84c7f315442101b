"""Trains a detector of mmdetection by mutual guidance, on images of shapes that it makes.

    python examples/frameworks/train_mmdet.py --model retinanet --steps 80

What matters is `guide`: the lines of a configuration that change. Needs mmdetection 3.3 and mmcv with its operators.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import mmdet
import mmengine
from mmdet.utils import register_all_modules
from mmengine.runner import Runner
from shapes import NAMES, make_shapes

CONFIGURATIONS = {
    "retinanet": "retinanet/retinanet_r18_fpn_1x_coco.py",
    "ddod": "ddod/ddod_r50_fpn_1x_coco.py",
    "tood": "tood/tood_r50_fpn_1x_coco.py",
    "rtmdet": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "yolox": "yolox/yolox_tiny_8xb8-300e_coco.py",
}
ASSIGNER = "mg_ops.adapters.mmdet.MutualAssigner"


def guide(name: str, model: Any) -> None:
    """Changes the configuration of a model."""
    if name == "retinanet":
        model.bbox_head.type = "mg_ops.adapters.mmdet.GuidedRetinaHead"
    elif name == "ddod":
        model.train_cfg.assigner = {"type": ASSIGNER, "scores_are_logits": True}
        model.train_cfg.reg_assigner = {**model.train_cfg.assigner, "task": "localization"}
    elif name == "tood":
        model.train_cfg.assigner = {"type": ASSIGNER}
        model.train_cfg.initial_epoch = 0  # mutual guidance from the first epoch on
    else:  # heads of points
        model.train_cfg.assigner = {"type": ASSIGNER, "anchor_size": 4.0, "scores_are_logits": name == "rtmdet"}


def configuration(name: str, data: Path, steps: int) -> Any:
    """mmdetection's own, for small images and few steps."""
    cfg = mmengine.Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs" / CONFIGURATIONS[name])
    model = cfg.model
    model.bbox_head.num_classes = len(NAMES)
    model.backbone.pop("init_cfg", None)  # random weights, so all of them learn
    if model.backbone.type == "ResNet":
        model.backbone.update(depth=18, frozen_stages=-1, norm_eval=False)
        model.neck.in_channels = [64, 128, 256, 512]
    if name == "ddod":  # mmcv's deformable convolution takes no map smaller than its kernel of 3 x 3
        model.neck.num_outs = 3
        model.bbox_head.anchor_generator.update(strides=[8, 16, 32], octave_base_scale=4)
    model.data_preprocessor.update(batch_augments=None, pad_size_divisor=32)
    guide(name, model)

    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations", "with_bbox": True},
        # Of each image one of them: multi-scale training.
        {"type": "RandomChoiceResize", "scales": [(96, 96), (128, 128)], "keep_ratio": True},
        {"type": "PackDetInputs"},
    ]
    dataset = {
        "type": "CocoDataset",
        "data_root": str(data),
        "ann_file": "annotations.json",
        "data_prefix": {"img": "images/"},
        "metainfo": {"classes": NAMES},
        "filter_cfg": {"filter_empty_gt": False},
        "pipeline": pipeline,
    }
    cfg.train_dataloader = {
        "batch_size": 4,
        "num_workers": 0,
        "sampler": {"type": "InfiniteSampler"},
        "batch_sampler": {"type": "AspectRatioBatchSampler"},  # rectangular batches
        "dataset": dataset,
    }
    cfg.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": steps}
    cfg.optim_wrapper = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 2e-4}}
    cfg.default_hooks.checkpoint = {"type": "CheckpointHook", "interval": steps, "by_epoch": False}
    cfg.param_scheduler = None
    for part in ("val", "test"):
        for key in (f"{part}_dataloader", f"{part}_cfg", f"{part}_evaluator"):
            cfg[key] = None
    # The average of the weights (EMA) that RTMDet and YOLOX have, for all; it is what checkpoints hold.
    cfg.custom_hooks = [{"type": "EMAHook", "ema_type": "ExpMomentumEMA", "momentum": 0.0002}]
    cfg.randomness = {"seed": 0}
    return cfg


def main() -> None:
    """Trains and prints losses; the checkpoint is OUT/iter_STEPS.pth, and loads where mg_ops is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGURATIONS, default="retinanet")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    parser.add_argument("--out", type=Path, help="folder of the run; none: it is not kept")
    arguments = parser.parse_args()

    # The checkpoints of mmengine hold objects, which torch.load refuses unless it is told to trust them.
    os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    register_all_modules()
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.out or Path(made)
        cfg = configuration(arguments.model, make_shapes(folder / "shapes"), arguments.steps)
        cfg.work_dir, cfg.resume = str(folder), arguments.resume
        runner = Runner.from_cfg(cfg)
        runner.train()
        losses = runner.message_hub.get_scalar("train/loss").data[0]
    for first in range(0, len(losses), 10):
        ten = losses[first : first + 10]
        print(f"steps from {first + 1}: loss {sum(ten) / len(ten):.3f}")


if __name__ == "__main__":
    main()
