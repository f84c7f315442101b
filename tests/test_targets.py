"""encode_targets, BoxCoder and box_iou against plain formulas and torchvision."""

from __future__ import annotations

import math

import pytest
import torch

import mg_ops

ANCHORS = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 15.0, 25.0], [20.0, 20.0, 30.0, 30.0]])
GT_BOXES = [
    torch.tensor([[1.0, 0.0, 11.0, 10.0], [5.0, 5.0, 15.0, 20.0]]),
    torch.zeros(0, 4),
    torch.tensor([[18.0, 20.0, 30.0, 32.0]]),
]
GT_LABELS = [torch.tensor([4, 7]), torch.zeros(0, dtype=torch.int64), torch.tensor([2])]
CODER = mg_ops.BoxCoder()


def hand_made_match() -> mg_ops.MutualMatch:
    """As if anchors 0 and 1 of image 0 had objects 0 and 1, and anchor 2 of image 2 object 0."""
    return mg_ops.MutualMatch(
        cls_match=torch.tensor([[0, 1, -2], [-1, -1, -1], [-2, -1, 0]]),
        loc_match=torch.tensor([[0, -1, -1], [-1, -1, -1], [-1, 0, 0]]),
        num_pos=torch.tensor([1, 1, 1], dtype=torch.int32),
        num_total=torch.tensor([1, 1, 2], dtype=torch.int32),
    )


@pytest.mark.parametrize("packed", [False, True])
def test_targets_are_those_of_the_matched_objects(packed: bool) -> None:
    objects = (GT_BOXES, GT_LABELS)
    if packed:
        objects = (torch.cat(GT_BOXES), torch.cat(GT_LABELS), torch.tensor([0, 2, 2, 3]))
    targets = mg_ops.encode_targets(hand_made_match(), ANCHORS, *objects)
    # Labels 4, 7 in image 0 and 2 in image 2; background and ignored as they were.
    assert targets.class_targets.tolist() == [[4, 7, -2], [-1, -1, -1], [-2, -1, 2]]
    assert targets.loc_labels.tolist() == [[4, -1, -1], [-1, -1, -1], [-1, 2, 2]]
    boxes = torch.zeros(3, 3, 4)
    boxes[0, 0], boxes[2, 1], boxes[2, 2] = GT_BOXES[0][0], GT_BOXES[2][0], GT_BOXES[2][0]
    assert torch.equal(targets.box_targets, boxes)


def test_boxes_are_encoded_from_their_anchors() -> None:
    targets = mg_ops.encode_targets(hand_made_match(), ANCHORS, GT_BOXES, GT_LABELS, box_coder=CODER)
    # Anchor 0 -> object 0 of image 0: moved right by 1/10 of the width, times 10.
    torch.testing.assert_close(targets.box_targets[0, 0], torch.tensor([1.0, 0.0, 0.0, 0.0]))
    # Anchor 2 (center 25, size 10) -> center (24, 26), size 12: -1/10 * 10, 1/10 * 10, 5 ln 1.2
    size = 5 * math.log(1.2)
    torch.testing.assert_close(targets.box_targets[2, 2], torch.tensor([-1.0, 1.0, size, size]))
    assert targets.box_targets[1].eq(0).all()
    assert targets.box_targets.isfinite().all()


def test_unknown_labels_are_ignored_where_the_number_of_classes_is_given() -> None:
    targets = mg_ops.encode_targets(hand_made_match(), ANCHORS, GT_BOXES, GT_LABELS, num_classes=5)
    assert targets.class_targets.tolist() == [[4, -2, -2], [-1, -1, -1], [-2, -1, 2]]
    assert targets.loc_labels.tolist() == [[4, -1, -1], [-1, -1, -1], [-1, 2, 2]]


@pytest.mark.parametrize("batch_size", [0, 2])
def test_without_objects_all_is_background(batch_size: int) -> None:
    boxes, labels = [torch.zeros(0, 4)] * batch_size, [torch.zeros(0, dtype=torch.int64)] * batch_size
    match = mg_ops.mutual_match(ANCHORS, boxes, labels, strategy="iou")
    targets = mg_ops.encode_targets(match, ANCHORS, boxes, labels, box_coder=CODER)
    assert targets.class_targets.eq(mg_ops.BACKGROUND).all() and targets.class_targets.shape == (batch_size, 3)
    assert targets.box_targets.shape == (batch_size, 3, 4) and targets.box_targets.eq(0).all()


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 100
    return torch.cat([corner, corner + 1 + 50 * torch.rand(count, 2, generator=generator)], dim=1)


def test_decoding_undoes_encoding() -> None:
    anchors, boxes = random_boxes(1000, 0), random_boxes(1000, 1)
    deltas = CODER.encode(anchors=anchors, boxes=boxes)
    torch.testing.assert_close(CODER.decode(anchors=anchors, deltas=deltas), boxes, rtol=1e-4, atol=1e-3)


def test_coder_agrees_with_torchvision() -> None:
    detection = pytest.importorskip("torchvision.models.detection._utils")
    anchors, boxes = random_boxes(1000, 2), random_boxes(1000, 3)
    coder = mg_ops.BoxCoder(weights=(10.0, 9.0, 5.0, 4.0))
    peer = detection.BoxCoder(weights=(10.0, 9.0, 5.0, 4.0))
    encoded = coder.encode(anchors=anchors, boxes=boxes)
    torch.testing.assert_close(encoded, peer.encode_single(boxes, anchors), rtol=1e-4, atol=1e-4)
    deltas = 8 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(4))
    decoded = coder.decode(anchors=anchors, deltas=deltas)
    torch.testing.assert_close(decoded, peer.decode_single(deltas, anchors), rtol=1e-4, atol=1e-2)


def test_iou_agrees_with_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    boxes_1, boxes_2 = random_boxes(300, 5), random_boxes(200, 6)
    torch.testing.assert_close(mg_ops.box_iou(boxes_1, boxes_2), ops.box_iou(boxes_1, boxes_2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_objects", [0, 1])
def test_targets_are_int64_whatever_the_match_is(num_objects: int) -> None:
    anchors = torch.tensor([[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 6.0, 6.0]])
    objects = [anchors[:num_objects]], [torch.zeros(num_objects, dtype=torch.int32)]
    match = mg_ops.mutual_match(anchors, *objects, strategy="iou")
    match = match._replace(cls_match=match.cls_match.int(), loc_match=match.loc_match.int())
    targets = mg_ops.encode_targets(match, anchors, *objects)
    assert targets.class_targets.dtype == targets.loc_labels.dtype == torch.int64
    assert targets.class_targets.tolist() == targets.loc_labels.tolist() == [[0 if num_objects else -1, -1]]


def test_points_become_squares_of_their_strides() -> None:
    points = torch.tensor([[4.0, 4.0], [12.0, 4.0], [16.0, 16.0]])
    anchors = mg_ops.anchors_from_points(points, torch.tensor([8.0, 8.0, 32.0]), 4)
    assert anchors.tolist() == [[-12, -12, 20, 20], [-4, -12, 28, 20], [-48, -48, 80, 80]]
    half = mg_ops.anchors_from_points(points.half(), torch.tensor([8.0, 8.0, 32.0]).half(), 0.5)
    assert half.dtype == torch.float32 and half[0].tolist() == [2, 2, 6, 6]
