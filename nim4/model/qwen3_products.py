"""Matrix products of few tokens, for which libraries are made least: what Qwen3 does with a product is done where it is made, by Triton.

    one token      a product of vectors; its norm before, SiLU and the sum behind it are in the same kernel: five kernels a layer
    few tokens     on the matrix units; rows of narrow matrices are cut, so that all processors read, and who reads the parts adds them
    many tokens    the library's

Which tiles are good was tried on an H200 with matrices of Qwen3-1.7B. Sums are in float32, and products are rounded where transformers' Qwen3 rounds
them, but for the norm of one token, whose scale is applied behind the product. A kernel may start when the one before it has all its blocks running
(programmatic dependent launch, from Hopper on): what it needs of others it reads behind `wait`.
Letters: T tokens, K width of what is read, N of what comes of it, D of a hidden state, V vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

FEW = 64  # tokens, with which products are made here
EARLY = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)  # kernels start before those ahead of them have ended
LAUNCH = {"launch_pdl": True} if EARLY else {}


class Tiles(NamedTuple):
    """What one block of threads does at once: rows of the weight, so many columns at a time, of which so many stages are on their way."""

    rows: int
    columns: int
    warps: int
    stages: int

    def columns_of(self, weight: Tensor) -> int:
        """Of wider numbers fewer fit."""
        return self.columns * 2 // weight.element_size()


ONE = Tiles(8, 512, 4, 3)
ONE_CHOICE = Tiles(16, 512, 4, 3)
WHOLE = {16: Tiles(32, 256, 4, 4)}  # by tokens at most
PARTS = {16: Tiles(64, 128, 4, 5), FEW: Tiles(64, 128, 4, 4)}
NUM_PARTS = 4
GATED = {16: Tiles(32, 128, 4, 4), FEW: Tiles(64, 64, 4, 5)}
CHOICES = {16: Tiles(128, 128, 4, 3), FEW: Tiles(128, 64, 4, 3), 128: Tiles(256, 64, 8, 3)}


@triton.jit
def wait(EARLY: tl.constexpr):
    """Until what the kernels before have written is there; then the next one may come."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch(pointers):
    """Has what stands there brought to the cache while the kernels before still run; no result depends on it."""
    told: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(told, "=r,l", [pointers.to(tl.int64, bitcast=True)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _fetch_rows(weight, row, part, N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, AHEAD: tl.constexpr):
    """The first AHEAD columns of a part of some rows, a line of the cache, 64 numbers, at a time."""
    pointers = weight + tl.minimum(row, N - 1).to(tl.int64)[:, None] * K + part + tl.arange(0, AHEAD // 64)[None, :] * 64
    fetch(pointers)
    if GATED:
        fetch(pointers + N * K)


@triton.jit
def silu(gate, up, kind: tl.constexpr):
    """Gates, and what they let through, float32 -> float32; rounded to `kind` in between."""
    gate = gate.to(kind).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32) * up.to(kind).to(tl.float32)


@triton.jit
def _tile(pointers, rows, columns, FITS: tl.constexpr):
    """Numbers of a tile; beyond its (R,) and (C,) masks, which are not needed if it FITS, there are zeros."""
    return tl.load(pointers) if FITS else tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0.0)


@triton.jit
def _one(
    x,
    norm,
    weight,
    y,
    places,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    CHOOSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    FITS: tl.constexpr = N % ROWS == 0 and K % COLUMNS == 0
    kind: tl.constexpr = weight.dtype.element_ty
    tile = tl.program_id(0)
    row, k = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if AHEAD > 0:
        _fetch_rows(weight, row, 0, N, K, GATED, AHEAD)
    wait(EARLY)
    there = row < N
    rows = weight + row.to(tl.int64)[:, None] * K + k[None, :]
    own = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.range(0, K, COLUMNS, num_stages=STAGES):
        inside = start + k < K
        a = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += a * a
            a *= tl.load(norm + start + k, mask=inside, other=0.0).to(tl.float32)
        own += _tile(rows + start, there, inside, FITS).to(tl.float32) * a[None, :]
        if GATED:
            up += _tile(rows + N * K + start, there, inside, FITS).to(tl.float32) * a[None, :]
    out = tl.sum(own, 1)
    scale = tl.rsqrt(tl.sum(squares, 0) / K + eps) if NORM else 1.0
    out *= scale
    if GATED:
        out = silu(out, tl.sum(up, 1) * scale, kind)
    if CHOOSE:
        best, place = tl.max(tl.where(there, out.to(kind).to(tl.float32), float("-inf")), 0, return_indices=True)
        tl.store(y + tile, best)
        tl.store(places + tile, tile * ROWS + place)
    else:
        if ADD:
            out = out.to(kind).to(tl.float32) + tl.load(y + row, mask=there, other=0.0).to(tl.float32)
        tl.store(y + row, out, mask=there)


def _ahead(memory_is_idle: bool, width: int) -> int:
    """Columns of a weight to be fetched before a kernel may begin: of use behind a kernel that leaves the memory idle, else in the way."""
    return next((columns for columns in (1024, 512) if columns <= width), 0) if memory_is_idle and EARLY else 0


def one(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    add_to: Tensor | None = None,
    gated: bool = False,
    memory_is_idle: bool = False,
) -> Tensor:
    """The product of one token, with what stands around it.

    Args:
        x: (1, K).
        weight: (N, K), or (2 N, K) if `gated`: gates, and what they let through.
        norm: (K,), weight of an RMS norm of x, with `eps`; None = none.
        add_to: (1, N), to which the product is added in place; None = a new tensor.
        memory_is_idle: while the kernel before this one runs.
    Returns:
        (1, N).
    """
    num_rows = len(weight) // 2 if gated else len(weight)
    y = x.new_empty(1, num_rows) if add_to is None else add_to
    flags = norm is not None, gated, add_to is not None, False
    _launch_one(x, norm, weight, y, y, eps, num_rows, flags, ONE, _ahead(memory_is_idle, x.shape[1]))
    return y


def _launch_one(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    y: Tensor,
    places: Tensor,
    eps: float,
    num_rows: int,
    flags: tuple[bool, ...],
    tiles: Tiles,
    ahead: int,
) -> None:
    _one[(triton.cdiv(num_rows, tiles.rows),)](
        x,
        x if norm is None else norm,
        weight,
        y,
        places,
        eps,
        num_rows,
        x.shape[1],
        *flags,
        tiles.rows,
        tiles.columns_of(weight),
        tiles.stages,
        ahead,
        EARLY,
        num_warps=tiles.warps,
        **LAUNCH,
    )


@triton.jit(do_not_specialize=["T"])
def _few(
    x,
    weight,
    y,
    places,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    CHOOSE: tl.constexpr,
    PARTS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    WIDTH: tl.constexpr = K // PARTS
    FITS: tl.constexpr = N % ROWS == 0 and WIDTH % COLUMNS == 0
    kind: tl.constexpr = weight.dtype.element_ty
    tile, part = tl.program_id(1), tl.program_id(2)
    token, row, k = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if AHEAD > 0:
        _fetch_rows(weight, row, part * WIDTH, N, K, GATED, AHEAD)
    wait(EARLY)
    real, there = token < T, row < N
    inputs = x + token[:, None] * K + part * WIDTH + k[None, :]
    rows = weight + row.to(tl.int64)[:, None] * K + part * WIDTH + k[None, :]
    own = tl.zeros((TOKENS, ROWS), tl.float32)
    up = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in tl.range(0, WIDTH, COLUMNS, num_stages=STAGES):
        inside = start + k < WIDTH
        if FITS:
            a = tl.load(inputs + start, mask=real[:, None], other=0.0)
        else:
            a = tl.load(inputs + start, mask=real[:, None] & inside[None, :], other=0.0)
        own = tl.dot(a, _tile(rows + start, there, inside, FITS).T, own, input_precision="ieee")
        if GATED:
            up = tl.dot(a, _tile(rows + N * K + start, there, inside, FITS).T, up, input_precision="ieee")
    if GATED:
        own = silu(own, up, kind)
    if CHOOSE:
        best, place = tl.max(tl.where(there[None, :], own.to(kind).to(tl.float32), float("-inf")), 1, return_indices=True)
        tl.store(y + tile * T + token, best, mask=real)
        tl.store(places + tile * T + token, tile * ROWS + place, mask=real)
    else:
        to = y + (part * T + token).to(tl.int64)[:, None] * N + row[None, :]
        tl.store(to, own, mask=real[:, None] & there[None, :])


def _launch_few(
    x: Tensor, weight: Tensor, y: Tensor, places: Tensor, flags: tuple[bool, bool], num_parts: int, tokens: int, tiles: Tiles, memory_is_idle: bool
) -> None:
    num_rows = len(weight) // 2 if flags[0] else len(weight)
    _few[(triton.cdiv(len(x), tokens), triton.cdiv(num_rows, tiles.rows), num_parts)](
        x,
        weight,
        y,
        places,
        len(x),
        num_rows,
        x.shape[1],
        *flags,
        num_parts,
        tokens,
        tiles.rows,
        tiles.columns_of(weight),
        tiles.stages,
        _ahead(memory_is_idle, x.shape[1] // num_parts),
        EARLY,
        num_warps=tiles.warps,
        **LAUNCH,
    )


def fitting(num_tokens: int, table: Mapping[int, Any]) -> int:
    """The first key that is not below a number, else the last."""
    return next((most for most in table if num_tokens <= most), max(table))


def whole(x: Tensor, weight: Tensor) -> Tensor:
    """(T, K), (N, K) -> (T, N). It stands behind `add_norm`, which leaves the memory idle."""
    most = fitting(len(x), WHOLE)
    if len(x) > most:
        return F.linear(x, weight)
    y = x.new_empty(len(x), len(weight))
    _launch_few(x, weight, y, y, (False, False), 1, most, WHOLE[most], True)
    return y


def parts(x: Tensor, weight: Tensor, *, memory_is_idle: bool = False) -> Tensor:
    """(T, K), (N, K) -> (P, T, N), of which the sum is the product: float32 if P is more than 1. `memory_is_idle` as of `one`."""
    if len(x) > FEW:
        return F.linear(x, weight)[None]
    most, num_parts = fitting(len(x), PARTS), math.gcd(x.shape[1], NUM_PARTS)
    y = torch.empty(num_parts, len(x), len(weight), dtype=torch.float32 if num_parts > 1 else x.dtype, device=x.device)
    _launch_few(x, weight, y, y, (False, False), num_parts, most, PARTS[most], memory_is_idle)
    return y


def gated(x: Tensor, weight: Tensor) -> Tensor:
    """(T, K), (2 N, K), gates and what they let through -> (T, N): SiLU of the first product, times the second."""
    if len(x) > FEW:
        return _gate(F.linear(x, weight))
    most = fitting(len(x), GATED)
    y = x.new_empty(len(x), len(weight) // 2)
    _launch_few(x, weight, y, y, (True, False), 1, most, GATED[most], most == 16)  # of more tokens the norms are not so short
    return y


@triton.jit
def _gate_many(both, y, N, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait(EARLY)
    start, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + start * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(both + start * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + start * N + n, silu(gate, up, y.dtype.element_ty), mask=n < N)


def _gate(both: Tensor) -> Tensor:
    y = both.new_empty(len(both), both.shape[1] // 2)
    _gate_many[(len(both), triton.cdiv(y.shape[1], 1024))](both, y, y.shape[1], 1024, EARLY, **LAUNCH)
    return y


@triton.jit(do_not_specialize=["T"])
def _choose(values, places, y, T, NUM_TILES, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait(EARLY)
    token, tile = tl.program_id(0), tl.arange(0, BLOCK)
    _, first = tl.max(tl.load(values + tile * T + token, mask=tile < NUM_TILES, other=float("-inf")), 0, return_indices=True)
    tl.store(y + token, tl.load(places + first * T + token))


def first_choices(x: Tensor, weight: Tensor) -> Tensor:
    """(T, D) hidden states, (V, D) -> (T,) int32, the ids of the largest products as they are rounded; the first of equals."""
    most = fitting(len(x), CHOICES)
    tiles = ONE_CHOICE if len(x) == 1 else CHOICES[most]
    num_tiles = triton.cdiv(len(weight), tiles.rows)
    values = torch.empty(num_tiles, len(x), dtype=torch.float32, device=x.device)
    places = torch.empty(num_tiles, len(x), dtype=torch.int32, device=x.device)
    if len(x) == 1:
        _launch_one(x, None, weight, values, places, 0.0, len(weight), (False, False, False, True), tiles, 0)
    else:
        _launch_few(x, weight, values, places, (False, True), 1, most, tiles, False)
    y = torch.empty(len(x), dtype=torch.int32, device=x.device)
    _choose[(len(x),)](values, places, y, len(x), num_tiles, triton.next_power_of_2(num_tiles), EARLY, num_warps=8, **LAUNCH)
    return y
