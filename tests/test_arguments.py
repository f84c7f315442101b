"""Wrong arguments raise an error that names the argument and says what was expected and what came; nothing crashes.

`listed`, `packed` and `padded` are right calls; each test makes one thing wrong. Patterns are regular expressions.
"""

from __future__ import annotations

import gc
import math
import re
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICES
from torch import Tensor

import mg_ops

B, A, C = 2, 3, 4


def listed() -> dict[str, Any]:
    """A right call with objects in lists: 2 objects in the first image, 1 in the second."""
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 15.0, 15.0], [20.0, 20.0, 30.0, 30.0]])
    return {
        "anchors": anchors,
        "pred_boxes": anchors.repeat(B, 1, 1),
        "cls_logits": torch.zeros(B, A, C),
        "gt_boxes": [anchors[:2].clone(), anchors[2:].clone()],
        "gt_labels": [torch.tensor([0, 1]), torch.tensor([3])],
    }


def packed() -> dict[str, Any]:
    """The same call, packed."""
    arguments = listed()
    return {
        **arguments,
        "gt_boxes": torch.cat(arguments["gt_boxes"]),
        "gt_labels": torch.cat(arguments["gt_labels"]),
        "gt_offsets": torch.tensor([0, 2, 3]),
    }


def with_deltas(**changes: Any) -> dict[str, Any]:
    """The listed call with zero deltas in place of the boxes they decode to; its coder is for the caller to give."""
    arguments = {**listed(), "box_deltas": torch.zeros(B, A, 4), **changes}
    del arguments["pred_boxes"]
    return arguments


def assert_raises(error: type[Exception], message: str, arguments: dict[str, Any], name: str = "") -> None:
    """A message is a pattern from its beginning on (^), or of what follows the name of the argument."""
    pattern = message if message.startswith("^") else f"^{name}{message}"
    with pytest.raises(error) as caught:
        mg_ops.mutual_match(**arguments)
    assert type(caught.value) is error
    assert re.search(pattern, str(caught.value)), str(caught.value)


def test_the_right_calls_pass() -> None:
    for arguments in (listed(), packed()):
        match = mg_ops.mutual_match(**arguments, check=True)
        assert match.cls_match.tolist() == [[0, 1, -1], [-1, -1, 0]]


def freed(tensor: Tensor, num_bytes: int = 0) -> Tensor:
    """A tensor that keeps its shape while its memory is taken away."""
    tensor.untyped_storage().resize_(num_bytes)
    return tensor


