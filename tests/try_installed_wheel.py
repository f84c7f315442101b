"""Run by `make test-wheel` in an environment that has only torch and the wheel: the package must work there."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

warnings.simplefilter("error", RuntimeWarning)  # a library that does not load is one

import mg_ops  # noqa: E402


def main() -> None:
    package = Path(mg_ops.__file__).parent
    assert package.is_relative_to(sys.prefix), f"{package} is not the installed wheel: run with python -I"
    assert (package / "py.typed").exists()
    assert mg_ops.backends()["cpp"].usable, mg_ops.backends()

    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(500, 2, generator=generator) * 300
    anchors = torch.cat([corners, corners + 8 + torch.rand(500, 2, generator=generator) * 90], dim=1)
    deltas = torch.randn(2, 500, 4, generator=generator)
    logits = torch.randn(2, 500, 20, generator=generator)
    boxes = [anchors[:7] + 3, anchors[100:103] - 2]
    labels = [torch.arange(7), torch.arange(3)]
    coder = mg_ops.BoxCoder()
    cpp, eager = (
        mg_ops.mutual_match(
            anchors, boxes, labels, cls_logits=logits, box_deltas=deltas, box_coder=coder, backend=backend
        )
        for backend in ("cpp", "eager")
    )
    assert all(torch.equal(ours, expected) for ours, expected in zip(cpp, eager, strict=True))
    assert (cpp.cls_match >= 0).any() and (cpp.loc_match >= 0).any()
    targets = mg_ops.encode_targets(cpp, anchors, boxes, labels, box_coder=coder)
    assert targets.box_targets.isfinite().all()
    print(f"mg_ops {mg_ops.__version__} works as a wheel under torch {torch.__version__} on Python {sys.version}")


if __name__ == "__main__":
    main()
