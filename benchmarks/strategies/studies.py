"""What is compared, as data: the studies of docs/results/."""

from __future__ import annotations

from collections.abc import Iterable

from detector.reproduce import STRATEGIES
from detector.rules import RULES
from detector.runs import Row, Setting, Study, parse_flags

SPLITS = "--train-split train --eval-split val --image-size"
BCCD_160 = Setting(
    "bccd-160",
    "BCCD",
    "voc",
    # Small enough for a CPU. Anchors from 12 pixels on, half of the published 24 as the input is half of 320.
    parse_flags(f"{SPLITS} 160 --anchor-size 12 --batch 8 --warmup 100 --epochs 40 --amp bf16"),
)
BCCD_320 = Setting("bccd-320", "BCCD", "voc", parse_flags(f"{SPLITS} 320 --batch 16 --epochs 150 --amp bf16"))
AQUARIUM_320 = Setting(
    "aquarium-320", "Aquarium", "voc", parse_flags(f"{SPLITS} 320 --batch 16 --epochs 100 --amp bf16")
)
"""448 training images to BCCD's 205: fewer epochs, for a few more steps."""

BCCD_160_KEPT = BCCD_160._replace(name="bccd-160-kept")
"""Of runs whose checkpoint of every epoch stays: for how labels change."""
AQUARIUM_192 = Setting(
    "aquarium-192",
    "Aquarium",
    "voc",
    # A size for a CPU. Anchors from 12 pixels on: half of the objects are smaller than 17 pixels.
    parse_flags(f"{SPLITS} 192 --anchor-size 12 --batch 8 --warmup 100 --epochs 30 --amp bf16"),
)

LR = "--lr 0.02"
"""What the study bccd-learning-rate chose, by the static matching's score."""

PUBLISHED_LR = "--lr 0.01"
"""Where the backbone has been trained before."""

RELEASED_BOX_LOSS, RELEASED_GAMMA = "--box-loss released_balanced_l1", "--focal-gamma 1"
"""What detector.reproduce trains with, and detector.train does not unless asked to."""
RELEASED = f"{RELEASED_BOX_LOSS} {RELEASED_GAMMA}"
BOX_RULES = ("iou", "mutual", "task_aligned", "atss")
"""Those that any anchors will do for."""
POINTS = "--anchors-per-location 1 --anchor-size 8"
"""The anchor-free head."""


def make_rows(
    variants: dict[str, str], strategies: Iterable[str] = ("iou", "mutual"), detector: str = "fssd resnet18"
) -> tuple[Row, ...]:
    """Every variant, flags by note, with every strategy."""
    flags = {note: parse_flags(text) for note, text in variants.items()}
    return tuple(Row(*detector.split(), strategy, flags[note], note) for note in flags for strategy in strategies)


