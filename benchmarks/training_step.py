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
import gc
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

import mg_ops  # noqa: E402
from benchmarks import baselines, measure, report  # noqa: E402
from benchmarks.machine import add_output_options, describe_machine, prepare_output, print_machine  # noqa: E402
from benchmarks.methods import LEAST_AGREEMENT, share_equal, usable_backends  # noqa: E402
from benchmarks.objects import generate_voc  # noqa: E402
from detector.detectors import make_detector  # noqa: E402
from detector.loss import detection_loss  # noqa: E402
from detector.train import Stopwatch  # noqa: E402

DETECTORS = ("fssd-resnet18", "fssd-vgg16", "retinanet-resnet18", "retinanet-vgg16", "rfbnet-vgg16")
PHASES = ("to device", "forward", "matching", "losses", "backward", "optimizer")
NUM_CLASSES, NUM_BATCHES = 20, 3
CODER = mg_ops.BoxCoder()


class Batch(NamedTuple):
    """Images on the host, and their objects on the device in every form that a matching takes."""

    images: Tensor  # (B, 3, S, S) uint8
    gt_boxes: Tensor  # (N, 4)
    gt_labels: Tensor  # (N,)
    gt_offsets: Tensor  # (B + 1,)
    lists: tuple[list[Tensor], list[Tensor], None]
    """Boxes and labels image by image; no crowd regions."""
    padded: tuple[Tensor, Tensor, None]
    """The same as (B, G, 4), (B, G)."""


Matching = Callable[[Tensor, Tensor, Tensor, Batch], mg_ops.MutualMatch]
"""(anchors, deltas, logits, batch) -> labels."""


def make_batches(options: argparse.Namespace) -> list[Batch]:
    """The batches to step on; their images have at least one object each."""
    rng, side = np.random.default_rng(0), options.image_size
    batches = []
    for _ in range(NUM_BATCHES):
        found = generate_voc(options.batch, NUM_CLASSES, rng)
        boxes = [torch.from_numpy(one.boxes) * side / torch.tensor([one.width, one.height] * 2) for one in found]
        boxes_list = [values.float().to(options.device) for values in boxes]
        labels_list = [torch.from_numpy(one.labels).to(options.device) for one in found]
        offsets = torch.tensor([0, *itertools.accumulate(map(len, boxes))]).to(options.device)
        images = torch.from_numpy(rng.integers(0, 256, (options.batch, 3, side, side), dtype=np.uint8))
        images = images.pin_memory() if torch.device(options.device).type == "cuda" else images
        padded = pad_sequence(boxes_list, batch_first=True), pad_sequence(labels_list, batch_first=True), None
        packed = torch.cat(boxes_list), torch.cat(labels_list), offsets
        batches.append(Batch(images, *packed, (boxes_list, labels_list, None), padded))
    return batches


def match_by_baseline(baseline: Callable[..., baselines.Match], form: str) -> Matching:
    """A matching of benchmarks/baselines.py, which takes the objects as `lists` or `padded`."""

    @torch.no_grad()
    def match(anchors: Tensor, deltas: Tensor, logits: Tensor, batch: Batch) -> mg_ops.MutualMatch:
        labels = baseline(anchors, deltas.float(), logits.float(), *getattr(batch, form), CODER.weights, CODER.clip)
        # The losses do not read the counts, which the baselines keep to themselves.
        counts = torch.zeros(len(batch.gt_boxes), dtype=torch.int32, device=deltas.device)
        return mg_ops.MutualMatch(labels.cls_match, labels.loc_match, counts, counts)

    return match


def match_by_backend(backend: str | None) -> Matching:
    """mg_ops.mutual_match on one backend, None for the default one."""

    def match(anchors: Tensor, deltas: Tensor, logits: Tensor, batch: Batch) -> mg_ops.MutualMatch:
        objects = batch.gt_boxes, batch.gt_labels, batch.gt_offsets
        predictions = {"cls_logits": logits, "box_deltas": deltas, "box_coder": CODER}
        return mg_ops.mutual_match(anchors, *objects, **predictions, backend=backend)

    return match


def make_matchings(device: str) -> dict[str, Matching]:
    """Every matching that runs on this device, by the label of its row; the last one is the default backend's."""
    matchings = {
        "(a) loop": match_by_baseline(baselines.match_per_image, "lists"),
        "(b) batched, padded": match_by_baseline(baselines.match_batched, "padded"),
    }
    fused = [name for name in reversed(usable_backends(device)) if name != "eager"]
    return {**matchings, **{f"mg_ops {name}": match_by_backend(name) for name in fused or ["eager"]}}


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

    def loss(self, batch: Batch, matching: Matching) -> Tensor:
        """The loss () of a batch."""
        with self.phase("to device"):
            images = batch.images.to(self.device, non_blocking=True)
        with self.phase("forward"):
            cls_logits, box_deltas = self.forward(images)
        with self.phase("matching"):
            match = matching(self.model.anchors, box_deltas, cls_logits, batch)
        with self.phase("losses"):
            objects = batch.gt_boxes, batch.gt_labels, batch.gt_offsets
            parts = detection_loss(cls_logits, box_deltas, self.model.anchors, match, *objects, CODER)
            return parts.cls_loss + parts.box_loss

    def step(self, batch: Batch, matching: Matching) -> Tensor:
        """One step; the loss () before it."""
        loss = self.loss(batch, matching)
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
    def agreement(self, batch: Batch, matching: Matching) -> float:
        """Share of labels equal to mg_ops' own, on the same predictions."""
        cls_logits, box_deltas = self.forward(batch.images.to(self.device))
        predictions = self.model.anchors, box_deltas, cls_logits, batch
        return share_equal(match_by_backend(None)(*predictions), matching(*predictions))


