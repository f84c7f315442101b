"""Every backend returns the integers of the reference, for every input: ties, garbage, odd sizes, dtypes and strides.

MG_OPS_FUZZ=10 runs ten times as many random cases (0.1: a tenth, as under a sanitizer). A failure names its seed:
`random_batches.random_batch(seed)` makes the batch again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparison import assert_same
from conftest import Target, fuzz_cases
from detector_batches import WORST, detector_batch, worst_batch
from hypothesis import given, settings
from random_batches import random_batch, to_device
from small_batches import small_batches
from torch import Tensor

import mg_ops


def assert_equals_reference(arguments: dict[str, Any], target: Target, what: object) -> None:
    reference = mg_ops.mutual_match(**arguments, backend="eager")
    assert_same(mg_ops.mutual_match(**to_device(arguments, target.device), backend=target.backend), reference, what)


def test_the_compiled_library_is_here() -> None:
    """Without it the rest of this file would be skipped and nobody would notice."""
    if os.environ.get("MG_OPS_TEST_NO_LIBRARY"):
        pytest.skip("MG_OPS_TEST_NO_LIBRARY is set: testing without the compiled library")
    status = mg_ops.backends()["cpp"]
    assert status.usable, f"{status.detail}; build it, or set MG_OPS_TEST_NO_LIBRARY=1 to test without it"


# Ten parts, so that a failure leaves the others running and pytest -n can share them.
@pytest.mark.parametrize("part", range(10))
def test_random_batches(compiled_target: Target, part: int) -> None:
    count = fuzz_cases(200)
    for seed in range(part * count, (part + 1) * count):
        batch = random_batch(seed)
        assert_equals_reference(batch.arguments, compiled_target, batch)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_large_random_batches(compiled_target: Target, part: int) -> None:
    count = fuzz_cases(12)
    for seed in range(part * count, (part + 1) * count):
        batch = random_batch(seed, large=True)
        assert_equals_reference(batch.arguments, compiled_target, batch)


def test_random_batches_match_something() -> None:
    """The generator is worth its time: most batches have positives, many have ties, ignored anchors and bad values."""
    count = 200
    batches = [random_batch(seed) for seed in range(count)]
    matches = [batch.call("eager") for batch in batches]
    assert sum(bool((match.cls_match >= 0).sum() > 1) for match in matches) > 0.5 * count
    assert sum(bool((match.cls_match == mg_ops.IGNORED).any()) for match in matches) > 0.15 * count
    assert sum(not torch.equal(match.cls_match >= 0, match.loc_match >= 0) for match in matches) > 0.25 * count

    def share(quality: Callable[[Tensor], bool], *names: str) -> float:
        """Of the batches, those whose argument of one of these names has a quality."""
        given = [batch.arguments[name] for batch in batches for name in names if name in batch.arguments]
        return sum(map(quality, given)) / count

    assert share(lambda boxes: bool(boxes.isnan().any()), "pred_boxes", "box_deltas") > 0.1
    assert share(lambda scores: not scores.is_contiguous(), "cls_logits", "cls_probabilities") > 0.1
    for name in ("pred_boxes", "box_deltas", "cls_logits", "cls_probabilities"):
        assert share(lambda _: True, name) > 0.25


# ---------------------------------------------------------------------------------------------------------------------
# Small batches that hypothesis shrinks when one fails


@settings(max_examples=fuzz_cases(600))
@given(arguments=small_batches())
def test_small_batches(compiled_target: Target, arguments: dict[str, Any]) -> None:
    assert_equals_reference(arguments, compiled_target, arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Threads


@pytest.fixture
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(
    ("batch_size", "num_anchors", "num_objects"),
    [(1, 6000, 40), (3, 2000, 7), (13, 1500, 5), (2, 9000, 0), (1, 500, 300)],
)
def test_thread_count_does_not_matter(
    compiled_target: Target, thread_count: None, threads: int, batch_size: int, num_anchors: int, num_objects: int
) -> None:
    """Fewer images than threads, and more; the second and third call say the same."""
    arguments = detector_batch(batch_size, num_anchors, num_objects)
    reference = mg_ops.mutual_match(**arguments, backend="eager")
    torch.set_num_threads(threads)
    for _ in range(3):
        match = mg_ops.mutual_match(**to_device(arguments, compiled_target.device), backend=compiled_target.backend)
        assert_same(match, reference, f"{threads} threads")


def test_calls_from_several_threads_at_once(compiled_target: Target) -> None:
    """Nothing is shared between calls: data loaders and servers may match in parallel."""
    from concurrent.futures import ThreadPoolExecutor

    batches = [detector_batch(2, 1000 + 7 * seed, 5, seed=seed) for seed in range(8)]
    references = [mg_ops.mutual_match(**batch, backend="eager") for batch in batches]

    def match(batch: dict[str, Any]) -> mg_ops.MutualMatch:
        return mg_ops.mutual_match(**to_device(batch, compiled_target.device), backend=compiled_target.backend)

    with ThreadPoolExecutor(4) as pool:
        for result, reference in zip(pool.map(match, batches * 4), references * 4, strict=True):
            assert_same(result, reference, "four threads at once")


@pytest.mark.parametrize("num_objects", [0, 1, 2, 500, 2000])
def test_many_objects(compiled_target: Target, num_objects: int) -> None:
    assert_equals_reference(detector_batch(1, 2000, num_objects), compiled_target, f"{num_objects} objects")


@pytest.mark.parametrize("kind", WORST)
def test_worst_cases_of_ranking(compiled_target: Target, kind: str) -> None:
    """When thousands of anchors compete for one object, and when all of them tie."""
    for iou_positive in (0.5, 1e-6):  # few positives, and nearly all of them
        arguments = worst_batch(kind, 5000) | {"iou_positive": iou_positive, "iou_ignored": iou_positive / 2}
        assert_equals_reference(arguments, compiled_target, kind)
