"""Mutual Guidance (Zhang et al., ACCV 2020) as one fused operator: `mg_ops.mutual_match`."""

from mg_ops import losses
from mg_ops.backend_choice import backends
from mg_ops.boxes import BoxCoder, anchors_from_points, box_iou
from mg_ops.diagnostics import MatchSummary, summarize
from mg_ops.matching import MutualMatch, MutualMatcher, mutual_match
from mg_ops.reference import BACKGROUND, IGNORED
from mg_ops.rules.atss_match import AtssMatcher, atss_match
from mg_ops.rules.dynamic_mutual_match import DynamicMutualMatcher, dynamic_mutual_match
from mg_ops.rules.dynamic_soft_label_match import DynamicSoftLabelMatcher, dynamic_soft_label_match
from mg_ops.rules.max_iou_match import MaxIouMatcher, max_iou_match
from mg_ops.rules.result import DynamicMutualMatch, Match
from mg_ops.rules.simota_match import SimOtaMatcher, simota_match
from mg_ops.rules.task_aligned_match import TaskAlignedMatcher, task_aligned_match
from mg_ops.targets import Targets, encode_class_targets, encode_targets

__all__ = [
    "BACKGROUND",
    "IGNORED",
    "AtssMatcher",
    "BoxCoder",
    "DynamicMutualMatch",
    "DynamicMutualMatcher",
    "DynamicSoftLabelMatcher",
    "Match",
    "MatchSummary",
    "MaxIouMatcher",
    "MutualMatch",
    "MutualMatcher",
    "SimOtaMatcher",
    "Targets",
    "TaskAlignedMatcher",
    "anchors_from_points",
    "atss_match",
    "backends",
    "box_iou",
    "dynamic_mutual_match",
    "dynamic_soft_label_match",
    "encode_class_targets",
    "encode_targets",
    "losses",
    "max_iou_match",
    "mutual_match",
    "simota_match",
    "summarize",
    "task_aligned_match",
]
__version__ = "0.1.0"