FLOATING = "float16, bfloat16, float32 or float64"
LABEL = "int64, int32 or floating point"


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        # Types
        ("anchors", None, TypeError, r": expected a floating point tensor, got NoneType"),
        ("anchors", [[0, 0, 1, 1]], TypeError, r"\[0\]: expected a floating point tensor, got list"),
        ("pred_boxes", 3.0, TypeError, r": expected a floating point tensor, got float"),
        ("cls_logits", "logits", TypeError, r": expected a floating point tensor, got str"),
        ("gt_boxes", None, TypeError, r": expected a list of 2 tensors.*got NoneType"),
        ("gt_boxes", 5, TypeError, r": expected a list of 2 tensors.*got int"),
        ("gt_labels", None, TypeError, r": expected a list of 2 tensors.*got NoneType"),
        ("gt_labels", torch.tensor([0, 1, 3]), TypeError, r": expected a list of 2 tensors.*got a torch.int64"),
        ("gt_crowd", torch.zeros(3).bool(), TypeError, r": expected a list of 2 tensors"),
        ("gt_boxes", [None, None], TypeError, r"\[0\]: expected a floating point tensor, got NoneType"),
        ("gt_labels", [torch.tensor([0, 1]), [3]], TypeError, r"\[1\]: expected a label tensor, got list"),
        ("box_coder", (10.0, 10.0, 5.0, 5.0), TypeError, r": expected mg_ops.BoxCoder or None, got tuple"),
        # Dtypes
        ("anchors", torch.zeros(A, 4).long(), TypeError, rf": expected dtype {FLOATING}, got a torch.int64"),
        ("anchors", torch.zeros(A, 4, dtype=torch.complex64), TypeError, r": expected dtype .*torch.complex64"),
        ("anchors", torch.zeros(A, 4, dtype=torch.float8_e5m2), TypeError, r": expected dtype .*torch.float8_e5m2"),
        ("pred_boxes", torch.zeros(B, A, 4).int(), TypeError, rf": expected dtype {FLOATING}"),
        ("cls_logits", torch.zeros(B, A, C).bool(), TypeError, rf": expected dtype {FLOATING}"),
        ("gt_boxes", [torch.zeros(2, 4).long(), torch.zeros(1, 4)], TypeError, r"\[0\]: expected dtype"),
        (
            "gt_labels",
            [torch.zeros(2).long(), torch.zeros(1, dtype=torch.uint8)],
            TypeError,
            rf"\[1\]: expected dtype {LABEL}, got a torch.uint8",
        ),
        ("gt_crowd", [torch.zeros(2), torch.zeros(1)], TypeError, r"\[0\]: expected dtype bool"),
        # Layout
        ("anchors", torch.zeros(A, 4).to_sparse(), TypeError, r": expected a dense tensor, got layout torch.sparse"),
        (
            "anchors",
            torch.nested.nested_tensor([torch.zeros(A, 4)], layout=torch.jagged),
            TypeError,
            r": .* dense tensor, got a nested",
        ),
        (
            "gt_boxes",
            [torch.zeros(2, 4), torch.nested.nested_tensor([torch.zeros(4)], layout=torch.jagged)],
            TypeError,
            r"\[1\]: expected a dense tensor, got a nested",
        ),
        # Memory
        ("anchors", freed(torch.zeros(A, 4)), ValueError, r": its memory of 0 bytes does not hold .*\(3, 4\)"),
        ("cls_logits", freed(torch.zeros(B, A, C), 95), ValueError, r": its memory of 95 bytes does not hold"),
        ("pred_boxes", freed(torch.zeros(B, A, 4)[:, :, ::2].repeat(1, 1, 2)), ValueError, r": its memory of 0"),
        ("gt_boxes", [freed(torch.zeros(2, 4)), torch.zeros(1, 4)], ValueError, r"\[0\]: its memory of 0 bytes"),
        # Shapes
        ("anchors", torch.zeros(B, A, 4), ValueError, r": expected shape \(A, 4\), got .*\(2, 3, 4\)"),
        ("anchors", torch.zeros(A, 5), ValueError, r": expected shape \(A, 4\), got .*\(3, 5\)"),
        ("anchors", torch.zeros(4), ValueError, r": expected shape \(A, 4\), got .*\(4,\)"),
        ("pred_boxes", torch.zeros(A, 4), ValueError, r": expected shape \(2, 3, 4\), got .*\(3, 4\)"),
        ("pred_boxes", torch.zeros(B + 1, A, 4), ValueError, r": expected shape \(2, 3, 4\), got .*\(3, 3, 4\)"),
        ("pred_boxes", torch.zeros(B, A + 1, 4), ValueError, r": expected shape \(2, 3, 4\), got .*\(2, 4, 4\)"),
        ("pred_boxes", torch.zeros(B, 4, A), ValueError, r": expected shape \(2, 3, 4\), got .*\(2, 4, 3\)"),
        ("cls_logits", torch.zeros(B, C, A), ValueError, r": expected shape \(B, 3, C\), got .*\(2, 4, 3\)"),
        ("cls_logits", torch.zeros(A, C), ValueError, r": expected shape \(B, 3, C\), got .*\(3, 4\)"),
        ("cls_logits", torch.zeros(()), ValueError, r": expected shape \(B, 3, C\), got .*\(\)"),
        (
            "gt_boxes",
            [torch.zeros(2, 4), torch.zeros(1, 5)],
            ValueError,
            r"\[1\]: expected shape \(G, 4\), got .*\(1, 5\)",
        ),
        ("gt_boxes", [torch.zeros(2, 4), torch.zeros(0)], ValueError, r"\[1\]: expected shape \(G, 4\), got .*\(0,\)"),
        (
            "gt_labels",
            [torch.tensor([0]), torch.tensor([3])],
            ValueError,
            r"\[0\]: expected shape \(2,\), got .*\(1,\)",
        ),
        # As many labels as boxes in all
        (
            "gt_labels",
            [torch.tensor([0]), torch.tensor([1, 3])],
            ValueError,
            r"\[0\]: expected shape \(2,\), got .*\(1,\)",
        ),
        (
            "gt_labels",
            [torch.tensor([0, 1]), torch.tensor([[3]])],
            ValueError,
            r"\[1\]: expected shape \(1,\), got .*\(1, 1\)",
        ),
        (
            "gt_crowd",
            [torch.zeros(2).bool(), torch.zeros(2).bool()],
            ValueError,
            r"\[1\]: expected shape \(1,\), got .*\(2,\)",
        ),
        # Lengths
        ("gt_boxes", [], ValueError, r": expected a list of 2 tensors, one per image, got 0"),
        ("gt_boxes", [torch.zeros(2, 4), torch.tensor([])], ValueError, r"\[1\]: expected shape .* \.reshape\(-1, 4\)"),
        (
            "anchors",
            [torch.zeros(A, 4)] * 2,
            ValueError,
            r": expected one tensor per feature level, .* pass those of one",
        ),
        ("gt_boxes", [torch.zeros(1, 4)] * 3, ValueError, r": expected a list of 2 tensors, one per image, got 3"),
        ("gt_labels", [torch.tensor([0, 1])], ValueError, r": expected a list of 2 tensors, one per image, got 1"),
        ("gt_crowd", [], ValueError, r": expected a list of 2 tensors, one per image, got 0"),
        ("gt_offsets", torch.tensor([0, 2, 3]), ValueError, r": only packed gt_boxes .* take offsets"),
        # Devices
        (
            "anchors",
            torch.zeros(A, 4, device="meta"),
            ValueError,
            r"^cls_logits: expected device meta, like anchors, got .*cpu",
        ),
        ("pred_boxes", torch.zeros(B, A, 4, device="meta"), ValueError, r": expected device cpu, like anchors.*meta"),
        ("cls_logits", torch.zeros(B, A, C, device="meta"), ValueError, r": expected device cpu, like anchors.*meta"),
        (
            "gt_boxes",
            [torch.zeros(2, 4), torch.zeros(1, 4, device="meta")],
            ValueError,
            r"\[1\]: expected device cpu, like anchors.*meta",
        ),
        (
            "gt_labels",
            [torch.zeros(2, dtype=torch.int64, device="meta"), torch.tensor([3])],
            ValueError,
            r"\[0\]: expected device cpu, like anchors.*meta",
        ),
        # Numbers
        ("sigma", "2", TypeError, r": expected a number, got str"),
        ("sigma", True, TypeError, r": expected a number, got bool"),
        ("sigma", None, TypeError, r": expected a number, got NoneType"),
        ("sigma", torch.tensor(2.0), TypeError, r": expected a number, got a torch.float32 tensor"),
        ("sigma", 1, ValueError, r": expected a finite number above 1, got 1"),
        ("sigma", 10**400, ValueError, r": expected a finite number above 1, got an integer that no float holds"),
        ("check", "yes", TypeError, r": expected True or False, got str"),
        ("check", torch.ones(2).bool(), TypeError, r": expected True or False, got a torch.bool tensor"),
        *(
            (name, value, error, rf"^{name}: expected {text}, got {re.escape(shown)}")
            for name in ("iou_positive", "iou_ignored", "crowd_overlap")
            for value, error, text, shown in (
                (50, ValueError, r"a threshold in \(0, 1\]", "50"),
                (None, TypeError, "a number", "NoneType"),
                ("0.5", TypeError, "a number", "str"),
            )
        ),
        ("iou_ignored", 0.6, ValueError, r": must not exceed iou_positive \(0.5\), got 0.6"),
        # Choices
        (
            "strategy",
            "atss",
            ValueError,
            r": expected one of 'iou', 'localize_to_classify', 'classify_to_localize', 'mutual', got 'atss'",
        ),
        ("strategy", None, ValueError, r": expected one of .*got None"),
        ("strategy", ["mutual"], ValueError, r": expected one of .*got \['mutual'\]"),
        ("backend", "tpu", ValueError, r": expected None or one of .*'eager'.*, got 'tpu'"),
        ("backend", ["eager"], ValueError, r": expected None or one of .*, got \['eager'\]"),
    ],
)
def test_wrong_argument(name: str, value: object, error: type[Exception], message: str) -> None:
    assert_raises(error, message, {**listed(), name: value}, name)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("gt_offsets", None, ValueError, r": packed gt_boxes \(N, 4\) need gt_offsets \(B \+ 1,\); .*list"),
        ("gt_offsets", [0, 2, 3], TypeError, r": expected an integer tensor, got list"),
        (
            "gt_offsets",
            torch.tensor([0.0, 2.0, 3.0]),
            TypeError,
            r": expected dtype int64 or int32, got a torch.float32",
        ),
        ("gt_offsets", torch.tensor([0, 3]), ValueError, r": expected shape \(3,\), got .*\(2,\)"),
        ("gt_offsets", torch.tensor([[0, 2, 3]]), ValueError, r": expected shape \(3,\), got .*\(1, 3\)"),
        ("gt_offsets", torch.tensor([0, 2, 3], device="meta"), ValueError, r": expected device cpu, like anchors"),
        ("gt_offsets", torch.tensor([1, 2, 3]), ValueError, r": must start at 0, got 1"),
        ("gt_offsets", torch.tensor([-1, 2, 3]), ValueError, r": must start at 0, got -1"),
        ("gt_offsets", torch.tensor([0, 2, 1]), ValueError, r": must not decrease, got 2 then 1 for image 1"),
        ("gt_offsets", torch.tensor([0, -1, 3]), ValueError, r": must not decrease, got 0 then -1 for image 0"),
        ("gt_offsets", torch.tensor([0, 2, 4]), ValueError, r": must not exceed the 3 packed objects, got 4"),
        ("gt_offsets", torch.tensor([0, 2, 2**62]), ValueError, r": must not exceed the 3 packed objects"),
        ("gt_boxes", torch.zeros(3, 5), ValueError, r": expected shape \(N, 4\), got .*\(3, 5\)"),
        ("gt_boxes", torch.zeros(3, 4).int(), TypeError, rf": expected dtype {FLOATING}"),
        ("gt_boxes", torch.zeros(2, 4), ValueError, r"^gt_labels: expected shape \(2,\), got .*\(3,\)"),
        ("gt_labels", [torch.tensor([0, 1]), torch.tensor([3])], TypeError, r": expected a label tensor, got list"),
        ("gt_labels", torch.zeros(3).bool(), TypeError, rf": expected dtype {LABEL}, got a torch.bool"),
        ("gt_labels", torch.zeros(3, 1).long(), ValueError, r": expected shape \(3,\), got .*\(3, 1\)"),
        ("gt_crowd", torch.zeros(2).bool(), ValueError, r": expected shape \(3,\), got .*\(2,\)"),
        ("gt_crowd", torch.zeros(3).long(), TypeError, r": expected dtype bool, got a torch.int64"),
        ("gt_crowd", [torch.zeros(2).bool()] * 2, TypeError, r": expected a bool tensor, got list"),
        ("gt_boxes", torch.zeros(3, 4, device="meta"), ValueError, r": expected device cpu, like anchors.*meta"),
    ],
)
def test_wrong_packed_argument(name: str, value: object, error: type[Exception], message: str) -> None:
    assert_raises(error, message, {**packed(), name: value}, name)


