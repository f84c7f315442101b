"""The tables of docs/results/, and those beside the paper's, say what the runs found: nothing else, nothing less."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pyramid_batches import pyramid_batch
from small_data import write_voc

import mg_ops
from benchmarks.strategies import compare, figure
from benchmarks.strategies.studies import STUDIES
from detector import reproduce, runs
from detector.runs import Row, Run, Setting, Study, parse_flags
from detector.train import parse_arguments

TINY = Setting(
    "tiny-64",
    "Tiny",
    "voc",
    parse_flags("--train-split train --eval-split val --image-size 64 --batch 4 --epochs 1"),
)
STUDY = Study("tiny", "Tiny", TINY, tuple(Row("fssd", "resnet18", strategy) for strategy in ("iou", "mutual")), (0, 1))
IOU, MUTUAL = STUDY.rows
DOCUMENT, RECORD, RUNS = Path("docs/results/tiny.md"), Path("results/tiny.json"), Path("runs/strategies")
FOLDER = RUNS / "tiny-64"
COLLECT = ["--study", "tiny", "--record", "--collect"]


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test runs: runs/, results/ and docs/ are here, in place of the checkout."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STUDIES, "tiny", STUDY)
    monkeypatch.setattr(compare, "RECORDS", Path("results"))
    monkeypatch.setattr(compare, "DOCS", Path("docs"))
    DOCUMENT.parent.mkdir(parents=True)
    Path("docs/results.md").touch()
    marks = f"<!-- begin tiny: written by {compare.SCRIPT} -->\nold\n<!-- end tiny -->"
    DOCUMENT.write_text(f"above\n{marks}\nbelow\n")


def scores(ap: float | None) -> dict[str, Any]:
    """Metrics as detector.evaluate writes them; AP50 and AP75 follow from AP."""
    values = {"AP": ap, "AP50": None if ap is None else ap + 0.2, "AP75": None if ap is None else ap - 0.1}
    classes = {"disc": {**values, "objects": 3}, "square": {**values, "objects": 4}}
    return {**values, "score_iou_correlation": ap, "matched_iou": 0.75, "images": 7, "per_class": classes}


def finish(run: Run, ap: float, changed: dict[str, object] | None = None) -> Path:
    """A run's folder as `detector.runs` leaves it, after 90 seconds of training with `changed` arguments."""
    arguments = {**run.arguments(), **(changed or {})}
    (run.folder / "test").mkdir(parents=True, exist_ok=True)
    (run.folder / "results.json").write_text(json.dumps({**scores(ap + 0.01), "arguments": arguments}, default=str))
    log = [{"step": 0, "images_per_second": 2.0}, {"step": 9, "images_per_second": 36 / 88}, {"step": 10}]
    (run.folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (run.folder / "test/metrics.json").write_text(json.dumps({**scores(ap), "split": "test", "step": 10}))
    start = {"device": "Abacus", "torch": "2", "mg_ops": "1", "commit": "abc", "threads": 1, "date": "2026-01-02T"}
    (run.folder / "provenance.json").write_text(json.dumps([start]))
    return run.folder


def finish_all(folder: Path, aps: dict[Row, dict[int, float]], study: Study = STUDY) -> None:
    """Runs from AP on test by row and seed."""
    for row, by_seed in aps.items():
        for run in runs.find_runs(study, [row], list(by_seed), folder):
            finish(run, by_seed[run.seed])


def content_of(aps: dict[Row, dict[int, float]], study: Study = STUDY) -> dict[str, Any]:
    """The records of such runs."""
    folder = Path(tempfile.mkdtemp(dir="."))
    finish_all(folder, aps, study)
    return runs.collect(study, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_a_row_is_mean_and_standard_deviation_over_its_seeds() -> None:
    text = compare.render(content_of({IOU: {0: 0.30, 1: 0.32, 2: 0.34}, MUTUAL: {5: 0.5}}), STUDY)
    row = "| FSSD ResNet-18 | iou | 0, 1, 2 | 32.0 ± 2.0 | 52.0 ± 2.0 | 22.0 ± 2.0 | 33.0 ± 2.0 | 1.5 |"
    assert f"{row} `fssd-resnet18-iou` |" in text
    assert "| FSSD ResNet-18 | mutual | 5 | 50.0 | 70.0 | 40.0 | 51.0 | 1.5 | `fssd-resnet18-mutual` |" in text
    assert "4 runs on Abacus (1 thread a run), torch 2, commit abc, 2026-01-02." in text


def test_agreement_of_scores_and_boxes_is_of_runs_that_know_it() -> None:
    content = content_of({IOU: {0: 0.30, 1: 0.32, 2: 0.34}, MUTUAL: {5: 0.5}})
    text = compare.render(content, STUDY)
    assert "| FSSD ResNet-18 | iou | 0.320 ± 0.020 |  | 0.750 ± 0.000 |" in text
    assert "| FSSD ResNet-18 | mutual | 0.500 | - | 0.750 |" in text  # no seed in common
    paired = compare.render(content_of({IOU: {0: 0.30, 1: 0.31, 2: 0.32}, MUTUAL: {0: 0.31, 1: 0.34}}), STUDY)
    assert "| FSSD ResNet-18 | mutual | 0.325 ± 0.021 | +0.020 ± 0.010 | 0.750 ± 0.000 |" in paired
    for run in (run for row in content["rows"] for run in row["runs"]):  # as scored by an older detector.evaluate
        del run["test"]["score_iou_correlation"], run["test"]["matched_iou"]
    assert compare.render(content, STUDY) == text[: text.index("\nDo the scores know")]


def test_a_row_without_runs_stays_with_its_command() -> None:
    text = compare.render(content_of({}), STUDY)
    assert "| FSSD ResNet-18 | iou | - | - | - | - | - | - | `fssd-resnet18-iou` |" in text
    assert "python benchmarks/strategies/compare.py --study tiny --data Tiny" in text
    assert "Paired" not in text and "class by class" not in text


@pytest.mark.parametrize(
    ("iou", "mutual", "expected"),
    [
        # 2, 3 and 1 points: standard deviation 1, over the root of 3
        ({0: 0.28, 1: 0.30, 2: 0.35, 3: 0.9}, {0: 0.30, 1: 0.33, 2: 0.36, 4: 0.1}, "0, 1, 2 |" + " +2.0 ± 0.6 |" * 3),
        ({0: 0.3}, {0: 0.2}, "0 | -10.0 | -10.0 | -10.0 |"),
        ({0: 0.3}, {1: 0.2}, None),
    ],
)
def test_differences_are_of_seeds_that_both_have(
    iou: dict[int, float], mutual: dict[int, float], expected: str | None
) -> None:
    text = compare.render(content_of({IOU: iou, MUTUAL: mutual}), STUDY)
    assert (f"| FSSD ResNet-18 | mutual - iou | {expected}" in text) if expected else ("Paired" not in text)


def test_a_baseline_without_a_note_is_the_one_of_the_same_note() -> None:
    others = [row._replace(flags=(("lr", "0.5"),), note="other losses") for row in STUDY.rows]
    study = STUDY._replace(rows=(*STUDY.rows, *others), baseline=("iou", None))
    aps = {IOU: {0: 0.3}, MUTUAL: {0: 0.2}, others[0]: {0: 0.4}, others[1]: {0: 0.5}}
    text = compare.render(content_of(aps, study), study)
    assert "| mutual - iou | 0 | -10.0 | -10.0 | -10.0 |" in text
    assert "| mutual, other losses - iou, other losses | 0 | +10.0 | +10.0 | +10.0 |" in text
    assert text.count(" - iou") == 4  # in both tables


def test_a_class_without_objects_has_no_ap() -> None:
    content = content_of({IOU: {0: 0.3, 1: 0.3}})
    for run in content["rows"][0]["runs"]:
        run["test"]["per_class"]["square"] = scores(None)
    assert "| FSSD ResNet-18 | iou | 30.0 ± 0.0 | - |" in compare.render(content, STUDY)


def test_only_what_is_between_the_markers_is_replaced() -> None:
    document = DOCUMENT.read_text()
    once = compare.replace_section(document, "tiny", "new\n")
    assert (
        once.startswith("above\n<!-- begin tiny") and once.endswith("<!-- end tiny -->\nbelow\n") and "\nnew\n" in once
    )
    assert "old" not in once and compare.replace_section(once, "tiny", "new\n") == once
    with pytest.raises(ValueError, match="begin y"):
        compare.replace_section(document, "y", "new\n")
    with pytest.raises(ValueError, match=r"expected the line '<!-- begin y: .*' in a page of results"):
        compare.find_page("y")


def test_a_lead_is_mutual_less_iou_seed_by_seed_and_each_run_is_drawn_once() -> None:
    content = content_of({IOU: {0: 0.28, 1: 0.30, 3: 0.9}, MUTUAL: {0: 0.30, 1: 0.33, 4: 0.1}})
    kept = {**content, "setting": {**content["setting"], "name": "tiny-64-kept"}}
    (lead,) = figure.find_leads([content, content, kept])
    assert (lead.data, lead.label) == ("Tiny 64", "FSSD ResNet-18")
    for metric in ("AP", "AP75", "score_iou_correlation"):
        assert lead.differences[metric] == pytest.approx({0: 0.02, 1: 0.03})
    assert figure.find_leads([{**content, "split": "val"}]) == []  # it has tuned something
    assert figure.find_leads([content_of({IOU: {0: 0.3}, MUTUAL: {1: 0.3}})]) == []
    fewer, more = (content_of({row: dict.fromkeys(range(seeds), 0.3) for row in (IOU, MUTUAL)}) for seeds in (1, 2))
    for contents in ([fewer, more], [more, fewer]):
        (lead,) = figure.find_leads(contents)
        assert lead.differences["AP"].keys() == {0, 1}


def test_a_lead_is_over_iou_with_the_same_flags() -> None:
    content, other, alone = (content_of({IOU: {0: 0.28}, MUTUAL: {0: 0.30}}) for _ in range(3))
    for row in other["rows"]:
        row |= {"name": f"{row['name']}-focal-gamma1", "note": "gamma 1"}
    alone["rows"] = [{**alone["rows"][1], "name": "fssd-resnet18-mutual-sigma3", "note": "sigma 3"}]
    labels = [lead.label for lead in figure.find_leads([content, other, alone])]
    assert labels == ["FSSD ResNet-18", "FSSD ResNet-18, gamma 1"]


def test_the_picture_is_drawn_from_the_json_files() -> None:
    with pytest.raises(ValueError, match="run a study first"):
        compare.main(["--plot", "figures/leads.png"])
    finish_all(RUNS, {IOU: {0: 0.2, 7: 0.4}, MUTUAL: {7: 0.5}})
    assert compare.main(COLLECT) == 0
    assert compare.main(["--plot", "figures/leads.png"]) == 0
    assert Path("figures/leads.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------------------
# Collection


def test_finished_runs_are_collected_whatever_their_seeds_and_unfinished_ones_are_not() -> None:
    finish_all(RUNS, {IOU: {0: 0.2, 7: 0.4}, MUTUAL: {7: 0.5, 0: 0.9}})
    (FOLDER / "fssd-resnet18-mutual-seed0/test/metrics.json").unlink()
    (FOLDER / "fssd-resnet18-iou-seed0/provenance.json").unlink()  # as of a run by hand
    assert compare.main(COLLECT) == 0
    text = RECORD.read_text()
    rows = json.loads(text)["rows"]
    assert [[run["seed"] for run in row["runs"]] for row in rows] == [[0, 7], [7]]
    run = rows[1]["runs"][0]
    assert run["test"]["AP"] == 0.5 and run["val"]["AP"] == 0.51 and run["test"]["per_class"]["disc"]["AP75"] == 0.4
    assert run["commit"] == "abc" and rows[0]["runs"][0]["commit"] == "not recorded" and run["steps"] == 10
    # 4 images at 2 per second, then 36 in 88 seconds
    assert run["training_seconds"] == pytest.approx(90) and run["images_per_second"] == pytest.approx(40 / 90)
    document = DOCUMENT.read_text()
    assert document.startswith("above\n") and document.endswith("below\n") and "30.0 ± 14.1" in document
    assert rows[0]["command"].startswith("python -m detector.train") and "--out RUN" in rows[0]["command"]
    for path in (Path.cwd(), compare.ROOT, Path.home(), Path(sys.prefix)):  # nobody learns where the runs lay
        assert f"{path}/" not in text + document


def test_without_record_results_stay_beside_the_runs(capsys: pytest.CaptureFixture[str]) -> None:
    finish_all(RUNS, {MUTUAL: {0: 0.2}})
    document = DOCUMENT.read_text()
    assert compare.main(["--study", "tiny", "--collect"]) == 0
    assert json.loads(Path("runs/strategies/tiny.json").read_text())["study"] == "tiny"
    text = Path("runs/strategies/tiny.md").read_text()
    assert "| mutual | 0 | 20.0 |" in text and text in capsys.readouterr().out
    assert not Path("results").exists() and DOCUMENT.read_text() == document


def test_recorded_runs_of_other_seeds_stay_and_those_of_another_command_do_not() -> None:
    """So a study can be completed on several machines."""
    finish_all(RUNS, {IOU: {0: 0.2, 1: 0.25}, MUTUAL: {0: 0.3}})
    assert compare.main(COLLECT) == 0
    shutil.rmtree(FOLDER)
    finish_all(RUNS, {IOU: {1: 0.4, 2: 0.5}})
    assert compare.main(COLLECT) == 0
    rows = json.loads(RECORD.read_text())["rows"]
    assert [{run["seed"]: run["test"]["AP"] for run in row["runs"]} for row in rows] == [
        {0: 0.2, 1: 0.4, 2: 0.5},
        {0: 0.3},
    ]
    none = [{**row, "runs": []} for row in rows]
    assert compare.join_records({"rows": none}, {"rows": rows}) == {"rows": rows}
    longer = [{**row, "command": f"{row['command']} --epochs 80"} for row in none]
    assert compare.join_records({"rows": longer}, {"rows": rows}) == {"rows": longer}


def test_an_interval_is_shown_beside_the_seeds_that_it_was_computed_of() -> None:
    content = content_of({IOU: {0: 0.30, 1: 0.31, 2: 0.32}, MUTUAL: {0: 0.31, 1: 0.33, 2: 0.35}})
    row = "| FSSD ResNet-18 | mutual - iou | 0, 1, 2 | +1.0, +2.0, +3.0 | 0.25 |"
    assert f"{row} - |" in compare.render(content, STUDY)
    interval = {"row": MUTUAL.name, "baseline": IOU.name, "AP": 0.02, "low": -0.01, "high": 0.04}
    for seeds, shown in (([0, 1, 2], "-1.0 to +4.0"), ([0, 1], "-")):
        analysis = {"rows": {}, "differences": [{**interval, "seeds": seeds}], "commit": "abc", "date": "2026-01-02"}
        text = compare.render(content, STUDY, analysis)
        assert f"{row} {shown} |" in text and "Analyzed at commit abc, 2026-01-02." in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.5}, "--lr 0.5 where the study has 0.01"),
        ({"focal_gamma": 1.0}, "--focal-gamma 1.0 where the study has 2.0"),  # a flag the study does not name
        ({"seed": 3}, "--seed 3 where the study has 0"),
        ({"backbone_weights": "imagenet"}, "--backbone-weights"),
    ],
)
def test_a_run_with_other_flags_is_refused_before_anything_is_run(changed: dict[str, object], message: str) -> None:
    finish(Run(STUDY, IOU, 0, FOLDER / "fssd-resnet18-iou-seed0"), 0.2, changed)
    for command in (COLLECT, ["--study", "tiny", "--record", "--data", "."]):
        with pytest.raises(ValueError, match=f"fssd-resnet18-iou-seed0 was started with other flags.*{message}"):
            compare.main(command)
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("text", "message"), [('{"split": "test", "step": 4, ', "at the last step 10"), ("{", "metrics.json: expected")]
)
def test_test_scores_of_another_checkpoint_are_refused(text: str, message: str) -> None:
    folder = finish(Run(STUDY, IOU, 0, FOLDER / "fssd-resnet18-iou-seed0"), 0.2)
    (folder / "test/metrics.json").write_text(text + (json.dumps(scores(0.2))[1:] if "," in text else ""))
    with pytest.raises(ValueError, match=message):
        compare.main(COLLECT)


