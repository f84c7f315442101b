"""What a number may be is one rule, whatever is called: the function, the operator of each backend, their fakes.

`low < number <= high`, as given and as the normal float32 that it is rounded to; a clip may be anything but NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICES
from torch._subclasses.fake_tensor import FakeTensorMode

import mg_ops
from mg_ops import library

INF, NAN = math.inf, math.nan
MAX = float(torch.finfo(torch.float32).max)
TINY = 2.0**-126  # the smallest normal float32

SIGMA: list[tuple[float, bool]] = [
    *((number, True) for number in (2.0, 1.01, MAX, 1 + 2.0**-23, 1 + 1.5 * 2.0**-24, 1 + 1.001 * 2.0**-24)),
    *((number, False) for number in (1.0, 1 + 2.0**-24, 1 + 1e-9, 0.5, 0.0, -2.0, NAN, INF, -INF, 1e39, MAX * 1.00001)),
]
# The first above 2^-126 - 2^-150 is rounded to 2^-126.
LEAST: list[tuple[float, bool]] = [(TINY, True), (TINY - 2.0**-150, True), (TINY - 1.01 * 2.0**-150, False)]
THRESHOLDS: list[tuple[float, bool]] = [
    *((number, True) for number in (1.0, 1 - 2.0**-30, 0.5)),
    *((number, False) for number in (0.0, -0.0, -0.1, 1.1, 1 + 2.0**-40, 1e-50, 2.0**-127, NAN, INF)),
    *LEAST,
]
WEIGHTS: list[tuple[float, bool]] = [
    *((number, True) for number in (10.0, -5.0, MAX, -MAX)),
    *((number, False) for number in (0.0, -0.0, 1e-60, 2.0**-127, 1e39, -1e39, MAX * (1 + 2.0**-26), NAN, INF, -INF)),
    *LEAST,
]
CLIPS: list[tuple[float, bool]] = [(4.0, True), (-1e300, True), (1e300, True), (INF, True), (-INF, True), (NAN, False)]

NUMBERS: list[tuple[str, float, bool]] = [
    *(("sigma", *row) for row in SIGMA),
    *((name, *row) for name in ("iou_positive", "crowd_overlap") for row in THRESHOLDS),
    *(("iou_ignored", *row) for row in THRESHOLDS),
    *(("weight", *row) for row in WEIGHTS),
    *(("clip", *row) for row in CLIPS),
]


def options_with(name: str, number: float) -> dict[str, Any]:
    """The numbers of a call, this one among them; the others are right whatever it is."""
    options: dict[str, Any] = {"sigma": 2.0, "iou_positive": 1.0, "iou_ignored": 1e-37, "crowd_overlap": 0.5}
    options["box_coder"] = [10.0, 10.0, 5.0, 5.0, 4.0]
    if name == "iou_positive" and 0 < number < 1e-37:
        options["iou_ignored"] = number
    if name in ("weight", "clip"):
        options["box_coder"][2 if name == "weight" else 4] = number
    else:
        options[name] = number
    return options


def tensors(device: str) -> list[torch.Tensor]:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    objects = [anchors[:1], torch.tensor([1]), torch.tensor([0, 1])]
    return [tensor.to(device) for tensor in (anchors, torch.zeros(1, 2, 4), torch.zeros(1, 2, 3), *objects)]


def call_matcher(backend: str, device: str) -> Callable[[dict[str, Any]], None]:
    def call(options: dict[str, Any]) -> None:
        anchors, deltas, logits, *objects = tensors(device)
        *weights, clip = options.pop("box_coder")
        matcher = mg_ops.MutualMatcher(box_coder=mg_ops.BoxCoder(weights, clip), backend=backend, **options)
        matcher(anchors, *objects, cls_logits=logits, box_deltas=deltas)

    return call


def call_function(backend: str, device: str) -> Callable[[dict[str, Any]], None]:
    def call(options: dict[str, Any]) -> None:
        anchors, deltas, logits, *objects = tensors(device)
        *weights, clip = options.pop("box_coder")
        options |= {"box_coder": mg_ops.BoxCoder(weights, clip), "backend": backend}
        mg_ops.mutual_match(anchors, *objects, cls_logits=logits, box_deltas=deltas, **options)

    return call


def call_operator(name: str, device: str, fake: bool) -> Callable[[dict[str, Any]], None]:
    def call(options: dict[str, Any]) -> None:
        operator, arguments = getattr(torch.ops.mg_ops, name).default, tensors(device)
        options |= {"gt_crowd": None, "scores_are_probabilities": False}
        options |= {"classification_by_regressed": True, "localization_by_amplified": True}
        if not fake:
            operator(*arguments, **options)
            return
        with FakeTensorMode() as mode:
            operator(*map(mode.from_tensor, arguments), **options)

    return call


def entry_points() -> dict[str, Callable[[dict[str, Any]], None]]:
    """Everything here that takes the numbers of a match."""
    calls = {}
    operator_of = {"cpp": "mutual_match", "cuda": "mutual_match", "eager": "mutual_match_eager"}
    operator_of["triton"] = "mutual_match_triton"
    device_types = {"cpp": ("cpu",), "cuda": ("cuda",), "eager": ("cpu", "cuda"), "triton": library.TRITON_DEVICES}
    for backend, status in mg_ops.backends().items():
        for device in DEVICES:
            if status.usable and device in device_types[backend]:
                calls[f"function, {backend} on {device}"] = call_function(backend, device)
                calls[f"operator, {backend} on {device}"] = call_operator(operator_of[backend], device, fake=False)
        if hasattr(torch.ops.mg_ops, operator_of[backend]):
            calls[f"fake of {backend}"] = call_operator(operator_of[backend], "cpu", fake=True)
            calls[f"meta of {backend}"] = call_operator(operator_of[backend], "meta", fake=False)
    calls["matcher"] = call_matcher("eager", "cpu")
    calls["function on meta"] = call_function("eager", "meta")
    return calls


@pytest.mark.parametrize("entry", entry_points())
def test_every_entry_point_takes_and_refuses_the_same_numbers(entry: str) -> None:
    call = entry_points()[entry]
    for name, number, is_accepted in NUMBERS:
        argument = "(box_coder|BoxCoder)" if name in ("weight", "clip") else name
        if is_accepted:
            call(options_with(name, number))
            continue
        with pytest.raises((ValueError, RuntimeError), match=rf"^{argument}: .*(expected|must)"):
            call(options_with(name, number))
            pytest.fail(f"{entry} took {name} {number!r}")


@pytest.mark.parametrize("entry", entry_points())
def test_no_entry_point_takes_a_threshold_of_ignoring_above_that_of_positives(entry: str) -> None:
    call = entry_points()[entry]
    for positive, ignored in [(0.3, 0.4), (0.5, math.nextafter(0.5, 1.0))]:
        options = options_with("iou_positive", positive) | {"iou_ignored": ignored}
        with pytest.raises((ValueError, RuntimeError), match=r"^iou_ignored: must not exceed iou_positive"):
            call(options)
