"""The paper's Figures 3, 4 and 5 and training curves, as PNG, JPEG, PDF or SVG files by the suffix of --out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.transforms import v2

import mg_ops
from detector.checkpoint import load_detector
from detector.data import AnnotatedImage, AnnotatedImages, LoadedImage, load_image
from detector.detectors import OneStageDetector
from detector.evaluate import read_split
from detector.images import CANNOT_BE_DECODED, OTHER_PROPORTIONS, decode
from detector.inference import Detections, detect
from detector.outputs import prepare_folder
from detector.program import add_data_arguments, real_number, run_program, whole_number
from detector.run_log import read_log

mpl.rcParams["text.parse_math"] = False  # names may have dollar signs

RED, GREEN, YELLOW = "#e6194b", "#3cb44b", "#ffe119"
DASHES = (0, (3, 3))


def make_panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes [row, column], each of so many inches."""
    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)


def colors_of(names: list[str]) -> dict[str, str]:
    """A color for each name."""
    palette = mpl.color_sequences["tab10" if len(names) <= 10 else "tab20"]
    return {name: mpl.colors.to_hex(palette[place % len(palette)]) for place, name in enumerate(names)}


def plot_amplification(sigmas: list[float]) -> Figure:
    """Figure 3: the amplified IoU (Eq. 1) over the anchor's IoU, for classification scores from 0 to 1."""
    iou = torch.linspace(0, 1, 201)
    figure, axes = make_panels(1, len(sigmas), 3.1, 3.6, sharey=True)
    scores = [0.0, 0.25, 0.5, 0.75, 1.0]
    colors = mpl.colormaps["viridis"](torch.linspace(0.9, 0, len(scores)).numpy())
    for axis, sigma in zip(axes[0], sigmas, strict=True):
        for score, color in zip(scores, colors, strict=True):
            axis.plot(iou, iou ** ((sigma - score) / sigma), color=color, label=f"p = {score:g}")
        title = f"\N{GREEK SMALL LETTER SIGMA} = {sigma:g}"
        axis.set(title=title, xlabel="IoU of the anchor", xlim=(0, 1), ylim=(0, 1), box_aspect=1)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("amplified IoU")
    axes[0, -1].legend(fontsize="small", loc="lower right", title="score of the class", title_fontsize="small")
    return figure


