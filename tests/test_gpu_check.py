"""`make gpu-check` can be trusted where nobody watches: every step runs, failures show, nothing found is lost."""

from __future__ import annotations

import importlib.metadata
import json
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

pytest.importorskip("torchvision")  # of the benchmarks

from bare_gpu_machine import copy_checkout, make_environment, without_network

from benchmarks import gpu_check, kernel_profile, machine

ROOT = Path(__file__).parents[1]
STEPS = {
    "right": ["build", "tests", "memcheck", "synccheck", "racecheck", "graph-replay", "card-limits"],
    "why": ["build", "kernel-profile"],
    "rest": ["build", "triton-tests", "baselines", "training-steps", "captured-steps"],
}
RESULTS = {
    "right": {"graph_replay.json", "card_limits.json"},
    "why": {"kernel_profile.json"},
    "rest": {"match_speed.json", "training_step.json", "captured_step.json"},
}


# ---------------------------------------------------------------------------------------------------------------------
# On a machine made to look like the one it is for


def make_machine(folder: Path) -> tuple[Path, dict[str, str]]:
    """A copy of the checkout, and the environment variables of the machine."""
    shutil.rmtree(folder / "machine", ignore_errors=True)
    (folder / "machine").mkdir(parents=True)
    try:
        environment = make_environment(folder / "machine")
    except importlib.metadata.PackageNotFoundError as error:
        pytest.skip(f"the machine has a package that is not here: {error}")
    copy_checkout(ROOT, folder / "checkout")
    for library in ROOT.glob("mg_ops/*.so"):  # which takes longer to build than all else
        shutil.copy(library, folder / "checkout/mg_ops")
    return folder / "checkout", environment


def run_there(machine: tuple[Path, dict[str, str]], *command: str | Path) -> subprocess.CompletedProcess[str]:
    checkout, environment = machine
    words = [*without_network(), "python", *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, cwd=checkout, env=environment, check=False)


@pytest.mark.slow
def test_the_machine_lacks_what_it_should(tmp_path: Path) -> None:
    program = (
        "import importlib.util, shutil, socket, torch, torchvision, triton\n"
        "names = ('pycocotools', 'tensorboard', 'mypy', 'yaml', 'pybind11', 'ultralytics', 'mg_ops')\n"
        "print([name for name in names if importlib.util.find_spec(name)])\n"
        "print([name for name in ('git', 'nvcc', 'ncu', 'compute-sanitizer') if shutil.which(name)])\n"
        "try: socket.create_connection(('192.0.2.1', 80), 1)\n"
        "except OSError: print('no network')\n"
    )
    result = run_there(make_machine(tmp_path), "-I", "-c", program)
    assert result.stdout.splitlines() == ["[]", "[]", "no network"], result.stderr


@pytest.mark.slow
def test_there_every_test_file_can_be_collected_and_all_gpu_tests_are_named(tmp_path: Path) -> None:
    checkout, environment = make_machine(tmp_path)
    environment["PYTHONPATH"] = f"{checkout}{os.pathsep}{checkout / 'tests'}"
    environment["MG_OPS_TEST_NO_LIBRARY"] = "1"  # the bindings of the C++ headers are not built there
    command = ["-m", "pytest", "-qq", "-p", "no:cacheprovider", "-p", "cuda_on_cpu.pretend_gpu", "--collect-only"]
    result = run_there((checkout, environment), *command, "-m", "gpu", "tests")
    assert result.returncode == 0, result.stdout + result.stderr
    files = {line.split("::")[0].split(":")[0] for line in result.stdout.splitlines() if line.startswith("tests/")}
    assert files == {*gpu_check.CUDA_TESTS, *gpu_check.TRITON_TESTS}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_there_a_dry_run_goes_through_every_step_of_every_call(tmp_path: Path) -> None:
    # Always the same folder: what has been built there need not be built again.
    machine = make_machine(ROOT / "build" / "bare-gpu-machine")
    machine[1]["MG_OPS_COMMIT"] = "0123abc"
    for call in STEPS:
        output = tmp_path / call
        result = run_there(machine, "benchmarks/gpu_check.py", call, "--dry-run", "--output", output)
        assert result.returncode == 0, result.stdout + result.stderr
        summary = json.loads((output / f"{call}.json").read_text())
        assert sorted(step["name"] for step in summary["steps"]) == sorted(STEPS[call])
        assert summary["passed"] and summary["complete"] and summary["dry_run"]
        assert summary["machine"]["commit"] == "0123abc"
        assert {path.name for path in output.iterdir()} == {call, f"{call}.json", *RESULTS[call]}
        assert {path.stem for path in (output / call).glob("*.log")} == set(STEPS[call])
        assert "All passed" in result.stdout.strip().splitlines()[-1]
        check_results(call, output, summary)


