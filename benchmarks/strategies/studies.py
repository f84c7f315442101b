"""What is compared, as data: studies, their rows, and the runs these come to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STRATEGIES = ("iou", "localize_to_classify", "classify_to_localize", "mutual")


class Setting(NamedTuple):
    """What the runs of a study have in common. Its name is the folder of the runs."""

    name: str
    data: str
    """The data set, as docs/results.md calls it."""
    layout: str
    """"voc" or "coco"."""
    flags: dict[str, str]
    """Of detector.train."""


class Row(NamedTuple):
    """One thing that is trained, once a seed."""

    model: str
    backbone: str
    strategy: str
    flags: tuple[tuple[str, str], ...] = ()
    """Of detector.train, beyond the setting's."""
    note: str = ""
    """What tells the row from others of the same strategy."""

    @property
    def name(self) -> str:
        """The folder of its runs, but for the seed."""
        flags = "".join(f"-{flag}{value}" for flag, value in sorted(self.flags))
        return f"{self.model}-{self.backbone}-{self.strategy}{flags}"


class Study(NamedTuple):
    """A table of docs/results.md."""

    title: str
    setting: Setting
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    split: str = "test"
    """The split it reports; "val" for a study that chooses something."""
    baseline: tuple[str, str | None] | None = ("iou", "")
    """Strategy and note of the row that others of the same model are compared with, seed by seed; without a note, those
    of the same note."""


BCCD_160 = Setting(
    "bccd-160",
    "BCCD",
    "voc",
    {
        "train-split": "train",
        "eval-split": "val",
        "image-size": "160",
        "anchor-size": "12",
        "batch": "8",
        "warmup": "100",
        "epochs": "40",
        "amp": "bf16",
    },
)
"""Small enough for a CPU. Anchors from 12 pixels on, half of the published 24 as the input is half of 320."""

BCCD_320 = Setting(
    "bccd-320",
    "BCCD",
    "voc",
    {"train-split": "train", "eval-split": "val", "image-size": "320", "batch": "16", "epochs": "150", "amp": "bf16"},
)
AQUARIUM_320 = BCCD_320._replace(name="aquarium-320", data="Aquarium", flags={**BCCD_320.flags, "epochs": "100"})
"""448 training images to BCCD's 205: fewer epochs, for a few more steps."""

BCCD_160_LEARNING_RATE = ("lr", "0.02")
"""What the study bccd-learning-rate chose, by the static matching's score."""

PRETRAINED_LEARNING_RATE = ("lr", "0.01")
"""The published one, where the backbone has been trained before."""

RELEASED_LOSSES = (("box-loss", "released_balanced_l1"), ("focal-gamma", "1"))
"""What detector.reproduce trains with, and detector.train does not unless asked to."""

DETECTORS = (("fssd", "vgg16"), ("retinanet", "vgg16"), ("rfbnet", "vgg16"), ("fssd", "resnet18"))
EVERY_DETECTOR = tuple(Row(model, backbone, strategy) for model, backbone in DETECTORS for strategy in STRATEGIES)

