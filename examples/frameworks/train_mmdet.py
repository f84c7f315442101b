"""Trains a detector of mmdetection by mutual guidance, on images of shapes that it makes.

    python examples/frameworks/train_mmdet.py --model retinanet --steps 80

What matters is `guide`: the lines of a configuration that change. Needs mmdetection 3.3 and mmcv with its operators.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import mmdet
import mmengine
import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.structures import InstanceData
from PIL import Image
from shapes import make_shapes
from torch.utils.data import DataLoader

CONFIGURATIONS = {
    "retinanet": "retinanet/retinanet_r18_fpn_1x_coco.py",
    "tood": "tood/tood_r50_fpn_1x_coco.py",
    "rtmdet": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "yolox": "yolox/yolox_tiny_8xb8-300e_coco.py",
}
ASSIGNER = "mg_ops.adapters.mmdet.MutualAssigner"


def guide(name: str, model: Any) -> None:
    """Changes the configuration of a model."""
    if name == "retinanet":
        model.bbox_head.type = "mg_ops.adapters.mmdet.GuidedRetinaHead"
    elif name == "tood":
        model.train_cfg.assigner = {"type": ASSIGNER}
        model.train_cfg.initial_epoch = 0  # mutual guidance from the first epoch on
    else:  # heads of points
        model.train_cfg.assigner = {"type": ASSIGNER, "anchor_size": 4.0, "scores_are_logits": name == "rtmdet"}


class Shapes(torch.utils.data.Dataset[tuple[torch.Tensor, Any]]):
    """Images (3, H, W) uint8, BGR, with their objects."""

    def __init__(self, folder: Path) -> None:
        content = json.loads((folder / "annotations.json").read_text())
        self.files = [folder / "images" / image["file_name"] for image in content["images"]]
        self.objects: list[list[Any]] = [[] for _ in self.files]
        for one in content["annotations"]:
            self.objects[one["image_id"]].append(one)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        image = torch.from_numpy(np.array(Image.open(self.files[index]))[:, :, ::-1].copy()).permute(2, 0, 1)
        boxes = torch.tensor([one["bbox"] for one in self.objects[index]], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([one["category_id"] - 1 for one in self.objects[index]], dtype=torch.int64)
        size = tuple(image.shape[1:])
        sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=labels[:0])
        return image, sample


def collate(pairs: list[tuple[torch.Tensor, Any]]) -> dict[str, list[Any]]:
    """A batch as mmdetection's models take it."""
    images, samples = zip(*pairs, strict=True)
    return {"inputs": list(images), "data_samples": list(samples)}


def main() -> None:
    """Trains and prints losses; the checkpoint loads where mg_ops is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGURATIONS, default="retinanet")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="where the weights go; none: they are not kept")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    register_all_modules()
    file = Path(mmdet.__file__).parent / ".mim/configs" / CONFIGURATIONS[arguments.model]
    configuration = mmengine.Config.fromfile(file).model
    configuration.bbox_head.num_classes = 3
    configuration.backbone.pop("init_cfg", None)  # random weights, so all of them learn
    if configuration.backbone.type == "ResNet":
        configuration.backbone.update(depth=18, frozen_stages=-1, norm_eval=False)
        configuration.neck.in_channels = [64, 128, 256, 512]
    configuration.data_preprocessor.update(batch_augments=None, pad_size_divisor=32)
    guide(arguments.model, configuration)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = revert_sync_batchnorm(MODELS.build(configuration)).to(device)
    model.init_weights()
    model.train()
    optimizer = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=2e-4))
    with tempfile.TemporaryDirectory() as folder:
        data = Shapes(make_shapes(Path(folder)))
        loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate)
        losses: list[float] = []
        while len(losses) < arguments.steps:
            # TOOD's head asks for the epoch.
            mmengine.MessageHub.get_current_instance().update_info("epoch", len(losses) // len(loader))
            for batch in itertools.islice(loader, arguments.steps - len(losses)):
                losses.append(float(model.train_step(batch, optimizer)["loss"]))
    for first in range(0, len(losses), 10):
        ten = losses[first : first + 10]
        print(f"steps from {first + 1}: loss {sum(ten) / len(ten):.3f}")
    if arguments.out is not None:
        torch.save(model.state_dict(), arguments.out)


if __name__ == "__main__":
    main()
