"""What the functions and the matcher objects of all rules take, and what the objects have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypedDict, TypeVar

from torch import Tensor

from mg_ops.backend_choice import check_backend
from mg_ops.boxes import BoxCoder, check_box_coder
from mg_ops.checks import check_bool
from mg_ops.objects import check_box_format

if TYPE_CHECKING:
    from typing_extensions import Unpack

Levels: TypeAlias = "Tensor | Sequence[Tensor]"
"""A prediction, or the anchors, of all feature levels: one tensor, or one per level, which are concatenated."""
GroundTruth: TypeAlias = "Tensor | Sequence[Tensor] | Sequence[dict[str, Tensor]]"
PerObject: TypeAlias = "Tensor | Sequence[Tensor] | None"


class Batch(TypedDict, total=False):
    """What comes with a batch beside its anchors and objects, each as of `mg_ops.mutual_match`."""

    cls_logits: Levels | None
    cls_probabilities: Levels | None
    pred_boxes: Levels | None
    box_deltas: Levels | None
    gt_crowd: PerObject
    gt_mask: Tensor | None


class Call(Batch, total=False):
    """A batch, and how it is to be read: what the functions of all rules take, each as of `mg_ops.mutual_match`."""

    box_coder: BoxCoder | None
    gt_box_format: str
    check: bool
    backend: str | None


Result = TypeVar("Result")


class Matcher(Generic[Result]):
    """The base of frozen dataclasses whose fields are the options of a rule's function."""

    box_coder: BoxCoder | None
    gt_box_format: str
    check: bool
    backend: str | None

    def _check_options(self) -> None:
        """Raises TypeError or ValueError on a wrong option of the rule's own."""
        raise NotImplementedError

    def _match(self, *arguments: Any, **options: Any) -> Result:
        """The rule's function."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        self._check_options()
        check_box_coder(self.box_coder)
        check_box_format(self.gt_box_format)
        check_bool("check", self.check)
        check_backend(self.backend)

    def __call__(
        self,
        anchors: Levels,
        gt_boxes: GroundTruth,
        gt_labels: PerObject = None,
        gt_offsets: Tensor | None = None,
        **batch: Unpack[Batch],
    ) -> Result:
        """The rule's function with these options; takes the other arguments of `mg_ops.mutual_match`.

        The box coder decodes `box_deltas`, and leaves `pred_boxes` alone.
        """
        options = dict(vars(self))
        given_twice = batch.keys() & options.keys()
        if given_twice:
            name, matcher = min(given_twice), type(self).__name__
            raise TypeError(f"{name}: expected it where the matcher is made, {matcher}({name}=...), got it in the call")
        if batch.get("box_deltas") is None:
            options["box_coder"] = None
        return self._match(anchors, gt_boxes, gt_labels, gt_offsets, **batch, **options)
