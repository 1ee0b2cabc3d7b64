"""WenetSpeech as published: WenetSpeech.json lists recordings (audio/<part>/.../<aid>.opus, of minutes to hours) and the segments of each,
with text, times and the subsets that each belongs to: L, M, S to train on, DEV, TEST_NET, TEST_MEETING.

S is part of M and M of L: WENETSPEECH_TRAIN names the one that is read (s, m or l; m). Stage 0 holds all utterances in memory, about 6 kB
each. lhotse's recipe for this corpus drops what it cannot match; this one reads the same file and leaves it to stage 0 to list that.
Counts (13,825 in dev, 24,774 in test_net, 8,370 in test_meeting) are unverified, so not checked.
"""

import json
import os
from pathlib import Path

from nim4.config import RecipeError, nearest
from nim4.corpus.table import Row, need

TESTS = {"DEV": "dev", "TEST_NET": "test_net", "TEST_MEETING": "test_meeting"}  # subset: split
TRAIN = ("s", "m", "l")
SETTINGS = ("WENETSPEECH_TRAIN",)  # of the environment, that decide what is read
FIX = "give the folder that holds WenetSpeech.json and audio as --source"


def prepare(source: Path, work: Path) -> dict[str, list[Row]]:
    """The segments of dev, test_net, test_meeting and one training subset, those that the JSON file has."""
    root = source / "WenetSpeech" if (source / "WenetSpeech").is_dir() else source
    train = os.environ.get("WENETSPEECH_TRAIN", "m")
    if train not in TRAIN:
        raise RecipeError("WENETSPEECH_TRAIN", expected="s, m or l", found=repr(train), fix=nearest(train, TRAIN))
    split_of = TESTS | {train.upper(): f"train_{train}"}
    path = need(root / "WenetSpeech.json", FIX)
    rows: dict[str, list[Row]] = {}
    try:
        for audio in json.loads(path.read_bytes())["audios"]:
            for segment in audio["segments"]:
                for subset in segment["subsets"]:
                    if subset in split_of:
                        text, times = segment["text"], (float(segment["begin_time"]), float(segment["end_time"]))
                        rows.setdefault(split_of[subset], []).append(Row(segment["sid"], root / audio["path"], text, audio["aid"], "zh", *times))
    except (KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__} {error}"
        raise RecipeError(path, expected="audios with segments, their text, times and subsets", found=found, fix="unpack it again") from error
    if not rows:
        raise RecipeError(path, expected=f"segments of {', '.join(split_of)}", found="none", fix=FIX)
    return rows
