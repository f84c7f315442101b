"""Extra memory stays within 40 bytes x B x A (and a little for each object), and no call leaves any behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from object_forms import FORMS, in_form
from operators import operator_arguments
from rule_batches import RULES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
form_of_scores, rule = sys.argv[4:6]
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
    if rule == "atss_match":
        options["level_sizes"] = [num_anchors - num_anchors // 4, num_anchors // 4]
    return (anchors, gt_boxes, gt_labels, offsets), options

# Threads, kernels and imports of the first call are not what is measured.
tensors, options = arguments(500, 3)
getattr(mg_ops, rule)(*tensors, **options)
tensors, options = arguments(num_anchors, num_objects)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
match = getattr(mg_ops, rule)(*tensors, **options)
peak = status("VmHWM")
outputs = sum(value.numel() * value.element_size() for value in match if value is not None)
assert (match.cls_match >= 0).sum() > 0.5 * num_objects
print(peak - before - outputs)
"""


class CountAllocations(TorchDispatchMode):
    """Sums the bytes of all tensors that operations in Python make; what an operator needs inside is its own."""

    allocated = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))

        def memory(values: Any) -> dict[int, int]:
            storages = [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
            return {storage.data_ptr(): storage.nbytes() for storage in storages}

        given = memory(args)
        self.allocated += sum(size for place, size in memory(results).items() if place not in given)
        return results


SIZES = [(200_000, 50), (10_000, 5_000)]
"""Of anchors and objects: what each anchor takes decides the first, and each object the second."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scores_name", ["cls_logits", "cls_probabilities"])
@pytest.mark.parametrize("boxes_name", ["pred_boxes", "box_deltas"])
def test_predictions_are_read_where_they_are(form: str, scores_name: str, boxes_name: str) -> None:
    """The operator is handed the tensors of the call, and nothing as large is made for it: the objects are all."""
    anchors = torch.rand(1000, 4) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    predictions = {boxes_name: torch.rand(3, 2000, 4, dtype=torch.float16)[:, ::2], scores_name: torch.rand(3, 1000, 7)}
    coder = {"box_coder": mg_ops.BoxCoder()} if boxes_name == "box_deltas" else {}
    objects, _ = in_form(form, [anchors[:5].clone() for _ in range(3)], [torch.zeros(5).long() for _ in range(3)])
    arguments = {"anchors": anchors, **predictions, **objects, **coder}
    taken = operator_arguments(**arguments)
    for value, given in zip(taken, (anchors, *predictions.values()), strict=False):
        assert value is given
    with CountAllocations() as count:
        match = mg_ops.mutual_match(**arguments)
    outputs = sum(value.untyped_storage().nbytes() for value in match)
    assert outputs <= count.allocated <= outputs + 2000


@pytest.mark.parametrize("strategy", ["iou", "localize_to_classify", "classify_to_localize"])
def test_predictions_that_are_left_out_take_no_memory(strategy: str) -> None:
    anchors = torch.rand(1000, 4) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    objects = {"gt_boxes": [anchors[:5].clone()] * 3, "gt_labels": [torch.zeros(5).long()] * 3}
    predictions = {
        "iou": {},
        "localize_to_classify": {"pred_boxes": anchors.expand(3, -1, -1)},
        "classify_to_localize": {"cls_logits": torch.zeros(3, 1000, 2)},
    }[strategy]
    with CountAllocations() as count:
        match = mg_ops.mutual_match(anchors, **objects, **predictions, strategy=strategy)
    assert count.allocated <= sum(value.untyped_storage().nbytes() for value in match) + 2000


BESIDES = 2**20
"""For what the process does besides: pages come in clusters, and Python allocates too."""


def extra_memory(rule: str, form_of_scores: str, batch_size: int, num_anchors: int, num_objects: int) -> int:
    """The bytes that a call takes beyond its outputs, in a process of its own."""
    if not mg_ops.backends()["cpp"].usable:
        pytest.skip(mg_ops.backends()["cpp"].detail)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak cannot be reset here: {error}")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(batch_size), str(num_anchors), str(num_objects), form_of_scores, rule],
        capture_output=True,
        text=True,
        cwd=Path(mg_ops.__file__).parent.parent,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("num_anchors", "num_objects"), SIZES)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("rule", "form_of_scores"),
    [("mutual_match", "cls_logits"), ("mutual_match", "cls_probabilities"), *((rule, "cls_logits") for rule in RULES)],
)
def test_extra_memory_is_bounded(
    rule: str, form_of_scores: str, batch_size: int, num_anchors: int, num_objects: int
) -> None:
    extra = extra_memory(rule, form_of_scores, batch_size, num_anchors, num_objects)
    bound = 40 * batch_size * num_anchors + 400 * batch_size * num_objects + BESIDES
    assert extra <= bound, f"{extra / (batch_size * num_anchors):.1f} bytes an anchor"


@pytest.mark.parametrize("rule", RULES)
def test_ten_thousand_objects_of_one_image_take_no_more_than_forty_bytes_an_anchor(rule: str) -> None:
    assert extra_memory(rule, "cls_logits", 1, 121_515, 10_000) <= 40 * 121_515 + BESIDES


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
