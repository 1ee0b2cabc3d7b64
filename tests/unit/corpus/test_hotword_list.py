"""Word lists of hotwords: the keys of a name, the lines of a file, and what becomes of bad ones."""

import gzip
import lzma
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nim4.config import RecipeError
from nim4.corpus.hotword_keys import MAX_KEYS, KeyMaker, parse_pronunciations
from nim4.corpus.hotword_list import ListReport, Name, make_keys, read_list
from nim4.corpus.units import PhonemeInventory

INVENTORY = PhonemeInventory.default()


@pytest.fixture(scope="module")
def maker():
    return KeyMaker()


@pytest.mark.parametrize(
    ("name", "readings"),
    [
        ("惠新西街", ["h ui4 x in1 x i1 j ie1"]),
        ("长宁", ["ch ang2 n ing2", "zh ang3 n ing2"]),
        ("朝阳", ["zh ao1 0 iang2", "ch ao2 0 iang2"]),
        ("单田芳", ["d an1 t ian2 f ang1", "sh an4 t ian2 f ang1"]),
        ("胡同儿", ["h u2 t ong4 0 er2", "h u2 t ong4"]),
        ("一汽", ["0 i1 q i4", "0 i2 q i4"]),
        ("一家", ["0 i1 j ia1", "0 i4 j ia1"]),
        ("不二", ["b u4 0 er4", "b u2 0 er4"]),
        ("NASA", ["N AE S AH", "EH N EY EH S EY"]),
        ("awt", ["AO T", "EY D AH B AH L Y UW T IY"]),
        ("360安全", ["s an1 b ai3 l iu4 sh i2 0 an1 q van2", "s an1 l iu4 l ing2 0 an1 q van2"]),
        ("101大厦", ["0 i1 b ai3 l ing2 0 i1 d a4 sh a4", "0 iao1 l ing2 0 iao1 d a4 sh a4"]),
        ("NIO 之家", ["N IY OW zh i1 j ia1", "EH N AY OW zh i1 j ia1"]),
        ("iPhone6", ["AY F OW N S IH K S", "AY F OW N l iu4"]),
        ("360", ["TH R IY HH AH N D R AH D AH N D S IH K S T IY", "s an1 l iu4 l ing2"]),
    ],
)
def test_every_way_to_say_a_name(maker, name, readings):
    found = [" ".join(INVENTORY.decode(key)) for key in maker.keys(name)]
    assert set(readings) <= set(found)
    assert len(found) == len(set(found)) <= MAX_KEYS


def test_keys_are_those_of_the_first_implementation(maker):
    """hotword_keys.tsv has, of names of all kinds, the number of keys and a checksum of them, as commit 594372b made them from whole texts."""
    lines = Path(__file__).with_name("hotword_keys.tsv").read_text(encoding="utf-8").splitlines()
    changed = []
    for name, count, checksum in (line.split("\t") for line in lines):
        keys = [" ".join(INVENTORY.decode(key)) for key in maker.keys(name)]
        if (len(keys), f"{zlib.crc32(' | '.join(keys).encode()):08x}") != (int(count), checksum):
            changed.append((name, keys))
    assert len(lines) > 100
    assert not changed


