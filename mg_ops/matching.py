"""`mutual_match`: checks the arguments, picks a backend, runs it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mg_ops import library
from mg_ops.boxes import BoxCoder
from mg_ops.checks import check_bool, check_objects, check_predictions, check_thresholds, check_values


class MutualMatch(NamedTuple):
    """The assignment of a batch: B images, A anchors, N objects in all."""

    cls_match: Tensor
    """(B, A) int64: the index of the object within its image, `BACKGROUND` (-1) or `IGNORED` (-2)."""
    loc_match: Tensor
    """(B, A) int64: the index of the object within its image, or -1."""
    num_pos: Tensor
    """(N,) int32: how many positives each object asks for (Np of the paper); 0 for one that cannot be matched."""
    num_total: Tensor
    """(N,) int32: positives and ignored anchors each object asks for (Np + Ni); 0 for one that cannot be matched."""


STRATEGIES = {
    "iou": (False, False),
    "localize_to_classify": (True, False),
    "classify_to_localize": (False, True),
    "mutual": (True, True),
}
"""Strategy -> (classification by q_regressed, localisation by q_amplified); the rows of the paper's Table 1."""


class BackendStatus(NamedTuple):
    """Whether a backend can be used here."""

    usable: bool
    detail: str
    """Where it runs, or why it cannot be used and what to do about it."""


def backends() -> dict[str, BackendStatus]:
    """The backends of `mutual_match` by name: which are usable here, and why the others are not.

    Examples:
        >>> mg_ops.backends()["eager"].usable
        True
    """
    cuda_index = torch.cuda.current_device() if torch.cuda.is_available() else None
    errors = {backend: _usage_error(backend, cuda_index) for backend in _DEVICES}
    return {backend: BackendStatus(not error, error or _accepted(backend)) for backend, error in errors.items()}


def mutual_match(
    anchors: Tensor,
    pred_boxes: Tensor,
    cls_scores: Tensor,
    gt_boxes: Tensor | Sequence[Tensor],
    gt_labels: Tensor | Sequence[Tensor],
    gt_offsets: Tensor | None = None,
    *,
    gt_crowd: Tensor | Sequence[Tensor] | None = None,
    box_coder: BoxCoder | None = None,
    strategy: str = "mutual",
    sigma: float = 2.0,
    iou_positive: float = 0.5,
    iou_ignored: float = 0.4,
    crowd_overlap: float = 0.5,
    check: bool = False,
    backend: str | None = None,
) -> MutualMatch:
    """Assigns anchors to objects by what the network predicts: Mutual Guidance (Zhang et al., ACCV 2020, section 3).

    Anchors whose regressed boxes localise an object well become its positives for classification; anchors that classify
    it well become its positives for localisation. Sizes: B images, A anchors, C classes, N objects in all. Boxes are
    (x1, y1, x2, y2) in any one unit (pixels, or fractions of the image), the same for all arguments. Floating inputs
    may be float16, bfloat16, float32 or float64; all are rounded to float32 first. Any strides are read in place.
    Nothing is differentiated: inputs may require grad, and none flows.

    Args:
        anchors: (A, 4) floating, the anchor boxes.
        pred_boxes: (B, A, 4) floating, the regressed boxes; with `box_coder` the raw regression deltas instead.
        cls_scores: (B, A, C) floating, the classification logits; p = sigmoid(logit).
        gt_boxes: a list of B tensors (G, 4), floating; or one packed tensor (N, 4) with `gt_offsets`.
        gt_labels: a list of B tensors (G,), int64 or int32; or packed (N,).
        gt_offsets: (B + 1,) int64 or int32, for packed objects: image b has objects gt_offsets[b] to gt_offsets[b + 1].
            Objects past gt_offsets[B] do not count, so buffers of a fixed capacity can be reused.
        gt_crowd: bool, like the labels: regions to ignore rather than objects to find.
        box_coder: decodes `pred_boxes` as deltas of the anchors, inside the kernel.
        strategy: by which quality each task ranks anchors, the rows of the paper's Table 1:
            "iou" (both by the anchors' IoU), "localize_to_classify" (classification by the regressed boxes' IoU),
            "classify_to_localize" (localisation by the amplified IoU), "mutual" (both).
        sigma: degree of amplification, above 1 (Eq. 1): q_amplified = q_anchor ** ((sigma - p) / sigma).
        iou_positive: anchors an object owns with at least this IoU count as positives (Np), in (0, 1].
        iou_ignored: those with at least this IoU count as positive or ignored (Np + Ni), in (0, iou_positive].
        crowd_overlap: background whose overlap with a crowd region is at least this share of the anchor's area becomes
            ignored, in (0, 1].
        check: raise on values that are otherwise passed over: boxes that are not finite or inverted, NaN scores,
            unknown labels, objects that no anchor overlaps, wrong offsets. Costs a device synchronisation.
        backend: None for the best one of the tensors' device, or one of `mg_ops.backends()`.

    Returns:
        `MutualMatch(cls_match, loc_match, num_pos, num_total)`. The same integers on every backend.

    Raises:
        TypeError: a wrong type or dtype; the message names the argument.
        ValueError: a wrong shape, device, length or number, a tensor whose memory has been freed, packed offsets (on
            the CPU) that do not start at 0, decrease or exceed N, or with `check=True` a bad value.
        RuntimeError: the backend asked for cannot be used; the message says why.

    Examples:
        >>> anchors = torch.tensor([[0., 0., 10., 10.], [5., 0., 15., 10.], [40., 40., 50., 50.]])
        >>> logits = torch.zeros(1, 3, 2)
        >>> match = mg_ops.mutual_match(anchors, anchors[None], logits, [torch.tensor([[1., 0., 11., 10.]])],
        ...                             [torch.tensor([1])])
        >>> match.cls_match
        tensor([[ 0, -1, -1]])
    """
    batch_size, device = check_predictions(anchors, pred_boxes, cls_scores)
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(map(repr, STRATEGIES))}, got {strategy!r}")
    if box_coder is not None and not isinstance(box_coder, BoxCoder):
        raise TypeError(f"box_coder: expected mg_ops.BoxCoder or None, got {type(box_coder).__name__}")
    numbers = check_thresholds(sigma, iou_positive, iou_ignored, crowd_overlap)
    check_bool("check", check)
    boxes, labels, offsets, crowd = check_objects(gt_boxes, gt_labels, gt_offsets, gt_crowd, batch_size, device)
    operator = _operator(backend, device)
    if check:
        check_values(anchors, pred_boxes, cls_scores, boxes, labels, offsets, crowd, box_coder)

    classification_by_regressed, localization_by_amplified = STRATEGIES[strategy]
    cls_match, loc_match, num_pos, num_total = operator(
        anchors.detach(),
        pred_boxes.detach(),
        cls_scores.detach(),
        boxes.detach(),
        labels,
        offsets,
        crowd,
        None if box_coder is None else [*box_coder.weights, box_coder.clip],
        classification_by_regressed,
        localization_by_amplified,
        *numbers,
    )
    return MutualMatch(cls_match, loc_match, num_pos, num_total)


