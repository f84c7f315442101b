"""Runs a detector over images: from files, arrays and tensors to boxes in pixels."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import nms
from torchvision.transforms import v2
from tqdm import tqdm

from detector.batches import EvaluationImages, EvaluationSample
from detector.checkpoint import load_detector
from detector.detectors import OneStageDetector
from detector.images import Placement, decode_image, decode_pillow
from detector.program import default_device
from mg_ops import BoxCoder

SCORE_THRESHOLD = 0.005
NMS_IOU = 0.5
MAX_DETECTIONS = 300
MAX_CANDIDATES = 5000
"""(anchor, class) pairs of an image that enter its NMS, the best by score (and all that equal the last of them)."""

MAX_HELD = 2**28
"""Bytes of decoded images that a thread holds for its pictures: a batch of large images is done in parts."""

NOT_FINITE = "image for which the network gives numbers that are not finite"

Item = TypeVar("Item")
Result = TypeVar("Result")


class Detections(NamedTuple):
    """What was found in one image, best first."""

    boxes: Tensor  # (D, 4) float32, (x1, y1, x2, y2) in pixels
    scores: Tensor  # (D,) float32
    labels: Tensor  # (D,) int64
    notes: tuple[str, ...] = ()
    """What was changed in reading the image, for messages."""


def find_candidates(scores: Tensor) -> Tensor:
    """Which (anchor, class) pairs may enter the NMS of their image: (B, A, C) bool of scores (B, A, C)."""
    flat = scores.flatten(1)
    if flat.shape[1] <= MAX_CANDIDATES:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores >= flat.topk(MAX_CANDIDATES).values[:, -1:, None]


def select_detections(
    cls_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    image_size: int,
    score_threshold: float = SCORE_THRESHOLD,
    max_detections: int = MAX_DETECTIONS,
) -> list[Detections]:
    """Scores over the threshold, boxes clipped to the input, NMS class by class, the best of each image.

    Args:
        cls_logits: (B, A, C).
        box_deltas: (B, A, 4).
        anchors: (A, 4) in pixels of the input.
        image_size: side of the input in pixels.
        score_threshold: what a score must exceed.
        max_detections: per image, over all classes.
    """
    scores = cls_logits.float().sigmoid()  # (B, A, C)
    found = scores > score_threshold
    if (found.flatten(1).sum(1) > MAX_CANDIDATES).any():
        found &= find_candidates(scores)
    image, anchor, label = found.nonzero().unbind(1)  # (N,), image by image
    score = scores[image, anchor, label]
    # Of the candidates alone: decoding every anchor takes longer than everything else here.
    boxes = BoxCoder().decode(anchors=anchors[anchor], deltas=box_deltas[image, anchor]).clamp(0, image_size)  # (N, 4)
    # Classes are moved apart, so that no two of them overlap; in float64 that changes no IoU.
    apart = boxes.double() + (label * (image_size + 1.0))[:, None]
    solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
    detections = []
    for index in range(len(scores)):
        of_image = (solid & (image == index)).nonzero().squeeze(1)
        keep = of_image[nms(apart[of_image], score[of_image].double(), NMS_IOU)][:max_detections]
        detections.append(Detections(boxes[keep], score[keep], label[keep]))
    return detections


def detect_batch(
    model: OneStageDetector,
    images: Tensor,
    sizes: Sequence[tuple[int, int]],
    device: torch.device | str,
    score_threshold: float,
    max_detections: int = MAX_DETECTIONS,
    amp: torch.dtype | None = None,
) -> list[Detections]:
    """Detections in a batch, on the CPU, in pixels of the images before they were resized to the network's input.

    Args:
        model: in evaluation mode.
        images: (B, 3, S, S) uint8.
        sizes: (width, height) of each image before.
        device: where the model is.
        score_threshold, max_detections: as in `select_detections`.
        amp: autocast to this type.
    """
    image_size = images.shape[-1]
    with torch.no_grad():
        with torch.autocast(torch.device(device).type, dtype=amp, enabled=amp is not None):
            cls_logits, box_deltas = model(images.to(device, non_blocking=True))
        finite = (cls_logits.isfinite().flatten(1).all(1) & box_deltas.isfinite().flatten(1).all(1)).tolist()
        found = select_detections(cls_logits, box_deltas, model.anchors, image_size, score_threshold, max_detections)
    return [
        Detections(
            boxes.cpu() * torch.tensor([width / image_size, height / image_size]).repeat(2),
            scores.cpu(),
            labels.cpu(),
            () if is_finite else (NOT_FINITE,),
        )
        for (boxes, scores, labels, _), is_finite, (width, height) in zip(found, finite, sizes, strict=True)
    ]


def run_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int
) -> Generator[Result, None, None]:
    """`map` on threads, a few items ahead: results in order, and the first error where its result would come.

    Each thread has its share of torch's threads: two batches side by side are faster than two cores on one batch, whose
    layers are too small to share. With 0 threads everything happens here.
    """
    if num_threads == 0:
        yield from map(function, items)
        return
    torch_threads = torch.get_num_threads()
    share = max(1, torch_threads // num_threads)
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads, "batch", torch.set_num_threads, (share,)) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > num_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(torch_threads)


def detect(
    model: OneStageDetector, paths: list[Path], image_size: int, device: torch.device | str, **options: Any
) -> tuple[dict[int, Detections], dict[int, str]]:
    """What `detect_each` gives with these arguments: the detections by index, and by index why others were left out."""
    found: dict[int, Detections] = {}
    left_out: dict[int, str] = {}
    for index, result in detect_each(model, paths, image_size, device, **options):
        if isinstance(result, Detections):
            found[index] = result
        else:
            left_out[index] = result
    return found, left_out


def detect_each(
    model: OneStageDetector,
    paths: list[Path],
    image_size: int,
    device: torch.device | str,
    *,
    batch_size: int = 32,
    num_workers: int = 2,
    indices: list[int] | None = None,
    annotated_sizes: list[tuple[int, int]] | None = None,
    score_threshold: float = SCORE_THRESHOLD,
    max_detections: int = MAX_DETECTIONS,
    amp: torch.dtype | None = None,
    show_progress: bool = True,
    use: Callable[[int, Detections, Tensor], Any] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Runs a detector over images, and gives the results of each batch as soon as they are there, in order.

    Args:
        model: FSSD, RetinaNet or RFBNet; its mode is left as it is found.
        paths: of the images.
        image_size: side of the model's input.
        device: where the model is.
        batch_size: images at once.
        num_workers: threads; each takes a batch from its files to its results.
        indices: which of the paths; all by default.
        annotated_sizes: (width, height) of each image as annotated, if it is.
        score_threshold: what a score must exceed.
        max_detections: per image, over all classes.
        amp: autocast to this type.
        show_progress: a progress bar.
        use: called in the thread with the index, the detections and the image as decoded, (3, H, W) uint8.

    Yields:
        The index of a path with its detections, on the CPU, in pixels of the image as annotated, or else of the image
        the right way up (with what `use` made of them, if it is given); or with the reason why the image was left out.
    """
    was_training = model.training
    model.eval()
    indices = list(range(len(paths))) if indices is None else indices
    data = EvaluationImages(paths, image_size, annotated_sizes)

    def run(batch: list[int]) -> list[tuple[int, Any]]:
        results: dict[int, Any] = {}
        waiting: list[EvaluationSample] = []
        for index in batch:
            sample = data[index]
            results[index] = sample.notes[0] if sample.placement is None else None
            if sample.placement is not None:
                waiting.append(sample if use is not None else sample._replace(pixels=None))
            held = sum(sample.pixels.numel() for sample in waiting if sample.pixels is not None)
            if waiting and (index == batch[-1] or held > MAX_HELD):
                images = torch.stack([cast(Tensor, sample.image) for sample in waiting])
                placements = [cast(Placement, sample.placement) for sample in waiting]
                sizes = [placement.image for placement in placements]
                found = detect_batch(model, images, sizes, device, score_threshold, max_detections, amp)
                for sample, placement, detections in zip(waiting, placements, found, strict=True):
                    boxes, notes = placement.to_annotation(detections.boxes), sample.notes + detections.notes
                    result = detections._replace(boxes=boxes, notes=notes)
                    results[sample.position] = (
                        result if use is None else use(sample.position, result, cast(Tensor, sample.pixels))
                    )
                waiting = []
        return list(results.items())

    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    with contextlib.closing(run_ahead(run, batches, num_workers)) as results:
        try:
            for of_batch in tqdm(
                results, "detecting", len(batches), leave=False, disable=None if show_progress else True
            ):
                yield from of_batch
        finally:
            results.close()  # before the model changes under a thread
            model.train(was_training)


