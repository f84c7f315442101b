"""The rules beside mutual matching, and random arguments for each. No test framework in here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from random_batches import random_batch
from torch import Tensor

import mg_ops
from mg_ops.matching import STRATEGIES

RuleMatch: TypeAlias = "mg_ops.Match | mg_ops.DynamicMutualMatch"

OPTIONS_OF_MUTUAL_MATCH = ("strategy", "sigma", "iou_positive", "iou_ignored", "crowd_overlap")


def random_max_iou_options(random: np.random.Generator) -> dict[str, Any]:
    iou_positive = float(random.choice([0.5, 0.5, 0.3, 0.7, 1.0, 1e-6, 0.05]))
    return {
        "iou_positive": iou_positive,
        "iou_ignored": iou_positive * float(random.choice([0.8, 0.8, 0.5, 1.0, 0.1])),
        "low_quality": str(random.choice(["none", "keep_owner", "take_all", "take_first"])),
        "iou_low_quality": float(random.choice([0.0, 0.0, 0.3, 1.0, 1e-6])),
        "crowd_overlap": float(random.choice([0.5, 0.5, 0.1, 1.0, 1e-6])),
    }


def random_task_aligned_options(random: np.random.Generator) -> dict[str, Any]:
    return {
        "alpha": float(random.choice([0.5, 1.0, 0.0, 0.3])),
        "beta": float(random.choice([6.0, 6.0, 1.0, 1.0, 2.5, 0.0, 0.7, 64.0])),
        "k": int(random.choice([10, 13, 1, 2, 3, 128])),
        "k_after_conflict": random.choice([None, None, 1, 2, 9]),
        "overlap": str(random.choice(["iou", "ciou"])),
        "candidates": str(random.choice(["inside", "inside", "inside", "all"])),
        "conflict": str(random.choice(["inside", "selecting", "all"])),
        "minimum_side": float(random.choice([0.0, 0.0, 16.0, 1e-3, 1.0])),
        "center_margin": float(random.choice([0.0, 0.0, 0.0, 0.0, 1e-9, 0.01, 3.0])),
        "epsilon": float(random.choice([1e-9, 0.0, 1.0])),
        "crowd_overlap": float(random.choice([0.5, 0.1, 1.0])),
    }


def random_simota_options(random: np.random.Generator) -> dict[str, Any]:
    return {
        "k": int(random.choice([10, 1, 2, 3, 128])),
        "center_radius": float(random.choice([2.5, 1.5, 0.0, 0.3, 10.0, 1e30])),
        "iou_weight": float(random.choice([3.0, 3.0, 1.0, 0.0, 1e4, 1e38])),
        "cls_weight": float(random.choice([1.0, 1.0, 0.0, 0.1, 1e3, 1e38])),
        "candidates": str(random.choice(["box_or_center", "center"])),
        "crowd_overlap": float(random.choice([0.5, 0.1, 1.0])),
    }


def random_dynamic_soft_label_options(random: np.random.Generator) -> dict[str, Any]:
    return {
        "k": int(random.choice([13, 1, 2, 3, 128])),
        "soft_center_radius": float(random.choice([3.0, 3.0, 0.0, 1.0, 1e30])),
        "iou_weight": float(random.choice([3.0, 3.0, 1.0, 0.0, 1e4, 1e38])),
        "crowd_overlap": float(random.choice([0.5, 0.1, 1.0])),
    }


def random_atss_options(random: np.random.Generator) -> dict[str, Any]:
    return {
        "k": int(random.choice([9, 9, 1, 2, 4, 36, 128])),
        "center_margin": random.choice([0.01, 0.01, None, None, 0.0, 1e-9, 3.0]),
        "crowd_overlap": float(random.choice([0.5, 0.1, 1.0])),
    }


def random_dynamic_mutual_options(random: np.random.Generator) -> dict[str, Any]:
    return {
        "strategy": str(random.choice([*STRATEGIES, "mutual", "mutual"])),
        "k": int(random.choice([15, 15, 1, 2, 3, 128])),
        "sigma": float(random.choice([2.0, 2.0, 0.7, 5.0, 1e-3, 1e-30, 1e30])),
        "crowd_overlap": float(random.choice([0.5, 0.1, 1.0])),
    }


class Rule(NamedTuple):
    """A rule as tests see it."""

    function: Callable[..., RuleMatch]
    matcher: Callable[..., Any]
    random_options: Callable[[np.random.Generator], dict[str, Any]]
    by_level: bool = False
    """Whether it takes `level_sizes`."""
    two_matches: bool = False
    """Whether it has a match for each task."""


RULES = {
    "max_iou_match": Rule(mg_ops.max_iou_match, mg_ops.MaxIouMatcher, random_max_iou_options),
    "simota_match": Rule(mg_ops.simota_match, mg_ops.SimOtaMatcher, random_simota_options),
    "dynamic_soft_label_match": Rule(
        mg_ops.dynamic_soft_label_match, mg_ops.DynamicSoftLabelMatcher, random_dynamic_soft_label_options
    ),
    "task_aligned_match": Rule(mg_ops.task_aligned_match, mg_ops.TaskAlignedMatcher, random_task_aligned_options),
    "dynamic_mutual_match": Rule(
        mg_ops.dynamic_mutual_match, mg_ops.DynamicMutualMatcher, random_dynamic_mutual_options, two_matches=True
    ),
    "atss_match": Rule(mg_ops.atss_match, mg_ops.AtssMatcher, random_atss_options, by_level=True),
}


def arguments_of(rule: str, arguments: dict[str, Any], random: np.random.Generator | None = None) -> dict[str, Any]:
    """Arguments of `mg_ops.mutual_match` as the rule takes them: less the options, and with sizes of its levels.

    Args:
        random: cuts the anchors into levels; None: three quarters of them, most of the others, the rest.
    """
    arguments = {name: value for name, value in arguments.items() if name not in OPTIONS_OF_MUTUAL_MATCH}
    if RULES[rule].by_level:
        num_anchors = len(arguments["anchors"])
        ends = [0, num_anchors * 3 // 4, num_anchors * 15 // 16, num_anchors]
        if random is not None:
            cuts = random.integers(0, num_anchors + 1, random.choice([0, 1, 2, 3, 4, 15]))
            ends = [0, *sorted(cuts.tolist()), num_anchors]
        arguments["level_sizes"] = [end - begin for begin, end in itertools.pairwise(ends)]
    return arguments


def random_rule_arguments(rule: str, seed: int, *, large: bool = False) -> dict[str, Any]:
    """Arguments of one call of the rule, all from the seed."""
    random = np.random.default_rng([seed, *rule.encode()])
    arguments = arguments_of(rule, random_batch(seed, large=large).arguments, random)
    return arguments | RULES[rule].random_options(random)


def assert_same_match(match: RuleMatch, expected: RuleMatch, what: object = "") -> None:
    """Raises AssertionError, naming the first difference, unless both have the same dtypes, shapes and numbers."""
    for name, value, wanted in zip(type(expected)._fields, match, expected, strict=True):
        if wanted is None:
            assert value is None
            continue
        assert isinstance(value, Tensor) and isinstance(wanted, Tensor)
        assert (value.dtype, value.shape) == (wanted.dtype, wanted.shape), f"{name}: {value}, expected {wanted}; {what}"
        differ = (value.cpu() != wanted.cpu()).nonzero()
        if len(differ) > 0:
            first = tuple(differ[0].tolist())
            raise AssertionError(
                f"{name}{list(first)} is {value[first].item()}, expected {wanted[first].item()}; "
                f"{len(differ)} of {value.numel()} differ; {what}"
            )
