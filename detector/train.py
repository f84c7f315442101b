"""Trains a detector with Mutual Guidance, on one device or, under torchrun, on several.

    python -m detector.train --data VOCdevkit --model fssd --backbone resnet18 --strategy mutual
    torchrun --nproc-per-node 8 -m detector.train --data coco --model retinanet --backbone vgg16_bn

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
from functools import partial
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
    initialize_from,
    load_entry,
    read_checkpoint,
    save_atomically,
    save_best,
    weights_of,
)
from detector.data import (
    Defects,
    check_classes,
    default_splits,
    has_split,
    hold_out,
    note_small_objects,
    read_data,
    recognize_format,
)
from detector.detectors import MODELS, OneStageDetector, make_detector
from detector.evaluate import evaluate
from detector.loss import BOX_LOSSES, CLS_LOSSES, detection_loss
from detector.outputs import strict_json, write_json
from detector.program import (
    add_data_arguments,
    default_device,
    device_name,
    input_side,
    process_group,
    real_number,
    run_program,
    whole_number,
)
from detector.rules import RULES, SOFT_RULES, check_rule, make_matcher
from detector.run_log import RunLog, claim_folder
from detector.scores import format_metrics, score, to_coco_ground_truth
from detector.step import CapturedStep, TrainingStep, make_buffers, set_learning_rate
from detector.watches import LossWatch, Stopwatch


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags, with the defaults that depend on other flags filled in."""
    positive, share, shrinking = real_number(0, above=True), real_number(0, 1), real_number(0, 1, below=True)
    parser = argparse.ArgumentParser(
        "python -m detector.train",
        description="Trains FSSD, RetinaNet or RFBNet with a rule of assignment, and evaluates it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = parser.add_argument_group("data")
    add_data_arguments(group)
    add = group.add_argument
    add("--train-split", help="by default VOC 07+12 trainval or train2017, where they are, or train")
    add("--eval-split", help="by default VOC2007/test or val2017, where they are, or val, or test")
    fraction = real_number(0, 1, above=True, below=True)
    add("--val-fraction", type=fraction, help="hold out this share of the training split to evaluate on, such as 0.2")
    add("--classes", help="comma-separated classes to learn; by default all of the training split")
    add("--cache", action="store_true", help="decode all training images once, into memory")
    add("--workers", type=whole_number(0), help="processes that prepare batches; by default 1, up to 12 on a GPU")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, default="fssd", help="architecture")
    add("--backbone", choices=BACKBONES, default="resnet18", help="feature extractor")
    add("--backbone-weights", help="imagenet (torchvision's, the default), none, or a state dict's file")
    add("--init-from", type=Path, help="checkpoint to start from: all of it that fits, in place of --backbone-weights")
    add("--image-size", type=input_side, default=320, help="side of the input in pixels, a multiple of 32")
    smaller = "side of the smallest anchor in pixels of the input; smaller for small objects or small inputs"
    add("--anchor-size", type=positive, default=BASE_SIZE, help=smaller)
    locations = "1: an anchor-free head, one square for each cell; 8 as --anchor-size makes it the stride"
    add("--anchors-per-location", type=int, choices=(1, 6), default=6, help=locations)

    add = parser.add_argument_group("matching and losses").add_argument
    add("--strategy", choices=RULES, default="mutual", help="a row of Table 1, or another rule of assignment")
    add(
        "--sigma",
        type=real_number(1, above=True),
        default=2.0,
        help="mutual and dynamic_mutual: degree of amplification",
    )
    static_first = "static matching (iou) for so many epochs, then --strategy"
    add("--strategy-from-epoch", type=whole_number(0), default=0, help=static_first)
    add("--backend", help="of the matching; by default the best one for the device")
    soft = f"all but focal learn soft targets, of {', '.join(SOFT_RULES)}"
    add("--cls-loss", choices=CLS_LOSSES, default="focal", help=soft)
    add("--focal-alpha", type=share, default=0.25, help="weight of positives in the focal loss")
    add("--focal-gamma", type=real_number(0), default=2.0, help="exponent of the focal loss")
    released = "Balanced L1 by its paper, or as the code released with Mutual Guidance has it"
    add("--box-loss", choices=tuple(BOX_LOSSES), default="balanced_l1", help=released)
    add("--box-weight", type=real_number(0), default=1.0, help="weight of the box loss")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=whole_number(1), help="by default 140 for coco and 250 for the others")
    add("--batch", type=whole_number(1), default=32, help="images per step, over all processes")
    add("--lr", type=real_number(0), default=0.01, help="learning rate after warm-up")
    add("--warmup", type=whole_number(0), default=500, help="steps of linear warm-up, a tenth of the run at most")
    add("--momentum", type=shrinking, default=0.9, help="of SGD")
    add("--weight-decay", type=real_number(0), default=5e-4, help="on convolution weights; none on biases and norms")
    add("--ema", type=shrinking, default=0.0, help="decay of averaged weights, such as 0.9998; 0 keeps none")
    autocast = "autocast of the network; auto: the fastest that the device has instructions for"
    add("--amp", choices=("none", "auto", "bf16", "fp16"), default="none", help=autocast)
    add("--seed", type=whole_number(0, MAX_SEED), default=0, help="of weights, order and augmentation")

    add = parser.add_argument_group("running").add_argument
    add("--device", type=device_name, default=default_device(), help="cpu or cuda; under torchrun one GPU a process")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--cuda-graph", action="store_true", help="capture the whole step once, and replay it; one process, on a GPU")
    fullest = "objects in a batch that --cuda-graph has room for; by default those of its fullest images"
    add("--graph-objects", type=whole_number(1), help=f"{fullest}; a batch with more runs eagerly")
    add("--sync-batch-norm", action="store_true", help="batch statistics over all GPUs")
    add("--deterministic", action="store_true", help="deterministic kernels: runs on a GPU repeat bit for bit")
    add("--out", type=Path, help="folder of the run; by default runs/DATA-MODEL-BACKBONE-STRATEGY-SIZE-...-seedN")
    add("--resume", action="store_true", help="continue the run in --out, if there is one; also to more --epochs")
    add("--eval-every", type=whole_number(0), default=0, help="epochs between evaluations; 0 is at the end only")
    add("--keep-every", type=whole_number(0), default=0, help="epochs between checkpoints that stay; 0 keeps the last")
    add("--save-minutes", type=real_number(0), default=10.0, help="minutes between checkpoints")
    add("--log-every", type=whole_number(1), default=20, help="steps between log entries")
    args = parser.parse_args(argv)

    if args.backbone_weights is None:
        args.backbone_weights = "none" if args.init_from is not None else "imagenet"
    if args.workers is None:
        cpus = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        args.workers = 1 if args.device == "cpu" else min(12, cpus)
    if args.anchor_size > args.image_size:
        parser.error(f"--anchor-size: expected at most --image-size, {args.image_size}, got {args.anchor_size:g}")
    try:
        check_rule(args)
    except ValueError as error:
        parser.error(str(error))
    if args.cuda_graph and not args.device.startswith("cuda"):
        parser.error(f"--cuda-graph: expected --device cuda, which a CUDA graph runs on, got {args.device}")
    if args.val_fraction is not None and args.eval_split is not None:
        parser.error("expected --val-fraction or --eval-split, got both")
    names = split_class_names(args.classes)
    if names is not None and (not all(names) or len(set(names)) < len(names)):
        parser.error(f"--classes: expected names, each once, with commas between them, got {args.classes!r}")
    if args.format != "auto":
        settle_format(args)
    return args


