"""Where the time of a training step goes, for each detector and each way to match.

    python benchmarks/training_step.py                                     # every detector, 160 pixels, batch 8
    python benchmarks/training_step.py --image-size 320 --batch 32 --device cuda --amp bf16

A step is what `detector.train` does once it has a batch: images to the device, forward, matching, losses, backward,
optimizer. Images are noise, objects have the statistics of VOC. The same batches are stepped on by each matching in
turn, so that noise hits all alike: baselines (a) and (b) of benchmarks/baselines.py, and every fused backend of mg_ops
that runs here. Each matching's labels are compared with mg_ops' on the first batch.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

import mg_ops  # noqa: E402
from benchmarks import baselines, measure, report  # noqa: E402
from benchmarks.cases import CODER, Batch, Case, make_batches  # noqa: E402
from benchmarks.machine import begin, check_options, make_parser, write  # noqa: E402
from benchmarks.methods import LEAST_AGREEMENT, match, share_equal, usable_backends  # noqa: E402
from detector.anchors import make_anchors  # noqa: E402
from detector.detectors import make_detector  # noqa: E402
from detector.loss import detection_loss  # noqa: E402
from detector.program import input_side, whole_number  # noqa: E402
from detector.watches import Stopwatch  # noqa: E402

DETECTORS = ("fssd-resnet18", "fssd-vgg16", "retinanet-resnet18", "retinanet-vgg16", "rfbnet-vgg16")
PHASES = ("to device", "forward", "matching", "losses", "backward", "optimizer")
NUM_CLASSES, NUM_BATCHES = 20, 3


Matching = Callable[[Batch], Any]
"""A method of match_speed.py: labels from a batch with predictions."""
Sample = tuple[Tensor, Batch]
"""What a step is taken on: images (B, 3, S, S) uint8 on the host, and on the device their objects."""


def make_samples(options: argparse.Namespace) -> list[Sample]:
    """What to step on."""
    side = options.image_size
    case = Case("step", options.batch, NUM_CLASSES, "voc", partial(make_anchors, side), (side, side))
    generator = torch.Generator().manual_seed(0)
    samples = []
    for objects in make_batches(case, None, NUM_BATCHES, 0, options.device):
        images = torch.randint(0, 256, (options.batch, 3, side, side), dtype=torch.uint8, generator=generator)
        samples.append((images.pin_memory() if objects.anchors.is_cuda else images, objects))
    return samples


def in_float32(baseline: Matching) -> Matching:
    """A baseline, which does not take other types, nor leave the gradients out by itself."""

    @torch.no_grad()
    def match(batch: Batch) -> Any:
        labels = baseline(batch.with_predictions(batch.anchors, batch.deltas.float(), batch.logits.float()))
        # The losses do not read the counts, which the baselines keep to themselves.
        counts = torch.zeros(len(batch.gt_boxes), dtype=torch.int32, device=batch.anchors.device)
        return mg_ops.MutualMatch(labels.cls_match, labels.loc_match, counts, counts)

    return match


def make_matchings(device: str) -> dict[str, Matching]:
    """Every matching that runs on this device, by the label of its row; the last one is the default backend's."""
    fused = [name for name in reversed(usable_backends(device)) if name != "eager"] or ["eager"]
    return {
        "(a) loop": in_float32(baselines.match_loop),
        "(b) batched, padded": in_float32(baselines.match_padded),
        **{f"mg_ops {name}": partial(match, backend=name) for name in fused},
    }


