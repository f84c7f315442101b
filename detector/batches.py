"""The batches that training and evaluation are fed."""

from __future__ import annotations

import atexit
import copy
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.transforms import v2
from tqdm import tqdm

from detector.augment import TrainingTransform
from detector.data import AnnotatedImages, LoadedImage, load_image
from detector.images import CANNOT_BE_DECODED, OTHER_PROPORTIONS, DecodedImage, Placement, decode, place_annotation

MAX_SEED = 2**32 - 1
"""torch's generator on the CPU takes 32 bits of a seed: beyond, other seeds would give the same numbers again."""


def combine_seed(*parts: int) -> int:
    """One seed from several numbers."""
    seed = 0
    for part in parts:
        seed = seed * 1_000_003 + part
    return seed % 2**64  # what torch takes


def decode_all(data: AnnotatedImages) -> dict[int, DecodedImage]:
    """Every image of a split in memory, by its position; those that cannot be decoded are left out."""

    def decode_one(index: int) -> DecodedImage | None:
        try:
            return decode(data.images[index].path)
        except OSError:
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = tqdm(
            pool.map(decode_one, range(len(data.images))),
            f"decoding {data.name}",
            len(data.images),
            False,
            disable=None,
        )
        return {index: image for index, image in enumerate(decoded) if image is not None}


class TrainingSample(NamedTuple):
    """One augmented image."""

    image: Tensor  # (3, S, S) uint8
    boxes: Tensor  # (G, 4) float32, pixels of the input
    labels: Tensor  # (G,) int64
    crowd: Tensor  # (G,) bool
    image_name: str
    defects: list[tuple[str, str]]  # kinds of what was changed or left out, and where


class TrainingBatch(NamedTuple):
    """B augmented images and their N objects, packed as `mg_ops.mutual_match` takes them, padding after the last."""

    images: Tensor  # (B, 3, S, S) uint8
    gt_boxes: Tensor  # (N, 4) float32, pixels of the input
    gt_labels: Tensor  # (N,) int64
    gt_crowd: Tensor  # (N,) bool
    gt_offsets: Tensor  # (B + 1,) int64
    image_names: list[str]
    defects: list[tuple[str, str]]


