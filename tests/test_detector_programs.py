"""The detector's command lines end, say why in one line, and lose nothing that was done."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_data import train_flags, write_coco, write_voc
from torch import Tensor
from torch.utils.data import Dataset

import detector.train
from detector import detect, evaluate, reproduce, visualize
from detector.batches import MAX_SEED, TrainingSampler, combine_seed, load_batches
from detector.checkpoint import data_fingerprint, load_detector, read_checkpoint, save_atomically
from detector.data import read_coco
from detector.detectors import make_detector
from detector.outputs import prepare_folder, strict_json, whole_file, write_json
from detector.program import run_program
from detector.run_log import RunLog, read_log

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def broken_voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of which no image can be decoded."""
    root = write_voc(tmp_path_factory.mktemp("broken"), {"train": 4, "val": 2})
    for path in (root / "JPEGImages").iterdir():
        path.write_bytes(b"")
    return root


def start(*words: object, launcher: tuple[str, ...] = ("-m",)) -> subprocess.Popen[str]:
    """A process of its own group: `python LAUNCHER WORDS`."""
    command = [sys.executable, "-W", "ignore", *launcher, *map(str, words)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **pipes)


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, list[str]]:
    """Waits: exit status, everything printed, and the lines that are errors."""
    try:
        output, errors = process.communicate(timeout=600)  # what is tested is whether it ends at all
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = output + errors
    return process.returncode, text, [line for line in text.splitlines() if "error: " in line]


