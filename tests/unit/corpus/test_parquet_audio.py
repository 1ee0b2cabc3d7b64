"""Audio out of parquet files: what it is called, what is missing, and what is broken."""

import sys
from pathlib import Path

import pyarrow
import pytest
import soundfile
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from made_table_corpora import audio_bytes, write_parquet

from nim4.config import RecipeError
from nim4.corpus.parquet_audio import column_names, unpack_rows


def rows_of(count, start=0, **audio):
    return [
        {"id": str(start + n), "text": f"text {start + n}", "audio": {"bytes": audio_bytes(seed=n), "path": "x.wav"} | audio} for n in range(count)
    ]


def test_audio_is_written_beside_the_rows(tmp_path):
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    write_parquet(paths[0], rows_of(70))  # more than is read at once
    write_parquet(paths[1], rows_of(2, start=70))
    rows = unpack_rows({"train": paths}, ["id", "text"], tmp_path / "work")["train"]
    assert [row["id"] for row in rows] == [str(number) for number in range(72)]
    assert [row["audio"].name for row in rows[:2]] == ["0000000.wav", "0000001.wav"]
    assert soundfile.info(rows[71]["audio"]).frames == 8000
    assert rows[71]["audio"].read_bytes() == audio_bytes(seed=1)
    assert column_names(paths[0]) == ["id", "text", "audio"]


def test_limit_spreads_over_all_files(tmp_path):
    write_parquet(tmp_path / "a.parquet", rows_of(3))
    write_parquet(tmp_path / "b.parquet", rows_of(3, start=3))
    rows = unpack_rows({"test": [tmp_path / "a.parquet", tmp_path / "b.parquet"]}, ["id"], tmp_path / "work", limit=2)["test"]
    assert [row["id"] for row in rows] == ["0", "3"]
    assert len(list((tmp_path / "work").rglob("*.*"))) == 2


def test_names_inside_the_corpus_are_no_paths(tmp_path):
    write_parquet(tmp_path / "a.parquet", rows_of(1, path="../../evil.wav/../x.sh"))
    (row,) = unpack_rows({"test": [tmp_path / "a.parquet"]}, ["id"], tmp_path / "work")["test"]
    assert row["audio"] == tmp_path / "work" / "test" / "0000000.wav"
    flac = audio_bytes(container="FLAC")
    write_parquet(tmp_path / "b.parquet", rows_of(1, bytes=flac, path="x.wav") + rows_of(1, bytes=b"what is this", path="a.w/v"))
    first, second = unpack_rows({"test": [tmp_path / "b.parquet"]}, ["id"], tmp_path / "work")["test"]
    assert (first["audio"].suffix, second["audio"].suffix) == (".flac", ".bin")


def test_a_row_without_audio_stays(tmp_path):
    write_parquet(tmp_path / "a.parquet", [*rows_of(1), *rows_of(1, bytes=None)])
    rows = unpack_rows({"test": [tmp_path / "a.parquet"]}, ["id"], tmp_path / "work")["test"]
    assert [row["audio"] is None for row in rows] == [False, True]
    plain = pyarrow.table({"id": ["0"], "sound": pyarrow.array([audio_bytes()], pyarrow.binary())})
    parquet.write_table(plain, tmp_path / "b.parquet")
    (row,) = unpack_rows({"test": [tmp_path / "b.parquet"]}, ["id"], tmp_path / "work", audio="sound")["test"]
    assert soundfile.info(row["audio"]).frames == 8000


def test_what_is_wrong_is_told_in_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(RecipeError, match="split 'test': expected parquet files, found none"):
        unpack_rows({"test": []}, ["id"], tmp_path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(RecipeError, match="expected a parquet file"):
        unpack_rows({"test": [path]}, ["id"], tmp_path)
    write_parquet(path, rows_of(2))
    with pytest.raises(RecipeError, match="a column 'transcription', found id, text, audio"):
        unpack_rows({"test": [path]}, ["transcription"], tmp_path)
    with pytest.raises(RecipeError, match=r"no such file|expected a parquet file"):
        unpack_rows({"test": [tmp_path / "gone.parquet"]}, ["id"], tmp_path)
    content = bytearray(path.read_bytes())
    content[4:60] = b"\x00" * 56  # the first rows, not the table of contents at the end
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="expected a whole parquet file"):
        unpack_rows({"test": [path]}, ["id"], tmp_path / "work")
