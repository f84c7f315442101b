"""A step of training: forward, matching, losses, backward, optimizer; as it comes, or captured as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detector.loss import DetectionLoss
from detector.watches import Stopwatch
from mg_ops.matcher import Matcher


class StepResult(NamedTuple):
    """What a step leaves behind, without its graph of derivatives. That of a captured step lasts until the next one."""

    loss: Tensor
    """() float32: what was differentiated, both parts."""
    parts: DetectionLoss
    match: Any
    gt_boxes: Tensor
    """The objects that `match` was made of, on the device, like the two after it."""
    gt_crowd: Tensor
    gt_offsets: Tensor


@dataclass
class TrainingStep:
    """One step, on the batch's tensors. Nothing in it waits for a GPU, but GradScaler without a fused optimizer.

    Args:
        network: images (B, 3, S, S) uint8 -> cls_logits (B, A, C), box_deltas (B, A, 4).
        anchors: (A, 4), on the device of the network.
        matcher: of any rule.
        detection_loss: `detector.loss.detection_loss` with its options.
        box_weight: of the box loss.
        optimizer: of the network's parameters.
        scaler: of the gradients, for float16.
        autocast_type: of the network; None for none.
        matching_time: is told when the matching starts and stops.
    """

    network: nn.Module
    anchors: Tensor
    matcher: Matcher[Any]
    detection_loss: Callable[..., DetectionLoss]
    box_weight: float
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast_type: torch.dtype | None
    matching_time: Stopwatch

    def __call__(self, *batch: Tensor) -> StepResult:
        """Takes the first five of a TrainingBatch, on the host or the device."""
        device = self.anchors.device
        images, gt_boxes, gt_labels, gt_crowd, gt_offsets = (part.to(device, non_blocking=True) for part in batch)
        with torch.autocast(device.type, dtype=self.autocast_type, enabled=self.autocast_type is not None):
            cls_logits, box_deltas = self.network(images)  # (B, A, C), (B, A, 4)

        # With Mutual Guidance what the network predicts decides which anchors it learns from.
        objects = gt_boxes, gt_labels, gt_offsets
        self.matching_time.start()
        match = self.matcher(self.anchors, *objects, cls_logits=cls_logits, box_deltas=box_deltas, gt_crowd=gt_crowd)
        self.matching_time.stop()
        parts = self.detection_loss(cls_logits, box_deltas, self.anchors, match, *objects)
        loss = parts.cls_loss + self.box_weight * parts.box_loss

        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Derivatives that outlive the step would tie the next one to the stream of this one.
        parts = DetectionLoss(*(part.detach() for part in parts))
        return StepResult(loss.detach(), parts, match, gt_boxes, gt_crowd, gt_offsets)


class CapturedStep:
    """A step that is captured as one CUDA graph after a few calls, and replayed with each batch in the same memory.

    A batch whose tensors have other shapes (more objects than there is room for, or fewer images) is stepped on as it
    comes. What is launched, and so every bit of the result, is the same in all three cases.

    Args:
        step: a `TrainingStep` whose optimizer can be captured: fused, its learning rate a tensor.
        buffers: where each tensor of a batch goes, on the GPU.
        capture: whether there is one; without, the step runs on the buffers each time.
        warmup: calls before the capture, which make what is made on first use: momenta, kernels, cuDNN's choices.
    """

    def __init__(
        self, step: Callable[..., StepResult], buffers: Sequence[Tensor], *, capture: bool = True, warmup: int = 3
    ) -> None:
        self.step, self.buffers, self.warmup = step, buffers, warmup
        self.stream = torch.cuda.Stream() if capture else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.num_eager = 0
        """Batches that did not fit."""

    def __call__(self, *batch: Tensor) -> StepResult:
        if any(part.shape != buffer.shape for part, buffer in zip(batch, self.buffers, strict=True)):
            self.num_eager += 1
            return self.step(*batch)
        for part, buffer in zip(batch, self.buffers, strict=True):
            buffer.copy_(part, non_blocking=True)
        if self.stream is None:
            return self.step(*self.buffers)
        if self.graph is None and self.warmup > 0:
            self.warmup -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.step(*self.buffers)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # Of this thread's calls alone: the one that pins batches allocates memory meanwhile.
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.step(*self.buffers)
        self.graph.replay()
        return self.result


def make_buffers(batch_size: int, capacity: int, image_size: int, device: torch.device) -> list[Tensor]:
    """Where the tensors of a TrainingBatch of so many images, padded to so many objects, go; it has no object yet."""
    return [
        torch.zeros(batch_size, 3, image_size, image_size, dtype=torch.uint8, device=device),
        torch.zeros(capacity, 4, device=device),
        torch.zeros(capacity, dtype=torch.int64, device=device),
        torch.zeros(capacity, dtype=torch.bool, device=device),
        torch.zeros(batch_size + 1, dtype=torch.int64, device=device),
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of all groups; in the same memory where it is a tensor, which a captured step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
