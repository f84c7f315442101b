"""Calls of `mg_ops.mutual_match` from many threads and processes at once, compared with the answers one by one.

    python tests/concurrent_calls.py threads
    python tests/concurrent_calls.py workers fork

Raises AssertionError where an answer differs. What hangs is for the caller to notice. No test framework in here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from comparison import assert_same
from random_batches import RandomBatch, random_batch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import mg_ops

BACKENDS = [name for name in ("cpp", "eager") if mg_ops.backends()[name].usable]
SEEDS = [seed for seed in range(200) if random_batch(seed).notes["A"] > 100 and random_batch(seed).notes["B"] > 0][:24]
NUM_THREADS = 8


def run_in_threads(works: list[Callable[[], None]]) -> None:
    """All at once, none before all are there; raises the first error."""
    barrier = threading.Barrier(len(works))
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        barrier.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def many_batches() -> list[tuple[RandomBatch, mg_ops.MutualMatch]]:
    """Batches of many shapes, those with many anchors among them, and their matches."""
    batches = [random_batch(seed) for seed in SEEDS] + [random_batch(seed, large=True) for seed in range(4)]
    torch.set_num_threads(1)
    return [(batch, batch.call("eager")) for batch in batches]


def check_threads() -> int:
    """Different and the same arguments, under other thread counts, modes and wrong calls; how many calls."""
    batches = many_batches()
    calls = 0

    def work(thread: int) -> Callable[[], None]:
        def run() -> None:
            # Thread counts are each thread's own in OpenMP.
            torch.set_num_threads(1 + thread % 3)
            for step in range(len(batches)):
                # Even threads all begin with the same tensors, odd ones each somewhere else.
                batch, expected = batches[(step + (thread * 5 if thread % 2 else 0)) % len(batches)]
                for backend in BACKENDS[:1] if step % 4 else BACKENDS:
                    if thread % 4 == 1:
                        with torch.inference_mode():
                            match = batch.call(backend)
                    elif thread % 4 == 2:
                        arguments = dict(batch.arguments)
                        boxes_name = "box_deltas" if "box_deltas" in arguments else "pred_boxes"
                        boxes = arguments[boxes_name].float().requires_grad_()
                        arguments[boxes_name] = boxes * 1.0
                        match = mg_ops.mutual_match(**arguments, backend=backend)
                        boxes.square().sum().backward()
                    else:
                        match = batch.call(backend)
                    assert_same(match, expected, f"thread {thread}, {batch}, {backend}")
                if thread % 4 == 3:  # wrong calls in between
                    try:
                        mg_ops.mutual_match(**{**batch.arguments, "sigma": 0.5})
                    except ValueError:
                        continue
                    raise AssertionError("sigma=0.5 did not raise")

        return run

    run_in_threads([work(thread) for thread in range(NUM_THREADS)])
    calls = NUM_THREADS * len(batches)
    return calls


class MatchedBatches(Dataset[dict[str, Tensor]]):
    """Matches batches where the data loader asks for them, in its workers: each by one thread, then by three."""

    def __init__(self, batches: list[RandomBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return 2 * len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        several, index = divmod(index, len(self.batches))
        torch.set_num_threads(3 if several else 1)  # torch gives workers one
        return self.batches[index].call(BACKENDS[0])._asdict()


def use_in_this_process() -> tuple[list[RandomBatch], list[mg_ops.MutualMatch]]:
    """Starts torch's threads, which a forked process will not have; batches and their matches.

    The batches are made here: torch's own operators would wait for those threads.
    """
    torch.set_num_threads(3)
    batches = [random_batch(seed) for seed in SEEDS]
    return batches, [batch.call(BACKENDS[0]) for batch in batches]


def check_workers(start_method: str) -> int:
    """Workers of a data loader; how many calls."""
    batches, expected = use_in_this_process()
    loader = DataLoader(MatchedBatches(batches), batch_size=None, num_workers=2, multiprocessing_context=start_method)
    for number, (match, wanted, batch) in enumerate(zip(loader, 2 * expected, 2 * batches, strict=True)):
        assert_same(mg_ops.MutualMatch(**match), wanted, f"match {number} of the workers, {batch}")
    return 2 * len(batches)


def match_in_child(batches: list[RandomBatch], results: Any) -> None:
    torch.set_num_threads(3)
    results.put([[value.tolist() for value in batch.call(BACKENDS[0])] for batch in batches])


def check_processes(start_method: str) -> int:
    """Processes that match by themselves, several threads each; how many calls."""
    batches, expected = use_in_this_process()
    context = multiprocessing.get_context(start_method)
    results = context.Queue()
    children = [context.Process(target=match_in_child, args=(batches, results)) for _ in range(2)]
    for child in children:
        child.start()
    for _ in children:
        for batch, match, wanted in zip(batches, results.get(), expected, strict=True):
            assert match == [value.tolist() for value in wanted], f"child process, {batch}"
    for child in children:
        child.join()
        assert child.exitcode == 0
    return len(children) * len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("where", choices=["threads", "workers", "processes"])
    parser.add_argument("start_method", nargs="?", default="fork", choices=["fork", "spawn", "forkserver"])
    options = parser.parse_args()
    if options.where == "threads":
        calls = check_threads()
    else:
        calls = {"workers": check_workers, "processes": check_processes}[options.where](options.start_method)
    print(f"{calls} calls in {options.where} equal those one by one")


if __name__ == "__main__":
    main()
