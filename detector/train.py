"""Trains a detector with Mutual Guidance, on one device or, under torchrun, on several.

    python -m detector.train --data VOCdevkit --format voc --model fssd --backbone resnet18 --strategy mutual
    torchrun --nproc-per-node 8 -m detector.train --data coco --format coco --model retinanet --backbone vgg16_bn

Everything random follows from --seed, the step and the image, and from nothing else. So a run interrupted anywhere and
continued with --resume ends in the same weights, bit for bit, as one that was not, and two strategies see the same
images.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import mg_ops
from detector.anchors import BASE_SIZE
from detector.augment import TrainingTransform
from detector.backbone import BACKBONES, load_backbone_weights
from detector.batches import TrainingBatch, TrainingImages, TrainingSampler, collate, decode_all
from detector.checkpoint import read_checkpoint, save_atomically
from detector.data import Defects, default_splits, note_small_objects, read_data
from detector.detectors import MODELS, make_detector
from detector.evaluate import evaluate
from detector.loss import BOX_LOSSES, detection_loss
from detector.scores import format_metrics

# Flags that say where and how fast a run goes, not what it computes: they may differ when it is resumed.
FREE_ON_RESUME = {"data", "out", "resume", "backbone_weights", "backend", "device", "workers", "cache"}
FREE_ON_RESUME |= {"save_minutes", "log_every", "eval_every"}


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
        "--workers", type=int, help="processes that prepare batches; by default 1 on the CPU, up to 12 on a GPU"
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, default="fssd", help="architecture")
    model.add_argument("--backbone", choices=BACKBONES, default="resnet18", help="feature extractor")
    model.add_argument(
        "--backbone-weights", default="imagenet", help="imagenet (torchvision's), none, or a state dict's file"
    )
    model.add_argument("--image-size", type=int, default=320, help="side of the input in pixels, a multiple of 32")
    model.add_argument(
        "--anchor-size",
        type=float,
        default=BASE_SIZE,
        help="side of the smallest anchor in pixels of the input; smaller for small objects or small inputs",
    )

    matching = parser.add_argument_group("matching and losses")
    matching.add_argument(
        "--strategy", choices=tuple(mg_ops.matching.STRATEGIES), default="mutual", help="rows of Table 1"
    )
    matching.add_argument("--sigma", type=float, default=2.0, help="degree of amplification (Eq. 1)")
    matching.add_argument("--backend", help="of mg_ops.mutual_match; by default the best one for the device")
    matching.add_argument("--focal-alpha", type=float, default=0.25, help="weight of positives in the focal loss")
    matching.add_argument("--focal-gamma", type=float, default=2.0, help="exponent of the focal loss")
    matching.add_argument(
        "--box-loss",
        choices=tuple(BOX_LOSSES),
        default="balanced_l1",
        help="Balanced L1 by its paper, or as the code released with Mutual Guidance has it",
    )
    matching.add_argument("--box-weight", type=float, default=1.0, help="weight of the box loss")

    schedule = parser.add_argument_group("optimisation")
    schedule.add_argument("--epochs", type=int, help="by default 250 for voc and 140 for coco")
    schedule.add_argument("--batch", type=int, default=32, help="images a step, over all processes")
    schedule.add_argument("--lr", type=float, default=0.01, help="learning rate after warm-up")
    schedule.add_argument("--warmup", type=int, default=500, help="steps of linear warm-up, a tenth of the run at most")
    schedule.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    schedule.add_argument(
        "--weight-decay", type=float, default=5e-4, help="on convolution weights; none on biases and norms"
    )
    schedule.add_argument(
        "--ema", type=float, default=0.0, help="decay of averaged weights, such as 0.9998; 0 keeps none"
    )
    schedule.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none", help="autocast of the network")
    schedule.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")

    running = parser.add_argument_group("running")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    running.add_argument(
        "--device", default=default_device, help="cpu or cuda; under torchrun each process takes one GPU"
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
        "--eval-every", type=int, default=0, help="epochs between evaluations; 0 evaluates at the end only"
    )
    running.add_argument("--save-minutes", type=float, default=10.0, help="minutes between checkpoints")
    running.add_argument("--log-every", type=int, default=20, help="steps between log entries")
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
    for flag in ("epochs", "batch", "log_every"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')}: expected at least 1, got {getattr(args, flag)}")
    return args


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
            seconds = sum(start.elapsed_time(stop) / 1000 for start, stop in self.pairs)
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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains, and returns the metrics that results.json then holds.

    Raises:
        SystemExit: 143 after SIGTERM (130 after SIGINT), with the checkpoint saved; 2 for flags that make no sense.
        FloatingPointError: a loss that is not finite.
    """
    args = parse_arguments(argv)

    # ---- Processes: one, or those of torchrun
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, num_processes = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if distributed else (0, 1)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if distributed:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    is_first = rank == 0
    say = print if is_first else (lambda *words: None)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic

    # ---- The run's folder, and the checkpoint to resume from
    checkpoint_file = args.out / "last.pt"
    resumed = read_checkpoint(checkpoint_file) if args.resume and checkpoint_file.is_file() else None
    if checkpoint_file.is_file() and not args.resume:
        raise SystemExit(f"{args.out} already holds a run: pass --resume to continue it, or another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    if resumed is not None:
        was = resumed["arguments"]
        changed = [name for name in arguments if name not in FREE_ON_RESUME and arguments[name] != was.get(name)]
        if changed:
            differences = ", ".join(f"{name} {was.get(name)!r} -> {arguments[name]!r}" for name in changed)
            raise SystemExit(f"--resume: the run in {args.out} was started with other flags: {differences}")

    # ---- Data
    wanted_classes = args.classes.split(",") if args.classes else None
    train_data = read_data(args.data, args.format, args.train_split, wanted_classes)
    eval_data = read_data(args.data, args.format, args.eval_split, train_data.class_names)
    note_small_objects(train_data, args.image_size)
    if resumed is not None and resumed["class_names"] != train_data.class_names:
        raise SystemExit(
            f"--resume: the run learned {resumed['class_names']}, the data now has {train_data.class_names}"
        )
    say(f"training on {train_data.summary()}\nevaluating on {eval_data.summary()}")
    decoded = decode_all(train_data) if args.cache else None
    start_step = resumed["step"] if resumed is not None else 0
    sampler = TrainingSampler(
        len(train_data.images), args.epochs, args.batch, args.seed, rank, num_processes, start_step
    )
    loader = DataLoader(
        TrainingImages(train_data, TrainingTransform(args.image_size), args.seed, decoded),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_trainer,
    )
    num_steps = sampler.num_steps

    # ---- Model, averaged weights, optimiser
    torch.manual_seed(args.seed)
    model = make_detector(args.model, args.backbone, args.image_size, len(train_data.class_names), args.anchor_size)
    if resumed is None:
        load_backbone_weights(model.backbone, args.backbone, args.backbone_weights)
    else:
        model.load_state_dict(resumed["model"])
    model.to(device)
    if args.sync_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    average = None
    if args.ema:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
        if resumed is not None:
            average.module.load_state_dict(resumed["ema"])
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
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        say(f"continuing {args.out} at step {start_step} of {num_steps}")
    network: nn.Module = model
    if distributed:
        network = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if args.compile:
        network = torch.compile(network)
    box_coder = mg_ops.BoxCoder()

    def save(step: int) -> None:
        losses.check()
        if is_first:
            content = {
                "step": step,
                "model": model.state_dict(),
                "ema": average.module.state_dict() if average is not None else None,
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "arguments": arguments,
                "class_names": train_data.class_names,
            }
            save_atomically(content, checkpoint_file)

    def run_evaluation() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return evaluate(
            average.module if average is not None else model,
            eval_data,
            args.image_size,
            device,
            batch_size=args.batch,
            num_workers=args.workers,
            amp=autocast_type,
        )

    # ---- Logs: one JSON line an entry, and TensorBoard
    log_file = args.out / "log.jsonl"
    writer = None
    if is_first:
        kept = [line for line in read_log(log_file) if resumed is not None and line["step"] < start_step]
        log_file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        writer = SummaryWriter(str(args.out / "tensorboard"), purge_step=start_step)

    def log(entry: dict[str, Any], step: int) -> None:
        if writer is not None:
            with log_file.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            for name, value in entry.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, step)

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
    batches = iter(loader)
    try:
        for step in range(start_step, num_steps):
            wait_start = time.perf_counter()
            batch: TrainingBatch = next(batches)
            waiting += time.perf_counter() - wait_start
            step_time.start()
            torch.manual_seed(((args.seed * 1_000_003) + step) * 1_000_003 + rank)  # nothing random to save or restore
            images = batch.images.to(device, non_blocking=True)  # (B, 3, S, S) uint8
            gt_boxes = batch.gt_boxes.to(device, non_blocking=True)  # (N, 4) pixels of the input
            gt_labels = batch.gt_labels.to(device, non_blocking=True)  # (N,)
            gt_crowd = batch.gt_crowd.to(device, non_blocking=True)  # (N,)
            gt_offsets = batch.gt_offsets.to(device, non_blocking=True)  # (B + 1,)

            with torch.autocast(device.type, dtype=autocast_type, enabled=autocast_type is not None):
                cls_logits, box_deltas = network(images)  # (B, A, C), (B, A, 4)

            # Mutual Guidance: what the network predicts decides which anchors it learns from.
            matching_time.start()
            match = mg_ops.mutual_match(
                model.anchors,
                gt_boxes,
                gt_labels,
                gt_offsets,
                cls_logits=cls_logits,
                box_deltas=box_deltas,
                gt_crowd=gt_crowd,
                box_coder=box_coder,
                strategy=args.strategy,
                sigma=args.sigma,
                backend=args.backend,
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
                entry = dict(zip(("loss", "cls_loss", "box_loss"), values.tolist(), strict=True))
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
                number = received[0] if received else signal.SIGTERM
                say(f"\n{signal.Signals(number).name}: saved step {step + 1} of {num_steps}; --resume continues it")
                raise SystemExit(128 + number)
            epochs_before, epochs_done = images_before // len(train_data.images), images_done // len(train_data.images)
            if args.eval_every and not is_last and epochs_done // args.eval_every > epochs_before // args.eval_every:
                metrics, _ = run_evaluation()
                log({"step": step, "epoch": epochs_done, **{f"eval_{name}": metrics[name] for name in EVALUATED}}, step)
                logged_at = time.perf_counter()
    finally:
        progress.close()
        del batches  # ends the workers
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    # ---- The end: checkpoint, evaluation, results.json
    save(num_steps)
    metrics, detections = run_evaluation()
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
    say(format_metrics(metrics))
    if met.found:
        say(f"met while training:\n{met.report()}")
    if writer is not None:
        writer.close()
        (args.out / "detections.json").write_text(json.dumps(detections))
        unfinished = args.out / ".results.json.unfinished"
        unfinished.write_text(json.dumps(metrics, indent=1))
        unfinished.replace(args.out / "results.json")  # its presence says that the run is complete
        say(f"written to {args.out}")
    if distributed:
        torch.distributed.destroy_process_group()
    return metrics


EVALUATED = ("AP", "AP50", "AP75", "VOC_AP50")


def leave_signals_to_the_trainer(worker: int) -> None:
    """A worker that dies of a signal meant for the whole job would keep the trainer from finishing its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a run's log.jsonl; an entry cut off by a crash is left out."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
