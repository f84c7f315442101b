"""On each kind of tensor the first usable backend of cuda, triton, cpp, eager; one that cannot be used says why.

No GPU is needed: what a machine has is made up here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mg_ops
from mg_ops import backend_choice, library


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes up a machine: machine(load_error="...", gpu_errors={"cuda": "..."}, ...)."""

    def make_up(
        load_error: str = "",
        has_cuda: bool = True,
        triton_error: str = "",
        has_gpu: bool = True,
        gpu_errors: dict[str, str] | None = None,
    ) -> None:
        monkeypatch.setattr(library, "load_error", load_error)
        monkeypatch.setattr(library, "has_cuda", has_cuda and not load_error)
        monkeypatch.setattr(library, "triton_error", triton_error)
        monkeypatch.setattr(library, "TRITON_DEVICES", ("cuda",))
        monkeypatch.setitem(backend_choice.DEVICES, "triton", ("cuda",))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        errors = gpu_errors or {}
        no_gpu = "torch finds no GPU here"
        monkeypatch.setattr(
            backend_choice, "_gpu_error", lambda backend, index: no_gpu if index is None else errors.get(backend, "")
        )

    return make_up


@pytest.mark.parametrize(
    ("state", "on_gpu", "on_cpu"),
    [
        ({}, "cuda", "cpp"),
        ({"has_cuda": False}, "triton", "cpp"),
        ({"load_error": "not built"}, "triton", "eager"),
        ({"gpu_errors": {"cuda": "no kernel image"}}, "triton", "cpp"),
        ({"has_cuda": False, "triton_error": "not installed"}, "eager", "cpp"),
        ({"has_cuda": False, "gpu_errors": {"triton": "too old"}}, "eager", "cpp"),
        ({"load_error": "not built", "triton_error": "not installed"}, "eager", "eager"),
    ],
)
def test_the_first_usable_backend_is_the_default(machine: Any, state: dict[str, Any], on_gpu: str, on_cpu: str) -> None:
    machine(**state)
    for operator in ("mutual_match", "class_loss", "box_loss", "distribution_loss"):
        assert backend_choice.choose_backend(None, "cuda", 0, operator) == on_gpu
        assert backend_choice.choose_backend(None, "cpu", None, operator) == on_cpu
        assert backend_choice.choose_backend(None, "xpu", 0, operator) == "eager"
        assert backend_choice.choose_backend(None, "meta", None, operator) == "eager"


@pytest.mark.parametrize(
    ("state", "backend", "reason"),
    [
        ({"load_error": "libmg_ops.so was not built"}, "cuda", "libmg_ops.so was not built"),
        ({"load_error": "libmg_ops.so was not built"}, "cpp", "libmg_ops.so was not built"),
        ({"has_cuda": False}, "cuda", "built without CUDA.*install nvcc"),
        ({"has_gpu": False}, "cuda", "torch finds no GPU here"),
        ({"has_gpu": False}, "triton", "torch finds no GPU here"),
        ({"triton_error": "Triton is not installed: run"}, "triton", "Triton is not installed: run"),
        ({"gpu_errors": {"cuda": "no kernel image"}}, "cuda", "no kernel image"),
        ({"gpu_errors": {"triton": "needs compute capability"}}, "triton", "needs compute capability"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_forced_backend_says_why_it_cannot_be_used(
    machine: Any, state: dict[str, Any], backend: str, reason: str, device: str
) -> None:
    machine(**state)
    index = 0 if device == "cuda" and state.get("has_gpu", True) else None
    with pytest.raises(RuntimeError, match=f"^backend '{backend}' cannot be used: .*{reason}"):
        backend_choice.choose_backend(backend, device, index)
    status = mg_ops.backends()[backend]
    assert not status.usable and reason.split(".*")[0] in status.detail


def test_a_forced_backend_takes_only_its_devices(machine: Any) -> None:
    machine()
    with pytest.raises(
        RuntimeError, match=r"^backend 'cpp' cannot be used: it takes CPU tensors, the arguments are on cuda:0"
    ):
        backend_choice.choose_backend("cpp", "cuda", 0)
    for backend in ("cuda", "triton"):
        message = f"^backend '{backend}' cannot be used: it takes CUDA tensors, the arguments are on cpu$"
        with pytest.raises(RuntimeError, match=message):
            backend_choice.choose_backend(backend, "cpu", None)
    assert backend_choice.choose_backend("eager", "cuda", 0) == "eager"


def test_backends_are_listed_in_order_of_preference(machine: Any) -> None:
    machine()
    statuses = mg_ops.backends()
    assert list(statuses) == ["cuda", "triton", "cpp", "eager"]
    assert all(status.usable for status in statuses.values())


def test_a_compiled_call_chooses_while_it_is_traced() -> None:
    """Asking the GPU is nothing torch.compile could trace: the choice is a constant of the graph."""
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 6.0, 10.0]])
    boxes, labels, offsets = anchors[:1].clone(), torch.tensor([0]), torch.tensor([0, 1])

    def match(anchors: torch.Tensor) -> mg_ops.MutualMatch:
        return mg_ops.mutual_match(anchors, boxes, labels, offsets, strategy="iou")

    compiled = torch.compile(match, fullgraph=True, backend="aot_eager")(anchors)
    assert [value.tolist() for value in compiled] == [value.tolist() for value in match(anchors)]
