"""Training learns, repeats bit for bit, survives being stopped, shares its work, and says what went wrong."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import train_flags, write_coco, write_voc
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten
from torchvision.transforms import v2

import detector.train
import mg_ops
from detector.batches import TrainingImages
from detector.checkpoint import ADDED_LATER, load_detector, read_checkpoint, save_atomically
from detector.data import read_voc
from detector.detectors import make_detector
from detector.evaluate import evaluate
from detector.images import decode_image
from detector.loss import BOX_LOSSES, CLS_LOSSES, detection_loss
from detector.program import process_group
from detector.rules import RULES
from detector.run_log import read_log
from detector.train import learning_rate

ROOT = Path(__file__).parent.parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
"""For the processes the tests start: what is compared bit for bit must add up in the same order."""


pytestmark = pytest.mark.usefixtures("one_thread")


def flags(data: Path, out: Path, **changes: object) -> list[str]:
    """Batches of 3, two epochs."""
    return train_flags(data, out, **{"batch": 3, "epochs": 2, "lr": 0.01, **changes})


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc"), {"train": 7, "val": 2})


def loss_curve(run: Path, *names: str) -> list[list[Any]]:
    return [[entry[name] for name in ("step", *names)] for entry in read_log(run / "log.jsonl") if "loss" in entry]


def assert_same_training(one: Path, another: Path) -> None:
    """The same weights, averages, momenta and loss curve, to the last bit."""
    first, second = read_checkpoint(one), read_checkpoint(another)
    for key in ("step", "model", "ema", "optimizer", "scaler", "class_names"):
        (leaves, structure), (others, other_structure) = tree_flatten(first[key]), tree_flatten(second[key])
        assert structure == other_structure, key
        for leaf, other in zip(leaves, others, strict=True):
            assert torch.equal(leaf, other) if isinstance(leaf, Tensor) else leaf == other, key
    names = ("loss", "cls_loss", "box_loss")
    assert loss_curve(one, *names) == loss_curve(another, *names)


def test_a_few_images_are_learned_by_heart(voc: Path) -> None:
    """Without augmentation, in a loop of a page: network, matching, losses, decoding and scores agree."""
    torch.manual_seed(0)
    data = read_voc(voc, "train")
    data.images = data.images[:4]
    size, coder = 64, mg_ops.BoxCoder()
    resize = v2.Resize((size, size), antialias=True)
    images = torch.stack([resize(decode_image(image.path)) for image in data.images])
    scale = torch.tensor([size / 128, size / 96, size / 128, size / 96])
    gt_boxes, gt_labels = [image.boxes * scale for image in data.images], [image.labels for image in data.images]
    gt_offsets = torch.tensor([0, *map(len, gt_labels)]).cumsum(0)
    objects = torch.cat(gt_boxes), torch.cat(gt_labels), gt_offsets
    model = make_detector("fssd", "resnet18", size, 2)
    num_steps = 40
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(num_steps):
        cls_logits, box_deltas = model(images)
        predictions = {"cls_logits": cls_logits, "box_deltas": box_deltas}
        match = mg_ops.mutual_match(model.anchors, *objects, **predictions, box_coder=coder)
        loss = detection_loss(cls_logits, box_deltas, model.anchors, match, *objects, coder)
        optimizer.param_groups[0]["lr"] = learning_rate(step, num_steps, 0.02, 10)
        optimizer.zero_grad()
        (loss.cls_loss + loss.box_loss).backward()
        optimizer.step()
    metrics, _ = evaluate(model, data, size, "cpu", num_workers=0, show_progress=False)
    assert metrics["AP50"] > 0.9 and metrics["VOC_AP50"] > 0.9


def test_the_schedule_warms_up_and_ends_low() -> None:
    assert learning_rate(0, 10_000, 0.01, 500) == 1e-6
    assert learning_rate(250, 10_000, 0.01, 500) == pytest.approx(1e-6 + (0.01 - 1e-6) / 2)
    assert learning_rate(500, 10_000, 0.01, 500) == pytest.approx(0.01)
    assert learning_rate(500 + 9499 // 2, 10_000, 0.01, 500) == pytest.approx(0.005, rel=1e-3)
    assert learning_rate(9_999, 10_000, 0.01, 500) == pytest.approx(1e-6)
    # A short run does not spend itself warming up.
    assert learning_rate(10, 100, 0.01, 500) == pytest.approx(0.01)


STOPPED = """
import os, signal, sys
from detector import program, run_log, train

def add_and_stop(log, entry, *arguments):
    add(log, entry, *arguments)
    if entry["step"] == 4:
        os.kill(os.getpid(), signal.SIGTERM)

