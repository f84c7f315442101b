"""Extra memory stays within 40 bytes x B x A (and a little for each object), and no call leaves any behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mg_ops

MEASURE = """
import sys
import torch
import mg_ops

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)

batch_size, num_anchors, num_objects = map(int, sys.argv[1:4])
form_of_scores = sys.argv[4]
torch.manual_seed(0)

def boxes(count, size):
    corner = torch.rand(count, 2) * 1300
    return torch.cat([corner, corner + 4 + size * torch.rand(count, 2)], dim=1)

def arguments(num_anchors, num_objects):
    anchors = boxes(num_anchors, 60)
    deltas = torch.randn(batch_size, num_anchors, 4)
    # Of so many classes that a copy of them would be beyond the bound.
    scores = torch.rand(batch_size, num_anchors, 12)
    gt_boxes = boxes(batch_size * num_objects, 60)
    gt_labels = torch.zeros(batch_size * num_objects, dtype=torch.int64)
    offsets = torch.arange(batch_size + 1) * num_objects
    options = {"box_deltas": deltas, "box_coder": mg_ops.BoxCoder(), form_of_scores: scores, "backend": "cpp"}
    return (anchors, gt_boxes, gt_labels, offsets), options

# Threads, kernels and imports of the first call are not what is measured.
tensors, options = arguments(500, 3)
mg_ops.mutual_match(*tensors, **options)
tensors, options = arguments(num_anchors, num_objects)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
match = mg_ops.mutual_match(*tensors, **options)
peak = status("VmHWM")
outputs = sum(value.numel() * value.element_size() for value in match)
assert (match.cls_match >= 0).sum() > num_objects
print(peak - before - outputs)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form_of_scores", ["cls_logits", "cls_probabilities"])
@pytest.mark.parametrize("num_objects", [50, 5000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_extra_memory_is_bounded(batch_size: int, num_objects: int, form_of_scores: str) -> None:
    if not mg_ops.backends()["cpp"].usable:
        pytest.skip(mg_ops.backends()["cpp"].detail)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak cannot be reset here: {error}")
    num_anchors = 200_000
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(batch_size), str(num_anchors), str(num_objects), form_of_scores],
        capture_output=True,
        text=True,
        cwd=Path(mg_ops.__file__).parent.parent,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    extra = int(run.stdout)
    # One MiB for what the process does besides: pages come in clusters, and Python allocates too.
    bound = 40 * batch_size * num_anchors + 400 * batch_size * num_objects + 2**20
    assert extra <= bound, f"{extra / (batch_size * num_anchors):.1f} bytes an anchor"


def test_many_calls_leave_nothing_behind() -> None:
    """A short run of `make soak`: a leak of 300 bytes a call would show."""
    if not mg_ops.backends()["cpp"].usable:
        pytest.skip(mg_ops.backends()["cpp"].detail)
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    script = Path(__file__).parent / "soak.py"
    run = subprocess.run(
        [sys.executable, str(script), "--calls", "30000", "--threads", "1"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
