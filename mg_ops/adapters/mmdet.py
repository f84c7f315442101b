"""Every rule of `mg_ops` as an mmdetection assigner, and a RetinaNet head that can be guided, by lines of a config.

    # RetinaNet by mutual guidance; its train_cfg stays as it is
    model = dict(bbox_head=dict(type="mg_ops.adapters.mmdet.GuidedRetinaHead"))
    # another head by mutual guidance
    assigner = dict(_delete_=True, type="mg_ops.adapters.mmdet.MutualAssigner")
    # a head by the rule that it has, fused
    assigner = dict(_delete_=True, type="mg_ops.adapters.mmdet.RuleAssigner", rule="simota")

`_delete_` leaves out the options that the base configuration has for its assigner. Nothing need be imported. Once this
module is, mmdetection's registries have the classes by their bare names too.

Mutual guidance needs `pred_instances` with `priors`, `bboxes` and `scores`. DDOD's head gives them and asks an assigner
for each task, so that both matches are used; TOOD's, RTMDet's and YOLOX's give them and ask one for both. Heads that
give priors alone (ATSS's, GFL's, RetinaNet's own) can only have the rules that read no predictions, "max_iou" and
"atss". Importable without mmdetection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from mg_ops.adapters.labels import to_mmdet
from mg_ops.boxes import BoxCoder, anchors_from_points
from mg_ops.matcher import Matcher
from mg_ops.matching import AnyMatch, MutualMatcher
from mg_ops.rules.atss_match import AtssMatcher
from mg_ops.rules.dynamic_mutual_match import DynamicMutualMatcher
from mg_ops.rules.dynamic_soft_label_match import DynamicSoftLabelMatcher
from mg_ops.rules.max_iou_match import MaxIouMatcher
from mg_ops.rules.options import check_choice
from mg_ops.rules.simota_match import SimOtaMatcher
from mg_ops.rules.task_aligned_match import TaskAlignedMatcher

try:
    from mmdet.models.dense_heads import RetinaHead
    from mmdet.models.task_modules.assigners import AssignResult
    from mmdet.models.task_modules.prior_generators import anchor_inside_flags
    from mmdet.registry import MODELS, TASK_UTILS
except ImportError:
    MODELS = TASK_UTILS = anchor_inside_flags = None

    class RetinaHead:  # type: ignore[no-redef]
        """Raises ImportError when it is made.

        Args:
            *args: of mmdetection's head.
            **kwargs: likewise.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ImportError("GuidedRetinaHead: expected mmdetection, and mmcv with its operators; install them")

    class AssignResult:  # type: ignore[no-redef]
        """The attributes of mmdetection's `AssignResult`, which is used where it can be imported.

        Args:
            num_gts: number of objects.
            gt_inds: (A,) int64, 1-based objects, 0 background, -1 ignored.
            max_overlaps: (A,) float32, IoU of each positive with its object.
            labels: (A,) int64, the label of each anchor's object, -1 where there is none.
        """

        def __init__(self, num_gts: int, gt_inds: Tensor, max_overlaps: Tensor, labels: Tensor) -> None:
            self.num_gts = num_gts
            self.gt_inds = gt_inds
            self.max_overlaps = max_overlaps
            self.labels = labels
            self._extra_properties: dict[str, Any] = {}

        @property
        def num_preds(self) -> int:
            """Number of anchors."""
            return len(self.gt_inds)

        def set_extra_property(self, key: str, value: Any) -> None:
            """Attaches a value under a name."""
            self._extra_properties[key] = value

        def get_extra_property(self, key: str) -> Any:
            """The value attached under a name, or None."""
            return self._extra_properties.get(key)


Task: TypeAlias = Literal["classification", "localization"]
TASKS = ("classification", "localization")


class _Rule(NamedTuple):
    """How mmdetection's heads run a rule."""

    matcher: type[Matcher[Any]]
    options: Mapping[str, Any] = {}
    """Those of mmdetection's own assigner, where they are not the matcher's defaults."""
    reads_predictions: bool = True
    scores_are_logits: bool = False
    anchor_size: float | None = None
    soft_targets_are_ious: bool = False


