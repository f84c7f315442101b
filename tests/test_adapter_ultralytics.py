"""`MutualAssigner` is called as ultralytics' `TaskAlignedAssigner` is, and its detection loss trains with it."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_data import draw_image, random_objects
from torch import Tensor, nn

import mg_ops
from detector.program import process_group
from mg_ops.adapters.ultralytics import MutualAssigner, guide_trainer, use_fused_assigner, use_mutual_guidance

ROOT = Path(__file__).parent.parent
CLASSES = 3


SIZES = [(8, 8), (4, 4), (2, 2)]
"""The feature maps of an image of 64 pixels."""


def anchor_points(
    sizes: list[tuple[int, int]] = SIZES, strides: tuple[int, ...] = (8, 16, 32)
) -> tuple[Tensor, Tensor]:
    """The centers of the cells of all levels (A, 2) and their strides (A, 1), as ultralytics lays them."""
    points, steps = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        y, x = torch.meshgrid(
            (torch.arange(height) + 0.5) * stride, (torch.arange(width) + 0.5) * stride, indexing="ij"
        )
        points.append(torch.stack([x, y], dim=-1).reshape(-1, 2))
        steps.append(torch.full((len(points[-1]), 1), float(stride)))
    return torch.cat(points), torch.cat(steps)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Two images of two and no objects, padded to three."""
    generator = torch.Generator().manual_seed(0)
    points, steps = anchor_points()
    scores = torch.rand(2, len(points), CLASSES, generator=generator)
    noise = torch.rand(2, len(points), 4, generator=generator) - 0.5
    boxes = torch.cat([points - 2 * steps, points + 2 * steps], dim=1) + 12 * noise
    labels, gt_boxes, mask = torch.zeros(2, 3, 1), torch.zeros(2, 3, 4), torch.zeros(2, 3, 1)
    gt_boxes[0, 0], gt_boxes[0, 1] = torch.tensor([2.0, 3.0, 35.0, 30.0]), torch.tensor([20.0, 8.0, 63.0, 60.0])
    labels[0, 0], labels[0, 1] = 2, 1
    mask[0, :2] = 1
    return scores.to(dtype), boxes.to(dtype), points, labels, gt_boxes, mask


def small_assigner(**options: Any) -> MutualAssigner:
    """An assigner of the small images."""
    assigner = MutualAssigner(CLASSES, matcher=mg_ops.MutualMatcher(**options))
    assigner.level_sizes = SIZES
    return assigner


def test_points_get_boxes_of_their_stride() -> None:
    sizes = [(3, 5), (2, 3), (1, 1)]
    points, steps = anchor_points(sizes, (8, 16, 64))
    assigner = MutualAssigner(stride=[8, 16, 64], anchor_size=5.0)
    assigner.level_sizes = sizes
    anchors = torch.cat(assigner.anchors())
    assert anchors.shape == (15 + 6 + 1, 4)
    assert torch.equal(anchors[:, 2:] - anchors[:, :2], (5 * steps).expand(-1, 2))
    assert torch.equal((anchors[:, 2:] + anchors[:, :2]) / 2, points)
    assert anchors[16].tolist() == [-16.0, -32.0, 64.0, 48.0]  # the second cell of the second level, around (24, 8)


def test_the_results_say_the_mutual_match() -> None:
    scores, boxes, points, labels, gt_boxes, mask = batch()
    assigner = small_assigner(sigma=1.1)
    target_labels, target_bboxes, target_scores, fg_mask, target_gt_idx = assigner(
        scores, boxes, points, labels, gt_boxes, mask
    )
    match = mg_ops.mutual_match(
        assigner.anchors(),
        [gt_boxes[0, :2], gt_boxes[1, :0]],
        [labels[0, :2, 0].long(), labels[1, :0, 0].long()],
        cls_probabilities=scores,
        pred_boxes=boxes,
        sigma=1.1,
    )
    assert (match.cls_match != match.loc_match).any() and (match.cls_match == 1).any() and (match.loc_match == 1).any()
    for image in range(2):
        for anchor in range(len(points)):
            found = int(match.cls_match[image, anchor])
            label = [2, 1][found] if found >= 0 else CLASSES
            assert target_labels[image, anchor] == label
            assert target_scores[image, anchor].tolist() == [float(label == index) for index in range(CLASSES)]
            found = int(match.loc_match[image, anchor])
            assert bool(fg_mask[image, anchor]) == (found >= 0)
            assert target_gt_idx[image, anchor] == max(found, 0)
            assert target_bboxes[image, anchor].tolist() == (
                gt_boxes[image, found].tolist() if found >= 0 else [0.0] * 4
            )


