"""Mutual matching measured: time and memory of `mg_ops.mutual_match` beside what people use today.

    python benchmarks/match_speed.py                      # every case, a few minutes on 2 cores
    python benchmarks/match_speed.py --quick              # small batches, to see that it works
    python benchmarks/match_speed.py --boxes annotations.json --cases coco320
    python benchmarks/match_speed.py --rules              # the other rules beside the libraries whose rules they are

Every answer is checked before it is timed: each backend of mg_ops integer by integer, each baseline by its share of
equal labels (native arithmetic may differ on ties; under 99.9 percent the run fails). Methods take turns, so that
noise hits all alike, and each call reads another batch. Baselines: benchmarks/baselines.py; how batches are made:
benchmarks/cases.py and objects.py. Prints tables, and writes JSON and a plot to runs/benchmarks/.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.status import Status

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

import mg_ops  # noqa: E402
from benchmarks import measure, report, rules  # noqa: E402
from benchmarks.cases import CASES, SWEEP_CASES, Batch, Case, batches_beyond_cache, make_batches  # noqa: E402
from benchmarks.machine import begin, check_options, make_parser, write  # noqa: E402
from benchmarks.methods import (  # noqa: E402
    LEAST_AGREEMENT,
    build_methods,
    check_backends,
    match,
    share_equal,
    usable_backends,
)
from benchmarks.objects import ImageObjects, read_objects  # noqa: E402
from benchmarks.report import LOOP  # noqa: E402

CASE_GROUPS = {**{name: (name,) for name in CASES if name not in SWEEP_CASES}, "sweep": SWEEP_CASES}
QUICK_CASES = ("voc320", "coco320", "dense")
SEED = 0
ROUNDS = 3
BATCH_BYTES = 256e6  # predictions of the batches that take turns, on a CPU


# ---------------------------------------------------------------------------------------------------------------------
# One case


def measure_peaks(
    case: Case, source: list[ImageObjects] | None, options: argparse.Namespace, threads_of: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """Runs in a fresh process: peak bytes beyond inputs and outputs by method, or why they are not known."""
    measured: dict[str, dict[str, Any]] = {}
    batch = make_batches(case, source, 1, SEED, "cpu")[0]
    methods = build_methods(case, options)
    for name, threads in threads_of.items():
        call = methods[name].call
        torch.set_num_threads(threads)
        call(batch if name == "compiled" else batch.head(1, 3))  # what any first call loads
        try:
            measured[name] = {"extra_bytes": measure.peak_bytes(partial(call, batch))[1]}
        except OSError as error:
            measured[name] = {"note": f"memory not measured: {error}"}
    return measured


def least_bytes(batch: Batch, expected: mg_ops.MutualMatch) -> int:
    """Bytes any implementation must move: anchors, deltas, objects, outputs, a 32-byte sector of scores a positive."""
    inputs = sum(t.nbytes for t in (batch.anchors, batch.deltas, batch.gt_boxes, batch.gt_labels, batch.gt_offsets))
    return inputs + sum(t.nbytes for t in expected) + 32 * int(expected.num_pos.sum())


def run_case(
    case: Case,
    source: list[ImageObjects] | None,
    options: argparse.Namespace,
    floor: dict[str, float] | None,
    status: Status,
) -> dict[str, Any]:
    """Makes the batches, checks, times and weighs every method; the figures as they go into the JSON file.

    Raises:
        RuntimeError: an answer is wrong.
    """
    say = lambda text: status.update(f"[bold]{case.name}[/] {text}")  # noqa: E731
    say("making batches")
    predictions = case.batch_size * len(case.make_anchors()) * (4 + case.num_classes) * 4
    if floor is None:
        num_batches = min(4, math.ceil(BATCH_BYTES / predictions)) if case.objects_per_image is None else 1
    else:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        num_batches = batches_beyond_cache(case, cache, torch.cuda.mem_get_info()[0])
    batches = make_batches(case, source, num_batches, SEED, options.device)
    batch = batches[0]
    say("comparing the backends")
    compared = check_backends(batch, options.backends, floor is not None)
    expected = {strategy: match(batch, options.backends[0], strategy) for strategy in ("mutual", "iou")}

    methods, records = build_methods(case, options), {}
    turns: dict[str, tuple[Callable[..., object], int]] = {}
    for name, method in methods.items():
        say(f"{method.label}: first call, its answer checked")
        records[name] = record = {"label": method.label, "subject": method.subject, "note": ""}
        record |= dict.fromkeys(("threads", "median_seconds", "quartile_seconds", "loop_over_this"))
        record |= {"share_of_labels_equal": None, "extra_bytes": None, "extra_bytes_resolution": 0}
        record["skipped"] = method.reason_to_skip(batch)
        if record["skipped"]:
            continue
        record["threads"] = options.threads
        if name == LOOP and floor is None:
            record["threads"] = measure.best_threads(method.call, batch.head(2, 100), options.threads)
            record["note"] = f"at its best number of threads, up to {options.threads}"
        try:
            equal = record["share_of_labels_equal"] = share_equal(expected[method.strategy], method.call(batch))
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError among them
            if method.subject:
                raise
            record["skipped"] = f"failed: {(str(error) or type(error).__name__).splitlines()[0]}"
            continue
        if equal < (1.0 if method.subject else LEAST_AGREEMENT):
            raise RuntimeError(f"{method.label}: only {100 * equal:.3f}% of the labels are mg_ops'")
        turns[name] = method.call, record["threads"]

    rounds = 1 if options.quick else ROUNDS
    timed = measure.take_turns(turns, batches, rounds, lambda name: say(f"{methods[name].label}: time"))
    for name, seconds in timed.items():
        low, records[name]["median_seconds"], high = measure.quartiles(seconds)
        records[name]["quartile_seconds"] = [low, high] if len(seconds) > 1 else None
    for name in turns if LOOP in turns else ():
        records[name]["loop_over_this"] = records[LOOP]["median_seconds"] / records[name]["median_seconds"]

    say("memory")
    if floor is None:
        threads_of = {name: threads for name, (_, threads) in turns.items()}
        try:
            peaks = measure.in_fresh_process(measure_peaks, case, source, options, threads_of)
        except BrokenProcessPool:
            peaks = {name: {"note": "memory not measured: the process ran out of it"} for name in turns}
        for name, found in peaks.items():
            records[name] |= {**found, "extra_bytes_resolution": measure.memory_resolution(threads_of[name])}
    else:
        least = least_bytes(batch, expected["mutual"]) / floor["bytes_per_second"]
        for name, (call, _) in turns.items():
            say(f"{methods[name].label}: device time, launches, memory")
            records[name]["extra_bytes"] = measure.peak_bytes(partial(call, batch), options.device)[1]
            cuda = measure.measure_on_gpu(call, batches, methods[name].captured, options.quick)
            lowest, replay = least + cuda["launches"] * floor["seconds_per_launch"], cuda["graph_replay_seconds"]
            records[name]["cuda"] = {**cuda, "floor_seconds": lowest, "ratio_to_floor": replay and replay / lowest}

    counts = [count for made in batches for count in made.counts]
    sizes = {"B": case.batch_size, "A": len(batch.anchors), "C": case.num_classes}
    return {
        "sizes": {**sizes, "N": sum(batch.counts), "batches": len(batches)},
        "objects_per_image": {"mean": sum(counts) / len(counts), "max": max(counts), "min": min(counts)},
        "objects_from": str(options.boxes) if source is not None and case.takes_file else f"generated: {case.objects}",
        "checked": compared,
        "methods": records,
    }


# ---------------------------------------------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked against what is usable here."""
    parser = make_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASE_GROUPS), help="what to run (all)")
    parser.add_argument(
        "--boxes",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="objects of voc320, coco320 and coco800 from COCO-style JSON or VOC XML, instead of generated ones",
    )
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="backends of mg_ops (all that are usable)")
    parser.add_argument("--no-baselines", action="store_true", help="mg_ops alone")
    parser.add_argument("--rules", action="store_true", help="the other rules, on the CPU, in place of mutual matching")
    parser.add_argument("--quick", action="store_true", help="small batches, no torch.compile: a check, no figures")
    options = parser.parse_args(arguments)
    if options.record and (options.quick or options.boxes or options.cases or options.no_baselines):
        parser.error("--record: expected all cases and methods on generated objects")
    check_options(parser, options)
    usable = usable_backends(options.device)
    options.backends = options.backends or usable
    if unusable := set(options.backends) - set(usable):
        known = "\n".join(f"  {name}: {status.detail}" for name, status in mg_ops.backends().items())
        parser.error(f"--backends: expected some of {', '.join(usable)}, got {', '.join(unusable)}\n{known}")
    options.cases = options.cases or list(QUICK_CASES if options.quick else CASE_GROUPS)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; the exit status."""
    options = parse_options(arguments)
    console, content, output = begin(options, "quick" if options.quick else "match_speed")
    if options.rules:
        rules.time_calls(rules.installed_rules(None), turns=1 if options.quick else 5)
        return 0
    console.print(f"backends: {', '.join(options.backends)}")
    source, num_classes = None, 0
    cases: dict[str, dict[str, Any]] = {}
    try:
        if options.boxes is not None:
            source, classes, notes = read_objects(options.boxes)
            num_classes = len(classes)
            console.print(f"{options.boxes}: {len(source):,} images, {num_classes} classes", notes, sep="\n")
        floor = None
        if options.device == "cuda":
            floor = {"bytes_per_second": measure.copy_bandwidth(), "seconds_per_launch": measure.launch_seconds()}
        content |= {"floor": floor, "cases": cases}
        for name in itertools.chain.from_iterable(CASE_GROUPS[group] for group in options.cases):
            case = CASES[name].quick() if options.quick else CASES[name]
            if case.takes_file:
                case = replace(case, num_classes=max(case.num_classes, num_classes))
            with console.status("") as progress:
                cases[name] = run_case(case, source, options, floor, progress)
            write(content, output)  # so that a later case cannot lose it
            if name not in SWEEP_CASES:
                report.print_table(report.case_table(name, cases[name]), console)
    except (RuntimeError, ValueError) as error:
        console.print(f"[bold red]failed:[/] {error}")
        return 1
    if len(swept := report.swept_cases(cases)) > 1:
        report.print_table(report.sweep_table(swept), console)
        report.plot_sweep(swept, content["machine"], output.with_suffix(".png"))
    console.print("\n[bold]Verdict[/]", *report.verdict_lines(cases), f"wrote {output}", sep="\n")
    if options.quick:
        console.print("--quick: small batches and few calls; run without it for figures to quote")
    return 0


if __name__ == "__main__":
    sys.exit(main())
