"""The losses on a GPU: the values of the definition, the same bits in every run, no synchronization, a graph."""

from __future__ import annotations

from typing import Any

import pytest
import test_box_losses
import test_class_losses
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def to_gpu(value: Any) -> Any:
    """Tensors in lists and tuples, on the GPU; a batch becomes its tuple."""
    if isinstance(value, (list, tuple)):
        return [to_gpu(element) for element in value]
    return value.cuda()


def arguments_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, list[Any], dict[str, Any]]:
    """A loss, its arguments on the CPU, predictions first, and its options."""
    if name in test_class_losses.LOSSES:
        loss, options = test_class_losses.LOSSES[name]
        return loss, list(test_class_losses.random_batch((4, 5000, 20), dtype)), options
    batch = test_box_losses.random_batch(dtype, 5000)
    return test_box_losses.LOSSES[name], [*batch[:3], *batch.packed], {}


def value_and_gradient(loss: Any, arguments: list[Any], **options: Any) -> tuple[Tensor, Tensor]:
    """A loss and its gradient, without reading them."""
    predictions = arguments[0].detach().requires_grad_()
    value = loss(predictions, *arguments[1:], **options)
    return value.detach(), torch.autograd.grad(value, predictions)[0]


every_loss = pytest.mark.parametrize("name", [*test_class_losses.LOSSES, *test_box_losses.LOSSES])


@every_loss
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_definition_and_itself(name: str, dtype: torch.dtype) -> None:
    loss, arguments, options = arguments_of(name, dtype)
    value, gradient = value_and_gradient(loss, to_gpu(arguments), **options)
    exact = [arguments[0].double(), *arguments[1:]]
    expected, wanted = value_and_gradient(loss, exact, backend="eager", **options)
    tolerances = test_class_losses.TOLERANCES if name in test_class_losses.LOSSES else test_box_losses.TOLERANCES
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    error = (gradient.cpu().double() - wanted).abs().max()
    assert error <= 4 * tolerances[dtype] * wanted.abs().max()  # exp and 1 / x are the GPU's own
    for _ in range(5):
        again = value_and_gradient(loss, to_gpu(arguments), **options)
        assert torch.equal(again[0], value) and torch.equal(again[1], gradient)


@every_loss
def test_nothing_waits_for_the_gpu_and_a_graph_holds_it(name: str) -> None:
    loss, arguments, options = arguments_of(name)
    arguments = to_gpu(arguments)
    normalizer = torch.full((), 7.0, device="cuda")
    expected = value_and_gradient(loss, arguments, normalizer=normalizer, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradient(loss, arguments, normalizer=normalizer, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Captured with other predictions in its buffers.
    buffers = [torch.zeros_like(arguments[0]), *arguments[1:]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        value_and_gradient(loss, buffers, normalizer=normalizer, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradient(loss, buffers, normalizer=normalizer, **options)
    buffers[0].copy_(arguments[0])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])