def padded(**changes: Any) -> dict[str, Any]:
    """The same call, padded: the second image has one object, and room for another."""
    arguments = listed()
    boxes = torch.nn.utils.rnn.pad_sequence(arguments["gt_boxes"], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(arguments["gt_labels"], batch_first=True, padding_value=-1)
    return {**arguments, "gt_boxes": boxes, "gt_labels": labels, **changes}


MASK = torch.tensor([[True, True], [True, False]])


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("gt_boxes", torch.zeros(B, 2, 5), ValueError, r": expected shape \(2, M, 4\), got .*\(2, 2, 5\)"),
        ("gt_boxes", torch.zeros(B + 1, 2, 4), ValueError, r": expected shape \(2, M, 4\), got .*\(3, 2, 4\)"),
        ("gt_boxes", torch.zeros(B, 2, 4).long(), TypeError, rf": expected dtype {FLOATING}"),
        ("gt_boxes", torch.zeros(1, B, 2, 4), ValueError, r"^gt_offsets: packed gt_boxes"),
        ("gt_boxes", freed(torch.zeros(B, 2, 4)), ValueError, r": its memory of 0 bytes"),
        ("gt_boxes", listed()["gt_boxes"], TypeError, r"^gt_labels: expected a list of 2 tensors, .*got a torch.int64"),
        ("gt_labels", None, TypeError, r": expected a label tensor, got NoneType"),
        ("gt_labels", listed()["gt_labels"], TypeError, r": expected a label tensor, got list"),
        ("gt_labels", torch.zeros(B, 3).long(), ValueError, r": expected shape \(2, 2\), got .*\(2, 3\)"),
        ("gt_labels", torch.zeros(B, 2).bool(), TypeError, rf": expected dtype {LABEL}"),
        ("gt_labels", freed(torch.zeros(B, 2)), ValueError, r": its memory of 0 bytes"),
        ("gt_crowd", torch.zeros(B, 2), TypeError, r": expected dtype bool"),
        ("gt_crowd", MASK[0], ValueError, r": expected shape \(2, 2\), got .*\(2,\)"),
        ("gt_mask", MASK.int(), TypeError, r": expected dtype bool, got a torch.int32"),
        ("gt_mask", MASK[:1], ValueError, r": expected shape \(2, 2\), got .*\(1, 2\)"),
        ("gt_mask", MASK.to("meta"), ValueError, r": expected device cpu, like anchors"),
        ("gt_mask", MASK.tolist(), TypeError, r": expected a bool tensor, got list"),
        ("gt_offsets", torch.tensor([0, 2, 3]), ValueError, r"^gt_boxes: expected shape \(N, 4\), got .*\(2, 2, 4\)"),
        ("gt_box_format", "yxyx", ValueError, r": expected one of 'xyxy', 'xywh', 'cxcywh', got 'yxyx'"),
        ("gt_box_format", ["xyxy"], ValueError, r": expected one of .*got \['xyxy'\]"),
    ],
)
def test_wrong_padded_argument(name: str, value: object, error: type[Exception], message: str) -> None:
    assert_raises(error, message, padded(**{name: value}), name)


@pytest.mark.parametrize("arguments", [listed(), packed()], ids=["listed", "packed"])
def test_only_padded_objects_take_a_mask(arguments: dict[str, Any]) -> None:
    assert_raises(ValueError, r"^gt_mask: only padded gt_boxes .* take a mask", {**arguments, "gt_mask": MASK})


TARGET = {"boxes": torch.zeros(1, 4), "labels": torch.tensor([0])}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gt_boxes": [TARGET]}, ValueError, r"^gt_boxes: expected a list of 2 tensors, one per image, got 1"),
        ({"gt_boxes": [TARGET, TARGET["boxes"]]}, TypeError, r'^gt_boxes\[1\]: expected a dictionary with "boxes" and'),
        ({"gt_boxes": [TARGET["boxes"], TARGET]}, TypeError, r"^gt_labels: expected a list of 2 tensors"),
        (
            {"gt_boxes": [TARGET, {"boxes": TARGET["boxes"], "class": 1}]},
            TypeError,
            r'^gt_boxes\[1\]: expected a dictionary with "boxes" and "labels", got one with \[\'boxes\', \'class\'\]',
        ),
        (
            {"gt_boxes": [TARGET, TARGET | {"iscrowd": torch.zeros(1)}]},
            TypeError,
            r'^gt_boxes\[1\]\["iscrowd"\]: expected dtype bool, uint8, int32 or int64, got a torch.float32',
        ),
        (
            {"gt_boxes": [TARGET, TARGET | {"iscrowd": torch.zeros(2).bool()}]},
            ValueError,
            r"^gt_crowd\[1\]: expected shape \(1,\)",
        ),
        (
            {"gt_boxes": [TARGET, TARGET | {"labels": 3}]},
            TypeError,
            r"^gt_labels\[1\]: expected a label tensor, got int",
        ),
        ({"gt_boxes": [TARGET] * 2, "gt_labels": [TARGET["labels"]] * 2}, ValueError, r"^gt_labels: .* dictionaries"),
        ({"gt_boxes": [TARGET] * 2, "gt_offsets": torch.arange(3)}, ValueError, r"^gt_offsets: .* dictionaries"),
        ({"gt_boxes": [TARGET] * 2, "gt_crowd": [MASK[0, :1]] * 2}, ValueError, r"^gt_crowd: .* dictionaries"),
    ],
)
def test_wrong_dictionaries(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    assert_raises(error, message, {**listed(), "gt_labels": None, **changes})


CODER = mg_ops.BoxCoder()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box_deltas": torch.zeros(B, A, 4)}, r"^box_deltas: expected pred_boxes or box_deltas, got both"),
        ({"box_deltas": torch.zeros(B, A, 4), "box_coder": CODER}, r"^box_deltas: .*got both"),
        ({"cls_probabilities": torch.zeros(B, A, C)}, r"^cls_probabilities: expected cls_logits or .*got both"),
        ({"box_coder": CODER}, r"^box_coder: expected none without box_deltas; boxes .* decoded are pred_boxes"),
        ({"pred_boxes": None, "box_coder": CODER}, r"^box_coder: expected none without box_deltas"),
        ({"pred_boxes": None, "box_deltas": torch.zeros(B, A, 4)}, r"^box_coder: expected one with box_deltas"),
        ({"pred_boxes": None}, r"^pred_boxes: strategy 'mutual' reads the predicted boxes; pass pred_boxes or box_del"),
        ({"pred_boxes": None, "strategy": "localize_to_classify"}, r"^pred_boxes: strategy 'localize_to_classify'"),
        ({"cls_logits": None}, r"^cls_logits: strategy 'mutual' reads the scores; pass cls_logits or cls_prob"),
        ({"cls_logits": None, "strategy": "classify_to_localize"}, r"^cls_logits: strategy 'classify_to_localize'"),
    ],
)
def test_boxes_and_deltas_logits_and_probabilities_cannot_be_confused(changes: dict[str, Any], message: str) -> None:
    """What is missing, and what is given twice, is an error that names it, whatever the other arguments are."""
    for arguments in (listed(), packed(), padded()):
        assert_raises(ValueError, message, {**arguments, **changes})


