"""The CUDA kernels of the rules beside mutual matching, run on the CPU as those of mutual matching are.

emulator = rules.build(threads=64)
match = emulator.run("max_iou_match", mg_ops.max_iou_match, anchors, gt_boxes, gt_labels, seed=7)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from operators import backend_is
from torch import Tensor

from cuda_on_cpu import compile_kernels, integers, rows
from mg_ops.reference import split_arguments
from mg_ops.rules.operators import RULES

Result = TypeVar("Result")


class FloatInput(ctypes.Structure):
    """As in csrc/problem.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 3),
        ("type", ctypes.c_int32),
        ("whole_rows", ctypes.c_bool),
    )


class IntegerInput(ctypes.Structure):
    """As in csrc/problem.h."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("is_int64", ctypes.c_bool))


class RuleCall(ctypes.Structure):
    """As in rules_on_cpu.cpp."""

    _fields_ = (
        *((name, FloatInput) for name in ("anchors", "pred_boxes", "cls_scores", "gt_boxes")),
        *((name, IntegerInput) for name in ("gt_labels", "gt_offsets")),
        ("gt_crowd", ctypes.c_void_p),
        ("crowd_stride", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("batch_size", "num_anchors", "num_classes", "num_gt")),
        *((name, ctypes.c_int32) for name in ("decode", "scores_are_probabilities")),
        ("coder", ctypes.c_float * 5),
        ("options", ctypes.c_float * 32),
        *((name, ctypes.c_void_p * 2) for name in ("match", "qualities", "counts")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("scratch_bytes", "launches")),
    )


def build(threads: int = 256, list_room: int = 2048, sanitize: bool = False) -> RuleEmulator:
    """As `cuda_on_cpu.build`."""
    return RuleEmulator(compile_kernels("rules_on_cpu.cpp", threads, list_room, sanitize))


def float_input(tensor: Tensor) -> FloatInput:
    array = rows(tensor.detach())
    return FloatInput(array.data, array.strides, array.type, array.whole_rows != 0)


def integer_input(tensor: Tensor) -> IntegerInput:
    array = integers(tensor)
    return IntegerInput(array.data, array.strides[0], array.type != 0)


def numbers_of(options: Iterable[Any]) -> list[float]:
    """Options as numbers: None as NaN, a list as its length and what is in it."""
    numbers: list[float] = []
    for option in options:
        if isinstance(option, (list, tuple)):
            numbers += [len(option), *option]
        else:
            numbers.append(float("nan") if option is None else option)
    return numbers


class RuleEmulator:
    """A compiled set of kernels."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.threads = self.library.threads_of_a_block()
        self.last_call = RuleCall()
        """Of the last call: its `scratch_bytes` and `launches`."""

    def run(self, rule: str, function: Callable[..., Result], *arguments: Any, seed: int = 0, **options: Any) -> Result:
        """A rule's function by these kernels, on CPU tensors; RuntimeError says what the emulator caught."""

        def operator(*arguments: Any) -> tuple[Tensor, ...]:
            RULES[rule].check(*arguments)
            return self.operator(rule, *arguments, seed=seed)

        with backend_is(operator):
            return function(*arguments, **options)

    def operator(self, rule: str, *arguments: Any, seed: int = 0) -> tuple[Tensor, ...]:
        """As the operators, but that nothing is checked: a GPU clamps offsets."""
        inputs, options = split_arguments(arguments)
        anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd, box_coder, _ = inputs
        batch_size, num_anchors, num_classes = cls_scores.shape
        # Whatever memory held before must not show.
        of_anchors = (batch_size, num_anchors)
        matches = [torch.full(of_anchors, 0x5A5A5A5A5A5A5A5A) for _ in range(2)]
        qualities = [torch.full(of_anchors, 0x5A5A5A5A, dtype=torch.int32).view(torch.float32) for _ in range(2)]
        counts = [torch.full((len(gt_boxes),), 0x5A5A5A5A, dtype=torch.int32) for _ in range(2)]
        call = RuleCall(
            *(float_input(tensor) for tensor in (anchors, pred_boxes, cls_scores, gt_boxes)),
            *(integer_input(tensor) for tensor in (gt_labels, gt_offsets)),
            None if gt_crowd is None else gt_crowd.data_ptr(),
            0 if gt_crowd is None else gt_crowd.stride(0),
            *(batch_size, num_anchors, num_classes, len(gt_boxes)),
            *(box_coder is not None, inputs.scores_are_probabilities),
            (ctypes.c_float * 5)(*(box_coder or [1.0] * 5)),
            (ctypes.c_float * 32)(*numbers_of(options)),
            *((ctypes.c_void_p * 2)(*(value.data_ptr() for value in pair)) for pair in (matches, qualities, counts)),
            seed,
        )
        message = ctypes.create_string_buffer(500)
        if getattr(self.library, f"{rule}_on_cpu")(ctypes.byref(call), message, len(message)) != 0:
            raise RuntimeError(message.value.decode())
        self.last_call = call
        per_anchor = RULES[rule].per_anchor
        of_type = {torch.int64: matches, torch.float32: qualities}
        results = [value for dtype, values in of_type.items() for value in values[: per_anchor.count(dtype)]]
        return *results, *counts[: RULES[rule].num_counts]
