"""Hotword indexes: searches against a naive one, changes, streams, filters, files."""

import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nim4.config import RecipeError
from nim4.corpus.g2p import Lexicon
from nim4.corpus.g2p_en import dictionary
from nim4.corpus.hotword_list import KeyedNames, ListReport, Name, make_keys
from nim4.corpus.units import ARPABET, FINALS, INITIALS, PhonemeInventory
from nim4.decode.hotword import FILE, JOURNAL, HotwordIndex
from nim4.decode.trie_build import build_trie, keys_of

INVENTORY = PhonemeInventory.default()
LEXICON = Lexicon()


def index_of(*names, **options):
    listed = [name if isinstance(name, Name) else Name(name) for name in names]
    return HotwordIndex.build(make_keys(enumerate(listed, 1), INVENTORY, ListReport()), INVENTORY, **options)


def keyed(keys):
    """Names k0, k1, ... with these keys, lists of phone ids."""
    lens = np.array([len(key) for key in keys], np.int64)
    flat = np.array([phone for key in keys for phone in key], np.uint8)
    return KeyedNames([Name(f"k{number}") for number in range(len(keys))], flat, lens, np.arange(len(keys)))


def said(text):
    return INVENTORY.encode(LEXICON.phones(text))


def seen(hits):
    return [(hit.start, hit.end, [name.text for name in hit.names]) for hit in hits]


def texts(hits):
    return [[name.text for name in hit.names] for hit in hits]


# ------------------------------------------------------------------------------------------------- against a naive search

# Few phones, so that keys overlap and contain one another: two syllables' worth, and words of one to four phones.
SMALL = [*INVENTORY.encode("b p an1 an4 an5"), *INVENTORY.encode("S T AA R DH AH")]
WORDS = {tuple(INVENTORY.encode(reading)) for reading in dictionary().values()}


def is_kind(phone, symbols):
    return INVENTORY.tokens[phone].rstrip("12345") in symbols


def fewest_words(phones, match=None):
    """Words and single phones that a run of English phones is read as, with phones[match[0]:match[1]] as one word when it is given."""
    costs = [0] + [10**6] * len(phones)
    for end in range(1, len(phones) + 1):
        for start in range(max(end - 24, 0), end):
            outside = match is None or end <= match[0] or start >= match[1]
            is_word = start == end - 1 or tuple(phones[start:end]) in WORDS
            if (outside and is_word) or (start, end) == match:
                costs[end] = min(costs[end], costs[start] + 1)
    return costs[-1]


def cuts_a_word(phones, start, end):
    english = [is_kind(phone, ARPABET) for phone in phones]
    for edge in (start, end):
        if 0 < edge < len(phones) and english[edge - 1] and english[edge]:
            first, last = edge, edge
            while first > 0 and english[first - 1]:
                first -= 1
            while last < len(phones) and english[last]:
                last += 1
            match = (max(start, first) - first, min(end, last) - first)
            if fewest_words(phones[first:last], match) > fewest_words(phones[first:last]):
                return True
    return False


def naive(keys, phones, same=lambda a, b: a == b):
    """Every key at every place, by the words of hotword_search.py."""
    found = []
    for number, key in enumerate(keys):
        for start in range(len(phones) - len(key) + 1):
            end = start + len(key)
            inside = start > 0 and is_kind(phones[start], FINALS) and is_kind(phones[start - 1], (*INITIALS, "0"))
            if all(map(same, key, phones[start:end])) and not inside and not cuts_a_word(phones, start, end):
                found.append((start, end, f"k{number}"))
    kept = [own for own in found if not any((o[0] <= own[0] and own[1] <= o[1]) and o[:2] != own[:2] for o in found)]
    spans = sorted({own[:2] for own in kept})
    return [(*span, sorted(name for *other, name in kept if tuple(other) == span)) for span in spans]


def any_keys(max_size=25):
    return st.lists(st.lists(st.sampled_from(SMALL), min_size=1, max_size=5), min_size=1, max_size=max_size)


utterances = st.lists(st.sampled_from(SMALL), max_size=40)


@pytest.mark.parametrize("engine", ["trie", "ahocorasick"])
@settings(max_examples=300, deadline=None)
@given(keys=any_keys(), phones=utterances)
def test_search_finds_what_a_naive_search_finds(engine, keys, phones):
    index = HotwordIndex.build(keyed(keys), INVENTORY, engine=engine)
    assert seen(index.search(phones)) == naive(keys, phones)


