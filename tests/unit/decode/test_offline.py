"""Whole recordings in batches: all of them, longest first, unreadable ones told, the same alone and together."""

from functools import partial

import numpy as np
import pytest
import torch
from tiny import tiny_llm, tiny_speech_llm

from nim4.corpus.manifest import load_cuts
from nim4.decode.offline import decode_cuts, features_of, transcripts


@pytest.fixture(scope="module")
def recordings():
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, length).astype(np.float32) for length in (16_000, 9_000, 100, 30_000)]


def test_recordings_alone_are_those_in_a_batch(recordings, tmp_path):
    model = tiny_speech_llm(tiny_llm(tmp_path, tie_word_embeddings=False))
    hints = [[], ["ab"], [], ["c", "d"]]
    together = transcripts(model, recordings, hints=hints)
    assert together == [transcripts(model, [samples], hints=[own])[0] for samples, own in zip(recordings, hints, strict=True)]
    assert any(together)
    assert transcripts(model, [recordings[2][:0]]) == [""]


class Last:
    """A rescorer that takes the least likely candidate."""

    def best(self, candidates, log_probs):
        assert log_probs.exp().sum(-1).allclose(torch.ones(len(log_probs)))
        return candidates[-1][0]


def test_a_rescorer_chooses_among_the_beams(recordings, tmp_path):
    model = tiny_speech_llm(tiny_llm(tmp_path, tie_word_embeddings=False))
    found = model.candidates(*model.adaptor(*model.encode(*features_of(recordings, torch.device("cpu")))), 3, hints=None)
    assert [row[0][0] for row in found] != [row[-1][0] for row in found]
    assert transcripts(model, recordings, num_beams=3, rescorer=Last()) == [row[-1][0] for row in found]


class All:
    """A rescorer that says what it was asked."""

    def best(self, candidates, log_probs):
        return candidates


def test_what_is_written_without_hints_is_in_the_choice_where_there_are_hints(recordings, tmp_path):
    model = tiny_speech_llm(tiny_llm(tmp_path, tie_word_embeddings=False))
    hints = [[], ["ab"], [], ["c", "d"]]
    speech = model.adaptor(*model.encode(*features_of(recordings, torch.device("cpu"))))
    plain, hinted = (model.candidates(*speech, 3, hints=own) for own in (None, hints))
    asked = transcripts(model, recordings, hints=hints, num_beams=3, rescorer=All())
    for row, own in enumerate(hints):
        texts = [text for text, _ in asked[row]]
        assert len(set(texts)) == len(texts)
        both = [*hinted[row], *plain[row]] if own else plain[row]
        assert dict(asked[row]) == pytest.approx({text: max(p for other, p in both if other == text) for text, _ in both}, abs=1e-4)
    assert any(dict(asked[row]) != pytest.approx(dict(hinted[row]), abs=1e-4) for row in (1, 3))


def test_every_cut_is_decoded_once_longest_first(units):
    cuts = list(load_cuts(units / "train.jsonl.gz"))
    sizes = []

    def decode(batch):
        sizes.append(len(batch))
        return [len(samples) for samples in batch]

    decoded = list(decode_cuts(cuts, 4.0, decode))
    assert sorted(row.cut.id for row in decoded) == sorted(cut.id for cut in cuts)
    assert [row.result for row in decoded] == sorted((row.result for row in decoded), reverse=True)
    assert all(row.result == round(row.cut.duration * 16_000) for row in decoded)
    assert len(sizes) > 1
    assert max(sizes) > 1


def test_audio_that_cannot_be_read_is_told_and_the_rest_goes_on(units):
    cuts = list(load_cuts(units / "test.jsonl.gz"))
    cuts[1].recording.sources[0].source = "/nowhere.wav"
    decoded = {row.cut.id: row for row in decode_cuts(cuts, 60.0, lambda batch: ["text"] * len(batch))}
    assert [cut.id for cut in cuts if decoded[cut.id].error] == [cuts[1].id]
    assert decoded[cuts[1].id].result is None
    assert {decoded[cut.id].result for cut in cuts if cut is not cuts[1]} == {"text"}


def test_the_language_model_writes_the_same_in_two_processes(units, tmp_path):
    model = tiny_speech_llm(tiny_llm(tmp_path, tie_word_embeddings=False))
    cuts = list(load_cuts(units / "test.jsonl.gz"))

    def texts(num_processes):
        return [(row.cut.id, row.result) for row in decode_cuts(cuts, 1.0, partial(transcripts, model), num_processes)]

    assert texts(2) == texts(1)
    assert any(text for _, text in texts(1))
