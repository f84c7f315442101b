"""Task-aligned matching: answers worked out by hand, and every label of the libraries whose rule it is.

ultralytics' assigner with and without its one-to-one selection, mmdetection's, and the one of PP-YOLOE and YOLO-NAS as
LibreYOLO has it. A label may differ where `unexplained_of_task_aligned` says why; every other one fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import pytest
import torch
from conftest import Target, fuzz_cases
from rule_batches import assert_same_match
from torch import Tensor

import mg_ops
from benchmarks import upstream

BACKGROUND, IGNORED = mg_ops.BACKGROUND, mg_ops.IGNORED

WITHOUT_TRITON = True
BY_IOU = {"alpha": 1.0, "beta": 1.0, "overlap": "iou", "epsilon": 0.0}


def column(x: float, width: float = 8.0) -> list[float]:
    """Of height 8, its center at x."""
    return [x - width / 2, 0.0, x + width / 2, 8.0]


def match_columns(
    target: Target,
    centers: list[float],
    pred_boxes: list[list[float]],
    gt_boxes: list[list[float]],
    p: list[float] | None = None,
    **options: Any,
) -> mg_ops.Match:
    """One image of one class, with anchors of 8 pixels around these x."""
    match = mg_ops.task_aligned_match(
        torch.tensor([column(x) for x in centers], device=target.device).reshape(-1, 4),
        [torch.tensor(gt_boxes, device=target.device).reshape(-1, 4)],
        [torch.zeros(len(gt_boxes), dtype=torch.int64, device=target.device)],
        cls_probabilities=torch.tensor(p or [1.0] * len(centers), device=target.device).reshape(1, -1, 1),
        pred_boxes=torch.tensor(pred_boxes, device=target.device).reshape(1, -1, 4),
        backend=target.backend,
        **BY_IOU | options,
    )
    assert match.num_pos.tolist() == [int((match.cls_match == index).sum()) for index in range(len(gt_boxes))]
    assert match.soft_targets is not None
    assert bool(((match.soft_targets == 0) | match.cls_positive).all())
    return match


def labels(*arguments: Any, **options: Any) -> list[int]:
    found: list[int] = match_columns(*arguments, **options).cls_match[0].tolist()
    return found


def test_the_k_best_are_selected_and_ties_go_to_the_lower_index(target: Target) -> None:
    centers, gt_boxes = [4.0, 12.0, 20.0, 28.0], [[0.0, 0.0, 32.0, 8.0]]
    boxes = [[0.0, 0.0, width, 8.0] for width in (8.0, 16.0, 16.0, 24.0)]
    for k, wanted in enumerate(([3], [3, 1], [3, 1, 2], [3, 1, 2, 0]), start=1):
        assert labels(target, centers, boxes, gt_boxes, k=k) == [0 if a in wanted else -1 for a in range(4)]


def test_the_metric_is_a_product_of_powers(target: Target) -> None:
    """Anchor 0 has p 1/4 and IoU 1, anchor 1 has p 1 and IoU 1/2."""
    arguments = ([4.0, 12.0], [[0.0, 0.0, 16.0, 8.0], [0.0, 0.0, 8.0, 8.0]], [[0.0, 0.0, 16.0, 8.0]], [0.25, 1.0])
    for alpha, beta, wanted in ((0.4, 1.0, [0, -1]), (1.0, 1.0, [-1, 0]), (0.5, 1.0, [0, -1]), (1.0, 2.1, [0, -1])):
        assert labels(target, *arguments, k=1, alpha=alpha, beta=beta) == wanted
    assert labels(target, *arguments, k=1, alpha=64.0, beta=0.0) == [-1, 0]
    assert labels(target, *arguments, k=1, alpha=0.0, beta=0.0) == [0, -1]  # all 1: the lower index


def test_soft_targets(target: Target) -> None:
    match = match_columns(
        target,
        [4.0, 12.0, 20.0],
        [[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 12.0, 8.0], [16.0, 0.0, 24.0, 8.0]],
        [[0.0, 0.0, 16.0, 8.0], [16.0, 0.0, 24.0, 8.0]],
        [1.0, 0.5, 0.5],
    )
    # The first object's t are 0.5 and 0.375, its largest IoU is 0.75. The second's only anchor gets its IoU, 1.
    assert match.cls_match.tolist() == [[0, 0, 1]]
    assert match.soft_targets is not None
    assert match.soft_targets.tolist() == [[0.75, 0.5625, 1.0]]


def test_epsilon_lessens_small_targets(target: Target) -> None:
    arguments = ([4.0], [[0.0, 0.0, 8.0, 8.0]], [[0.0, 0.0, 8.0, 8.0]], [0.25])
    for epsilon, wanted in ((0.0, 1.0), (0.25, 0.5), (0.75, 0.25)):
        match = match_columns(target, *arguments, epsilon=epsilon)
        assert match.soft_targets is not None and match.soft_targets.item() == wanted


def test_only_anchors_inside_are_positives(target: Target) -> None:
    centers, gt_boxes = [4.0, 12.0, 20.0], [[4.0, 0.0, 16.0, 8.0]]
    boxes = [[4.0, 0.0, 16.0, 8.0], [4.0, 0.0, 10.0, 8.0], [4.0, 0.0, 16.0, 8.0]]
    assert labels(target, centers, boxes, gt_boxes) == [-1, 0, -1]  # the first lies on the edge
    assert labels(target, centers, boxes, gt_boxes, center_margin=3.9) == [-1, 0, -1]
    assert labels(target, centers, boxes, gt_boxes, center_margin=4.0) == [-1, -1, -1]
    assert labels(target, centers, boxes, gt_boxes, minimum_side=12.1) == [0, 0, -1]  # 3.95 to 16.05
    assert labels(target, centers, boxes, gt_boxes, minimum_side=20.1) == [0, 0, 0]


def test_anchors_outside_take_places_where_all_are_candidates(target: Target) -> None:
    centers, gt_boxes = [2.0, 12.0], [[4.0, 0.0, 16.0, 8.0]]
    boxes = [[4.0, 0.0, 16.0, 8.0], [4.0, 0.0, 10.0, 8.0]]
    assert labels(target, centers, boxes, gt_boxes, k=1) == [-1, 0]
    assert labels(target, centers, boxes, gt_boxes, k=1, candidates="all") == [-1, -1]
    assert labels(target, centers, boxes, gt_boxes, k=2, candidates="all") == [-1, 0]


@pytest.mark.parametrize(("conflict", "owner"), [("selecting", 1), ("inside", 2), ("all", 3)])
def test_a_contested_anchor_goes_to_the_object_that_it_overlaps_most(target: Target, conflict: str, owner: int) -> None:
    """Objects 0 and 1 select anchor 0. Object 2 prefers anchor 1, and object 3 does not have the center of anchor 0."""
    gt_boxes = [[0.0, 0.0, 24.0, 8.0], [8.0, 0.0, 26.0, 8.0], [8.0, 0.0, 30.0, 8.0], [9.0, 0.0, 28.0, 8.0]]
    boxes = [[8.0, 0.0, 28.0, 8.0], gt_boxes[2]]
    overlaps = mg_ops.box_iou(torch.tensor(boxes[:1]), torch.tensor(gt_boxes))[0]
    assert overlaps.tolist() == sorted(overlaps.tolist())
    assert labels(target, [8.5, 27.0], boxes, gt_boxes, k=1, conflict=conflict) == [owner, 2]


def test_the_lower_object_owns_a_tie(target: Target) -> None:
    for conflict in ("selecting", "inside", "all"):
        assert labels(target, [4.0], [column(4.0)], [column(4.0)] * 3, conflict=conflict) == [0]


def test_each_object_keeps_its_best_after_the_conflict(target: Target) -> None:
    centers = [4.0, 12.0, 20.0, 28.0]
    gt_boxes = [[0.0, 0.0, 24.0, 8.0], [8.0, 0.0, 32.0, 8.0]]
    boxes = [[0.0, 0.0, 20.0, 8.0], [0.0, 0.0, 24.0, 8.0], [8.0, 0.0, 31.0, 8.0], [8.0, 0.0, 28.0, 8.0]]
    assert labels(target, centers, boxes, gt_boxes) == [0, 0, 1, 1]
    match = match_columns(target, centers, boxes, gt_boxes, k_after_conflict=1)
    assert match.cls_match.tolist() == [[-1, 0, 1, -1]]
    assert match.soft_targets is not None
    assert match.soft_targets[0].tolist() == [0.0, 1.0, pytest.approx(23 / 24), 0.0]


def test_ciou(target: Target) -> None:
    """Of a box of half the object's height: IoU 1/2, no distance between centers, and another shape."""
    match = match_columns(target, [8.0], [[0.0, 2.0, 16.0, 6.0]], [[0.0, 0.0, 16.0, 8.0]], overlap="ciou")
    v = 4 / torch.pi**2 * (torch.atan(torch.tensor(2.0)) - torch.atan(torch.tensor(4.0))) ** 2
    assert match.soft_targets is not None
    assert match.soft_targets.item() == pytest.approx(float(0.5 - v * v / (v - 0.5 + 1)), abs=1e-6)
    # So far away that CIoU is negative.
    arguments = ([8.0], [[15.0, 0.0, 100.0, 8.0]], [[0.0, 0.0, 16.0, 8.0]])
    assert labels(target, *arguments, overlap="ciou") == [-1]
    assert labels(target, *arguments, overlap="iou") == [0]