@settings(max_examples=100, deadline=None)
@given(keys=any_keys(), phones=utterances)
def test_toneless_and_wildcard_find_what_a_naive_search_finds(keys, phones):
    tokens = INVENTORY.tokens

    def toneless(a, b):
        return tokens[a].rstrip("12345") == tokens[b].rstrip("12345")

    def wildcard(a, b):
        return a == b or (toneless(a, b) and "5" in (tokens[a][-1], tokens[b][-1]))

    for tones, same in (("toneless", toneless), ("wildcard", wildcard)):
        assert seen(HotwordIndex.build(keyed(keys), INVENTORY, tones=tones).search(phones)) == naive(keys, phones, same)


@pytest.mark.parametrize("tones", ["toned", "wildcard"])
@settings(max_examples=200, deadline=None)
@given(keys=any_keys(), phones=utterances, data=st.data())
def test_a_stream_shows_what_a_search_of_its_beginning_finds(tones, keys, phones, data):
    index = HotwordIndex.build(keyed(keys), INVENTORY, tones=tones)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(phones)), max_size=8)))
    stream, standing = index.stream(), []
    for begin, end in itertools.pairwise([0, *cuts, len(phones)]):
        change = stream.push(phones[begin:end])
        for hit in seen(change.withdrawn):
            standing.remove(hit)
        standing += seen(change.added)
        assert sorted(standing) == seen(stream.hits) == seen(index.search(phones[:end]))


@settings(max_examples=100, deadline=None)
@given(keys=any_keys(8), more=any_keys(8), gone=st.sets(st.integers(0, 15)), phones=utterances)
def test_a_changed_index_is_one_built_anew(keys, more, gone, phones):
    names = [*keys, *more]
    tokens = INVENTORY.tokens
    own = [Name(f"k{number}", pronunciations=(tuple(tokens[phone] for phone in key),)) for number, key in enumerate(names) if len(key) > 2]
    added = [name for name in own if int(name.text[1:]) >= len(keys)]
    index = HotwordIndex.build(keyed(keys), INVENTORY)
    index.add(added)
    index.remove(f"k{number}" for number in gone)
    left = {number: key for number, key in enumerate(names) if number not in gone and (number < len(keys) or len(key) > 2)}
    expected = naive(list(left.values()), phones)
    numbers = list(left)
    found = [(start, end, sorted(int(name[1:]) for name in hit)) for start, end, hit in seen(index.search(phones))]
    assert found == [(start, end, sorted(numbers[int(name[1:])] for name in hit)) for start, end, hit in expected]
    assert len(index) == len(left)


def test_the_trie_gives_its_keys_back():
    rng = np.random.default_rng(0)
    lens = rng.integers(1, 12, 2000)
    flat = rng.integers(1, 250, lens.sum()).astype(np.uint8)
    trie, numbers = build_trie(flat, lens)
    phones, key_lens = keys_of(trie)
    ends, key_ends = np.cumsum(lens), np.cumsum(key_lens)
    for row, number in enumerate(numbers.tolist()):
        key = flat[ends[row] - lens[row] : ends[row]]
        np.testing.assert_array_equal(phones[key_ends[number] - key_lens[number] : key_ends[number]], key)
        assert trie.find(key) == number
    assert trie.find(np.array([251], np.uint8)) is None
    assert trie.num_keys == len(key_lens)
    for wrong in ([0, len(flat)], [1], [len(flat), 1]):
        with pytest.raises(ValueError, match="at least one phone"):
            build_trie(flat, np.array(wrong))


@settings(max_examples=200, deadline=None)
@given(keys=st.lists(st.binary(min_size=1, max_size=6).map(lambda key: key.replace(b"\0", b"\1")), max_size=40))
def test_nodes_are_numbered_by_level_then_by_phones(keys):
    trie, numbers = build_trie(np.frombuffer(b"".join(keys), np.uint8), np.fromiter(map(len, keys), np.int64, len(keys)))
    nodes = sorted({key[:end] for key in keys for end in range(len(key) + 1)} | {b""}, key=lambda node: (len(node), node))
    assert [trie.phones_to(number).tobytes() for number in range(len(trie.label))] == nodes
    ends = sorted(set(keys), key=lambda key: (len(key), key))
    assert numbers.tolist() == [ends.index(key) for key in keys]


