"""Step-Audio-2-mini by its authors' code, which is no package: `install` clones it. https://github.com/stepfun-ai/Step-Audio2, Apache-2.0.

Its class runs Python code that lies beside the weights (trust_remote_code): load only what came from the authors.
"""

import random
import re
import sys
from pathlib import Path

from asking import text_of


def load(settings):
    sys.path.insert(0, str(Path(__file__).parent / ".venv" / "code"))
    from stepaudio2 import StepAudio2

    if not Path(settings["model"]).is_dir():
        raise FileNotFoundError(f"no folder {settings['model']} with the weights; download stepfun-ai/Step-Audio-2-mini, and --set model=DIR")
    return Step(StepAudio2(settings["model"]), settings)


def clean(raw, settings):
    """Without the marks of turns and other tokens in <| |>."""
    return re.sub(r"<\|[^|<>]*\|>", "", raw).strip()


class Step:
    def __init__(self, model, settings):
        self._model, self._settings = model, settings

    def transcribe(self, path, language):
        import torch

        random.seed(self._settings["seed"])  # where it samples, a clip's text must not depend on the clips before it
        torch.manual_seed(self._settings["seed"])
        asked = [
            {"role": "system", "content": text_of(self._settings, language)},
            {"role": "human", "content": [{"type": "audio", "audio": path}]},
            {"role": "assistant", "content": None},
        ]
        ids, text, _ = self._model(asked, **self._settings["decoding"])
        if not isinstance(text, str):
            raise RuntimeError(f"it gave no text but {text!r:.100}")
        limit = self._settings["decoding"]["max_new_tokens"]
        return {"raw": text, "tokens": len(ids), "finish": "length" if len(ids) >= limit - 1 else "stop"}  # it leaves out the last token
