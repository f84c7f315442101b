"""Trains and evaluates the runs behind docs/results.md: does Mutual Guidance help, on which data, by how much?

    python benchmarks/strategies/compare.py --study bccd-fssd-resnet18 --data BCCD --parallel 2
    python benchmarks/strategies/compare.py --study bccd-fssd-resnet18 --data BCCD --dry-run   # the commands alone
    python benchmarks/strategies/compare.py --render   # docs/results.md from the recorded JSON files
    python benchmarks/strategies/compare.py --plot docs/figures/leads.png   # and its first picture

A study is a list of rows (what is trained) in a setting (what all of them have in common); each row is trained once a
seed, by `detector.train`, and its last checkpoint is scored by `detector.evaluate`. Runs that are complete are not run
again, interrupted ones are resumed, and a run that several studies ask for is shared by them. After each run the
study's JSON file and its tables are written anew, beside the runs in runs/strategies/, which git ignores; with --record
to benchmarks/strategies/results/ and docs/results.md.

Whatever is tuned is chosen by the val split, for both strategies with the same budget, and reported on test.
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
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks/strategies/results"
DOCUMENT = ROOT / "docs/results.md"
sys.path.append(str(ROOT))

from benchmarks.strategies.figure import draw_leads, find_leads  # noqa: E402
from benchmarks.strategies.records import collect, evaluation_command, training_command  # noqa: E402
from benchmarks.strategies.studies import STRATEGIES, STUDIES, Run, find_runs, is_complete, is_trained  # noqa: E402
from benchmarks.strategies.tables import SCRIPT, render, write_study  # noqa: E402


class Slot:
    """A share of the machine: a run at a time has its cores, and a GPU if there is one, for itself."""

    def __init__(self, cores: list[int], gpu: int | None) -> None:
        self.cores, self.gpu = cores, gpu
        self.run: Run | None = None
        self.commands: list[list[str]] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.task: TaskID | None = None

    def environment(self) -> dict[str, str]:
        """Of its processes."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(len(self.cores))}
        if self.gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[self.gpu] if visible[0] else str(self.gpu)
        # Before an installed mg_ops and detector of another checkout.
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return environment

    def start_command(self) -> None:
        """Starts the next command of its run; output goes to a log beside the run's folder."""
        assert self.run is not None
        log = self.run.folder.with_name(f"{self.run.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        pin = (lambda: os.sched_setaffinity(0, self.cores)) if hasattr(os, "sched_setaffinity") else None
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                self.commands.pop(0),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                preexec_fn=pin,
            )


