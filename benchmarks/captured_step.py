"""What a CUDA graph saves of a training step, by batch size: nothing captured, the network alone, or the whole step.

    python benchmarks/captured_step.py --device cuda                             # fssd-resnet18, 320 pixels
    python benchmarks/captured_step.py --device cuda --amp bf16 --batch 1 4 16 32

The step is `detector.train`'s own, copies to the GPU included. The network alone is captured by
torch.cuda.make_graphed_callables, with matching, losses and optimizer eager: what one does where the assigner cannot be
captured. All three step on the same batches from the same weights, in turns, so that noise hits all alike.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

import mg_ops  # noqa: E402
from benchmarks import measure, report, training_step  # noqa: E402
from benchmarks.cases import CODER  # noqa: E402
from benchmarks.machine import begin, check_options, make_parser, write  # noqa: E402
from detector.detectors import make_detector  # noqa: E402
from detector.loss import detection_loss  # noqa: E402
from detector.program import input_side, whole_number  # noqa: E402
from detector.step import CapturedStep, TrainingStep, make_buffers  # noqa: E402
from detector.watches import Stopwatch  # noqa: E402

WAYS = ("eager", "network captured", "whole step captured")
TURNS = 5


def make_batches(batch_size: int, capacity: int, options: argparse.Namespace) -> list[list[Tensor]]:
    """Batches as detector.train gets them: on the host, pinned, their objects padded to the capacity."""
    samples = training_step.make_samples(argparse.Namespace(**{**vars(options), "batch": batch_size}))
    batches = []
    for images, objects in samples:
        padding = capacity - len(objects.gt_boxes)
        boxes, labels = objects.gt_boxes.cpu(), objects.gt_labels.cpu()
        boxes = torch.cat([boxes, boxes.new_zeros(padding, 4)])
        labels = torch.cat([labels, labels.new_zeros(padding)])
        crowd = torch.zeros(capacity, dtype=torch.bool)
        batches.append([images, *(part.pin_memory() for part in (boxes, labels, crowd, objects.gt_offsets.cpu()))])
    return batches


def make_step(way: str, batch_size: int, capacity: int, options: argparse.Namespace) -> TrainingStep | CapturedStep:
    """A detector's step in one of the ways, from the same weights each time."""
    torch.manual_seed(0)
    device, amp = torch.device(options.device), torch.bfloat16 if options.amp == "bf16" else None
    model = make_detector(*options.detector.split("-"), options.image_size, training_step.NUM_CLASSES).to(device)
    network, buffers = model.train(), make_buffers(batch_size, capacity, options.image_size, device)
    if way == "network captured":
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None, cache_enabled=False):
            network = torch.cuda.make_graphed_callables(model, (buffers[0],))
    lr = torch.tensor(1e-4, device=device)
    step = TrainingStep(
        network,
        model.anchors,
        mg_ops.MutualMatcher(box_coder=CODER),
        partial(detection_loss, box_coder=CODER),
        1.0,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True),
        torch.amp.GradScaler(device.type, enabled=False),
        amp,
        Stopwatch(device),
    )
    return CapturedStep(step, buffers) if way == "whole step captured" else step


def seconds_a_step(step: TrainingStep | CapturedStep, batches: Sequence[list[Tensor]], num_steps: int) -> float:
    """The mean of so many steps in a row."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for number in range(num_steps):
        step(*batches[number % len(batches)])
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / num_steps


def measure_batch_size(batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each way, quartiles of the turns."""
    capacity = 64 * batch_size
    batches = make_batches(batch_size, capacity, options)
    steps = {way: make_step(way, batch_size, capacity, options) for way in WAYS}
    for step in steps.values():
        seconds_a_step(step, batches, 5)  # and the capture
    turns = [[seconds_a_step(step, batches, options.steps) for step in steps.values()] for _ in range(TURNS)]
    return dict(zip(WAYS, map(measure.quartiles, zip(*turns, strict=True)), strict=True))


def batch_table(content: dict[str, Any], options: argparse.Namespace) -> report.Table:
    """A row per batch size."""
    rows = []
    for batch_size, ways in content.items():
        medians = [ways[way][1] for way in WAYS]
        ratios = [f"{medians[0] / median:.2f}" for median in medians[1:]]
        rows.append([batch_size, *map(report.format_seconds, medians), *ratios])
    text = f"{options.image_size} x {options.image_size}, amp {options.amp}; medians of {TURNS} turns"
    header = ["images", *WAYS, *(f"{way}, times as fast as eager" for way in WAYS[1:])]
    return report.Table(options.detector, text, header, rows, [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the command line asks for; the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--detector", choices=training_step.DETECTORS, default="fssd-resnet18", help="(%(default)s)")
    parser.add_argument("--image-size", type=input_side, default=320, help="side of the input (%(default)s)")
    parser.add_argument("--batch", type=whole_number(1), nargs="+", default=[1, 4, 16, 32], help="images per step")
    parser.add_argument("--steps", type=whole_number(1), default=20, help="steps in a turn (%(default)s)")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="autocast of the network (%(default)s)")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if options.device != "cuda":
        parser.error("--device: expected cuda, which a CUDA graph runs on, got cpu")
    torch.backends.cudnn.benchmark = True
    console, content, output = begin(options, "captured_step")
    content["batch_sizes"] = {}
    for batch_size in options.batch:
        with console.status(f"{batch_size} images"):
            content["batch_sizes"][str(batch_size)] = measure_batch_size(batch_size, options)
        write(content, output)
    report.print_table(batch_table(content["batch_sizes"], options), console)
    console.print(f"\nwrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
