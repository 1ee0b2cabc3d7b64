"""An endless stream: one session per segment which hears nothing else, the same updates for any split, memory bounded by a segment."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spoken_clips import join, read_clips
from tiny import make_talkative, tiny_llm, tiny_speech_llm

from nim4.config import VadConfig
from nim4.decode import streaming, vad
from nim4.decode.listening import Listener
from nim4.decode.streaming import Recogniser, StreamingSession
from nim4.decode.vad import WINDOW_SAMPLES, segments

SHORT = VadConfig(min_silence_s=0.3, padding_s=0.2, max_segment_s=2, cut_search_s=1)


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory):
    return Recogniser(make_talkative(tiny_speech_llm(tiny_llm(tmp_path_factory.mktemp("llm"), tie_word_embeddings=False))))


class Loud:
    """Stands for the network, quickly: what is not digital silence is speech."""

    def hear(self, windows):
        yield from ()
        return [float(bool(window.any())) for window in windows]


@pytest.fixture
def loud(monkeypatch):
    monkeypatch.setattr(vad, "SpeechProbability", Loud)


def listen(listener, pieces):
    return [update for piece in pieces for update in listener.push(piece)] + listener.finish()


def essence(updates):
    """All but the seconds of compute."""
    return [(update.kind, update.segment, update.audio_s, update.hypothesis) for update in updates]


def test_each_segment_is_heard_by_a_session_of_its_own(recogniser, monkeypatch):
    samples = join(read_clips(3), 1.0)
    heard = []
    append = StreamingSession.append

    def recorded(session, piece):
        if not heard or heard[-1][0] is not session:
            heard.append((session, []))
        heard[-1][1].append(piece)
        append(session, piece)

    monkeypatch.setattr(StreamingSession, "append", recorded)
    updates = listen(Listener(recogniser, SHORT), np.split(samples, range(1600, len(samples), 1600)))
    places = segments(samples, SHORT)
    assert len(places) > 3  # one is cut for its length
    assert len(heard) == len(places)
    for (session, pieces), (start, end) in zip(heard, places, strict=True):
        assert np.array_equal(np.concatenate(pieces), samples[start:end])
        assert session._row is None
    finals = [update for update in updates if update.kind == "final"]
    for final, (start, end) in zip(finals, places, strict=True):
        session = recogniser.session()
        append(session, samples[start:end])
        alone = session.finalize()
        assert (final.hypothesis.text, final.hypothesis.phones, final.audio_s) == (alone.text, alone.phones, end / 16_000)
    assert len({final.hypothesis.text for final in finals}) > 1


def test_updates_are_in_order(recogniser):
    samples = join(read_clips(3), 1.0)
    updates = listen(Listener(recogniser, SHORT), [samples])
    kinds = "".join({"speech_started": "<", "partial": "p", "speech_stopped": ">", "final": "f"}[update.kind] for update in updates)
    assert all(set(part[1:]) <= {"p"} and part[0] == "<" for part in kinds.split(">f")[:-1])
    assert kinds.endswith(">f")
    assert [update.segment for update in updates if update.kind == "final"] == list(range(kinds.count("<")))
    assert [update.audio_s for update in updates] == sorted(update.audio_s for update in updates)
    assert all((update.hypothesis is None) == (update.kind in ("speech_started", "speech_stopped")) for update in updates)


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_any_split_of_the_stream_gives_the_same_updates(recogniser, data):
    samples = join(read_clips(2), 0.5)
    ends = data.draw(st.lists(st.integers(0, len(samples)), max_size=20))
    split = listen(Listener(recogniser, SHORT), np.split(samples, sorted(ends)))
    assert essence(split) == essence(listen(Listener(recogniser, SHORT), [samples]))


def test_silence_starts_nothing(recogniser):
    assert listen(Listener(recogniser), [np.zeros(50_000, np.float32)]) == []


def tensor_bytes():
    gc.collect()
    found = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter, np.ndarray)]
    return sum(own.nbytes for own in found if isinstance(own, np.ndarray) or all(isinstance(size, int) for size in own.shape))


def test_ten_minutes_take_no_more_memory_than_one(tmp_path, loud, monkeypatch):
    monkeypatch.setattr(streaming, "max_answer_tokens", lambda speech_tokens: 4)
    recogniser = Recogniser(tiny_speech_llm(tiny_llm(tmp_path)))  # hears few phonemes, so that the test is quick
    clips = read_clips(12)
    order = np.random.default_rng(0)
    listener, heard, sizes, finals = Listener(recogniser, VadConfig(max_segment_s=8, cut_search_s=2)), 0, [], 0
    while heard < 600 * 16_000:
        piece = join([clips[order.integers(len(clips))]], float(order.choice([0.2, 2.0])))
        heard += len(piece)
        finals += sum(update.kind == "final" for update in listener.push(piece))
        if not listener._cutter.speaking:
            assert listener._session is None
            assert len(listener._cutter.kept) <= 16_000 + WINDOW_SAMPLES
            if finals >= 20 * (len(sizes) + 1):
                sizes.append(tensor_bytes())
        assert len(listener._cutter.kept) <= 3 * 16_000
    listener.finish()
    assert finals > 80
    assert len(sizes) > 3
    assert max(sizes[1:]) < 1.02 * sizes[0]
    assert sum(isinstance(found, StreamingSession) for found in gc.get_objects()) == 0


def test_mistakes(recogniser):
    listener = Listener(recogniser)
    with pytest.raises(ValueError, match="samples must be finite"):
        listener.push(np.array([np.nan], np.float32))
    listener.abort()
    for call in (listener.finish, lambda: listener.push(np.zeros(1, np.float32))):
        with pytest.raises(RuntimeError, match="needs a new Listener"):
            call()
