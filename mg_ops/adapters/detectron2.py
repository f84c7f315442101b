"""Mutual guidance in detectron2's RetinaNet, by replacing how its anchors are labeled and nothing else.

    class Trainer(DefaultTrainer):
        @classmethod
        def build_model(cls, cfg):
            return mg_ops.adapters.detectron2.use_mutual_guidance(super().build_model(cfg))

detectron2 labels its anchors before it looks at the predictions, and both losses read one label; here the predictions
are read, and its loss is called once for the labels of each task. Parameters, checkpoints and inference stay as they
are. Imports nothing of detectron2.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from mg_ops.boxes import BoxCoder
from mg_ops.matching import AnyMatch, AnyMatcher, MutualMatcher
from mg_ops.rules.result import Match


def use_mutual_guidance(model: Any, matcher: AnyMatcher | None = None) -> Any:
    """Makes a detectron2 RetinaNet match by mutual guidance when it computes its training loss.

    Each of the two losses is divided by the running mean of its own positives; detectron2 has one mean for both.

    Args:
        model: a `RetinaNet`, changed in place, before DDP wraps it.
        matcher: how to match; by default `mg_ops.MutualMatcher()`, whose thresholds detectron2's configuration has too.
            The matcher of another rule may take its place; soft targets are not read. With `mg_ops.MaxIouMatcher()` the
            loss is detectron2's own, for every image in which an anchor overlaps each object. Its box coder is not
            used: the model has its own.

    Returns:
        The model itself. `model.match` is the match of the last batch, for `mg_ops.summarize`.

    Raises:
        TypeError: the model is no RetinaNet.
    """
    if not (hasattr(model, "label_anchors") and hasattr(model, "box2box_transform")):
        raise TypeError(
            f"model: expected detectron2's RetinaNet, got {type(model).__name__}; if this wraps one (DDP), "
            "call use_mutual_guidance before wrapping"
        )
    transform = model.box2box_transform
    coder = BoxCoder(weights=tuple(transform.weights), clip=transform.scale_clamp)
    given: Any = MutualMatcher() if matcher is None else matcher
    with_coder = dataclasses.replace(given, box_coder=coder, gt_box_format="xyxy")
    # An attribute of the instance hides the method of its class, and is copied and pickled with it.
    model.forward_training = functools.partial(_forward_training, model, with_coder)
    return model


def _forward_training(
    model: Any, matcher: AnyMatcher, images: Any, features: Any, predictions: Any, gt_instances: Any
) -> dict[str, Tensor]:
    """`RetinaNet.forward_training` with labels of each task."""
    # The levels are put together once, for the matching and for the losses.
    by_level = model._transpose_dense_predictions(predictions, [model.num_classes, 4])
    cls_logits, box_deltas = (torch.cat(levels, dim=1) for levels in by_level)
    anchors = model.anchor_generator(features)
    boxes = [objects.gt_boxes.tensor for objects in gt_instances]
    labels = [objects.gt_classes for objects in gt_instances]
    boxes_of_levels = [level.tensor for level in anchors]
    match: AnyMatch = matcher(boxes_of_levels, boxes, labels, cls_logits=cls_logits, box_deltas=box_deltas)
    model.match = match
    # The last two rows are those of the indices -2, ignored, and -1, background.
    labels = [torch.cat([image, image.new_tensor([-1, model.num_classes])]) for image in labels]
    boxes = [torch.cat([image, image.new_zeros(2, 4)]) for image in boxes]

    def losses(task_match: Tensor) -> dict[str, Tensor]:
        gt_labels = [image[objects] for image, objects in zip(labels, task_match, strict=True)]
        gt_boxes = [image[objects] for image, objects in zip(boxes, task_match, strict=True)]
        found: dict[str, Tensor] = model.losses(anchors, [cls_logits], gt_labels, [box_deltas], gt_boxes)
        return found

    # The loss keeps the running mean of the positives in an attribute, which begins at 100.
    loc_normalizer = getattr(model, "loc_loss_normalizer", getattr(model, "loss_normalizer", 100))
    of_classes = losses(match.cls_match)
    if isinstance(match, Match):
        return of_classes
    cls_normalizer, model.loss_normalizer = model.loss_normalizer, loc_normalizer
    of_boxes = losses(match.loc_match)
    model.loc_loss_normalizer, model.loss_normalizer = model.loss_normalizer, cls_normalizer
    return {"loss_cls": of_classes["loss_cls"], "loss_box_reg": of_boxes["loss_box_reg"]}
