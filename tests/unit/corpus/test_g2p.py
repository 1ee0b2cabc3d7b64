"""Readings, phone by phone; the cache, the report of unknown words, a user's own readings, and the letter-to-sound model."""

import functools
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nim4.config import RecipeError
from nim4.corpus.g2p import Lexicon, load_lexicon, read_pronunciations
from nim4.corpus.g2p_en import LEXICON_DIR, dictionary, letter_to_sound, read_word
from nim4.corpus.g2p_numbers import cardinal_zh, read_by_grammar, read_chinese, read_english
from nim4.corpus.letter_to_sound import END, START, LetterToSound
from nim4.corpus.text import split_tokens
from nim4.corpus.units import PhonemeInventory
from nim4.corpus.word_list import WordList

READINGS = [
    ("打开CarPlay", "d a3 k ai1 K AA R P L EY"),
    ("第2名", "d i4 0 er4 m ing2"),
    ("AirPods Pro 2", "EH R P AA D Z P R OW T UW"),
    ("AirPods Pro 2很好", "EH R P AA D Z P R OW 0 er4 h en3 h ao3"),
    ("VIP", "V IY AY P IY"),
    ("我是VIP", "0 uo3 sh i4 V IY AY P IY"),
    ("A4L", "EY F AO R EH L"),
    ("奥迪A4L", "0 ao4 d i2 EY s i4 EH L"),
    ("苹果表配apple pay", "p ing2 g uo3 b iao3 p ei4 AE P AH L P EY"),
    ("银行行长", "0 in2 h ang2 h ang2 zh ang3"),
    ("n l n s one seventy five", "EH N EH L EH N EH S W AH N S EH V AH N T IY F AY V"),
    ("O'Brien's", "OW B R AY IH N Z"),
    ("O’BRIEN’S", "OW B R AY IH N Z"),
    # polyphones, by phrase
    ("重庆的长城", "ch ong2 q ing4 d e5 ch ang2 ch eng2"),
    ("音乐快乐", "0 in1 0 ve4 k uai4 l e4"),
    ("纳什说什么", "n a4 sh i2 sh uo1 sh en2 m e5"),
    ("觉得跑得快", "j ve2 d e5 p ao3 d e5 k uai4"),
    ("得到组长同意", "d e2 d ao4 z u3 zh ang3 t ong2 0 i4"),
    # citation tones; erhua is a syllable of its own
    ("不是一个", "b u4 sh i4 0 i1 g e4"),
    ("花儿", "h ua1 0 er2"),
    ("嗯", "0 en2"),
    ("女绿居全", "n v3 l v4 j v1 q van2"),
    # capitals and letters
    ("AI和OK", "EY AY h e2 OW K EY"),
    ("THE CAT SAT ON A MAT", "DH AH K AE T S AE T AA N AH M AE T"),  # a text all in capitals: they say nothing
    ("The CEO of IBM", "DH AH S IY IY OW AH V AY B IY EH M"),
    ("S A M S U N G", "EH S EY EH M EH S Y UW EH N JH IY"),
    ("I a dog", "AY AH D AO G"),
    ("5 a.m. U.S.", "F AY V EY EH M Y UW EH S"),
    ("用HTML写", "0 iong4 EY CH T IY EH M EH L x ie3"),
    ("A股", "EY g u3"),
    ("café", "K AH F EY"),
    ("AirPods' Smartron's", "EH R P AA D Z S M AA R T R AA N Z"),
    ("the AT&T C++", "DH AH EY T IY AH N D T IY S IY P L AH S P L AH S"),
    # digits
    ("2024年5月20日", "0 er4 l ing2 0 er4 s i4 n ian2 0 u3 0 ve4 0 er4 sh i2 r i4"),
    ("2个第12名", "l iang3 g e4 d i4 sh i2 0 er4 m ing2"),
    ("200，300只", "l iang3 b ai3 s an1 b ai3 zh i1"),
    ("3.5℃", "TH R IY P OY N T F AY V D IH G R IY Z S EH L S IY AH S"),
    ("今天3.5℃", "j in1 t ian1 s an1 d ian3 0 u3 sh e4 sh i4 d u4"),
    ("iPhone12和A380", "AY F OW N sh i2 0 er4 h e2 EY s an1 b a1 l ing2"),
    ("21st, 1990s, 175", "T W EH N T IY F ER S T N AY N T IY N N AY N T IY Z W AH N HH AH N D R AH D AH N D S EH V AH N T IY F AY V"),
    ("mp3 192.168", "EH M P IY TH R IY W AH N HH AH N D R AH D AH N D N AY N T IY T UW P OY N T W AH N S IH K S EY T"),
    # nothing to say, and nothing known
    ("", ""),
    ("……！~ 、", ""),
    ("好😀👍🏽", "h ao3 <unk> <unk>"),
    ("ひら한𠮷", "<unk> <unk> <unk> <unk>"),
]


