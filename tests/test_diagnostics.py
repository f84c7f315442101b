"""`summarize` counts what a match did: hand-made matches with hand-made answers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import mg_ops

SIDES = (10.0, 32.0, 96.0, 20.0, 200.0)
"""Small, medium (the limit itself), large (the limit itself); then small and large."""


def square(side: float) -> list[float]:
    return [5.0, 5.0, 5.0 + side, 5.0 + side]


def hand_made() -> tuple[mg_ops.MutualMatch, list[Tensor], list[Tensor]]:
    """Three images of six anchors with three, none and two objects."""
    match = mg_ops.MutualMatch(
        cls_match=torch.tensor([[0, 0, 1, -2, -1, -1], [-1] * 6, [-2, -2, 1, 1, 1, -1]]),
        loc_match=torch.tensor([[0, 1, 1, 1, -1, -1], [-1] * 6, [-1, -1, 1, 0, -1, -1]]),
        num_pos=torch.tensor([2, 1, 0, 1, 3], dtype=torch.int32),
        num_total=torch.tensor([2, 2, 0, 3, 3], dtype=torch.int32),
    )
    boxes = torch.tensor([square(side) for side in SIDES])
    labels = torch.tensor([0, 1, 1, 2, 7])
    return match, [boxes[:3], boxes[3:3], boxes[3:]], [labels[:3], labels[3:3], labels[3:]]


def test_objects_and_positives_are_counted_by_size() -> None:
    match, boxes, _ = hand_made()
    summary = mg_ops.summarize(match, boxes)
    assert summary.num_objects.tolist() == [5, 2, 1, 2]
    assert summary.unmatchable.tolist() == [1, 0, 0, 1]
    assert summary.without_cls_positive.tolist() == [2, 1, 0, 1]
    assert summary.without_loc_positive.tolist() == [1, 0, 0, 1]
    assert summary.cls_positives.tolist() == [6, 2, 1, 3]
    assert summary.loc_positives.tolist() == [6, 2, 3, 1]
    assert summary.class_counts is None


def test_disagreement_is_of_the_anchors_positive_for_some_task() -> None:
    """Image 0: anchors 0 and 2 agree, 1 (0, 1) and 3 (ignored, 1) do not. Image 2: 2 agrees, 3 and 4 do not."""
    match, boxes, _ = hand_made()
    summary = mg_ops.summarize(match, boxes)
    assert float(summary.disagreement) == pytest.approx(4 / 7)
    assert float(summary.ignored_share) == pytest.approx(3 / 18)


def test_classes_are_counted_where_their_number_is_given() -> None:
    match, boxes, labels = hand_made()
    counts = mg_ops.summarize(match, boxes, labels, num_classes=4).class_counts
    assert counts is not None and counts.tolist() == [[1, 0, 0], [2, 1, 1], [1, 1, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="gt_labels, num_classes: the counts by class need both"):
        mg_ops.summarize(match, boxes, labels)


def test_crowd_regions_are_no_objects() -> None:
    match, boxes, labels = hand_made()
    crowd = [torch.tensor([False, False, True]), torch.zeros(0, dtype=torch.bool), torch.tensor([False, False])]
    summary = mg_ops.summarize(match, boxes, labels, gt_crowd=crowd, num_classes=4)
    assert summary.num_objects.tolist() == [4, 2, 1, 1]
    assert summary.unmatchable.tolist() == [0, 0, 0, 0]
    assert summary.class_counts is not None and summary.class_counts[1].tolist() == [1, 0, 0]


def test_packed_objects_past_the_last_offset_do_not_count() -> None:
    match, boxes, _ = hand_made()
    junk = torch.full((3, 4), float("nan"))
    match = match._replace(num_pos=torch.cat([match.num_pos, torch.zeros(3, dtype=torch.int32)]))
    summary = mg_ops.summarize(match, torch.cat([*boxes, junk]), gt_offsets=torch.tensor([0, 3, 3, 5]))
    for packed, listed in zip(summary[:-1], mg_ops.summarize(hand_made()[0], boxes)[:-1], strict=True):
        assert packed.tolist() == listed.tolist()


def test_boxes_that_are_none_count_among_all_only() -> None:
    match, boxes, _ = hand_made()
    boxes[0][2] = torch.tensor([20.0, 20.0, 10.0, 10.0])
    assert mg_ops.summarize(match, boxes).num_objects.tolist() == [5, 2, 1, 1]


def test_size_limits_are_in_the_boxes_unit() -> None:
    match, boxes, _ = hand_made()
    scaled: Sequence[Tensor] = [box / 1000 for box in boxes]
    assert mg_ops.summarize(match, scaled, size_limits=(0.0319, 0.0961)).num_objects.tolist() == [5, 2, 2, 1]


def test_padded_objects_need_no_labels_where_a_mask_tells_the_padding() -> None:
    match, boxes, _ = hand_made()
    mask = torch.tensor([[True, True, True], [False] * 3, [True, True, False]])
    padded = torch.full((3, 3, 4), float("nan")).masked_scatter(mask.unsqueeze(-1), torch.cat(boxes))
    counts = [torch.zeros(3, 3, dtype=torch.int32).masked_scatter(mask, value) for value in match[2:]]
    found = mg_ops.summarize(match._replace(num_pos=counts[0], num_total=counts[1]), padded, gt_mask=mask)
    assert found.as_dict() == mg_ops.summarize(match, boxes).as_dict()


def test_a_batch_without_objects_has_zeros() -> None:
    nothing = torch.full((2, 3), mg_ops.BACKGROUND)
    match = mg_ops.MutualMatch(nothing, nothing, torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    values = mg_ops.summarize(match, [torch.zeros(0, 4)] * 2).as_dict()
    assert len(values) == 26 and set(values.values()) == {0.0}


def test_the_dictionary_names_every_number() -> None:
    match, boxes, _ = hand_made()
    values = mg_ops.summarize(match, boxes).as_dict()
    assert values["objects/all"] == 5
    assert values["without_cls_positive/small"] == 1
    assert values["cls_positives_per_object/large"] == 1.5
    assert values["loc_positives_per_object/medium"] == 3
    assert values["disagreement"] == pytest.approx(4 / 7)


def test_the_iou_strategy_never_disagrees() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 2, generator=generator) * 80
    anchors = torch.cat([corners, corners + 8 + 20 * torch.rand(300, 2, generator=generator)], dim=1)
    predictions = anchors + torch.randn(2, 300, 4, generator=generator)
    scores = 3 * torch.randn(2, 300, 3, generator=generator)
    boxes, labels = [anchors[:4] + 1, anchors[50:53] - 1], [torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 2])]

    def disagreement(strategy: str) -> float:
        options = {"strategy": strategy, "iou_positive": 0.3, "iou_ignored": 0.2}
        match = mg_ops.mutual_match(anchors, boxes, labels, cls_logits=scores, pred_boxes=predictions, **options)
        return float(mg_ops.summarize(match, boxes).disagreement)

    assert disagreement("iou") == 0.0
    assert 0.0 < disagreement("mutual") <= 1.0


def test_another_batchs_objects_are_refused() -> None:
    match, boxes, _ = hand_made()
    with pytest.raises(ValueError, match="match: made for 5 objects, but gt_boxes has 3"):
        mg_ops.summarize(match, [boxes[0], boxes[1], boxes[1]])
    with pytest.raises(TypeError, match=r"match: expected what mg_ops\.mutual_match or another rule returned"):
        mg_ops.summarize(match.cls_match, boxes)  # type: ignore[arg-type]


def test_it_is_one_compiled_graph() -> None:
    match, boxes, _ = hand_made()
    compiled = torch.compile(mg_ops.summarize, fullgraph=True, backend="eager")
    for actual, expected in zip(compiled(match, boxes)[:-1], mg_ops.summarize(match, boxes)[:-1], strict=True):
        assert actual.tolist() == expected.tolist()