def test_levels_that_are_not_told_are_asked_for() -> None:
    arguments = batch()
    assigner = MutualAssigner(CLASSES)
    with pytest.raises(
        ValueError, match=r"level_sizes: expected \(height, width\) for each of 3 levels, got None; set"
    ):
        assigner(*arguments)
    assigner.level_sizes = SIZES[:2]
    with pytest.raises(ValueError, match=r"level_sizes: .* for each of 3 levels, got \[\(8, 8\), \(4, 4\)\]"):
        assigner(*arguments)
    assigner.level_sizes = [(4, 8), (2, 4), (1, 2)]
    with pytest.raises(ValueError, match=r"level_sizes: expected levels of 84 cells in all, .* with 42"):
        assigner(*arguments)


def test_wrong_options_and_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="stride: expected positive numbers of pixels"):
        MutualAssigner(stride=[8, 0])
    with pytest.raises(ValueError, match="anchor_size: expected a positive number of strides"):
        MutualAssigner(anchor_size=-1.0)
    with pytest.raises(TypeError, match=r"criterion: expected the v8DetectionLoss or E2ELoss .*, got Linear"):
        use_mutual_guidance(nn.Linear(1, 1))


def test_the_call_and_the_results_are_those_of_the_real_assigner() -> None:
    tal = pytest.importorskip("ultralytics.utils.tal", reason="ultralytics is not installed")
    real = tal.TaskAlignedAssigner(num_classes=CLASSES)
    names = list(inspect.signature(real.forward).parameters)
    assert list(inspect.signature(MutualAssigner.forward).parameters)[1:] == names[:6]
    scores, boxes, points, *objects = batch()
    for padded_to in (3, 0):
        padded = [part[:, :padded_to] for part in objects]
        results = small_assigner()(scores, boxes, points, *padded)
        for actual, expected in zip(results, real(scores, boxes, points, *padded), strict=True):
            assert actual.shape == expected.shape
            # Without objects the real one's labels and indices have the dtype of the scores.
            assert actual.dtype == expected.dtype or padded_to == 0


def test_the_fused_assigner_gives_what_the_real_one_gives() -> None:
    tal = pytest.importorskip("ultralytics.utils.tal", reason="ultralytics is not installed")
    scores, boxes, points, *objects = batch()
    for options in ({"topk": 10}, {"topk": 7, "topk2": 1}, {"topk": 13, "alpha": 1.0, "beta": 4.0, "stride": [8]}):
        criterion = SimpleNamespace(assigner=tal.TaskAlignedAssigner(num_classes=CLASSES, **options), nc=CLASSES)
        criterion = type("v8DetectionLoss", (SimpleNamespace,), {})(**vars(criterion))
        real = criterion.assigner
        for padded_to in (3, 2, 0):
            padded = [part[:, :padded_to].contiguous() for part in objects]
            expected = real(scores, boxes, points, *padded)
            results = use_fused_assigner(criterion).assigner(scores, boxes, points, *padded)
            for actual, wanted in zip(results, expected, strict=True):
                assert actual.shape == wanted.shape
                assert actual.dtype == wanted.dtype or padded_to == 0
            foreground = expected[3].bool()
            assert torch.equal(results[3], foreground) and bool(foreground.any()) == (padded_to > 0)
            for actual, wanted in zip(results, expected, strict=True):
                torch.testing.assert_close(actual[foreground].float(), wanted[foreground].float())
            assert not results[2][~foreground].any()
            criterion.assigner = real


class Detect(nn.Module):
    """What the losses read of a detection head."""

    def __init__(self) -> None:
        super().__init__()
        self.stride, self.nc, self.reg_max = torch.tensor([8.0, 16.0, 32.0]), CLASSES, 4
        self.bias = nn.Parameter(torch.zeros(1))


