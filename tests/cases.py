"""Small assignments worked out on paper: one or more for every clause of the definition (docs/definition.md).

Plain data, no test framework: the same cases check every backend on every device, emulators included. Most boxes are
strips of height 1, `strip(x1, x2)`, so that an IoU is the overlap of two intervals over their union: strip(0, 6)
against strip(0, 10) has 6 / 10. Unless a case says otherwise, an image has one object, strip(0, 10), which asks for one
positive, predicted boxes equal the anchors and every logit is 0, so that both rankings agree with the anchors' IoU.

Logits SURE and NEVER give p = 1 and p = 0 (3.8e-44, which sigma - p rounds away).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from object_forms import in_form
from torch import Tensor

import mg_ops

Box = tuple[float, float, float, float]

NAN = math.nan
INF = math.inf
SURE = 100.0
NEVER = -100.0
MATCHES = {".": mg_ops.BACKGROUND, "i": mg_ops.IGNORED} | {str(index): index for index in range(10)}


def strip(x1: float, x2: float) -> Box:
    return (x1, 0.0, x2, 1.0)


FAR = strip(1000, 1010)
"""Overlaps nothing that a case is about."""


@dataclass(frozen=True)
class Image:
    """The predictions for one image, its objects, and what matching must make of them."""

    cls_match: str  # a digit for each anchor, the index of its object; "." is background, "i" ignored
    loc_match: str
    num_pos: list[int] = field(default_factory=lambda: [1])
    num_total: list[int] | None = None  # None: num_pos, nothing is ignored
    gt_boxes: list[Box] = field(default_factory=lambda: [strip(0, 10)])
    pred_boxes: list[Box] | None = None  # None: the anchors
    box_deltas: list[Box] | None = None  # None: zeros; in place of boxes where the case has a box coder
    cls_logits: list[list[float]] | None = None  # None: zeros
    cls_probabilities: list[list[float]] | None = None  # in place of logits, for all images or none
    gt_labels: list[int] | None = None  # None: zeros
    gt_crowd: list[bool] | None = None  # None: no crowd


@dataclass(frozen=True)
class Case:
    """A batch with its expected result. `clause` is the sentence of the definition it stands for."""

    name: str
    clause: str
    anchors: list[Box]
    images: list[Image]
    num_classes: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, device: str = "cpu", *, packed: bool = False, slack: int = 0) -> dict[str, Any]:
        """All arguments of `mg_ops.mutual_match`, the objects in lists or packed with this slack."""
        objects = self.packed_objects(device, slack) if packed else self.listed_objects(device)
        return {**self.predictions(device), **objects, **self.options}

    def predictions(self, device: str = "cpu") -> dict[str, Tensor]:
        """anchors (A, 4), pred_boxes or box_deltas (B, A, 4), cls_logits or cls_probabilities (B, A, C), float32."""
        shape = (len(self.images), len(self.anchors))

        def tensor(rows: list[Any], *shape: int) -> Tensor:
            return torch.tensor(rows, dtype=torch.float32, device=device).reshape(shape)

        boxes_name, default = "pred_boxes", self.anchors
        if "box_coder" in self.options:
            boxes_name, default = "box_deltas", [(0.0,) * 4] * len(self.anchors)
        probabilities = any(image.cls_probabilities is not None for image in self.images)
        scores_name = "cls_probabilities" if probabilities else "cls_logits"
        zeros = [[0.0] * self.num_classes] * len(self.anchors)
        boxes, scores = (
            [rest if getattr(image, name) is None else getattr(image, name) for image in self.images]
            for name, rest in ((boxes_name, default), (scores_name, zeros))
        )
        return {
            "anchors": tensor(self.anchors, len(self.anchors), 4),
            boxes_name: tensor(boxes, *shape, 4),
            scores_name: tensor(scores, *shape, self.num_classes),
        }

    def listed_objects(self, device: str = "cpu") -> dict[str, list[Tensor]]:
        """gt_boxes, gt_labels and, where the case has any, gt_crowd: a list of one tensor per image."""
        objects: dict[str, list[Tensor]] = {"gt_boxes": [], "gt_labels": []}
        if any(image.gt_crowd is not None for image in self.images):
            objects["gt_crowd"] = []
        for image in self.images:
            num_objects = len(image.gt_boxes)
            objects["gt_boxes"].append(
                torch.tensor(image.gt_boxes, dtype=torch.float32, device=device).reshape(num_objects, 4)
            )
            labels = [0] * num_objects if image.gt_labels is None else image.gt_labels
            objects["gt_labels"].append(torch.tensor(labels, dtype=torch.int64, device=device))
            if "gt_crowd" in objects:
                crowd = [False] * num_objects if image.gt_crowd is None else image.gt_crowd
                objects["gt_crowd"].append(torch.tensor(crowd, dtype=torch.bool, device=device))
        return objects

    def packed_objects(self, device: str = "cpu", slack: int = 0) -> dict[str, Tensor]:
        """The same objects packed, with gt_offsets; `slack` more follow that gt_offsets[B] leaves out."""
        listed = self.listed_objects(device)
        packed, _ = in_form("packed", listed["gt_boxes"], listed["gt_labels"], listed.get("gt_crowd"))
        # What the slack holds must not matter: boxes that would win everything if they counted.
        winner = torch.tensor(self.anchors[0] if self.anchors else strip(0, 1), device=device)
        more = {"gt_boxes": winner.expand(slack, 4), "gt_labels": packed["gt_labels"].new_zeros(slack)}
        more["gt_crowd"] = torch.ones(slack, dtype=torch.bool, device=device)
        return packed | {name: torch.cat([packed[name], more[name]]) for name in packed.keys() & more.keys()}

    def expected(self, slack: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """cls_match (B, A), loc_match (B, A), num_pos (N,), num_total (N,) on the CPU; `slack` objects count 0."""
        shape = (len(self.images), len(self.anchors))
        num_pos = [count for image in self.images for count in image.num_pos] + [0] * slack
        num_total = [count for image in self.images for count in image.num_total or image.num_pos] + [0] * slack
        cls_match, loc_match = (
            [[MATCHES[letter] for letter in getattr(image, name)] for image in self.images]
            for name in ("cls_match", "loc_match")
        )
        return (
            torch.tensor(cls_match, dtype=torch.int64).reshape(shape),
            torch.tensor(loc_match, dtype=torch.int64).reshape(shape),
            torch.tensor(num_pos, dtype=torch.int32),
            torch.tensor(num_total, dtype=torch.int32),
        )


CASES: list[Case] = []


def add(
    name: str,
    clause: str,
    anchors: list[Box],
    *images: Image,
    num_classes: int = 1,
    options: dict[str, Any] | None = None,
) -> None:
    CASES.append(Case(name, clause, anchors, list(images), num_classes, options or {}))


# ---------------------------------------------------------------------------------------------------------------------
# Claim

add(
    "best anchor of each quality",
    "best[g] = the anchor with the largest quality for g",
    # q_anchor    .6            .7            0
    [strip(0, 6), strip(0, 7), strip(20, 30)],
    # q_regressed .3          .2           .9: anchor 2 leads, though its anchor does not even touch the object
    # n_pos: .6 >= .5, and .7 forced to 1 >= .5: 2; n_total the same. Classification ranks 2, 0, 1; the last is
    # past n_total.
    # Amplified (p = .5 everywhere) ranks 1, 0.
    Image("0.0", "00.", [2], pred_boxes=[strip(0, 3), strip(0, 2), strip(0, 9)]),
)
add(
    "best anchor is forced to quality 1",
    'The pair (best[g], g) gets quality 1. ("At least one anchor should be assigned as positive.")',
    # q .1, below every threshold; forced to 1
    [strip(50, 60), strip(0, 1)],
    Image(".0", ".0"),
)
add(
    "forced quality beats a larger real one",
    "The pair (best[g], g) gets quality 1; owner[a] = the object with the largest quality for a",
    # object 0: .8 and 1; object 1: 4/8 = .5 and 4/10 = .4. best = [anchor 1, anchor 0]; (0, 1) becomes 1 > .8.
    [strip(0, 8), strip(0, 10)],
    Image("10", "10", [1, 1], gt_boxes=[strip(0, 10), strip(0, 4)]),
)
add(
    "both forced bests on one anchor",
    "owner[a]: lowest object index on ties",
    # Anchor 0 is the best of both: object 0 with 8/12, object 1 with 1. Both become 1: a tie, object 0 wins.
    # Object 1 is stolen empty: it owns no anchor, its counts are still at least 1.
    [strip(2, 12), strip(100, 110)],
    Image("0.", "0.", [1, 1], gt_boxes=[strip(0, 10), strip(2, 12)]),
)
add(
    "a perfect overlap ties with a forced one",
    "The pair (best[g], g) gets quality 1; lowest object index on ties",
    # First image: the anchor is object 1 exactly (IoU 1); object 0 (.5) has no other anchor: forced to 1, tie, object
    # 0. Second image: the same two objects in the other order.
    [strip(0, 10)],
    Image("0", "0", [1, 1], gt_boxes=[strip(0, 5), strip(0, 10)]),
    Image("0", "0", [1, 1], gt_boxes=[strip(0, 10), strip(0, 5)]),
)
add(
    "equal anchors: the lowest is best",
    "best[g]: lowest anchor index on ties",
    # .4 four times: anchor 0 is forced to 1; n_pos 1; all four reach .4: n_total 4.
    [strip(0, 4), strip(0, 4), strip(0, 4), strip(0, 4)],
    Image("0iii", "0...", [1], [4]),
)
add(
    "equal regressed boxes: the lowest anchor is best",
    "best[g]: lowest anchor index on ties",
    # q_anchor .4 .3 .3: n_pos = n_total = 1 (.4 is forced). q_regressed 0 .5 .5: anchor 1.
    [strip(0, 4), strip(0, 3), strip(0, 3)],
    Image(".0.", "0..", pred_boxes=[FAR, strip(0, 5), strip(0, 5)]),
)
add(
    "equal amplified qualities: the lowest anchor is best",
    "best[g]: lowest anchor index on ties",
    # q_anchor .3 twice, p = 1 for both: the same exponent.
    [FAR, strip(0, 3), strip(7, 10)],
    Image(".0.", ".0.", cls_logits=[[SURE], [SURE], [SURE]]),
)
add(
    "equal objects: the lowest owns",
    "owner[a] = the object with the largest quality for a; lowest object index on ties",
    # Two objects on one place: both bests are anchor 0, and .8 against .8 for anchor 1. Object 1 owns nothing.
    [strip(0, 10), strip(0, 8)],
    Image("00", "00", [2, 1], gt_boxes=[strip(0, 10), strip(0, 10)]),
)
add(
    "an anchor half way between two objects",
    "owner[a]: lowest object index on ties",
    # Anchors 0 and 1 are the objects themselves. Anchor 2 = [3, 13] against [0, 10] and [6, 16]: 7/13 both. Object 0
    # owns it: n_pos 2 and 1.
    [strip(0, 10), strip(6, 16), strip(3, 13)],
    Image("010", "010", [2, 1], gt_boxes=[strip(0, 10), strip(6, 16)]),
)
add(
    "an anchor competes for its owner only",
    "From here on an anchor competes for its owner only.",
    # Anchor 2 = [1, 11]: 9/11 with object 0, 7/13 with object 1. Object 0 owns it, and it does not count for object 1,
    # though 7/13 >= .5: n_pos 2 and 1.
    [strip(0, 10), strip(4, 14), strip(1, 11)],
    Image("010", "010", [2, 1], gt_boxes=[strip(0, 10), strip(4, 14)]),
)
add(
    "no regressed box touches the object",
    "If every quality of g is 0: under q_regressed it is the best[g] of q_anchor",
    # q_anchor .5 .7 .6: best is anchor 1, n_pos 3. Every regressed box is elsewhere: only the pair (1, 0) has quality
    # 1.
    [strip(0, 5), strip(0, 7), strip(0, 6)],
    Image(".0.", "000", [3], pred_boxes=[FAR, FAR, FAR]),
)
add(
    "the fallback best meets another object's best",
    "If every quality of g is 0 ... it is the best[g] of q_anchor; owner[a]: lowest object index on ties",
    # Regressed: nothing near object 0, whose best is anchor 0 as under q_anchor. For object 1 anchor 0 has 1, anchor 1
    # .8. First image: (0, 0) and (0, 1) are both 1: object 0 takes anchor 0; object 1 keeps anchor 1 (.8).
    [strip(0, 10), strip(20, 30)],
    Image("01", "01", [1, 1], gt_boxes=[strip(0, 10), strip(20, 30)], pred_boxes=[strip(20, 30), strip(20, 28)]),
    # The objects swapped: now object 0 is the one at [20, 30] and takes anchor 0 (1 against 1); the other is left
    # empty. Anchor 1 (.8) is object 0's second, past n_total = 1.
    Image("0.", "10", [1, 1], gt_boxes=[strip(20, 30), strip(0, 10)], pred_boxes=[strip(20, 30), strip(20, 28)]),
)

# ---------------------------------------------------------------------------------------------------------------------
# Counts

add(
    "counts at the thresholds",
    "n_pos = number of anchors it owns with quality >= iou_positive; n_total = ... >= iou_ignored",
    # 1, 5/10 (counts), 4.999/10 (does not), 4/10 (counts as ignored), 3.999/10 (does not): n_pos 2, n_total 4
    [strip(0, 10), strip(0, 5), strip(0, 4.999), strip(0, 4), strip(0, 3.999)],
    Image("00ii.", "00...", [2], [4]),
)
add(
    "counts at other thresholds",
    "iou_positive, iou_ignored",
    # >= 1: the first two; >= .75: [0, 7.5] as well, [0, 7] not
    [strip(0, 10), strip(0, 10), strip(0, 7.5), strip(0, 7)],
    Image("00i.", "00..", [2], [3]),
    options={"iou_positive": 1.0, "iou_ignored": 0.75},
)
add(
    "equal thresholds ignore nothing",
    "the next n_total - n_pos are ignored",
    [strip(0, 10), strip(0, 5), strip(0, 4.9), strip(0, 4)],
    Image("00..", "00..", [2]),
    options={"iou_positive": 0.5, "iou_ignored": 0.5},
)
add(
    "tiny thresholds count every overlap",
    "thresholds in (0, 1]",
    [strip(0, 10), strip(0, 1), strip(9.5, 20), strip(10, 20)],
    # 1, .1, .5/20 = .025, and a shared edge: 0
    Image("000.", "000.", [3]),
    options={"iou_positive": 1e-6, "iou_ignored": 1e-6},
)
add(
    "counts are at least 1",
    "n_pos ... at least 1; n_total ... at least n_pos",
    # Object 1 loses its best, anchor 0 (9/11 for both, object 0 wins), and keeps anchor 1: [8, 12] in [2, 12] is .4,
    # below .5. Counts 1 and 1. Its one positive is the best anchor it still owns. (2/12 of anchor 1 with object 0.)
    [strip(1, 11), strip(8, 12)],
    Image("01", "01", [1, 1], gt_boxes=[strip(0, 10), strip(2, 12)]),
)
add(
    "one positive, and the rest of what is left ignored",
    "n_pos at least 1; n_total = number it owns with quality >= iou_ignored",
    # As above with two more anchors in object 1, .45 and .4 (0.5/12 and less of object 0): it owns .4 .45 .4, all of
    # them >= .4 and none >= .5: n_pos 1, n_total 3.
    [strip(1, 11), strip(8, 12), strip(7.5, 12), strip(8, 12)],
    Image("0i1i", "0.1.", [1, 1], [1, 3], gt_boxes=[strip(0, 10), strip(2, 12)]),
)

# ---------------------------------------------------------------------------------------------------------------------
# Labels

add(
    "positives, then ignored, then background",
    "The first n_pos are its positives, the next n_total - n_pos are ignored, the rest are background.",
    # q_anchor .9 .6 .45 .4 .3: n_pos 2, n_total 4
    [strip(0, 9), strip(0, 6), strip(0, 4.5), strip(0, 4), strip(0, 3)],
    # q_regressed .1 .2 .3 .35 .8: ranks 4, 3 | 2, 1 | 0
    # nothing is ignored for localization
    Image(".ii00", "00...", [2], [4], pred_boxes=[strip(0, 1), strip(0, 2), strip(0, 3), strip(0, 3.5), strip(0, 8)]),
)
add(
    "equal ranks: the lowest anchor first",
    "largest first, lowest anchor index on ties",
    # q_anchor .5 .4 .1 .1: n_pos 1, n_total 2. q_regressed .9 0 .3 .3: ranks 0 | 2 | 3
    [strip(0, 5), strip(0, 4), strip(0, 1), strip(0, 1)],
    Image("0.i.", "0...", [1], [2], pred_boxes=[strip(0, 9), FAR, strip(0, 3), strip(0, 3)]),
)
add(
    "an object takes what it owns",
    "An object that owns fewer anchors than the count takes what it owns. Anchors of quality 0 are never chosen.",
    # n_pos 3; only the regressed box of anchor 1 touches the object.
    [strip(0, 10), strip(0, 9), strip(0, 8)],
    Image(".0.", "000", [3], pred_boxes=[FAR, strip(0, 1), FAR]),
)
add(
    "a sure anchor overtakes a better placed one",
    "the same ranking under q_amplified",
    # q_anchor .8 .6 .4: n_pos 2, n_total 3. p = 0, 0, 1: exponents log2 .8 = -.32, log2 .6 = -.74, log2 .4 / 2 = -.66.
    # Localization ranks 0, 2 | 1.
    [strip(0, 8), strip(0, 6), strip(0, 4)],
    Image("00i", "0.0", [2], [3], cls_logits=[[NEVER], [NEVER], [SURE]]),
)
add(
    "p is read at the object's label",
    "p[a, label g]; p = sigmoid(logit)",
    # q_anchor .7 .6, n_pos 1 (>= .65), n_total 2. Label 1: p = 0 and 1: exponents -.51 and -.74 / 2 = -.37: anchor 1.
    # Labels 0 and 2 (second image: label 2) say the opposite: -.26 and -.74: anchor 0.
    [strip(0, 7), strip(0, 6)],
    *(
        Image("0i", loc_match, [1], [2], gt_labels=[label], cls_logits=[[SURE, NEVER, SURE], [NEVER, SURE, NEVER]])
        for label, loc_match in ((1, ".0"), (2, "0."), (0, "0."))
    ),
    num_classes=3,
    options={"iou_positive": 0.65},
)
add(
    "probabilities are p themselves",
    "or cls_probabilities, p itself",
    # q_anchor .7 .6, n_pos 1 (>= .65). Label 1, p = 0 for anchor 0: exponent -.51. Anchor 1 with p = .75: -.74 * .625 =
    # -.46, the larger; with p = .5: -.55, the smaller. Taken for logits (.5 and .68), both would be anchor 0's.
    [strip(0, 7), strip(0, 6)],
    *(
        Image("0i", loc_match, [1], [2], gt_labels=[1], cls_probabilities=[[1, 0], [0, p]])
        for p, loc_match in ((0.75, ".0"), (0.5, "0."))
    ),
    num_classes=2,
    options={"iou_positive": 0.65},
)
add(
    "amplified quality decides the owner",
    "owner[a] = the object with the largest quality for a (under q_amplified)",
    # Anchors 0, 1 are objects 0, 1. Anchor 2 = [1.5, 11.5]: 8.5/11.5 = .74 with object 0, 7.5/12.5 = .6 with object 1.
    # By q_anchor it belongs to object 0: n_pos 2 and 1. Amplified (p = 0 for label 0, 1 for label 1): -.44 against
    # -.74 / 2 = -.37: object 1 owns it. Object 0 then owns anchor 0 alone and takes that; anchor 2 is second for
    # object 1.
    [strip(0, 10), strip(4, 14), strip(1.5, 11.5)],
    Image(
        "010",
        "01.",
        [2, 1],
        gt_boxes=[strip(0, 10), strip(4, 14)],
        gt_labels=[0, 1],
        cls_logits=[[0, 0], [0, 0], [NEVER, SURE]],
    ),
    num_classes=2,
)
add(
    "no overlap is not amplified",
    "and 0 where q_anchor is 0",
    # Anchor 0 is sure of the class but elsewhere; anchor 1 (IoU 1) belongs to object 0, which leaves object 1 (the same
    # place) empty, though its count is 1.
    [FAR, strip(0, 10)],
    Image(".0", ".0", [1, 1], gt_boxes=[strip(0, 10), strip(0, 10)], cls_logits=[[SURE], [NEVER]]),
)
for sigma, loc_match in (
    # q_anchor .7 .6, p = 0 and 1, n_pos 1 (>= .65): exponents log2 .7 = -.515 and (sigma - 1) / sigma * -.737.
    (1.0001, ".0"),  # -.00007
    (2.0, ".0"),  # -.368
    (3.0, ".0"),  # -.491
    (4.0, "0."),  # -.553
    (1e6, "0."),  # -.737
):
    add(
        f"sigma = {sigma:g}",
        "q_anchor ** ((sigma - p) / sigma)",
        [strip(0, 7), strip(0, 6)],
        Image("0i", loc_match, [1], [2], cls_logits=[[NEVER], [SURE]]),
        options={"iou_positive": 0.65, "sigma": sigma},
    )
for strategy, cls_match, loc_match in (
    # q_anchor .7 .6: n_pos 1 (>= .65), n_total 2. q_regressed .1 .9. p = 0 and 1: exponents -.51 and -.37.
    ("iou", "0i", "0."),
    ("localize_to_classify", "i0", "0."),
    ("classify_to_localize", "0i", ".0"),
    ("mutual", "i0", ".0"),
):
    add(
        f"strategy {strategy}",
        "strategy picks the quality of each task",
        [strip(0, 7), strip(0, 6)],
        Image(cls_match, loc_match, [1], [2], pred_boxes=[strip(0, 1), strip(0, 9)], cls_logits=[[NEVER], [SURE]]),
        options={"iou_positive": 0.65, "strategy": strategy},
    )
add(
    "boxes have two dimensions",
    "IoU = inter / union",
    # Object 10 x 10. Anchor 0 [0,0,10,5]: 50/100 = .5. Anchor 1 [5,5,15,15]: 25/175 = .14. Anchor 2 [0,0,5,8]: 40/100
    # = .4. Anchor 3 shares the x range but lies below: 0.
    [(0, 0, 10, 5), (5, 5, 15, 15), (0, 0, 5, 8), (0, 20, 10, 30)],
    Image("0.i.", "0...", [1], [2], gt_boxes=[(0, 0, 10, 10)]),
)

# ---------------------------------------------------------------------------------------------------------------------
# Box coder

DEFAULT_CODER = mg_ops.BoxCoder(weights=(10.0, 10.0, 5.0, 5.0), clip=math.log(1000 / 16))
add(
    "deltas are decoded",
    "box_deltas, with box_coder: the raw regression deltas instead, decoded inside",
    # dx = 10 moves by 10/10 of the width: anchor 0 -> [10, 20]; dx = -8 -> anchor 1 [10, 20] -> [2, 12]; dy = 10 moves
    # anchor 2 up by its height, off the object. q_anchor 0 .. : object [10, 20]: 0 1 1. q_regressed 1, 2/18, 0.
    # n_pos 2 (anchor 1 forced to 1, anchor 2 is 1). Classification ranks 0, 1; localization 1, 2.
    [strip(0, 10), strip(10, 20), strip(10, 20)],
    Image("00.", ".00", [2], gt_boxes=[strip(10, 20)], box_deltas=[(10, 0, 0, 0), (-8, 0, 0, 0), (0, 10, 0, 0)]),
    options={"box_coder": DEFAULT_CODER},
)
add(
    "log sizes are scaled and cut",
    "pw = exp(min(d_w / w_w, clip)) * w",
    # Anchors [4.5, 5.5] (.1 of [0, 10]), three times, n_pos 1, n_total 1. dw = 5 ln 10 -> width 10: about 1.
    # dw = 1000 -> cut at ln 62.5: width 62.5: 10/62.5 = .16. dw = 0: .1. First image: the exact one wins.
    # Second image: without it the cut one (.16) wins over .1.
    [strip(4.5, 5.5), strip(4.5, 5.5), strip(4.5, 5.5)],
    Image("..0", "0..", box_deltas=[(0, 0, 0, 0), (0, 0, 1000, 0), (0, 0, 5 * math.log(10), 0)]),
    Image(".0.", "0..", box_deltas=[(0, 0, 0, 0), (0, 0, 1000, 0), (0, 0, -1, 0)]),
    options={"box_coder": DEFAULT_CODER},
)
add(
    "weights and clip of the coder",
    "BoxCoder(weights, clip)",
    # Weights 1: dx = 1 moves by the width, [0, 10] -> [10, 20]: 1. clip = 0: dw = 1 -> min(1, 0) = 0, unchanged: 0
    # overlap for anchor 1. With the default coder dx = 1 would move by 1 only, and neither would touch the object.
    [strip(0, 10), strip(0, 10), strip(19, 29)],
    # q_anchor 0 0 1/19: n_pos 1. q_regressed 1 0 1/19.
    Image("0..", "..0", gt_boxes=[strip(10, 20)], box_deltas=[(1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 0)]),
    options={"box_coder": mg_ops.BoxCoder(weights=(1.0, 1.0, 1.0, 1.0), clip=0.0)},
)
add(
    "exploding and missing deltas",
    "A non-finite or inverted predicted box: quality 0 with everything.",
    # clip = inf: dw = 1e4 -> exp(2000) = inf: not finite. NaN likewise. dx = inf likewise. Left: anchor 3 with dx = 5:
    # [5, 15], 5/15. n_pos 4.
    [strip(0, 10)] * 4,
    Image("...0", "0000", [4], box_deltas=[(0, 0, 1e4, 0), (0, NAN, 0, 0), (INF, 0, 0, 0), (5, 0, 0, 0)]),
    options={"box_coder": mg_ops.BoxCoder(weights=(10.0, 10.0, 5.0, 5.0), clip=INF)},
)
add(
    "deltas of an invalid anchor",
    "A non-finite anchor: quality 0 with everything (decoded from it, so is the box)",
    [(0, 0, NAN, 1), strip(0, 6)],
    Image(".0", ".0"),
    options={"box_coder": DEFAULT_CODER},
)

# ---------------------------------------------------------------------------------------------------------------------
# Crowd regions

add(
    "background that a crowd covers is ignored",
    "background whose overlap with a crowd region, divided by the anchor's area, is >= crowd_overlap",
    # Against the crowd [0, 10]: 4/4, 5/10 (= .5, counts), 4/10, none. Anchor 1's IoU would be 5/15: the anchor's area
    # counts. The object [100, 110] has index 1: the crowds keep their places in the list.
    # Anchor 4 is the object's positive and anchor 5 (.45) ignored for it; the second crowd covers both and changes
    # nothing; anchor 6 ([108, 118]: 2/18 of the object, 7/10 of the crowd [95, 115]) becomes ignored.
    [strip(0, 4), strip(5, 15), strip(6, 16), strip(40, 50), strip(100, 110), strip(100, 104.5), strip(108, 118)],
    Image(
        "ii..1ii",
        "....1..",
        [0, 1, 0],
        [0, 2, 0],
        gt_boxes=[strip(0, 10), strip(100, 110), strip(95, 115)],
        gt_crowd=[True, False, True],
    ),
)
add(
    "a crowd takes no part",
    "A crowd region takes no part above.",
    # The crowd equals anchor 0 and would win it; the object (.5 of anchor 0) gets it. Anchor 1 overlaps only the
    # crowd, by .4.
    [strip(0, 10), strip(6, 16)],
    Image("1.", "1.", [0, 1], gt_boxes=[strip(0, 10), strip(0, 5)], gt_crowd=[True, False]),
)
add(
    "only crowds",
    "A crowd region takes no part above.",
    [strip(0, 10), strip(20, 30)],
    Image("i.", "..", [0], gt_crowd=[True]),
)
add(
    "another share of a crowd",
    "crowd_overlap",
    # 4/10 >= .25; 2.5/10 = .25; 2/10. In two dimensions: [0,0,4,4] against [0,0,10,1]: 4/16 = .25.
    # Two crowds do not add up: [8, 12] would be covered 2/4 by one and 0 by the other ([11.5, 13]: .5/4).
    [strip(6, 16), strip(7.5, 17.5), strip(8, 18), (0, 0, 4, 4), strip(9.2, 13.2)],
    # strip(6, 16): .4; strip(7.5, 17.5): .25; strip(8, 18): .2, and .05 of the second; (0, 0, 4, 4): .25;
    # strip(9.2, 13.2): .8/4 = .2 and .5/4 = .125: together .325, each below .25.
    Image("ii.i.", ".....", [0, 0], gt_boxes=[strip(0, 10), strip(12.5, 13)], gt_crowd=[True, True]),
    options={"crowd_overlap": 0.25},
)
add(
    "wholly covered",
    "crowd_overlap in (0, 1]",
    [strip(0, 10), strip(0, 10.5)],
    Image("i.", "..", [0], gt_crowd=[True]),
    options={"crowd_overlap": 1.0},
)
add(
    "invalid crowds have no effect",
    "Bad values never spread",
    [strip(0, 10), strip(0, 6)],
    Image(
        "44",
        "44",
        [0, 0, 0, 0, 2],
        gt_boxes=[(NAN, 0, 10, 1), (-INF, 0, INF, 1), (10, 0, 0, 1), (0, 0, 10, 0), strip(0, 10)],
        gt_crowd=[True, True, True, True, False],
    ),
    Image(
        "..",
        "..",
        [0] * 4,
        gt_boxes=[(NAN, 0, 10, 1), (-INF, 0, INF, 1), (10, 0, 0, 1), (0, 0, 10, 0)],
        gt_crowd=[True] * 4,
    ),
)

# ---------------------------------------------------------------------------------------------------------------------
# Bad values never spread

BAD_OBJECTS: dict[str, Box] = {
    "NaN": (NAN, NAN, NAN, NAN),
    "one NaN": (0, 0, 10, NAN),
    "inf": (0, 0, INF, 1),
    "-inf": (-INF, 0, 10, 1),
    "all inf": (-INF, -INF, INF, INF),
    "inverted": (10, 0, 0, 1),
    "inverted both ways": (10, 1, 0, 0),
    "zero width": (5, 0, 5, 1),
    "zero height": (0, 0.5, 10, 0.5),
    "all zero": (0, 0, 0, 0),
    "out of reach": FAR,
    "touching": (30, 0, 40, 1),
    "overflowing area": (-3e38, -3e38, 3e38, 3e38),
}
for bad_name, bad in BAD_OBJECTS.items():
    for place in range(3):
        # Two objects with two anchors each: [0, 10] with 1 and .6, [20, 30] with 1 and .7; a third, bad one among
        # them. The answer without it is owner 0 0 1 1 and counts 2 2; with it only the numbers of the later objects
        # shift.
        gt_boxes = [strip(0, 10), strip(20, 30)]
        gt_boxes.insert(place, bad)
        first, second = (index for index in range(3) if index != place)
        counts = [2, 2]
        counts.insert(place, 0)
        add(
            f"bad object, {bad_name}, place {place}",
            "takes no part, counts 0, and changes nothing for any other object",
            [strip(0, 10), strip(0, 6), strip(20, 30), strip(23, 30), strip(40, 50)],
            Image(f"{first}{first}{second}{second}.", f"{first}{first}{second}{second}.", counts, gt_boxes=gt_boxes),
        )
    add(
        f"bad object, {bad_name}, alone",
        "takes no part, counts 0",
        [strip(0, 10), strip(23, 30)],
        Image("..", "..", [0], gt_boxes=[bad]),
    )
add(
    "an object out of the anchors' reach stays out, whatever the regressed boxes",
    "An object that no anchor overlaps: takes no part",
    [strip(0, 10)],
    Image(".", ".", [0], gt_boxes=[strip(20, 30)], pred_boxes=[strip(20, 30)], cls_logits=[[SURE]]),
)
add(
    "invalid predicted boxes",
    "A non-finite or inverted predicted box: quality 0 with everything",
    [strip(0, 10)] * 7,
    # Only the last box is one: [0, 2], .2. n_pos 7.
    Image(
        "......0",
        "0000000",
        [7],
        pred_boxes=[
            (NAN, 0, 10, 1),
            (0, 0, 10, NAN),
            (0, 0, INF, 1),
            (-INF, -INF, INF, INF),
            (10, 0, 0, 1),
            (10, 1, 0, 0),
            strip(0, 2),
        ],
    ),
    # All invalid: the best of q_anchor, anchor 0.
    Image("0......", "0000000", [7], pred_boxes=[(NAN, NAN, NAN, NAN)] * 7),
)
for bad_name, bad in (
    ("NaN", (0.0, NAN, 10.0, 1.0)),
    ("inf", (-INF, 0.0, INF, 1.0)),
    ("inverted", (10.0, 0.0, 0.0, 1.0)),
    ("zero area", (0.0, 0.0, 10.0, 0.0)),
):
    # q_anchor 0 .6: n_pos 1, for anchor 1. The regressed box of anchor 0 is judged on its own: IoU 1 against .6.
    add(
        f"invalid anchor, {bad_name}",
        "A non-finite or inverted anchor: quality 0 with everything",
        [bad, strip(0, 6)],
        Image("0.", ".0", pred_boxes=[strip(0, 10), strip(0, 6)], cls_logits=[[SURE], [NEVER]]),
    )
    add(
        f"invalid anchor under a crowd, {bad_name}",
        "overlap with a crowd region divided by the anchor's area",
        [bad, strip(0, 6)],
        Image(".i", "..", [0], gt_boxes=[(0, 0, 10, 1)], gt_crowd=[True]),
    )
add(
    "a NaN score is p = 0",
    "A NaN score: p = 0.",
    # q_anchor .7 .6, n_pos 1 (>= .65). p = 0 and NaN -> 0: exponents -.51 and -.74: anchor 0. With p = 0 and +inf ->
    # 1: -.37: anchor 1. With p = -inf -> 0: anchor 0.
    [strip(0, 7), strip(0, 6)],
    *(
        Image("0i", loc_match, [1], [2], cls_logits=[[NEVER], [score]])
        for score, loc_match in ((NAN, "0."), (-NAN, "0."), (INF, ".0"), (-INF, "0."))
    ),
    options={"iou_positive": 0.65},
)
add(
    "a probability that is none is contained",
    "below 0 it counts as 0, above 1 as 1; a NaN score: p = 0",
    # As above. p = 0 gives the exponents -.51 and -.74, p = 1 gives -.26 and -.37, p = .5 for anchor 1 gives -.55.
    # Not contained, p = 3 would give anchor 1 +.37, and p = -1 anchor 0 -.77.
    [strip(0, 7), strip(0, 6)],
    *(
        Image("0i", loc_match, [1], [2], cls_probabilities=[[first], [second]])
        for first, second, loc_match in (
            *((1, 3, "0."), (0, 3, ".0"), (0, INF, ".0"), (1, INF, "0.")),
            *((-1, 0.5, "0."), (-INF, 0.5, "0."), (0, -INF, "0."), (-INF, 1, ".0")),
            *((NAN, 0.5, "0."), (0, NAN, "0."), (NAN, 1, ".0")),
        )
    ),
    options={"iou_positive": 0.65},
)
add(
    "an unknown label is p = 0",
    "A label outside [0, C): p = 0, and never a read out of bounds.",
    # As above; the logits would make anchor 1 win for any label in [0, 2). Neighbors in memory say the same.
    [strip(0, 7), strip(0, 6)],
    *(
        Image("0i", loc_match, [1], [2], gt_labels=[label], cls_logits=[[NEVER, NEVER], [SURE, SURE]])
        for label, loc_match in (
            *((label, ".0") for label in (0, 1)),
            *((label, "0.") for label in (2, -1, -2, 2**31 - 1, 2**31, 2**32, 2**32 + 1, -(2**32))),
            *((label, "0.") for label in (2**63 - 1, -(2**63))),
        )
    ),
    num_classes=2,
    options={"iou_positive": 0.65},
)
add(
    "no class at all",
    "A label outside [0, C): p = 0 (C = 0)",
    [strip(0, 7), strip(0, 6)],
    Image("00", "00", [2]),
    num_classes=0,
)
add(
    "no object",
    "An image without objects: all background, no positive.",
    [strip(0, 10), strip(0, 6)],
    Image("..", "..", [], gt_boxes=[]),
)
add(
    "an image without objects between others",
    "An image without objects: all background, no positive.",
    [strip(0, 10), strip(0, 6)],
    Image("00", "00", [2]),
    Image("..", "..", [], gt_boxes=[]),
    # [0, 6] is object 1; object 0 = [8, 10] overlaps anchor 0 only (.2), its best: anchor 0 is forced on it.
    Image("01", "01", [1, 1], gt_boxes=[strip(8, 10), strip(0, 6)]),
    Image("..", "..", [], gt_boxes=[]),
)
add("no image", "B = 0 is ordinary", [strip(0, 10)])
add(
    "no anchor",
    "A = 0 is ordinary: no anchor overlaps the objects",
    [],
    Image("", "", [0, 0], gt_boxes=[strip(0, 10), strip(0, 5)]),
    Image("", "", [], gt_boxes=[]),
)
add("no anchor and no image", "A = 0, B = 0 are ordinary", [])
add("no anchor, no object, no class", "A = 0, N = 0 are ordinary", [], Image("", "", [], gt_boxes=[]), num_classes=0)

# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic

add(
    "areas that overflow",
    "IoU = inter / union (0 unless finite and > 0)",
    # [0, 1e19] squared is 1e38; 1e38 + 1e38 - 1e38 = 1e38: IoU 1. [0, 1.5e19] squared is 2.25e38; with itself
    # 2.25e38 + 2.25e38 overflows: IoU 0, as with any union above 3.4e38.
    [(0, 0, 1e19, 1e19), (0, 0, 1.5e19, 1.5e19)],
    # anchor 1: 1e38 / ((2.25e38 + 1e38) - 1e38) = .44
    Image("0i", "0.", [1], [2], gt_boxes=[(0, 0, 1e19, 1e19)]),
    # anchor 0: .44, the best, forced; anchor 1: overflow, 0.
    Image("0.", "0.", gt_boxes=[(0, 0, 1.5e19, 1.5e19)]),
)
add(
    "areas that underflow",
    "IoU = inter / union (0 unless finite and > 0)",
    # 1e-30 squared is 0 in float32: no IoU, though the boxes are equal. 1e-22 squared is 1e-44, 7 units of the smallest
    # subnormal (1.4e-45): half of it in width is 5e-23 * 1e-22 = 5e-45, 3.57 -> 4 units: IoU 4 / ((4 + 7) - 4) = 4/7.
    [(0, 0, 1e-30, 1e-30), (1, 1, 1 + 1e-22, 1 + 1e-22), (0, 0, 5e-23, 1e-22)],
    # anchor 2 holds it, but the intersection is 0 as well
    Image("...", "...", [0], gt_boxes=[(0, 0, 1e-30, 1e-30)]),
    # q_anchor 0 0 4/7: n_pos 1. q_regressed 1 0 0.
    Image("0..", "..0", gt_boxes=[(0, 0, 1e-22, 1e-22)], pred_boxes=[(0, 0, 1e-22, 1e-22), FAR, FAR]),
)
add(
    "normalized coordinates",
    "any one unit (pixels, or fractions of the image)",
    # .25/.5 = .5, .5/.5 = 1 of the object; powers of two, so that the fractions are exact
    [(0.25, 0.25, 0.5, 0.75), (0.25, 0.25, 0.75, 0.75), (0.0, 0.0, 0.25, 0.25)],
    Image("00.", "00.", [2], gt_boxes=[(0.25, 0.25, 0.75, 0.75)]),
)
add(
    "negative coordinates",
    "boxes lie anywhere",
    [strip(-10, 0), strip(-5, 5), strip(0, 10)],
    # [-10, 0] is the object; [-5, 5]: 5/15; [0, 10] touches it
    Image("0..", "0..", gt_boxes=[strip(-10, 0)]),
)