@pytest.fixture(scope="module")
def lexicon():
    return Lexicon()


@pytest.mark.parametrize(("text", "phones"), READINGS)
def test_reading(lexicon, text, phones):
    assert " ".join(lexicon.phones(text)) == phones
    assert all(phone in PhonemeInventory.default() for phone in lexicon.phones(text))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=12) | st.text("0123459.,:/-%$¥℃°~+第年月个点aAbCs'’ 一長é٣½", max_size=14))
def test_any_text_can_be_read(lexicon, text):
    phones = lexicon.phones(text)
    assert all(phone in PhonemeInventory.default() and phone != "<blk>" for phone in phones)
    assert all(word and word_phones for word, word_phones in lexicon.words(text))


def test_language_decides_digits_without_chinese_characters():
    assert " ".join(Lexicon("zh").phones("Pro 2")) == "P R OW 0 er4"
    assert " ".join(Lexicon("en").phones("第2")) == "d i4 T UW"
    with pytest.raises(RecipeError, match="expected zh or en or zh-en"):
        Lexicon("fr")


def test_words(lexicon):
    assert lexicon.words("银行行长用CarPlay，第2名") == [
        ("银行", ("0", "in2", "h", "ang2")),
        ("行长", ("h", "ang2", "zh", "ang3")),
        ("用", ("0", "iong4")),
        ("carplay", ("K", "AA", "R", "P", "L", "EY")),
        ("第", ("d", "i4")),
        ("二", ("0", "er4")),
        ("名", ("m", "ing2")),
    ]
    text = "苹果表 配Apple Pay，O’Brien’s A4L U.S. 很好"
    assert [token for word, _ in lexicon.words(text) for token in split_tokens(word)] == split_tokens(text)


def test_same_reading_whatever_was_read_before():
    alone = [Lexicon().words(text) for text, _ in READINGS]
    shared = Lexicon()
    assert [shared.words(text) for text, _ in reversed(READINGS)][::-1] == alone
    assert [shared.words(text) for text, _ in READINGS] == alone


def test_a_text_is_worked_out_once(monkeypatch):
    lexicon = Lexicon()
    first = lexicon.phones("银行😀")
    monkeypatch.setattr(lexicon, "read_folded", lambda text: pytest.fail("read again"))
    assert lexicon.phones("银行😀") == first
    assert lexicon.unknown == {("😀", "<unk>"): 2}  # but it counts again


def test_saved_lexicon_and_unknown_words(tmp_path):
    lexicon = Lexicon()
    for text in ("ai AI AI 😀", "银行 AI", "zorblax 😀"):
        lexicon.phones(text)
    lexicon.save(tmp_path / "lexicon.tsv")
    lexicon.save_unknown(tmp_path / "unknown.tsv")
    readings = load_lexicon(tmp_path / "lexicon.tsv")
    assert readings["ai"] == [("EY", "AY"), ("AY",)]  # the most frequent first
    assert readings["银行"] == [("0", "in2", "h", "ang2")]
    assert "😀" not in readings
    rows = [line.split("\t") for line in (tmp_path / "unknown.tsv").read_text(encoding="utf-8").splitlines()]
    assert rows == [["😀", "2", "<unk>"], ["zorblax", "1", "letter-to-sound: Z AO R B L AE K S"]]
    with pytest.raises(RecipeError, match="expected word<TAB>phones"):
        load_lexicon(tmp_path / "none.tsv")


