"""The fast way through Qwen3: its kernels are what they say, on a GPU or under Triton's interpreter; recorded passes are the model's own.

TRITON_INTERPRET=1 python -m pytest tests/unit/model/test_qwen3.py
"""

import copy
import os

import plain_kernels
import pytest
import torch
import torch.nn.functional as F
from tiny import make_talkative, tiny_llm, tiny_speech_llm
from transformers import Qwen3Config, Qwen3ForCausalLM

from nim4.model import rows as rows_module
from nim4.model.qwen3 import LENGTHS, _joined, why_not, why_not_of_shape
from nim4.model.rows import Read, Rows

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
with_kernels = pytest.mark.skipif(not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1")
on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
SHAPE = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def tiny_qwen3(**shape):
    return Qwen3ForCausalLM(Qwen3Config(**(SHAPE | {"head_dim": 16} | shape)))


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(found, expected):
    assert found.dtype == expected.dtype
    distance = float((found.float() - expected.float()).norm() / expected.float().norm())
    assert distance <= (1e-5 if found.dtype == torch.float32 else 1e-2)


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_and_norms(dtype):
    from nim4.model import qwen3_kernels as kernels

    x, more, weight = numbers(5, 48, dtype=dtype), numbers(3, 5, 48, seed=1), numbers(48, seed=2, dtype=dtype)
    check(kernels.add_norm(x, None, weight, 1e-6), plain_kernels.add_norm(x, None, weight, 1e-6))
    for parts in (more, more[:1].to(dtype)):
        sums = x.clone(), x.clone()
        check(kernels.add_norm(sums[0], parts, weight, 1e-6), plain_kernels.add_norm(sums[1], parts, weight, 1e-6))
        check(*sums)
    ids, spoken = (torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in ([7, 0, 3, 0, 9], [-1, 1, -1, 0, -1]))
    speech, table = numbers(5, 48, seed=3, dtype=dtype), numbers(10, 48, seed=4, dtype=dtype)
    assert torch.equal(kernels.embed(ids, spoken, speech, table), plain_kernels.embed(ids, spoken, speech, table))


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if ON_GPU else [])])
@pytest.mark.parametrize(("width", "rows"), [(64, 128), (48, 200), (576, 32)])
def test_products(width, rows, dtype):
    """Of one token, of few and of many, in tiles that fit and in those that do not."""
    from nim4.model import qwen3_products as products

    weight, norm = numbers(2 * rows, width, dtype=dtype), numbers(width, seed=1, dtype=dtype)
    for count in (1, 2, 16, 17, 64, *([200] if ON_GPU else [])):
        x = numbers(count, width, seed=count, dtype=dtype)
        check(products.whole(x, weight), F.linear(x, weight))
        check(products.parts(x, weight).sum(0).to(dtype), F.linear(x, weight))
        check(products.gated(x, weight), plain_kernels.gated(x, weight))
        logits = F.linear(x, weight).float()
        chosen = logits.gather(1, products.first_choices(x, weight)[:, None].long())
        assert bool((chosen[:, 0] >= logits.amax(-1) - (1e-4 if dtype == torch.float32 else 0.2)).all())  # 0.2: a step of bf16 or two
    x, sums = numbers(1, width, seed=2, dtype=dtype), numbers(1, 2 * rows, seed=3, dtype=dtype)
    for given in ({}, {"norm": norm, "eps": 1e-6}, {"norm": norm, "eps": 1e-6, "gated": True}, {"gated": True}):
        check(products.one(x, weight, **given), plain_kernels.one(x, weight, **given))
    check(products.one(x, weight, add_to=sums.clone()), plain_kernels.one(x, weight, add_to=sums.clone()))