def check_results(call: str, output: Path, summary: dict[str, Any]) -> None:
    """What the steps found is there, in figures and in the verdict's lines."""
    details = {step["name"]: step["detail"] for step in summary["steps"]}
    results = {name: json.loads((output / name).read_text()) for name in RESULTS[call]}
    assert all(result["machine"]["commit"] == "0123abc" for result in results.values())
    if call == "right":
        assert "passed" in details["tests"] and "failed" not in details["tests"]
        assert all("equal to the reference" in details[name] for name in ("memcheck", "synccheck", "racecheck"))
        cases = results["graph_replay.json"]["cases"]
        assert list(cases) == ["voc320", "coco320", "coco800", "dense", "dense5000"]
        for case in cases.values():
            ours = case["methods"]["cuda"]
            low, median, high = ours["cuda"]["graph_replay_quartiles"]
            assert 0 < low <= median <= high and median == ours["cuda"]["graph_replay_seconds"]
            assert case["checked"] == "cuda, cpp: the same integers for all images"
        limits = results["card_limits.json"]
        assert limits["copy_bytes_per_second"] > 0
        assert all(limits[f"divide {number} by x"]["nanoseconds"][1] > 0 for number in (0, 1))
        assert all(limits[f"add in {bits} bits, all lanes one"]["nanoseconds"][1] > 0 for bits in (32, 64))
    elif call == "why":
        cases = results["kernel_profile.json"]["cases"]
        assert list(cases) == ["coco320", "coco800", "dense"]
        assert all([launch["kernel"] for launch in case] for case in cases.values())
    else:
        detectors = results["training_step.json"]["detectors"]
        assert list(detectors) == ["fssd-resnet18", "retinanet-resnet18"]
        assert all("mg_ops cuda" in detector["matchings"] for detector in detectors.values())
        batch_sizes = results["captured_step.json"]["batch_sizes"]
        assert list(batch_sizes) == ["2", "4"]
        for ways in batch_sizes.values():
            assert list(ways) == ["eager", "network captured", "whole step captured"]
            assert all(0 < low <= median <= high for low, median, high in ways.values())


# ---------------------------------------------------------------------------------------------------------------------
# The stand-in for a GPU

