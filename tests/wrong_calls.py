"""Random calls of everything public, right and wrong: each must return the right answer or raise an error that helps.

    python tests/wrong_calls.py --calls 1000

makes a right call from each seed, spoils nothing, one or a few of its arguments, and holds the outcome against the
contract, which is written down here a second time:

- arguments that the contract accepts give what the definition gives for clean copies of them (contiguous, float32);
- all others raise one of the documented exceptions, with a message that begins with the name of an argument;
- nothing crashes the process or hangs: each call runs in a child process that is watched, and a failure names the seed.

`make fuzz` runs tens of thousands of calls against a library with AddressSanitizer and UndefinedBehaviorSanitizer in
it. No test framework in here.
"""

from __future__ import annotations

import argparse
import collections
import decimal
import fractions
import math
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from object_forms import FORMS, in_form
from random_batches import SPECIAL, boxes_around, odd_strides, sprinkle
from torch import Tensor

import mg_ops
from mg_ops import reference
from mg_ops.matching import STRATEGIES

Arguments = dict[str, Any]
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int64, torch.int32)
LABELS = (*INTEGER, *FLOATING)
OTHER_DTYPES = (
    *(torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64),
    *(torch.complex128, torch.float8_e5m2, torch.float8_e4m3fn, torch.quint8, *FLOATING, *INTEGER),
)
MAX_COUNT = 2**31 - 1
SECONDS_A_CALL = 120
"""After which a call counts as hanging. Ordinary ones take milliseconds."""


FAILED = 3
"""The child's exit status where a call ended wrongly; any other one but 0 is a crash."""


class PlainSubclass(Tensor):
    """A subclass that changes nothing."""


# ---------------------------------------------------------------------------------------------------------------------
# Right calls


PREDICTIONS = ("pred_boxes", "box_deltas", "cls_logits", "cls_probabilities")
OBJECTS = ("gt_boxes", "gt_labels", "gt_offsets", "gt_crowd", "gt_mask", "gt_box_format")
BOX_FORMATS = ("xyxy", "xywh", "cxcywh")


def right_objects(random: np.random.Generator, batch_size: int, num_classes: int, form: str | None = None) -> Arguments:
    counts = [int(random.choice([0, 1, 1, 2, 3, 6])) for _ in range(batch_size)]
    label_dtype = torch.int32 if random.random() < 0.2 else torch.int64
    boxes = [torch.from_numpy(boxes_around(random, count, a_kind(random)).astype(np.float32)) for count in counts]
    labels = [torch.from_numpy(random.integers(0, max(1, num_classes), count)).to(label_dtype) for count in counts]
    crowd = [torch.from_numpy(random.random(count) < 0.3) for count in counts] if random.random() < 0.5 else None
    form = form or str(random.choice(["packed", *FORMS]))
    objects, _ = in_form(form, boxes, labels, crowd, seed=int(random.integers(0, 1000)))
    objects = dict.fromkeys(OBJECTS) | {"gt_box_format": "xyxy"} | objects
    if form == "packed":
        slack = int(random.choice([0, 0, 2]))
        objects["gt_boxes"] = torch.cat([objects["gt_boxes"], torch.full((slack, 4), math.nan)])
        objects["gt_labels"] = torch.cat(
            [objects["gt_labels"].to(label_dtype), torch.full((slack,), -77).to(label_dtype)]
        )
        if crowd is not None:
            objects["gt_crowd"] = torch.cat([objects["gt_crowd"], torch.ones(slack, dtype=torch.bool)])
        if random.random() < 0.2:
            objects["gt_offsets"] = objects["gt_offsets"].int()
    if random.random() < 0.2:
        objects["gt_box_format"] = str(random.choice(BOX_FORMATS))
    if random.random() < 0.2 and form != "dictionaries":
        labels = objects["gt_labels"]
        objects["gt_labels"] = [c.float() for c in labels] if isinstance(labels, list) else labels.float()
    return objects


def a_kind(random: np.random.Generator) -> str:
    return str(random.choice(["smooth", "integer", "integer", "few", "grid"]))


def right_match_call(random: np.random.Generator, form: str | None = None) -> Arguments:
    """One whose objects are in this form, or any."""
    batch_size = int(random.choice([0, 1, 1, 2, 3, 5]))
    num_anchors = int(random.choice([0, 1, 3, 8, 17, 63, 64, 65, 130]))
    num_classes = int(random.choice([0, 1, 2, 5]))
    anchors = torch.from_numpy(boxes_around(random, num_anchors, a_kind(random)).astype(np.float32))
    noise = torch.from_numpy(0.1 * random.standard_normal((batch_size, num_anchors, 4)).astype(np.float32))
    scores = torch.from_numpy(random.standard_normal((batch_size, num_anchors, num_classes)).astype(np.float32))
    with_coder, probabilities = random.random() < 0.3, random.random() < 0.3
    iou_positive = float(random.choice([0.5, 0.5, 0.3, 1.0, 1e-6]))
    arguments = {
        "anchors": anchors,
        **dict.fromkeys(PREDICTIONS),
        "box_deltas" if with_coder else "pred_boxes": noise if with_coder else anchors + noise,
        "cls_probabilities" if probabilities else "cls_logits": scores.abs() % 1 if probabilities else scores,
        **right_objects(random, batch_size, num_classes, form),
        "box_coder": mg_ops.BoxCoder() if with_coder else None,
        "strategy": str(random.choice(list(STRATEGIES))),
        "sigma": float(random.choice([2.0, 1.01, 3.0])),
        "iou_positive": iou_positive,
        "iou_ignored": iou_positive * float(random.choice([0.8, 1.0])),
        "crowd_overlap": 0.5,
        "check": bool(random.random() < 0.2),
    }
    if random.random() < 0.2 and form is None:  # what the strategy does not read is left out
        by_regressed, by_amplified = STRATEGIES[arguments["strategy"]]
        unread = [] if by_regressed else ["pred_boxes", "box_deltas", "box_coder"]
        unread += [] if by_amplified else ["cls_logits", "cls_probabilities"]
        arguments |= dict.fromkeys(unread)
    if random.random() < 0.15 and form is None:
        for name in ("anchors", *PREDICTIONS):
            if arguments[name] is not None and random.random() < 0.7:
                arguments[name] = list(arguments[name].tensor_split(3, dim=-2))
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# Spoiling


def anything(random: np.random.Generator) -> Any:
    """A Python value that is hardly ever right."""
    values: list[Callable[[], Any]] = [
        *(lambda: None, lambda: 3, lambda: -1, lambda: 2.5, lambda: math.nan, lambda: 10**400, lambda: True),
        *(lambda: "mutual", lambda: "", lambda: b"abc", lambda: [], lambda: (), lambda: {}, lambda: {0: 1}),
        *(object, lambda: np.zeros((3, 4), np.float32), lambda: [[0.0, 0.0, 1.0, 1.0]], lambda: (x for x in range(2))),
        *(lambda: torch.float32, lambda: torch.zeros(()), lambda: torch.zeros(0), lambda: torch.Tensor, lambda: ...),
        *(lambda: collections.deque([1, 2]), lambda: range(2), lambda: torch.device("cpu"), lambda: mg_ops.BoxCoder),
        *(lambda: [None], lambda: [[], []], lambda: 2 + 3j, lambda: torch.zeros(3, 4), lambda: len),
    ]
    return values[random.integers(0, len(values))]()


