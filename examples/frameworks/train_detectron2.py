"""Trains detectron2's RetinaNet by mutual guidance, on images of shapes that it makes.

    python examples/frameworks/train_detectron2.py --steps 80

What matters is `use_mutual_guidance` in `build_model`. Needs detectron2, none of whose compiled parts a RetinaNet uses.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.utils.logger import setup_logger
from shapes import make_shapes
from torch import nn

from mg_ops.adapters.detectron2 import use_mutual_guidance


class Trainer(DefaultTrainer):
    """detectron2's, whose model is guided."""

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """The model of a configuration."""
        model = use_mutual_guidance(super().build_model(cfg))
        model.loss_normalizer = 70.0  # the positives of a batch of these; detectron2 begins with 100
        return model

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW, with which so short a training from random weights learns something."""
        return torch.optim.AdamW(model.parameters(), cfg.SOLVER.BASE_LR)


def configuration(arguments: argparse.Namespace) -> Any:
    """A RetinaNet with ResNet-18, as of COCO-Detection/retinanet_R_50_FPN_1x.yaml, for small images."""
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[side, 1.26 * side, 1.59 * side] for side in (16, 32, 64, 128, 256)]
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.PIXEL_STD = [57.4, 57.1, 58.4]  # random weights want inputs around 1
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes",), ()
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = 0, False
    cfg.INPUT.MIN_SIZE_TRAIN = (96, 128)  # of each image one of them: multi-scale training
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = 4, arguments.steps, 10
    cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS = 1e-4, ()
    cfg.SEED = 0
    return cfg


def main() -> None:
    """Trains and prints losses; the checkpoint is OUT/model_final.pth, and loads where mg_ops is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    parser.add_argument("--out", type=Path, help="folder of the run; none: it is not kept")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as made:
        folder = arguments.out or Path(made)
        data = make_shapes(folder / "shapes")
        register_coco_instances("shapes", {}, str(data / "annotations.json"), str(data / "images"))
        cfg = configuration(arguments)
        cfg.OUTPUT_DIR = str(folder)
        setup_logger(str(folder))
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=arguments.resume)
        trainer.train()
        losses = [value for value, _ in trainer.storage.history("total_loss").values()]
        for first in range(0, len(losses), 10):
            ten = losses[first : first + 10]
            print(f"steps from {first + 1}: loss {sum(ten) / len(ten):.3f}")


if __name__ == "__main__":
    main()
