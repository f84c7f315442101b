"""The lines of docs/frameworks.md run in the frameworks that they are for, and give those frameworks' own results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/frameworks.md").read_text()


def lines_of(section: str) -> list[str]:
    """The blocks of a section of the page."""
    text = re.split(r"^## ", PAGE.split(f"\n## {section}\n")[1], flags=re.MULTILINE)[0]
    return re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def needs(module: str) -> Any:
    """The module of a framework; skips where it is not installed."""
    return pytest.importorskip(module, reason=f"{module.split('.')[0]} is not installed")


def random_boxes(count: int, size: int, seed: int = 0) -> Tensor:
    """(count, 4) boxes inside of an image of so many pixels."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * size * 0.6
    return torch.cat([corner, corner + size * (0.1 + 0.3 * torch.rand(count, 2, generator=generator))], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 1])
def test_torchvision(block: int) -> None:
    needs("torchvision")
    namespace: dict[str, Any] = {}
    for code in lines_of("torchvision")[: block + 1]:
        exec(code, namespace)
    model = namespace["model"].train()
    model.transform.min_size, model.transform.max_size = (64,), 64
    targets = [{"boxes": random_boxes(3, 64), "labels": torch.tensor([1, 2, 90])}]
    losses = model([torch.rand(3, 64, 64)], targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()) and losses["classification"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 1])
def test_ultralytics(block: int, tmp_path: Path) -> None:
    needs("ultralytics")
    shapes = f"sys.path.insert(0, {str(ROOT / 'examples/frameworks')!r}); import shapes"
    made = f"import sys\nfrom pathlib import Path\n{shapes}\nshapes.make_shapes(Path('shapes'), 8, 64)\n"
    code = "\n".join(lines_of("ultralytics")[: block + 1])
    assert code.count('data="your_data.yaml", epochs=100') == block + 1
    options = 'data="shapes/data.yaml", epochs=1, imgsz=64, batch=4, workers=0, device="cpu", plots=False'
    code = made + code.replace('data="your_data.yaml", epochs=100', options)
    code += "\nprint(type(model.trainer.model.criterion).__name__, model.trainer.tloss)"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "true", "PYTHONPATH": paths}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert ("E2ELoss" if block else "v8DetectionLoss") in finished.stdout.splitlines()[-1]


@pytest.mark.filterwarnings("ignore")
def test_detectron2() -> None:
    config = needs("detectron2.config").get_cfg()
    namespace: dict[str, Any] = {}
    exec(lines_of("detectron2")[0], namespace)
    config.MODEL.DEVICE = "cpu"
    config.MODEL.META_ARCHITECTURE = "RetinaNet"
    config.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    config.MODEL.RESNETS.OUT_FEATURES = config.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    sizes = [[side, 1.26 * side, 1.59 * side] for side in (32, 64, 128, 256, 512)]
    config.MODEL.ANCHOR_GENERATOR.SIZES = sizes
    model = namespace["Trainer"].build_model(config)
    structures, events = needs("detectron2.structures"), needs("detectron2.utils.events")
    classes = torch.tensor([0, 4])
    objects = structures.Instances((64, 64), gt_boxes=structures.Boxes(random_boxes(2, 64)), gt_classes=classes)
    with events.EventStorage():
        losses = model([{"image": torch.rand(3, 64, 64), "instances": objects}])
    sum(losses.values()).backward()
    assert all(loss > 0 for loss in losses.values()) and model.match.num_pos.shape == (2,)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", ["yolox.models", "libreyolo.models.yolox.nn"])
