"""What the pages say can be relied on: their code runs and shows its true results, their links, names and pages exist.

So do the files that comments and docstrings cite; the figures of the README are those recorded.

A block fenced as `python` is run, the blocks of a page one after the other; a line that is an expression followed by a
comment with a value must have that value. A block fenced as `py` is a fragment, which need only be Python. The site
itself is built and checked by `make docs`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import io
import json
import pkgutil
import re
import runpy
import subprocess
import sys
import textwrap
import tokenize
from pathlib import Path
from typing import Any

import pytest
import torch

import mg_ops
import mg_ops.adapters
from benchmarks.cases import CASES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SHOWN_VALUE = re.compile(r"  # (tensor\(|True|False|None|[-\d\[{('\"])")


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(the line it begins on, code) of each block of a page in a language."""
    text = page.read_text()
    found = [(text[: match.start()].count("\n") + 2, match) for match in BLOCK.finditer(text)]
    return [(line, textwrap.dedent(match[3])) for line, match in found if match[2] == language]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


RUNNABLE = [page for page in PAGES if blocks(page, "python")]


def run_block(page: Path, first_line: int, code: str, namespace: dict[str, Any]) -> int:
    """Runs a block, statement by statement; how many shown values were compared."""
    num_values = 0
    lines = code.splitlines()
    for statement in ast.parse(code).body:
        where = f"{name_of(page)}:{first_line + statement.lineno - 1}"
        source = compile(ast.Module([statement], []), where, "exec")
        if not isinstance(statement, ast.Expr):
            exec(source, namespace)
            continue
        value = eval(compile(ast.Expression(statement.value), where, "eval"), namespace)
        line = lines[(statement.end_lineno or statement.lineno) - 1]
        if SHOWN_VALUE.search(line):
            shown, actual = (" ".join(text.split()) for text in (line.split("  # ", 1)[1], repr(value)))
            assert shown.startswith(actual), f"{where}: shows {shown}, is {actual}"
            num_values += 1
    return num_values


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_the_code_of_a_page_runs_and_shows_its_true_results(page: Path) -> None:
    code = blocks(page, "python")
    if any("torchvision" in text for _, text in code):
        pytest.importorskip("torchvision")
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    num_values = sum(run_block(page, line, text, namespace) for line, text in code)
    assert num_values > 0, "a page that shows no value promises little: end a line with the value it has"


def test_a_wrong_value_would_be_seen() -> None:
    with pytest.raises(AssertionError, match=r"README\.md:8: shows 3, is 2"):
        run_block(ROOT / "README.md", 7, "x = 1\nx + 1  # 3\n", {})


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "py")], ids=name_of)
def test_fragments_are_python(page: Path) -> None:
    for line, code in blocks(page, "py"):
        compile(code, f"{name_of(page)}:{line}", "exec")


def test_every_name_the_pages_mention_exists() -> None:
    mentioned = {}
    for page in PAGES:
        for match in re.finditer(r"(?<![\w/.-])(mg_ops|detector)((?:\.[A-Za-z_]\w*)+)", page.read_text()):
            if match[2] not in (".md", ".py"):
                mentioned[match[0]] = page
    assert "mg_ops.mutual_match" in mentioned and "mg_ops.adapters.torchvision.use_mutual_guidance" in mentioned
    missing = [f"{name_of(page)}: {name}" for name, page in mentioned.items() if not exists(name)]
    assert not missing


