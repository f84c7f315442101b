"""Which device a kernel is launched on."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which the device is torch's current one, where Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
