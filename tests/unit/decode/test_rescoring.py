"""The phoneme head's say in what the language model proposes."""

import itertools

import numpy as np
import pytest
import torch

from nim4.corpus.g2p import Lexicon
from nim4.corpus.units import PhonemeInventory
from nim4.decode.rescoring import CtcRescorer
from nim4.model.ctc import collapse

INVENTORY = PhonemeInventory.default()


def heard(text: str, num_frames: int = 40, sure: float = 8.0) -> torch.Tensor:
    """(S, V) log-probabilities of a head that hears the phonemes of `text`, every other frame blank."""
    logits = torch.zeros(num_frames, len(INVENTORY))
    ids = INVENTORY.encode(Lexicon("zh-en").phones(text))
    logits[:, 0] = sure
    for place, phone in enumerate(ids):
        logits[2 * place + 1] = 0.0
        logits[2 * place + 1, phone] = sure
    return logits.log_softmax(-1)


def test_a_likelihood_is_the_sum_of_all_paths():
    torch.manual_seed(0)
    log_probs = torch.full((5, len(INVENTORY)), -30.0)
    ids = INVENTORY.encode(Lexicon("zh-en").phones("八"))
    log_probs[:, [0, *ids]] = torch.randn(5, 1 + len(ids)).log_softmax(-1)
    paths = itertools.product([0, *ids], repeat=5)
    right = [sum(log_probs[place, label].item() for place, label in enumerate(path)) for path in paths if collapse(list(path)) == ids]
    assert len(right) > 5
    (found, nothing) = CtcRescorer(INVENTORY, 1.0).log_likelihoods(["八", ""], log_probs)
    assert found == pytest.approx(np.logaddexp.reduce(right), abs=1e-4)
    assert nothing == pytest.approx(log_probs[:, 0].sum().item(), abs=1e-4)


def test_only_silence_and_nothing_written():
    log_probs = heard("", sure=9.0)
    assert CtcRescorer(INVENTORY, 0.5).log_likelihoods(["", ""], log_probs) == pytest.approx([log_probs[:, 0].sum().item()] * 2)


def test_a_word_that_nobody_said_is_left_out():
    candidates = [("打开语言识别。", -1.0), ("打开语音识别。", -3.0), ("打开。", -3.5)]
    log_probs = heard("打开语音识别")
    assert CtcRescorer(INVENTORY, 0.3).best(candidates, log_probs) == "打开语音识别。"
    assert CtcRescorer(INVENTORY, 0.0).best(candidates, log_probs) == "打开语言识别。"


def test_what_sounds_the_same_is_the_language_models_choice():
    candidates = [("公式", -2.0), ("公事", -1.0)]
    assert CtcRescorer(INVENTORY, 0.3).best(candidates, heard("公式")) == "公事"


def test_more_phonemes_than_frames_are_taken_only_if_all_are_such():
    log_probs = heard("", num_frames=3)
    assert CtcRescorer(INVENTORY, 0.3).best([("打开语音识别", -0.1), ("啊", -9.0)], log_probs) == "啊"
    assert CtcRescorer(INVENTORY, 0.3).best([("打开语音识别", -0.1), ("打开语言识别", -9.0)], log_probs) == "打开语音识别"
