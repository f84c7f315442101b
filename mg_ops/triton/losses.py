"""The losses' operators in Triton, mg_ops::class_loss_triton and so on: torch.compile sees through to their kernels.

Importing this registers them, which takes a second: `mg_ops.losses` does so with the first call that needs them.
"""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor
from torch.library import triton_op, wrap_triton

from mg_ops.checks import check_tensor, describe
from mg_ops.library import LOSS_OPERATORS
from mg_ops.loss_definitions import BOX_LOSSES
from mg_ops.losses import register_autograd
from mg_ops.triton.box_loss_kernels import box_loss_kernel, distribution_loss_kernel
from mg_ops.triton.class_loss_kernel import class_loss_kernel
from mg_ops.triton.device import current

CLASS_LOSS_BLOCK = 1024  # logits
BOX_LOSS_BLOCK = 256  # anchors
DISTRIBUTION_LOSS_BLOCK = 1024  # logits
WARPS = 4


def _result(grad_output: Tensor | None, predictions: Tensor, num_programs: int) -> Tensor:
    """Room for the gradient, or without grad_output for a part of the loss a program."""
    if grad_output is None:
        return predictions.new_empty(num_programs, dtype=torch.float32)
    if grad_output.dim():
        raise ValueError(f"grad_output: expected shape (), got {describe(grad_output)}")
    return torch.empty_like(predictions, memory_format=torch.contiguous_format)


