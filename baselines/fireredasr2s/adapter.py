"""FireRedASR2-LLM by its authors' code, which is no package: `install` clones it. https://github.com/FireRedTeam/FireRedASR2S, Apache-2.0.

Its weights are pickles that its code loads as such: load only what came from the authors.
"""

import sys
from pathlib import Path


def load(settings):
    sys.path.insert(0, str(Path(__file__).parent / ".venv" / "code"))
    from fireredasr2s.fireredasr2 import FireRedAsr2, FireRedAsr2Config

    if not Path(settings["model"]).is_dir():
        raise FileNotFoundError(f"no folder {settings['model']} with the weights; download FireRedTeam/FireRedASR2-LLM, and --set model=DIR")
    return FireRed(FireRedAsr2.from_pretrained("llm", settings["model"], FireRedAsr2Config(**settings["decoding"])))


def clean(raw, settings):
    return raw.strip()


class FireRed:
    def __init__(self, model):
        self._model = model

    def transcribe(self, path, language):
        found = self._model.transcribe(["clip"], [path])
        # its code turns an exception of the model into an empty list, and one of the audio or features into an empty text without "rtf", the time it
        # took: both are failures, no silence
        if len(found) != 1 or found[0].get("uttid") != "clip" or not isinstance(found[0].get("text"), str) or "rtf" not in found[0]:
            raise RuntimeError(f"it gave no result but {found!r:.100}; what went wrong is in the log")
        return {"raw": found[0]["text"]}
