"""Recordings of any length: the texts of their segments, when words are said, subtitles."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from spoken_clips import join, read_clips
from tiny import make_talkative, tiny_llm, tiny_speech_llm

from nim4.config import VadConfig
from nim4.corpus.g2p import Lexicon
from nim4.corpus.text import joined
from nim4.corpus.units import PhonemeInventory
from nim4.decode import recordings, vad
from nim4.decode.offline import transcripts
from nim4.decode.recordings import Segment, Transcriber, Word, as_json, as_srt, as_vtt, cues, full_text, word_times
from nim4.decode.streaming import new_rows
from nim4.decode.together import run
from nim4.decode.vad import segments

SHORT = VadConfig(min_silence_s=0.3, padding_s=0.2, max_segment_s=2, cut_search_s=1)
DEFAULT = PhonemeInventory.default()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_talkative(tiny_speech_llm(tiny_llm(tmp_path_factory.mktemp("llm"), tie_word_embeddings=False)))


def said(*words):
    """Log-probabilities that say so: (phones, frames each) or a number of blank frames, and the text's lexicon reads them."""
    rows = []
    for word in words:
        labels = [0] * word if isinstance(word, int) else [label for label in DEFAULT.encode(word[0]) for _ in range(word[1])]
        rows += [np.full(len(DEFAULT.tokens), -9.0, np.float32) for _ in labels]
        for row, label in zip(rows[len(rows) - len(labels) :], labels, strict=True):
            row[label] = -0.01
    return np.stack(rows)


def test_a_recording_is_the_texts_of_its_segments_in_order(model, monkeypatch):
    samples = join(read_clips(4), 1.0)
    places = segments(samples, SHORT)
    assert len(places) > 4
    for batch_s in (60.0, 3.0, 0.1):
        monkeypatch.setattr(recordings, "BATCH_S", batch_s)
        found = Transcriber(model, DEFAULT, vad=SHORT, given=["北京"], with_words=False).transcribe(samples)
        assert [(round(segment.start_s * 16_000), round(segment.end_s * 16_000)) for segment in found] == places
        assert [segment.text for segment in found] == [transcripts(model, [samples[a:b]], hints=[["北京"]])[0] for a, b in places]
        assert len({segment.text for segment in found}) > 1
        together = Transcriber(model, DEFAULT, vad=SHORT, given=["北京"], with_words=False, rows=new_rows(model))
        assert [task.value() for task in run([together.decoding(samples, place) for place in places])] == found
        assert all((segment.words, segment.untimed, segment.hints) == (None, None, ("北京",)) for segment in found)


def test_where_nobody_speaks_there_is_no_text(model):
    for num_samples in (0, 1, 100, 50_000):
        found = Transcriber(model, DEFAULT).transcribe(np.zeros(num_samples, np.float32))
        assert (found, full_text(found), as_json(found), as_srt(found), as_vtt(found)) == ([], "", [], "", "WEBVTT\n")


def test_words_are_timed_by_the_phones_of_the_text():
    lexicon = Lexicon()
    (door,) = lexicon.words("door")
    log_probs = said(5, (lexicon.phones("你"), 2), 3, (lexicon.phones("好"), 2), 10, (door[1], 3), 4)
    words = word_times("你好，Door!", log_probs, lexicon, DEFAULT, start_s=10.0)
    assert [word.text for word in words] == ["你", "好", "Door"]
    starts, ends = [5, 12, 26], [9, 16, 26 + 3 * len(door[1])]
    assert [word.start_s for word in words] == pytest.approx([10 + 0.04 * frame for frame in starts])
    assert [word.end_s for word in words] == pytest.approx([10 + 0.04 * frame for frame in ends])
    assert word_times("你好，Door!", log_probs, lexicon, DEFAULT, 10.0, 11.1)[-1].end_s == 11.1
    assert word_times("", log_probs, lexicon, DEFAULT) == []
    assert word_times("，", log_probs, lexicon, DEFAULT) == []


@pytest.mark.parametrize(
    ("text", "inventory", "reason"),
    [
        ("3点", DEFAULT, "not written as it is read"),
        ("한", DEFAULT, "nobody can read"),
        ("你好", PhonemeInventory(["<blk>", "<unk>", "a"]), "the model does not have"),
        ("你好" * 10, DEFAULT, "need at least 40 frames, but there are 6"),
    ],
)
def test_words_that_cannot_be_timed_say_why(text, inventory, reason):
    with pytest.raises(ValueError, match=reason):
        word_times(text, said(6), Lexicon(), inventory)


def test_a_segment_without_times_says_why(model, monkeypatch):
    monkeypatch.setattr(model, "write", lambda speech, lens, hints: ["3点" for _ in hints])
    (segment,) = Transcriber(model, DEFAULT, vad=VadConfig(threshold=0)).transcribe(np.zeros(20_000, np.float32))
    assert (segment.text, segment.words) == ("3点", None)
    assert as_json([segment]) == [{"start_s": 0.0, "end_s": 1.25, "text": "3点", "words": None, "untimed": "a word is not written as it is read"}]


def test_json_and_subtitles():
    words = (Word("a", 0.5, 0.75), Word("b", 1.0004, 1.25))
    found = [
        Segment(0.25, 1.5, "a <b>\n\n& c", words, None, ()),
        Segment(2.0, 3.0, "", (), None, ()),
        Segment(3661.9996, 3662.5, "打开", (), None, ()),
    ]
    assert json.loads(json.dumps(as_json(found)))[0]["words"][1] == {"text": "b", "start_s": 1.0, "end_s": 1.25}
    assert as_srt(found) == "1\n00:00:00,250 --> 00:00:01,500\na <b> & c\n\n2\n01:01:02,000 --> 01:01:02,500\n打开\n"
    vtt = "WEBVTT\n\n00:00:00.250 --> 00:00:01.500\na &lt;b&gt; &amp; c\n\n01:01:02.000 --> 01:01:02.500\n打开\n"
    assert as_vtt(found) == vtt


def test_a_long_segment_gives_several_subtitles_between_its_words():
    words = [Word(text, start, start + 1.0) for text, start in (("a", 1.0), ("b", 3.0), ("a", 6.75), ("c", 8.0), ("long", 16.0))]
    segment = Segment(0.5, 18.0, "“a b, a—c. long", tuple(words), None, ())
    assert cues([segment]) == [(0.5, 4.0, "“a b,"), (6.75, 9.0, "a—c."), (16.0, 18.0, "long")]
    assert cues([replace(segment, words=None)]) == [(0.5, 18.0, segment.text)]
    assert cues([replace(segment, words=(Word("a", 9.0, 17.0), *words[4:]))]) == [(0.5, 17.0, "“a b, a—c."), (16.0, 18.0, "long")]


def test_texts_are_joined_as_their_scripts_want_it():
    assert joined(["open.", "the door", "", "打开", "CarPlay", "Apple", "，你", "ｖ"]) == "open. the door打开CarPlay Apple，你ｖ"


def test_threads_of_others_are_left_alone(model):
    vad._silero.cache_clear()
    torch.set_num_threads(2)
    Transcriber(model, DEFAULT).transcribe(np.zeros(1000, np.float32))
    assert torch.get_num_threads() == 2
