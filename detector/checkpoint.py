"""Checkpoints that are whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from detector.anchors import ANCHORS_PER_LOCATION, BASE_SIZE
from detector.backbone import describe_misfit, load_torch_file
from detector.data import AnnotatedImages
from detector.detectors import OneStageDetector, make_detector
from detector.outputs import strict_json, whole_file

ADDED_LATER = {
    "anchor_size": BASE_SIZE,
    "anchors_per_location": ANCHORS_PER_LOCATION,
    "cls_loss": "focal",
    "box_loss": "balanced_l1",
    "val_fraction": None,
    "init_from": None,
    "strategy_from_epoch": 0,
}
"""Flags of detector.train that older checkpoints do not have, and what they were then."""


# Flags that say where and how fast a run goes, not what it computes: they may differ when it is resumed.
FREE_ON_RESUME = {"data", "format", "out", "resume", "backbone_weights", "init_from", "backend", "device", "workers"}
FREE_ON_RESUME |= {"cache", "cuda_graph", "graph_objects", "save_minutes", "log_every", "eval_every", "keep_every"}


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint in one piece: path holds the old one or the new one.

    Raises:
        OSError: it cannot be written; with the path.
    """
    before = sys.exc_info()[1]  # what made the caller save
    with whole_file(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch.save closes its archive even when writing failed, and that fails again in words of its own.
            if isinstance(error.__context__, OSError) and error.__context__ is not before:
                raise error.__context__ from None
            raise


def weights_of(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without the state of the training: of its weights the averaged ones, if there are any."""
    kept = {name: value for name, value in content.items() if name not in ("optimizer", "scaler")}
    return {**kept, "model": content["ema"] or content["model"], "ema": None}


def save_best(content: dict[str, Any], ap: float | None, folder: Path) -> None:
    """Writes best.pt and best.safetensors unless they hold weights of a higher AP; no state of the training.

    Args:
        content: of a checkpoint. Of its weights the averaged ones are kept, if there are any: they are evaluated.
        ap: of the evaluation split; None if it has no objects, which is below every number.
        folder: of the run.

    Raises:
        OSError: they cannot be written; with the path.
    """
    path = folder / "best.pt"
    if path.is_file():
        with contextlib.suppress(ValueError):  # what cannot be read holds no better weights
            best = read_checkpoint(path).get("AP")
            if (-1.0 if ap is None else ap) <= (-1.0 if best is None else best):
                return
    best_content = {**weights_of(content), "AP": ap}
    save_atomically(best_content, path)
    with contextlib.suppress(ImportError):  # a training without safetensors is not worth less
        save_weights(best_content, path.with_suffix(".safetensors"))


def save_weights(content: dict[str, Any], path: Path) -> None:
    """Writes the weights of a checkpoint, and what it takes to build their model, as a safetensors file.

    Raises:
        ImportError: safetensors is not installed.
        OSError: it cannot be written; with the path.
    """
    from safetensors.torch import save

    description = {name: content.get(name) for name in ("step", "AP", "arguments", "class_names")}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in (content.get("ema") or content["model"]).items()}
    with whole_file(path) as file:
        file.write(save(tensors, {"detector": strict_json(description)}))


def load_weights(path: Path, device: torch.device | str) -> dict[str, Any]:
    """What `save_weights` wrote, as a checkpoint.

    Raises:
        ValueError: it is something else, or cut off.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", device=str(device)) as file:
            content = json.loads((file.metadata() or {})["detector"])
            content["model"] = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"checkpoint: {path} was not written by detector.train, or is cut off ({error})") from error
    return dict(content)


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `detector.train` saved: step, model, ema, optimizer, scaler, arguments, class_names, and the data's mark.

    A safetensors file has no optimizer, scaler and mark.

    Raises:
        ValueError: there is no such file, or it is something else; the message names the file and the entry.
    """
    if path.is_dir():
        path = path / "last.pt"
    if not path.is_file():
        raise ValueError(
            f"checkpoint: expected a file written by detector.train or its folder, and there is none at {path}"
        )
    is_torch = path.suffix != ".safetensors"
    content = load_torch_file(path, "checkpoint", device) if is_torch else load_weights(path, device)
    if not isinstance(content, dict) or not {"model", "arguments", "class_names"} <= content.keys():
        raise ValueError(f"checkpoint: {path} was not written by detector.train")
    names = content["class_names"]
    wrong = [
        (entry, expected)
        for entry, expected, fits in (
            ("model", "tensors by name", is_state(content["model"])),
            ("ema", "tensors by name or None", content.get("ema") is None or is_state(content["ema"])),
            ("arguments", "flags of detector.train by name", isinstance(content["arguments"], dict)),
            ("class_names", "a list of names, each once", is_list_of_names(names)),
            ("step", "a number of steps", type(content.get("step", 0)) is int and content.get("step", 0) >= 0),
            ("data", "the mark of the training data", is_data_mark(content.get("data"))),
        )
        if not fits
    ]
    if wrong:
        entry, expected = wrong[0]
        found = repr(content[entry])
        found = found if len(found) < 80 else f"{found[:60]}... ({type(content[entry]).__name__})"
        raise ValueError(f"checkpoint: {path}: entry {entry!r}: expected {expected}, got {found}")
    content["arguments"] = {**ADDED_LATER, **content["arguments"]}
    return content


def is_list_of_names(value: object) -> bool:
    """Whether this names classes, each once."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def is_data_mark(value: object) -> bool:
    """Whether this marks training data; None, in older checkpoints, marks none."""
    return value is None or (isinstance(value, dict) and value.keys() == {"images", "fingerprint"})


def is_state(value: object) -> bool:
    """Whether this is a state dict."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def load_entry(module: torch.nn.Module, content: dict[str, Any], entry: str, path: Path) -> None:
    """Fills a module with an entry of a checkpoint.

    Raises:
        ValueError: it does not fit; the message names the file, the entry and its first tensors that do not.
    """
    misfit = describe_misfit(module.state_dict(), content[entry])
    if misfit:
        raise ValueError(f"checkpoint: {path}: entry {entry!r} does not fit its model: {misfit}")
    module.load_state_dict(content[entry])


def load_detector(path: Path, device: torch.device | str) -> tuple[OneStageDetector, dict[str, Any]]:
    """A trained detector in evaluation mode (averaged weights where the run kept them), and its checkpoint.

    Raises:
        ValueError: there is no such file, or it is something else; the message names the file and the entry.
    """
    content = read_checkpoint(path, device)
    arguments = content["arguments"]
    if not content["class_names"]:
        raise ValueError(f"checkpoint: {path}: entry 'class_names' is empty")
    try:
        detector = make_detector(
            arguments["model"],
            arguments["backbone"],
            arguments["image_size"],
            len(content["class_names"]),
            arguments["anchor_size"],
            arguments["anchors_per_location"],
        )
    except KeyError as error:
        raise ValueError(f"checkpoint: {path}: entry 'arguments' has no {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"checkpoint: {path}: entry 'arguments': {error}") from error
    load_entry(detector, content, "ema" if content.get("ema") else "model", path)
    return detector.to(device).eval(), content


def initialize_from(model: OneStageDetector, content: dict[str, Any], class_names: list[str]) -> str:
    """Fills a detector with what fits of another's checkpoint, the head's classes by their names.

    Returns:
        What was taken and what was not, in one line.

    Raises:
        ValueError: nothing fits.
    """
    source, target = content["ema"] if content.get("ema") else content["model"], model.state_dict()
    old_names = content["class_names"]
    common = [name for name in class_names if name in old_names]
    places = [class_names.index(name) for name in common], [old_names.index(name) for name in common]
    taken, by_class = [], []
    for name, value in source.items():
        if name not in target or value.shape[1:] != target[name].shape[1:]:
            continue
        if name.startswith("head.classes."):  # (K * C, ...), the classes of an anchor side by side
            if len(value) * len(class_names) != len(target[name]) * len(old_names):
                continue  # of another number of anchors per location
            ours, theirs = (
                state.unflatten(0, (-1, len(names)))
                for state, names in ((target[name], class_names), (value, old_names))
            )
            ours[:, places[0]] = theirs[:, places[1]]
            by_class.append(name)
        elif value.shape == target[name].shape:
            target[name] = value
            taken.append(name)
    if not taken:
        raise ValueError("--init-from: no tensor of the checkpoint fits; expected the same --model or --backbone")
    model.load_state_dict(target)
    parts = [f"{len(taken)} of {len(target)} tensors taken whole"]
    if by_class:
        parts.append(f"{len(common)} of {len(class_names)} classes taken ({', '.join(common) or 'none'})")
    new = [name for name in target if name not in {*taken, *by_class}]
    parts += [f"{len(new)} not taken ({', '.join(new[:3])}{', ...' if len(new) > 3 else ''})"] if new else []
    return "; ".join(parts)


def data_fingerprint(data: AnnotatedImages) -> str:
    """SHA-256 over what the steps of a training depend on: the classes, and name, size and objects of each image."""
    digest = hashlib.sha256(strict_json(data.class_names).encode())
    for image in data.images:
        digest.update(strict_json([image.name, image.width, image.height, len(image.labels)]).encode())
        for values in (image.boxes, image.labels, image.crowd):
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def check_resumed(
    resumed: dict[str, Any],
    checkpoint_file: Path,
    arguments: dict[str, Any],
    class_names: list[str],
    data_mark: dict[str, Any],
) -> None:
    """Raises ValueError unless a checkpoint is one of this very run."""
    missing = sorted({"step", "ema", "optimizer", "scaler"} - resumed.keys())
    if missing:
        raise ValueError(f"--resume: {checkpoint_file} has no {', '.join(missing)}: it is no checkpoint of a training")
    was = resumed["arguments"]
    changed = [name for name in arguments if name not in FREE_ON_RESUME and arguments[name] != was.get(name)]
    if "epochs" in changed and isinstance(was.get("epochs"), int) and arguments["epochs"] > was["epochs"]:
        changed.remove("epochs")
    if changed:
        differences = ", ".join(f"{name} {was.get(name)!r} -> {arguments[name]!r}" for name in changed)
        raise ValueError(f"--resume: the run in {checkpoint_file.parent} was started with other flags: {differences}")
    if resumed["class_names"] != class_names:
        raise ValueError(f"--resume: the run learned {resumed['class_names']}, the data now has {class_names}")
    # Checkpoints from before the mark was kept are taken at their word.
    if resumed.get("data") not in (None, data_mark):
        counts = f"{resumed['data']['images']} images then, {data_mark['images']} now"
        raise ValueError(
            f"--resume: the training data is not that of the run in {checkpoint_file.parent} ({counts}; or other "
            "names, sizes or objects); bring it back, or start anew with another --out"
        )
