"""What every test shares: markers, the backends to test on the devices that are here, and hypothesis settings."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch

import mg_ops

# Where the build leaves the test-only bindings of the C++ headers (CMake option MG_OPS_TEST_BINDINGS).
sys.path.insert(0, str(Path(__file__).parent.parent / "build" / "tests"))

# No test has a time limit: machines differ, and a sanitizer makes everything slow.
hypothesis.settings.register_profile(
    "mg_ops", deadline=None, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("mg_ops")

OPTIONAL = ("matplotlib", "PIL", "pycocotools", "rich", "scipy", "tensorboard", "torchvision", "tqdm", "yaml")
"""Packages that a test file may need and an installed mg_ops does not."""

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


class Target(NamedTuple):
    """A backend on a device it can run on."""

    backend: str
    device: str


def usable_targets() -> list[Target]:
    """Every usable backend on every device here that it takes."""
    targets = []
    for backend, status in mg_ops.backends().items():
        devices = {"eager": DEVICES, "cpp": ["cpu"]}.get(backend, [device for device in DEVICES if device != "cpu"])
        if status.usable:
            targets += [Target(backend, device) for device in devices]
    return targets


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a script's background, and so in all that tests start
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """A file that imports an optional package that is not here is skipped; the others run."""
    report = yield
    cause = getattr(getattr(report.call.excinfo, "value", None), "__cause__", None)
    if report.failed and isinstance(cause, ModuleNotFoundError) and str(cause.name).split(".")[0] in OPTIONAL:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, f"needs {cause.name}")
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def as_parameter(target: Target) -> Any:
    """A target as a parameter of a test, marked where it needs a GPU."""
    marks = [pytest.mark.gpu] if target.device == "cuda" else []
    return pytest.param(target, marks=marks, id=f"{target.backend}-{target.device}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A file without Triton, of operators that have no Triton kernel, says so by WITHOUT_TRITON = True."""
    targets = usable_targets()
    if getattr(metafunc.module, "WITHOUT_TRITON", False):
        targets = [target for target in targets if target.backend != "triton"]
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", [as_parameter(target) for target in targets])
    if "compiled_target" in metafunc.fixturenames:
        params = [as_parameter(target) for target in targets if target.backend != "eager"]
        if not params:
            reason = "no backend but eager is usable here: " + "; ".join(
                f"{name}: {status.detail}" for name, status in mg_ops.backends().items() if not status.usable
            )
            params = [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="no compiled backend")]
        metafunc.parametrize("compiled_target", params)


def pytest_report_header() -> str:
    targets = ", ".join(f"{target.backend} on {target.device}" for target in usable_targets())
    return f"mg_ops {mg_ops.__version__}, torch {torch.__version__}: {targets}"


@pytest.fixture
def one_thread() -> Generator[None, None, None]:
    """Networks as small as the detector's tests train gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VOC folder of four training images and two to evaluate on, for tests that change nothing in it."""
    from small_data import write_voc

    return write_voc(tmp_path_factory.mktemp("voc"), {"train": 4, "val": 2})


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained detector that finds something everywhere, as `detector.train` would have left it."""
    from small_data import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("run"))


def fuzz_cases(count: int) -> int:
    """How many random cases to run: `count` times the environment variable MG_OPS_FUZZ (0.1: quick, 100: overnight)."""
    return max(1, int(count * float(os.environ.get("MG_OPS_FUZZ", "1"))))