def draw_boxes(axis: Axes, boxes: Tensor, color: str, width: float = 1.2, style: Any = "-", alpha: float = 1) -> None:
    """Outlines boxes (K, 4), (x1, y1, x2, y2) in pixels, on a picture."""
    patches = [Rectangle((x1, y1), x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes.tolist()]
    outline = {"facecolor": "none", "edgecolor": color, "linewidth": width, "linestyle": style, "alpha": alpha}
    axis.add_collection(PatchCollection(patches, **outline))


def draw_anchors(axis: Axes, anchors: Tensor, color: str) -> None:
    """Outlines anchors (K, 4) and dots their centers. The more there are, the fainter: a large object has many."""
    draw_boxes(axis, anchors, color, alpha=max(min(8 / max(len(anchors), 1), 1), 0.12))
    center = (anchors[:, :2] + anchors[:, 2:]) / 2
    axis.scatter(center[:, 0], center[:, 1], s=9, color=color, edgecolors="black", linewidths=0.3, zorder=2)


def draw_objects(axis: Axes, boxes: Tensor) -> None:
    """Outlines annotated objects (G, 4): white dashes on black, seen on any background."""
    draw_boxes(axis, boxes, "black", width=1.8)
    draw_boxes(axis, boxes, "white", style=DASHES)


def add_legend(figure: Figure, colors: dict[str, str], objects: str, columns: int) -> None:
    """What the colors mean, by name, and what `draw_objects` draws; below the panels."""
    handles: list[Any] = [Line2D([], [], color=color, linewidth=1.6) for color in colors.values()]
    dashes = Line2D([], [], color="white", linewidth=1.2, linestyle=DASHES)
    handles.append((Line2D([], [], color="black", linewidth=1.8), dashes))
    figure.legend(handles, [*colors, objects], loc="outside lower center", ncols=columns, fontsize="small")


def show_image(axis: Axes, image: Tensor, title: str) -> None:
    """A picture (3, H, W) uint8 without ticks."""
    axis.imshow(image.permute(1, 2, 0).numpy())
    axis.set_title(title, fontsize="small")
    axis.set_axis_off()


def load(annotated: AnnotatedImage) -> LoadedImage:
    """The pixels of an image and its objects; an OSError that names it if they cannot be brought together."""
    try:
        decoded = decode(annotated.path)
    except OSError as error:
        raise OSError(f"{annotated.path}: {CANNOT_BE_DECODED}: {error}") from error
    loaded = load_image(annotated, decoded)
    if loaded is None:
        raise OSError(f"{annotated.path}: {OTHER_PROPORTIONS}")
    return loaded


@torch.no_grad()
def plot_assignment(
    model: OneStageDetector, image_size: int, data: AnnotatedImages, positions: list[int], sigma: float
) -> Figure:
    """Figure 4: the positive anchors of static matching, and where those of each half of Mutual Guidance differ."""
    figure, axes = make_panels(len(positions), 3, 3.2, 3.35)
    resize = v2.Resize((image_size, image_size), antialias=True)
    device, anchors = model.anchors.device, model.anchors.cpu()
    for row, position in enumerate(positions):
        loaded = load(data.images[position])
        height, width = loaded.pixels.shape[-2:]
        image = resize(loaded.pixels)
        gt_boxes = loaded.boxes * torch.tensor([image_size / width, image_size / height]).repeat(2)
        cls_logits, box_deltas = model(image[None].to(device))
        static, mutual = (
            mg_ops.mutual_match(
                model.anchors,
                [gt_boxes.to(device)],
                [loaded.labels.to(device)],
                cls_logits=cls_logits,
                box_deltas=box_deltas,
                gt_crowd=[loaded.crowd.to(device)],
                box_coder=mg_ops.BoxCoder(),
                strategy=strategy,
                sigma=sigma,
            )
            for strategy in ("iou", "mutual")
        )
        by_iou = static.cls_positive[0].cpu()
        show_image(axes[row, 0], image, f"{data.images[position].name}: by IoU, {int(by_iou.sum())} positives")
        draw_anchors(axes[row, 0], anchors[by_iou], RED)
        panels = (
            ("Localize to Classify", mutual.cls_positive[0].cpu(), GREEN),
            ("Classify to Localize", mutual.loc_positive[0].cpu(), YELLOW),
        )
        for axis, (name, chosen, color) in zip(axes[row, 1:], panels, strict=True):
            gained, lost = chosen & ~by_iou, by_iou & ~chosen
            show_image(axis, image, f"{name}: {int(gained.sum())} gained, {int(lost.sum())} lost")
            draw_anchors(axis, anchors[lost], RED)
            draw_anchors(axis, anchors[gained], color)
        for axis in axes[row]:
            draw_objects(axis, gt_boxes)
    meanings = {
        "positive by IoU, not by Mutual Guidance (first column: every positive by IoU)": RED,
        "positive by Localize to Classify only": GREEN,
        "positive by Classify to Localize only": YELLOW,
    }
    add_legend(figure, meanings, "object", columns=2)
    return figure


def plot_detections(
    names: list[str], found: list[dict[int, Detections]], class_names: list[list[str]], images: list[AnnotatedImage]
) -> Figure:
    """Figure 5: the detections of several checkpoints side by side, one image a row.

    Args:
        names: of the checkpoints.
        found: for each checkpoint its detections by position of the image.
        class_names: for each checkpoint.
        images: which images.
    """
    figure, axes = make_panels(len(images), len(names), 4.6, 3.7)
    columns = list(zip(names, found, class_names, strict=True))
    labels = {of[label] for _, by_image, of in columns for one in by_image.values() for label in one.labels.tolist()}
    color_of = colors_of(sorted(labels))
    for row, annotated in enumerate(images):
        loaded = load(annotated)
        for axis, (name, by_image, classes) in zip(axes[row], columns, strict=True):
            detections = by_image[row]
            show_image(axis, loaded.pixels, f"{name}: {len(detections.labels)} detections in {annotated.name}")
            draw_objects(axis, loaded.boxes)
            for box, score, label in zip(*(part.tolist() for part in detections[:3]), strict=True):
                color = color_of[classes[label]]
                draw_boxes(axis, torch.tensor([box]), color, width=1.6)
                # Inside the box, so that it stays in the picture.
                frame = {"facecolor": color, "edgecolor": "none", "pad": 0.8}
                text = {"fontsize": 7, "color": "white", "va": "top", "bbox": frame, "clip_on": True}
                axis.text(box[0], box[1], f"{score:.2f}", **text)
    add_legend(figure, color_of, "object, as annotated", columns=min(len(color_of) + 1, 3 * len(names)))
    return figure


def detect_in(
    model: OneStageDetector, images: list[AnnotatedImage], image_size: int, threshold: float
) -> dict[int, Detections]:
    """Detections by position in the list."""
    paths, options = [image.path for image in images], {"num_workers": 0, "show_progress": False}
    return detect(model, paths, image_size, model.anchors.device, score_threshold=threshold, **options)[0]


def plot_curves(runs: list[Path]) -> Figure:
    """Loss, its parts, learning rate, and what evaluations there were, over epochs; a color for each run.

    Raises:
        ValueError: a run has no log.
    """
    panels = {"loss": "loss", "cls_loss": "classification loss", "box_loss": "box loss", "lr": "learning rate"}
    logs: dict[str, list[dict[str, Any]]] = {}
    names = [run.resolve().name for run in runs]
    for run, name in zip(runs, names, strict=True):
        entries = read_log(run / "log.jsonl")
        if not entries:
            raise ValueError(f"{run}: expected the folder of a run of detector.train, and there is no log.jsonl in it")
        # Runs in folders of one name are told apart by their paths.
        logs[name if names.count(name) == 1 else str(run)] = entries
    if any("eval_AP" in entry for entries in logs.values() for entry in entries):
        panels |= {"eval_AP": "AP", "eval_AP50": "AP50"}
    figure, axes = make_panels(2, len(panels) // 2, 3.6, 2.8)
    color_of = colors_of(list(logs))
    for axis, (key, title) in zip(axes.flat, panels.items(), strict=True):
        for name, entries in logs.items():
            pairs = ((entry.get("epoch"), entry.get(key)) for entry in entries)
            points = [pair for pair in pairs if all(isinstance(value, (int, float)) for value in pair)]
            marker = "o" if key.startswith("eval") else None
            if points:
                axis.plot(*zip(*points, strict=True), label=name, color=color_of[name], marker=marker, linewidth=1.2)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
        if key.startswith("eval"):
            axis.set_ylim(0, 1)
    axes[0, 0].legend(fontsize="x-small" if max(map(len, logs)) < 30 else 4)
    return figure


def choose_images(data: AnnotatedImages, names: list[str] | None, count: int) -> list[int]:
    """Positions of the images asked for by name, or of `count` spread evenly over those with objects."""
    if names:
        position_of = {image.name: position for position, image in enumerate(data.images)}
        unknown = [name for name in names if name not in position_of]
        if unknown:
            raise ValueError(f"--images: not in split {data.name!r}: {', '.join(unknown)}")
        return [position_of[name] for name in names]
    with_objects = [position for position, image in enumerate(data.images) if len(image.labels) > 0]
    if not with_objects:
        raise ValueError(f"no image in split {data.name!r} has an object; name some with --images")
    count = min(count, len(with_objects))
    return [with_objects[index * len(with_objects) // count] for index in range(count)]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The figure asked for, and its flags."""
    parser = argparse.ArgumentParser("python -m detector.visualize", description=__doc__)
    figures = parser.add_subparsers(dest="figure", required=True)
    sigma = real_number(1, above=True)

    amplification = figures.add_parser("amplification", help="Figure 3: how a score amplifies an anchor's IoU")
    amplification.add_argument("--sigmas", nargs="+", type=sigma, default=[1.5, 2.0, 3.0], help="one panel each")

    assignment = figures.add_parser("assignment", help="Figure 4: which anchors each strategy chooses")
    assignment.add_argument("--checkpoint", type=Path, required=True, help="whose predictions guide the matching")
    assignment.add_argument("--sigma", type=sigma, default=2.0, help="degree of amplification")

    detections = figures.add_parser("detections", help="Figure 5: detections of checkpoints side by side")
    detections.add_argument("--checkpoints", nargs="+", type=Path, required=True, help="one column each")
    detections.add_argument("--threshold", type=real_number(0, 1), default=0.3, help="lowest score shown")

    for figure in (assignment, detections):
        add_data_arguments(figure)
        figure.add_argument("--split", help="by default what training held out, or VOC2007/test, val2017, val or test")
        figure.add_argument("--images", nargs="+", help="names of images; by default some spread over the split")
        figure.add_argument("--count", type=whole_number(1), default=4, help="how many images, without --images")

    curves = figures.add_parser("curves", help="loss, learning rate and AP of runs over epochs")
    curves.add_argument("--runs", nargs="+", type=Path, required=True, help="folders of detector.train")

    for figure in (amplification, assignment, detections, curves):
        figure.add_argument("--out", type=Path, required=True, help="file to write: .png, .jpg, .pdf, .svg, ...")
        figure.add_argument("--dpi", type=whole_number(1), default=150, help="of a .png or .jpg")
    args = parser.parse_args(argv)
    suffixes = sorted(Figure().canvas.get_supported_filetypes())
    if args.out.suffix[1:].lower() not in suffixes:
        raise ValueError(f"--out: expected a name that ends in .{', .'.join(suffixes)}, got {args.out}")
    return args


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = parse_arguments(argv)
    prepare_folder(args.out.parent, [args.out.name])
    if args.figure == "amplification":
        drawing = plot_amplification(args.sigmas)
    elif args.figure == "curves":
        drawing = plot_curves(args.runs)
    else:
        checkpoints = [args.checkpoint] if args.figure == "assignment" else args.checkpoints
        loaded = [load_detector(checkpoint, "cpu") for checkpoint in checkpoints]
        data = read_split(args, loaded[0][1])
        positions = choose_images(data, args.images, args.count)
        sizes = [content["arguments"]["image_size"] for _, content in loaded]
        if args.figure == "assignment":
            drawing = plot_assignment(loaded[0][0], sizes[0], data, positions, args.sigma)
        else:
            images = [data.images[position] for position in positions]
            found = [
                detect_in(model, images, size, args.threshold) for (model, _), size in zip(loaded, sizes, strict=True)
            ]
            names = [content["arguments"].get("strategy") for _, content in loaded]
            if None in names or len(set(names)) < len(names):
                names = [path.parent.name if path.suffix else path.name for path in checkpoints]
            drawing = plot_detections(names, found, [content["class_names"] for _, content in loaded], images)
    drawing.savefig(args.out, dpi=args.dpi)
    plt.close(drawing)
    print(f"written to {args.out}")


if __name__ == "__main__":
    run_program(main)
