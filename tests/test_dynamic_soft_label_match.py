"""Dynamic soft label matching: answers worked out by hand, and every label of mmdetection's `DynamicSoftLabelAssigner`.

A label may differ where an exact tie or a margin within rounding decides, and nowhere else: each one that differs is
looked at (`dynamic_k_images.explained`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Target, fuzz_cases
from dynamic_k_images import Costs, DynamicKImage, explained, pair_geometry, random_image
from torch import Tensor
from torch.nn import functional

import mg_ops
from benchmarks import upstream

BACKGROUND, IGNORED = mg_ops.BACKGROUND, mg_ops.IGNORED
WITHOUT_TRITON = True


def row(count: int) -> Tensor:
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
    logits: list[list[float]] | None = None,
    gt_labels: list[int] | None = None,
    anchors: Tensor | None = None,
    **options: Any,
) -> mg_ops.Match:
    """Of one image; by default of anchors in a row, and of one class of logit 0."""
    cls_logits = torch.zeros(len(pred_boxes), 1) if logits is None else torch.tensor(logits)
    result = mg_ops.dynamic_soft_label_match(
        (row(len(pred_boxes)) if anchors is None else anchors).to(target.device),
        [gt_boxes.to(target.device)],
        [torch.tensor(gt_labels or [0] * len(gt_boxes), dtype=torch.int64, device=target.device)],
        pred_boxes=pred_boxes[None].to(target.device),
        backend=target.backend,
        **({"cls_logits": cls_logits[None].to(target.device)} | options),
    )
    assert result.num_pos.tolist() == [result.cls_match[0].tolist().count(index) for index in range(len(gt_boxes))]
    return result


def labels(*arguments: Any, **options: Any) -> list[int]:
    return match(*arguments, **options).cls_match[0].tolist()


def test_the_nearer_center_wins(target: Target) -> None:
    """Five equal predictions of IoU 1/2: the object selects two, whose distances are 0 and 1 stride."""
    half = boxes(*[(0.0, 20.0)] * 5)
    assert labels(target, boxes((0, 40)), half) == [BACKGROUND, 0, 0, BACKGROUND, BACKGROUND]
    assert labels(target, boxes((0, 40)), half, k=1) == [BACKGROUND, BACKGROUND, 0, BACKGROUND, BACKGROUND]
    result = match(target, boxes((0, 40)), half)
    assert result.soft_targets is not None
    assert result.soft_targets.tolist() == [[0.0, 0.5, 0.5, 0.0, 0.0]]


def test_the_distance_is_in_widths_of_the_anchor(target: Target) -> None:
    """The farther of two anchors is the wider one, and nearer in strides."""
    anchors = torch.tensor([[8.0, 0.0, 16.0, 8.0], [-10.0, 0.0, 22.0, 8.0]])  # centers at 12 and 6
    half = boxes((0, 20), (0, 20))
    assert labels(target, boxes((0, 40)), half, anchors=anchors, k=1) == [BACKGROUND, 0]
    anchors[1] = torch.tensor([2.0, 0.0, 10.0, 8.0])
    assert labels(target, boxes((0, 40)), half, anchors=anchors, k=1) == [0, BACKGROUND]


@pytest.mark.parametrize(("radius", "wanted"), [(3.0, [0, BACKGROUND]), (0.0, [BACKGROUND, 0])])
def test_the_soft_center_weighs_against_the_iou(target: Target, radius: float, wanted: list[int]) -> None:
    """Of the first the IoU is better, by 3 ln(20 / 16) = 0.67; the second is 1 stride nearer: 9 or 0.009 cheaper."""
    anchors = torch.tensor([[8.0, 0.0, 16.0, 8.0], [16.0, 0.0, 24.0, 8.0]])
    pred_boxes = boxes((0, 20), (0, 16))
    found = labels(target, boxes((0, 40)), pred_boxes, anchors=anchors, k=1, soft_center_radius=radius)
    assert found == wanted


def test_the_class_is_asked_for_the_iou(target: Target) -> None:
    """Where the IoU is 1/2, p = 1/2 costs nothing; the surer the class, or that it is none, the more it costs."""
    anchors, half = row(1).repeat(3, 1), boxes(*[(0.0, 4.0)] * 3)
    assert labels(target, boxes((0, 8)), half, [[5.0], [-5.0], [0.0]], anchors=anchors) == [BACKGROUND, BACKGROUND, 0]
    assert labels(target, boxes((0, 8)), half, [[1.0], [-0.9], [2.0]], anchors=anchors) == [BACKGROUND, 0, BACKGROUND]


def test_probabilities_give_what_their_logits_give(target: Target) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(fuzz_cases(30)):
        image = random_image(generator)
        objects = [image.gt_boxes.to(target.device)], [image.gt_labels.to(target.device)]
        matches = [
            mg_ops.dynamic_soft_label_match(
                image.anchors.to(target.device),
                *objects,
                pred_boxes=image.pred_boxes[None].to(target.device),
                backend=target.backend,
                **scores,
            )
            for scores in (
                {"cls_logits": image.cls_logits[None].to(target.device)},
                {"cls_probabilities": image.cls_logits.sigmoid()[None].to(target.device)},
            )
        ]
        differ = matches[0].cls_match != matches[1].cls_match
        if bool(differ.any()):  # p is rounded before it is read
            assert bool(explained(costs_of(image), 13)[differ[0].cpu()].all())


def test_only_anchors_inside_are_candidates(target: Target) -> None:
    away = boxes(*[(100.0, 101.0)] * 4)
    assert labels(target, boxes((4, 20)), away) == [BACKGROUND, 0, BACKGROUND, BACKGROUND]  # boundaries are outside
    assert labels(target, boxes((5, 11)), away) == [BACKGROUND] * 4


def test_an_anchor_of_several_objects_goes_to_the_least_cost(target: Target) -> None:
    """Both objects want it; with the same class the one of larger IoU gets it, and of equal ones the lower."""
    assert labels(target, boxes((0, 9), (0, 8)), boxes((0, 8)), [[0.0]]) == [1]
    assert labels(target, boxes((0, 8), (0, 8)), boxes((0, 8)), [[0.0]]) == [0]
    assert labels(target, boxes((0, 8), (0, 8)), boxes((0, 8)), [[0.0, 2.0]], [0, 1]) == [1]


def test_bad_values_are_contained(target: Target) -> None:
    """NaN counts as a logit of -100, which a smaller one does too; a box that is not finite as IoU 0."""
    nan, inf = float("nan"), float("inf")
    anchors, full = row(1).repeat(3, 1), boxes(*[(0.0, 8.0)] * 3)
    assert labels(target, boxes((0, 8)), full, [[nan], [-90.0], [-inf]], anchors=anchors, k=1) == [
        BACKGROUND,
        0,
        BACKGROUND,
    ]
    assert labels(target, boxes((0, 8)), full, [[nan], [-100.0], [-inf]], anchors=anchors, k=1)[0] == 0
    assert labels(target, boxes((0, 8)), full, [[0.0], [inf], [200.0]], anchors=anchors, k=2) == [BACKGROUND, 0, 0]
    predictions = torch.tensor([[nan, 0, 8, 8], [0, 0, inf, 8], [0, 0, 4, 8]])
    assert labels(target, boxes((0, 8)), predictions, anchors=anchors) == [BACKGROUND, BACKGROUND, 0]
    anchors = torch.tensor([[nan, 0, 8, 8], [4.0, 0, 4, 8], [0, 0, 8, 8]])
    assert labels(target, boxes((0, 8)), full, anchors=anchors) == [BACKGROUND, BACKGROUND, 0]
    bad = torch.tensor([[5.0, 5, 5, 5], [nan, 0, 5, 5], [0, 0, inf, 9]])
    assert labels(target, bad, full) == [BACKGROUND] * 3
    for unknown in (-1, 1, 2**40):
        assert labels(target, boxes((0, 24)), boxes(*[(0.0, 24.0)] * 3), gt_labels=[unknown], k=1)[1] == 0


def test_crowd_regions_ignore_background(target: Target) -> None:
    crowd = [torch.tensor([False, True], device=target.device)]
    result = match(target, boxes((0, 16), (0, 28)), boxes((0, 16), (0, 8), (9, 10), (40, 48), (40, 48)), gt_crowd=crowd)
    assert result.cls_match.tolist() == [[0, IGNORED, IGNORED, IGNORED, BACKGROUND]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, "^k: expected an integer from 1 to 128, got 0"),
        ({"k": True}, TypeError, "^k: expected an integer"),
        ({"soft_center_radius": -1.0}, ValueError, "^soft_center_radius: expected a finite number of at least 0"),
        ({"iou_weight": float("nan")}, ValueError, "^iou_weight: expected a finite number"),
        ({"crowd_overlap": 2}, ValueError, "^crowd_overlap: expected a threshold"),
    ],
)
def test_a_wrong_option_raises(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mg_ops.DynamicSoftLabelMatcher(**options)
    with pytest.raises(error, match=message):
        mg_ops.dynamic_soft_label_match(torch.zeros(1, 4), [torch.zeros(0, 4)], [torch.zeros(0).long()], **options)


# ---------------------------------------------------------------------------------------------------------------------
# mmdetection's own


def costs_of(image: DynamicKImage) -> Costs:
    """The costs in float64, from geometry in float32."""
    inside, _, iou = pair_geometry(image, 0.0)
    logits, y = image.cls_logits.double(), iou.double()
    p, label = logits.sigmoid(), image.gt_labels
    others = functional.softplus(logits) * p**2
    of_label, of_p = logits[:, label], p[:, label]
    of_target = functional.binary_cross_entropy_with_logits(of_label, y, reduction="none") * (y - of_p) ** 2
    total = others.sum(1, keepdim=True)
    of_iou = -3 * (iou + 1e-7).double().log()
    middle = (image.gt_boxes[:, :2] + image.gt_boxes[:, 2:]) / 2
    distance = (image.priors[:, None, :2] - middle).pow(2).sum(-1).sqrt() / image.priors[:, 2:3]
    of_place = 10 ** (distance - 3.0).double()
    # Of a sum, what its terms may be wrong by, and of the power what the rounding of its exponent makes of it.
    slack = 1e-6 * (total + of_target + of_iou.abs() + of_place * (1 + distance))
    return Costs(inside.any(1), iou, total - others[:, label] + of_target + of_iou + of_place, slack)


def test_mmdetections_assigner(target: Target) -> None:
    try:
        assigner = upstream.mmdet_assigners()["DynamicSoftLabelAssigner"]()
    except ImportError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    positives = differing = 0
    for _ in range(fuzz_cases(200)):
        image = random_image(generator)
        predictions = upstream.instances(bboxes=image.pred_boxes, scores=image.cls_logits, priors=image.priors)
        objects = upstream.instances(bboxes=image.gt_boxes, labels=image.gt_labels)
        result = assigner.assign(predictions, objects)
        wanted = upstream.labels_of_mmdet(result.gt_inds)
        match = mg_ops.dynamic_soft_label_match(
            image.anchors.to(target.device),
            [image.gt_boxes.to(target.device)],
            [image.gt_labels.to(target.device)],
            cls_logits=image.cls_logits[None].to(target.device),
            pred_boxes=image.pred_boxes[None].to(target.device),
            backend=target.backend,
        )
        differ = match.cls_match[0].cpu() != wanted
        if bool(differ.any()):
            assert bool(explained(costs_of(image), 13)[differ].all())
        same = (wanted >= 0) & ~differ
        assert match.soft_targets is not None
        assert torch.equal(match.soft_targets[0].cpu()[same], result.max_overlaps[same])
        positives += int((wanted >= 0).sum())
        differing += int(differ.sum())
    assert positives > fuzz_cases(1000) and differing < 0.02 * positives
