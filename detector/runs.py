"""Many runs of `detector.train` as one job: what a study trains, several runs at once, and records of their results.

A study is data: rows (what is trained) in a setting (what all of them have in common), each row once per seed. Complete
runs are not run again and interrupted ones are resumed, so the same command continues a study at any time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from detector.batches import MAX_SEED
from detector.checkpoint import FREE_ON_RESUME
from detector.outputs import whole_file
from detector.program import default_device, whole_number
from detector.run_log import read_log
from detector.scores import AGREEMENT_METRICS
from detector.train import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("AP", "AP50", "AP75")
Flags = tuple[tuple[str, str], ...]
"""Of detector.train: names and values."""


def parse_flags(text: str) -> Flags:
    """The flags of "--lr 0.02 --epochs 40"."""
    words = text.replace("--", "").split()
    return tuple(zip(words[::2], words[1::2], strict=True))


def join_flags(flags: dict[str, str]) -> list[str]:
    """The words of a command line."""
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


class Setting(NamedTuple):
    """What the runs of a study have in common. Its name is the folder of the runs."""

    name: str
    data: str
    """The data set, as docs/results.md calls it."""
    layout: str
    """"voc" or "coco"."""
    flags: Flags


class Row(NamedTuple):
    """One thing that is trained, once per seed."""

    model: str
    backbone: str
    strategy: str
    flags: Flags = ()
    """They come before the setting's."""
    note: str = ""
    """What tells the row from others of the same strategy."""
    paper: tuple[float, float, float] | None = None
    """The paper's AP, AP50 and AP75 in percent, if it has this row."""

    @property
    def name(self) -> str:
        """The folder of its runs, but for the seed."""
        flags = "".join(f"-{flag}{value}" for flag, value in sorted(self.flags))
        return f"{self.model}-{self.backbone}-{self.strategy}{flags}"


class Study(NamedTuple):
    """What is compared: one table."""

    name: str
    title: str
    setting: Setting
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    split: str = "test"
    """The split it reports: "test", scored after the training, or "val", the one that the training itself scores."""
    baseline: tuple[str, str | None] | None = ("iou", "")
    """Strategy and note of the row that others of the same model are compared with, seed by seed; without a note, those
    of the same note."""
    pretrained: tuple[str, ...] = ("vgg16",)
    """Backbones that start from pretrained weights; the others start from random ones."""
    words: tuple[str, ...] = ("--cache",)
    """These begin each command line of detector.train."""


class Run(NamedTuple):
    """A row with one seed, and its folder."""

    study: Study
    row: Row
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"{self.row.name}-seed{self.seed}"

    @property
    def log(self) -> Path:
        """What its commands print."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def is_trained(self) -> bool:
        """Whether it was trained to its end."""
        return (self.folder / "results.json").is_file()

    @property
    def is_complete(self) -> bool:
        """Whether it has what its study reports."""
        return self.is_trained and (self.study.split == "val" or (self.folder / "test/metrics.json").is_file())

    def flags(self, weights: str = "imagenet") -> dict[str, str]:
        """What decides what the run computes, beside the study's words."""
        row, setting = self.row, self.study.setting
        flags = {"format": setting.layout, **dict(setting.flags), "model": row.model, "backbone": row.backbone}
        flags |= {"strategy": row.strategy, **dict(row.flags), "seed": str(self.seed)}
        return {**flags, "backbone-weights": weights if row.backbone in self.study.pretrained else "none"}

    def arguments(self) -> dict[str, Any]:
        """All that detector.train makes of it; ends the program if it does not take a flag."""
        return vars(parse_arguments([*self.study.words, *join_flags({"data": ".", **self.flags()})]))


