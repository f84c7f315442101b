"""MutualMatcher is mutual_match with its options set beforehand: the same answers, the same errors, once and early."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import pickle
from typing import Any

import pytest
import torch
from comparison import assert_same
from conftest import Target, fuzz_cases
from operators import operator_arguments
from random_batches import random_batch, to_device

import mg_ops
from mg_ops.matcher import Batch, Call, Matcher

OPTIONS = {field.name for field in dataclasses.fields(mg_ops.MutualMatcher)}
OTHERS: dict[str, Any] = {
    "strategy": "localize_to_classify",
    "sigma": 3.0,
    "iou_positive": 0.6,
    "iou_ignored": 0.3,
    "crowd_overlap": 0.7,
    "box_coder": mg_ops.BoxCoder(weights=(1.0, 1.0, 1.0, 1.0)),
    "gt_box_format": "cxcywh",
    "check": True,
    "backend": "eager",
}
"""An option other than the default, of each."""


def test_every_argument_of_the_function_is_an_option_or_an_argument_of_the_call() -> None:
    """With the function's defaults: neither can get one that the other lacks."""
    function = inspect.signature(mg_ops.mutual_match).parameters
    objects = [name for name, value in inspect.signature(Matcher.__call__).parameters.items() if value.kind.value == 1]
    assert {*objects, *Batch.__annotations__} - {"self"} == function.keys() - OPTIONS and OPTIONS <= function.keys()
    assert {*Call.__annotations__} <= function.keys()
    assert OTHERS.keys() == OPTIONS
    for name in OPTIONS:
        assert getattr(mg_ops.MutualMatcher(), name) == function[name].default


def test_it_gives_what_the_function_gives(target: Target) -> None:
    for seed in range(fuzz_cases(60)):
        batch = random_batch(seed)
        arguments = to_device(batch.arguments, target.device)
        options = {name: arguments.pop(name) for name in OPTIONS & arguments.keys()} | {"backend": target.backend}
        expected = mg_ops.mutual_match(**arguments, **options)
        assert_same(mg_ops.MutualMatcher(**options)(**arguments), expected, batch)


@pytest.mark.parametrize("name", sorted(OPTIONS - {"check", "backend"}))
def test_every_option_reaches_the_operator(name: str) -> None:
    """The operator is handed other arguments by each other option, those that the function hands it."""
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    deltas, logits = torch.zeros(1, 2, 4), torch.zeros(1, 2, 3)
    call = {"anchors": anchors, "gt_boxes": [anchors[:1]], "gt_labels": [torch.tensor([0])], "box_deltas": deltas}
    call["cls_logits"] = logits

    def handed(match: Any, **options: Any) -> list[Any]:
        arguments = operator_arguments(function=match, **call, **options)
        return [value.tolist() if isinstance(value, torch.Tensor) else value for value in arguments]

    default = {"box_coder": mg_ops.BoxCoder()}
    options = default | {name: OTHERS[name]}
    by_matcher = handed(mg_ops.MutualMatcher(**options))
    assert by_matcher == handed(mg_ops.mutual_match, **options) != handed(mg_ops.mutual_match, **default)


def test_its_coder_decodes_deltas_and_leaves_boxes_alone() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    matcher = mg_ops.MutualMatcher(box_coder=mg_ops.BoxCoder())
    objects = {"gt_boxes": [anchors[:1]], "gt_labels": [torch.tensor([0])], "cls_logits": torch.zeros(1, 2, 1)}
    by_deltas = matcher(anchors, **objects, box_deltas=torch.zeros(1, 2, 4))
    assert_same(matcher(anchors, **objects, pred_boxes=anchors[None]), by_deltas)
    assert by_deltas.cls_match.tolist() == [[0, -1]]
    assert_same(dataclasses.replace(matcher, strategy="iou")(anchors, [anchors[:1]], [torch.tensor([0])]), by_deltas)
    with pytest.raises(ValueError, match=r"^box_coder: expected one with box_deltas"):
        mg_ops.MutualMatcher()(anchors, **objects, box_deltas=torch.zeros(1, 2, 4))


def test_it_is_a_value() -> None:
    """Frozen, equal by its options, a key of dictionaries, copied and pickled, replaced in part."""
    matchers = [mg_ops.MutualMatcher(), *(mg_ops.MutualMatcher(**{name: value}) for name, value in OTHERS.items())]
    assert len(set(matchers)) == len(matchers)
    for matcher in matchers:
        assert pickle.loads(pickle.dumps(matcher)) == copy.deepcopy(matcher) == matcher
        assert hash(dataclasses.replace(matcher)) == hash(matcher)
    for name, value in OTHERS.items():
        assert dataclasses.replace(matchers[0], **{name: value}) == mg_ops.MutualMatcher(**{name: value})
    with pytest.raises(dataclasses.FrozenInstanceError):
        matchers[0].sigma = 3.0  # type: ignore[misc]
    assert "sigma=3.0" in repr(mg_ops.MutualMatcher(sigma=3.0))


def test_a_warning_points_at_the_line_that_called() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0]])
    arguments = {"cls_logits": torch.tensor([[[0.2], [0.9]]]), "pred_boxes": anchors[None]}
    for call in (functools.partial(mg_ops.mutual_match, check=True), mg_ops.MutualMatcher(check=True)):
        with pytest.warns(UserWarning, match="cls_logits: all values lie between 0 and 1") as caught:
            call(anchors, [anchors[:1]], [torch.tensor([0])], **arguments)
        assert [warning.filename for warning in caught if warning.category is UserWarning] == [__file__]