def test_own_readings_win(tmp_path):
    path = tmp_path / "own.tsv"
    path.write_text("# ours\nCarPlay\tK AA R\n乐\t0 ve4\n行长\tx ing2 ch ang2\nA4L\tEY s i4\n", encoding="utf-8")
    lexicon = Lexicon(pronunciations=read_pronunciations(path))
    assert " ".join(lexicon.phones("carplay A4L 乐 快乐")) == "K AA R EY s i4 0 ve4 k uai4 l e4"
    assert " ".join(lexicon.phones("银行行长")) == "0 in2 h ang2 x ing2 ch ang2"
    assert " ".join(Lexicon().phones("行长")) == "h ang2 zh ang3"  # and do not outlive the object


@pytest.mark.parametrize("line", ["银行", "银行\t", "\tb ei3", "a b\tEY", "苹果pro\tP", "银行\tyin2 hang2", "银行\t<unk>"])
def test_wrong_own_reading(tmp_path, line):
    path = tmp_path / "own.tsv"
    path.write_text("# first\n" + line + "\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="line 2: expected word<TAB>phones"):
        read_pronunciations(path)
    with pytest.raises(RecipeError, match="expected a file"):
        read_pronunciations(tmp_path / "none.tsv")


def test_every_phrase_has_a_reading_in_the_inventory(lexicon):
    from pypinyin.constants import PHRASES_DICT

    inventory = PhonemeInventory.default()
    for phrase in list(PHRASES_DICT)[::40]:
        phones = lexicon.phones(phrase)
        assert len(phones) == 2 * len(phrase), phrase
        assert all(phone in inventory for phone in phones), phrase


def test_word_list_takes_the_longest():
    assert list(WordList(["ab", "abc", "d"]).split("xabcdab")) == [("x", False), ("abc", True), ("d", True), ("ab", True)]
    assert list(WordList([]).split("ab")) == [("ab", False)]


@pytest.mark.parametrize(
    ("digits", "spoken"),
    [
        ("0", "零"),
        ("2", "二"),
        ("10", "十"),
        ("12", "十二"),
        ("20", "二十"),
        ("101", "一百零一"),
        ("110", "一百一十"),
        ("1001", "一千零一"),
        ("10010", "一万零一十"),
        ("20300", "二万零三百"),
        ("100000000", "一亿"),
        ("100010002", "一亿零一万零二"),
        ("007", "零零七"),
        ("1234567890123", "一二三四五六七八九零一二三"),
    ],
)
def test_chinese_cardinals(digits, spoken):
    assert cardinal_zh(digits) == spoken


_AROUND = "号楼层路院室街区村店年月日点时分秒个人米元角块公小平微半到约前后内来多比之万亿千百负零尾下上第二两十惠新西中国"
_NUMBERS = st.one_of(
    st.integers(0, 300).map(lambda number: f"{number}%"),
    st.sampled_from(
        ["2", "0", "02", "007", "110", "119", "12306", "95588", "10086", "200", "2000", "20000", "100008000", "2222", "1008", "13800138000"]
    ),
    st.integers(0, 9999).map(str),
    st.from_regex(r"[0-9]{1,13}", fullmatch=True),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.text(_AROUND, max_size=3), _NUMBERS), min_size=1, max_size=3), st.text(_AROUND, max_size=3))
def test_plain_numbers_are_read_as_the_grammar_reads_them(pieces, end):
    text = "".join(before + number for before, number in pieces) + end
    if "第" not in text:  # that the grammar never sees
        assert read_chinese(text) == read_by_grammar(text)