def collate(samples: list[TrainingSample], capacity: int = 0) -> TrainingBatch:
    """Stacks the images and packs their objects, padded to the capacity if there are fewer; padding does not count."""
    images, boxes, labels, crowd, names, defects = zip(*samples, strict=True)
    offsets = torch.tensor([0] + [len(of_image) for of_image in labels]).cumsum(0)
    padding = max(0, capacity - int(offsets[-1]))

    def pack(values: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([*values, values[0].new_zeros(padding, *values[0].shape[1:])])

    objects = pack(boxes), pack(labels), pack(crowd)
    return TrainingBatch(torch.stack(images), *objects, offsets, list(names), [*chain(*defects)])


class TrainingImages(Dataset[TrainingSample]):
    """Augmented images by (index, epoch).

    What augmentation does to an image follows from the seed, the epoch and the image alone: neither the number of
    workers and processes nor where a run was interrupted changes it.
    """

    def __init__(
        self,
        data: AnnotatedImages,
        transform: TrainingTransform,
        seed: int,
        decoded: dict[int, DecodedImage] | None = None,
    ) -> None:
        self.data, self.transform, self.seed, self.decoded = data, transform, seed, decoded or {}

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, key: tuple[int, int]) -> TrainingSample:
        index, epoch = key
        defects: list[tuple[str, str]] = []
        loaded = self.load(index, defects)
        for _ in range(len(self.data.images)):
            if loaded is not None:
                break
            # The next image stands in for one that cannot be used, so that every batch keeps its size.
            index = (index + 1) % len(self.data.images)
            loaded = self.load(index, defects)
        if loaded is None:
            reasons = "; ".join(sorted({kind for kind, _ in defects}))
            raise OSError(f"{self.data.name}: not one of {len(self.data.images)} images can be used: {reasons}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(combine_seed(self.seed, epoch, index))
            image, boxes, labels, crowd = self.transform(loaded.pixels, loaded.boxes, loaded.labels, loaded.crowd)
        return TrainingSample(image, boxes, labels, crowd, self.data.images[index].name, defects)

    def load(self, index: int, defects: list[tuple[str, str]]) -> LoadedImage | None:
        """The image and its objects, and entries in defects; None if nothing can be learned from it."""
        annotated = self.data.images[index]
        loaded = None
        try:
            loaded = load_image(annotated, self.decoded.get(index) or decode(annotated.path))
            kinds = loaded.notes if loaded is not None else (OTHER_PROPORTIONS,)
        except OSError:
            kinds = (CANNOT_BE_DECODED,)
        stand_in = ": the next one trained on in its place" if loaded is None else ""
        defects += [(kind + stand_in, annotated.name) for kind in kinds]
        return loaded


class TrainingSampler(Sampler[list[tuple[int, int]]]):
    """The batches of one process, as lists of (index, epoch).

    The epochs' permutations form one stream, cut into batches of `batch_size` over all processes; a batch may join the
    end of an epoch to the start of the next. So every image comes exactly once an epoch, no batch is padded and none is
    dropped; the last two share what is left evenly. Process r takes every num_processes-th image of a batch from r on.

    Args:
        num_images: in an epoch.
        epochs: how many times each comes.
        batch_size: over all processes.
        seed: of the permutations.
        rank, num_processes: of torch.distributed.
        start_step: the first batch to give, for a resumed run.
    """

    def __init__(
        self,
        num_images: int,
        epochs: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
        start_step: int = 0,
    ) -> None:
        total = num_images * epochs
        self.num_steps = math.ceil(total / batch_size)
        smallest = total if self.num_steps == 1 else (total - (self.num_steps - 2) * batch_size) // 2
        if smallest < num_processes:
            raise ValueError(
                f"{num_images} images for {epochs} epochs in batches of {batch_size} leave one of the {num_processes} "
                "processes without an image; use a larger --batch or fewer processes"
            )
        self.num_images, self.batch_size, self.seed, self.total = num_images, batch_size, seed, total
        self.rank, self.num_processes, self.start_step = rank, num_processes, start_step

    def start_of(self, step: int) -> int:
        """How many images of the stream come before a batch."""
        if step >= self.num_steps:
            return self.total
        if step == self.num_steps - 1 and step > 0:
            before = (self.num_steps - 2) * self.batch_size
            return before + math.ceil((self.total - before) / 2)
        return step * self.batch_size

    def smallest_share(self) -> int:
        """The fewest images a process gets in a step that is still to come."""
        sizes = [self.start_of(step + 1) - self.start_of(step) for step in range(self.start_step, self.num_steps)[-2:]]
        return min(sizes, default=self.batch_size) // self.num_processes

    def permutation(self, epoch: int) -> list[int]:
        """The order of an epoch."""
        generator = torch.Generator().manual_seed(combine_seed(self.seed, epoch))
        return torch.randperm(self.num_images, generator=generator).tolist()

    def __len__(self) -> int:
        return self.num_steps - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current, permutation = -1, []
        for step in range(self.start_step, self.num_steps):
            batch = []
            for position in range(self.start_of(step), self.start_of(step + 1)):
                epoch, place = divmod(position, self.num_images)
                if epoch != current:
                    current, permutation = epoch, self.permutation(epoch)
                batch.append((permutation[place], epoch))
            yield batch[self.rank :: self.num_processes]


class EvaluationSample(NamedTuple):
    """An image resized to the network's input, and what it takes to bring detections back; or why there is none."""

    position: int  # of its path
    image: Tensor | None  # (3, S, S) uint8; None if the image cannot be used
    placement: Placement | None  # of the image as annotated in the image as decoded
    notes: tuple[str, ...]  # what was changed in reading it, or why it cannot be used
    pixels: Tensor | None = None  # (3, H, W) uint8, the image as decoded; None if the image cannot be used


class EvaluationImages(Dataset[EvaluationSample]):
    """Images resized to the network's input, by index.

    Args:
        paths: of the images.
        image_size: S, side of the input in pixels.
        annotated_sizes: (width, height) of each as annotated, in which detections are to come back; without them they
            come back as the images lie the right way up.
    """

    def __init__(
        self, paths: Sequence[Path], image_size: int, annotated_sizes: Sequence[tuple[int, int]] | None = None
    ) -> None:
        self.paths, self.annotated_sizes = paths, annotated_sizes
        self.resize = v2.Resize((image_size, image_size), antialias=True)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> EvaluationSample:
        try:
            decoded = decode(self.paths[index])
        except OSError as error:
            return EvaluationSample(index, None, None, (f"{CANNOT_BE_DECODED}: {error}",))
        height, width = decoded.pixels.shape[-2:]
        placement: Placement | None = Placement((width, height), (width, height))
        if self.annotated_sizes is not None:
            placement = place_annotation(self.annotated_sizes[index], (width, height), decoded.orientation)
        if placement is None:
            return EvaluationSample(index, None, None, (OTHER_PROPORTIONS,))
        notes = decoded.notes + placement.notes
        return EvaluationSample(index, self.resize(decoded.pixels), placement, notes, decoded.pixels)


# ---------------------------------------------------------------------------------------------------------------------
# Workers: processes that prepare batches. Whatever happens in them, the process they work for goes on or ends with it.


class WorkerError(NamedTuple):
    """An exception on its way from a worker."""

    error: Exception
    trace: str


class WholeBatches(Dataset[Any]):
    """A dataset read batch by batch; what goes wrong in a worker comes back as a WorkerError.

    torch's loader would make a text of several lines of it, of a type that it cannot always make.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, keys: list[Any]) -> Any:
        if get_worker_info() is None:
            return self.collate([self.dataset[key] for key in keys])
        try:
            batch = self.collate([self.dataset[key] for key in keys])
            # Here, where running out of shared memory is an error. The thread that sends the batch would do the same,
            # but there it would be lost, and waited for without end.
            for part in batch:
                if isinstance(part, Tensor):
                    part.share_memory_()
        except Exception as error:
            trace = traceback.format_exc()
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:
                error = RuntimeError(f"{type(error).__name__}: {error}")
            return WorkerError(error, trace)
        return batch


def leave_signals_to_the_trainer(worker: int) -> None:
    """A worker that dies of a signal meant for the whole job would keep the trainer from finishing its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


workers_of_this_process: set[multiprocessing.process.BaseProcess] = set()


@atexit.register
def end_workers() -> None:
    """Ends the workers that are left when the process ends.

    They are left after an error, whose traceback holds on to their loader. multiprocessing would send them SIGTERM,
    which they ignore, and then wait for them without end.
    """
    alive = [worker for worker in workers_of_this_process if worker.is_alive()]
    if alive:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the death of a worker for an error
    for worker in alive:
        worker.kill()


def wait_for_the_lost(workers: Iterable[multiprocessing.process.BaseProcess]) -> None:
    """Raises RuntimeError if a worker has ended, or ends within ten seconds: its connection breaks a little earlier.

    Meanwhile torch's handler of SIGCHLD may raise the same, in much the same words.
    """
    ends = {worker.sentinel: worker for worker in workers}
    for end in multiprocessing.connection.wait(list(ends), timeout=10):
        worker = ends[cast(int, end)]
        worker.join()
        raise RuntimeError(f"worker process {worker.pid} exited unexpectedly, with exit code {worker.exitcode}")


def load_batches(
    dataset: Dataset[Any],
    keys: Iterable[list[Any]],
    collate: Callable[[list[Any]], Any],
    num_workers: int,
    pin_memory: bool = False,
) -> Generator[Any, None, None]:
    """Batches of a dataset, of samples by the keys of each, prepared by workers (or here, by 0 of them).

    Closing the iterator ends the workers.

    Raises:
        Exception: what a worker raised, as it was raised there.
        RuntimeError: a worker was killed.
    """
    before = set(multiprocessing.active_children())
    batches = iter(
        DataLoader(
            WholeBatches(dataset, collate),
            batch_size=None,
            sampler=keys,
            collate_fn=copy.copy,  # batches come whole
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=leave_signals_to_the_trainer,
        )
    )
    workers = set(multiprocessing.active_children()) - before
    workers_of_this_process.update(workers)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (OSError, EOFError):  # what a worker raises comes as a WorkerError, unless there are none
                wait_for_the_lost(workers)
                raise
            if isinstance(batch, WorkerError):
                raise batch.error from RuntimeError(f"in a worker:\n{batch.trace}")
            yield batch
    finally:
        del batches  # ends the workers
        workers_of_this_process.difference_update(w for w in list(workers_of_this_process) if not w.is_alive())