def make_slots(count: int, num_gpus: int) -> list[Slot]:
    """Cores and GPUs shared out evenly."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return [
        Slot(cores[index::count] or [cores[index % len(cores)]], index % num_gpus if num_gpus else None)
        for index in range(count)
    ]


def last_epoch(run: Run) -> float:
    """How far its log says that it is."""
    log = run.folder / "log.jsonl"
    try:
        return float(json.loads(log.read_text().splitlines()[-1])["epoch"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0.0


def note_start(run: Run, machine: dict[str, object], threads: int) -> None:
    """Adds to the run's provenance.json where, when and from which commit it was started or resumed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    started = {name: machine[name] for name in ("device", "torch", "mg_ops", "commit")}
    started |= {"threads": threads, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    file = run.folder / "provenance.json"
    starts = json.loads(file.read_text()) if file.is_file() else []
    file.write_text(json.dumps([*starts, started], indent=1) + "\n")


class Interrupted(Exception):
    """SIGINT or SIGTERM came."""


def execute(
    runs: list[Run], args: argparse.Namespace, split: str, console: Console, after_each: Any
) -> tuple[list[Run], bool]:
    """Runs what is not complete, several at once, each in its slot.

    Args:
        runs: all of the study that are wanted.
        args: the command line.
        split: what the study reports.
        console: for messages and progress.
        after_each: called whenever a run is complete.

    Returns:
        The runs that failed, and whether a signal ended it early.
    """
    from benchmarks.machine import describe_machine

    waiting = [run for run in runs if not is_complete(run, split)]
    failed: list[Run] = []
    if not waiting:
        return failed, False
    num_gpus = 0
    if args.device == "cuda":
        import torch

        num_gpus = torch.cuda.device_count()
    machine = describe_machine(args.device)
    slots = make_slots(args.parallel, num_gpus)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"))
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
    try:
        with progress:
            overall = progress.add_task("runs", total=len(waiting), done=f"0 of {len(waiting)}")
            number_of_runs, ended = len(waiting), 0
            while waiting or any(slot.run for slot in slots):
                for slot in slots:
                    if slot.run is None and waiting:
                        run = slot.run = waiting.pop(0)
                        slot.commands = commands_of(run, args, split, len(slot.cores))
                        slot.task = progress.add_task(run.name, total=float(run.flags()["epochs"]), done="")
                        console.print(f"started {run.name}", highlight=False)
                        if not is_trained(run):
                            note_start(run, machine, len(slot.cores))
                        slot.start_command()
                    if slot.run is None:
                        continue
                    assert slot.process is not None and slot.task is not None
                    epoch = last_epoch(slot.run)
                    progress.update(
                        slot.task, completed=epoch, done=f"epoch {epoch:.1f} of {slot.run.flags()['epochs']}"
                    )
                    code = slot.process.poll()
                    if code is None:
                        continue
                    if code == 0 and slot.commands:
                        slot.start_command()
                        continue
                    run, slot.run, slot.process = slot.run, None, None
                    progress.remove_task(slot.task)
                    ended += 1
                    progress.update(overall, completed=ended, done=f"{ended} of {number_of_runs}")
                    if code == 0:
                        console.print(f"finished {run.name}", highlight=False)
                        after_each()
                    else:
                        failed.append(run)
                        log = run.folder.with_name(f"{run.name}.log")
                        console.print(f"[red]failed[/] {run.name}, exit status {code}: see {log}", highlight=False)
                time.sleep(args.poll_seconds)
    except Interrupted:
        for slot in slots:
            if slot.process is not None:
                slot.process.terminate()  # detector.train saves its step and exits
        for slot in slots:
            if slot.process is not None:
                slot.process.wait()
        console.print("interrupted: every run has saved its step; the same command continues")
        return failed, True
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return failed, False


def commands_of(run: Run, args: argparse.Namespace, split: str, num_cores: int) -> list[list[str]]:
    """What is still to do for a run."""
    # On a CPU the network has the cores; a GPU leaves them to the loader.
    device_flags = {"device": args.device, "workers": num_cores if args.device == "cuda" else 0}
    data, out = str(args.data), str(run.folder)
    commands = []
    if not is_trained(run):
        commands.append(training_command(run, sys.executable, data, out, args.backbone_weights, device_flags))
    if split == "test":
        commands.append(evaluation_command(run, sys.executable, data, out, device_flags))
    return commands


# ---------------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        f"python {SCRIPT}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="studies:\n" + "\n".join(f"  {name:20} {study.title}" for name, study in STUDIES.items()),
    )
    parser.add_argument("--study", choices=STUDIES, help="which table; see below")
    parser.add_argument("--data", type=Path, help="folder of the study's data set")
    parser.add_argument("--format", choices=("voc", "coco"), help="how it is laid out, if not as the study says")
    parser.add_argument("--seeds", nargs="+", type=int, help="each row once a seed; by default the study's")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, help="rows of these strategies only")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows only, by the last column of the table")
    parser.add_argument("--runs", type=Path, default=Path("runs/strategies"), help="folder of the runs (%(default)s)")
    parser.add_argument(
        "--backbone-weights",
        default="imagenet",
        help="of VGG-16: imagenet (downloaded) or the file of a state dict; ResNet-18 starts from random ones",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")
    parser.add_argument("--parallel", type=int, default=1, help="runs at once, each with its share of cores and GPUs")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands that are left, run and write nothing"
    )
    parser.add_argument("--collect", action="store_true", help="run nothing: read the runs that are there and write")
    parser.add_argument("--commit", help="with --collect: of runs started by hand on this machine, without a record")
    parser.add_argument("--threads", type=int, help="with --collect: how many threads such runs had")
    parser.add_argument("--render", action="store_true", help="run and read nothing: tables from the JSON files")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="likewise: mutual less iou in every setting, drawn")
    parser.add_argument("--record", action="store_true", help="write the results that docs/results.md shows")
    parser.add_argument("--poll-seconds", type=float, default=1.0, help="between looks at the runs (%(default)s)")
    args = parser.parse_args(argv)
    if args.render or args.plot is not None:
        return args
    if args.study is None:
        parser.error("--study is needed: one of " + ", ".join(STUDIES))
    if args.data is None and not args.collect:
        parser.error(f"--data is needed: the folder of {STUDIES[args.study].setting.data}")
    if args.parallel < 1:
        parser.error(f"--parallel: expected at least 1, got {args.parallel}")
    names = [row.name for row in STUDIES[args.study].rows]
    unknown = [name for name in args.rows or () if name not in names]
    if unknown:
        parser.error(f"--rows: {', '.join(unknown)} not in {args.study}; its rows are {', '.join(names)}")
    if args.data is not None:
        args.data = args.data.resolve()
    if Path(args.backbone_weights).is_file():
        args.backbone_weights = str(Path(args.backbone_weights).resolve())
    args.runs = args.runs.resolve()
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, 1 if a run failed or does not fit, 130 after a signal."""
    args = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if args.render or args.plot is not None:
        files = {name: RECORDS / f"{name}.json" for name in STUDIES}
        contents = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
        if args.render:
            for name, content in contents.items():
                write_study(name, content, RECORDS, DOCUMENT)
        if args.plot is not None:
            try:
                draw_leads(find_leads(list(contents.values())), args.plot)
            except ValueError as error:
                console.print(f"[red]{error}[/]", highlight=False)
                return 1
        return 0
    study = STUDIES[args.study]
    if args.format is not None:
        study = study._replace(setting=study.setting._replace(layout=args.format))
    rows = [
        row
        for row in study.rows
        if (args.rows is None or row.name in args.rows) and (args.strategies is None or row.strategy in args.strategies)
    ]
    runs = find_runs(study, rows, args.seeds or study.seeds, args.runs)
    if args.dry_run:
        for run in runs:
            state = "complete" if is_complete(run, study.split) else "trained" if is_trained(run) else "to do"
            print(f"# {run.name}: {state}")
            if state != "complete":
                for command in commands_of(run, args, study.split, 1):
                    print(shlex.join(command))
        return 0

    from benchmarks.machine import describe_machine

    machine = describe_machine(args.device)
    provenance: dict[str, object] = {name: machine[name] for name in ("device", "torch", "mg_ops")}
    provenance |= {"commit": args.commit or "not recorded", "threads": args.threads}

    results = RECORDS if args.record else args.runs
    document = DOCUMENT if args.record else None

    def write() -> list[Path]:
        return write_study(args.study, collect(args.study, study, args.runs, provenance), results, document)

    failed: list[Run] = []
    interrupted = False
    try:
        if not args.collect:
            failed, interrupted = execute(runs, args, study.split, console, write)
        written = write()
    except ValueError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        return 1
    print(render(json.loads(written[0].read_text()), study))
    console.print(f"written to {' and '.join(map(str, written))}", highlight=False)
    return 130 if interrupted else 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
