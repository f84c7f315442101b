"""Without a GPU the Triton kernels still run, and equal the reference: in Triton's interpreter, in its own process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parent
MATCH, LOSSES = "test_triton_equals_reference.py", "test_triton_losses.py"
# Parts, so that pytest -n can share them.
PARTS = {
    "clauses": (MATCH, "test_every_clause_of_the_definition"),
    "random batches 0, 1": (MATCH, "test_random_batches and (0 or 1) and not blocks"),
    "random batches 2, 3": (MATCH, "test_random_batches and (2 or 3) and not blocks"),
    "small blocks": (MATCH, "test_random_batches_in_small_blocks"),
    # The thresholds between take as long and say the same; on a GPU they are tested too.
    "thresholds of lists": (MATCH, "test_any_threshold_of_lists and not 0.0001 and not 0.2"),
    "the rest": (
        MATCH,
        "not test_random_batches and not test_every_clause_of_the_definition and not test_any_threshold",
    ),
    "losses": (LOSSES, "losses"),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_interpreted_kernels_equal_the_reference(part: str) -> None:
    file, chosen = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    result = subprocess.run(
        [*command, str(TESTS / file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in result.stdout:
        pytest.skip("the interpreter of this Triton fails under this NumPy: install triton 3.9, or numpy<2.4")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert re.search(r"\b[1-9]\d* passed", result.stdout), result.stdout
