"""Mutual matching measured: time and memory of `mg_ops.mutual_match` beside what people use today.

    python benchmarks/match_speed.py                      # every case, a few minutes on 2 cores
    python benchmarks/match_speed.py --quick              # small batches, to see that it works
    python benchmarks/match_speed.py --boxes annotations.json --cases coco320

Every answer is checked before it is timed: each backend against backend="eager" integer by integer, each baseline by
its share of equal labels (native arithmetic may differ on ties; under 99.9 percent the run fails). Methods take
turns, so that noise hits all alike, and each call reads another batch. Baselines: benchmarks/baselines.py; how
batches are made: benchmarks/cases.py and objects.py. Prints tables, and writes JSON and a plot to runs/benchmarks/.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

import mg_ops  # noqa: E402
from benchmarks import baselines  # noqa: E402
from benchmarks.card_limits import copy_bandwidth, launch_seconds  # noqa: E402
from benchmarks.cases import CASES, CODER, SWEEP, Batch, Case, batches_beyond_cache, make_batches  # noqa: E402
from benchmarks.graph_replay import REPLAYS, GraphOfCalls  # noqa: E402
from benchmarks.machine import add_output_options, describe_machine, prepare_output  # noqa: E402
from benchmarks.objects import ImageObjects, read_objects  # noqa: E402

LOOP = "loop"
"""The baseline all ratios are to: (a), the loop over images and objects."""
TUNED_LOOP = "tuned-loop"
"""(a2): the same loop, tuned by hand."""
LOOPS = (LOOP, TUNED_LOOP)
CASE_GROUPS = {
    "voc320": ["voc320"],
    "coco320": ["coco320"],
    "coco800": ["coco800"],
    "dense": ["dense"],
    "dense5000": ["dense5000"],
    "sweep": [f"sweep{count}" for count in SWEEP],
}
LEAST_AGREEMENT = 0.999
ONE_CALL_SECONDS = 2.0  # a method whose call takes longer is timed once
LONGEST_CALL_SECONDS = 3.0  # a baseline other than the loop that would take longer is not run
LONGEST_LOOP_SECONDS = 10.0  # the same for the loop on a single image
SLOT_SECONDS = 0.25  # the turn of a method in each round
BATCH_BYTES = 256e6  # predictions of the batches that take turns, on a CPU


# ---------------------------------------------------------------------------------------------------------------------
# Methods: the subject and the baselines


@dataclass
class Method:
    """One way to do the job."""

    name: str
    label: str
    call: Callable[[Batch], object]
    strategy: str | None
    """What its answer is compared with: mg_ops' answer under this strategy, or None: another algorithm."""
    threads: int
    subject: bool = False
    pair_bytes: float = 0.0
    """Estimate of its peak memory a padded (image, anchor, object) triple that is alive at once."""
    per_image: bool = False
    """Whether only one image's pairs are alive at once."""
    note: str = ""
    captured: bool = True
    """Whether a CUDA graph may hold it: not where a call reads host memory that it frees."""


