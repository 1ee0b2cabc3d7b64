"""The door to Triton of the language model: what Qwen3 does between its matrix products (nim4/model/qwen3_products.py).

Written out as torch calls, a layer is sixty kernels, and for a few tokens each of them costs more to start than to run. Sums are in float32, and
numbers are rounded where transformers' Qwen3 rounds them, but for rotation and attention, which are rounded once.
Letters: T tokens, D width, H heads of keys, G heads that share one, W width of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nim4.model.qwen3_products import EARLY, LAUNCH, fetch, fitting, wait

MIN_QUERIES = 16  # of a product on the matrix units
COLUMNS = 64  # read at once
FETCHED = 256  # columns of a row, before its queries are there: of few rows, whose keys and values all memory has time for
SINGLE = {16: (64, 3, 4), 64: (64, 2, 4), 128: (32, 3, 1)}  # columns, stages and warps, where rows read one token each; by tokens at most


@triton.jit
def _embed(ids, spoken, speech, table, x, D, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait(EARLY)
    token, d = tl.program_id(0), tl.arange(0, BLOCK)
    place = tl.load(spoken + token).to(tl.int64)
    said = tl.load(speech + place * D + d, mask=(d < D) & (place >= 0), other=0.0)
    read = tl.load(table + tl.load(ids + token).to(tl.int64) * D + d, mask=(d < D) & (place < 0), other=0.0)
    tl.store(x + token.to(tl.int64) * D + d, tl.where(place >= 0, said, read), mask=d < D)


def embed(ids: Tensor, spoken: Tensor, speech: Tensor, table: Tensor) -> Tensor:
    """(T,) int32 ids, their rows of `speech` (A, D), below 0 = it is text, and a table (V, D) -> (T, D)."""
    x = speech.new_empty(len(ids), speech.shape[1])
    _embed[(len(ids),)](ids, spoken, speech, table, x, x.shape[1], triton.next_power_of_2(x.shape[1]), EARLY, **LAUNCH)
    return x


@triton.jit(do_not_specialize=["T"])
def _add_norm(x, more, weight, y, T, D, eps, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    wait(EARLY)
    start = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    kind: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + start + d, mask=d < D, other=0.0).to(tl.float32)
    if PARTS > 0:
        own = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            own += tl.load(more + part * T * D + start + d, mask=d < D, other=0.0).to(tl.float32)
        value = (value + own.to(kind).to(tl.float32)).to(kind)
        tl.store(x + start + d, value, mask=d < D)
        value = value.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    value = value.to(y.dtype.element_ty).to(tl.float32) * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y + start + d, value, mask=d < D)


def add_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Adds the sum of `more` (P, T, D), at least one, to `x` (T, D) in place, and returns the RMS norm of it all."""
    y, num_parts = torch.empty_like(x), 0 if more is None else len(more)
    block = triton.next_power_of_2(x.shape[1])
    _add_norm[(len(x),)](x, x if more is None else more, weight, y, *x.shape, eps, num_parts, block, EARLY, num_warps=8, **LAUNCH)
    return y


@triton.jit
def _take(qkv, norms, cos, sin, places, positions, queries, keys, values, row_size, Q, H, eps, HALF: tl.constexpr, EARLY: tl.constexpr):
    wait(EARLY)
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
        EARLY,
        num_warps=1,
        **LAUNCH,
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
    EARLY: tl.constexpr,
):
    # One program: neighbouring tokens of one row, all heads that share one of its keys. What other heads read is beside it: they run side by side.
    wait(EARLY)
    count, head = tl.load(counts + tl.program_id(1)), tl.program_id(0)
    if count > 0:
        first = tl.load(starts + tl.program_id(1))
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
    _attend[(heads, len(queries))](
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
        COLUMNS * 2 // keys.element_size(),
        EARLY,
        num_warps=4,
        **LAUNCH,
    )
    return out.flatten(1)


