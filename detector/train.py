"""Trains a detector with Mutual Guidance, on one device or, under torchrun, on several.

    python -m detector.train --data VOCdevkit --format voc --model fssd --backbone resnet18 --strategy mutual
    torchrun --nproc-per-node 8 -m detector.train --data coco --format coco --model retinanet --backbone vgg16_bn

Everything random follows from --seed, the step and the image, and from nothing else. So a run interrupted anywhere and
continued with --resume ends in the same weights, bit for bit, as one that was not, and two strategies see the same
images.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import mg_ops
from detector.anchors import BASE_SIZE
from detector.augment import TrainingTransform
from detector.backbone import BACKBONES, load_backbone_weights
from detector.batches import (
    MAX_SEED,
    TrainingBatch,
    TrainingImages,
    TrainingSampler,
    collate,
    combine_seed,
    decode_all,
    load_batches,
)
from detector.checkpoint import (
    check_resumed,
    data_fingerprint,
    load_entry,
    read_checkpoint,
    save_atomically,
    save_best,
)
from detector.data import Defects, default_splits, note_small_objects, read_data
from detector.detectors import MODELS, OneStageDetector, make_detector
from detector.evaluate import evaluate
from detector.loss import BOX_LOSSES, detection_loss
from detector.outputs import prepare_folder, strict_json, write_json
from detector.program import default_device, device_name, input_side, real_number, run_program, whole_number
from detector.run_log import RunLog
from detector.scores import format_metrics, score, to_coco_ground_truth


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags, with the defaults that depend on other flags filled in."""
    cpus = os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        "python -m detector.train",
        description="Trains FSSD, RetinaNet or RFBNet with one of the four matching strategies, and evaluates it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, required=True, help="folder of the data set")
    data.add_argument("--format", choices=("voc", "coco"), default="voc", help="how it is laid out")
    data.add_argument("--train-split", help="by default VOC 07+12 trainval or train2017, where they are, or train")
    data.add_argument("--eval-split", help="by default VOC2007/test or val2017, where they are, or val")
    data.add_argument("--classes", help="comma-separated classes to learn; by default all of the training split")
    data.add_argument("--cache", action="store_true", help="decode all training images once, into memory")
    data.add_argument(
        "--workers",
        type=whole_number(0),
        help="processes that prepare batches; by default 1 on the CPU, up to 12 on a GPU",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, default="fssd", help="architecture")
    model.add_argument("--backbone", choices=BACKBONES, default="resnet18", help="feature extractor")
    model.add_argument(
        "--backbone-weights", default="imagenet", help="imagenet (torchvision's), none, or a state dict's file"
    )
    model.add_argument(
        "--image-size", type=input_side, default=320, help="side of the input in pixels, a multiple of 32"
    )
    model.add_argument(
        "--anchor-size",
        type=real_number(0, above=True),
        default=BASE_SIZE,
        help="side of the smallest anchor in pixels of the input; smaller for small objects or small inputs",
    )

    matching = parser.add_argument_group("matching and losses")
    matching.add_argument(
        "--strategy", choices=tuple(mg_ops.matching.STRATEGIES), default="mutual", help="rows of Table 1"
    )
    matching.add_argument(
        "--sigma", type=real_number(1, above=True), default=2.0, help="degree of amplification (Eq. 1)"
    )
    matching.add_argument("--backend", help="of mg_ops.mutual_match; by default the best one for the device")
    matching.add_argument(
        "--focal-alpha", type=real_number(0, 1), default=0.25, help="weight of positives in the focal loss"
    )
    matching.add_argument("--focal-gamma", type=real_number(0), default=2.0, help="exponent of the focal loss")
    matching.add_argument(
        "--box-loss",
        choices=tuple(BOX_LOSSES),
        default="balanced_l1",
        help="Balanced L1 by its paper, or as the code released with Mutual Guidance has it",
    )
    matching.add_argument("--box-weight", type=real_number(0), default=1.0, help="weight of the box loss")

    schedule = parser.add_argument_group("optimization")
    schedule.add_argument("--epochs", type=whole_number(1), help="by default 250 for voc and 140 for coco")
    schedule.add_argument("--batch", type=whole_number(1), default=32, help="images per step, over all processes")
    schedule.add_argument("--lr", type=real_number(0), default=0.01, help="learning rate after warm-up")
    schedule.add_argument(
        "--warmup", type=whole_number(0), default=500, help="steps of linear warm-up, a tenth of the run at most"
    )
    schedule.add_argument("--momentum", type=real_number(0, 1, below=True), default=0.9, help="of SGD")
    schedule.add_argument(
        "--weight-decay", type=real_number(0), default=5e-4, help="on convolution weights; none on biases and norms"
    )
    schedule.add_argument(
        "--ema",
        type=real_number(0, 1, below=True),
        default=0.0,
        help="decay of averaged weights, such as 0.9998; 0 keeps none",
    )
    schedule.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none", help="autocast of the network")
    schedule.add_argument(
        "--seed", type=whole_number(0, MAX_SEED), default=0, help="of weights, order and augmentation"
    )

    running = parser.add_argument_group("running")
    running.add_argument(
        "--device", type=device_name, default=default_device(), help="cpu or cuda; under torchrun one GPU a process"
    )
    running.add_argument("--compile", action="store_true", help="torch.compile the network")
    running.add_argument("--sync-batch-norm", action="store_true", help="batch statistics over all GPUs")
    running.add_argument(
        "--deterministic", action="store_true", help="deterministic kernels: runs on a GPU repeat bit for bit"
    )
    running.add_argument(
        "--out", type=Path, help="folder of the run; by default runs/MODEL-BACKBONE-STRATEGY-SIZE-seedN"
    )
    running.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    running.add_argument(
        "--eval-every", type=whole_number(0), default=0, help="epochs between evaluations; 0 evaluates at the end only"
    )
    running.add_argument("--save-minutes", type=real_number(0), default=10.0, help="minutes between checkpoints")
    running.add_argument("--log-every", type=whole_number(1), default=20, help="steps between log entries")
    args = parser.parse_args(argv)

    train_split, eval_split = default_splits(args.data, args.format)
    args.train_split = args.train_split or train_split
    args.eval_split = args.eval_split or eval_split
    if args.epochs is None:
        args.epochs = 250 if args.format == "voc" else 140
    if args.workers is None:
        args.workers = 1 if args.device == "cpu" else min(12, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if args.out is None:
        args.out = Path("runs") / f"{args.model}-{args.backbone}-{args.strategy}-{args.image_size}-seed{args.seed}"
    if args.anchor_size > args.image_size:
        parser.error(f"--anchor-size: expected at most --image-size, {args.image_size}, got {args.anchor_size:g}")
    names = split_class_names(args.classes)
    if names is not None and (not all(names) or len(set(names)) < len(names)):
        parser.error(f"--classes: expected names, each once, with commas between them, got {args.classes!r}")
    return args


def split_class_names(classes: str | None) -> list[str] | None:
    """The names in --classes."""
    return None if classes is None else [name.strip() for name in classes.split(",")]


def learning_rate(step: int, num_steps: int, peak: float, warmup: int, lowest: float = 1e-6) -> float:
    """Linear from `lowest` to `peak` over the warm-up, then half a cosine back to `lowest`."""
    warmup = min(warmup, num_steps // 10)
    if step < warmup:
        return lowest + (peak - lowest) * step / warmup
    done = (step - warmup) / max(num_steps - 1 - warmup, 1)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * done))