# ---------------------------------------------------------------------------------------------------------------------
# Running


def test_a_dry_run_prints_what_is_left_to_do_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    finish_all(RUNS, {IOU: {0: 0.2}, MUTUAL: {0: 0.2}})
    (FOLDER / "fssd-resnet18-mutual-seed0/test/metrics.json").unlink()
    before = sorted(Path().rglob("*"))
    flags = ["--study", "tiny", "--record", "--data", ".", "--dry-run", "--device", "cpu"]
    assert compare.main([*flags, "--seeds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["# fssd-resnet18-iou-seed0: complete", "# fssd-resnet18-mutual-seed0: trained"]
    assert len(lines) == 3 and "detector.evaluate" in lines[2]
    assert compare.main([*flags, "--strategies", "mutual", "--seeds", "3"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[1])
    assert words[2] == "detector.train" and "--resume" in words and words[words.index("--strategy") + 1] == "mutual"
    assert sorted(Path().rglob("*")) == before


def finish_quickly(run: Run, args: object, num_cores: int) -> list[list[str]]:
    """Two commands that leave what a training and an evaluation leave; seed 1 of iou fails."""
    if run.row.strategy == "iou" and run.seed == 1:
        return [[sys.executable, "-c", "print('no data here'); raise SystemExit(3)"], ["no-such-command"]]
    made = Run(run.study, run.row, run.seed, Path(tempfile.mkdtemp(dir=Path.cwd())))
    finish(made, 0.2 + 0.1 * (run.row.strategy == "mutual") + 0.01 * run.seed)
    (made.folder / "provenance.json").unlink()
    code = (
        "import os, sys; from pathlib import Path; made, folder = map(Path, sys.argv[1:]);"
        "assert int(os.environ['OMP_NUM_THREADS']) == len(os.sched_getaffinity(0));"
        "[file.rename(folder / file.name) for file in made.iterdir()]"
    )
    return [[sys.executable, "-c", "print('first')"], [sys.executable, "-c", code, str(made.folder), str(run.folder)]]


def test_runs_go_side_by_side_and_a_failure_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "commands_of", finish_quickly)
    flags = ["--study", "tiny", "--record", "--data", ".", "--device", "cpu", "--parallel", "2"]
    assert compare.main(flags) == 1
    said = capsys.readouterr().out
    assert said.count("started ") == 4 and said.count("finished ") == 3
    assert "failed fssd-resnet18-iou-seed1, exit status 3: no data here" in said
    assert "| mutual | 0, 1 | 30.5 ± 0.7 |" in DOCUMENT.read_text()
    (start,) = json.loads((FOLDER / "fssd-resnet18-mutual-seed0/provenance.json").read_text())
    assert start["commit"] != "unknown" and start["threads"] >= 1
    # Again: only what failed is started.
    assert compare.main(flags) == 1
    assert capsys.readouterr().out.count("started ") == 1


def test_a_signal_ends_every_run_and_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import signal, sys, time; from pathlib import Path\n"
        "def save(number, frame): time.sleep(0.3); Path(sys.argv[1], 'saved').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save); Path(sys.argv[1], 'ready').touch(); time.sleep(600)"
    )
    python = [sys.executable, "-c", code]
    monkeypatch.setattr(runs, "commands_of", lambda run, *_: [[*python, str(run.folder)], ["no-such-command"]])
    started = runs.find_runs(STUDY, STUDY.rows, [0], RUNS)

    def interrupt_when_ready() -> None:
        while not all((run.folder / "ready").exists() for run in started):
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=interrupt_when_ready)
    watcher.start()
    assert compare.main(["--study", "tiny", "--record", "--data", ".", "--device", "cpu", "--parallel", "2"]) == 130
    watcher.join()
    assert all((run.folder / "saved").exists() for run in started)
    assert "the same command continues" in capsys.readouterr().out
    assert not list(FOLDER.glob("*seed1"))  # what waited for its turn is not started