@dataclass
class Result:
    """What was measured of one method in one case; a figure that was not measured is None."""

    label: str
    subject: bool = False
    strategy: str | None = None
    threads: int = 0
    note: str = ""
    skipped: str | None = None
    seconds: list[float] = field(default_factory=list)
    """Wall time of each timed call."""
    first_call_seconds: float | None = None
    agreement: float | None = None
    """Share of labels equal to mg_ops' own (classification, and localization where the method has it)."""
    agreement_labelled: float | None = None
    """The same among anchors that either of the two gives an object or ignores."""
    extra_bytes: int | None = None
    """Peak memory beyond inputs and outputs."""
    output_bytes: int | None = None
    memory_resolution: int = 0
    memory_note: str = ""
    cuda: dict[str, float | int | str | list[float] | None] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Seconds; None if it was not timed."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """Seconds; None if only one call was timed."""
        if len(self.seconds) < 2:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def usable_backends(device: str) -> list[str]:
    """Backends of mg_ops that run on this device, the default one first, "eager" last."""
    names = []
    for name, status in mg_ops.backends().items():
        if not status.usable or name == "eager":
            continue
        if (name == "cpp") == (device == "cpu"):
            names.append(name)
    return [*names, "eager"]


def match(batch: Batch, backend: str | None, strategy: str = "mutual", lists: bool = False) -> mg_ops.MutualMatch:
    """mg_ops on a batch; objects packed, or as lists."""
    if lists:
        objects = {"gt_boxes": batch.boxes_list, "gt_labels": batch.labels_list, "gt_crowd": batch.crowd_list}
    else:
        objects = {"gt_boxes": batch.gt_boxes, "gt_labels": batch.gt_labels, "gt_crowd": batch.gt_crowd}
        objects["gt_offsets"] = batch.gt_offsets
    return mg_ops.mutual_match(
        batch.anchors,
        **objects,
        cls_logits=batch.logits,
        box_deltas=batch.deltas,
        box_coder=CODER,
        strategy=strategy,
        backend=backend,
    )


def match_loop(
    batch: Batch, loop: Callable[..., baselines.Match] = baselines.match_per_image, **options: int | None
) -> baselines.Match:
    """Baseline (a), or with another loop (a2), on a batch."""
    return loop(
        batch.anchors,
        batch.deltas,
        batch.logits,
        batch.boxes_list,
        batch.labels_list,
        batch.crowd_list,
        CODER.weights,
        CODER.clip,
        **options,
    )


match_tuned_loop = partial(match_loop, loop=baselines.match_per_image_tuned)
"""Baseline (a2) on a batch."""


class Methods:
    """Builds the methods of a case, in the order of the tables."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Options as `parse_options` returns them; torch.compile is set up once for all cases."""
        self.options = options
        self.compiled = None

    def build(self, case: Case, anchors: Tensor) -> list[Method | tuple[str, str, str]]:
        """Methods; a (name, label, reason) for one that cannot run here."""
        threads, device = self.options.threads, self.options.device
        names = self.options.backends
        best = names[0]
        coder = (CODER.weights, CODER.clip)
        sweep = case.name.startswith("sweep") or case.name == "dense5000"
        methods: list[Method | tuple[str, str, str]] = []

        def add(name: str, label: str, call: Callable[[Batch], object], strategy: str | None, **more: object) -> None:
            methods.append(Method(name, label, call, strategy, **{"threads": threads, **more}))

        for name in names:
            reference = {"pair_bytes": 90.0, "per_image": True} if name == "eager" else {}
            add(f"{name}", f"mg_ops {name}", lambda b, n=name: match(b, n), "mutual", subject=True, **reference)
            if name == best != "eager" and not sweep:  # beside the packed objects: their turns follow each other
                add(
                    f"{best}-lists",
                    f"mg_ops {best}, objects as lists",
                    lambda b: match(b, best, lists=True),
                    "mutual",
                    subject=True,
                    captured=False,
                )
        add(LOOP, "(a) loop over images and objects", match_loop, "mutual")
        if not sweep:
            add(TUNED_LOOP, "(a2) the loop, tuned by hand", match_tuned_loop, "mutual")
        batched = lambda b, run: run(  # noqa: E731
            b.anchors, b.deltas, b.logits, b.padded_boxes, b.padded_labels, b.padded_crowd, *coder
        )
        add("batched", "(b) batched, padded", lambda b: batched(b, baselines.match_batched), "mutual", pair_bytes=36.0)
        label = "(c) batched, torch.compile"
        if self.options.no_compile:
            methods.append(("compiled", label, "--no-compile"))
        elif not sweep:
            if self.compiled is None:
                self.compiled = torch.compile(baselines.match_batched, fullgraph=True, dynamic=device == "cpu")
            add("compiled", label, lambda b: batched(b, self.compiled), "mutual", pair_bytes=36.0)
        if best != "eager":
            add(f"{best}-iou", f'mg_ops {best}, strategy="iou"', lambda b: match(b, best, "iou"), "iou", subject=True)
        add(
            "torchvision",
            "(d) torchvision Matcher (IoU only)",
            lambda b: baselines.match_by_torchvision(b.anchors, b.boxes_list, b.crowd_list),
            "iou",
            pair_bytes=44.0,
            per_image=True,
        )
        label = "(e) ultralytics TaskAlignedAssigner"
        try:
            assign = baselines.make_task_aligned_assigner(anchors, case.num_classes, *coder)
        except ImportError as error:
            methods.append(("task-aligned", label, f"not installed ({error})"))
        else:
            add(
                "task-aligned",
                label,
                lambda b: assign(b.deltas, b.logits, b.padded_boxes, b.padded_labels),
                None,
                pair_bytes=60.0,
                note="another algorithm",
            )
        return methods


def count_pairs(batch: Batch, method: Method) -> tuple[int, int]:
    """(pairs worked on in all, pairs alive at once) of a method that handles every pair."""
    num_anchors, padded = len(batch.anchors), batch.padded_boxes.shape[1]
    if method.per_image or method.name in LOOPS:
        return num_anchors * sum(batch.counts), num_anchors * max(batch.counts)
    return num_anchors * padded * len(batch.counts), num_anchors * padded * len(batch.counts)


def available_bytes(device: str) -> float:
    """Memory that is free now, on the machine or on the GPU; infinity where the system does not say."""
    if device != "cpu":
        return float(torch.cuda.mem_get_info()[0])
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            return 1024.0 * int(found[1])
    return math.inf


