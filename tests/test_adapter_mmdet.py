"""`MutualAssigner` keeps mmdetection's assigner contract, without mmdetection and with its own `AssignResult`.

mmdetection imports its compiled companion mmcv in every `__init__`. Where only its Python files are installed, the test
against them loads `assign_result.py` and `util_mixins.py` themselves, and nothing else of mmdetection is run.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import mg_ops
from mg_ops.adapters import mmdet

ANCHORS = torch.tensor(
    [
        [0.0, 0.0, 10.0, 10.0],
        [0.0, 0.0, 10.0, 9.0],
        [0.0, 0.0, 9.0, 5.5],
        [40.0, 40.0, 50.0, 50.0],
        [70.0, 0.0, 80.0, 10.0],
    ]
)


def image() -> tuple[SimpleNamespace, SimpleNamespace, SimpleNamespace]:
    """IoU 1, 0.9, 0.495, 0 and 0 with object 1; object 0 is the fourth anchor; a crowd region covers the last."""
    predictions = SimpleNamespace(priors=ANCHORS, bboxes=ANCHORS.clone(), scores=torch.full((5, 8), 0.5))
    objects = SimpleNamespace(bboxes=ANCHORS[[3, 0]], labels=torch.tensor([7, 4]))
    return predictions, objects, SimpleNamespace(bboxes=torch.tensor([[60.0, 0.0, 90.0, 20.0]]))


def check_contract(result: Any) -> None:
    assert result.num_gts == 2 and result.num_preds == 5
    assert result.gt_inds.tolist() == [2, 2, -1, 1, -1]
    assert result.labels.tolist() == [4, 4, -1, 7, -1]
    assert result.max_overlaps.tolist() == pytest.approx([1.0, 0.9, 0.0, 1.0, 0.0])
    assert result.get_extra_property("loc_gt_inds").tolist() == [2, 2, 0, 1, 0]


def test_background_is_0_ignored_minus_1_and_objects_count_from_1() -> None:
    check_contract(mmdet.MutualAssigner().assign(*image(), alpha=1, beta=6))


def test_each_task_can_be_asked_for() -> None:
    """As DDOD's head does, by keywords and with the sizes of its levels."""
    predictions, objects, regions = image()
    assigner = mmdet.MutualAssigner(task="localization")
    result = assigner.assign(
        pred_instances=predictions, num_level_priors=[5], gt_instances=objects, gt_instances_ignore=regions
    )
    assert result.gt_inds.tolist() == [2, 2, 0, 1, 0] == result.get_extra_property("loc_gt_inds").tolist()
    assert result.labels.tolist() == [4, 4, -1, 7, -1]
    with pytest.raises(ValueError, match="task: expected 'classification' or 'localization', got 'both'"):
        mmdet.MutualAssigner(task="both")


def test_toods_call_and_weights_are_understood() -> None:
    """TOOD's head passes alpha and beta by position, and reads a weight of each positive."""
    result = mmdet.MutualAssigner().assign(*image(), 1, 6)
    check_contract(result)
    assert result.assign_metrics.tolist() == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_without_regions_to_ignore_nothing_is_ignored_for_them() -> None:
    predictions, objects, regions = image()
    nothing = SimpleNamespace(bboxes=regions.bboxes[:0])
    for ignore in (None, nothing):
        assert mmdet.MutualAssigner().assign(predictions, objects, ignore).gt_inds.tolist() == [2, 2, -1, 1, 0]


def test_without_objects_all_is_background() -> None:
    predictions, objects, _ = image()
    result = mmdet.MutualAssigner().assign(
        predictions, SimpleNamespace(bboxes=objects.bboxes[:0], labels=objects.labels[:0])
    )
    assert result.gt_inds.tolist() == [0] * 5 and result.labels.tolist() == [-1] * 5 and result.num_gts == 0


def test_logits_and_probabilities_give_the_same_match() -> None:
    """Scores decide who is positive for localisation: with one positive an object, the anchor that classifies it."""
    predictions, objects, _ = image()
    predictions.scores = torch.full((5, 8), 0.01)
    predictions.scores[1, 4] = 0.99
    options = {"iou_positive": 0.95, "sigma": 1.05}
    expected = mg_ops.mutual_match(
        ANCHORS, ANCHORS[None], torch.logit(predictions.scores)[None], [objects.bboxes], [objects.labels], **options
    )
    by_probability = mmdet.MutualAssigner(**options).assign(predictions, objects)
    predictions.scores = torch.logit(predictions.scores)
    by_logit = mmdet.MutualAssigner(scores_are_logits=True, **options).assign(predictions, objects)
    for result in (by_probability, by_logit):
        assert result.gt_inds.tolist() == (expected.cls_match[0] + 1).tolist()
        assert result.get_extra_property("loc_gt_inds").tolist() == (expected.loc_match[0] + 1).tolist()


def test_a_head_without_predictions_is_told_so() -> None:
    predictions, objects, _ = image()
    with pytest.raises(ValueError, match="pred_instances: expected priors, bboxes and scores, got no bboxes, scores"):
        mmdet.MutualAssigner().assign(SimpleNamespace(priors=predictions.priors), objects)


def load_real_assign_result(monkeypatch: pytest.MonkeyPatch) -> Any:
    """mmdetection's own class, from its two files, past the `__init__`s that need the compiled mmcv."""
    spec = importlib.util.find_spec("mmdet")
    if spec is None or spec.origin is None:
        pytest.skip("mmdet is not installed")
    folder = Path(spec.origin).parent
    for name in ("mmdet", "mmdet.utils"):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, package)
    mixins = importlib.import_module("mmdet.utils.util_mixins")
    monkeypatch.setitem(sys.modules, "mmdet.utils.util_mixins", mixins)
    path = folder / "models" / "task_modules" / "assigners" / "assign_result.py"
    spec = importlib.util.spec_from_file_location("mmdet_assign_result", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AssignResult


def test_the_real_assign_result_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = load_real_assign_result(monkeypatch)
    structures = pytest.importorskip("mmengine.structures", reason="mmengine is not installed")
    monkeypatch.setattr(mmdet, "AssignResult", real)
    predictions, objects, regions = (structures.InstanceData(**vars(part)) for part in image())
    result = mmdet.MutualAssigner().assign(predictions, objects, regions)
    assert type(result) is real and "num_gts=2" in repr(result)
    check_contract(result)
    result.add_gt_(objects.labels)
    assert result.gt_inds.tolist() == [1, 2, 2, 2, -1, 1, -1]
