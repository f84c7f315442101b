"""Writing results: files that are whole or not there, and folders that are known to take them before the work."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
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
