"""What holds for every loss: the same bits for any threads, strides and runs, a normalizer, torch's modes, a GPU's.

On a GPU: the values of the definition, no synchronization, a graph. What each is, is in test_class_losses.py,
test_box_losses.py and test_distribution_loss.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_box_losses
import test_class_losses
import test_distribution_loss
import torch
from torch import Tensor

from mg_ops import losses

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def to_gpu(value: Any) -> Any:
    """Tensors in lists and tuples, on the GPU; a batch becomes its tuple."""
    if isinstance(value, (list, tuple)):
        return [to_gpu(element) for element in value]
    return value.cuda()


def arguments_of(
    name: str, dtype: torch.dtype = torch.float32, num_anchors: int = 5000
) -> tuple[Any, list[Any], dict[str, Any]]:
    """A loss, its arguments on the CPU, predictions first, and its options."""
    if name in test_class_losses.LOSSES:
        loss, options = test_class_losses.LOSSES[name]
        return loss, list(test_class_losses.random_batch((4, num_anchors, 20), dtype)), options
    if name == "distribution focal":
        batch = test_distribution_loss.random_batch(dtype, num_anchors)
        return losses.distribution_focal_loss, [*batch[:3], *batch.packed], {"strides": 4.0}
    batch = test_box_losses.random_batch(dtype, num_anchors)
    return test_box_losses.LOSSES[name], [*batch[:3], *batch.packed], {}


def value_and_gradient(loss: Any, arguments: list[Any], **options: Any) -> tuple[Tensor, Tensor]:
    """A loss and its gradient, without reading them."""
    predictions = arguments[0].detach().requires_grad_()
    value = loss(predictions, *arguments[1:], **options)
    return value.detach(), torch.autograd.grad(value, predictions)[0]


every_loss = pytest.mark.parametrize("name", [*test_class_losses.LOSSES, *test_box_losses.LOSSES, "distribution focal"])


def assert_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """The same value and gradient, to the last bit."""
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@every_loss
def test_the_same_bits_for_any_number_of_threads(name: str) -> None:
    loss, arguments, options = arguments_of(name)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            answers.append(value_and_gradient(loss, arguments, **options))
    finally:
        torch.set_num_threads(before)
    for answer in answers[1:]:
        assert_equal(answer, answers[0])


@every_loss
def test_tensors_of_any_strides(name: str) -> None:
    loss, (predictions, *rest), options = arguments_of(name, num_anchors=60)
    expected = value_and_gradient(loss, [predictions, *rest], **options)
    channels_first = predictions.transpose(1, 2).contiguous().transpose(1, 2)
    a_part = torch.randn(len(predictions), 80, 99)[:, 10:70, 2 : 2 + predictions.shape[2]].copy_(predictions)
    for other in (channels_first, a_part):
        assert_equal(value_and_gradient(loss, [other, *rest], **options), expected)
    of_anchors = predictions.shape[:2]
    strided = [value.repeat_interleave(2, 1)[:, ::2] if value.shape == of_anchors else value for value in rest]
    assert_equal(value_and_gradient(loss, [predictions, *strided], **options), expected)


@every_loss
def test_a_normalizer_divides_and_may_be_a_tensor(name: str) -> None:
    loss, arguments, options = arguments_of(name, num_anchors=30)
    value, gradient = value_and_gradient(loss, arguments, **options)
    for normalizer in (4, 4.0, torch.tensor(4), torch.tensor([4.0])):
        assert_equal(value_and_gradient(loss, arguments, normalizer=normalizer, **options), (value / 4, gradient / 4))


@every_loss
def test_twice_through_one_graph(name: str) -> None:
    loss, arguments, options = arguments_of(name, num_anchors=20)
    value = loss(arguments[0].requires_grad_(), *arguments[1:], **options)
    first = torch.autograd.grad(value, arguments[0], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(2 * value, arguments[0])[0], 2 * first)


@every_loss
@pytest.mark.parametrize("backend", [None, "eager"])
def test_autocast_changes_nothing(name: str, backend: str | None) -> None:
    loss, arguments, options = arguments_of(name, torch.bfloat16, 20)
    expected = loss(*arguments, backend=backend, **options)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*arguments, backend=backend, **options)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


@pytest.mark.parametrize("name", ["varifocal", "GIoU of deltas", "distribution focal"])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_torch_compile_takes_the_whole_call(name: str, backend: str | None) -> None:
    loss, arguments, options = arguments_of(name, num_anchors=20)

    def step(predictions: Tensor, *rest: Any) -> Tensor:
        return loss(2 * predictions, *rest, backend=backend, **options)

    value, gradient = value_and_gradient(step, arguments)
    found = value_and_gradient(torch.compile(step, fullgraph=True), arguments)
    torch.testing.assert_close(found, (value, gradient), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
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
        assert_equal(value_and_gradient(loss, to_gpu(arguments), **options), (value, gradient))


def assert_a_graph_holds(name: str, backend: str | None = None) -> None:
    """A call and its gradient, captured, replay with other predictions; without a graph nothing waits for the GPU."""
    loss, arguments, options = arguments_of(name)
    arguments, options = to_gpu(arguments), {**options, "backend": backend}
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
    assert_equal(captured, expected)


@pytest.mark.gpu
@every_loss
def test_nothing_waits_for_the_gpu_and_a_graph_holds_it(name: str) -> None:
    assert_a_graph_holds(name)
