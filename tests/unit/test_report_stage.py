"""Stage 13: what it writes for the page, that the same input gives the same bytes, and every way in which its input can be wrong."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from made_corpora import run_program
from made_report import EVENTS, GONE, HTML, NUM_CLIPS, id_of, make_inputs, options, write_rows

from nim4.config import RecipeError
from nim4.report import clip_audio, clips, page
from nim4.report.reported import as_markdown, as_tables, measured_in
from nim4.score.error_rate import ScoredUtterance
from nim4.score.table import read_rows
from nim4.stage import ROOT, read_jsonl

REPORTED = ROOT / "results" / "reported" / "tables.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs and, in 13_report, what the stage makes of them with one more system."""
    folder = tmp_path_factory.mktemp("made") / "made"
    with pytest.MonkeyPatch.context() as patch:
        make_inputs(folder, patch)
        (folder / "theirs.tsv").write_text("u00\t总工北京商行\nu01\t总工\n", encoding="utf-8")
        run_program(patch, "13_report", *options(folder), "--hyp", f"theirs={folder / 'theirs.tsv'}")
    return folder


@pytest.fixture
def fresh(made, tmp_path):
    return shutil.copytree(made, tmp_path / "made")


def values_of(path):
    """The values that a file of data is called with."""
    text = path.read_text(encoding="ascii")
    return json.loads(f"[{text[text.index('(') + 1 : text.rindex(')')]}]")


def report_in(folder):
    return values_of(folder / "13_report" / "data" / "report.js")[0]


def clips_in(folder):
    files = sorted((folder / "13_report" / "data").glob("clips-*.js"), key=lambda path: int(path.stem.split("-")[1]))
    read = [values_of(path) for path in files]
    assert [number for number, _ in read] == list(range(len(files)))
    assert all(len(own) == page.PER_FILE for _, own in read[:-1])
    return {clip["id"]: clip for _, own in read for clip in own}


def test_rates_are_those_of_stage_12(made):
    report = report_in(made)
    assert (report["systems"], report["sets"]) == (["offline", "offline_hotwords", "streaming", "theirs"], ["test", "test_noise"])
    (table,) = [one for one in report["tables"] if one["set"] == "test" and one["profile"] == 0]
    rows = {row[0]: row for row in table["rows"]}
    for record in read_jsonl(made / "12_score" / "records.jsonl"):
        row = rows[record["config"]]
        assert row[1] == f"{record['rate']:.2f}"
        assert row[2]["interval"] == [record["ci_low"], record["rate"], record["ci_high"]]
        assert record["profile_hash"] in table["note"]
    assert rows["offline"][3] == "first"
    assert rows["theirs"][3]["kind"] == "worse"
    assert rows["offline"][6].startswith("1 of 45 [")
    assert rows["theirs"][5] == str(NUM_CLIPS - 2)


def test_a_set_in_which_nothing_is_said_has_its_own_table(made):
    (table,) = [one for one in report_in(made)["tables"] if one["set"] == "test_noise" and one["profile"] == 1]
    assert [row[:2] for row in table["rows"]] == [["offline", "0 of 2"], ["offline_hotwords", "0 of 2"], ["streaming", "1 of 2"]]


def test_a_clip_says_what_each_system_wrote_and_what_was_counted(made):
    clip = clips_in(made)["u10"]
    offline, hotwords, streaming, theirs = clip["systems"]
    assert offline["text"] == "总工北金商行"
    assert offline["scores"][0] == [1, 6, ["总", "工", "北", ["京", "金"], "商", "行"]]
    assert (hotwords["scores"][0][0], hotwords["hints"], offline["hints"]) == (0, ["北京", "上海"], None)
    assert streaming["shown"] == [list(event) for event in EVENTS]
    assert (theirs["text"], theirs["missing"], theirs["scores"][0][0]) == ("", "absent", 6)
    assert clips_in(made)["u06"]["systems"][2]["missing"] == "absent"
    assert clips_in(made)["n1"]["systems"][3] is None


def test_profiles_count_differently(made):
    plain, fair = clips_in(made)["u03"]["systems"][0]["scores"]
    assert (plain[0], fair[0]) == (1, 0)
    columns = report_in(made)["columns"]
    assert [columns["errors"][profile][0][3] for profile in (0, 1)] == [1, 0]


def test_columns_are_those_of_the_clips(made):
    columns, names = report_in(made)["columns"], report_in(made)["systems"]
    for place, clip in enumerate(clips_in(made).values()):
        assert columns["language"][place] == clip["language"] == ("en" if clip["id"] == "u03" else "zh")
        for index in range(len(names)):
            scores = clip["systems"][index] and clip["systems"][index]["scores"]
            for profile in (0, 1):
                assert columns["errors"][profile][index][place] == (-1 if scores is None else scores[profile][0])
                assert columns["units"][profile][place] == clip["systems"][0]["scores"][profile][1]
    assert columns["hallucinated"][0] == [[5], [5], [5, NUM_CLIPS], []]
    changed = [i for i in range(0, NUM_CLIPS, 10)]
    assert columns["changed"] == {"offline": [], "offline_hotwords": changed, "streaming": [], "theirs": []}
    assert report_in(made)["twins"] == {"offline_hotwords": "offline"}