def test_predictions_go_by_name_alone() -> None:
    arguments = listed()
    with pytest.raises(TypeError, match="positional argument"):
        mg_ops.mutual_match(*(arguments[name] for name in ("anchors", "pred_boxes", "cls_logits")), *[None] * 2)  # type: ignore[misc]


@pytest.mark.parametrize("name", ["anchors", "pred_boxes", "box_deltas", "cls_logits", "cls_probabilities"])
def test_a_wrong_level_is_named(name: str) -> None:
    arguments = with_deltas(box_coder=CODER) if name == "box_deltas" else listed()
    if name == "cls_probabilities":
        arguments[name] = arguments.pop("cls_logits")
    first, *rest = arguments[name].split(1, dim=-2)
    for levels, error, message in (
        ([first, 3], TypeError, r"\[1\]: expected a floating point tensor, got int"),
        ([first, *rest, first[..., :3]], ValueError, r"\[3\]: expected the shape and device of .*\[0\]"),
        ([first, first[0]], ValueError, r"\[1\]: expected "),
        ([first, rest[0].to("meta")], ValueError, r"\[1\]: expected the shape and device of"),
        ([first.int(), *rest], TypeError, r"\[0\]: expected dtype float16"),
        ([first, freed(torch.zeros(rest[0].shape))], ValueError, r"\[1\]: its memory of 0 bytes"),
        ([first], ValueError, ": expected shape"),
        ([], ValueError, ": expected one tensor, or one tensor per feature level, got none"),
    ):
        wanted = message
        if levels == [first] and name == "anchors":
            wanted = r"^\w+: expected shape"  # the others no longer fit the anchors
        assert_raises(error, wanted, {**arguments, name: levels}, name)


def test_a_wrong_object_is_named_where_predictions_are_in_levels() -> None:
    """Levels that are right are not blamed for another argument."""
    arguments = listed()
    names = ("anchors", "pred_boxes", "cls_logits")
    levels = {name: arguments[name].split(1, dim=-2) for name in names}
    wrong = {**arguments, **levels, "gt_labels": None}
    assert_raises(TypeError, r"^gt_labels: expected a list of 2 tensors", wrong)


def test_more_than_32_bits_number_is_refused() -> None:
    """Sizes as huge as this come from a stray expand: every tensor here is a few bytes."""
    count = 2**31 + 5
    anchors = torch.zeros(1, 4).expand(count, 4)
    arguments = {**packed(), "anchors": anchors, "pred_boxes": anchors.expand(B, count, 4)}
    arguments["cls_logits"] = torch.zeros(1, 1, 1).expand(B, count, C)
    assert_raises(ValueError, rf"^anchors: expected at most 2147483647, got {count}", arguments)
    arguments = {**packed(), "gt_boxes": anchors, "gt_labels": torch.zeros(1).long().expand(count)}
    assert_raises(ValueError, rf"^gt_boxes: expected at most 2147483647, got {count}", arguments)


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_any_number_of_classes_is_read_where_it_is(backend: str) -> None:
    if not mg_ops.backends()[backend].usable:
        pytest.skip(mg_ops.backends()[backend].detail)
    arguments = {**packed(), "cls_logits": torch.zeros(1, 1, 1).expand(B, A, 2**40)}
    arguments["gt_labels"] = torch.tensor([0, 2**40 - 1, 2**40])
    match = mg_ops.mutual_match(**arguments, backend=backend)
    assert match.cls_match.tolist() == [[0, 1, -1], [-1, -1, 0]]


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_results_beyond_any_memory_are_an_error(backend: str) -> None:
    if not mg_ops.backends()[backend].usable:
        pytest.skip(mg_ops.backends()[backend].detail)
    count, images = 2**31 - 1, 2**16
    arguments = {
        "anchors": torch.zeros(1, 4).expand(count, 4),
        "pred_boxes": torch.zeros(1, 1, 4).expand(images, count, 4),
        "cls_logits": torch.zeros(1, 1, 1).expand(images, count, 1),
        "gt_boxes": torch.zeros(0, 4),
        "gt_labels": torch.zeros(0).long(),
        "gt_offsets": torch.zeros(images + 1).long(),
    }
    with pytest.raises(RuntimeError, match="memory"):
        mg_ops.mutual_match(**arguments, backend=backend)


def unaligned(tensor: Tensor) -> Tensor:
    """The same values, one byte off where they should begin, as in a file that is mapped into memory."""
    memory = np.zeros(tensor.numel() * tensor.element_size() + 1, np.uint8)
    values = memory[1:].view(tensor.numpy().dtype)
    values[:] = tensor.numpy().ravel()
    return torch.from_numpy(values).view(tensor.shape)


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_numbers_may_begin_anywhere_in_memory(backend: str) -> None:
    if not mg_ops.backends()[backend].usable:
        pytest.skip(mg_ops.backends()[backend].detail)
    arguments = {name: unaligned(value) for name, value in packed().items()}
    assert all(value.data_ptr() % value.element_size() == 1 for value in arguments.values())
    match = mg_ops.mutual_match(**arguments, backend=backend)
    assert match.cls_match.tolist() == [[0, 1, -1], [-1, -1, 0]]


