"""The rules of assignment that the training takes by name, with the options of their papers."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import mg_ops
from detector.anchors import FINEST_STRIDE, level_cells, make_anchors
from mg_ops.matcher import Matcher
from mg_ops.matching import STRATEGIES

RULES = (*STRATEGIES, "dynamic_mutual", "max_iou", "atss", "task_aligned", "simota", "dynamic_soft_label")
"""Values of --strategy: mutual matching by the rows of Table 1, and the rules that others train with."""

SOFT_RULES = ("dynamic_mutual", "task_aligned", "simota", "dynamic_soft_label")
"""Those that give soft targets of classification."""

POINT_RULES = ("simota", "dynamic_soft_label")
"""Those that take the side of an anchor for the stride of its level."""


def check_rule(args: argparse.Namespace) -> None:
    """Raises ValueError for flags of the matching that do not go together."""
    if args.cls_loss != "focal" and args.strategy not in SOFT_RULES:
        raise ValueError(
            f"--cls-loss {args.cls_loss}: needs soft targets, which --strategy {args.strategy} does not give; expected "
            f"focal, or a --strategy of {', '.join(SOFT_RULES)}"
        )
    if args.strategy_from_epoch and args.cls_loss != "focal":
        raise ValueError(
            f"--strategy-from-epoch {args.strategy_from_epoch}: iou, which comes first, gives no soft targets; "
            f"expected --cls-loss focal, got {args.cls_loss}"
        )
    if args.strategy_from_epoch and args.cuda_graph:
        raise ValueError(
            f"--strategy-from-epoch {args.strategy_from_epoch}: a captured step keeps its rule; expected no "
            "--cuda-graph"
        )
    if args.strategy in POINT_RULES and (args.anchors_per_location, args.anchor_size) != (1, FINEST_STRIDE):
        raise ValueError(
            f"--strategy {args.strategy}: takes the side of an anchor for the stride of its level; expected "
            f"--anchors-per-location 1 --anchor-size {FINEST_STRIDE}, got {args.anchors_per_location} and "
            f"{args.anchor_size:g}"
        )


def make_matcher(args: argparse.Namespace, device: torch.device) -> Matcher[Any]:
    """The matcher that the flags say, tried without an object: what it refuses is refused before data is read."""
    common: dict[str, Any] = {"backend": args.backend, "box_coder": mg_ops.BoxCoder()}
    matcher: Matcher[Any]
    if args.strategy in STRATEGIES:
        matcher = mg_ops.MutualMatcher(strategy=args.strategy, sigma=args.sigma, **common)
    elif args.strategy == "dynamic_mutual":
        matcher = mg_ops.DynamicMutualMatcher(sigma=args.sigma, **common)
    elif args.strategy == "max_iou":
        matcher = mg_ops.MaxIouMatcher(**common)
    elif args.strategy == "atss":
        sizes = [args.anchors_per_location * cells * cells for cells in level_cells(args.image_size)]
        matcher = mg_ops.AtssMatcher(level_sizes=sizes, **common)
    elif args.strategy == "task_aligned":  # YOLOv8's
        matcher = mg_ops.TaskAlignedMatcher(minimum_side=2.0 * FINEST_STRIDE, **common)
    elif args.strategy == "simota":
        matcher = mg_ops.SimOtaMatcher(**common)
    else:
        matcher = mg_ops.DynamicSoftLabelMatcher(**common)
    anchors = make_anchors(args.image_size, args.anchor_size, args.anchors_per_location).to(device)
    nothing = [torch.zeros(0, 4, device=device)], [torch.zeros(0, dtype=torch.int64, device=device)]
    matcher(anchors, *nothing, cls_logits=anchors[None, :, :1], box_deltas=torch.zeros_like(anchors)[None])
    return matcher