class Trainer:
    """A detector and its optimizer, stepped as detector.train steps them."""

    def __init__(self, detector: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device(options.device)
        self.model = make_detector(*detector.split("-"), options.image_size, NUM_CLASSES).to(self.device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
        self.bfloat16 = options.amp == "bf16"
        self.watches = {phase: Stopwatch(self.device) for phase in PHASES}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase; nothing waits for it."""
        self.watches[name].start()
        yield
        self.watches[name].stop()

    def predict(self, images: Tensor, objects: Batch) -> Batch:
        """Objects and predictions, made under autocast if there is one."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
            cls_logits, box_deltas = self.model(images)
        return objects.with_predictions(self.model.anchors, box_deltas, cls_logits)

    def step(self, sample: Sample, matching: Matching) -> list[float]:
        """One step; seconds of each phase."""
        with self.phase("to device"):
            images = sample[0].to(self.device, non_blocking=True)
        with self.phase("forward"):
            batch = self.predict(images, sample[1])
        with self.phase("matching"):
            labels = matching(batch)
        with self.phase("losses"):
            packed = batch.gt_boxes, batch.gt_labels, batch.gt_offsets
            parts = detection_loss(batch.logits, batch.deltas, batch.anchors, labels, *packed, CODER)
        with self.phase("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            (parts.cls_loss + parts.box_loss).backward()
        with self.phase("optimizer"):
            self.optimizer.step()
        return [watch.read() for watch in self.watches.values()]

    @torch.no_grad()
    def agreement(self, sample: Sample, matching: Matching) -> float:
        """Share of labels equal to mg_ops' own, on the same predictions."""
        batch = self.predict(sample[0].to(self.device), sample[1])
        return share_equal(match(batch), matching(batch))


def measure_detector(
    detector: str, samples: Sequence[Sample], matchings: dict[str, Matching], options: argparse.Namespace
) -> dict[str, Any]:
    """Phases, speed and memory of a detector with each matching.

    Raises:
        RuntimeError: a matching's labels are not mg_ops'.
    """
    trainer, rows = Trainer(detector, options), {}
    agreements = {name: trainer.agreement(samples[0], matching) for name, matching in matchings.items()}
    for name, agreement in agreements.items():
        if agreement < LEAST_AGREEMENT:
            raise RuntimeError(f"{detector}, {name}: only {agreement:.5f} of the labels are mg_ops'")
    seconds: dict[str, list[list[float]]] = {name: [] for name in matchings}
    for step, (name, matching) in itertools.product(range(-options.warmup, options.steps), matchings.items()):
        phases = trainer.step(samples[step % len(samples)], matching)
        seconds[name] += [phases] if step >= 0 else []
    for name, matching in matchings.items():
        median = measure.quartiles([sum(phases) for phases in seconds[name]])[1]
        phases = [measure.quartiles(phase)[1] for phase in zip(*seconds[name], strict=True)]
        peak: int | None = None
        with contextlib.suppress(OSError):
            peak = measure.peak_bytes(partial(trainer.step, samples[0], matching), options.device)[0]
        rows[name] = {
            "phases": dict(zip(PHASES, phases, strict=True)),
            "step_seconds": median,
            "images_per_second": options.batch / median,
            "peak_bytes": peak,
            "share_of_labels_equal": agreements[name],
        }
    return {"anchors": len(trainer.model.anchors), "matchings": rows}


# ---------------------------------------------------------------------------------------------------------------------


def detector_table(detector: str, content: dict[str, Any], options: argparse.Namespace) -> report.Table:
    """A row per matching."""
    rows = []
    for name, row in content["matchings"].items():
        peak = "-" if row["peak_bytes"] is None else report.format_quantity(row["peak_bytes"], "B")
        times = [report.format_seconds(value) for value in [*row["phases"].values(), row["step_seconds"]]]
        share = f"{100 * row['phases']['matching'] / row['step_seconds']:.1f}%"
        label = report.format_label(name, name.startswith("mg_ops"))
        rows.append([label, *times, share, report.format_number(row["images_per_second"]), peak])
    text = (
        f"{options.batch} images of {options.image_size} x {options.image_size}, {content['anchors']:,} anchors each; "
        f"medians of {options.steps} steps; memory of the {'GPU' if options.device == 'cuda' else 'whole process'}"
    )
    header = ["", *PHASES, "step", "matching's share", "images/s", "peak memory"]
    return report.Table(detector, text, header, rows, [])


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = make_parser(__doc__)
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS, help="what to train (all)")
    parser.add_argument(
        "--image-size", type=input_side, default=160, help="side of the input, a multiple of 32 (%(default)s)"
    )
    parser.add_argument("--batch", type=whole_number(1), default=8, help="images per step (%(default)s)")
    parser.add_argument("--steps", type=whole_number(1), default=5, help="steps timed with each matching (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before these (%(default)s)")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="autocast of the network (%(default)s)")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the command line asks for; the exit status."""
    options = parse_options(arguments)
    torch.backends.cudnn.benchmark = True
    console, content, output = begin(options, "training_step")
    try:
        matchings, samples = make_matchings(options.device), make_samples(options)
        counts = [count for _, objects in samples for count in objects.counts]
        content |= {"objects_per_image": sum(counts) / len(counts), "detectors": {}}
        for detector in options.detectors:
            with console.status(detector):
                content["detectors"][detector] = measure_detector(detector, samples, matchings, options)
            report.print_table(detector_table(detector, content["detectors"][detector], options), console)
            write(content, output)
    except (RuntimeError, ValueError) as error:
        console.print(f"[bold red]failed:[/] {error}")
        return 1
    console.print(f"\nwrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