def test_tensors_without_values() -> None:
    """On the meta device the result has its shapes; there is nothing to check."""
    arguments: dict[str, Any] = {name: value.to("meta") for name, value in packed().items()}
    match = mg_ops.mutual_match(**arguments)
    assert [tuple(value.shape) for value in match] == [(B, A), (B, A), (3,), (3,)]
    assert all(value.is_meta for value in match)
    objects = {name: arguments[name] for name in ("gt_boxes", "gt_labels", "gt_offsets")}
    targets = mg_ops.encode_targets(match, arguments["anchors"], **objects, num_classes=C)
    assert [tuple(value.shape) for value in targets] == [(B, A), (B, A), (B, A, 4)]
    assert mg_ops.summarize(match, **objects, num_classes=C).num_objects.is_meta
    assert_raises(ValueError, r"^check: tensors on the meta device have no values", {**arguments, "check": True})


def test_an_unusable_backend_says_why() -> None:
    for backend, status in mg_ops.backends().items():
        if not status.usable:
            with pytest.raises(RuntimeError, match=f"^backend '{backend}' cannot be used: ") as caught:
                mg_ops.mutual_match(**listed(), backend=backend)
            assert status.detail in str(caught.value)


@pytest.mark.parametrize("device", DEVICES)
def test_every_backend_takes_only_its_devices(device: str) -> None:
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else [element.to(device) for element in value]
        for name, value in listed().items()
    }
    for backend, status in mg_ops.backends().items():
        if not status.usable:
            continue
        try:
            match = mg_ops.mutual_match(**arguments, backend=backend)
        except RuntimeError as error:
            assert re.match(
                f"backend '{backend}' cannot be used: it takes .* tensors, the arguments are on {device}", str(error)
            )
        else:
            assert match.cls_match.device.type == device


# ---------------------------------------------------------------------------------------------------------------------
# check=True


NAN, INF = float("nan"), float("inf")


def replace(arguments: dict[str, Any], name: str, where: tuple[int, ...], value: object) -> dict[str, Any]:
    """The arguments with one element changed; for a list the first index is the image."""
    if isinstance(arguments[name], list):
        elements = [element.clone() for element in arguments[name]]
        elements[where[0]][where[1:]] = torch.as_tensor(value, dtype=elements[where[0]].dtype)
        return {**arguments, name: elements}
    changed = arguments[name].clone()
    changed[where] = torch.as_tensor(value, dtype=changed.dtype)
    return {**arguments, name: changed}


BOX = "expected four finite coordinates with x2 > x1 and y2 > y1"


@pytest.mark.parametrize(
    ("name", "where", "value", "message"),
    [
        ("anchors", (1,), [0, NAN, 1, 1], rf"\[1\]: {BOX}, got \[0.0, nan, 1.0, 1.0\]"),
        ("anchors", (2,), [5, 0, 1, 1], rf"\[2\]: {BOX}, got \[5.0, 0.0, 1.0, 1.0\]"),
        ("pred_boxes", (1, 2), [0, 0, INF, 1], rf": image 1, anchor 2: {BOX}, got \[0.0, 0.0, inf, 1.0\]"),
        ("pred_boxes", (0, 1), [0, 3, 1, 1], rf": image 0, anchor 1: {BOX}, got \[0.0, 3.0, 1.0, 1.0\]"),
        ("cls_logits", (1, 0, 3), NAN, r": image 1, anchor 0, class 3: got NaN"),
        ("gt_boxes", (0, 1), [NAN, 0, 1, 1], rf": image 0, object 1: {BOX}, got \[nan, 0.0, 1.0, 1.0\]"),
        ("gt_boxes", (1, 0), [0, 0, 0, 1], rf": image 1, object 0: {BOX}, got \[0.0, 0.0, 0.0, 1.0\]"),
        ("gt_boxes", (0, 0), [0, 1, 1, 0], rf": image 0, object 0: {BOX}, got .*; other formats .* gt_box_format"),
        ("gt_boxes", (0, 1), [0, 0, 0, 0], rf": image 0, object 1: {BOX}, got .*; if it is padding, .* gt_mask"),
        ("gt_boxes", (1, 0), [900, 900, 910, 910], r": image 1, object 0: no anchor overlaps \[900.0, .*same unit\?"),
        ("gt_labels", (0, 1), 4, r": image 0, object 1: expected a label in \[0, 4\), got 4; labels number .* from 0"),
        ("gt_labels", (1, 0), -1, r": image 1, object 0: expected a label in \[0, 4\), got -1"),
        ("gt_labels", (0, 0), 2**40, r": image 0, object 0: expected a label in \[0, 4\), got 1099511627776"),
    ],
)
@pytest.mark.parametrize("form", ["listed", "packed"])
def test_check_names_the_bad_value(name: str, where: tuple[int, ...], value: object, message: str, form: str) -> None:
    arguments = replace(listed(), name, where, value)
    if form == "packed":
        objects = {key: torch.cat(arguments[key]) for key in ("gt_boxes", "gt_labels")}
        arguments = {**arguments, **objects, "gt_offsets": torch.tensor([0, 2, 3])}
    mg_ops.mutual_match(**arguments)  # passed over without check
    assert_raises(ValueError, message, {**arguments, "check": True}, name)


@pytest.mark.parametrize(
    ("deltas", "clip", "message"),
    [
        (
            [NAN, 0, 0, 0],
            4.0,
            r"^box_deltas: image 1, anchor 2: expected four finite deltas, got \[nan, 0.0, 0.0, 0.0\]",
        ),
        (
            [0, 0, INF, 0],
            4.0,
            r"^box_deltas: image 1, anchor 2: expected four finite deltas, got \[0.0, 0.0, inf, 0.0\]",
        ),
        ([0, 0, 1e4, 0], INF, r"^box_deltas: image 1, anchor 2: .*\[0.0, 0.0, 10000.0, 0.0\].* decode to .*inf"),
        ([3e38, 0, 0, 0], 4.0, r"^box_deltas: image 1, anchor 2: .*\[3.*e\+38, 0.0, 0.0, 0.0\].* decode to .*inf"),
    ],
)
def test_check_names_bad_deltas(deltas: list[float], clip: float, message: str) -> None:
    arguments = listed()
    del arguments["pred_boxes"]
    arguments["box_deltas"] = torch.zeros(B, A, 4)
    arguments["box_coder"] = mg_ops.BoxCoder(weights=(1.0, 1.0, 1.0, 1.0), clip=clip)
    mg_ops.mutual_match(**arguments, check=True)
    arguments = replace(arguments, "box_deltas", (1, 2), deltas)
    mg_ops.mutual_match(**arguments)
    assert_raises(ValueError, message, {**arguments, "check": True})


