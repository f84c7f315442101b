"""The detectors' training step, in buffers and as a CUDA graph: every bit of the plain step's, and nothing that waits.

Without a GPU the step runs on its buffers, uncaptured; and on a device without data, where whatever needs a number is
an error. tests/test_detector_training.py has a whole training whose graph the stand-in of cuda_on_cpu replays.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from cuda_on_cpu.pretend_gpu import reads_back
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detector.batches import TrainingSample, collate
from detector.detectors import make_detector
from detector.loss import detection_loss
from detector.rules import POINT_RULES, RULES, SOFT_RULES, make_matcher
from detector.step import CapturedStep, TrainingStep, make_buffers, set_learning_rate
from detector.watches import Stopwatch
from mg_ops import BoxCoder, backend_choice, losses, matching

SIZE, BATCH, CAPACITY, NUM_CLASSES = 64, 3, 8, 3
COUNTS = [(2, 1, 1), (0, 0, 0), (3, 0, 5), (7, 4, 0), (1, 0, 2), (0, 3, 1), (2, 2), (4, 1, 1)]
"""Objects of the images of each batch: the fourth has too many for the buffers, the seventh an image too few."""
FITTING = [number for number, counts in enumerate(COUNTS) if len(counts) == BATCH and sum(counts) <= CAPACITY]
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def make_batch(counts: tuple[int, ...], seed: int, capacity: int = CAPACITY) -> tuple[Tensor, ...]:
    """Noise with objects, as detector.train is given them; one object in three is a crowd."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for count in counts:
        corners = (SIZE - 24) * torch.rand(count, 2, generator=generator)
        boxes = torch.cat([corners, corners + 8 + 16 * torch.rand(count, 2, generator=generator)], 1)
        labels = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
        image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        samples.append(TrainingSample(image, boxes, labels, labels == 2, "noise", []))
    return collate(samples, capacity)[:5]


def make_step(
    device: str = "cpu",
    strategy: str = "mutual",
    *,
    cls_loss: str = "focal",
    amp: torch.dtype | None = None,
    fused: bool = True,
) -> TrainingStep:
    """What detector.train makes of its flags; on "meta" an optimizer that torch has no check for."""
    torch.manual_seed(0)
    points = strategy in POINT_RULES
    head = {"anchors_per_location": 1 if points else 6, "anchor_size": 8.0 if points else 24.0}
    flags = argparse.Namespace(strategy=strategy, sigma=2.0, backend=None, image_size=SIZE, **head)
    matcher = make_matcher(flags, torch.device("cpu" if device == "meta" else device))
    model = make_detector("fssd", "resnet18", SIZE, NUM_CLASSES, **head).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused or None)
    optimizer._need_device_dtype_check_for_fused = False  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.01, device=device) if fused else 0.01
    loss = partial(detection_loss, box_coder=BoxCoder(), cls_loss=cls_loss)
    scaler = torch.amp.GradScaler("cpu" if device == "meta" else device, enabled=amp == torch.float16)
    return TrainingStep(
        model, model.anchors, matcher, loss, 1.0, optimizer, scaler, amp, Stopwatch(torch.device(device))
    )


def in_buffers(step: TrainingStep, device: str = "cpu") -> CapturedStep:
    """The step on buffers of CAPACITY objects, captured on a GPU."""
    return CapturedStep(step, make_buffers(BATCH, CAPACITY, SIZE, torch.device(device)), capture=device == "cuda")