def test_many_changes_leave_what_one_would_have_left(tmp_path):
    tags = [("a",), (), ("a", "b"), ("b",)]
    names = [
        Name(text, 1.0 + number % 3, tags[number % 4]) for number, text in enumerate(map("".join, itertools.product("惠新西东", "街路桥", "甲乙")))
    ]
    index = HotwordIndex.build(make_keys(enumerate(names[:5]), INVENTORY, ListReport()), INVENTORY)
    index.save(tmp_path)
    left = {name.text: name for name in names[:5]}
    rng = np.random.default_rng(0)
    for step in range(30):
        chosen = [names[number] for number in rng.choice(len(names), 4, replace=False)]
        if step % 3 == 2:
            index.remove(name.text for name in chosen)
            left = {text: name for text, name in left.items() if text not in {own.text for own in chosen}}
        else:
            chosen = [Name(name.text, name.weight + step, name.tags) for name in chosen]
            index.add(chosen)
            left |= {name.text: name for name in chosen}
        if step % 10 == 9:
            index.save()
            index = HotwordIndex.load(tmp_path)
        fresh = HotwordIndex.build(make_keys(enumerate(left.values()), INVENTORY, ListReport()), INVENTORY)
        utterance = [phone for name in names for phone in INVENTORY.encode(Lexicon("zh").phones(name.text))]
        for view, other in ((index, fresh), (index.filter(["a"]), fresh.filter(["a"]))):
            found, expected = view.search(utterance), other.search(utterance)
            assert [(hit.span, hit.names) for hit in found] == [(hit.span, hit.names) for hit in expected]
        assert len(index) == len(left)


# ------------------------------------------------------------------------------------------------- what users see


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("去北京饭店和惠新西街", [["北京饭店"], ["惠新西街"]]),  # 北京 lies inside
        ("看背景", [["背景"]]),
        ("start restart smart", []),
        ("start the art of art", [["art"], ["art"]]),
        ("open speech 识别", [["speech"]]),
        ("speeches", []),
        ("蔚来NIO house", [["NIO House"]]),
        ("北京", [["北京"]]),
        ("", []),
        ("完全没有", []),
    ],
)
@pytest.mark.parametrize("engine", ["trie", "ahocorasick"])
def test_names_of_a_text(text, found, engine):
    index = index_of(
        "北京",
        "北京饭店",
        "惠新西街",
        "背景",
        "art",
        "speech",
        Name("NIO House", pronunciations=(("N", "IY", "OW", "HH", "AW", "S"),)),
        engine=engine,
    )
    said_so = text.replace("NIO", "knee oh")
    assert texts(index.search(said(said_so))) == found


def test_a_name_that_begins_with_a_final_is_not_found_inside_a_syllable():
    index = index_of(Name("安福", pronunciations=(("an1", "f", "u2"),)))
    assert index.search(INVENTORY.encode("f an1 f u2")) == []
    assert texts(index.search(INVENTORY.encode("an1 f u2"))) == texts(index.search(INVENTORY.encode("f an1 an1 f u2"))) == [["安福"]]


def test_homophones_all_come_back_by_weight():
    index = index_of(Name("张薇", 2.0), Name("张威", 5.0), Name("章威", 2.0))
    index.add([Name("张巍", 3.0)])
    (hit,) = index.search(said("张威"))
    assert [name.text for name in hit.names] == ["张威", "张巍", "张薇", "章威"]


def test_every_reading_is_a_way_to_find_a_name():
    index = index_of("朝阳", "胡同儿")
    for reading in ("zh ao1 0 iang2", "ch ao2 0 iang2", "h u2 t ong4 0 er2", "h u2 t ong4"):
        assert len(index.search(INVENTORY.encode(reading))) == 1, reading


def test_tags_hide_names_and_what_is_hidden_hides_nothing():
    index = index_of(Name("北京饭店", tags=("hotel",)), Name("北京", tags=("city", "place")), Name("上海", tags=("city",)))
    index.add([Name("南京", tags=("city",)), Name("南京饭店", tags=("hotel",))])
    phones = said("北京饭店上海南京饭店")
    assert texts(index.search(phones)) == [["北京饭店"], ["上海"], ["南京饭店"]]
    assert texts(index.filter({"city"}).search(phones)) == [["北京"], ["上海"], ["南京"]]
    assert texts(index.filter({"place", "hotel"}).search(phones)) == [["北京饭店"], ["南京饭店"]]
    assert index.filter({"nothing"}).search(phones) == []
    view = index.filter({"hotel"})
    index.remove(["北京饭店"])
    assert texts(view.search(phones)) == [["南京饭店"]], "a view sees changes"


