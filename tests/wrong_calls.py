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
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from random_batches import SPECIAL, boxes_around, odd_strides, sprinkle
from torch import Tensor

import mg_ops
from mg_ops import reference
from mg_ops.matching import STRATEGIES

Arguments = dict[str, Any]
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int64, torch.int32)
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


def right_objects(random: np.random.Generator, batch_size: int, num_classes: int) -> Arguments:
    counts = [int(random.choice([0, 1, 1, 2, 3, 6])) for _ in range(batch_size)]
    label_dtype = torch.int32 if random.random() < 0.2 else torch.int64
    boxes = [torch.from_numpy(boxes_around(random, count, a_kind(random)).astype(np.float32)) for count in counts]
    labels = [torch.from_numpy(random.integers(0, max(1, num_classes), count)).to(label_dtype) for count in counts]
    crowd = [torch.from_numpy(random.random(count) < 0.3) for count in counts]
    objects: Arguments = {"gt_boxes": boxes, "gt_labels": labels, "gt_offsets": None, "gt_crowd": crowd}
    if random.random() < 0.5:
        slack = int(random.choice([0, 0, 2]))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        objects = {
            "gt_boxes": torch.cat([*boxes, torch.full((slack, 4), math.nan)]),
            "gt_labels": torch.cat([*labels, torch.full((slack,), -77, dtype=label_dtype)]).to(label_dtype),
            "gt_offsets": offsets.to(torch.int32) if random.random() < 0.2 else offsets,
            "gt_crowd": torch.cat([*crowd, torch.ones(slack, dtype=torch.bool)]).bool(),
        }
    if random.random() < 0.5:
        objects["gt_crowd"] = None
    return objects


def a_kind(random: np.random.Generator) -> str:
    return str(random.choice(["smooth", "integer", "integer", "few", "grid"]))


def right_match_call(random: np.random.Generator) -> Arguments:
    batch_size = int(random.choice([0, 1, 1, 2, 3, 5]))
    num_anchors = int(random.choice([0, 1, 3, 8, 17, 63, 64, 65, 130]))
    num_classes = int(random.choice([0, 1, 2, 5]))
    anchors = torch.from_numpy(boxes_around(random, num_anchors, a_kind(random)).astype(np.float32))
    near = anchors + torch.from_numpy(0.1 * random.standard_normal((batch_size, num_anchors, 4)).astype(np.float32))
    scores = torch.from_numpy(random.standard_normal((batch_size, num_anchors, num_classes)).astype(np.float32))
    iou_positive = float(random.choice([0.5, 0.5, 0.3, 1.0, 1e-6]))
    return {
        "anchors": anchors,
        "pred_boxes": near,
        "cls_scores": scores,
        **right_objects(random, batch_size, num_classes),
        "box_coder": mg_ops.BoxCoder() if random.random() < 0.3 else None,
        "strategy": str(random.choice(list(STRATEGIES))),
        "sigma": float(random.choice([2.0, 1.01, 3.0])),
        "iou_positive": iou_positive,
        "iou_ignored": iou_positive * float(random.choice([0.8, 1.0])),
        "crowd_overlap": 0.5,
        "check": bool(random.random() < 0.2),
    }


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
    for image in range(len(changed)):
        if random.random() < 0.5:
            changed[image] = spoil_tensor(random, changed[image])
    return changed


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
    anchors, boxes, scores = (arguments[name] for name in ("anchors", "pred_boxes", "cls_scores"))
    if kind == 0 and isinstance(arguments["gt_boxes"], Tensor) and len(arguments["gt_boxes"]) > 0:
        count = int(random.choice([2**31, 2**32 + 1]))
        names = [name for name in ("gt_boxes", "gt_labels", "gt_crowd") if arguments[name] is not None]
        return arguments | {name: arguments[name][:1].expand(count, *arguments[name].shape[1:]) for name in names}
    if kind == 1 and scores.shape[2] > 0:  # allowed: the classes are read where they are
        return arguments | {"cls_scores": scores[..., :1].expand(-1, -1, 2**40), "check": False}
    if len(anchors) == 0 or len(boxes) == 0:
        return arguments
    count = int(random.choice([2**31, 2**31 + 5, 2**32 + 1]))
    changed = {"anchors": anchors[:1], "pred_boxes": boxes[:, :1], "cls_scores": scores[:, :1]}
    if kind == 2:  # as many anchors as can be, in so many images that B * A bytes are beyond any memory
        count = MAX_COUNT
        batch_size = 2**16
        changed = {
            name: value[..., :1, :].expand(*value.shape[:-2], 1, value.shape[-1]) for name, value in changed.items()
        }
        changed["pred_boxes"] = changed["pred_boxes"][:1].expand(batch_size, 1, 4)
        changed["cls_scores"] = changed["cls_scores"][:1].expand(batch_size, 1, scores.shape[2])
        objects = {"gt_boxes": torch.zeros(0, 4), "gt_labels": torch.zeros(0, dtype=torch.int64), "gt_crowd": None}
        arguments = arguments | objects | {"gt_offsets": torch.zeros(batch_size + 1, dtype=torch.int64), "check": False}
    return arguments | {
        name: value.expand(*value.shape[:-2], count, value.shape[-1]) for name, value in changed.items()
    }


