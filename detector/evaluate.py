"""Scores a detector on a data set, or a file of detections against annotations."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from detector.annotations import Defects, read_json
from detector.checkpoint import load_detector
from detector.data import AnnotatedImages, default_splits, read_data, recognize_format, select_images
from detector.detectors import OneStageDetector
from detector.images import CANNOT_BE_DECODED, OTHER_PROPORTIONS
from detector.inference import MAX_DETECTIONS, detect
from detector.outputs import prepare_folder, write_json
from detector.program import add_data_arguments, default_device, device_name, run_program, whole_number
from detector.scores import format_metrics, score, to_coco_detections, to_coco_ground_truth


def evaluate(
    model: OneStageDetector,
    data: AnnotatedImages,
    image_size: int,
    device: torch.device | str,
    *,
    batch_size: int = 32,
    num_workers: int = 2,
    max_detections: int | None = None,
    amp: torch.dtype | None = None,
    show_progress: bool = True,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Detects in every image of a split and scores it; with torch.distributed every process takes a share of it.

    What was changed or left out on the way is counted in data.defects.

    Args:
        model: FSSD, RetinaNet or RFBNet.
        data: the split.
        image_size: side of the model's input in pixels.
        device: where the model is.
        batch_size, num_workers: of the loader.
        max_detections: as in `detector.scores.score`; also how many per image are kept, 300 at least.
        amp: autocast to this type.
        show_progress: a progress bar.

    Returns:
        The metrics, and the detections as COCO's result records. The same in every process.
    """
    paths = [image.path for image in data.images]
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, num_processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    found, left_out = detect(
        model,
        paths,
        image_size,
        device,
        batch_size=batch_size,
        num_workers=num_workers,
        indices=list(range(rank, len(paths), num_processes)),
        annotated_sizes=[(image.width, image.height) for image in data.images],
        max_detections=max(MAX_DETECTIONS, max_detections or 0),
        amp=amp,
        show_progress=show_progress and rank == 0,
    )
    if distributed:
        gathered: list[Any] = [None] * num_processes
        torch.distributed.all_gather_object(gathered, (found, left_out))
        found = {index: detections for part, _ in gathered for index, detections in part.items()}
        left_out = dict(sorted(entry for _, part in gathered for entry in part.items()))
    for index, detections_of_image in sorted(found.items()):
        for note in detections_of_image.notes:
            data.defects.add(note, data.images[index].name)
    for index, reason in left_out.items():
        kind = OTHER_PROPORTIONS if reason == OTHER_PROPORTIONS else CANNOT_BE_DECODED
        data.defects.add(f"{kind}: left out of the evaluation", data.images[index].name)
    detections = to_coco_detections(found, data)
    ground_truth = to_coco_ground_truth(data, leave_out=list(left_out))
    metrics = score(ground_truth, detections, data.defects, max_detections=max_detections)
    metrics["images_left_out"] = [data.images[index].name for index in left_out]
    return metrics, detections


def read_split(args: argparse.Namespace, checkpoint: dict[str, Any]) -> AnnotatedImages:
    """The split that a command line asks for by --data, --format and --split, with the classes of a checkpoint."""
    layout = recognize_format(args.data, args.format)
    print(f"{args.data}: {'recognized' if args.format == 'auto' else 'read'} as {layout.upper()}")
    held_out = checkpoint.get("held_out") if args.split is None else None
    split = args.split or default_splits(args.data, layout)[1]
    if held_out is not None:
        split = checkpoint["arguments"]["train_split"]
    data = read_data(args.data, layout, split, checkpoint["class_names"])
    return data if held_out is None else select_images(data, held_out)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The command line; returns the metrics."""
    parser = argparse.ArgumentParser(
        "python -m detector.evaluate",
        description="Scores a checkpoint on a data set, or a file of detections against a COCO annotation file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint of detector.train, or its folder")
    add_data_arguments(parser, required=False)
    parser.add_argument("--split", help="by default what training held out, or VOC2007/test, val2017, val or test")
    parser.add_argument("--annotations", type=Path, help="COCO annotation file to score --detections against")
    parser.add_argument("--detections", type=Path, help="COCO result file to score instead of a checkpoint")
    parser.add_argument(
        "--max-detections",
        type=whole_number(1),
        help="per image and class that count; by default 100, as COCO has it, or 300 where an image has more objects",
    )
    parser.add_argument("--batch", type=whole_number(1), default=32, help="images at once")
    parser.add_argument("--workers", type=whole_number(0), default=2, help="processes that decode images")
    parser.add_argument("--device", type=device_name, default=default_device(), help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--out", type=Path, help="folder for metrics.json and detections.json")
    args = parser.parse_args(argv)

    files, trained = {"annotations", "detections"}, {"checkpoint", "data", "split"}
    given = {name for name in files | trained if getattr(args, name) is not None}
    if given & files and given & trained:
        names = ", ".join(f"--{name}" for name in sorted(given))
        parser.error(f"expected --detections with --annotations, or --checkpoint with --data, got {names}")
    if args.out is not None:
        prepare_folder(args.out, ("metrics.json", "detections.json"))
    if args.detections is not None:
        if args.annotations is None:
            parser.error("--detections needs --annotations")
        defects, detections = Defects(), None
        metrics = score(
            read_json(args.annotations, "COCO's images, annotations and categories"),
            read_json(args.detections, "COCO's list of results"),
            defects,
            max_detections=args.max_detections,
            sources=(str(args.annotations), str(args.detections)),
        )
        metrics["defects"] = defects.counts()
        if defects.found:
            print(defects.report())
    else:
        if args.checkpoint is None or args.data is None:
            parser.error("pass --checkpoint and --data, or --detections and --annotations")
        model, content = load_detector(args.checkpoint, args.device)
        data = read_split(args, content)
        print(data.summary())
        known = set(data.defects.found)
        start = time.perf_counter()
        metrics, detections = evaluate(
            model,
            data,
            content["arguments"]["image_size"],
            args.device,
            batch_size=args.batch,
            num_workers=args.workers,
            max_detections=args.max_detections,
        )
        if data.defects.found.keys() - known:
            print(f"met while evaluating:\n{data.defects.report(but=known)}")
        metrics["seconds"] = time.perf_counter() - start
        metrics["checkpoint"], metrics["step"], metrics["split"] = str(args.checkpoint), content.get("step"), data.name
        metrics["defects"] = data.defects.counts()
    if args.out is not None:
        write_json(args.out / "metrics.json", metrics, indent=1)
        if detections is not None:
            write_json(args.out / "detections.json", detections)
    print(format_metrics(metrics))
    if args.out is not None:
        print(f"written to {args.out}")
    return metrics


if __name__ == "__main__":
    run_program(main)
