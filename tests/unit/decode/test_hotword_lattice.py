"""Confusion networks: slots of log-probabilities, names along them against a naive search, and CTC scores against an enumeration."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hotword import INVENTORY, SMALL, any_keys, index_of, keyed, said, seen, texts, utterances

from nim4.corpus.hotword_list import Name
from nim4.decode.confusion import MAX_COST, WIDTH, SlotMaker, Slots, ctc_cost, slots_of
from nim4.decode.hotword import HotwordIndex
from nim4.decode.hotword_lattice import LatticeLimits, _walk, rescored
from nim4.decode.trie import MAX_GAPS
from nim4.model.ctc import collapse

B, P, AN1, AN4 = INVENTORY.encode("b p an1 an4")


def slots_from(alternatives):
    """Slots of [(phone, cost), ...] lists, each the cheapest first."""
    slots = Slots.of_phones(np.array([own[0][0] for own in alternatives], np.uint8))
    for number, own in enumerate(alternatives):
        slots.counts[number] = len(own)
        for place, (phone, cost) in enumerate(own):
            slots.phones[number, place], slots.costs[number, place] = phone, cost
    return slots


def siblings(phone):
    token = INVENTORY.tokens[phone]
    return (
        [INVENTORY.tokens.index(token[:-1] + tone) for tone in "12345" if token[:-1] + tone in INVENTORY and tone != token[-1]]
        if token[-1].isdigit() and len(token) > 1
        else []
    )


def naive_matches(keys, alternatives, limits):
    """(first slot, slot behind the last, key) -> least cost, by trying every way through the slots."""
    found = {}

    def go(slot, rest, cost, gaps, start, key, number):
        if not rest:
            cheap = cost < 1e-6 or (len(key) >= limits.min_phones and cost <= limits.per_phone * len(key))
            if cheap and cost <= limits.budget:
                spot = (start, slot, number)
                found[spot] = min(found.get(spot, np.inf), cost)
            return
        if slot == len(alternatives):
            return
        for place, (phone, extra) in enumerate(alternatives[slot]):
            if phone == 0 and slot > start and len(rest) < len(key) and (place == 0 or gaps < MAX_GAPS):
                go(slot + 1, rest, cost + extra, gaps + (place > 0), start, key, number)
            elif phone == rest[0]:
                go(slot + 1, rest[1:], cost + extra, gaps, start, key, number)
        if alternatives[slot][0][0] and rest[0] in siblings(alternatives[slot][0][0]):
            go(slot + 1, rest[1:], cost + limits.tone, gaps, start, key, number)

    for (number, key), start in itertools.product(enumerate(keys), range(len(alternatives))):
        before = next((own[0][0] for own in reversed(alternatives[:start]) if own[0][0]), 0)
        if not (key[0] in (AN1, AN4, SMALL[4]) and before in (B, P)):
            go(start, key, 0.0, 0, start, key, number)
    return found


slot = st.lists(st.sampled_from([0, *SMALL]), min_size=1, max_size=WIDTH, unique=True).flatmap(
    lambda phones: st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0]), min_size=len(phones) - 1, max_size=len(phones) - 1).map(
        lambda costs: list(zip(phones, [0.0, *sorted(costs)], strict=True))
    )
)


@settings(max_examples=200, deadline=None)
@given(keys=any_keys(10), alternatives=st.lists(slot, min_size=1, max_size=8), budget=st.sampled_from([0.0, 1.0, 3.0]))
def test_the_walk_finds_what_a_naive_search_finds(keys, alternatives, budget):
    limits = LatticeLimits(budget=budget, per_phone=0.6, min_phones=2, tone=1.5)
    index = HotwordIndex.build(keyed(keys), INVENTORY)
    (source,) = index.filter().sources()
    rows, costs, _ = _walk([source], index.about, slots_from(alternatives), limits, 0)
    found = {}
    for (start, end, key, length), cost in zip(rows.tolist(), costs.tolist(), strict=True):
        assert length == len(source.table.key(key))
        for name in source.table.names_under(key).tolist():
            spot = (start, end, name)
            found[spot] = min(found.get(spot, np.inf), cost)
    assert found.keys() == (expected := naive_matches(keys, alternatives, limits)).keys()
    assert all(found[spot] == pytest.approx(cost) for spot, cost in expected.items())


@settings(max_examples=200, deadline=None)
@given(keys=any_keys(), phones=utterances)
def test_without_alternatives_it_is_the_exact_search(keys, phones):
    index = HotwordIndex.build(keyed(keys), INVENTORY)
    assert seen(index.search_lattice(Slots.of_phones(np.array(phones, np.uint8)), LatticeLimits(tone=np.inf))) == seen(index.search(phones))


def test_a_name_survives_errors_and_homophones_of_the_errors_come_along():
    index = index_of("惠新西街", "会心西街", "北京饭店", "辉新西街")
    h, ui4, x, in1, _, i1, j, ie1 = said("惠新西街")
    f = INVENTORY.encode("f")[0]
    network = [[(h, 0.0)], [(ui4, 0.0)], [(f, 0.0), (x, 1.0)], [(in1, 0.0), (0, 2.0)], [(x, 0.0)], [(0, 0.0), (i1, 0.5)], [(j, 0.0)], [(ie1, 0.0)]]
    assert index.search([phone for (phone, _), *_ in network if phone]) == []
    hits = index.search_lattice(slots_from(network))
    assert [(hit.start, hit.end) for hit in hits] == [(0, 8)]
    assert {name.text for hit in hits for name in hit.names} == {"惠新西街", "会心西街"}  # 辉: another tone, 2.5 nats more
    assert hits[0].cost == pytest.approx(1.5)
    assert index.search_lattice(slots_from(network), LatticeLimits(budget=1.4)) == []
    assert index.search_lattice(slots_from(network), LatticeLimits(min_phones=9)) == []


def test_a_change_and_tags_are_seen_in_the_network():
    index = index_of("北京饭店")
    index.add(["上海饭店"])
    slots = Slots.of_phones(np.array(said("北京饭店上海饭店"), np.uint8))
    assert texts(index.search_lattice(slots)) == [["北京饭店"], ["上海饭店"]]
    index.remove(["北京饭店"])
    assert texts(index.search_lattice(slots)) == [["上海饭店"]]
    assert index.filter({"x"}).search_lattice(slots) == []


def test_words_are_not_cut_in_a_network():
    index = index_of("art", "smart")
    assert index.search_lattice(Slots.of_phones(np.array(said("restart start"), np.uint8))) == []
    assert texts(index.search_lattice(Slots.of_phones(np.array(said("the art smart"), np.uint8)))) == [["art"], ["smart"]]


# --------------------------------------------------------------------------------------------------------------- slots


def frames(rows, size=6):
    """(S, size) log-probabilities; each row maps labels to probabilities, the rest is shared."""
    table = np.full((len(rows), size), 1e-6)
    for row, given_row in zip(table, rows, strict=True):
        for label, probability in given_row.items():
            row[label] = probability
    return np.log(table / table.sum(1, keepdims=True)).astype(np.float32)


def test_slots_of_frames():
    log_probs = frames([{0: 1}, {2: 0.6, 3: 0.3}, {2: 0.9, 3: 0.08, 0: 0.02}, {0: 0.6, 2: 0.4}, {0: 0.7, 4: 0.3}, {0: 0.8, 4: 0.2}, {0: 1}, {5: 1}])
    slots = slots_of(log_probs)
    kept = [
        list(zip(slots.phones[i, :n].tolist(), [round(cost, 2) for cost in slots.costs[i, :n].tolist()], strict=True))
        for i, n in enumerate(slots.counts)
    ]
    assert kept == [[(2, 0.0), (3, 2.42), (0, 3.81)], [(0, 0.0), (4, 0.85)], [(5, 0.0)]]  # the end of 2 is no second 2
    assert slots.frames.tolist() == [[1, 3], [4, 6], [7, 8]]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(0, 30), cuts=st.lists(st.integers(0, 30), max_size=5))
def test_slots_keep_the_best_path_and_come_in_chunks(seed, size, cuts):
    rng = np.random.default_rng(seed)
    log_probs = np.log(rng.dirichlet(np.full(6, 0.3), size).astype(np.float32) + 1e-9).reshape(size, 6)
    whole = slots_of(log_probs)
    assert [phone for phone in whole.phones[:, 0].tolist() if phone] == collapse(log_probs.argmax(-1).tolist())
    assert all(0 < count <= WIDTH for count in whole.counts)
    for costs, count in zip(whole.costs, whole.counts, strict=True):
        assert costs[0] == 0
        assert (np.diff(costs[:count]) >= 0).all()
        assert costs[:count].max() <= MAX_COST
    maker, parts = SlotMaker(), []
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    for begin, end in itertools.pairwise(edges):
        parts.append(maker.push(log_probs[begin:end]))
    parts.append(maker.push(log_probs[:0], final=True))
    for name in ("phones", "costs", "counts", "frames"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def test_ctc_cost_is_that_of_all_paths():
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet(np.ones(4), 5)).astype(np.float32)
    for phones in ([1], [1, 2], [2, 2], [3, 1, 2], [1, 1, 1], [1, 2, 3, 1, 2], [1, 1, 1, 1]):
        paths = [path for path in itertools.product(range(4), repeat=5) if collapse(path) == phones]
        total = np.logaddexp.reduce([log_probs[np.arange(5), list(path)].sum() for path in paths]) if paths else -np.inf
        assert ctc_cost(log_probs, 0, 5, np.array(phones)) == pytest.approx(log_probs.max(1).sum() - total, abs=1e-5)


@pytest.mark.parametrize("tones", ["toned", "toneless", "wildcard"])
def test_rescoring_counts_a_phone_as_what_it_may_be_taken_for(tones):
    index = index_of(Name("妈妈", pronunciations=(("m", "a1", "m", "a5"),)), tones=tones)
    m, a1, a5 = INVENTORY.encode("m a1 a5")
    log_probs = frames([{m: 1}, {a1: 1}, {m: 1}, {a1: 1} if tones != "toned" else {a5: 1}], len(INVENTORY))
    slots = slots_of(log_probs)
    (hit,) = rescored(index.search_lattice(slots), index.about, slots, log_probs, LatticeLimits())
    assert hit.cost < 0.01
    assert texts(index.search_log_probs(log_probs)) == texts(index.search_log_probs(log_probs, None)) == [["妈妈"]]


def test_rescoring_leaves_out_what_the_frames_speak_against():
    index = index_of("惠新西街")
    phones = said("惠新西街")
    wrong = INVENTORY.encode("f")[0]
    log_probs = frames([{phone: 1} if number != 2 else {wrong: 0.9, phone: 0.1} for number, phone in enumerate(phones)], len(INVENTORY))
    assert texts(index.search_log_probs(log_probs)) == [["惠新西街"]]
    assert index.search_log_probs(log_probs, LatticeLimits(max_ctc_cost=0.2)) == []
    assert index.search_log_probs(log_probs, None) == []


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(0, 40), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_a_stream_of_log_probabilities_ends_where_a_search_of_the_whole_does(seed, size, cuts):
    rng = np.random.default_rng(seed)
    ids = [0, *SMALL]
    keys = [rng.choice(SMALL, rng.integers(2, 5)).tolist() for _ in range(20)]
    limits = LatticeLimits(min_phones=2, max_ctc_cost=3.0)
    index = HotwordIndex.build(keyed(keys), INVENTORY)
    log_probs = np.full((size, len(INVENTORY)), -15.0, np.float32)
    log_probs[:, ids] = np.log(rng.dirichlet(np.full(len(ids), 0.2), size).reshape(size, len(ids)) + 1e-6)
    stream = index.stream_lattice(limits)
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    for begin, end in itertools.pairwise(edges):
        stream.push(log_probs[begin:end])
    stream.push(log_probs[:0], final=True)
    expected = index.search_log_probs(log_probs, limits)
    assert seen(stream.hits) == seen(expected)
    assert [hit.cost for hit in stream.hits] == pytest.approx([hit.cost for hit in expected])


def test_a_lattice_stream_sees_a_change_and_rereads_only_what_is_open():
    index = index_of("北京", "上海饭店")
    phones = said("北京饭店上海饭店")
    log_probs = frames([{phone: 1} for phone in phones], len(INVENTORY))
    stream = index.stream_lattice()
    assert texts(stream.push(log_probs[:9])) == [["北京"]]
    index.add(["北京饭店"])
    assert texts(stream.push(log_probs[9:], final=True)) == [["北京饭店"], ["上海饭店"]]
