"""What `mutual_match` accepts, and the messages of what it does not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mg_ops.reference import Inputs

MAX_FLOAT = torch.finfo(torch.float32).max
MAX_COUNT = 2**31 - 1
"""Of anchors, objects and classes: kernels number them in 32 bits."""

DTYPES: dict[str, tuple[set[torch.dtype], str]] = {
    "floating point": (
        {torch.float16, torch.bfloat16, torch.float32, torch.float64},
        "float16, bfloat16, float32 or float64",
    ),
    "integer": ({torch.int64, torch.int32}, "int64 or int32"),
    "int64": ({torch.int64}, "int64"),
    "label": (
        {torch.int64, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64},
        "int64, int32 or floating point",
    ),
    "bool": ({torch.bool}, "bool"),
    "flag": ({torch.bool, torch.uint8, torch.int32, torch.int64}, "bool, uint8, int32 or int64"),
}
"""What each kind of tensor may hold, and how a message says it."""


def describe(value: object) -> str:
    """A value as an error message shows it: a tensor by dtype, shape and device, anything else by its type."""
    if isinstance(value, Tensor):
        if value.is_nested:  # which may have no shape
            return f"a nested {value.dtype} tensor on {value.device}"
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__}"


def check_tensor(
    name: str,
    value: object,
    kind: str,
    shape: tuple[int | str, ...],
    device: torch.device | None,
    device_of: str = "anchors",
) -> Tensor:
    """Raises unless value is a tensor of this kind, shape and device.

    Args:
        kind: a key of `DTYPES`.
        shape: a string names a size that may be anything; "..." at the beginning is any number of them.
        device_of: the argument whose device it is.
    """
    if not isinstance(value, Tensor):
        article = "an" if kind.startswith("int") else "a"
        raise TypeError(f"{name}: expected {article} {kind} tensor, got {describe(value)}")
    dtypes, allowed = DTYPES[kind]
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {allowed}, got {describe(value)}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got {describe(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    actual = value.shape
    wanted = shape
    if shape[0] == "...":
        wanted = shape[1:]
        actual = actual[max(0, len(actual) - len(wanted)) :]
    fits = len(actual) == len(wanted)
    for size, actual_size in zip(wanted, actual, strict=False):
        fits = fits and (isinstance(size, str) or size == actual_size)
    if not fits:
        text = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name}: expected shape ({text}), got {describe(value)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, like {device_of}, got {describe(value)}")
    if not _holds_its_elements(value):
        raise ValueError(
            f"{name}: its memory of {value.untyped_storage().nbytes()} bytes does not hold what its shape and strides "
            f"say (has its storage been resized, or freed by something that shards parameters?), got {describe(value)}"
        )
    return value


def is_readable(tensor: Tensor) -> bool:
    """Whether the tensor's memory holds all its elements: torch itself would read past its end."""
    try:
        num_bytes = tensor.untyped_storage().nbytes()
    except RuntimeError:  # inside torch.func's transforms
        return True
    num_elements = tensor.numel()
    if num_elements == 0:
        return True
    last = tensor.storage_offset()
    if tensor.is_contiguous():
        last += num_elements - 1
    else:
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            last += (size - 1) * stride
    return bool((last + 1) * tensor.element_size() <= num_bytes)


