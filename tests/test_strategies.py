"""The tables of docs/results.md say what the runs found: nothing else, nothing less, and no path of the machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pyramid_batches import pyramid_batch
from small_data import write_voc

import mg_ops
from benchmarks.strategies import compare, figure, records, tables
from benchmarks.strategies.studies import STUDIES, Row, Run, Setting, Study, find_runs
from detector.train import parse_arguments

ROOT = Path(__file__).parents[1]
TINY = Setting(
    "tiny-64",
    "Tiny",
    "voc",
    {"train-split": "train", "eval-split": "val", "image-size": "64", "batch": "4", "epochs": "1"},
)
STUDY = Study("Tiny", TINY, tuple(Row("fssd", "resnet18", strategy) for strategy in ("iou", "mutual")), (0, 1))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(STUDIES, "tiny", STUDY)


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags that record what a test writes, outside of the checkout."""
    document = tmp_path / "results.md"
    document.write_text(f"above\n<!-- begin tiny: written by {tables.SCRIPT} -->\nold\n<!-- end tiny -->\nbelow\n")
    monkeypatch.setattr(compare, "RECORDS", tmp_path / "results")
    monkeypatch.setattr(compare, "DOCUMENT", document)
    return ["--record", "--runs", str(tmp_path / "runs")]


def scores(ap: float | None) -> dict[str, Any]:
    """Metrics as detector.evaluate writes them; AP50 and AP75 follow from AP."""
    values = {"AP": ap, "AP50": None if ap is None else ap + 0.2, "AP75": None if ap is None else ap - 0.1}
    agreement = {"score_iou_correlation": ap, "matched_iou": 0.75}
    return {
        **values,
        **agreement,
        "images": 7,
        "per_class": {"disc": {**values, "objects": 3}, "square": {**values, "objects": 4}},
    }