STUDIES = {
    "bccd-learning-rate": Study(
        "BCCD at 160 pixels: the learning rate, chosen on val by shorter runs",
        BCCD_160,
        tuple(
            Row("fssd", "resnet18", strategy, (("epochs", "25"), ("lr", lr)), f"lr {lr}")
            for lr in ("0.01", "0.02")
            for strategy in ("iou", "mutual")
        ),
        (0,),
        split="val",
        baseline=None,
    ),
    "bccd-fssd-resnet18": Study(
        "BCCD at 160 pixels: the four strategies",
        BCCD_160,
        tuple(Row("fssd", "resnet18", strategy, (BCCD_160_LEARNING_RATE,)) for strategy in STRATEGIES),
        (0, 1, 2),
    ),
    "bccd-sigma": Study(
        "BCCD at 160 pixels: the degree of amplification",
        BCCD_160,
        (
            *(
                Row(
                    "fssd",
                    "resnet18",
                    "mutual",
                    # 2 is the default, and not in the name: the runs of bccd-fssd-resnet18 are these.
                    (BCCD_160_LEARNING_RATE, *((("sigma", sigma),) if sigma != "2" else ())),
                    f"sigma {sigma}",
                )
                for sigma in ("1.5", "2", "3", "5")
            ),
            # Localisation by the anchors' own IoU, classification by regressed boxes: mutual without amplification.
            Row("fssd", "resnet18", "localize_to_classify", (BCCD_160_LEARNING_RATE,), "no amplification"),
        ),
        (0, 1, 2),
        baseline=("localize_to_classify", "no amplification"),
    ),
    "bccd-released-losses": Study(
        "BCCD at 160 pixels: with the losses of the paper's released code",
        BCCD_160,
        tuple(
            Row("fssd", "resnet18", strategy, (*flags, BCCD_160_LEARNING_RATE), note)
            for flags, note in (
                ((), ""),
                (RELEASED_LOSSES[:1], "released Balanced L1"),
                (RELEASED_LOSSES[1:], "gamma 1"),
                (RELEASED_LOSSES, "released losses"),
            )
            for strategy in ("iou", "mutual")
        ),
        (0, 1, 2),
        baseline=("iou", None),
    ),
    "bccd-schedule": Study(
        "BCCD at 160 pixels: shorter and longer schedules",
        BCCD_160,
        tuple(
            Row("fssd", "resnet18", strategy, (*flags, BCCD_160_LEARNING_RATE), note)
            for flags, note in (
                ((("epochs", "10"),), "10 epochs"),
                ((("epochs", "20"),), "20 epochs"),
                ((), ""),
                ((("epochs", "80"),), "80 epochs"),
                (RELEASED_LOSSES, "released losses"),
                ((*RELEASED_LOSSES, ("epochs", "80")), "released losses, 80 epochs"),
            )
            for strategy in ("iou", "mutual")
        ),
        (0, 1, 2),
        baseline=("iou", None),
    ),
    "bccd-detectors": Study(
        "BCCD at 160 pixels: other detectors, and a pretrained backbone",
        BCCD_160,
        tuple(
            Row(model, backbone, strategy, flags, note)
            for model, backbone, flags, note in (
                ("fssd", "resnet18", (BCCD_160_LEARNING_RATE,), ""),
                ("retinanet", "resnet18", (BCCD_160_LEARNING_RATE,), ""),
                ("retinanet", "resnet18", (("epochs", "80"), BCCD_160_LEARNING_RATE), "80 epochs"),
                ("rfbnet", "vgg16", (("epochs", "15"), PRETRAINED_LEARNING_RATE), "15 epochs"),
                ("rfbnet", "vgg16", (PRETRAINED_LEARNING_RATE,), ""),
            )
            for strategy in ("iou", "mutual")
        ),
        (0, 1, 2),
        baseline=("iou", None),
    ),
    "aquarium": Study("Aquarium at 320 pixels: every detector", AQUARIUM_320, EVERY_DETECTOR, (0, 1, 2)),
    "bccd": Study("BCCD at 320 pixels: every detector", BCCD_320, EVERY_DETECTOR, (0, 1, 2)),
}
PRETRAINED = ("vgg16",)
"""Backbones that start from ImageNet weights here; the others start from random ones."""


class Run(NamedTuple):
    """A row with one seed, and its folder."""

    setting: Setting
    row: Row
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """As progress and messages call it."""
        return f"{self.row.name}-seed{self.seed}"

    def flags(self) -> dict[str, str]:
        """The flags of detector.train that decide what the run computes, but for the file of pretrained weights."""
        flags = {"format": self.setting.layout, **self.setting.flags}
        flags |= {"model": self.row.model, "backbone": self.row.backbone, "strategy": self.row.strategy}
        return {**flags, **dict(self.row.flags), "seed": str(self.seed)}


def find_runs(study: Study, rows: Sequence[Row], seeds: Sequence[int] | None, folder: Path) -> list[Run]:
    """The runs of a study, seed by seed so that every strategy has the first seed before one has the second.

    Args:
        study: of which the runs are.
        rows: those of its rows that are wanted.
        seeds: None for every seed that has a folder.
        folder: where the settings' folders are.
    """
    runs = []
    for row in rows:
        found = seeds
        if found is None:
            folders = (folder / study.setting.name).glob(f"{row.name}-seed*")
            endings = [path.name.removeprefix(f"{row.name}-seed") for path in folders]
            found = [int(ending) for ending in endings if ending.isdecimal()]
        runs += [
            Run(study.setting, row, seed, folder / study.setting.name / f"{row.name}-seed{seed}") for seed in found
        ]
    order = {row.name: position for position, row in enumerate(rows)}
    return sorted(runs, key=lambda run: (run.seed, order[run.row.name]))


def is_trained(run: Run) -> bool:
    """Whether it was trained to its end."""
    return (run.folder / "results.json").is_file()


def is_complete(run: Run, split: str) -> bool:
    """Whether it has what a study of this split reports."""
    return is_trained(run) and (split == "val" or (run.folder / "test" / "metrics.json").is_file())
