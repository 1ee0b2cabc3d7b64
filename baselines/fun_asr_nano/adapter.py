"""Fun-ASR-Nano by transformers' own class. https://github.com/FunAudioLLM/Fun-ASR, Apache-2.0."""

import re

from asking import Greedy, samples


def load(settings):
    from transformers import FunAsrNanoForConditionalGeneration

    def inputs(processor, path, language):
        return processor.apply_transcription_request(samples(path), language=language)

    return Greedy(FunAsrNanoForConditionalGeneration, settings, inputs)


def clean(raw, settings):
    """As the authors' package cleans: `/sil` is a pause."""
    return re.sub(r"\s+", " ", raw.replace("/sil", " ")).strip()
