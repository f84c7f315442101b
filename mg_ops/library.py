"""The operators torch knows: the compiled library's, and the eager definition registered beside it.

A library that is missing or does not load never stops the import: it is a warning that says what to do, and
`backend="eager"` works without it. `load_error` holds the reason.
"""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mg_ops.rules.operators import RULES, Rule

_CLASS_LOSS_ARGUMENTS = (
    "Tensor cls_logits, Tensor class_targets, Tensor? soft_targets, float positive_weight, float positive_gamma, "
    "float negative_weight, float negative_gamma, bool weigh_by_target"
)
_POSITIVES = "Tensor predictions, Tensor anchors, Tensor match, Tensor gt_boxes, Tensor gt_offsets, Tensor? weights"
_BOX_LOSS_ARGUMENTS = f"{_POSITIVES}, float[]? box_coder, int loss, float alpha, float gamma, float beta"
_DISTRIBUTION_LOSS_ARGUMENTS = f"{_POSITIVES}, Tensor strides, float margin"
LOSS_OPERATORS = {
    "class_loss": f"({_CLASS_LOSS_ARGUMENTS}) -> Tensor",
    "class_loss_backward": f"(Tensor grad_output, {_CLASS_LOSS_ARGUMENTS}) -> Tensor",
    "box_loss": f"({_BOX_LOSS_ARGUMENTS}) -> Tensor",
    "box_loss_backward": f"(Tensor grad_output, {_BOX_LOSS_ARGUMENTS}) -> Tensor",
    "distribution_loss": f"({_DISTRIBUTION_LOSS_ARGUMENTS}) -> Tensor",
    "distribution_loss_backward": f"(Tensor grad_output, {_DISTRIBUTION_LOSS_ARGUMENTS}) -> Tensor",
}
"""The signatures of the losses and of their derivatives."""
_COMPILED_OPERATORS = {name: rule.signature for name, rule in RULES.items()} | LOSS_OPERATORS

LIBRARY_FILE = Path(__file__).parent / "libmg_ops.so"
MINIMUM_TORCH = (2, 10)
"""The oldest torch whose stable ABI has what the library uses; TORCH_TARGET_VERSION in CMakeLists.txt."""


def _load_library() -> str:
    """Loads the compiled operators; the reason why not, or an empty string."""
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or (int(version[1]), int(version[2])) < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        return f"torch {minimum} or newer is needed, this is {torch.__version__}: run `pip install --upgrade torch`"
    if not LIBRARY_FILE.exists():
        folder = LIBRARY_FILE.parents[1]
        if (folder / "CMakeLists.txt").exists():
            return (
                f"this mg_ops is the checkout {folder}, where the library is not built: run Python in another folder "
                "to use the mg_ops that you have installed, or build it here with `make build`"
            )
        return (
            f"{LIBRARY_FILE.name} was not built when mg_ops was installed: install a C++ compiler (on Debian "
            "`apt install g++`), then run `pip install -v --force-reinstall --no-deps --no-cache-dir .` in the "
            "checkout; it names what is still missing"
        )
    try:
        torch.ops.load_library(LIBRARY_FILE)
        found = {name: str(getattr(torch.ops.mg_ops, name).default._schema) for name in _COMPILED_OPERATORS}
    except AttributeError:
        found = {}  # an operator is missing
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error  # torch puts the loader's words into the cause
        return f"{LIBRARY_FILE.name} does not load under torch {torch.__version__} ({reason}): install mg_ops again"
    if found != {name: f"mg_ops::{name}{signature}" for name, signature in _COMPILED_OPERATORS.items()}:
        name = LIBRARY_FILE.name
        return f"{name} was built from other sources than these Python files: run `make build`, or install mg_ops again"
    return ""


def _triton(*arguments: Any) -> tuple[Tensor, ...]:
    # Not above: importing Triton takes longer than importing mg_ops.
    from mg_ops.triton.mutual_match import mutual_match

    RULES["mutual_match"].check(*arguments)
    device = arguments[0].device
    if device.type == "cuda" and len(TRITON_DEVICES) > 1:
        # The kernels get addresses, which the interpreter would read on the CPU.
        raise RuntimeError(
            f"backend 'triton': expected CPU tensors where TRITON_INTERPRET=1, got tensors on {device}; "
            "unset TRITON_INTERPRET to run on the GPU"
        )
    return mutual_match(*arguments)


triton_error = "" if importlib.util.find_spec("triton") else "Triton is not installed: run `pip install triton`"
"""Why the Triton backend cannot be used, or an empty string."""
TRITON_DEVICES = ("cpu", "cuda") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
"""Where it runs: Triton's interpreter, slow and for tests, takes CPU tensors too."""


def _define(operator: str, rule: Rule, run: Callable[..., tuple[Tensor, ...]], devices: tuple[str, ...]) -> None:
    """A rule's operator that is written in Python."""
    torch.library.define(f"mg_ops::{operator}", rule.signature)
    torch.library.impl(f"mg_ops::{operator}", devices)(run)
    torch.library.register_fake(f"mg_ops::{operator}")(rule.fake)


for _name, _rule in RULES.items():
    _define(f"{_name}_eager", _rule, _rule.eager, ("cpu", "cuda"))
_define("mutual_match_triton", RULES["mutual_match"], _triton, TRITON_DEVICES)

load_error = _load_library()
if load_error:
    rest = "" if triton_error else ", 'triton' too on GPUs"
    warnings.warn(
        f"mg_ops: no compiled backend: {load_error}. backend='eager' works without it{rest}.",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    for _name, _rule in RULES.items():
        torch.library.register_fake(f"mg_ops::{_name}")(_rule.fake)
has_cuda = not load_error and torch._C._dispatch_has_kernel_for_dispatch_key("mg_ops::mutual_match", "CUDA")
"""Whether the compiled library holds the CUDA backend."""
