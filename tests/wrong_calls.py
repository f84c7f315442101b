"""Random calls of everything public, right and wrong: each is answered rightly, or refused with an error that helps.

    python tests/wrong_calls.py --calls 1000

makes a right call from each seed, spoils nothing, one or a few of its arguments, and looks at what becomes of it:

- an answer is that of the definition for clean copies of the arguments (packed, contiguous, float32);
- an error is one of the documented exceptions, and its message begins with the name of an argument;
- a call that is right but for where its tensors lie and what floating values they hold is answered;
- nothing crashes the process or hangs: each call runs in a child process that is watched, and a failure names the seed.

What must be refused, and by which words, is the table in test_arguments.py, sizes beyond 32 bits and memory included.
`make fuzz` runs tens of thousands of calls against a library with AddressSanitizer and UndefinedBehaviorSanitizer in
it. No test framework in here.
"""

from __future__ import annotations

import argparse
import collections
import decimal
import fractions
import inspect
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
from object_forms import FORMS, in_form, without_labels
from random_batches import SPECIAL, boxes_around, odd_strides, sprinkle
from torch import Tensor

import mg_ops
from mg_ops import reference
from mg_ops.checks import is_readable
from mg_ops.matching import STRATEGIES

Arguments = dict[str, Any]
Random = np.random.Generator
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int64, torch.int32)
OTHER_DTYPES = (
    *(torch.int8, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64),
    *(torch.complex128, torch.float8_e5m2, torch.float8_e4m3fn, torch.quint8, *FLOATING, *INTEGER),
)
PREDICTIONS = ("pred_boxes", "box_deltas", "cls_logits", "cls_probabilities")
OBJECTS = ("gt_boxes", "gt_labels", "gt_offsets", "gt_crowd", "gt_mask", "gt_box_format")
BOX_FORMATS = ("xyxy", "xywh", "cxcywh")
NUMBERS = ("sigma", "iou_positive", "iou_ignored", "crowd_overlap")
FLAGS = ("scores_are_probabilities", "classification_by_regressed", "localization_by_amplified")
SECONDS_A_CALL = 600
"""After which a call counts as hanging: ordinary ones take milliseconds, those of interpreted Triton seconds, and on a
busy machine many times as long."""
FAILED = 3
"""The child's exit status where a call ended wrongly; any other one but 0 is a crash."""


class PlainSubclass(Tensor):
    """A subclass that changes nothing."""


def one_of(random: Random, values: Sequence[Any]) -> Any:
    return values[random.integers(0, len(values))]


# ---------------------------------------------------------------------------------------------------------------------
# Right calls


def some_boxes(random: Random, count: int) -> Tensor:
    kind = str(random.choice(["smooth", "integer", "integer", "few", "grid"]))
    return torch.from_numpy(boxes_around(random, count, kind).astype(np.float32))


def right_objects(random: Random, batch_size: int, num_classes: int, form: str) -> Arguments:
    counts = [int(random.choice([0, 1, 1, 2, 3, 6])) for _ in range(batch_size)]
    label_dtype = torch.int32 if random.random() < 0.2 else torch.int64
    boxes = [some_boxes(random, count) for count in counts]
    labels = [torch.from_numpy(random.integers(0, max(1, num_classes), count)).to(label_dtype) for count in counts]
    crowd = [torch.from_numpy(random.random(count) < 0.3) for count in counts] if random.random() < 0.5 else None
    objects, _ = in_form(form, boxes, labels, crowd, seed=int(random.integers(0, 1000)))
    objects = dict.fromkeys(OBJECTS) | {"gt_box_format": "xyxy"} | objects
    if form == "packed":
        slack = int(random.choice([0, 0, 2]))
        more = {"gt_boxes": torch.full((slack, 4), math.nan), "gt_labels": torch.full((slack,), -77)}
        more |= {} if crowd is None else {"gt_crowd": torch.ones(slack, dtype=torch.bool)}
        objects |= {name: torch.cat([objects[name], values]) for name, values in more.items()}
        if random.random() < 0.2:
            objects |= {"gt_labels": objects["gt_labels"].int(), "gt_offsets": objects["gt_offsets"].int()}
    if random.random() < 0.2:
        objects["gt_box_format"] = str(random.choice(BOX_FORMATS))
    if random.random() < 0.2 and form != "dictionaries":
        labels = objects["gt_labels"]
        objects["gt_labels"] = [c.float() for c in labels] if isinstance(labels, list) else labels.float()
    return objects


