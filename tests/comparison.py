"""The one way in which tests compare two matches. No test framework in here: scripts use it as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import mg_ops


def assert_same(match: Sequence[Tensor], expected: Sequence[Tensor], what: object = "") -> None:
    """Raises AssertionError, naming the first difference, unless both have the same dtypes, shapes and integers.

    Args:
        match: of any device.
        expected: of any device, a plain tuple too.
        what: was matched, for the message.
    """
    for name, value, wanted in zip(mg_ops.MutualMatch._fields, match, expected, strict=True):
        assert (value.dtype, value.shape) == (wanted.dtype, wanted.shape), f"{name}: {value}, expected {wanted}; {what}"
        value, wanted = value.cpu(), wanted.cpu()
        if not torch.equal(value, wanted):
            where = (value != wanted).nonzero()
            first = tuple(where[0].tolist())
            raise AssertionError(
                f"{name}{list(first)} is {value[first].item()}, expected {wanted[first].item()}; "
                f"{len(where)} of {value.numel()} differ; {what}"
            )
