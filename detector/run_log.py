"""The log of a training: log.jsonl, one JSON object a line, and TensorBoard's events."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from detector.data import AnnotatedImages
from detector.detectors import OneStageDetector
from detector.outputs import prepare_folder, strict_json, whole_file
from detector.program import explain


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a run's log.jsonl, each with its step; what is not whole, after a crash, is left out."""
    entries = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("step"), (int, float)):
                entries.append(entry)
    return entries


@contextlib.contextmanager
def claim_folder(folder: Path, files: Iterable[str]) -> Iterator[None]:
    """Prepares the folder of a run, and keeps other processes out of it.

    Raises:
        ValueError: another process trains in it, or it cannot be written.
    """
    prepare_folder(folder, files)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"--out: another process trains in {folder}; wait for it, or choose another folder") from None
    try:
        for unfinished in folder.glob(".*.unfinished"):  # of a process that was killed
            if unfinished.is_file():
                unfinished.unlink()
        yield
    finally:
        lock.release()


class RunLog:
    """log.jsonl, one entry a line, and TensorBoard. What cannot be written is said once, and training goes on."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self.file = folder / "log.jsonl"
        self.writer: Any = None
        self.said: set[str] = set()
        self.line_is_whole = True
        with self.tolerating("log.jsonl"):
            kept = [entry for entry in read_log(self.file) if entry["step"] < start_step]
            with whole_file(self.file) as file:
                file.write("".join(strict_json(entry) + "\n" for entry in kept).encode())
        with self.tolerating("TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter

            # Its own thread writes, prints a traceback when that fails, and hands the error to the next call here.
            hook = threading.excepthook
            threading.excepthook = lambda args: (
                None if type(args.thread).__name__ == "_AsyncWriterThread" else hook(args)
            )
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step)

    @contextlib.contextmanager
    def tolerating(self, what: str) -> Iterator[None]:
        """Says what went wrong with the writing of something, if it is news."""
        try:
            yield
        except Exception as error:  # what writers meet is many things, and none is worth a training
            if what not in self.said:
                tqdm.write(f"{what} cannot be written ({explain(error)}); training goes on without", file=sys.stderr)
            self.said.add(what)

    def add(self, entry: dict[str, Any], step: int) -> None:
        """Writes an entry."""
        with self.tolerating("log.jsonl"), self.file.open("a") as file:
            start = "" if self.line_is_whole else "\n"
            self.line_is_whole = False
            file.write(f"{start}{strict_json(entry)}\n")
            file.flush()
            self.line_is_whole = True
        if "TensorBoard" not in self.said:
            with self.tolerating("TensorBoard"):
                for name, value in entry.items():
                    if isinstance(value, (int, float)):
                        self.writer.add_scalar(name, value, step)

    def add_pictures(
        self, model: OneStageDetector, data: AnnotatedImages, image_size: int, sigma: float, step: int
    ) -> None:
        """Detections in some images of a split, and Figure 4's assignment on the first, for TensorBoard."""
        if "TensorBoard" in self.said:
            return
        was_training = model.training
        with self.tolerating("TensorBoard's pictures"):
            from detector import visualize

            model.eval()
            positions = visualize.choose_images(data, None, 4)
            images = [data.images[position] for position in positions]
            found = visualize.detect_in(model, images, image_size, threshold=0.3)
            figures = {
                "detections": visualize.plot_detections(["detections"], [found], [data.class_names], images),
                "assignment": visualize.plot_assignment(model, image_size, data, positions[:1], sigma),
            }
            with self.tolerating("TensorBoard"):
                for name, figure in figures.items():
                    self.writer.add_figure(name, figure, step)
        model.train(was_training)

    def close(self) -> None:
        """Ends the writing."""
        if "TensorBoard" not in self.said:
            with self.tolerating("TensorBoard"):
                self.writer.close()
