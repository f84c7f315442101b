"""benchmarks/training_step.py measures the step that detector.train takes, and says where its time goes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from small_data import write_voc

from benchmarks import training_step
from detector.batches import TrainingBatch
from detector.data import read_data

TINY = ["--detectors", "fssd-resnet18", "--image-size", "64", "--batch", "2", "--steps", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    data = write_voc(tmp_path / "voc", {"train": 3, "val": 1})
    return training_step.parse_options([*TINY, "--data", str(data)])


def test_every_phase_of_every_matching_is_measured_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "figures.json"
    assert training_step.main([*TINY, "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    assert content["machine"]["commit"] and content["options"]["data"] is None and content["objects_per_image"] > 0
    assert 0 < content["data_milliseconds_per_image"]["augment"]
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
    assert "optimiser" in said and "images/s" in said and "(a) loop" in said


def test_its_batches_are_the_data_sets_augmented_images(options: argparse.Namespace) -> None:
    data = read_data(options.data, "voc", "train")
    batches, milliseconds = training_step.prepare_batches(data, options)
    assert len(batches) == 3 and {len(batch.image_names) for batch in batches} == {2}
    assert {name for batch in batches for name in batch.image_names} == {image.name for image in data.images}
    assert batches[0].images.shape == (2, 3, 64, 64) and set(milliseconds) == {"augment", "decode and augment"}


def test_each_matching_gets_the_same_objects_in_its_own_form() -> None:
    boxes = torch.arange(12.0).reshape(3, 4)
    batch = TrainingBatch(
        torch.zeros(3, 3, 64, 64, dtype=torch.uint8), boxes, torch.tensor([5, 6, 7]), torch.zeros(3, dtype=torch.bool),
        torch.tensor([0, 2, 2, 3]), ["a", "b", "c"], [],
    )  # fmt: skip
    forms = training_step.add_object_forms(batch, torch.device("cpu"))
    assert [labels.tolist() for labels in forms.lists[1]] == [[5, 6], [], [7]]
    assert forms.padded[1].tolist() == [[5, 6], [0, 0], [7, 0]]
    assert torch.equal(forms.padded[0][2], torch.stack([boxes[2], torch.zeros(4)]))
    none = torch.zeros(0)
    empty = batch._replace(
        gt_boxes=none.reshape(0, 4), gt_labels=none.long(), gt_crowd=none.bool(), gt_offsets=torch.zeros(4).long()
    )
    assert training_step.add_object_forms(empty, torch.device("cpu")).padded[0].shape == (3, 1, 4)


def test_a_step_trains_the_same_weights_whatever_matches(options: argparse.Namespace) -> None:
    """The matchings agree on these labels, so a step with one is a step with another: nothing else differs."""
    data = read_data(options.data, "voc", "train")
    batch = training_step.add_object_forms(training_step.prepare_batches(data, options)[0][0], torch.device("cpu"))
    weights = []
    for matching in training_step.make_matchings("cpu").values():
        trainer = training_step.Trainer("fssd-resnet18", 2, options)
        before = trainer.model.head.boxes[0].weight.detach().clone()
        assert trainer.agreement(batch, matching) == 1.0
        trainer.step(batch, matching)
        weights.append(trainer.model.head.boxes[0].weight.detach())
        assert not torch.equal(before, weights[-1])
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=0)


def test_a_matching_whose_labels_are_wrong_is_refused(options: argparse.Namespace) -> None:
    data = read_data(options.data, "voc", "train")
    batch = training_step.add_object_forms(training_step.prepare_batches(data, options)[0][0], torch.device("cpu"))

    def match_nothing(model: torch.nn.Module, deltas: torch.Tensor, logits: torch.Tensor, batch: object) -> object:
        labels = torch.full(logits.shape[:2], 0)
        return training_step.mg_ops.MutualMatch(labels, labels, labels, labels)

    with pytest.raises(RuntimeError, match="of the labels"):
        training_step.measure_detector("fssd-resnet18", [batch], 2, {"wrong": match_nothing}, options, lambda: None)