def test_yolox(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses and gradients are those of the head's own assignment."""
    head_class = needs(module).YOLOXHead
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    own = head_class.get_assignments
    monkeypatch.setattr(head_class, "get_assignments", own)  # put back afterwards
    torch.manual_seed(0)
    head = head_class(3, width=0.125, in_channels=[256, 512, 1024]).train()
    features = [
        torch.randn(2, int(channels * 0.125), 16 // step, 16 // step)
        for channels, step in ((256, 1), (512, 2), (1024, 4))
    ]
    boxes = random_boxes(3, 128)
    objects = torch.zeros(2, 5, 5)  # class, center and size; the second image has none
    objects[0, :3, 0] = torch.tensor([0.0, 1.0, 2.0])
    objects[0, :3, 1:3], objects[0, :3, 3:] = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    found = []
    for guided in (False, True):
        if guided:
            code = lines_of("YOLOX and LibreYOLO")[0].replace("yolox.models", module)
            exec(code, {})
            assert head_class.get_assignments is not own
        head.zero_grad()
        losses = head(features, objects, torch.zeros(2, 3, 128, 128))
        total = losses["total_loss"] if isinstance(losses, dict) else losses[0]
        total.backward()
        found.append([total.detach(), *(parameter.grad for parameter in head.parameters())])
    torch.testing.assert_close(*found)


def pyramid(size: int, num_anchors: int) -> tuple[Tensor, list[int]]:
    """Anchors of three levels, and how many locations each has."""
    levels, counts = [], []
    for step in (8, 16, 32):
        places = torch.arange(step / 2, size, step)
        points = torch.cartesian_prod(places, places).flip(1).repeat_interleave(num_anchors, 0)
        sides = step * torch.linspace(2, 4, num_anchors).repeat(len(places) ** 2).unsqueeze(1)
        levels.append(torch.cat([points - sides / 2, points + sides / 2], dim=1))
        counts.append(len(places) ** 2)
    return torch.cat(levels), counts


def test_monai() -> None:
    """The labels are those of its own matcher."""
    module = needs("monai.apps.detection.utils.ATSS_matcher")
    namespace: dict[str, Any] = {"retinanet": SimpleNamespace()}
    exec(lines_of("MONAI")[0], namespace)
    own = module.ATSSMatcher(num_candidates=4, center_in_gt=True)
    ours = namespace["retinanet"].proposal_matcher
    anchors, counts = pyramid(256, 2)
    for count in (0, 5):
        arguments = random_boxes(count, 256, seed=3), anchors, counts, 2
        assert torch.equal(ours(*arguments)[1], own(*arguments)[1])
        assert (ours(*arguments)[1] >= 0).any() == (count > 0)


@pytest.mark.filterwarnings("ignore")
def test_effdet() -> None:
    """The targets are those of its own matcher."""
    anchors_of = needs("effdet.anchors")
    found = []
    for guided in (False, True):
        anchors = anchors_of.Anchors(3, 5, 2, [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)], 4.0, (128, 128))
        labeler = anchors_of.AnchorLabeler(anchors, 4)
        if guided:
            exec(lines_of("effdet")[0], {"labeler": labeler})
        boxes = [random_boxes(3, 128), random_boxes(2, 128, seed=1)]
        found.append(labeler.batch_label_anchors(boxes, [torch.tensor([1, 2, 4]), torch.tensor([3, 1])]))
    for ours, theirs in zip(*found[::-1], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert float(found[1][2].sum() if isinstance(found[1][2], Tensor) else sum(found[1][2])) > 0


@pytest.mark.parametrize(
    ("block", "base", "expected"),
    [
        (0, "retinanet/retinanet_r50_fpn_1x_coco.py", []),
        (1, "ddod/ddod_r50_fpn_1x_coco.py", [("cls_logits", "classification"), ("cls_logits", "localization")]),
        (2, "yolox/yolox_tiny_8xb8-300e_coco.py", [("cls_probabilities", "classification")]),
    ],
)
def test_mmdetection(block: int, base: str, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    """As the configuration of a user, whose base is mmdetection's: what both have is merged."""
    needs("mmcv.ops")
    registry, mmdet, engine = needs("mmdet.registry"), needs("mmdet"), needs("mmengine")
    folder = Path(mmdet.__file__).parent / ".mim/configs"
    file = tmp_path / "config.py"
    file.write_text(f"_base_ = {str(folder / base)!r}\n" + lines_of("mmdetection")[block])
    model = engine.Config.fromfile(file).model
    if block == 0:
        head = registry.MODELS.build({**model.bbox_head, "train_cfg": model.train_cfg})
        assert type(head).__name__ == "GuidedRetinaHead"
    assigners = [
        registry.TASK_UTILS.build(model.train_cfg[name])
        for name in ("assigner", "reg_assigner")
        if block > 0 and name in model.train_cfg
    ]
    assert [(one.scores_name, one.task) for one in assigners] == expected
    names = {1: "MutualMatcher", 2: "SimOtaMatcher"}
    assert all(type(one.matcher).__name__ == names[block] for one in assigners)


def test_every_section_is_run_here() -> None:
    sections = [
        name
        for name in re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
        if "```py\n" in PAGE.split(f"## {name}\n")[1].split("\n## ")[0]
    ]
    tested = {"torchvision", "ultralytics", "detectron2", "YOLOX and LibreYOLO", "MONAI", "effdet", "mmdetection"}
    assert set(sections) == tested
