"""The door to Triton of the language model: what Qwen3 does between its matrix products, as four kernels.

Written out as torch calls, a layer is sixty kernels, and for a few tokens each of them costs more to start than to run. Sums are in float32, and
numbers are rounded where transformers' Qwen3 rounds them, but for rotation and attention, which are rounded once.
Letters: T tokens, D width, H heads of keys, G heads that share one, W width of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_QUERIES = 16  # of a product on the matrix units
COLUMNS = 64  # read at once
WIDE = 1024


@triton.jit
def _add_norm(x, more, weight, y, D, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    value = tl.load(x + start + d, mask=d < D, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(more + start + d, mask=d < D, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty)
        tl.store(x + start + d, value, mask=d < D)
        value = value.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    value = value.to(y.dtype.element_ty).to(tl.float32) * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y + start + d, value, mask=d < D)


def add_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Adds `more` (T, D) to `x` (T, D) in place, and returns the RMS norm of the sum."""
    y = torch.empty_like(x)
    _add_norm[(len(x),)](
        x, x if more is None else more, weight, y, x.shape[1], eps, more is not None, triton.next_power_of_2(x.shape[1]), num_warps=8
    )
    return y


@triton.jit
def _take(qkv, norms, cos, sin, places, positions, queries, keys, values, row_size, Q, H, eps, HALF: tl.constexpr):
    token, head = tl.program_id(0), tl.program_id(1)
    half = tl.arange(0, HALF)
    start = (token.to(tl.int64) * (Q + 2 * H) + head) * 2 * HALF
    a = tl.load(qkv + start + half).to(tl.float32)
    b = tl.load(qkv + start + HALF + half).to(tl.float32)
    position = tl.load(positions + token)
    column = tl.load(places + token).to(tl.int64) * row_size + position.to(tl.int64) * H * 2 * HALF
    if head >= Q + H:
        to = values + column + (head - Q - H) * 2 * HALF
        tl.store(to + half, a)
        tl.store(to + HALF + half, b)
    else:
        scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + eps)
        weight = norms + tl.where(head < Q, 0, 2 * HALF)
        kind = qkv.dtype.element_ty
        a = ((a * scale).to(kind).to(tl.float32) * tl.load(weight + half).to(tl.float32)).to(kind).to(tl.float32)
        b = ((b * scale).to(kind).to(tl.float32) * tl.load(weight + HALF + half).to(tl.float32)).to(kind).to(tl.float32)
        c = tl.load(cos + position * HALF + half).to(tl.float32)
        s = tl.load(sin + position * HALF + half).to(tl.float32)
        if head < Q:
            to = queries + (token.to(tl.int64) * Q + head) * 2 * HALF
            tl.store(to + half, a * c - b * s)
            tl.store(to + HALF + half, b * c + a * s)
        else:
            to = keys + column + (head - Q) * 2 * HALF
            tl.store(to + half, a * c - b * s)
            tl.store(to + HALF + half, b * c + a * s)


def take(qkv: Tensor, norms: Tensor, cos: Tensor, sin: Tensor, places: Tensor, positions: Tensor, keys: Tensor, values: Tensor, eps: float) -> Tensor:
    """Norms and rotates queries and keys; keys and values are written where they belong.

    Args:
        qkv: (T, (G H + 2 H) W), queries, keys and values of each token.
        norms: (2, W), weights of the norms of queries and keys.
        cos, sin: (columns, W / 2).
        places, positions: (T,) int32, row and column of each token.
        keys, values: (rows, columns, H, W), contiguous.
    Returns:
        (T, G H, W) queries.
    """
    _, columns, heads, width = keys.shape
    num_heads = qkv.shape[1] // width
    queries = qkv.new_empty(len(qkv), num_heads - 2 * heads, width)
    _take[(len(qkv), num_heads)](
        qkv,
        norms,
        cos,
        sin,
        places,
        positions,
        queries,
        keys,
        values,
        columns * heads * width,
        num_heads - 2 * heads,
        heads,
        eps,
        width // 2,
        num_warps=1,
    )
    return queries


@triton.jit
def _attend(
    queries,
    keys,
    values,
    places,
    positions,
    starts,
    counts,
    out,
    row_size,
    scale,
    H,
    G: tl.constexpr,
    M: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program: neighbouring tokens of one row, all heads that share one of its keys.
    count, head = tl.load(counts + tl.program_id(0)), tl.program_id(1)
    if count > 0:
        first = tl.load(starts + tl.program_id(0))
        position = tl.load(positions + first)
        w, token = tl.arange(0, W), tl.arange(0, M) // G
        own = token < count
        at = ((first + token).to(tl.int64) * H * G + head * G + tl.arange(0, M) % G) * W
        query = tl.load(queries + at[:, None] + w[None, :], mask=own[:, None], other=0.0)
        row = tl.load(places + first).to(tl.int64) * row_size + head * W
        best = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)
        mixed = tl.zeros((M, W), tl.float32)
        for start in range(0, position + count, BLOCK):
            column = start + tl.arange(0, BLOCK)
            there = column < position + count
            place = row + column.to(tl.int64) * H * W
            key = tl.load(keys + place[None, :] + w[:, None], mask=there[None, :], other=0.0)
            score = tl.dot(query, key, input_precision="ieee") * scale
            score = tl.where(column[None, :] <= position + token[:, None], score, float("-inf"))
            higher = tl.maximum(best, tl.max(score, 1))
            share, kept = tl.exp(score - higher[:, None]), tl.exp(best - higher)
            total = total * kept + tl.sum(share, 1)
            value = tl.load(values + place[:, None] + w[None, :], mask=there[:, None], other=0.0)
            mixed = mixed * kept[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
            best = higher
        tl.store(out + at[:, None] + w[None, :], mixed / total[:, None], mask=own[:, None])


def tokens_per_block(groups: int) -> int:
    """So many tokens of a row at most are one block of `attend`, where so many heads share one of keys."""
    return max(MIN_QUERIES, triton.next_power_of_2(groups)) // groups


def attend(queries: Tensor, keys: Tensor, values: Tensor, places: Tensor, positions: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
    """Attention of each token to the columns of its row, up to its own.

    Args:
        queries: (T, G H, W).
        keys, values: (rows, columns, H, W), contiguous.
        places, positions: (T,) int32, row and column of each token.
        starts, counts: (T,) int32, blocks of neighbouring tokens of one row: the first, and how many; 0 = none. A token of no block has no result.
    Returns:
        (T, G H W).
    """
    _, columns, heads, width = keys.shape
    groups, out = queries.shape[1] // heads, torch.empty_like(queries)
    _attend[(len(queries), heads)](
        queries,
        keys,
        values,
        places,
        positions,
        starts,
        counts,
        out,
        columns * heads * width,
        width**-0.5,
        heads,
        groups,
        max(MIN_QUERIES, triton.next_power_of_2(groups)),
        width,
        COLUMNS if keys.element_size() == 2 else COLUMNS // 2,
        num_warps=4,
    )
    return out.flatten(1)


@triton.jit
def _gate(both, y, F, BLOCK: tl.constexpr):
    start, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + start * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(both + start * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + start * F + f, gate * up, mask=f < F)


def gate(both: Tensor) -> Tensor:
    """(T, 2 F), gates and what they let through -> (T, F): SiLU of the first, times the second."""
    width = both.shape[1] // 2
    y = both.new_empty(len(both), width)
    _gate[(len(both), triton.cdiv(width, WIDE))](both, y, width, WIDE)
    return y
