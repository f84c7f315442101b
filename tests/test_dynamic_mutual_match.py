"""Dynamic mutual matching: answers worked out by hand, and every label of the code whose rule it is.

MG_OPS_RELEASED_CODE=FOLDER names a checkout of zhanghengdev/MutualGuide at 108b4a8 (benchmarks/released_code.py loads
it). No label may differ but of objects with an exact tie, or whose qualities leave the choice to a rounding.
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Target, fuzz_cases
from torch import Tensor

import mg_ops
from benchmarks.released_code import load_released_matching
from detector.loss import detection_loss

BACKGROUND, IGNORED = mg_ops.BACKGROUND, mg_ops.IGNORED

WITHOUT_TRITON = True


def box(width: float, x: float = 0.0) -> list[float]:
    """Of height 10, at x: its IoU with box(10, x) is width / 10."""
    return [x, 0.0, x + width, 10.0]


def match_of(
    target: Target,
    anchors: list[list[float]],
    gt_boxes: list[list[float]],
    pred_boxes: list[list[float]] | None = None,
    p: list[list[float]] | None = None,
    **options: Any,
) -> mg_ops.DynamicMutualMatch:
    """Of one image; object g has class g. By default the anchors are predicted, and every p is 0."""
    objects = torch.tensor(gt_boxes, device=target.device).reshape(-1, 4)
    boxes = torch.tensor(anchors, device=target.device).reshape(-1, 4)
    if p is None:
        p = [[0.0] * len(gt_boxes) for _ in anchors]
    return mg_ops.dynamic_mutual_match(
        boxes,
        [objects],
        [torch.arange(len(objects), device=target.device)],
        pred_boxes=(boxes if pred_boxes is None else torch.tensor(pred_boxes, device=target.device))[None],
        cls_probabilities=torch.tensor(p, device=target.device).reshape(1, len(anchors), -1),
        backend=target.backend,
        **options,
    )


def test_an_object_takes_as_many_anchors_as_their_qualities_add_up_to(target: Target) -> None:
    anchors = [box(8), box(9), box(7.5), box(3), box(10, 50)]  # 2.75 in all
    match = match_of(target, anchors, [box(10)])
    assert match.cls_match.tolist() == match.loc_match.tolist() == [[0, 0, BACKGROUND, BACKGROUND, BACKGROUND]]
    assert match.num_pos.tolist() == match.num_loc_pos.tolist() == [2]
    torch.testing.assert_close(match.soft_targets.cpu(), torch.tensor([[0.8, 0.9, 0.0, 0.0, 0.0]]))


def test_at_least_one_and_no_more_than_it_owns(target: Target) -> None:
    assert match_of(target, [box(1), box(2)], [box(10)]).cls_match.tolist() == [[BACKGROUND, 0]]
    match = match_of(target, [box(10), box(10, 50)], [box(10), box(10, 100)])
    assert match.cls_match.tolist() == [[0, BACKGROUND]]
    assert match.num_pos.tolist() == match.num_loc_pos.tolist() == [1, 0]  # no anchor is forced upon an object


def test_only_the_k_largest_are_added_up(target: Target) -> None:
    anchors = [box(10), box(10), box(10), box(9), box(9), box(9)]
    for k, count in [(1, 1), (2, 2), (3, 3), (4, 3), (6, 5), (15, 5)]:
        wanted = [[0] * count + [BACKGROUND] * (6 - count)]
        match = match_of(target, anchors, [box(10)], k=k)
        assert match.cls_match.tolist() == match.loc_match.tolist() == wanted, k


def test_the_lower_index_wins_ties(target: Target) -> None:
    """Of anchors of an object, and of objects of an anchor: the object that loses owns nothing."""
    match = match_of(target, [box(10), box(5), box(5), box(5)], [box(10), box(10)])
    assert match.cls_match.tolist() == [[0, 0, BACKGROUND, BACKGROUND]]
    assert match.num_pos.tolist() == [2, 0]


def test_an_anchor_competes_for_its_best_object_only(target: Target) -> None:
    """Object 1 has no anchor left, though it is the best that anchor 1 is for it."""
    match = match_of(target, [box(10), box(8)], [box(10), box(5)])
    assert match.cls_match.tolist() == [[0, BACKGROUND]]  # 1.8: anchor 1 is lost to both
    assert match.num_pos.tolist() == [1, 0]


def test_each_task_reads_the_other_tasks_prediction(target: Target) -> None:
    anchors, predicted = [box(6), box(5)], [box(2), box(9)]
    match = match_of(target, anchors, [box(10)], predicted, [[0.0], [0.8]])
    assert match.cls_match.tolist() == [[BACKGROUND, 0]]
    assert match.loc_match.tolist() == [[BACKGROUND, 0]]  # 0.5 * exp(0.4) = 0.746, and 0.6
    torch.testing.assert_close(match.loc_weights.cpu(), torch.tensor([[0.0, 0.5 * torch.tensor(0.4).exp()]]))
    wanted = {
        "iou": ([[0, BACKGROUND]], [[0, BACKGROUND]]),
        "localize_to_classify": ([[BACKGROUND, 0]], [[0, BACKGROUND]]),
        "classify_to_localize": ([[0, BACKGROUND]], [[BACKGROUND, 0]]),
    }
    for strategy, (of_classes, of_boxes) in wanted.items():
        match = match_of(target, anchors, [box(10)], predicted, [[0.0], [0.8]], strategy=strategy)
        assert (match.cls_match.tolist(), match.loc_match.tolist()) == (of_classes, of_boxes), strategy


def test_qualities_of_localization_end_at_1(target: Target) -> None:
    match = match_of(target, [box(7), box(9), box(2)], [box(10)], p=[[1.0], [1.0], [0.0]])
    assert match.loc_match.tolist() == [[0, 0, BACKGROUND]]
    assert match.loc_weights.tolist() == [[1.0, 1.0, 0.0]]
    # The smallest sigmas make 1 of every overlap with a class.
    match = match_of(target, [box(0.001), box(9), box(9, 50)], [box(10)], p=[[1.0], [0.0], [1.0]], sigma=1e-30)
    assert match.loc_weights[0, 0] == 1.0 and match.loc_match.tolist() == [[0, BACKGROUND, BACKGROUND]]


def test_what_is_not_read_need_not_be_passed(target: Target) -> None:
    anchors, objects = torch.tensor([box(10)], device=target.device), [torch.tensor([box(10)], device=target.device)]
    match = mg_ops.dynamic_mutual_match(anchors, objects, strategy="iou", backend=target.backend)
    assert match.cls_match.tolist() == match.loc_match.tolist() == [[0]]
    for strategy, name in [("localize_to_classify", "pred_boxes"), ("classify_to_localize", "cls_logits")]:
        message = f"^{name}: dynamic_mutual_match with strategy '{strategy}' reads"
        with pytest.raises(ValueError, match=message):
            mg_ops.dynamic_mutual_match(anchors, objects, strategy=strategy, backend=target.backend)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "dynamic"}, ValueError, "^strategy: expected one of 'iou'"),
        ({"k": 0}, ValueError, "^k: expected an integer from 1 to 128, got 0$"),
        ({"k": 1.5}, TypeError, "^k: expected an integer from 1 to 128"),
        ({"sigma": 0.0}, ValueError, "^sigma: expected a finite number above 0, got 0.0$"),
        ({"crowd_overlap": 0.0}, ValueError, "^crowd_overlap: expected a threshold"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mg_ops.DynamicMutualMatcher(**options)
    with pytest.raises(error, match=message):
        mg_ops.dynamic_mutual_match(torch.zeros(1, 4), [torch.zeros(0, 4)], [torch.zeros(0).long()], **options)


def test_the_detectors_loss_weighs_each_task_by_its_own_qualities() -> None:
    """A box that a weight of 0 leaves out has no gradient, one with a weight has."""
    anchors = torch.tensor([box(6), box(5)])
    objects = torch.tensor([box(10)]), torch.tensor([0]), torch.tensor([0, 1])
    match = mg_ops.dynamic_mutual_match(
        anchors,
        *objects,
        cls_probabilities=torch.tensor([[[0.9], [0.0]]]),
        pred_boxes=torch.tensor([[box(2), box(9)]]),
    )
    assert (match.cls_match.tolist(), match.loc_match.tolist()) == ([[BACKGROUND, 0]], [[0, BACKGROUND]])

    def losses(match: mg_ops.DynamicMutualMatch) -> list[float]:
        predictions = torch.zeros(1, 2, 1), torch.zeros(1, 2, 4)
        loss = detection_loss(*predictions, anchors, match, *objects, mg_ops.BoxCoder(), cls_loss="quality_focal")
        assert [int(loss.num_cls_positives), int(loss.num_loc_positives)] == [1, 1]
        return [float(loss.cls_loss), float(loss.box_loss)]

    of_classes, of_boxes = losses(match)
    assert of_classes > 0 and of_boxes > 0
    other = losses(match._replace(soft_targets=match.soft_targets * 0.5))
    assert other[0] != of_classes and other[1] == of_boxes
    other = losses(match._replace(loc_weights=match.loc_weights * 0.0))
    assert other[0] == of_classes and other[1] == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# The released code


class Scene(NamedTuple):
    """One image as the released code takes it."""

    priors: Tensor  # (A, 4) center and size
    deltas: Tensor  # (A, 4)
    logits: Tensor  # (A, C)
    gt_boxes: Tensor  # (G, 4)
    gt_labels: Tensor  # (G,)


def random_scene(seed: int) -> Scene:
    """Objects among others of their size, anchors around them, boxes predicted better or worse, scores low or high."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    num_objects, num_classes = int(uniform(1, 13, 1)), int(uniform(1, 6, 1))
    centers, sizes = uniform(0.2, 0.8, num_objects, 2), uniform(0.05, 0.3, num_objects, 2)
    gt_boxes = torch.cat([centers - sizes / 2, centers + sizes / 2], dim=1)
    num_anchors = int(uniform(20, 300, 1))
    around = torch.randint(num_objects, (num_anchors,), generator=generator)
    offset = uniform(-0.6, 0.6, num_anchors, 2) * sizes[around]
    priors = torch.cat([centers[around] + offset, sizes[around] * uniform(0.6, 1.6, num_anchors, 2)], dim=1)
    deltas = torch.randn(num_anchors, 4, generator=generator) * float(uniform(0.1, 1.5, 1))
    logits = torch.randn(num_anchors, num_classes, generator=generator) * 2 + float(uniform(-6, 1, 1))
    return Scene(priors, deltas, logits, gt_boxes, torch.randint(num_classes, (num_objects,), generator=generator))


