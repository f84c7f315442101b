"""What is wrong with an argument is said by every entry point alike: which one, what was expected, what came.

One table for each function: a row makes one thing wrong in a right call, and shows how the message begins; "..." in it
stands for anything. The rows of packed objects and the table of numbers are run against every entry point: the
function, the matcher, the operators of the backends, and their fakes. test_wrong_calls.py looks for what is not here.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import math
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import DEVICES
from torch import Tensor, tensor, zeros
from torch._subclasses.fake_tensor import FakeTensorMode

import mg_ops
from mg_ops import library

Arguments = dict[str, Any]
Rows = list[tuple[Arguments, str]]
B, A, C = 2, 3, 4
INF, NAN = math.inf, math.nan
CODER = mg_ops.BoxCoder()
ANCHORS = tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 15.0, 15.0], [20.0, 20.0, 30.0, 30.0]])
MASK = tensor([[True, True], [True, False]])
RIGHT_MATCH = [[0, 1, -1], [-1, -1, 0]]


def listed() -> Arguments:
    """A right call with objects in lists: 2 objects in the first image, 1 in the second."""
    predictions = {"anchors": ANCHORS, "pred_boxes": ANCHORS.repeat(B, 1, 1), "cls_logits": zeros(B, A, C)}
    return predictions | {"gt_boxes": [ANCHORS[:2], ANCHORS[2:]], "gt_labels": [tensor([0, 1]), tensor([3])]}


def packed() -> Arguments:
    objects = {"gt_boxes": ANCHORS, "gt_labels": tensor([0, 1, 3]), "gt_offsets": tensor([0, 2, 3])}
    return listed() | objects


def padded() -> Arguments:
    """The second image has one object, and room for another."""
    pad = torch.nn.utils.rnn.pad_sequence
    boxes, labels = listed()["gt_boxes"], listed()["gt_labels"]
    return listed() | {"gt_boxes": pad(boxes, True), "gt_labels": pad(labels, True, padding_value=-1)}


def dictionaries() -> Arguments:
    boxes, labels = listed()["gt_boxes"], listed()["gt_labels"]
    targets = [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]
    return listed() | {"gt_boxes": targets, "gt_labels": None}


def with_deltas(**changes: Any) -> Arguments:
    """Zero deltas in place of the boxes they decode to."""
    return listed() | {"pred_boxes": None, "box_deltas": zeros(B, A, 4), "box_coder": CODER} | changes


def with_match(*names: str) -> Arguments:
    return {"match": mg_ops.mutual_match(**listed())} | {name: listed()[name] for name in names}


def freed(value: Tensor, num_bytes: int = 0) -> Tensor:
    """A tensor that keeps its shape while its memory is taken away."""
    value.untyped_storage().resize_(num_bytes)
    return value


def assert_raises(error: type[Exception], message: str, call: Callable[..., Any], arguments: Arguments) -> None:
    """The message begins like this, where "..." stands for anything."""
    with pytest.raises(error) as caught:
        call(**arguments)
    assert type(caught.value) is error
    assert re.match(re.escape(message).replace(r"\.\.\.", ".*"), str(caught.value)), str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The table


FP = "floating point"
KINDS: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "floating point": ("float16, bfloat16, float32 or float64", (torch.int64, torch.complex64, torch.float8_e5m2)),
    "label": ("int64, int32 or floating point", (torch.bool, torch.uint8)),
    "integer": ("int64 or int32", (torch.float32, torch.int16)),
    "bool": ("bool", (torch.float32, torch.int64)),
}
"""What a tensor may hold, and what is something else."""


class Given(NamedTuple):
    """A tensor that a function takes."""

    name: str
    """As messages have it; of a list the tensor of the first image."""
    value: Tensor
    kind: str
    shape: str
    """As messages have it; nothing where any will do."""
    like: str = ""
    """What has the device it must be on."""
    rest: tuple[Tensor, ...] = ()
    """The list goes on with these."""

    def rows(self) -> tuple[Rows, Rows]:
        """All that can be wrong with it by itself: no tensor, its dtype, layout, memory, shape, device."""
        name, value, kind, shape, like, rest = self
        article = "an" if kind == "integer" else "a"
        types = [] if name == "gt_boxes" else [(3.0, f"expected {article} {kind} tensor, got float")]
        types += [(value.to(dtype), f"expected dtype {KINDS[kind][0]}, got a {dtype}") for dtype in KINDS[kind][1]]
        types += [(value.to_sparse(), "expected a dense tensor, got layout torch.sparse")]
        if shape != "(2, M, 4)":  # by their dimensions padded boxes are told from packed ones
            nested = torch.nested.nested_tensor([value], layout=torch.jagged)
            types += [(nested, f"expected a dense tensor, got a nested {value.dtype}")]
        num_bytes = value.numel() * value.element_size()
        values = [
            (freed(value.clone(), left), f"its memory of {left} bytes does not hold") for left in (0, num_bytes - 1)
        ]
        values += [(value.to("meta"), f"expected device cpu, like {like}, got ...meta")] if like else []
        sizes = shape.strip("(,)").split(", ") if shape else []
        others = [value.narrow(d, 0, value.shape[d] - 1) for d in range(-len(sizes), 0) if sizes[d].isdigit()]
        if shape and shape != "(2, M, 4)":
            others += [value.unsqueeze(-1), value.new_zeros(())] + ([value.flatten()] if value.dim() > 1 else [])
        values += [(other, f"expected shape {shape}, got ...{tuple(other.shape)}") for other in others]
        argument = name.removeprefix("match.").removesuffix("[0]")
        wrapped = lambda wrong: [wrong, *rest] if rest else wrong  # noqa: E731
        by_type, by_value = ([({argument: wrapped(w)}, f"{name}: {text}") for w, text in r] for r in (types, values))
        return by_type, by_value


def given(*tensors: Given) -> tuple[Rows, Rows]:
    types, values = zip(*(of_tensor.rows() for of_tensor in tensors), strict=True)
    return list(itertools.chain(*types)), list(itertools.chain(*values))


OPTION_TYPES: Rows = [
    ({"box_coder": (10.0, 10.0, 5.0, 5.0)}, "box_coder: expected mg_ops.BoxCoder or None, got tuple"),
    ({"check": "yes"}, "check: expected True or False, got str"),
    ({"check": 1}, "check: expected True or False, got int"),
    ({"check": zeros(2).bool()}, "check: expected True or False, got a torch.bool tensor"),
    *(
        ({name: value}, f"{name}: expected a number, got {shown}")
        for name in ("sigma", "iou_positive", "iou_ignored", "crowd_overlap")
        for value, shown in (("2", "str"), (True, "bool"), (None, "NoneType"), (tensor(2.0), "a torch.float32 tensor"))
    ),
]
FORMATS = "gt_box_format: expected one of 'xyxy', 'xywh', 'cxcywh', got "
STRATEGIES = "strategy: expected one of 'iou', 'localize_to_classify', 'classify_to_localize', 'mutual', got "
OPTION_VALUES: Rows = [
    ({"sigma": 1}, "sigma: expected a finite number above 1, got 1"),
    ({"sigma": 10**400}, "sigma: expected a finite number above 1, got an integer that no float holds"),
    *(
        ({name: 50}, f"{name}: expected a threshold in (0, 1], got 50")
        for name in ("iou_positive", "iou_ignored", "crowd_overlap")
    ),
    ({"iou_ignored": 0.6}, "iou_ignored: must not exceed iou_positive (0.5), got 0.6"),
    ({"iou_positive": 0.3}, "iou_ignored: must not exceed iou_positive (0.3), got 0.4"),
    *(({"strategy": value}, f"{STRATEGIES}{value!r}") for value in ("atss", None, ["mutual"])),
    *(({"backend": value}, f"backend: expected None or one of ...'eager'..., got {value!r}") for value in ("tpu", [1])),
    *(({"gt_box_format": value}, f"{FORMATS}{value!r}") for value in ("yxyx", None, ["xyxy"])),
]
# Boxes and deltas, logits and probabilities cannot be confused, whatever the other arguments are: what is missing and
# what is given twice are errors.
CONFUSIONS: Rows = [
    ({"box_deltas": zeros(B, A, 4)}, "box_deltas: expected pred_boxes or box_deltas, got both"),
    ({"box_deltas": zeros(B, A, 4), "box_coder": CODER}, "box_deltas: ...got both"),
    ({"cls_probabilities": zeros(B, A, C)}, "cls_probabilities: expected cls_logits or ...got both"),
    ({"box_coder": CODER}, "box_coder: expected none without box_deltas; boxes ... decoded are pred_boxes"),
    ({"pred_boxes": None, "box_coder": CODER}, "box_coder: expected none without box_deltas"),
    ({"pred_boxes": None, "box_deltas": zeros(B, A, 4)}, "box_coder: expected one with box_deltas"),
    ({"pred_boxes": None}, "pred_boxes: strategy 'mutual' reads the predicted boxes; pass pred_boxes or box_deltas"),
    ({"pred_boxes": None, "strategy": "localize_to_classify"}, "pred_boxes: strategy 'localize_to_classify'"),
    ({"cls_logits": None}, "cls_logits: strategy 'mutual' reads the scores; pass cls_logits or cls_probabilities"),
    ({"cls_logits": None, "strategy": "classify_to_localize"}, "cls_logits: strategy 'classify_to_localize'"),
]
NO_LABELS: Rows = [
    ({"gt_labels": None}, "gt_labels: strategy 'mutual' reads the labels; pass them in the form of gt_boxes"),
    ({"gt_labels": None, "strategy": "classify_to_localize"}, "gt_labels: strategy 'classify_to_localize' reads"),
]
LEVELS = {name: listed()[name].split(1, dim=-2) for name in ("pred_boxes", "anchors", "cls_logits")}
LIST = "expected a list of 2 tensors"
LISTED_TENSORS = given(
    Given("gt_boxes[0]", ANCHORS[:2], FP, "(G, 4)", "anchors", (ANCHORS[2:],)),
    Given("gt_labels[0]", tensor([0, 1]), "label", "(2,)", "anchors", (tensor([3]),)),
    Given("gt_crowd[0]", zeros(2).bool(), "bool", "(2,)", "anchors", (zeros(1).bool(),)),
)
LISTED_TYPES: Rows = [
    ({"anchors": [[0, 0, 1, 1]]}, "anchors[0]: expected a floating point tensor, got list"),
    *(
        ({name: value}, f"{name}: {LIST}...got ")
        for name, value in (("gt_boxes", None), ("gt_boxes", 5), ("gt_labels", 5))
    ),
    ({"gt_labels": tensor([0, 1, 3])}, f"gt_labels: {LIST}...got a torch.int64"),
    ({"gt_crowd": zeros(3).bool()}, f"gt_crowd: {LIST}"),
]
LISTED_VALUES: Rows = [
    (LEVELS | {"gt_labels": None}, NO_LABELS[0][1]),  # levels that are right are not blamed for it
    ({"gt_boxes": [zeros(2, 4), zeros(0)]}, "gt_boxes[1]: expected shape (G, 4), got ...(0,)...; ....reshape(-1, 4)"),
    ({"gt_labels": [tensor([0]), tensor([1, 3])]}, "gt_labels[0]: expected shape (2,), got ...(1,)"),  # as many in all
    ({"anchors": [zeros(A, 4)] * 2}, "anchors: expected one tensor per feature level, ... pass those of one"),
    *(
        ({name: [zeros(1)] * count}, f"{name}: {LIST}, one per image, got {count}")
        for name in ("gt_boxes", "gt_labels", "gt_crowd")
        for count in (0, 1, 3)
    ),
    ({"gt_offsets": tensor([0, 2, 3])}, "gt_offsets: only packed gt_boxes ... take offsets"),
    ({"gt_mask": MASK}, "gt_mask: only padded gt_boxes ... take a mask"),
]
PACKED_TENSORS = given(
    Given("anchors", ANCHORS, FP, "(A, 4)"),
    Given("pred_boxes", zeros(B, A, 4), FP, "(2, 3, 4)", "anchors"),
    Given("cls_logits", zeros(B, A, C), FP, "(B, 3, C)", "anchors"),
    Given("gt_boxes", ANCHORS, FP, "(N, 4)", "anchors"),
    Given("gt_labels", tensor([0, 1, 3]), "label", "(3,)", "anchors"),
    Given("gt_offsets", tensor([0, 2, 3]), "integer", "(3,)", "anchors"),
    Given("gt_crowd", zeros(3).bool(), "bool", "(3,)", "anchors"),
)
PACKED_VALUES: Rows = [
    ({"anchors": ANCHORS.to("meta")}, "cls_logits: expected device meta, like anchors, got ...cpu"),
    ({"anchors": zeros(A + 1, 4)}, "cls_logits: expected shape (B, 4, C), got ...(2, 3, 4)"),
    ({"pred_boxes": zeros(B + 1, A, 4)}, "pred_boxes: expected shape (2, 3, 4), got ...(3, 3, 4)"),
    (
        {"cls_logits": zeros(B, A, C)[:, :, :0].expand(2, 3, 0)[:1]},
        "pred_boxes: expected shape (1, 3, 4), got ...(2, 3",
    ),
    ({"pred_boxes": freed(zeros(B, A, 4)[:, :, ::2].repeat(1, 1, 2))}, "pred_boxes: its memory of 0"),
    ({"gt_boxes": zeros(2, 4)}, "gt_labels: expected shape (2,), got ...(3,)"),
    ({"gt_offsets": zeros(0).long()}, "gt_offsets: expected shape (3,), got ...(0,)"),
    ({"gt_offsets": tensor([1, 2, 3])}, "gt_offsets: must start at 0, got 1"),
    ({"gt_offsets": tensor([-1, 2, 3])}, "gt_offsets: must start at 0, got -1"),
    ({"gt_offsets": tensor([-(2**62), 2**62, 2**63 - 1])}, "gt_offsets: must start at 0, got -"),
    ({"gt_offsets": tensor([0, 2, 1])}, "gt_offsets: must not decrease, got 2 then 1 for image 1"),
    ({"gt_offsets": tensor([0, -1, 3])}, "gt_offsets: must not decrease, got 0 then -1 for image 0"),
    ({"gt_offsets": tensor([0, 2, 4])}, "gt_offsets: must not exceed the 3 packed objects, got 4"),
    ({"gt_offsets": tensor([0, 2, 2**62])}, "gt_offsets: must not exceed the 3 packed objects"),
]
FUNCTION_OF_PACKED: Rows = [  # the operators have no mask, and their offsets no default
    ({"gt_offsets": None}, "gt_offsets: packed gt_boxes (N, 4) need gt_offsets (B + 1,); ...list"),
    ({"gt_mask": MASK}, "gt_mask: only padded gt_boxes ... take a mask"),
]
PADDED_TENSORS = given(
    Given("gt_boxes", zeros(B, 2, 4), FP, "(2, M, 4)", "anchors"),
    Given("gt_labels", zeros(B, 2), "label", "(2, 2)", "anchors"),
    Given("gt_crowd", MASK, "bool", "(2, 2)", "anchors"),
    Given("gt_mask", MASK, "bool", "(2, 2)", "anchors"),
)
PADDED_TYPES: Rows = [
    ({"gt_boxes": listed()["gt_boxes"]}, f"gt_labels: {LIST}, ...got a torch.int64"),
    ({"gt_labels": [tensor([0])] * 2}, "gt_labels: expected a label tensor, got list"),
]
PADDED_VALUES: Rows = [
    ({"gt_boxes": zeros(1, B, 2, 4)}, "gt_offsets: packed gt_boxes"),
    ({"gt_offsets": tensor([0, 2, 3])}, "gt_boxes: expected shape (N, 4), got ...(2, 2, 4)"),
]
TARGET = {"boxes": zeros(1, 4), "labels": tensor([0])}
DICTIONARY_TYPES: Rows = [
    ({"gt_boxes": [TARGET, TARGET["boxes"]]}, 'gt_boxes[1]: expected a dictionary with "boxes" and "labels"'),
    ({"gt_boxes": [TARGET["boxes"], TARGET], "gt_labels": [tensor([0])] * 2}, "gt_boxes[1]: expected a floating point"),
    ({"gt_boxes": [TARGET, {"boxes": 1, "class": 1}]}, "gt_boxes[1]: expected a ..., got one with ['boxes', 'class']"),
    (
        {"gt_boxes": [TARGET, TARGET | {"iscrowd": zeros(1)}]},
        'gt_boxes[1]["iscrowd"]: expected dtype bool, uint8, int32 or int64, got a torch.float32',
    ),
    ({"gt_boxes": [TARGET, TARGET | {"labels": 3}]}, "gt_labels[1]: expected a label tensor, got int"),
]
DICTIONARY_VALUES: Rows = [
    ({"gt_boxes": [TARGET]}, f"gt_boxes: {LIST}, one per image, got 1"),
    ({"gt_boxes": [TARGET, TARGET | {"iscrowd": zeros(2).bool()}]}, "gt_crowd[1]: expected shape (1,)"),
    ({"gt_labels": [TARGET["labels"]] * 2}, "gt_labels: ... dictionaries"),
    ({"gt_offsets": torch.arange(3)}, "gt_offsets: ... dictionaries"),
    ({"gt_crowd": [MASK[0, :1]] * 2}, "gt_crowd: ... dictionaries"),
]
FOUR = "BoxCoder: weights must be four finite non-zero numbers (in float32), got "
CODER_TYPES: Rows = [
    *(({"weights": value}, f"{FOUR}{value!r}"[:90]) for value in (10.0, "abcd", (10**400, 10.0, 5.0, 5.0))),
    *(({"clip": clip}, "BoxCoder: clip must be a number, got ") for clip in (10**400, zeros(2), None)),
]
CODER_VALUES: Rows = [
    ({"weights": (10.0, 10.0, 5.0)}, FOUR + "(10.0, 10.0, 5.0)"),
    ({"weights": (0.1, 0.2)}, FOUR + "(0.1, 0.2); weights are 1 / variances"),
    ({"clip": NAN}, "BoxCoder: clip must be a number, got NaN"),
]
MATCH_TENSORS = (
    Given("match.loc_match", zeros(B, A).long(), "integer", "(2, 3)", "anchors"),
    Given("match.num_pos", zeros(3).int(), "integer", ""),
)
MATCH_AND_CLASS_TYPES: Rows = [
    ({"match": (1, 2)}, "match: expected what mg_ops.mutual_match or another rule returned, got tuple"),
    ({"num_classes": 2.5}, "num_classes: expected an integer or None, got float"),
]
CLASS_VALUES: Rows = [
    ({"num_classes": -1}, "num_classes: expected at least 0, got -1"),
    ({"num_classes": 10**30}, "num_classes: expected at most 2147483647"),
]
TARGET_TYPES = [({"box_coder": "ssd"}, "box_coder: expected mg_ops.BoxCoder or None, got str"), *MATCH_AND_CLASS_TYPES]
TARGET_VALUES: Rows = [
    ({"anchors": zeros(A + 1, 4)}, "match.cls_match: expected shape (B, 4), got ...(2, 3)"),
    ({"gt_boxes": [zeros(1, 4)] * 2, "gt_labels": [zeros(1).long()] * 2}, "match: made for 3 objects"),
    ({"gt_boxes": [zeros(3, 4)]}, f"gt_boxes: {LIST}"),
    ({"gt_labels": None}, "gt_labels: encode_targets reads the labels"),
]
LIMITS = "size_limits: expected two numbers, 0 <= small <= large, got "
SUMMARY_TYPES: Rows = [
    ({"gt_boxes": None}, f"gt_boxes: {LIST}"),
    *(({"size_limits": value}, LIMITS) for value in (32, (1, "2"), (1,))),
]
SUMMARY_VALUES: Rows = [
    *(({name: None}, "gt_labels, num_classes: ... both") for name in ("gt_labels", "num_classes")),
    ({"gt_boxes": zeros(B, 2, 4), "gt_labels": None, "num_classes": None}, "gt_mask: of padded gt_boxes (B, M, 4)"),
    ({"num_pos": zeros(2).int()}, "match: made for 2 objects, but gt_boxes has 3"),
    *(({"size_limits": value}, LIMITS) for value in ((96.0, 32.0), (0.0, NAN))),
]
NUMBER_OF_STRIDES = "size: expected a finite number of strides above 0, got 0"
BROADCASTS = "boxes: expected a shape that broadcasts with anchors (3, 4), got ...(2, 4)"
Entry = tuple[Callable[..., Any], Callable[[], Arguments], tuple[Rows, Rows], Rows, Rows]
TABLE: dict[str, Entry] = {
    "lists": (
        mg_ops.mutual_match,
        listed,
        LISTED_TENSORS,
        LISTED_TYPES + OPTION_TYPES,
        LISTED_VALUES + OPTION_VALUES + CONFUSIONS + NO_LABELS,
    ),
    "packed": (
        mg_ops.mutual_match,
        packed,
        PACKED_TENSORS,
        [],
        PACKED_VALUES + FUNCTION_OF_PACKED + CONFUSIONS + NO_LABELS,
    ),
    "padded": (mg_ops.mutual_match, padded, PADDED_TENSORS, PADDED_TYPES, PADDED_VALUES + CONFUSIONS + NO_LABELS),
    "dictionaries": (mg_ops.mutual_match, dictionaries, ([], []), DICTIONARY_TYPES, DICTIONARY_VALUES + CONFUSIONS),
    "BoxCoder": (mg_ops.BoxCoder, dict, ([], []), CODER_TYPES, CODER_VALUES),
    "box_iou": (
        mg_ops.box_iou,
        lambda: {"boxes_1": ANCHORS, "boxes_2": ANCHORS},
        given(Given("boxes_1", ANCHORS, FP, "(M, 4)"), Given("boxes_2", ANCHORS, FP, "(G, 4)", "boxes_1")),
        [],
        [],
    ),
    "decode": (
        CODER.decode,
        lambda: {"anchors": ANCHORS, "deltas": ANCHORS},
        given(Given("anchors", ANCHORS, FP, "(A, 4)"), Given("deltas", ANCHORS, FP, "(..., 3, 4)", "anchors")),
        [],
        [],
    ),
    "encode": (
        CODER.encode,
        lambda: {"anchors": ANCHORS, "boxes": ANCHORS},
        given(Given("anchors", ANCHORS, FP, ""), Given("boxes", ANCHORS, FP, "", "anchors")),
        [],
        [
            ({"boxes": ANCHORS[:, :2]}, "boxes: expected shape (..., 4), got ...(3, 2)"),
            ({"boxes": ANCHORS[:2]}, BROADCASTS),
        ],
    ),
    "anchors_from_points": (
        mg_ops.anchors_from_points,
        lambda: {"points": ANCHORS[:, :2], "strides": torch.ones(3), "size": 4.0},
        given(
            Given("points", ANCHORS[:, :2].clone(), FP, "(A, 2)"), Given("strides", torch.ones(3), FP, "(3,)", "points")
        ),
        [({"size": "4"}, "size: expected a number")],
        [({"size": 0}, NUMBER_OF_STRIDES)],
    ),
    "encode_targets": (
        mg_ops.encode_targets,
        lambda: with_match("anchors", "gt_boxes", "gt_labels"),
        given(
            Given("anchors", ANCHORS, FP, "(A, 4)"),
            Given("match.cls_match", zeros(B, A).long(), "integer", "(B, 3)", "anchors"),
            *MATCH_TENSORS,
        ),
        TARGET_TYPES,
        TARGET_VALUES + CLASS_VALUES,
    ),
    "summarize": (
        mg_ops.summarize,
        lambda: with_match("gt_boxes", "gt_labels") | {"num_classes": C},
        given(Given("match.cls_match", zeros(B, A).long(), "integer", ""), *MATCH_TENSORS),
        SUMMARY_TYPES + MATCH_AND_CLASS_TYPES,
        SUMMARY_VALUES + CLASS_VALUES,
    ),
}


def rows_of_the_table() -> list[Any]:
    return [
        pytest.param(function, right, error, *row, id=f"{name}-{row[1]}")
        for name, (function, right, tensors, types, values) in TABLE.items()
        for error, rows in ((TypeError, tensors[0] + types), (ValueError, tensors[1] + values))
        for row in rows
    ]


@pytest.mark.parametrize(("function", "right", "error", "changes", "message"), rows_of_the_table())
def test_what_is_wrong_is_named(function: Any, right: Any, error: Any, changes: Arguments, message: str) -> None:
    arguments = right()
    if "match" in arguments and changes.keys() <= set(mg_ops.MutualMatch._fields):
        changes = {"match": arguments["match"]._replace(**changes)}
    assert_raises(error, message, function, arguments | changes)


def test_a_matcher_refuses_a_wrong_option_where_it_is_set() -> None:
    for error, rows in ((TypeError, OPTION_TYPES), (ValueError, OPTION_VALUES)):
        for changes, message in rows:
            assert_raises(error, message, mg_ops.MutualMatcher, changes)
            replaced = functools.partial(dataclasses.replace, mg_ops.MutualMatcher())
            assert_raises(error, message, replaced, changes)


def test_the_right_calls_pass() -> None:
    for function, right, *_ in TABLE.values():
        function(**right())
    for objects in (listed(), packed(), padded(), dictionaries(), with_deltas()):
        assert mg_ops.mutual_match(**objects, check=True).cls_match.tolist() == RIGHT_MATCH


@pytest.mark.parametrize("name", ["anchors", "pred_boxes", "box_deltas", "cls_logits", "cls_probabilities"])
def test_a_wrong_level_is_named(name: str) -> None:
    arguments = with_deltas() if name == "box_deltas" else listed()
    if name == "cls_probabilities":
        arguments[name] = arguments.pop("cls_logits")
    first, *rest = arguments[name].split(1, dim=-2)
    of_all = "cls_logits" if name == "anchors" else name  # the others no longer fit the anchors
    for levels, error, message in (
        ([first, 3], TypeError, f"{name}[1]: expected a floating point tensor, got int"),
        ([first.int(), *rest], TypeError, f"{name}[0]: expected dtype float16"),
        ([first, *rest, first[..., :3]], ValueError, f"{name}[3]: expected the shape and device of {name}[0]"),
        ([first, first[0]], ValueError, f"{name}[1]: expected "),
        ([first, rest[0].to("meta")], ValueError, f"{name}[1]: expected the shape and device of"),
        ([first, freed(zeros(rest[0].shape))], ValueError, f"{name}[1]: its memory of 0 bytes"),
        ([first], ValueError, f"{of_all}: expected shape"),
        ([], ValueError, f"{name}: expected one tensor, or one tensor per feature level, got none"),
    ):
        assert_raises(error, message, mg_ops.mutual_match, arguments | {name: levels})


def test_predictions_and_options_go_by_name_alone() -> None:
    """A positional sigma would be taken for something else one day."""
    arguments = listed()
    for positional, named in ((list(arguments.values()), {}), ([ANCHORS], {}), ([], arguments | {"sigmas": 2.0})):
        with pytest.raises(TypeError, match=r"positional|required|unexpected"):
            mg_ops.mutual_match(*positional, **named)


# ---------------------------------------------------------------------------------------------------------------------
# Every entry point: the function, the matcher, the operators as an exported program calls them, and their fakes


def of_operator(arguments: Arguments) -> Arguments:
    """What the operators take, by their names."""
    options = {"gt_crowd": None, "box_coder": None, "sigma": 2.0, "crowd_overlap": 0.5}
    options |= {"iou_positive": 0.5, "iou_ignored": 0.4, "scores_are_probabilities": False}
    options |= {"classification_by_regressed": True, "localization_by_amplified": True} | arguments
    return {"cls_scores" if name == "cls_logits" else name: value for name, value in options.items()}


def call_function(function: Callable[..., Any], backend: str) -> Callable[[Arguments], Any]:
    def call(arguments: Arguments) -> Any:
        options = dict(arguments)
        tensors = {name: options.pop(name) for name in arguments if isinstance(arguments[name], Tensor)}
        if options.get("box_coder") is not None:
            *weights, clip = options["box_coder"]
            options["box_coder"] = mg_ops.BoxCoder(weights, clip)
            tensors["box_deltas"] = tensors.pop("pred_boxes")
        if function is mg_ops.MutualMatcher:
            return mg_ops.MutualMatcher(**options, backend=backend)(**tensors)
        return function(**tensors, **options, backend=backend)

    return call


def call_operator(name: str, is_fake: bool) -> Callable[[Arguments], Any]:
    def call(arguments: Arguments) -> Any:
        arguments = of_operator(arguments)
        if is_fake:
            with FakeTensorMode() as mode:
                arguments = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
                return getattr(torch.ops.mg_ops, name).default(**arguments)
        return getattr(torch.ops.mg_ops, name).default(**arguments)

    return call


def entry_points() -> dict[str, tuple[Callable[[Arguments], Any], str]]:
    """Everything here that takes packed objects and the numbers of a match, and the device of its tensors."""
    calls: dict[str, tuple[Callable[[Arguments], Any], str]] = {}
    operator_of = {"cpp": "mutual_match", "cuda": "mutual_match", "eager": "mutual_match_eager"}
    operator_of["triton"] = "mutual_match_triton"
    device_types = {"cpp": ("cpu",), "cuda": ("cuda",), "eager": ("cpu", "cuda"), "triton": library.TRITON_DEVICES}
    for backend, status in mg_ops.backends().items():
        for device in DEVICES:
            if status.usable and device in device_types[backend]:
                calls[f"function, {backend} on {device}"] = call_function(mg_ops.mutual_match, backend), device
                calls[f"operator, {backend} on {device}"] = call_operator(operator_of[backend], False), device
    for name in sorted(set(operator_of.values())):
        if hasattr(torch.ops.mg_ops, name):
            calls[f"fake of {name}"] = call_operator(name, True), "cpu"
            calls[f"meta of {name}"] = call_operator(name, False), "meta"
    calls["matcher"] = call_function(mg_ops.MutualMatcher, "eager"), "cpu"
    calls["function on meta"] = call_function(mg_ops.mutual_match, "eager"), "meta"
    return calls


ENTRIES = entry_points()
NAMES = r"anchors|pred_boxes|cls_scores|cls_logits|gt_\w+|box_coder|BoxCoder"
FOR_OPERATORS: Rows = [  # what the function makes right, or does not take
    ({"gt_labels": zeros(3)}, "gt_labels"),
    *(({name: None}, name) for name in ("anchors", "pred_boxes", "cls_logits", "gt_boxes", "gt_labels", "gt_offsets")),
    *(({"box_coder": [1.0] * count}, "box_coder") for count in (0, 4, 6)),
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point_refuses_the_same_tensors(entry: str) -> None:
    """With a message that names an argument, but for offsets on a GPU, which are clamped."""
    call, device = ENTRIES[entry]
    is_real = device != "meta" and not entry.startswith("fake")
    rows = sum(PACKED_TENSORS, start=PACKED_VALUES) + (
        FOR_OPERATORS if entry.startswith(("operator", "meta", "fake")) else []
    )
    for changes, message in rows:
        ((name, value),) = changes.items()
        of_memory = re.search("memory|must| device |nested", message)
        if isinstance(value, float) or (of_memory and not is_real):  # fakes have no memory, and are not nested
            continue
        if isinstance(value, Tensor) and value.device.type == "cpu" and "memory" not in message:
            value = value.to(device)
        arguments = {n: v.to(device) for n, v in packed().items()} | {name: value}
        if device == "cuda" and "must" in message:
            call(arguments)
            torch.cuda.synchronize()
            continue
        with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)) as caught:
            call(arguments)
            pytest.fail(f"{entry} took {changes}")
        if not (
            isinstance(value, Tensor) and (value.is_sparse or value.is_nested)
        ):  # no kernel is for them, says torch
            assert re.match(rf"[^:]*\b({NAMES})\b", str(caught.value)), str(caught.value)


def test_every_operator_has_the_one_signature() -> None:
    names = [name for name in ("mutual_match", "mutual_match_eager") if hasattr(torch.ops.mg_ops, name)]
    operators = [getattr(torch.ops.mg_ops, name).default for name in names]
    assert len({str(operator._schema).partition("(")[2] for operator in operators}) == 1
    for operator in operators:
        assert operator(**of_operator(packed()))[0].tolist() == RIGHT_MATCH


MAX = float(torch.finfo(torch.float32).max)
TINY = 2.0**-126  # the smallest normal float32
# A number is low < number <= high, as given and as the normal float32 it is rounded to: the first above 2^-126 - 2^-150
# is rounded to 2^-126.
LEAST = ([TINY, TINY - 2.0**-150], [TINY - 1.01 * 2.0**-150])
THRESHOLDS = (
    [1, 1.0, 1 - 2.0**-30, 0.5, *LEAST[0]],
    [0.0, -0.0, -0.1, 1.1, 1 + 2.0**-40, 1e-50, 2.0**-127, NAN, INF, *LEAST[1]],
)
NUMBERS: dict[str, tuple[list[float], list[float]]] = {
    "sigma": (
        [2, 2.0, 1.01, MAX, 1 + 2.0**-23, 1 + 1.5 * 2.0**-24, 1 + 1.001 * 2.0**-24],
        [1.0, 1 + 2.0**-24, 1 + 1e-9, 0.5, 0.0, -2.0, NAN, INF, -INF, 1e39, MAX * 1.00001],
    ),
    "iou_positive": THRESHOLDS,
    "iou_ignored": THRESHOLDS,
    "crowd_overlap": THRESHOLDS,
    "weight": (
        [10.0, -5.0, MAX, -MAX, *LEAST[0]],
        [0.0, -0.0, 1e-60, 2.0**-127, 1e39, -1e39, MAX * (1 + 2.0**-26), NAN, INF, -INF, *LEAST[1]],
    ),
    "clip": ([4.0, -1e300, 1e300, INF, -INF], [NAN]),
}
"""What each number may be, and what it may not."""


def call_with(name: str, number: float, device: str) -> Arguments:
    """A call with this number; the others are right whatever it is."""
    arguments: Arguments = {n: value.to(device) for n, value in packed().items()}
    arguments |= {"sigma": 2.0, "iou_positive": 1.0, "iou_ignored": 1e-37, "crowd_overlap": 0.5}
    arguments["box_coder"] = [10.0, 10.0, 5.0, 5.0, 4.0]
    if name == "iou_positive" and 0 < number < 1e-37:
        arguments["iou_ignored"] = number
    if name in ("weight", "clip"):
        arguments["box_coder"][2 if name == "weight" else 4] = number
        return arguments
    return arguments | {name: number}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point_takes_and_refuses_the_same_numbers(entry: str) -> None:
    call, device = ENTRIES[entry]
    for name, (right, wrong) in NUMBERS.items():
        for number in right:
            call(call_with(name, number, device))
        for number in wrong:
            argument = "(box_coder|BoxCoder)" if name in ("weight", "clip") else name
            with pytest.raises((ValueError, RuntimeError), match=rf"^{argument}: .*(expected|must)"):
                call(call_with(name, number, device))
                pytest.fail(f"{entry} took {name} {number!r}")
    for positive, ignored in ((0.3, 0.4), (0.5, math.nextafter(0.5, 1.0))):
        with pytest.raises((ValueError, RuntimeError), match=r"^iou_ignored: must not exceed iou_positive"):
            call(call_with("iou_positive", positive, device) | {"iou_ignored": ignored})


def test_a_box_coder_takes_any_numbers() -> None:
    for clip in (1e300, -1e300):  # beyond float32: as good as infinite
        finite = mg_ops.BoxCoder(clip=math.copysign(INF, clip))
        tensors = {"anchors": ANCHORS, "deltas": ANCHORS}
        assert mg_ops.BoxCoder(clip=clip).decode(**tensors).equal(finite.decode(**tensors))
    coder = mg_ops.BoxCoder(weights=[1, 2, 3, 4], clip=1e300)
    assert coder.weights == (1.0, 2.0, 3.0, 4.0)
    assert mg_ops.mutual_match(**with_deltas(box_coder=coder)).cls_match.tolist() == RIGHT_MATCH


def test_every_backend_takes_only_its_devices_and_one_that_cannot_be_used_says_why() -> None:
    for device in DEVICES:
        arguments = {name: value.to(device) for name, value in packed().items()}
        for backend, status in mg_ops.backends().items():
            try:
                match = mg_ops.mutual_match(**arguments, backend=backend)
            except RuntimeError as error:
                why = (
                    f"it takes .* tensors, the arguments are on {device}" if status.usable else re.escape(status.detail)
                )
                assert re.match(f"backend '{backend}' cannot be used: {why}", str(error)), error
            else:
                assert status.usable and match.cls_match.device.type == device


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and places in memory


@pytest.fixture(params=["cpp", "eager"])
def backend(request: pytest.FixtureRequest) -> str:
    status = mg_ops.backends()[request.param]
    if not status.usable:
        pytest.skip(status.detail)
    return str(request.param)


def test_more_than_32_bits_number_is_refused() -> None:
    """Sizes as huge as this come from a stray expand: every tensor here is a few bytes."""
    count = 2**31 + 5
    many = zeros(1, 4).expand(count, 4)
    predictions = {"pred_boxes": many.expand(B, count, 4), "cls_logits": zeros(1, 1, 1).expand(B, count, C)}
    objects = {"gt_boxes": many, "gt_labels": zeros(1).long().expand(count)}
    for name, changes in (("anchors", {"anchors": many, **predictions}), ("gt_boxes", objects)):
        message = f"{name}: expected at most 2147483647, got {count}"
        assert_raises(ValueError, message, mg_ops.mutual_match, packed() | changes)


def test_any_number_of_classes_is_read_where_it_is(backend: str) -> None:
    scores = {"cls_logits": zeros(1, 1, 1).expand(B, A, 2**40), "gt_labels": tensor([0, 2**40 - 1, 2**40])}
    assert mg_ops.mutual_match(**packed() | scores, backend=backend).cls_match.tolist() == RIGHT_MATCH


def test_results_beyond_any_memory_are_an_error(backend: str) -> None:
    count, images = 2**31 - 1, 2**16
    arguments = {
        "anchors": zeros(1, 4).expand(count, 4),
        "pred_boxes": zeros(1, 1, 4).expand(images, count, 4),
        "cls_logits": zeros(1, 1, 1).expand(images, count, 1),
        **{"gt_boxes": zeros(0, 4), "gt_labels": zeros(0).long(), "gt_offsets": zeros(images + 1).long()},
    }
    with pytest.raises(RuntimeError, match="memory"):
        mg_ops.mutual_match(**arguments, backend=backend)


def unaligned(value: Tensor) -> Tensor:
    """The same values, one byte off where they should begin, as in a file that is mapped into memory."""
    memory = np.zeros(value.numel() * value.element_size() + 1, np.uint8)
    values = memory[1:].view(value.numpy().dtype)
    values[:] = value.numpy().ravel()
    return torch.from_numpy(values).view(value.shape)


def test_numbers_may_begin_anywhere_in_memory(backend: str) -> None:
    arguments = {name: unaligned(value) for name, value in packed().items()}
    assert all(value.data_ptr() % value.element_size() == 1 for value in arguments.values())
    assert mg_ops.mutual_match(**arguments, backend=backend).cls_match.tolist() == RIGHT_MATCH


def test_tensors_without_values() -> None:
    """On the meta device the result has its shapes; there is nothing to check."""
    arguments: Arguments = {name: value.to("meta") for name, value in packed().items()}
    match = mg_ops.mutual_match(**arguments)
    assert [tuple(value.shape) for value in match] == [(B, A), (B, A), (3,), (3,)]
    assert all(value.is_meta for value in match)
    objects = {name: arguments[name] for name in ("gt_boxes", "gt_labels", "gt_offsets")}
    targets = mg_ops.encode_targets(match, arguments["anchors"], **objects, num_classes=C)
    assert [tuple(value.shape) for value in targets] == [(B, A), (B, A), (B, A, 4)]
    assert mg_ops.summarize(match, **objects, num_classes=C).num_objects.is_meta
    message = "check: tensors on the meta device have no values"
    assert_raises(ValueError, message, mg_ops.mutual_match, arguments | {"check": True})


def test_an_explained_error_keeps_nothing_alive() -> None:
    """Neither a second traceback to read, nor a cycle of frames that holds the tensors of a call that failed."""
    arguments = packed() | {"gt_labels": zeros(2, dtype=torch.int64)}
    alive = weakref.ref(arguments["cls_logits"])
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ValueError, match=r"^gt_labels") as caught:
            mg_ops.mutual_match(**arguments)
        assert caught.value.__suppress_context__
        del caught, arguments
        assert alive() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------------------------------------
# check=True


def replace(arguments: Arguments, name: str, where: tuple[int, ...], value: object) -> Arguments:
    """The arguments with one element changed; for a list the first index is the image."""
    if isinstance(arguments[name], list):
        images = list(arguments[name])
        changed = replace({name: images[where[0]]}, name, where[1:], value)
        return arguments | {name: [*images[: where[0]], changed[name], *images[where[0] + 1 :]]}
    changed = arguments[name].clone()
    changed[where] = torch.as_tensor(value, dtype=changed.dtype)
    return arguments | {name: changed}


def assert_check_raises(message: str, arguments: Arguments) -> None:
    """Without check the value is passed over."""
    mg_ops.mutual_match(**arguments)
    assert_raises(ValueError, message, mg_ops.mutual_match, arguments | {"check": True})


BOX = "expected four finite coordinates with x2 > x1 and y2 > y1, got "
LABELS = "expected a label in [0, 4), got "
PROBABILITY = "expected a probability in [0, 1], got "
BAD_VALUES: list[tuple[str, tuple[int, ...], Any, str]] = [
    ("anchors", (1,), [0, NAN, 1, 1], f"[1]: {BOX}[0.0, nan, 1.0, 1.0]"),
    ("anchors", (2,), [5, 0, 1, 1], f"[2]: {BOX}[5.0, 0.0, 1.0, 1.0]"),
    ("pred_boxes", (1, 2), [0, 0, INF, 1], f": image 1, anchor 2: {BOX}[0.0, 0.0, inf, 1.0]"),
    ("pred_boxes", (0, 1), [0, 3, 1, 1], f": image 0, anchor 1: {BOX}[0.0, 3.0, 1.0, 1.0]"),
    ("pred_boxes", (), [0.1, 0.2, -0.3, 0.1], f": image 0, anchor 0: {BOX}...are they deltas? Then pass ... box_coder"),
    ("cls_logits", (1, 0, 3), NAN, ": image 1, anchor 0, class 3: got NaN"),
    ("cls_probabilities", (1, 2, 3), NAN, ": image 1, anchor 2, class 3: got NaN"),
    *(
        ("cls_probabilities", (1, 2, 3), value, f": image 1, anchor 2, class 3: {PROBABILITY}...cls_logits")
        for value in (-0.25, 1.5, INF, -INF)
    ),
    (
        "box_deltas",
        (1, 2),
        [NAN, 0, 0, 0],
        ": image 1, anchor 2: expected four finite deltas, got [nan, 0.0, 0.0, 0.0]",
    ),
    (
        "box_deltas",
        (1, 2),
        [0, 0, INF, 0],
        ": image 1, anchor 2: expected four finite deltas, got [0.0, 0.0, inf, 0.0]",
    ),
    ("box_deltas", (1, 2), [0, 0, 1e4, 0], ": image 1, anchor 2: ...[0.0, 0.0, 10000.0, 0.0] decode to ...inf"),
    ("box_deltas", (1, 2), [3e38, 0, 0, 0], ": image 1, anchor 2: ...[3...e+38, 0.0, 0.0, 0.0] decode to ...inf"),
    ("gt_boxes", (0, 1), [NAN, 0, 1, 1], f": image 0, object 1: {BOX}[nan, 0.0, 1.0, 1.0]"),
    ("gt_boxes", (1, 0), [0, 0, 0, 1], f": image 1, object 0: {BOX}[0.0, 0.0, 0.0, 1.0]"),
    ("gt_boxes", (0, 0), [0, 1, 1, 0], f": image 0, object 0: {BOX}...; other formats ... gt_box_format"),
    ("gt_boxes", (0, 1), [0, 0, 0, 0], f": image 0, object 1: {BOX}...; if it is padding, ... gt_mask"),
    ("gt_boxes", (1, 0), [900, 900, 910, 910], ": image 1, object 0: no anchor overlaps [900.0, ...same unit?"),
    ("gt_labels", (0, 1), 4, f": image 0, object 1: {LABELS}4; labels number ... from 0"),
    ("gt_labels", (1, 0), -1, f": image 1, object 0: {LABELS}-1"),
    ("gt_labels", (0, 0), 2**40, f": image 0, object 0: {LABELS}1099511627776"),
]


@pytest.mark.parametrize(("name", "where", "value", "message"), BAD_VALUES)
def test_check_names_the_bad_value(name: str, where: tuple[int, ...], value: object, message: str) -> None:
    arguments = listed()
    if name == "cls_probabilities":
        arguments = arguments | {"cls_logits": None, name: torch.full((B, A, C), 0.5)}
    if name == "box_deltas":
        arguments = with_deltas(box_coder=mg_ops.BoxCoder(weights=(1.0, 1.0, 1.0, 1.0), clip=INF))
    mg_ops.mutual_match(**arguments, check=True)
    arguments = replace(arguments, name, where, value)
    assert_check_raises(name + message, arguments)
    objects = {key: torch.cat(arguments[key]) for key in ("gt_boxes", "gt_labels")}
    assert_check_raises(name + message, arguments | objects | {"gt_offsets": tensor([0, 2, 3])})


@pytest.mark.parametrize("form", [listed, packed, padded])
def test_check_refuses_objects_in_fractions_of_the_image(form: Callable[[], Arguments]) -> None:
    """Anchors in pixels, and boxes as DETR's data sets have them: each would be matched to some corner anchor."""
    arguments = form()
    boxes = arguments["gt_boxes"]
    arguments["gt_boxes"] = [image / 30 for image in boxes] if isinstance(boxes, list) else boxes / 30
    assert_check_raises(
        "gt_boxes: no coordinate is above 1, and the anchors reach 30: ...multiply fractions", arguments
    )
    unit = {name: arguments[name] / 30 for name in ("anchors", "pred_boxes")}
    mg_ops.mutual_match(**arguments | unit, check=True)