def find_runs(study: Study, rows: Sequence[Row], seeds: Sequence[int] | None, folder: Path) -> list[Run]:
    """The runs of some rows with some seeds (None for all that have a folder), below the folder of the settings.

    Seed by seed, so that every strategy has the first seed before one has the second.
    """
    folder, runs = folder / study.setting.name, []
    for row in rows:
        endings = [path.name.removeprefix(f"{row.name}-seed") for path in folder.glob(f"{row.name}-seed*")]
        found = seeds if seeds is not None else [int(ending) for ending in endings if ending.isdecimal()]
        runs += [Run(study, row, seed, folder / f"{row.name}-seed{seed}") for seed in found]
    return sorted(runs, key=lambda run: run.seed)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def read_scores(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A results.json or metrics.json, and what records keep of it: AP, AP50 and AP75, by class too, and the agreement.

    Raises:
        ValueError: it is something else, or cut off.
    """
    try:
        metrics = json.loads(file.read_text())
        # Of checkpoints that were scored before there were metrics of agreement, only the rest.
        wanted = (*METRICS, *(metric for metric in AGREEMENT_METRICS if metric in metrics), "images")
        classes = {name: {metric: of[metric] for metric in METRICS} for name, of in metrics["per_class"].items()}
        return metrics, {**{metric: metrics[metric] for metric in wanted}, "per_class": classes}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: expected a detector's scores ({error!r}); remove it to have it made anew") from error


def read_run(run: Run) -> dict[str, Any]:
    """The record of a complete run.

    Raises:
        ValueError: its flags are not the study's, or its test scores are of another checkpoint.
    """
    results, val = read_scores(run.folder / "results.json")
    arguments = results["arguments"]
    differences = [
        f"--{name.replace('_', '-')} {arguments[name]!r} where the study has {value!r}"
        for name, value in run.arguments().items()  # those that the study does not name among them
        if (name not in FREE_ON_RESUME and arguments.get(name, value) != value)
        or (name == "backbone_weights" and (arguments[name] == "none") != (value == "none"))
    ]
    if differences:
        raise ValueError(f"{run.name} was started with other flags: {', '.join(differences)}")
    log = read_log(run.folder / "log.jsonl")
    # Without evaluations and what came before the first step: each entry gives the speed since the entry before.
    seconds, images, step_before = 0.0, 0, -1
    for entry in (entry for entry in log if "images_per_second" in entry):
        new = (entry["step"] - step_before) * arguments["batch"]
        seconds, images, step_before = seconds + new / entry["images_per_second"], images + new, entry["step"]
    file = run.folder / "provenance.json"
    if file.is_file():
        starts = json.loads(file.read_text())
        commits = dict.fromkeys(start.get("commit", "not recorded") for start in starts)
        provenance = {**starts[-1], "commit": ", ".join(commits)}
    else:  # it was started by hand
        written = datetime.datetime.fromtimestamp((run.folder / "results.json").stat().st_mtime, datetime.timezone.utc)
        provenance = dict.fromkeys(("device", "torch", "mg_ops", "commit"), "not recorded")
        provenance |= {"threads": None, "date": written.isoformat(timespec="seconds")}
    record = {"seed": run.seed, **provenance, "training_seconds": seconds or None}
    record |= {"images_per_second": images / seconds if seconds else None, "val": val}
    if run.study.split == "test":
        metrics, test = read_scores(run.folder / "test/metrics.json")
        steps = log[-1]["step"] if log else None
        if metrics["split"] != "test" or metrics["step"] != steps:
            raise ValueError(
                f"{run.name}: expected test/metrics.json to score split 'test' at the last step {steps}, and it "
                f"scores {metrics['split']!r} at step {metrics['step']}: remove it to have it made again"
            )
        record |= {"steps": metrics["step"], "test": test}
    return record


def collect(study: Study, folder: Path) -> dict[str, Any]:
    """A study's records, as JSON keeps them: all its runs that are complete, whatever rows and seeds were asked for."""
    rows = []
    for row in study.rows:
        example = Run(study, row, study.seeds[0], Path("RUN"))
        command = training_command(example, ["python", "-m"], study.setting.data, "VGG16_WEIGHTS", {})
        record: dict[str, Any] = {
            "name": row.name,
            "model": row.model,
            "backbone": row.backbone,
            "strategy": row.strategy,
        }
        record |= {"note": row.note, "flags": dict(row.flags), "command": shlex.join(command)}
        record |= {"paper": dict(zip(METRICS, row.paper, strict=True))} if row.paper is not None else {}
        runs = [read_run(run) for run in find_runs(study, [row], None, folder) if run.is_complete]
        rows.append({**record, "runs": runs})
    setting = {**study.setting._asdict(), "flags": dict(study.setting.flags)}
    return {"study": study.name, "title": study.title, "split": study.split, "setting": setting, "rows": rows}


def write_text(path: Path, text: str) -> None:
    """Writes a file in one piece, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text.encode())


# ---------------------------------------------------------------------------------------------------------------------
# Running


def training_command(run: Run, python: list[str], data: str, weights: str, device: dict[str, str]) -> list[str]:
    """`detector.train` for a run; --resume starts one that is not there."""
    flags = {"data": data, **run.flags(weights), "out": str(run.folder)}
    return [*python, "detector.train", "--resume", *join_flags(device), *run.study.words, *join_flags(flags)]


def commands_of(run: Run, args: argparse.Namespace, num_cores: int) -> list[list[str]]:
    """What is still to do for a run: training, and evaluation of its last checkpoint on the test split."""
    python, data = [sys.executable, "-m"], str(args.data)
    torchrun = [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}", "-m"]
    # On a CPU the network has the cores; a GPU leaves them to the loader.
    workers = min(12, max(1, num_cores // args.processes)) if args.device == "cuda" else 0
    device = {"device": args.device, "workers": str(workers)}
    commands = []
    if not run.is_trained:
        launcher = torchrun if args.processes > 1 else python
        commands.append(training_command(run, launcher, data, args.backbone_weights, device))
    if run.study.split == "test":
        flags = {"checkpoint": str(run.folder), "data": data, "format": run.study.setting.layout, "split": "test"}
        commands.append([*python, "detector.evaluate", *join_flags({**flags, **device, "out": f"{run.folder}/test"})])
    return commands


def share_machine(index: int, args: argparse.Namespace) -> tuple[list[int], dict[str, str]]:
    """The cores that one of --parallel runs has for itself, and an environment that tells it so, and its GPUs."""

    def share(things: list[Any]) -> list[Any]:
        return things[index :: args.parallel] or [things[index % len(things)]]

    all_cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = share(sorted(all_cores))
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, len(cores) // args.processes))}
    # Before an installed mg_ops and detector of another checkout.
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if args.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(share(visible.split(",")))
    return cores, environment


def note_start(run: Run, start: dict[str, Any]) -> None:
    """Adds to the run's provenance.json where, when and from which commit it was started or resumed."""
    file = run.folder / "provenance.json"
    starts = json.loads(file.read_text()) if file.is_file() else []
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_text(file, json.dumps([*starts, {**start, "date": now}], indent=1) + "\n")


def execute(
    runs: list[Run], args: argparse.Namespace, provenance: dict[str, Any], after_each: Callable[[], Any]
) -> int:
    """Runs what is not complete, --parallel runs at once, and calls `after_each` whenever one is.

    Returns:
        0, 1 if a run failed, 130 after SIGINT or SIGTERM, when every run has saved its step and ended.
    """
    shares = [share_machine(index, args) for index in range(args.parallel)]
    processes: list[subprocess.Popen[bytes]] = []
    starting, stopping = threading.Lock(), threading.Event()

    def complete(run: Run) -> int:
        cores, environment = share = shares.pop()
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)  # of this thread, and so of the processes that it starts
        tqdm.write(f"started {run.name}; what it prints: {run.log}")
        if not run.is_trained:
            note_start(run, {**provenance, "threads": int(environment["OMP_NUM_THREADS"])})
        code = 0
        for command in commands_of(run, args, len(cores)):
            with starting, run.log.open("ab") as log:
                if code != 0 or stopping.is_set():
                    break
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                processes.append(process)
            code = process.wait()
        shares.append(share)
        return code

    failed = False
    pool = ThreadPoolExecutor(args.parallel)
    terminate_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as SIGINT is
    try:
        futures = {pool.submit(complete, run): run for run in runs if not run.is_complete}
        for future in tqdm(as_completed(futures), total=len(futures), unit="run", disable=None):
            run, code = futures[future], future.result()
            if code == 0:
                tqdm.write(f"finished {run.name}")
                after_each()
            else:
                failed = True
                last_line = "".join(run.log.read_text(errors="replace").splitlines()[-1:])
                tqdm.write(f"failed {run.name}, exit status {code}: {last_line}")
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        with starting:
            stopping.set()
        for process in processes:
            process.terminate()  # detector.train saves its step and exits
        if not isinstance(error, KeyboardInterrupt):
            raise
        pool.shutdown()
        print("interrupted: every run has saved its step; the same command continues")
        return 130
    finally:
        pool.shutdown()
        signal.signal(signal.SIGTERM, terminate_handler)
    return int(failed)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines

CHOICES = {"models": "model", "backbones": "backbone", "strategies": "strategy", "rows": "name"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every program that runs a study has."""
    parser.add_argument("--data", type=Path, help="folder of the study's data set, or of any set to run its rows on")
    parser.add_argument("--format", choices=("voc", "coco"), help="how it is laid out, if not as the study says")
    parser.add_argument(
        "--seeds", nargs="+", type=whole_number(0, MAX_SEED), help="each row once per seed; by default the study's"
    )
    for flag, field in CHOICES.items():
        # Under both names: what is taken for a flag of detector.train would be the row's to set.
        parser.add_argument(f"--{flag}", f"--{field}", nargs="+", metavar="NAME", help="only rows with one of these")
    weights = "of backbones that start from pretrained ones: imagenet (downloaded) or the file of a state dict"
    parser.add_argument("--backbone-weights", default="imagenet", help=weights)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=default_device(), help="where to train (%(default)s)"
    )
    parser.add_argument(
        "--parallel", type=whole_number(1), default=1, help="runs at once, each with its share of cores and GPUs"
    )
    parser.add_argument(
        "--processes", type=whole_number(1), default=1, help="GPUs that one run takes, through torchrun"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands that are left; write nothing")


def choose_rows(study: Study, args: argparse.Namespace) -> list[Row]:
    """The rows that --models, --backbones, --strategies and --rows leave; ValueError for names that the study lacks."""
    rows = list(study.rows)
    for flag, field in CHOICES.items():
        wanted, known = getattr(args, flag), list(dict.fromkeys(getattr(row, field) for row in study.rows))
        unknown = [name for name in wanted or () if name not in known]
        if unknown:
            raise ValueError(f"--{flag}: {', '.join(unknown)} not in {study.name}; it has {', '.join(known)}")
        rows = [row for row in rows if wanted is None or getattr(row, field) in wanted]
    if not rows:
        raise ValueError(f"{study.name} has no row with all of these --models, --backbones, --strategies and --rows")
    return rows


def run_study(
    study: Study, args: argparse.Namespace, folder: Path, provenance: dict[str, Any], write: Callable[[Any], Any]
) -> int:
    """Runs the rows that a command line (of `add_arguments`) asks for, in a folder that has one for each setting.

    `provenance` is noted at each start, beside date and number of threads; `write` keeps the study's records, before
    the first run and after each.

    Returns:
        0, 1 if a run failed, 130 after a signal.

    Raises:
        ValueError: an option that makes no sense, or a run that was started with other flags than the study's.
    """
    if args.data is None:
        raise ValueError(f"--data is needed: the folder of {study.setting.data}")
    runs = find_runs(study, choose_rows(study, args), list(dict.fromkeys(args.seeds or study.seeds)), folder)
    for run in runs:
        run.arguments()
    content = collect(study, folder)
    if not args.dry_run:
        write(content)
        return execute(runs, args, provenance, lambda: write(collect(study, folder)))
    for run in runs:
        print(f"# {run.name}: {'complete' if run.is_complete else 'trained' if run.is_trained else 'to do'}")
        for command in commands_of(run, args, 1) if not run.is_complete else ():
            print(shlex.join(command))
    return 0