def test_lists_of_a_user_are_searched_beside_the_base():
    index, contacts = index_of("北京", "张威"), index_of("张薇", "北京饭店")
    view = index.filter(lists=[contacts])
    assert texts(view.search(said("张威在北京饭店"))) == [["张威", "张薇"], ["北京饭店"]]
    contacts.remove(["北京饭店"])
    assert texts(view.search(said("张威在北京饭店"))) == [["张威", "张薇"], ["北京"]]
    assert texts(index.search(said("张威在北京饭店"))) == [["张威"], ["北京"]]
    with pytest.raises(ValueError, match="units and tones"):
        index.filter(lists=[index_of("上海", tones="toneless")])


def test_a_stream_merges_repeats_across_chunks_and_withdraws_the_shorter_name():
    index = index_of("北京", "北京饭店")
    stream, (b, ei, j, ing, f, an, d, ian) = index.stream(), said("北京饭店")
    assert texts(stream.push_labels([0, b, b]).added) == []
    assert texts(stream.push_labels([b, ei, 0, 0, j, ing, ing]).added) == [["北京"]]
    for labels in ([ing, 0, f, an, d], []):
        change = stream.push_labels(labels)
        assert (change.added, change.withdrawn) == ((), ())
    change = stream.push_labels([d, ian])  # d goes on: no second one
    assert (texts(change.withdrawn), texts(change.added)) == ([["北京"]], [["北京饭店"]])
    assert seen(stream.hits) == [(0, 8, ["北京饭店"])]


def test_a_stream_sees_a_change_at_its_next_chunk():
    index = index_of("北京", "上海")
    stream, phones = index.stream(), said("北京饭店")
    assert texts(stream.push(phones[:4]).added) == [["北京"]]
    index.add(["北京饭店"])
    index.remove(["北京"])
    change = stream.push(phones[4:])
    assert (texts(change.withdrawn), texts(change.added), texts(stream.hits)) == ([["北京"]], [["北京饭店"]], [["北京饭店"]])


def test_keys_that_ordinary_text_has_too_often_are_stopped():
    names = make_keys(enumerate([Name("我们"), Name("北京饭店")]), INVENTORY, ListReport())
    ordinary = [said("我们都去")] * 50 + [said("北京饭店")]
    index = HotwordIndex.build(names, INVENTORY, ordinary=ordinary)
    assert texts(index.search(said("我们去北京饭店"))) == [["北京饭店"]]
    assert index.stats()["stopped_keys"] == 1
    assert texts(HotwordIndex.build(names, INVENTORY, ordinary=[said("我们")] * 2).search(said("我们"))) == [["我们"]], "twice tells nothing"


def test_what_cannot_be_said_is_reported_and_the_rest_added():
    index = index_of("北京")
    report = index.add(["吴㻦", "上海", "啊"])
    assert sorted(report.skipped) == ["cannot be pronounced", "has fewer than 3 or more than 96 phones"]
    assert "上海" in index
    assert index.remove(["天津", "上海"]) == ["天津"]
    assert "上海" not in index


@pytest.mark.parametrize(
    ("options", "message"), [({"tones": "tone"}, "--tones: expected toned or"), ({"engine": "trie2"}, "--engine: expected trie or")]
)
def test_wrong_options(options, message):
    with pytest.raises(RecipeError, match=message):
        index_of("北京", **options)


