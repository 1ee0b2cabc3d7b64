"""Downloads that break off, and archives that mean harm."""

import errno
import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nim4.config import RecipeError
from nim4.corpus import download
from nim4.corpus.download import fetch, unpack, unpacked_archives
from nim4.stage import read_json

CONTENT = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT. `server.plan` holds what to do at each request, then everything is served: int = break off after so many bytes
    of the answer, "ignore" = send all of it whatever the Range, "busy" = 503, "gone" = 404."""

    def do_GET(self):
        asked = self.headers.get("Range", "")
        self.server.asked.append(asked)
        what = self.server.plan.pop(0) if self.server.plan else None
        if what in ("busy", "gone"):
            self.send_error(503 if what == "busy" else 404)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and what != "ignore" else 0
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:what] if isinstance(what, int) else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.plan, server.asked = [], []
    server.url = f"http://127.0.0.1:{server.server_port}/corpus.tgz"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_broken_connection_is_resumed(server, tmp_path):
    server.plan = [300_000, 200_000]
    assert fetch(server.url, tmp_path / "a.tgz", sha256=SHA256, size=len(CONTENT), wait_s=0.01) == SHA256
    assert (tmp_path / "a.tgz").read_bytes() == CONTENT
    assert server.asked == ["", "bytes=300000-", "bytes=500000-"]
    assert not (tmp_path / "a.tgz.part").exists()


def test_a_part_of_an_earlier_run_is_kept(server, tmp_path):
    (tmp_path / "a.tgz.part").write_bytes(CONTENT[:1000])
    fetch(server.url, tmp_path / "a.tgz", sha256=SHA256)
    assert server.asked == ["bytes=1000-"]


@pytest.mark.parametrize("checks", [{}, {"size": len(CONTENT)}])
def test_a_whole_part_is_not_sent_for_again(server, tmp_path, checks):
    (tmp_path / "a.tgz.part").write_bytes(CONTENT)
    assert fetch(server.url, tmp_path / "a.tgz", **checks) == SHA256
    assert server.asked == ([] if checks else [f"bytes={len(CONTENT)}-"])


def test_a_part_longer_than_the_file_is_replaced(server, tmp_path):
    (tmp_path / "a.tgz.part").write_bytes(CONTENT + b"more")
    assert fetch(server.url, tmp_path / "a.tgz", wait_s=0.01) == SHA256


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.plan = [1000, "ignore"]
    assert fetch(server.url, tmp_path / "a.tgz", wait_s=0.01) == SHA256


def test_what_is_there_is_checked_and_not_sent_for(server, tmp_path):
    (tmp_path / "a.tgz").write_bytes(CONTENT)
    assert fetch(server.url, tmp_path / "a.tgz", md5=hashlib.md5(CONTENT).hexdigest().upper()) == SHA256
    assert server.asked == []
    with pytest.raises(RecipeError, match=r"expected size 7.*delete"):
        fetch(server.url, tmp_path / "a.tgz", size=7)
    assert (tmp_path / "a.tgz").exists(), "a file of the user's is never removed"


@pytest.mark.parametrize("check", [{"sha256": "0" * 64}, {"md5": "0" * 32}, {"size": 5}])
def test_a_wrong_checksum_leaves_nothing(server, tmp_path, check):
    with pytest.raises(RecipeError, match=f"expected {next(iter(check))} "):
        fetch(server.url, tmp_path / "a.tgz", **check)
    assert list(tmp_path.iterdir()) == []


def test_a_busy_server_is_asked_again_and_at_last_given_up(server, tmp_path):
    server.plan = ["busy", 0, "busy"]
    assert fetch(server.url, tmp_path / "a.tgz", wait_s=0.01) == SHA256
    server.plan = ["busy"] * 3
    with pytest.raises(RecipeError, match=r"503.*after 3 tries.*goes on where it stopped"):
        fetch(server.url, tmp_path / "b.tgz", attempts=3, wait_s=0.01)
    assert len(server.asked) == 4 + 3


def test_tries_count_only_while_nothing_comes(server, tmp_path):
    server.plan = [1000] * 5
    assert fetch(server.url, tmp_path / "a.tgz", attempts=2, wait_s=0.001) == SHA256


def test_a_file_that_is_gone_ends_at_once(server, tmp_path):
    server.plan = ["gone"]
    with pytest.raises(RecipeError, match="HTTP 404"):
        fetch(server.url, tmp_path / "a.tgz")
    assert len(server.asked) == 1


def test_no_server(tmp_path):
    with pytest.raises(RecipeError, match="check the network"):
        fetch("http://127.0.0.1:9/a.tgz", tmp_path / "a.tgz", attempts=2, wait_s=0.001)
    with pytest.raises(RecipeError, match="http or https"):
        fetch("file:///etc/hostname", tmp_path / "a.tgz")


def test_too_small_a_disk_is_told_before_it_fills(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(RecipeError, match="of room"):
        fetch(server.url, tmp_path / "a.tgz")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------------- unpacking


def make_tar(path, members, mode="w:gz"):
    """A tar of (name, content) or (TarInfo) members."""
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_unpacks_and_leaves_a_marker(tmp_path):
    archive = make_tar(tmp_path / "a.tgz", [special("data", tarfile.DIRTYPE), ("data/x/a.wav", b"12345"), ("data/README", b"a")])
    unpack(archive, tmp_path / "out", sha256="abc")
    assert (tmp_path / "out" / "data" / "x" / "a.wav").read_bytes() == b"12345"
    assert unpacked_archives(tmp_path / "out") == [
        {"archive": "a.tgz", "bytes": archive.stat().st_size, "sha256": "abc", "files": 2, "unpacked_bytes": 6}
    ]
    archive.unlink()
    unpack(archive, tmp_path / "out")  # marked as done: the archive is no longer needed


def test_archives_share_folders(tmp_path):
    for name in ("dev", "test"):
        unpack(make_tar(tmp_path / f"{name}.tar", [(f"Libri/{name}/1.flac", name.encode()), ("Libri/README", name.encode())], "w"), tmp_path / "out")
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out" / "Libri").rglob("*") if path.is_file())
    assert found == ["Libri/README", "Libri/dev/1.flac", "Libri/test/1.flac"]


HARMFUL = {
    "absolute": ("/etc/evil", b"x"),
    "parent": ("data/../../evil", b"x"),
    "backslash": ("..\\evil", b"x"),
    "drive": ("C:evil", b"x"),
    "symlink": special("data/link", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": special("data/link", tarfile.LNKTYPE, "data/a"),
    "device": special("data/device", tarfile.CHRTYPE),
    "fifo": special("data/fifo", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_a_harmful_member_stops_everything(tmp_path, kind):
    archive = make_tar(tmp_path / "a.tgz", [("data/a", b"good"), HARMFUL[kind]])
    with pytest.raises(RecipeError, match="do not unpack it"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tgz", "out"]


def test_a_bomb_is_stopped(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "a.tgz", [("zeros", bytes(3_000_000))])
    with pytest.raises(RecipeError, match="decompression bomb"):
        unpack(archive, tmp_path / "out", max_bytes=2_000_000)
    monkeypatch.setattr(download, "ALWAYS_ALLOWED_BYTES", 1000)
    with pytest.raises(RecipeError, match="decompression bomb"):
        unpack(archive, tmp_path / "out")
    monkeypatch.setattr(download, "MAX_FILES", 3)
    with pytest.raises(RecipeError, match="at most 3 files"):
        unpack(make_tar(tmp_path / "b.tgz", [(f"{number}", b"") for number in range(4)]), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("cut", [10, 3000, -20])
def test_a_broken_archive_leaves_nothing(tmp_path, cut):
    noise = hashlib.sha256(b"0").digest() + b"".join(hashlib.sha256(bytes([number % 256, number // 256])).digest() for number in range(300))
    archive = make_tar(tmp_path / "a.tgz", [("data/a", noise), ("data/b", noise[::-1])])
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(RecipeError, match="whole tar archive"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_archive_at_all(tmp_path):
    with pytest.raises(RecipeError, match="--download true"):
        unpack(tmp_path / "a.tgz", tmp_path / "out")
    (tmp_path / "a.tgz").write_text("<html>not here</html>")
    with pytest.raises(RecipeError, match="whole tar archive"):
        unpack(tmp_path / "a.tgz", tmp_path / "out")


def test_what_a_killed_run_left_is_replaced(tmp_path):
    (tmp_path / "out" / ".a.tgz.tmp").mkdir(parents=True)
    (tmp_path / "out" / ".a.tgz.tmp" / "half").write_text("")
    unpack(make_tar(tmp_path / "a.tgz", [("data/a", b"good")]), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".unpacked", "data"]
    assert read_json(tmp_path / "out" / ".unpacked" / "a.tgz.json")["files"] == 1


def test_a_full_disk_is_not_taken_for_a_broken_archive(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_extract_all", full)
    with pytest.raises(OSError, match="No space left"):
        unpack(make_tar(tmp_path / "a.tgz", [("data/a", b"good")]), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