RULES = {
    "mutual": _Rule(MutualMatcher),
    "dynamic_mutual": _Rule(DynamicMutualMatcher),
    "max_iou": _Rule(MaxIouMatcher, {"low_quality": "take_all"}, reads_predictions=False),
    "atss": _Rule(AtssMatcher, reads_predictions=False),
    "task_aligned": _Rule(
        TaskAlignedMatcher,
        {"alpha": 1.0, "k": 13, "overlap": "iou", "candidates": "all", "conflict": "selecting", "center_margin": 0.01},
    ),
    "simota": _Rule(SimOtaMatcher, anchor_size=1.0, soft_targets_are_ious=True),
    "dynamic_soft_label": _Rule(
        DynamicSoftLabelMatcher, scores_are_logits=True, anchor_size=1.0, soft_targets_are_ious=True
    ),
}
"""Name -> rule."""


class _Objects(NamedTuple):
    """The objects of an image, then its regions to ignore."""

    boxes: Tensor
    labels: Tensor
    crowd: Tensor | None
    """Which are regions; None where none is."""


class RuleAssigner:
    """Assigns the anchors of one image by a rule of `mg_ops`.

    Args:
        rule: "mutual", "dynamic_mutual", "max_iou" (RetinaNet, SSD, RPN), "atss" (ATSS, GFL, VFNet), "task_aligned"
            (TOOD), "simota" (YOLOX) or "dynamic_soft_label" (RTMDet).
        scores_are_logits: whether `pred_instances.scores` are logits (DDOD, RTMDet) or probabilities (TOOD, YOLOX). By
            default as the head gives them whose rule it is, and probabilities for the two mutual rules.
        task: which match `gt_inds`, `labels` and `max_overlaps` say, for heads that ask an assigner for each.
        anchor_size: for heads whose priors are points (cx, cy, stride, stride), as RTMDet's, YOLOX's and NanoDet's are:
            the side of a point's square anchor, in strides. None where priors are boxes. By default 1 for "simota" and
            "dynamic_soft_label", else None.
        **options: those of the rule's matcher, by name, as a configuration file has them. By default those that make
            the labels of mmdetection's own assigner; for "max_iou" RetinaNet's.

    Attributes:
        matcher: the matcher; `AtssMatcher.level_sizes`, and alpha and beta of `TaskAlignedMatcher`, are those of the
            last call.

    Raises:
        TypeError: an option that the matcher does not have; the message names it.
        ValueError: an option that makes no sense, likewise.
    """

    def __init__(
        self,
        rule: str,
        scores_are_logits: bool | None = None,
        task: Task = "classification",
        anchor_size: float | None = None,
        **options: Any,
    ) -> None:
        check_choice("rule", rule, tuple(RULES))
        check_choice("task", task, TASKS)
        if anchor_size is not None and not anchor_size > 0:
            raise ValueError(f"anchor_size: expected a positive number of strides or None, got {anchor_size}")
        self.rule = RULES[rule]
        unknown = options.keys() - {field.name for field in dataclasses.fields(cast(Any, self.rule.matcher))}
        if unknown:
            raise TypeError(
                f"options: expected those of {self.rule.matcher.__name__}, got {', '.join(sorted(unknown))}; if they "
                "are of the assigner in your base configuration, add _delete_=True"
            )
        logits = self.rule.scores_are_logits if scores_are_logits is None else scores_are_logits
        self.scores_name = "cls_logits" if logits else "cls_probabilities"
        self.task = task
        self.anchor_size = self.rule.anchor_size if anchor_size is None else anchor_size
        self.matcher: Any = self.rule.matcher(**{**self.rule.options, **options})
        self._last: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def assign(
        self,
        pred_instances: Any,
        gt_instances: Any,
        gt_instances_ignore: Any = None,
        alpha: Any = None,
        beta: Any = None,
        *,
        num_level_priors: Sequence[int] | None = None,
    ) -> AssignResult:
        """Assigns the anchors of an image to its objects.

        Args:
            pred_instances: `priors` (A, 4), the anchors (x1, y1, x2, y2), or with `anchor_size` the points
                (cx, cy, stride, stride); and, unless the rule reads none, `bboxes` (A, 4), the regressed boxes
                (x1, y1, x2, y2), and `scores` (A, C).
            gt_instances: `bboxes` (G, 4) and `labels` (G,).
            gt_instances_ignore: `bboxes` (K, 4), crowd regions: background that they cover is ignored. mmdetection's
                own assigners take it for background, unless they have an `ignore_iof_thr`.
            alpha: of "task_aligned", which TOOD's head passes; other rules do not read it.
            beta: likewise.
            num_level_priors: of "atss", how many priors each level has; other rules do not read it. The heads of ATSS
                and GFL pass it by position, before gt_instances.

        Returns:
            `AssignResult` for the task: `gt_inds` (A,) 1-based objects, 0 background, -1 ignored; `labels`, -1 where
            there is no object; `max_overlaps`, the IoU of a positive with its object, of its regressed box if the rule
            reads predictions and else of its anchor, and 0 elsewhere; `assign_metrics`, the metric of "task_aligned",
            else max_overlaps. So by mutual guidance the class target of a positive is the IoU of its own box in TOOD's,
            RTMDet's and YOLOX's losses; it grows as the boxes do, up to 1. DDOD's loss reads neither. The match of both
            tasks is `result.get_extra_property("match")`, of a batch of one image.

        Raises:
            ValueError: pred_instances lacks what the rule reads, or has points where boxes are expected or boxes where
                points are, or as the rule's function.
            TypeError: as the rule's function.
        """
        if isinstance(gt_instances, (list, tuple)):
            num_level_priors, gt_instances, gt_instances_ignore = gt_instances, gt_instances_ignore, alpha
        rule = self.rule
        wanted = ("priors", "bboxes", "scores") if rule.reads_predictions else ("priors",)
        missing = [name for name in wanted if not hasattr(pred_instances, name)]
        if missing:
            raise ValueError(
                f"pred_instances: expected {', '.join(wanted[:-1])} and {wanted[-1]}, got no {', '.join(missing)}; "
                f"{rule.matcher.__name__} needs a head that hands its predictions to its assigner"
            )
        if rule.matcher is AtssMatcher and num_level_priors is not None:
            self._set_options(level_sizes=tuple(num_level_priors))
        elif rule.matcher is TaskAlignedMatcher and alpha is not None:
            self._set_options(alpha=float(alpha), beta=float(beta))
        anchors = self._anchors(_as_tensor(pred_instances.priors))
        boxes, labels = _as_tensor(gt_instances.bboxes), gt_instances.labels
        all_boxes, all_labels, crowd = _with_regions(boxes, labels, gt_instances_ignore)
        all_crowd = None if crowd is None else [crowd]
        compared, predictions = anchors, {}
        if rule.reads_predictions:
            compared = _as_tensor(pred_instances.bboxes)
            predictions = {self.scores_name: pred_instances.scores.unsqueeze(0), "pred_boxes": compared.unsqueeze(0)}
        match = self.matcher(anchors, [all_boxes], [all_labels], gt_crowd=all_crowd, **predictions)

        task_match = (match.cls_match if self.task == TASKS[0] else match.loc_match)[0]
        # Few anchors are positives: what else is said of them is made for them alone.
        positive = (task_match >= 0).nonzero().squeeze(1)
        objects = task_match[positive]
        positive_labels = labels[objects]
        assigned = torch.full_like(task_match, -1)
        assigned[positive] = positive_labels
        if rule.soft_targets_are_ious:
            overlaps = match.soft_targets[0]
        else:
            iou = _overlaps(compared[positive].float(), boxes[objects].float())
            overlaps = torch.zeros_like(task_match, dtype=torch.float32)
            overlaps[positive] = iou
        result = AssignResult(len(boxes), to_mmdet(task_match), overlaps, assigned)
        # TOOD scales an object's metrics to the largest of its overlaps: the overlaps stay as they are.
        result.assign_metrics = overlaps
        if rule.matcher is TaskAlignedMatcher:
            score = pred_instances.scores[positive, positive_labels].float()
            score = score.sigmoid() if self.scores_name == "cls_logits" else score
            result.assign_metrics = torch.zeros_like(overlaps)
            result.assign_metrics[positive] = score**self.matcher.alpha * iou**self.matcher.beta
        result.set_extra_property("match", match)
        return result

    def _set_options(self, **options: Any) -> None:
        """Changes options of the matcher, which a head says anew in each call."""
        if any(getattr(self.matcher, name) != value for name, value in options.items()):
            self.matcher = dataclasses.replace(self.matcher, **options)

    def _anchors(self, priors: Tensor) -> Tensor:
        """The anchor boxes of priors; ValueError unless these are what `anchor_size` says."""
        # A head's priors hardly ever change from call to call.
        if self._last is not None and self._last[0].device == priors.device and torch.equal(self._last[0], priors):
            return self._last[1]
        if self.anchor_size is None:
            wrong = (priors[:, 2:] <= priors[:, :2]).any(1)
            wanted = "boxes (x1, y1, x2, y2) with x2 > x1 and y2 > y1"
            remedy = "for a head whose priors are points (RTMDet, YOLOX), pass anchor_size=4.0"
        else:
            wrong = (priors[:, 2] != priors[:, 3]) | (priors[:, 2] <= 0)
            wanted = "points (cx, cy, stride, stride)"
            remedy = "for a head whose priors are boxes, leave out anchor_size"
        if wrong.any():
            found = priors[wrong][0].tolist()
            raise ValueError(f"pred_instances.priors: expected {wanted}, got {found}; {remedy}")
        anchors = priors
        if self.anchor_size is not None:
            anchors = anchors_from_points(priors[:, :2], priors[:, 2], self.anchor_size)
        self._last = (priors, anchors)
        return anchors