def ended(main: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """Runs a program here: its exit status, and what it printed on stderr and stdout."""
    with pytest.raises(SystemExit) as end:
        run_program(main)
    printed = capsys.readouterr()
    return end.value.code, printed.err, printed.out


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# ---- Ends


def test_an_error_in_a_worker_ends_every_process_of_torchrun_and_is_said_once(broken_voc: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    process = start("detector.train", *train_flags(broken_voc, tmp_path, batch=4, workers=1), launcher=torchrun)
    status, text, _ = end_of(process)
    assert status != 0, text
    assert text.count("python -m detector.train: error: ") == 1, text  # behind the progress bar of the other process
    assert "not one of 4 images can be used" in text


@pytest.fixture
def long_training(voc: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A training that would go on for hours, and its two workers, once it has begun."""
    process = start("detector.train", *train_flags(voc, tmp_path, workers=2, epochs=10**6))
    while process.poll() is None and len(read_log(tmp_path / "log.jsonl")) < 2:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    yield process, children(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_worker_ends_the_training_with_one_line(
    long_training: tuple[subprocess.Popen[str], list[int]],
) -> None:
    process, workers = long_training
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    status, text, errors = end_of(process)
    assert status == 1, text
    assert len(errors) == 1 and re.search("killed by signal: Killed|exited unexpectedly", errors[0]), text
    assert "Traceback" not in text


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_end_when_their_trainer_is_killed(long_training: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, workers = long_training
    assert len(workers) == 2
    process.kill()
    status, _, _ = end_of(process)  # only when the workers, which hold the pipes too, have ended
    assert status == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_signal_to_the_whole_job_saves_and_ends_it(
    long_training: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
) -> None:
    process, _ = long_training
    os.killpg(process.pid, signal.SIGTERM)
    status, text, _ = end_of(process)
    assert status == 143 and "--resume continues it" in text, text
    assert read_checkpoint(tmp_path)["step"] >= 2


STUCK_WORKER = """
import time
import torch
from torch.utils.data import Dataset
from detector.batches import load_batches
from detector.program import run_program

class Images(Dataset):
    def __getitem__(self, key):
        if key == 1:
            time.sleep(100_000)
        raise OSError("no such image")

def main():
    for batch in load_batches(Images(), [[0], [1]], torch.stack, 2):
        pass

run_program(main)
"""


def test_a_worker_that_hangs_does_not_keep_the_process_from_ending() -> None:
    status, text, errors = end_of(start(STUCK_WORKER, launcher=("-c",)))
    assert status == 2, text
    assert len(errors) == 1 and errors[0].endswith("no such image"), text
    assert "Traceback" not in text


LOST_WORKER = """
import os
import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from detector.batches import load_batches
from detector.checkpoint import save_atomically
from detector.program import run_program
from detector.train import saving_on_error

def receive(worker):
    os.kill(worker, signal.SIGKILL)
    raise ConnectionResetError(104, "Connection reset by peer")

class Batch:
    def __reduce__(self):
        return receive, (os.getpid(),)

class Images(Dataset):
    def __getitem__(self, key):
        return key

def main():
    batches = load_batches(Images(), [[0]], lambda keys: (Batch(),), 1)
    with saving_on_error(lambda step: save_atomically({"step": step}, Path(sys.argv[1])), 7):
        next(batches)

run_program(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked, with the classes of the program")
def test_a_worker_that_is_killed_while_it_hands_over_a_batch_is_said_to_be(tmp_path: Path) -> None:
    checkpoint = tmp_path / "last.pt"
    status, text, errors = end_of(start(LOST_WORKER, checkpoint, launcher=("-c",)))
    assert status == 1, text
    assert len(errors) == 1 and re.search("killed by signal: Killed|exited unexpectedly", errors[0]), text
    assert torch.load(checkpoint) == {"step": 7}


class Unsavable:
    def __reduce__(self) -> str:
        raise RuntimeError("not this one")


def test_what_fails_in_a_checkpoint_is_not_taken_for_the_error_before_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not this one"):
        try:
            raise ConnectionResetError(104, "Connection reset by peer")
        except OSError:
            save_atomically({"model": Unsavable()}, tmp_path / "last.pt")


class LocalError(Exception):
    """Cannot be made again from its message, as pickle does."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} is not {other}")


class Faulty(Dataset[Tensor]):
    """What goes wrong in a worker, by key."""

    def __getitem__(self, key: str) -> Tensor:
        if key == "value":
            raise ValueError("a wrong value")
        if key == "missing":
            raise FileNotFoundError(2, "No such file or directory", "/images/1.jpg")
        if key == "pickle":
            raise LocalError(1, 2)
        if key == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if key == "memory":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # also of shared memory
        return torch.zeros(100_000)


def stack(samples: list[Tensor]) -> tuple[Tensor]:
    return (torch.stack(samples),)


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("value", ValueError, "^a wrong value$"),
        ("missing", FileNotFoundError, "/images/1.jpg"),
        ("pickle", RuntimeError, "^LocalError: 1 is not 2$"),
        ("killed", RuntimeError, "killed by signal: Killed|exited unexpectedly"),
        ("memory", RuntimeError, "File too large"),
    ],
)
def test_what_goes_wrong_in_a_worker_arrives_as_it_was(key: str, kind: type[Exception], message: str) -> None:
    batches = load_batches(Faulty(), [["good", "good"], [key]], stack, 1)
    with pytest.raises(kind, match=message):
        for batch in batches:
            assert batch[0].shape == (2, 100_000)


# ---- One line


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("one\n  two"), 2, "one; two"),
        (FileNotFoundError(2, "No such file or directory", "a.jpg"), 2, "a.jpg: No such file or directory"),
        (ImportError("No module named 'scipy'"), 2, "No module named 'scipy'"),
        (RuntimeError("CUDA out of memory\nframe #0: c10"), 1, "CUDA out of memory"),
        (FloatingPointError("The loss is nan"), 1, "The loss is nan"),
        (MemoryError(), 1, "MemoryError"),
    ],
)
def test_an_error_is_one_line_and_its_kind_the_exit_status(
    error: Exception, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    code, printed, _ = ended(main, capsys)
    assert code == status
    assert printed.endswith(f": error: {line}\n") and printed.count("\n") == 1


def test_a_fault_of_the_program_itself_keeps_its_traceback() -> None:
    def main() -> None:
        raise KeyError("a fault")

    with pytest.raises(KeyError):
        run_program(main)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_program_once_it_has_tidied_up(
    number: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(600)
        finally:
            print("tidied up")

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert ended(main, capsys) == (status, "", "tidied up\n")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_every_file_name_can_be_printed() -> None:
    program = "from detector.program import run_program; run_program(lambda: print('caf\\udce9'))"
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"caf\\udce9\n"), done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seed", -1), ("seed", MAX_SEED + 1), ("workers", -1), ("batch", 0), ("epochs", 0), ("image-size", 100)),
        *(("image-size", 32), ("anchor-size", 0), ("anchor-size", 65), ("sigma", 1), ("sigma", "nan"), ("lr", "nan")),
        *(("lr", -1), ("momentum", 1), ("ema", 1), ("warmup", -1), ("device", "nonsense"), ("device", "cuda:99")),
        *(("classes", "disc,"), ("classes", "disc, disc"), ("focal-alpha", 2), ("save-minutes", "inf")),
    ],
)
def test_a_value_outside_the_limits_of_its_option_names_the_option(
    name: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        detector.train.main(train_flags(tmp_path / "absent", tmp_path, **{name: value}))
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert (f"--{name}" in last and "expected" in last) or "torch sees" in last
    assert str(value) in last


def test_flags_that_the_matching_refuses_are_refused_before_data_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sigma"):
        detector.train.main(train_flags(tmp_path / "absent", tmp_path, sigma=1 + 1e-9))
    with pytest.raises(ValueError, match="backend"):
        detector.train.main(train_flags(tmp_path / "absent", tmp_path, backend="nonsense"))


def test_large_seeds_train_and_small_ones_give_the_numbers_they_always_gave(voc: Path, tmp_path: Path) -> None:
    assert combine_seed(3, 5, 7) == (3 * 1_000_003 + 5) * 1_000_003 + 7
    assert combine_seed(3, 5) == 3 * 1_000_003 + 5
    order = TrainingSampler(5, 1, 5, seed=3).permutation(2)
    assert order == torch.randperm(5, generator=torch.Generator().manual_seed(3 * 1_000_003 + 2)).tolist()
    detector.train.main(train_flags(voc, tmp_path, seed=MAX_SEED))
    assert (tmp_path / "results.json").is_file()


def spoil(checkpoint: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint with something changed."""
    content = torch.load(checkpoint / "last.pt", weights_only=True)
    change(content)
    torch.save(content, out)
    return out


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda source, path: path.write_bytes(b""), "cannot be read"),
        (lambda source, path: path.mkdir(), "there is none at"),
        (lambda source, path: path.write_text('{"model": 1}'), "cannot be read"),
        (lambda source, path: path.write_bytes((source / "last.pt").read_bytes()[:100_000]), "cannot be read"),
        (lambda source, path: torch.save({"state_dict": {}}, path), "was not written by detector.train"),
        (lambda source, path: torch.save([1, 2], path), "was not written by detector.train"),
        (lambda source, path: spoil(source, path, lambda c: c.update(class_names=[0, 1])), r"'class_names'.*\[0, 1\]"),
        (lambda source, path: spoil(source, path, lambda c: c.update(class_names="disc")), "'class_names'.*'disc'"),
        (lambda source, path: spoil(source, path, lambda c: c.update(class_names=["a", "a"])), "'class_names'.*once"),
        (lambda source, path: spoil(source, path, lambda c: c.update(class_names=[])), "'class_names' is empty"),
        (lambda source, path: spoil(source, path, lambda c: c.update(class_names=["one"])), "'model' does not fit"),
        (lambda source, path: spoil(source, path, lambda c: c.update(model=[1])), r"'model'.*\[1\]"),
        (lambda source, path: spoil(source, path, lambda c: c["arguments"].pop("backbone")), "'arguments'.*'backbone'"),
        (lambda source, path: spoil(source, path, lambda c: c["arguments"].update(model="yolo")), "'arguments'.*yolo"),
        (lambda source, path: spoil(source, path, lambda c: c["arguments"].update(image_size="64")), "'arguments'"),
        (lambda source, path: spoil(source, path, lambda c: c["model"].popitem()), "'model' does not fit.*1 tensors"),
        (lambda source, path: spoil(source, path, lambda c: c.update(step=-5)), "'step'.*-5"),
        (lambda source, path: spoil(source, path, lambda c: c.update(step=True)), "'step'.*True"),
        (lambda source, path: spoil(source, path, lambda c: c.update(data={"images": 4})), "'data'.*mark"),
    ],
)
def test_what_is_no_checkpoint_is_one_line_that_names_file_and_entry(
    write: Callable[[Path, Path], object],
    message: str,
    checkpoint: Path,
    voc: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "other.pt"
    write(checkpoint, path)
    with pytest.raises(ValueError, match=message) as raised:
        load_detector(path, "cpu")
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    words = [str(voc / "JPEGImages"), "--checkpoint", str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    status, printed, _ = ended(lambda: detect.main(words), capsys)
    assert status == 2 and printed.count("\n") == 1 and str(path) in printed


@pytest.mark.parametrize(
    ("entry", "message"),
    [("optimizer", "no optimizer"), ("scaler", "no scaler"), ("step", "no step")],
)
def test_a_checkpoint_without_the_state_of_a_training_is_not_resumed(
    entry: str, message: str, voc: Path, tmp_path: Path, checkpoint: Path
) -> None:
    full = {"step": 1, "ema": None, "optimizer": {}, "scaler": {}}
    del full[entry]
    spoil(
        checkpoint,
        tmp_path / "last.pt",
        lambda content: (content.pop("step"), content.pop("ema"), content.update(full)),
    )
    with pytest.raises(ValueError, match=message):
        detector.train.main(train_flags(voc, tmp_path, resume=True))


def test_the_other_programs_say_what_is_wrong_in_one_line(
    voc: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    absent = str(tmp_path / "absent")
    results = tmp_path / "runs" / "table1" / "rfbnet-vgg16_bn-iou-seed0" / "results.json"
    results.parent.mkdir(parents=True)
    results.write_text('{"AP": 0.')
    rows = ["table1", "--data", absent, "--models", "rfbnet", "--strategies", "iou"]
    programs: list[tuple[Callable[[], object], str]] = [
        (lambda: evaluate.main(["--checkpoint", absent, "--data", str(voc), "--device", "cpu"]), absent),
        (lambda: visualize.main(["curves", "--runs", absent, "--out", str(tmp_path / "a.png")]), absent),
        (lambda: visualize.main(["amplification", "--out", str(tmp_path / "a.docx")]), "a.docx"),
        (lambda: visualize.main(["amplification", "--out", str(file / "a.png")]), str(file)),
        (lambda: reproduce.main([*rows, "--out", str(tmp_path / "runs")]), str(results)),
        (lambda: reproduce.main([*rows, "--out", str(file)]), str(file)),
        (lambda: detector.train.main(train_flags(voc, file)), str(file)),
        (lambda: detect.main([absent, "--checkpoint", str(checkpoint)]), absent),
        (lambda: detect.main([str(voc), "--checkpoint", str(checkpoint), "--out", str(file)]), str(file)),
    ]
    for main, names in programs:
        status, printed, _ = ended(main, capsys)
        assert status == 2, printed
        assert names in printed.splitlines()[-1] and "Traceback" not in printed


# ---- Full disks


@pytest.fixture
def full_disk(tmp_path: Path) -> Callable[[str], None]:
    """Makes the disk full for one file of the test's folder."""

    def fill(name: str) -> None:
        (tmp_path / f".{name}.unfinished").symlink_to("/dev/full")

    return fill


pytestmark_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


@pytestmark_full
def test_a_checkpoint_on_a_full_disk_names_the_path_and_leaves_the_old_one(
    tmp_path: Path, full_disk: Callable[[str], None]
) -> None:
    path = tmp_path / "last.pt"
    save_atomically({"model": {"weight": torch.ones(3)}, "arguments": {}, "class_names": []}, path)
    full_disk("last.pt")
    with pytest.raises(OSError, match=r"No space left on device.*last\.pt"):
        save_atomically({"model": {"weight": torch.zeros(1_000_000)}}, path)
    assert read_checkpoint(path)["model"]["weight"].tolist() == [1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytestmark_full
def test_results_that_do_not_fit_on_the_disk_are_written_by_resuming(
    voc: Path, tmp_path: Path, full_disk: Callable[[str], None]
) -> None:
    full_disk("results.json")
    with pytest.raises(OSError, match=r"No space left on device.*results\.json"):
        detector.train.main(train_flags(voc, tmp_path))
    assert not (tmp_path / "results.json").exists()
    metrics = detector.train.main(train_flags(voc, tmp_path, resume=True))
    assert json.loads((tmp_path / "results.json").read_text())["AP"] == metrics["AP"]


@pytestmark_full
def test_a_log_that_cannot_be_written_is_said_once_and_goes_on_when_it_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, 0)
    log.add({"step": 0, "loss": 3.0}, 0)
    kept = (tmp_path / "log.jsonl").rename(tmp_path / "kept")
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    for step in (1, 2):
        log.add({"step": step, "loss": 2.0}, step)
    kept.rename(tmp_path / "log.jsonl")
    log.add({"step": 3, "loss": float("nan")}, 3)
    log.close()
    assert read_log(tmp_path / "log.jsonl") == [{"step": 0, "loss": 3.0}, {"step": 3, "loss": None}]
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "No space left on device" in printed and "log.jsonl" in printed


@pytestmark_full
def test_a_cut_off_entry_of_the_log_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 0}\n{"step": 1}\n[5]\n7\n\n{"st')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 0}, {"step": 1}]


@pytestmark_full
def test_tensorboard_that_cannot_be_written_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, 0)
    log.writer.flush()
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.unlink()
    events.symlink_to("/dev/full")
    for step in range(3):
        log.add({"step": step, "loss": 2.0}, step)
        if log.writer is not None and "TensorBoard" not in log.said:
            with log.tolerating("TensorBoard"):
                log.writer.flush()
    log.close()
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl")] == [0, 1, 2]
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "TensorBoard" in printed and "No space left on device" in printed


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == '{"a": 1}'
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
    with pytest.raises(OSError, match=r"absent/file\.json"), whole_file(tmp_path / "absent" / "file.json"):
        pass


def test_json_holds_every_name_and_no_nan() -> None:
    name = b"caf\xe9.jpg".decode(errors="surrogateescape")
    content = {name: [1.5, float("nan"), {"deeper": (float("inf"), 1)}]}
    assert json.loads(strict_json(content), parse_constant=pytest.fail) == {name: [1.5, None, {"deeper": [None, 1]}]}
    assert strict_json(content).isascii()


# ---- Batch normalization


@pytest.mark.parametrize(
    ("model", "backbone", "image_size"),
    [("fssd", "resnet18", 64), ("fssd", "resnet18", 96), ("retinanet", "vgg16", 64), ("rfbnet", "vgg16", 64)],
)
@pytest.mark.parametrize("share", [1, 2])
def test_a_batch_is_refused_exactly_where_batch_normalization_fails(
    model: str, backbone: str, image_size: int, share: int, tmp_path: Path
) -> None:
    network = make_detector(model, backbone, image_size, 2)
    args = detector.train.parse_arguments(train_flags(tmp_path, tmp_path, **{"image-size": image_size}))
    fails = False
    try:
        network.train()(torch.zeros(share, 3, image_size, image_size, dtype=torch.uint8))
    except ValueError:
        fails = True
    if fails:
        with pytest.raises(ValueError, match=f"--batch 2.*--image-size {image_size}"):
            detector.train.check_batch_norm(network, share, args)
    else:
        detector.train.check_batch_norm(network, share, args)


@pytest.mark.parametrize(
    ("sampler", "smallest"),
    [
        (TrainingSampler(7, 1, 3, 0), 2),  # 3, 2, 2
        (TrainingSampler(3, 1, 2, 0), 1),  # 2, 1
        (TrainingSampler(8, 1, 4, 0), 4),
        (TrainingSampler(7, 2, 6, 0, 0, 2), 2),  # 6, 4, 4 over two processes
        (TrainingSampler(9, 1, 4, 0, 1, 2), 1),  # 4, 3, 2 over two
        (TrainingSampler(3, 1, 3, 0), 3),
    ],
)
def test_the_smallest_share_is_that_of_the_smallest_step(sampler: TrainingSampler, smallest: int) -> None:
    assert sampler.smallest_share() == smallest
    shares = [
        len(batch)
        for rank in range(sampler.num_processes)
        for batch in TrainingSampler(
            sampler.num_images, sampler.total // sampler.num_images, sampler.batch_size, 0, rank, sampler.num_processes
        )
    ]
    assert min(shares) == smallest


def test_a_last_step_of_one_image_is_refused_before_the_first(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "voc", {"train": 3, "val": 1})
    with pytest.raises(ValueError, match=r"--batch 2.*1 image .*--image-size 64"):
        detector.train.main(train_flags(root, tmp_path / "run"))
    assert not (tmp_path / "run" / "log.jsonl").exists()


# ---- Work that would be lost


def test_what_is_done_with_results_is_tried_before_the_first_step(
    voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(metrics: object) -> str:
        raise TypeError("a metric that cannot be printed")

    monkeypatch.setattr(detector.train, "format_metrics", fails)
    with pytest.raises(TypeError, match="cannot be printed"):
        detector.train.main(train_flags(voc, tmp_path))
    assert read_log(tmp_path / "log.jsonl") == [] and not (tmp_path / "last.pt").exists()


def test_classes_whose_names_are_numbers_are_trained_to_the_end(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", {"train": 2, "val": 1})
    for file in (root / "annotations").iterdir():
        content = json.loads(file.read_text())
        for number, category in enumerate(content["categories"]):
            category["name"] = number
        file.write_text(json.dumps(content))
    detector.train.main(train_flags(root, tmp_path / "run", format="coco"))
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())["per_class"]) == {"0", "1"}


@pytest.mark.parametrize("name", ["last.pt", "results.json"])
def test_a_folder_that_cannot_take_the_results_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=name):
        prepare_folder(tmp_path, ["last.pt", "results.json"])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--out: .*file"):
        prepare_folder(tmp_path / "file", [])
    with pytest.raises(ValueError, match=r"--out: .*deeper"):
        prepare_folder(tmp_path / "file" / "deeper", [])


# ---- Data


def test_a_run_is_not_resumed_on_other_data(voc: Path, tmp_path: Path) -> None:
    root = write_voc(tmp_path / "voc", {"train": 4, "val": 2})
    out = tmp_path / "run"
    detector.train.main(train_flags(root, out))
    moved = root.rename(tmp_path / "moved")  # where it lies is not what it is
    detector.train.main(train_flags(moved, out, resume=True))
    before = (out / "last.pt").read_bytes()

    split = moved / "ImageSets" / "Main" / "train.txt"
    names = split.read_text()
    split.write_text("".join(names.splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match=r"--resume: the training data .*4 images then, 3 now"):
        detector.train.main(train_flags(moved, out, resume=True))
    split.write_text(names)
    annotation = moved / "Annotations" / "image_000.xml"
    annotation.write_text(annotation.read_text().replace("<width>128", "<width>127"))
    with pytest.raises(ValueError, match="--resume: the training data"):
        detector.train.main(train_flags(moved, out, resume=True))
    assert (out / "last.pt").read_bytes() == before


def test_a_checkpoint_from_before_data_was_marked_is_resumed(voc: Path, tmp_path: Path) -> None:
    detector.train.main(train_flags(voc, tmp_path))
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    del content["data"]
    save_atomically(content, tmp_path / "last.pt")
    detector.train.main(train_flags(voc, tmp_path, resume=True))
    content["step"] = 99  # more than this run has
    save_atomically(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="step 99, and this run has 2"):
        detector.train.main(train_flags(voc, tmp_path, resume=True))


def test_the_mark_of_data_changes_with_what_training_sees(tmp_path: Path) -> None:
    root = write_coco(tmp_path, {"train": 2})

    def changed(change: Callable[[dict[str, Any]], object]) -> str:
        file = root / "annotations" / "instances_train.json"
        text = file.read_text()
        content = json.loads(text)
        change(content)
        file.write_text(json.dumps(content))
        mark = data_fingerprint(read_coco(root, "train"))
        file.write_text(text)
        return mark

    same = changed(lambda content: content.update(info="made on another day"))
    assert same == changed(lambda content: None)
    marks = [
        changed(lambda content: content["annotations"][0]["bbox"].__setitem__(2, 5)),
        changed(lambda content: content["annotations"][0].update(iscrowd=1)),
        changed(lambda content: content["annotations"][0].update(category_id=content["annotations"][1]["category_id"])),
        changed(lambda content: content["images"].reverse()),
        changed(lambda content: content["categories"][0].update(name="ring")),
        changed(lambda content: content["annotations"].pop()),
    ]
    assert len({same, *marks}) == 7


# ---- Detection


def run_detect(checkpoint: Path, out: Path, *inputs: Path) -> tuple[int, list[dict[str, Any]]]:
    words = [*map(str, inputs), "--checkpoint", str(checkpoint), "--out", str(out), "--workers", "0", "--device", "cpu"]
    failed = detect.main(words)
    return failed, json.loads((out / "detections.json").read_text())


def test_a_picture_too_wide_for_jpeg_is_a_png(checkpoint: Path, tmp_path: Path) -> None:
    images = tmp_path / "in"
    images.mkdir()
    Image.new("RGB", (detect.MAX_JPEG_SIDE + 1, 8)).save(images / "wide.bmp")
    Image.new("RGB", (8, 8)).save(images / "wide.png")
    failed, records = run_detect(checkpoint, tmp_path / "out", images)
    assert failed == 0
    assert [(record["width"], record["picture"]) for record in records] == [
        (detect.MAX_JPEG_SIDE + 1, "images/wide-2.png"),
        (8, "images/wide.png"),
    ]


def test_a_bad_file_costs_no_other_its_results(
    voc: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "in"
    images.mkdir()
    content = (voc / "JPEGImages" / "image_000.png").read_bytes()
    (images / "a.png").write_bytes(content)
    (images / "b.png").write_bytes(content)
    odd = Path(os.fsdecode(os.fsencode(images) + b"/caf\xe9.png"))
    odd.write_bytes(b"no image")

    calls = []

    def draws_once(*arguments: Any) -> Image.Image:
        calls.append(arguments)
        if len(calls) == 1:
            raise RuntimeError("no font")
        return arguments[0]

    monkeypatch.setattr(detect, "draw_detections", draws_once)
    words = [str(images), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--workers", "0"]
    status, _, output = ended(lambda: detect.main(words), capsys)
    assert status == 1
    records = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [record["file"] for record in records] == [str(images / "a.png"), str(images / "b.png"), str(odd)]
    assert records[0]["objects"] == records[1]["objects"] != []
    assert records[0]["picture_error"] == "no font" and records[1]["picture"] == "images/b.png"
    assert records[2]["error"] == "cannot be decoded"
    assert f"{images / 'a.png'}: no picture: no font" in output and "caf\\udce9.png" in output


@pytest.mark.parametrize("end", [RuntimeError("a worker is killed"), KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_results_so_far_are_written_when_detecting_ends_early(
    end: BaseException, voc: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends_early(*arguments: Any, **options: Any) -> Iterator[Any]:
        results = detect_each(*arguments, **options)
        yield next(results)
        raise end

    detect_each = detect.detect_each
    monkeypatch.setattr(detect, "detect_each", ends_early)
    with pytest.raises(type(end)):
        run_detect(checkpoint, tmp_path, voc / "JPEGImages")
    records = json.loads((tmp_path / "detections.json").read_text())
    assert len(records) == 6 and "objects" in records[0]
    assert [record["error"] for record in records[1:]] == ["not reached"] * 5


def test_an_image_that_is_given_is_never_overwritten(voc: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    image = tmp_path / "images" / "a.png"
    image.write_bytes((voc / "JPEGImages" / "image_000.png").read_bytes())
    before = image.read_bytes()
    with pytest.raises(ValueError, match="would overwrite"):
        run_detect(checkpoint, tmp_path, tmp_path / "images")
    assert image.read_bytes() == before


@pytest.mark.parametrize("ignored", ["annotations", "detections"])
def test_an_evaluation_that_would_ignore_a_file_is_refused(
    ignored: str, voc: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(checkpoint), "--data", str(voc), f"--{ignored}", "a.json"]
    status, printed, _ = ended(lambda: evaluate.main(words), capsys)
    assert status == 2 and f"got {', '.join(sorted(['--checkpoint', '--data', f'--{ignored}']))}" in printed


def test_a_link_to_nothing_is_an_image_that_cannot_be_decoded(checkpoint: Path, voc: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes((voc / "JPEGImages" / "image_000.png").read_bytes())
    (tmp_path / "b.png").symlink_to("nowhere.png")
    _, records = run_detect(checkpoint, tmp_path / "out", tmp_path)
    assert [(Path(record["file"]).name, record.get("error")) for record in records] == [
        ("a.png", None),
        ("b.png", "cannot be decoded"),
    ]


def test_an_image_given_by_two_paths_is_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    inputs = [Path("a.png"), tmp_path / "a.png", Path("../") / tmp_path.name / "a.png", tmp_path]
    assert [path for path, _ in detect.find_images(inputs)] == [Path("a.png")]


def test_ctrl_c_while_a_program_is_still_importing_ends_it_without_a_traceback(tmp_path: Path) -> None:
    """While torch imports NumPy: a signal from here could come too early or too late."""
    (tmp_path / "numpy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "detector.evaluate"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