def in_doubt(quality: Tensor, k: int = 15) -> Tensor:
    """(A, G) qualities -> (G,) bool: objects with an exact tie, or of which a rounding can change the answer."""
    best = quality.amax(1)
    near_best = (quality >= best.unsqueeze(1) * (1 - 1e-6)) & (quality > 0)
    doubt = (near_best & (near_best.sum(1, keepdim=True) > 1)).any(0)
    owned = torch.where(near_best, quality, 0.0).sort(dim=0, descending=True).values
    total = owned[:k].double().sum(0)
    doubt |= (total - total.round()).abs() < 1e-5
    count = total.floor().clamp(min=1).long().minimum((owned > 0).sum(0))
    last, next_one = (owned.gather(0, place.clamp(0, len(owned) - 1)[None])[0] for place in (count - 1, count))
    return doubt | ((count > 0) & (count < len(owned)) & (next_one > 0) & (last - next_one <= 1e-6 * last))


@pytest.mark.skipif(
    "MG_OPS_RELEASED_CODE" not in os.environ,
    reason="MG_OPS_RELEASED_CODE: a checkout of zhanghengdev/MutualGuide at 108b4a8",
)
def test_every_label_of_the_released_code(target: Target) -> None:
    folder = Path(os.environ["MG_OPS_RELEASED_CODE"])
    released = load_released_matching(folder)
    tools = {name: inspect.unwrap(released).__globals__[name] for name in ("point_form", "decode", "jaccard")}
    counts: Counter[str] = Counter()
    for seed in range(fuzz_cases(150)):
        compare(random_scene(seed), released, tools, target, counts, f"seed {seed}")
    assert counts["classification compared"] > 0.99 * counts["classification"] > 0
    assert counts["localization compared"] > 0.99 * counts["localization"] > 0