def train(step: TrainingStep, take_step: Any, capacity: int) -> Iterator[list[Tensor]]:
    """Steps on every batch; the loss, the match and the gradients after each, then weights, buffers and momenta."""
    for number, counts in enumerate(COUNTS):
        set_learning_rate(step.optimizer, 0.01 / (1 + number))
        result = take_step(*make_batch(counts, number, capacity))
        gradients = [parameter.grad for parameter in step.network.parameters()]
        yield [tensor.clone() for tensor in [result.loss, *result.parts, *result.match[:2], *gradients]]
    state = [*step.network.state_dict().values(), *tree_leaves(step.optimizer.state_dict()["state"])]
    yield [torch.as_tensor(leaf) for leaf in state]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("amp", [None, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_buffers_change_no_bit(amp: torch.dtype | None) -> None:
    """Padding, a batch with too many objects, and one with too few images included."""
    plain, buffered = make_step(amp=amp), make_step(amp=amp)
    take_step = in_buffers(buffered)
    for found, expected in zip(train(buffered, take_step, CAPACITY), train(plain, plain, 0), strict=True):
        assert_same_bits(found, expected)
    assert take_step.num_eager == len(COUNTS) - len(FITTING) == 2


@pytest.mark.parametrize("strategy", RULES)
def test_gradients_are_those_of_the_optimizer_that_is_not_captured(strategy: str) -> None:
    cls_loss = "soft_bce" if strategy in SOFT_RULES else "focal"
    gradients = []
    for fused, take in ((False, lambda step: step), (True, in_buffers)):
        step = make_step(strategy=strategy, cls_loss=cls_loss, fused=fused)
        take(step)(*make_batch(COUNTS[2], 2))
        gradients.append([parameter.grad for parameter in step.network.parameters()])
    assert any(bool(gradient.any()) for gradient in gradients[0])
    assert_same_bits(*gradients)


every_rule = pytest.mark.parametrize(
    ("strategy", "cls_loss"),
    [(rule, "soft_bce" if rule in SOFT_RULES else "focal") for rule in RULES]
    + [("task_aligned", "varifocal"), ("dynamic_mutual", "quality_focal")],
)


def gradients_of(strategy: str, cls_loss: str, counts: tuple[int, ...]) -> list[Tensor | None]:
    """Those of every parameter after one step."""
    step = make_step(strategy=strategy, cls_loss=cls_loss)
    step(*make_batch(counts, 0, 0))
    return [parameter.grad for parameter in step.network.parameters()]


@every_rule
def test_without_an_object_every_parameter_has_a_gradient(strategy: str, cls_loss: str) -> None:
    """DistributedDataParallel would wait without end for one that has none."""
    for counts in ((0, 0, 0), (0, 3, 0)):
        gradients = gradients_of(strategy, cls_loss, counts)
        assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


@every_rule
def test_gradients_are_equal_from_run_to_run_and_for_any_number_of_threads(strategy: str, cls_loss: str) -> None:
    """Of what mg_ops computes: convolutions of other numbers of threads add up in other orders."""
    step = make_step(strategy=strategy, cls_loss=cls_loss)
    batch = make_batch(COUNTS[2], 2)
    logits, deltas = (part.detach() for part in step.network(batch[0]))
    answers = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        outputs = (logits.clone().requires_grad_(), deltas.clone().requires_grad_())
        match = step.matcher(step.anchors, *batch[1:3], batch[4], cls_logits=outputs[0], box_deltas=outputs[1])
        parts = step.detection_loss(*outputs, step.anchors, match, *batch[1:3], batch[4])
        answers.append(list(torch.autograd.grad(parts.cls_loss + parts.box_loss, outputs)))
    torch.set_num_threads(1)
    assert all(bool(gradient.any()) for gradient in answers[0])
    for answer in answers[1:]:
        assert_same_bits(answer, answers[0])
    for one, other in zip(*(gradients_of(strategy, cls_loss, COUNTS[2]) for _ in range(2)), strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_a_step_leaves_no_derivatives_behind() -> None:
    """They would tie a capture to the stream of the step before it."""
    result = make_step()(*make_batch(COUNTS[0], 0))
    assert not any(leaf.requires_grad for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


# ---------------------------------------------------------------------------------------------------------------------
# What a capture forbids


class Forbidden(TorchDispatchMode):
    """Raises at operations that would wait for a GPU: a number or a size read back, a copy to another device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reads_back(function, args):
            raise RuntimeError(f"waits for the device: {function}")
        # In place, and all of it: torch has no shapes to give for it.
        updates = function is torch.ops.aten._fused_sgd_.tensor_lr and args[0][0].is_meta
        result = None if updates else function(*args, **(kwargs or {}))
        # A number of Python's travels with the launch; any other tensor of the host would have to be copied.
        leaves = [leaf for leaf in tree_leaves([args, kwargs, result]) if isinstance(leaf, Tensor)]
        numbers = {id(leaf) for leaf in leaves if leaf.dim() == 0 and leaf.is_cpu}
        devices = {leaf.device.type for leaf in leaves if id(leaf) not in numbers}
        if len(devices) > 1:
            raise RuntimeError(f"copies between devices: {function}")
        return result


SYNCHRONIZING = {
    "item": lambda x: x.sum().item(),
    "a condition": lambda x: bool(x.any()),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a mask that is filled with many values": lambda x: x.index_put_((x > 0,), torch.ones(int(x.numel()))),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, 2 * x),
    "to the device": lambda x: x + torch.ones(3).to("meta").sum(),
}


@pytest.mark.parametrize("name", SYNCHRONIZING)
def test_what_is_forbidden_is_noticed(name: str) -> None:
    with Forbidden(), pytest.raises(RuntimeError, match=r"waits for the device|copies between devices"):
        SYNCHRONIZING[name](torch.arange(4.0))


@every_rule
@pytest.mark.parametrize("amp", [None, torch.float16], ids=str)
def test_no_step_reads_anything_back(strategy: str, cls_loss: str, amp: torch.dtype | None) -> None:
    step = make_step(strategy=strategy, cls_loss=cls_loss, amp=amp)
    batch = make_batch(COUNTS[0], 0)
    with Forbidden():
        for _ in range(2):
            step(*batch)


@every_rule
def test_no_step_needs_data_or_the_host(monkeypatch: pytest.MonkeyPatch, strategy: str, cls_loss: str) -> None:
    """On a device that has none: operators give shapes, sizes that depend on data and copies to the host are errors."""
    fused = backend_choice.operator_of
    monkeypatch.setattr(matching, "operator_of", lambda backend, device, *rest: fused("cpp", CPU, *rest))
    monkeypatch.setattr(losses, "choose_backend", lambda *_: "cpp")
    # There is no autocast for it.
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: contextlib.nullcontext())
    step = make_step("meta", strategy, cls_loss=cls_loss)
    batch = [part.to("meta") for part in make_batch(COUNTS[0], 0)]
    with Forbidden():
        for _ in range(2):
            result = step(*batch)
    assert result.loss.is_meta
    assert all(parameter.grad.is_meta for parameter in step.network.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_graph_changes_no_bit(amp: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, matches, weights and momenta of captured steps, with batches that run eagerly between them."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        plain, graphed = make_step("cuda", amp=amp), make_step("cuda", amp=amp)
        take_step = in_buffers(graphed, "cuda")
        for number in [*range(len(COUNTS)), *range(len(COUNTS))]:
            results = []
            for step, take, capacity in ((graphed, take_step, CAPACITY), (plain, plain, 0)):
                set_learning_rate(step.optimizer, 0.01 / (1 + number))
                result = take(*make_batch(COUNTS[number], number, capacity))
                results.append([result.loss, *result.parts, *result.match[:2]])
            assert_same_bits(*results)
        assert take_step.graph is not None and take_step.num_eager == 2 * (len(COUNTS) - len(FITTING))
        for one, other in ((graphed.network, plain.network), (graphed.optimizer, plain.optimizer)):
            assert_same_bits(*(list(filter(torch.is_tensor, tree_leaves(x.state_dict()))) for x in (one, other)))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@every_rule
def test_nothing_waits_for_the_gpu(strategy: str, cls_loss: str) -> None:
    step = make_step("cuda", strategy, cls_loss=cls_loss, amp=torch.float16)
    batch = [part.pin_memory() for part in make_batch(COUNTS[0], 0)]
    step(*batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
