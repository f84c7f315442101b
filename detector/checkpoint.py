"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from detector.anchors import BASE_SIZE
from detector.detectors import OneStageDetector, make_detector

ADDED_LATER = {"anchor_size": BASE_SIZE, "box_loss": "balanced_l1"}
"""Flags of detector.train that older checkpoints do not have, and what they were then."""


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint beside its place and moves it there: path holds the old one or the new one, always whole."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `detector.train` saved: step, model, ema, optimizer, scaler, arguments, class_names.

    Raises:
        ValueError: there is no such file, or it is something else.
    """
    if path.is_dir():
        path = path / "last.pt"
    if not path.is_file():
        raise ValueError(
            f"checkpoint: expected a file written by detector.train or its folder, and there is none at {path}"
        )
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"checkpoint: {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not {"model", "arguments", "class_names"} <= content.keys():
        raise ValueError(f"checkpoint: {path} was not written by detector.train")
    content["arguments"] = {**ADDED_LATER, **content["arguments"]}
    return content


def load_detector(path: Path, device: torch.device | str) -> tuple[OneStageDetector, dict[str, Any]]:
    """A trained detector in evaluation mode (averaged weights where the run kept them), and its checkpoint."""
    content = read_checkpoint(path, device)
    arguments = content["arguments"]
    detector = make_detector(
        arguments["model"],
        arguments["backbone"],
        arguments["image_size"],
        len(content["class_names"]),
        arguments["anchor_size"],
    )
    detector.load_state_dict(content["ema"] or content["model"])
    return detector.to(device).eval(), content
