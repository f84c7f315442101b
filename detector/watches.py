"""What watches a training: how long its parts take, and whether its losses are finite."""

from __future__ import annotations

import math
import time
from typing import Any

import torch


class Stopwatch:
    """Adds up the time between `start` and `stop`: on a GPU by its events, which do not hold it up.

    While a CUDA graph is captured it stands still: nothing runs then.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.pairs: list[tuple[Any, Any]] = []
        self.running: Any = None

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begins an interval."""
        self.running = self._now()

    def stop(self) -> None:
        """Ends it."""
        if self.running is not None:
            self.pairs.append((self.running, self._now()))

    def read(self) -> float:
        """Seconds since the last reading; waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = sum(start.elapsed_time(stop) / 1000 if self.on_gpu else stop - start for start, stop in self.pairs)
        self.pairs.clear()
        return float(seconds)


class LossWatch:
    """Stops training at a loss that is not finite; looks one step late, so that the GPU does not wait."""

    def __init__(self) -> None:
        self.pending: tuple[torch.Tensor, Any, int, list[str]] | None = None

    def watch(self, loss: torch.Tensor, step: int, image_names: list[str]) -> None:
        """Looks at the loss before this one, and keeps this one for the next look."""
        self.check()
        copy, copied = loss.detach(), None
        if copy.is_cuda:
            copy = copy.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.pending = copy, copied, step, image_names

    def check(self) -> None:
        """Raises FloatingPointError for the loss watched last, with its images."""
        if self.pending is None:
            return
        loss, copied, step, image_names = self.pending
        self.pending = None
        if copied is not None:
            copied.synchronize()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {step}, in a batch of the images {', '.join(image_names)}. "
                "The last checkpoint is from before it. "
                "A lower --lr, a longer --warmup or --amp bf16 in place of fp16 may help."
            )
