"""Which backends can be used here, and which of them takes a call."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from mg_ops import library

DEVICES: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda",),
    "triton": library.TRITON_DEVICES,
    "cpp": ("cpu",),
    "eager": (),
}
"""Backend -> the types of device it takes, all of them if empty; on each device the first usable one is the default."""


WITH_TRITON = ("mutual_match", "class_loss", "box_loss", "distribution_loss")
"""The operators that have Triton kernels."""


class BackendStatus(NamedTuple):
    """Whether a backend can be used here."""

    usable: bool
    detail: str
    """Where it runs, or why it cannot be used and what to do about it."""


def backends() -> dict[str, BackendStatus]:
    """The backends of `mutual_match` and the losses by name: which are usable here, and why the others are not.

    Examples:
        >>> mg_ops.backends()["eager"].usable
        True
    """
    cuda_index = torch.cuda.current_device() if torch.cuda.is_available() else None
    errors = {backend: _usage_error(backend, cuda_index) for backend in DEVICES}
    return {backend: BackendStatus(not error, error or _accepted(backend)) for backend, error in errors.items()}


def _accepted(backend: str) -> str:
    types = " and ".join(device.upper() for device in DEVICES[backend])
    return f"{types} tensors" if types else "tensors on any device"


def _usage_error(backend: str, cuda_index: int | None) -> str:
    """Why a backend cannot be used here, on this GPU where it needs one; an empty string if it can."""
    if backend in ("cpp", "cuda") and library.load_error:
        return library.load_error
    if backend == "cuda" and not library.has_cuda:
        return (
            f"{library.LIBRARY_FILE.name} was built without CUDA: install nvcc 12.8 or newer, then run "
            "`pip install --force-reinstall --no-deps --no-cache-dir .` in the checkout"
        )
    if backend == "triton" and library.triton_error:
        return library.triton_error
    return "" if "cpu" in DEVICES[backend] or not DEVICES[backend] else _gpu_error(backend, cuda_index)


@functools.cache
def _gpu_error(backend: str, cuda_index: int | None) -> str:
    if cuda_index is None:
        return "torch finds no GPU here (torch.cuda.is_available() is false)"
    if backend == "cuda":
        error = torch.ops.mg_ops.cuda_device_error(cuda_index)
        return f"{library.LIBRARY_FILE.name} does not run on cuda:{cuda_index}: {error}" if error else ""
    capability = torch.cuda.get_device_capability(cuda_index)
    if torch.version.hip is None and capability < (8, 0):
        return f"Triton needs compute capability 8.0, cuda:{cuda_index} has {capability[0]}.{capability[1]}"
    return ""


def check_backend(backend: object) -> None:
    """Raises ValueError unless it is None or the name of a backend, usable or not."""
    if backend is not None and (not isinstance(backend, str) or backend not in DEVICES):
        raise ValueError(f"backend: expected None or one of {', '.join(map(repr, DEVICES))}, got {backend!r}")


def choose_backend(
    backend: str | None, device_type: str, device_index: int | None, operator: str = "mutual_match"
) -> str:
    """The backend to use for tensors on this device: the one asked for, or the first that can be used."""
    has_triton = operator in WITH_TRITON
    cuda_index = device_index if device_type == "cuda" else None
    if backend is None:
        for name, device_types in DEVICES.items():
            # Triton's interpreter takes CPU tensors, but only on request.
            fits = not device_types or device_types[-1] == device_type
            if fits and (has_triton or name != "triton") and not _usage_error(name, cuda_index):
                return name
        return "eager"  # which any device takes
    check_backend(backend)
    if cuda_index is None and torch.cuda.is_available():
        cuda_index = torch.cuda.current_device()
    error = _usage_error(backend, cuda_index)
    if backend == "triton" and not has_triton:
        error = f"{operator} has no Triton kernel: use 'cuda', 'cpp' or 'eager'"
    if not error and DEVICES[backend] and device_type not in DEVICES[backend]:
        device = device_type if device_index is None else f"{device_type}:{device_index}"
        error = f"it takes {_accepted(backend)}, the arguments are on {device}"
    if error:
        raise RuntimeError(f"backend {backend!r} cannot be used: {error}")
    return backend


# torch.compile calls it once, while it traces. This is what torch.compiler.assume_constant_result does, whose first use
# would import all of the compiler with mg_ops, seconds of work.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def operator_of(backend: str | None, device: torch.device, operator: str = "mutual_match") -> torch._ops.OpOverload:
    """An operator of a backend for tensors on this device; RuntimeError if it cannot be used."""
    backend = choose_backend(backend, device.type, device.index, operator)
    suffix = "" if backend in ("cpp", "cuda") else f"_{backend}"
    found: torch._ops.OpOverload = getattr(torch.ops.mg_ops, f"{operator}{suffix}").default
    return found
