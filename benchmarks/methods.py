"""The ways to match that are measured: mg_ops on each backend, and the baselines, as calls on a batch."""

from __future__ import annotations

import argparse
import bisect
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mg_ops
from benchmarks import baselines
from benchmarks.cases import CODER, SWEEP_CASES, Batch, Case
from benchmarks.report import LOOP

LEAST_AGREEMENT = 0.999  # of a baseline's labels with mg_ops'
MOST_PAIRS = {"eager": 1e7, "looped": 5e8, "padded": 1e8}
"""Of anchors and objects, that a method is run on: seconds of one call, or gigabytes of memory, on 2 CPU cores."""
MOST_COMPARED_PAIRS = 6_000_000  # of anchors and objects: what "eager" does in seconds


@dataclass
class Method:
    """One way to do the job."""

    label: str
    call: Callable[[Batch], Any]
    strategy: str | None = "mutual"
    """What its answer is compared with: mg_ops' answer under this strategy, or None: another algorithm."""
    subject: bool = False
    most_pairs: float = math.inf
    """It is not run on batches with more pairs of anchors and objects: they take too long, or too much memory."""
    padded: bool = False
    """Whether it works on as many objects in every image as the fullest has."""
    captured: bool = True
    """Whether a CUDA graph may hold it: not where a call reads host memory that it frees."""
    missing: str | None = None
    """Why it cannot run here."""

    def reason_to_skip(self, batch: Batch) -> str | None:
        """Why it is not run on this batch."""
        objects = batch.padded_boxes.shape[:2].numel() if self.padded else sum(batch.counts)
        pairs = len(batch.anchors) * objects
        if self.missing or pairs <= self.most_pairs:
            return self.missing
        most = self.most_pairs / 1e6
        return f"{pairs / 1e6:,.0f} million pairs of anchors and objects; it is run on at most {most:.0f} million"


def usable_backends(device: str) -> list[str]:
    """Backends of mg_ops that run on this device, the default one first, "eager" last."""
    usable = [name for name, status in mg_ops.backends().items() if status.usable and name != "eager"]
    return [*(name for name in usable if (name == "cpp") == (device == "cpu")), "eager"]


def match(
    batch: Batch, backend: str | None = None, strategy: str = "mutual", lists: bool = False, device: str | None = None
) -> mg_ops.MutualMatch:
    """mg_ops on a batch; objects packed, or as lists."""
    return mg_ops.mutual_match(**batch.arguments(device, lists), strategy=strategy, backend=backend)


def match_loop(batch: Batch) -> baselines.Match:
    """Baseline (a) on a batch."""
    objects = batch.boxes_list, batch.labels_list, batch.crowd_list
    return baselines.match_per_image(batch.anchors, batch.deltas, batch.logits, *objects, CODER.weights, CODER.clip)


def match_padded(batch: Batch, function: Callable[..., baselines.Match] = baselines.match_batched) -> baselines.Match:
    """Baseline (b) on a batch."""
    objects = batch.padded_boxes, batch.padded_labels, batch.padded_crowd
    return function(batch.anchors, batch.deltas, batch.logits, *objects, CODER.weights, CODER.clip)


@functools.cache
def compiled_baseline(device: str) -> Callable[..., baselines.Match]:
    """(b) under torch.compile: once for all cases."""
    return torch.compile(baselines.match_batched, fullgraph=True, dynamic=device == "cpu")


def build_methods(case: Case, anchors: Tensor, options: argparse.Namespace) -> dict[str, Method]:
    """The methods of a case, in the order of the tables."""
    best, sweep = options.backends[0], case.name in (*SWEEP_CASES, "dense5000")
    ours = partial(Method, subject=True)
    methods: dict[str, Method] = {}
    for name in options.backends:
        most = MOST_PAIRS["eager"] if name == "eager" else math.inf
        methods[name] = ours(f"mg_ops {name}", partial(match, backend=name), most_pairs=most)
        if name == best != "eager" and not sweep:  # beside the packed objects: their turns follow each other
            call = partial(match, backend=best, lists=True)
            methods[f"{best}-lists"] = ours(f"mg_ops {best}, objects as lists", call, captured=False)
    if best != "eager":
        methods[f"{best}-iou"] = ours(
            f'mg_ops {best}, strategy="iou"', partial(match, backend=best, strategy="iou"), "iou"
        )
    if options.no_baselines:
        return methods
    methods[LOOP] = Method("(a) loop over images and objects", match_loop, most_pairs=MOST_PAIRS["looped"])
    padded = partial(Method, padded=True, most_pairs=MOST_PAIRS["padded"])
    methods["batched"] = padded("(b) batched, padded", match_padded)
    if not sweep:
        call = lambda b: match_padded(b, compiled_baseline(options.device))  # noqa: E731
        missing = "--quick" if options.quick else None
        methods["compiled"] = padded("(c) batched, torch.compile", call, missing=missing)
    call = lambda b: baselines.match_by_torchvision(b.anchors, b.boxes_list, b.crowd_list)  # noqa: E731
    methods["torchvision"] = Method("(d) torchvision Matcher (IoU only)", call, "iou", most_pairs=MOST_PAIRS["looped"])
    try:
        assign = baselines.make_task_aligned_assigner(anchors, case.num_classes, CODER.weights, CODER.clip)
        call, missing = lambda b: assign(b.deltas, b.logits, b.padded_boxes, b.padded_labels), None
    except ImportError as error:
        call, missing = match_padded, f"not installed ({error})"
    methods["task-aligned"] = padded("(e) ultralytics TaskAlignedAssigner", call, None, missing=missing)
    return methods


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def check_backends(batch: Batch, backends: Sequence[str], on_gpu: bool) -> str:
    """Compares each backend exactly: on a GPU with "cpp" on the CPU, else with "eager" on as much as it can do.

    Returns:
        What was compared.

    Raises:
        RuntimeError: an integer differs.
    """
    trusted = "cpp" if on_gpu and mg_ops.backends()["cpp"].usable else "eager"
    compared = [name for name in backends if name != "eager"]
    if not compared:
        return 'only backend "eager" is usable: nothing to compare'
    part, what = batch, "all images"
    if trusted == "eager":
        most = max(1, MOST_COMPARED_PAIRS // max(1, len(batch.anchors)))  # objects in all
        part = batch.head(max(1, bisect.bisect_right(list(itertools.accumulate(batch.counts[:8])), most)), most)
        what = f"{sum(part.counts):,} objects in {len(part.counts)} of {len(batch.counts)} images"
    for backend, strategy in itertools.product(compared, ("mutual", "iou")):
        expected = match(part, trusted, strategy, device="cpu" if trusted == "cpp" else None)
        if unequal := different_values(expected, match(part, backend, strategy)):
            raise RuntimeError(f'{backend} differs from {trusted} under strategy "{strategy}": {unequal}')
    return f"{', '.join(compared)} and {trusted} give the same integers for {what}"


def different_values(expected: mg_ops.MutualMatch, answer: mg_ops.MutualMatch) -> str:
    """Which integers differ; nothing if none does."""
    counts = [int((a.cpu() != b.cpu()).sum()) for a, b in zip(expected, answer, strict=True)]
    return ", ".join(f"{count} of {name}" for name, count in zip(expected._fields, counts, strict=True) if count)


def share_equal(expected: mg_ops.MutualMatch, answer: Any) -> float:
    """The share of equal labels; of the worse of the two matches, where the answer has both."""
    pairs = [(getattr(expected, name), getattr(answer, name)) for name in ("cls_match", "loc_match")]
    return min(float((mine == theirs).double().mean()) for mine, theirs in pairs if theirs is not None)
