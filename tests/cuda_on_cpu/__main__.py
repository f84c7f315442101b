"""Runs the CUDA kernels on the CPU against the reference; `--help` says with what."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from comparison import assert_same  # noqa: E402

import cuda_on_cpu  # noqa: E402


def count(emulator: cuda_on_cpu.Emulator, name: str, images: int) -> None:
    """Prints what the kernels move for a benchmark case, and how many scores they read; checks the answer first."""
    import mg_ops
    from benchmarks.cases import CASES, make_batches

    case = dataclasses.replace(CASES[name], batch_size=images)
    batch = make_batches(case, None, 1, 0, "cpu")[0]
    arguments = batch.arguments()
    match = emulator.mutual_match(**arguments)
    backend = "cpp" if mg_ops.backends()["cpp"].usable else "eager"
    assert_same(match, mg_ops.mutual_match(**arguments, backend=backend), name)
    call = emulator.last_call
    num_anchors = len(batch.anchors)
    pairs = images * num_anchors
    overlapping = sum(int((mg_ops.box_iou(batch.anchors, object_box[None]) > 0).sum()) for object_box in batch.gt_boxes)
    print(
        f"{name}: {images} images, {num_anchors:,} anchors, {len(batch.gt_boxes)} objects: {call.launches} launches; "
        f"deltas {16 * pairs:,} B, outputs {16 * pairs:,} B, scratch {call.scratch_bytes:,} B; "
        f"{overlapping:,} overlapping pairs, {call.scores_read:,} score reads; {emulator.notes() or 'nothing rare'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/cuda_on_cpu", description=__doc__)
    parser.add_argument("--threads", type=int, default=64, help="threads of a block (a multiple of 32; default 64)")
    parser.add_argument("--list-room", type=int, default=8, help="longest list of an object (default 8)")
    parser.add_argument("--batches", type=int, default=50, help="how many random batches (default 50)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (default 0)")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    parser.add_argument("--wrong-offsets", action="store_true", help="only the batches with wrong offsets")
    parser.add_argument("--mistake", type=int, default=0, help="run the kernel with this mistake instead (1 to 5)")
    parser.add_argument(
        "--count", metavar="CASE", help="print launches, bytes and score reads of a benchmark case instead"
    )
    parser.add_argument("--images", type=int, default=1, help="images of that case (default 1)")
    options = parser.parse_args()
    if options.sanitize and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        environment = cuda_on_cpu.sanitizer_environment()
        raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode)
    torch.set_num_threads(1)
    emulator = cuda_on_cpu.build(options.threads, options.list_room, options.sanitize)
    if options.mistake:
        print(emulator.run_mistake(options.mistake))
        return
    if options.count:
        count(emulator, options.count, options.images)
        return
    batches = range(options.first, options.first + options.batches)
    compared = 0 if options.wrong_offsets else cuda_on_cpu.check_against_reference(emulator, batches, options.first)
    compared += cuda_on_cpu.check_wrong_offsets(emulator, batches)
    print(
        f"{compared} batches equal to the reference, blocks of {options.threads} threads, sanitizers {options.sanitize}"
    )


main()
