"""Fetches PASCAL VOC or COCO: resumes what was interrupted, verifies checksums, unpacks."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.voc import DATASET_YEAR_DICT
from tqdm import tqdm

from detector.program import run_program


class Archive(NamedTuple):
    """A file to fetch and unpack."""

    url: str
    md5: str


COCO = "http://images.cocodataset.org"
ARCHIVES = {
    "voc": [
        Archive(DATASET_YEAR_DICT[year]["url"], DATASET_YEAR_DICT[year]["md5"])
        for year in ("2007", "2007-test", "2012")
    ],
    "coco": [
        Archive(f"{COCO}/annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c"),
        Archive(f"{COCO}/zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80"),
        Archive(f"{COCO}/zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2"),
    ],
}
DATA_FOLDER = {"voc": "VOCdevkit", "coco": "."}
"""Where the data set lies once unpacked: what `detector.train --data` takes, below --to."""

CHUNK = 1 << 20


def fetch(archive: Archive, folder: Path, attempts: int = 5, pause: float = 2.0) -> Path:
    """Downloads an archive unless it is there, going on where an earlier attempt, or call, stopped.

    Args:
        archive: what to fetch.
        folder: where to; the unfinished file has the suffix .part there.
        attempts: tries in a row that bring nothing new before giving up.
        pause: seconds before another try, doubled each time.

    Returns:
        The path of the verified file.

    Raises:
        OSError: the server cannot be reached or refuses; the message says what was fetched so far.
        ValueError: the checksum is wrong; the file is deleted.
    """
    name = archive.url.rsplit("/", 1)[1]
    path, part = folder / name, folder / f"{name}.part"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        failures, wait = 0, pause
        while True:
            before = part.stat().st_size if part.is_file() else 0
            try:
                if fetch_rest(archive.url, part):
                    break
                problem: Exception = OSError("the connection was closed early")
            except urllib.error.HTTPError as error:
                if error.code not in (408, 429) and error.code < 500:
                    raise OSError(f"{archive.url}: the server answers {error.code} {error.reason}") from error
                problem = error
            except (OSError, http.client.HTTPException) as error:
                problem = error
            fetched = part.stat().st_size if part.is_file() else 0
            failures, wait = (failures + 1, wait * 2) if fetched <= before else (1, pause)
            if failures >= attempts:
                raise OSError(
                    f"{archive.url}: gave up after {attempts} tries: {problem}. {fetched} bytes are kept in {part}; "
                    "the same command goes on from there"
                ) from problem
            print(f"{name}: {problem}; going on at {fetched} bytes in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
        part.replace(path)
    digest = hashlib.md5(usedforsecurity=False)
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=f"verifying {name}", unit="B", unit_scale=True, leave=False) as bar,
    ):
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != archive.md5:
        path.unlink()
        raise ValueError(
            f"{name}: its MD5 is {digest.hexdigest()}, not {archive.md5}; it was deleted, run the command again. "
            f"It had {size} bytes."
        )
    return path


def fetch_rest(url: str, part: Path) -> bool:
    """One request for what part lacks; whether the file is whole now."""
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing lies beyond what is here
            return True
        raise
    with response:
        # A server that does not know ranges sends everything again.
        mode = "ab" if response.status == 206 else "wb"
        start = start if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        name = url.rsplit("/", 1)[1]
        with part.open(mode) as file, tqdm(desc=name, initial=start, total=total, unit="B", unit_scale=True) as bar:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or part.stat().st_size >= total


def unpack(path: Path, folder: Path) -> None:
    """Extracts a .tar or .zip archive; members that would land outside the folder are refused."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in tqdm(archive.infolist(), f"unpacking {path.name}", unit="file", leave=False):
                archive.extract(member, folder)  # drops "..", and checks the member's CRC
    else:
        with tarfile.open(path) as tar:
            for entry in tqdm(tar, f"unpacking {path.name}", unit="file", leave=False):
                target = (folder / entry.name).resolve()
                # tarfile's own filters came with Python 3.11.4; these archives hold nothing but files and folders.
                if not target.is_relative_to(folder.resolve()) or not (entry.isfile() or entry.isdir()):
                    raise ValueError(f"{path}: refusing to unpack {entry.name!r}: not a file or folder inside {folder}")
                if entry.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(entry)
                assert source is not None  # it is a file
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)


def download(archives: list[Archive], folder: Path, keep_archives: bool = False) -> None:
    """Fetches and unpacks archives; those a call before this one finished are left alone."""
    for archive in archives:
        name = archive.url.rsplit("/", 1)[1]
        done = folder / f".{name}.unpacked"
        if done.is_file():
            print(f"{name}: there already")
            continue
        path = fetch(archive, folder)
        unpack(path, folder)
        done.touch()
        if not keep_archives:
            path.unlink()
        print(f"{name}: unpacked")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m detector.download",
        description="Fetches, verifies and unpacks PASCAL VOC 2007 and 2012, or COCO 2017.",
    )
    parser.add_argument(
        "dataset", choices=sorted(ARCHIVES), help="voc: 2.8 GB; coco: 20 GB (and as much again to unpack)"
    )
    parser.add_argument("--to", type=Path, required=True, help="folder to unpack in")
    parser.add_argument("--mirror", help="fetch the files by their names from this URL instead of the official servers")
    parser.add_argument("--keep-archives", action="store_true", help="do not delete the archives once unpacked")
    args = parser.parse_args(argv)
    archives = ARCHIVES[args.dataset]
    if args.mirror:
        archives = [Archive(f"{args.mirror.rstrip('/')}/{url.rsplit('/', 1)[1]}", md5) for url, md5 in archives]
    download(archives, args.to, args.keep_archives)
    print(f"ready: python -m detector.train --data {args.to / DATA_FOLDER[args.dataset]} --format {args.dataset}")


if __name__ == "__main__":
    run_program(main)