add, run_log.RunLog.add = run_log.RunLog.add, add_and_stop
program.run_program(train.main)
"""
"""A training that is terminated in its fifth step, however fast it is."""


def test_a_run_that_was_terminated_and_resumed_equals_one_that_was_not(voc: Path, tmp_path: Path) -> None:
    # The sixth step is the first of --strategy.
    changes: dict[str, object] = {"epochs": 3, "workers": 1, "ema": 0.9, "strategy-from-epoch": 2}
    detector.train.main(flags(voc, tmp_path / "whole", **changes))

    command = [sys.executable, "-W", "ignore", "-c", STOPPED, *flags(voc, tmp_path / "stopped", **changes)]
    stopped = subprocess.run(command, cwd=ROOT, env=ONE_THREAD, capture_output=True, text=True, check=False)
    assert stopped.returncode == 143, stopped.stdout + stopped.stderr
    assert "--resume continues it" in stopped.stdout
    assert read_checkpoint(tmp_path / "stopped")["step"] == 5  # that during which the signal came
    assert not (tmp_path / "stopped" / "results.json").exists()

    # Other workers, images in memory: how fast a run goes has no say in what it computes.
    metrics = detector.train.main(
        [*flags(voc, tmp_path / "stopped", **changes, resume=True), "--cache", "--workers", "0"]
    )
    assert_same_training(tmp_path / "whole", tmp_path / "stopped")
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert whole["AP"] == metrics["AP"] and whole["per_class"] == metrics["per_class"]


def test_a_run_whose_data_went_away_is_saved_and_continues_as_if_it_had_not(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector.train.main(flags(voc, tmp_path / "whole", epochs=3))

    def gone_in_epoch_2(self: TrainingImages, key: tuple[int, int]) -> Any:
        if key[1] == 2:
            raise OSError("the disk of the images is gone")
        return read(self, key)

    read = TrainingImages.__getitem__
    monkeypatch.setattr(TrainingImages, "__getitem__", gone_in_epoch_2)
    with pytest.raises(OSError, match="disk of the images is gone"):
        detector.train.main(flags(voc, tmp_path / "stopped", epochs=3))
    # Batches of 3 of 7 images an epoch: the fifth is the first with an image of epoch 2.
    assert read_checkpoint(tmp_path / "stopped")["step"] == 4
    monkeypatch.setattr(TrainingImages, "__getitem__", read)
    detector.train.main(flags(voc, tmp_path / "stopped", epochs=3, resume=True))
    assert_same_training(tmp_path / "whole", tmp_path / "stopped")


def test_an_evaluation_that_fails_on_the_way_costs_no_step(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise OSError("the images to evaluate on are gone")

    monkeypatch.setattr(detector.train, "evaluate", fails)
    with pytest.raises(OSError, match="to evaluate on are gone"):
        detector.train.main(flags(voc, tmp_path, **{"eval-every": 1}))
    assert read_checkpoint(tmp_path)["step"] == 3  # the first step that ends an epoch


def test_fused_and_eager_matching_give_the_same_loss_curve(voc: Path, tmp_path: Path) -> None:
    status = mg_ops.backends()["cpp"]
    if not status.usable:
        pytest.skip(status.detail)
    for backend in ("eager", "cpp"):
        detector.train.main(flags(voc, tmp_path / backend, backend=backend, epochs=1))
    assert_same_training(tmp_path / "eager", tmp_path / "cpp")


def test_the_strategy_changes_nothing_but_the_strategy(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[tuple[Tensor, ...]]] = {}

    def record(
        cls_logits: Tensor, box_deltas: Tensor, anchors: Tensor, match: Any, *objects: Any, **options: Any
    ) -> Any:
        predictions = cls_logits.detach().clone(), box_deltas.detach().clone()
        seen.setdefault(current, []).append((*predictions, *objects[:3], match.cls_match, match.loc_match))
        return detection_loss(cls_logits, box_deltas, anchors, match, *objects, **options)

    monkeypatch.setattr(detector.train, "detection_loss", record)
    head = {"anchors-per-location": 1, "anchor-size": 8}
    for current in RULES:
        detector.train.main(flags(voc, tmp_path / current, strategy=current, epochs=1, **head))
        assert load_detector(tmp_path / current, "cpu")[0].anchors.shape == (64 + 16 + 4 + 1, 4)
    static = seen.pop("iou")
    assert len(static) == 3
    differing = set()
    for name, guided in seen.items():
        for one, other in zip(static, guided, strict=True):
            for objects, same_objects in zip(one[2:5], other[2:5], strict=True):
                assert torch.equal(objects, same_objects)  # the same images, augmented the same way, in the same order
            if not (torch.equal(one[5], other[5]) and torch.equal(one[6], other[6])):
                differing.add(name)
        for predictions, same_predictions in zip(static[0][:2], guided[0][:2], strict=True):
            assert torch.equal(predictions, same_predictions)  # the same first weights
    assert {"mutual", "dynamic_mutual", "atss", "task_aligned", "simota", "dynamic_soft_label"} <= differing


def test_the_strategy_follows_the_epochs_of_static_matching(voc: Path, tmp_path: Path) -> None:
    for name, changes in (("static", {"strategy": "iou"}), ("later", {"strategy-from-epoch": 1}), ("at once", {})):
        detector.train.main(flags(voc, tmp_path / name, **changes))
    static, later, at_once = (loss_curve(tmp_path / name, "loss") for name in ("static", "later", "at once"))
    # Batches of 3 of 7 images an epoch: the first image of the fourth step is of epoch 1.
    assert later[:3] == static[:3] != at_once[:3] and later[3] != static[3]
    strategies = [strategy for _, strategy in loss_curve(tmp_path / "later", "strategy")]
    assert strategies == ["iou"] * 3 + ["mutual"] * (len(static) - 3)


def test_checkpoints_stay_where_they_are_asked_to(voc: Path, tmp_path: Path) -> None:
    detector.train.main(flags(voc, tmp_path, epochs=3, ema=0.9, **{"keep-every": 2}))
    assert [path.name for path in tmp_path.glob("epoch*.pt")] == ["epoch2.pt"]
    kept, last = read_checkpoint(tmp_path / "epoch2.pt"), read_checkpoint(tmp_path)
    assert kept["step"] == 5  # the first to end in epoch 2: 15 of 7 images an epoch
    detector.train.main(flags(voc, tmp_path, epochs=4, ema=0.9, resume=True, **{"keep-every": 1}))
    assert sorted(path.name for path in tmp_path.glob("epoch*.pt")) == ["epoch2.pt", "epoch4.pt"]
    model, content = load_detector(tmp_path / "epoch4.pt", "cpu")
    averaged, weight = read_checkpoint(tmp_path)["ema"], "neck.fuse.0.weight"
    assert model.state_dict()[weight].equal(averaged[weight]) and not averaged[weight].equal(last["ema"][weight])
    assert "optimizer" not in content


@pytest.mark.parametrize("cls_loss", CLS_LOSSES)
def test_soft_targets_are_learned(voc: Path, tmp_path: Path, cls_loss: str) -> None:
    matching = {"strategy": "task_aligned", "cls-loss": cls_loss, "anchors-per-location": 1}
    detector.train.main(flags(voc, tmp_path, epochs=12, **matching))
    losses = [entry["cls_loss"] for entry in read_log(tmp_path / "log.jsonl") if "cls_loss" in entry]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])


def test_flags_of_the_matching_that_do_not_go_together_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (
            "--strategy mutual --cls-loss soft_bce",
            "--cls-loss soft_bce: needs soft targets, which --strategy mutual does not",
        ),
        ("--strategy simota", "expected --anchors-per-location 1 --anchor-size 8, got 6 and 24"),
        ("--strategy dynamic_soft_label --anchors-per-location 1", "--anchor-size 8, got 1 and 24"),
        (
            "--strategy task_aligned --cls-loss soft_bce --strategy-from-epoch 3",
            "3: iou, which comes first, gives no soft targets; expected --cls-loss focal, got soft_bce",
        ),
        ("--strategy-from-epoch 3 --cuda-graph", "a captured step keeps its rule; expected no --cuda-graph"),
    ):
        with pytest.raises(SystemExit) as stop:
            detector.train.main(["--data", "absent", *words.split()])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_with_its_images(voc: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"The loss is (nan|inf) at step \d+, in a batch of the images image_00"
    ):
        detector.train.main(flags(voc, tmp_path, lr=1e30, epochs=20))
    assert not (tmp_path / "last.pt").exists()  # nothing that is broken was saved


def test_a_run_is_not_overwritten_and_not_resumed_as_another(voc: Path, tmp_path: Path) -> None:
    detector.train.main(flags(voc, tmp_path, epochs=1))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="--resume"):
        detector.train.main(flags(voc, tmp_path, epochs=1))
    with pytest.raises(ValueError, match=r"sigma 2\.0 -> 3\.0"):
        detector.train.main(flags(voc, tmp_path, epochs=1, sigma=3.0, resume=True))
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_run_from_before_a_flag_existed_is_resumed_as_what_it_was(voc: Path, tmp_path: Path) -> None:
    detector.train.main(flags(voc, tmp_path, epochs=1))
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    for flag in ADDED_LATER:
        del content["arguments"][flag]
    save_atomically(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="box_loss 'balanced_l1' -> 'released_balanced_l1'"):
        detector.train.main(flags(voc, tmp_path, epochs=1, resume=True, **{"box-loss": "released_balanced_l1"}))
    metrics = detector.train.main(flags(voc, tmp_path, epochs=1, resume=True))
    assert metrics["arguments"]["box_loss"] == "balanced_l1"
    load_detector(tmp_path, "cpu")


def test_the_box_loss_is_the_one_asked_for(voc: Path, tmp_path: Path) -> None:
    first = {}
    for name in BOX_LOSSES:
        detector.train.main(flags(voc, tmp_path / name, epochs=1, **{"box-loss": name}))
        first[name] = read_log(tmp_path / name / "log.jsonl")[0]
    assert first["balanced_l1"]["cls_loss"] == first["released_balanced_l1"]["cls_loss"]
    assert first["balanced_l1"]["box_loss"] < first["released_balanced_l1"]["box_loss"]


def test_coco_with_crowds_and_a_broken_image_trains_under_bf16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_coco(tmp_path / "coco", {"train": 4, "val": 2})
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    broken = root / "train" / content["images"][1]["file_name"]
    broken.write_bytes(broken.read_bytes()[:200])
    metrics = detector.train.main(
        flags(root, tmp_path / "run", format="coco", amp="bf16", model="retinanet", **{"eval-every": 1})
    )
    kind = "image that cannot be decoded: the next one trained on in its place"
    assert metrics["defects"]["train"] == {kind: 1}
    assert capsys.readouterr().out.count(kind) == 2  # once when met, once in the summary at the end
    assert json.loads((tmp_path / "run" / "results.json").read_text())["AP"] == metrics["AP"]
    assert [entry["epoch"] for entry in read_log(tmp_path / "run" / "log.jsonl") if "eval_AP" in entry] == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# The step as a CUDA graph


def test_a_graph_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        detector.train.main(["--data", "absent", "--device", "cpu", "--cuda-graph"])
    assert stop.value.code == 2
    assert "--cuda-graph: expected --device cuda, which a CUDA graph runs on, got cpu" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_training_as_a_graph_has_the_weights_of_one_whose_batches_all_run_eagerly(voc: Path, tmp_path: Path) -> None:
    """On the stand-in for a GPU, which replays what it recorded of one step."""
    program = tmp_path / "program.py"
    program.write_text("from detector import program, train\nprogram.run_program(train.main)\n")
    environment = {**ONE_THREAD, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}

    def run(name: str, **changes: object) -> str:
        changes = {"device": "cuda", "cuda-graph": True, "epochs": 4, "ema": 0.9, **changes}
        command = [sys.executable, "-W", "ignore", "-m", "cuda_on_cpu.pretend_gpu", str(program)]
        command += flags(voc, tmp_path / name, **changes)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "--cuda-graph: room for 6 objects in a batch" in run("graph")
    run("eager", **{"graph-objects": 1})
    # 28 images in batches of 3, but for the last two, which are smaller.
    num_eager = {run: [entry[1] for entry in loss_curve(tmp_path / run, "eager_steps")] for run in ("graph", "eager")}
    assert num_eager == {"graph": [0] * 8 + [1, 2], "eager": list(range(1, 11))}
    assert_same_training(tmp_path / "graph", tmp_path / "eager")
    detector.train.main(flags(voc, tmp_path / "plain", epochs=4, ema=0.9))
    curves = [loss_curve(tmp_path / run, "loss", "lr", "cls_positives") for run in ("graph", "plain")]
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    # Each goes on as the other: how it steps is not what it learned.
    run("plain", epochs=5, resume=True)
    detector.train.main(flags(voc, tmp_path / "graph", epochs=5, ema=0.9, resume=True))
    groups = {run: read_checkpoint(tmp_path / run)["optimizer"]["param_groups"] for run in ("graph", "plain")}
    assert all(group["fused"] is None and isinstance(group["lr"], float) for group in groups["graph"])
    assert all(group["fused"] and isinstance(group["lr"], Tensor) for group in groups["plain"])


class Frozen(nn.Module):
    """A detector with its batch statistics held, so that how a batch is shared out cannot change its predictions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.detector = make_detector("fssd", "resnet18", 64, 3).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.detector(images)