def test_texts_stay_texts(made):
    clip = clips_in(made)["u02"]
    assert clip["ref"] == HTML
    for path in (made / "13_report").glob("*.html"):
        assert "window.broken" not in path.read_text(encoding="utf-8")
    for path in (made / "13_report" / "data").iterdir():
        assert path.read_bytes().isascii()


def test_audio_is_what_was_heard_and_what_is_missing_is_said(made, capsys):
    found = clips_in(made)
    folder = made / "13_report"
    assert {path.relative_to(folder).as_posix() for path in (folder / "audio").iterdir()} == {
        clip["audio"] for clip in found.values() if clip["audio"]
    }
    samples, rate = soundfile.read(folder / found["u00"]["audio"], dtype="float32")
    original, _ = soundfile.read(made / "audio" / "u00.wav", dtype="float32")
    assert rate == 16_000
    assert (samples == original).all()
    assert len(found["u00"]["peaks"]) == clip_audio.NUM_PEAKS
    assert set(found["u00"]["peaks"]) <= {48, 49, 50}
    assert found[GONE]["audio"] is None
    assert "cannot be read" in found[GONE]["noAudio"]
    assert json.loads((folder / "done.json").read_text())["without_audio"] == 1


def test_audio_can_be_linked(fresh, monkeypatch):
    shutil.rmtree(fresh / "13_report")
    run_program(monkeypatch, "13_report", *options(fresh), "--audio", "link")
    address = clips_in(fresh)["u00"]["audio"]
    assert soundfile.info(fresh / "13_report" / address).frames == 32_000
    assert not list((fresh / "13_report" / "audio").iterdir())


def test_without_a_manifest_every_clip_is_there_and_marked(fresh, monkeypatch):
    shutil.rmtree(fresh / "units")
    shutil.rmtree(fresh / "13_report")
    run_program(monkeypatch, "13_report", *options(fresh))
    assert {(clip["noAudio"], clip["language"]) for clip in clips_in(fresh).values()} == {("no manifest has this utterance", None)}


def test_the_same_input_gives_the_same_bytes(fresh, monkeypatch):
    def contents():
        files = (path for path in (fresh / "13_report").rglob("*") if path.is_file() and path.name != "done.json")
        return {path.relative_to(fresh).as_posix(): path.read_bytes() for path in files}

    run_program(monkeypatch, "13_report", *options(fresh))
    before = contents()
    shutil.rmtree(fresh / "13_report")
    run_program(monkeypatch, "13_report", *options(fresh))
    assert contents() == before
    assert len(before) > NUM_CLIPS


def test_peaks_of_less_audio_than_peaks():
    assert clip_audio.peaks_of(np.zeros(0, np.float32)) == [0] * clip_audio.NUM_PEAKS
    assert max(clip_audio.peaks_of(np.ones(7, np.float32))) == clip_audio.HIGHEST


def test_alignment_keeps_every_unit():
    utt = ScoredUtterance("u", None, ("a", "b", "c"), ("a", "x", "c", "d"), 1, 0, 1, None)
    assert clips.pairs_of(utt) == ["a", ["b", "x"], "c", ["", "d"]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--hyp", "theirs"], "NAME=FILE"),
        (["--hyp", "theirs=none.tsv"], "a file of texts"),
        (["--hyp", "offline={folder}/theirs.tsv"], "no decode config's"),
        (["--profiles", "plain fare"], "some of fair, page"),
        (["--profiles", ""], "some of fair, page"),
        (["--jobs", "0"], "at least 1"),
    ],
)
def test_options_that_cannot_be(fresh, monkeypatch, given, expected):
    before = report_in(fresh)
    with pytest.raises(RecipeError, match=expected):
        run_program(monkeypatch, "13_report", *options(fresh), *(option.format(folder=fresh) for option in given))
    assert report_in(fresh) == before