def compare(
    scene: Scene,
    released: Callable[..., None],
    tools: dict[str, Callable[..., Tensor]],
    target: Target,
    counts: Counter[str],
    what: str,
) -> None:
    """Raises unless the two agree on one image; counts positives, and those of objects that are compared."""
    num_anchors = len(scene.priors)
    boxes, labels = torch.zeros(1, num_anchors, 4), torch.zeros(1, num_anchors, dtype=torch.int64)
    overlap, prediction = torch.zeros(1, num_anchors), torch.zeros(1, num_anchors)
    arguments = scene.gt_boxes, scene.gt_labels, scene.deltas, scene.logits, scene.priors
    released(*arguments, boxes, labels, overlap, prediction, 0)
    anchors, predicted = tools["point_form"](scene.priors), tools["decode"](scene.deltas, scene.priors)
    match = mg_ops.dynamic_mutual_match(
        anchors.to(target.device),
        [scene.gt_boxes.to(target.device)],
        [scene.gt_labels.to(target.device)],
        pred_boxes=predicted[None].to(target.device),
        cls_logits=scene.logits[None].to(target.device),
        backend=target.backend,
    )
    of_classes = tools["jaccard"](predicted, scene.gt_boxes)
    p = scene.logits.sigmoid()[:, scene.gt_labels]
    of_boxes = (tools["jaccard"](anchors, scene.gt_boxes) * (p / 2.0).exp()).clamp(max=1.0)
    # Which object the released code has meant, its loss does not ask: that of the largest quality.
    for task, quality, ours, weights, score in [
        ("classification", of_classes, match.cls_match, match.soft_targets, overlap),
        ("localization", of_boxes, match.loc_match, match.loc_weights, prediction),
    ]:
        doubt = in_doubt(quality)
        owner = quality.argmax(1)
        theirs = torch.where(score[0] >= 3.0, owner, BACKGROUND)
        own, own_weights = ours[0].cpu(), weights[0].cpu()
        differ = (own != theirs) & ~doubt[owner] & ~doubt[own.clamp(min=0)]
        assert not differ.any(), f"{task}: {differ.nonzero().flatten().tolist()}; {what}"
        compared = (theirs >= 0) & ~doubt[owner]
        given = boxes[0] if task == "localization" else labels[0]
        wanted = scene.gt_boxes[owner] if task == "localization" else scene.gt_labels[owner]
        assert torch.equal(given[compared], wanted[compared]), f"{task}, {what}"
        torch.testing.assert_close(own_weights[compared], score[0][compared] - 3.0, rtol=0, atol=1e-6)
        counts[task] += int((theirs >= 0).sum())
        counts[f"{task} compared"] += int(compared.sum())