def gradients_of(rank: int, num_processes: int, folder: Path) -> None:
    """What process `rank` of `num_processes` does with its images of a batch of four; the first saves the gradients."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (4, 3, 64, 64), generator=generator, dtype=torch.uint8)
    # Three objects, one, none, none: the second process has no positive at all.
    boxes = torch.tensor([[2.0, 2, 30, 30], [20, 20, 60, 60], [5, 30, 40, 63], [10, 10, 50, 45]])
    labels, counts = torch.tensor([0, 1, 2, 1]), [3, 1, 0, 0]
    model: nn.Module = Frozen()
    anchors = model.detector.anchors
    if num_processes > 1:
        model = DistributedDataParallel(model)
    share = 4 // num_processes
    mine = slice(rank * share, (rank + 1) * share)
    first, last = sum(counts[: mine.start]), sum(counts[: mine.stop])
    objects = boxes[first:last], labels[first:last], torch.tensor([0, *counts[mine]]).cumsum(0)
    cls_logits, box_deltas = model(images[mine])
    coder = mg_ops.BoxCoder()
    match = mg_ops.mutual_match(anchors, *objects, cls_logits=cls_logits, box_deltas=box_deltas, box_coder=coder)
    loss = detection_loss(cls_logits, box_deltas, anchors, match, *objects, coder)
    (loss.cls_loss + loss.box_loss).backward()
    if rank == 0:
        gradients = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
        torch.save(gradients, folder / f"gradients{num_processes}.pt")


def main_of_a_process_of_torchrun(folder: Path, stopped: bool, words: list[str]) -> None:
    """Saves gradients, trains, and writes how that ended and which threads of the group are left."""
    rank, num_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if stopped:
        detector.train.LossWatch.watch = lambda *arguments: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore
    else:
        store = f"file://{folder}/store"
        with process_group("gloo", init_method=store, rank=rank, world_size=num_processes):
            gradients_of(rank, num_processes, folder)
    status: object = 0
    try:
        detector.train.main(words)
    except SystemExit as stop:
        status = stop.code
    for _ in range(100):  # a thread that has just ended is listed for a moment
        names = []
        for file in Path("/proc/self/task").glob("*/comm"):
            with contextlib.suppress(OSError):
                names.append(file.read_text())
        threads = [name for name in names if "gloo" in name]
        if not threads:
            break
        time.sleep(0.1)
    (folder / f"end{rank}.json").write_text(json.dumps([status, threads]))


def run_under_torchrun(num_processes: int, folder: Path, stopped: bool, words: list[str]) -> None:
    """Starts this file in so many processes."""
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command = [sys.executable, *launcher, __file__, str(folder), str(int(stopped)), *words]
    environment = {**ONE_THREAD, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_processes_train_as_one_would_and_leave_no_thread(voc: Path, tmp_path: Path) -> None:
    """Static matching counts positives from the objects alone: equal counts at every step are equal images."""
    # 14 images in batches of 6, 4 and 4: batch norm over the single cell of the last level needs two images a process.
    changes = {"strategy": "iou", "epochs": 2, "batch": 6}
    gradients_of(0, 1, tmp_path)
    metrics = detector.train.main(flags(voc, tmp_path / "one", **changes))
    run_under_torchrun(2, tmp_path, False, flags(voc, tmp_path / "two", **changes))

    one, two = (torch.load(tmp_path / f"gradients{number}.pt") for number in (1, 2))
    assert one.keys() == two.keys()
    for name in one:
        size = one[name].abs().max().item()
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5 * size + 1e-12)
    curves = [loss_curve(tmp_path / run, "cls_positives", "lr") for run in ("one", "two")]
    assert len(curves[0]) == 3 and curves[0] == curves[1]
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["images"] == metrics["images"] == 2
    assert math.isfinite(results["AP"])
    assert [json.loads((tmp_path / f"end{rank}.json").read_text()) for rank in (0, 1)] == [[0, []]] * 2


def test_no_thread_of_the_process_group_outlives_a_training_that_is_terminated(voc: Path, tmp_path: Path) -> None:
    """Such a thread aborts the process if it lets go of a tensor while Python ends: rarely, and on a busy machine."""
    run_under_torchrun(1, tmp_path, True, flags(voc, tmp_path / "run", epochs=1))
    assert json.loads((tmp_path / "end0.json").read_text()) == [143, []]


if __name__ == "__main__":
    main_of_a_process_of_torchrun(Path(sys.argv[1]), sys.argv[2] == "1", sys.argv[3:])
