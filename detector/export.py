"""Exports a trained detector, with decoding and NMS inside, to be run without this code.

    python -m detector.export --checkpoint runs/NAME/best.pt                  # best.onnx beside it
    python -m detector.export --checkpoint runs/NAME/best.pt --out a.onnx a.pt2 a.safetensors --half

An exported detector takes images (B, 3, S, S) uint8, RGB, for any B, and gives D = --max-detections entries for each,
best first: boxes (B, D, 4) float32, (x1, y1, x2, y2) in pixels of the input; scores (B, D) float32; labels (B, D)
int64. After the last detection scores are 0 and labels -1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.ops import nms

from detector.checkpoint import load_detector, save_weights
from detector.detect import find_images
from detector.detectors import OneStageDetector
from detector.inference import MAX_DETECTIONS, NMS_IOU, find_candidates, to_pixels
from detector.outputs import prepare_folder, strict_json, whole_file
from detector.program import device_name, real_number, run_program, whole_number
from mg_ops import BoxCoder

NEEDED = {".onnx": ("onnx", "onnxruntime", "onnxscript"), ".pt2": (), ".safetensors": ("safetensors",)}
"""What is written, by suffix, and the packages that this takes."""

TOLERANCES = {False: (0.05, 1e-3), True: (2.0, 0.02)}
"""Pixels of the input, and score, that an anchor may differ by from PyTorch in float32; True for a float16 network."""


def suppress(boxes: Tensor, scores: Tensor, score_threshold: Tensor, max_detections: int) -> Tensor:
    """NMS of each class of each image, as ONNX's NonMaxSuppression.

    Args:
        boxes: (B, A, 4) float32, (x1, y1, x2, y2) in pixels, from 0.
        scores: (B, C, A) float32.
        score_threshold: (1,) float32, what a score must exceed.
        max_detections: per class, at least; what ONNX's operator would leave out beyond it, `select` does.

    Returns:
        (N, 3) int64: image, class and anchor of what is kept.
    """
    image, label, anchor = (scores > score_threshold).nonzero().unbind(1)  # (N,)
    # Images and classes are moved apart, so that no two of them overlap; in float64 that changes no IoU.
    group = (image * scores.shape[1] + label).double() * (boxes.amax().double() + 1)
    moved, score = boxes[image, anchor].double() + group[:, None], scores[image, label, anchor].double()
    # torch.export takes it that NMS keeps at least two boxes. So two go along that overlap none and come last.
    others = moved.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]])
    keep = nms(torch.cat([moved, others]), torch.cat([score, others[:, 0]]), NMS_IOU)[:-2]
    return torch.stack([image[keep], label[keep], anchor[keep]], dim=1)


# ONNX has an operator for this. torch's exporter finds it by this name, and leaves the name in the graph until then.
suppress_operator = torch.library.custom_op("detector::suppress", suppress, mutates_args=())


@suppress_operator.register_fake
def _(boxes: Tensor, scores: Tensor, score_threshold: Tensor, max_detections: int) -> Tensor:
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(), 3), dtype=torch.int64)


class ExportedDetector(nn.Module):
    """What is exported: the top of this file says what it takes and gives.

    Args:
        model: FSSD, RetinaNet or RFBNet, in evaluation mode; it is copied.
        image_size: S.
        score_threshold: what a score must exceed.
        max_detections: D, over all classes.
        half: the network in float16, and what follows in float32 all the same.
    """

    score_threshold: Tensor

    def __init__(
        self, model: OneStageDetector, image_size: int, score_threshold: float, max_detections: int, half: bool = False
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(model).requires_grad_(False)
        if half:
            for part in (self.network.backbone, self.network.neck, self.network.head):
                part.half()
            normalize = self.network.backbone.get_submodule("normalize").float()
            normalize.register_forward_hook(lambda module, inputs, output: output.half())
        self.image_size, self.max_detections = image_size, max_detections
        self.suppress: Callable[[Tensor, Tensor, Tensor, int], Tensor] = suppress
        self.register_buffer("score_threshold", torch.tensor([score_threshold], device=model.anchors.device))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.select(*self.decode(images))

    def decode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> boxes (B, A, 4), and scores (B, C, A), 0 where an anchor is no candidate."""
        cls_logits, box_deltas = self.network(images)
        # As `mg_ops.BoxCoder` decodes, with the exp of who runs it.
        coder, anchors = BoxCoder(), self.network.anchors
        deltas = box_deltas.float() / anchors.new_tensor(coder.weights)
        size = anchors[:, 2:] - anchors[:, :2]
        center = anchors[:, :2] + 0.5 * size + deltas[..., :2] * size
        half = 0.5 * size * deltas[..., 2:].clamp(max=coder.clip).exp()
        boxes = torch.cat([center - half, center + half], dim=-1).clamp(0, self.image_size)
        scores = cls_logits.float().sigmoid()  # (B, A, C)
        solid = (boxes[..., 2:] > boxes[..., :2]).all(-1, keepdim=True)
        return boxes, torch.where(find_candidates(scores) & solid, scores, 0.0).transpose(1, 2)

    def select(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `decode` gives -> boxes, scores and labels of the best, filled up to D."""
        kept = self.suppress(boxes, scores, self.score_threshold, self.max_detections)
        image, label, anchor = kept.unbind(1)
        found = torch.zeros_like(scores).index_put((image, label, anchor), scores[image, label, anchor]).flatten(1)
        best, place = found.topk(min(self.max_detections, found.shape[1]))  # (B, D)
        num_anchors = boxes.shape[1]
        best_boxes = boxes.gather(1, (place % num_anchors).unsqueeze(2).expand(-1, -1, 4))
        return (
            torch.where(best.unsqueeze(2) > 0, best_boxes, 0.0),
            best,
            torch.where(best > 0, place // num_anchors, -1),
        )


def make_check_images(image_size: int, paths: list[Path]) -> Tensor:
    """Images (B, 3, S, S) uint8 to compare on: the first 16 of those given, or three of disks and boxes on noise."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(3):
        images.append(Image.fromarray(random.integers(80, 176, (image_size, image_size, 3), np.uint8)))
        draw = ImageDraw.Draw(images[-1])
        for shape in (draw.ellipse, draw.rectangle) * 3:
            x, y, side = random.integers(image_size // 12, image_size // 2, 3).tolist()
            shape((x, y, x + side, y + side), fill=tuple(random.integers(0, 256, 3).tolist()))
    images = [Image.fromarray(to_pixels(path).permute(1, 2, 0).numpy()) for path in paths[:16]] or images
    return torch.stack([to_pixels(image.resize((image_size, image_size))) for image in images])


def in_order(boxes: Any, scores: Any, labels: Any) -> np.ndarray:
    """Detections (B, D, 6), ordered by score and, where scores are equal, by the rest."""
    columns = [np.asarray(column, np.float64)[..., None] for column in (scores, labels)]
    table = np.concatenate([*columns, np.asarray(boxes, np.float64)], axis=-1)
    return np.stack([image[np.lexsort(image.T[::-1])] for image in table])


def choose_thresholds(reference: ExportedDetector, images: Tensor) -> list[float]:
    """Thresholds that about 100 boxes an image exceed, a single box, and none."""
    scores = reference.decode(images)[1].flatten()
    best = scores.topk(min(100 * len(images), len(scores))).values
    return [best[-1].item(), best[1].item(), 1.0]


def compare(
    reference: ExportedDetector, half: bool, run: Callable[[Tensor, float], tuple[Any, Any, Any]], images: Tensor
) -> str:
    """Compares an exported detector with PyTorch, on a batch and on its first image alone, with many boxes and few.

    In two steps, since the smallest difference can turn an NMS: the boxes and scores of all anchors must be near, and
    what is selected of them equal.

    Args:
        reference: in float32.
        half: whether what is compared has its network in float16.
        run: images and a threshold -> what the exported detector gives; its boxes (B, A, 4) and its scores (B, C, A)
            before the NMS.
        images: (B, 3, S, S) uint8.

    Returns:
        What was found, for a message.

    Raises:
        RuntimeError: they differ.
    """
    farthest, count = [0.0, 0.0], 0
    for threshold, batch in itertools.product(choose_thresholds(reference, images), (images[:1], images)):
        reference.score_threshold.fill_(threshold)
        outputs, boxes, scores = run(batch, threshold)
        boxes, scores = torch.as_tensor(boxes), torch.as_tensor(scores)
        true_boxes, true_scores = reference.decode(batch)
        both = (scores > 0) & (true_scores > 0)  # candidates in both: all but a few at the limit
        if both.sum() < 0.95 * (true_scores > 0).sum():
            raise RuntimeError("it has other candidates for its NMS than PyTorch")
        distances = ((boxes - true_boxes).abs().max(), (scores - true_scores).abs()[both].max())
        farthest = np.maximum(farthest, [distance.item() for distance in distances]).tolist()  # NaN stays
        if not all(far <= limit for far, limit in zip(farthest, TOLERANCES[half], strict=True)):
            raise RuntimeError(f"boxes differ from PyTorch's by {farthest[0]:.3g} pixels, scores by {farthest[1]:.3g}")
        selected = [output.cpu() for output in reference.select(boxes, scores)]
        if not np.array_equal(in_order(*outputs), in_order(*selected)):
            raise RuntimeError("its NMS selects other boxes than PyTorch's")
        count += int((selected[2] >= 0).sum())
    return (
        f"{count} boxes equal PyTorch's in batches of 1 and {len(images)}; "
        f"all anchors within {farthest[0]:.1g} pixels, scores within {farthest[1]:.1g}"
    )


def export_onnx(
    exported: ExportedDetector, reference: ExportedDetector, half: bool, images: Tensor, about: dict[str, str]
) -> tuple[bytes, str]:
    """An ONNX file, and what a comparison in onnxruntime found."""
    import onnx
    import onnxruntime
    import onnxscript

    opset: Any = onnxscript.opset18

    def onnx_suppress(boxes: Any, scores: Any, score_threshold: Any, max_detections: int) -> Any:
        most, iou = opset.Constant(value_ints=[max_detections]), opset.Constant(value_floats=[NMS_IOU])
        return opset.NonMaxSuppression(boxes, scores, most, iou, score_threshold)

    exported.suppress = suppress_operator
    program = torch.onnx.export(
        exported,
        (images[:1].repeat(2, 1, 1, 1),),
        dynamo=True,
        verbose=False,
        opset_version=18,
        input_names=["images"],
        output_names=["boxes", "scores", "labels"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        custom_translation_table={torch.ops.detector.suppress.default: onnx_suppress},
    )
    exported.suppress = suppress
    assert program is not None  # with dynamo it is a program
    model: Any = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # the places in this code that it comes from
    onnx.helper.set_model_props(model, about)

    checked = onnx.ModelProto.FromString(model.SerializeToString())
    (nms_node,) = (node for node in checked.graph.node if node.op_type == "NonMaxSuppression")
    checked.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in nms_node.input[:2])
    (stored,) = (tensor for tensor in checked.graph.initializer if tensor.name == "score_threshold")
    checked.graph.initializer.remove(stored)
    checked.graph.input.append(onnx.helper.make_tensor_value_info(stored.name, stored.data_type, stored.dims))
    session = onnxruntime.InferenceSession(checked.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(batch: Tensor, threshold: float) -> tuple[Any, Any, Any]:
        inputs = {"images": batch.numpy(), "score_threshold": np.array([threshold], np.float32)}
        *outputs, boxes, scores = session.run(None, inputs)
        return outputs, boxes, scores

    found = compare(reference, half, run, images)
    return model.SerializeToString(), f"in onnxruntime {onnxruntime.__version__} {found}"


def export_torch(
    exported: ExportedDetector, reference: ExportedDetector, half: bool, images: Tensor, about: dict[str, str]
) -> tuple[bytes, str]:
    """What `torch.export.save` writes, and what a comparison, once it was loaded again, found."""
    example = images[:1].repeat(2, 1, 1, 1)
    program = torch.export.export(exported, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=about)
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()

    def run(batch: Tensor, threshold: float) -> tuple[Any, Any, Any]:
        loaded.get_buffer("score_threshold").fill_(threshold)
        return (loaded(batch), *exported.decode(batch))

    with torch.backends.cudnn.flags(deterministic=True):  # the same network twice gives the same
        found = compare(reference, half, run, images)
    return file.getvalue(), f"loaded again {found}"


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Keeps back what torch's exporters say of their own workings."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def main(argv: list[str] | None = None) -> list[Path]:
    """The command line; returns the files written.

    Raises:
        RuntimeError: what was exported does not give what PyTorch gives; its file is not written.
    """
    parser = argparse.ArgumentParser(
        "python -m detector.export",
        description="Exports a detector with decoding and NMS inside, once it gives what PyTorch gives.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pt, last.pt or a run's folder")
    parser.add_argument(
        "--out",
        type=Path,
        nargs="+",
        help="files: .onnx, .pt2 (torch.export), .safetensors (weights alone); by default .onnx beside --checkpoint",
    )
    parser.add_argument("--half", action="store_true", help="the network in float16, in .onnx and .pt2")
    parser.add_argument("--threshold", type=real_number(0, 1), default=0.05, help="lowest score that is given out")
    parser.add_argument("--max-detections", type=whole_number(1), default=MAX_DETECTIONS, help="per image")
    parser.add_argument("--images", type=Path, nargs="+", help="images to compare on; by default drawn ones")
    parser.add_argument("--device", type=device_name, default="cpu", help="where a .pt2 file will run")
    args = parser.parse_args(argv)
    stem = args.checkpoint / "last.pt" if args.checkpoint.is_dir() else args.checkpoint
    files: list[Path] = args.out or [stem.with_suffix(".onnx")]
    for file in files:
        if file.suffix not in NEEDED:
            parser.error(f"--out: expected names that end in {', '.join(NEEDED)}, got {str(file)!r}")
        prepare_folder(file.parent, [file.name])
        for package in NEEDED[file.suffix]:
            importlib.import_module(package)

    model, content = load_detector(args.checkpoint, "cpu")
    image_size = content["arguments"]["image_size"]
    images = make_check_images(image_size, [path for path, _ in find_images(args.images)] if args.images else [])
    about = {"class_names": strict_json(content["class_names"]), "image_size": str(image_size)}
    about |= {"score_threshold": str(args.threshold), "precision": "float16" if args.half else "float32"}
    for file in files:
        if file.suffix == ".safetensors":
            save_weights(content, file)
            print(f"{file}: the weights, in float32")
            continue
        device = "cpu" if file.suffix == ".onnx" else args.device
        settings = image_size, args.threshold, args.max_detections
        exported = ExportedDetector(model, *settings, args.half).to(device).eval()
        reference = ExportedDetector(model, *settings).to(device).eval()
        export = export_onnx if file.suffix == ".onnx" else export_torch
        try:
            with without_warnings(), torch.no_grad():
                data, found = export(exported, reference, args.half, images.to(device), about)
        except RuntimeError as error:
            raise RuntimeError(f"{file} is not written: {error}") from error
        with whole_file(file) as output:
            output.write(data)
        print(f"{file}: {len(data) / 2**20:.1f} MiB, {about['precision']}; {found}")
    return files


if __name__ == "__main__":
    run_program(main)
