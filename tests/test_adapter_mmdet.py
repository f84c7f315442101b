"""The assigners keep mmdetection's contract and give its own assigners' labels; its heads train by them.

mmdetection imports its compiled companion mmcv in every `__init__`. Where only its Python files are installed, its
`AssignResult` and its assigners are loaded from their own files, and the tests of its heads are skipped.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import mg_ops
from benchmarks import upstream
from detector.program import process_group
from mg_ops.adapters import mmdet
from mg_ops.adapters.labels import to_mmdet

ROOT = Path(__file__).parent.parent
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


def localization(result: Any) -> list[int]:
    """The match of localization in mmdetection's convention."""
    (match,) = to_mmdet(result.get_extra_property("match").loc_match).tolist()
    return match


def check_contract(result: Any) -> None:
    assert result.num_gts == 2 and result.num_preds == 5
    assert result.gt_inds.tolist() == [2, 2, -1, 1, -1]
    assert result.labels.tolist() == [4, 4, -1, 7, -1]
    assert result.max_overlaps.tolist() == pytest.approx([1.0, 0.9, 0.0, 1.0, 0.0])
    assert localization(result) == [2, 2, 0, 1, 0]


def test_background_is_0_ignored_minus_1_and_objects_count_from_1() -> None:
    check_contract(mmdet.MutualAssigner().assign(*image(), alpha=1, beta=6))


def test_each_task_can_be_asked_for() -> None:
    """As DDOD's head does, by keywords and with the sizes of its levels."""
    predictions, objects, regions = image()
    assigner = mmdet.MutualAssigner(task="localization")
    result = assigner.assign(
        pred_instances=predictions, num_level_priors=[5], gt_instances=objects, gt_instances_ignore=regions
    )
    assert result.gt_inds.tolist() == [2, 2, 0, 1, 0] == localization(result)
    assert result.labels.tolist() == [4, 4, -1, 7, -1]
    with pytest.raises(ValueError, match="task: expected one of 'classification', 'localization', got 'both'"):
        mmdet.MutualAssigner(task="both")


def test_toods_call_is_understood() -> None:
    """TOOD's head passes alpha and beta by position."""
    check_contract(mmdet.MutualAssigner().assign(*image(), 1, 6))


@pytest.mark.parametrize("task", ["classification", "localization"])
def test_overlaps_and_metrics_are_those_of_the_regressed_boxes(task: str) -> None:
    """1 for a perfect box, however far its anchor is; in TOOD's loss the class target of a positive is this IoU."""
    predictions, objects, _ = image()
    # The anchors of object 0 (the fourth) and object 1 (the first) regress half of them; the last, all of object 0.
    predictions.bboxes = torch.tensor(
        [[0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 8.0], [90.0, 0.0, 99.0, 9.0], [40, 40, 50, 45], [40, 40, 50, 50]]
    )
    result = mmdet.MutualAssigner(task=task).assign(predictions, objects)
    expected = torch.tensor([0.5, 0.8, 0.0, 0.5, 1.0])
    positive = result.gt_inds > 0
    assert positive.tolist() == (
        [True, True, False, False, True] if task == "classification" else [True, True, False, True, False]
    )
    torch.testing.assert_close(result.max_overlaps, torch.where(positive, expected, 0.0))
    torch.testing.assert_close(result.assign_metrics, result.max_overlaps)


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
    """Scores decide who is positive for localization: with one positive an object, the anchor that classifies it."""
    predictions, objects, _ = image()
    predictions.scores = torch.full((5, 8), 0.01)
    predictions.scores[1, 4] = 0.99
    options = {"iou_positive": 0.95, "sigma": 1.05}
    expected = mg_ops.mutual_match(
        ANCHORS,
        [objects.bboxes],
        [objects.labels],
        **options,
        cls_logits=torch.logit(predictions.scores)[None],
        pred_boxes=ANCHORS[None],
    )
    by_probability = mmdet.MutualAssigner(**options).assign(predictions, objects)
    predictions.scores = torch.logit(predictions.scores)
    by_logit = mmdet.MutualAssigner(scores_are_logits=True, **options).assign(predictions, objects)
    for result in (by_probability, by_logit):
        assert result.gt_inds.tolist() == (expected.cls_match[0] + 1).tolist()
        assert localization(result) == (expected.loc_match[0] + 1).tolist()


