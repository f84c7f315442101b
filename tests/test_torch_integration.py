"""mutual_match under torch: opcheck, torch.compile, autocast, gradients, fake tensors, deterministic mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_same
from conftest import Target
from object_forms import FORMS, in_form
from operators import operator_arguments
from random_batches import random_batch, to_device

import mg_ops

SEEDS = [
    seed for seed in range(60) if random_batch(seed).notes["A"] > 7 and sum(random_batch(seed).notes["objects"]) > 2
][:6]


def operator_of(target: Target) -> Any:
    name = "mutual_match_eager" if target.backend == "eager" else "mutual_match"
    return getattr(torch.ops.mg_ops, name).default


def packed_arguments(device: str, requires_grad: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    anchors = torch.rand(70, 4, device=device)
    anchors[:, 2:] += anchors[:, :2]
    arguments = {
        "anchors": anchors,
        "box_deltas": torch.randn(2, 70, 4, device=device),
        "cls_logits": torch.randn(2, 70, 3, device=device),
        "gt_boxes": anchors[::20].clone(),
    }
    for tensor in arguments.values():
        tensor.requires_grad_(requires_grad)
    labels, offsets = torch.tensor([0, 1, 2, 0], device=device), torch.tensor([0, 3, 4], device=device)
    return {**arguments, "gt_labels": labels, "gt_offsets": offsets, "box_coder": mg_ops.BoxCoder()}


@pytest.mark.parametrize("crowd", [False, True])
def test_opcheck(target: Target, crowd: bool) -> None:
    arguments = packed_arguments(target.device)
    if crowd:
        arguments["gt_crowd"] = torch.tensor([False, True, False, False], device=target.device)
    results = torch.library.opcheck(operator_of(target), operator_arguments(**arguments))
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


@pytest.mark.parametrize("form", FORMS)
def test_compiled_calls_give_the_same_integers(target: Target, form: str) -> None:
    """fullgraph=True, with changing numbers of objects."""

    def match(anchors: Any, deltas: Any, logits: Any, objects: dict[str, Any]) -> Any:
        return mg_ops.mutual_match(
            anchors,
            cls_logits=logits,
            box_deltas=[level * 1.0 for level in deltas.split(30, dim=1)],
            box_coder=mg_ops.BoxCoder(),
            backend=target.backend,
            **objects,
        )

    torch._dynamo.reset()
    compiled = torch.compile(match, fullgraph=True, backend="aot_eager")
    arguments = packed_arguments(target.device)
    anchors, deltas, logits = (arguments[name] for name in ("anchors", "box_deltas", "cls_logits"))
    for count in (1, 3, 8, 2):
        boxes = [anchors[: count + 1].clone(), anchors[20 : 20 + count].clone()]
        labels = [torch.zeros(len(box), dtype=torch.int64, device=target.device) for box in boxes]
        objects, _ = in_form(form, boxes, labels)
        assert_same(compiled(anchors, deltas, logits, objects), match(anchors, deltas, logits, objects), count)


def test_a_matcher_compiles(target: Target) -> None:
    arguments = packed_arguments(target.device)
    matcher = mg_ops.MutualMatcher(box_coder=arguments.pop("box_coder"), backend=target.backend)
    torch._dynamo.reset()
    compiled = torch.compile(matcher.__call__, fullgraph=True, backend="aot_eager")
    assert_same(compiled(**arguments), matcher(**arguments))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "mode", ["autocast", "inference_mode", "no_grad", "deterministic", "float64 default", "meta default"]
)
def test_modes_do_not_change_the_result(target: Target, seed: int, mode: str) -> None:
    arguments = to_device(random_batch(seed).arguments, target.device)
    expected = mg_ops.mutual_match(**arguments, backend=target.backend)
    if mode == "deterministic":
        torch.use_deterministic_algorithms(True)
    elif mode == "float64 default":
        torch.set_default_dtype(torch.float64)
    context = {
        "autocast": lambda: torch.autocast(target.device, dtype=torch.bfloat16),
        "inference_mode": torch.inference_mode,
        "no_grad": torch.no_grad,
        "meta default": lambda: torch.device("meta"),
    }.get(mode, torch.enable_grad)
    try:
        with context():
            match = mg_ops.mutual_match(**arguments, backend=target.backend)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
    assert_same(match, expected, mode)
    assert [value.device for value in match] == [value.device for value in expected]


def test_inputs_may_require_grad_and_none_flows(target: Target) -> None:
    packed = packed_arguments(target.device, requires_grad=True)
    objects = {name: packed[name].split([3, 1]) for name in ("gt_boxes", "gt_labels")}
    for arguments in (packed, {**packed, **objects, "gt_offsets": None}):
        match = mg_ops.mutual_match(**arguments, backend=target.backend)
        assert not any(value.requires_grad for value in match)


@pytest.mark.parametrize("seed", SEEDS)
def test_inputs_are_not_changed(target: Target, seed: int) -> None:
    arguments = to_device(random_batch(seed).arguments, target.device)
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    tensors += [element for value in arguments.values() if isinstance(value, list) for element in value]
    before = [tensor.clone() for tensor in tensors]
    mg_ops.mutual_match(**arguments, backend=target.backend)
    for tensor, copy in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


def test_fake_tensors_have_the_shapes_of_the_result(target: Target) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = operator_arguments(**packed_arguments("cpu"))
    with FakeTensorMode() as mode:
        arguments = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        shapes = [(tuple(value.shape), value.dtype) for value in operator_of(target)(*arguments)]
    assert shapes == [((2, 70), torch.int64)] * 2 + [((4,), torch.int32)] * 2
