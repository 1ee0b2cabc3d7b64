"""Qwen3-Omni-30B-A3B-Instruct by transformers' own class, its thinker alone. https://github.com/QwenLM/Qwen3-Omni, Apache-2.0."""

import re

from asking import Greedy, messages, samples

QUOTES = {'"': '"', "“": "”", "「": "」", "'": "'"}


def load(settings):
    from transformers import Qwen3OmniMoeForConditionalGeneration

    def inputs(processor, path, language):
        asked = messages(settings, language, {"type": "audio", "audio": path})
        text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        return processor(text=text, audio=[samples(path)], return_tensors="pt", padding=True, use_audio_in_video=False)

    class Thinker(Greedy):
        def generate(self, made):
            limits = {f"thinker_{key}": value for key, value in self._settings["decoding"].items()}
            return self.model.generate(**made, return_audio=False, use_audio_in_video=False, **limits)

    thinker = Thinker(Qwen3OmniMoeForConditionalGeneration, settings, inputs)
    thinker.model.disable_talker()
    return thinker


def clean(raw, settings):
    """Without quotation marks around all of it; explanations stay, as errors that the model makes."""
    text = re.sub(r"\s+", " ", raw).strip()
    while len(text) > 1 and QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text
