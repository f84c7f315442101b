"""What stands between `mg_ops.mutual_match` and the operators: other operators in their place, and what they are given.

No test framework in here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mg_ops import matching

Operator = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def backend_is(operator: Operator) -> AbstractContextManager[object]:
    """Within it `mg_ops.mutual_match` has this function, which takes what the operators take, as its backend."""
    return mock.patch.object(matching, "operator_of", lambda *_: operator)


def operator_arguments(
    *arguments: Any, function: Callable[..., Any] = matching.mutual_match, **options: Any
) -> tuple[Any, ...]:
    """What `mg_ops.mutual_match`, another rule or a matcher hands to its operator for these arguments, in its order."""
    taken: list[tuple[Any, ...]] = []

    def take(backend: Any, device: Any, name: str) -> Operator:
        def operator(*arguments: Any) -> Any:
            taken.append(arguments)
            return getattr(torch.ops.mg_ops, f"{name}_eager")(*arguments)

        return operator

    with mock.patch.object(matching, "operator_of", take):
        function(*arguments, **options)
    return taken[0]
