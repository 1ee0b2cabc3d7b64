"""CMU PocketSphinx with the US-English model inside its package: GMM-HMM, 5-state phones, a trigram language model. It knows no Mandarin."""

import re
import wave

from pocketsphinx import Decoder


def load(settings):
    return Sphinx(Decoder(samprate=16000, loglevel="FATAL", **settings["decoder"]))


def clean(raw, settings):
    """Without the marks of other pronunciations, as in `a(2)`, and of noises, as in `<sil>` and `[NOISE]`."""
    words = [re.sub(r"\(\d+\)$", "", word) for word in raw.split()]
    return " ".join(word for word in words if not re.fullmatch(r"<.*>|\[.*\]|\+\+.*\+\+", word))


class Sphinx:
    def __init__(self, decoder):
        self._decoder = decoder

    def transcribe(self, path, language):
        with wave.open(path) as file:
            samples = file.readframes(file.getnframes())
        self._decoder.start_utt()
        self._decoder.process_raw(samples, full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()  # None where it hears no word
        return {"raw": found.hypstr if found else ""}
