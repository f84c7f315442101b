"""Checks a built site: every link and anchor leads somewhere, and nothing is fetched from the network to show a page.

    python docs/check_site.py build/site

MkDocs checks the links of the Markdown pages; this checks what became of them, with those of the API pages and the
theme. Links to other sites are checked for their form only.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

RESOURCES = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
"""What a browser fetches by itself."""


class Links(HTMLParser):
    """The targets a page offers and the links it has."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, bool]] = []
        """Each with whether the browser fetches it by itself."""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Collects ids, names and links."""
        for name, value in attributes:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif (tag, name) in RESOURCES or (tag, name) == ("a", "href"):
                self.links.append((value, tag != "a"))


def read_page(path: Path) -> Links:
    """The links of an HTML file."""
    links = Links()
    links.feed(path.read_text())
    return links


def link_problem(link: str, fetched: bool, page: Path, site: Path, pages: dict[Path, Links]) -> str:
    """What is wrong with a link of a page, or an empty string."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        if fetched and parts.scheme != "data":
            return "fetched from the network"
        well_formed = parts.scheme == "https" and "." in parts.netloc and not re.search(r"\s", link)
        return "" if well_formed or parts.scheme in ("mailto", "data") else "not a well-formed https link"
    path = unquote(parts.path)
    target = page if not path else (site / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve()
    if target.is_dir():
        target = target / "index.html"
    if not target.is_relative_to(site) or not target.is_file():
        return "no such file in the site"
    anchor = unquote(parts.fragment)

    if anchor and target in pages and anchor not in pages[target].anchors:
        return "no such anchor"
    return ""


def find_problems(site: Path) -> tuple[list[str], int, int]:
    """(what is wrong, how many pages, how many links) of a built site."""
    pages = {path: read_page(path) for path in sorted(site.rglob("*.html"))}
    problems, num_links = [], 0
    for path, page in pages.items():
        for link, fetched in page.links:
            num_links += 1
            problem = link_problem(link, fetched, path, site, pages)
            if problem:
                problems.append(f"{path.relative_to(site)}: {link}: {problem}")
    for path in sorted(site.rglob("*.css")):
        for link in re.findall(r"url\(\s*[\"']?(https?:[^\"')]+)", path.read_text()):
            problems.append(f"{path.relative_to(site)}: {link}: fetched from the network")
    return problems, len(pages), num_links


def main() -> int:
    """Prints what is wrong; 0 if nothing is."""
    if len(sys.argv) != 2 or not Path(sys.argv[1], "index.html").is_file():
        print("expected the folder of a built site: python docs/check_site.py build/site", file=sys.stderr)
        return 2
    site = Path(sys.argv[1]).resolve()
    problems, num_pages, num_links = find_problems(site)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{site}: {num_pages} pages, {num_links} links, {len(problems)} wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