def settle_format(args: argparse.Namespace) -> None:
    """Fills in how the data is laid out, and the flags that depend on it.

    Raises:
        ValueError: there is no such folder, or it does not tell.
    """
    args.format = recognize_format(args.data, args.format)
    train_split, eval_split = default_splits(args.data, args.format)
    args.train_split = args.train_split or train_split
    args.eval_split = (args.eval_split or eval_split) if args.val_fraction is None else None
    if args.epochs is None:
        args.epochs = 140 if args.format == "coco" else 250
    if args.out is None:
        name = "-".join([args.data.resolve().name, args.model, args.backbone, args.strategy, str(args.image_size)])
        args.out = Path("runs") / f"{name}-lr{args.lr:g}-{args.epochs}epochs-seed{args.seed}"


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


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without them it is many times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and "bf16" in cpu.read_text(errors="replace")


def choose_amp(amp: str, device: torch.device, say: Callable[..., None]) -> str:
    """What --amp auto is on a device; says so where another choice would be faster."""
    if amp == "auto":
        amp = "bf16" if has_bfloat16(device) else "fp16" if device.type == "cuda" else "none"
        say(f"--amp auto: {amp}")
    elif amp == "bf16" and not has_bfloat16(device):
        say(f"warning: --amp bf16: this {device.type} has no bfloat16 instructions and emulates them, slower than "
            "float32 by far; --amp auto chooses what it has")  # fmt: skip
    return amp


