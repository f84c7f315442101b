"""The losses are the plain formulas, with no one-hot tensor, no object, and under autocast."""

from __future__ import annotations

import math

import pytest
import torch

import mg_ops
from detector.loss import BOX_LOSSES, balanced_l1_loss, detection_loss, focal_loss, released_balanced_l1_loss
from mg_ops import BACKGROUND, IGNORED, BoxCoder


def plain_focal_loss(logits: torch.Tensor, targets: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    """The paper's formula on one-hot targets, in float64."""
    one_hot = torch.zeros_like(logits, dtype=torch.float64)
    for image, anchor in (targets >= 0).nonzero().tolist():
        one_hot[image, anchor, targets[image, anchor]] = 1
    p = logits.double().sigmoid()
    p_t = torch.where(one_hot == 1, p, 1 - p)
    alpha_t = torch.where(one_hot == 1, alpha, 1 - alpha)
    loss = -alpha_t * (1 - p_t) ** gamma * p_t.log()
    return loss[targets != IGNORED].sum()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("num_classes", [1, 5])
def test_focal_loss_is_the_formula_and_so_is_its_gradient(gamma: float, num_classes: int) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 40, num_classes)).requires_grad_()
    targets = torch.randint(-2, num_classes, (2, 40))
    assert (targets == IGNORED).any() and (targets == BACKGROUND).any() and (targets >= 0).any()
    reference = logits.detach().double().requires_grad_()
    expected = plain_focal_loss(reference, targets, 0.25, gamma)
    loss = focal_loss(logits, targets, 0.25, gamma)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.double(), reference.grad, rtol=1e-4, atol=1e-6)


def test_focal_loss_of_extreme_logits_is_finite() -> None:
    logits = torch.tensor([[[90.0, -90.0], [-90.0, 90.0], [300.0, 300.0]]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([[0, 0, IGNORED]]))
    # Anchor 0 is right about both classes; anchor 1 misses its own by 90 and invents the other by 90.
    assert loss.item() == pytest.approx(0.25 * 90 + 0.75 * 90, rel=1e-5)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2].tolist() == [0, 0]


def test_balanced_l1_worked_out_by_hand() -> None:
    alpha, gamma, beta = 0.5, 1.5, 0.11
    b = math.exp(3) - 1
    x = 0.05
    inside = alpha / b * (b * x + beta) * math.log(b * x / beta + 1) - alpha * x
    outside = gamma * 2 + (gamma / b - alpha) * beta
    loss = balanced_l1_loss(torch.tensor([0.0, x, -x, 2.0, -2.0]))
    torch.testing.assert_close(loss, torch.tensor([0.0, inside, inside, outside, outside]))


def test_balanced_l1_has_the_gradient_of_its_definition() -> None:
    b = math.exp(3) - 1
    error = torch.linspace(-0.3, 0.3, 101, dtype=torch.float64).float().requires_grad_()
    balanced_l1_loss(error).sum().backward()
    size = error.detach().abs()
    expected = torch.where(size < 0.11, 0.5 * torch.log(b * size / 0.11 + 1), 1.5) * error.detach().sign()
    torch.testing.assert_close(error.grad, expected, atol=1e-5, rtol=1e-4)
    # The two pieces meet: no jump at beta.
    near = balanced_l1_loss(torch.tensor([0.11 - 1e-6, 0.11 + 1e-6]))
    assert abs(near[0] - near[1]) < 1e-5


def test_the_released_balanced_l1_worked_out_by_hand() -> None:
    alpha, gamma, beta = 0.5, 1.5, 0.11
    b = math.exp(3) - 1
    x = 0.05
    inside = alpha / b * (b * x + 1) * math.log(b * x / beta + 1) - alpha * x
    outside = gamma * 2 + gamma / b - alpha * beta
    loss = released_balanced_l1_loss(torch.tensor([0.0, x, -x, 2.0, -2.0]))
    torch.testing.assert_close(loss, torch.tensor([0.0, inside, inside, outside, outside]))
    near = released_balanced_l1_loss(torch.tensor([beta - 1e-6, beta + 1e-6]))
    assert abs(near[0] - near[1]) < 1e-5


def test_the_released_balanced_l1_is_the_papers_at_a_beta_of_1_and_steeper_below() -> None:
    error = torch.linspace(-3, 3, 61).requires_grad_()
    torch.testing.assert_close(released_balanced_l1_loss(error, beta=1.0), balanced_l1_loss(error, beta=1.0))
    slopes = {}
    for name, loss in BOX_LOSSES.items():
        small = torch.tensor([1e-7, 0.05, 0.10999, 0.11001], requires_grad=True)
        loss(small).sum().backward()
        slopes[name] = small.grad
    # alpha / beta - alpha at 0; gamma + alpha * ((b * beta + 1) / (b * beta + beta) - 1) at beta; gamma beyond.
    expected = [0.5 / 0.11 - 0.5, None, 1.5 + 0.5 * ((19.0855 * 0.11 + 1) / (20.0855 * 0.11) - 1), 1.5]
    for slope, value in zip(slopes["released_balanced_l1"].tolist(), expected, strict=True):
        assert value is None or slope == pytest.approx(value, rel=2e-4)
    assert (slopes["released_balanced_l1"][:3] > slopes["balanced_l1"][:3]).all()


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
    errors = balanced_l1_loss(torch.tensor([0.2, 0.01]))
    assert loss.box_loss.item() == pytest.approx(errors.sum().item() / (2 * 4), rel=1e-6)
    assert (loss.num_cls_positives.item(), loss.num_loc_positives.item()) == (2, 2)
    released = detection_loss(logits, deltas, ANCHORS, match, *gt, BoxCoder(), box_loss="released_balanced_l1")
    errors = released_balanced_l1_loss(torch.tensor([0.2, 0.01]))
    assert released.box_loss.item() == pytest.approx(errors.sum().item() / (2 * 4), rel=1e-6)


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
