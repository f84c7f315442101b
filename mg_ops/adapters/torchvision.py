"""Mutual guidance in torchvision's dense detectors, by replacing how the loss matches and nothing else.

    model = torchvision.models.detection.retinanet_resnet50_fpn_v2(weights=None)
    mg_ops.adapters.torchvision.use_mutual_guidance(model)

works for `RetinaNet` (`retinanet_resnet50_fpn`, `retinanet_resnet50_fpn_v2`), `SSD` (`ssd300_vgg16`,
`ssdlite320_mobilenet_v3_large`) and `FCOS` (`fcos_resnet50_fpn`). Parameters, state_dict, evaluation and the wrapping
by DDP or torch.compile stay as they are.

The matcher of another rule may be passed in its place: with `mg_ops.MaxIouMatcher()` a RetinaNet has torchvision's own
loss, for every image in which an anchor overlaps each object.

Where `strategy="iou"` gives torchvision's own loss:

- RetinaNet: for an image where an anchor overlaps every object, the best anchor of each object overlaps no other object
  more, and no two anchors share the best overlap of an object below the positive threshold. Elsewhere the low-quality
  matches differ: torchvision takes all anchors of an equal best overlap (and *every* anchor for an object that none
  overlaps) and gives them to the object each overlaps most; here every object gets its own best anchor, the first of
  equals, and an object that no anchor overlaps gets none.
- SSD: for an image where an anchor overlaps every object and no two objects share their best anchor. Elsewhere
  torchvision gives anchor 0 to an object that none overlaps, and a shared anchor to the last object; here they get
  none, and the first. torchvision's hard negatives also repeat positives where an image has fewer negatives than asked
  for; here they do not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection import _utils as detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetClassificationHead
from torchvision.models.detection.ssd import SSD

from mg_ops.boxes import BoxCoder, anchors_from_points
from mg_ops.losses import focal_loss
from mg_ops.matcher import Matcher
from mg_ops.matching import AnyMatch, AnyMatcher, MutualMatcher
from mg_ops.reference import BACKGROUND
from mg_ops.rules.atss_match import AtssMatcher

Detector: TypeAlias = "RetinaNet | SSD | FCOS"
_Model = TypeVar("_Model", bound=nn.Module)
Target = dict[str, Tensor]
MatchHook = Callable[[Any, list[Target]], None]


class _Guidance(NamedTuple):
    """How a model matches; the arguments of `use_mutual_guidance`."""

    matcher: AnyMatcher
    anchor_size: float
    crowd_key: str | None
    on_match: MatchHook | None


def use_mutual_guidance(
    model: _Model,
    matcher: AnyMatcher | None = None,
    *,
    anchor_size: float = 4.0,
    crowd_key: str | None = None,
    on_match: MatchHook | None = None,
) -> _Model:
    """Makes a torchvision RetinaNet, SSD or FCOS match by mutual guidance when it computes its training loss.

    The batch is matched in one call, by the network's own predictions. The classification loss then takes its positives
    and ignored anchors from `cls_match`, the box loss its positives from `loc_match`, each averaged over its own
    positives. The loss functions of RetinaNet and FCOS are torchvision's, and FCOS' centerness goes with the boxes;
    SSD's is torchvision's written for two matches: ignored anchors (none with its own thresholds) are no hard
    negatives. Anchors are matched in the resized images' pixels.

    p, the score of a class, is sigmoid(logit) in RetinaNet and FCOS, and in SSD the softmax probability over the
    classes and the background.

    Args:
        model: a RetinaNet, SSD or FCOS, changed in place, before DDP or torch.compile wrap it. Calling again replaces
            the options.
        matcher: how to match. By default with the thresholds the model was made with: RetinaNet 0.5 and 0.4, as in the
            paper, and so FCOS; SSD 0.5 twice, so that nothing is ignored. The matcher of another rule, such as
            `mg_ops.TaskAlignedMatcher`, takes its place; soft targets are not read. Its box coder is not used: the
            model has its own.
        anchor_size: FCOS has points: the side of a point's square anchor, in strides. Points outside of their object
            learn its class and not its box, which they cannot reach. `mg_ops.SimOtaMatcher` and
            `mg_ops.DynamicSoftLabelMatcher` want 1.0, `mg_ops.AtssMatcher` its authors' 8.0. RetinaNet and SSD have
            anchors of their own.
        crowd_key: the entry of a target that flags crowd regions, (G,) integer or bool ("iscrowd" in COCO's); an image
            without it has none. None, as in torchvision: all boxes are objects.
        on_match: called in every training step with the match and the targets (boxes in the resized image), for
            `mg_ops.summarize`.

    Returns:
        The model itself.

    Raises:
        TypeError: the model is no RetinaNet, SSD or FCOS, its box coder is not torchvision's, or the matcher is no
            matcher of `mg_ops`.
        ValueError: anchor_size is not positive.
    """
    if not isinstance(model, (RetinaNet, SSD, FCOS)):
        raise TypeError(
            f"model: expected torchvision's RetinaNet, SSD or FCOS, got {type(model).__name__}; "
            "if this wraps one (DDP, torch.compile), call use_mutual_guidance before wrapping"
        )
    if matcher is not None and not isinstance(matcher, Matcher):
        found = type(matcher).__name__
        raise TypeError(f"matcher: expected mg_ops.MutualMatcher, another matcher or None, got {found}")
    expected = detection.BoxLinearCoder if isinstance(model, FCOS) else detection.BoxCoder
    if not isinstance(model.box_coder, expected):
        found = type(model.box_coder).__name__
        raise TypeError(f"model.box_coder: expected torchvision's {expected.__name__}, got {found}")
    if not anchor_size > 0:
        raise ValueError(f"anchor_size: expected a positive number of strides, got {anchor_size}")
    remove_mutual_guidance(model)
    replaced = getattr(model, "proposal_matcher", None)  # FCOS has none
    if matcher is None:
        matcher = MutualMatcher()
        if replaced is not None:
            matcher = MutualMatcher(iou_positive=replaced.high_threshold, iou_ignored=replaced.low_threshold)
    coder = None
    if isinstance(model.box_coder, detection.BoxCoder):
        coder = BoxCoder(weights=tuple(model.box_coder.weights), clip=model.box_coder.bbox_xform_clip)
    replacement: Any = dataclasses.replace(cast(Any, matcher), box_coder=coder, gt_box_format="xyxy")
    guidance = _Guidance(replacement, anchor_size, crowd_key, on_match)
    # An attribute of the instance hides the method of its class, survives copy.deepcopy and pickle, and is deleted to
    # undo.
    if isinstance(model, FCOS):
        model.compute_loss = functools.partial(_fcos_loss, model, guidance)
    elif isinstance(model, RetinaNet):
        model.compute_loss = functools.partial(_retinanet_loss, model, guidance)
    else:
        model.compute_loss = functools.partial(_ssd_loss, model, guidance)
        model._mutual_guidance_replaced = replaced
        model.proposal_matcher = _Unmatched()
    return model


def remove_mutual_guidance(model: _Model) -> _Model:
    """Undoes `use_mutual_guidance` in place (torch.jit.script needs it); does nothing to a model without it.

    Returns:
        The model itself.
    """
    model.__dict__.pop("compute_loss", None)
    replaced = model.__dict__.pop("_mutual_guidance_replaced", None)
    if replaced is not None:
        model.proposal_matcher = replaced
    return model


class _Unmatched:
    """Stands in for SSD's matcher, whose result `_ssd_loss` does not read."""

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        return match_quality_matrix.new_empty(0, dtype=torch.int64)


def _retinanet_loss(
    model: RetinaNet, guidance: _Guidance, targets: list[Target], head_outputs: Target, anchors: list[Tensor]
) -> Target:
    """`RetinaNet.compute_loss` with a match for each of the two losses."""
    deltas, cls_logits = head_outputs["bbox_regression"], head_outputs["cls_logits"]
    levels = _level_sizes(model, anchors[0]) if isinstance(guidance.matcher, AtssMatcher) else None
    match = _match(model, guidance, targets, anchors, levels, box_deltas=deltas, cls_logits=cls_logits)
    head = model.head
    return {
        "classification": head.classification_head.compute_loss(targets, head_outputs, list(match.cls_match)),
        "bbox_regression": head.regression_head.compute_loss(targets, head_outputs, anchors, list(match.loc_match)),
    }


def _fcos_loss(
    model: FCOS,
    guidance: _Guidance,
    targets: list[Target],
    head_outputs: Target,
    anchors: list[Tensor],
    num_anchors_per_level: list[int],
) -> Target:
    """`FCOS.compute_loss` with a match for each of the two tasks: the loss of its head, called for each."""
    cls_logits = head_outputs["cls_logits"]
    # What torchvision calls an anchor is a square of one stride around a point.
    squares = [
        anchors_from_points((box[:, :2] + box[:, 2:]) / 2, box[:, 2] - box[:, 0], guidance.anchor_size)
        for box in anchors
    ]
    pred_boxes = model.box_coder.decode(head_outputs["bbox_regression"].detach().float(), torch.stack(anchors))
    predictions = {"pred_boxes": pred_boxes, "cls_logits": cls_logits}
    match = _match(model, guidance, targets, squares, num_anchors_per_level, **predictions)
    # It knows no ignored anchors: their loss is made 0, and no gradient reaches them.
    seen = head_outputs | {"cls_logits": torch.where(match.ignored.unsqueeze(-1), -100.0, cls_logits)}
    of_classes = model.head.compute_loss(targets, seen, anchors, list(match.cls_match))
    # From a point outside of its object no distances to the sides lead to it, and its centerness is not a number.
    inside = [
        torch.where(_centers_are_inside(box, target["boxes"], objects), objects, BACKGROUND)
        for box, target, objects in zip(anchors, targets, match.loc_match, strict=True)
    ]
    of_boxes = model.head.compute_loss(targets, head_outputs, anchors, inside)
    return {**of_boxes, "classification": of_classes["classification"]}


def _centers_are_inside(anchors: Tensor, boxes: Tensor, objects: Tensor) -> Tensor:
    """(A,) bool: whether the center of each anchor (A, 4) is inside the box (G, 4) of its object (A,)."""
    # One box more than there are, for anchors without an object: an empty one.
    box = torch.cat([boxes, boxes.new_zeros(1, 4)])[objects]
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    return ((centers > box[:, :2]) & (centers < box[:, 2:])).all(1)


def _ssd_loss(
    model: SSD,
    guidance: _Guidance,
    targets: list[Target],
    head_outputs: Target,
    anchors: list[Tensor],
    matched_idxs: list[Tensor],
) -> Target:
    """`SSD.compute_loss` with a match for each of the two losses, in shapes known beforehand."""
    deltas, cls_logits = head_outputs["bbox_regression"], head_outputs["cls_logits"].float()
    probabilities = cls_logits.detach().softmax(-1)
    match = _match(model, guidance, targets, anchors, None, box_deltas=deltas, cls_probabilities=probabilities)

    # One row more than there are objects: what anchors without an object read, label 0, the background.
    boxes = torch.cat([target["boxes"].float() for target in targets] + [deltas.new_zeros(1, 4, dtype=torch.float32)])
    labels = torch.cat([target["labels"] for target in targets] + [targets[0]["labels"].new_zeros(1)])
    starts = [0]
    for target in targets:
        starts.append(starts[-1] + target["boxes"].shape[0])
    num_gt = starts.pop()
    start = torch.tensor(starts, device=deltas.device).unsqueeze(1)  # (B, 1)

    loc_positive = match.loc_positive
    loc_objects = torch.where(loc_positive, start + match.loc_match, num_gt)
    coder = guidance.matcher.box_coder
    assert coder is not None, "use_mutual_guidance sets it"
    box_targets = coder.encode(anchors=torch.stack(anchors), boxes=boxes[loc_objects])
    box_targets = torch.where(loc_positive.unsqueeze(-1), box_targets, 0.0)
    box_error = functional.smooth_l1_loss(deltas.float(), box_targets, reduction="none").sum(-1)
    box_loss = torch.where(loc_positive, box_error, 0.0).sum() / loc_positive.sum().clamp(min=1)

    cls_positive = match.cls_positive
    class_targets = labels[torch.where(cls_positive, start + match.cls_match, num_gt)]  # (B, A)
    class_error = functional.cross_entropy(cls_logits.flatten(0, 1), class_targets.flatten(), reduction="none")
    class_error = class_error.view_as(class_targets)

    # Hard negatives: of each image's background the worst classified, neg_to_pos_ratio for every positive.
    foreground = class_targets > 0
    candidates = ~foreground & ~match.ignored
    ranking = torch.where(candidates, class_error.detach(), float("-inf")).argsort(dim=1, descending=True)
    hardest = ranking.argsort(dim=1) < model.neg_to_pos_ratio * foreground.sum(1, keepdim=True)
    counted = foreground | (candidates & hardest)
    class_loss = torch.where(counted, class_error, 0.0).sum() / cls_positive.sum().clamp(min=1)
    return {"bbox_regression": box_loss, "classification": class_loss}


def _level_sizes(model: RetinaNet, anchors: Tensor) -> list[int]:
    """How many of the anchors each feature level has, which the loss is not told; waits for the device."""
    per_location = model.anchor_generator.num_anchors_per_location()[0]
    widths = anchors[::per_location, 2] - anchors[::per_location, 0]
    counts = torch.unique_consecutive(widths, return_counts=True)[1]
    return [per_location * int(count) for count in counts.tolist()]


def _match(
    model: Detector,
    guidance: _Guidance,
    targets: list[Target],
    anchors: list[Tensor],
    level_sizes: list[int] | None,
    **predictions: Tensor,
) -> AnyMatch:
    """Matches a batch: in one call where its images have the same anchors, else image by image."""
    boxes = [target["boxes"] for target in targets]
    labels = [target["labels"] for target in targets]
    key = guidance.crowd_key
    crowd = None
    if key is not None:
        crowd = [
            target[key].bool() if key in target else torch.zeros_like(target["labels"], dtype=torch.bool)
            for target in targets
        ]

    def match_images(images: slice) -> AnyMatch:
        return guidance.matcher(
            anchors[images][0] if level_sizes is None else anchors[images][0].split(level_sizes),
            boxes[images],
            labels[images],
            gt_crowd=None if crowd is None else crowd[images],
            **{name: prediction[images] for name, prediction in predictions.items()},
        )

    if _anchors_are_shared(model, anchors):
        match = match_images(slice(None))
    else:
        matches = [match_images(slice(image, image + 1)) for image in range(len(targets))]
        # Of a rule without soft targets these are None.
        columns: Any = ([part for part in parts if part is not None] for parts in zip(*matches, strict=True))
        kind: Any = type(matches[0])
        match = kind(*(torch.cat(parts) if parts else None for parts in columns))
    if guidance.on_match is not None:
        guidance.on_match(match, targets)
    return match


def _anchors_are_shared(model: Detector, anchors: list[Tensor]) -> bool:
    """Whether all images have the same anchors.

    torchvision's own generators lay them on the padded batch, the same for every image; those of others are compared,
    which waits for the device.
    """
    if type(model.anchor_generator).forward in (AnchorGenerator.forward, DefaultBoxGenerator.forward):
        return True
    return all(torch.equal(anchors[0], others) for others in anchors[1:])


def use_fused_focal_loss(model: _Model) -> _Model:
    """Has a RetinaNet compute its classification loss by `mg_ops.losses.focal_loss`, with or without mutual guidance.

    The value is torchvision's, without its one-hot targets and its tensors of the size of the logits, and without
    waiting for the device.

    Args:
        model: a RetinaNet, changed in place, before DDP or torch.compile wrap it.

    Returns:
        The model itself.

    Raises:
        TypeError: the model is no RetinaNet, or its head is not torchvision's.
    """
    head = getattr(getattr(model, "head", None), "classification_head", None)
    if not isinstance(model, RetinaNet) or not isinstance(head, RetinaNetClassificationHead):
        raise TypeError(f"model: expected torchvision's RetinaNet with its own head, got {type(model).__name__}")
    head.compute_loss = _fused_focal_loss
    return model


def _fused_focal_loss(targets: list[Target], head_outputs: Target, matched_idxs: list[Tensor]) -> Tensor:
    """`RetinaNetClassificationHead.compute_loss`: of each image over its own positives, then the mean over images."""
    losses = []
    for target, cls_logits, matched in zip(targets, head_outputs["cls_logits"], matched_idxs, strict=True):
        labels = torch.cat([target["labels"], target["labels"].new_zeros(1)])  # one to read where there is none
        class_targets = torch.where(matched >= 0, labels[matched.clamp(min=0)], matched)
        num_positives = (matched >= 0).sum().clamp(min=1)
        losses.append(focal_loss(cls_logits[None], class_targets[None], normalizer=num_positives))
    return torch.stack(losses).mean()
