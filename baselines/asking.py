"""What adapters share: the messages of a request, and greedy decoding with a class of transformers. Runs in the baselines' environments."""


def text_of(settings, language):
    """The prompt's text for a language that the model is told, or for none; None where the model wants no text."""
    texts = settings["prompt"]["texts"]
    text = texts.get(language) or texts.get("with_language" if language else "without_language")
    return text.replace("{language}", language or "") if text else None


def messages(settings, language, audio):
    """The conversation that asks for a transcript.

    Args:
        audio: the item of the user's turn that holds the audio, in the form that the model's template or server wants.
    """
    text = text_of(settings, language)
    written = [{"type": "text", "text": text}] if text else []
    content = [audio, *written] if settings["prompt"]["audio_first"] else [*written, audio]
    system = settings["prompt"]["system"]
    turns = [{"role": "user", "content": content}]
    return turns if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}, *turns]


def place(settings):
    """Where the weights go: (device, dtype)."""
    import torch

    device = settings["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, getattr(torch, settings["dtype"])


def from_hub(loader, settings):
    """`loader.from_pretrained` of the model at its revision; never runs code that comes with weights."""
    return loader.from_pretrained(settings["model"], revision=settings.get("revision"), trust_remote_code=False)


class Greedy:
    """A model of transformers with its processor, one clip at a time: what it writes must not depend on who else is in the batch.

    Args:
        inputs: makes the processor's output of a path and a language.
    """

    def __init__(self, model_class, settings, inputs):
        import torch
        from transformers import AutoProcessor

        self._device, self._dtype = place(settings)
        self.processor = from_hub(AutoProcessor, settings)
        self.model = from_hub(model_class, settings).to(self._device, self._dtype).eval()
        self._settings, self._inputs, self._torch = settings, inputs, torch

    def transcribe(self, path, language):
        made = self._inputs(self.processor, path, language).to(self._device, self._dtype)
        with self._torch.inference_mode():
            written = self.generate(made)
        ids = written[0, made["input_ids"].shape[1] :].tolist()
        limit = self._settings["decoding"]["max_new_tokens"]
        tokenizer = self.processor.tokenizer
        return {
            "raw": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            "tokens": len(ids),
            "finish": "length" if len(ids) >= limit else "stop",
        }

    def generate(self, made):
        """(1, L) ids, the prompt's included."""
        return self.model.generate(**made, **self._settings["decoding"])


def samples(path):
    """A 16 kHz, one-channel, 16-bit WAV file as (N,) float32 in [-1, 1]."""
    import wave

    import numpy as np

    with wave.open(path) as file:
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32768