def _holds_its_elements(tensor: Tensor) -> bool:
    """As `is_readable`, for tensors of any kind: of some, the memory is their own affair."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return True
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or is_readable(tensor)


def join_levels(name: str, levels: Any) -> Any:
    """One tensor of all feature levels; what is no list of them comes back as it is, for others to check.

    Raises:
        TypeError, ValueError: naming the level.
    """
    if not isinstance(levels, (list, tuple)):
        return levels
    if not levels:
        raise ValueError(f"{name}: expected one tensor, or one tensor per feature level, got none")
    for index, level in enumerate(levels):
        check_tensor(f"{name}[{index}]", level, "floating point", ("...", "A", "width"), None)
    wanted = levels[0]
    for index, level in enumerate(levels):
        is_alike = (*level.shape[:-2], level.shape[-1]) == (*wanted.shape[:-2], wanted.shape[-1])
        if not is_alike or level.device != wanted.device:
            raise ValueError(
                f"{name}[{index}]: expected the shape and device of {name}[0], {describe(wanted)}, but for the number "
                f"of anchors, got {describe(level)}"
            )
    return torch.cat(tuple(levels), -2)


def check_levels_are_of_one_image(levels: object, name: str, prediction: object) -> None:
    """Raises ValueError if the levels' anchors look like those of several images, as torchvision's generators return.

    Args:
        levels: the anchors as given.
        name: what the caller calls the prediction.
        prediction: (B, A, ...).
    """
    if not isinstance(levels, (list, tuple)) or not isinstance(prediction, Tensor) or prediction.dim() < 2:
        return
    counts = {len(level) for level in levels}
    if len(levels) > 1 and counts == {prediction.shape[1]}:
        raise ValueError(
            f"anchors: expected one tensor per feature level, {prediction.shape[1]} anchors in all like {name}, got "
            f"{len(levels)} tensors of as many each; if they are those of {len(levels)} images, pass those of one"
        )


def check_levels_are_not_images(levels: object, num_images: int, check: bool) -> None:
    """Raises ValueError if anchors without predictions beside them are a list of the same tensor for each image.

    Args:
        levels: the anchors as given.
        num_images: of the objects.
        check: whether a GPU may be waited for.
    """
    if not isinstance(levels, (list, tuple)) or not len(levels) == num_images > 1:
        return
    first, *others = levels
    shown = type(first).__torch_dispatch__ is Tensor.__torch_dispatch__ and not torch.compiler.is_compiling()
    if first.device.type != "meta" and (first.is_cpu or check) and shown:
        if len(first) > 1 and all(torch.equal(first, other) for other in others):
            raise ValueError(
                f"anchors: expected one tensor per feature level, got the same {len(first)} anchors {num_images} "
                f"times; if they are those of {num_images} images, pass those of one"
            )


def check_bool(name: str, value: object) -> bool:
    """Raises TypeError unless value is True or False; returns it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return value


def check_num_classes(value: object) -> None:
    """Raises unless value is a number of classes."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"num_classes: expected an integer or None, got {describe(value)}")
    if value < 0:
        raise ValueError(f"num_classes: expected at least 0, got {value}")
    if value > MAX_COUNT:
        raise ValueError(f"num_classes: expected at most {MAX_COUNT}")


def is_in_range(number: float, low: float, high: float) -> bool:
    """What every number must be: low < number <= high, as given and as the normal float32 it is rounded to.

    Args:
        low: 0 or 1.
    """
    # The largest double that float32 rounds to 1 is 1 + 2^-24, the smallest that it rounds to its smallest normal
    # number, 2^-126, is 2^-126 - 2^-150. NaN fails every comparison.
    return low * (1 + 2.0**-24) < number <= high and number >= 2.0**-126 - 2.0**-150


def check_number(name: str, value: object, low: float, high: float, low_text: str) -> float:
    """Raises unless value is a number in this range (`is_in_range`); returns the float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected {low_text}, got an integer that no float holds") from None
    if not is_in_range(number, low, high):
        raise ValueError(f"{name}: expected {low_text}, got {value!r}")
    return number


def check_thresholds(
    sigma: object, iou_positive: object, iou_ignored: object, crowd_overlap: object
) -> tuple[float, float, float, float]:
    """Raises unless sigma is above 1 and the thresholds are in (0, 1], ignored not above positive; returns floats."""
    sigma = check_number("sigma", sigma, 1.0, MAX_FLOAT, "a finite number above 1")
    return sigma, *check_iou_thresholds(iou_positive, iou_ignored, crowd_overlap)