def exists(name: str) -> bool:
    """Whether a dotted name is a module or something in one; one that needs a package that is missing passes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.split(".")[0] != parts[0]:
                return True
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return part in getattr(found, "__annotations__", {})
            found = getattr(found, part)
        return True
    return False


def documented() -> set[str]:
    """What the API pages show, `::: name` each."""
    pages = ROOT.glob("docs/api/*.md")
    return {name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)}


def test_every_public_name_is_on_an_api_page() -> None:
    expected = {f"mg_ops.{name}" for name in mg_ops.__all__}
    expected |= {f"mg_ops.adapters.{module.name}" for module in pkgutil.iter_modules(mg_ops.adapters.__path__)}
    assert expected - documented() == set()


def test_every_name_on_an_api_page_exists() -> None:
    assert [name for name in sorted(documented()) if not exists(name)] == []


def nav_pages(entries: Any) -> list[str]:
    """The pages of a navigation, of all levels."""
    if isinstance(entries, str):
        return [entries]
    children = entries.values() if isinstance(entries, dict) else entries
    return [page for child in children for page in nav_pages(child)]


def test_the_navigation_names_the_pages_there_are() -> None:
    yaml = pytest.importorskip("yaml")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = nav_pages(settings["nav"])
    assert len(named) == len(set(named))
    assert set(named) == {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    for path in [*settings["hooks"], *(f"docs/{name}" for name in settings["extra_css"])]:
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/results/*/match_speed.json")), ids=name_of)
def test_the_performance_page_shows_every_method_measured(path: Path) -> None:
    hook = runpy.run_path(str(ROOT / "docs/measured_tables.py"))
    page = hook["on_page_markdown"](f"# Performance\n\n{hook['MARK']}\n", None, None, None)
    assert page.startswith("# Performance") and hook["MARK"] not in page
    measured = json.loads(path.read_text())
    assert f"### {measured['machine']['device']}" in page
    for name, case in measured["cases"].items():
        if not name.startswith("sweep"):
            rows = page.split(f"#### {name}\n")[1].split("####")[0]
            assert all(method["label"] in rows for method in case["methods"].values())


def test_the_installation_page_shows_every_environment_the_wheel_is_tested_in() -> None:
    pytest.importorskip("nox")
    environments = runpy.run_path(str(ROOT / "noxfile.py"))["ENVIRONMENTS"]
    hook = runpy.run_path(str(ROOT / "docs/measured_tables.py"))
    page = hook["on_page_markdown"]((ROOT / "docs/installation.md").read_text(), None, None, None)
    rows = re.findall(r"^\| (2\.\d+)\.\S+ \| (3\.\d+)\.\d+ \|", page, re.MULTILINE)
    tested = [(torch, python) for torch, python in environments if torch != "newest"]
    assert [(".".join(torch.split(".")[:2]), python) for torch, python in tested] == rows[: len(tested)]
    assert rows[-1][1] == environments[-1][1]
    assert len(rows) == len(environments)


def test_the_citation_file_names_this_version() -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == mg_ops.__version__


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/results/NOTES.md"], ids=name_of
)
def test_links_to_files_lead_to_files(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    for link in re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", text):
        assert (page.parent / link).exists(), link


# What is cited in comments, docstrings and pages: a path, or the bare name of a source file.
CITED = re.compile(
    r"(?<![\w./<>*:\\$-])(?:\.\./)*((?:[\w.<>*-]+/)+[\w.<>*-]*|[\w-]+\.(?:md|py|h|cpp|cu|cuh))(?![\w/(])"
)
NOT_OURS = {"Python.h", "assign_result.py", "util_mixins.py"}  # Python's, mmdetection's
COMMENT = {".md": r"(?s).+", **dict.fromkeys((".h", ".cpp", ".cu", ".cuh"), r"//.*")}  # others: what follows a #


def repository_files() -> list[Path]:
    """What git keeps or would keep; skips where there is no git."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs a git checkout: {error}")
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def comments_of(path: Path) -> list[str]:
    """What a file says to its reader."""
    if path.suffix in (".json", ".npz", ".png", ".jpg"):
        return []
    text = path.read_text()
    if path.suffix != ".py":
        return re.findall(COMMENT.get(path.suffix, r"(?<!\S)#.*"), text)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    statements = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr))
    return comments + [
        node.value for node in statements if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def wrong_citations(text: str, files: list[Path]) -> list[str]:
    """Cited files that are not there; paths into folders that the repository does not have are not ours to check."""
    folders = {path.relative_to(ROOT).parts[0] for path in files}
    names = {path.name for path in files} | NOT_OURS
    wrong = []
    for cited in (match[1].rstrip(".") for match in CITED.finditer(text)):
        if "/" not in cited:
            found = cited in names
        else:
            pattern = re.sub(r"<[^>]*>|MACHINE|STUDY", "*", cited)
            found = cited.split("/")[0] not in folders or any(ROOT.glob(pattern.rstrip("/")))
        if not found:
            wrong.append(cited)
    return wrong


def test_every_file_cited_in_the_repository_exists() -> None:
    files = repository_files()
    wrong = {name_of(path): wrong_citations("\n".join(comments_of(path)), files) for path in files}
    assert {name: cited for name, cited in wrong.items() if cited} == {}


def test_a_citation_of_a_page_that_does_not_exist_would_be_seen() -> None:
    files = repository_files()
    text = "written from docs/no_such_page.md, no_such_file.py, docs/figures/nothing and ../docs/api/nothing.md."
    cited = ["docs/no_such_page.md", "no_such_file.py", "docs/figures/nothing", "docs/api/nothing.md"]
    assert wrong_citations(text, files) == cited
    assert wrong_citations("docs/api/*.md, csrc/cpu, box.h, benchmarks/results/<gpu>/, a/b, runs/x.json", files) == []


def imported_distributions(folder: Path) -> set[str]:
    """What pip must install for the modules of a folder, beside torch and mg_ops."""
    modules = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module)
    if "torch.utils.tensorboard" in modules:  # imports a package that torch does not bring
        modules.add("tensorboard")
    packages = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"torch", "mg_ops", folder.name}
    distributions = importlib.metadata.packages_distributions()
    return {distributions.get(package, [package])[0].lower() for package in packages}


