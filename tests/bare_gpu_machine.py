"""An environment made to look like a bare GPU machine: few packages, no network, no git, no CUDA tools on the PATH.

The packages are links to those of the environment that runs the tests, so it takes a second and no space.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = (
    *("torch", "torchvision", "triton", "numpy", "scipy", "pillow", "matplotlib", "rich", "tqdm"),
    *("pip", "setuptools", "cmake", "ninja", "pytest", "pytest-xdist", "hypothesis"),
)
ABSENT_PROGRAMS = ("git", "cmake", "ctest", "ninja", "nvcc", "ncu", "compute-sanitizer", "python", "pip")
NO_NETWORK = '''"""Refuses the network, as where there is none."""
import sys


def refuse(event, arguments):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        raise OSError("there is no network here")


sys.addaudithook(refuse)
'''


def with_requirements(names: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """Distributions by name, those they require among them.

    Raises:
        PackageNotFoundError: this environment lacks one.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = list(names)
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        for text in found[name].requires or []:
            requirement = Requirement(text)
            # Extras bring packages whose markers name none, such as the CUDA libraries of torch's cuda-toolkit[...].
            extras = requirement.extras or {""}
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
                wanted += requirements_of_extras(requirement.name, extras)
    return found


def requirements_of_extras(name: str, extras: set[str]) -> list[str]:
    """What a distribution requires for these extras."""
    requirements = [Requirement(text) for text in importlib.metadata.distribution(name).requires or []]
    return [
        requirement.name
        for requirement in requirements
        if requirement.marker is not None
        and any(extra and requirement.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def link_package(distribution: importlib.metadata.Distribution, site_packages: Path, scripts: Path) -> None:
    """Links what a distribution has in site-packages; its scripts are copied, to be run by the new Python."""
    for file in distribution.files or []:
        top = file.parts[0]
        if top == ".." and file.parts[-2] == "bin":
            source = Path(str(distribution.locate_file(file))).resolve()
            content = source.read_bytes()
            if content.startswith(b"#!"):
                content = f"#!{scripts / 'python'}\n".encode() + content.split(b"\n", 1)[1]
            (scripts / source.name).write_bytes(content)
            (scripts / source.name).chmod(0o755)
        elif top not in ("..", "__pycache__") and not (site_packages / top).is_symlink():
            (site_packages / top).symlink_to(Path(str(distribution.locate_file(top))))


def make_environment(folder: Path) -> dict[str, str]:
    """Makes it in a new folder; the environment variables under which its `python` is found first.

    Raises:
        PackageNotFoundError: this environment lacks one of PACKAGES.
    """
    distributions = with_requirements(PACKAGES)
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    scripts, tools = venv / "bin", folder / "tools"
    site_packages = next(venv.glob("lib/python*/site-packages"))
    for distribution in distributions.values():
        link_package(distribution, site_packages, scripts)
    (site_packages / "sitecustomize.py").write_text(NO_NETWORK)
    tools.mkdir()
    for source in (path for place in os.environ["PATH"].split(os.pathsep) for path in Path(place).glob("*")):
        link = tools / source.name
        if source.name.startswith(ABSENT_PROGRAMS) or link.is_symlink() or ".venv" in source.parts:
            continue
        link.symlink_to(source)
    (folder / "home").mkdir()
    return {"PATH": f"{scripts}{os.pathsep}{tools}", "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}


def without_network() -> list[str]:
    """What stands before a command to run it without a network device, where the system permits that."""
    unshare = shutil.which("unshare")
    command = [unshare, "--net", "--map-root-user"] if unshare else []
    permitted = command and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return command if permitted else []


def copy_checkout(source: Path, target: Path) -> None:
    """The files of a checkout as a tool would send them: no .git, nothing built. What was built in `target` stays."""
    for path in target.iterdir() if target.is_dir() else []:
        if path.name != "build":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    left_out = shutil.ignore_patterns(
        *(".git", ".venv*", "build", "dist", "data", "runs", "site", "__pycache__", ".*_cache", ".hypothesis", "*.so"),
    )
    shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)
