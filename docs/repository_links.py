"""MkDocs hook: links from pages to files of the repository lead to pages of the site.

In the repository a page links to `../examples/plain_loop.py`, which any viewer of the repository follows. On the site
such a file becomes a page of its own under `source/`, with its text highlighted; an image is copied; and a Markdown
file or a folder that has its page in the navigation leads there. Of any other folder there is a list of its files.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/results/NOTES.md": "performance_notes.md",
    "examples": "examples.md",
}
"""File or folder of the repository -> the page that shows it."""

IMAGES = {".png", ".svg", ".jpg"}
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp", ".toml": "toml"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")


def repository_path(link: str, folder: str) -> str:
    """The path from the repository's root of what a page in this folder links to."""
    return posixpath.normpath(posixpath.join(folder, link))


def site_path(path: str) -> str:
    """Where the site shows a file or folder of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in PAGES:
        return PAGES[path]
    if path.startswith("benchmarks/results/") and (ROOT / path).is_dir():
        return "performance.md"
    return f"source/{path}" if Path(path).suffix in IMAGES else f"source/{path}.md"


def linked_files() -> set[str]:
    """The files and folders of the repository that pages link to and that have no page yet."""
    linked = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/results/*/match_speed.png")}
    shown = [*PAGES, *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md"))]
    for markdown in (name for name in shown if name.endswith(".md")):
        for link, _ in LINK.findall((ROOT / markdown).read_text()):
            path = repository_path(link, posixpath.dirname(markdown))
            if site_path(path).startswith("source/"):
                if path.startswith("..") or not (ROOT / path).exists():
                    raise PluginError(f"{markdown}: expected a file of the repository or a page, got the link {link}")
                linked.add(path)
    return linked


def source_page(path: str) -> str:
    """Markdown that shows a text file, or lists a folder."""
    if (ROOT / path).is_dir():
        names = sorted(
            entry.name + "/" * entry.is_dir()
            for entry in (ROOT / path).iterdir()
            if not entry.name.startswith((".", "__")) and entry.suffix != ".so"
        )
        return f"# `{path}`\n\nThis folder of the repository holds\n\n" + "".join(f"- `{name}`\n" for name in names)
    language = LANGUAGES.get(Path(path).suffix, "text")
    settings = "hide: [toc]\nsearch: {boost: 0.2}"  # found after the pages that explain it
    return f"---\n{settings}\n---\n# `{path}`\n\n````{language}\n{(ROOT / path).read_text()}\n````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the linked files and folders of the repository."""
    for path in sorted(linked_files()):
        target = site_path(path)
        if not target.endswith(".md"):
            files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
        else:
            files.append(File.generated(config, target, content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that leave the documentation's folder into links within the site."""
    source = page.file.src_uri
    if source.startswith("source/"):
        return markdown

    def rewrite(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        path = repository_path(link, posixpath.join("docs", posixpath.dirname(source)))
        return posixpath.relpath(site_path(path), posixpath.dirname(source) or ".") + anchor

    return LINK.sub(rewrite, markdown)
