"""benchmarks/training_step.py measures the step that detector.train takes, and says where its time goes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import training_step
from benchmarks.baselines import Match
from benchmarks.cases import Batch

TINY = ["--detectors", "fssd-resnet18", "--image-size", "64", "--batch", "2", "--steps", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def options() -> argparse.Namespace:
    return training_step.parse_options(TINY)


def test_every_phase_of_every_matching_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    assert training_step.main([*TINY, "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    assert content["machine"]["commit"] and content["objects_per_image"] >= 1
    rows = content["detectors"]["fssd-resnet18"]["matchings"]
    assert {"(a) loop", "(b) batched, padded"} < rows.keys()
    for row in rows.values():
        assert tuple(row["phases"]) == training_step.PHASES and min(row["phases"].values()) >= 0
        assert row["phases"]["forward"] > 0 and row["phases"]["backward"] > 0
        assert row["images_per_second"] == pytest.approx(2 / row["step_seconds"])
        assert row["share_of_labels_equal"] >= 0.999
        assert row["peak_bytes"] is None or row["peak_bytes"] > 1e6
    said = capsys.readouterr().out
    assert "optimizer" in said and "images/s" in said and "(a) loop" in said


def test_its_samples_have_images_and_objects_of_the_size_asked_for(options: argparse.Namespace) -> None:
    samples = training_step.make_samples(options)
    assert len(samples) == training_step.NUM_BATCHES
    for images, objects in samples:
        assert images.shape == (2, 3, 64, 64) and len(objects.counts) == 2 and min(objects.counts) >= 1
        assert objects.gt_boxes.min() >= -1e-3 and objects.gt_boxes.max() <= 64 + 1e-3


def test_a_step_trains_the_same_weights_whatever_matches(options: argparse.Namespace) -> None:
    """The matchings agree on these labels, so a step with one is a step with another: nothing else differs."""
    sample = training_step.make_samples(options)[0]
    weights = []
    for matching in training_step.make_matchings("cpu").values():
        trainer = training_step.Trainer("fssd-resnet18", options)
        before = trainer.model.head.boxes[0].weight.detach().clone()
        assert trainer.agreement(sample, matching) == 1.0
        trainer.step(sample, matching)
        weights.append(trainer.model.head.boxes[0].weight.detach())
        assert not torch.equal(before, weights[-1])
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=0)


def test_a_matching_whose_labels_are_wrong_is_refused(options: argparse.Namespace) -> None:
    sample = training_step.make_samples(options)[0]

    def match_nothing(batch: Batch) -> Match:
        labels = torch.zeros(batch.logits.shape[:2], dtype=torch.int64)
        return Match(labels, labels)

    with pytest.raises(RuntimeError, match="of the labels"):
        training_step.measure_detector("fssd-resnet18", [sample], {"wrong": match_nothing}, options)
