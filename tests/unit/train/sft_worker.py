"""Supervised fine-tuning of a tiny speech LLM as a program, for the tests with several processes.

python sft_worker.py UNITS OUT STAGE SETTINGS_JSON [KILL_AT]: trains on UNITS/train.jsonl.gz; the model folder is OUT.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tiny import INVENTORY, SFT, tiny_llm, tiny_speech_llm

from nim4 import stage
from nim4.config import SftConfig, build
from nim4.corpus.batch import Source
from nim4.corpus.examples import Examples
from nim4.corpus.manifest import load_cuts
from nim4.train.distributed import processes
from nim4.train.fine_tuning import TrainingRun


class Killed(Exception):
    """In place of a signal: nothing is cleaned up that a signal would leave."""


def fine_tune(units: Path, out: Path, name: str, settings: dict, kill_at: int | None = None) -> None:
    """A run of stage `name`, from the last checkpoint in `out` if there is one; all processes stop inside step `kill_at`."""

    def stop(step: int) -> bool:
        if step == kill_at:
            raise Killed
        return False

    config = build(SftConfig, SFT | settings, "settings")
    model = tiny_speech_llm(tiny_llm(out.parent / f"llm-{os.environ.get('RANK', 0)}"))  # before transformers sees peers and writes on one only
    with processes("cpu") as peers:
        out.mkdir(exist_ok=True)
        run = TrainingRun(name, out, peers, [Source(units / "train.jsonl.gz")], list(load_cuts(units / "dev.jsonl.gz")), None)
        run.fine_tune(model, config, Examples(INVENTORY, model.prompt, config), before_step=stop)
        run.save(model, INVENTORY, config)


if __name__ == "__main__":
    units, out, name, settings, *kill_at = sys.argv[1:]
    stage.run(lambda: fine_tune(Path(units), Path(out), name, json.loads(settings), *map(int, kill_at)), name)