def test_a_head_without_predictions_is_told_so() -> None:
    predictions, objects, _ = image()
    with pytest.raises(ValueError, match="pred_instances: expected priors, bboxes and scores, got no bboxes, scores"):
        mmdet.MutualAssigner().assign(SimpleNamespace(priors=predictions.priors), objects)


POINTS = torch.tensor([[4.0, 4.0, 8.0, 8.0], [12.0, 4.0, 8.0, 8.0], [8.0, 8.0, 16.0, 16.0]])
"""(cx, cy, stride, stride), as RTMDet's and YOLOX's heads give them."""
SQUARES = torch.tensor([[-12.0, -12.0, 20.0, 20.0], [-4.0, -12.0, 28.0, 20.0], [-24.0, -24.0, 40.0, 40.0]])
"""Their anchors of 4 strides."""


def test_points_get_squares_of_their_strides() -> None:
    """The object is the second square: IoU 24 * 32 / (2 * 32 * 32 - 24 * 32) = 0.6, 1 and 32 * 32 / 64 / 64 = 0.25."""
    predictions = SimpleNamespace(priors=POINTS, bboxes=SQUARES.clone(), scores=torch.full((3, 8), 0.5))
    objects = SimpleNamespace(bboxes=SQUARES[1:2], labels=torch.tensor([5]))
    result = mmdet.MutualAssigner(anchor_size=4.0).assign(predictions, objects)
    assert result.gt_inds.tolist() == [1, 1, 0]
    assert localization(result) == [1, 1, 0]
    assert result.labels.tolist() == [5, 5, -1]
    assert result.max_overlaps.tolist() == pytest.approx([0.6, 1.0, 0.0])
    # Half the side, around the same points: IoU 8 * 16 / (2 * 16 * 16 - 8 * 16) = 0.33, 1 and 0.25.
    predictions.bboxes = torch.tensor([[-4.0, -4.0, 12.0, 12.0], [4.0, -4.0, 20.0, 12.0], [-8.0, -8.0, 24.0, 24.0]])
    objects.bboxes = predictions.bboxes[1:2]
    assert mmdet.MutualAssigner(anchor_size=2.0).assign(predictions, objects).gt_inds.tolist() == [0, 1, 0]


def test_points_are_not_taken_for_boxes_nor_boxes_for_points() -> None:
    predictions, objects, _ = image()
    predictions.priors = ANCHORS[:2]
    with pytest.raises(ValueError, match=r"priors: expected points .*, got .* 9.0\]; .* leave out anchor_size"):
        mmdet.MutualAssigner(anchor_size=4.0).assign(predictions, objects)
    predictions.priors = POINTS
    with pytest.raises(ValueError, match=r"priors: expected boxes .*, got \[12.0, .* pass anchor_size=4.0"):
        mmdet.MutualAssigner().assign(predictions, objects)
    with pytest.raises(ValueError, match="anchor_size: expected a positive number of strides or None, got 0"):
        mmdet.MutualAssigner(anchor_size=0)


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


# ---------------------------------------------------------------------------------------------------------------------
# Label for label


LEVEL_SIZES = [400, 100, 25]


class Scene(NamedTuple):
    """An image of 160 x 160 pixels with three feature levels. Its objects' places are numbers that hardly ever tie."""

    points: Tensor
    """(525, 4) centers, and strides twice."""
    anchors: Tensor
    """(525, 4) their squares of 4 strides."""
    pred_boxes: Tensor
    scores: Tensor
    """(525, 6) probabilities."""
    objects: SimpleNamespace


def random_scene(seed: int, num_objects: int = 5) -> Scene:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    levels = []
    for stride, side in ((8.0, 20), (16.0, 10), (32.0, 5)):
        centers = (torch.arange(side) + 0.5) * stride
        levels.append(functional.pad(torch.cartesian_prod(centers, centers).flip(1), (0, 2), value=stride))
    points = torch.cat(levels)
    anchors = mg_ops.anchors_from_points(points[:, :2], points[:, 2], 4.0)
    first, size = 110 * random(num_objects, 2), 12 + 38 * random(num_objects, 2)
    objects = SimpleNamespace(
        bboxes=torch.cat([first, first + size], dim=1),
        labels=torch.randint(6, (num_objects,), generator=generator),
    )
    pred_boxes = anchors + points[:, 2:3] * (random(525, 4) - 0.5)
    return Scene(points, anchors, pred_boxes, 0.02 + 0.9 * random(525, 6), objects)


