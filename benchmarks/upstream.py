"""The libraries whose rules are ours to reproduce, loaded as far as the rules go.

mmdetection imports its compiled companion mmcv in every `__init__`; the assigners need none of it. So its packages are
stood in for by empty ones that lead to its own files.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mg_ops import BACKGROUND, IGNORED

MMDET_ASSIGNERS = {
    "ATSSAssigner": "atss_assigner",
    "DynamicSoftLabelAssigner": "dynamic_soft_label_assigner",
    "MaxIoUAssigner": "max_iou_assigner",
    "SimOTAAssigner": "sim_ota_assigner",
    "TaskAlignedAssigner": "task_aligned_assigner",
}
"""Class -> module of mmdet.models.task_modules.assigners."""


@functools.cache
def mmdet_assigners() -> dict[str, Any]:
    """What makes each of mmdetection's assigners, by the class's name; ImportError says what is not installed."""
    spec = importlib.util.find_spec("mmdet")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("mmdet is not installed")
    importlib.import_module("mmengine.structures")
    root = Path(spec.submodule_search_locations[0])
    assigners = "mmdet.models.task_modules.assigners"
    packages = ["mmdet", "mmdet.models", "mmdet.models.task_modules", assigners]
    packages += ["mmdet.structures", "mmdet.structures.bbox", "mmdet.utils"]
    before = {module: sys.modules[module] for module in list(sys.modules) if module.split(".")[0] == "mmdet"}
    for module in before:
        del sys.modules[module]
    try:
        for package in packages:
            stand_in = ModuleType(package)
            stand_in.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
            sys.modules[package] = stand_in
        sys.modules["mmdet.utils"].ConfigType = dict  # type: ignore[attr-defined]
        bbox: Any = sys.modules["mmdet.structures.bbox"]
        bbox.bbox_overlaps = importlib.import_module("mmdet.structures.bbox.bbox_overlaps").bbox_overlaps
        bbox.get_box_tensor = lambda boxes: boxes
        bbox.BaseBoxes = type("BaseBoxes", (), {})
        calculator = importlib.import_module(f"{assigners}.iou2d_calculator").BboxOverlaps2D
        # By its name the calculator would be looked up in all of mmdetection.
        return {
            name: functools.partial(
                getattr(importlib.import_module(f"{assigners}.{module}"), name), iou_calculator={"type": calculator}
            )
            for name, module in MMDET_ASSIGNERS.items()
        }
    finally:
        for module in [module for module in sys.modules if module.split(".")[0] == "mmdet"]:
            del sys.modules[module]
        sys.modules.update(before)


def instances(**tensors: Any) -> Any:
    """mmengine's InstanceData of these."""
    return importlib.import_module("mmengine.structures").InstanceData(**tensors)


def labels_of_mmdet(inds: Any) -> Any:
    """Indices that count objects from 1, with 0 for background and -1 for ignored, as a match numbers them."""
    return torch.where(inds > 0, inds - 1, torch.where(inds == 0, BACKGROUND, IGNORED))
