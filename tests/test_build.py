"""What the compiled library and the wheel promise whoever installs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import mg_ops

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "mg_ops" / "libmg_ops.so"
BUILD = ROOT / "build" / "library"
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="mg_ops/libmg_ops.so is not built: run `make build`")


def run(*command: str | Path) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


def dynamic_symbols(library: Path, *options: str) -> dict[str, str]:
    """Names without versions -> the type letter of nm."""
    lines = [line.split() for line in run("nm", "-D", *options, library).splitlines()]
    return {fields[-1].split("@")[0]: fields[-2] for fields in lines}


def dynamic_section(library: Path, tag: str) -> set[str]:
    return set(re.findall(rf"\({tag}\).*\[(.*)\]", run("readelf", "-dW", library)))


def cuda_architectures() -> list[str]:
    """What CMake was asked to compile for; nothing where the library in the build folder is without CUDA."""
    rules, cache = BUILD / "build.ninja", BUILD / "CMakeCache.txt"
    if not rules.exists() or "device.cu" not in rules.read_text():
        return []
    found = re.search(r"^MG_OPS_CUDA_ARCHITECTURES:\w+=(.*)$", cache.read_text(), re.MULTILINE)
    return found[1].split(";") if found else []


def built_wheel() -> Path:
    wheels = sorted((ROOT / "dist").glob("mg_ops-*.whl"))
    if not wheels:
        pytest.skip("no wheel in dist: run `make wheel`")
    newest_source = max(path.stat().st_mtime for path in (ROOT / "mg_ops").rglob("*.py"))
    if wheels[-1].stat().st_mtime < newest_source:
        pytest.skip("the wheel in dist is older than the sources: run `make wheel`")
    return wheels[-1]


@pytest.fixture(params=["checkout", "wheel"])
def library(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The library that `make build` puts into the checkout, and the one in the release wheel."""
    if request.param == "wheel":
        return Path(zipfile.ZipFile(built_wheel()).extract("mg_ops/libmg_ops.so", tmp_path))
    if not LIBRARY.exists():
        pytest.skip("mg_ops/libmg_ops.so is not built: run `make build`")
    return LIBRARY


def test_library_uses_no_python_symbol(library: Path) -> None:
    undefined = dynamic_symbols(library, "--undefined-only")
    assert undefined
    assert not [name for name in undefined if re.match(r"_?Py|pybind", name)]


def test_library_needs_torch_and_the_c_and_cpp_runtimes_only(library: Path) -> None:
    needed = dynamic_section(library, "NEEDED")
    # libtorch.so brings libtorch_cuda.so into scope where there is one: without it the stream symbol stays null.
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    runtimes = {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "librt", "libpthread", "ld-linux-x86-64"}
    assert {name for name in needed if name.split(".")[0] not in runtimes} == {"libtorch.so", "libtorch_cpu.so"}


def test_library_remembers_no_folder_of_the_build_machine(library: Path) -> None:
    assert not dynamic_section(library, "RPATH") | dynamic_section(library, "RUNPATH")
    contents = library.read_bytes()
    assert str(ROOT).encode() not in contents
    assert str(TORCH_LIBRARIES.parent).encode() not in contents


def test_library_exports_nothing(library: Path) -> None:
    assert dynamic_symbols(library, "--defined-only") == {}


def test_library_loads_under_torch_without_cuda(library: Path) -> None:
    """Every strong symbol it asks of torch is in libtorch_cpu.so, which every build of torch has."""
    undefined = dynamic_symbols(library, "--undefined-only")
    asked = {name for name, kind in undefined.items() if re.match(r"(aoti_)?torch_", name) and kind == "U"}
    assert asked
    assert asked <= set(dynamic_symbols(TORCH_LIBRARIES / "libtorch_cpu.so", "--defined-only"))
    assert undefined.get("aoti_torch_get_current_cuda_stream", "w") == "w"