class MutualAssigner(RuleAssigner):
    """Assigns the anchors of one image by mutual guidance: `RuleAssigner` with rule "mutual".

    Args:
        **options: the other arguments of `RuleAssigner`, by name.

    Raises:
        TypeError, ValueError: as `RuleAssigner`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__("mutual", **options)


class GuidedRetinaHead(RetinaHead):  # type: ignore[misc]
    """mmdetection's `RetinaHead`, its batch matched in one call by its own predictions.

    Each loss has its own match and is divided by its own number of positives, counted as mmdetection does: at least one
    in each image. Layers, losses, checkpoints and inference are `RetinaHead`'s.

    Args:
        *args: those of `RetinaHead`. `train_cfg.assigner` may be mmdetection's own `MaxIoUAssigner`, whose two
            thresholds mutual guidance then takes, or a `MutualAssigner` or `RuleAssigner`; soft targets are not read.
        **kwargs: likewise.

    Attributes:
        match: the match of the last batch, for `mg_ops.summarize`; its objects are an image's, then its regions to
            ignore. None before the first.

    Raises:
        TypeError: the box coder is no `DeltaXYWHBBoxCoder`, or the assigner none of the three.
        ValueError: the box coder has means, or the class loss is not of sigmoids.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.match: AnyMatch | None = None
        self._predictions: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None
        if self.train_cfg:
            self.matcher = _matcher_of(self)

    def loss_by_feat(
        self, cls_scores: Sequence[Tensor], bbox_preds: Sequence[Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """`RetinaHead`'s, with targets that depend on the predictions."""
        self._predictions = (cls_scores, bbox_preds)
        try:
            losses: dict[str, Any] = super().loss_by_feat(cls_scores, bbox_preds, *args, **kwargs)
        finally:
            self._predictions = None
        return losses

    @torch.no_grad()
    def get_targets(
        self,
        anchor_list: Sequence[Sequence[Any]],
        valid_flag_list: Sequence[Sequence[Tensor]],
        batch_gt_instances: Sequence[Any],
        batch_img_metas: Sequence[Mapping[str, Any]],
        batch_gt_instances_ignore: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """`AnchorHead`'s targets and weights of each level, and the number of positives of the class loss.

        Args:
            anchor_list: the anchors (A_l, 4) of each level, the same for every image.
            valid_flag_list: (A_l,) bool of each level, for each image.
            batch_gt_instances: the objects of each image.
            batch_img_metas: of each image.
            batch_gt_instances_ignore: as of `RuleAssigner.assign`, for each image.
            **kwargs: what else heads pass; not used.

        Returns:
            labels, label_weights, bbox_targets and bbox_weights, each by level, and avg_factor.
        """
        assert self._predictions is not None, "loss_by_feat sets them"
        level_sizes = [len(level) for level in anchor_list[0]]
        anchors = torch.cat([_as_tensor(level) for level in anchor_list[0]])
        inside = self._inside(anchors, valid_flag_list, batch_img_metas)
        regions = batch_gt_instances_ignore or [None] * len(batch_gt_instances)
        objects = [
            _with_regions(_as_tensor(image.bboxes), image.labels, ignored)
            for image, ignored in zip(batch_gt_instances, regions, strict=True)
        ]
        match = self.match = self._match(anchors, level_sizes, inside, objects)

        boxes, gt_labels = torch.cat([image.boxes for image in objects]), torch.cat([image.labels for image in objects])
        starts = torch.tensor([0] + [len(image.boxes) for image in objects[:-1]], device=boxes.device).cumsum(0)
        labels = torch.full_like(match.cls_match, self.num_classes)
        label_weights = (~match.ignored & inside).float()
        image, anchor = match.cls_positive.nonzero(as_tuple=True)
        labels[image, anchor] = gt_labels[starts[image] + match.cls_match[image, anchor]]
        if self.train_cfg["pos_weight"] > 0:
            label_weights[image, anchor] = self.train_cfg["pos_weight"]

        image, anchor = match.loc_positive.nonzero(as_tuple=True)
        targets = boxes[starts[image] + match.loc_match[image, anchor]]
        if not self.reg_decoded_bbox:
            targets = self.bbox_coder.encode(anchors[anchor], targets)
        bbox_targets = anchors.new_zeros(*labels.shape, 4)
        bbox_targets[image, anchor] = targets
        num_cls, num_loc = (positive.sum(1).clamp(min=1).sum() for positive in (match.cls_positive, match.loc_positive))
        bbox_weights = torch.zeros_like(bbox_targets)
        # Both losses are divided by num_cls: with this weight the sum of the box loss is, in effect, by num_loc.
        bbox_weights[image, anchor] = num_cls / num_loc
        columns = (labels, label_weights, bbox_targets, bbox_weights)
        return *(column.split(level_sizes, dim=1) for column in columns), int(num_cls)

    def _inside(
        self,
        anchors: Tensor,
        valid_flag_list: Sequence[Sequence[Tensor]],
        batch_img_metas: Sequence[Mapping[str, Any]],
    ) -> Tensor:
        """(B, A) bool: which anchors `train_cfg.allowed_border` and the padding of each image leave."""
        border = self.train_cfg["allowed_border"]
        flags = [
            anchor_inside_flags(anchors, torch.cat(tuple(valid)), meta["img_shape"][:2], border)
            for valid, meta in zip(valid_flag_list, batch_img_metas, strict=True)
        ]
        return torch.stack(flags)

    def _match(self, anchors: Tensor, level_sizes: list[int], inside: Tensor, objects: Sequence[_Objects]) -> AnyMatch:
        """Matches a batch: in one call where all anchors count in every image, else image by image."""
        assert self._predictions is not None
        logits, deltas = (
            _flatten(levels, columns)
            for levels, columns in zip(self._predictions, (self.cls_out_channels, 4), strict=True)
        )

        def match_images(images: slice, their_anchors: Tensor) -> AnyMatch:
            boxes, labels, regions = zip(*objects[images], strict=True)
            crowd = None
            if any(flags is not None for flags in regions):
                crowd = [
                    torch.zeros_like(image, dtype=torch.bool) if flags is None else flags
                    for image, flags in zip(labels, regions, strict=True)
                ]
            match: AnyMatch = self.matcher(
                their_anchors.split(level_sizes),
                boxes,
                labels,
                gt_crowd=crowd,
                cls_logits=logits[images],
                box_deltas=deltas[images],
            )
            return match

        if inside.all():
            return match_images(slice(None), anchors)
        # What has a coordinate that is no number is matched with nothing.
        nowhere = torch.full_like(anchors, torch.nan)
        matches = [
            match_images(slice(image, image + 1), torch.where(flags.unsqueeze(1), anchors, nowhere))
            for image, flags in enumerate(inside)
        ]
        # Of a rule without soft targets these are None.
        columns = ([part for part in parts if part is not None] for parts in zip(*matches, strict=True))
        kind: Any = type(matches[0])
        joined: AnyMatch = kind(*(torch.cat(parts) if parts else None for parts in columns))
        return joined


def _matcher_of(head: Any) -> Any:
    """The matcher that a head's assigner and box coder stand for."""
    coder, assigner = head.bbox_coder, head.assigner
    if type(coder).__name__ != "DeltaXYWHBBoxCoder":
        raise TypeError(f"bbox_coder: expected DeltaXYWHBBoxCoder, got {type(coder).__name__}")
    if any(coder.means):
        raise ValueError(f"bbox_coder.target_means: expected zeros, got {coder.means}")
    if not head.use_sigmoid_cls:
        raise ValueError(
            "loss_cls.use_sigmoid: expected True, got False; mutual guidance reads a sigmoid of each class"
        )
    if isinstance(assigner, RuleAssigner):
        matcher = assigner.matcher
    elif type(assigner).__name__ == "MaxIoUAssigner":
        matcher = MutualMatcher(iou_positive=assigner.pos_iou_thr, iou_ignored=assigner.neg_iou_thr)
    else:
        found = type(assigner).__name__
        raise TypeError(f"train_cfg.assigner: expected MaxIoUAssigner, MutualAssigner or RuleAssigner, got {found}")
    return dataclasses.replace(matcher, box_coder=BoxCoder(weights=tuple(1 / std for std in coder.stds)))


def _flatten(levels: Sequence[Tensor], columns: int) -> Tensor:
    """(B, A, columns) of the levels (B, K * columns, H_l, W_l), an anchor's K boxes after those of the cell before."""
    batch_size = len(levels[0])
    sizes = [level[0].numel() // columns for level in levels]
    flat = levels[0].new_empty(batch_size, sum(sizes), columns)
    for level, part in zip(levels, flat.split(sizes, dim=1), strict=True):
        part.view(batch_size, *level.shape[2:], -1).copy_(level.permute(0, 2, 3, 1))
    return flat


def _with_regions(boxes: Tensor, labels: Tensor, gt_instances_ignore: Any) -> _Objects:
    """The objects of an image and, if there are any, its regions to ignore."""
    if gt_instances_ignore is None or len(gt_instances_ignore.bboxes) == 0:
        return _Objects(boxes, labels, None)
    regions = _as_tensor(gt_instances_ignore.bboxes)
    crowd = torch.arange(len(boxes) + len(regions), device=boxes.device) >= len(boxes)
    return _Objects(torch.cat([boxes, regions]), torch.cat([labels, labels.new_zeros(len(regions))]), crowd)


def _as_tensor(boxes: Any) -> Tensor:
    """Boxes as a tensor; mmdetection may wrap them in `HorizontalBoxes`."""
    tensor: Tensor = boxes if isinstance(boxes, Tensor) else boxes.tensor
    return tensor


def _overlaps(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """IoU of each box with the box of the same row, 0 where they do not overlap."""
    size = (torch.minimum(boxes_1[:, 2:], boxes_2[:, 2:]) - torch.maximum(boxes_1[:, :2], boxes_2[:, :2])).clamp(min=0)
    intersection = size.prod(1)
    union = (boxes_1[:, 2:] - boxes_1[:, :2]).prod(1) + (boxes_2[:, 2:] - boxes_2[:, :2]).prod(1) - intersection
    return torch.where(intersection > 0, intersection / union, 0.0)


if TASK_UTILS is not None:
    # By force: a module may be imported twice, under a test's stand-ins for example.
    for _class in (RuleAssigner, MutualAssigner):
        TASK_UTILS.register_module(module=_class, force=True)
    MODELS.register_module(module=GuidedRetinaHead, force=True)
