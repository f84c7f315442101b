"""What the kernels leave out by bounds would not have mattered: culled equals brute force, on pyramids of anchors."""

from __future__ import annotations

import pytest
from conftest import Target, fuzz_cases
from pyramid_batches import pyramid_batch
from test_cpp_equals_reference import assert_equals_reference


@pytest.mark.parametrize("part", range(4))
def test_pyramids_of_anchors(compiled_target: Target, part: int) -> None:
    count = fuzz_cases(100)
    for seed in range(part * count, (part + 1) * count):
        assert_equals_reference(pyramid_batch(seed), compiled_target, f"pyramid_batch({seed})")
