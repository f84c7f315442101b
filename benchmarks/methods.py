"""The ways to match that are measured: mg_ops on each backend, and the baselines, as calls on a batch."""

from __future__ import annotations

import argparse
import bisect
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mg_ops
from benchmarks import baselines, measure
from benchmarks.cases import CODER, SWEEP_CASES, Batch, Case
from benchmarks.report import LOOP, format_quantity

LEAST_AGREEMENT = 0.999  # of a baseline's labels with mg_ops'
LONGEST_CALL_SECONDS = 3.0  # a baseline other than the loop that would take longer is not run
LONGEST_LOOP_SECONDS = 10.0  # the same for the loop on a single image
MOST_COMPARED_PAIRS = 6_000_000  # of anchors and objects: what "eager" does in seconds


@dataclass
class Method:
    """One way to do the job."""

    label: str
    call: Callable[[Batch], Any]
    strategy: str | None = "mutual"
    """What its answer is compared with: mg_ops' answer under this strategy, or None: another algorithm."""
    subject: bool = False
    pair_bytes: float = 0.0
    """Estimate of its peak memory per pair of an anchor and a padded object that is alive at once."""
    per_image: bool = False
    """Whether only one image's pairs are alive at once."""
    captured: bool = True
    """Whether a CUDA graph may hold it: not where a call reads host memory that it frees."""
    skip: str | None = None
    """Why it cannot run here."""


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
    methods: dict[str, Method] = {}
    for name in options.backends:
        size: dict[str, Any] = {"pair_bytes": 90.0, "per_image": True} if name == "eager" else {}
        methods[name] = Method(f"mg_ops {name}", partial(match, backend=name), subject=True, **size)
        if name == best != "eager" and not sweep:  # beside the packed objects: their turns follow each other
            call = partial(match, backend=best, lists=True)
            methods[f"{best}-lists"] = Method(f"mg_ops {best}, objects as lists", call, subject=True, captured=False)
    if not options.no_baselines:
        methods[LOOP] = Method("(a) loop over images and objects", match_loop, per_image=True)
        methods["batched"] = Method("(b) batched, padded", match_padded, pair_bytes=36.0)
        if not sweep:
            methods["compiled"] = compiled = replace(methods["batched"], label="(c) batched, torch.compile")
            compiled.call = lambda b: match_padded(b, compiled_baseline(options.device))
            compiled.skip = "--quick" if options.quick else None
    if best != "eager":
        call = partial(match, backend=best, strategy="iou")
        methods[f"{best}-iou"] = Method(f'mg_ops {best}, strategy="iou"', call, "iou", subject=True)
    if not options.no_baselines:
        methods["torchvision"] = Method(
            "(d) torchvision Matcher (IoU only)",
            lambda b: baselines.match_by_torchvision(b.anchors, b.boxes_list, b.crowd_list),
            "iou",
            pair_bytes=44.0,
            per_image=True,
        )
        methods["task-aligned"] = other = replace(methods["batched"], strategy=None, pair_bytes=60.0)
        other.label = "(e) ultralytics TaskAlignedAssigner"
        try:
            assign = baselines.make_task_aligned_assigner(anchors, case.num_classes, CODER.weights, CODER.clip)
            other.call = lambda b: assign(b.deltas, b.logits, b.padded_boxes, b.padded_labels)
        except ImportError as error:
            other.skip = f"not installed ({error})"
    return methods


def count_pairs(batch: Batch, method: Method) -> tuple[int, int]:
    """(pairs worked on in all, pairs alive at once) of a method that handles every pair."""
    num_anchors, counts = len(batch.anchors), batch.counts
    if method.per_image:
        return num_anchors * sum(counts), num_anchors * max(counts)
    return (num_anchors * batch.padded_boxes.shape[1] * len(counts),) * 2


def reason_to_skip(name: str, method: Method, batch: Batch, batched: str | None) -> str | None:
    """Why a method is not run on this batch: too much memory by estimate, or too much time by a trial on a part."""
    pairs, alive = count_pairs(batch, method)
    needed, allowed = method.pair_bytes * alive, 0.6 * measure.available_bytes(batch.anchors.device.type)
    if needed > allowed:
        sizes = [format_quantity(size, "B") for size in (needed, allowed)]
        return f"needs about {sizes[0]} by estimate, over 60% of free memory ({sizes[1]})"
    if name == "compiled":  # a trial would compile for its own sizes
        return f"(b) is: {batched}" if batched else None
    longest = LONGEST_CALL_SECONDS
    if name == LOOP:  # what the ratios are to; but one image of 5,000 objects alone would take half a minute
        longest = math.inf if len(batch.counts) > 1 else LONGEST_LOOP_SECONDS
    if longest == math.inf or (method.subject and name != "eager") or pairs < 5_000_000:
        return None
    part = batch.head(4, 30)
    seconds = measure.time_call(method.call, part)[0] * pairs / count_pairs(part, method)[0]
    if seconds <= longest:
        return None
    images = "1 image" if len(part.counts) == 1 else f"{len(part.counts)} images"
    return f"would take about {seconds:.0f} s a call, by a trial on {images} with {sum(part.counts)} objects"


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