class Model(nn.Module):
    """What the losses read of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleList([Detect()])
        self.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=10)


@pytest.fixture
def losses() -> Any:
    return pytest.importorskip("ultralytics.utils.loss", reason="ultralytics is not installed")


def outputs(
    sizes: list[tuple[int, int]] = SIZES, dtype: torch.dtype = torch.float32, images: int = 2
) -> dict[str, Any]:
    """What a head gives its loss."""
    generator = torch.Generator().manual_seed(0)
    num_anchors = sum(height * width for height, width in sizes)
    return {
        "boxes": torch.randn(images, 16, num_anchors, generator=generator).to(dtype).requires_grad_(),
        "scores": torch.randn(images, CLASSES, num_anchors, generator=generator).to(dtype).requires_grad_(),
        "feats": [torch.zeros(images, 1, *size, dtype=dtype) for size in sizes],
    }


def objects(num_objects: int = 3) -> dict[str, Tensor]:
    """The objects of two images, as the data loader gives them: center and size in shares of the image."""
    return {
        "batch_idx": torch.tensor([0.0, 0.0, 1.0])[:num_objects],
        "cls": torch.tensor([1.0, 2.0, 0.0])[:num_objects],
        "bboxes": torch.tensor([[0.4, 0.4, 0.5, 0.5], [0.7, 0.6, 0.3, 0.4], [0.5, 0.5, 0.9, 0.8]])[:num_objects],
    }


@pytest.mark.parametrize("num_objects", [3, 0])
@pytest.mark.parametrize("sizes", [SIZES, [(8, 12), (4, 6), (2, 3)], [(7, 9), (4, 5), (2, 3)]])
def test_the_real_detection_loss_trains(losses: Any, sizes: list[tuple[int, int]], num_objects: int) -> None:
    criterion = use_mutual_guidance(losses.v8DetectionLoss(Model()))
    predictions = outputs(sizes)
    loss, _ = criterion(predictions, objects(num_objects))
    loss.sum().backward()
    assert loss.isfinite().all() and loss[1] > 0
    points, steps = anchor_points(sizes)
    anchors = torch.cat(criterion.assigner.anchors())
    assert torch.equal((anchors[:, :2] + anchors[:, 2:]) / 2, points)
    assert torch.equal(anchors[:, 2:] - anchors[:, :2], (4 * steps).expand(-1, 2))
    has_gradient = (predictions["boxes"].grad != 0).any(1)  # (B, A)
    # Every positive of localization is trained, also one that is none for classification; nothing else is.
    assert torch.equal(has_gradient, criterion.assigner.match.loc_match >= 0)
    assert bool(has_gradient.any()) == (num_objects > 0)
    if num_objects:
        assert (has_gradient & (criterion.assigner.match.cls_match < 0)).any()


@pytest.mark.parametrize("name", ["v8DetectionLoss", "E2ELoss"])
@pytest.mark.parametrize("num_objects", [3, 0])
def test_the_fused_assigner_changes_no_loss_and_no_gradient(losses: Any, name: str, num_objects: int) -> None:
    found = []
    for change in (lambda criterion: criterion, use_fused_assigner):
        torch.manual_seed(0)
        criterion = change(getattr(losses, name)(Model()))
        predictions = {"one2many": outputs(), "one2one": outputs()} if name == "E2ELoss" else outputs()
        loss, _ = criterion(predictions, objects(num_objects))
        loss.sum().backward()
        halves = predictions.values() if name == "E2ELoss" else [predictions]
        found.append([loss.detach(), *(half[key].grad for half in halves for key in ("boxes", "scores"))])
    for ours, theirs in zip(*found[::-1], strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(TypeError, match="with its own assigner, got v8DetectionLoss with MutualAssigner"):
        use_fused_assigner(use_mutual_guidance(losses.v8DetectionLoss(Model())))


@pytest.mark.parametrize("num_objects", [3, 0])
@pytest.mark.parametrize(
    ("matcher", "anchor_size"),
    [
        (mg_ops.MaxIouMatcher(), 4.0),
        (mg_ops.AtssMatcher(), 8.0),
        (mg_ops.SimOtaMatcher(), 1.0),
        (mg_ops.DynamicSoftLabelMatcher(), 1.0),
        (mg_ops.DynamicMutualMatcher(), 4.0),
    ],
)
def test_other_rules_train_the_real_loss(losses: Any, matcher: Any, anchor_size: float, num_objects: int) -> None:
    """Each box has the weight that its rule gives it, and what has none learns no box."""
    criterion = use_mutual_guidance(losses.v8DetectionLoss(Model()), matcher, anchor_size=anchor_size)
    predictions = outputs()
    loss, _ = criterion(predictions, objects(num_objects))
    loss.sum().backward()
    match, weights = criterion.assigner.match, criterion.assigner.loc_weights
    assert loss.isfinite().all() and match.loc_positive.any() == (num_objects > 0)
    assert torch.equal((predictions["boxes"].grad != 0).any(1), weights > 0)
    if match.soft_targets is None:
        assert torch.equal(weights, match.loc_positive.float())


def test_the_box_and_the_class_of_task_aligned_matching_weigh_what_ultralytics_gives_them(losses: Any) -> None:
    """As any rule with soft targets: the loss is that of ultralytics, which has this rule."""
    found = []
    for guided in (True, False):
        criterion = losses.v8DetectionLoss(Model())
        matcher = use_fused_assigner(copy.deepcopy(criterion)).assigner.matcher
        if guided:
            use_mutual_guidance(criterion, matcher)
        found.append(criterion(outputs(), objects())[0].detach())
    torch.testing.assert_close(*found)


def test_every_positive_of_localization_weighs_1_in_the_real_box_loss(losses: Any) -> None:
    """Whatever its class target is: as if the real loss had one-hot class targets of these positives."""
    criterion = use_mutual_guidance(losses.v8DetectionLoss(Model()))
    generator = torch.Generator().manual_seed(0)
    points, steps = anchor_points()
    points = points / steps
    fg_mask = torch.rand(2, len(points), generator=generator) < 0.1
    near = torch.rand(2, len(points), 4, generator=generator) + 0.5
    boxes = torch.cat([points - near[..., :2], points + near[..., 2:]], dim=-1)
    arguments = (torch.randn(2, len(points), 16, generator=generator), boxes + 0.1, points, boxes)
    rest = (fg_mask, torch.tensor([64.0, 64.0]), steps)
    one_hot = nn.functional.one_hot(fg_mask.long(), CLASSES).float() * fg_mask.unsqueeze(-1)
    expected = losses.BboxLoss(4)(*arguments, one_hot, one_hot.sum(), *rest)
    soft = torch.rand(2, len(points), CLASSES, generator=generator)
    criterion.assigner.loc_weights = fg_mask.float()
    actual = criterion.bbox_loss(*arguments, soft, soft.sum(), *rest)
    assert actual[0] > 0 and actual[1] > 0
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_the_same_anchors_in_large_images(losses: Any, dtype: torch.dtype) -> None:
    """bfloat16 holds no position beyond 1024 pixels, where most of these objects are."""
    sizes = [(168, 176), (84, 88), (42, 44)]  # 1344 by 1408 pixels
    generator = torch.Generator().manual_seed(1)
    small = {
        "batch_idx": torch.zeros(40),
        "cls": torch.zeros(40),
        "bboxes": torch.cat(
            [torch.randint(96, 124, (40, 2), generator=generator) / 128, torch.full((40, 2), 1 / 44)], 1
        ),
    }
    matches = []
    for precision in (torch.float32, dtype):
        criterion = use_mutual_guidance(losses.v8DetectionLoss(Model()), mg_ops.MutualMatcher(strategy="iou"))
        criterion(outputs(sizes, precision, images=1), small)
        matches.append(criterion.assigner.match)
        anchors = torch.cat(criterion.assigner.anchors())
        assert (anchors[:, 2:] > anchors[:, :2]).all()
    assert (matches[0].loc_match >= 0).sum() >= 40
    assert torch.equal(matches[0].loc_match, matches[1].loc_match)


@pytest.mark.parametrize("name", ["E2ELoss", "E2EDetectLoss"])
def test_of_an_end_to_end_loss_one_half_is_guided(losses: Any, name: str) -> None:
    tal = pytest.importorskip("ultralytics.utils.tal")
    criterion = getattr(losses, name)(Model())
    matcher = mg_ops.MutualMatcher(sigma=1.5)
    assert use_mutual_guidance(criterion, matcher) is criterion
    assert isinstance(criterion.one2many.assigner, MutualAssigner)
    assert criterion.one2many.assigner.matcher == matcher
    assert type(criterion.one2one.assigner) is tal.TaskAlignedAssigner
    halves = {"one2many": outputs(), "one2one": outputs()}
    loss, _ = criterion(halves, objects())
    loss.sum().backward()
    has_gradient = (halves["one2many"]["boxes"].grad != 0).any(1)
    assert torch.equal(has_gradient, criterion.one2many.assigner.match.loc_match >= 0)
    # One box per object.
    assert (halves["one2one"]["boxes"].grad != 0).any(1).sum(1).tolist() == [2, 1]


@pytest.mark.parametrize("name", ["E2ELoss", "E2EDetectLoss"])
def test_the_half_of_one_box_per_object_is_refused(losses: Any, name: str) -> None:
    criterion = getattr(losses, name)(Model())
    with pytest.raises(
        ValueError, match="criterion: expected a loss that learns many boxes per object, got the one2one"
    ):
        use_mutual_guidance(criterion.one2one)
    assert not isinstance(criterion.one2one.assigner, MutualAssigner)


def test_a_copy_of_the_loss_tells_its_own_assigner(losses: Any) -> None:
    criterion = use_mutual_guidance(losses.v8DetectionLoss(Model()))
    duplicate = copy.deepcopy(criterion)
    duplicate(outputs(), objects())
    assert duplicate.assigner.match is not None and criterion.assigner.match is None


def test_the_callback_guides_the_model_inside_its_wrappers(losses: Any) -> None:
    class Whole(Model):
        def init_criterion(self) -> Any:
            return losses.v8DetectionLoss(self)

    for wrap in (nn.Identity, nn.DataParallel, torch.compile):
        model = Whole()
        wrapped = model if wrap is nn.Identity else wrap(model)
        callback = functools.partial(guide_trainer, anchor_size=5.0)
        pickle.loads(pickle.dumps(callback))(SimpleNamespace(model=wrapped))  # ultralytics pickles it for DDP
        assert model.criterion.assigner.anchor_size == 5.0


def small_yolo(name: str) -> nn.Module:
    """A YOLO as a trainer has it, its batch statistics frozen."""
    tasks = pytest.importorskip("ultralytics.nn.tasks", reason="ultralytics is not installed")
    torch.manual_seed(0)
    model = tasks.DetectionModel(f"{name}.yaml", nc=CLASSES, verbose=False).train()
    model.args = importlib.import_module("ultralytics.cfg").get_cfg(overrides={"epochs": 10})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def yolo_batch(images: slice = slice(None)) -> dict[str, Tensor]:
    """Two images of two and no objects."""
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))[images]
    count = 2 if images.start in (None, 0) else 0
    return {
        "img": pictures,
        "batch_idx": torch.zeros(count),
        "cls": torch.tensor([[0.0], [2.0]])[:count],
        "bboxes": torch.tensor([[0.3, 0.3, 0.5, 0.5], [0.6, 0.6, 0.4, 0.6]])[:count],
    }


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_the_compiled_model_is_the_eager_one(name: str) -> None:
    """As ultralytics' trainer has it: the network is compiled, and its loss is called by itself."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, batch = small_yolo(name), yolo_batch()
        wrapped = torch.compile(model, backend="aot_eager") if compiled else model
        guide_trainer(SimpleNamespace(model=wrapped))
        loss, _ = model.loss(batch, wrapped(batch["img"]))
        loss.sum().backward()
        found.append([loss.detach(), *gradients_of(model)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def train_one_rank(rank: int, rendezvous: str) -> None:
    """One of two processes, each with one of the two images; the averaged gradients are those of each alone."""
    torch.set_num_threads(1)
    with process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2):
        for name in ("yolo11n", "yolo26n"):
            alone = []
            for image in range(2):
                model = small_yolo(name)
                guide_trainer(SimpleNamespace(model=model))
                model(yolo_batch(slice(image, image + 1)))[0].sum().backward()
                alone.append(gradients_of(model))
            model = nn.parallel.DistributedDataParallel(small_yolo(name), find_unused_parameters=True)
            guide_trainer(SimpleNamespace(model=model))
            model(yolo_batch(slice(rank, rank + 1)))[0].sum().backward()
            averages = [(with_objects + without) / 2 for with_objects, without in zip(*alone, strict=True)]
            torch.testing.assert_close(gradients_of(model), averages, rtol=1e-4, atol=1e-4)
            assert max(gradient.abs().max() for gradient in averages) > 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_average_their_gradients_also_when_one_has_no_objects(tmp_path: Path) -> None:
    small_yolo("yolo11n")  # skips where it is not installed
    torch.multiprocessing.spawn(train_one_rank, args=(str(tmp_path / "rendezvous"),), nprocs=2)


TRAINING = """
import functools, sys
from ultralytics import YOLO
import mg_ops
from mg_ops.adapters import ultralytics as adapter

calls, matcher = [], mg_ops.MutualMatcher(sigma=1.5)
forward = adapter.MutualAssigner.forward
adapter.MutualAssigner.forward = lambda self, *arguments: calls.append(self) or forward(self, *arguments)
options = dict(data="data.yaml", imgsz=64, batch=2, workers=0, device="cpu", plots=False)
model = YOLO(sys.argv[1] + ".yaml")
model.add_callback("on_pretrain_routine_end", functools.partial(adapter.guide_trainer, matcher=matcher))
model.train(epochs=2, project=sys.argv[2], name="run", **options)
assert calls and all(assigner.matcher == matcher for assigner in calls)
print("calls", len(calls))
"""

FUSED_TRAINING = """
import sys
import torch
from ultralytics import YOLO
from ultralytics.utils.tal import TaskAlignedAssigner
from benchmarks.upstream import unexplained_of_task_aligned
from mg_ops.adapters import ultralytics as adapter

forward, seen = adapter.FusedAssigner.forward, [0, 0]

def compare(self, scores, boxes, points, labels, objects, mask):
    results = forward(self, scores, boxes, points, labels, objects, mask)
    rule = self.matcher
    real = TaskAlignedAssigner(
        topk=rule.k, num_classes=self.num_classes, alpha=rule.alpha, beta=rule.beta, stride=[8, 16, 32],
        topk2=rule.k_after_conflict,
    )
    *_, foreground, index = real(scores, boxes, points, labels, objects, mask)
    for image in range(len(scores)):
        count = int(mask[image].sum())
        wanted = torch.where(foreground[image].bool(), index[image], -1)
        of_image = scores[image], boxes[image], objects[image, :count], labels[image, :count, 0].long()
        assert unexplained_of_task_aligned(self.match.cls_match[image], wanted, rule, points, *of_image) == []
        seen[0] += int((wanted >= 0).sum())
        seen[1] += int((self.match.cls_match[image] != wanted).sum())
    return results

adapter.FusedAssigner.forward = compare
options = dict(data="data.yaml", imgsz=64, batch=2, workers=0, device="cpu", plots=False)
model = YOLO(sys.argv[1] + ".yaml")
model.add_callback("on_pretrain_routine_end", adapter.fuse_trainer)
model.train(epochs=4, project=sys.argv[2], name="run", **options)
assert seen[0] > 100
print("positives", seen[0], "differ", seen[1])
"""

LOADING = """
import sys
sys.modules["mg_ops"] = None  # importing it fails
from ultralytics import YOLO

for name in ("last", "best"):
    model = YOLO(f"{sys.argv[1]}/run/weights/{name}.pt")
    model.predict("images/0.png", imgsz=64, device="cpu", verbose=False)
print("classes", sorted(model.names.values()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
@pytest.mark.parametrize("training", ["guided", "fused"])
def test_checkpoints_of_a_training_load_without_mg_ops(tmp_path: Path, name: str, training: str) -> None:
    """And in the fused one every label of every step is that of ultralytics' own assigner, or a near tie."""
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    for index in range(4):
        drawn = random_objects((64, 64), index)
        draw_image(tmp_path / "images" / f"{index}.png", drawn, (64, 64), index)
        lines = [
            f"{int(kind == 'disc')} {(x1 + x2) / 128} {(y1 + y2) / 128} {(x2 - x1) / 64} {(y2 - y1) / 64}"
            for kind, (x1, y1, x2, y2) in drawn
        ]
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{index}.txt").write_text("\n".join(lines))
    (tmp_path / "data.yaml").write_text(
        f"path: {tmp_path}\ntrain: images\nval: images\nnames: {{0: square, 1: disc}}\n"
    )
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"YOLO_CONFIG_DIR": str(tmp_path), "YOLO_OFFLINE": "true", "PYTHONPATH": paths}
    first = (TRAINING, [name], "calls 4") if training == "guided" else (FUSED_TRAINING, [name], "positives")
    for script, arguments, said in (first, (LOADING, [], "classes ['disc', 'square']")):
        command = [sys.executable, "-c", script, *arguments, str(tmp_path / "runs")]
        finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert said in finished.stdout