def reason_to_skip(method: Method, batch: Batch, results: dict[str, Result], longest_call: float) -> str | None:
    """Why a method is not run on this batch: too much memory by estimate, or too much time by a trial on a part."""
    device = batch.anchors.device.type
    pairs, alive = count_pairs(batch, method)
    needed, allowed = method.pair_bytes * alive, 0.6 * available_bytes(device)
    if needed > allowed:
        return f"needs about {format_bytes(needed)} by estimate, over 60% of free memory ({format_bytes(allowed)})"
    if method.name == "compiled":  # a trial would compile for its own sizes
        eager = results["batched"]
        return f"(b) is: {eager.skipped}" if eager.skipped else None
    if method.name == LOOP:  # what the ratios are to; but one image of 5,000 objects alone would take half a minute
        longest_call = math.inf if len(batch.counts) > 1 else max(longest_call, LONGEST_LOOP_SECONDS)
    if longest_call == math.inf or (method.subject and method.name != "eager") or pairs < 5_000_000:
        return None
    part = batch.head(4, 30)
    with thread_count(method.threads):
        seconds = time_call(partial(method.call, part), device)[0] * pairs / count_pairs(part, method)[0]
    if seconds > longest_call:
        tried = "1 image" if len(part.counts) == 1 else f"{len(part.counts)} images"
        return f"would take about {seconds:.0f} s a call, by a trial on {tried} with {sum(part.counts)} objects"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def check_backends(batch: Batch, backends: list[str]) -> str:
    """Compares each backend with "eager" exactly, on as much of the batch as eager can do in a few seconds.

    Returns:
        What was compared.

    Raises:
        RuntimeError: an integer differs.
    """
    if backends == ["eager"]:
        return 'only backend "eager" is usable: nothing to compare'
    most_pairs = 6_000_000
    num_anchors = len(batch.anchors)
    boxes, labels, crowds = batch.boxes_list, batch.labels_list, batch.crowd_list
    num_images, pairs = 0, 0
    # Whole images as long as they fit, the first objects of one image where not even that does.
    while num_images < min(len(boxes), 8) and (
        num_images == 0 or pairs + num_anchors * len(boxes[num_images]) <= most_pairs
    ):
        pairs += num_anchors * len(boxes[num_images])
        num_images += 1
    most_objects = max(1, most_pairs // max(num_anchors, 1)) if pairs > most_pairs else max(batch.counts, default=0)
    subset = [slice(0, most_objects)] * num_images
    arguments = {
        "gt_boxes": [boxes[i][s] for i, s in enumerate(subset)],
        "gt_labels": [labels[i][s] for i, s in enumerate(subset)],
        "gt_crowd": None if crowds is None else [crowds[i][s] for i, s in enumerate(subset)],
        "cls_logits": batch.logits[:num_images],
        "box_deltas": batch.deltas[:num_images],
        "box_coder": CODER,
    }
    for strategy in ("mutual", "iou"):
        expected = mg_ops.mutual_match(batch.anchors, **arguments, backend="eager", strategy=strategy)
        for backend in backends:
            if backend == "eager":
                continue
            got = mg_ops.mutual_match(batch.anchors, **arguments, backend=backend, strategy=strategy)
            for name, a, b in zip(expected._fields, expected, got, strict=True):
                if not torch.equal(a, b):
                    raise RuntimeError(
                        f'backend {backend!r} differs from "eager" under strategy {strategy!r}: {int((a != b).sum())} '
                        f"of {a.numel()} values of {name}"
                    )
    images = "the first image" if num_images == 1 else f"the first {num_images} images"
    images = "all images" if num_images == len(boxes) else images
    objects = f", the first {most_objects} objects of each" if most_objects < max(batch.counts) else ""
    compared = [backend for backend in backends if backend != "eager"]
    return f"{', '.join(compared)} equal eager in every integer on {images}{objects}"


def share_equal(expected: mg_ops.MutualMatch, answer: object) -> tuple[float, float]:
    """(share of equal labels among all, among anchors labelled by either); of the worse of the two matches."""
    shares = []
    for name in ("cls_match", "loc_match"):
        mine, theirs = getattr(expected, name), getattr(answer, name)
        if theirs is None:
            continue
        equal = mine == theirs
        labelled = (mine != mg_ops.BACKGROUND) | (theirs != mg_ops.BACKGROUND)
        among = float(equal[labelled].double().mean()) if bool(labelled.any()) else 1.0
        shares.append((float(equal.double().mean()) if equal.numel() else 1.0, among))
    return min(shares)


# ---------------------------------------------------------------------------------------------------------------------
# Timing


@contextlib.contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Runs with so many threads of torch."""
    before = torch.get_num_threads()
    if threads != before:
        torch.set_num_threads(threads)
        torch.empty(1 << 18).fill_(0.0)  # threads start here, not in what is timed next
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_call(call: Callable[[], object], device: str) -> tuple[float, object]:
    """Wall seconds of a call, until the device has finished, and its answer."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    answer = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, answer


def choose_loop(method: Method, batch: Batch, threads: int) -> None:
    """Sets what makes a loop fastest on a few images: the thread count, and for (a2) one object or all at a time."""
    device = batch.anchors.device.type
    part = batch.head(8 if len(batch.anchors) < 50_000 else 2, 150)
    if sum(part.counts) * len(batch.anchors) > 20_000_000:
        part = batch.head(1, 150)
    ways = {"object by object": method.call}
    if method.name == TUNED_LOOP and max(batch.counts, default=0) * len(batch.anchors) <= 8_000_000:
        ways["an image's objects at once"] = partial(match_tuned_loop, objects_at_once=None)
    counts = [1 << power for power in range(10) if 1 << power < threads] + [threads] if device == "cpu" else [threads]
    best = math.inf
    for way, call in ways.items():
        for count in counts:
            with thread_count(count):
                seconds, _ = time_call(partial(call, part), device)
                for _ in range(4 if seconds < 0.1 else 1 if seconds < 1.0 else 0):
                    seconds = min(seconds, time_call(partial(call, part), device)[0])
            if seconds < best:
                best, method.threads, method.call, method.note = seconds, count, call, way
    tried = [f"{counts} threads"] if len(counts) > 1 else []
    tried += [" and ".join(ways)] if len(ways) > 1 else []
    if tried:
        method.note += f"; the fastest of {', of '.join(tried)}"


def time_methods(
    methods: list[Method], batches: list[Batch], results: dict[str, Result], repeats: int, tick: Callable[[str], None]
) -> None:
    """Rounds in which each method has its turn: as many calls as fit, the batches one after the other."""
    device = batches[0].anchors.device.type
    finished: set[str] = set()
    for turn in range(repeats):
        for method in methods:
            result = results[method.name]
            first = result.first_call_seconds
            assert first is not None
            if method.name in finished:
                tick(method.label)
                continue
            if first > ONE_CALL_SECONDS:
                result.seconds = [first]
                finished.add(method.name)
                tick(method.label)
                continue
            with thread_count(method.threads):
                index = turn
                if first < 0.1:
                    time_call(
                        partial(method.call, batches[index % len(batches)]), device
                    )  # caches are the last method's: not timed
                spent = 0.0
                while spent < SLOT_SECONDS and len(result.seconds) < 200 * (turn + 1):
                    index += 1
                    seconds, answer = time_call(partial(method.call, batches[index % len(batches)]), device)
                    del answer
                    result.seconds.append(seconds)
                    spent += seconds
            if sum(result.seconds) > (8.0 if method.subject or method.name in LOOPS else 2.5):
                finished.add(method.name)
            tick(method.label)


# ---------------------------------------------------------------------------------------------------------------------
# Memory on the CPU: the peak resident size of a fresh process, which has the inputs and runs one call


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status, such as VmRSS."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not found:
        raise OSError(f"/proc/self/status has no {name}")
    return 1024 * int(found[1])


def memory_resolution(threads: int) -> int:
    """How far the kernel's count of a process's pages may be off: it sums the processors' counts in batches."""
    return 4096 * max(32, 2 * (os.cpu_count() or 1)) * threads


def tensors_of(answer: object) -> list[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(answer, Tensor):
        return [answer]
    return [t for part in answer for t in tensors_of(part)] if isinstance(answer, (tuple, list)) else []


def measure_peaks(
    case: Case, source: list[ImageObjects] | None, options: argparse.Namespace, threads_of: dict[str, int]
) -> dict[str, tuple[int, int] | str]:
    """Runs in the fresh process: name -> (peak bytes beyond inputs and outputs, bytes of the outputs), or why not.

    Each method runs once on a few anchors first, for what any first call loads.
    """
    builder = Methods(options)
    torch.set_num_threads(options.threads)
    objects_per_image = None if case.objects_per_image is None else 3
    tiny = replace(
        case, batch_size=1, make_anchors=lambda: case.make_anchors()[:64], objects_per_image=objects_per_image
    )
    with thread_count(1):
        small = make_batches(tiny, None, 1, options.seed, "cpu")[0]
        batch = make_batches(case, source, 1, options.seed, "cpu")[0]
    warm_up = {m.name: m for m in builder.build(tiny, small.anchors) if isinstance(m, Method)}
    measured: dict[str, tuple[int, int] | str] = {}
    for method in builder.build(case, batch.anchors):
        if not isinstance(method, Method) or method.name not in threads_of:
            continue
        with thread_count(threads_of[method.name]):
            if method.name == "compiled":
                method.call(batch)  # compiled for these sizes
            else:
                warm_up[method.name].call(small)
            gc.collect()
            try:
                before = status_bytes("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
                answer = method.call(batch)
                peak = status_bytes("VmHWM")
            except OSError as error:
                measured[method.name] = f"not measured: {error}"
                continue
        outputs = sum(t.untyped_storage().nbytes() for t in tensors_of(answer))
        measured[method.name] = (max(0, peak - before - outputs), outputs)
        del answer
    return measured


def measure_memory(
    case: Case, source: list[ImageObjects] | None, options: argparse.Namespace, threads_of: dict[str, int]
) -> dict[str, tuple[int, int] | str]:
    """`measure_peaks` in a process of its own, in which freed memory goes back to the system at once."""
    settings = {
        "MALLOC_MMAP_THRESHOLD_": "16384",  # glibc reads them when the process starts
        "MALLOC_TRIM_THRESHOLD_": "16384",
        "PYTHONWARNINGS": "ignore::RuntimeWarning",  # what importing mg_ops warns of has been said by this process
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        # The server imports torch once and forks a process for each case.
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("forkserver")) as pool:
            return pool.submit(measure_peaks, case, source, options, threads_of).result()
    except BrokenProcessPool:
        return dict.fromkeys(threads_of, "not measured: the process ran out of memory")
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# ---------------------------------------------------------------------------------------------------------------------
# What only a GPU shows


def measure_cuda(
    method: Method, batches: list[Batch], result: Result, floor: dict[str, float], min_bytes: int, replays: int
) -> None:
    """Device time under graph replay, launches, host synchronizations, peak memory; fills result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answer = method.call(batches[0])
    torch.cuda.synchronize()
    outputs = sum(t.untyped_storage().nbytes() for t in tensors_of(answer))
    result.extra_bytes = max(0, torch.cuda.max_memory_allocated() - before - outputs)
    result.output_bytes = outputs
    del answer

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            method.call(batches[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    syncs = sum("synchroniz" in str(warning.message) for warning in caught)
    torch.cuda.synchronize()

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        method.call(batches[0])
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    launches = len(on_device)
    busy = sum(event.device_time for event in on_device) / 1e6

    times: list[float] = []
    reason = f"not captured: {syncs} host synchronizations" if syncs else ""
    if not method.captured:
        reason = "not captured: a call copies from host memory that it frees"
    if not reason:
        try:
            times = GraphOfCalls([partial(method.call, batch) for batch in batches]).time(replays)
        except RuntimeError as error:
            reason = f"not captured: {str(error).splitlines()[0]}"
            torch.cuda.synchronize()
    lowest = min_bytes / floor["bytes_per_second"] + launches * floor["seconds_per_launch"]
    replay = statistics.median(times) if times else None
    result.cuda = {
        "graph_replay_seconds": replay,
        "graph_replay_quartiles": statistics.quantiles(times, n=4, method="inclusive") if times else None,
        "graph_replay_note": reason,
        "device_busy_seconds": busy,
        "launches": launches,
        "host_synchronizations": syncs,
        "floor_seconds": lowest,
        "ratio_to_floor": None if replay is None else replay / lowest,
    }


def measure_floor() -> dict[str, float]:
    """What the device does at best: bytes a second of a large copy, and seconds a dependent launch in a graph."""
    return {"bytes_per_second": copy_bandwidth(), "seconds_per_launch": launch_seconds()}


def least_bytes(batch: Batch, expected: mg_ops.MutualMatch) -> int:
    """Bytes any implementation must move: anchors, deltas, objects, outputs, a 32-byte sector of scores a positive."""
    inputs = sum(t.nbytes for t in (batch.anchors, batch.deltas, batch.gt_boxes, batch.gt_labels, batch.gt_offsets))
    return inputs + sum(t.nbytes for t in expected) + 32 * int(expected.num_pos.sum())


# ---------------------------------------------------------------------------------------------------------------------
# One case


def run_case(
    case: Case,
    source: list[ImageObjects] | None,
    options: argparse.Namespace,
    builder: Methods,
    floor: dict[str, float] | None,
    console: Console,
) -> dict[str, object]:
    """Makes the batches, checks, times and weighs every method; the figures as they go into the JSON file."""
    device = options.device
    steps = options.repeats + 3
    with Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.fields[case]:9}[/] {task.description:58}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("making batches", total=None, case=case.name)
        say = lambda text, advance=0: progress.update(task, description=text, advance=advance)  # noqa: E731
        predictions = case.batch_size * len(case.make_anchors()) * (4 + case.num_classes) * 4
        if device == "cpu":
            num_batches = min(4, math.ceil(BATCH_BYTES / predictions)) if case.objects_per_image is None else 1
        else:
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            num_batches = batches_beyond_cache(case, cache, available_bytes(device))
        with thread_count(1):
            batches = make_batches(case, source, num_batches, options.seed, device)
        batch = batches[0]

        say('comparing the backends with "eager"')
        compared = check_backends(batch, options.backends)
        expected: dict[str, mg_ops.MutualMatch] = {}
        trusted = options.backends[0]

        results: dict[str, Result] = {}
        runnable: list[Method] = []
        built = builder.build(case, batch.anchors)
        progress.update(task, total=steps * len(built))
        for method in built:
            if not isinstance(method, Method):
                name, label, reason = method
                results[name] = Result(label, skipped=reason)
                say(label, steps)
                continue
            result = Result(method.label, method.subject, method.strategy)
            results[method.name] = result
            say(f"{method.label}: first call, its answer checked", 1)
            result.skipped = reason_to_skip(method, batch, results, options.longest_call)
            if result.skipped:
                say(method.label, steps - 1)
                continue
            if method.name in LOOPS:
                choose_loop(method, batch, options.threads)
            result.threads, result.note = method.threads, method.note
            try:
                with thread_count(method.threads):
                    seconds, answer = time_call(partial(method.call, batch), device)
                    if method.name == "compiled":
                        result.note = f"compiled in {seconds:.0f} s"
                        seconds, answer = time_call(partial(method.call, batch), device)
                    elif seconds < ONE_CALL_SECONDS:
                        seconds = min(seconds, time_call(partial(method.call, batch), device)[0])
            except (RuntimeError, MemoryError, torch.OutOfMemoryError) as error:
                result.skipped = f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
                if method.subject:
                    raise
                say(method.label, steps - 1)
                continue
            result.first_call_seconds = seconds
            if method.strategy is not None:
                if method.strategy not in expected:
                    expected[method.strategy] = (
                        answer if method.name == trusted else match(batch, trusted, method.strategy)
                    )  # type: ignore[assignment]
                result.agreement, result.agreement_labelled = share_equal(expected[method.strategy], answer)
                if method.subject and result.agreement < 1.0:
                    raise RuntimeError(f"{method.label}: answers differ from {trusted!r} in {case.name}")
                if result.agreement < LEAST_AGREEMENT:
                    raise RuntimeError(
                        f"{case.name}: {method.label} agrees with mg_ops on {100 * result.agreement:.3f} percent of "
                        f"the labels, under {100 * LEAST_AGREEMENT} percent: one of them is wrong"
                    )
            del answer
            runnable.append(method)

        time_methods(runnable, batches, results, options.repeats, lambda label: say(f"{label}: timing", 1))

        if device == "cpu":
            say("memory, in a fresh process")
            quick = [m for m in runnable if (results[m.name].first_call_seconds or 0.0) <= ONE_CALL_SECONDS]
            for method in runnable:
                if method not in quick:
                    results[method.name].memory_note = "not measured: it would take another slow call"
            measured = measure_memory(case, source, options, {m.name: m.threads for m in quick})
            for name, memory in measured.items():
                if isinstance(memory, str):
                    results[name].memory_note = memory
                else:
                    results[name].extra_bytes, results[name].output_bytes = memory
                    results[name].memory_resolution = memory_resolution(results[name].threads)
        else:
            assert floor is not None
            least, replays = least_bytes(batch, expected["mutual"]), 2 if options.quick else REPLAYS
            for method in runnable:
                say(f"{method.label}: device time, launches, memory", 1)
                measure_cuda(method, batches, results[method.name], floor, least, replays)

    sizes = {"B": case.batch_size, "A": len(batch.anchors), "C": case.num_classes}
    counts = [count for b in batches for count in b.counts]
    return {
        "sizes": {**sizes, "N": sum(batch.counts), "batches": len(batches)},
        "objects_per_image": {"mean": statistics.mean(counts), "max": max(counts), "min": min(counts)},
        "objects_from": str(options.boxes) if source is not None and case.takes_file else f"generated: {case.objects}",
        "checked": compared,
        "methods": {name: result_as_json(result, results.get(LOOP), sizes) for name, result in results.items()},
    }


def result_as_json(result: Result, loop: Result | None, sizes: dict[str, int]) -> dict[str, object]:
    """What the JSON file says of a method."""
    cells = sizes["B"] * sizes["A"]
    ratio = loop.median / result.median if loop and loop.median and result.median else None
    return {
        "label": result.label,
        "subject": result.subject,
        "strategy": result.strategy,
        "skipped": result.skipped,
        "note": result.note,
        "threads": result.threads or None,
        "median_seconds": result.median,
        "quartile_seconds": result.quartiles,
        "timed_calls": len(result.seconds),
        "loop_over_this": ratio,
        "share_of_labels_equal": result.agreement,
        "share_of_labelled_anchors_equal": result.agreement_labelled,
        "extra_bytes": result.extra_bytes,
        "extra_bytes_per_image_and_anchor": None if result.extra_bytes is None else result.extra_bytes / cells,
        "extra_bytes_resolution": result.memory_resolution,
        "output_bytes": result.output_bytes,
        "memory_note": result.memory_note,
        **({"cuda": result.cuda} if result.cuda else {}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def format_seconds(seconds: float) -> str:
    """Three digits and a unit."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def format_ratio(ratio: float) -> str:
    """Three digits, or all of them before the point."""
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def format_bytes(size: float) -> str:
    """Three digits and a unit, in powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def format_memory(method: dict, cells: int = 1) -> str:
    """Extra memory, divided by `cells`; "<" where it is under what the measurement can tell."""
    extra, resolution = method["extra_bytes"], method["extra_bytes_resolution"]
    if extra is None:
        return "not measured"
    text = format_bytes if cells == 1 else "{:.1f} B".format
    return text(extra / cells) if extra >= resolution else f"< {text(resolution / cells)}"


def print_case(name: str, case: dict, console: Console, on_cuda: bool) -> None:
    """The table of a case: a row for each method that ran; below, which did not and why."""
    sizes, objects = case["sizes"], case["objects_per_image"]
    batches = f", {sizes['batches']} batches in turn" if sizes["batches"] > 1 else ""
    table = Table(
        title=f"[bold]{name}[/]  B = {sizes['B']}, A = {sizes['A']:,}, C = {sizes['C']}; objects per image: mean "
        f"{objects['mean']:.1f}, max {objects['max']} ({case['objects_from']}){batches}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption=case["checked"],
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("time", justify="right")
    table.add_column("quartiles", justify="right", style="dim")
    table.add_column("(a) / this", justify="right")
    if on_cuda:
        for header in ("graph replay", "/ floor", "launches", "syncs"):
            table.add_column(header, justify="right")
    else:
        table.add_column("threads", justify="right")
    table.add_column("extra memory", justify="right")
    table.add_column("/ (B A)", justify="right")
    table.add_column("equal labels", justify="right")
    notes = []
    for method in case["methods"].values():
        label = f"[bold green]{method['label']}[/]" if method["subject"] else method["label"]
        if method["skipped"]:
            notes.append(f"{method['label']}: skipped, {method['skipped']}")
            continue
        quartiles, ratio, cuda = method["quartile_seconds"], method["loop_over_this"], method.get("cuda", {})
        extra = method["extra_bytes"]
        row = [
            label,
            format_seconds(method["median_seconds"]),
            f"{format_seconds(quartiles[0])} - {format_seconds(quartiles[1])}" if quartiles else "one call",
            f"{format_ratio(ratio)}x" if ratio else "",
        ]
        if on_cuda:
            replay, over = cuda["graph_replay_seconds"], cuda["ratio_to_floor"]
            row += [format_seconds(replay) if replay else "-", f"{over:.2f}" if over else "-"]
            row += [str(cuda["launches"]), str(cuda["host_synchronizations"])]
        else:
            row.append(str(method["threads"]))
        equal = method["share_of_labels_equal"]
        cells = sizes["B"] * sizes["A"]
        row += [
            format_memory(method),
            "" if extra is None else format_memory(method, cells),
            "another algorithm" if equal is None else "all" if equal == 1 else f"{100 * equal:.3f} %",
        ]
        table.add_row(*row)
        if method["note"] and method["note"] != "another algorithm":
            notes.append(f"{method['label']}: {method['note']}")
        if method["memory_note"]:
            notes.append(f"{method['label']}: memory {method['memory_note']}")
    console.print()
    console.print(table)
    for note in notes:
        console.print(f"  [dim]{note}[/]", highlight=False)


def swept_cases(cases: dict[str, dict]) -> list[dict]:
    """One image with more and more objects."""
    swept = [case for name, case in cases.items() if name.startswith("sweep") or name == "dense5000"]
    return sorted(swept, key=lambda case: case["sizes"]["N"])


def print_sweep(swept: list[dict], console: Console) -> None:
    """One table for all sizes of the sweep: time and memory against the number of objects."""
    if len(swept) < 2:
        return
    sizes = swept[0]["sizes"]
    table = Table(
        title=f"[bold]sweep[/]  one image, A = {sizes['A']:,}, C = {sizes['C']}: time and extra memory against the "
        "number of objects",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        caption="; ".join(f"{case['sizes']['N']:,}: {case['checked']}" for case in swept),
        caption_justify="left",
    )
    table.add_column("")
    for case in swept:
        table.add_column(f"{case['sizes']['N']:,}", justify="right")
    notes: dict[str, list[str]] = {}
    for name, method in swept[0]["methods"].items():
        row = []
        for case in swept:
            cell = case["methods"][name]
            if cell["skipped"]:
                row.append("skipped")
                notes.setdefault(f"{cell['label']}: {cell['skipped']}", []).append(f"{case['sizes']['N']:,}")
            else:
                row.append(f"{format_seconds(cell['median_seconds'])}, {format_memory(cell)}")
        table.add_row(f"[bold green]{method['label']}[/]" if method["subject"] else method["label"], *row)
    console.print()
    console.print(table)
    for note, objects in notes.items():
        console.print(f"  [dim]{', '.join(objects)} objects skipped: {note}[/]", highlight=False)


def verdict_lines(cases: dict[str, dict]) -> list[str]:
    """One line a case: the default backend against the loop, and its memory."""
    lines = []
    for name, case in cases.items():
        if name.startswith("sweep"):
            continue
        subject = next(method for method in case["methods"].values() if method["subject"])
        loop = case["methods"][LOOP]
        if subject["median_seconds"] is None or loop["median_seconds"] is None:
            reason = subject["skipped"] or loop["skipped"]
            lines.append(f"{name}: no verdict, {reason}")
            continue
        time_text = format_seconds(subject["median_seconds"])
        replay = subject.get("cuda", {}).get("graph_replay_seconds")
        if replay:
            time_text += f" ({format_seconds(replay)} on the device)"
        lists = next((method for key, method in case["methods"].items() if key.endswith("-lists")), None)
        if lists and lists["median_seconds"]:
            time_text += f" (objects as lists: {format_seconds(lists['median_seconds'])})"
        extra = format_memory(subject, case["sizes"]["B"] * case["sizes"]["A"])
        threads = f"{loop['threads']} thread{'' if loop['threads'] == 1 else 's'}"
        memory = f"extra memory {extra} per anchor of the batch"
        tuned = case["methods"].get(TUNED_LOOP, {}).get("median_seconds")
        against_tuned = ""
        if tuned:
            ratio = tuned / subject["median_seconds"]
            against_tuned = f", {format_ratio(ratio)} times as fast as (a2) ({format_seconds(tuned)})"
        lines.append(
            f"{name}: {subject['label']} {time_text}, {format_ratio(subject['loop_over_this'])} times as fast as the "
            f"loop (a) ({format_seconds(loop['median_seconds'])}, {threads}){against_tuned}; {memory}"
        )
    return lines


PLOT_STYLE = {
    LOOP: ("(a) loop over images and objects", "#d1495b", "o"),
    "batched": ("(b) batched, padded", "#8d6a9f", "s"),
    "compiled": ("(c) batched, torch.compile", "#5c4d7d", "D"),
    "torchvision": ("(d) torchvision Matcher, IoU only", "#edae49", "^"),
    "task-aligned": ("(e) ultralytics TaskAlignedAssigner", "#7f7f7f", "v"),
}


def plot_sweep(cases: dict[str, dict], machine: dict, path: Path) -> bool:
    """Time and memory of one image against its number of objects; False if no sweep was run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    swept = swept_cases(cases)
    if len(swept) < 2:
        return False
    subject = next(name for name, method in swept[0]["methods"].items() if method["subject"])
    styles = {subject: (f"mg_ops ({subject})", "#00798c", "o"), **PLOT_STYLE}
    rc = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
    with pyplot.rc_context(rc):
        figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(11, 4.8), dpi=160)
        for name, (label, color, marker) in styles.items():
            points = [(case["sizes"]["N"], case["methods"].get(name, {})) for case in swept]
            ours = name == subject
            style = {
                "color": color,
                "marker": marker,
                "markersize": 7 if ours else 5.5,
                "linewidth": 3 if ours else 1.6,
                "zorder": 5 if ours else 3,
            }
            timed = [(n, m["median_seconds"]) for n, m in points if m.get("median_seconds")]
            weighed = [
                (n, max(m["extra_bytes"], m["extra_bytes_resolution"], 1))
                for n, m in points
                if m.get("extra_bytes") is not None
            ]
            if timed:
                time_axes.plot(*zip(*timed, strict=True), label=label, **style)
            if weighed:
                memory_axes.plot(*zip(*weighed, strict=True), **style)
        for axes, title, formatter in (
            (time_axes, "Time of one call", format_seconds),
            (memory_axes, "Peak memory beyond inputs and outputs", format_bytes),
        ):
            axes.set(xscale="log", yscale="log", xlabel="objects in the image")
            axes.set_title(title, loc="left", fontweight="bold")
            axes.xaxis.set_major_locator(matplotlib.ticker.FixedLocator([case["sizes"]["N"] for case in swept]))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _, show=formatter: show(value))
            axes.grid(axis="y", color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
        sizes = swept[0]["sizes"]
        figure.legend(loc="lower center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 0.055))
        figure.text(
            0.5,
            0.015,
            f"one image, {sizes['A']:,} anchors, {sizes['C']} classes; {machine['device']}, torch {machine['torch']}, "
            f"mg_ops {machine['commit']}, {machine['date'][:10]}",
            ha="center",
            color="#666666",
            fontsize=9,
        )
        figure.tight_layout(rect=(0, 0.16, 1, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)
    return True


# ---------------------------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked against what is usable here."""
    parser = argparse.ArgumentParser(description="Time and memory of mg_ops.mutual_match beside what people use today.")
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASE_GROUPS), default=list(CASE_GROUPS), help="what to run (all)"
    )
    parser.add_argument(
        "--boxes",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="objects of voc320, coco320 and coco800 from COCO-style JSON or VOC XML, instead of generated ones",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="backends of mg_ops (all that are usable)")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="CPU threads (%(default)s); (a) and (a2) also try fewer",
    )
    parser.add_argument(
        "--longest-call",
        type=float,
        metavar="SECONDS",
        help=f"leave out baselines that would take longer per call ({LONGEST_CALL_SECONDS:g}, with --quick 1)",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds in which every method has its turn (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of objects and predictions (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="small batches, 2 rounds, no torch.compile: a check, no figures"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out baseline (c)")
    parser.add_argument("--no-plot", action="store_true", help="write no PNG")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    if options.record and (options.quick or options.boxes is not None or len(set(options.cases)) < len(CASE_GROUPS)):
        parser.error("--record: expected all cases on generated objects, without --quick, --boxes and --cases")
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device: expected cpu or cuda, got {options.device}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    usable = usable_backends(options.device)
    options.backends = options.backends or usable
    for name in options.backends:
        if name not in usable:
            status = mg_ops.backends().get(name)
            reason = (
                f"it runs on {status.detail}"
                if status and status.usable
                else status.detail
                if status
                else "no such backend"
            )
            parser.error(f"--backends: {name} cannot run on {options.device}: {reason}; usable: {', '.join(usable)}")
    if options.longest_call is None:
        options.longest_call = 1.0 if options.quick else LONGEST_CALL_SECONDS
    if options.quick:
        options.repeats, options.no_compile = min(options.repeats, 2), True
    return options


def make_quick(case: Case) -> Case:
    """A case small enough for a check in seconds."""
    objects = None if case.objects_per_image is None else min(case.objects_per_image, 20)
    return replace(case, batch_size=min(case.batch_size, 4 if objects is None else 1), objects_per_image=objects)


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for; the exit status."""
    options = parse_options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    start = time.perf_counter()
    torch.set_num_threads(options.threads)
    source = None
    if options.boxes is not None:
        try:
            read = read_objects(options.boxes)
        except (FileNotFoundError, ValueError) as error:
            console.print(f"[red]{error}[/]")
            return 2
        source = read.images
        console.print(
            f"{options.boxes}: {len(source):,} images, {sum(len(i.labels) for i in source):,} objects, "
            f"{len(read.classes)} classes"
        )
        for note in read.notes:
            console.print(f"  {note}")
    machine = describe_machine(options.device)
    console.print(
        f"[bold]{machine['device']}[/], torch {machine['torch']}, mg_ops {machine['mg_ops']} at {machine['commit']}; "
        f"backends: {', '.join(options.backends)}"
    )
    for name, status in mg_ops.backends().items():
        if not status.usable:
            console.print(f"  backend {name}: {status.detail}")
    output = prepare_output(options, machine, "quick" if options.quick else "match_speed")
    floor = measure_floor() if options.device == "cuda" else None
    builder = Methods(options)
    cases: dict[str, dict] = {}
    names = [name for group in options.cases for name in CASE_GROUPS[group]]
    if options.quick:
        names = [name for name in names if name in ("voc320", "coco320", "dense")] or names[:1]
    shown = {name: value for name, value in vars(options).items() if name not in ("output", "record")}
    content = {"machine": machine, "options": shown, "floor": floor, "cases": cases}
    for name in names:
        case = make_quick(CASES[name]) if options.quick else CASES[name]
        if source is not None and case.takes_file:
            case = replace(case, num_classes=max(case.num_classes, len(read.classes)))
        try:
            cases[name] = run_case(case, source, options, builder, floor, console)
        except RuntimeError as error:
            console.print(f"[bold red]{name} failed:[/] {error}")
            return 1
        gc.collect()
        content["verdict"] = verdict_lines(cases)
        output.write_text(json.dumps(content, indent=1, default=str) + "\n")  # so that a later case cannot lose it
        if not name.startswith("sweep"):
            print_case(name, cases[name], console, options.device == "cuda")
    print_sweep(swept_cases(cases), console)

    console.print(f"\nwrote {output}")
    if not options.no_plot and plot_sweep(cases, machine, output.with_suffix(".png")):
        console.print(f"wrote {output.with_suffix('.png')}")
    console.print(f"\n[bold]Verdict[/] ({time.perf_counter() - start:.0f} s in all)")
    for line in content["verdict"]:
        console.print(f"  {line}", highlight=False)
    if options.quick:
        console.print("  --quick: small batches and few rounds; run without it for figures to quote")
    return 0


if __name__ == "__main__":
    sys.exit(main())