ON_THE_STAND_IN = """
import torch
a = torch.arange(3.0)
on_device = a.to("cuda")
on_device += 1
assert a.tolist() == [0, 1, 2]  # a copy to the device is a copy
graph, count = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
with torch.cuda.graph(graph):
    count += 1
    double = 2 * on_device
    double[:1] += 1  # through a view, in place
    total = double.sum()
assert count.item() == 0  # a capture runs nothing
on_device.copy_(torch.tensor([10.0, 20.0, 30.0]))
graph.replay()
assert double.tolist() == [21, 40, 60] and total.item() == 121 and count.item() == 1
for read in (lambda: total.item(), lambda: on_device.nonzero(), lambda: double[double > 1]):
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            read()
    except RuntimeError as error:
        assert "not permitted when stream is capturing" in str(error)
    else:
        raise AssertionError("a captured graph waited for the device")
print("all of it")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_stand_in_copies_replays_and_refuses_to_wait_as_a_gpu_does(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(ON_THE_STAND_IN)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "cuda_on_cpu.pretend_gpu", str(program)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.strip() == "all of it", result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Time, failures, interruptions


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do() -> None:
    command = [sys.executable, "benchmarks/gpu_check.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 2
    assert "--dry-run" in result.stdout


@pytest.mark.parametrize("call", list(STEPS))
def test_the_steps_of_a_call_fit_into_it_and_a_call_into_nine_minutes(call: str) -> None:
    seconds = sum(max(step.seconds for step in steps) for steps in gpu_check.CALLS[call])
    assert seconds <= gpu_check.CALL_SECONDS <= 9 * 60 - 10


def make_check(output: Path, seconds: float = 60.0) -> gpu_check.Check:
    return gpu_check.Check("right", output, False, {"device": "none"}, seconds)


def python_step(name: str, program: str, seconds: float = 60.0) -> gpu_check.Step:
    return gpu_check.Step(name, seconds, lambda check: ([sys.executable, "-c", program], {}))


def test_a_failing_step_is_reported_and_those_beside_it_run(tmp_path: Path) -> None:
    check = make_check(tmp_path)

    def no_tool(check: gpu_check.Check) -> gpu_check.Command:
        return [gpu_check.find_tool("no-such-program-anywhere")], {}

    good = python_step("good", "print('2 times faster'); print('3 times faster')")
    bad = python_step("bad", "print('before'); print('3 failed'); raise SystemExit(3)")
    assert not check.run_side_by_side((good, bad, gpu_check.Step("missing", 60.0, no_tool)))
    outcomes = {outcome["name"]: outcome for outcome in check.steps}
    assert outcomes["good"]["passed"] and outcomes["good"]["detail"] == "3 times faster"
    assert not outcomes["bad"]["passed"] and outcomes["bad"]["detail"] == "exit status 3: 3 failed"
    assert not outcomes["missing"]["passed"] and "no-such-program-anywhere" in outcomes["missing"]["detail"]
    summary = json.loads((tmp_path / "right.json").read_text())
    assert not summary["passed"] and len(summary["steps"]) == 3
    assert (tmp_path / "right/bad.log").read_text().splitlines()[1:] == ["before", "3 failed"]


START_ANOTHER = (
    "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('started', child.pid, flush=True); child.wait()"
)


def ends(process: int) -> bool:
    """Whether a process ends by itself: a signal that was sent may still be on its way."""
    status = Path(f"/proc/{process}/status")
    for _ in range(600):
        try:
            if "State:\tZ" in status.read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("whose", ["the step", "the call"])
def test_what_takes_too_long_is_cut_off_with_all_it_started(tmp_path: Path, whose: str) -> None:
    check = make_check(tmp_path, 3.0 if whose == "the call" else 60.0)
    step = python_step("slow", START_ANOTHER, 600.0 if whose == "the call" else 3.0)
    assert not check.run_side_by_side((step,))
    assert "cut off after 3 s: started" in check.steps[0]["detail"]
    assert ends(int(check.steps[0]["detail"].split()[-1]))
    if whose == "the call":
        assert not check.run_side_by_side((python_step("next", "print('x')"),))
        assert check.steps[1]["detail"] == "not run: the time of this call is over"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_call_that_is_ended_keeps_what_it_has(tmp_path: Path, number: signal.Signals) -> None:
    program = f"""
import sys
from benchmarks import gpu_check
def step(name, program):
    return gpu_check.Step(name, 60.0, lambda check: ([sys.executable, "-c", program], {{}}))
