"""mg_ops::mutual_match_triton: allocates, and launches the kernels on the current stream of the tensors' device."""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mg_ops.reference import BACKGROUND, split_arguments
from mg_ops.triton.device import current
from mg_ops.triton.inputs import FLOATING_TYPES, boxes_type, packed_integers, packed_rows
from mg_ops.triton.mutual_match_kernels import (
    NUM_COUNTERS,
    claim_kernel,
    listed_orders,
    own_kernel,
    rank_kernel,
    scratch_bytes,
    settle_kernel,
)

CLAIM_BLOCK, CLAIM_WARPS = 128, 1
CLAIM_OPTIONS = {} if torch.version.hip else {"maxnreg": 144}
"""14 warps on a multiprocessor of an NVIDIA GPU where the 158 registers that ptxas would take leave room for 12. None
spills: the kernel holds a tile's anchors, boxes and owners in registers."""
OWN_BLOCK, OWN_WARPS = 512, 4
RANK_BLOCK, RANK_WARPS = 1024, 4
SETTLE_BLOCK, SETTLE_WARPS = 256, 4


def mutual_match(*arguments: Any, longest_list: int = 0x7FFFFFFF) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of packed objects on the current stream of their device.

    Args:
        arguments: of the operator.
        longest_list: objects with a longer list than this rank by scanning all anchors; the result is the same.

    Returns:
        cls_match (B, A) int64, loc_match (B, A) int64, num_pos (N,) int32, num_total (N,) int32.

    Raises:
        ValueError: anchors or objects that 31 bits cannot number.
    """
    inputs, options = split_arguments(arguments)
    anchors, pred_boxes, cls_scores, gt_boxes, gt_labels, gt_offsets, gt_crowd, box_coder, are_probabilities = inputs
    classification_by_regressed, localization_by_amplified, sigma, iou_positive, iou_ignored, crowd_overlap = options
    batch_size, num_anchors, num_classes = cls_scores.shape
    num_gt = gt_boxes.shape[0]
    device = anchors.device
    if num_anchors + num_gt > 0x7FFFFFFF - RANK_BLOCK:
        raise ValueError(f"backend 'triton' numbers anchors and objects with 31 bits, got {num_anchors} and {num_gt}")
    if batch_size == 0 or num_anchors == 0 or num_gt == 0:
        cls_match = torch.full((batch_size, num_anchors), BACKGROUND, dtype=torch.int64, device=device)
        counts = torch.zeros(num_gt, dtype=torch.int32, device=device)
        return cls_match, cls_match.clone(), counts, counts.clone()

    cls_match = torch.empty((batch_size, num_anchors), dtype=torch.int64, device=device)
    loc_match = torch.empty_like(cls_match)
    num_pos = torch.empty(num_gt, dtype=torch.int32, device=device)
    num_total = torch.empty_like(num_pos)
    num_qualities = 1 + classification_by_regressed + localization_by_amplified
    num_rankings = 2 if num_qualities > 1 else 1
    per_object = torch.zeros((3 + NUM_COUNTERS // 2) * num_gt, dtype=torch.int64, device=device)
    scratch = torch.empty(
        scratch_bytes(batch_size, num_anchors, num_gt, num_qualities), dtype=torch.uint8, device=device
    )

    # Small beside the predictions, which alone are read as they are.
    anchors, gt_boxes = packed_rows(anchors), packed_rows(gt_boxes)
    gt_labels, gt_offsets = packed_integers(gt_labels), packed_integers(gt_offsets)
    gt_crowd = None if gt_crowd is None else gt_crowd.contiguous()
    crowd = 0 if gt_crowd is None else gt_crowd.data_ptr()
    memory = scratch.data_ptr(), per_object.data_ptr()
    matches = cls_match.data_ptr(), loc_match.data_ptr()
    sizes = batch_size, num_anchors, num_gt
    decode = int(box_coder is not None)
    coder = box_coder or (1.0, 1.0, 1.0, 1.0, 0.0)  # without one it is never used
    strategy = classification_by_regressed, localization_by_amplified
    offsets = gt_offsets.data_ptr()
    objects = gt_boxes.data_ptr(), gt_labels.data_ptr(), offsets, crowd
    kind_of_boxes = boxes_type(pred_boxes)
    boxes_strides = pred_boxes.stride()
    listed = listed_orders(iou_ignored)
    with current(device):
        _launch(
            claim_kernel,
            device,
            batch_size * -(-num_anchors // CLAIM_BLOCK),
            (
                *memory,
                anchors.data_ptr(),
                pred_boxes.data_ptr(),
                cls_scores.data_ptr(),
                *objects,
                *sizes,
                num_classes,
                kind_of_boxes,
                FLOATING_TYPES[cls_scores.dtype],
                decode,
                int(are_probabilities),
                *boxes_strides,
                *cls_scores.stride(),
                *coder,
                sigma,
                iou_positive,
                iou_ignored,
                *listed,
            ),
            (*strategy, CLAIM_BLOCK),
            CLAIM_WARPS,
            **CLAIM_OPTIONS,
        )
        _launch(
            settle_kernel,
            device,
            batch_size,
            (*memory, offsets, *sizes, iou_positive, iou_ignored, *listed),
            (*strategy, SETTLE_BLOCK),
            SETTLE_WARPS,
        )
        _launch(
            own_kernel,
            device,
            batch_size * -(-num_anchors // OWN_BLOCK),
            (
                *matches,
                *memory,
                anchors.data_ptr(),
                pred_boxes.data_ptr(),
                objects[0],
                offsets,
                crowd,
                *sizes,
                kind_of_boxes,
                decode,
                *boxes_strides,
                *coder,
                crowd_overlap,
            ),
            (*strategy, OWN_BLOCK),
            OWN_WARPS,
        )
        _launch(
            rank_kernel,
            device,
            num_gt * num_rankings,
            (*matches, num_pos.data_ptr(), num_total.data_ptr(), *memory, offsets, *sizes, longest_list),
            (*strategy, RANK_BLOCK),
            RANK_WARPS,
        )
    return cls_match, loc_match, num_pos, num_total


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any,
    device: torch.device,
    num_programs: int,
    arguments: tuple[Any, ...],
    constants: tuple[bool, bool, int],
    num_warps: int,
    **options: int,
) -> None:
    """Launches a kernel on the device, which is the current one.

    Looking a kernel up by the types of all its arguments is most of what a launch costs in Triton. Here they are the
    same in every call, so only the first call of a strategy leaves it to Triton.
    """
    key = (kernel, device, constants, num_warps)
    compiled = _compiled.get(key)
    grid = (num_programs, 1, 1)
    if compiled is not None:
        compiled[grid](*arguments, *constants)
        return
    compiled = kernel[grid](*arguments, *constants, num_warps=num_warps, enable_fp_fusion=False, **options)
    if compiled is not None:  # the interpreter compiles nothing
        _compiled[key] = compiled
