"""The file of a hotword index: named arrays behind a header, mapped into memory, with nothing in it that could run.

    8 bytes  b"NIM4HOT1", the last one being the version
    8 bytes  little-endian: length of the header; 4 bytes: its CRC-32
    header   JSON: {"meta": ..., "arrays": [[name, dtype, length, offset, checksum], ...], "size": bytes of the file}
    arrays   little-endian, one-dimensional, each at a multiple of 64 bytes

Checksums are compared when a file is opened: of every 64 KiB the sum of its 64-bit words, and the CRC-32 of these sums, which takes a tenth
of the time that reading does. The pages touched by it are then given back, so that only those that searches use stay in memory.
"""

import json
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nim4.config import RecipeError
from nim4.stage import atomic_write

MAGIC = b"NIM4HOT1"
ALIGNMENT = 64
BLOCK_BYTES = 1 << 16
DTYPES = ("|u1", "<u2", "<u4", "<f4")
REBUILD = "build it again from the word list: python -m nim4 hotwords build"


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Writes the file under a temporary name and renames it when it is whole; who has the old one open keeps it."""
    listed, offset = [], 0
    for name, array in arrays.items():
        if array.dtype.str not in DTYPES or array.ndim != 1:
            raise ValueError(f"{name} must be one-dimensional, of one of {DTYPES}, but is {array.dtype.str} {array.shape}")
        offset = -(-offset // ALIGNMENT) * ALIGNMENT
        listed.append([name, array.dtype.str, len(array), offset, checksum(np.ascontiguousarray(array).view(np.uint8))])
        offset += array.nbytes
    header = json.dumps({"meta": meta, "arrays": listed, "size": offset}, ensure_ascii=False).encode()
    start = _data_start(len(header))
    with atomic_write(path, "wb") as file:
        file.write(MAGIC + len(header).to_bytes(8, "little") + zlib.crc32(header).to_bytes(4, "little") + header)
        for (_, _, _, offset, _), array in zip(listed, arrays.values(), strict=True):
            file.write(b"\0" * (start + offset - file.tell()))
            file.write(np.ascontiguousarray(array).data)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays, mapped read-only, and the meta data.

    Raises:
        RecipeError: if the file is missing, of another kind or version, shorter or longer than it says, or damaged.
    """
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise RecipeError(path, expected="a hotword index", found=error, fix=REBUILD) from error
    header, start = _read_header(path, mapped)
    if len(mapped) != start + header["size"]:
        raise RecipeError(path, expected=f"{start + header['size']} bytes", found=f"{len(mapped)}: it was cut off or added to", fix=REBUILD)
    content = np.frombuffer(mapped, np.uint8)
    arrays = {}
    for name, dtype, length, offset, expected in header["arrays"]:
        raw = content[start + offset : start + offset + length * np.dtype(dtype).itemsize]
        if checksum(raw) != expected:
            raise RecipeError(f"{path}, {name}", expected="the content that was written", found="another checksum: it is damaged", fix=REBUILD)
        arrays[name] = raw.view(dtype)
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)
    return arrays, header["meta"]


def checksum(raw: np.ndarray) -> int:
    """Of (N,) uint8; 32 bits."""
    whole = len(raw) // BLOCK_BYTES * BLOCK_BYTES
    sums = raw[:whole].view(np.uint64).reshape(-1, BLOCK_BYTES // 8).sum(axis=1, dtype=np.uint64) if whole else np.zeros(0, np.uint64)
    return zlib.crc32(raw[whole:].data, zlib.crc32(sums.data))


def _data_start(header_length: int) -> int:
    return -(-(len(MAGIC) + 12 + header_length) // ALIGNMENT) * ALIGNMENT


def _read_header(path: Path, mapped: mmap.mmap) -> tuple[dict[str, Any], int]:
    magic, length = mapped[: len(MAGIC)], int.from_bytes(mapped[len(MAGIC) : len(MAGIC) + 8], "little")
    if magic[:-1] != MAGIC[:-1]:
        raise RecipeError(path, expected="a hotword index", found="another kind of file", fix=REBUILD)
    if magic != MAGIC:
        raise RecipeError(path, expected=f"version {MAGIC[-1:].decode()}", found=f"version {magic[-1:]!r}", fix=REBUILD)
    raw = mapped[len(MAGIC) + 12 : len(MAGIC) + 12 + length] if length < len(mapped) else b""
    if len(raw) != length or zlib.crc32(raw) != int.from_bytes(mapped[len(MAGIC) + 8 : len(MAGIC) + 12], "little"):
        raise RecipeError(path, expected="a whole header", found="one that is damaged or cut off", fix=REBUILD)
    try:
        header = json.loads(raw)
        good = isinstance(header["meta"], dict) and header["size"] >= 0
        for name, dtype, count, offset, _ in header["arrays"]:
            good = good and isinstance(name, str) and dtype in DTYPES and count >= 0 and offset >= 0 and offset % ALIGNMENT == 0
            good = good and offset + count * np.dtype(dtype).itemsize <= header["size"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(path, expected="the header of a hotword index", found=repr(error), fix=REBUILD) from error
    if not good:
        raise RecipeError(path, expected="the header of a hotword index", found="arrays that lie outside the file", fix=REBUILD)
    return header, _data_start(length)