def test_library_uses_only_the_stable_abi_of_torch_2_10(library: Path) -> None:
    pytest.importorskip("torch_abi_audit")
    report = run(Path(sys.executable).parent / "torch-abi-audit", "--check", "torch", library)
    assert re.search(r"Torch ABI:\s+STABLE\n", report)
    assert re.search(r"Min torch:\s+2\.10\.0\n", report)


@pytest.mark.parametrize("instruction_set", ["avx2", "avx512"])
def test_vector_kernels_share_no_symbol_with_the_rest(instruction_set: str) -> None:
    """The linker keeps one of equal weak functions, so a weak AVX one could reach a processor without AVX."""
    objects = sorted(BUILD.glob(f"CMakeFiles/mg_ops_cpu_{instruction_set}.dir/**/*.o"))
    if not objects:
        pytest.skip("no objects of this instruction set in build/library: run `make build` on x86-64")
    for file in objects:
        symbols = [line.split() for line in run("nm", "--defined-only", file).splitlines()]
        assert not [fields[-1] for fields in symbols if fields[-2] in "wW"], f"weak functions in {file}"
        shared = [fields[-1] for fields in symbols if fields[-2] in "TDBR" and instruction_set not in fields[-1]]
        assert not shared, f"not in a namespace named {instruction_set}: {shared}"


@pytest.mark.skipif(
    not all(re.fullmatch(r"\d+a?(-real)?", architecture) for architecture in cuda_architectures() or [""]),
    reason="build/library has no CUDA code, or was asked for no architecture by number: run `make build` where nvcc is",
)
def test_cuda_code_is_there_for_every_architecture_asked_for() -> None:
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    library = BUILD / "libmg_ops.so"
    binaries = set(re.findall(r"sm_(\d+a?)", run(cuobjdump, "--list-elf", library)))
    assert binaries == {architecture.removesuffix("-real") for architecture in cuda_architectures()}
    intermediate = set(re.findall(r"sm_(\d+a?)", run(cuobjdump, "--list-ptx", library)))
    assert intermediate == {architecture for architecture in cuda_architectures() if not architecture.endswith("-real")}


@needs_library
@pytest.mark.skipif(not cuda_architectures(), reason="the library was built without CUDA")
def test_cuda_half_answers_on_any_machine() -> None:
    """Also without a GPU or a driver the CUDA runtime in the library starts, and says what is missing."""
    assert mg_ops.backends()["cpp"].usable
    error = torch.ops.mg_ops.cuda_device_error(0)
    if torch.cuda.is_available():
        assert error == ""
        assert torch.ops.mg_ops.cuda_device_error(torch.cuda.device_count()) == "invalid device ordinal"
    else:
        assert re.search("driver|device", error)


def test_wheel_is_for_any_python_3_wherever_wheels_of_torch_are_installed() -> None:
    assert built_wheel().name.endswith("-py3-none-manylinux_2_28_x86_64.whl")
    metadata = zipfile.ZipFile(built_wheel()).read(f"mg_ops-{mg_ops.__version__}.dist-info/WHEEL").decode()
    assert re.findall(r"^Tag: (.*)$", metadata, re.MULTILINE) == ["py3-none-manylinux_2_28_x86_64"]


def test_wheel_asks_for_no_newer_system_than_manylinux_2_28(tmp_path: Path) -> None:
    """Of glibc 2.28 and the libstdc++ of GCC 8, whatever the machine that built it has."""
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (8,)}
    library = zipfile.ZipFile(built_wheel()).extract("mg_ops/libmg_ops.so", tmp_path)
    asked = re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", run("readelf", "-VW", library))
    assert {family for family, _ in asked} >= {"GLIBC", "GLIBCXX", "CXXABI"}
    assert [(name, version) for name, version in asked if tuple(map(int, version.split("."))) > newest[name]] == []