def finish_run(folder: Path, strategy: str, seed: int, ap: float, changed: dict[str, object] | None = None) -> Path:
    """A run's folder as detector.train and detector.evaluate leave it."""
    row = next(row for row in STUDY.rows if row.strategy == strategy)
    run = Run(TINY, row, seed, folder / TINY.name / f"{row.name}-seed{seed}")
    arguments = vars(parse_arguments(["--data", str(folder), *records.join_flags(dict(run.flags()))]))
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    arguments |= {"backbone_weights": "none", "out": str(run.folder), **(changed or {})}
    (run.folder / "test").mkdir(parents=True)
    (run.folder / "results.json").write_text(json.dumps({**scores(ap + 0.01), "arguments": arguments}))
    log = [{"step": 0, "epoch": 0.5, "images_per_second": 2.0}, {"step": 9, "epoch": 1, "images_per_second": 12.0}]
    log.append({"step": 10, "epoch": 1, "eval_AP": ap})
    (run.folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    metrics = {**scores(ap), "split": "test", "step": 10, "checkpoint": str(run.folder)}
    (run.folder / "test" / "metrics.json").write_text(json.dumps(metrics))
    return run.folder


def content_of(aps: dict[str, dict[int, float]]) -> dict[str, Any]:
    """A study's records, from AP on test by strategy and seed."""
    provenance = {"device": "Abacus", "torch": "2", "mg_ops": "1", "commit": "abc", "threads": 1, "date": "2026-01-02T"}
    rows = [
        {
            "name": row.name,
            **{key: value for key, value in row._asdict().items() if key != "flags"},
            "runs": [
                {"seed": seed, **provenance, "training_seconds": 90.0, "val": scores(ap + 0.01), "test": scores(ap)}
                for seed, ap in aps.get(row.strategy, {}).items()
            ],
        }
        for row in STUDY.rows
    ]
    return {"study": "tiny", "split": "test", "setting": TINY._asdict(), "rows": rows}


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_a_row_is_mean_and_standard_deviation_over_its_seeds() -> None:
    text = tables.render(content_of({"iou": {0: 0.30, 1: 0.32, 2: 0.34}, "mutual": {5: 0.5}}), STUDY)
    row = "| FSSD ResNet-18 | iou | 0, 1, 2 | 32.0 ± 2.0 | 52.0 ± 2.0 | 22.0 ± 2.0 | 33.0 ± 2.0 | 1.5 |"
    assert f"{row} `fssd-resnet18-iou` |" in text
    assert "| FSSD ResNet-18 | mutual | 5 | 50.0 | 70.0 | 40.0 | 51.0 | 1.5 | `fssd-resnet18-mutual` |" in text
    assert "4 runs on Abacus (1 thread a run), torch 2, commit abc, 2026-01-02." in text


def test_agreement_of_scores_and_boxes_is_of_runs_that_know_it() -> None:
    content = content_of({"iou": {0: 0.30, 1: 0.32, 2: 0.34}, "mutual": {5: 0.5}})
    text = tables.render(content, STUDY)
    assert "| FSSD ResNet-18 | iou | 0.320 ± 0.020 |  | 0.750 ± 0.000 |" in text
    assert "| FSSD ResNet-18 | mutual | 0.500 | - | 0.750 |" in text  # no seed in common
    paired = tables.render(content_of({"iou": {0: 0.30, 1: 0.31, 2: 0.32}, "mutual": {0: 0.31, 1: 0.34}}), STUDY)
    assert "| FSSD ResNet-18 | mutual | 0.325 ± 0.021 | +0.020 ± 0.010 | 0.750 ± 0.000 |" in paired
    for row in content["rows"]:
        for run in row["runs"]:  # as of runs scored by an older detector.evaluate
            del run["test"]["score_iou_correlation"], run["test"]["matched_iou"]
    assert tables.render(content, STUDY) == text[: text.index("\nDo the scores know")]


def test_a_row_without_runs_stays_with_its_command() -> None:
    text = tables.render(content_of({}), STUDY)
    assert "| FSSD ResNet-18 | iou | - | - | - | - | - | - | `fssd-resnet18-iou` |" in text
    assert "python benchmarks/strategies/compare.py --study tiny --data Tiny" in text
    assert "Paired" not in text and "class by class" not in text


def test_differences_are_of_seeds_that_both_have() -> None:
    aps = {"iou": {0: 0.28, 1: 0.30, 2: 0.35, 3: 0.9}, "mutual": {0: 0.30, 1: 0.33, 2: 0.36, 4: 0.1}}
    text = tables.render(content_of(aps), STUDY)  # 2, 3 and 1 points: standard deviation 1, over the root of 3
    difference = "+2.0 ± 0.6"
    assert f"| FSSD ResNet-18 | mutual - iou | 0, 1, 2 | {difference} | {difference} | {difference} |" in text
    text = tables.render(content_of({"iou": {0: 0.3}, "mutual": {0: 0.2}}), STUDY)
    assert "| mutual - iou | 0 | -10.0 | -10.0 | -10.0 |" in text
    assert "Paired" not in tables.render(content_of({"iou": {0: 0.3}, "mutual": {1: 0.2}}), STUDY)


def test_a_baseline_without_a_note_is_the_one_of_the_same_note() -> None:
    rows = tuple(row._replace(note=note) for note in ("", "other losses") for row in STUDY.rows[:2])
    study = STUDY._replace(rows=rows, baseline=("iou", None))
    content = content_of({"iou": {0: 0.3}, "mutual": {0: 0.2}})
    others = content_of({"iou": {0: 0.4}, "mutual": {0: 0.5}})["rows"]
    content["rows"] = content["rows"][:2] + [{**row, "note": "other losses"} for row in others[:2]]
    text = tables.render(content, study)
    assert "| mutual - iou | 0 | -10.0 | -10.0 | -10.0 |" in text
    assert "| mutual, other losses - iou, other losses | 0 | +10.0 | +10.0 | +10.0 |" in text
    assert text.count(" - iou") == 2


def test_a_class_without_objects_has_no_ap() -> None:
    content = content_of({"iou": {0: 0.3, 1: 0.3}})
    for run in content["rows"][0]["runs"]:
        run["test"]["per_class"]["square"] = scores(None)
    assert "| FSSD ResNet-18 | iou | 30.0 ± 0.0 | - |" in tables.render(content, STUDY)


def test_only_what_is_between_the_markers_is_replaced() -> None:
    document = f"a\n<!-- begin x: written by {tables.SCRIPT} -->\nold\n<!-- end x -->\nb\n"
    once = tables.replace_section(document, "x", "new\n")
    assert once.startswith("a\n<!-- begin x") and once.endswith("<!-- end x -->\nb\n") and "\nnew\n" in once
    assert "old" not in once and tables.replace_section(once, "x", "new\n") == once
    with pytest.raises(ValueError, match="begin y"):
        tables.replace_section(document, "y", "new\n")


# ---------------------------------------------------------------------------------------------------------------------
# The picture


def test_a_lead_is_mutual_less_iou_seed_by_seed_and_each_run_is_drawn_once() -> None:
    content = content_of({"iou": {0: 0.28, 1: 0.30, 3: 0.9}, "mutual": {0: 0.30, 1: 0.33, 4: 0.1}})
    (lead,) = figure.find_leads([content, content])
    assert (lead.data, lead.label) == ("Tiny 64", "FSSD ResNet-18")
    for metric in ("AP", "AP75", "score_iou_correlation"):
        assert lead.differences[metric] == pytest.approx({0: 0.02, 1: 0.03})
    assert figure.find_leads([{**content, "split": "val"}]) == []  # it has tuned something
    assert figure.find_leads([content_of({"iou": {0: 0.3}, "mutual": {1: 0.3}})]) == []


def test_a_lead_is_over_iou_with_the_same_flags() -> None:
    aps = {"iou": {0: 0.28}, "mutual": {0: 0.30}}
    content, other, alone = content_of(aps), content_of(aps), content_of(aps)
    for row in other["rows"]:
        row |= {"name": f"{row['name']}-focal-gamma1", "note": "gamma 1"}
    alone["rows"] = [{**alone["rows"][1], "name": "fssd-resnet18-mutual-sigma3", "note": "sigma 3"}]
    assert [lead.label for lead in figure.find_leads([content, other, alone])] == [
        "FSSD ResNet-18",
        "FSSD ResNet-18, gamma 1",
    ]


def test_the_picture_is_drawn_from_the_json_files(
    tmp_path: Path, outputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plot = ["--plot", str(tmp_path / "figures" / "leads.png"), *outputs]
    assert compare.main(plot) == 1
    assert "run a study first" in " ".join(capsys.readouterr().out.split())
    for strategy, seed, ap in (("iou", 0, 0.2), ("iou", 7, 0.4), ("mutual", 7, 0.5)):
        finish_run(tmp_path / "runs", strategy, seed, ap)
    assert compare.main(["--study", "tiny", "--collect", *outputs]) == 0
    assert compare.main(plot) == 0
    assert (tmp_path / "figures" / "leads.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Collection


def test_finished_runs_are_collected_whatever_their_seeds_and_unfinished_ones_are_not(
    tmp_path: Path, outputs: list[str]
) -> None:
    for strategy, seed, ap in (("iou", 0, 0.2), ("iou", 7, 0.4), ("mutual", 7, 0.5)):
        finish_run(tmp_path / "runs", strategy, seed, ap)
    unfinished = finish_run(tmp_path / "runs", "mutual", 0, 0.9)
    (unfinished / "test" / "metrics.json").unlink()
    assert compare.main(["--study", "tiny", "--collect", "--commit", "c0ffee", *outputs]) == 0
    content = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert [[run["seed"] for run in row["runs"]] for row in content["rows"]] == [[0, 7], [7]]
    run = content["rows"][1]["runs"][0]
    assert run["test"]["AP"] == 0.5 and run["val"]["AP"] == 0.51 and run["test"]["per_class"]["disc"]["AP75"] == 0.4
    assert run["commit"] == "c0ffee" and run["device"] and run["torch"] == torch.__version__ and run["steps"] == 10
    assert run["training_seconds"] == pytest.approx(4 / 2.0 + 36 / 12.0)  # 4 images at 2 a second, then 36 at 12
    document = (tmp_path / "results.md").read_text()
    assert document.startswith("above\n") and document.endswith("below\n") and "30.0 ± 14.1" in document


def test_without_record_results_stay_beside_the_runs(
    tmp_path: Path, outputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    finish_run(tmp_path / "runs", "mutual", 0, 0.2)
    document = (tmp_path / "results.md").read_text()
    assert compare.main(["--study", "tiny", "--collect", *outputs[1:]]) == 0
    assert json.loads((tmp_path / "runs/tiny.json").read_text())["study"] == "tiny"
    tables = (tmp_path / "runs/tiny.md").read_text()
    assert "| mutual | 0 | 20.0 |" in tables and tables in capsys.readouterr().out
    assert not (tmp_path / "results").exists() and (tmp_path / "results.md").read_text() == document


def test_neither_the_json_nor_the_document_knows_where_the_runs_lay(tmp_path: Path, outputs: list[str]) -> None:
    finish_run(tmp_path / "runs", "iou", 0, 0.2)
    assert compare.main(["--study", "tiny", "--collect", *outputs]) == 0
    command = json.loads((tmp_path / "results" / "tiny.json").read_text())["rows"][0]["command"]
    assert command.startswith("python -m detector.train") and "--data Tiny" in command and "--out RUN" in command
    for file in (tmp_path / "results" / "tiny.json", tmp_path / "results.md"):
        for path in (tmp_path, ROOT, Path.home(), Path(sys.prefix)):
            assert f"{path}/" not in file.read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.5}, "--lr 0.5 where the study has 0.01"),
        ({"focal_gamma": 1.0}, "--focal-gamma 1.0 where the study has 2.0"),  # a flag the study does not name
        ({"seed": 3}, "--seed 3 where the study has 0"),
        ({"backbone_weights": "imagenet"}, "--backbone-weights"),
    ],
)
def test_a_run_with_other_flags_is_refused(
    changed: dict[str, object], message: str, tmp_path: Path, outputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    finish_run(tmp_path / "runs", "iou", 0, 0.2, changed)
    assert compare.main(["--study", "tiny", "--collect", *outputs]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "fssd-resnet18-iou-seed0 was started with other flags" in said and message in said
    assert not (tmp_path / "results" / "tiny.json").exists()


def test_test_scores_of_another_checkpoint_are_refused(
    tmp_path: Path, outputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = finish_run(tmp_path / "runs", "iou", 0, 0.2) / "test" / "metrics.json"
    metrics.write_text(json.dumps({**json.loads(metrics.read_text()), "step": 4}))
    assert compare.main(["--study", "tiny", "--collect", *outputs]) == 1
    assert "at the last step 10" in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------------------------------------------------------------
# Running


def test_a_dry_run_prints_what_is_left_to_do_and_writes_nothing(
    tmp_path: Path, outputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    finish_run(tmp_path / "runs", "iou", 0, 0.2)
    (finish_run(tmp_path / "runs", "mutual", 0, 0.2) / "test" / "metrics.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    flags = ["--study", "tiny", "--data", str(tmp_path), "--dry-run", "--device", "cpu", *outputs]
    assert compare.main([*flags, "--seeds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["# fssd-resnet18-iou-seed0: complete", "# fssd-resnet18-mutual-seed0: trained"]
    assert len(lines) == 3 and "detector.evaluate" in lines[2]
    assert compare.main([*flags, "--strategies", "mutual", "--seeds", "3"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[1])
    assert words[2] == "detector.train" and "--resume" in words and words[words.index("--strategy") + 1] == "mutual"
    assert sorted(tmp_path.rglob("*")) == before


def finish_quickly(run: Run, args: object, split: str, num_cores: int) -> list[list[str]]:
    """Two commands that leave what a training and an evaluation leave; seed 1 of iou fails."""
    ap = 0.2 + 0.1 * (run.row.strategy == "mutual") + 0.01 * run.seed
    if run.row.strategy == "iou" and run.seed == 1:
        return [[sys.executable, "-c", "raise SystemExit(3)"], ["no-such-command"]]
    made = finish_run(run.folder.parents[1] / f"scratch-{run.name}", run.row.strategy, run.seed, ap)
    code = (
        "import os, sys; from pathlib import Path; made, folder = map(Path, sys.argv[1:]);"
        "assert os.environ['OMP_NUM_THREADS'] and len(os.sched_getaffinity(0)) >= 1;"
        "[file.rename(folder / file.name) for file in made.iterdir()]"
    )
    return [[sys.executable, "-c", "print('first')"], [sys.executable, "-c", code, str(made), str(run.folder)]]


def test_runs_go_side_by_side_and_a_failure_stops_no_other(
    tmp_path: Path, outputs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "commands_of", finish_quickly)
    flags = ["--study", "tiny", "--data", str(tmp_path), "--device", "cpu", "--parallel", "2", "--poll-seconds", "0.05"]
    assert compare.main([*flags, *outputs]) == 1
    said = capsys.readouterr().out
    assert said.count("started ") == 4 and said.count("finished ") == 3
    assert re.search(r"failed fssd-resnet18-iou-seed1, exit status 3", said)
    assert "| mutual | 0, 1 | 30.5 ± 0.7 |" in (tmp_path / "results.md").read_text()
    starts = json.loads((tmp_path / "runs/tiny-64/fssd-resnet18-mutual-seed0/provenance.json").read_text())
    assert len(starts) == 1 and starts[0]["commit"] != "unknown" and starts[0]["threads"] >= 1
    # Again: only what failed is started.
    assert compare.main([*flags, *outputs]) == 1
    assert capsys.readouterr().out.count("started ") == 1


def test_a_signal_ends_every_run_and_waits_for_it(
    tmp_path: Path, outputs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import signal, sys, time; from pathlib import Path\n"
        "def save(number, frame): time.sleep(0.3); Path(sys.argv[1], 'saved').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save); Path(sys.argv[1], 'ready').touch(); time.sleep(600)"
    )
    monkeypatch.setattr(
        compare, "commands_of", lambda run, *rest: [[sys.executable, "-c", code, str(run.folder)], ["no-such-command"]]
    )
    runs = find_runs(STUDY, STUDY.rows, [0], tmp_path / "runs")

    def interrupt_when_ready() -> None:
        while not all((run.folder / "ready").exists() for run in runs):
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=interrupt_when_ready)
    watcher.start()
    flags = ["--study", "tiny", "--data", str(tmp_path), "--device", "cpu", "--parallel", "2", "--poll-seconds", "0.05"]
    assert compare.main([*flags, "--seeds", "0", *outputs]) == 130
    watcher.join()
    assert all((run.folder / "saved").exists() for run in runs)
    assert "the same command continues" in capsys.readouterr().out


@pytest.mark.slow
def test_the_detectors_own_runs_fill_the_table(tmp_path: Path, outputs: list[str]) -> None:
    data = write_voc(tmp_path / "voc", {"train": 4, "val": 2, "test": 2})
    flags = [
        "--study",
        "tiny",
        "--data",
        str(data),
        "--device",
        "cpu",
        "--seeds",
        "0",
        "--rows",
        "fssd-resnet18-mutual",
    ]
    assert compare.main([*flags, *outputs]) == 0
    folder = tmp_path / "runs" / "tiny-64" / "fssd-resnet18-mutual-seed0"
    trained = json.loads((folder / "results.json").read_text())
    record = json.loads((tmp_path / "results" / "tiny.json").read_text())["rows"][1]["runs"][0]
    assert record["val"]["AP"] == trained["AP"] and record["training_seconds"] > 0 and record["steps"] == 1
    assert f"{100 * record['test']['AP']:.1f}" in (tmp_path / "results.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What is committed


def test_the_page_holds_what_the_json_files_say(tmp_path: Path) -> None:
    document = (ROOT / "docs" / "results.md").read_text()
    studies = [name for name in STUDIES if name != "tiny"]
    results = ROOT / "benchmarks" / "strategies" / "results"
    assert sorted(file.stem for file in results.glob("*.json")) == sorted(studies)
    for name in studies:
        content = json.loads((results / f"{name}.json").read_text())
        assert [row["name"] for row in content["rows"]] == [row.name for row in STUDIES[name].rows]
        assert tables.replace_section(document, name, tables.render(content, STUDIES[name])) == document
        assert not re.search(r"\"[^\" ]*(/home|/root|/tmp|/work)/", json.dumps(content))


def test_studies_share_runs_and_no_two_rows_of_one_share_a_folder() -> None:
    for study in STUDIES.values():
        assert len({row.name for row in study.rows}) == len(study.rows)
        if study.baseline is not None:
            strategy, note = study.baseline
            notes = {row.note for row in study.rows} if note is None else {note}
            assert {(strategy, note) for note in notes} <= {(row.strategy, row.note) for row in study.rows}
    strategies = {row.name for row in STUDIES["bccd-fssd-resnet18"].rows}
    sigmas = {row.name for row in STUDIES["bccd-sigma"].rows}
    assert {"fssd-resnet18-mutual-lr0.02", "fssd-resnet18-localize_to_classify-lr0.02"} <= strategies & sigmas


def test_without_amplification_mutual_is_localize_to_classify() -> None:
    """With sigma 1e30, (sigma - p) / sigma is 1 in float32, and what is compared is log2 of the anchor's IoU.

    That ties qualities which differ in their last bit, as those of mirrored anchors do: hence the strategy itself in
    the study, not the large number.
    """
    equal, equal_amplified = [], []
    for seed in range(5):
        batch = {**pyramid_batch(seed), "backend": "eager"}
        without = mg_ops.mutual_match(**{**batch, "strategy": "localize_to_classify"})
        limit = mg_ops.mutual_match(**{**batch, "strategy": "mutual", "sigma": 1e30})
        amplified = mg_ops.mutual_match(**{**batch, "strategy": "mutual", "sigma": 1.1})
        assert torch.equal(limit.cls_match, without.cls_match)
        positive = without.loc_match >= 0
        equal.append((limit.loc_match == without.loc_match)[positive])
        equal_amplified.append((amplified.loc_match == without.loc_match)[positive])
    assert torch.cat(equal).double().mean() > 0.99 > torch.cat(equal_amplified).double().mean()