@settings(max_examples=200, deadline=None)
@given(st.text("惠新西街朝阳银行一不儿女二三0123456789", min_size=1, max_size=9))
def test_the_quick_way_for_chinese_names_gives_what_the_long_one_gives(maker, name):
    quick = maker.keys(name)
    assume(any("\u4e00" <= char <= "\u9fff" for char in name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nim4.corpus.hotword_keys._CHINESE", re.compile("(?!)"))
        assert maker.keys(name) == quick


PIECES = [
    "Apple",
    "store",
    "Xiaomi",
    "xiaomi",
    "io",
    "na",
    "awt",
    "the",
    "I",
    "a",
    "McD",
    "NASA",
    "7",
    "2",
    "12",
    "101",
    "2004",
    "1000000",
    "0",
    "020",
    "11",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(" ".join))
def test_the_quick_way_for_words_and_numbers_gives_what_the_long_one_gives(maker, name):
    quick = maker.keys(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nim4.corpus.hotword_keys._WORDS_AND_NUMBERS", re.compile("(?!)"))
        assert maker.keys(name) == quick


def test_the_likeliest_reading_comes_first(maker):
    assert " ".join(INVENTORY.decode(maker.keys("朝阳区")[0])) == "ch ao2 0 iang2 q v1"
    assert " ".join(INVENTORY.decode(maker.keys("银行")[0])) == "0 in2 h ang2"


@pytest.mark.parametrize("name", ["女儿国", "儿子", "花儿"])
def test_a_child_is_not_swallowed_and_a_name_keeps_a_syllable(maker, name):
    assert all("er2" in INVENTORY.decode(key) for key in maker.keys(name))


@pytest.mark.parametrize("name", ["", "！？", "㻦", "吴㻦"])
def test_what_nobody_can_read_has_no_key(maker, name):
    assert maker.keys(name) == []


def test_pronunciations_are_phones_or_pinyin():
    assert parse_pronunciations("hui4 xin1 | h ui4 N IY OW", INVENTORY) == [("h", "ui4", "x", "in1"), ("h", "ui4", "N", "IY", "OW")]
    for wrong in ("hui4 xyz", "hui", "<blk>", "|", "hui4 |"):
        with pytest.raises(ValueError, match=r"pinyin|pronunciation|syllable"):
            parse_pronunciations(wrong, INVENTORY)


def names_of(path, **options):
    report = ListReport()
    keyed = make_keys(read_list(path, INVENTORY, report), INVENTORY, report, **options)
    return keyed, report


def keys_of(keyed):
    ends = np.cumsum(keyed.key_lens)
    keys = [INVENTORY.decode(keyed.phones[end - length : end]) for end, length in zip(ends, keyed.key_lens, strict=True)]
    return {name.text: [" ".join(key) for key, owner in zip(keys, keyed.owners, strict=True) if owner == i] for i, name in enumerate(keyed.names)}


def test_a_table(tmp_path):
    path = tmp_path / "list.tsv"
    path.write_text(
        "# names\n北京饭店\t2.5\tcity,hotel\n蔚来\t\t\t0 ui4 l ai2|NIO\n\n上海\t1\t\tshang4 hai3\n".replace("|NIO", "| n i2 0 ou1"), encoding="utf-8"
    )
    keyed, report = names_of(path)
    assert [(name.text, name.weight, name.tags) for name in keyed.names] == [
        ("北京饭店", 2.5, ("city", "hotel")),
        ("蔚来", 1.0, ()),
        ("上海", 1.0, ()),
    ]
    assert keys_of(keyed)["蔚来"] == ["0 ui4 l ai2", "n i2 0 ou1"]
    assert keys_of(keyed)["上海"] == ["sh ang4 h ai3"], "a user's pronunciation is the only one"
    assert (report.names, report.skipped) == (3, {})


def test_a_first_line_may_name_the_columns(tmp_path, caplog):
    path = tmp_path / "list.tsv"
    path.write_text("name\tcategory\tweight\n北京\tplace\t3\n", encoding="utf-8")
    assert names_of(path)[0].names == [Name("北京", 3.0)]
    assert "columns category are not used" in caplog.text


@pytest.mark.parametrize("opener", [gzip.open, lzma.open])
def test_packed_lists_and_byte_order_marks(tmp_path, opener):
    path = tmp_path / ("list.gz" if opener is gzip.open else "list.xz")
    with opener(path, "wt", encoding="utf-8-sig") as file:
        file.write("北京\r\n上海\r\n")
    assert [name.text for name in names_of(path)[0].names] == ["北京", "上海"]


def test_repeated_names_are_one(tmp_path):
    path = tmp_path / "list.tsv"
    path.write_text("北京\t1\ta\n上海\n北京\t5\tb\n", encoding="utf-8")
    keyed, report = names_of(path)
    assert keyed.names == [Name("北京", 5.0, ("a", "b")), Name("上海")]
    assert report.merged == 1


def test_bad_lines_are_left_out_and_counted(tmp_path):
    long = "x" * 10_000_000
    lines = ["北京", long, "上\x07海", "。。", "一\tabc", "二\t-1", "南京\t1\t\tnanjing", "北\t1\ta\t\tmore", "吴㻦", "啊", "\ue000\u4e00"]
    path = tmp_path / "list.tsv"
    path.write_text("\n".join(lines) + "\n天津", encoding="utf-8")
    keyed, report = names_of(path)
    assert [name.text for name in keyed.names] == ["北京", "天津"]
    reasons = {line: reason for reason, lines in report.skipped.items() for line, _ in lines}
    assert reasons == {
        2: "longer than 100 characters",
        3: "control or private characters",
        4: "neither a letter nor a digit",
        5: "the weight is not a number",
        6: "the weight is not a number from 0 on",
        7: "the pronunciation is neither phones of tokens.txt nor pinyin with tones",
        8: "more than 4 columns",
        9: "cannot be pronounced",
        10: "has fewer than 3 or more than 96 phones",
        11: "control or private characters",
    }
    assert all(len(text) <= 100 for lines in report.skipped.values() for _, text in lines)


def test_a_list_in_gbk_is_told_with_its_line(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("ok\n北京\n".encode("gbk"))
    with pytest.raises(RecipeError, match=r"list.txt, line 2: expected UTF-8, .* Fix: convert it, for example iconv"):
        names_of(path)


@pytest.mark.parametrize("name", ["nowhere.txt", "broken.gz", "broken.xz"])
def test_an_unreadable_list_is_told(tmp_path, name):
    path = tmp_path / name
    if name != "nowhere.txt":
        path.write_bytes(b"no archive")
    with pytest.raises(RecipeError, match="expected a readable word list"):
        names_of(path)


def test_more_processes_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("nim4.corpus.hotword_list.NAMES_AT_ONCE", 3)
    path = tmp_path / "list.txt"
    path.write_text("北京\n上海\n吴㻦\n广州\n长安街\nNASA\n360\n天津\n", encoding="utf-8")
    (one, report_one), (two, report_two) = names_of(path), names_of(path, jobs=2)
    assert report_one == report_two
    assert one.names == two.names
    for field in ("phones", "key_lens", "owners"):
        np.testing.assert_array_equal(getattr(one, field), getattr(two, field))