@pytest.mark.parametrize("following", ["", *_AROUND, "%", "%的", "小时", "公里", "年前", "年级", "平方米", "点2分", "月2日", "号2层", "路12号院"])
def test_numbers_of_every_length_before_what_names_have_behind_them(following):
    digits = "2029876543210"
    for text in ("2", "12", "110", *(digits[:size] for size in range(1, 13)), *(f"2{'0' * size}" for size in range(1, 10))):
        assert read_chinese(f"惠新{text}{following}") == read_by_grammar(f"惠新{text}{following}")


def test_small_english_numbers_are_read_as_the_grammar_reads_them():
    wetext = pytest.importorskip("wetext").Normalizer(lang="en", operator="tn")
    for number in [*range(121), *range(121, 1000, 7), *range(1000, 3100, 11), *range(1998, 2022)]:
        assert read_english(str(number)) == re.split("[ -]", wetext.normalize(str(number))), number


@settings(max_examples=200, deadline=None)
@given(st.from_regex(r"[0-9]{1,16}", fullmatch=True) | st.from_regex(r"[0-9]{0,6}0{1,6}[0-9]{0,4}", fullmatch=True))
def test_english_numbers_of_any_length_are_read_as_the_grammar_reads_them(digits):
    wetext = pytest.importorskip("wetext").Normalizer(lang="en", operator="tn")
    try:
        expected = re.split("[ -]", wetext.normalize(digits))
    except AssertionError:  # it has no way to read them
        expected = [read_english(digit)[0] for digit in digits]
    assert read_english(digits) == expected


def test_a_number_between_thousands_and_hundred_millions_has_its_zero():
    assert [cardinal_zh(digits) for digits in ("100008000", "110000")] == ["一亿零八千", "十一万"]


def test_numbers_by_wetext():
    assert read_chinese("第2名和2个，12:30😀x") == "第二名和两个，十二点三十分😀x"
    assert read_english("$35") == ["thirty", "five", "dollars"]
    assert read_english("1999") == ["nineteen", "ninety", "nine"]
    assert read_english("09%") == ["zero", "nine"]  # wetext fails on this
    assert all(word.isalpha() for word in read_english("1.2.3.4") + read_english("1" * 30))


def test_dictionary_is_whole_and_in_the_inventory():
    assert len(dictionary()) > 120_000
    used = {phone for phones in dictionary().values() for phone in phones.split()}
    assert len(used) == 39
    assert all(phone in PhonemeInventory.default() for phone in used)
    assert "Carnegie Mellon" in (LEXICON_DIR / "LICENSE.cmudict").read_text(encoding="utf-8")


def test_letter_to_sound():
    model = letter_to_sound()
    assert model.metadata["phone_error_percent"] < 15
    assert model.metadata["word_error_percent"] < 45
    assert (LEXICON_DIR / "letter_to_sound.npz").stat().st_size < 1_500_000
    assert "".join(model.phones("paddington")) == "PAEDIHNGTAHN"
    assert model.phones("") == []
    assert model.phones("北") == []
    words = sorted(dictionary())[::4000]
    right = sum(tuple(model.phones(word)) == tuple(dictionary()[word].split()) for word in words)
    assert right >= 0.6 * len(words)


def readings_in_plain_python(model, path, word, beam):
    """What the beam search is: the cheapest readings of each beginning, one for each history of `order - 1` graphones."""
    with np.load(path, allow_pickle=False) as arrays:
        letters, phones = arrays["letters"].tolist(), [tuple(side.split()) for side in arrays["phones"].tolist()]
        symbol, cost, backoff = (arrays[name].tolist() for name in ("symbol", "cost", "backoff"))
        first = 1 + np.concatenate([[0], np.cumsum(arrays["num_children"], dtype=np.int64)])
    children = functools.cache(lambda node: {symbol[child]: child for child in range(first[node], first[node + 1])})

    def step(history, graphone):
        total = 0
        for start in range(len(history) + 1):
            node = 0
            for own in history[start:]:
                node = children(node).get(own) if node is not None else None
            if node is not None and graphone in children(node):
                return total + cost[children(node)[graphone]]
            total += backoff[node] if node is not None else 0
        raise AssertionError("no unigram")

    beams = [{} for _ in range(len(word) + 1)]
    beams[0][(START,)] = (0, ())
    for i in range(len(word)):
        for history, (so_far, said) in sorted(beams[i].items(), key=lambda item: item[1])[:beam]:
            for length in (1, 2):
                for graphone in [own for own, side in enumerate(letters) if side == word[i : i + length] and i + length <= len(word) and side]:
                    own, longer = so_far + step(history, graphone), (*history, graphone)[-(model.metadata["order"] - 1) :]
                    reached = beams[i + length]
                    if longer not in reached or own < reached[longer][0]:
                        reached[longer] = (own, said + phones[graphone])
    ends = [(so_far + step(history, END), said) for history, (so_far, said) in beams[-1].items()]
    return list(min(ends)[1]) if ends else []


