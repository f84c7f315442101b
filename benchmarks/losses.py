"""What the focal loss of a batch and its gradient cost: fused, in plain PyTorch, and by torchvision's function.

    python benchmarks/losses.py                 # 16 images of 8,400 anchors and 80 classes, on 2 threads
    python benchmarks/losses.py --amp bf16 --batch 32 --anchors 12750 --classes 20

"without one-hot" is what the detectors trained with before `mg_ops.losses`: one label an anchor, and torchvision's
sigmoid_focal_loss of the negatives and of the positives. "one-hot" is torchvision's function of a dense target, as its
RetinaNet calls it. They take turns. The values are compared first. Memory is that beyond logits, targets and gradient.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

ROOT = Path(__file__).resolve().parents[1]
# After everything else: an installed mg_ops goes before the checkout's.
sys.path.append(str(ROOT))

import mg_ops  # noqa: E402
from benchmarks import measure, report  # noqa: E402
from benchmarks.machine import begin, check_options, make_parser, write  # noqa: E402
from detector.program import whole_number  # noqa: E402

Batch = tuple[Tensor, Tensor]
"""Logits (B, A, C) and class targets (B, A)."""
NEVER = -100.0
"""A logit whose focal loss as a negative, and its gradient, are 0 in float32."""


def without_one_hot(cls_logits: Tensor, class_targets: Tensor) -> Tensor:
    """Every logit a negative but those of positives at their label, whose loss is one number an anchor."""
    cls_logits = cls_logits.float()
    positive, label = class_targets >= 0, class_targets.clamp(min=0).unsqueeze(-1)
    at_label = cls_logits.gather(-1, label)  # (B, A, 1)
    negatives = cls_logits.scatter(-1, label, torch.where(positive.unsqueeze(-1), NEVER, at_label))
    zero, one = cls_logits.new_zeros(()), cls_logits.new_ones(())
    as_negatives = sigmoid_focal_loss(negatives, zero.expand_as(negatives)).sum(-1)
    as_positive = sigmoid_focal_loss(at_label, one.expand_as(at_label)).squeeze(-1)
    loss = as_negatives + torch.where(positive, as_positive, 0.0)
    return torch.where(class_targets == mg_ops.IGNORED, 0.0, loss).sum()


def one_hot(cls_logits: Tensor, class_targets: Tensor) -> Tensor:
    """Of a target (B, A, C)."""
    wanted = class_targets.unsqueeze(-1) == torch.arange(cls_logits.shape[-1], device=cls_logits.device)
    losses = sigmoid_focal_loss(cls_logits.float(), wanted.float())
    return torch.where(class_targets.unsqueeze(-1) == mg_ops.IGNORED, 0.0, losses).sum()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mg_ops": mg_ops.losses.focal_loss,
    "without one-hot": without_one_hot,
    "one-hot": one_hot,
}


def make_batch(options: argparse.Namespace) -> Batch:
    """Logits around the usual prior; one anchor in a hundred is a positive, as many are ignored."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.anchors, options.classes)
    logits = torch.randn(shape, generator=generator) - 4.6
    kinds = torch.rand(shape[:2], generator=generator)
    targets = torch.randint(0, options.classes, shape[:2], generator=generator)
    targets = torch.where(kinds < 0.01, targets, torch.where(kinds < 0.02, mg_ops.IGNORED, mg_ops.BACKGROUND))
    dtype = torch.bfloat16 if options.amp == "bf16" else torch.float32
    return logits.to(options.device, dtype), targets.to(options.device)


def forward_and_backward(loss: Callable[[Tensor, Tensor], Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of the logits."""
    logits = batch[0].detach().requires_grad_()
    value = loss(logits, batch[1])
    return value.detach(), torch.autograd.grad(value, logits)[0]


def extra_bytes(name: str, options: argparse.Namespace) -> int:
    """Memory at the peak of a call beyond what it is given and returns, once it has been called on a few anchors."""
    torch.set_num_threads(options.threads)
    batch = make_batch(options)
    forward_and_backward(LOSSES[name], (batch[0][:1, :10], batch[1][:1, :10]))
    return measure.peak_bytes(partial(forward_and_backward, LOSSES[name], batch), options.device)[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the command line asks for; the exit status."""
    parser = make_parser(__doc__)
    for name, default in (("batch", 16), ("anchors", 8400), ("classes", 80)):
        parser.add_argument(f"--{name}", type=whole_number(1), default=default, help="(%(default)s)")
    parser.add_argument("--turns", type=whole_number(1), default=9, help="calls of each (%(default)s)")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="dtype of the logits (%(default)s)")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    console, content, output = begin(options, "losses")
    batch = make_batch(options)
    expected = forward_and_backward(one_hot, batch)[0].item()
    for name, loss in LOSSES.items():
        value = forward_and_backward(loss, batch)[0].item()
        if not abs(value - expected) <= 1e-4 * expected:
            console.print(f"[bold red]failed:[/] {name}: expected a loss of {expected:.6g}, got {value:.6g}")
            return 1
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(options.turns):
        for name, loss in LOSSES.items():
            call = partial(forward_and_backward, loss)
            seconds[name] += measure.time_calls(call, [batch], options.threads, 0.0)
    rows: dict[str, Any] = {}
    for name in LOSSES:
        extra = measure.in_fresh_process(extra_bytes, name, options)
        rows[name] = {"quartiles": measure.quartiles(seconds[name]), "extra_bytes": extra}
    content["losses"] = rows
    write(content, output)
    table, fastest = [], rows["mg_ops"]["quartiles"][1]
    for name, row in rows.items():
        median = row["quartiles"][1]
        cells = [report.format_seconds(median), f"{median / fastest:.1f}"]
        cells.append(report.format_quantity(row["extra_bytes"], "B"))
        table.append([report.format_label(name, name == "mg_ops"), *cells])
    text = f"{options.batch} images, {options.anchors:,} anchors, {options.classes} classes; medians of {options.turns}"
    header = ["focal loss and its gradient", "time", "times as long as mg_ops", "extra memory"]
    report.print_table(report.Table("losses", text, header, table, []), console)
    console.print(f"\nwrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
