"""Where the time of a training step goes, for each detector and each way to match.

    python benchmarks/training_step.py                                     # every detector, 160 pixels, batch 8
    python benchmarks/training_step.py --image-size 320 --batch 32 --device cuda --amp bf16 --captured

A step is what `detector.train` does once it has a batch: images to the device, forward, matching, losses, backward,
optimizer. Images are noise, objects have the statistics of VOC. The same batches are stepped on by each matching in
turn, so that noise hits all alike: baselines (a) and (b) of benchmarks/baselines.py, and every fused backend of mg_ops
that runs here. Each matching's labels are compared with mg_ops' on the first batch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

import mg_ops  # noqa: E402
from benchmarks import measure, report  # noqa: E402
from benchmarks.cases import CODER, Batch, Case, make_batches  # noqa: E402
from benchmarks.machine import begin, check_options, make_parser  # noqa: E402
from benchmarks.methods import (  # noqa: E402
    LEAST_AGREEMENT,
    match,
    match_loop,
    match_padded,
    share_equal,
    usable_backends,
)
from detector.anchors import make_anchors  # noqa: E402
from detector.detectors import make_detector  # noqa: E402
from detector.loss import detection_loss  # noqa: E402
from detector.watches import Stopwatch  # noqa: E402

DETECTORS = ("fssd-resnet18", "fssd-vgg16", "retinanet-resnet18", "retinanet-vgg16", "rfbnet-vgg16")
PHASES = ("to device", "forward", "matching", "losses", "backward", "optimizer")
NUM_CLASSES, NUM_BATCHES = 20, 3


Matching = Callable[[Batch], Any]
"""A method of match_speed.py: labels from a batch with predictions."""


class Sample(NamedTuple):
    """What a step is taken on."""

    images: Tensor  # (B, 3, S, S) uint8, on the host
    objects: Batch
    """On the device; its predictions are put in by each step."""


def make_samples(options: argparse.Namespace) -> list[Sample]:
    """What to step on."""
    side = options.image_size
    case = Case("step", options.batch, NUM_CLASSES, "voc", partial(make_anchors, side), (side, side))
    generator = torch.Generator().manual_seed(0)
    samples = []
    for objects in make_batches(case, None, NUM_BATCHES, 0, options.device):
        images = torch.randint(0, 256, (options.batch, 3, side, side), dtype=torch.uint8, generator=generator)
        pinned = torch.device(options.device).type == "cuda"
        samples.append(Sample(images.pin_memory() if pinned else images, objects))
    return samples


def with_predictions(objects: Batch, anchors: Tensor, deltas: Tensor, logits: Tensor) -> Batch:
    """The same objects, not packed and padded again."""
    batch = copy.copy(objects)
    batch.anchors, batch.deltas, batch.logits = anchors, deltas, logits
    return batch


def in_float32(baseline: Matching) -> Matching:
    """A baseline, which does not take other types, nor leave the gradients out by itself."""

    @torch.no_grad()
    def match(batch: Batch) -> Any:
        labels = baseline(with_predictions(batch, batch.anchors, batch.deltas.float(), batch.logits.float()))
        # The losses do not read the counts, which the baselines keep to themselves.
        counts = torch.zeros(len(batch.gt_boxes), dtype=torch.int32, device=batch.anchors.device)
        return mg_ops.MutualMatch(labels.cls_match, labels.loc_match, counts, counts)

    return match


def make_matchings(device: str) -> dict[str, Matching]:
    """Every matching that runs on this device, by the label of its row; the last one is the default backend's."""
    fused = [name for name in reversed(usable_backends(device)) if name != "eager"] or ["eager"]
    return {
        "(a) loop": in_float32(match_loop),
        "(b) batched, padded": in_float32(match_padded),
        **{f"mg_ops {name}": partial(match, backend=name) for name in fused},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Steps


class Trainer:
    """A detector and its optimizer, stepped as detector.train steps them."""

    def __init__(self, detector: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        model, backbone = detector.split("-")
        self.device = torch.device(options.device)
        self.model = make_detector(model, backbone, options.image_size, NUM_CLASSES).to(self.device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
        self.bfloat16 = options.amp == "bf16"
        self.watches = {phase: Stopwatch(self.device) for phase in PHASES}
        self.watching = True

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase; nothing waits for it."""
        if self.watching:
            self.watches[name].start()
        yield
        if self.watching:
            self.watches[name].stop()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and deltas, under autocast if there is one."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            return self.model(images)

    def loss(self, sample: Sample, matching: Matching) -> Tensor:
        """The loss () of a sample."""
        objects, anchors = sample.objects, self.model.anchors
        with self.phase("to device"):
            images = sample.images.to(self.device, non_blocking=True)
        with self.phase("forward"):
            cls_logits, box_deltas = self.forward(images)
        with self.phase("matching"):
            labels = matching(with_predictions(objects, anchors, box_deltas, cls_logits))
        with self.phase("losses"):
            packed = objects.gt_boxes, objects.gt_labels, objects.gt_offsets
            parts = detection_loss(cls_logits, box_deltas, anchors, labels, *packed, CODER)
            return parts.cls_loss + parts.box_loss

    def step(self, sample: Sample, matching: Matching) -> Tensor:
        """One step; the loss () before it."""
        loss = self.loss(sample, matching)
        with self.phase("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        with self.phase("optimizer"):
            self.optimizer.step()
        return loss.detach()

    def read(self) -> list[float]:
        """Seconds of each phase since the last reading."""
        return [watch.read() for watch in self.watches.values()]

    @torch.no_grad()
    def agreement(self, sample: Sample, matching: Matching) -> float:
        """Share of labels equal to mg_ops' own, on the same predictions."""
        cls_logits, box_deltas = self.forward(sample.images.to(self.device))
        batch = with_predictions(sample.objects, self.model.anchors, box_deltas, cls_logits)
        return share_equal(match(batch), matching(batch))


class CapturedStep:
    """A whole step as one CUDA graph: it is replayed with other images and objects in the same memory."""

    def __init__(self, trainer: Trainer, matching: Matching, samples: Sequence[Sample]) -> None:
        """Captures a step; the objects of any of the samples fit in.

        Raises:
            RuntimeError: the captured step's loss is not that of a plain one.
        """
        trainer.watching = False
        first, capacity = samples[0], max(sum(sample.objects.counts) for sample in samples)
        objects = copy.copy(first.objects)
        objects.gt_boxes, objects.gt_labels = (
            objects.gt_boxes.new_zeros(capacity, 4),
            objects.gt_labels.new_zeros(capacity),
        )
        objects.gt_offsets = objects.gt_offsets.clone()
        self.sample = Sample(first.images.to(trainer.device).clone(), objects)
        # What is made on first use (kernels, momentum, cuDNN's choices) must exist before the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for sample in samples:
                self.load(sample)
                trainer.step(self.sample, matching)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = trainer.step(self.sample, matching)
        with torch.no_grad():
            expected = float(trainer.loss(first, matching))
        self.run(first)
        if not abs(float(self.loss) - expected) <= 0.02 * abs(expected):
            raise RuntimeError(f"a captured step's loss is {float(self.loss):.5g}, a plain one's {expected:.5g}")

    def load(self, sample: Sample) -> None:
        """Puts a sample where the graph reads; objects past its own do not count."""
        count = sum(sample.objects.counts)
        self.sample.images.copy_(sample.images, non_blocking=True)
        self.sample.objects.gt_boxes[:count].copy_(sample.objects.gt_boxes)
        self.sample.objects.gt_labels[:count].copy_(sample.objects.gt_labels)
        self.sample.objects.gt_offsets.copy_(sample.objects.gt_offsets)

    def run(self, sample: Sample) -> None:
        """A step on a sample, its copy to the device included."""
        self.load(sample)
        self.graph.replay()


def measure_detector(
    detector: str, samples: Sequence[Sample], matchings: dict[str, Matching], options: argparse.Namespace
) -> dict[str, Any]:
    """Phases, speed and memory of a detector with each matching.

    Raises:
        RuntimeError: a matching's labels are not mg_ops', or a captured step's loss not a plain one's.
    """
    trainer, rows = Trainer(detector, options), {}
    agreements = {name: trainer.agreement(samples[0], matching) for name, matching in matchings.items()}
    for name, agreement in agreements.items():
        if agreement < LEAST_AGREEMENT:
            raise RuntimeError(f"{detector}, {name}: only {agreement:.5f} of the labels are mg_ops'")
    seconds: dict[str, list[list[float]]] = {name: [] for name in matchings}
    for step, (name, matching) in itertools.product(range(-options.warmup, options.steps), matchings.items()):
        trainer.step(samples[step % len(samples)], matching)
        phases = trainer.read()
        if step >= 0:
            seconds[name].append(phases)
    for name, matching in matchings.items():
        steps = [sum(phases) for phases in seconds[name]]
        medians = [measure.quartiles(phase)[1] for phase in zip(*seconds[name], strict=True)]
        try:
            peak: int | None = measure.peak_bytes(lambda m=matching: trainer.step(samples[0], m), options.device)[1]  # type: ignore[misc]
        except OSError:
            peak = None
        rows[name] = {
            "phases": dict(zip(PHASES, medians, strict=True)),
            "step_seconds": measure.quartiles(steps)[1],
            "slowest_step_seconds": max(steps),
            "images_per_second": options.batch / measure.quartiles(steps)[1],
            "peak_bytes": peak,
            "share_of_labels_equal": agreements[name],
        }
    measured: dict[str, Any] = {"anchors": len(trainer.model.anchors), "matchings": rows}
    if options.captured:
        captured = CapturedStep(trainer, list(matchings.values())[-1], samples)
        turns = itertools.islice(itertools.cycle(samples), options.warmup + options.steps)
        times = [measure.time_call(captured.run, sample)[0] for sample in turns][options.warmup :]
        median = measure.quartiles(times)[1]
        measured["captured"] = {"step_seconds": median, "images_per_second": options.batch / median}
    return measured


# ---------------------------------------------------------------------------------------------------------------------


def detector_table(detector: str, content: dict[str, Any], options: argparse.Namespace) -> report.Table:
    """A row per matching."""
    rows, bold, notes = [], set(), []
    for name, row in content["matchings"].items():
        if name.startswith("mg_ops"):
            bold.add(len(rows))
        peak = "-" if row["peak_bytes"] is None else report.format_quantity(row["peak_bytes"], "B")
        times = [report.format_seconds(value) for value in [*row["phases"].values(), row["step_seconds"]]]
        share = f"{100 * row['phases']['matching'] / row['step_seconds']:.1f}%"
        rows.append([name, *times, share, report.format_number(row["images_per_second"]), peak])
    if captured := content.get("captured"):
        seconds, speed = report.format_seconds(captured["step_seconds"]), captured["images_per_second"]
        notes.append(f"with {rows[-1][0]} as one CUDA graph: {seconds}, {report.format_number(speed)} images/s")
    text = (
        f"{options.batch} images of {options.image_size} x {options.image_size}, {content['anchors']:,} anchors each; "
    )
    text += f"medians of {options.steps} steps; memory of the {'GPU' if options.device == 'cuda' else 'whole process'}"
    header = ["", *PHASES, "step", "matching's share", "images/s", "peak memory"]
    return report.Table(detector, text, header, rows, bold, notes)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = make_parser(__doc__)
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS, help="what to train (all)")
    parser.add_argument("--image-size", type=int, default=160, help="side of the input, a multiple of 32 (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images per step (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps timed with each matching (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before these (%(default)s)")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="autocast of the network (%(default)s)")
    parser.add_argument("--captured", action="store_true", help="also the whole step as one CUDA graph (--device cuda)")
    options = parser.parse_args(arguments)
    for flag in ("batch", "steps"):
        if getattr(options, flag) < 1:
            parser.error(f"--{flag}: expected at least 1, got {getattr(options, flag)}")
    check_options(parser, options)
    if options.captured and options.device != "cuda":
        parser.error("--captured: a CUDA graph needs --device cuda")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the command line asks for; the exit status."""
    options = parse_options(arguments)
    torch.backends.cudnn.benchmark = True
    console, machine, output = begin(options, "training_step")
    shown = {name: value for name, value in vars(options).items() if name not in ("output", "record")}
    detectors: dict[str, Any] = {}
    try:
        matchings, samples = make_matchings(options.device), make_samples(options)
        objects = sum(sum(sample.objects.counts) for sample in samples) / (len(samples) * options.batch)
        content = {"machine": machine, "options": shown, "objects_per_image": objects, "detectors": detectors}
        for detector in options.detectors:
            with console.status(detector):
                detectors[detector] = measure_detector(detector, samples, matchings, options)
            report.print_table(detector_table(detector, detectors[detector], options), console)
            output.write_text(json.dumps(content, indent=1) + "\n")
            gc.collect()
    except (RuntimeError, ValueError) as error:
        console.print(f"[bold red]failed:[/] {error}")
        return 1
    console.print(f"\nwrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
