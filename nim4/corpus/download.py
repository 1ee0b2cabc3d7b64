"""Fetching a corpus and unpacking it: resumed after a broken connection, checked, and safe against a hostile archive.

Standard library only. A recipe's `download(target)` is usually two lines per archive: `fetch`, then `unpack`.
"""

import hashlib
import http.client
import logging
import lzma
import os
import re
import shutil
import ssl
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from nim4.config import RecipeError
from nim4.corpus.progress import Progress
from nim4.stage import read_json, write_json

log = logging.getLogger("nim4")

BLOCK_BYTES = 1 << 20
MARKERS = ".unpacked"  # folder beside the data with one JSON file per archive that was unpacked to its end
MAX_RATIO = 20  # ours: speech grows 1 to 3 times when it is unpacked
ALWAYS_ALLOWED_BYTES = 1 << 30
MAX_FILES = 5_000_000
_DRIVE = re.compile("[A-Za-z]:")  # of Windows; elsewhere a colon is part of a name, as in times of day
NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


class _Interrupted(Exception):
    """The transfer ended early in a way that another attempt may mend."""


def fetch(
    url: str,
    target: Path,
    *,
    sha256: str | None = None,
    md5: str | None = None,
    size: int | None = None,
    attempts: int = 6,
    wait_s: float = 2.0,
    timeout_s: float = 60.0,
) -> str:
    """Downloads a file, going on from what an earlier try left in `TARGET.part`.

    Args:
        url: http or https.
        target: the file to make; if it is there and fits the checksums, nothing is sent for.
        sha256, md5, size: published values to check; give what is known for certain.
        attempts: tries in a row without a single new byte.
        wait_s: pause before the second of them, doubled each time, at most 60 s.
        timeout_s: silence after which a connection counts as broken.
    Returns:
        the file's SHA-256, for the report.
    Raises:
        RecipeError: if the server refuses, all tries fail, the disk is too small, or the content is not what was published.
    """
    target = Path(target)
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise RecipeError(url, expected="an http or https address", found="another kind", fix="correct the address in prepare.py")
    if target.exists():
        log.info("%s: already there, checking it", target)
        return _verify(target, target, sha256, md5, size, f"delete {target} and run the same command again")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _receive(url, part, size, timeout_s)
            break
        except (_Interrupted, *NETWORK_ERRORS) as error:
            grown = part.exists() and part.stat().st_size > before
            failures = 1 if grown else failures + 1
            if failures >= attempts:
                fix = "check the network, then run the same command again: it goes on where it stopped"
                raise RecipeError(url, expected="a whole file", found=f"{error} after {failures} tries", fix=fix) from error
            pause_s = min(wait_s * 2 ** (failures - 1), 60.0)
            log.warning("%s: %s; trying again in %.0f s", url, error, pause_s)
            time.sleep(pause_s)
    digest = _verify(part, target, sha256, md5, size, "run the same command again; if it persists, the published file has changed")
    os.replace(part, target)
    log.info("%s: fetched, sha256 %s", target, digest)
    return digest


def _receive(url: str, part: Path, size: int | None, timeout_s: float) -> None:
    """One connection: appends to `part` what it lacks. Raises _Interrupted or a network error when that is not all."""
    start = part.stat().st_size if part.exists() else 0
    if size is not None and start == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            _refused(error, url, part, start)
        return
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise _Interrupted(f"asked for bytes from {start}, got {response.headers.get('Content-Range')}")
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else 0
        _check_room(part, total - start)
        progress = Progress(f"downloading {part.name.removesuffix('.part')}", total / 1e6, "MB", before=start / 1e6)
        with open(part, "ab" if resumed else "wb") as file:
            while block := response.read(BLOCK_BYTES):
                file.write(block)
                progress.add(len(block) / 1e6)
    received = part.stat().st_size
    if total and received < total:
        raise _Interrupted(f"the connection broke after {received} of {total} bytes")


def _refused(error: urllib.error.HTTPError, url: str, part: Path, start: int) -> None:
    """Decides what an HTTP error means: done, try again, or the user's business."""
    if error.code == 416 and start:
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(start):
            return
        part.unlink()
        raise _Interrupted(f"{part.name} did not belong to this file and was removed")
    if error.code in (408, 429) or error.code >= 500:
        raise _Interrupted(f"the server answered {error.code} {error.reason}")
    raise RecipeError(
        url, expected="the file", found=f"HTTP {error.code} {error.reason}", fix="fetch it by hand into --source, or correct the address"
    )