@with_kernels
def test_the_first_of_equals_is_chosen():
    from nim4.model import qwen3_products as products

    weight = numbers(1, 32).repeat(300, 1)
    weight[:70] = 0
    for count in (1, 3, 40):
        x = weight[-1:].repeat(count, 1)
        x[1:2] = -x[1:2]  # for which all others are better
        assert products.first_choices(x, weight).tolist() == [70, 0, *[70] * 38][:count]


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if ON_GPU else [])])  # the interpreter multiplies the bits of bf16
@pytest.mark.parametrize(("groups", "heads", "width"), [(2, 2, 16), (1, 1, 32), (3, 2, 16)])
def test_keys_are_kept_and_seen(groups, heads, width, dtype):
    """Rows of 1, 19 and 2 new tokens behind 70, 0 and 5 others, and padding that goes to a row of its own, in whatever order."""
    from nim4.model import qwen3_kernels as kernels

    rows = [(2, 70, 1), (0, 0, 19), (3, 5, 2)]
    block, length = kernels.tokens_per_block(groups), 24
    places, positions, starts, counts = [], [], [], []
    for place, position, count in rows:
        for first in range(0, count, block):
            starts.append(len(places) + first)
            counts.append(min(block, count - first))
        places += [place] * count
        positions += range(position, position + count)
    num_tokens = len(places)
    ints = torch.zeros(4, length, dtype=torch.int32)
    ints[0] = 1
    for row, values in zip(ints, (places, positions, starts, counts), strict=True):
        row[: len(values)] = torch.tensor(values)
    places, positions, starts, counts = ints.to(DEVICE)
    tables = [numbers(2, 4, 96, heads, width, dtype=dtype) for _ in range(2)]
    qkv, norms = numbers(length, (groups + 2) * heads * width, seed=1, dtype=dtype), numbers(2, width, seed=2, dtype=dtype)
    angles = numbers(96, width // 2, seed=3)
    starting, seen = tables[0].clone(), []
    for way, (keys, values) in zip((kernels, plain_kernels), tables, strict=True):
        queries = way.take(qkv, norms, angles.cos().to(dtype), angles.sin().to(dtype), places, positions, keys, values, 1e-6)
        seen.append((queries, way.attend(queries, keys, values, places, positions, starts, counts)[:num_tokens]))
    for found, expected in zip(*seen, strict=True):
        check(found, expected)
    check(*(table[:, [0, 2, 3]] for table in tables))
    single = [torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in ([2, 0, 3, 1], [70, 0, 95, 64])]
    seen = []
    for way in (kernels, plain_kernels):
        keys, values = table = starting.clone()
        seen.append((way.take_and_attend(qkv[:4], norms, angles.cos().to(dtype), angles.sin().to(dtype), *single, keys, values, 1e-6), table))
    for found, expected in zip(*seen, strict=True):
        check(found, expected)


def test_weights_are_joined_once_and_stay_what_they_are():
    model = tiny_qwen3()
    own = model.model.layers[0].self_attn
    parts, before = (own.q_proj, own.k_proj, own.v_proj), [part.weight.clone() for part in (own.q_proj, own.k_proj, own.v_proj)]
    joined = _joined(*parts)
    assert torch.equal(joined, torch.cat(before))
    assert all(torch.equal(part.weight, weight) for part, weight in zip(parts, before, strict=True))
    assert _joined(*parts).data_ptr() == joined.data_ptr() == own.q_proj.weight.data_ptr()
    own.k_proj.weight = torch.nn.Parameter(before[1] + 1)
    assert torch.equal(_joined(*parts), torch.cat([before[0], before[1] + 1, before[2]]))


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({}, None),
        ({"attention_bias": True}, "without bias"),
        ({"head_dim": 24}, "24 wide"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding attention"),
    ],
)
def test_other_shapes_are_refused_by_name(shape, reason):
    model = tiny_qwen3(**shape)
    found = why_not_of_shape(model, model.config)
    assert found == reason or reason in found
    assert why_not(model) == "it is not on a GPU"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return make_talkative(tiny_speech_llm(tiny_llm(tmp_path_factory.mktemp("llm"), tie_word_embeddings=False))).llm.to(DEVICE)


def ids(seed, count):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def read_all(model):
    """First choices of eleven rows that read, are cut and read again, together, in parts and alone."""
    rows, found = Rows(model, [1, 2, 3]), []
    rows.reserve(14, 256)
    held = [rows.new() for _ in range(11)]
    speech = torch.randn(7, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows.read([Read(rows, row, ids(number, 20 + number), 0, speech if number % 2 else None) for number, row in enumerate(held)])
    for count in (11, 1, 8):
        for width in (1, 3, 40):
            found.append(rows.read([Read(rows, row, ids(width + number, width), width) for number, row in enumerate(held[:count])]))
        for row in held[:count]:
            row.drop(42)
    return found


@on_a_gpu
def test_recorded_passes_choose_what_the_model_chooses(llm, monkeypatch):
    fast = read_all(copy.deepcopy(llm))
    monkeypatch.setattr(rows_module, "why_not", lambda model: "the test says so")
    assert fast == read_all(llm)


@on_a_gpu
def test_all_lengths_can_be_recorded(llm):
    rows = Rows(copy.deepcopy(llm), [1, 2, 3])
    rows.record()
    assert sorted(rows._flat._graphs._made) == [(length, alone) for length in LENGTHS for alone in (False, True)]
    assert sorted(rows._flat._choices._made) == list(LENGTHS)