def test_wheel_loads_with_every_symbol_bound_at_once(tmp_path: Path) -> None:
    """Functions are otherwise looked up at their first call, and a missing one ends the process there."""
    library = zipfile.ZipFile(built_wheel()).extract("mg_ops/libmg_ops.so", tmp_path)
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.mg_ops.mutual_match.default._schema)"
    )
    command = [sys.executable, "-c", code, library]
    result = subprocess.run(command, env=os.environ | {"LD_BIND_NOW": "1"}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("mg_ops::mutual_match(Tensor anchors")


def test_wheel_holds_the_package_and_nothing_else() -> None:
    names = [name for name in zipfile.ZipFile(built_wheel()).namelist() if not name.endswith("/")]
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mg_ops"}
    modules = {str(path.relative_to(ROOT / "mg_ops")) for path in (ROOT / "mg_ops").rglob("*.py")}
    assert {name.removeprefix("mg_ops/") for name in names if name.startswith("mg_ops/")} == modules | {
        "libmg_ops.so",
        "py.typed",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_holds_all_that_a_build_reads() -> None:
    built_wheel()  # as old as the sdist
    (sdist,) = (ROOT / "dist").glob("mg_ops-*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mg_ops").rglob("*.py")}
    files = {"CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "mg_ops/py.typed", "pyproject.toml", "setup.py"}
    assert names >= sources | modules | files
    assert not [name for name in names if name.endswith(".so") or name.startswith(("tests", "detector", "benchmarks"))]


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """What an sdist holds, to build without touching the checkout."""
    for name in ("mg_ops", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, tmp_path)
    return tmp_path


def build_wheel(source_tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MG_OPS_", "CMAKE_"))}
    command = [sys.executable, "setup.py", "bdist_wheel"]
    return subprocess.run(command, cwd=source_tree, env=inherited | environment, capture_output=True, text=True)


def test_without_a_compiler_the_package_is_built_without_the_library(source_tree: Path) -> None:
    result = build_wheel(source_tree, CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "the compiled library was not built, for want of a C++ compiler" in result.stdout + result.stderr
    (wheel,) = (source_tree / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    # Not even one that lay in the source folder: it would not fit the Python files.
    assert "mg_ops/libmg_ops.so" not in zipfile.ZipFile(wheel).namelist()
    assert not (source_tree / "mg_ops" / "libmg_ops.so").exists()


def test_without_a_compiler_it_is_an_error_where_the_library_is_required(source_tree: Path) -> None:
    result = build_wheel(source_tree, CXX="no-such-compiler", MG_OPS_REQUIRE_LIBRARY="1")
    assert result.returncode != 0
    assert "for want of a C++ compiler; MG_OPS_REQUIRE_LIBRARY=1 makes this an error" in result.stderr


def test_without_a_compiler_that_works_the_package_is_built_without_the_library(source_tree: Path) -> None:
    """One without its headers, for example: CMake tries it first, and fails."""
    if not (shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("no CMake or no Ninja on PATH")
    result = build_wheel(source_tree, CXX=str(shutil.which("false")))
    assert result.returncode == 0, result.stderr
    assert "the compiled library was not built, because CMake failed" in result.stdout + result.stderr
    assert [wheel.name for wheel in (source_tree / "dist").iterdir()] == [
        f"mg_ops-{mg_ops.__version__}-py3-none-any.whl"
    ]


def test_what_cmake_args_ask_for_and_cannot_have_is_an_error(source_tree: Path) -> None:
    if not (shutil.which("c++") and shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("no C++ compiler, CMake or Ninja on PATH")
    result = build_wheel(source_tree, CMAKE_ARGS="-DMG_OPS_CUDA=ON", CUDACXX="/no/nvcc")
    assert result.returncode != 0
    assert not (source_tree / "dist").exists()


def test_a_compile_error_is_never_passed_over(source_tree: Path) -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    (source_tree / "csrc" / "schema.cpp").write_text("#error broken\n")
    result = build_wheel(source_tree, CMAKE_ARGS="-DMG_OPS_CUDA=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O0")
    assert result.returncode != 0
    assert "#error broken" in result.stdout + result.stderr
