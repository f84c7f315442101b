"""cls_probabilities are p itself: what the sigmoid makes of logits gives what the logits give, bit for bit.

Values that are no probabilities are in the cases on paper (cases.py), in the random batches and in test_det_math.py.
"""

from __future__ import annotations

from typing import Any

import cuda_on_cpu
import pytest
import torch
from comparison import assert_same
from conftest import Target, fuzz_cases
from pyramid_batches import pyramid_batch
from random_batches import random_batch, to_device

import mg_ops
from mg_ops import reference


def batches_of_logits(count: int) -> list[dict[str, Any]]:
    """Random ones, garbage and odd strides among them, and pyramids, where bounds leave out most scores."""
    batches = [random_batch(seed).arguments for seed in range(80_000, 80_000 + 2 * count)]
    return [batch for batch in batches if "cls_logits" in batch][:count] + list(map(pyramid_batch, range(count // 4)))


def as_probabilities(arguments: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(arguments)
    return arguments | {"cls_probabilities": reference.sigmoid(arguments.pop("cls_logits").float())}


def test_probabilities_give_what_their_logits_give(target: Target) -> None:
    for arguments in batches_of_logits(fuzz_cases(100)):
        expected = mg_ops.mutual_match(**arguments, backend="eager")
        probabilities = to_device(as_probabilities(arguments), target.device)
        assert_same(mg_ops.mutual_match(**probabilities, backend=target.backend), expected, arguments)


def test_so_they_do_in_the_cuda_kernels() -> None:
    emulator = cuda_on_cpu.build(threads=32, list_room=8)
    for seed, arguments in enumerate(batches_of_logits(fuzz_cases(8))):
        match = emulator.mutual_match(**as_probabilities(arguments), seed=seed)
        assert_same(match, mg_ops.mutual_match(**arguments, backend="eager"), arguments)


def test_few_probabilities_are_read() -> None:
    """The bounds hold for them too: of the pairs that overlap, which the definition asks about, few are looked at."""
    emulator = cuda_on_cpu.build(threads=32, list_room=8)
    arguments = pyramid_batch(3) | {"strategy": "mutual"}
    emulator.mutual_match(**arguments)
    reads = emulator.last_call.scores_read
    emulator.mutual_match(**as_probabilities(arguments))
    assert emulator.last_call.scores_read == reads > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_probabilities_of_every_dtype_are_rounded_to_float32(target: Target, dtype: torch.dtype) -> None:
    for arguments in batches_of_logits(fuzz_cases(20)):
        arguments = to_device(as_probabilities(arguments), target.device)
        arguments["cls_probabilities"] = arguments["cls_probabilities"].to(dtype)
        rounded = arguments | {"cls_probabilities": arguments["cls_probabilities"].float()}
        expected = mg_ops.mutual_match(**rounded, backend=target.backend)
        assert_same(mg_ops.mutual_match(**arguments, backend=target.backend), expected, dtype)