@triton.jit
def _turned(at, weight, cos, sin, own, eps, HALF: tl.constexpr):
    """Both halves of heads, (M, 1) of which begin `at`, normed and rotated; zeros where they are not one's `own`."""
    kind: tl.constexpr = at.dtype.element_ty
    half = tl.arange(0, HALF)[None, :]
    a = tl.load(at + half, mask=own, other=0.0).to(tl.float32)
    b = tl.load(at + HALF + half, mask=own, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
    a = ((a * scale).to(kind).to(tl.float32) * tl.load(weight + half).to(tl.float32)).to(kind).to(tl.float32)
    b = ((b * scale).to(kind).to(tl.float32) * tl.load(weight + HALF + half).to(tl.float32)).to(kind).to(tl.float32)
    return (a * cos - b * sin).to(kind), (b * cos + a * sin).to(kind)


@triton.jit
def _fetch_row(keys, values, last, step, W: tl.constexpr, AHEAD: tl.constexpr):
    """The first AHEAD columns of a row, up to its last one."""
    for first in tl.static_range(0, AHEAD, 64):
        column = tl.minimum(first + tl.arange(0, 64), last).to(tl.int64)[:, None]
        near = column * step + tl.arange(0, max(W // 64, 1))[None, :] * 64
        fetch(keys + near)
        fetch(values + near)


@triton.jit
def _take_and_attend(
    qkv,
    norms,
    cos,
    sin,
    places,
    positions,
    keys,
    values,
    out,
    row_size,
    scale,
    eps,
    H,
    G: tl.constexpr,
    M: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    # One program: a token, all heads that share one of its keys.
    head, token = tl.program_id(0), tl.program_id(1)
    W: tl.constexpr = 2 * HALF
    kind: tl.constexpr = qkv.dtype.element_ty
    half, w, g, one = tl.arange(0, HALF)[None, :], tl.arange(0, W)[None, :], tl.arange(0, M)[:, None], tl.arange(0, 1)[:, None]
    position = tl.load(positions + token)
    row = tl.load(places + token).to(tl.int64) * row_size + head * W
    _fetch_row(keys + row, values + row, position, H * W, W, AHEAD)
    wait(EARLY)
    c, s = tl.load(cos + position * HALF + half).to(tl.float32), tl.load(sin + position * HALF + half).to(tl.float32)
    new = qkv + token.to(tl.int64) * (G + 2) * H * W
    a, b = _turned(new + (head * G + g) * W, norms, c, s, g < G, eps, HALF)
    key_a, key_b = _turned(new + (G * H + head + one) * W, norms + W, c, s, one < 1, eps, HALF)
    value = tl.load(new + (G * H + H + head + one) * W + w)
    to = row + position.to(tl.int64) * H * W
    tl.store(keys + to + one + half, key_a)
    tl.store(keys + to + HALF + one + half, key_b)
    tl.store(values + to + one + w, value)
    best = tl.sum(a.to(tl.float32) * key_a.to(tl.float32) + b.to(tl.float32) * key_b.to(tl.float32), 1) * scale
    query = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (M, W))
    total = tl.full((M,), 1.0, tl.float32)
    mixed = tl.zeros((M, W), tl.float32) + value.to(tl.float32)
    for start in tl.range(0, position, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        there = column < position
        at = row + column.to(tl.int64) * H * W
        score = tl.dot(query, tl.load(keys + at[None, :] + w.T, mask=there[None, :], other=0.0), input_precision="ieee") * scale
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        share, kept = tl.exp(score - higher[:, None]), tl.exp(best - higher)
        total = total * kept + tl.sum(share, 1)
        mixed = mixed * kept[:, None]
        mixed = tl.dot(share.to(kind), tl.load(values + at[:, None] + w, mask=there[:, None], other=0.0), mixed, input_precision="ieee")
        best = higher
    tl.store(out + (token.to(tl.int64) * G * H + head * G + g) * W + w, mixed / total[:, None], mask=g < G)


def take_and_attend(
    qkv: Tensor, norms: Tensor, cos: Tensor, sin: Tensor, places: Tensor, positions: Tensor, keys: Tensor, values: Tensor, eps: float
) -> Tensor:
    """`take` and `attend` in one, where no row reads more than one token, which sees nothing else that is new.

    Args: as of `take`.
    Returns:
        (T, G H W).
    """
    _, columns, heads, width = keys.shape
    groups = qkv.shape[1] // (heads * width) - 2
    out = qkv.new_empty(len(qkv), groups * heads * width)
    block, stages, warps = SINGLE[fitting(len(qkv), SINGLE)]
    _take_and_attend[(heads, len(qkv))](
        qkv,
        norms,
        cos,
        sin,
        places,
        positions,
        keys,
        values,
        out,
        columns * heads * width,
        width**-0.5,
        eps,
        heads,
        groups,
        max(MIN_QUERIES, triton.next_power_of_2(groups)),
        width // 2,
        block * 2 // keys.element_size(),
        stages,
        FETCHED if EARLY and len(qkv) <= 16 else 0,
        EARLY,
        num_warps=warps,
        **LAUNCH,
    )
    return out