def all_to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
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


def clean_scores(cls_scores: Tensor) -> Tensor:
    """Likewise, but for the classes that no memory holds, of which all are the same."""
    if cls_scores.shape[2] <= 2**16:
        return clean(cls_scores, torch.float32)
    return clean(cls_scores[..., :1], torch.float32).expand(cls_scores.shape)


def accept_objects(
    arguments: Arguments, batch_size: int, device: torch.device, with_crowd: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """Clean packed objects, or None where they are on the meta device."""
    boxes, labels, offsets = (arguments[name] for name in ("gt_boxes", "gt_labels", "gt_offsets"))
    crowd = arguments.get("gt_crowd") if with_crowd else None
    if isinstance(boxes, Tensor):
        num_gt = accept(boxes, FLOATING, (None, 4), device)[0]
        accept(labels, INTEGER, (num_gt,), device)
        accept(offsets, INTEGER, (batch_size + 1,), device)
        if crowd is not None:
            accept(crowd, (torch.bool,), (num_gt,), device)
        must(num_gt <= MAX_COUNT)
        if device.type == "meta":
            return None
        ends = offsets.tolist()
        must(ends[0] == 0 and ends == sorted(ends) and ends[-1] <= num_gt)
    else:
        must(offsets is None)
        for value in (boxes, labels, *([] if crowd is None else [crowd])):
            must(isinstance(value, Sequence) and not isinstance(value, Tensor) and len(value) == batch_size)
        counts = [accept(box, FLOATING, (None, 4), device)[0] for box in boxes]
        for image, count in enumerate(counts):
            accept(labels[image], INTEGER, (count,), device)
            if crowd is not None:
                accept(crowd[image], (torch.bool,), (count,), device)
        must(sum(counts) <= MAX_COUNT)
        if device.type == "meta":
            return None
        boxes = torch.cat([clean(box, torch.float32) for box in boxes] or [torch.zeros(0, 4)])
        labels = torch.cat([clean(label, torch.int64) for label in labels] or [torch.zeros(0, dtype=torch.int64)])
        if crowd is not None:
            crowd = torch.cat([clean(flags, torch.bool) for flags in crowd] or [torch.zeros(0, dtype=torch.bool)])
        ends = [0, *np.cumsum(counts).tolist()]
    boxes, labels = clean(boxes, torch.float32), clean(labels, torch.int64)
    return boxes, labels, torch.tensor(ends), None if crowd is None else clean(crowd, torch.bool)


def accept_predictions(arguments: Arguments) -> tuple[int, torch.device]:
    num_anchors, _ = accept(arguments["anchors"], FLOATING, (None, 4), None)
    device = arguments["anchors"].device
    batch_size, _, _ = accept(arguments["cls_scores"], FLOATING, (None, num_anchors, None), device)
    accept(arguments["pred_boxes"], FLOATING, (batch_size, num_anchors, 4), device)
    must(num_anchors <= MAX_COUNT)
    must(device.type == "meta" or batch_size * num_anchors < 2**40)  # more is more than any memory
    return batch_size, device


def accept_coder(coder: Any) -> None:
    must(coder is None or isinstance(coder, mg_ops.BoxCoder))


def accept_values(arguments: Arguments, objects: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
    """What check=True refuses."""
    boxes, labels, offsets, crowd = objects
    must(arguments["cls_scores"].shape[2] <= 2**16)  # so many that looking at each takes more than any memory
    anchors, predictions, scores = (
        clean(arguments[name], torch.float32) for name in ("anchors", "pred_boxes", "cls_scores")
    )
    must(reference.is_object(anchors).all() and not scores.isnan().any())
    if arguments["box_coder"] is None:
        must(reference.is_object(predictions).all())
    else:
        must(predictions.isfinite().all() and arguments["box_coder"].decode(anchors, predictions).isfinite().all())
    counted = int(offsets[-1])
    ordinary = torch.ones(counted, dtype=torch.bool) if crowd is None else ~crowd[:counted]
    must(reference.is_object(boxes[:counted]).all())
    must(((labels[:counted] >= 0) & (labels[:counted] < scores.shape[2]))[ordinary].all())
    must(
        (reference.box_iou(anchors, boxes[:counted]) > 0).any(0)[ordinary].all() if len(anchors) else not ordinary.any()
    )


def by_definition(
    arguments: Arguments, objects: tuple[Tensor, Tensor, Tensor, Tensor | None], options: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    anchors, predictions = (clean(arguments[name], torch.float32) for name in ("anchors", "pred_boxes"))
    return reference.mutual_match(anchors, predictions, clean_scores(arguments["cls_scores"]), *objects, *options)


def expected_match(arguments: Arguments) -> tuple[Tensor, ...] | None:
    """What mutual_match must return, None if tensors without values; raises Wrong if it must raise."""
    batch_size, device = accept_predictions(arguments)
    must(isinstance(arguments["strategy"], str) and arguments["strategy"] in STRATEGIES)
    accept_coder(arguments["box_coder"])
    accept_thresholds(arguments)
    must(isinstance(arguments["check"], bool))
    backend = arguments["backend"]
    must(backend is None or isinstance(backend, str))
    must(backend is None or (backend in mg_ops.backends() and mg_ops.backends()[backend].usable))
    must(device.type == "cpu" or (device.type == "meta" and backend in (None, "eager") and not arguments["check"]))
    objects = accept_objects(arguments, batch_size, device)
    if objects is None:
        return None
    if arguments["check"]:
        accept_values(arguments, objects)
    coder = arguments["box_coder"] or mg_ops.BoxCoder()
    options = (
        None if arguments["box_coder"] is None else coder.weights,
        coder.clip,
        *STRATEGIES[arguments["strategy"]],
    )
    numbers = (float(arguments[name]) for name in ("sigma", "iou_positive", "iou_ignored", "crowd_overlap"))
    return by_definition(arguments, objects, (*options, *numbers))


# ---------------------------------------------------------------------------------------------------------------------
# What is called


class Case(NamedTuple):
    """One call."""

    what: str
    arguments: Arguments
    call: Callable[[], Any]
    expected: Callable[[], Any]
    """What it must return: raises Wrong if it must raise; None if no values are expected, only tensors on "meta"."""


def mutual_match_case(random: np.random.Generator, backends: Sequence[str]) -> Case:
    backend_choices: list[Any] = [None, "cuda", "tpu", *mg_ops.backends()]
    right = {**right_match_call(random), "backend": str(random.choice(backends))}
    choices: dict[str, list[Any]] = {
        "strategy": [*STRATEGIES, "Mutual"],
        "check": [True, False],
        "backend": backend_choices,
    }
    arguments = huge_together(random, right) if random.random() < 0.03 else spoil_some(random, right, choices)
    backend = arguments["backend"]
    what = f"mutual_match {backend if isinstance(backend, str) else 'of any backend'}"
    return Case(what, arguments, lambda: mg_ops.mutual_match(**arguments), lambda: expected_match(arguments))


def operator_case(random: np.random.Generator, backends: Sequence[str]) -> Case:
    backend = str(random.choice(backends))
    name = {"eager": "mutual_match_eager", "triton": "mutual_match_triton"}.get(backend, "mutual_match")
    right = right_match_call(random)
    while right["gt_offsets"] is None:
        right = right_match_call(random)
    coder = right.pop("box_coder")
    strategy = right.pop("strategy")
    del right["check"]
    numbers = {name: right.pop(name) for name in ("sigma", "iou_positive", "iou_ignored", "crowd_overlap")}
    right |= {"decode": coder is not None, "weight_x": 10.0, "weight_y": 9.0, "weight_w": 5.0, "weight_h": 4.0}
    right |= {"clip": 4.0, "classification_by_regressed": STRATEGIES[strategy][0]}
    right |= {"localization_by_amplified": STRATEGIES[strategy][1], **numbers}
    bools = ("decode", "classification_by_regressed", "localization_by_amplified")
    if random.random() < 0.03:
        right = huge_together(random, right)
        right.pop("check", None)
    arguments = spoil_some(random, right, {option: [True, False] for option in bools})

    def expected() -> tuple[Tensor, ...] | None:
        batch_size, device = accept_predictions(arguments)
        must(device.type in ("cpu", "meta"))
        must(isinstance(arguments["gt_boxes"], Tensor))
        objects = accept_objects(arguments, batch_size, device)
        names = ("weight_x", "weight_y", "weight_w", "weight_h", "clip", *numbers)
        # What torch makes a bool or a float of is its own affair.
        specified = all(isinstance(arguments[option], bool) for option in bools)
        if not (specified and all(type(arguments[option]) in (int, float) for option in names)):
            raise Unspecified
        must(all(isinstance(arguments[option], float) or abs(arguments[option]) < 2**1023 for option in names))
        if arguments["decode"]:
            rounded = torch.tensor([float(arguments[option]) for option in names[:4]], dtype=torch.float32)
            must(rounded.isfinite().all() and (rounded != 0).all() and not math.isnan(arguments["clip"]))
        accept_thresholds(arguments)
        if objects is None:
            return None
        weights = tuple(float(arguments[option]) for option in names[:4]) if arguments["decode"] else None
        options = (weights, *(arguments[option] for option in ("clip", *bools[1:], *numbers)))
        return by_definition(arguments, objects, options)

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
    arguments = {name: right[name] for name in ("anchors", "gt_boxes", "gt_labels", "gt_offsets", "box_coder")}
    arguments["num_classes"] = int(random.choice([0, 1, 2, 5])) if random.random() < 0.5 else None
    arguments = spoil_some(random, arguments, {"num_classes": [-1, 2**62, 2**63, 10**30, 3, True, 2.0]})
    arguments["match"] = spoil_match(random, match)

    def expected() -> Any:
        num_anchors, _ = accept(arguments["anchors"], FLOATING, (None, 4), None)
        device = arguments["anchors"].device
        match = arguments["match"]
        batch_size, _ = accept_match(match, device, num_anchors)
        accept_classes(arguments["num_classes"])
        accept_coder(arguments["box_coder"])
        objects = accept_objects(arguments, batch_size, device, with_crowd=False)
        accept(
            match.num_pos,
            INTEGER,
            (len(arguments["gt_boxes"]) if objects is None and isinstance(arguments["gt_boxes"], Tensor) else None,),
            device,
        )
        if objects is None:
            must(
                isinstance(arguments["gt_boxes"], Tensor) or len(match.num_pos) == sum(map(len, arguments["gt_boxes"]))
            )
            return None
        boxes, labels, offsets, _ = objects
        must(len(match.num_pos) == len(boxes))
        if not are_of_these_objects(match, offsets):
            return ANY_ANSWER
        anchors = clean(arguments["anchors"], torch.float32)
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
                    box_targets[image, anchor] = box if coder is None else coder.encode(anchors[anchor], box)
        return class_targets, loc_labels, box_targets

    return Case("encode_targets", arguments, lambda: mg_ops.encode_targets(**arguments), expected)


def summary_case(random: np.random.Generator, backends: Sequence[str]) -> Case:
    right, match = a_match(random)
    arguments = {name: right[name] for name in ("gt_boxes", "gt_labels", "gt_offsets", "gt_crowd")}
    arguments |= {"num_classes": int(random.choice([0, 1, 2, 5])), "size_limits": (0.2, 0.5)}
    if random.random() < 0.3:
        arguments["gt_labels"] = arguments["num_classes"] = None
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
    choices = {"num_classes": [-1, 0, 3, None, 2.0, True, 2**62, 10**30], "size_limits": limits}
    arguments = spoil_some(random, arguments, choices)
    arguments["match"] = spoil_match(random, match)

    def expected() -> Any:
        match = arguments["match"]
        batch_size, device = accept_match(match, None, None)
        num_classes, limits = arguments["num_classes"], arguments["size_limits"]
        accept_classes(num_classes)
        must((num_classes is None) == (arguments["gt_labels"] is None))
        must(isinstance(limits, (tuple, list)) and len(limits) == 2)
        must(all(isinstance(limit, (int, float)) and not isinstance(limit, bool) for limit in limits))
        must(0 <= limits[0] <= limits[1])
        without_labels = arguments["gt_labels"] is None
        boxes_given = arguments["gt_boxes"]
        given = dict(arguments)
        if without_labels:
            if isinstance(boxes_given, Tensor):
                must(accept(boxes_given, FLOATING, (None, 4), device)[0] <= MAX_COUNT)
                given["gt_labels"] = torch.zeros(len(boxes_given), dtype=torch.int64, device=device)
            else:
                must(isinstance(boxes_given, Sequence))
                for box in boxes_given:
                    must(accept(box, FLOATING, (None, 4), device)[0] <= MAX_COUNT)
                given["gt_labels"] = [torch.zeros(len(box), dtype=torch.int64, device=device) for box in boxes_given]
        objects = accept_objects(given, batch_size, device)
        must(isinstance(match.num_pos, Tensor))
        accept(match.num_pos, INTEGER, (None,), device)
        if objects is None:
            num_gt = len(boxes_given) if isinstance(boxes_given, Tensor) else sum(map(len, boxes_given))
            must(len(match.num_pos) == num_gt)
            return None
        boxes, labels, offsets, crowd = objects
        must(len(match.num_pos) == len(boxes))
        if not are_of_these_objects(match, offsets):
            return ANY_ANSWER
        counts = np.zeros((6, 4), np.int64)
        classes = np.zeros((num_classes or 0, 3), np.int64)
        num_pos = clean(match.num_pos, torch.int64)
        for image in range(batch_size):
            for index in range(int(offsets[image]), int(offsets[image + 1])):
                if crowd is not None and crowd[index]:
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
        must(max(count_1, 1) * max(count_2, 1) < 2**31)
        if arguments["boxes_1"].is_meta:
            return None
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
        return (coder.encode(first, second) if encode else reference.decode(first, second, coder.weights, coder.clip),)

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
        must(all(2.0**-126 <= abs(weight) <= float(torch.finfo(torch.float32).max) for weight in weights))
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
    r"anchors|pred_boxes|cls_scores|gt_boxes|gt_labels|gt_offsets|gt_crowd|box_coder|strategy|sigma|iou_positive"
    r"|iou_ignored|crowd_overlap|check|backend|match|num_classes|size_limits|boxes_1|boxes_2|boxes|deltas|BoxCoder"
    r"|mutual_match|box coder weights|clip|backend '\w+' cannot be used"
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