def test_pairs_without_a_metric_are_never_selected(target: Target) -> None:
    gt_boxes = [[0.0, 0.0, 16.0, 8.0]]
    assert labels(target, [4.0, 12.0], [column(50.0), column(12.0)], gt_boxes) == [-1, 0]
    assert labels(target, [4.0, 12.0], [column(4.0), column(12.0)], gt_boxes, [0.0, float("nan")]) == [-1, -1]
    assert labels(target, [4.0], [[0.0, 0.0, float("nan"), 8.0]], gt_boxes, alpha=0.0, beta=0.0) == [-1]


def test_bad_objects_and_anchors_match_nothing(target: Target) -> None:
    nan, inf = float("nan"), float("inf")
    bad = [[5.0, 0.0, 5.0, 8.0], [16.0, 0.0, 0.0, 8.0], [nan, 0.0, 16.0, 8.0], [0.0, 0.0, inf, 8.0]]
    assert labels(target, [4.0], [column(4.0)], [*bad, column(4.0)]) == [4]
    assert labels(target, [4.0], [column(4.0)], bad) == [-1]
    assert labels(target, [4.0], [column(4.0)], []) == [-1]
    assert labels(target, [], [], [column(4.0)]) == []
    assert labels(target, [nan, inf, 4.0], [column(4.0)] * 3, [column(4.0)]) == [-1, -1, 0]


