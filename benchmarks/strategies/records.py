"""Finished runs read into what a study's JSON file keeps of them, and nothing that is not the study's."""

from __future__ import annotations

import datetime
import json
import shlex
from pathlib import Path
from typing import Any

from benchmarks.strategies.studies import PRETRAINED, Row, Run, Study, find_runs, is_complete
from detector.reproduce import METRICS
from detector.scores import AGREEMENT_METRICS


def join_flags(flags: dict[str, object]) -> list[str]:
    """The words of a command line."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def training_command(
    run: Run, python: str, data: str, out: str, weights: str, device_flags: dict[str, object]
) -> list[str]:
    """`detector.train` for a run; --resume starts one that is not there."""
    flags: dict[str, object] = {"data": data, **run.flags()}
    flags["backbone-weights"] = weights if run.row.backbone in PRETRAINED else "none"
    return [python, "-m", "detector.train", "--resume", "--cache", *join_flags({**flags, **device_flags, "out": out})]


def evaluation_command(run: Run, python: str, data: str, out: str, device_flags: dict[str, object]) -> list[str]:
    """`detector.evaluate` of the last checkpoint on the test split."""
    flags: dict[str, object] = {"checkpoint": out, "data": data, "format": run.setting.layout, "split": "test"}
    return [python, "-m", "detector.evaluate", *join_flags({**flags, **device_flags, "out": f"{out}/test"})]


def check_arguments(run: Run, arguments: dict[str, Any]) -> None:
    """Refuses a run that was started with other flags than the study's, those not named among them.

    Raises:
        ValueError: names each flag that differs.
    """
    from detector.checkpoint import FREE_ON_RESUME
    from detector.train import parse_arguments

    expected = vars(parse_arguments(["--data", ".", *join_flags(dict(run.flags()))]))
    differences = [
        f"--{name.replace('_', '-')} {arguments[name]!r} where the study has {value!r}"
        for name, value in expected.items()
        if name not in FREE_ON_RESUME and name in arguments and arguments[name] != value
    ]
    if (arguments.get("backbone_weights") != "none") != (run.row.backbone in PRETRAINED):
        wanted = "pretrained ones" if run.row.backbone in PRETRAINED else "random ones"
        differences.append(f"--backbone-weights of another kind where the study has {wanted}")
    if differences:
        raise ValueError(f"{run.name} was started with other flags: {', '.join(differences)}")


def training_speed(log: list[dict[str, Any]], batch: int) -> tuple[float | None, float | None]:
    """Seconds a training took by its log, without evaluations and what came before the first step, and images a second.

    Each entry gives the images a second since the entry before.
    """
    seconds, images, step_before = 0.0, 0, -1
    for entry in log:
        if "images_per_second" in entry:
            new = (entry["step"] - step_before) * batch
            seconds, images, step_before = seconds + new / entry["images_per_second"], images + new, entry["step"]
    return (seconds, images / seconds) if seconds else (None, None)


def pick_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a results.json or metrics.json: AP, AP50 and AP75, also class by class, and the agreement."""
    kept = {metric: metrics[metric] for metric in METRICS}
    # Of checkpoints that were scored before there was such a metric, only the rest.
    kept |= {metric: metrics[metric] for metric in AGREEMENT_METRICS if metric in metrics}
    kept["images"] = metrics["images"]
    kept["per_class"] = {
        name: {metric: values[metric] for metric in METRICS} for name, values in metrics["per_class"].items()
    }
    return kept


def read_run(run: Run, split: str, provenance: dict[str, object]) -> dict[str, Any]:
    """A complete run as the JSON file keeps it.

    Args:
        run: the run.
        split: what the study reports.
        provenance: for a run without provenance.json: started by hand, on this machine.

    Raises:
        ValueError: its flags are not the study's, or its test scores are of another checkpoint.
    """
    from detector.run_log import read_log

    results = json.loads((run.folder / "results.json").read_text())
    check_arguments(run, results["arguments"])
    log = read_log(run.folder / "log.jsonl")
    seconds, images_per_second = training_speed(log, int(run.flags()["batch"]))
    file = run.folder / "provenance.json"
    if file.is_file():
        starts = json.loads(file.read_text())
        provenance = {**starts[-1], "commit": ", ".join(dict.fromkeys(str(start["commit"]) for start in starts))}
    else:
        written = datetime.datetime.fromtimestamp((run.folder / "results.json").stat().st_mtime, datetime.timezone.utc)
        provenance = {**provenance, "date": written.isoformat(timespec="seconds")}
    record: dict[str, Any] = {"seed": run.seed, **provenance}
    record |= {"training_seconds": seconds, "images_per_second": images_per_second, "val": pick_metrics(results)}
    if split == "test":
        metrics = json.loads((run.folder / "test" / "metrics.json").read_text())
        steps = log[-1]["step"] if log else None
        if metrics["split"] != "test" or metrics["step"] != steps:
            raise ValueError(
                f"{run.name}: expected test/metrics.json to score split 'test' at the last step {steps}, and it "
                f"scores {metrics['split']!r} at step {metrics['step']}: remove it to have it made again"
            )
        record |= {"steps": metrics["step"], "test": pick_metrics(metrics)}
    return record


def shown_command(study: Study, row: Row) -> str:
    """The command of a row's first seed, with names in place of paths."""
    run = Run(study.setting, row, study.seeds[0], Path("RUN"))
    return shlex.join(training_command(run, "python", study.setting.data, "RUN", "VGG16_WEIGHTS", {}))


def collect(name: str, study: Study, folder: Path, provenance: dict[str, object]) -> dict[str, Any]:
    """A study's content for its JSON file: every run of it that is complete, whatever seeds and rows were asked for."""
    rows = []
    for row in study.rows:
        runs = [run for run in find_runs(study, [row], None, folder) if is_complete(run, study.split)]
        rows.append(
            {
                "name": row.name,
                **{key: value for key, value in row._asdict().items() if key != "flags"},
                "flags": dict(row.flags),
                "command": shown_command(study, row),
                "runs": [read_run(run, study.split, provenance) for run in runs],
            }
        )
    setting = {**study.setting._asdict()}
    return {"study": name, "title": study.title, "split": study.split, "setting": setting, "rows": rows}
