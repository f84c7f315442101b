"""The ways to match that are measured, mg_ops on each backend and the baselines, as calls on a batch."""

from __future__ import annotations

import argparse
import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

import mg_ops
from benchmarks import baselines
from benchmarks.cases import SWEEP_CASES, Batch, Case
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
    strategy: str = "mutual"
    """What its answer is compared with: mg_ops' answer under this strategy."""
    subject: bool = False
    most_pairs: float = math.inf
    """It is not run on batches with more pairs of anchors and objects: they take too long, or too much memory."""
    padded: bool = False
    """Whether it works on as many objects in every image as the fullest has."""
    captured: bool = True
    """Whether a CUDA graph may hold it: not where a call reads host memory that it frees."""

    def reason_to_skip(self, batch: Batch) -> str | None:
        """Why it is not run on this batch."""
        objects = batch.padded_boxes.shape[:2].numel() if self.padded else sum(batch.counts)
        pairs, most = len(batch.anchors) * objects / 1e6, self.most_pairs / 1e6
        too_many = f"{pairs:,.0f} million pairs of anchors and objects; it is run on at most {most:.0f} million"
        return too_many if pairs > most else None


def usable_backends(device: str) -> list[str]:
    """Backends of mg_ops that run on this device, the default one first, "eager" last."""
    usable = [name for name, status in mg_ops.backends().items() if status.usable and name != "eager"]
    return [*(name for name in usable if (name == "cpp") == (device == "cpu")), "eager"]


def match(batch: Batch, backend: str | None = None, strategy: str = "mutual", lists: bool = False) -> Any:
    """mg_ops on a batch; objects packed, or as lists."""
    return mg_ops.mutual_match(**batch.arguments(lists), strategy=strategy, backend=backend)


def build_methods(case: Case, options: argparse.Namespace) -> dict[str, Method]:
    """The methods of a case, in the order of the tables."""
    best, sweep = options.backends[0], case.name in (*SWEEP_CASES, "dense5000")
    ours, methods = partial(Method, subject=True), {}
    for name in options.backends:
        most = MOST_PAIRS["eager"] if name == "eager" else math.inf
        methods[name] = ours(f"mg_ops {name}", partial(match, backend=name), most_pairs=most)
        if name == best != "eager" and not sweep:  # beside the packed objects: their turns follow each other
            call = partial(match, backend=best, lists=True)
            methods[f"{best}-lists"] = ours(f"mg_ops {best}, objects as lists", call, captured=False)
    if best != "eager":
        call = partial(match, backend=best, strategy="iou")
        methods[f"{best}-iou"] = ours(f'mg_ops {best}, strategy="iou"', call, "iou")
    if options.no_baselines:
        return methods
    looped = partial(Method, most_pairs=MOST_PAIRS["looped"])
    padded = partial(Method, most_pairs=MOST_PAIRS["padded"], padded=True)
    methods[LOOP] = looped("(a) loop over images and objects", baselines.match_loop)
    methods["batched"] = padded("(b) batched, padded", baselines.match_padded)
    if not sweep and not options.quick:
        methods["compiled"] = padded("(c) batched, torch.compile", baselines.match_compiled)
    methods["torchvision"] = looped("(d) torchvision Matcher (IoU only)", baselines.match_by_torchvision, "iou")
    return methods


def check_backends(batch: Batch, backends: Sequence[str], on_gpu: bool) -> str:
    """Compares each backend exactly: on a GPU with "cpp" on the CPU, else with "eager" on as much as it can do.

    Returns:
        What was compared.

    Raises:
        RuntimeError: an integer differs.
    """
    trusted = "cpp" if on_gpu and mg_ops.backends()["cpp"].usable else "eager"
    part, what = batch, "all images"
    if trusted == "eager":
        most = max(1, MOST_COMPARED_PAIRS // len(batch.anchors))  # objects in all
        part = batch.head(max(1, bisect.bisect_right(list(itertools.accumulate(batch.counts[:8])), most)), most)
        what = f"{sum(part.counts):,} objects in {len(part.counts)} of {len(batch.counts)} images"
    on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in part.arguments().items()}
    compared = [name for name in backends if name != "eager"]
    for backend, strategy in itertools.product(compared, ("mutual", "iou")):
        expected = mg_ops.mutual_match(**on_cpu, strategy=strategy, backend=trusted)
        answer = match(part, backend, strategy)
        for name, mine, theirs in zip(expected._fields, expected, answer, strict=True):
            if differ := int((mine != theirs.cpu()).sum()):
                raise RuntimeError(f'{backend} differs from {trusted} under strategy "{strategy}": {differ} of {name}')
    return f"{', '.join([*compared, trusted])}: the same integers for {what}"


def share_equal(expected: Any, answer: Any) -> float:
    """The share of equal labels; of the worse of the two matches, where the answer has both."""
    pairs = [(getattr(expected, name), getattr(answer, name)) for name in ("cls_match", "loc_match")]
    return min(float((mine == theirs).double().mean()) for mine, theirs in pairs if theirs is not None)
