"""TextGrid files in both of Praat's forms and encodings."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from made_table_corpora import TEXTGRID

from nim4.config import RecipeError
from nim4.corpus.textgrid import read_intervals

SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
1.5
<exists>
2
"IntervalTier"
"words"
0
1.5
2
0
1
"one"
1
1.5
""
"TextTier"
"points"
0
1.5
1
0.5
"here"
"""
EXPECTED = [(0.0, 0.2, '佢哋話"係"'), (0.3, 0.5, "OK 啦")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_the_long_form(tmp_path, encoding):
    path = tmp_path / "a.TextGrid"
    path.write_text(TEXTGRID, encoding=encoding)
    assert read_intervals(path, "文本") == EXPECTED
    assert read_intervals(path, "情感") == [(0.0, 0.5, "neutral")]


def test_the_short_form(tmp_path):
    path = tmp_path / "a.TextGrid"
    path.write_text(SHORT, encoding="utf-8")
    assert read_intervals(path, "words") == [(0.0, 1.0, "one")]


def test_what_is_wrong_is_told_in_one_line(tmp_path):
    path = tmp_path / "a.TextGrid"
    with pytest.raises(RecipeError, match="no such file"):
        read_intervals(path, "words")
    path.write_text(SHORT, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"a tier of intervals named 'word', found words, points.*did you mean 'words'"):
        read_intervals(path, "word")
    with pytest.raises(RecipeError, match="a tier of intervals named 'points'"):
        read_intervals(path, "points")
    for content in (b"", b"no grid", TEXTGRID[:700].encode(), TEXTGRID.replace("xmax = 0.2", "xmax = ?").encode(), b"\xff\x00\xd8"):
        path.write_bytes(content)
        with pytest.raises(RecipeError, match="expected a TextGrid file"):
            read_intervals(path, "文本")
