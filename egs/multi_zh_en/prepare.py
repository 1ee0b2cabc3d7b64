"""A mixture of corpora that are prepared already: SOURCE is the folder with <corpus>/{manifests,fbank,units}, that is data/.

Training reads the parts where they are (`--train "aishell:train librispeech:train-clean-100=0.5"`), so nothing is copied. What the mixture
has of its own is `sample`: at most 2,000 utterances of each part, spread evenly, from which the mean and variance of the features come.
MULTI_ZH_EN_TRAIN lists the parts; run.sh beside this file sets it.
"""

import os
from pathlib import Path

from lhotse import CutSet

from nim4.config import RecipeError
from nim4.corpus.batch import parse_sources
from nim4.corpus.manifest import load_cuts
from nim4.corpus.table import spread

SETTINGS = ("MULTI_ZH_EN_TRAIN",)  # of the environment, that decide what is read
PER_PART = 2000


def prepare(source: Path, work: Path) -> dict[str, CutSet]:
    """The sample of all parts."""
    parts = parse_sources(os.environ.get("MULTI_ZH_EN_TRAIN", ""), source / "multi_zh_en" / "manifests", "MULTI_ZH_EN_TRAIN")
    cuts = []
    for part in parts:
        corpus = part.path.parent.parent.name
        if not part.path.exists():
            fix = f"run egs/{corpus}/run.sh --stop-stage 2 first, or take it out of MULTI_ZH_EN_TRAIN"
            raise RecipeError(part.path, expected="a part that is prepared", found="nothing", fix=fix)
        cuts += spread(list(load_cuts(part.path)), PER_PART)
    return {"sample": CutSet.from_cuts(cuts)}
