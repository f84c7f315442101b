"""What stands between `mg_ops.mutual_match` and the operators: other operators in their place, and what they are given.

No test framework in here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

import mg_ops
from mg_ops import library, matching

Operator = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def backend_is(operator: Operator) -> AbstractContextManager[object]:
    """Within it `mg_ops.mutual_match` has this function, which takes what the operators take, as its backend."""
    return mock.patch.object(matching, "operator_of", lambda backend, device: operator)


def operator_arguments(
    *arguments: Any, function: Callable[..., mg_ops.MutualMatch] = matching.mutual_match, **options: Any
) -> tuple[Any, ...]:
    """What `mg_ops.mutual_match`, or a matcher, hands to the operator for these arguments, in the operator's order."""
    taken: list[tuple[Any, ...]] = []

    def take(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        taken.append(arguments)
        return library._eager(*arguments)

    with backend_is(take):
        function(*arguments, **options)
    return taken[0]
