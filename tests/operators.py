"""What stands between `mg_ops.mutual_match` and the operators: other operators in their place, and what they are given.

No test framework in here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import Tensor

import mg_ops
from mg_ops import library, matching

Operator = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def match_by(operator: Operator, *arguments: Any, **options: Any) -> mg_ops.MutualMatch:
    """`mg_ops.mutual_match` with this function, which takes what the operators take, as its backend."""
    with mock.patch.object(matching, "operator_of", lambda backend, device: operator):
        return mg_ops.mutual_match(*arguments, **options)


def operator_arguments(*arguments: Any, **options: Any) -> tuple[Any, ...]:
    """What `mg_ops.mutual_match` hands to its operator for these arguments, in the operator's order."""
    taken: list[tuple[Any, ...]] = []

    def take(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        taken.append(arguments)
        return library._eager(*arguments)

    match_by(take, *arguments, **options)
    return taken[0]