class CapturedStep:
    """A whole step as one CUDA graph: it is replayed with other images and objects in the same memory."""

    def __init__(self, trainer: Trainer, matching: Matching, batches: Sequence[Batch]) -> None:
        """Captures a step; the objects of any of the batches fit in.

        Raises:
            RuntimeError: the captured step's loss is not that of a plain one.
        """
        trainer.watching = False
        first, capacity = batches[0], max(len(batch.gt_boxes) for batch in batches)
        self.batch = first._replace(
            images=first.images.to(trainer.device).clone(),
            gt_boxes=first.gt_boxes.new_zeros(capacity, 4),
            gt_labels=first.gt_labels.new_zeros(capacity),
            gt_offsets=first.gt_offsets.clone(),
        )
        # What is made on first use (kernels, momentum, cuDNN's choices) must exist before the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for batch in batches:
                self.load(batch)
                trainer.step(self.batch, matching)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = trainer.step(self.batch, matching)
        self.load(first)
        with torch.no_grad():
            expected = float(trainer.loss(first, matching))
        self.graph.replay()
        if not abs(float(self.loss) - expected) <= 0.02 * abs(expected):
            raise RuntimeError(f"a captured step's loss is {float(self.loss):.5g}, a plain one's {expected:.5g}")

    def load(self, batch: Batch) -> None:
        """Puts a batch where the graph reads; objects past its own do not count."""
        count = len(batch.gt_boxes)
        self.batch.images.copy_(batch.images, non_blocking=True)
        self.batch.gt_boxes[:count].copy_(batch.gt_boxes)
        self.batch.gt_labels[:count].copy_(batch.gt_labels)
        self.batch.gt_offsets.copy_(batch.gt_offsets)

    def run(self, batch: Batch) -> None:
        """A step on a batch, its copy to the device included."""
        self.load(batch)
        self.graph.replay()


def measure_detector(
    detector: str, batches: Sequence[Batch], matchings: dict[str, Matching], options: argparse.Namespace
) -> dict[str, Any]:
    """Phases, speed and memory of a detector with each matching.

    Raises:
        RuntimeError: a matching's labels are not mg_ops', or a captured step's loss not a plain one's.
    """
    trainer, rows = Trainer(detector, options), {}
    agreements = {name: trainer.agreement(batches[0], matching) for name, matching in matchings.items()}
    for name, agreement in agreements.items():
        if agreement < LEAST_AGREEMENT:
            raise RuntimeError(f"{detector}, {name}: only {agreement:.5f} of the labels are mg_ops'")
    seconds: dict[str, list[list[float]]] = {name: [] for name in matchings}
    for step, (name, matching) in itertools.product(range(-options.warmup, options.steps), matchings.items()):
        trainer.step(batches[step % len(batches)], matching)
        phases = trainer.read()
        if step >= 0:
            seconds[name].append(phases)
    for name, matching in matchings.items():
        steps = [sum(phases) for phases in seconds[name]]
        medians = [measure.quartiles(phase)[1] for phase in zip(*seconds[name], strict=True)]
        try:
            peak: int | None = measure.peak_bytes(lambda m=matching: trainer.step(batches[0], m), options.device)[1]  # type: ignore[misc]
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
        captured = CapturedStep(trainer, list(matchings.values())[-1], batches)
        turns = itertools.islice(itertools.cycle(batches), options.warmup + options.steps)
        times = [measure.time_call(captured.run, batch)[0] for batch in turns][options.warmup :]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS, help="what to train (all)")
    parser.add_argument("--image-size", type=int, default=160, help="side of the input, a multiple of 32 (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images per step (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps timed with each matching (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before these (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (%(default)s)")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="autocast of the network (%(default)s)")
    parser.add_argument("--captured", action="store_true", help="also the whole step as one CUDA graph (--device cuda)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    for flag in ("batch", "steps", "threads"):
        if getattr(options, flag) < 1:
            parser.error(f"--{flag}: expected at least 1, got {getattr(options, flag)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if options.captured and options.device != "cuda":
        parser.error("--captured: a CUDA graph needs --device cuda")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the command line asks for; the exit status."""
    options = parse_options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    machine = describe_machine(options.device)
    output = prepare_output(options, machine, "training_step")
    print_machine(machine, console)
    shown = {name: value for name, value in vars(options).items() if name not in ("output", "record")}
    detectors: dict[str, Any] = {}
    try:
        matchings, batches = make_matchings(options.device), make_batches(options)
        objects = sum(len(batch.gt_labels) for batch in batches) / (len(batches) * options.batch)
        content = {"machine": machine, "options": shown, "objects_per_image": objects, "detectors": detectors}
        for detector in options.detectors:
            with console.status(detector):
                detectors[detector] = measure_detector(detector, batches, matchings, options)
            report.print_table(detector_table(detector, detectors[detector], options), console)
            output.write_text(json.dumps(content, indent=1) + "\n")
            gc.collect()
    except (RuntimeError, ValueError) as error:
        console.print(f"[bold red]failed:[/] {error}", highlight=False)
        return 1
    console.print(f"\nwrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