def a_number(random: np.random.Generator) -> Any:
    numbers: list[Any] = [0, -1, 1, 2, 0.0, -0.0, 1.0, -1.0, 0.3, 1e308, -1e308, 1e-308, 5e-324, 1e39, 1e-39, 1e-46]
    numbers += [math.nan, math.inf, -math.inf, 10**400, 2**63, -(2**63), 1 + 1e-9, 1 + 2.0**-23, 1 - 2.0**-24, 3.5]
    numbers += [True, None, "2", np.float64(2), np.float32(2), np.int64(2), torch.tensor(2.0), 2j]
    numbers += [fractions.Fraction(3, 2), decimal.Decimal(2)]
    return numbers[random.integers(0, len(numbers))]


def other_shape(random: np.random.Generator, tensor: Tensor) -> Tensor:
    kind = random.integers(0, 9)
    dim = int(random.integers(0, max(1, tensor.dim())))
    if kind == 0 or tensor.dim() == 0:
        return tensor.unsqueeze(0)
    if kind == 1:
        return tensor.narrow(dim, 0, max(0, tensor.shape[dim] - 1))
    if kind == 2:
        return torch.cat([tensor, tensor.narrow(dim, 0, min(1, tensor.shape[dim]))], dim)
    if kind == 3:
        return tensor.flatten()
    if kind == 4:
        return tensor.transpose(0, -1)
    if kind == 5 and tensor.shape[0] > 0:
        return tensor[0]
    if kind == 6:
        return tensor.new_zeros([int(size) for size in random.choice([0, 1, 2, 3, 4, 7], random.integers(0, 5))])
    if kind == 7:
        return tensor.unsqueeze(dim)
    return tensor.narrow(dim, 0, 0)


def other_dtype(random: np.random.Generator, tensor: Tensor) -> Tensor:
    dtype = OTHER_DTYPES[random.integers(0, len(OTHER_DTYPES))]
    if dtype == torch.quint8:
        return torch.quantize_per_tensor(torch.zeros(tensor.shape), 0.1, 0, dtype)
    return torch.zeros(tensor.shape, dtype=dtype) if tensor.is_complex() else tensor.to(dtype)


def other_layout(random: np.random.Generator, tensor: Tensor) -> Tensor:
    kind = random.integers(0, 6)
    if kind == 0:
        return tensor.to_sparse()
    if kind == 1 and tensor.dim() == 2:
        return tensor.to_sparse_csr()
    if kind == 2 and tensor.dtype == torch.float32 and tensor.numel() > 0:
        return tensor.to_mkldnn()
    if kind == 3 and tensor.dim() > 1:
        return torch.nested.nested_tensor([tensor, tensor])
    if kind == 4 and tensor.dim() > 1:
        return torch.nested.nested_tensor([tensor, tensor[:1]], layout=torch.jagged)
    return tensor.to("meta")


