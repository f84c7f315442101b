"""What released_code.py says of another matching: that it agrees where it does, and by how much where it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mg_ops
from benchmarks import released_code
from benchmarks.cases import CASES, make_batches

# With the interface of the released matching, and mg_ops' own definition behind it.
STAND_IN = """
import torch
import mg_ops


def mutual_match(truths, priors, regress, classif, labels, loc_t, conf_t, overlap_t, pred_t, idx):
    assert len(truths) == len(labels) > 0 and labels.min() >= 1
    anchors = torch.cat([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], 1)
    match = mg_ops.mutual_match(
        anchors,
        [truths],
        [labels - 1],
        cls_logits=classif[None],
        box_deltas=regress[None],
        box_coder=mg_ops.BoxCoder(),
        backend="eager",
    )
    cls_match, loc_match = match.cls_match[0], match.loc_match[0]
    overlap_t[idx] = torch.where(cls_match >= 0, 3.0, torch.where(cls_match == mg_ops.IGNORED, 2.0, 0.3))
    conf_t[idx] = labels[cls_match.clamp(min=0)]
    pred_t[idx] = torch.where(loc_match >= 0, 3.0, 0.3)
    loc_t[idx] = truths[loc_match.clamp(min=0)]
"""


def write_code(folder: Path, text: str) -> Path:
    """A checkout with this matching."""
    file = folder / released_code.FILE
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return folder


def test_a_matching_that_agrees_is_reported_so_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = write_code(tmp_path / "code", STAND_IN)
    command = ["--code", str(code), "--quick", "--cases", "voc320", "--threads", "1"]
    assert released_code.main([*command, "--output", str(tmp_path / "out.json")]) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    counts = content["cases"]["voc320"]["differences"]
    assert counts["labelled"] > counts["learn_a_box"] > 0
    # The anchors are a rounding away from those mg_ops had: nearly all is equal.
    assert counts["classes_differ"] <= 0.01 * counts["labelled"]
    assert counts["boxes_differ"] <= 0.01 * counts["learn_a_box"]
    timed = content["cases"]["voc320"]["timed"]
    assert set(timed) == {"released code", "mutual_match"} and all(t["seconds"] > 0 for t in timed.values())
    assert content["machine"]["commit"] and f"of {counts['labelled']:,}" in capsys.readouterr().out


def test_differences_are_counted_anchor_by_anchor() -> None:
    def targets(classes: list[int], boxes: list[float]) -> released_code.Targets:
        learned = torch.tensor([boxes])
        return released_code.Targets(torch.tensor([classes]), learned > 0, learned.unsqueeze(-1).expand(1, -1, 4))

    background, ignored = mg_ops.BACKGROUND, mg_ops.IGNORED
    ours = targets([3, 3, ignored, background, background], [5.0, 5.0, 0.0, 0.0, 7.0])
    theirs = targets([3, 4, background, background, ignored], [5.0, 6.0, 0.0, 7.0, 0.0])
    assert released_code.count_differences(ours, theirs) == {
        "labelled": 4,
        "classes_differ": 3,
        "learn_a_box": 4,
        "boxes_differ": 3,
    }


def test_the_released_scores_are_read_as_its_loss_reads_them() -> None:
    boxes = torch.ones(1, 4, 4)
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    answer = released_code.released_targets((boxes, torch.tensor([[5, 5, 5, 5]]), scores, scores))
    assert answer.class_targets.tolist() == [[4, mg_ops.IGNORED, mg_ops.BACKGROUND, mg_ops.BACKGROUND]]
    assert answer.learns_box.tolist() == [[True, False, False, False]]
    assert answer.boxes[0, :, 0].tolist() == [1, 0, 0, 0]


def test_an_image_without_objects_is_background_and_not_given_to_the_released_code(tmp_path: Path) -> None:
    matching = released_code.load_released_matching(write_code(tmp_path, STAND_IN))
    batch = make_batches(replace(CASES["voc320"], batch_size=2), None, 1, 0, "cpu")[0]
    batch.counts[1], batch.boxes_list[1], batch.labels_list[1] = 0, batch.boxes_list[1][:0], batch.labels_list[1][:0]
    answer = released_code.run_released(matching, released_code.center_size(batch.anchors), batch)
    targets = released_code.released_targets(answer)
    assert (targets.class_targets[0] >= 0).any()
    assert (targets.class_targets[1] == mg_ops.BACKGROUND).all() and not targets.learns_box[1].any()


def test_a_folder_without_the_code_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        released_code.main(["--code", str(tmp_path)])
    message = capsys.readouterr().err
    assert "expected a checkout of zhanghengdev/MutualGuide" in message and "box_utils.py" in message
