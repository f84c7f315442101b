"""Where the time of a training step goes, for each detector and each way to match.

    python benchmarks/training_step.py                                     # every detector, 160 pixels, batch 8
    python benchmarks/training_step.py --image-size 320 --batch 32 --device cuda --amp bf16
    python benchmarks/training_step.py --data VOCdevkit --format voc       # your images in place of generated ones

A step is what `detector.train` does: images to the device, forward, matching, losses, backward, optimizer. The same
batches are stepped on by each matching in turn, so that noise hits all alike: the loops over images and the padded
batch of benchmarks/baselines.py, and every fused backend of mg_ops that runs here. Each matching's labels are compared
with mg_ops' on the first batch. On a GPU the phases are measured by its events, without a wait inside a step. What one
process needs to read, decode and augment a batch is measured apart: in training other processes do it meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

import mg_ops  # noqa: E402
from benchmarks import baselines  # noqa: E402
from benchmarks.machine import add_output_options, describe_machine, prepare_output  # noqa: E402
from benchmarks.objects import generate_voc  # noqa: E402
from detector.augment import TrainingTransform  # noqa: E402
from detector.batches import TrainingBatch, TrainingImages, collate, decode_all  # noqa: E402
from detector.data import AnnotatedImage, AnnotatedImages, default_splits, read_data  # noqa: E402
from detector.detectors import make_detector  # noqa: E402
from detector.loss import detection_loss  # noqa: E402

DETECTORS = ("fssd-resnet18", "fssd-vgg16", "retinanet-resnet18", "retinanet-vgg16", "rfbnet-vgg16")
PHASES = ("to device", "forward", "matching", "losses", "backward", "optimizer")
LEAST_AGREEMENT = 0.999
CODER = mg_ops.BoxCoder()


class Batch(NamedTuple):
    """A batch on the device, and its objects in the form each matching takes."""

    images: Tensor  # (B, 3, S, S) uint8
    gt_boxes: Tensor  # (N, 4)
    gt_labels: Tensor  # (N,)
    gt_crowd: Tensor  # (N,)
    gt_offsets: Tensor  # (B + 1,)
    lists: tuple[list[Tensor], list[Tensor], list[Tensor]]
    """Boxes, labels and crowd flags image by image."""
    padded: tuple[Tensor, Tensor, Tensor]
    """The same as (B, G, 4), (B, G), (B, G)."""


Matching = Callable[[nn.Module, Tensor, Tensor, Batch], mg_ops.MutualMatch]
"""(model, deltas, logits, batch) -> labels."""


# ---------------------------------------------------------------------------------------------------------------------
# Matchings


def match_by_baseline(baseline: Callable[..., baselines.Match], form: str) -> Matching:
    """A matching of benchmarks/baselines.py, which takes the objects as `lists` or `padded`."""

    @torch.no_grad()
    def match(model: nn.Module, deltas: Tensor, logits: Tensor, batch: Batch) -> mg_ops.MutualMatch:
        labels = baseline(
            model.anchors, deltas.float(), logits.float(), *getattr(batch, form), CODER.weights, CODER.clip
        )
        # The losses do not read the counts, which the baselines keep to themselves.
        counts = torch.zeros(len(batch.gt_boxes), dtype=torch.int32, device=deltas.device)
        return mg_ops.MutualMatch(labels.cls_match, labels.loc_match, counts, counts)

    return match


def match_by_backend(backend: str) -> Matching:
    """mg_ops.mutual_match on one backend."""

    def match(model: nn.Module, deltas: Tensor, logits: Tensor, batch: Batch) -> mg_ops.MutualMatch:
        return mg_ops.mutual_match(
            model.anchors,
            batch.gt_boxes,
            batch.gt_labels,
            batch.gt_offsets,
            cls_logits=logits,
            box_deltas=deltas,
            gt_crowd=batch.gt_crowd,
            box_coder=CODER,
            backend=backend,
        )

    return match


def make_matchings(device: str) -> dict[str, Matching]:
    """Every matching that runs on this device, by the label of its row; the last one is the default backend's."""
    # Object by object is faster on a CPU, the objects of an image at once on a GPU.
    tuned = functools.partial(baselines.match_per_image_tuned, objects_at_once=1 if device == "cpu" else None)
    matchings = {
        "(a) loop": match_by_baseline(baselines.match_per_image, "lists"),
        "(a2) loop, tuned": match_by_baseline(tuned, "lists"),
        "(b) batched, padded": match_by_baseline(baselines.match_batched, "padded"),
    }
    on_device = ("cpp",) if device == "cpu" else ("triton", "cuda")
    for name in on_device:
        if mg_ops.backends()[name].usable:
            matchings[f"mg_ops {name}"] = match_by_backend(name)
    return matchings