def _run_class_loss(
    grad_output: Tensor | None,
    logits: Tensor,
    class_targets: Tensor,
    soft_targets: Tensor | None,
    positive_weight: float,
    positive_gamma: float,
    negative_weight: float,
    negative_gamma: float,
    weigh_by_target: bool,
) -> Tensor:
    shape = check_tensor("cls_logits", logits, "floating point", ("B", "A", "C"), None).shape
    check_tensor("class_targets", class_targets, "int64", shape[:2], logits.device, "cls_logits")
    if soft_targets is not None:
        check_tensor("soft_targets", soft_targets, "floating point", shape[:2], logits.device, "cls_logits")
    num_programs = -(-logits.numel() // CLASS_LOSS_BLOCK)
    result = _result(grad_output, logits, num_programs)
    if num_programs:
        with current(logits.device):
            wrap_triton(class_loss_kernel)[(num_programs,)](
                logits,
                class_targets.contiguous(),
                class_targets if soft_targets is None else soft_targets.contiguous(),
                class_targets if grad_output is None else grad_output,
                result,
                logits.numel(),
                shape[1],
                shape[2],
                *logits.stride(),
                positive_weight,
                positive_gamma,
                negative_weight,
                negative_gamma,
                HAS_SOFT_TARGETS=soft_targets is not None,
                WEIGH_BY_TARGET=weigh_by_target,
                EXPONENT=int(negative_gamma) if negative_gamma in (0, 1, 2) else 3,
                CONTIGUOUS=logits.is_contiguous(),
                GRADIENT=grad_output is not None,
                BLOCK=CLASS_LOSS_BLOCK,
                num_warps=WARPS,
            )
    return result


def _check_positives(
    width: int,
    predictions: Tensor,
    anchors: Tensor,
    match: Tensor,
    gt_boxes: Tensor,
    gt_offsets: Tensor,
    weights: Tensor | None,
) -> None:
    device = check_tensor("predictions", predictions, "floating point", ("B", "A", width), None).device
    batch_size, num_anchors = predictions.shape[:2]
    check_tensor("anchors", anchors, "floating point", (num_anchors, 4), device, "predictions")
    check_tensor("match", match, "int64", (batch_size, num_anchors), device, "predictions")
    check_tensor("gt_boxes", gt_boxes, "floating point", ("N", 4), device, "predictions")
    check_tensor("gt_offsets", gt_offsets, "integer", (batch_size + 1,), device, "predictions")
    if weights is not None:
        check_tensor("weights", weights, "floating point", (batch_size, num_anchors), device, "predictions")


def _positives(
    predictions: Tensor, anchors: Tensor, match: Tensor, gt_boxes: Tensor, gt_offsets: Tensor, weights: Tensor | None
) -> tuple[Tensor, ...]:
    """As the kernels read them; without weights the place of theirs is not read."""
    return (
        predictions,
        anchors.float().contiguous(),
        match.contiguous(),
        gt_boxes.float().contiguous(),
        gt_offsets.contiguous(),
        match if weights is None else weights.contiguous(),
    )


def _run_box_loss(
    grad_output: Tensor | None,
    predictions: Tensor,
    anchors: Tensor,
    match: Tensor,
    gt_boxes: Tensor,
    gt_offsets: Tensor,
    weights: Tensor | None,
    box_coder: list[float] | None,
    loss: int,
    alpha: float,
    gamma: float,
    beta: float,
) -> Tensor:
    _check_positives(4, predictions, anchors, match, gt_boxes, gt_offsets, weights)
    num_rows = match.numel()
    num_programs = -(-num_rows // BOX_LOSS_BLOCK)
    result = _result(grad_output, predictions, num_programs)
    if num_programs:
        with current(predictions.device):
            wrap_triton(box_loss_kernel)[(num_programs,)](
                *_positives(predictions, anchors, match, gt_boxes, gt_offsets, weights),
                match if grad_output is None else grad_output,
                result,
                num_rows,
                anchors.shape[0],
                gt_boxes.shape[0],
                *predictions.stride(),
                *(box_coder or (1.0, 1.0, 1.0, 1.0, 0.0)),  # without one it is never used
                alpha,
                gamma,
                beta,
                math.expm1(gamma / alpha) if "balanced" in BOX_LOSSES[loss] else 1.0,
                HAS_WEIGHTS=weights is not None,
                DECODE=box_coder is not None,
                LOSS=loss,
                GRADIENT=grad_output is not None,
                BLOCK=BOX_LOSS_BLOCK,
                num_warps=WARPS,
            )
    return result


def _run_distribution_loss(
    grad_output: Tensor | None,
    predictions: Tensor,
    anchors: Tensor,
    match: Tensor,
    gt_boxes: Tensor,
    gt_offsets: Tensor,
    weights: Tensor | None,
    strides: Tensor,
    margin: float,
) -> Tensor:
    num_bins = predictions.shape[-1] // 4
    if num_bins < 2:
        raise ValueError(f"predictions: expected shape (B, A, 4 * R) with R >= 2, got {describe(predictions)}")
    _check_positives(4 * num_bins, predictions, anchors, match, gt_boxes, gt_offsets, weights)
    check_tensor("strides", strides, "floating point", (anchors.shape[0],), predictions.device, "predictions")
    num_rows = 4 * match.numel()
    columns = triton.next_power_of_2(num_bins)
    block = max(1, DISTRIBUTION_LOSS_BLOCK // columns)
    num_programs = -(-num_rows // block)
    result = _result(grad_output, predictions, num_programs)
    if num_programs:
        with current(predictions.device):
            wrap_triton(distribution_loss_kernel)[(num_programs,)](
                *_positives(predictions, anchors, match, gt_boxes, gt_offsets, weights),
                strides.float().contiguous(),
                match if grad_output is None else grad_output,
                result,
                num_rows,
                anchors.shape[0],
                gt_boxes.shape[0],
                num_bins,
                *predictions.stride(),
                margin,
                HAS_WEIGHTS=weights is not None,
                GRADIENT=grad_output is not None,
                BLOCK=block,
                BINS=columns,
                num_warps=WARPS,
            )
    return result


def _register(name: str, run: Callable[..., Tensor]) -> None:
    """The operators of a loss: `run` takes None for a sum in parts, or the incoming gradient, then their arguments."""

    def loss(*arguments: Any) -> Tensor:
        return run(None, *arguments).sum()

    triton_op(f"mg_ops::{name}_triton", loss, mutates_args=(), schema=LOSS_OPERATORS[name])
    triton_op(f"mg_ops::{name}_triton_backward", run, mutates_args=(), schema=LOSS_OPERATORS[f"{name}_backward"])
    register_autograd(f"{name}_triton")


_register("class_loss", _run_class_loss)
_register("box_loss", _run_box_loss)
_register("distribution_loss", _run_distribution_loss)
