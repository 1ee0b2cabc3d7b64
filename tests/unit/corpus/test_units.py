"""The phoneme inventory is frozen: a model's outputs are its ids."""

import hashlib

import pytest

from nim4.config import RecipeError
from nim4.corpus.units import ARPABET, INITIALS, PhonemeInventory, ctc_fits, num_encoder_frames, syllable_phones, symbols


def test_inventory_is_frozen():
    listed = symbols()
    assert listed[:4] == ["<blk>", "<unk>", "0", "b"]
    assert (len(INITIALS), len(ARPABET), len(listed)) == (21, 39, 2 + 1 + 21 + 180 + 39)
    assert len(set(listed)) == len(listed)
    assert hashlib.sha256("\n".join(listed).encode()).hexdigest() == "40e80471519f9f91c064528836ad3bdba451921336d6bf130a0e011b0b43b54a"


@pytest.mark.parametrize(
    ("syllable", "phones"),
    [
        ("bei3", "b ei3"),
        ("zhuang1", "zh uang1"),
        ("shi4", "sh i4"),
        ("yi1", "0 i1"),
        ("wu4", "0 u4"),
        ("yu2", "0 v2"),
        ("ying1", "0 ing1"),
        ("yuan2", "0 van2"),
        ("yong3", "0 iong3"),
        ("you3", "0 iu3"),
        ("wei4", "0 ui4"),
        ("wen2", "0 un2"),
        ("weng1", "0 ueng1"),
        ("er2", "0 er2"),
        ("an1", "0 an1"),
        ("ju4", "j v4"),
        ("qu4", "q v4"),
        ("xue2", "x ve2"),
        ("juan3", "j van3"),
        ("xun2", "x vn2"),
        ("xiong2", "x iong2"),
        ("lü4", "l v4"),
        ("nv3", "n v3"),
        ("lue4", "l ve4"),
        ("lu4", "l u4"),
        ("de5", "d e5"),
        ("n2", "0 en2"),
    ],
)
def test_syllables(syllable, phones):
    assert " ".join(syllable_phones(syllable)) == phones
    assert all(phone in PhonemeInventory.default() for phone in syllable_phones(syllable))


@pytest.mark.parametrize("wrong", ["bei", "bei6", "xyz1", "er1", "", "ㄅ1", "yo3"])
def test_no_syllable(wrong):
    with pytest.raises(ValueError, match=r"must be pinyin|is no syllable"):
        syllable_phones(wrong)


def test_encode_decode():
    inventory = PhonemeInventory.default()
    assert (inventory.blank_id, inventory.unk_id) == (inventory.encode("<blk>")[0], inventory.encode("<unk>")[0])
    assert inventory.decode(inventory.encode("b ei3 j ing1 K AA")) == ["b", "ei3", "j", "ing1", "K", "AA"]
    assert inventory.encode(["b", "ei3"]) == inventory.encode("b ei3")
    assert inventory.encode("") == []
    with pytest.raises(RecipeError, match="expected symbols of the inventory, found 'ei9'"):
        inventory.encode("b ei9")
    for outside in (-1, len(inventory)):
        with pytest.raises(IndexError, match=str(outside)):
            inventory.decode([outside])


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "tokens.txt"
    PhonemeInventory.default().save(path)
    assert path.read_text(encoding="utf-8").splitlines()[:2] == ["<blk> 0", "<unk> 1"]
    assert PhonemeInventory.load(path).tokens == PhonemeInventory.default().tokens


@pytest.mark.parametrize(
    "content", [None, "", "<blk> 0\n", "<unk> 0\n<blk> 1\n", "<blk> 0\n<unk> 2\n", "<blk> 0\n<unk> 1\na 2\na 3\n", "<blk>\n", "\xff"]
)
def test_broken_token_table(tmp_path, content):
    path = tmp_path / "tokens.txt"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(RecipeError, match=r"tokens\.txt: expected"):
        PhonemeInventory.load(path)


def test_ctc_fits():
    assert [num_encoder_frames(frames) for frames in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert ctc_fits(2, ["a", "b"])
    assert not ctc_fits(1, ["a", "b"])
    assert not ctc_fits(3, ["a", "a", "b", "b"])
    assert not ctc_fits(5, ["a", "a", "b", "b"])
    assert ctc_fits(6, ["a", "a", "b", "b"])
    assert ctc_fits(0, [])