PAPER = "table1 --data . --models fssd --backbones resnet18 --strategies iou mutual --device cpu".split()


def test_a_row_is_trained_once_and_stands_beside_the_papers_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "commands_of", finish_quickly)
    for year in ("VOC2007", "VOC2012"):
        Path(year).mkdir()
    assert reproduce.main([*PAPER, "--seeds", "0", "1"]) == 1  # seed 1 of iou fails
    table = Path("runs/reproduce/table1/table.md").read_text()
    assert "| fssd resnet18 | iou | 1 | 21.0 (50.3) | 41.0 (75.5) | 11.0 (53.7) |" in table
    assert "| fssd resnet18 | mutual | 2 | 31.5 ± 0.7 (52.1) | 51.5 ± 0.7 (76.2) | 21.5 ± 0.7 (55.9) |" in table
    assert "| FSSD ResNet-18 | mutual - iou | 0 | +10.0 | +10.0 | +10.0 |" in table
    assert table.count("fssd resnet18") == 2 and table in capsys.readouterr().out
    content = json.loads(Path("runs/reproduce/table1/table.json").read_text())
    assert [[run["seed"] for run in row["runs"]] for row in content["rows"][:4]] == [[0], [], [], [0, 1]]
    # Another command keeps the rows that are there, and a dry run writes nothing.
    assert reproduce.main([*PAPER[:3], "--strategy", "classify_to_localize", "--dry-run"]) == 0
    assert Path("runs/reproduce/table1/table.md").read_text() == table
    said = capsys.readouterr().out
    assert said.count("classify_to_localize-seed0: to do") == 5 and "| fssd resnet18 | mutual | 2 |" in said
    assert reproduce.main(PAPER) == 0
    assert "started" not in capsys.readouterr().out


