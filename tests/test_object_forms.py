"""Objects and predictions in every form give the same integers: by hand, and against the packed form on random batches.

What each form is, and what a match of padded objects must be, is in tests/object_forms.py. The cases on paper hold in
every form too (test_every_clause_of_the_definition.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import assert_same
from conftest import Target, fuzz_cases
from object_forms import FORMS, in_form, known_or_beyond, of_padded, without_labels
from random_batches import random_batch, to_device

import mg_ops

ANCHORS = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0], [40.0, 40.0, 50.0, 50.0]])
BOX, OTHER = [0.0, 0.0, 10.0, 9.0], [40.0, 40.0, 50.0, 48.0]
NOTHING = [float("nan")] * 4


def match(**arguments: Any) -> mg_ops.MutualMatch:
    """Two images whose predictions equal the anchors."""
    return mg_ops.mutual_match(
        **{"anchors": ANCHORS, "pred_boxes": ANCHORS.expand(2, 3, 4), "cls_logits": torch.zeros(2, 3, 2), **arguments}
    )


# ---------------------------------------------------------------------------------------------------------------------
# By hand


@pytest.mark.parametrize("telling", ["labels", "mask", "both"])
def test_indices_of_padded_objects_are_positions_in_the_padded_row(telling: str) -> None:
    """Image 0 has an object behind padding, and one between; image 1 has one that ends its row."""
    boxes = torch.tensor([[BOX, OTHER, BOX, BOX], [BOX, BOX, BOX, OTHER]])
    labels = torch.tensor([[-1, 0, -1, 1], [-1, -1, -1, 0]])
    objects = {"gt_boxes": boxes, "gt_labels": labels}
    if telling != "labels":
        objects["gt_mask"] = labels >= 0
    if telling == "mask":
        objects["gt_labels"] = labels.clamp(min=0)
    found = match(**objects, check=True)
    assert found.cls_match.tolist() == found.loc_match.tolist() == [[3, -1, 1], [-1, -1, 3]]
    assert found.num_pos.tolist() == found.num_total.tolist() == [[0, 1, 0, 1], [0, 0, 0, 1]]
    assert found.cls_positive.tolist() == [[True, False, True], [False, False, True]]


def test_a_mask_makes_padding_of_any_label_and_an_object_of_none() -> None:
    """The mask alone decides: an object of an unknown class is found by its box."""
    found = match(
        gt_boxes=torch.tensor([[BOX, OTHER], [BOX, OTHER]]),
        gt_labels=torch.tensor([[0, 0], [-1, 0]]),
        gt_mask=torch.tensor([[True, False], [True, False]]),
    )
    assert found.cls_match.tolist() == [[0, -1, -1], [0, -1, -1]]


@pytest.mark.parametrize("mask", [False, True])
def test_padding_that_is_a_crowd_ignores_nothing(mask: bool) -> None:
    """A crowd that covers an anchor makes it ignored; padding does not, whatever it holds."""
    labels = torch.tensor([[0, -1], [-1, 1]])
    crowd = torch.tensor([[False, True], [True, True]])
    objects = {"gt_boxes": torch.tensor([[BOX, OTHER], [BOX, OTHER]]), "gt_labels": labels, "gt_crowd": crowd}
    if mask:
        objects |= {"gt_labels": labels.abs(), "gt_mask": labels >= 0}
    assert match(**objects).cls_match.tolist() == [[0, -1, -1], [-1, -1, -2]]


@pytest.mark.parametrize(("batch_size", "capacity"), [(2, 0), (0, 0), (0, 3), (2, 1)])
def test_padded_rows_without_objects_are_background(batch_size: int, capacity: int) -> None:
    boxes, labels = torch.zeros(batch_size, capacity, 4), torch.full((batch_size, capacity), -1)
    found = mg_ops.mutual_match(ANCHORS, boxes, labels, strategy="iou", check=True)
    assert found.cls_match.tolist() == [[-1, -1, -1]] * batch_size
    assert found.num_pos.shape == found.num_total.shape == (batch_size, capacity)


def test_dictionaries_are_read_as_torchvision_and_detr_write_them() -> None:
    """Crowd flags are integers in COCO's, and may be missing where an image has none; other entries do not matter."""
    targets = [
        {"boxes": torch.tensor([BOX, OTHER]), "labels": torch.tensor([1, 0]), "iscrowd": torch.tensor([0, 1])},
        {"boxes": torch.tensor([OTHER]), "labels": torch.tensor([1]), "image_id": 7, "area": torch.tensor([80.0])},
    ]
    found = match(gt_boxes=targets, check=True)
    assert found.cls_match.tolist() == [[0, -1, -2], [-1, -1, 0]]
    assert found.num_pos.tolist() == [1, 0, 1]
    targets[0]["iscrowd"] = torch.tensor([False, True])
    assert_same(match(gt_boxes=targets), found)
    assert mg_ops.encode_targets(found, ANCHORS, targets).class_targets.tolist() == [[1, -1, -2], [-1, -1, 1]]
    assert mg_ops.summarize(found, targets, num_classes=2).num_objects[0] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32], ids=str)
