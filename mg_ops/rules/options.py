"""What the options of the rules may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

from torch import Tensor

from mg_ops.checks import MAX_COUNT, MAX_FLOAT, check_iou_thresholds, check_number, check_threshold, describe

MAX_K = 128
"""The most anchors that an object selects; csrc/ranked.h."""
CONFLICT = ("selecting", "inside", "all")
"""Which objects a contested anchor may belong to; the operator takes the place in this list."""
MAX_LEVELS = 16
"""Of the rule that selects by feature level; csrc/atss.h."""
MAX_EXPONENT = 64.0

LOW_QUALITY = ("none", "keep_owner", "take_all", "take_first")
"""What an object does with its best anchors; the operator takes the place in this list."""
SIMOTA_CANDIDATES = ("box_or_center", "center")
"""What of an object a candidate is near; likewise."""


def check_max_iou_options(
    iou_positive: object, iou_ignored: object, low_quality: object, iou_low_quality: object, crowd_overlap: object
) -> tuple[float, float, int, float, float]:
    """Raises unless they are the options of the operator `max_iou_match`; returns them, the numbers as floats."""
    iou_positive, iou_ignored, crowd_overlap = check_iou_thresholds(iou_positive, iou_ignored, crowd_overlap)
    low_quality = check_count("low_quality", low_quality, 0, len(LOW_QUALITY) - 1)
    iou_low_quality = check_from_zero("iou_low_quality", iou_low_quality, 1.0, "a threshold in [0, 1]")
    return iou_positive, iou_ignored, low_quality, iou_low_quality, crowd_overlap


def check_from_zero(name: str, value: object, high: float, range_text: str) -> float:
    """Raises unless value is 0, or a number up to `high` that float32 does not round to 0; returns the float."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0:
        return 0.0
    return check_number(name, value, 0.0, high, range_text)


def check_choice(name: str, value: object, choices: Sequence[str]) -> int:
    """Raises ValueError unless value is one of the choices; returns its place."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return choices.index(value)


def check_count(name: str, value: object, low: int, high: int) -> int:
    """Raises unless value is an integer in this range; returns it."""
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, (bool, Tensor)) or not isinstance(value, SupportsIndex):  # which takes 10 us to ask
            raise TypeError(f"{name}: expected an integer from {low} to {high}, got {describe(value)}")
        value = value.__index__()  # NumPy has integers of its own
    if not low <= value <= high:
        raise ValueError(f"{name}: expected an integer from {low} to {high}, got {value}")
    return value


def check_task_aligned_options(
    alpha: object,
    beta: object,
    k: object,
    k_after_conflict: object,
    by_ciou: bool,
    inside_first: bool,
    conflict: object,
    minimum_side: object,
    center_margin: object,
    epsilon: object,
    crowd_overlap: object,
) -> tuple[float, float, int, int, bool, bool, int, float, float, float, float]:
    """Raises unless they are the options of the operator `task_aligned_match`; returns them, the numbers as floats."""
    # Spelled out: torch.compile(dynamic=True) would take the number for a symbol.
    exponent, length = "an exponent in [0, 64]", "a finite number of at least 0"
    return (
        check_from_zero("alpha", alpha, MAX_EXPONENT, exponent),
        check_from_zero("beta", beta, MAX_EXPONENT, exponent),
        check_count("k", k, 1, MAX_K),
        check_count("k_after_conflict", k_after_conflict, 0, MAX_K),
        by_ciou,
        inside_first,
        check_count("conflict", conflict, 0, len(CONFLICT) - 1),
        check_from_zero("minimum_side", minimum_side, MAX_FLOAT, length),
        check_from_zero("center_margin", center_margin, MAX_FLOAT, length),
        check_from_zero("epsilon", epsilon, MAX_FLOAT, length),
        check_threshold("crowd_overlap", crowd_overlap),
    )


def check_simota_options(
    k: object,
    center_radius: object,
    iou_weight: object,
    cls_weight: object,
    candidates: int,
    crowd_overlap: object,
) -> tuple[int, float, float, float, int, float]:
    """Raises unless they are the options of the operator `simota_match`; returns them, the numbers as floats."""
    return (
        check_count("k", k, 1, MAX_K),
        check_not_negative("center_radius", center_radius),
        check_not_negative("iou_weight", iou_weight),
        check_not_negative("cls_weight", cls_weight),
        check_count("candidates", candidates, 0, len(SIMOTA_CANDIDATES) - 1),
        check_threshold("crowd_overlap", crowd_overlap),
    )


def check_dynamic_soft_label_options(
    k: object, soft_center_radius: object, iou_weight: object, crowd_overlap: object
) -> tuple[int, float, float, float]:
    """Raises unless they are the options of `dynamic_soft_label_match`; returns them, the numbers as floats."""
    return (
        check_count("k", k, 1, MAX_K),
        check_not_negative("soft_center_radius", soft_center_radius),
        check_not_negative("iou_weight", iou_weight),
        check_threshold("crowd_overlap", crowd_overlap),
    )


def check_dynamic_mutual_options(
    by_regressed: bool, by_amplified: bool, k: object, sigma: object, crowd_overlap: object
) -> tuple[bool, bool, int, float, float]:
    """Raises unless they are the options of `dynamic_mutual_match`; returns them, the numbers as floats."""
    return (
        by_regressed,
        by_amplified,
        check_count("k", k, 1, MAX_K),
        check_number("sigma", sigma, 0.0, MAX_FLOAT, "a finite number above 0"),
        check_threshold("crowd_overlap", crowd_overlap),
    )


def check_not_negative(name: str, value: object) -> float:
    """Raises unless value is a finite number of at least 0; returns the float."""
    return check_from_zero(name, value, MAX_FLOAT, "a finite number of at least 0")


def check_level_sizes(value: object) -> tuple[int, ...]:
    """Raises unless they are numbers of anchors, one a level; returns them."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"level_sizes: expected a list of numbers of anchors, one a level, got {describe(value)}")
    if len(value) > MAX_LEVELS:
        raise ValueError(f"level_sizes: expected at most {MAX_LEVELS} levels, got {len(value)}")
    for level, size in enumerate(value):
        check_count(f"level_sizes[{level}]", size, 0, MAX_COUNT)
    return tuple(map(int, value))


def check_atss_options(
    level_sizes: object, k: object, center_margin: object, crowd_overlap: object
) -> tuple[tuple[int, ...], int, float | None, float]:
    """Raises unless they are the options of the operator `atss_match`; returns them, the numbers as floats."""
    if center_margin is not None:
        expected = "None or a finite number of at least 0"
        center_margin = check_from_zero("center_margin", center_margin, MAX_FLOAT, expected)
    return (
        check_level_sizes(level_sizes),
        check_count("k", k, 1, MAX_K),
        center_margin,
        check_threshold("crowd_overlap", crowd_overlap),
    )


def check_level_sum(num_anchors: int, level_sizes: Sequence[int]) -> None:
    """Raises ValueError unless the levels' anchors are all anchors."""
    if sum(level_sizes) != num_anchors:
        raise ValueError(
            f"level_sizes: expected a sum of {num_anchors}, the number of anchors, got {sum(level_sizes)} "
            f"of {len(level_sizes)} levels"
        )