def test_check_warns_of_what_is_probably_another_form() -> None:
    """It is no error: the numbers could be meant. The warning names the form to pass them in, at the caller's line."""
    wide = ANCHORS * 10
    right = {**listed(), "anchors": wide, "pred_boxes": wide.repeat(B, 1, 1), "check": True}
    right["gt_boxes"] = [wide[:2], wide[2:]]
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(B, A, C, generator=generator)
    deltas = tensor([-0.5, -0.2, 0.1, 0.3]) + torch.rand(B, A, 4, generator=generator) / 20
    coded = right | {"pred_boxes": None, "box_coder": CODER}
    for arguments, message in (
        (right | {"cls_logits": probabilities}, "^cls_logits: all values .* Then pass them as cls_probabilities"),
        (right | {"pred_boxes": deltas}, "^pred_boxes: the largest coordinate .* Deltas are passed as box_deltas"),
        (
            coded | {"box_deltas": right["pred_boxes"] + 30},
            "^box_deltas: half of the values .* Then pass them as pred_boxes, without coder",
        ),
    ):
        with pytest.warns(UserWarning, match=message) as caught:
            mg_ops.mutual_match(**arguments)
        # Others, as of a file that is collected now, may come from anywhere.
        assert [warning.filename for warning in caught if warning.category is UserWarning] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mg_ops.mutual_match(**right)
        mg_ops.mutual_match(**right | {"cls_logits": 4 * probabilities - 2})
        mg_ops.mutual_match(**coded | {"box_deltas": deltas})
        mg_ops.mutual_match(**right | {"cls_logits": None, "cls_probabilities": probabilities})
        mg_ops.mutual_match(**right | {"cls_logits": zeros(B, A, C)})  # an untrained network