def test_labels_may_be_whole_floating_numbers(dtype: torch.dtype) -> None:
    """As datasets that keep a label in a row with its box have them. Amplified by class 1 anchor 0 is the best."""
    boxes = [torch.tensor([[2.5, 0.0, 12.5, 10.0]]), torch.tensor([OTHER])]
    labels = [torch.tensor([1], dtype=dtype), torch.tensor([0], dtype=dtype)]
    logits = torch.tensor([[0.0, 9.0], [0.0, -9.0], [0.0, 0.0]])
    for anchors, best in ((ANCHORS, 0), (ANCHORS[[1, 0, 2]], 0)):
        scores = (logits if best == 0 else logits[[1, 0, 2]]).expand(2, 3, 2)
        found = match(anchors=anchors, cls_logits=scores, gt_boxes=boxes, gt_labels=labels, iou_positive=0.9)
        assert found.loc_match.tolist() == [[0, -1, -1], [-1, -1, 0]]
        for form in FORMS[:4]:
            objects, is_object = in_form(form, boxes, labels)
            if is_object is not None:
                objects["gt_labels"] = objects["gt_labels"].to(dtype)
            other = match(anchors=anchors, cls_logits=scores, **objects, iou_positive=0.9)
            assert_same(other, found if is_object is None else of_padded(found, is_object), form)


@pytest.mark.parametrize("label", [0.5, float("nan"), float("inf"), -float("inf"), 3e9, -1.0])
def test_a_floating_label_that_is_no_class_is_an_unknown_one(label: float) -> None:
    """Its object is found by its box alone, and check=True says so."""
    objects = {"gt_boxes": [torch.tensor([BOX])] * 2, "gt_labels": [torch.tensor([0.0]), torch.tensor([label])]}
    found = match(**objects)
    assert found.loc_match.tolist() == [[0, -1, -1], [0, -1, -1]]
    assert mg_ops.encode_targets(found, ANCHORS, **objects, num_classes=2).class_targets[1, 0] == mg_ops.IGNORED
    with pytest.raises(ValueError, match=r"^gt_labels: image 1, object 0: expected a label in \[0, 2\), got -1"):
        match(**objects, check=True)


@pytest.mark.parametrize(
    ("box_format", "box"), [("xyxy", [5, 2, 15, 9]), ("xywh", [5, 2, 10, 7]), ("cxcywh", [10, 5.5, 10, 7])]
)
@pytest.mark.parametrize("form", FORMS)
def test_boxes_of_every_format_are_the_same_box(box_format: str, box: list[float], form: str) -> None:
    labels = [torch.tensor([1]), torch.zeros(0, dtype=torch.int64)]
    objects, _ = in_form(form, [torch.tensor([box], dtype=torch.float32), torch.zeros(0, 4)], labels)
    found = match(**objects, gt_box_format=box_format, check=True)
    assert found.cls_positive.tolist() == [[False, True, False], [False] * 3]
    targets = mg_ops.encode_targets(found, ANCHORS, **objects, gt_box_format=box_format)
    assert targets.box_targets[0, 1].tolist() == [5, 2, 15, 9]
    summary = mg_ops.summarize(found, **objects, gt_box_format=box_format, num_classes=2, size_limits=(8.3, 8.4))
    assert summary.num_objects.tolist() == [1, 0, 1, 0]  # the square root of 70 is 8.37


