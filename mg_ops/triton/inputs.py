"""csrc/problem.h's inputs in Triton: arrays by their address, predictions of any floating type and strides.

A kernel takes addresses and the types as plain integers, so that one compilation serves all dtypes and alignments:
Triton compiles a kernel anew for each dtype, and for each alignment, of each tensor it is given.
"""

# Triton compiles these functions, and takes no annotations on their tensors.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-calls=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from mg_ops.triton.box import Box, load_columns, load_rows

_FLOAT32 = tl.constexpr(0)
_FLOAT16 = tl.constexpr(1)
_BFLOAT16 = tl.constexpr(2)
_FLOAT64 = tl.constexpr(3)
_ROWS = tl.constexpr(4)  # added: the last dimension is contiguous, and a row of four is read by one aligned load
FLOATING_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


def boxes_type(boxes: Tensor) -> int:
    """How `load_boxes` reads boxes (B, A, 4)."""
    stride_image, stride_row, stride_column = boxes.stride()
    size = boxes.element_size()
    rows = (
        size < 8
        and stride_column == 1
        and not stride_row % 4
        and not stride_image % 4
        and not boxes.data_ptr() % (4 * size)
    )
    return FLOATING_TYPES[boxes.dtype] + 4 * rows


def packed_rows(boxes: Tensor) -> Tensor:
    """Boxes (n, 4) as float32 rows that lie one after the other, aligned to 16 bytes; copied only where they do not."""
    boxes = _packed(boxes, torch.float32)
    return boxes.clone() if boxes.data_ptr() % 16 else boxes


def packed_integers(values: Tensor) -> Tensor:
    """Integers (n,) as int64 that lie one after the other; copied only where they do not."""
    return _packed(values, torch.int64)


def _packed(values: Tensor, dtype: torch.dtype) -> Tensor:
    # A question costs less than a conversion that does nothing.
    return values if values.dtype is dtype and values.is_contiguous() else values.to(dtype).contiguous()


# A hint on what a function returns is lost when Triton inlines that function: the alignment, in bytes, goes in.


@triton.jit
def array(address, DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr = 1):
    """Pointer to numbers of a type at an address."""
    return tl.multiple_of(address.to(tl.int64).to(tl.pointer_type(DTYPE)), ALIGNMENT)


@triton.jit
def load_numbers(address, offsets, mask, floating_type):
    """Numbers of a floating type at offsets from an address, as float32; zeros where the mask is off."""
    if floating_type == _FLOAT32:
        numbers = tl.load(array(address, tl.float32) + offsets, mask=mask, other=0)
    elif floating_type == _FLOAT16:
        numbers = tl.load(array(address, tl.float16) + offsets, mask=mask, other=0).to(tl.float32)
    elif floating_type == _BFLOAT16:
        numbers = tl.load(array(address, tl.bfloat16) + offsets, mask=mask, other=0).to(tl.float32)
    else:
        numbers = tl.load(array(address, tl.float64) + offsets, mask=mask, other=0).to(tl.float32)
    return numbers


@triton.jit
def load_boxes(address, image, row, strides, mask, boxes_type):
    """Boxes of an image as float32, of what `boxes_type` says; zeros where the mask is off."""
    stride_image, stride_row, stride_column = strides
    row = row.to(tl.int64)
    offsets = image * stride_image + row * stride_row
    aligned = 4 * (image * (stride_image >> 2) + row * (stride_row >> 2))  # the same, seen to be a multiple of 4
    if boxes_type == _FLOAT32 + _ROWS:
        x1, y1, x2, y2 = load_rows(array(address, tl.float32, 16) + aligned, mask)
    elif boxes_type == _FLOAT16 + _ROWS:
        x1, y1, x2, y2 = load_rows(array(address, tl.float16, 8) + aligned, mask)
    elif boxes_type == _BFLOAT16 + _ROWS:
        x1, y1, x2, y2 = load_rows(array(address, tl.bfloat16, 8) + aligned, mask)
    elif boxes_type == _FLOAT32:
        x1, y1, x2, y2 = load_columns(array(address, tl.float32) + offsets, stride_column, mask)
    elif boxes_type == _FLOAT16:
        x1, y1, x2, y2 = load_columns(array(address, tl.float16) + offsets, stride_column, mask)
    elif boxes_type == _BFLOAT16:
        x1, y1, x2, y2 = load_columns(array(address, tl.bfloat16) + offsets, stride_column, mask)
    else:
        x1, y1, x2, y2 = load_columns(array(address, tl.float64) + offsets, stride_column, mask)
    return Box(x1, y1, x2, y2)
