"""benchmarks/training_step.py measures the step that detector.train takes, and says where its time goes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks import training_step

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
        slowest = row["slowest_step_seconds"]
        assert row["phases"]["forward"] > 0 and row["phases"]["backward"] > 0 and row["step_seconds"] <= slowest
        assert row["images_per_second"] == pytest.approx(2 / row["step_seconds"])
        assert row["share_of_labels_equal"] >= 0.999
        assert row["peak_bytes"] is None or row["peak_bytes"] > 1e6
    said = capsys.readouterr().out
    assert "optimizer" in said and "images/s" in said and "(a) loop" in said


def test_each_matching_gets_the_same_objects_in_its_own_form(options: argparse.Namespace) -> None:
    batches = training_step.make_batches(options)
    assert len(batches) == training_step.NUM_BATCHES and batches[0].images.shape == (2, 3, 64, 64)
    for batch in batches:
        sizes = batch.gt_offsets.diff().tolist()
        assert min(sizes) >= 1 and batch.gt_boxes.min() >= -1e-3 and batch.gt_boxes.max() <= 64 + 1e-3
        for form in (0, 1):
            packed = (batch.gt_boxes, batch.gt_labels)[form]
            assert torch.equal(torch.cat(batch.lists[form]), packed)
            rows = list(zip(batch.padded[form], sizes, strict=True))
            assert torch.equal(torch.cat([row[:size] for row, size in rows]), packed)
            assert not any(row[size:].any() for row, size in rows)


def test_a_step_trains_the_same_weights_whatever_matches(options: argparse.Namespace) -> None:
    """The matchings agree on these labels, so a step with one is a step with another: nothing else differs."""
    batch = training_step.make_batches(options)[0]
    weights = []
    for matching in training_step.make_matchings("cpu").values():
        trainer = training_step.Trainer("fssd-resnet18", options)
        before = trainer.model.head.boxes[0].weight.detach().clone()
        assert trainer.agreement(batch, matching) == 1.0
        trainer.step(batch, matching)
        weights.append(trainer.model.head.boxes[0].weight.detach())
        assert not torch.equal(before, weights[-1])
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=0)


def test_a_matching_whose_labels_are_wrong_is_refused(options: argparse.Namespace) -> None:
    batch = training_step.make_batches(options)[0]

    def match_nothing(anchors: torch.Tensor, deltas: torch.Tensor, logits: torch.Tensor, batch: object) -> object:
        labels = torch.full(logits.shape[:2], 0)
        return training_step.mg_ops.MutualMatch(labels, labels, labels, labels)

    with pytest.raises(RuntimeError, match="of the labels"):
        training_step.measure_detector("fssd-resnet18", [batch], {"wrong": match_nothing}, options)
