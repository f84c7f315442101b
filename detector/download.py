"""Fetches PASCAL VOC or COCO: resumes what was interrupted, verifies checksums, unpacks."""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import requests
from torchvision.datasets.utils import check_integrity
from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

from detector.program import run_program


class Archive(NamedTuple):
    """A file to fetch and unpack."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        """Of the file."""
        return self.url.rsplit("/", 1)[1]


COCO = "http://images.cocodataset.org"
VOC_YEARS = [DATASET_YEAR_DICT[year] for year in ("2007", "2007-test", "2012")]
ARCHIVES = {
    "voc": [Archive(year["url"], year["md5"]) for year in VOC_YEARS],
    "coco": [
        Archive(f"{COCO}/annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c"),
        Archive(f"{COCO}/zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80"),
        Archive(f"{COCO}/zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2"),
    ],
}
DATA_FOLDER = {"voc": "VOCdevkit", "coco": "."}
"""Where the data set lies once unpacked: what `detector.train --data` takes, below --to."""


def fetch(archive: Archive, folder: Path, attempts: int = 5, pause: float = 2.0) -> Path:
    """Downloads an archive unless it is there, going on where an earlier attempt, or call, stopped.

    Args:
        archive: what to fetch.
        folder: where to; the unfinished file has the suffix .part there.
        attempts: tries in a row that bring nothing new before giving up.
        pause: seconds before another try, doubled each time.

    Raises:
        OSError: the server cannot be reached or refuses; the message says what was fetched so far.
        ValueError: the checksum is wrong; the file is deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / archive.name, folder / f"{archive.name}.part"
    failures = 0
    while not path.is_file():
        part.touch()
        before = part.stat().st_size
        try:
            fetch_rest(archive, part)
            part.replace(path)
        except OSError as problem:  # requests' errors are, too
            response = getattr(problem, "response", None)
            if response is not None and response.status_code < 500 and response.status_code not in (408, 429):
                raise OSError(f"{archive.url}: the server answers {response.status_code} {response.reason}") from None
            fetched = part.stat().st_size
            failures = failures + 1 if fetched <= before else 1
            if failures >= attempts:
                raise OSError(
                    f"{archive.url}: gave up after {attempts} tries: {problem}. {fetched} bytes are kept in {part}; "
                    "the same command goes on from there"
                ) from problem
            print(f"{archive.name}: {problem}; going on at {fetched} bytes", file=sys.stderr)
            time.sleep(pause * 2 ** (failures - 1))
    if not check_integrity(str(path), archive.md5):
        path.unlink()
        raise ValueError(f"{path}: its MD5 is not {archive.md5}; it was deleted, run the command again")
    return path


def fetch_rest(archive: Archive, part: Path) -> None:
    """One request for what part lacks."""
    start = part.stat().st_size
    headers = {"Range": f"bytes={start}-"} if start else {}
    with requests.get(archive.url, headers=headers, stream=True, timeout=60) as response:
        if response.status_code == 416:  # nothing lies beyond what is here
            return
        response.raise_for_status()
        # A server that does not know ranges sends everything again.
        mode, start = ("ab", start) if response.status_code == 206 else ("wb", 0)
        total = start + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        response.raw.enforce_content_length = False  # it would drop what came last before the connection broke
        bar = tqdm(desc=archive.name, initial=start, total=total, unit="B", unit_scale=True, disable=None)
        with part.open(mode) as file, bar:
            for chunk in response.iter_content(1 << 20):
                bar.update(file.write(chunk))
        if total is not None and part.stat().st_size < total:
            raise OSError("the connection was closed early")


def download(archives: list[Archive], folder: Path, keep_archives: bool = False) -> None:
    """Fetches and unpacks archives; those a call before this one finished are left alone."""
    for archive in archives:
        done = folder / f".{archive.name}.unpacked"
        if done.is_file():
            print(f"{archive.name}: there already")
            continue
        path = fetch(archive, folder)
        print(f"{archive.name}: unpacking")
        try:  # zipfile drops ".." and checks every file; tarfile does so with this filter
            shutil.unpack_archive(path, folder, filter="data" if path.suffix == ".tar" else None)
        except tarfile.FilterError as error:
            raise ValueError(f"{path}: refusing to unpack {error.tarinfo.name!r}: {error}") from None
        done.touch()
        if not keep_archives:
            path.unlink()


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m detector.download",
        description="Fetches, verifies and unpacks PASCAL VOC 2007 and 2012, or COCO 2017.",
    )
    sizes = "voc: 2.8 GB; coco: 20 GB (and as much again to unpack)"
    parser.add_argument("dataset", choices=sorted(ARCHIVES), help=sizes)
    parser.add_argument("--to", type=Path, required=True, help="folder to unpack in")
    parser.add_argument("--mirror", help="fetch the files by their names from this URL instead of the official servers")
    parser.add_argument("--keep-archives", action="store_true", help="do not delete the archives once unpacked")
    args = parser.parse_args(argv)
    archives = ARCHIVES[args.dataset]
    if args.mirror:
        archives = [archive._replace(url=f"{args.mirror.rstrip('/')}/{archive.name}") for archive in archives]
    download(archives, args.to, args.keep_archives)
    print(f"ready: python -m detector.train --data {args.to / DATA_FOLDER[args.dataset]} --format {args.dataset}")


if __name__ == "__main__":
    run_program(main)
