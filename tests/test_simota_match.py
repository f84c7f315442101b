"""SimOTA: answers worked out by hand, and every label of mmdetection's `SimOTAAssigner` and of YOLOX's own head.

The libraries promise no order of ties and add numbers in another order. So a label may differ where an exact tie or a
margin within rounding decides, and nowhere else: each one that differs is looked at (`dynamic_k_images.explained`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Target, fuzz_cases
from dynamic_k_images import Costs, DynamicKImage, explained, pair_geometry, random_image
from torch import Tensor

import mg_ops
from benchmarks import upstream

BACKGROUND, IGNORED = mg_ops.BACKGROUND, mg_ops.IGNORED
WITHOUT_TRITON = True


def row(count: int = 6) -> Tensor:
    """(count, 4) anchors of stride 8 in a row, with centers at 4, 12, ..."""
    first = 8.0 * torch.arange(count)
    return torch.stack([first, torch.zeros(count), first + 8, torch.full((count,), 8.0)], dim=1)


def boxes(*of: tuple[float, float]) -> Tensor:
    """(len(of), 4) boxes of height 8 from x1 to x2."""
    return torch.tensor([[x1, 0.0, x2, 8.0] for x1, x2 in of]).reshape(-1, 4)


def match(
    target: Target,
    gt_boxes: Tensor,
    pred_boxes: Tensor,
    anchors: Tensor | None = None,
    probabilities: Tensor | None = None,
    gt_labels: Tensor | None = None,
    **options: Any,
) -> mg_ops.Match:
    """Of one image; by default of anchors in a row, and of one class that each has with probability 1/2."""
    anchors = row(len(pred_boxes)) if anchors is None else anchors
    probabilities = torch.full((len(anchors), 1), 0.5) if probabilities is None else probabilities
    gt_labels = torch.zeros(len(gt_boxes), dtype=torch.int64) if gt_labels is None else gt_labels
    result = mg_ops.simota_match(
        anchors.to(target.device),
        [gt_boxes.to(target.device)],
        [gt_labels.to(target.device)],
        pred_boxes=pred_boxes[None].to(target.device),
        cls_probabilities=probabilities[None].to(target.device),
        backend=target.backend,
        **options,
    )
    assert result.num_pos.tolist() == [result.cls_match[0].tolist().count(index) for index in range(len(gt_boxes))]
    return result


def labels(*arguments: Any, **options: Any) -> list[int]:
    return match(*arguments, **options).cls_match[0].tolist()


def test_an_object_selects_as_many_as_its_ious_add_up_to(target: Target) -> None:
    """IoUs of 1, 1/2, 1/2, 1/4: 2.25 in all, of the two largest 1.5."""
    pred_boxes = boxes((0, 32), (0, 16), (16, 32), (0, 8), (100, 101))
    result = match(target, boxes((0, 32)), pred_boxes)
    assert result.cls_match.tolist() == [[0, 0, BACKGROUND, BACKGROUND, BACKGROUND]]
    assert result.soft_targets is not None
    assert result.soft_targets.tolist() == [[1.0, 0.5, 0.0, 0.0, 0.0]]
    assert labels(target, boxes((0, 32)), pred_boxes, k=2) == [0, BACKGROUND, BACKGROUND, BACKGROUND, BACKGROUND]
    full = boxes(*[(0.0, 32.0)] * 5)  # the center of the fifth is near no object
    assert labels(target, boxes((0, 32)), full) == [0, 0, 0, 0, BACKGROUND]
    assert labels(target, boxes((0, 32)), full, k=3) == [0, 0, 0, BACKGROUND, BACKGROUND]


def test_an_object_that_no_box_overlaps_selects_one(target: Target) -> None:
    """The lowest index of those that tie. A candidate that is near the center and not inside pays the penalty."""
    away = boxes(*[(100.0, 101.0)] * 6)
    assert labels(target, boxes((8, 24)), away) == [BACKGROUND, 0, *[BACKGROUND] * 4]
    assert labels(target, boxes((8, 24)), away, candidates="center") == [0, *[BACKGROUND] * 5]
    probabilities = torch.tensor([[0.5], [0.5], [0.6], [0.5], [0.5], [0.5]])
    assert labels(target, boxes((8, 24)), away, probabilities=probabilities) == [
        BACKGROUND,
        BACKGROUND,
        0,
        *[BACKGROUND] * 3,
    ]


@pytest.mark.parametrize("candidates", ["box_or_center", "center"])
def test_the_gate_is_the_union_of_all_objects(target: Target, candidates: str) -> None:
    """The first object overlaps five predictions fully, and may select the candidates that only the second is near."""
    gt_boxes = boxes((0, 8), (32, 40))  # centers at 4 and 36; those of the anchors at 4, 12, ... 44
    pred_boxes = boxes(*[(0.0, 8.0)] * 5, (200, 208))
    options: dict[str, Any] = {"center_radius": 0.75, "candidates": candidates}
    # Two candidates, of which each object selects the first or both; the other one's penalty decides.
    assert labels(target, gt_boxes, pred_boxes, **options) == [0, *[BACKGROUND] * 3, 1, BACKGROUND]
    # Six candidates, of which the first object selects five.
    options["center_radius"] = 3.0
    fifth = 1 if candidates == "box_or_center" else 0  # else the second object selects the third, and loses it
    assert labels(target, gt_boxes, pred_boxes, **options) == [0, 0, 0, 0, fifth, BACKGROUND]


def test_boundaries_are_outside(target: Target) -> None:
    """Of an object, and of the square around its center."""
    away = boxes(*[(100.0, 101.0)] * 3)
    assert labels(target, boxes((4, 12)), away, center_radius=0.5) == [BACKGROUND] * 3
    assert labels(target, boxes((4, 12)), away, center_radius=0.5 + 1e-6) == [0, BACKGROUND, BACKGROUND]
    assert labels(target, boxes((4, 12.001)), away, center_radius=0.0) == [BACKGROUND, 0, BACKGROUND]
    assert labels(target, boxes((4, 12.001)), away, center_radius=0.0, candidates="center") == [BACKGROUND] * 3


def test_the_stride_is_the_width_of_the_anchor(target: Target) -> None:
    """Of two anchors with one center, the wider one is near an object that is farther away."""
    anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [-4.0, 0.0, 12.0, 8.0], [4.0, 0.0, 4.0, 8.0]])
    away = boxes(*[(100.0, 101.0)] * 3)
    assert labels(target, boxes((12, 20)), away, anchors=anchors, center_radius=1.0) == [BACKGROUND, 0, BACKGROUND]


def test_an_anchor_of_several_objects_goes_to_the_least_cost_of_all(target: Target) -> None:
    """Two classes. Objects 0 and 1 select the first anchor; it costs object 2 least, which selects the second."""
    gt_boxes = boxes((0, 16), (0, 16), (0, 16))
    gt_labels = torch.tensor([0, 0, 1])
    pred_boxes = boxes((0, 8), (0, 7.5))
    probabilities = torch.tensor([[0.4, 0.5], [0.1, 0.9]])
    wanted = [2, 2]
    assert labels(target, gt_boxes, pred_boxes, probabilities=probabilities, gt_labels=gt_labels) == wanted
    # Of equal costs the lower object's.
    assert labels(target, gt_boxes, pred_boxes, probabilities=probabilities, gt_labels=torch.tensor([0, 0, 0])) == [
        0,
        BACKGROUND,
    ]


def test_weights(target: Target) -> None:
    """The first anchor has the better class, the second the better box."""
    gt_boxes, pred_boxes = boxes((0, 16)), boxes((0, 8), (0, 9))
    probabilities = torch.tensor([[0.9], [0.7]])
    assert labels(target, gt_boxes, pred_boxes, probabilities=probabilities, iou_weight=1.0) == [0, BACKGROUND]
    assert labels(target, gt_boxes, pred_boxes, probabilities=probabilities, iou_weight=3.0) == [BACKGROUND, 0]
    assert labels(target, gt_boxes, pred_boxes, probabilities=probabilities, cls_weight=0.0) == [BACKGROUND, 0]
    assert labels(target, gt_boxes, pred_boxes, probabilities=probabilities, iou_weight=0.0) == [0, BACKGROUND]
    assert labels(target, gt_boxes, pred_boxes, cls_weight=0.0, iou_weight=0.0) == [0, BACKGROUND]


def test_probabilities_of_0_and_1_and_nan_cost_100(target: Target) -> None:
    """NaN counts as 0, as does a class that is unknown."""
    gt_boxes, away = boxes((0, 32)), boxes(*[(100.0, 101.0)] * 4)
    for best in range(4):
        probabilities = torch.tensor([[0.0], [float("nan")], [-3.0], [0.0]])
        probabilities[best] = 1e-40  # -ln of it is 92
        wanted = [BACKGROUND] * 4
        wanted[best] = 0
        assert labels(target, gt_boxes, away, probabilities=probabilities) == wanted
    two_classes = torch.tensor([[1.0, 0.0], [1.0, 0.9], [1.0, 1.0], [1.0, 0.9]])
    assert labels(target, gt_boxes, away, probabilities=two_classes, gt_labels=torch.tensor([1])) == [
        BACKGROUND,
        BACKGROUND,
        0,
        BACKGROUND,
    ]
    for unknown in (-1, 1, 2**40):
        label = torch.tensor([unknown])
        assert labels(target, gt_boxes, boxes(*[(0.0, 32.0)] * 4), gt_labels=label, k=1) == [0, *[BACKGROUND] * 3]


def test_bad_boxes_match_nothing(target: Target) -> None:
    nan, inf = float("nan"), float("inf")
    bad = torch.tensor([[5.0, 5, 5, 5], [9, 0, 3, 9], [nan, 0, 5, 5], [0, 0, inf, 9]])
    full = boxes(*[(0.0, 32.0)] * 4)
    assert labels(target, torch.cat([bad, boxes((0, 32))]), full) == [4, 4, 4, 4]
    assert labels(target, bad, full) == [BACKGROUND] * 4
    assert labels(target, boxes(), full) == [BACKGROUND] * 4
    assert labels(target, boxes((0, 32)), boxes()) == []
    anchors = torch.tensor([[nan, 0, 8, 8], [0, 0, inf, 8], [8.0, 0, 0, 8], [0, 0, 8, 8]])
    assert labels(target, boxes((0, 32)), full, anchors=anchors) == [BACKGROUND] * 3 + [0]
    predictions = torch.tensor([[nan, 0, 32, 8], [0, 0, inf, 8], [32.0, 0, 0, 8], [0, 0, 8, 8]])
    assert labels(target, boxes((0, 32)), predictions) == [BACKGROUND] * 3 + [0]


def test_crowd_regions_ignore_background_and_match_nothing(target: Target) -> None:
    result = match(
        target,
        boxes((0, 16), (0, 28)),
        boxes((0, 16), (0, 8), (16, 24), (24, 32), (32, 40)),
        gt_crowd=[torch.tensor([False, True], device=target.device)],
    )
    assert result.cls_match.tolist() == [[0, IGNORED, IGNORED, IGNORED, BACKGROUND]]
    assert result.num_pos.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, "^k: expected an integer from 1 to 128, got 0"),
        ({"k": 129}, ValueError, "^k: expected an integer"),
        ({"k": 10.0}, TypeError, "^k: expected an integer"),
        ({"center_radius": -1.0}, ValueError, "^center_radius: expected a finite number of at least 0"),
        ({"iou_weight": float("inf")}, ValueError, "^iou_weight: expected a finite number"),
        ({"cls_weight": None}, TypeError, "^cls_weight: expected a number"),
        ({"candidates": "box"}, ValueError, "^candidates: expected one of 'box_or_center', 'center', got 'box'"),
        ({"crowd_overlap": 0}, ValueError, "^crowd_overlap: expected a threshold"),
    ],
)
def test_a_wrong_option_raises(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mg_ops.SimOtaMatcher(**options)
    with pytest.raises(error, match=message):
        mg_ops.simota_match(torch.zeros(1, 4), [torch.zeros(0, 4)], [torch.zeros(0).long()], **options)


def test_predictions_are_needed() -> None:
    with pytest.raises(ValueError, match=r"^pred_boxes: simota_match reads the predicted boxes"):
        mg_ops.simota_match(row(), [boxes()], [torch.zeros(0).long()], cls_logits=torch.zeros(1, 6, 1))
    with pytest.raises(ValueError, match=r"^cls_logits: simota_match reads the scores"):
        mg_ops.simota_match(row(), [boxes()], [torch.zeros(0).long()], pred_boxes=row()[None])


# ---------------------------------------------------------------------------------------------------------------------
# The libraries' own


def simota_costs(image: DynamicKImage, p: Tensor, radius: float, candidates: str) -> Costs:
    """The costs in float64, from geometry in float32."""
    inside, near_center, iou = pair_geometry(image, radius)
    by_center = candidates == "center"
    preferred = near_center if by_center else inside & near_center
    p64 = p.double()
    of_target, of_other = -p64.log().clamp(min=-100), -(-p64).log1p().clamp(min=-100)
    others, label = of_other.sum(1, keepdim=True), image.gt_labels
    of_iou = -3 * (iou + (1e-8 if by_center else 1e-7)).double().log()
    cls_cost = others - of_other[:, label] + of_target[:, label]
    penalty = torch.where(preferred, 0.0, 1e6 if by_center else 1e5).double()
    # Of a sum, what its terms may be wrong by; a penalty costs the bits of its own last place.
    slack = 1e-6 * (others + of_target[:, label] + of_iou.abs()) + penalty * 2.0**-23
    return Costs((near_center if by_center else inside | near_center).any(1), iou, cls_cost + of_iou + penalty, slack)


def compare(
    target: Target,
    assign: Callable[[DynamicKImage, Tensor, Tensor], tuple[Tensor, Tensor | None]],
    radius: float,
    candidates: str,
    quantized: bool = False,
) -> None:
    """Compares with the labels and targets that a library gives, on random images.

    Args:
        assign: of an image, its probabilities and objectnesses.
        radius: the library's option.
        candidates: likewise.
        quantized: whether boxes are multiples of 1/8, with which center and size are exact.
    """
    generator = torch.Generator().manual_seed(0)
    positives = differing = 0
    for _ in range(fuzz_cases(100)):
        image = random_image(generator)
        if quantized:
            rounded = [(boxes * 8).round() / 8 for boxes in (image.gt_boxes, image.pred_boxes)]
            image = image._replace(gt_boxes=rounded[0], pred_boxes=rounded[1])
        objectness = torch.randn(len(image.anchors), 1, generator=generator).sigmoid()
        p = (image.cls_logits.sigmoid() * objectness).sqrt()
        wanted, wanted_targets = assign(image, p, objectness)
        match = mg_ops.simota_match(
            image.anchors.to(target.device),
            [image.gt_boxes.to(target.device)],
            [image.gt_labels.to(target.device)],
            cls_probabilities=p[None].to(target.device),
            pred_boxes=image.pred_boxes[None].to(target.device),
            center_radius=radius,
            candidates=candidates,
            backend=target.backend,
        )
        cls_match = match.cls_match[0].cpu()
        differ = cls_match != wanted
        if bool(differ.any()):
            assert bool(explained(simota_costs(image, p, radius, candidates), 10)[differ].all())
        assert match.soft_targets is not None
        if wanted_targets is not None:
            same = (wanted >= 0) & ~differ
            assert torch.equal(match.soft_targets[0].cpu()[same], wanted_targets[same])
        positives += int((wanted >= 0).sum())
        differing += int(differ.sum())
    assert positives > fuzz_cases(500) and differing < 0.02 * positives


@pytest.mark.parametrize("radius", [2.5, 1.0])
def test_mmdetections_assigner(target: Target, radius: float) -> None:
    try:
        assigner = upstream.mmdet_assigners()["SimOTAAssigner"](center_radius=radius)
    except ImportError as error:
        pytest.skip(str(error))

    def assign(image: DynamicKImage, p: Tensor, objectness: Tensor) -> tuple[Tensor, Tensor]:
        predictions = upstream.instances(bboxes=image.pred_boxes, scores=p, priors=image.priors)
        objects = upstream.instances(bboxes=image.gt_boxes, labels=image.gt_labels)
        result = assigner.assign(predictions, objects)
        return upstream.labels_of_mmdet(result.gt_inds), result.max_overlaps

    compare(target, assign, radius, "box_or_center")


def test_the_head_of_yolox(target: Target) -> None:
    try:
        head = upstream.libreyolo_yolox_head()
    except ImportError as error:
        pytest.skip(str(error))

    def assign(image: DynamicKImage, p: Tensor, objectness: Tensor) -> tuple[Tensor, Tensor]:
        return upstream.labels_of_yolox(
            head, image.priors, image.gt_boxes, image.gt_labels, image.pred_boxes, image.cls_logits, objectness.logit()
        )

    compare(target, assign, 1.5, "center", quantized=True)
