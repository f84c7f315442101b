"""Runs cannot hurt each other, lose nothing at a signal, go on, start from others, and say what they do."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import train_flags

import detector.train
from detector.checkpoint import initialize_from, read_checkpoint
from detector.detectors import OneStageDetector, make_detector
from detector.run_log import RunLog, claim_folder, read_log

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_folder_that_another_process_trains_in_is_refused(voc: Path, tmp_path: Path) -> None:
    with claim_folder(tmp_path, []), pytest.raises(ValueError, match=f"--out: another process trains in {tmp_path}"):
        detector.train.main(train_flags(voc, tmp_path))
    assert not (tmp_path / "log.jsonl").exists()


def test_the_default_folder_says_what_tells_runs_apart(voc: Path) -> None:
    words = ("--data", str(voc), "--format", "voc", "--strategy", "iou", "--epochs", "40", "--lr", "0.02")
    out = detector.train.parse_arguments([*words]).out
    assert out == Path("runs") / f"{voc.name}-fssd-resnet18-iou-320-lr0.02-40epochs-seed0"


def test_what_a_killed_process_left_unfinished_is_removed(voc: Path, tmp_path: Path) -> None:
    (tmp_path / ".last.pt.unfinished").write_bytes(b"half")
    with claim_folder(tmp_path, ["last.pt"]):
        assert not (tmp_path / ".last.pt.unfinished").exists()


@pytest.mark.parametrize("eval_every", [1, 0])
def test_a_signal_in_an_evaluation_ends_it_at_once_and_every_step_is_saved(
    eval_every: int, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    changes: dict[str, object] = {"epochs": 2, "eval-every": eval_every}
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(detector.train, "evaluate", slow)
        with pytest.raises(SystemExit) as end:
            detector.train.main(train_flags(voc, tmp_path, **changes))
    saved = 2 if eval_every else 4  # of 4 steps
    assert end.value.code == 143 and read_checkpoint(tmp_path)["step"] == saved
    assert f"SIGTERM: saved step {saved} of 4" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is handler
    detector.train.main(train_flags(voc, tmp_path, resume=True, **changes))
    assert (tmp_path / "results.json").is_file()


def test_a_logger_that_fails_costs_nothing_but_its_entries(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def fails(*arguments: object, **options: object) -> None:
        raise RuntimeError("the server is full")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fails)
    detector.train.main(train_flags(voc, tmp_path))
    assert len(read_log(tmp_path / "log.jsonl")) == 3
    assert capsys.readouterr().err.count("the server is full") == 1


def test_a_run_goes_on_to_more_epochs_and_not_to_fewer(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector.train.main(train_flags(voc, tmp_path))
    metrics = detector.train.main(train_flags(voc, tmp_path, resume=True, epochs=3))
    assert "--epochs raised from 1 to 3" in capsys.readouterr().out
    assert metrics["arguments"]["epochs"] == 3 and read_checkpoint(tmp_path)["step"] == 6
    entries = read_log(tmp_path / "log.jsonl")
    assert {"step": 2, "epochs_before": 1, "epochs": 3} in entries
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(6))
    with pytest.raises(ValueError, match="started with other flags: epochs 3 -> 2"):
        detector.train.main(train_flags(voc, tmp_path, resume=True, epochs=2))


# ---- Fine-tuning


def content_of(model: OneStageDetector, class_names: list[str]) -> dict[str, Any]:
    """A checkpoint of a model."""
    return {"model": {name: value.clone() for name, value in model.state_dict().items()}, "class_names": class_names}


def test_everything_that_fits_is_taken_and_classes_by_their_names() -> None:
    torch.manual_seed(0)
    source, target = make_detector("fssd", "resnet18", 64, 2), make_detector("fssd", "resnet18", 512, 3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    said = initialize_from(target, content_of(source, ["cat", "dog"]), ["dog", "cow", "cat"])
    assert "2 of 3 classes taken (dog, cat)" in said and "not taken (neck.downsample.3.0.weight" in said
    after, old = target.state_dict(), source.state_dict()
    for name in ("backbone.layer4.1.conv2.weight", "neck.fuse.0.weight", "head.boxes.3.weight"):
        assert after[name].equal(old[name]) and not after[name].equal(before[name])
    for level in range(4):
        for part in ("weight", "bias"):
            name = f"head.classes.{level}.{part}"
            ours, theirs = (state[name].unflatten(0, (6, -1)) for state in (after, old))
            assert ours[:, 0].equal(theirs[:, 1]) and ours[:, 2].equal(theirs[:, 0])
            assert ours[:, 1].equal(before[name].unflatten(0, (6, -1))[:, 1])
    for name in ("neck.downsample.3.0.weight", "head.classes.4.weight"):  # the fifth level, from 512 pixels on
        assert after[name].equal(before[name])


def test_a_head_of_other_anchors_is_not_taken() -> None:
    source = make_detector("fssd", "resnet18", 64, 3)
    target = make_detector("fssd", "resnet18", 64, 18, anchors_per_location=1)  # as many channels
    said = initialize_from(target, content_of(source, ["a", "b", "c"]), [f"class {index}" for index in range(18)])
    assert "classes taken" not in said


def test_a_checkpoint_of_which_nothing_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="--init-from: no tensor of the checkpoint fits"):
        initialize_from(
            make_detector("fssd", "resnet18", 64, 1), {"model": {"a": torch.ones(1)}, "class_names": []}, []
        )


def test_training_starts_from_another_run(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    detector.train.main(train_flags(voc, tmp_path / "first"))
    changes = {"init-from": tmp_path / "first", "backbone-weights": None, "strategy": "iou", "lr": 0}
    detector.train.main(train_flags(voc, tmp_path / "second", **changes))
    assert f"--init-from {tmp_path / 'first'}: " in capsys.readouterr().out
    first, second = (read_checkpoint(tmp_path / name)["model"] for name in ("first", "second"))
    weight = "neck.fuse.0.weight"
    assert torch.allclose(first[weight], second[weight], atol=1e-5)  # the schedule ends above a rate of 0


# ---- What a run says


def test_the_types_that_autocast_takes_are_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    cpu = torch.device("cpu")
    for has, chosen in ((True, "bf16"), (False, "none")):
        monkeypatch.setattr(detector.train, "has_bfloat16", lambda device, has=has: has)
        assert detector.train.choose_amp("auto", cpu, said.append) == chosen
    assert said == ["--amp auto: bf16", "--amp auto: none"]
    assert detector.train.choose_amp("bf16", cpu, said.append) == "bf16"
    assert said[2].startswith("warning: --amp bf16: this cpu has no bfloat16 instructions") and "--amp auto" in said[2]


def test_a_log_that_is_no_terminal_gets_lines(voc: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    detector.train.main(train_flags(voc, tmp_path, cache=True))
    printed = capfd.readouterr()
    assert "\r" not in printed.out + printed.err
    assert "step 1 of 2, epoch 0.50 of 1: loss " in printed.out and "step 2 of 2, epoch 1.00 of 1: " in printed.out


def test_tensorboard_gets_pictures_and_what_the_matching_did(voc: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    detector.train.main(train_flags(voc, tmp_path, epochs=2, **{"eval-every": 1}))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["images"]) == {"detections", "assignment"}
    for name in ("detections", "assignment"):
        pictures = events.Images(name)
        assert [picture.step for picture in pictures] == [1, 4]
        assert min(pictures[0].width, pictures[0].height) > 100
    scalars = events.Tags()["scalars"]
    assert {"loss", "eval_AP", "match/disagreement", "match/without_cls_positive/all"} <= set(scalars)
    assert events.Scalars("match/objects/all")[0].value > 0


def test_pictures_that_cannot_be_drawn_cost_no_training(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from detector import visualize

    def fails(*arguments: object) -> None:
        raise OSError("an image is gone")

    monkeypatch.setattr(visualize, "load", fails)
    detector.train.main(train_flags(voc, tmp_path))
    assert capsys.readouterr().err.count("an image is gone") == 1
    assert json.loads((tmp_path / "results.json").read_text())["images"] == 2


def test_the_log_says_once_that_a_library_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, 0)
    for _ in range(2):
        with log.tolerating("TensorBoard"):
            raise ImportError("no module named tensorboard")
    assert capsys.readouterr().err.count("training goes on without") == 1
