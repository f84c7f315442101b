"""What is compared, as data: the studies of docs/results.md."""

from __future__ import annotations

from collections.abc import Iterable

from detector.reproduce import STRATEGIES
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

LR = "--lr 0.02"
"""What the study bccd-learning-rate chose, by the static matching's score."""

PUBLISHED_LR = "--lr 0.01"
"""Where the backbone has been trained before."""

RELEASED_BOX_LOSS, RELEASED_GAMMA = "--box-loss released_balanced_l1", "--focal-gamma 1"
"""What detector.reproduce trains with, and detector.train does not unless asked to."""


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
                "released losses": f"{RELEASED_BOX_LOSS} {RELEASED_GAMMA} {LR}",
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
                "released losses": f"{RELEASED_BOX_LOSS} {RELEASED_GAMMA} {LR}",
                "released losses, 80 epochs": f"{RELEASED_BOX_LOSS} {RELEASED_GAMMA} --epochs 80 {LR}",
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
        make_rows({"": LR}, ("iou", "mutual", "task_aligned", "atss")),
        tuple(range(6)),
    ),
    Study("aquarium", "Aquarium at 320 pixels: every detector", AQUARIUM_320, EVERY_DETECTOR),
    Study("bccd", "BCCD at 320 pixels: every detector", BCCD_320, EVERY_DETECTOR),
)
STUDIES = {study.name: study for study in ALL}