@pytest.mark.parametrize("box_format", ["xywh", "cxcywh"])
def test_formats_are_converted_to_the_bits_of_torchvision(box_format: str) -> None:
    """Whoever converts the boxes with torchvision beforehand gets the same integers and targets."""
    ops = pytest.importorskip("torchvision.ops")
    boxes = torch.rand(1000, 4, generator=torch.Generator().manual_seed(0)) * 700
    match = mg_ops.MutualMatch(torch.arange(1000)[None], torch.arange(1000)[None], *(torch.ones(1000).int(),) * 2)
    labels = [torch.zeros(1000).long()]
    targets = mg_ops.encode_targets(match, boxes, [boxes], labels, gt_box_format=box_format).box_targets[0]
    assert targets.tolist() == ops.box_convert(boxes, box_format, "xyxy").tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Against the packed form


def listed_batches(first_seed: int, count: int) -> list[Any]:
    batches = (random_batch(seed) for seed in range(first_seed, first_seed + 4 * count))
    return [batch for batch in batches if isinstance(batch.arguments["gt_boxes"], list)][:count]


@pytest.mark.parametrize("form", FORMS)
def test_random_batches_match_alike_in_every_form(target: Target, form: str) -> None:
    """The match, its targets and its summary."""
    for batch in listed_batches(50_000, fuzz_cases(40)):
        arguments = to_device(batch.arguments, target.device) | {"backend": target.backend}
        lists = [
            arguments.pop("gt_boxes"),
            known_or_beyond(arguments.pop("gt_labels")),
            arguments.pop("gt_crowd", None),
        ]
        packed, _ = in_form("packed", *lists)
        objects, is_object = in_form(form, *lists, seed=batch.seed)
        expected = mg_ops.mutual_match(**arguments, **packed)
        found = mg_ops.mutual_match(**arguments, **objects)
        assert_same(found, expected if is_object is None else of_padded(expected, is_object), batch)

        numbers = [
            mg_ops.summarize(match, **form_of_objects, num_classes=3)
            for match, form_of_objects in ((found, objects), (expected, packed))
        ]
        objects.pop("gt_crowd", None), packed.pop("gt_crowd", None)
        numbers += [
            mg_ops.encode_targets(match, arguments["anchors"], **form_of_objects, num_classes=3)
            for match, form_of_objects in ((found, objects), (expected, packed))
        ]
        for value, wanted in zip(numbers[0] + numbers[2], numbers[1] + numbers[3], strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def test_levels_of_a_pyramid_are_one_tensor(target: Target) -> None:
    """Anchors, boxes and scores in a list or tuple of one tensor per level, each by itself or all together."""
    for batch in listed_batches(60_000, fuzz_cases(15)):
        arguments = to_device(batch.arguments, target.device) | {"backend": target.backend}
        expected = mg_ops.mutual_match(**arguments)
        names = arguments.keys() & {"anchors", "pred_boxes", "box_deltas", "cls_logits", "cls_probabilities"}
        levels = {name: arguments[name].tensor_split([3, 10], dim=-2) for name in sorted(names)}
        for name, value in levels.items():
            assert_same(mg_ops.mutual_match(**arguments | {name: list(value)}), expected, (name, batch))
        assert_same(mg_ops.mutual_match(**arguments | levels), expected, batch)


@pytest.mark.parametrize("strategy", ["iou", "localize_to_classify", "classify_to_localize"])
@pytest.mark.parametrize("form", FORMS)
def test_what_the_strategy_does_not_read_may_be_left_out(target: Target, strategy: str, form: str) -> None:
    """Without predictions the objects tell how many images there are. What would be read is what test_arguments.py
    demands."""
    unread = {
        "iou": ("pred_boxes", "box_deltas", "box_coder", "cls_logits", "cls_probabilities"),
        "localize_to_classify": ("cls_logits", "cls_probabilities"),
        "classify_to_localize": ("pred_boxes", "box_deltas", "box_coder"),
    }[strategy]
    for batch in listed_batches(70_000, fuzz_cases(15)):
        arguments = to_device(batch.arguments, target.device) | {"strategy": strategy, "backend": target.backend}
        lists = [
            arguments.pop("gt_boxes"),
            known_or_beyond(arguments.pop("gt_labels")),
            arguments.pop("gt_crowd", None),
        ]
        objects, _ = in_form(form, *lists)
        expected = mg_ops.mutual_match(**arguments, **objects)
        left = {name: value for name, value in arguments.items() if name not in unread}
        assert_same(mg_ops.mutual_match(**left, **objects), expected, batch)
        if strategy != "classify_to_localize" and form != "padded, labels tell":
            assert_same(mg_ops.mutual_match(**left, **without_labels(objects)), expected, batch)
            assert_same(mg_ops.mutual_match(**arguments, **without_labels(objects)), expected, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Labels that nobody reads


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_rule_that_reads_no_labels_needs_none(target: Target, form: str, dtype: torch.dtype) -> None:
    """With their values checked and without, and an image that has no object."""
    boxes = [torch.tensor([BOX, OTHER], dtype=dtype), torch.zeros(0, 4, dtype=dtype)]
    crowd = [torch.tensor([False, True]), torch.zeros(0, dtype=torch.bool)]
    objects, is_object = in_form(form, boxes, [torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64)], crowd)
    arguments = {"anchors": ANCHORS.to(target.device), "backend": target.backend}
    arguments |= to_device(without_labels(objects), target.device)
    if form == "padded, labels tell":
        with pytest.raises(ValueError, match=r"^gt_mask: of padded gt_boxes \(B, M, 4\), pass gt_mask or gt_labels to"):
            mg_ops.max_iou_match(**arguments)
        return
    logits = torch.zeros(2, 3, 0, device=target.device)  # of no classes, which no label could be one of
    for more in ({}, {"check": True}, {"check": True, "cls_logits": logits}):
        found = mg_ops.max_iou_match(**arguments, **more)
        first = 0 if is_object is None else int(is_object[0].nonzero()[0])
        assert found.cls_match.tolist() == [[first, -1, -2], [-1, -1, -1]]
        assert found.num_pos.sum() == 1 and found.num_pos.shape == ((2,) if is_object is None else is_object.shape)
    summary = mg_ops.summarize(found, **to_device(without_labels(objects), target.device))
    assert summary.num_objects[0] == summary.cls_positives[0] == 1


def test_labels_that_are_missing_or_of_some_images_alone_are_refused() -> None:
    """What is not read must be right where it is given."""
    target = {"boxes": torch.tensor([BOX]), "labels": torch.tensor([0])}
    for objects, error, message in (
        (
            {"gt_boxes": [target, {"boxes": target["boxes"]}]},
            TypeError,
            r"gt_boxes\[1\]: .* \"boxes\" and \"labels\", got",
        ),
        ({"gt_boxes": [{"labels": target["labels"]}]}, TypeError, r"gt_boxes\[0\]: expected a dictionary with"),
        (
            {"gt_boxes": [{"box": target["boxes"]}]},
            TypeError,
            r"gt_boxes\[0\]: expected a dictionary with \"boxes\", got",
        ),
        ({"gt_boxes": [target["boxes"]], "gt_labels": [torch.zeros(2)]}, ValueError, r"gt_labels\[0\]: expected shape"),
        (
            {"gt_boxes": [{"boxes": torch.zeros(0)}, {"boxes": target["boxes"], "iscrowd": torch.ones(1).int()}]},
            ValueError,
            r"gt_boxes\[0\]: .*reshape",
        ),
    ):
        with pytest.raises(error, match=f"^{message}"):
            mg_ops.max_iou_match(ANCHORS, **objects)


@pytest.mark.parametrize("match_of", [mg_ops.atss_match, mg_ops.max_iou_match, mg_ops.MutualMatcher(strategy="iou")])
def test_the_same_anchors_for_each_image_are_no_levels(match_of: Any) -> None:
    """What torchvision's anchor generators return; nothing else tells where no prediction is given."""
    objects = {"gt_boxes": [torch.tensor([BOX])] * 2}
    with pytest.raises(ValueError, match=r"^anchors: expected one tensor per feature level, got the same 3 .* of one$"):
        match_of([ANCHORS, ANCHORS.clone()], **objects)
    levels = [ANCHORS, ANCHORS + 1]
    assert match_of(levels, **objects).cls_match.shape == (2, 6)
    assert match_of([ANCHORS[:1]] * 2, **objects).cls_match.shape == (2, 2)  # two levels of one cell
    found = torch.compile(match_of, backend="eager", fullgraph=True)(levels, **objects)
    assert found.cls_match.shape == (2, 6)