def check_threshold(name: str, value: object) -> float:
    """Raises unless value is in (0, 1]; returns the float."""
    return check_number(name, value, 0.0, 1.0, "a threshold in (0, 1]")


def check_iou_thresholds(
    iou_positive: object, iou_ignored: object, crowd_overlap: object
) -> tuple[float, float, float]:
    """Raises unless the thresholds are in (0, 1], ignored not above positive; returns floats."""
    iou_positive = check_threshold("iou_positive", iou_positive)
    iou_ignored = check_threshold("iou_ignored", iou_ignored)
    crowd_overlap = check_threshold("crowd_overlap", crowd_overlap)
    if iou_ignored > iou_positive:
        raise ValueError(f"iou_ignored: must not exceed iou_positive ({iou_positive}), got {iou_ignored}")
    return iou_positive, iou_ignored, crowd_overlap


def check_predictions(
    anchors: object,
    pred_boxes: object,
    cls_scores: object,
    boxes_name: str = "pred_boxes",
    scores_name: str = "cls_scores",
) -> tuple[int | None, torch.device]:
    """Raises unless they are (A, 4), (B, A, 4) and (B, A, C), floating, on one device; returns B and the device.

    Args:
        pred_boxes: None where there are none, like cls_scores. B is None where there are neither.
        boxes_name: what the caller calls pred_boxes.
        scores_name: what the caller calls cls_scores.
    """
    anchors = check_tensor("anchors", anchors, "floating point", ("A", 4), None)
    device = anchors.device
    num_anchors = anchors.shape[0]
    batch_size = None
    if cls_scores is not None:
        cls_scores = check_tensor(scores_name, cls_scores, "floating point", ("B", num_anchors, "C"), device)
        batch_size = cls_scores.shape[0]
    if pred_boxes is not None:
        of_boxes: tuple[int | str, ...] = ("B" if batch_size is None else batch_size, num_anchors, 4)
        batch_size = check_tensor(boxes_name, pred_boxes, "floating point", of_boxes, device).shape[0]
    check_count("anchors", num_anchors)
    return batch_size, device


def check_count(name: str, count: int) -> None:
    """Raises ValueError if there are more anchors or objects than kernels can number."""
    if count > MAX_COUNT:
        raise ValueError(f"{name}: expected at most {MAX_COUNT}, got {count}")


def check_packed_objects(
    gt_boxes: object,
    gt_labels: object,
    gt_offsets: object,
    gt_crowd: object,
    batch_size: int,
    device: torch.device,
    labels_kind: str = "integer",
    labels_optional: bool = False,
) -> None:
    """Raises unless they are (N, 4), (N,), (B + 1,) and (N,) or None on this device."""
    gt_boxes = check_tensor("gt_boxes", gt_boxes, "floating point", ("N", 4), device)
    num_gt = gt_boxes.shape[0]
    if gt_labels is not None or not labels_optional:
        check_tensor("gt_labels", gt_labels, labels_kind, (num_gt,), device)
    check_tensor("gt_offsets", gt_offsets, "integer", (batch_size + 1,), device)
    if gt_crowd is not None:
        check_tensor("gt_crowd", gt_crowd, "bool", (num_gt,), device)
    check_count("gt_boxes", num_gt)