def _check_room(path: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed_bytes > free:
        found = f"{free / 1e9:.1f} GB free"
        raise RecipeError(path.parent, expected=f"{needed_bytes / 1e9:.1f} GB of room", found=found, fix="free some space, or give another --source")


def _verify(path: Path, name: Path, sha256: str | None, md5: str | None, size: int | None, fix: str) -> str:
    """The SHA-256 of `path`. Raises RecipeError on a mismatch, and removes `path` if it is only a `.part`."""
    digests = {"sha256": hashlib.sha256(), "md5": hashlib.md5(usedforsecurity=False)}
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            for digest in digests.values():
                digest.update(block)
    found = {name: digest.hexdigest() for name, digest in digests.items()} | {"size": str(path.stat().st_size)}
    for kind, published in (("size", size), ("sha256", sha256), ("md5", md5)):
        if published is not None and str(published).lower() != found[kind]:
            if path != name:
                path.unlink()
            raise RecipeError(name, expected=f"{kind} {published}", found=found[kind], fix=fix)
    return found["sha256"]


# --------------------------------------------------------------------------------------------------------------- unpacking


def unpack(archive: Path, target: Path, *, sha256: str = "", max_bytes: int | None = None) -> None:
    """Unpacks a tar archive (plain or compressed) into a folder; nothing of it shows there until all of it is unpacked.

    A marker in `TARGET/.unpacked/` records the archive; with it, the archive is skipped.

    Args:
        archive: the tar file.
        target: the folder; files of other archives in it stay.
        sha256: the archive's, for the marker.
        max_bytes: limit on the unpacked size; default: 20 times the archive, at least 1 GiB.
    Raises:
        RecipeError: if the archive is broken, too large when unpacked, or holds an absolute path, a `..`, a link or a device.
    """
    archive, target = Path(archive), Path(target)
    marker = target / MARKERS / f"{archive.name}.json"
    if marker.exists():
        log.info("%s: unpacked before", archive)
        return
    if not archive.is_file():
        raise RecipeError(archive, expected="an archive", found="no such file", fix="run with --download true")
    limit = max(MAX_RATIO * archive.stat().st_size, ALWAYS_ALLOWED_BYTES) if max_bytes is None else max_bytes
    work = target / f".{archive.name}.tmp"
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    try:
        num_files, num_bytes = _extract_all(archive, work, limit)
        _move_into(work, target)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, tarfile.TarError) and error.errno is not None:
            raise  # the disk, not the archive
        raise RecipeError(archive, expected="a whole tar archive", found=repr(error), fix=f"delete {archive} and fetch it again") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_json(marker, {"archive": archive.name, "bytes": archive.stat().st_size, "sha256": sha256, "files": num_files, "unpacked_bytes": num_bytes})
    log.info("%s: unpacked %d files, %.1f MB", archive, num_files, num_bytes / 1e6)


def unpacked_archives(target: Path) -> list[dict[str, object]]:
    """The markers of a folder, sorted by archive name."""
    return [read_json(path) for path in sorted((Path(target) / MARKERS).glob("*.json"))]


def _extract_all(archive: Path, work: Path, limit: int) -> tuple[int, int]:
    """Writes the regular files of an archive below `work`; number of files and bytes."""
    num_files = num_bytes = 0
    progress = Progress(f"unpacking {archive.name}", 0, "MB")
    with tarfile.open(archive, "r:*") as tar:
        for member in _safe_members(tar, archive, work):
            path = work.joinpath(*PurePosixPath(member.name).parts)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            num_files += 1
            if num_files > MAX_FILES:
                raise RecipeError(archive, expected=f"at most {MAX_FILES} files", found="more", fix="do not unpack it; find out what it is")
            path.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None, member.name  # regular files only
            with source, open(path, "wb") as file:
                for block in _blocks(source):
                    num_bytes += len(block)
                    if num_bytes > limit:
                        found = "more (a decompression bomb?)"
                        raise RecipeError(
                            archive, expected=f"at most {limit} bytes unpacked", found=found, fix="do not unpack it; find out what it is"
                        )
                    file.write(block)
                    progress.add(len(block) / 1e6)
        assert tar.fileobj is not None, archive
        for _ in _blocks(tar.fileobj):  # only at the very end does the decompressor compare its checksum
            pass
    return num_files, num_bytes


def _blocks(source: IO[bytes]) -> Iterator[bytes]:
    while block := source.read(BLOCK_BYTES):
        yield block


def _safe_members(tar: tarfile.TarFile, archive: Path, work: Path) -> Iterator[tarfile.TarInfo]:
    """Regular files and folders that lie below the target; anything else is an error, since no corpus needs it."""
    data_filter = getattr(tarfile, "data_filter", None)  # Python's own check of the same; 3.11.4 and later have it
    for member in tar:
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name or _DRIVE.match(str(name)):
            raise RecipeError(f"{archive}: {member.name!r}", expected="a path below the target", found="one that leaves it", fix="do not unpack it")
        if not (member.isreg() or member.isdir()):
            raise RecipeError(f"{archive}: {member.name!r}", expected="files and folders", found="a link or a device", fix="do not unpack it")
        if data_filter is not None:
            data_filter(member, str(work))
        yield member


def _move_into(source: Path, target: Path) -> None:
    """Moves what is in `source` into `target`, joining folders that are in both."""
    for entry in sorted(source.iterdir()):
        destination = target / entry.name
        if entry.is_dir() and destination.is_dir():
            _move_into(entry, destination)
        else:
            shutil.move(entry, destination)  # a rename, also where the user has linked a folder to another disk