def test_inputs_that_cannot_be(fresh, monkeypatch):
    theirs = fresh / "theirs.tsv"
    theirs.write_text("nobody\t总工\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="ids of the references"):
        run_program(monkeypatch, "13_report", *options(fresh, "other"), "--hyp", f"theirs={theirs}")
    hyps = read_jsonl(fresh / "11_decode" / "offline_hotwords" / "test" / "hyps.jsonl")
    write_rows(fresh / "11_decode" / "offline_hotwords" / "test" / "hyps.jsonl", [hyps[0] | {"hints": "北京"}, *hyps[1:]])
    with pytest.raises(RecipeError, match="row 1: expected 'hints' as a list of texts"):
        run_program(monkeypatch, "13_report", *options(fresh, "other"))
    write_rows(fresh / "11_decode" / "offline_hotwords" / "test" / "hyps.jsonl", hyps)
    refs = read_jsonl(fresh / "11_decode" / "streaming" / "test" / "refs.jsonl")
    write_rows(fresh / "11_decode" / "streaming" / "test" / "refs.jsonl", [refs[0] | {"text": "别的"}, *refs[1:]])
    with pytest.raises(RecipeError, match="the references of offline"):
        run_program(monkeypatch, "13_report", *options(fresh, "other"))
    assert not (fresh / "other").exists()


def test_without_stage_12(fresh, monkeypatch):
    (fresh / "12_score" / "done.json").unlink()
    with pytest.raises(RecipeError, match="product of an earlier stage"):
        run_program(monkeypatch, "13_report", *options(fresh, "other"))


def test_phonemes_alone(fresh, monkeypatch):
    """A decode config of CTC on an open set writes no words: the page then compares phonemes."""
    shutil.rmtree(fresh / "11_decode")
    refs = [{"id": f"u{i:02d}", "phones": "b ei3 j ing1", "text": "北京", "speaker": "s1", "audio_s": 2.0} for i in range(3)]
    folder = fresh / "11_decode" / "ctc_greedy" / "test"
    write_rows(folder / "refs.jsonl", refs)
    facts = {"text": None, "audio_s": 2.0, "wall_s": 0.1, "error": None}
    write_rows(folder / "hyps.jsonl", [{"id": ref["id"], "phones": "b ei3 j in1", **facts} for ref in refs])
    (folder / "done.json").write_text(json.dumps({"made_from": {}, "commit": "abc1234", "model": "exp/made/base/3_pretrain"}))
    run_program(monkeypatch, "12_score", "--decode", fresh / "11_decode", "--out", fresh / "12_score")
    run_program(monkeypatch, "13_report", *options(fresh))
    report, clip = report_in(fresh), clips_in(fresh)["u01"]
    assert (report["metric"], report["profiles"], [table["title"] for table in report["tables"]]) == ("PER", ["phones"], ["test, PER %"])
    assert report["tables"][0]["rows"][0][:2] == ["ctc_greedy", "25.00"]
    assert (clip["ref"], clip["systems"][0]["text"]) == ("北京", "b ei3 j in1")
    assert clip["systems"][0]["scores"] == [[1, 4, ["b", "ei3", "j", ["ing1", "in1"]]]]
    with pytest.raises(RecipeError, match="expected test sets scored in words or characters"):
        run_program(monkeypatch, "13_report", *options(fresh, "other"), "--hyp", f"theirs={fresh / 'theirs.tsv'}")


def test_reported_figures_stand_beside_measured_ones(made):
    rows = read_rows([made / "12_score"])
    measured = measured_in(rows)
    assert {key[:2] for key in measured} == {("made", "test")}
    ours = {("aishell", "test", "CER"): ["offline 3.00 [2.00, 4.00] (plain abc)"], ("ascend", "test", "MER"): ["another metric"]}
    public, internal, hallucination = as_tables(REPORTED, ours)
    by_set = {row[1]: row for row in public["rows"]}
    assert by_set["AISHELL-1 test"][3:] == ["1.81", "2.41", "1.51", "0.64", "0.81", "0.92", "0.57", "0.60", "offline 3.00 [2.00, 4.00] (plain abc)"]
    assert by_set["AISHELL-1 dev"][-1] == by_set["ASCEND"][-1] == "-"
    assert by_set["M4Singer"][6] == "-"
    assert (len(public["rows"]), len(internal["rows"]), len(hallucination["rows"])) == (25, 11, 5)
    text = as_markdown(REPORTED, ours)
    assert "| reported: NIM4-ASR (streaming) | measured here |" in text
    assert "project page, 2026" in text


def test_every_reported_set_that_has_a_recipe_is_one_of_it():
    for row in json.loads(REPORTED.read_text(encoding="utf-8"))["rows"]:
        if "corpus" in row:
            recipe = (ROOT / "egs" / row["corpus"] / "run.sh").read_text(encoding="utf-8")
            prepare = (ROOT / "egs" / row["corpus"] / "prepare.py").read_text(encoding="utf-8")
            assert row["set"] in recipe or row["set"].removeprefix("test_") in prepare


def test_a_broken_file_of_reported_figures(tmp_path):
    (tmp_path / "tables.json").write_text('{"source": "x", "rows": [{"table": "public"}]}')
    with pytest.raises(RecipeError, match="restore the file"):
        as_tables(tmp_path / "tables.json", {})


def test_ids_are_as_made(made):
    assert list(clips_in(made)) == [*(id_of(i) for i in range(NUM_CLIPS)), "n1", "n2"]
