"""Writing results: files that are whole or not there, and folders that are known to take them before the work."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its place once it is written: path holds the old content or the new, always whole.

    Raises:
        OSError: it cannot be written; with the path.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def strict_json(content: Any, indent: int | None = None) -> str:
    """JSON in ASCII, whatever characters names hold; numbers that are not finite, which JSON lacks, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {key: finite(entry) for key, entry in value.items()}
        return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(finite(content), indent=indent, allow_nan=False)


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Writes a JSON file in one piece.

    Raises:
        OSError: it cannot be written; with the path.
    """
    with whole_file(path) as file:
        file.write(strict_json(content, indent).encode())


@contextlib.contextmanager
def growing_list(path: Path) -> Iterator[Callable[[Any], None]]:
    """A function that adds an entry to a JSON list, which is written as it grows.

    Each entry is at once a line of the .jsonl file beside path. At the end, also after an error, the lines become the
    list in path, and the .jsonl file goes; a process that is killed leaves it.

    Raises:
        OSError: an entry cannot be written; with the path.
    """
    lines = path.with_suffix(".jsonl")

    def add(entry: Any) -> None:
        try:
            file.write(strict_json(entry).encode() + b"\n")
            file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(lines)) from error

    with lines.open("w+b") as file:
        try:
            yield add
        finally:
            file.seek(0)
            with whole_file(path) as whole:
                for number, line in enumerate(file):
                    whole.write((b",\n" if number else b"[\n") + line.rstrip())
                whole.write(b"\n]\n")
    lines.unlink()


def prepare_folder(folder: Path, files: Iterable[str]) -> None:
    """Makes a folder for results and tries that it takes these files, so that the work is not done for nothing.

    Raises:
        ValueError: it cannot; the message says why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise ValueError(f"--out: expected a folder that can be written, got {folder}: {error.strerror}") from error
    for name in files:
        if (folder / name).is_dir():
            raise ValueError(f"--out: expected to write the file {folder / name}, and it is a folder")