def test_the_install_line_of_the_detectors_brings_what_they_import() -> None:
    tomllib = pytest.importorskip("tomllib")
    assert "pip install --editable '.[detector]'" in (ROOT / "docs/detector.md").read_text()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extra = set(settings["project"]["optional-dependencies"]["detector"])
    assert extra == imported_distributions(ROOT / "detector")
    # `make` installs torchvision with torch.
    assert extra - set(settings["dependency-groups"]["dev"]) == {"torchvision"}


RELEASED_CODE = ROOT / "benchmarks/results/amd-epyc-2-cores/released_code.json"


def test_the_figures_of_the_definition_are_those_recorded() -> None:
    recorded, page = json.loads(RELEASED_CODE.read_text()), (ROOT / "docs/definition.md").read_text()
    machine, cases = recorded["machine"], {name: case["differences"] for name, case in recorded["cases"].items()}
    voc = next(iter(cases.values()))
    text = (
        f"{voc['classes_differ']} of {voc['labelled']:,} labeled anchors learn another class in `{next(iter(cases))}`, "
    )
    in_others = (f"{of['classes_differ']} of {of['labelled']:,} in `{name}`" for name, of in list(cases.items())[1:])
    text += " and ".join(in_others) + ". Another box is learned by "
    first, *rest = (f"{of['boxes_differ']} of {of['learn_a_box']:,}" for of in cases.values())
    assert f"{text}{first}, {' and '.join(rest)} anchors." in page.replace("\n", " ")
    assert f"commit {machine['commit']}, {machine['date'][:10]}, seed {recorded['seed']}" in page


def test_the_figures_of_the_readme_are_those_recorded() -> None:
    recorded = json.loads(RELEASED_CODE.read_text())
    machine, readme = recorded["machine"], (ROOT / "README.md").read_text()

    def say(seconds: float) -> str:
        return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"

    for name, case in recorded["cases"].items():
        released, ours = (case["timed"][method]["seconds"] for method in ("released code", "mutual_match"))
        size = f"{CASES[name].batch_size} x {len(CASES[name].make_anchors()):,}"
        row = f"| {name} | {size} | {say(released)} | {say(ours)} "
        assert f"{row}| {released / ours:.0f} |" in readme
        if name == "coco320":
            headline = (
                f"in {1000 * ours:.1f} ms on {machine['cores']} CPU cores, {released / ours:.0f} times as fast as"
            )
            assert headline in readme.replace("\n", " ")
    assert f"torch {machine['torch'].split('+')[0]}, commit {machine['commit']}, {machine['date'][:10]}" in readme

    bench = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/match_speed.json").read_text())["cases"]
    median = {
        (name, key): bench[name]["methods"][key]["median_seconds"]
        for name in recorded["cases"]
        for key in ("cpp", "cpp-lists")
    }
    longer = [100 * median[name, "cpp-lists"] / median[name, "cpp"] - 100 for name in recorded["cases"]]
    assert f"With objects as lists a call takes up to {max(longer):.0f}% longer" in readme