EVERY_DETECTOR = tuple(
    row
    for detector in ("fssd vgg16", "retinanet vgg16", "rfbnet vgg16", "fssd resnet18")
    for row in make_rows({"": ""}, STRATEGIES, detector)
)
ALL = (
    Study(
        "bccd-learning-rate",
        "BCCD at 160 pixels: the learning rate, chosen on val by shorter runs",
        BCCD_160,
        make_rows({f"lr {lr}": f"--epochs 25 --lr {lr}" for lr in ("0.01", "0.02")}),
        (0,),
        split="val",
        baseline=None,
    ),
    Study("bccd-fssd-resnet18", "BCCD at 160 pixels: the four strategies", BCCD_160, make_rows({"": LR}, STRATEGIES)),
    Study(
        "bccd-sigma",
        "BCCD at 160 pixels: the degree of amplification",
        BCCD_160,
        (
            *make_rows({"sigma 1.5": f"{LR} --sigma 1.5"}, ["mutual"]),
            *make_rows({"sigma 2": LR}, ["mutual"]),  # the default: the runs of bccd-fssd-resnet18 are these
            *make_rows({f"sigma {sigma}": f"{LR} --sigma {sigma}" for sigma in (3, 5)}, ["mutual"]),
            # Localization by the anchors' own IoU, classification by regressed boxes: mutual without amplification.
            *make_rows({"no amplification": LR}, ["localize_to_classify"]),
        ),
        baseline=("localize_to_classify", "no amplification"),
    ),
    Study(
        "bccd-released-losses",
        "BCCD at 160 pixels: with the losses of the paper's released code",
        BCCD_160,
        make_rows(
            {
                "": LR,
                "released Balanced L1": f"{RELEASED_BOX_LOSS} {LR}",
                "gamma 1": f"{RELEASED_GAMMA} {LR}",
                "released losses": f"{RELEASED} {LR}",
            }
        ),
        baseline=("iou", None),
    ),
    Study(
        "bccd-schedule",
        "BCCD at 160 pixels: shorter and longer schedules",
        BCCD_160,
        make_rows(
            {
                "10 epochs": f"--epochs 10 {LR}",
                "20 epochs": f"--epochs 20 {LR}",
                "": LR,
                "80 epochs": f"--epochs 80 {LR}",
                "released losses": f"{RELEASED} {LR}",
                "released losses, 80 epochs": f"{RELEASED} --epochs 80 {LR}",
            }
        ),
        baseline=("iou", None),
    ),
    Study(
        "bccd-detectors",
        "BCCD at 160 pixels: other detectors, and a pretrained backbone",
        BCCD_160,
        (
            *make_rows({"": LR}),
            *make_rows({"": LR, "80 epochs": f"--epochs 80 {LR}"}, detector="retinanet resnet18"),
            *make_rows({"15 epochs": f"--epochs 15 {PUBLISHED_LR}", "": PUBLISHED_LR}, detector="rfbnet vgg16"),
        ),
        baseline=("iou", None),
    ),
    Study(
        "bccd-rules",
        "BCCD at 160 pixels: the rules of other detectors, all else equal",
        BCCD_160,
        make_rows({"": LR}, BOX_RULES),
        tuple(range(6)),
    ),
    Study(
        "bccd-rules-variants",
        "BCCD at 160 pixels: Mutual Guidance's halves and dynamic counts, all else equal",
        BCCD_160,
        make_rows({"": LR}, ("iou", "localize_to_classify", "classify_to_localize", "mutual", "dynamic_mutual")),
    ),
    Study(
        "bccd-rules-as-published",
        "BCCD at 160 pixels: each rule with the classification loss and soft targets of its paper",
        BCCD_160,
        (
            *make_rows({"released losses": f"{RELEASED} {LR}"}),  # Mutual Guidance's
            *make_rows({"focal loss": LR}, ["atss"]),
            *make_rows({"quality focal loss": f"--cls-loss quality_focal {LR}"}, ["task_aligned", "dynamic_mutual"]),
            *make_rows({"soft BCE": f"--cls-loss soft_bce {LR}"}, ["task_aligned"]),  # YOLOv8's
        ),
        baseline=("iou", "released losses"),
    ),
    Study(
        "bccd-rules-anchor-free",
        "BCCD at 160 pixels: every rule on an anchor-free head, all else equal",
        BCCD_160,
        make_rows({"": f"{POINTS} {LR}"}, [rule for rule in RULES if rule != "max_iou"]),
    ),
    Study(
        "bccd-rules-anchor-free-as-published",
        "BCCD at 160 pixels: the rules of anchor-free detectors, with the soft targets of their papers",
        BCCD_160,
        (
            *make_rows({"focal loss": f"{POINTS} {LR}"}, ["iou", "mutual", "atss"]),
            *make_rows({"soft BCE": f"{POINTS} --cls-loss soft_bce {LR}"}, ["task_aligned", "simota"]),
            *make_rows(
                {"quality focal loss": f"{POINTS} --cls-loss quality_focal {LR}"},
                ["task_aligned", "dynamic_soft_label", "dynamic_mutual"],
            ),
        ),
        baseline=("iou", "focal loss"),
    ),
    Study(
        "bccd-slow-start",
        "BCCD at 160 pixels: a quarter of the schedule, static matching first",
        BCCD_160,
        tuple(
            row
            for detector, lr in (("fssd resnet18", LR), ("rfbnet vgg16", PUBLISHED_LR))
            for row in (
                *make_rows({"10 epochs": f"--epochs 10 {lr}"}, detector=detector),
                *make_rows(
                    {
                        f"10 epochs, from epoch {epoch}": f"--epochs 10 --strategy-from-epoch {epoch} {lr}"
                        for epoch in (2, 5)
                    },
                    ["mutual"],
                    detector,
                ),
            )
        ),
        baseline=("iou", "10 epochs"),
    ),
    Study(
        "bccd-label-changes",
        "BCCD at 160 pixels: how many labels change from epoch to epoch",
        BCCD_160_KEPT,
        make_rows({"10 epochs": f"--epochs 10 {LR}"}, BOX_RULES),
        (0,),
        baseline=("iou", "10 epochs"),
        words=("--cache", "--keep-every", "1"),
    ),
    Study(
        "bccd-retinanet",
        "BCCD at 160 pixels: RetinaNet with the released losses, and twice the schedule",
        BCCD_160,
        make_rows(
            {
                "": LR,
                "released losses": f"{RELEASED} {LR}",
                "80 epochs": f"--epochs 80 {LR}",
                "released losses, 80 epochs": f"{RELEASED} --epochs 80 {LR}",
            },
            detector="retinanet resnet18",
        ),
        baseline=("iou", None),
    ),
    Study(
        "aquarium-rules",
        "Aquarium at 192 pixels: the rules of other detectors, all else equal",
        AQUARIUM_192,
        make_rows({"": LR}, BOX_RULES),
    ),
    Study("aquarium", "Aquarium at 320 pixels: every detector", AQUARIUM_320, EVERY_DETECTOR),
    Study("bccd", "BCCD at 320 pixels: every detector", BCCD_320, EVERY_DETECTOR),
)
STUDIES = {study.name: study for study in ALL}