def check_objects(
    gt_boxes: object, gt_labels: object, gt_offsets: object, gt_crowd: object, batch_size: int, device: torch.device
) -> None:
    """Raises unless they are the objects of a batch in a form that `mg_ops.mutual_match` takes, on this device.

    Labels are checked where they are given.
    """
    if isinstance(gt_boxes, Tensor):
        if gt_offsets is None:
            raise ValueError(
                "gt_offsets: packed gt_boxes (N, 4) need gt_offsets (B + 1,); "
                "without offsets pass gt_boxes as a list of B tensors (G, 4), or padded (B, M, 4)"
            )
        check_packed_objects(
            gt_boxes, gt_labels, gt_offsets, gt_crowd, batch_size, device, "label", labels_optional=True
        )
        if isinstance(gt_offsets, Tensor) and device.type == "cpu" and not torch.compiler.is_compiling():
            check_offsets(gt_offsets, gt_boxes.shape[0])
        return
    if gt_offsets is not None:
        raise ValueError(
            "gt_offsets: only packed gt_boxes (N, 4) take offsets, got gt_boxes as a list; pass gt_offsets=None"
        )
    boxes = check_list("gt_boxes", gt_boxes, batch_size)
    labels = None if gt_labels is None else check_list("gt_labels", gt_labels, batch_size)
    crowd = None if gt_crowd is None else check_list("gt_crowd", gt_crowd, batch_size)
    num_gt = 0
    for image in range(batch_size):
        num_objects = check_boxes_of_image(image, boxes[image], device).shape[0]
        if labels is not None:
            check_tensor(f"gt_labels[{image}]", labels[image], "label", (num_objects,), device)
        if crowd is not None:
            check_tensor(f"gt_crowd[{image}]", crowd[image], "bool", (num_objects,), device)
        num_gt += num_objects
    check_count("gt_boxes", num_gt)


def check_boxes_of_image(image: int, boxes: object, device: torch.device | None) -> Tensor:
    """Raises unless they are the boxes (G, 4) of one image in a list of them."""
    if isinstance(boxes, Tensor) and boxes.dim() == 1 and boxes.numel() == 0:
        raise ValueError(
            f"gt_boxes[{image}]: expected shape (G, 4), got {describe(boxes)}; "
            "for an image without objects pass .reshape(-1, 4)"
        )
    return check_tensor(f"gt_boxes[{image}]", boxes, "floating point", ("G", 4), device)


def check_list(name: str, value: object, batch_size: int) -> Sequence[Tensor]:
    """Raises unless value is a sequence of one element per image; their tensors are not looked at."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(
            f"{name}: expected a list of {batch_size} tensors, one per image, like gt_boxes, got {describe(value)}"
        )
    if len(value) != batch_size:
        raise ValueError(f"{name}: expected a list of {batch_size} tensors, one per image, got {len(value)}")
    return value


def check_offsets(gt_offsets: Tensor, num_gt: int) -> None:
    """Raises ValueError unless the offsets start at 0, never decrease and stay within the num_gt objects."""
    offsets = gt_offsets.tolist()
    if offsets[0] != 0:
        raise ValueError(f"gt_offsets: must start at 0, got {offsets[0]}")
    for image, (start, end) in enumerate(itertools.pairwise(offsets)):
        if end < start:
            raise ValueError(f"gt_offsets: must not decrease, got {start} then {end} for image {image}")
    if offsets[-1] > num_gt:
        raise ValueError(f"gt_offsets: must not exceed the {num_gt} packed objects, got {offsets[-1]}")


def check_operator_inputs(inputs: Inputs) -> None:
    """The checks of csrc/check.h, for the operators that are written in Python; not of the offsets' values."""
    anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd, box_coder, _ = inputs
    for name, value in (("pred_boxes", pred_boxes), ("cls_scores", cls_scores)):
        check_tensor(name, value, "floating point", ("B", "A", "C"), None)
    batch_size, device = check_predictions(anchors, pred_boxes, cls_scores)
    assert batch_size is not None
    check_packed_objects(gt_boxes, gt_labels, gt_offsets, gt_crowd, batch_size, device)
    if box_coder is not None:
        if len(box_coder) != 5:
            raise ValueError(
                f"box_coder: expected five numbers, the weights of x, y, w and h and the clip, got {len(box_coder)}"
            )
        for weight in box_coder[:4]:
            if not is_in_range(abs(weight), 0.0, MAX_FLOAT):
                raise ValueError(f"box_coder: expected weights that are finite numbers other than 0, got {weight}")
        if box_coder[4] != box_coder[4]:
            raise ValueError("box_coder: expected a number as clip, got NaN")