def test_check_warns_of_what_is_probably_another_form() -> None:
    """It is no error: the numbers could be meant. The warning names the form to pass them in, at the caller's line."""
    wide = torch.tensor([[0.0, 0.0, 100.0, 100.0], [50.0, 50.0, 150.0, 150.0], [200.0, 200.0, 300.0, 300.0]])
    right = {**listed(), "anchors": wide, "pred_boxes": wide.repeat(B, 1, 1), "check": True}
    right["gt_boxes"] = [wide[:2].clone(), wide[2:].clone()]
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(B, A, C, generator=generator)
    deltas = torch.tensor([-0.5, -0.2, 0.1, 0.3]) + torch.rand(B, A, 4, generator=generator) / 20
    without = {name: value for name, value in right.items() if name != "pred_boxes"}
    for arguments, message in (
        ({**right, "cls_logits": probabilities}, "^cls_logits: all values .* Then pass them as cls_probabilities"),
        ({**right, "pred_boxes": deltas}, "^pred_boxes: the largest coordinate .* Deltas are passed as box_deltas"),
        (
            {**without, "box_deltas": right["pred_boxes"] + 30, "box_coder": mg_ops.BoxCoder()},
            "^box_deltas: half of the values .* Then pass them as pred_boxes, without coder",
        ),
    ):
        with pytest.warns(UserWarning, match=message) as caught:
            mg_ops.mutual_match(**arguments)
        assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mg_ops.mutual_match(**right)
        mg_ops.mutual_match(**right | {"cls_logits": 4 * probabilities - 2})
        mg_ops.mutual_match(**without, box_deltas=deltas, box_coder=mg_ops.BoxCoder())
        mg_ops.mutual_match(**{**right, "cls_logits": None, "cls_probabilities": probabilities})
        mg_ops.mutual_match(**right | {"cls_logits": torch.zeros(B, A, C)})  # an untrained network


def test_check_says_that_many_inverted_boxes_may_be_deltas() -> None:
    deltas = torch.tensor([[0.1, 0.2, -0.3, 0.1]]).repeat(B, A, 1)
    message = r"^pred_boxes: image 0, anchor 0: .*are they deltas\? Then pass them as box_deltas, with box_coder"
    assert_raises(ValueError, message, {**listed(), "pred_boxes": deltas, "check": True})


@pytest.mark.parametrize("value", [-0.25, 1.5, INF, -INF])
def test_check_refuses_what_is_no_probability(value: float) -> None:
    arguments = {**listed(), "cls_probabilities": torch.full((B, A, C), 0.5)}
    del arguments["cls_logits"]
    bad = replace(arguments, "cls_probabilities", (1, 2, 3), value)
    mg_ops.mutual_match(**bad)
    message = r"^cls_probabilities: image 1, anchor 2, class 3: expected a probability in \[0, 1\], got .*cls_logits"
    assert_raises(ValueError, message, {**bad, "check": True})
    bad = replace(arguments, "cls_probabilities", (1, 2, 3), NAN)
    assert_raises(ValueError, r"^cls_probabilities: image 1, anchor 2, class 3: got NaN", {**bad, "check": True})


@pytest.mark.parametrize("form", ["listed", "packed", "padded"])
def test_check_refuses_objects_in_fractions_of_the_image(form: str) -> None:
    """Anchors in pixels, and boxes as DETR's data sets have them: each would be matched to some corner anchor."""
    arguments = {"listed": listed, "packed": packed, "padded": padded}[form]()
    boxes = arguments["gt_boxes"]
    arguments["gt_boxes"] = [image / 30 for image in boxes] if form == "listed" else boxes / 30
    message = r"^gt_boxes: no coordinate is above 1, and the anchors reach 30: .*multiply fractions"
    assert_raises(ValueError, message, {**arguments, "check": True})
    unit = {name: arguments[name] / 30 for name in ("anchors", "pred_boxes")}
    mg_ops.mutual_match(**arguments | unit, check=True)


def test_check_does_not_look_at_padding() -> None:
    arguments = padded(gt_mask=MASK, gt_labels=torch.tensor([[0, 1], [3, 99]]))
    arguments["gt_boxes"][1, 1] = NAN
    found = mg_ops.mutual_match(**arguments, check=True)
    assert found.cls_match.tolist() == [[0, 1, -1], [-1, -1, 0]] and found.num_pos.tolist() == [[1, 1], [1, 0]]


def test_check_lets_a_crowd_lie_anywhere_with_any_label() -> None:
    crowd = [torch.tensor([True, False]), torch.tensor([False])]
    arguments = {**listed(), "gt_crowd": crowd, "check": True}
    mg_ops.mutual_match(**replace(arguments, "gt_boxes", (0, 0), [900, 900, 910, 910]))
    mg_ops.mutual_match(**replace(arguments, "gt_labels", (0, 0), -7))
    bad = replace(arguments, "gt_boxes", (0, 0), [NAN, 900, 910, 910])
    assert_raises(ValueError, r"^gt_boxes: image 0, object 0: expected four finite", bad)


def test_check_does_not_look_at_slack() -> None:
    arguments = packed()
    arguments["gt_boxes"] = torch.cat([arguments["gt_boxes"], torch.full((2, 4), NAN)])
    arguments["gt_labels"] = torch.cat([arguments["gt_labels"], torch.tensor([-5, 99])])
    mg_ops.mutual_match(**arguments, check=True)


def test_check_takes_every_ordinary_emptiness() -> None:
    no_image = {
        **listed(),
        "pred_boxes": torch.zeros(0, A, 4),
        "cls_logits": torch.zeros(0, A, C),
        "gt_boxes": [],
        "gt_labels": [],
    }
    mg_ops.mutual_match(**no_image, check=True)
    no_object = {**listed(), "gt_boxes": [torch.zeros(0, 4)] * B, "gt_labels": [torch.zeros(0).long()] * B}
    mg_ops.mutual_match(**no_object, check=True)
    no_anchor = {"anchors": torch.zeros(0, 4), "pred_boxes": torch.zeros(B, 0, 4), "cls_logits": torch.zeros(B, 0, C)}
    mg_ops.mutual_match(**{**no_object, **no_anchor}, check=True)
    assert_raises(
        ValueError, "^gt_boxes: image 0, object 0: no anchor overlaps", {**listed(), **no_anchor, "check": True}
    )


# ---------------------------------------------------------------------------------------------------------------------
# The other functions


