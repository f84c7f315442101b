"""Downloads go on where they stopped, are verified, and unpack once; a local server misbehaves on request."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("requests")

from detector import download
from detector.download import Archive, fetch


class Server(ThreadingHTTPServer):
    """Serves `files`; closes the first `drops` connections after half of what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.drops = 0
        self.knows_ranges = True
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, asked = self.path[1:], self.headers.get("Range")
        self.server.requests.append((name, asked))
        if name not in self.server.files:
            self.send_error(404)
            return
        content, start = self.server.files[name], 0
        if asked and self.server.knows_ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.drops > 0:
            self.server.drops -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))  # seconds between looks for the end
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def zipped(files: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return memory.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return memory.getvalue()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


PAYLOAD = bytes(range(256)) * 4000


def test_archives_are_unpacked_once(server: Server, tmp_path: Path) -> None:
    server.files = {"a.zip": zipped({"annotations/a.json": b"{}"}), "b.tar": tarred({"VOCdevkit/VOC2007/b.txt": b"b"})}
    archives = [Archive(f"{server.url}/{name}", md5(content)) for name, content in server.files.items()]
    for _ in range(2):
        download.download(archives, tmp_path)
    assert [name for name, _ in server.requests] == ["a.zip", "b.tar"]
    assert (tmp_path / "annotations" / "a.json").read_bytes() == b"{}"
    assert (tmp_path / "VOCdevkit" / "VOC2007" / "b.txt").read_bytes() == b"b"
    assert not (tmp_path / "a.zip").exists()


def test_a_dropped_connection_is_resumed_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.files, server.drops = {"data.bin": PAYLOAD}, 2
    path = fetch(Archive(f"{server.url}/data.bin", md5(PAYLOAD)), tmp_path, pause=0.01)
    assert path.read_bytes() == PAYLOAD
    half = len(PAYLOAD) // 2
    assert server.requests == [
        ("data.bin", None),
        ("data.bin", f"bytes={half}-"),
        ("data.bin", f"bytes={half + half // 2}-"),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["data.bin"]


@pytest.mark.parametrize("count", [1000, len(PAYLOAD)])
def test_a_call_goes_on_from_what_an_earlier_one_left(server: Server, tmp_path: Path, count: int) -> None:
    server.files = {"data.bin": PAYLOAD}
    (tmp_path / "data.bin.part").write_bytes(PAYLOAD[:count])
    assert fetch(Archive(f"{server.url}/data.bin", md5(PAYLOAD)), tmp_path).read_bytes() == PAYLOAD
    assert server.requests == [("data.bin", f"bytes={count}-")]


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.files, server.drops, server.knows_ranges = {"data.bin": PAYLOAD}, 1, False
    assert fetch(Archive(f"{server.url}/data.bin", md5(PAYLOAD)), tmp_path, pause=0.01).read_bytes() == PAYLOAD


def test_a_server_that_keeps_dropping_is_given_up_and_nothing_fetched_is_lost(server: Server, tmp_path: Path) -> None:
    server.files, server.drops, server.knows_ranges = {"data.bin": PAYLOAD}, 10**6, False
    with pytest.raises(OSError, match=r"gave up after 3 tries.*are kept in .*data\.bin\.part"):
        fetch(Archive(f"{server.url}/data.bin", md5(PAYLOAD)), tmp_path, attempts=3, pause=0.01)
    assert (tmp_path / "data.bin.part").stat().st_size == len(PAYLOAD) // 2


def test_a_wrong_checksum_is_an_error_and_the_file_goes(server: Server, tmp_path: Path) -> None:
    server.files = {"data.bin": PAYLOAD[:-1] + b"!"}
    with pytest.raises(ValueError, match="MD5"):
        fetch(Archive(f"{server.url}/data.bin", md5(PAYLOAD)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_not_asked_for_twice(server: Server, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="404"):
        fetch(Archive(f"{server.url}/data.bin", "0"), tmp_path)
    assert len(server.requests) == 1


def test_an_archive_cannot_write_outside_its_folder(server: Server, tmp_path: Path) -> None:
    content = tarred({"../outside.txt": b"evil"})
    server.files = {"evil.tar": content}
    with pytest.raises(ValueError, match=r"refusing to unpack '../outside.txt'"):
        download.download([Archive(f"{server.url}/evil.tar", md5(content))], tmp_path / "in")
    assert not (tmp_path / "outside.txt").exists()


def test_the_command_line_takes_a_mirror(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = zipped({"val2017/1.jpg": b"image"})
    server.files = {"val2017.zip": content}
    monkeypatch.setitem(download.ARCHIVES, "coco", [Archive("http://elsewhere.invalid/zips/val2017.zip", md5(content))])
    download.main(["coco", "--to", str(tmp_path), "--mirror", f"{server.url}/"])
    assert (tmp_path / "val2017" / "1.jpg").read_bytes() == b"image"
    assert "detector.train" in capsys.readouterr().out
    monkeypatch.setitem(download.ARCHIVES, "coco", [Archive("http://elsewhere.invalid/absent.zip", "0")])
    with pytest.raises(OSError, match="404"):
        download.main(["coco", "--to", str(tmp_path), "--mirror", server.url])


def test_the_archives_are_the_official_ones() -> None:
    names = [archive.url.rsplit("/", 1)[1] for archives in download.ARCHIVES.values() for archive in archives]
    assert names == [
        "VOCtrainval_06-Nov-2007.tar",
        "VOCtest_06-Nov-2007.tar",
        "VOCtrainval_11-May-2012.tar",
        "annotations_trainval2017.zip",
        "val2017.zip",
        "train2017.zip",
    ]
    assert all(len(archive.md5) == 32 for archives in download.ARCHIVES.values() for archive in archives)