def test_crowd_regions_ignore_background_and_match_nothing(target: Target) -> None:
    centers, objects = [4.0, 24.0, 28.0, 60.0], [column(4.0), column(24.0)]
    for k_after_conflict in (None, 1):
        match = mg_ops.task_aligned_match(
            torch.tensor([column(x) for x in centers], device=target.device),
            [torch.tensor(objects, device=target.device)],
            [torch.zeros(2, dtype=torch.int64, device=target.device)],
            gt_crowd=[torch.tensor([False, True], device=target.device)],
            cls_logits=torch.zeros(1, 4, 1, device=target.device),
            pred_boxes=torch.tensor([[column(x) for x in centers]], device=target.device),
            backend=target.backend,
            k_after_conflict=k_after_conflict,
        )
        assert match.cls_match.tolist() == [[0, IGNORED, IGNORED, BACKGROUND]]
        assert match.num_pos.tolist() == [1, 0]


def test_an_anchor_that_is_dropped_after_the_conflict_is_ignored_in_a_crowd(target: Target) -> None:
    match = mg_ops.task_aligned_match(
        torch.tensor([column(4.0), column(12.0)], device=target.device),
        [torch.tensor([[0.0, 0.0, 16.0, 8.0], [8.0, 0.0, 16.0, 8.0]], device=target.device)],
        [torch.zeros(2, dtype=torch.int64, device=target.device)],
        gt_crowd=[torch.tensor([False, True], device=target.device)],
        cls_logits=torch.zeros(1, 2, 1, device=target.device),
        pred_boxes=torch.tensor([[[0.0, 0.0, 16.0, 8.0], [0.0, 0.0, 12.0, 8.0]]], device=target.device),
        backend=target.backend,
        k_after_conflict=1,
    )
    assert match.cls_match.tolist() == [[0, IGNORED]]