@pytest.mark.parametrize(
    ("weights", "clip", "error", "message"),
    [
        (
            (10.0, 10.0, 5.0),
            4.0,
            ValueError,
            r"^BoxCoder: weights must be four finite non-zero numbers \(in float32\), got \(10.0, 10.0, 5.0\)",
        ),
        ((0.1, 0.2), 4.0, ValueError, r"^BoxCoder: weights must be four .*weights are 1 / variances"),
        (10.0, 4.0, TypeError, r"^BoxCoder: weights must be four finite non-zero numbers.*got 10.0"),
        ("abcd", 4.0, TypeError, r"^BoxCoder: weights must be four finite non-zero numbers.*got 'abcd'"),
        ((10**400, 10.0, 5.0, 5.0), 4.0, TypeError, r"^BoxCoder: weights must be four finite non-zero numbers"),
        ((10.0, 10.0, 5.0, 5.0), 10**400, TypeError, r"^BoxCoder: clip must be a number"),
        ((10.0, 10.0, 5.0, 5.0), torch.zeros(2), TypeError, r"^BoxCoder: clip must be a number"),
        ((10.0, 10.0, 5.0, 5.0), None, TypeError, r"^BoxCoder: clip must be a number, got None"),
    ],
)
def test_wrong_box_coder(weights: Any, clip: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mg_ops.BoxCoder(weights=weights, clip=clip)


def test_box_coder_takes_any_numbers() -> None:
    anchors = listed()["anchors"]
    for clip in (1e300, -1e300):  # beyond float32: as good as infinite
        finite = mg_ops.BoxCoder(clip=math.copysign(math.inf, clip))
        tensors = {"anchors": anchors, "deltas": anchors}
        assert mg_ops.BoxCoder(clip=clip).decode(**tensors).equal(finite.decode(**tensors))
    coder = mg_ops.BoxCoder(weights=[1, 2, 3, 4], clip=1e300)
    assert coder.weights == (1.0, 2.0, 3.0, 4.0)
    match = mg_ops.mutual_match(**with_deltas(), box_coder=coder)
    assert match.cls_match.tolist() == [[0, 1, -1], [-1, -1, 0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda boxes: mg_ops.box_iou(boxes, None),
            TypeError,
            r"^boxes_2: expected a floating point tensor, got NoneType",
        ),
        (lambda boxes: mg_ops.box_iou(boxes.long(), boxes), TypeError, r"^boxes_1: expected dtype .*got a torch.int64"),
        (
            lambda boxes: mg_ops.box_iou(boxes[:, :3], boxes),
            ValueError,
            r"^boxes_1: expected shape \(M, 4\), got .*\(3, 3\)",
        ),
        (
            lambda boxes: mg_ops.box_iou(boxes, boxes[None]),
            ValueError,
            r"^boxes_2: expected shape \(G, 4\), got .*\(1, 3, 4\)",
        ),
        (lambda boxes: mg_ops.box_iou(boxes[0], boxes), ValueError, r"^boxes_1: expected shape \(M, 4\), got .*\(4,\)"),
        (
            lambda boxes: mg_ops.BoxCoder().decode(anchors=boxes[None], deltas=boxes),
            ValueError,
            r"^anchors: expected shape \(A, 4\), got",
        ),
        (
            lambda boxes: mg_ops.BoxCoder().decode(anchors=boxes, deltas=boxes[:2]),
            ValueError,
            r"^deltas: expected shape \(..., 3, 4\), got .*\(2, 4\)",
        ),
        (
            lambda boxes: mg_ops.BoxCoder().decode(anchors=boxes, deltas=boxes[0]),
            ValueError,
            r"^deltas: expected shape \(..., 3, 4\), got .*\(4,\)",
        ),
        (
            lambda boxes: mg_ops.BoxCoder().decode(anchors=boxes, deltas=3),
            TypeError,
            r"^deltas: expected a floating point tensor, got int",
        ),
        (
            lambda boxes: mg_ops.BoxCoder().encode(anchors=boxes, boxes=boxes[:, :2]),
            ValueError,
            r"^boxes: expected shape \(..., 4\), got .*\(3, 2\)",
        ),
        (
            lambda boxes: mg_ops.BoxCoder().encode(anchors=boxes, boxes=boxes[:2]),
            ValueError,
            r"^boxes: expected a shape that broadcasts with anchors \(3, 4\), got .*\(2, 4\)",
        ),
        (
            lambda boxes: mg_ops.BoxCoder().decode(anchors=boxes, deltas=boxes.to("meta")),
            ValueError,
            r"^deltas: expected device cpu, like anchors",
        ),
        (lambda boxes: mg_ops.box_iou(boxes, boxes.to_sparse()), TypeError, r"^boxes_2: expected a dense tensor"),
        (
            lambda boxes: mg_ops.box_iou(boxes, boxes.to("meta")),
            ValueError,
            r"^boxes_2: expected device cpu, like boxes_1",
        ),
        (lambda boxes: mg_ops.box_iou(boxes, freed(boxes.clone())), ValueError, r"^boxes_2: its memory of 0 bytes"),
        (
            lambda boxes: mg_ops.BoxCoder().encode(anchors=[1], boxes=boxes),
            TypeError,
            r"^anchors: expected a floating point tensor, got list",
        ),
    ],
)
def test_wrong_boxes(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(listed()["anchors"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"anchors": torch.zeros(A + 1, 4)}, ValueError, r"^match.cls_match: expected shape \(B, 4\), got .*\(2, 3\)"),
        ({"anchors": None}, TypeError, r"^anchors: expected a floating point tensor, got NoneType"),
        (
            {"gt_boxes": [torch.zeros(1, 4)] * 2, "gt_labels": [torch.zeros(1).long()] * 2},
            ValueError,
            r"^match: made for 3 objects",
        ),
        ({"gt_boxes": [torch.zeros(3, 4)]}, ValueError, r"^gt_boxes: expected a list of 2 tensors"),
        (
            {"gt_labels": [torch.zeros(2).bool(), torch.zeros(1)]},
            TypeError,
            rf"^gt_labels\[0\]: expected dtype {LABEL}",
        ),
        (
            {"gt_boxes": [torch.zeros(2, 4).to_sparse(), torch.zeros(1, 4)]},
            TypeError,
            r"^gt_boxes\[0\]: expected a dense tensor",
        ),
        ({"box_coder": "ssd"}, TypeError, r"^box_coder: expected mg_ops.BoxCoder or None, got str"),
        (
            {"match": (1, 2)},
            TypeError,
            r"^match: expected what mg_ops.mutual_match or another rule returned, got tuple",
        ),
        ({"num_classes": 2.5}, TypeError, r"^num_classes: expected an integer or None, got float"),
        ({"num_classes": -1}, ValueError, r"^num_classes: expected at least 0, got -1"),
        ({"num_classes": 10**30}, ValueError, r"^num_classes: expected at most 2147483647"),
        ({"num_pos": None}, TypeError, r"^match.num_pos: expected an integer tensor, got NoneType"),
        ({"loc_match": torch.zeros(1, A).long()}, ValueError, r"^match.loc_match: expected shape \(2, 3\)"),
    ],
)
def test_wrong_targets(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = listed()
    match = mg_ops.mutual_match(**arguments)
    right = {"match": match, **{name: arguments[name] for name in ("anchors", "gt_boxes", "gt_labels")}}
    mg_ops.encode_targets(**right)
    if change.keys() <= set(match._fields):
        change = {"match": match._replace(**change)}
    with pytest.raises(error, match=message):
        mg_ops.encode_targets(**{**right, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gt_boxes": None}, TypeError, r"^gt_boxes: expected a list of 2 tensors"),
        ({"gt_boxes": [None, None]}, TypeError, r"^gt_boxes\[0\]: expected a floating point tensor, got NoneType"),
        (
            {"gt_labels": [torch.zeros(2).long(), torch.zeros(1).long()]},
            ValueError,
            r"^gt_labels, num_classes: .* both",
        ),
        ({"num_classes": 3}, ValueError, r"^gt_labels, num_classes: .* both"),
        ({"num_pos": torch.zeros(2).int()}, ValueError, r"^match: made for 2 objects, but gt_boxes has 3"),
        ({"num_pos": None}, TypeError, r"^match.num_pos: expected an integer tensor, got NoneType"),
        ({"size_limits": 32}, TypeError, r"^size_limits: expected two numbers, 0 <= small <= large, got 32"),
        ({"size_limits": (1, "2")}, TypeError, r"^size_limits: expected two numbers"),
        ({"size_limits": (96.0, 32.0)}, ValueError, r"^size_limits: expected two numbers, 0 <= small <= large"),
        ({"size_limits": (0.0, NAN)}, ValueError, r"^size_limits: expected two numbers"),
    ],
)
def test_wrong_summary(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = listed()
    match = mg_ops.mutual_match(**arguments)
    mg_ops.summarize(match, arguments["gt_boxes"])
    if change.keys() <= set(match._fields):
        match, change = match._replace(**change), {}
    with pytest.raises(error, match=message):
        mg_ops.summarize(match, **{"gt_boxes": arguments["gt_boxes"], **change})


@pytest.mark.parametrize("num_classes", [-1, 2.5, 10**30])
def test_wrong_number_of_classes_of_a_summary(num_classes: Any) -> None:
    arguments = listed()
    match = mg_ops.mutual_match(**arguments)
    with pytest.raises((TypeError, ValueError), match=r"^num_classes: expected"):
        mg_ops.summarize(match, arguments["gt_boxes"], arguments["gt_labels"], num_classes=num_classes)


# ---------------------------------------------------------------------------------------------------------------------
# The operators themselves, as an exported program or another library would call them


def operator_arguments(device: str) -> dict[str, Any]:
    scores_name = {"cls_logits": "cls_scores"}
    return {
        **{scores_name.get(name, name): value.to(device) for name, value in packed().items()},
        "gt_crowd": torch.zeros(3, dtype=torch.bool, device=device),
        "box_coder": None,
        "scores_are_probabilities": False,
        "classification_by_regressed": True,
        "localization_by_amplified": True,
        "sigma": 2.0,
        "iou_positive": 0.5,
        "iou_ignored": 0.4,
        "crowd_overlap": 0.5,
    }


def operators() -> list[Any]:
    """Every operator that is registered with the signature of mutual_match."""
    names = [name for name in ("mutual_match", "mutual_match_eager") if hasattr(torch.ops.mg_ops, name)]
    return [getattr(torch.ops.mg_ops, name).default for name in names]


WRONG_FOR_OPERATORS: list[tuple[str, Any]] = [
    ("anchors", torch.zeros(A, 5)),
    ("anchors", torch.zeros(A + 1, 4)),
    ("anchors", torch.zeros(4)),
    ("anchors", torch.zeros(A, 4).long()),
    ("anchors", torch.zeros(A, 4, dtype=torch.complex64)),
    ("pred_boxes", torch.zeros(B, A, 3)),
    ("pred_boxes", torch.zeros(B - 1, A, 4)),
    ("pred_boxes", torch.zeros(B, A, 4, dtype=torch.uint8)),
    ("cls_scores", torch.zeros(B, A)),
    ("cls_scores", torch.zeros(B, A + 1, C)),
    ("cls_scores", torch.zeros(B + 1, A, C)),
    ("cls_scores", torch.zeros(B, A, C).int()),
    ("gt_boxes", torch.zeros(3, 2)),
    ("gt_boxes", torch.zeros(12)),
    ("gt_boxes", torch.zeros(1, 4)),
    ("gt_labels", torch.zeros(3)),
    ("gt_labels", torch.zeros(2).long()),
    ("gt_labels", torch.zeros(3, 1).long()),
    ("gt_offsets", torch.zeros(3)),
    ("gt_offsets", torch.zeros(2).long()),
    ("gt_offsets", torch.zeros(0).long()),
    ("gt_crowd", torch.zeros(3)),
    ("gt_crowd", torch.zeros(2).bool()),
    ("gt_offsets", torch.tensor([0, 2, 9])),
    ("gt_offsets", torch.tensor([0, 3, 2])),
    ("gt_offsets", torch.tensor([-4, 2, 3])),
    ("gt_offsets", torch.tensor([-(2**62), 2**62, 2**63 - 1])),
    *((name, None) for name in ("anchors", "pred_boxes", "cls_scores", "gt_boxes", "gt_labels", "gt_offsets")),
    ("anchors", torch.zeros(A, 4).to_sparse()),
    ("anchors", freed(torch.zeros(A, 4))),
    ("gt_offsets", freed(torch.zeros(B + 1).long(), 23)),
    ("pred_boxes", torch.zeros(B, A, 4, device="meta")),
    ("gt_labels", torch.zeros(3, dtype=torch.int64, device="meta")),
    ("box_coder", []),
    ("box_coder", [1.0] * 4),
    ("box_coder", [1.0] * 6),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "value"), WRONG_FOR_OPERATORS)
@pytest.mark.parametrize("operator", operators(), ids=str)
def test_wrong_input_of_an_operator_raises(operator: Any, name: str, value: Any, device: str) -> None:
    """With a message that names an argument, except for wrong offsets on a GPU, which are clamped."""
    if isinstance(value, Tensor) and value.device.type == "cpu":
        value = value.to(device)
    arguments = {**operator_arguments(device), name: value}
    wrong_offset = (
        name == "gt_offsets" and isinstance(value, Tensor) and value.dtype == torch.int64 and value.shape == (B + 1,)
    )
    if device != "cpu" and wrong_offset:
        operator(**arguments)
        torch.cuda.synchronize()
        return
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)) as caught:
        operator(**arguments)
    if not (isinstance(value, Tensor) and value.is_sparse):
        names = r"anchors|pred_boxes|cls_scores|gt_\w+|box_coder"
        assert re.match(rf"[^:]*\b({names})\b", str(caught.value)), str(caught.value)


def test_the_right_operator_call_passes() -> None:
    for operator in operators():
        assert operator(**operator_arguments("cpu"))[0].tolist() == [[0, 1, -1], [-1, -1, 0]]


def test_every_operator_has_the_one_signature() -> None:
    signatures = {str(operator._schema).partition("(")[2] for operator in operators()}
    assert len(signatures) == 1


@pytest.mark.parametrize("kind", ["positional", "missing", "unknown"])
def test_wrong_call_of_the_function(kind: str) -> None:
    """Options are keyword-only: a positional sigma would be taken for something else one day."""
    arguments = listed()
    with pytest.raises(TypeError):
        if kind == "positional":
            mg_ops.mutual_match(*arguments.values())  # type: ignore[misc]
        elif kind == "missing":
            mg_ops.mutual_match(arguments["anchors"])  # type: ignore[call-arg]
        else:
            mg_ops.mutual_match(**arguments, sigmas=2.0)  # type: ignore[call-arg]


def test_an_explained_error_keeps_nothing_alive() -> None:
    """Neither a second traceback to read, nor a cycle of frames that holds the tensors of a call that failed."""
    arguments = {**packed(), "gt_labels": torch.zeros(2, dtype=torch.int64)}
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