def to_pixels(image: object) -> Tensor:
    """An image as (3, H, W) uint8: `Detector` says what it may be.

    Raises:
        OSError: a file cannot be read.
        TypeError, ValueError: what is given is no image; the message says what was expected.
    """
    if isinstance(image, (str, Path)):
        try:
            return decode_image(Path(image))
        except OSError as error:
            raise OSError(f"{image}: {error}") from error
    if isinstance(image, Image.Image):
        try:
            return decode_pillow(image).pixels
        except OSError as error:
            raise ValueError(f"images: {error}") from error
    if isinstance(image, np.ndarray):
        layout, channels = "an array (H, W, 3)", -1
        if image.dtype.kind not in "biuf":
            raise ValueError(f"images: expected an array of uint8, or floating values from 0 to 1, got {image.dtype}")
        image = torch.from_numpy(np.require(image, requirements=["C", "W"]))  # a copy of what cannot be written to
    elif isinstance(image, Tensor):
        layout, channels = "a tensor (3, H, W)", 0
    else:
        raise TypeError(f"images: expected paths, PIL images, arrays or tensors, got {type(image).__name__}")
    shape = tuple(image.shape)
    if image.dim() != 3 or shape[channels] != 3 or 0 in shape:
        raise ValueError(f"images: expected {layout}, RGB, got the shape {shape}")
    if image.is_floating_point():
        lowest, highest = image.min().item(), image.max().item()
        if not (lowest >= 0 and highest <= 1):
            raise ValueError(
                f"images: expected floating values from 0 to 1, got {lowest:g} to {highest:g}; "
                "values up to 255 are expected as uint8"
            )
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"images: expected uint8, or floating values from 0 to 1, got {image.dtype}")
    return image if channels == 0 else image.permute(2, 0, 1)