class Stopwatch:
    """Adds up the time between `start` and `stop`: on a GPU by its events, which do not hold it up."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.pairs: list[tuple[Any, Any]] = []
        self.running: Any = None

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begins an interval."""
        self.running = self._now()

    def stop(self) -> None:
        """Ends it."""
        self.pairs.append((self.running, self._now()))

    def read(self) -> float:
        """Seconds since the last reading; waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
            seconds: float = sum(start.elapsed_time(stop) / 1000 for start, stop in self.pairs)
        else:
            seconds = sum(stop - start for start, stop in self.pairs)
        self.pairs.clear()
        return seconds


class LossWatch:
    """Stops training at a loss that is not finite; looks one step late, so that the GPU does not wait."""

    def __init__(self) -> None:
        self.pending: tuple[torch.Tensor, Any, int, list[str]] | None = None

    def watch(self, loss: torch.Tensor, step: int, image_names: list[str]) -> None:
        """Looks at the loss before this one, and keeps this one for the next look."""
        self.check()
        copy, copied = loss.detach(), None
        if copy.is_cuda:
            copy = copy.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.pending = copy, copied, step, image_names

    def check(self) -> None:
        """Raises FloatingPointError for the loss watched last, with its images."""
        if self.pending is None:
            return
        loss, copied, step, image_names = self.pending
        self.pending = None
        if copied is not None:
            copied.synchronize()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {step}, in a batch of the images {', '.join(image_names)}. "
                "The last checkpoint is from before it. "
                "A lower --lr, a longer --warmup or --amp bf16 in place of fp16 may help."
            )


@contextlib.contextmanager
def saving_on_error(save: Callable[[int], None], step: int) -> Iterator[None]:
    """Saves before an error between two steps ends the run."""
    try:
        yield
    except Exception:
        save(step)
        raise


def make_matcher(args: argparse.Namespace, device: torch.device) -> mg_ops.MutualMatcher:
    """The matcher that the flags say, tried on one object: what it refuses is refused before data is read."""
    matcher = mg_ops.MutualMatcher(
        strategy=args.strategy, sigma=args.sigma, backend=args.backend, box_coder=mg_ops.BoxCoder()
    )
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device)
    label = torch.zeros(1, dtype=torch.int64, device=device)
    matcher(box, [box], [label], cls_logits=box[None, :, :1], box_deltas=torch.zeros_like(box)[None])
    return matcher


def check_batch_norm(model: nn.Module, share: int, args: argparse.Namespace) -> None:
    """Raises ValueError if batch normalization would meet a single value a channel, which it cannot train on.

    Args:
        model: the detector.
        share: the fewest images that a process gets in a step.
        args: for the message.
    """
    shapes_only = copy.deepcopy(model).to("meta").train()
    images = torch.empty(share, 3, args.image_size, args.image_size, dtype=torch.uint8, device="meta")
    try:
        shapes_only(images)
    except ValueError as error:
        raise ValueError(
            f"--batch {args.batch}: some step has {share} image{'s' * (share != 1)} for a process, and at --image-size "
            f"{args.image_size} batch normalization needs more ({error}); choose a --batch that gives every process 2 "
            "images in every step, the last ones too, or a larger --image-size"
        ) from error


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, and returns the metrics that results.json then holds.

    Raises:
        SystemExit: 143 after SIGTERM (130 after SIGINT), with the checkpoint saved; 2 for flags that make no sense.
        ValueError: data, a checkpoint, or flags together that cannot be trained with; before the first step.
        OSError: a file cannot be read or written.
        FloatingPointError: a loss that is not finite.
    """
    args = parse_arguments(argv)

    # ---- Processes: one, or those of torchrun
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, num_processes = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if distributed else (0, 1)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"--device cuda: process {device.index} has no GPU: torch sees {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device)
    if distributed:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    is_first = rank == 0
    say = print if is_first else (lambda *words: None)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic
    matcher = make_matcher(args, device)

    # ---- The run's folder, and the checkpoint to resume from
    checkpoint_file = args.out / "last.pt"
    held = [name for name in ("last.pt", "best.pt") if (args.out / name).is_file()]
    if held and not (args.resume and "last.pt" in held):
        raise ValueError(
            f"{args.out} already holds a run ({', '.join(held)}): pass --resume to continue last.pt, or another --out"
        )
    if is_first:
        written = ("last.pt", "best.pt", "best.safetensors", "log.jsonl", "results.json", "detections.json")
        prepare_folder(args.out, written)
    resumed = read_checkpoint(checkpoint_file) if args.resume and checkpoint_file.is_file() else None
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}

    # ---- Data
    train_data = read_data(args.data, args.format, args.train_split, split_class_names(args.classes))
    eval_data = read_data(args.data, args.format, args.eval_split, train_data.class_names)
    note_small_objects(train_data, args.image_size)
    data_mark = {"images": len(train_data.images), "fingerprint": data_fingerprint(train_data)}
    if resumed is not None:
        check_resumed(resumed, checkpoint_file, arguments, train_data.class_names, data_mark)
    if not any((~image.crowd).any() for image in train_data.images):
        raise ValueError(
            f"{args.data}: no object to train on in split {train_data.name!r}\n{train_data.defects.report()}"
        )
    say(f"training on {train_data.summary()}\nevaluating on {eval_data.summary()}")
    decoded = decode_all(train_data) if args.cache else None
    start_step = resumed["step"] if resumed is not None else 0
    sampler = TrainingSampler(
        len(train_data.images), args.epochs, args.batch, args.seed, rank, num_processes, start_step
    )
    num_steps = sampler.num_steps
    if start_step > num_steps:
        raise ValueError(f"--resume: {checkpoint_file} is of step {start_step}, and this run has {num_steps}")

    # ---- Model, averaged weights, optimizer
    torch.manual_seed(args.seed)
    model = make_detector(args.model, args.backbone, args.image_size, len(train_data.class_names), args.anchor_size)
    if not (args.sync_batch_norm and num_processes > 1):
        check_batch_norm(model, sampler.smallest_share(), args)
    if resumed is None:
        load_backbone_weights(model.backbone, args.backbone, args.backbone_weights)
    else:
        load_entry(model, resumed, "model", checkpoint_file)
    model.to(device)
    if args.sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    average = None
    if args.ema:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
        if resumed is not None:
            load_entry(average.module, resumed, "ema", checkpoint_file)
            average.n_averaged.fill_(start_step)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        momentum=args.momentum,
    )
    autocast_type = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    if resumed is not None:
        for name, target in (("optimizer", optimizer), ("scaler", scaler)):
            try:
                target.load_state_dict(resumed[name])
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
                raise ValueError(f"--resume: {checkpoint_file}: entry {name!r} does not fit: {error!r}") from error
        say(f"continuing {args.out} at step {start_step} of {num_steps}")
    network: nn.Module = model
    if distributed:
        network = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if args.compile:
        network = cast(nn.Module, torch.compile(network))  # declared as a function, whatever it compiles
    box_coder = matcher.box_coder
    assert box_coder is not None  # make_matcher gives it one

    def checkpoint_of(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "model": model.state_dict(),
            "ema": average.module.state_dict() if average is not None else None,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "arguments": arguments,
            "class_names": train_data.class_names,
            "data": data_mark,
        }

    def save(step: int) -> None:
        losses.check()
        if is_first:
            save_atomically(checkpoint_of(step), checkpoint_file)

    def run_evaluation(step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        metrics, detections = evaluate(
            cast(OneStageDetector, average.module) if average is not None else model,
            eval_data,
            args.image_size,
            device,
            batch_size=args.batch,
            num_workers=args.workers,
            amp=autocast_type,
        )
        if is_first:
            save_best(checkpoint_of(step), metrics["AP"], args.out)
        return metrics, detections

    if is_first:  # what is done with the results of hours is tried before them
        ground_truth = to_coco_ground_truth(eval_data)
        strict_json([ground_truth, format_metrics(score(ground_truth, [])), arguments])
    run_log = RunLog(args.out, start_step) if is_first else None

    def log(entry: dict[str, Any], step: int) -> None:
        if run_log is not None:
            run_log.add(entry, step)

    # ---- SIGTERM and SIGINT: finish the step, save, exit
    received: list[int] = []

    def remember_signal(signal_number: int, frame: FrameType | None) -> None:
        received.append(signal_number)

    previous_handlers = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous_handlers[number] = signal.signal(number, remember_signal)

    def must_stop(step: int) -> bool:
        """Whether a signal came to any process; on GPUs they agree every tenth step, since that makes them wait."""
        if not distributed:
            return bool(received)
        if device.type == "cuda" and step % 10:
            return False
        flag = torch.tensor(float(bool(received)), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    # ---- Training
    losses, met = LossWatch(), Defects()
    matching_time, step_time, waiting = Stopwatch(device), Stopwatch(device), 0.0
    images_since, images_done = 0, sampler.start_of(start_step)
    logged_at = saved_at = time.perf_counter()
    progress = tqdm(
        total=sampler.total,
        initial=images_done,
        unit="img",
        disable=not is_first,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
    network.train()
    batches = load_batches(
        TrainingImages(train_data, TrainingTransform(args.image_size), args.seed, decoded),
        sampler,
        collate,
        args.workers,
        pin_memory=device.type == "cuda",
    )
    try:
        for step in range(start_step, num_steps):
            wait_start = time.perf_counter()
            with saving_on_error(save, step) if step > start_step else contextlib.nullcontext():
                batch: TrainingBatch = next(batches)
            waiting += time.perf_counter() - wait_start
            step_time.start()
            torch.manual_seed(combine_seed(args.seed, step, rank))  # nothing random to save or restore
            images = batch.images.to(device, non_blocking=True)  # (B, 3, S, S) uint8
            gt_boxes = batch.gt_boxes.to(device, non_blocking=True)  # (N, 4) pixels of the input
            gt_labels = batch.gt_labels.to(device, non_blocking=True)  # (N,)
            gt_crowd = batch.gt_crowd.to(device, non_blocking=True)  # (N,)
            gt_offsets = batch.gt_offsets.to(device, non_blocking=True)  # (B + 1,)

            with torch.autocast(device.type, dtype=autocast_type, enabled=autocast_type is not None):
                cls_logits, box_deltas = network(images)  # (B, A, C), (B, A, 4)

            # Mutual Guidance: what the network predicts decides which anchors it learns from.
            matching_time.start()
            match = matcher(
                model.anchors,
                gt_boxes,
                gt_labels,
                gt_offsets,
                cls_logits=cls_logits,
                box_deltas=box_deltas,
                gt_crowd=gt_crowd,
            )
            matching_time.stop()
            parts = detection_loss(
                cls_logits,
                box_deltas,
                model.anchors,
                match,
                gt_boxes,
                gt_labels,
                gt_offsets,
                box_coder,
                focal_alpha=args.focal_alpha,
                focal_gamma=args.focal_gamma,
                box_loss=args.box_loss,
            )
            loss = parts.cls_loss + args.box_weight * parts.box_loss
            losses.watch(loss, step, batch.image_names)

            lr = learning_rate(step, num_steps, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if average is not None:
                average.update_parameters(model)
            step_time.stop()

            # ---- What can be seen of it
            for kind, where in batch.defects:
                if met.add(kind, where):
                    tqdm.write(f"{kind}: {where}")
            images_before, images_done = images_done, sampler.start_of(step + 1)
            images_since += images_done - images_before
            progress.update(images_done - images_before)
            is_last = step == num_steps - 1
            if step % args.log_every == 0 or is_last:
                values = torch.stack([loss.detach(), parts.cls_loss.detach(), parts.box_loss.detach()])
                positives = torch.stack([parts.num_cls_positives, parts.num_loc_positives])
                if distributed:
                    torch.distributed.all_reduce(values)
                    torch.distributed.all_reduce(positives)
                    values /= num_processes
                now = time.perf_counter()
                entry: dict[str, Any] = dict(zip(("loss", "cls_loss", "box_loss"), values.tolist(), strict=True))
                entry.update(zip(("cls_positives", "loc_positives"), positives.tolist(), strict=True))
                entry["step"], entry["epoch"], entry["lr"] = step, images_done / len(train_data.images), lr
                seconds = now - logged_at
                entry["images_per_second"] = images_since / seconds
                entry["matching_share"] = matching_time.read() / max(step_time.read(), 1e-9)
                entry["waiting_share"] = waiting / seconds
                logged_at, images_since, waiting = now, 0, 0.0
                log(entry, step)
                progress.set_postfix_str(
                    f"loss {entry['loss']:.3f} = cls {entry['cls_loss']:.3f} + box {entry['box_loss']:.3f}, "
                    f"lr {lr:.1e}, matching {100 * entry['matching_share']:.0f}%, "
                    f"waiting for data {100 * entry['waiting_share']:.0f}%"
                )

            # ---- Checkpoints, evaluation, signals
            if time.perf_counter() - saved_at > 60 * args.save_minutes and not is_last:
                save(step + 1)
                saved_at = time.perf_counter()
            if must_stop(step) and not is_last:
                save(step + 1)
                stopped_by = signal.Signals(received[0] if received else signal.SIGTERM)
                say(f"\n{stopped_by.name}: saved step {step + 1} of {num_steps}; --resume continues it")
                raise SystemExit(128 + stopped_by)
            epochs_before, epochs_done = images_before // len(train_data.images), images_done // len(train_data.images)
            if args.eval_every and not is_last and epochs_done // args.eval_every > epochs_before // args.eval_every:
                with saving_on_error(save, step + 1):
                    metrics, _ = run_evaluation(step + 1)
                log({"step": step, "epoch": epochs_done, **{f"eval_{name}": metrics[name] for name in EVALUATED}}, step)
                logged_at = time.perf_counter()
    finally:
        progress.close()
        batches.close()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    # ---- The end: checkpoint, evaluation, results.json
    save(num_steps)
    metrics, detections = run_evaluation(num_steps)
    log({"step": num_steps, "epoch": args.epochs, **{f"eval_{name}": metrics[name] for name in EVALUATED}}, num_steps)
    if distributed:
        everywhere: list[Any] = [None] * num_processes
        torch.distributed.all_gather_object(everywhere, met.found)
        for found in everywhere:
            for kind, places in found.items():
                for where in places:
                    met.add(kind, where)
    metrics["arguments"] = arguments
    metrics["defects"] = {
        "train": {**train_data.defects.counts(), **met.counts()},
        "eval": eval_data.defects.counts(),
    }
    if run_log is not None:
        run_log.close()
        write_json(args.out / "detections.json", detections)
        write_json(args.out / "results.json", metrics, indent=1)  # its presence says that the run is complete
    say(format_metrics(metrics))
    if met.found:
        say(f"met while training:\n{met.report()}")
    say(f"written to {args.out}")
    if distributed:
        torch.distributed.destroy_process_group()
    return metrics


EVALUATED = ("AP", "AP50", "AP75", "VOC_AP50")


if __name__ == "__main__":
    run_program(main)