def test_check_looks_neither_at_padding_nor_at_slack() -> None:
    arguments = padded() | {"gt_mask": MASK, "gt_labels": tensor([[0, 1], [3, 99]])}
    arguments["gt_boxes"][1, 1] = NAN
    found = mg_ops.mutual_match(**arguments, check=True)
    assert found.cls_match.tolist() == RIGHT_MATCH and found.num_pos.tolist() == [[1, 1], [1, 0]]
    boxes, labels = torch.cat([ANCHORS, torch.full((2, 4), NAN)]), tensor([0, 1, 3, -5, 99])
    mg_ops.mutual_match(**packed() | {"gt_boxes": boxes, "gt_labels": labels}, check=True)


def test_check_lets_a_crowd_lie_anywhere_with_any_label() -> None:
    arguments = listed() | {"gt_crowd": [tensor([True, False]), tensor([False])]}
    mg_ops.mutual_match(**replace(arguments, "gt_boxes", (0, 0), [900, 900, 910, 910]), check=True)
    mg_ops.mutual_match(**replace(arguments, "gt_labels", (0, 0), -7), check=True)
    bad = replace(arguments, "gt_boxes", (0, 0), [NAN, 900, 910, 910])
    assert_check_raises("gt_boxes: image 0, object 0: expected four finite", bad)


def test_check_takes_every_ordinary_emptiness() -> None:
    no_image = {"pred_boxes": zeros(0, A, 4), "cls_logits": zeros(0, A, C), "gt_boxes": [], "gt_labels": []}
    no_object = {"gt_boxes": [zeros(0, 4)] * B, "gt_labels": [zeros(0).long()] * B}
    no_anchor = {"anchors": zeros(0, 4), "pred_boxes": zeros(B, 0, 4), "cls_logits": zeros(B, 0, C)}
    for changes in (no_image, no_object, no_object | no_anchor):
        mg_ops.mutual_match(**listed() | changes, check=True)
    mg_ops.mutual_match(ANCHORS, *(listed()[name] for name in ("gt_boxes", "gt_labels")), strategy="iou", check=True)
    assert_check_raises("gt_boxes: image 0, object 0: no anchor overlaps", listed() | no_anchor)
