"""mg_ops::mutual_match_triton: allocates, and launches the kernels on the current stream of the tensors' device."""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mg_ops.reference import BACKGROUND
from mg_ops.triton.mutual_match_kernels import NUM_COUNTERS, claim_kernel, own_kernel, rank_kernel, settle_kernel

CLAIM_BLOCK, CLAIM_WARPS = 128, 1
OWN_BLOCK, OWN_WARPS = 512, 4
RANK_BLOCK, RANK_WARPS = 1024, 4
SETTLE_BLOCK, SETTLE_WARPS = 256, 4


def mutual_match(
    anchors: Tensor,
    pred_boxes: Tensor,
    cls_scores: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    gt_crowd: Tensor | None,
    box_coder: Sequence[float] | None,
    scores_are_probabilities: bool,
    classification_by_regressed: bool,
    localization_by_amplified: bool,
    sigma: float,
    iou_positive: float,
    iou_ignored: float,
    crowd_overlap: float,
    longest_list: int = 0x7FFFFFFF,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of packed objects on the current stream of their device; takes what the operators take (csrc/schema.cpp).

    Args:
        longest_list: objects with a longer list than this rank by scanning all anchors; the result is the same.

    Returns:
        cls_match (B, A) int64, loc_match (B, A) int64, num_pos (N,) int32, num_total (N,) int32.

    Raises:
        ValueError: anchors or objects that 31 bits cannot number.
    """
    batch_size, num_anchors, num_classes = cls_scores.shape
    num_gt = gt_boxes.shape[0]
    device = anchors.device
    if max(num_anchors, num_gt) > 0x7FFFFFFF - RANK_BLOCK:
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
    per_object = torch.zeros((3 + NUM_COUNTERS // 2, num_gt), dtype=torch.int64, device=device)
    best, counters = per_object[:3], per_object[3:].view(torch.int32)
    keys = torch.empty((num_qualities, batch_size, num_anchors), dtype=torch.int64, device=device)
    list_entries = torch.empty((num_rankings, batch_size * num_anchors + num_gt), dtype=torch.int32, device=device)
    list_starts = torch.empty((num_rankings, num_gt), dtype=torch.int64, device=device)
    images_to_redo = torch.empty(batch_size, dtype=torch.int32, device=device)

    coder = tuple(box_coder or (1.0, 1.0, 1.0, 1.0, 0.0))  # without one it is never used
    # Small beside the predictions, which alone are read through strides.
    anchors, gt_boxes, gt_labels, gt_offsets = (x.contiguous() for x in (anchors, gt_boxes, gt_labels, gt_offsets))
    # Without crowds the pointer is never read.
    crowd = gt_labels if gt_crowd is None else gt_crowd.contiguous().view(torch.uint8)
    variant = {
        "REGRESSED": classification_by_regressed,
        "AMPLIFIED": localization_by_amplified,
        "enable_fp_fusion": False,
    }
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        num_tiles = triton.cdiv(num_anchors, CLAIM_BLOCK)
        claim_kernel[(batch_size * num_tiles,)](
            keys,
            best,
            counters,
            anchors,
            pred_boxes,
            cls_scores,
            gt_boxes,
            gt_labels,
            gt_offsets,
            crowd,
            batch_size,
            num_anchors,
            num_gt,
            num_classes,
            num_tiles,
            *pred_boxes.stride(),
            *cls_scores.stride(),
            coder,
            sigma,
            DECODE=box_coder is not None,
            PROBABILITIES=scores_are_probabilities,
            CROWD=gt_crowd is not None,
            BLOCK=CLAIM_BLOCK,
            num_warps=CLAIM_WARPS,
            **variant,
        )
        settle_kernel[(batch_size,)](
            keys,
            best,
            counters,
            list_starts,
            images_to_redo,
            gt_offsets,
            batch_size,
            num_anchors,
            num_gt,
            BLOCK=SETTLE_BLOCK,
            num_warps=SETTLE_WARPS,
            **variant,
        )
        num_tiles = triton.cdiv(num_anchors, OWN_BLOCK)
        own_kernel[(batch_size * num_tiles,)](
            cls_match,
            loc_match,
            keys,
            best,
            counters,
            list_starts,
            list_entries,
            images_to_redo,
            anchors,
            pred_boxes,
            gt_boxes,
            gt_offsets,
            crowd,
            batch_size,
            num_anchors,
            num_gt,
            num_tiles,
            *pred_boxes.stride(),
            coder,
            iou_positive,
            iou_ignored,
            crowd_overlap,
            DECODE=box_coder is not None,
            CROWD=gt_crowd is not None,
            BLOCK=OWN_BLOCK,
            num_warps=OWN_WARPS,
            **variant,
        )
        rank_kernel[(num_gt * num_rankings,)](
            cls_match,
            loc_match,
            num_pos,
            num_total,
            keys,
            best,
            counters,
            list_starts,
            list_entries,
            gt_offsets,
            batch_size,
            num_anchors,
            num_gt,
            longest_list,
            BLOCK=RANK_BLOCK,
            num_warps=RANK_WARPS,
            **variant,
        )
    return cls_match, loc_match, num_pos, num_total
