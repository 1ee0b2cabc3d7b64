"""Rows of keys and values: what is read together is what is read alone, whatever stood in a row before and whoever reads beside it."""

import gc
from unittest.mock import patch

import plain_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_talkative, tiny_llm, tiny_speech_llm

from nim4.decode import together
from nim4.model import qwen3
from nim4.model import rows as rows_module
from nim4.model.llm import Llm, generate, read
from nim4.model.rows import COLUMNS, Read, Rows, write

PREFIX = [1, 2, 3]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return make_talkative(tiny_speech_llm(tiny_llm(tmp_path_factory.mktemp("llm"), tie_word_embeddings=False))).llm


@pytest.fixture(scope="module", params=["padded", "flat"], autouse=True)
def way(request):
    """Rows go the way that any model goes, or the fast one with kernels that run on a CPU."""

    def flat(model, place):
        return qwen3.FlatQwen3(model, place, plain_kernels)

    why_not = (lambda model: qwen3.why_not_of_shape(model, model.config)) if request.param == "flat" else qwen3.why_not
    with (
        patch.object(rows_module, "why_not", why_not),
        patch.object(rows_module, "FlatQwen3", flat),
        patch.object(rows_module, "MORE_COLUMNS", COLUMNS),
    ):
        yield request.param


def reading(rows, row, what, num_wanted=0):
    return Read(rows, row, (), num_wanted, what) if isinstance(what, torch.Tensor) else Read(rows, row, what, num_wanted)


def alone(llm, pieces):
    """First choices behind all that a row reads, piece by piece, with transformers' own cache."""
    embed, found = llm.get_input_embeddings(), []
    with torch.inference_mode():
        cache = read(llm, embed(torch.tensor([PREFIX])))[1]
        for piece in pieces:
            hidden, cache = read(llm, piece[None] if isinstance(piece, torch.Tensor) else embed(torch.tensor([piece])), cache)
            found.append(llm.lm_head(hidden[0]).argmax(-1).tolist())
    return found


def ids(seed, count):
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@settings(max_examples=15, deadline=None)
@given(
    lens=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=5),
    padding=st.sampled_from([0, 16, 1000]),
    speech=st.integers(0, 4),
)
def test_rows_read_together_what_they_read_alone(llm, lens, padding, speech):
    rows = Rows(llm, PREFIX)
    rows._max_padding = padding
    texts = [[ids(10 * number + place, count) for place, count in enumerate(own)] for number, own in enumerate(lens)]
    if speech < len(texts):
        texts[speech][0] = torch.randn(lens[speech][0], 32, generator=torch.Generator().manual_seed(9))
    open_rows = [rows.new() for _ in texts]
    found = [[] for _ in texts]
    for place in range(max(map(len, texts))):
        going = [number for number, own in enumerate(texts) if place < len(own)]
        best = rows.read([reading(rows, open_rows[number], texts[number][place], len(texts[number][place])) for number in going])
        for number, own in zip(going, best, strict=True):
            found[number].append(own)
    assert found == [alone(llm, own) for own in texts]
    assert [row.length for row in open_rows] == [len(PREFIX) + sum(own) for own in lens]


def test_what_was_dropped_is_forgotten(llm):
    rows = Rows(llm, PREFIX)
    kept, other = rows.new(), rows.new()
    rows.read([Read(rows, kept, ids(1, 10)), Read(rows, other, ids(2, 30))])
    rows.read([Read(rows, kept, ids(3, 20), 20)])
    kept.drop(20)
    best = rows.read([Read(rows, kept, ids(4, 6), 6), Read(rows, other, ids(5, 9), 9)])
    assert best == [alone(llm, [ids(1, 10), ids(4, 6)])[-1], alone(llm, [ids(2, 30), ids(5, 9)])[-1]]


def test_only_what_is_wanted_is_told(llm):
    rows = Rows(llm, PREFIX)
    first, second = rows.new(), rows.new()
    best = rows.read([Read(rows, first, ids(1, 5), 2), Read(rows, second, ids(2, 7))])
    assert best == [alone(llm, [ids(1, 5)])[0][-2:], []]


def test_a_row_has_nothing_of_the_one_before(llm):
    rows = Rows(llm, PREFIX)
    broken = rows.new()
    rows.read([reading(rows, broken, torch.full((20, 32), float("nan")))])
    place = broken.place
    beside = rows.new()
    assert rows.read([Read(rows, beside, ids(1, 8), 8), Read(rows, broken, ids(2, 3))])[0] == alone(llm, [ids(1, 8)])[0]
    del broken
    again = rows.new()
    assert again.place == place
    assert rows.read([Read(rows, again, ids(3, 8), 8), Read(rows, beside, ids(4, 2), 2)])[0] == alone(llm, [ids(3, 8)])[0]


def test_places_are_used_again(llm):
    rows = Rows(llm, PREFIX)
    for _ in range(15):
        held = [rows.new() for _ in range(3)]
        rows.read([Read(rows, row, ids(1, 4)) for row in held])
        del held
        gc.collect()
    assert rows._table.shape[2:4] == (4, COLUMNS)


def test_room_is_given_back_and_those_who_are_there_lose_nothing(llm, way):
    rows = Rows(llm, PREFIX)
    kept = rows.new()
    rows.read([Read(rows, kept, ids(1, 100))])
    crowd = [rows.new() for _ in range(20)]
    rows.read([Read(rows, row, ids(2, 500 if row is crowd[0] else 4)) for row in crowd])
    grown = rows._table.shape[2:4]
    del crowd
    gc.collect()
    beside = rows.new()
    assert grown[0] > 20
    assert grown[1] > 500
    assert rows._table.shape[2:4] == (grown if way == "flat" else (2, 4 * COLUMNS))  # recorded passes keep theirs
    best = rows.read([Read(rows, kept, ids(3, 9), 9), Read(rows, beside, ids(4, 90), 90)])
    assert best == [alone(llm, [ids(1, 100), ids(3, 9)])[-1], alone(llm, [ids(4, 90)])[0]]


def test_what_was_reserved_stays(llm):
    rows = Rows(llm, PREFIX)
    rows.reserve(40, 200)
    rows.new()
    assert rows._table.shape[2:4] == (40, 4 * COLUMNS)


def test_a_read_that_fails_can_be_repeated(llm, monkeypatch):
    rows = Rows(llm, PREFIX)
    row = rows.new()
    with monkeypatch.context() as patch:
        patch.setattr(rows_module, "_shared", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rows.read([Read(rows, row, ids(1, 9), 9)])
    assert rows.read([Read(rows, row, ids(1, 9), 9)]) == alone(llm, [ids(1, 9)])


def test_writing_behind_a_row_is_greedy_decoding(llm):
    rows = Rows(llm, PREFIX)
    row = rows.new()
    written = together.alone(write(rows, row, ids(1, 5), ids(2, 4), 12, 300))
    embeds = llm.get_input_embeddings()(torch.tensor([[*PREFIX, *ids(1, 5)]]))
    assert [written.ids] == generate(Llm(llm, None, ""), embeds, torch.tensor([0]), [12], end=300)
    assert row.length == len(PREFIX) + 5 + 12 - 1  # nobody has asked what comes behind the last one


def test_ids_may_be_of_any_sequence(llm):
    rows = Rows(llm, tuple(PREFIX))
    assert rows.read([Read(rows, rows.new(), tuple(ids(1, 10)), 10)]) == alone(llm, [ids(1, 10)])