gpu_check.CALLS["right"] = ((step("first", "print('half')"),), (step("second", {START_ANOTHER!r}),))
sys.exit(gpu_check.main())
"""
    command = [sys.executable, "-c", program, "right", "--dry-run", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("second:"):
                break
        while not any("started" in log.read_text().partition("\n")[2] for log in tmp_path.glob("right/second.log")):
            time.sleep(0.1)
        process.send_signal(number)
        said = process.stdout.read()
    assert process.returncode == 1
    assert f"ended by {number.name}: started" in said and "Not all passed" in said
    summary = json.loads((tmp_path / "right.json").read_text())
    assert [step["passed"] for step in summary["steps"]] == [True, False]
    assert not summary["complete"]
    assert "half" in (tmp_path / "right/first.log").read_text()
    assert ends(int(summary["steps"][1]["detail"].split()[-1]))


def test_tools_are_found_beyond_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "toolkit" / "bin" / "a-tool-of-cuda"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FileNotFoundError, match="expected a-tool-of-cuda on the PATH"):
        gpu_check.find_tool(tool.name)
    monkeypatch.setattr(gpu_check, "TOOL_FOLDERS", (f"{tmp_path}/tool*/bin"[1:],))
    assert gpu_check.find_tool(tool.name) == str(tool)
    monkeypatch.setattr(gpu_check, "TOOL_FOLDERS", ())
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert gpu_check.find_tool(tool.name) == str(tool)


def test_where_git_is_absent_the_commit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("MG_OPS_COMMIT", raising=False)
    assert machine.describe_commit() == "unknown"
    monkeypatch.setenv("MG_OPS_COMMIT", "0123abc")
    assert machine.describe_commit() == "0123abc"


# ---------------------------------------------------------------------------------------------------------------------
# Nsight Compute's tables

RAW_PAGE = """\
==PROF== Connected to process 4711 (/usr/bin/python3.12)
some words of the program
==PROF== Profiling "claim_kernel" - 0: 0%....50%....100% - 38 passes
"ID","Process ID","Kernel Name","dram__bytes_read.sum","gpu__time_duration.sum","smsp__inst_executed.sum",\
"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
"","","","byte","ns","inst","inst","inst"
"0","4711","mg_ops::cuda::claim_kernel(mg_ops::cuda::MatchProblem)","7,500,000","14,200","15,812,345","0.25","1.75"
"1","4711","void mg_ops::cuda::rank_kernel<(int)4>(mg_ops::cuda::MatchProblem)","1,000","2.5","n/a","0","0"
"""


def test_the_summary_of_a_profile_is_what_its_table_says() -> None:
    claim, rank = kernel_profile.read_raw_page(RAW_PAGE)
    assert claim["kernel"] == "claim_kernel" and rank["kernel"] == "rank_kernel"
    assert claim["nanoseconds"] == 14_200 and claim["device_bytes_read"] == 7.5e6
    assert claim["warp_instructions"] == 15_812_345 and rank["warp_instructions"] is None
    assert list(claim["stalls"].items()) == [("wait", 1.75), ("barrier", 0.25)] and rank["stalls"] == {}
    assert rank["occupancy_percent"] is None


@pytest.mark.parametrize("text", ["", "==ERROR== no permission\n", "".join(RAW_PAGE.splitlines(True)[:5])])
def test_a_profile_without_a_kernel_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no kernel"):
        kernel_profile.read_raw_page(text)


@pytest.mark.parametrize("knows", ["every metric", "its sections alone", "nothing"])
def test_an_ncu_that_lacks_a_metric_is_asked_again_for_its_sections(
    tmp_path: Path, knows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ncu = tmp_path / "ncu"
    (tmp_path / "table").write_text(RAW_PAGE)
    refused = {"every metric": "never", "its sections alone": "--metrics", "nothing": "--csv"}[knows]
    ncu.write_text(
        f"#!/bin/sh\ncase \"$*\" in *{refused}*) echo '==ERROR== Failed to find metric'; exit 1;; esac\n"
        f"cat {tmp_path / 'table'}\n"
    )
    ncu.chmod(0o755)
    call = (str(ncu), "coco320", ["program"], tmp_path, None)
    if knows == "nothing":
        with pytest.raises(RuntimeError, match="Failed to find metric"):
            kernel_profile.profile(*call)
        return
    assert [launch["kernel"] for launch in kernel_profile.profile(*call)] == ["claim_kernel", "rank_kernel"]
    assert (tmp_path / "ncu-coco320.csv").read_text() == RAW_PAGE
    assert ("Failed to find metric" in capsys.readouterr().out) == (knows == "its sections alone")