@contextlib.contextmanager
def saving_on_error(save: Callable[[int], None], step: int) -> Iterator[None]:
    """Saves before an error between two steps ends the run."""
    try:
        yield
    except Exception:
        save(step)
        raise


def check_batch_norm(model: nn.Module, share: int, args: argparse.Namespace) -> None:
    """Raises ValueError if batch normalization would meet a single value a channel, which it cannot train on, where
    some step has `share` images for a process."""
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
    with contextlib.ExitStack() as held:
        return train(parse_arguments(argv), held)


RUN_FILES = ("last.pt", "best.pt", "best.safetensors", "log.jsonl", "results.json", "detections.json")
"""What a run writes into its folder."""


def train(args: argparse.Namespace, held: contextlib.ExitStack) -> dict[str, Any]:
    """`main`; what it holds until its end, it gives to `held`."""
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
        if args.cuda_graph:
            raise ValueError(f"--cuda-graph: captures the step of one process, got {num_processes} by torchrun")
        held.enter_context(process_group("nccl" if device.type == "cuda" else "gloo"))
    is_first = rank == 0

    def say(text: str) -> None:
        if is_first:
            tqdm.write(text)
            sys.stdout.flush()

    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic
    matcher = make_matcher(args, device)
    first_matcher = make_matcher(argparse.Namespace(**{**vars(args), "strategy": "iou"}), device)

    # ---- The run's folder, and the checkpoint to resume or to start from
    if args.format == "auto":
        settle_format(args)
        say(f"{args.data}: recognized as {args.format.upper()}")
    if is_first:
        held.enter_context(claim_folder(args.out, RUN_FILES))
    checkpoint_file = args.out / "last.pt"
    there = [name for name in ("last.pt", "best.pt") if (args.out / name).is_file()]
    if there and not (args.resume and "last.pt" in there):
        raise ValueError(
            f"{args.out} already holds a run ({', '.join(there)}): pass --resume to continue last.pt, or another --out"
        )
    resumed = read_checkpoint(checkpoint_file) if args.resume and checkpoint_file.is_file() else None
    initial = read_checkpoint(args.init_from) if args.init_from is not None and resumed is None else None
    is_auto = args.amp == "auto"
    args.amp = resumed["arguments"]["amp"] if resumed is not None and is_auto else choose_amp(args.amp, device, say)

    # ---- Data
    wanted = split_class_names(args.classes)
    train_data = read_data(args.data, args.format, args.train_split, wanted)
    if wanted is not None:
        check_classes(train_data, wanted)
    if args.val_fraction is not None:
        train_data, eval_data = hold_out(train_data, args.val_fraction, args.seed)
    else:
        if not has_split(args.data, args.format, args.eval_split):
            raise ValueError(
                f"--eval-split: no split {args.eval_split!r} in {args.data}; --val-fraction 0.2 holds out a fifth of "
                f"{args.train_split!r}"
            )
        eval_data = read_data(args.data, args.format, args.eval_split, train_data.class_names)
    held_out = [image.name for image in eval_data.images] if args.val_fraction is not None else None
    note_small_objects(train_data, args.image_size)
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    data_mark = {"images": len(train_data.images), "fingerprint": data_fingerprint(train_data)}
    if resumed is not None:
        check_resumed(resumed, checkpoint_file, arguments, train_data.class_names, data_mark)
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
    model = make_detector(
        args.model,
        args.backbone,
        args.image_size,
        len(train_data.class_names),
        args.anchor_size,
        args.anchors_per_location,
    )
    if not (args.sync_batch_norm and num_processes > 1):
        check_batch_norm(model, sampler.smallest_share(), args)
    if resumed is not None:
        load_entry(model, resumed, "model", checkpoint_file)
    else:
        load_backbone_weights(model.backbone, args.backbone, args.backbone_weights)
    if initial is not None:
        say(f"--init-from {args.init_from}: {initialize_from(model, initial, train_data.class_names)}")
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
        # Those of --cuda-graph read the learning rate, and whether float16 overflowed, where they are: on the GPU.
        lr=torch.tensor(args.lr, device=device) if args.cuda_graph else args.lr,
        fused=args.cuda_graph or None,
        momentum=args.momentum,
    )
    autocast_type = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    if resumed is not None:
        for name, target in (("optimizer", optimizer), ("scaler", scaler)):
            try:
                if target is optimizer:  # how it steps is this run's own, like its device
                    for saved, group in zip(resumed[name]["param_groups"], optimizer.param_groups, strict=True):
                        saved |= {"lr": group["lr"], "fused": group["fused"]}
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
    matching_time, step_time, waiting = Stopwatch(device), Stopwatch(device), 0.0
    step_of_batch = TrainingStep(
        network,
        model.anchors,
        matcher,
        partial(
            detection_loss,
            box_coder=box_coder,
            cls_loss=args.cls_loss,
            focal_alpha=args.focal_alpha,
            focal_gamma=args.focal_gamma,
            box_loss=args.box_loss,
        ),
        args.box_weight,
        optimizer,
        scaler,
        autocast_type,
        matching_time,
    )
    captured, capacity = None, 0
    if args.cuda_graph:
        fullest = sorted((len(image.boxes) for image in train_data.images), reverse=True)[: args.batch]
        capacity = args.graph_objects or max(1, sum(fullest))
        captured = CapturedStep(step_of_batch, make_buffers(args.batch, capacity, args.image_size, device))
        say(f"--cuda-graph: room for {capacity} objects in a batch")
    take_step = captured or step_of_batch
    evaluated = cast(OneStageDetector, average.module) if average is not None else model

    saved_step = start_step

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
            "held_out": held_out,
        }

    def save(step: int) -> None:
        nonlocal saved_step
        losses.check()
        if is_first:
            save_atomically(checkpoint_of(step), checkpoint_file)
        saved_step = step

    if is_first:  # what is done with the results of hours is tried before them
        ground_truth = to_coco_ground_truth(eval_data)
        strict_json([ground_truth, format_metrics(score(ground_truth, [])), arguments])
        if held_out is not None:
            write_json(args.out / "held_out.json", held_out, indent=1)
        if start_step < num_steps:
            (args.out / "results.json").unlink(missing_ok=True)  # of the run before more epochs were asked for
    run_log = RunLog(args.out, start_step) if is_first else None

    def log(entry: dict[str, Any], step: int) -> None:
        if run_log is not None:
            run_log.add(entry, step)

    if resumed is not None and resumed["arguments"].get("epochs", args.epochs) != args.epochs:
        say(f"--epochs raised from {resumed['arguments']['epochs']} to {args.epochs}")
        log({"step": start_step, "epochs_before": resumed["arguments"]["epochs"], "epochs": args.epochs}, start_step)

    # ---- SIGTERM and SIGINT: finish the step, save, exit; an evaluation, before which all is saved, is left at once
    received: list[int] = []
    evaluating = False

    def remember_signal(signal_number: int, frame: FrameType | None) -> None:
        received.append(signal_number)
        if evaluating:
            raise SystemExit(128 + signal_number)

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

    def save_and_evaluate(step: int, epochs_done: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        nonlocal evaluating
        save(step)
        evaluating = True
        try:
            if received:
                raise SystemExit(128 + received[0])
            metrics, detections = evaluate(
                evaluated,
                eval_data,
                args.image_size,
                device,
                batch_size=args.batch,
                num_workers=args.workers,
                amp=autocast_type,
            )
            if is_first:
                save_best(checkpoint_of(step), metrics["AP"], args.out)
            scores = {f"eval_{name}": metrics[name] for name in ("AP", "AP50", "AP75", "VOC_AP50")}
            at = step - 1 if step < num_steps else step
            log({"step": at, "epoch": epochs_done, **scores}, at)
            if run_log is not None:
                run_log.add_pictures(evaluated, eval_data, args.image_size, args.sigma, at)
        finally:
            evaluating = False
        return metrics, detections

    # ---- Training
    losses, met = LossWatch(), Defects()
    images_since, images_done = 0, sampler.start_of(start_step)
    logged_at = saved_at = said_at = time.perf_counter()
    # Where it is no terminal, lines take the place of the bar.
    progress = tqdm(
        total=sampler.total, initial=images_done, unit="img", disable=None if is_first else True, dynamic_ncols=True
    )
    network.train()
    batches = load_batches(
        TrainingImages(train_data, TrainingTransform(args.image_size), args.seed, decoded),
        sampler,
        partial(collate, capacity=capacity),
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
            lr = learning_rate(step, num_steps, args.lr, args.warmup)
            set_learning_rate(optimizer, lr)
            is_static = images_done < args.strategy_from_epoch * len(train_data.images)
            step_of_batch.matcher = first_matcher if is_static else matcher
            done = take_step(*batch[:5])
            losses.watch(done.loss, step, batch.image_names)
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
                values = torch.stack([done.loss, *done.parts[:2]])
                positives = torch.stack(done.parts[2:])
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
                share = matching_time.read() / max(step_time.read(), 1e-9)
                # Inside a graph the matching is not timed.
                entry |= {"matching_share": share} if captured is None else {"eager_steps": captured.num_eager}
                entry["waiting_share"] = waiting / seconds
                entry["strategy"] = "iou" if is_static else args.strategy
                if is_first:  # of the images of this process
                    summary = mg_ops.summarize(
                        done.match, done.gt_boxes, gt_offsets=done.gt_offsets, gt_crowd=done.gt_crowd
                    ).as_dict()
                    entry |= {f"match/{name}": float(value) for name, value in summary.items()}
                logged_at, images_since, waiting = now, 0, 0.0
                log(entry, step)
                matching = f"matching {100 * share:.0f}%, " if captured is None else ""
                shown = (
                    f"loss {entry['loss']:.3f} = cls {entry['cls_loss']:.3f} + box {entry['box_loss']:.3f}, "
                    f"lr {lr:.1e}, {matching}waiting for data {100 * entry['waiting_share']:.0f}%"
                )
                progress.set_postfix_str(shown)
                if progress.disable and (now - said_at > 30 or is_last or step == start_step):
                    speed = f"{entry['images_per_second']:.1f} images/s"
                    say(
                        f"step {step + 1} of {num_steps}, epoch {entry['epoch']:.2f} of {args.epochs}: {shown}, {speed}"
                    )
                    said_at = now

            # ---- Checkpoints, evaluation, signals
            epochs_before, epochs_done = images_before // len(train_data.images), images_done // len(train_data.images)
            if is_first and args.keep_every and epochs_done // args.keep_every > epochs_before // args.keep_every:
                losses.check()
                save_atomically(weights_of(checkpoint_of(step + 1)), args.out / f"epoch{epochs_done}.pt")
            if time.perf_counter() - saved_at > 60 * args.save_minutes and not is_last:
                save(step + 1)
                saved_at = time.perf_counter()
            if must_stop(step) and not is_last:
                save(step + 1)
                raise SystemExit(128 + (received[0] if received else signal.SIGTERM))
            if args.eval_every and not is_last and epochs_done // args.eval_every > epochs_before // args.eval_every:
                save_and_evaluate(step + 1, epochs_done)
                logged_at = saved_at = time.perf_counter()
        progress.close()
        batches.close()
        metrics, detections = save_and_evaluate(num_steps, args.epochs)
    except SystemExit as stop:
        name = signal.Signals(stop.code - 128).name if isinstance(stop.code, int) and stop.code > 128 else "stopped"
        say(f"\n{name}: saved step {saved_step} of {num_steps}; --resume continues it")
        raise
    finally:
        progress.close()
        batches.close()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    # ---- The end: results.json
    if distributed:
        everywhere: list[Any] = [None] * num_processes
        torch.distributed.all_gather_object(everywhere, met.found)
        for found in everywhere:
            for kind, places in found.items():
                for where in places:
                    met.add(kind, where)
    metrics["arguments"] = arguments
    train_defects = {**train_data.defects.counts(), **met.counts()}
    metrics["defects"] = {"train": train_defects, "eval": eval_data.defects.counts()}
    if run_log is not None:
        run_log.close()
        write_json(args.out / "detections.json", detections)
        write_json(args.out / "results.json", metrics, indent=1)  # its presence says that the run is complete
    say(format_metrics(metrics))
    if met.found:
        say(f"met while training:\n{met.report()}")
    say(f"written to {args.out}")
    return metrics


if __name__ == "__main__":
    run_program(main)