# ---------------------------------------------------------------------------------------------------------------------
# Data


def write_images(folder: Path, count: int, seed: int) -> AnnotatedImages:
    """Generated photographs of VOC's size with objects of VOC's statistics, as JPEG files."""
    rng = np.random.default_rng(seed)
    images = []
    for number, objects in enumerate(generate_voc(count, 20, rng)):
        width, height = int(objects.width), int(objects.height)
        # Coarse and fine noise: a JPEG file of a photograph's size, about 60 KB.
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (pixels + rng.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
        path = folder / f"{number:04d}.jpg"
        Image.fromarray(pixels).save(path, quality=90)
        boxes = torch.from_numpy(objects.boxes)
        flags = torch.zeros(len(boxes), dtype=torch.bool)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        images.append(
            AnnotatedImage(
                number, path.name, path, width, height, boxes, torch.from_numpy(objects.labels), flags, flags, areas
            )
        )
    return AnnotatedImages("generated", images, [f"class {index}" for index in range(20)], list(range(20)))


@contextlib.contextmanager
def open_data(options: argparse.Namespace) -> Iterator[AnnotatedImages]:
    """The user's data, or generated images that are there as long as the context is."""
    if options.data is not None:
        split = options.split or default_splits(options.data, options.format)[0]
        yield read_data(options.data, options.format, split)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield write_images(Path(folder), min(64, options.batch * 4), options.seed)


def prepare_batches(data: AnnotatedImages, options: argparse.Namespace) -> tuple[list[TrainingBatch], dict[str, float]]:
    """The batches to step on, and milliseconds an image that one process needed for them.

    Reading and decoding are measured apart from augmentation: `--cache` of detector.train leaves the former out.
    """
    images = TrainingImages(data, TrainingTransform(options.image_size), options.seed)
    keys = [  # (index, epoch) of each image of each batch
        [((number * options.batch + place) % len(images), number) for place in range(options.batch)]
        for number in range(options.batches)
    ]
    used = sorted({index for batch in keys for index, _ in batch})
    decoded = decode_all(AnnotatedImages(data.name, [data.images[index] for index in used], [], []))
    cached = TrainingImages(
        data, images.transform, options.seed, {used[place]: image for place, image in decoded.items()}
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a loader's process has
    milliseconds, batches = {}, []
    for name, source in (("augment", cached), ("decode and augment", images)):
        start = time.perf_counter()
        batches = [collate([source[key] for key in batch]) for batch in keys]
        milliseconds[name] = 1000 * (time.perf_counter() - start) / (options.batches * options.batch)
    torch.set_num_threads(threads)
    return batches, milliseconds


def add_object_forms(batch: TrainingBatch, device: torch.device) -> Batch:
    """A batch whose objects are on the device in every form; the images come with each step."""
    sizes = (batch.gt_offsets[1:] - batch.gt_offsets[:-1]).tolist()
    lists = tuple(list(values.to(device).split(sizes)) for values in (batch.gt_boxes, batch.gt_labels, batch.gt_crowd))
    padded = tuple(pad_sequence(values, batch_first=True) for values in lists)
    if padded[0].shape[1] == 0:  # no object in the whole batch
        padded = tuple(values.new_zeros(len(sizes), 1, *values.shape[2:]) for values in padded)
    packed = [getattr(batch, name).to(device) for name in ("gt_boxes", "gt_labels", "gt_crowd", "gt_offsets")]
    images = batch.images.pin_memory() if device.type == "cuda" else batch.images
    return Batch(images, *packed, lists, padded)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Steps


class Marks:
    """The times at which the phases of a step begin, and that at which the last one ends."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """A phase ends and the next begins; nothing waits for it."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of each phase; on a GPU to be called after a synchronization."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        return [a.elapsed_time(b) / 1000 for a, b in pairs] if self.on_gpu else [b - a for a, b in pairs]


class Trainer:
    """A detector and its optimizer, stepped as detector.train steps them."""

    def __init__(self, detector: str, num_classes: int, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        model, backbone = detector.split("-")
        self.device = torch.device(options.device)
        self.model = make_detector(model, backbone, options.image_size, num_classes).to(self.device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
        self.autocast_type = {"none": None, "bf16": torch.bfloat16}[options.amp]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and deltas, under autocast if there is one."""
        with torch.autocast(self.device.type, dtype=self.autocast_type, enabled=self.autocast_type is not None):
            return self.model(images)

    def loss(self, batch: Batch, matching: Matching, mark: Callable[[], None] = lambda: None) -> Tensor:
        """The loss () of a batch; `mark` is called where a phase ends and the next begins."""
        images = batch.images.to(self.device, non_blocking=True)
        mark()
        cls_logits, box_deltas = self.forward(images)
        mark()
        match = matching(self.model, box_deltas, cls_logits, batch)
        mark()
        parts = detection_loss(
            cls_logits,
            box_deltas,
            self.model.anchors,
            match,
            batch.gt_boxes,
            batch.gt_labels,
            batch.gt_offsets,
            CODER,
        )
        loss = parts.cls_loss + parts.box_loss
        mark()
        return loss

    def step(self, batch: Batch, matching: Matching, mark: Callable[[], None] = lambda: None) -> Tensor:
        """One step, its phases marked from the first on; the loss () before it."""
        mark()
        loss = self.loss(batch, matching, mark)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        mark()
        self.optimizer.step()
        mark()
        return loss.detach()

    @torch.no_grad()
    def agreement(self, batch: Batch, matching: Matching) -> float:
        """Share of labels equal to mg_ops' own, on the same predictions."""
        cls_logits, box_deltas = self.forward(batch.images.to(self.device))
        expected = mg_ops.mutual_match(
            self.model.anchors,
            batch.gt_boxes,
            batch.gt_labels,
            batch.gt_offsets,
            cls_logits=cls_logits,
            box_deltas=box_deltas,
            gt_crowd=batch.gt_crowd,
            box_coder=CODER,
        )
        got = matching(self.model, box_deltas, cls_logits, batch)
        equal = [(a == b).double().mean() for a, b in zip(expected[:2], got[:2], strict=True)]
        return float(sum(equal) / 2)


class CapturedStep:
    """A whole step as one CUDA graph: it is replayed with other images and objects in the same memory."""

    def __init__(self, trainer: Trainer, matching: Matching, batches: list[Batch]) -> None:
        """Captures a step; the objects of any of the batches fit in.

        Raises:
            RuntimeError: the captured step's loss is not that of a plain one.
        """
        capacity = max(1, *(len(batch.gt_boxes) for batch in batches))
        first = batches[0]
        self.batch = first._replace(
            images=first.images.to(trainer.device).clone(),
            gt_boxes=first.gt_boxes.new_zeros(capacity, 4),
            gt_labels=first.gt_labels.new_zeros(capacity),
            gt_crowd=first.gt_crowd.new_zeros(capacity),
            gt_offsets=first.gt_offsets.clone(),
        )
        # What is made on first use (kernels, momentum, cuDNN's choices) must exist before the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for batch in batches[:3]:
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
        self.batch.gt_crowd[:count].copy_(batch.gt_crowd)
        self.batch.gt_offsets.copy_(batch.gt_offsets)


def measure_captured(
    trainer: Trainer, matching: Matching, batches: list[Batch], options: argparse.Namespace
) -> dict[str, float]:
    """Times of steps captured as one CUDA graph, the copy of each batch to the device included."""
    captured = CapturedStep(trainer, matching, batches)
    marks = []
    for step in range(options.warmup + options.steps):
        marked = Marks(trainer.device)
        marked.mark()
        captured.load(batches[step % len(batches)])
        captured.graph.replay()
        marked.mark()
        if step >= options.warmup:
            marks.append(marked)
    torch.cuda.synchronize()
    seconds = [marked.seconds()[0] for marked in marks]
    median = statistics.median(seconds)
    return {"step_seconds": median, "slowest_step_seconds": max(seconds), "images_per_second": options.batch / median}


def peak_memory(trainer: Trainer, batch: Batch, matching: Matching) -> int | None:
    """Bytes at the peak of a step: of the GPU, or of this process (None where the system does not say)."""
    gc.collect()
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.step(batch, matching)
        return torch.cuda.max_memory_allocated()
    try:
        # What the allocator keeps of the step before goes back to the system first.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present size
        trainer.step(batch, matching)
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):
        return None
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def measure_detector(
    detector: str,
    batches: list[Batch],
    num_classes: int,
    matchings: dict[str, Matching],
    options: argparse.Namespace,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Phases, speed and memory of a detector with each matching.

    Raises:
        RuntimeError: a matching's labels are not mg_ops', or a captured step's loss not a plain one's.
    """
    trainer = Trainer(detector, num_classes, options)
    agreements = {name: trainer.agreement(batches[0], matching) for name, matching in matchings.items()}
    for name, agreement in agreements.items():
        if agreement < LEAST_AGREEMENT:
            raise RuntimeError(f"{detector}, {name}: only {agreement:.5f} of the labels are mg_ops'")
    marks: dict[str, list[Marks]] = {name: [] for name in matchings}
    for step in range(options.warmup + options.steps):
        for name, matching in matchings.items():
            marked = Marks(trainer.device)
            trainer.step(batches[step % len(batches)], matching, marked.mark)
            if step >= options.warmup:
                marks[name].append(marked)
            advance()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    rows = {}
    for name, matching in matchings.items():
        seconds = [marked.seconds() for marked in marks[name]]
        step_seconds = statistics.median(sum(phases) for phases in seconds)
        rows[name] = {
            "phases": {
                phase: statistics.median(phases[index] for phases in seconds) for index, phase in enumerate(PHASES)
            },
            "step_seconds": step_seconds,
            "slowest_step_seconds": max(sum(phases) for phases in seconds),
            "images_per_second": options.batch / step_seconds,
            "peak_bytes": peak_memory(trainer, batches[0], matching),
            "share_of_labels_equal": agreements[name],
        }
    measured: dict[str, Any] = {"anchors": len(trainer.model.anchors), "matchings": rows}
    if options.captured:
        measured["captured"] = measure_captured(trainer, list(matchings.values())[-1], batches, options)
    return measured


# ---------------------------------------------------------------------------------------------------------------------


def format_milliseconds(seconds: float) -> str:
    """With three digits, or all of them before the point."""
    milliseconds = 1000 * seconds
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"


def print_detector(detector: str, content: dict[str, Any], options: argparse.Namespace, console: Console) -> None:
    """A detector's table."""
    table = Table(
        title=f"[bold]{detector}[/]  {options.batch} images of {options.image_size} x {options.image_size}, "
        f"{content['anchors']:,} anchors each; milliseconds, median of {options.steps} steps; memory of the "
        f"{'GPU' if options.device == 'cuda' else 'whole process'}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("matching")
    for head in (*PHASES, "step", "matching's share", "images/s", "peak memory"):
        table.add_column(head, justify="right")
    for name, row in content["matchings"].items():
        phases = [format_milliseconds(row["phases"][phase]) for phase in PHASES]
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f} MB"
        share = f"{100 * row['phases']['matching'] / row['step_seconds']:.1f}%"
        speed = f"{row['images_per_second']:.3g}"
        style = "bold green" if name.startswith("mg_ops") else ""
        table.add_row(name, *phases, format_milliseconds(row["step_seconds"]), share, speed, peak, style=style)
    console.print()
    console.print(table)
    if "captured" in content:
        captured = content["captured"]
        console.print(
            f"  the whole step with {list(content['matchings'])[-1]} as one CUDA graph: "
            f"{format_milliseconds(captured['step_seconds'])} ms, {captured['images_per_second']:.3g} images/s",
            highlight=False,
        )


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Where the time of a training step goes.")
    parser.add_argument(
        "--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS), help="what to train (all)"
    )
    parser.add_argument("--image-size", type=int, default=160, help="side of the input, a multiple of 32 (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images per step (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps timed with each matching (%(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before these (%(default)s)")
    parser.add_argument("--batches", type=int, default=3, help="batches that take turns (%(default)s)")
    parser.add_argument("--data", type=Path, help="folder of a data set, in place of generated images")
    parser.add_argument("--format", choices=("voc", "coco"), default="voc", help="how it is laid out (%(default)s)")
    parser.add_argument("--split", help="by default what detector.train trains on")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (%(default)s)")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="autocast of the network (%(default)s)")
    parser.add_argument("--captured", action="store_true", help="also the whole step as one CUDA graph (--device cuda)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and augmentation (%(default)s)")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    for flag in ("batch", "steps", "batches", "threads"):
        if getattr(options, flag) < 1:
            parser.error(f"--{flag}: expected at least 1, got {getattr(options, flag)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if options.captured and options.device != "cuda":
        parser.error("--captured: a CUDA graph needs --device cuda")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measures what the command line asks for; the exit status."""
    options = parse_options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True
    machine = describe_machine(options.device)
    output = prepare_output(options, machine, "training_step")
    matchings = make_matchings(options.device)
    console.print(
        f"[bold]{machine['device']}[/], torch {machine['torch']}, mg_ops {machine['mg_ops']} at {machine['commit']}; "
        f"load average {machine['load_average_at_start']:.1f}"
    )
    try:
        with open_data(options) as data:
            source = data.summary().splitlines()[0]
            prepared, milliseconds = prepare_batches(data, options)
            num_classes = len(data.class_names)
        console.print(
            f"{source}; one process takes {milliseconds['decode and augment']:.3g} ms per image to decode and augment "
            f"it, {milliseconds['augment']:.3g} ms if it is decoded"
        )
        batches = [add_object_forms(batch, torch.device(options.device)) for batch in prepared]
        objects = sum(len(batch.gt_labels) for batch in batches) / (len(batches) * options.batch)
        shown = {name: value for name, value in vars(options).items() if name not in ("output", "record", "data")}
        detectors: dict[str, Any] = {}
        content = {
            "machine": machine,
            "options": {**shown, "data": None if options.data is None else options.data.name},
            "objects_per_image": objects,
            "data_milliseconds_per_image": milliseconds,
            "detectors": detectors,
        }
        total = len(options.detectors) * (options.warmup + options.steps) * len(matchings)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("step {task.completed} of {task.total}"))
        for_progress = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
        with for_progress as progress:
            task = progress.add_task("", total=total)
            for detector in options.detectors:
                progress.update(task, description=detector)
                detectors[detector] = measure_detector(
                    detector, batches, num_classes, matchings, options, lambda: progress.advance(task)
                )
                print_detector(detector, detectors[detector], options, console)
                output.write_text(json.dumps(content, indent=1) + "\n")
                gc.collect()
    except (RuntimeError, ValueError, OSError) as error:
        console.print(f"[bold red]failed:[/] {error}", highlight=False)
        return 1
    console.print(f"\nwrote {output}")
    for detector, measured in detectors.items():
        rows = measured["matchings"]
        loop, fused = rows["(a) loop"], rows[list(rows)[-1]]
        console.print(
            f"  {detector}: {fused['images_per_second']:.3g} images/s with {list(rows)[-1]}, "
            f"{loop['images_per_second']:.3g} with the loop; matching "
            f"{format_milliseconds(fused['phases']['matching'])} ms against "
            f"{format_milliseconds(loop['phases']['matching'])} ms",
            highlight=False,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