OWN = {
    "max_iou": ("MaxIoUAssigner", {"pos_iou_thr": 0.5, "neg_iou_thr": 0.4}),
    "atss": ("ATSSAssigner", {"topk": 9}),
    "task_aligned": ("TaskAlignedAssigner", {"topk": 13}),
    "simota": ("SimOTAAssigner", {}),
    "dynamic_soft_label": ("DynamicSoftLabelAssigner", {}),
}
"""Rule -> mmdetection's own assigner, with its options in the head whose rule it is."""


@pytest.mark.parametrize("rule", OWN)
@pytest.mark.parametrize("num_objects", [0, 1, 7])
def test_each_rule_gives_what_mmdetections_own_assigner_gives(rule: str, num_objects: int) -> None:
    name, options = OWN[rule]
    try:
        own = upstream.mmdet_assigners()[name](**options)
    except ImportError as error:
        pytest.skip(str(error))
    assigner = mmdet.RuleAssigner(rule)
    for seed in range(20):
        scene = random_scene(seed, num_objects)
        scores = torch.logit(scene.scores) if rule == "dynamic_soft_label" else scene.scores
        predictions = {"bboxes": scene.pred_boxes, "scores": scores}
        priors = scene.points if rule in ("simota", "dynamic_soft_label") else scene.anchors
        instances = upstream.instances(priors=priors, **({} if rule in ("max_iou", "atss") else predictions))
        objects = upstream.instances(**vars(scene.objects))
        call: tuple[Any, ...] = (instances, objects, None)
        if rule == "atss":
            call = (instances, LEVEL_SIZES, objects, None)
        elif rule == "task_aligned":
            call = (*call, 1, 6)
        result, wanted = assigner.assign(*call), own.assign(*call)
        assert result.num_gts == wanted.num_gts == num_objects
        assert result.gt_inds.tolist() == wanted.gt_inds.tolist()
        assert result.labels.tolist() == wanted.labels.tolist()
        positive = result.gt_inds > 0
        assert bool(positive.any()) == (num_objects > 0)
        overlaps = wanted.max_overlaps
        if rule == "max_iou" and num_objects > 0:
            # mmdetection's own is the largest of any object, whichever the anchor is given to.
            iou = mg_ops.box_iou(scene.anchors, scene.objects.bboxes)
            overlaps = iou.gather(1, (wanted.gt_inds - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(result.max_overlaps[positive], overlaps[positive])
        assert result.max_overlaps[~positive].eq(0).all()
        if rule == "task_aligned":
            torch.testing.assert_close(result.assign_metrics, wanted.assign_metrics)


@pytest.mark.parametrize("task", ["classification", "localization"])
def test_dynamic_mutual_matching_says_either_task(task: str) -> None:
    scene = random_scene(0)
    instances = SimpleNamespace(priors=scene.anchors, bboxes=scene.pred_boxes, scores=scene.scores)
    result = mmdet.RuleAssigner("dynamic_mutual", task=task, k=9).assign(instances, scene.objects)
    match = mg_ops.dynamic_mutual_match(
        scene.anchors,
        [scene.objects.bboxes],
        [scene.objects.labels],
        k=9,
        cls_probabilities=scene.scores[None],
        pred_boxes=scene.pred_boxes[None],
    )
    task_match = match.cls_match if task == "classification" else match.loc_match
    assert result.gt_inds.tolist() == (task_match[0] + 1).tolist()
    if task == "classification":
        torch.testing.assert_close(result.max_overlaps, match.soft_targets[0])


def test_the_levels_are_those_of_each_call() -> None:
    """Heads leave out anchors beyond the image's border, other ones for each image."""
    scene, assigner = random_scene(1), mmdet.RuleAssigner("atss")
    for keep in ([400, 100, 25], [300, 100, 25], [400, 60, 0]):
        anchors = torch.cat(
            [level[:count] for level, count in zip(scene.anchors.split(LEVEL_SIZES), keep, strict=True)]
        )
        match = mg_ops.atss_match(anchors, [scene.objects.bboxes], level_sizes=keep)
        expected = to_mmdet(match.cls_match[0]).tolist()
        predictions = SimpleNamespace(priors=anchors)
        assert assigner.assign(predictions, keep, scene.objects, None).gt_inds.tolist() == expected
        by_name = assigner.assign(pred_instances=predictions, num_level_priors=keep, gt_instances=scene.objects)
        assert by_name.gt_inds.tolist() == expected


def test_tood_decides_alpha_and_beta() -> None:
    scene, assigner = random_scene(2), mmdet.RuleAssigner("task_aligned")
    instances = SimpleNamespace(priors=scene.anchors, bboxes=scene.pred_boxes, scores=scene.scores)
    found = []
    for alpha, beta in ((1, 6), (4, 0.5), (1, 6)):
        result = assigner.assign(instances, scene.objects, None, alpha, beta)
        assert (assigner.matcher.alpha, assigner.matcher.beta) == (alpha, beta)
        found.append(result.gt_inds.tolist())
    assert found[0] == found[2] != found[1]


def test_rules_and_what_they_read_are_named() -> None:
    scene = random_scene(3)
    with pytest.raises(ValueError, match=r"rule: expected one of 'mutual', 'dynamic_mutual', .*, got 'hungarian'"):
        mmdet.RuleAssigner("hungarian")
    with pytest.raises(ValueError, match="got no bboxes, scores; SimOtaMatcher needs a head"):
        mmdet.RuleAssigner("simota").assign(SimpleNamespace(priors=scene.points), scene.objects)
    with pytest.raises(ValueError, match="level_sizes: expected the number of anchors of each level"):
        mmdet.RuleAssigner("atss").assign(SimpleNamespace(priors=scene.anchors), scene.objects)
    with pytest.raises(TypeError, match=r"options: expected those of AtssMatcher, got k_nearest; .* add _delete_"):
        mmdet.RuleAssigner("atss", k_nearest=9)


def test_priors_that_change_are_looked_at_again() -> None:
    """Multi-scale training has other points in each batch."""
    scene, assigner = random_scene(4), mmdet.RuleAssigner("simota")
    for points in (scene.points, scene.points[:400], scene.points + torch.tensor([8.0, 8.0, 0.0, 0.0])):
        instances = SimpleNamespace(
            priors=points, bboxes=scene.pred_boxes[: len(points)], scores=scene.scores[: len(points)]
        )
        result = assigner.assign(instances, scene.objects)
        fresh = mmdet.RuleAssigner("simota").assign(instances, scene.objects)
        assert result.gt_inds.tolist() == fresh.gt_inds.tolist()
    with pytest.raises(ValueError, match="priors: expected points"):
        instances.priors = scene.anchors
        assigner.assign(instances, scene.objects)


def test_without_mmdetection_its_head_says_what_is_missing() -> None:
    if mmdet.MODELS is not None:
        pytest.skip("mmdet is installed, with mmcv")
    with pytest.raises(ImportError, match="GuidedRetinaHead: expected mmdetection, and mmcv"):
        mmdet.GuidedRetinaHead(num_classes=3, in_channels=8)


# ---------------------------------------------------------------------------------------------------------------------
# Its heads


RTMDET_HEAD = {
    "type": "RTMDetHead",
    "norm_cfg": {"type": "BN"},
    "anchor_generator": {"type": "MlvlPointGenerator", "offset": 0, "strides": [8, 16, 32]},
    "bbox_coder": {"type": "DistancePointBBoxCoder"},
    "loss_cls": {"type": "QualityFocalLoss", "use_sigmoid": True},
    "loss_bbox": {"type": "GIoULoss"},
    "train_cfg": {
        "assigner": {"type": mmdet.MutualAssigner, "anchor_size": 4.0, "scores_are_logits": True},
        "allowed_border": -1,
        "pos_weight": -1,
    },
}
YOLOX_HEAD = {
    "type": "YOLOXHead",
    "strides": [8, 16, 32],
    "train_cfg": {"assigner": {"type": mmdet.MutualAssigner, "anchor_size": 4.0}},
}


TOOD_HEAD = {
    "type": "TOODHead",
    "norm_cfg": {"type": "BN"},
    "anchor_type": "anchor_free",
    "anchor_generator": {
        "type": "AnchorGenerator",
        "ratios": [1.0],
        "octave_base_scale": 4,
        "scales_per_octave": 1,
        "strides": [8, 16, 32],
    },
    "bbox_coder": {"type": "DeltaXYWHBBoxCoder"},
    "initial_loss_cls": {"type": "FocalLoss", "activated": True},
    "loss_cls": {"type": "QualityFocalLoss", "use_sigmoid": True, "activated": True},
    "loss_bbox": {"type": "GIoULoss"},
    "train_cfg": {
        "assigner": {"type": mmdet.MutualAssigner},
        "initial_assigner": {"type": "ATSSAssigner", "topk": 9},
        "initial_epoch": 0,
        "alpha": 1,
        "beta": 6,
        "allowed_border": -1,
        "pos_weight": -1,
    },
}


@pytest.fixture
def small_head() -> Any:
    """Makes a real head, and its loss for two images of two and one objects, with the assigner's results."""
    pytest.importorskip("mmcv.ops", reason="mmcv is not installed with its operators")
    models = pytest.importorskip("mmdet.models", reason="mmdet is not installed")
    engine = pytest.importorskip("mmengine")

    def make(config: dict[str, Any], assigner: str = "assigner") -> tuple[Any, Any, list[Any]]:
        torch.manual_seed(0)
        options = {"num_classes": 3, "in_channels": 8, "feat_channels": 8, "stacked_convs": 1, **config}
        head = getattr(models.dense_heads, options.pop("type"))(**engine.ConfigDict(options))
        results: list[Any] = []
        assign = getattr(head, assigner).assign

        def watched_assign(*args: Any, **kwargs: Any) -> Any:
            results.append(assign(*args, **kwargs))
            return results[-1]

        getattr(head, assigner).assign = watched_assign
        engine.MessageHub.get_current_instance().update_info("epoch", 0)  # TOOD's head asks for it
        boxes = [
            torch.tensor([[4.0, 4.0, 40.0, 36.0], [30.0, 20.0, 62.0, 60.0]]),
            torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        ]
        labels = [torch.tensor([0, 2]), torch.tensor([1])]
        objects = [
            engine.structures.InstanceData(bboxes=boxes[image], labels=labels[image]) for image in range(len(boxes))
        ]

        def loss() -> Tensor:
            outputs = head([torch.randn(2, 8, 64 // stride, 64 // stride) for stride in (8, 16, 32)])
            losses = head.loss_by_feat(*outputs, objects, [{"img_shape": (64, 64), "pad_shape": (64, 64)}] * 2)
            return sum(torch.stack(loss).sum() if isinstance(loss, list) else loss for loss in losses.values())

        return head, loss, results

    return make


@pytest.mark.parametrize("config", [RTMDET_HEAD, YOLOX_HEAD], ids=["RTMDet", "YOLOX"])
def test_the_real_heads_of_points_train(config: dict[str, Any], small_head: Any) -> None:
    head, loss, results = small_head(config)
    total = loss()
    total.backward()
    assert total.isfinite()
    assert [set(result.gt_inds.tolist()) - {0, -1} for result in results] == [{1, 2}, {1}]
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_the_real_tood_head_trains_each_positive_toward_the_iou_of_its_box(small_head: Any) -> None:
    head, loss, results = small_head(TOOD_HEAD, "alignment_assigner")
    targets = []
    get_targets = head._get_targets_single

    def watched_targets(*args: Any, **kwargs: Any) -> Any:
        targets.append(get_targets(*args, **kwargs))
        return targets[-1]

    head._get_targets_single = watched_targets
    total = loss()
    total.backward()
    assert total.isfinite()
    for (*_, target), result in zip(targets, results, strict=True):
        positive = result.gt_inds > 0
        assert positive.any() and len(result.max_overlaps[positive].unique()) > 1
        torch.testing.assert_close(target, torch.where(positive, result.max_overlaps, 0.0), rtol=1e-4, atol=0)


RETINA_HEAD = {
    "anchor_generator": {
        "type": "AnchorGenerator",
        "octave_base_scale": 4,
        "scales_per_octave": 2,
        "ratios": [0.5, 1.0],
        "strides": [8, 16, 32],
    },
    "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_stds": (0.1, 0.1, 0.2, 0.2)},
    "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "alpha": 0.3},
    "loss_bbox": {"type": "L1Loss"},
    "train_cfg": {
        "assigner": {"type": "MaxIoUAssigner", "pos_iou_thr": 0.45, "neg_iou_thr": 0.35, "min_pos_iou": 0},
        "allowed_border": -1,
        "pos_weight": -1,
    },
    "num_classes": 3,
    "in_channels": 8,
    "feat_channels": 8,
    "stacked_convs": 1,
}
GUIDED = "mg_ops.adapters.mmdet.GuidedRetinaHead"


@pytest.fixture
def retina_head() -> Any:
    """Makes a RetinaNet head by its name in the registry, always with the same weights."""
    pytest.importorskip("mmcv.ops", reason="mmcv is not installed with its operators")
    registry = pytest.importorskip("mmdet.registry", reason="mmdet is not installed")
    pytest.importorskip("mmdet.models")
    engine = pytest.importorskip("mmengine")

    def make(kind: str, assigner: dict[str, Any] | None = None, **options: Any) -> Any:
        torch.manual_seed(0)
        config = engine.ConfigDict({**RETINA_HEAD, "type": kind, **options})
        if assigner is not None:
            config.train_cfg = {**RETINA_HEAD["train_cfg"], "assigner": assigner}
        head = registry.MODELS.build(config)
        head.init_weights()
        return head

    return make


def retina_losses(head: Any, *, pads: Any = ((64, 64), (64, 64)), empty: int = 0, regions: Any = None) -> Any:
    """The losses for two images, the first `empty` of them without objects."""
    structures = pytest.importorskip("mmengine.structures")
    boxes = [torch.tensor([[4.3, 4.1, 40.7, 36.9], [30.2, 20.4, 61.9, 58.6]]), torch.tensor([[7.7, 8.1, 39.2, 41.6]])]
    labels = [torch.tensor([0, 2]), torch.tensor([1])]
    objects = [
        structures.InstanceData(bboxes=image[: 0 if i < empty else 2], labels=of_image[: 0 if i < empty else 2])
        for i, (image, of_image) in enumerate(zip(boxes, labels, strict=True))
    ]
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(2, 8, 64 // stride, 64 // stride, generator=generator) for stride in (8, 16, 32)]
    outputs = head(features)
    metas = [{"img_shape": pad, "pad_shape": pad} for pad in pads]
    losses = head.loss_by_feat(*outputs, objects, metas, regions)
    return outputs, objects, {name: torch.stack(loss).sum() for name, loss in losses.items()}


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("pads", [((64, 64), (64, 64)), ((64, 64), (64, 40))], ids=["one size", "two sizes"])
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_by_max_iou_the_guided_head_has_the_losses_of_retina_head(
    retina_head: Any, decoded: bool, pads: Any, empty: int
) -> None:
    """And its gradients: one match for both tasks, so that the normalizers are the same."""
    options = {"reg_decoded_bbox": decoded}
    if decoded:
        options["loss_bbox"] = {"type": "GIoULoss"}
    own = retina_head("RetinaHead", **options)
    rule = {"type": "mg_ops.adapters.mmdet.RuleAssigner", "rule": "max_iou", "iou_positive": 0.45, "iou_ignored": 0.35}
    guided = retina_head(GUIDED, rule, **options)
    guided.load_state_dict(own.state_dict(), strict=True)
    found = []
    for head in (own, guided):
        _, _, losses = retina_losses(head, pads=pads, empty=empty)
        sum(losses.values()).backward()
        found.append((losses, [parameter.grad for parameter in head.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_each_loss_has_its_own_match_and_its_own_number_of_positives(retina_head: Any) -> None:
    """By dynamic mutual matching, whose two numbers differ; those of mutual matching are equal here."""
    head = retina_head(GUIDED, {"type": "mg_ops.adapters.mmdet.RuleAssigner", "rule": "dynamic_mutual"})
    torch.nn.init.normal_(head.retina_reg.weight, std=0.5)  # boxes that have left their anchors
    (scores, deltas), objects, losses = retina_losses(head)
    logits = torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, 3) for level in scores], dim=1)
    deltas = torch.cat([level.permute(0, 2, 3, 1).reshape(2, -1, 4) for level in deltas], dim=1)
    anchors = torch.cat(head.prior_generator.grid_priors([(8, 8), (4, 4), (2, 2)], device="cpu"))
    coder = mg_ops.BoxCoder()
    boxes, labels = [image.bboxes for image in objects], [image.labels for image in objects]
    match = mg_ops.dynamic_mutual_match(anchors, boxes, labels, cls_logits=logits, box_deltas=deltas, box_coder=coder)
    assert head.match.cls_match.tolist() == match.cls_match.tolist()
    assert head.match.loc_match.tolist() == match.loc_match.tolist()
    assert match.cls_positive.sum() != match.loc_positive.sum()
    targets = mg_ops.encode_targets(match, anchors, boxes, labels, num_classes=3, box_coder=coder)
    cls_loss = mg_ops.losses.focal_loss(
        logits, targets.class_targets, alpha=0.3, normalizer=match.cls_positive.sum().float()
    )
    box_error = (deltas - targets.box_targets).abs().sum(-1)[match.loc_positive].sum() / match.loc_positive.sum()
    torch.testing.assert_close(losses["loss_cls"], cls_loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["loss_bbox"], box_error, rtol=1e-4, atol=0)


def test_mutual_guidance_takes_the_thresholds_of_max_iou(retina_head: Any) -> None:
    matcher = retina_head(GUIDED).matcher
    assert isinstance(matcher, mg_ops.MutualMatcher)
    assert (matcher.iou_positive, matcher.iou_ignored) == (0.45, 0.35)


def test_regions_to_ignore_are_neither_background_nor_objects(retina_head: Any) -> None:
    structures = pytest.importorskip("mmengine.structures")
    head = retina_head(GUIDED)
    region = structures.InstanceData(bboxes=torch.tensor([[0.0, 0.0, 64.0, 64.0]]))
    _, _, losses = retina_losses(head, empty=2, regions=[None, region])
    assert losses["loss_cls"] > 0
    assert not head.match.ignored[0].any() and head.match.ignored[1].any()
    retina_losses(head, empty=1, regions=[region, None])
    assert head.match.ignored[0].any() and head.match.cls_match.max() == 0


def test_the_guided_head_in_bfloat16(retina_head: Any) -> None:
    head = retina_head(GUIDED)
    with torch.autocast("cpu", torch.bfloat16):
        _, _, losses = retina_losses(head)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_what_the_guided_head_cannot_take_is_named(retina_head: Any) -> None:
    with pytest.raises(ValueError, match="target_means: expected zeros"):
        retina_head(GUIDED, bbox_coder={"type": "DeltaXYWHBBoxCoder", "target_means": (0.1, 0.0, 0.0, 0.0)})
    with pytest.raises(TypeError, match="bbox_coder: expected DeltaXYWHBBoxCoder, got TBLRBBoxCoder"):
        retina_head(GUIDED, bbox_coder={"type": "TBLRBBoxCoder"})
    with pytest.raises(TypeError, match=r"assigner: expected MaxIoUAssigner, .*, got ATSSAssigner"):
        retina_head(GUIDED, {"type": "ATSSAssigner", "topk": 9})
    with pytest.raises(ValueError, match="use_sigmoid: expected True"):
        retina_head(GUIDED, loss_cls={"type": "CrossEntropyLoss"})


# ---------------------------------------------------------------------------------------------------------------------
# Its detectors, as people train them


DETECTORS = ("retinanet", "ddod", "tood", "rtmdet", "yolox")


def small_detector(name: str) -> Any:
    """A guided detector of examples/frameworks/train_mmdet.py, its batch statistics frozen."""
    pytest.importorskip("mmcv.ops", reason="mmcv is not installed with its operators")
    model = pytest.importorskip("mmengine.model")
    registry = pytest.importorskip("mmdet.registry", reason="mmdet is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples/frameworks"))
        example = importlib.import_module("train_mmdet")
    example.register_all_modules()
    importlib.import_module("mmengine").MessageHub.get_current_instance().update_info("epoch", 0)  # TOOD asks for it
    logging.getLogger("mmengine").setLevel(logging.ERROR)  # it says how each parameter begins
    torch.manual_seed(0)
    detector = model.revert_sync_batchnorm(registry.MODELS.build(example.configuration(name, Path(), steps=1).model))
    detector.init_weights()
    detector.train()
    for module in detector.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    if name == "rtmdet":
        for layer in detector.bbox_head.rtm_reg:  # its boxes begin without an area, and so its targets at 0
            torch.nn.init.constant_(layer.bias, 1.5)
    return detector


def detector_batch(images: slice = slice(None)) -> dict[str, list[Any]]:
    """Two images, the second without objects."""
    structures = pytest.importorskip("mmengine.structures")
    sample_class = pytest.importorskip("mmdet.structures").DetDataSample
    generator = torch.Generator().manual_seed(1)
    boxes, labels = torch.tensor([[3.3, 4.1, 40.2, 44.7], [30.8, 33.2, 85.9, 80.1]]), torch.tensor([0, 2])
    inputs, samples = [], []
    for count in (2, 0):
        inputs.append(torch.randint(0, 256, (3, 96, 96), generator=generator, dtype=torch.uint8))
        samples.append(sample_class(metainfo={"img_shape": (96, 96), "ori_shape": (96, 96)}))
        samples[-1].gt_instances = structures.InstanceData(bboxes=boxes[:count], labels=labels[:count])
        samples[-1].ignored_instances = structures.InstanceData(bboxes=boxes[:0], labels=labels[:0])
    return {"inputs": inputs[images], "data_samples": samples[images]}


def detector_gradients(detector: Any, batch: dict[str, list[Any]], forward: Any = None) -> tuple[Any, list[Tensor]]:
    """The losses and gradients of a detector, or of what wraps it."""
    data = detector.data_preprocessor(batch, True)
    forward = detector if forward is None else forward
    total, losses = detector.parse_losses(forward(data["inputs"], data["data_samples"], mode="loss"))
    total.backward()
    gradients = [parameter.grad for parameter in detector.parameters() if parameter.grad is not None]
    return {name: loss.detach() for name, loss in losses.items()}, gradients


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["retinanet", "rtmdet", "yolox"])
def test_detectors_in_bfloat16(name: str) -> None:
    """Without DDOD and TOOD: mmcv's deformable convolution has no bfloat16 on the CPU."""
    expected, _ = detector_gradients(small_detector(name), detector_batch())
    with torch.autocast("cpu", torch.bfloat16):
        losses, gradients = detector_gradients(small_detector(name), detector_batch())
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_retinanet_is_the_eager_one() -> None:
    expected = detector_gradients(small_detector("retinanet"), detector_batch())
    torch._dynamo.reset()
    detector = small_detector("retinanet")
    found = detector_gradients(detector, detector_batch(), torch.compile(detector, backend="aot_eager"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def train_one_rank(rank: int, rendezvous: str) -> None:
    """One of two processes, each with one of the two images."""
    torch.set_num_threads(1)
    wrapper = importlib.import_module("mmengine.model").MMDistributedDataParallel
    expected = {}
    for name in DETECTORS:
        if name == "retinanet":  # each process divides by its own positives; the others, by the mean over processes
            alone = [detector_gradients(small_detector(name), detector_batch(slice(i, i + 1)))[1] for i in range(2)]
            expected[name] = [(one + other) / 2 for one, other in zip(*alone, strict=True)]
        else:
            expected[name] = detector_gradients(small_detector(name), detector_batch())[1]
    with process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2):
        for name in DETECTORS:
            model = wrapper(small_detector(name))
            _, gradients = detector_gradients(model.module, detector_batch(slice(rank, rank + 1)), model)
            if name != "ddod":  # it weighs its levels by the positives that the process has had
                torch.testing.assert_close(gradients, expected[name], rtol=1e-3, atol=1e-4)
            assert all(gradient.isfinite().all() for gradient in gradients)
            assert max(gradient.abs().max() for gradient in gradients) > 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_train_as_one_also_when_one_has_no_objects(tmp_path: Path) -> None:
    small_detector("retinanet")  # skips where it is not installed
    torch.multiprocessing.spawn(train_one_rank, args=(str(tmp_path / "rendezvous"),), nprocs=2)
