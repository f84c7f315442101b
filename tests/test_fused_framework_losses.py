"""The fused losses in a framework's place: the framework's values and gradients, and nothing that waits for a GPU."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cuda_on_cpu.pretend_gpu import reads_back
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

detection = pytest.importorskip("torchvision.models.detection")

from mg_ops.adapters.torchvision import use_fused_focal_loss, use_mutual_guidance  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def make_retinanet() -> nn.Module:
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 64, "num_classes": 4}
    return detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None, **options).train()


def make_batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images with objects, and one without."""
    generator = torch.Generator().manual_seed(0)
    boxes = [torch.tensor([[5.0, 5, 40, 40], [20, 10, 60, 50]]), torch.zeros(0, 4), torch.tensor([[1.0, 2, 30, 60]])]
    labels = [torch.tensor([1, 3]), torch.zeros(0, dtype=torch.int64), torch.tensor([2])]
    images = [torch.rand(3, 64, 64, generator=generator) for _ in boxes]
    return images, [{"boxes": one, "labels": other} for one, other in zip(boxes, labels, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_retinanets_loss_and_gradients_are_torchvisions(guided: bool) -> None:
    images, targets = make_batch()
    answers = []
    for fused in (False, True):
        model = make_retinanet()
        if guided:
            use_mutual_guidance(model)
        if fused:
            model = pickle.loads(pickle.dumps(copy.deepcopy(use_fused_focal_loss(model))))
        losses = model(images, targets)
        sum(losses.values()).backward()
        head = model.head.classification_head
        answers.append((losses["classification"], losses["bbox_regression"], head.cls_logits.weight.grad))
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


class NothingReadBack(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert not reads_back(function, args), function
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
def test_retinanets_classification_loss_reads_nothing_back() -> None:
    head = use_fused_focal_loss(make_retinanet()).head.classification_head
    _, targets = make_batch()
    matched = [torch.tensor([-1, 0, -2, 1, 0]), torch.full((5,), -1), torch.tensor([0, -1, -1, -2, -1])]
    logits = torch.randn(3, 5, 4, requires_grad=True)
    with NothingReadBack():
        head.compute_loss(targets, {"cls_logits": logits}, matched).backward()
    expected = torch.zeros_like(logits)
    wanted = type(head).compute_loss(head, targets, {"cls_logits": logits.detach().requires_grad_()}, matched)
    value = head.compute_loss(targets, {"cls_logits": logits}, matched)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6) and not torch.equal(logits.grad, expected)


def test_what_is_no_retinanet_is_refused() -> None:
    with pytest.raises(TypeError, match="expected torchvision's RetinaNet with its own head, got Linear"):
        use_fused_focal_loss(nn.Linear(1, 1))
