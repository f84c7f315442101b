"""The loss of a batch: its two parts and their normalizers, without objects, and under autocast."""

from __future__ import annotations

import math

import pytest
import torch

import mg_ops
from detector.loss import detection_loss
from mg_ops import BACKGROUND, BoxCoder

ANCHORS = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [40, 40, 50, 50], [20, 20, 30, 30]])


def packed(*images: tuple[list[list[float]], list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    boxes = torch.tensor([box for objects, _ in images for box in objects], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([label for _, labels in images for label in labels], dtype=torch.int64)
    offsets = torch.tensor([0] + [len(labels) for _, labels in images]).cumsum(0)
    return boxes, labels, offsets


def test_the_two_parts_and_their_normalizers_worked_out_by_hand() -> None:
    # Object 0 sits on anchor 0 (IoU 1) and leaves anchor 1 at 1/3; object 1 sits on anchor 3.
    gt = packed(([[0, 0, 10, 10], [20, 20, 30, 30]], [1, 0]))
    logits = torch.zeros(1, 4, 2)
    deltas = torch.tensor([[[0.2, 0, 0, 0], [9, 9, 9, 9], [9, 9, 9, 9], [0, 0, 0.01, 0]]])
    match = mg_ops.mutual_match(
        ANCHORS, *gt, cls_logits=logits, box_deltas=deltas, box_coder=BoxCoder(), strategy="iou"
    )
    assert match.cls_match.tolist() == [[0, BACKGROUND, BACKGROUND, 1]]
    loss = detection_loss(logits, deltas, ANCHORS, match, *gt, BoxCoder())
    at_half = 0.25 * math.log(2)  # (1/2)^2 * ln 2, as for every logit of 0
    assert loss.cls_loss.item() == pytest.approx((2 * 0.25 * at_half + 6 * 0.75 * at_half) / 2, rel=1e-6)
    # Of the errors 0.2 and 0.01: beyond beta = 0.11, and below it.
    b = math.exp(3) - 1
    beyond = 1.5 * 0.2 + (1.5 / b - 0.5) * 0.11
    below = 0.5 * 0.11 / b * (b * 0.01 / 0.11 + 1) * math.log(b * 0.01 / 0.11 + 1) - 0.5 * 0.01
    assert loss.box_loss.item() == pytest.approx((beyond + below) / (2 * 4), rel=1e-5)
    assert (loss.num_cls_positives.item(), loss.num_loc_positives.item()) == (2, 2)
    released = detection_loss(logits, deltas, ANCHORS, match, *gt, BoxCoder(), box_loss="released_balanced_l1")
    beyond = 1.5 * 0.2 + 1.5 / b - 0.5 * 0.11
    below = 0.5 / b * (b * 0.01 + 1) * math.log(b * 0.01 / 0.11 + 1) - 0.5 * 0.01
    assert released.box_loss.item() == pytest.approx((beyond + below) / (2 * 4), rel=1e-5)


def test_a_batch_without_objects_learns_its_background() -> None:
    gt = packed(([], []), ([], []))
    logits = torch.zeros(2, 4, 3, requires_grad=True)
    deltas = torch.zeros(2, 4, 4, requires_grad=True)
    match = mg_ops.mutual_match(ANCHORS, *gt, cls_logits=logits, box_deltas=deltas, box_coder=BoxCoder())
    loss = detection_loss(logits, deltas, ANCHORS, match, *gt, BoxCoder())
    assert loss.cls_loss.item() == pytest.approx(24 * 0.75 * 0.25 * math.log(2), rel=1e-6)
    assert loss.box_loss.item() == 0
    (loss.cls_loss + loss.box_loss).backward()
    assert (logits.grad > 0).all()
    assert (deltas.grad == 0).all()


def test_what_other_anchors_predict_reaches_no_box_gradient() -> None:
    gt = packed(([[0, 0, 10, 10]], [0]))
    logits = torch.zeros(1, 4, 2)
    deltas = torch.zeros(1, 4, 4)
    deltas[0, 2] = torch.tensor([float("inf"), float("nan"), 1e30, -1e30])
    deltas.requires_grad_()
    match = mg_ops.mutual_match(ANCHORS, *gt, cls_logits=logits, box_deltas=deltas, box_coder=BoxCoder())
    loss = detection_loss(logits, deltas, ANCHORS, match, *gt, BoxCoder())
    loss.box_loss.backward()
    assert loss.box_loss.isfinite()
    assert deltas.grad[0, 2].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing_but_the_rounding_of_its_inputs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gt = packed(([[0, 0, 10, 10]], [1]), ([[20, 20, 30, 30], [40, 40, 50, 50]], [0, 2]))
    logits, deltas = torch.randn(2, 4, 3).to(dtype), torch.randn(2, 4, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        match = mg_ops.mutual_match(ANCHORS, *gt, cls_logits=logits, box_deltas=deltas, box_coder=BoxCoder())
        low = detection_loss(logits, deltas, ANCHORS, match, *gt, BoxCoder())
    high = detection_loss(logits.float(), deltas.float(), ANCHORS, match, *gt, BoxCoder())
    for one, other in zip(low, high, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_a_label_out_of_range_is_ignored_not_indexed() -> None:
    gt = packed(([[0, 0, 10, 10]], [7]))
    logits, deltas = torch.zeros(1, 4, 2), torch.zeros(1, 4, 4)
    match = mg_ops.mutual_match(
        ANCHORS, *gt, cls_logits=logits, box_deltas=deltas, box_coder=BoxCoder(), strategy="iou"
    )
    loss = detection_loss(logits, deltas, ANCHORS, match, *gt, BoxCoder())
    assert loss.cls_loss.item() == pytest.approx(6 * 0.75 * 0.25 * math.log(2), rel=1e-6)
    assert loss.num_cls_positives.item() == 0


def test_the_loss_is_one_graph_to_torch_compile() -> None:
    torch.manual_seed(0)
    gt = packed(([[0, 0, 10, 10]], [1]), ([[20, 20, 30, 30], [40, 40, 50, 50]], [0, 2]))
    logits, deltas = torch.randn(2, 4, 3), torch.randn(2, 4, 4)
    match = mg_ops.mutual_match(ANCHORS, *gt, cls_logits=logits, box_deltas=deltas, box_coder=BoxCoder())

    def total(logits: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        loss = detection_loss(logits, deltas, ANCHORS, match, *gt, BoxCoder())
        return loss.cls_loss + loss.box_loss

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, deltas), total(logits, deltas))
