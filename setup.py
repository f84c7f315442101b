"""Runs CMakeLists.txt, puts the library into the package and tags the wheel; all else is in pyproject.toml.

Without a C++ compiler that works, CMake, Ninja or torch's headers the package is installed without the library, and
says so: its eager and Triton backends work all the same. MG_OPS_REQUIRE_LIBRARY=1 makes that an error. CMAKE_ARGS holds
further options for CMake, for example CMAKE_ARGS="-DMG_OPS_CUDA=OFF"; with any, CMake must not fail.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # older than 70: an environment's own, which pip uses with --no-build-isolation
    raise SystemExit(
        f"mg_ops: setuptools 77 or newer is needed to build, this is {setuptools.__version__}: run "
        "`pip install --upgrade setuptools`, or leave out --no-build-isolation"
    ) from None

ROOT = Path(__file__).parent.resolve()
# optional: where the tools are missing there is no file to copy, and that is no error.
LIBRARY = Extension("mg_ops.libmg_ops", sources=[], optional=True)
MINIMUM_TORCH = (2, 10)  # as TORCH_TARGET_VERSION in CMakeLists.txt


def find_torch() -> Path | None:
    """The folder of a torch whose headers will do: the build environment's, or that of the environment installed into.

    pip builds in an isolated environment, where torch would be downloaded again, gigabytes of it. Its headers are all
    that is needed, those of any version from 2.10 on, and the interpreter still knows its own site-packages.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    site_packages = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages()]
    for folder in folders + [Path(path) / "torch" for path in site_packages]:
        version_file = folder / "version.py"
        version = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text()) if version_file.exists() else None
        if version and (int(version[1]), int(version[2])) >= MINIMUM_TORCH and (folder / "include/torch").is_dir():
            return folder
    return None


def find_tool(name: str) -> str | None:
    """A program beside this interpreter (pip installs cmake and ninja there), or on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def find_compiler() -> str | None:
    """The C++ compiler CMake will use: $CXX, or the first of the usual names."""
    names = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


class BuildLibrary(build_ext):
    """Builds mg_ops/libmg_ops.so with CMake, in build/library: what did not change is not compiled again."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no Python ABI in the name: it is no Python module

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja, torch_dir = find_tool("cmake"), find_tool("ninja"), find_torch()
        needed = {"a C++ compiler": find_compiler(), "CMake": cmake, "Ninja": ninja, "torch 2.10 or newer": torch_dir}
        missing = [name for name, found in needed.items() if not found]
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        if missing:
            self._go_without(library, f"for want of {' and '.join(missing)}")
            return
        build_dir = ROOT / "build" / "library"
        # -U first: an option of an earlier build must not stay in force.
        configure = [cmake, "-S", ROOT, "-B", build_dir, "-G", "Ninja", "-U", "MG_OPS_*"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
        options = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        configure += [f"-DMG_OPS_TORCH_DIR={torch_dir}", *options]
        # A machine that cannot build fails here, as by a compiler without its headers; what fails later is a fault.
        if subprocess.run([str(argument) for argument in configure], check=bool(options)).returncode != 0:
            self._go_without(library, "because CMake failed, in the words above")
            return
        subprocess.run([cmake, "--build", str(build_dir), "--target", "mg_ops"], check=True)
        subprocess.run([cmake, "--install", str(build_dir), "--prefix", str(library.parents[1])], check=True)

    def _go_without(self, library: Path, reason: str) -> None:
        message = f"mg_ops: the compiled library was not built, {reason}"
        if os.environ.get("MG_OPS_REQUIRE_LIBRARY") == "1":
            raise SystemExit(f"{message}; MG_OPS_REQUIRE_LIBRARY=1 makes this an error")
        self.warn(
            f"{message}. backend='eager' works without it, 'triton' too on GPUs; for 'cpp' and 'cuda' mend that, then "
            "install mg_ops again"
        )
        for stale in (library, ROOT / "mg_ops" / library.name):  # one built before would not fit the Python files
            stale.unlink(missing_ok=True)


class TagWheel(bdist_wheel):
    """py3-none-<platform>, or -any without the library: it uses torch's stable ABI and nothing of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        library = Path(self.get_finalized_command("build_ext").get_ext_fullpath(LIBRARY.name))
        return "py3", "none", super().get_tag()[2] if library.exists() else "any"


setup(
    ext_modules=[LIBRARY],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TagWheel},
    # What the build environment needs besides pyproject.toml: torch, where none can be found and one will be used.
    setup_requires=[] if find_torch() or not find_compiler() else ["torch>=2.10"],
)
