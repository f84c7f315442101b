"""Concurrent calls give what calls one by one give, from threads, data loaders' workers and forked processes.

Each check runs in a process of its own (tests/concurrent_calls.py), so that a deadlock ends this test and not all of
them. The limit of time is there for that alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "concurrent_calls.py"
DEADLOCK_SECONDS = 900
"""Far more than any machine needs for a few seconds' work."""


def assert_all_equal(*options: str) -> None:
    try:
        result = subprocess.run(
            [sys.executable, "-X", "faulthandler", str(SCRIPT), *options],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLOCK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"{' '.join(options)}: no end after {DEADLOCK_SECONDS} s")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    assert re.search(r"\b[1-9]\d* calls in \w+ equal", result.stdout)


def test_threads() -> None:
    """Of one process: the same tensors and others, other thread counts, inference mode, autograd, calls that raise."""
    assert_all_equal("threads")


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_of_data_loaders(start_method: str) -> None:
    assert_all_equal("workers", start_method)


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_processes_forked_from_one_that_has_used_its_threads(start_method: str) -> None:
    """torch's own operators wait forever there; a match does not."""
    assert_all_equal("processes", start_method)