def other_strides(random: np.random.Generator, tensor: Tensor) -> Tensor:
    """Other places in memory, not always the same values: overlapping, offset, reversed, expanded, negated lazily."""
    kind = random.integers(0, 7)
    if kind <= 2:
        return odd_strides(random, tensor)
    if kind == 3:  # any strides at any offset
        strides = [int(random.choice([0, 0, 1, 1, 2, 3, 5, 64])) for _ in tensor.shape]
        last = sum(max(0, size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
        offset = int(random.choice([0, 1, 3, 100]))
        values = torch.from_numpy(random.integers(0, 3, offset + last + 1)).to(tensor.dtype)
        return values.as_strided(tensor.shape, strides, offset)
    if kind == 4 and tensor.dim() > 0:
        return tensor.flip(0)
    if kind == 5 and tensor.dtype in (torch.float32, torch.float64):
        return torch.complex(tensor, -tensor).conj().imag  # the same numbers, whose sign is not in memory
    if kind == 6 and tensor.dtype == torch.float32 and tensor.dim() > 0:  # unaligned, out of another dtype's memory
        memory = np.zeros(tensor.numel() * 4 + 1, np.uint8)
        view = memory[1:].view(np.float32) if tensor.numel() > 0 else np.zeros(0, np.float32)
        view[:] = tensor.numpy(force=True).ravel()
        return torch.from_numpy(view).view(tensor.shape)
    return tensor


def other_wrapping(random: np.random.Generator, tensor: Tensor) -> Tensor:
    kind = random.integers(0, 5)
    if kind == 0 and tensor.is_floating_point():
        return torch.nn.Parameter(tensor)
    if kind == 1 and tensor.is_floating_point():
        return tensor.clone().requires_grad_() * 1.0
    if kind == 2:
        with torch.inference_mode():
            return tensor.clone()
    if kind == 3:
        return tensor.as_subclass(PlainSubclass)
    return tensor.share_memory_() if not tensor.requires_grad and kind == 4 else tensor


def without_storage(random: np.random.Generator, tensor: Tensor) -> Tensor:
    """A tensor whose memory has been taken away, all of it or its end, as frameworks do to free and refill it."""
    tensor = tensor.detach().clone()
    storage = tensor.untyped_storage()
    storage.resize_(int(random.choice([0, 0, storage.nbytes() // 2, max(0, storage.nbytes() - 1)])))
    return tensor


def huge(random: np.random.Generator, tensor: Tensor) -> Tensor:
    """The first of its elements, as often as no memory could hold them."""
    dim = int(random.integers(0, max(1, tensor.dim())))
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = int(random.choice([2**46, 2**50]))
    return tensor.narrow(dim, 0, 1).expand(shape)


def is_huge(tensor: Tensor) -> bool:
    return max(tensor.shape, default=0) > 2**20


def other_values(random: np.random.Generator, tensor: Tensor) -> Tensor:
    if tensor.numel() == 0 or tensor.dim() == 0:
        return tensor
    if tensor.dtype == torch.bool:
        return ~tensor
    if tensor.is_floating_point():
        flat = tensor.detach().float().reshape(-1, tensor.shape[-1]).numpy().copy()
        with np.errstate(all="ignore"):
            if random.random() < 0.3:
                flat[:] = random.choice(SPECIAL, flat.shape)
            flat = sprinkle(random, flat, 0.3)
        return torch.from_numpy(flat).reshape(tensor.shape).to(tensor.dtype)
    limits = torch.iinfo(tensor.dtype)
    extremes = [limits.min, limits.max, limits.min + 1, limits.max - 1, -1, 0, 1, 2, 3, 7, 100]
    tensor = tensor.clone()
    for _ in range(random.integers(1, 3)):
        value = extremes[random.integers(0, len(extremes))]
        tensor.view(-1)[random.integers(0, tensor.numel())] = value if limits.min <= value <= limits.max else 0
    return tensor


def spoil_tensor(random: np.random.Generator, tensor: Any) -> Any:
    if not isinstance(tensor, Tensor) or random.random() < 0.06:
        return anything(random)
    if tensor.is_nested or is_huge(tensor) or (tensor.layout == torch.strided and not is_readable(tensor)):
        return tensor  # torch itself would crash, or ask for all memory
    how = random.choice(
        [other_shape, other_dtype, other_layout, other_strides, other_wrapping, without_storage, huge, other_values],
        p=[0.2, 0.1, 0.08, 0.2, 0.1, 0.06, 0.04, 0.22],
    )
    try:
        return how(random, tensor)
    except (RuntimeError, ValueError, TypeError, IndexError):  # one that torch does not let be made
        plain = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
        return other_strides(random, tensor) if plain else tensor


def spoil_list(random: np.random.Generator, tensors: Any) -> Any:
    if not isinstance(tensors, list):
        return anything(random)
    kind = random.integers(0, 8)
    if kind == 0:
        return anything(random)
    if kind == 1:
        return tensors[:-1]
    if kind == 2:
        return [*tensors, *(tensors[:1] or [torch.zeros(0, 4)])]
    if kind == 3:
        return tuple(tensors)
    if kind == 4:
        return collections.deque(tensors)
    changed = list(tensors)
    for image, value in enumerate(changed):
        if random.random() < 0.5:
            changed[image] = spoil_target(random, value) if isinstance(value, dict) else spoil_tensor(random, value)
    return changed


def spoil_target(random: np.random.Generator, target: dict[str, Any]) -> Any:
    """A dictionary of boxes and labels, one of them spoiled, missing, or for another thing."""
    name = str(random.choice(["boxes", "labels", "iscrowd"]))
    kind = random.integers(0, 6)
    if kind == 0:
        return {key: value for key, value in target.items() if key != name}
    if kind == 1:
        return anything(random)
    return target | {name: spoil_tensor(random, target.get(name, torch.zeros(len(target["labels"])).bool()))}


def spoil(random: np.random.Generator, arguments: Arguments, name: str, choices: dict[str, list[Any]]) -> Any:
    """Something else for one argument. Options of a few values get them, or anything at all."""
    value = arguments[name]
    if name in choices and random.random() < 0.7:
        return choices[name][random.integers(0, len(choices[name]))]
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        return a_number(random)
    if name == "box_coder" and random.random() < 0.8:
        weights = [float(random.choice([10.0, -5.0, 1e-30, 1e30, 1.2e-38])) for _ in range(4)]
        return mg_ops.BoxCoder(tuple(weights), float(random.choice([4.0, 0.0, -1.0, math.inf, -math.inf, 1e300])))
    if isinstance(value, Tensor):
        return spoil_tensor(random, value)
    if isinstance(value, list):
        return spoil_list(random, value)
    return anything(random)


def huge_together(random: np.random.Generator, arguments: Arguments) -> Arguments:
    """Sizes that belong together, beyond 32 bits or any memory; every tensor is one element, repeated."""
    kind = random.integers(0, 4)
    given = [name for name in (*PREDICTIONS, "cls_scores") if isinstance(arguments.get(name), Tensor)]
    if len(given) < 2 or not isinstance(arguments["anchors"], Tensor):
        return arguments
    boxes_name, scores_name = given
    anchors, boxes, scores = (arguments[name] for name in ("anchors", *given))
    if kind == 0 and arguments["gt_offsets"] is not None and len(arguments["gt_boxes"]) > 0:
        count = int(random.choice([2**31, 2**32 + 1]))
        names = [name for name in ("gt_boxes", "gt_labels", "gt_crowd") if arguments[name] is not None]
        return arguments | {name: arguments[name][:1].expand(count, *arguments[name].shape[1:]) for name in names}
    if kind == 1 and scores.shape[2] > 0:  # allowed: the classes are read where they are
        return arguments | {scores_name: scores[..., :1].expand(-1, -1, 2**40), "check": False}
    if len(anchors) == 0 or len(boxes) == 0:
        return arguments
    count = int(random.choice([2**31, 2**31 + 5, 2**32 + 1]))
    changed = {"anchors": anchors[:1], boxes_name: boxes[:, :1], scores_name: scores[:, :1]}
    if kind == 2:  # as many anchors as can be, in so many images that B * A bytes are beyond any memory
        count = MAX_COUNT
        batch_size = 2**16
        changed = {
            name: value[..., :1, :].expand(*value.shape[:-2], 1, value.shape[-1]) for name, value in changed.items()
        }
        changed[boxes_name] = changed[boxes_name][:1].expand(batch_size, 1, 4)
        changed[scores_name] = changed[scores_name][:1].expand(batch_size, 1, scores.shape[2])
        objects = {"gt_boxes": torch.zeros(0, 4), "gt_labels": torch.zeros(0, dtype=torch.int64), "gt_crowd": None}
        objects |= {"gt_mask": None} if "gt_mask" in arguments else {}
        arguments = arguments | objects | {"gt_offsets": torch.zeros(batch_size + 1, dtype=torch.int64), "check": False}
    return arguments | {
        name: value.expand(*value.shape[:-2], count, value.shape[-1]) for name, value in changed.items()
    }


def all_to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: all_to_meta(element) for name, element in value.items()}
    return [all_to_meta(element) for element in value] if isinstance(value, list) else value


def spoil_some(
    random: np.random.Generator, arguments: Arguments, choices: dict[str, list[Any]] | None = None
) -> Arguments:
    """Nothing, one or a few arguments made wrong or unusual."""
    arguments = dict(arguments)
    if random.random() < 0.03:
        arguments = {name: all_to_meta(value) for name, value in arguments.items()}
    names = list(arguments)
    for _ in range(random.choice([0, 1, 1, 1, 1, 2, 3])):
        name = names[random.integers(0, len(names))]
        if arguments[name] is None and random.random() < 0.7:  # of many arguments few are given
            continue
        arguments[name] = spoil(random, arguments, name, choices or {})
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# The contract once more


class Wrong(Exception):
    """Arguments that the contract does not accept."""


class Unspecified(Exception):
    """Arguments of which the contract says nothing: an answer is as good as an error."""


def must(condition: object) -> None:
    if not condition:
        raise Wrong


def is_readable(tensor: Tensor) -> bool:
    """Whether the tensor's memory holds all its elements."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.numel() == 0 or tensor.is_meta or end <= tensor.untyped_storage().nbytes()


def accept(
    tensor: Any, dtypes: Sequence[torch.dtype], shape: tuple[int | None, ...], device: torch.device | None
) -> tuple[int, ...]:
    """The shape of a dense tensor of one of these dtypes and this shape, where None is any size."""
    must(isinstance(tensor, Tensor))
    must(tensor.dtype in dtypes)
    must(tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized)
    must(tensor.dim() == len(shape))
    must(all(size is None or size == actual for size, actual in zip(shape, tensor.shape, strict=True)))
    must(device is None or tensor.device == device)
    must(is_readable(tensor))
    return tuple(tensor.shape)


def accept_number(value: Any, low: float, high: float) -> None:
    must(isinstance(value, (int, float)) and not isinstance(value, bool))
    must(-1e39 < value < 1e39)
    rounded = float(torch.tensor(float(value), dtype=torch.float32))
    must(low < value <= high and low < rounded <= high and rounded >= 2.0**-126)


def accept_thresholds(arguments: Arguments) -> None:
    accept_number(arguments["sigma"], 1.0, float(torch.finfo(torch.float32).max))
    for name in ("iou_positive", "iou_ignored", "crowd_overlap"):
        accept_number(arguments[name], 0.0, 1.0)
    must(arguments["iou_ignored"] <= arguments["iou_positive"])


def clean(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain contiguous copy."""
    return torch.tensor(tensor.detach().as_subclass(Tensor).to(dtype).tolist(), dtype=dtype).reshape(tensor.shape)


def clean_scores(scores: Tensor) -> Tensor:
    """Likewise, but for the classes that no memory holds, of which all are the same."""
    if scores.shape[2] <= 2**16:
        return clean(scores, torch.float32)
    return clean(scores[..., :1], torch.float32).expand(scores.shape)


class Objects(NamedTuple):
    """Clean and packed: what the operators take, and which are no padding."""

    boxes: Tensor
    labels: Tensor
    offsets: Tensor
    crowd: Tensor | None
    is_object: Tensor
    shape: tuple[int, ...]
    """Of what is counted for each object."""


class WithoutValues(NamedTuple):
    """Objects on the meta device: how many, and in which shape."""

    shape: tuple[int, ...]


def whole(labels: Tensor) -> Tensor:
    """Labels as integers; -1 for a floating number that is no class."""
    if not labels.is_floating_point():
        return clean(labels, torch.int64)
    numbers = [value if math.isfinite(value) and value == int(value) else -1 for value in labels.flatten().tolist()]
    return torch.tensor([int(value) if abs(value) < MAX_COUNT else -1 for value in numbers]).long().view(labels.shape)


def are_dictionaries(boxes: Any, labels: Any) -> bool:
    if not isinstance(boxes, (list, tuple)):
        return False
    return isinstance(boxes[0], dict) if len(boxes) > 0 else labels is None


def accept_objects(
    arguments: Arguments, batch_size: int | None, device: torch.device, with_crowd: bool = True
) -> Objects | WithoutValues:
    boxes, labels, offsets = (arguments[name] for name in ("gt_boxes", "gt_labels", "gt_offsets"))
    mask, box_format = arguments.get("gt_mask"), arguments.get("gt_box_format", "xyxy")
    crowd = arguments.get("gt_crowd") if with_crowd else None
    must(isinstance(box_format, str) and box_format in BOX_FORMATS)
    padded = isinstance(boxes, Tensor) and not boxes.is_nested and boxes.dim() == 3 and offsets is None
    must(padded or mask is None)
    is_object = None
    if padded:
        images, capacity, _ = shape = accept(boxes, FLOATING, (batch_size, None, 4), device)
        counted: tuple[int, ...] = shape[:2]
        accept(labels, LABELS, counted, device)
        must(images * capacity <= MAX_COUNT)
        for flags in (mask, crowd):
            if flags is not None:
                accept(flags, (torch.bool,), counted, device)
        if device.type == "meta":
            return WithoutValues(counted)
        is_object = clean(labels >= 0 if mask is None else mask, torch.bool)
        boxes, labels = torch.where(is_object[..., None], clean(boxes, torch.float32), 0.0).flatten(0, 1), whole(labels)
        crowd = None if crowd is None else clean(crowd, torch.bool).flatten()
        is_object, labels = is_object.flatten(), labels.flatten()
        ends = [image * capacity for image in range(images + 1)]
    elif isinstance(boxes, Tensor):
        counted = accept(boxes, FLOATING, (None, 4), device)[:1]
        accept(labels, LABELS, counted, device)
        accept(offsets, INTEGER, (None if batch_size is None else batch_size + 1,), device)
        must(len(offsets) > 0)
        if crowd is not None:
            accept(crowd, (torch.bool,), counted, device)
        must(counted[0] <= MAX_COUNT)
        if device.type == "meta":
            return WithoutValues(counted)
        ends = offsets.tolist()
        must(ends[0] == 0 and ends == sorted(ends) and ends[-1] <= counted[0])
        boxes, labels = clean(boxes, torch.float32), whole(labels)
        crowd = None if crowd is None else clean(crowd, torch.bool)
    else:
        must(offsets is None)
        if are_dictionaries(boxes, labels):
            must(labels is None and arguments.get("gt_crowd") is None)
            must(all(isinstance(target, dict) and {"boxes", "labels"} <= target.keys() for target in boxes))
            flags = [target.get("iscrowd") for target in boxes]
            boxes, labels = [target["boxes"] for target in boxes], [target["labels"] for target in boxes]
            for value in flags:
                if value is not None:
                    accept(value, (torch.bool, torch.uint8, *INTEGER), (None,), device)
            if any(value is not None for value in flags):
                for value in labels:
                    accept(value, LABELS, (None,), device)
                crowd = [
                    torch.zeros(len(c), dtype=torch.bool, device=device) if value is None else value.bool()
                    for value, c in zip(flags, labels, strict=True)
                ]
        for value in (boxes, labels, *([] if crowd is None else [crowd])):
            must(isinstance(value, Sequence) and not isinstance(value, Tensor))
            must(len(value) == (len(boxes) if batch_size is None else batch_size))
        counts = [accept(box, FLOATING, (None, 4), device)[0] for box in boxes]
        for image, count in enumerate(counts):
            accept(labels[image], LABELS, (count,), device)
            if crowd is not None:
                accept(crowd[image], (torch.bool,), (count,), device)
        counted = (sum(counts),)
        must(counted[0] <= MAX_COUNT)
        if device.type == "meta":
            return WithoutValues(counted)
        boxes = torch.cat([torch.zeros(0, 4), *(clean(box, torch.float32) for box in boxes)])
        labels = torch.cat([torch.zeros(0, dtype=torch.int64), *map(whole, labels)])
        if crowd is not None:
            crowd = torch.cat([torch.zeros(0, dtype=torch.bool), *(clean(flags, torch.bool) for flags in crowd)])
        ends = [0, *np.cumsum(counts).tolist()]
    if is_object is None:
        is_object = torch.arange(len(boxes)) < ends[-1]
    if box_format != "xyxy":
        place, size = boxes[:, :2], boxes[:, 2:]
        corners = (place, place + size) if box_format == "xywh" else (place - 0.5 * size, place + 0.5 * size)
        boxes = torch.cat(corners, dim=1)
    return Objects(boxes, labels, torch.tensor(ends), crowd, is_object, counted)


def accept_levels(levels: Any, width: int | None, in_batch: bool) -> Any:
    """One tensor of a list of levels; anything else as it is."""
    if not isinstance(levels, (list, tuple)):
        return levels
    must(len(levels) > 0)
    shapes = [accept(level, FLOATING, (*[None] * in_batch, None, width), None) for level in levels]
    must(len({(*shape[:-2], shape[-1]) for shape in shapes}) == len({level.device for level in levels}) == 1)
    must(sum(map(math.prod, shapes)) < 2**31)
    return torch.cat([level.as_subclass(Tensor) for level in levels], -2)


class Predictions(NamedTuple):
    anchors: Tensor
    boxes: Tensor | None
    scores: Tensor | None
    batch_size: int | None
    device: torch.device


def accept_predictions(anchors: Any, boxes: Any, scores: Any) -> Predictions:
    anchors, boxes, scores = (accept_levels(*v) for v in ((anchors, 4, False), (boxes, 4, True), (scores, None, True)))
    num_anchors, _ = accept(anchors, FLOATING, (None, 4), None)
    device, batch_size = anchors.device, None
    if scores is not None:
        batch_size, _, _ = accept(scores, FLOATING, (None, num_anchors, None), device)
    if boxes is not None:
        batch_size, _, _ = accept(boxes, FLOATING, (batch_size, num_anchors, 4), device)
    must(num_anchors <= MAX_COUNT)
    must(device.type == "meta" or (batch_size or 0) * num_anchors < 2**40)  # more is more than any memory
    return Predictions(anchors, boxes, scores, batch_size, device)


def accept_coder(coder: Any) -> None:
    must(coder is None or isinstance(coder, mg_ops.BoxCoder))


def accept_values(given: Predictions, objects: Objects, coder: mg_ops.BoxCoder | None, probabilities: bool) -> None:
    """What check=True refuses."""
    anchors = clean(given.anchors, torch.float32)
    must(reference.is_object(anchors).all())
    counted = objects.is_object
    ordinary = counted if objects.crowd is None else counted & ~objects.crowd
    boxes, labels = objects.boxes, objects.labels
    if given.scores is not None:
        must(given.scores.shape[2] <= 2**16)  # so many that looking at each takes more than any memory
        scores = clean(given.scores, torch.float32)
        must(not scores.isnan().any())
        must(not probabilities or ((scores >= 0) & (scores <= 1)).all())
        must(((labels >= 0) & (labels < scores.shape[2]))[ordinary].all())
    if given.boxes is not None:
        predictions = clean(given.boxes, torch.float32)
        if coder is None:
            must(reference.is_object(predictions).all())
        else:
            must(predictions.isfinite().all() and coder.decode(anchors=anchors, deltas=predictions).isfinite().all())
    must(reference.is_object(boxes[counted]).all())
    if len(anchors) > 0 and counted.any():
        must(boxes[counted].abs().max() > 1 or anchors.abs().max() < 16)
    must((reference.box_iou(anchors, boxes[ordinary]) > 0).any(0).all() if len(anchors) else not ordinary.any())


def by_definition(given: Predictions, objects: Objects, options: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The reference on clean arguments; what is not given is not read."""
    batch_size = len(objects.offsets) - 1
    num_anchors = len(given.anchors)
    boxes = torch.zeros(batch_size, num_anchors, 4) if given.boxes is None else clean(given.boxes, torch.float32)
    scores = torch.zeros(batch_size, num_anchors, 1) if given.scores is None else clean_scores(given.scores)
    match = reference.mutual_match(clean(given.anchors, torch.float32), boxes, scores, *objects[:4], *options)
    return (*match[:2], *(counts.view(objects.shape) for counts in match[2:]))


def expected_match(arguments: Arguments) -> tuple[Tensor, ...] | None:
    """What mutual_match must return, None if tensors without values; raises Wrong if it must raise."""
    strategy, coder, check = (arguments[name] for name in ("strategy", "box_coder", "check"))
    must(isinstance(strategy, str) and strategy in STRATEGIES)
    accept_coder(coder)
    accept_thresholds(arguments)
    must(isinstance(check, bool))
    pred_boxes, deltas, logits, probabilities = (arguments[name] for name in PREDICTIONS)
    must(pred_boxes is None or deltas is None)
    must(logits is None or probabilities is None)
    must((deltas is None) == (coder is None))
    boxes = pred_boxes if deltas is None else deltas
    scores = logits if probabilities is None else probabilities
    by_regressed, by_amplified = STRATEGIES[strategy]
    must(not by_regressed or boxes is not None)
    must(not by_amplified or scores is not None)
    given = accept_predictions(arguments["anchors"], boxes, scores)
    device, backend = given.device, arguments["backend"]
    must(backend is None or isinstance(backend, str))
    must(backend is None or (backend in mg_ops.backends() and mg_ops.backends()[backend].usable))
    must(device.type == "cpu" or (device.type == "meta" and backend in (None, "eager") and not check))
    objects = accept_objects(arguments, given.batch_size, device)
    if isinstance(objects, WithoutValues):
        return None
    must((len(objects.offsets) - 1) * len(given.anchors) < 2**40)
    if check:
        accept_values(given, objects, coder, probabilities is not None)
    numbers = (float(arguments[name]) for name in ("sigma", "iou_positive", "iou_ignored", "crowd_overlap"))
    coder_numbers = None if coder is None else [*coder.weights, coder.clip]
    return by_definition(
        given, objects, (coder_numbers, probabilities is not None, by_regressed, by_amplified, *numbers)
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is called


class Case(NamedTuple):
    """One call."""

    what: str
    arguments: Arguments
    call: Callable[[], Any]
    expected: Callable[[], Any]
    """What it must return: raises Wrong if it must raise; None if no values are expected, only tensors on "meta"."""


FORMAT_CHOICES: dict[str, list[Any]] = {"gt_box_format": [*BOX_FORMATS, "xyxyxy"]}


def without_huge_offsets(arguments: Arguments, right: Arguments) -> Arguments:
    """Where offsets alone say how many images there are, no more than can be looked at."""
    offsets = arguments["gt_offsets"]
    return (
        arguments | {"gt_offsets": right["gt_offsets"]}
        if isinstance(offsets, Tensor) and is_huge(offsets)
        else arguments
    )


def mutual_match_case(random: np.random.Generator, backends: Sequence[str]) -> Case:
    backend_choices: list[Any] = [None, "cuda", "tpu", *mg_ops.backends()]
    right = {**right_match_call(random), "backend": str(random.choice(backends))}
    choices: dict[str, list[Any]] = {
        "strategy": [*STRATEGIES, "Mutual"],
        "check": [True, False],
        "backend": backend_choices,
        **FORMAT_CHOICES,
    }
    arguments = huge_together(random, right) if random.random() < 0.03 else spoil_some(random, right, choices)
    if all(arguments[name] is None for name in PREDICTIONS):
        arguments = without_huge_offsets(arguments, right)
    backend = arguments["backend"]
    what = f"mutual_match {backend if isinstance(backend, str) else 'of any backend'}"
    return Case(what, arguments, lambda: mg_ops.mutual_match(**arguments), lambda: expected_match(arguments))


def operator_case(random: np.random.Generator, backends: Sequence[str]) -> Case:
    backend = str(random.choice(backends))
    name = {"eager": "mutual_match_eager", "triton": "mutual_match_triton"}.get(backend, "mutual_match")
    right = right_match_call(random, "packed")
    boxes, deltas, logits, probabilities = (right.pop(name) for name in PREDICTIONS)
    right |= {"pred_boxes": boxes if deltas is None else deltas}
    right |= {"cls_scores": logits if probabilities is None else probabilities, "gt_labels": right["gt_labels"].long()}
    del right["gt_mask"], right["gt_box_format"]
    coder = right.pop("box_coder")
    strategy = right.pop("strategy")
    del right["check"]
    numbers = {name: right.pop(name) for name in ("sigma", "iou_positive", "iou_ignored", "crowd_overlap")}
    right |= {"box_coder": None if coder is None else [10.0, 9.0, 5.0, 4.0, 4.0]}
    bools = ("scores_are_probabilities", "classification_by_regressed", "localization_by_amplified")
    right |= dict(zip(bools, (probabilities is not None, *STRATEGIES[strategy]), strict=True)) | numbers
    if random.random() < 0.03:
        right = huge_together(random, right)
        right.pop("check", None)
    coders: list[Any] = [None, [1.0] * 4, [1.0] * 6, []]
    coders += [[a_number(random) if random.random() < 0.3 else 5.0 for _ in range(5)] for _ in range(5)]
    choices = {option: [True, False] for option in bools} | {"box_coder": coders}
    arguments = spoil_some(random, right, choices)

    def expected() -> tuple[Tensor, ...] | None:
        for tensor in (arguments[tensor_name] for tensor_name in ("anchors", "pred_boxes", "cls_scores", "gt_offsets")):
            must(isinstance(tensor, Tensor))
        given_predictions = accept_predictions(*(arguments[name] for name in ("anchors", "pred_boxes", "cls_scores")))
        must(given_predictions.device.type in ("cpu", "meta"))
        must(isinstance(arguments["gt_boxes"], Tensor))
        must(isinstance(arguments["gt_labels"], Tensor) and arguments["gt_labels"].dtype in INTEGER)
        objects = accept_objects(arguments, given_predictions.batch_size, given_predictions.device)
        coder = arguments["box_coder"]
        given = [arguments[option] for option in numbers] + (coder if isinstance(coder, list) else [])
        # What torch makes a bool, a float or a list of them of is its own affair.
        specified = all(isinstance(arguments[option], bool) for option in bools)
        if not (
            specified and isinstance(coder, (list, NoneType)) and all(type(value) in (int, float) for value in given)
        ):
            raise Unspecified
        must(all(isinstance(value, float) or abs(value) < 2**1023 for value in given))
        if coder is not None:
            must(len(coder) == 5 and not math.isnan(coder[4]))
            for weight in coder[:4]:
                accept_number(abs(weight), 0.0, float(torch.finfo(torch.float32).max))
        accept_thresholds(arguments)
        if isinstance(objects, WithoutValues):
            return None
        options = tuple(arguments[option] for option in ("box_coder", *bools, *numbers))
        return by_definition(given_predictions, objects, options)

    operator = getattr(torch.ops.mg_ops, name)
    call = operator if random.random() < 0.5 else operator.default
    return Case(f"operator {name}", arguments, lambda: call(**arguments), expected)


def a_match(random: np.random.Generator) -> tuple[Arguments, Arguments]:
    """A right call and its match by name, as `MutualMatch` takes it."""
    right = right_match_call(random)
    right["check"] = False
    return right, mg_ops.mutual_match(**right, backend="eager")._asdict()


def spoil_match(random: np.random.Generator, match: Arguments) -> Any:
    if random.random() < 0.05:
        return anything(random)
    return mg_ops.MutualMatch(**(spoil_some(random, match) if random.random() < 0.3 else match))


def accept_match(match: Any, device: torch.device | None, num_anchors: int | None) -> tuple[int, torch.device]:
    must(isinstance(match, mg_ops.MutualMatch))
    must(isinstance(match.cls_match, Tensor))
    batch_size, num_anchors = accept(match.cls_match, INTEGER, (None, num_anchors), device)
    must(match.cls_match.is_meta or batch_size * num_anchors < 2**40)
    accept(match.loc_match, INTEGER, (batch_size, num_anchors), match.cls_match.device)
    return batch_size, match.cls_match.device


def accept_counts(match: mg_ops.MutualMatch, objects: Objects | WithoutValues, device: torch.device) -> None:
    must(isinstance(match.num_pos, Tensor) and not match.num_pos.is_nested)
    shape = accept(match.num_pos, INTEGER, tuple(None for _ in match.num_pos.shape), device)
    must(math.prod(shape) == math.prod(objects.shape))


def are_of_these_objects(match: mg_ops.MutualMatch, offsets: Tensor) -> bool:
    """Whether the match could be one for these objects: others' answers mean nothing, but must not crash."""
    counts = offsets.diff().unsqueeze(1)
    return all(bool((value < counts).all() and (value >= -2).all()) for value in match[:2])


def accept_classes(num_classes: Any) -> None:
    must(num_classes is None or (isinstance(num_classes, int) and not isinstance(num_classes, bool)))
    must(num_classes is None or 0 <= num_classes <= MAX_COUNT)


ANY_ANSWER = object()


def targets_case(random: np.random.Generator, backends: Sequence[str]) -> Case:
    right, match = a_match(random)
    arguments = {name: right[name] for name in ("anchors", *OBJECTS, "box_coder") if name != "gt_crowd"}
    arguments["num_classes"] = int(random.choice([0, 1, 2, 5])) if random.random() < 0.5 else None
    choices = {"num_classes": [-1, 2**62, 2**63, 10**30, 3, True, 2.0]} | FORMAT_CHOICES
    arguments = spoil_some(random, arguments, choices)
    arguments["match"] = spoil_match(random, match)

    def expected() -> Any:
        anchors = accept_levels(arguments["anchors"], 4, False)
        num_anchors, _ = accept(anchors, FLOATING, (None, 4), None)
        device = anchors.device
        match = arguments["match"]
        batch_size, _ = accept_match(match, device, num_anchors)
        accept_classes(arguments["num_classes"])
        accept_coder(arguments["box_coder"])
        objects = accept_objects(arguments, batch_size, device, with_crowd=False)
        accept_counts(match, objects, device)
        if isinstance(objects, WithoutValues):
            return None
        boxes, labels, offsets = objects[:3]
        if not are_of_these_objects(match, offsets):
            return ANY_ANSWER
        anchors = clean(anchors, torch.float32)
        cls_match, loc_match = clean(match.cls_match, torch.int64), clean(match.loc_match, torch.int64)
        class_targets, loc_labels = cls_match.clone(), torch.full_like(loc_match, -1)
        box_targets = torch.zeros(batch_size, num_anchors, 4)
        num_classes = arguments["num_classes"]
        for image in range(batch_size):
            for anchor in range(num_anchors):
                found = int(cls_match[image, anchor])
                if found >= 0:
                    label = int(labels[offsets[image] + found])
                    known = num_classes is None or 0 <= label < num_classes
                    class_targets[image, anchor] = label if known else mg_ops.IGNORED
                found = int(loc_match[image, anchor])
                if found >= 0:
                    loc_labels[image, anchor] = labels[offsets[image] + found]
                    box = boxes[offsets[image] + found]
                    coder = arguments["box_coder"]
                    box_targets[image, anchor] = (
                        box if coder is None else coder.encode(anchors=anchors[anchor], boxes=box)
                    )
        return class_targets, loc_labels, box_targets

    return Case("encode_targets", arguments, lambda: mg_ops.encode_targets(**arguments), expected)


def summary_case(random: np.random.Generator, backends: Sequence[str]) -> Case:
    right, match = a_match(random)
    arguments = {name: right[name] for name in OBJECTS}
    arguments |= {"num_classes": int(random.choice([0, 1, 2, 5])), "size_limits": (0.2, 0.5)}
    if random.random() < 0.3:
        arguments["num_classes"] = None
        arguments["gt_labels"] = None
    limits: list[Any] = [
        (0.2, 0.5),
        [0.3, 0.3],
        (0.5, 0.2),
        (0.2,),
        (math.nan, 1.0),
        (0.0, math.inf),
        3,
        "ab",
        ("a", "b"),
    ]
    limits += [(1e200, 1e300), (-1.0, 2.0), None]
    choices = {"num_classes": [-1, 0, 3, None, 2.0, True, 2**62, 10**30], "size_limits": limits} | FORMAT_CHOICES
    arguments = spoil_some(random, arguments, choices)
    arguments["match"] = spoil_match(random, match)

    def expected() -> Any:
        match = arguments["match"]
        batch_size, device = accept_match(match, None, None)
        num_classes, limits = arguments["num_classes"], arguments["size_limits"]
        accept_classes(num_classes)
        dictionaries = are_dictionaries(arguments["gt_boxes"], arguments["gt_labels"])
        must(dictionaries or (num_classes is None) == (arguments["gt_labels"] is None))
        must(isinstance(limits, (tuple, list)) and len(limits) == 2)
        must(all(isinstance(limit, (int, float)) and not isinstance(limit, bool) for limit in limits))
        must(0 <= limits[0] <= limits[1])
        given = dict(arguments)
        if arguments["gt_labels"] is None and not dictionaries:
            boxes_given = arguments["gt_boxes"]
            if isinstance(boxes_given, Tensor):
                must(not boxes_given.is_nested and boxes_given.dim() > 1)
                must(boxes_given.dim() != 3 or arguments["gt_mask"] is not None)
                must(math.prod(boxes_given.shape[:-1]) <= MAX_COUNT)
                given["gt_labels"] = torch.zeros(boxes_given.shape[:-1], dtype=torch.int64, device=device)
            else:
                must(isinstance(boxes_given, Sequence))
                for box in boxes_given:
                    must(accept(box, FLOATING, (None, 4), device)[0] <= MAX_COUNT)
                given["gt_labels"] = [torch.zeros(len(box), dtype=torch.int64, device=device) for box in boxes_given]
        objects = accept_objects(given, batch_size, device)
        accept_counts(match, objects, device)
        if isinstance(objects, WithoutValues):
            return None
        boxes, labels, offsets, crowd = objects[:4]
        if not are_of_these_objects(match, offsets):
            return ANY_ANSWER
        counts = np.zeros((6, 4), np.int64)
        classes = np.zeros((num_classes or 0, 3), np.int64)
        num_pos = clean(match.num_pos, torch.int64).flatten()
        for image in range(batch_size):
            for index in range(int(offsets[image]), int(offsets[image + 1])):
                if (crowd is not None and crowd[index]) or not objects.is_object[index]:
                    continue
                positives = [int((value[image] == index - offsets[image]).sum()) for value in match[:2]]
                groups = [0]
                if reference.is_object(boxes[index]):
                    area = float(reference.area(boxes[index]))
                    groups.append(1 if area < limits[0] * limits[0] else 2 if area < limits[1] * limits[1] else 3)
                missing = [int(count == 0) for count in positives]
                for group in groups:
                    counts[:, group] += [1, int(num_pos[index] == 0), *missing, *positives]
                if 0 <= int(labels[index]) < len(classes):
                    classes[int(labels[index])] += [1, *missing]
        either = (match.cls_match >= 0) | (match.loc_match >= 0)
        differ = int((either & (match.cls_match != match.loc_match)).sum())
        ignored = int((match.cls_match == mg_ops.IGNORED).sum())
        shares = (ignored / max(1, match.cls_match.numel()), differ / max(1, int(either.sum())))
        expected_counts = [torch.from_numpy(row) for row in counts]
        expected_shares = [torch.tensor(share, dtype=torch.float64).float() for share in shares]
        return (*expected_counts, *expected_shares, None if num_classes is None else torch.from_numpy(classes))

    return Case("summarize", arguments, lambda: mg_ops.summarize(**arguments), expected)


def iou_case(random: np.random.Generator, backends: Sequence[str]) -> Case:
    boxes_1, boxes_2 = (
        torch.from_numpy(boxes_around(random, int(random.choice([0, 1, 5, 20])), a_kind(random)).astype(np.float32))
        for _ in range(2)
    )
    arguments = spoil_some(random, {"boxes_1": boxes_1, "boxes_2": boxes_2})

    def expected() -> Any:
        (count_1, _), (count_2, _) = (accept(arguments[name], FLOATING, (None, 4), None) for name in arguments)
        must(arguments["boxes_1"].device == arguments["boxes_2"].device)
        if arguments["boxes_1"].is_meta:
            return ANY_ANSWER if count_1 * count_2 >= 2**31 else None
        must(max(count_1, 1) * max(count_2, 1) < 2**31)
        return (reference.box_iou(*(clean(value, torch.float32) for value in arguments.values())),)

    return Case("box_iou", arguments, lambda: (mg_ops.box_iou(**arguments),), expected)


def coder_case(random: np.random.Generator, backends: Sequence[str]) -> Case:
    encode = random.random() < 0.5
    count = int(random.choice([0, 1, 5, 20]))
    anchors = torch.from_numpy(boxes_around(random, count, a_kind(random)).astype(np.float32))
    other = anchors + torch.from_numpy(
        random.standard_normal((int(random.choice([1, 2])), count, 4)).astype(np.float32)
    )
    arguments = spoil_some(random, {"anchors": anchors, "boxes" if encode else "deltas": other})
    coder = mg_ops.BoxCoder((10.0, 10.0, 5.0, 5.0))

    def expected() -> Any:
        for value in arguments.values():
            must(isinstance(value, Tensor) and not value.is_nested)
            accept(value, FLOATING, (*(None for _ in value.shape[:-1]), 4), None)
            must(value.dim() > 0 and value.numel() < 2**31)
        first, second = arguments.values()
        must(first.device == second.device)
        if encode:
            try:
                must(math.prod(torch.broadcast_shapes(first.shape, second.shape)) < 2**31)
            except RuntimeError:
                raise Wrong from None
        else:
            must(first.dim() == 2 and second.dim() >= 2 and second.shape[-2] == first.shape[0])
        if first.is_meta:
            return None
        first, second = clean(first, torch.float32), clean(second, torch.float32)
        return (
            coder.encode(anchors=first, boxes=second)
            if encode
            else reference.decode(first, second, coder.weights, coder.clip),
        )

    call = coder.encode if encode else coder.decode
    what = f"BoxCoder.{'encode' if encode else 'decode'}"
    return Case(what, arguments, lambda: (call(**arguments),), expected)


def new_coder_case(random: np.random.Generator, backends: Sequence[str]) -> Case:
    arguments: Arguments = {"weights": [a_number(random) if random.random() < 0.3 else 5.0 for _ in range(4)]}
    arguments["clip"] = a_number(random) if random.random() < 0.3 else 4.0
    if random.random() < 0.3:
        arguments["weights"] = anything(random)

    def expected() -> Any:
        # Whatever float() takes is a number here.
        try:
            weights = [float(weight) for weight in arguments["weights"]]
            clip = float(arguments["clip"])
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise Wrong from None
        must(len(weights) == 4 and not math.isnan(clip))
        for weight in weights:
            accept_number(abs(weight), 0.0, float(torch.finfo(torch.float32).max))
        return (torch.tensor([*weights, clip], dtype=torch.float64),)

    def call() -> Any:
        coder = mg_ops.BoxCoder(**arguments)
        return (torch.tensor([*coder.weights, coder.clip], dtype=torch.float64),)

    return Case("BoxCoder", arguments, call, expected)


def device_query_case(random: np.random.Generator, backends: Sequence[str]) -> Case:
    """The operator about CUDA devices, whose answers depend on the build: never a crash."""
    value = [-1, 17, 2**31, 2**32, 2**62, -(2**63), None, "0", 1.5][random.integers(0, 9)]

    def expected() -> Any:
        must(isinstance(value, int) and mg_ops.library.has_cuda)
        return ANY_ANSWER

    call = torch.ops.mg_ops.cuda_device_error
    return Case("operator cuda_device_error", {"value": value}, lambda: (call(value),), expected)


CASES: list[tuple[Callable[[np.random.Generator, Sequence[str]], Case], float]] = [
    *((mutual_match_case, 0.44), (operator_case, 0.22), (targets_case, 0.1), (summary_case, 0.1), (iou_case, 0.05)),
    *((coder_case, 0.05), (new_coder_case, 0.03), (device_query_case, 0.01)),
]

NAMES = (
    r"anchors|pred_boxes|box_deltas|cls_logits|cls_probabilities|cls_scores|gt_boxes|gt_labels|gt_offsets|gt_crowd"
    r"|gt_mask|gt_box_format|box_coder|strategy|sigma|iou_positive"
    r"|iou_ignored|crowd_overlap|check|backend|match|num_classes|size_limits|boxes_1|boxes_2|boxes|deltas|BoxCoder"
    r"|mutual_match|backend '\w+' cannot be used"
)
DOCUMENTED = re.compile(rf"^({NAMES})\b")
BY_TORCH = re.compile(r"mg_ops::\w+|argument '\w+'")
"""How torch itself refuses what is no argument of an operator, or a tensor that no kernel is for."""
OUT_OF_MEMORY = re.compile(r"not enough memory|can't allocate memory|overflow")
NOISE = re.compile(r"INTERNAL ASSERT|Exception raised from|\.cpp:\d|\.h:\d")


def is_fine(error: BaseException, of_operator: bool) -> bool:
    """Whether an exception is one that the API documents, and its message helps."""
    message = str(error)
    if OUT_OF_MEMORY.search(message) and isinstance(error, RuntimeError):
        return True
    if of_operator:
        kinds: tuple[type[Exception], ...] = (RuntimeError, TypeError, ValueError)
        return isinstance(error, kinds) and bool(DOCUMENTED.search(message) or BY_TORCH.search(message))
    documented = type(error) in (TypeError, ValueError) or (
        type(error) is RuntimeError and bool(re.match(r"backend|mutual_match: ", message))
    )
    return documented and bool(DOCUMENTED.search(message)) and not NOISE.search(message)


def equal(value: Any, wanted: Any) -> bool:
    if wanted is None or value is None:
        return value is wanted
    value = value.as_subclass(Tensor)
    if value.dtype != wanted.dtype or value.shape != wanted.shape:
        return False
    return bool(((value == wanted) | ((value != value) & (wanted != wanted))).all())


def run_case(case: Case) -> str:
    """Makes one call and checks its outcome, "answered" or "refused".

    Raises:
        AssertionError: saying what is wrong with it.
    """
    what, _, call, expected = case
    raised: BaseException | None = None
    answer: Any = None
    try:
        answer = call()
    except Exception as error:
        raised = error
    try:
        wanted = expected()
    except Unspecified:
        wanted = ANY_ANSWER
        if raised is not None and not is_fine(raised, what.startswith("operator")):
            raise AssertionError(f"{what}: {type(raised).__name__} does not help: {raised}") from raised
        if raised is not None:
            return "refused"
    except Wrong:
        if raised is None:
            raise AssertionError(f"{what}: must raise, but returned {[describe(value) for value in answer]}") from None
        if not is_fine(raised, what.startswith("operator")):
            raise AssertionError(f"{what}: {type(raised).__name__} does not help: {raised}") from raised
        return "refused"
    if raised is not None:
        raise AssertionError(f"{what}: must not raise {type(raised).__name__}: {raised}") from raised
    if wanted is None:
        assert all(value is None or value.is_meta for value in answer), f"{what}: expected meta tensors"
    elif wanted is not ANY_ANSWER:
        for index, (value, right) in enumerate(zip(answer, wanted, strict=True)):
            assert equal(value, right), f"{what}: result {index} is\n{value}\nexpected\n{right}"
    return "answered"


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"{value.dtype} {tuple(value.shape)} {value.device}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {', '.join(map(describe, value))}"
    return f"{str(value)[:80]} ({type(value).__name__})"


def make_case(seed: int, backends: Sequence[str]) -> Case:
    random = np.random.default_rng([seed, 77])
    torch.manual_seed(seed)
    makers, weights = zip(*CASES, strict=True)
    maker = makers[random.choice(len(makers), p=weights)]
    torch.set_num_threads(int(random.choice([1, 1, 2, 3])))
    with np.errstate(all="ignore"):
        return maker(random, backends)


def run(seeds: range, backends: Sequence[str], progress: Path, keep_going: bool) -> int:
    """Makes the calls of these seeds in this process; the exit status."""
    warnings.simplefilter("ignore")
    outcomes: collections.Counter[str] = collections.Counter()
    failures = 0
    with progress.open("r+b", buffering=0) as file:
        for seed in seeds:
            file.seek(0)
            file.write(b"%20d" % seed)
            case = make_case(seed, backends)
            try:
                outcomes[f"{case.what} {run_case(case)}"] += 1
            except AssertionError as error:
                failures += 1
                print(
                    f"seed {seed}: {error}",
                    *(f"    {name} = {describe(v)}" for name, v in case.arguments.items()),
                    sep="\n",
                )
                if not keep_going:
                    traceback.print_exc()
                    return FAILED
    answered, refused = (
        sum(n for name, n in outcomes.items() if name.endswith(end)) for end in ("answered", "refused")
    )
    for name, number in sorted(outcomes.items()):
        print(f"{number:8,} {name}")
    print(
        f"{len(seeds):,} calls of seeds {seeds.start} to {seeds.stop - 1}: {answered:,} answered, {refused:,} refused, "
        f"{failures} failed"
    )
    return FAILED if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (default 0)")
    usable = [name for name, status in mg_ops.backends().items() if status.usable and name != "cuda"]
    parser.add_argument(
        "--backends",
        nargs="+",
        default=usable,
        help=f"one named twice is taken twice as often; default: {' '.join(usable)}",
    )
    parser.add_argument("--keep-going", action="store_true", help="report all failures, not only the first")
    parser.add_argument("--in-process", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.calls)
    if options.in_process:
        return run(seeds, options.backends, options.in_process, options.keep_going)
    started = time.monotonic()
    with tempfile.NamedTemporaryFile() as progress:
        command = [sys.executable, "-X", "faulthandler", *sys.argv, "--in-process", progress.name]
        status, seed = watch(subprocess.Popen(command), Path(progress.name))
    print(f"{time.monotonic() - started:.0f} s")
    if status not in (0, FAILED):
        print(f"the process ended with status {status} at seed {seed}: {sys.argv[0]} --first {seed} --calls 1")
    return 0 if status == 0 else 1


def watch(child: subprocess.Popen[bytes], progress: Path) -> tuple[int, str]:
    """Waits for the child, or kills it where one call takes too long; its exit status and the seed of its last call."""
    seed, since = "", time.monotonic()
    while True:
        try:
            return child.wait(timeout=1), progress.read_text().strip()
        except subprocess.TimeoutExpired:
            now = progress.read_text().strip()
            if now != seed:
                seed, since = now, time.monotonic()
            elif seed and time.monotonic() - since > SECONDS_A_CALL:
                print(f"seed {seed} hangs: no end after {SECONDS_A_CALL} s", flush=True)
                child.send_signal(signal.SIGABRT)  # Python then writes where it is


if __name__ == "__main__":
    sys.exit(main())
