"""No call crashes the process, hangs or is answered wrongly: random right and wrong calls of everything public.

What is called, how it is spoiled and what must follow is in tests/wrong_calls.py. MG_OPS_FUZZ scales the number of
calls; `make fuzz` makes tens of thousands of them under AddressSanitizer.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import wrong_calls
from conftest import fuzz_cases

import mg_ops

SCRIPT = Path(wrong_calls.__file__)


def make_calls(*options: str, **environment: str) -> str:
    """Runs tests/wrong_calls.py; its report."""
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return result.stdout


def test_random_calls() -> None:
    """Every kind of call is answered at times and refused at times."""
    report = make_calls("--calls", str(fuzz_cases(600)))
    assert re.search(r"\b0 failed", report)
    if fuzz_cases(600) < 600:
        return
    for what in ("mutual_match eager", "operator mutual_match_eager", "encode_targets", "summarize", "box_iou"):
        for outcome in ("answered", "refused"):
            assert f"{what} {outcome}" in report
    if mg_ops.backends()["cpp"].usable:
        assert "mutual_match cpp answered" in report and "operator mutual_match refused" in report


@pytest.mark.slow
def test_random_calls_of_interpreted_triton() -> None:
    pytest.importorskip("triton")
    calls = str(fuzz_cases(60))
    report = make_calls("--calls", calls, "--backends", "triton", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert re.search(r"\b0 failed", report)


def test_a_wrong_answer_shows() -> None:
    """The harness itself: a wrong answer, an error that says nothing, and one for a right call are failures."""
    right, match = wrong_calls.match_and_objects(wrong_calls.np.random.default_rng(4))
    assert match["cls_match"].numel() > 0
    answer = {name: value.clone() for name, value in match.items()}
    case = wrong_calls.Case("mutual_match", right, answer.values, match.values)
    assert wrong_calls.run_case(case) == "answered"
    answer["cls_match"].view(-1)[0] += 1
    with pytest.raises(AssertionError, match="result 0 is"):
        wrong_calls.run_case(case)

    def fail(message: str) -> None:
        raise ValueError(message)

    for wrong, message in (
        (case._replace(definition=lambda: fail("what is this?")), "answered what the definition cannot read"),
        (case._replace(call=lambda: fail("the size of tensor a (3) must match")), "ValueError does not help"),
        (case._replace(call=lambda: fail("anchors: expected"), must_answer=True), "must not raise ValueError"),
    ):
        with pytest.raises(AssertionError, match=message):
            wrong_calls.run_case(wrong)
    refusing = case._replace(call=lambda: fail("anchors: expected"), must_answer=False)
    assert wrong_calls.run_case(refusing) == "refused"


def test_a_crash_names_the_call(tmp_path: Path) -> None:
    """A child process that dies is reported with the seed that kills it again."""
    script = tmp_path / "crash.py"
    lines = [
        "import os, sys",
        f"sys.path[:0] = [{str(SCRIPT.parent)!r}, {str(SCRIPT.parents[1])!r}]",
        "import wrong_calls",
        "make_case = wrong_calls.make_case",
        "wrong_calls.make_case = lambda seed, backends: os._exit(99) if seed == 7 else make_case(seed, backends)",
        "sys.exit(wrong_calls.main())",
    ]
    script.write_text("\n".join(lines))
    result = subprocess.run([sys.executable, str(script), "--calls", "20"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "at seed 7" in result.stdout and "--first 7 --calls 1" in result.stdout