def test_runs_with_other_flags_have_a_table_of_their_own_without_the_papers_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "commands_of", finish_quickly)
    for year in ("VOC2007", "VOC2012"):
        Path(year).mkdir()
    assert reproduce.main(PAPER) == 0
    assert reproduce.main([*PAPER, "--epochs=3", "--cache", "--amp", "bf16"]) == 0
    table = Path("runs/reproduce/table1-ampbf16-epochs3/table.md").read_text()
    assert "| fssd resnet18 | mutual | 1 | 31.0 | 51.0 | 21.0 |" in table and "of another setting" in table
    assert reproduce.main([*PAPER, "--amp", "bf16", "--dry-run"]) == 0  # the same setting by another arithmetic
    assert "| fssd resnet18 | mutual | 0 | - (52.1) | - (76.2) | - (55.9) |" in capsys.readouterr().out


def test_the_papers_rows_are_trained_with_the_released_losses_and_what_the_user_adds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra = ["--dry-run", "--image-size=160", "--cache", "--focal-gamma", "1.5", "--workers=3", "--processes", "2"]
    assert reproduce.main([*PAPER, *extra, "--backbone-weights", "none"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[3])
    assert "torch.distributed.run" in words and "--nproc-per-node=2" in words
    arguments = vars(parse_arguments(words[words.index("detector.train") + 1 :]))
    expected = {"box_loss": "released_balanced_l1", "focal_gamma": 1.5, "image_size": 160, "cache": True, "workers": 3}
    expected |= {"strategy": "mutual", "backbone_weights": "none", "resume": True, "seed": 0, "format": "voc"}
    assert expected.items() <= arguments.items()
    reproduce.main([*PAPER, "--dry-run"])
    assert "--focal-gamma 1 --box-loss released_balanced_l1 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("table1 --data . --strategies iou mutaul", "--strategies: mutaul not in table1; it has iou, localize_to"),
        ("table2 --data . --strategies localize_to_classify", "not in table2; it has iou, mutual"),
        ("table1 --data . --models rfbnet --backbones resnet18", "no row with all of these"),
        ("table1 --data . --parallel 0", "argument --parallel: expected a whole number, 1 or more"),
        ("table1 --data . --image-sise 160", "unrecognized arguments: --image-sise"),
        ("table1", "--data is needed"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_anything_is_run(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        reproduce.main(flags.split())
    assert message in str(caught.value) + capsys.readouterr().err
    assert not Path("runs").exists()


def test_the_tables_are_the_papers() -> None:
    for table, strategies in ((reproduce.TABLES["table1"], 4), (reproduce.TABLES["table2"], 2)):
        assert len(table) == 5
        for row in table.values():  # Mutual Guidance has the paper's best AP in every block
            assert len(row) == strategies and max(row) == row[-1] and all(len(numbers) == 3 for numbers in row)


@pytest.mark.slow
def test_the_detectors_own_runs_fill_the_tables() -> None:
    data = ["--data", str(write_voc(Path("voc"), {"train": 4, "val": 2, "test": 2})), "--device", "cpu"]
    assert compare.main(["--study", "tiny", "--record", *data, "--seeds", "0", "--rows", "fssd-resnet18-mutual"]) == 0
    trained = json.loads((FOLDER / "fssd-resnet18-mutual-seed0/results.json").read_text())
    record = json.loads(RECORD.read_text())["rows"][1]["runs"][0]
    assert record["val"]["AP"] == trained["AP"] and record["training_seconds"] > 0 and record["steps"] == 1
    assert f"{100 * record['test']['AP']:.1f}" in DOCUMENT.read_text()
    flags = "--backbone-weights none --image-size 64 --batch 4 --epochs 1 --models fssd --backbones resnet18"
    assert reproduce.main(["table2", *data, "--format", "voc", "--strategies", "iou", *flags.split()]) == 0
    (folder,) = Path("runs/reproduce").iterdir()
    assert folder.name == "table2-batch4-epochs1-image-size64"
    trained = json.loads((folder / "fssd-resnet18-iou-seed0/results.json").read_text())
    assert f"| fssd resnet18 | iou | 1 | {100 * trained['AP']:.1f} |" in (folder / "table.md").read_text()
    assert trained["arguments"]["box_loss"] == "released_balanced_l1"


# ---------------------------------------------------------------------------------------------------------------------
# What is committed


def test_the_pages_hold_what_the_json_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "DOCS", compare.ROOT / "docs")
    studies = [name for name in STUDIES if name != "tiny"]
    results = compare.ROOT / "benchmarks" / "strategies" / "results"
    assert sorted(file.stem for file in results.glob("*.json")) == sorted(studies)
    for name in studies:
        content = json.loads((results / f"{name}.json").read_text())
        assert [row["name"] for row in content["rows"]] == [row.name for row in STUDIES[name].rows]
        document, analysis = compare.find_page(name).read_text(), compare.read_analysis(results, name)
        assert compare.replace_section(document, name, compare.render(content, STUDIES[name], analysis)) == document
        if name == compare.SUMMARIZED:
            document = (compare.DOCS / "results.md").read_text()
            summary = compare.render_summary(content, STUDIES[name], analysis)
            assert compare.replace_section(document, "summary", summary) == document
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