# ------------------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path):
    names = [Name("北京饭店", 2.0, ("city",)), "北京", "上海", Name("art"), "张威"]
    index_of(*names).save(tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("engine", ["trie", "ahocorasick"])
def test_a_loaded_index_is_the_one_that_was_saved(saved, engine):
    index = HotwordIndex.load(saved, INVENTORY, engine=engine)
    (hit,) = index.search(said("去北京饭店"))
    assert [(name.text, name.weight, name.tags) for name in hit.names] == [("北京饭店", 2.0, ("city",))]
    assert texts(index.search(said("the art in start"))) == [["art"]]
    assert len(index) == 5


def test_changes_are_saved_and_loaded(saved):
    index = HotwordIndex.load(saved)
    index.add([Name("天津", 3.0, ("city", "port")), Name("北京", 9.0)])
    index.remove(["上海"])
    assert len(HotwordIndex.load(saved)) == 5, "not saved yet"
    index.save()
    again = HotwordIndex.load(saved)
    assert again.stats() == index.stats()
    for text in ("天津", "上海", "北京"):
        assert [hit.names for hit in again.search(said(text))] == [hit.names for hit in index.search(said(text))]
    assert again.search(said("北京"))[0].names[0].weight == 9.0
    again.save(saved.with_name("copy"))  # as a whole
    assert not (saved.with_name("copy") / JOURNAL).exists()
    assert texts(HotwordIndex.load(saved.with_name("copy")).search(said("天津北京上海"))) == [["天津"], ["北京"]]


def test_two_that_change_one_folder_do_not_lose_a_word(saved):
    one, two = HotwordIndex.load(saved), HotwordIndex.load(saved)
    one.add(["天津"])
    one.save()
    two.add(["南京"])
    with pytest.raises(RecipeError, match="expected no changes but our own, found others"):
        two.save()
    assert "天津" in HotwordIndex.load(saved)


def test_an_index_of_other_units_is_refused(saved):
    other = PhonemeInventory([*INVENTORY.tokens[:5], INVENTORY.tokens[6], INVENTORY.tokens[5], *INVENTORY.tokens[7:]])
    with pytest.raises(RecipeError, match="expected an index of the model's units, found others: 243 symbols beside 243"):
        HotwordIndex.load(saved, other)


def test_every_cut_off_and_every_damaged_file_is_refused(saved):
    content = (saved / FILE).read_bytes()
    rng = random.Random(0)
    for size in [0, 5, 19, 60, 500, *(rng.randrange(len(content)) for _ in range(20)), len(content) - 1]:
        (saved / FILE).write_bytes(content[:size])
        with pytest.raises(RecipeError, match="Fix: build it again"):
            HotwordIndex.load(saved)
    header = int.from_bytes(content[8:16], "little") + 20
    places = [*range(0, 20), *(rng.randrange(20, header) for _ in range(20)), *(rng.randrange(header + 64, len(content) - 64) for _ in range(40))]
    refused = 0
    for place in places:
        (saved / FILE).write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            HotwordIndex.load(saved)
        except RecipeError:
            refused += 1
    assert refused >= len(places) - 4, "only padding between arrays may change unseen"
    (saved / FILE).write_bytes(content + b"\0")
    with pytest.raises(RecipeError, match="it was cut off or added to"):
        HotwordIndex.load(saved)


def test_a_file_with_false_numbers_and_right_checksums_reads_no_memory_but_its_own(saved):
    from nim4.decode.hotword_file import read_arrays, write_arrays

    arrays, meta = read_arrays(saved / FILE)
    arrays = {name: array.copy() for name, array in arrays.items()}
    rng = np.random.default_rng(0)
    phones = [said("去北京饭店上海张威art"), said("start the art")]
    for name, array in arrays.items():
        for _ in range(8):
            false = array.copy()
            if len(false):
                false[rng.integers(len(false), size=3)] = rng.integers(2**32, size=3).astype(false.dtype)
            write_arrays(saved / FILE, {**arrays, name: false}, meta)
            try:
                index = HotwordIndex.load(saved)
            except RecipeError:
                continue
            for query in phones:
                assert all(len(hit.names) < 100 for hit in index.search(query))
            index.remove(["北京", "张威"])
            index.add(["北京", "天津"])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"sequence": 1}\n{"added": "x"}\n',
        "[]\n",
        '{"sequence": 1}\n{"added": "x", "weight": "y", "tags": [], "keys": []}\n',
        '{"sequence": 1}\n{"added": "x", "weight": 1, "tags": [], "keys": [[]], "sequence": 1}\n',
    ],
)
def test_a_broken_journal_is_told(saved, content):
    (saved / JOURNAL).write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"journal.jsonl.*expected .*Fix: "):
        HotwordIndex.load(saved)


def test_a_missing_index_is_told(tmp_path):
    with pytest.raises(RecipeError, match=r"hotwords.bin: expected a hotword index, found .*No such file"):
        HotwordIndex.load(tmp_path)


def test_nothing_in_the_file_can_run(saved):
    assert b"pickle" not in (saved / FILE).read_bytes()
    json.loads((saved / FILE).read_bytes()[20 : 20 + int.from_bytes((saved / FILE).read_bytes()[8:16], "little")])
