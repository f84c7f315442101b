"""What the options of the rules may be."""

from __future__ import annotations

from mg_ops.checks import check_iou_thresholds, check_threshold

LOW_QUALITY = ("none", "keep_owner", "take_all", "take_first")
"""What an object does with its best anchors; the operator takes the place in this list."""


def check_low_quality(value: object) -> int:
    """Raises ValueError unless it is the name of a low-quality rule; returns its place."""
    if not isinstance(value, str) or value not in LOW_QUALITY:
        raise ValueError(f"low_quality: expected one of {', '.join(map(repr, LOW_QUALITY))}, got {value!r}")
    return LOW_QUALITY.index(value)


def check_max_iou_options(
    iou_positive: object, iou_ignored: object, low_quality: int, iou_low_quality: object, crowd_overlap: object
) -> tuple[float, float, int, float, float]:
    """Raises unless they are the options of the operator `max_iou_match`; returns them, the numbers as floats."""
    iou_positive, iou_ignored, crowd_overlap = check_iou_thresholds(iou_positive, iou_ignored, crowd_overlap)
    if not 0 <= low_quality < len(LOW_QUALITY):
        raise ValueError(f"low_quality: expected an integer from 0 to {len(LOW_QUALITY) - 1}, got {low_quality}")
    if isinstance(iou_low_quality, bool) or iou_low_quality != 0:
        iou_low_quality = check_threshold("iou_low_quality", iou_low_quality)
    return iou_positive, iou_ignored, low_quality, float(iou_low_quality), crowd_overlap
