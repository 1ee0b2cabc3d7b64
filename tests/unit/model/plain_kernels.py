"""What nim4/model/qwen3_kernels.py and qwen3_products.py do, in torch, without a thought for speed: reference, and stand-in on a CPU."""

import torch
import torch.nn.functional as F


def tokens_per_block(groups):
    return 3  # few, so that short rows have several blocks


def _norm(x, weight, eps):
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def embed(ids, spoken, speech, table):
    return torch.where(spoken[:, None] >= 0, speech[spoken.clamp(min=0)], F.embedding(ids, table))


def add_norm(x, more, weight, eps):
    if more is not None:
        x += more.sum(0).to(x.dtype)
    return _norm(x, weight, eps)


def take(qkv, norms, cos, sin, places, positions, keys, values, eps):
    heads, width = keys.shape[2:]
    parts = qkv.unflatten(1, (-1, width))
    num_queries = parts.shape[1] - 2 * heads
    queries, new_keys, new_values = parts.split([num_queries, heads, heads], 1)
    rotated = []
    for part, weight in zip((queries, new_keys), norms, strict=True):
        a, b = _norm(part, weight, eps).float().chunk(2, -1)
        c, s = cos[positions][:, None].float(), sin[positions][:, None].float()
        rotated.append(torch.cat([a * c - b * s, b * c + a * s], -1).to(qkv.dtype))
    keys[places.long(), positions.long()] = rotated[1]
    values[places.long(), positions.long()] = new_values
    return rotated[0]


def attend(queries, keys, values, places, positions, starts, counts):
    out = torch.full_like(queries, float("nan"))  # what nobody wrote nobody may read
    groups = queries.shape[1] // keys.shape[2]
    for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
        for token in range(start, start + count):
            place, end = int(places[start]), int(positions[token]) + 1
            assert int(places[token]) == place
            assert int(positions[token]) == int(positions[start]) + token - start
            key, value = (part[place, :end].transpose(0, 1).repeat_interleave(groups, 0) for part in (keys, values))
            out[token] = F.scaled_dot_product_attention(queries[token][:, None], key, value)[:, 0]
    return out.flatten(1)


def take_and_attend(qkv, norms, cos, sin, places, positions, keys, values, eps):
    starts = torch.arange(len(qkv))
    return attend(take(qkv, norms, cos, sin, places, positions, keys, values, eps), keys, values, places, positions, starts, torch.ones_like(starts))


def one(x, weight, *, norm=None, eps=0.0, add_to=None, gated=False, memory_is_idle=False):
    assert len(x) == 1
    y = F.linear(x if norm is None else _norm(x, norm, eps), weight)
    if gated:
        first, second = y.chunk(2, -1)
        y = F.silu(first) * second
    if add_to is None:
        return y
    add_to += y
    return add_to


def whole(x, weight):
    return F.linear(x, weight)


def parts(x, weight, *, memory_is_idle=False):
    return torch.stack([F.linear(own, columns) for own, columns in zip(x.float().chunk(2, -1), weight.float().chunk(2, -1), strict=True)])


def gated(x, weight):
    first, second = F.linear(x, weight).chunk(2, -1)
    return F.silu(first) * second


def first_choices(x, weight):
    return F.linear(x, weight).argmax(-1).int()