class Detector:
    """A trained detector: images in; boxes, scores and labels out.

    Args:
        model: FSSD, RetinaNet or RFBNet; it is put into evaluation mode.
        class_names: what the labels mean, by their number.
        image_size: S, the side in pixels of the model's input, to which every image is resized.

    Examples:
        >>> detector = Detector.load("runs/NAME/best.pt")  # doctest: +SKIP
        >>> found = detector("photo.jpg")  # doctest: +SKIP
        >>> [detector.class_names[label] for label in found["labels"]]  # doctest: +SKIP
    """

    def __init__(self, model: OneStageDetector, class_names: list[str], image_size: int) -> None:
        self.model, self.class_names, self.image_size = model.eval(), class_names, image_size
        self.resize = v2.Resize((image_size, image_size), antialias=True)

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str | None = None) -> Detector:
        """The detector in a checkpoint, its run's folder, or a safetensors file; by default on a GPU, if there is one.

        Raises:
            ValueError: there is no such file, or it is something else; the message names the file and the entry.
        """
        model, content = load_detector(Path(path), default_device() if device is None else device)
        return cls(model, content["class_names"], content["arguments"]["image_size"])

    def __call__(
        self,
        images: Any,
        *,
        score_threshold: float = 0.3,
        max_detections: int = MAX_DETECTIONS,
        batch_size: int = 16,
        amp: torch.dtype | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Detects objects.

        Args:
            images: one image, or a list of them, of any sizes: paths, PIL images, arrays (H, W, 3), tensors (3, H, W);
                or a batch (B, H, W, 3) or (B, 3, H, W). RGB, as uint8 or as floating values from 0 to 1.
            score_threshold: what a score must exceed.
            max_detections: per image, over all classes.
            batch_size: images that the network takes at once.
            amp: autocast to this type.

        Returns:
            For each image, on the CPU, best first: `boxes` (D, 4) float32, (x1, y1, x2, y2) in pixels of the image;
            `scores` (D,) float32; `labels` (D,) int64, from 0. One dictionary for one image, else a list.

        Raises:
            OSError: a file cannot be read.
            TypeError, ValueError: what is given is no image; the message says what was expected.
        """
        is_batch = isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4)
        given = list(images) if is_batch else [images]
        found: list[dict[str, Tensor]] = []
        for start in range(0, len(given), batch_size):
            pixels = [to_pixels(image) for image in given[start : start + batch_size]]
            resized = torch.stack([self.resize(image.cpu()) for image in pixels])
            sizes = [(image.shape[2], image.shape[1]) for image in pixels]
            device = self.model.anchors.device
            for detections in detect_batch(self.model, resized, sizes, device, score_threshold, max_detections, amp):
                found.append({"boxes": detections.boxes, "scores": detections.scores, "labels": detections.labels})
        return found if is_batch else found[0]