_DEVICES: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda",),
    "triton": library.TRITON_DEVICES,
    "cpp": ("cpu",),
    "eager": (),
}
"""Backend -> the types of device it takes, all of them if empty; on each device the first usable one is the default."""


def _accepted(backend: str) -> str:
    types = " and ".join(device.upper() for device in _DEVICES[backend])
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
    return "" if "cpu" in _DEVICES[backend] or not _DEVICES[backend] else _gpu_error(backend, cuda_index)


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


def _choose_backend(backend: str | None, device_type: str, device_index: int | None) -> str:
    """The backend to use for tensors on this device: the one asked for, or the first that can be used."""
    cuda_index = device_index if device_type == "cuda" else None
    if backend is None:
        # Triton's interpreter takes CPU tensors, but only on request.
        fitting = (name for name in _DEVICES if not _DEVICES[name] or _DEVICES[name][-1] == device_type)
        return next(name for name in fitting if not _usage_error(name, cuda_index))
    if not isinstance(backend, str) or backend not in _DEVICES:
        raise ValueError(f"backend: expected None or one of {', '.join(map(repr, _DEVICES))}, got {backend!r}")
    if cuda_index is None and torch.cuda.is_available():
        cuda_index = torch.cuda.current_device()
    error = _usage_error(backend, cuda_index)
    if not error and _DEVICES[backend] and device_type not in _DEVICES[backend]:
        device = device_type if device_index is None else f"{device_type}:{device_index}"
        error = f"it takes {_accepted(backend)}, the arguments are on {device}"
    if error:
        raise RuntimeError(f"backend {backend!r} cannot be used: {error}")
    return backend


# torch.compile calls it once, while it traces. This is what torch.compiler.assume_constant_result does, whose first use
# would import all of the compiler with mg_ops, seconds of work.
_choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _operator(backend: str | None, device: torch.device) -> torch._ops.OpOverload:
    """The operator of a backend for tensors on this device; RuntimeError if it cannot be used."""
    backend = _choose_backend(backend, device.type, device.index)
    if backend == "eager":
        return torch.ops.mg_ops.mutual_match_eager.default
    if backend == "triton":
        return torch.ops.mg_ops.mutual_match_triton.default
    return torch.ops.mg_ops.mutual_match.default
