"""SimOTA and dynamic soft label matching on images of points: every backend gives the bits of the reference.

tests/test_rules.py has the batches of all rules, whose anchors are any boxes. Here they are as these rules are used, so
that objects compete for anchors, and some have to look far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Target, fuzz_cases
from cuda_on_cpu import rules as emulated
from dynamic_k_images import random_batch_of_points
from random_batches import to_device
from rule_batches import RULES, assert_same_match

WITHOUT_TRITON = True
pytestmark = pytest.mark.parametrize("rule", ["simota_match", "dynamic_soft_label_match"])


def arguments_of(rule: str, seed: int) -> dict[str, Any]:
    """With the usual options, or others."""
    options = RULES[rule].random_options(np.random.default_rng(seed)) if seed % 3 == 0 else {}
    return random_batch_of_points(seed) | options


def test_compiled_backends(rule: str, compiled_target: Target) -> None:
    for seed in range(fuzz_cases(150)):
        arguments = arguments_of(rule, seed)
        expected = RULES[rule].function(**arguments, backend="eager")
        match = RULES[rule].function(**to_device(arguments, compiled_target.device), backend=compiled_target.backend)
        assert_same_match(match, expected, f"seed {seed}")


def test_the_cuda_kernels(rule: str) -> None:
    emulator = emulated.build(threads=64)
    for seed in range(fuzz_cases(15)):
        arguments = arguments_of(rule, seed)
        expected = RULES[rule].function(**arguments, backend="eager")
        match = emulator.run(rule, RULES[rule].function, **arguments, seed=seed)
        assert_same_match(match, expected, f"seed {seed}")
