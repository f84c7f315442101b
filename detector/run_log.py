"""The log of a training: log.jsonl, one JSON object a line, and TensorBoard's events."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detector.outputs import strict_json, whole_file
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
        except (OSError, ImportError) as error:
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

    def close(self) -> None:
        """Ends the writing."""
        if "TensorBoard" not in self.said:
            with self.tolerating("TensorBoard"):
                self.writer.close()