def right_match_call(random: Random, form: str | None = None) -> Arguments:
    """One whose objects are in this form, with all predictions in one tensor; or any."""
    batch_size = int(random.choice([0, 1, 1, 2, 3, 5]))
    num_anchors = int(random.choice([0, 1, 3, 8, 17, 63, 64, 65, 130]))
    num_classes = int(random.choice([0, 1, 2, 5]))
    anchors = some_boxes(random, num_anchors)
    noise = torch.from_numpy(0.1 * random.standard_normal((batch_size, num_anchors, 4)).astype(np.float32))
    scores = torch.from_numpy(random.standard_normal((batch_size, num_anchors, num_classes)).astype(np.float32))
    with_coder, probabilities = random.random() < 0.3, random.random() < 0.3
    iou_positive = float(random.choice([0.5, 0.5, 0.3, 1.0, 1e-6]))
    arguments = {
        "anchors": anchors,
        **dict.fromkeys(PREDICTIONS),
        "box_deltas" if with_coder else "pred_boxes": noise if with_coder else anchors + noise,
        "cls_probabilities" if probabilities else "cls_logits": scores.abs() % 1 if probabilities else scores,
        **right_objects(random, batch_size, num_classes, form or str(random.choice(["packed", *FORMS]))),
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
        arguments |= dict.fromkeys(unread + ([] if by_amplified else ["cls_logits", "cls_probabilities"]))
    if random.random() < 0.15 and form is None:
        for name in ("anchors", *PREDICTIONS):
            if arguments[name] is not None and random.random() < 0.7:
                arguments[name] = list(arguments[name].tensor_split(3, dim=-2))
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# Spoiling


def anything(random: Random) -> Any:
    """A Python value that is hardly ever right."""
    values: list[Callable[[], Any]] = [
        *(lambda: None, lambda: 3, lambda: -1, lambda: 2.5, lambda: math.nan, lambda: 10**400, lambda: True),
        *(lambda: "mutual", lambda: "", lambda: b"abc", lambda: [], lambda: (), lambda: {}, lambda: {0: 1}),
        *(object, lambda: np.zeros((3, 4), np.float32), lambda: [[0.0, 0.0, 1.0, 1.0]], lambda: (x for x in range(2))),
        *(lambda: torch.float32, lambda: torch.zeros(()), lambda: torch.zeros(0), lambda: torch.Tensor, lambda: ...),
        *(lambda: collections.deque([1, 2]), lambda: range(2), lambda: torch.device("cpu"), lambda: mg_ops.BoxCoder),
        *(lambda: [None], lambda: [[], []], lambda: 2 + 3j, lambda: torch.zeros(3, 4), lambda: len),
    ]
    return one_of(random, values)()


def a_number(random: Random) -> Any:
    numbers: list[Any] = [0, -1, 1, 2, 0.0, -0.0, 1.0, -1.0, 0.3, 1e308, -1e308, 1e-308, 5e-324, 1e39, 1e-39, 1e-46]
    numbers += [math.nan, math.inf, -math.inf, 10**400, 2**63, -(2**63), 1 + 1e-9, 1 + 2.0**-23, 1 - 2.0**-24, 3.5]
    numbers += [True, None, "2", np.float64(2), np.float32(2), np.int64(2), torch.tensor(2.0), 2j]
    return one_of(random, [*numbers, fractions.Fraction(3, 2), decimal.Decimal(2)])


def other_shape(random: Random, tensor: Tensor) -> Tensor:
    dim = int(random.integers(0, max(1, tensor.dim())))
    shapes: list[Callable[[], Tensor]] = [
        lambda: tensor.unsqueeze(dim),
        lambda: tensor.narrow(dim, 0, max(0, tensor.shape[dim] - 1)),
        lambda: torch.cat([tensor, tensor.narrow(dim, 0, min(1, tensor.shape[dim]))], dim),
        tensor.flatten,
        lambda: tensor.transpose(0, -1),
        lambda: tensor[0],
        lambda: tensor.new_zeros([int(size) for size in random.choice([0, 1, 2, 3, 4, 7], random.integers(0, 5))]),
        lambda: tensor.narrow(dim, 0, 0),
    ]
    return one_of(random, shapes)()


def other_dtype(random: Random, tensor: Tensor) -> Tensor:
    dtype = one_of(random, OTHER_DTYPES)
    if dtype == torch.quint8:
        return torch.quantize_per_tensor(torch.zeros(tensor.shape), 0.1, 0, dtype)
    return torch.zeros(tensor.shape, dtype=dtype) if tensor.is_complex() else tensor.to(dtype)


def other_layout(random: Random, tensor: Tensor) -> Tensor:
    layouts: list[Callable[[], Tensor]] = [
        *(tensor.to_sparse, tensor.to_sparse_csr, lambda: tensor.to("meta")),
        lambda: tensor.to_mkldnn() if tensor.numel() > 0 else tensor,
        lambda: torch.nested.nested_tensor([tensor, tensor]),
        lambda: torch.nested.nested_tensor([tensor, tensor[:1]], layout=torch.jagged),
    ]
    return one_of(random, layouts)()


def other_strides(random: Random, tensor: Tensor) -> Tensor:
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


def other_wrapping(random: Random, tensor: Tensor) -> Tensor:
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


def without_storage(random: Random, tensor: Tensor) -> Tensor:
    """A tensor whose memory has been taken away, all of it or its end, as frameworks do to free and refill it."""
    tensor = tensor.detach().clone()
    storage = tensor.untyped_storage()
    storage.resize_(int(random.choice([0, 0, storage.nbytes() // 2, max(0, storage.nbytes() - 1)])))
    return tensor


def huge(random: Random, tensor: Tensor) -> Tensor:
    """The first of its elements, as often as no memory could hold them."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    dim = int(random.integers(0, tensor.dim()))
    shape = list(tensor.shape)
    shape[dim] = int(random.choice([2**46, 2**50]))
    return tensor.narrow(dim, 0, 1).expand(shape)


def is_huge(tensor: Tensor) -> bool:
    return max(tensor.shape, default=0) > 2**20


def other_values(random: Random, tensor: Tensor) -> Tensor:
    if tensor.numel() == 0 or tensor.dim() == 0:
        return tensor
    if tensor.dtype == torch.bool:
        return ~tensor
    if tensor.is_floating_point():
        flat = tensor.detach().float().reshape(-1, tensor.shape[-1]).numpy().copy()
        if random.random() < 0.3:
            flat[:] = random.choice(SPECIAL, flat.shape)
        return torch.from_numpy(sprinkle(random, flat, 0.3)).reshape(tensor.shape).to(tensor.dtype)
    limits = torch.iinfo(tensor.dtype)
    tensor = tensor.clone()
    for _ in range(random.integers(1, 3)):
        value = one_of(random, [limits.min, limits.max, limits.min + 1, limits.max - 1, -1, 0, 1, 2, 3, 7, 100])
        tensor.view(-1)[random.integers(0, tensor.numel())] = value if limits.min <= value <= limits.max else 0
    return tensor


def spoil_tensor(random: Random, tensor: Any) -> Any:
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
        return tensor


def spoil_list(random: Random, tensors: list[Any]) -> Any:
    whole: list[Callable[[], Any]] = [
        *(lambda: anything(random), lambda: tensors[:-1], lambda: tuple(tensors), lambda: collections.deque(tensors)),
        lambda: [*tensors, *(tensors[:1] or [torch.zeros(0, 4)])],
    ]
    if random.random() < 0.6:
        return one_of(random, whole)()

    def element(value: Any) -> Any:
        return spoil_target(random, value) if isinstance(value, dict) else spoil_tensor(random, value)

    return [element(value) if random.random() < 0.5 else value for value in tensors]


def spoil_target(random: Random, target: dict[str, Any]) -> Any:
    """A dictionary of boxes and labels, one of them spoiled, missing, or for another thing."""
    name = str(random.choice(["boxes", "labels", "iscrowd"]))
    kind = random.integers(0, 6)
    if kind == 0:
        return {key: value for key, value in target.items() if key != name}
    if kind == 1:
        return anything(random)
    return target | {name: spoil_tensor(random, target.get(name, torch.zeros(1).bool()))}


def spoil(random: Random, value: Any, choices: list[Any]) -> Any:
    """Something else for one argument. Options of a few values get them, or anything at all."""
    if choices and random.random() < 0.7:
        return one_of(random, choices)
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        return a_number(random)
    if isinstance(value, mg_ops.BoxCoder) and random.random() < 0.8:
        weights = [float(random.choice([10.0, -5.0, 1e-30, 1e30, 1.2e-38])) for _ in range(4)]
        return mg_ops.BoxCoder(tuple(weights), float(random.choice([4.0, 0.0, -1.0, math.inf, -math.inf, 1e300])))
    if isinstance(value, Tensor):
        return spoil_tensor(random, value)
    return spoil_list(random, value) if isinstance(value, list) else anything(random)


def all_to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {name: all_to_meta(element) for name, element in value.items()}
    return [all_to_meta(element) for element in value] if isinstance(value, list) else value


def spoil_some(random: Random, arguments: Arguments, choices: dict[str, list[Any]] | None = None) -> Arguments:
    """Nothing, one or a few arguments made wrong or unusual."""
    arguments = all_to_meta(arguments) if random.random() < 0.03 else dict(arguments)
    for _ in range(random.choice([0, 1, 1, 1, 1, 2, 3])):
        name = one_of(random, list(arguments))
        if arguments[name] is not None or random.random() < 0.3:  # of many arguments few are given
            arguments[name] = spoil(random, arguments[name], (choices or {}).get(name, []))
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# The oracle


def is_right(given: Any, right: Any) -> bool:
    """Whether a spoiled argument is as good as the right one: other floats and another place in memory at most."""
    if isinstance(right, Tensor) and isinstance(given, Tensor):
        plain = not given.is_nested and not given.is_quantized and given.layout == torch.strided and given.is_cpu
        if not plain or given.shape != right.shape or is_huge(given) or not is_readable(given):
            return False
        floating = right.dtype in FLOATING and given.dtype in FLOATING
        return floating or (given.dtype == right.dtype and given.as_subclass(Tensor).equal(right))
    if isinstance(right, (list, tuple)) and isinstance(given, (list, tuple)):
        return len(given) == len(right) and all(map(is_right, given, right))
    if isinstance(right, dict) and isinstance(given, dict):
        return given.keys() == right.keys() and all(is_right(given[name], value) for name, value in right.items())
    return type(given) is type(right) and bool(given == right)


def clean(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A plain contiguous copy; of a huge number of columns, which are all the same, a view."""
    if tensor.dim() > 0 and tensor.shape[-1] > 2**16:
        return clean(tensor[..., :1], dtype).expand(tensor.shape)
    return torch.tensor(tensor.detach().as_subclass(Tensor).to(dtype).tolist(), dtype=dtype).reshape(tensor.shape)


def whole(labels: Tensor) -> Tensor:
    """Labels as integers; -1 for a floating number that is no class."""
    if not labels.is_floating_point():
        return clean(labels, torch.int64)
    numbers = [value if math.isfinite(value) and value == int(value) else -1 for value in labels.flatten().tolist()]
    return torch.tensor([int(value) if abs(value) < 2**31 else -1 for value in numbers]).long().view(labels.shape)


class Objects(NamedTuple):
    """Clean and packed: what the operators take, and which are no padding."""

    boxes: Tensor
    labels: Tensor
    offsets: Tensor
    crowd: Tensor | None
    is_object: Tensor
    shape: tuple[int, ...]
    """Of what is counted for each object."""


def clean_objects(arguments: Arguments) -> Objects:
    """Objects of any form, read one image after the other."""
    boxes, labels, offsets, crowd = (arguments.get(name) for name in OBJECTS[:4])
    if isinstance(boxes, (list, tuple)) and boxes and isinstance(boxes[0], dict):
        flags = [target.get("iscrowd") for target in boxes]
        labels = [target["labels"] for target in boxes] if "labels" in boxes[0] else None
        boxes = [target["boxes"] for target in boxes]
        crowd = [torch.zeros(len(b)) if f is None else f for f, b in zip(flags, boxes, strict=True)]
    if isinstance(boxes, Tensor) and offsets is None:
        shape: tuple[int, ...] = (boxes.shape[0], boxes.shape[1])
        mask = arguments.get("gt_mask")
        is_object = clean(labels >= 0 if mask is None else mask, torch.bool).flatten()
        boxes = torch.where(is_object[:, None], clean(boxes).flatten(0, 1), 0.0)
        labels = torch.zeros(shape) if labels is None else labels
        labels, crowd = whole(labels).flatten(), None if crowd is None else clean(crowd, torch.bool).flatten()
        ends = [image * shape[1] for image in range(shape[0] + 1)]
    else:
        if isinstance(boxes, Tensor):
            ends = clean(offsets, torch.int64).tolist()
            boxes, labels, crowd = [boxes], [labels], None if crowd is None else [crowd]
        else:
            ends = [0, *np.cumsum([len(of_image) for of_image in boxes]).tolist()]
        labels = [torch.zeros(len(b)) for b in boxes] if labels is None or labels == [None] else labels
        boxes = torch.cat([torch.zeros(0, 4), *map(clean, boxes)])
        labels = torch.cat([torch.zeros(0, dtype=torch.int64), *map(whole, labels)])
        crowd = crowd if crowd is None else torch.cat([torch.zeros(0).bool(), *(clean(c, torch.bool) for c in crowd)])
        shape, is_object = (len(boxes),), torch.arange(len(boxes)) < ends[-1]
    if arguments.get("gt_box_format", "xyxy") != "xyxy":
        place, size = boxes[:, :2], boxes[:, 2:]
        start = place if arguments["gt_box_format"] == "xywh" else place - 0.5 * size
        end = place + size if arguments["gt_box_format"] == "xywh" else place + 0.5 * size
        boxes = torch.cat([start, end], dim=1)
    return Objects(boxes, labels, torch.tensor(ends), crowd, is_object, shape)


def one_tensor(levels: Any) -> Tensor:
    return clean(torch.cat(list(levels), -2) if isinstance(levels, (list, tuple)) else levels)


def defined_match(arguments: Arguments, coder: Any, flags: Sequence[bool]) -> tuple[Tensor, ...]:
    """The match by the reference; what is not given is not read."""
    anchors, objects = one_tensor(arguments["anchors"]), clean_objects(arguments)
    boxes, scores = (
        next((one_tensor(arguments[name]) for name in names if arguments.get(name) is not None), None)
        for names in (("pred_boxes", "box_deltas"), ("cls_logits", "cls_probabilities", "cls_scores"))
    )
    shape = (len(objects.offsets) - 1, len(anchors))
    boxes = torch.zeros(*shape, 4) if boxes is None else boxes
    scores = torch.zeros(*shape, 1) if scores is None else scores
    coder = None if coder is None else [float(number) for number in coder]
    numbers = [float(arguments[name]) for name in NUMBERS]
    match = reference.mutual_match(anchors, boxes, scores, *objects[:4], coder, *map(bool, flags), *numbers)
    return (*match[:2], *(counts.view(objects.shape) for counts in match[2:]))


def are_of_these_objects(match: mg_ops.MutualMatch, offsets: Tensor) -> bool:
    """Whether the match could be one for these objects: others' answers mean nothing, but must not crash."""
    counts = offsets.diff().unsqueeze(1)
    return all(bool((value < counts).all() and (value >= -2).all()) for value in match[:2])


def defined_targets(arguments: Arguments) -> tuple[Tensor, ...] | None:
    match, coder, num_classes = (arguments[name] for name in ("match", "box_coder", "num_classes"))
    boxes, labels, offsets = clean_objects(arguments)[:3]
    if not are_of_these_objects(match, offsets):
        return None
    anchors = one_tensor(arguments["anchors"])
    cls_match, loc_match = (clean(value, torch.int64) for value in match[:2])
    class_targets, loc_labels, box_targets = cls_match.clone(), cls_match.new_full(cls_match.shape, -1), []
    for image, anchor in np.ndindex(*cls_match.shape):
        of_cls, of_loc = (int(offsets[image] + value[image, anchor]) for value in (cls_match, loc_match))
        if cls_match[image, anchor] >= 0:
            known = num_classes is None or 0 <= labels[of_cls] < num_classes
            class_targets[image, anchor] = labels[of_cls] if known else mg_ops.IGNORED
        target = torch.zeros(4)
        if loc_match[image, anchor] >= 0:
            loc_labels[image, anchor], target = labels[of_loc], boxes[of_loc]
            target = target if coder is None else coder.encode(anchors=anchors[anchor], boxes=target)
        box_targets.append(target)
    return class_targets, loc_labels, torch.cat([torch.zeros(0), *box_targets]).view(*cls_match.shape, 4)


def defined_summary(arguments: Arguments) -> tuple[Tensor | None, ...] | None:
    match, num_classes, limits = (arguments[name] for name in ("match", "num_classes", "size_limits"))
    boxes, labels, offsets, crowd, is_object, _ = clean_objects(arguments)
    if not are_of_these_objects(match, offsets):
        return None
    counts, classes = np.zeros((6, 4), np.int64), np.zeros((num_classes or 0, 3), np.int64)
    num_pos = clean(match.num_pos, torch.int64).flatten()
    for image in range(len(offsets) - 1):
        for index in range(int(offsets[image]), int(offsets[image + 1])):
            if (crowd is not None and crowd[index]) or not is_object[index]:
                continue
            positives = [int((value[image] == index - offsets[image]).sum()) for value in match[:2]]
            missing = [int(count == 0) for count in positives]
            groups = [0]
            if reference.is_object(boxes[index]):
                area = float(reference.area(boxes[index]))
                groups.append(1 if area < limits[0] * limits[0] else 2 if area < limits[1] * limits[1] else 3)
            for group in groups:
                counts[:, group] += [1, int(num_pos[index] == 0), *missing, *positives]
            if 0 <= int(labels[index]) < len(classes):
                classes[int(labels[index])] += [1, *missing]
    either = (match.cls_match >= 0) | (match.loc_match >= 0)
    differ = int((either & (match.cls_match != match.loc_match)).sum())
    ignored = int((match.cls_match == mg_ops.IGNORED).sum())
    shares = (ignored / max(1, match.cls_match.numel()), differ / max(1, int(either.sum())))
    by_class = None if num_classes is None else torch.from_numpy(classes)
    return (*map(torch.from_numpy, counts), *(torch.tensor(s, dtype=torch.float64).float() for s in shares), by_class)


# ---------------------------------------------------------------------------------------------------------------------
# What is called


class Case(NamedTuple):
    """One call."""

    what: str
    arguments: Arguments
    call: Callable[[], Any]
    definition: Callable[[], Any]
    """What an answer must be; None where any will do."""
    must_answer: bool = False


def mutual_match_case(random: Random, backends: Sequence[str]) -> Case:
    right = {**right_match_call(random), "backend": str(random.choice(backends))}
    labels_tell = isinstance(right["gt_boxes"], Tensor) and right["gt_offsets"] is right["gt_mask"] is None
    if random.random() < 0.2 and not STRATEGIES[right["strategy"]][1] and not labels_tell:  # what is padding
        right |= {"gt_labels": None} | without_labels({"gt_boxes": right["gt_boxes"]})
    choices = {"strategy": [*STRATEGIES, "Mutual"], "check": [True, False], "gt_box_format": [*BOX_FORMATS, "xyxyxy"]}
    choices |= {"backend": [None, "cuda", "tpu", *mg_ops.backends()]}
    arguments = spoil_some(random, right, choices)
    offsets = arguments["gt_offsets"]
    if all(arguments[name] is None for name in PREDICTIONS) and isinstance(offsets, Tensor) and is_huge(offsets):
        arguments["gt_offsets"] = right["gt_offsets"]  # they alone would say how many images there are

    def definition() -> tuple[Tensor, ...]:
        coder = arguments["box_coder"]
        flags = (arguments["cls_probabilities"] is not None, *STRATEGIES[arguments["strategy"]])
        return defined_match(arguments, None if coder is None else [*coder.weights, coder.clip], flags)

    must_answer = arguments["check"] is False and is_right(arguments, right)
    what = f"mutual_match {arguments['backend'] if isinstance(arguments['backend'], str) else 'of any backend'}"
    return Case(what, arguments, lambda: mg_ops.mutual_match(**arguments), definition, must_answer)


def operator_case(random: Random, backends: Sequence[str]) -> Case:
    backend = str(random.choice(backends))
    name = {"eager": "mutual_match_eager", "triton": "mutual_match_triton"}.get(backend, "mutual_match")
    match = right_match_call(random, "packed")
    boxes, deltas, logits, probabilities = (match[prediction] for prediction in PREDICTIONS)
    right = {option: match[option] for option in ("anchors", *OBJECTS[:4], *NUMBERS)}
    right |= {"pred_boxes": boxes if deltas is None else deltas, "gt_labels": right["gt_labels"].long()}
    right |= {"cls_scores": logits if probabilities is None else probabilities}
    right |= {"box_coder": None if deltas is None else [10.0, 9.0, 5.0, 4.0, 4.0]}
    right |= dict(zip(FLAGS, (probabilities is not None, *STRATEGIES[match["strategy"]]), strict=True))
    coders: list[Any] = [None, [1.0] * 4, [1.0] * 6, []]
    coders += [[a_number(random) if random.random() < 0.3 else 5.0 for _ in range(5)] for _ in range(5)]
    choices: dict[str, list[Any]] = {flag: [True, False] for flag in FLAGS} | {"box_coder": coders}
    arguments = spoil_some(random, right, choices)

    def definition() -> tuple[Tensor, ...]:
        return defined_match(arguments, arguments["box_coder"], [arguments[flag] for flag in FLAGS])

    operator = getattr(torch.ops.mg_ops, name)
    call = operator if random.random() < 0.5 else operator.default
    what = f"operator {name}"
    return Case(what, arguments, lambda: call(**arguments), definition, is_right(arguments, right))


def match_and_objects(random: Random) -> tuple[Arguments, Arguments]:
    """A right call and its match by name, as `MutualMatch` takes it."""
    right = right_match_call(random) | {"check": False}
    return right, mg_ops.mutual_match(**right, backend="eager")._asdict()


def case_of_match(random: Random, function: Callable[..., Any], definition: Any, right: Arguments, **more: Any) -> Case:
    """Of a function that takes a match, and objects among its other arguments."""
    choices = {"num_classes": [-1, 0, 3, None, 2.0, True, 2**62, 2**63, 10**30]}
    choices |= {"gt_box_format": [*BOX_FORMATS, "xyxyxy"], **more}
    match = right.pop("match")
    arguments = spoil_some(random, right, choices)
    arguments["match"] = mg_ops.MutualMatch(**(spoil_some(random, match) if random.random() < 0.3 else match))
    must_answer = is_right(arguments, right | {"match": mg_ops.MutualMatch(**match)})
    if random.random() < 0.05:
        arguments["match"], must_answer = anything(random), False
    call = lambda: function(**arguments)  # noqa: E731
    return Case(function.__name__, arguments, call, lambda: definition(arguments), must_answer)


def targets_case(random: Random, backends: Sequence[str]) -> Case:
    right, match = match_and_objects(random)
    names = ("anchors", *OBJECTS, "box_coder")
    arguments = {name: right[name] for name in names if name != "gt_crowd"} | {"match": match}
    arguments["num_classes"] = int(random.choice([0, 1, 2, 5])) if random.random() < 0.5 else None
    return case_of_match(random, mg_ops.encode_targets, defined_targets, arguments)


def summary_case(random: Random, backends: Sequence[str]) -> Case:
    right, match = match_and_objects(random)
    arguments = {name: right[name] for name in OBJECTS} | {"match": match, "size_limits": (0.2, 0.5)}
    arguments["num_classes"] = int(random.choice([0, 1, 2, 5]))
    labels_tell = isinstance(right["gt_boxes"], Tensor) and right["gt_offsets"] is right["gt_mask"] is None
    if random.random() < 0.3 and len(right["gt_boxes"]) > 0 and not labels_tell:  # what is padding
        arguments |= {"num_classes": None, "gt_labels": None}
    limits: list[Any] = [(0.2, 0.5), [0.3, 0.3], (0.5, 0.2), (0.2,), (math.nan, 1.0), (0.0, math.inf), 3, "ab", None]
    limits += [("a", "b"), (1e200, 1e300), (-1.0, 2.0)]
    return case_of_match(random, mg_ops.summarize, defined_summary, arguments, size_limits=limits)


def iou_case(random: Random, backends: Sequence[str]) -> Case:
    right = {f"boxes_{number}": some_boxes(random, int(random.choice([0, 1, 5, 20]))) for number in (1, 2)}
    arguments = spoil_some(random, right)

    def definition() -> tuple[Tensor, ...]:
        return (reference.box_iou(*map(clean, arguments.values())),)

    return Case("box_iou", arguments, lambda: (mg_ops.box_iou(**arguments),), definition, is_right(arguments, right))


def coder_case(random: Random, backends: Sequence[str]) -> Case:
    encode = random.random() < 0.5
    anchors = some_boxes(random, int(random.choice([0, 1, 5, 20])))
    noise = torch.from_numpy(random.standard_normal((int(random.choice([1, 2])), *anchors.shape)).astype(np.float32))
    right = {"anchors": anchors, "boxes" if encode else "deltas": anchors + noise}
    arguments = spoil_some(random, right)
    coder = mg_ops.BoxCoder((10.0, 10.0, 5.0, 5.0))

    def definition() -> tuple[Tensor, ...]:
        cleaned = {name: clean(value) for name, value in arguments.items()}
        decoded = coder.encode(**cleaned) if encode else reference.decode(*cleaned.values(), coder.weights, coder.clip)
        return (decoded,)

    function = coder.encode if encode else coder.decode
    what = f"BoxCoder.{function.__name__}"
    return Case(what, arguments, lambda: (function(**arguments),), definition, is_right(arguments, right))


def new_coder_case(random: Random, backends: Sequence[str]) -> Case:
    arguments: Arguments = {"weights": [a_number(random) if random.random() < 0.3 else 5.0 for _ in range(4)]}
    arguments["clip"] = a_number(random) if random.random() < 0.3 else 4.0
    if random.random() < 0.3:
        arguments["weights"] = anything(random)

    def numbers(weights: Any, clip: Any) -> tuple[Tensor]:
        return (torch.tensor([*map(float, weights), float(clip)], dtype=torch.float64),)

    def call() -> Any:
        coder = mg_ops.BoxCoder(**arguments)
        return numbers(coder.weights, coder.clip)

    return Case("BoxCoder", arguments, call, lambda: numbers(**arguments))


def device_query_case(random: Random, backends: Sequence[str]) -> Case:
    """The operator about CUDA devices, whose answers depend on the build: never a crash."""
    value = one_of(random, [-1, 17, 2**31, 2**32, 2**62, -(2**63), None, "0", 1.5])
    operator = torch.ops.mg_ops.cuda_device_error
    return Case("operator cuda_device_error", {"value": value}, lambda: operator(value), lambda: None)


CASES: list[tuple[Callable[[Random, Sequence[str]], Case], float]] = [
    *((mutual_match_case, 0.44), (operator_case, 0.22), (targets_case, 0.1), (summary_case, 0.1), (iou_case, 0.05)),
    *((coder_case, 0.05), (new_coder_case, 0.03), (device_query_case, 0.01)),
]

FUNCTIONS = (mg_ops.mutual_match, mg_ops.encode_targets, mg_ops.summarize, mg_ops.box_iou, mg_ops.BoxCoder.encode)
NAMES = {name for function in (*FUNCTIONS, mg_ops.BoxCoder.decode) for name in inspect.signature(function).parameters}
DOCUMENTED = re.compile(
    rf"^({'|'.join(sorted(NAMES))}|cls_scores|BoxCoder|mutual_match|backend '\w+' cannot be used)\b"
)
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
        kinds = (RuntimeError, TypeError, ValueError)
        return isinstance(error, kinds) and bool(DOCUMENTED.search(message) or BY_TORCH.search(message))
    of_backend = type(error) is RuntimeError and re.match(r"backend|mutual_match: ", message) is not None
    is_documented = type(error) in (TypeError, ValueError) or of_backend
    return is_documented and bool(DOCUMENTED.search(message)) and not NOISE.search(message)


def equal(value: Any, wanted: Any) -> bool:
    if wanted is None or value is None:
        return value is wanted
    value = value.as_subclass(Tensor)
    return (value.dtype, value.shape) == (wanted.dtype, wanted.shape) and bool(
        ((value == wanted) | ((value != value) & (wanted != wanted))).all()
    )


def run_case(case: Case) -> str:
    """Makes one call and checks its outcome, "answered" or "refused".

    Raises:
        AssertionError: saying what is wrong with it.
    """
    try:
        answer = case.call()
    except Exception as error:
        assert not case.must_answer, f"{case.what}: must not raise {type(error).__name__}: {error}"
        fine = is_fine(error, case.what.startswith("operator"))
        assert fine, f"{case.what}: {type(error).__name__} does not help: {error}"
        return "refused"
    if isinstance(answer, tuple) and any(isinstance(value, Tensor) and value.is_meta for value in answer):
        assert all(value is None or value.is_meta for value in answer), f"{case.what}: expected meta tensors"
        return "answered"
    try:
        wanted = case.definition()
    except Exception as error:
        raise AssertionError(f"{case.what}: answered what the definition cannot read: {error!r}") from error
    if wanted is not None:
        for index, (value, right) in enumerate(zip(answer, wanted, strict=True)):
            assert equal(value, right), f"{case.what}: result {index} is\n{value}\nexpected\n{right}"
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
                given = [f"    {name} = {describe(value)}" for name, value in case.arguments.items()]
                print(f"seed {seed}: {error}", *given, sep="\n")
                if not keep_going:
                    traceback.print_exc()
                    return FAILED
    for name, number in sorted(outcomes.items()):
        print(f"{number:8,} {name}")
    ends = ("answered", "refused")
    numbers = (f"{sum(n for name, n in outcomes.items() if name.endswith(end)):,} {end}" for end in ends)
    print(f"{len(seeds):,} calls of seeds {seeds.start} to {seeds.stop - 1}:", *numbers, f"{failures} failed")
    return FAILED if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (default 0)")
    usable = [name for name, status in mg_ops.backends().items() if status.usable and name != "cuda"]
    text = f"one named twice is taken twice as often; default: {' '.join(usable)}"
    parser.add_argument("--backends", nargs="+", default=usable, help=text)
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
