"""A library that is missing, too old or broken never stops the import: a warning says what to do, eager works."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(str(importlib.util.find_spec("mg_ops").origin)).parent
LIBRARY = PACKAGE / "libmg_ops.so"

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="mg_ops/libmg_ops.so is not built: run `make build`")

IMPORT_AND_MATCH = """
import json, sys, warnings
import torch
torch.__version__ = type(torch.__version__)({torch_version!r} or torch.__version__)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mg_ops
anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 50.0, 50.0]])
arguments = dict(anchors=anchors, gt_boxes=[anchors[:1] + 1], gt_labels=[torch.tensor([2])])
arguments |= dict(pred_boxes=anchors[None], cls_logits=torch.zeros(1, 2, 3))
try:
    mg_ops.mutual_match(**arguments, backend="cpp")
    cpp_error = ""
except RuntimeError as error:
    cpp_error = str(error)
print(json.dumps(dict(
    package=mg_ops.__file__,
    warnings=[(warning.category.__name__, str(warning.message)) for warning in caught],
    usable=mg_ops.backends()["cpp"].usable,
    cpp_error=cpp_error,
    eager=mg_ops.mutual_match(**arguments, backend="eager").cls_match.tolist(),
    default=mg_ops.mutual_match(**arguments).cls_match.tolist(),
)))
"""


def import_and_match(package: Path, torch_version: str = "") -> dict[str, Any]:
    """What a fresh Python that imports this package sees: its warnings, its backends, a match by two of them."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_MATCH.format(torch_version=torch_version)],
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        cwd=package.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    assert Path(answer["package"]).parent == package
    return answer


def assert_eager_only(answer: dict[str, Any], reason: str) -> None:
    """One RuntimeWarning with the reason, the same reason on asking for the library, and eager at work."""
    ((category, message),) = answer["warnings"]
    assert category == "RuntimeWarning"
    assert reason in message
    assert "backend='eager' works without it" in message
    assert not answer["usable"]
    assert "backend 'cpp' cannot be used" in answer["cpp_error"] and reason in answer["cpp_error"]
    assert answer["eager"] == answer["default"] == [[0, -1]]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the Python files, without the library."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    return Path(shutil.copytree(PACKAGE, tmp_path / "mg_ops", ignore=ignored))


def test_a_checkout_that_is_not_built_is_told_from_an_installation(package: Path) -> None:
    """Python prefers the folder it is started in to what is installed."""
    (package.parent / "CMakeLists.txt").touch()
    assert_eager_only(
        import_and_match(package), f"the checkout {package.parent}, where the library is not built: run Python"
    )


@needs_library
def test_a_library_that_fits_loads_without_a_word() -> None:
    answer = import_and_match(PACKAGE)
    assert answer["warnings"] == []
    assert answer["usable"] and answer["cpp_error"] == ""
    assert answer["eager"] == answer["default"] == [[0, -1]]


def test_a_missing_library_is_a_warning_that_says_what_to_do(package: Path) -> None:
    assert_eager_only(import_and_match(package), "install a C++ compiler")


def test_a_broken_library_is_a_warning_that_says_what_to_do(package: Path) -> None:
    (package / "libmg_ops.so").write_bytes(b"not a library" * 1000)
    assert_eager_only(import_and_match(package), "invalid ELF header")


@needs_library
def test_a_library_built_from_other_sources_is_not_used(package: Path) -> None:
    shutil.copy(LIBRARY, package)
    signatures = package / "rules" / "operators.py"
    signatures.write_text(signatures.read_text().replace("Tensor anchors,", "Tensor boxes,", 1))
    assert_eager_only(import_and_match(package), "was built from other sources")


# As strings, "2.9.1" > "2.10" and "10.0.0" < "2.10".
@needs_library
def test_an_old_torch_is_a_warning_that_says_what_to_do() -> None:
    version = "2.9.1+cu128"
    assert_eager_only(import_and_match(PACKAGE, version), f"torch 2.10 or newer is needed, this is {version}")


@pytest.mark.parametrize("version", ["2.10.0a0+gitabc", "10.0.0"])
@needs_library
def test_a_newer_torch_is_not_taken_for_an_old_one(version: str) -> None:
    assert import_and_match(PACKAGE, version)["warnings"] == []


def test_importing_mg_ops_after_torch_imports_nothing_else() -> None:
    """What keeps the import fast: no third-party package, and none of torch's heavy parts, comes with it."""
    code = "import sys, torch; before = set(sys.modules); import mg_ops; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    imported = result.stdout.split()
    assert "mg_ops.matching" in imported
    expected = {"mg_ops", *sys.stdlib_module_names}
    assert [name for name in imported if name.split(".")[0] not in expected] == []