@settings(max_examples=25, deadline=None)
@given(st.from_regex("[a-z']{1,9}", fullmatch=True) | st.sampled_from(sorted(dictionary())), st.sampled_from([1, 3, 16]))
def test_compiled_letter_to_sound_reads_as_plain_python_does(word, beam):
    model = letter_to_sound()
    assert model.phones(word, beam) == readings_in_plain_python(model, LEXICON_DIR / "letter_to_sound.npz", word, beam)


def test_word_readings_say_where_they_are_from():
    assert read_word("apple", True)[1] == "dictionary"
    assert read_word("USB", True) == (("Y", "UW", "EH", "S", "B", "IY"), "letters")
    assert read_word("QWRT", True)[1] == "spelled"
    assert read_word("CarPlay", True) == (("K", "AA", "R", "P", "L", "EY"), "parts")
    assert read_word("zorblax", True)[1] == "letter-to-sound"
    assert read_word("Zorblax's", True)[1] == "letter-to-sound"
    assert read_word("boss's", True)[0][-2:] == ("IH", "Z")


def test_broken_letter_to_sound_model(tmp_path):
    (tmp_path / "model.npz").write_bytes(b"nothing")
    for name in ("model.npz", "none.npz"):
        with pytest.raises(RecipeError, match="expected a letter-to-sound model"):
            LetterToSound.load(tmp_path / name)


def test_heavy_libraries_are_loaded_when_needed():
    code = (
        "import sys; from nim4.corpus.g2p import Lexicon; lexicon = Lexicon(); assert 'pypinyin' not in sys.modules;"
        "lexicon.phones('银行 bank'); assert 'pypinyin' in sys.modules and not {'wetext', 'numba', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=LEXICON_DIR.parents[2])


def test_training_script_on_a_few_words(tmp_path):
    from utils.train_letter_to_sound import best_alignment, kneser_ney, learn_graphones, read_dictionary

    path = tmp_path / "words.dict"
    path.write_text(
        "she SH IY1\nshe(2) SH EH1\nfish F IH1 SH\nhis HH IH S\nif IH F\nsee S IY1\nfee F IY1\nship SH IH P\nfox F AA1 K S\nhe HH IY\nwell-to W\n",
        encoding="utf-8",
    )
    lexicon = read_dictionary(path)
    assert lexicon["she"] == ("SH", "IY")
    assert sorted(lexicon) == ["fee", "fish", "fox", "he", "his", "if", "see", "she", "ship"]
    prob = learn_graphones(lexicon, 8, min_count=0.0)
    assert best_alignment("if", lexicon["if"], prob) == [("i", "IH"), ("f", "F")]
    for word, phones in lexicon.items():
        aligned = best_alignment(word, phones, prob)
        assert "".join(letters for letters, _ in aligned) == word
        assert " ".join(side for _, side in aligned if side).split() == list(phones)
    model = kneser_ney([[START, 2, 3, END], [START, 2, 4, END], [START, 3, END]], 2, [1, 1])
    for context in [(), (START,), (2,), (3,)]:
        backed_off = {symbol: model[context][1] * model[symbol,][0] for symbol in (END, 2, 3, 4)}
        total = sum(model[*context, symbol][0] if (*context, symbol) in model else backed_off[symbol] for symbol in (END, 2, 3, 4))
        assert total == pytest.approx(1.0, abs=1e-9)
