"""GLM-ASR-Nano by transformers' own class. https://github.com/zai-org/GLM-ASR, Apache-2.0."""

import re

from asking import Greedy, samples, text_of

FRAME = re.compile(r'^(?:The (?:spoken content|transcription) of the audio is|The content of the input audio is):?\s*(["\'])(.*)\1\.?$', re.DOTALL)


def load(settings):
    from transformers import GlmAsrForConditionalGeneration

    def inputs(processor, path, language):
        return processor.apply_transcription_request(samples(path), prompt=text_of(settings, language))

    return Greedy(GlmAsrForConditionalGeneration, settings, inputs)


def clean(raw, settings):
    """Without the sentence that sometimes stands around the transcript."""
    text = raw.strip()
    framed = FRAME.match(text)
    return framed[2].strip() if framed else text