@pytest.mark.parametrize("num_objects", [15, 16, 17, 300])
@pytest.mark.parametrize("conflict", ["inside", "all", "selecting"])
def test_anchors_contested_in_a_crowd(
    target: Target, conflict: Literal["inside", "all", "selecting"], num_objects: int
) -> None:
    """Objects near each other, some of them the same, and the largest finite ones among them."""
    generator = torch.Generator().manual_seed(num_objects)
    corners = (torch.rand(num_objects, 2, generator=generator) * 60).round()
    gt_boxes = torch.cat([corners, corners + torch.randint(3, 30, (num_objects, 2), generator=generator)], dim=1)
    gt_boxes[5] = torch.tensor([-3e38, -3e38, 3e38, 3e38])
    gt_boxes[9:12] = gt_boxes[8]
    y, x = torch.meshgrid(*[torch.arange(16) * 4 + 2.0] * 2, indexing="ij")
    points = torch.stack([x, y], dim=-1).reshape(-1, 2)
    pred_boxes = gt_boxes[torch.randint(0, num_objects, (256,), generator=generator)]
    matches = [
        mg_ops.task_aligned_match(
            mg_ops.anchors_from_points(points, torch.ones(256), size=4.0).to(device),
            [gt_boxes.to(device)],
            [torch.zeros(num_objects, dtype=torch.int64, device=device)],
            cls_probabilities=torch.rand(1, 256, 1, generator=torch.Generator().manual_seed(0)).to(device),
            pred_boxes=pred_boxes[None].to(device),
            conflict=conflict,
            backend=backend,
        )
        for device, backend in ((target.device, target.backend), ("cpu", "eager"))
    ]
    assert_same_match(*matches)
    assert (matches[0].cls_match >= 0).sum() >= 10


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, r"^alpha: expected an exponent in \[0, 64\], got -1.0"),
        ({"alpha": True}, TypeError, "^alpha: expected a number, got bool"),
        ({"beta": float("nan")}, ValueError, "^beta: expected an exponent"),
        ({"beta": 65}, ValueError, "^beta: expected an exponent"),
        ({"k": 0}, ValueError, "^k: expected an integer from 1 to 128, got 0"),
        ({"k": 10.0}, TypeError, "^k: expected an integer from 1 to 128, got float"),
        ({"k_after_conflict": 0}, ValueError, "^k_after_conflict: expected an integer from 1 to 128, got 0"),
        ({"overlap": "giou"}, ValueError, "^overlap: expected one of 'iou', 'ciou', got 'giou'"),
        ({"candidates": "near"}, ValueError, "^candidates: expected one of 'all', 'inside', got 'near'"),
        ({"conflict": None}, ValueError, "^conflict: expected one of 'selecting', 'inside', 'all', got None"),
        ({"minimum_side": -1}, ValueError, "^minimum_side: expected a finite number of at least 0"),
        ({"center_margin": float("inf")}, ValueError, "^center_margin: expected a finite number"),
        ({"epsilon": "small"}, TypeError, "^epsilon: expected a number, got str"),
        ({"crowd_overlap": 0}, ValueError, "^crowd_overlap: expected a threshold"),
    ],
)
def test_a_wrong_option_raises(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mg_ops.TaskAlignedMatcher(**options)
    with pytest.raises(error, match=message):
        mg_ops.task_aligned_match(torch.zeros(1, 4), [torch.zeros(0, 4)], [torch.zeros(0).long()], **options)


# ---------------------------------------------------------------------------------------------------------------------
# The libraries' own


class Scene(NamedTuple):
    """One image."""

    anchors: Tensor  # (A, 4)
    points: Tensor  # (A, 2)
    probabilities: Tensor  # (A, C)
    pred_boxes: Tensor  # (A, 4)
    gt_boxes: Tensor  # (G, 4)
    gt_labels: Tensor  # (G,)


def random_scene(generator: torch.Generator, size: int = 96, num_classes: int = 3) -> Scene:
    """Predictions of a training that has begun: boxes near the objects around their points, or near nothing."""
    grids = []
    for stride in (8, 16, 32):
        y, x = torch.meshgrid(*[(torch.arange(size // stride) + 0.5) * stride] * 2, indexing="ij")
        grids.append(torch.stack([x, y, torch.full_like(x, stride)], dim=-1).reshape(-1, 3))
    points, strides = torch.cat(grids)[:, :2], torch.cat(grids)[:, 2]
    num_objects = int(torch.randint(1, 13, (), generator=generator))
    corner = torch.rand(num_objects, 2, generator=generator) * (size - 12)
    side = 4 + torch.rand(num_objects, 2, generator=generator) * float(torch.randint(8, 80, (), generator=generator))
    gt_boxes = torch.cat([corner, (corner + side).clamp(max=size)], dim=1)
    if int(torch.randint(0, 3, (), generator=generator)) == 0:
        gt_boxes = gt_boxes.round()
    nearest = torch.cdist(points, (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2).argmin(1)
    noise = torch.randn(len(points), 4, generator=generator) * strides[:, None] * 0.5
    alone = torch.cat([points - 1.5 * strides[:, None], points + 1.5 * strides[:, None]], dim=1)
    learned = torch.rand(len(points), 1, generator=generator) < 0.7
    pred_boxes = torch.where(learned, gt_boxes[nearest], alone) + noise
    return Scene(
        mg_ops.anchors_from_points(points, strides, size=1.0),
        points,
        torch.rand(len(points), num_classes, generator=generator) ** 2,
        torch.cat(
            [torch.minimum(pred_boxes[:, :2], pred_boxes[:, 2:]), pred_boxes.amax(1, keepdim=True).expand(-1, 2)], 1
        ),
        gt_boxes,
        torch.randint(0, num_classes, (num_objects,), generator=generator),
    )


def compare(
    target: Target,
    assign: Callable[[Scene], tuple[Tensor, Tensor | None]],
    options: dict[str, Any],
    tolerance: float = 1e-5,
) -> None:
    """Compares with what a library gives: (A,) labels, and (A,) soft targets."""
    generator = torch.Generator().manual_seed(0)
    positives = contested = 0
    for _ in range(fuzz_cases(60)):
        scene = random_scene(generator)
        match = mg_ops.task_aligned_match(
            scene.anchors.to(target.device),
            [scene.gt_boxes.to(target.device)],
            [scene.gt_labels.to(target.device)],
            cls_probabilities=scene.probabilities[None].to(target.device),
            pred_boxes=scene.pred_boxes[None].to(target.device),
            backend=target.backend,
            **options,
        )
        assert match.soft_targets is not None
        ours, soft_targets = match.cls_match[0].cpu(), match.soft_targets[0].cpu()
        wanted, wanted_targets = assign(scene)
        rule = mg_ops.TaskAlignedMatcher(**options)
        assert upstream.unexplained_of_task_aligned(ours, wanted, rule, *scene[1:]) == []
        if bool((ours == wanted).all()) and wanted_targets is not None:
            torch.testing.assert_close(soft_targets, wanted_targets, rtol=tolerance, atol=1e-6)
        positives += int((wanted >= 0).sum())
        contested += int((mg_ops.box_iou(scene.gt_boxes, scene.gt_boxes) > 0).sum()) - len(scene.gt_boxes)
    assert positives > fuzz_cases(60) * 5 and contested > fuzz_cases(60)


ULTRALYTICS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "YOLOv8 to YOLO12": ({"topk": 10, "alpha": 0.5, "beta": 6.0, "stride": [8, 16, 32]}, {"minimum_side": 16.0}),
    "one level": ({"topk": 10, "alpha": 0.5, "beta": 6.0, "stride": [1e-3]}, {"minimum_side": 1e-3}),
    "YOLO26, one-to-one": (
        {"topk": 7, "alpha": 0.5, "beta": 6.0, "stride": [8, 16, 32], "topk2": 1},
        {"k": 7, "k_after_conflict": 1, "minimum_side": 16.0},
    ),
}


@pytest.mark.parametrize("detector", ULTRALYTICS)
def test_ultralytics_assigner(target: Target, detector: str) -> None:
    tal = pytest.importorskip("ultralytics.utils.tal")
    theirs, options = ULTRALYTICS[detector]
    assigner = tal.TaskAlignedAssigner(num_classes=3, **theirs)

    def assign(scene: Scene) -> tuple[Tensor, Tensor]:
        num_objects = len(scene.gt_boxes)
        _, _, scores, foreground, index = assigner(
            scene.probabilities[None],
            scene.pred_boxes[None],
            scene.points,
            scene.gt_labels.reshape(1, num_objects, 1),
            scene.gt_boxes[None],
            torch.ones(1, num_objects, 1),
        )
        return torch.where(foreground[0].bool(), index[0].long(), BACKGROUND), scores[0].sum(-1)

    compare(target, assign, options)


def test_mmdetections_assigner(target: Target) -> None:
    try:
        assigner = upstream.mmdet_assigners()["TaskAlignedAssigner"](topk=13)
    except ImportError as error:
        pytest.skip(str(error))

    def assign(scene: Scene) -> tuple[Tensor, None]:
        predictions = upstream.instances(priors=scene.anchors, bboxes=scene.pred_boxes, scores=scene.probabilities)
        objects = upstream.instances(bboxes=scene.gt_boxes, labels=scene.gt_labels)
        return upstream.labels_of_mmdet(assigner.assign(predictions, objects, alpha=1, beta=6).gt_inds), None

    options = {
        "alpha": 1.0,
        "k": 13,
        "overlap": "iou",
        "candidates": "all",
        "conflict": "selecting",
        "center_margin": 0.01,
    }
    compare(target, assign, options)


def test_pp_yoloes_assigner(target: Target) -> None:
    yolonas = pytest.importorskip("libreyolo.models.yolonas.loss")
    assigner = yolonas.TaskAlignedAssigner(topk=13, alpha=1.0, beta=6.0)

    def assign(scene: Scene) -> tuple[Tensor, Tensor]:
        num_objects = len(scene.gt_boxes)
        # An object's number as its label tells which one an anchor has.
        numbers = torch.arange(num_objects).reshape(1, num_objects, 1)
        probabilities = scene.probabilities[None][:, :, scene.gt_labels]
        assigned, _, scores = assigner(
            probabilities,
            scene.pred_boxes[None],
            scene.points,
            [len(scene.points)],
            numbers,
            scene.gt_boxes[None],
            torch.ones(1, num_objects, 1),
            bg_index=num_objects,
        )
        return torch.where(assigned[0] == num_objects, BACKGROUND, assigned[0]), scores[0].sum(-1)

    compare(target, assign, {"alpha": 1.0, "k": 13, "overlap": "iou", "conflict": "all"})
