#!/usr/bin/env python3
"""The golden loss curves: 20 steps of each training stage at the size `ci`, on made features, fp32, one thread, fixed seeds.

Stages 4 to 7 and 9 start from each other and use the language model of egs/mini. Stage 8 has no curve: it samples, and one
token that falls the other way on another CPU changes all that follow.

`test_golden.py` runs them again and compares. A change that is meant to move them renews them in the same commit, whose message says why:

    python tests/golden/renew.py           # all curves; says by how much each has moved
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # so that it also runs alone

import numpy as np
from lhotse import Features, LilcomChunkyWriter, MonoCut, SupervisionSegment

from nim4.corpus.feats import Cmvn
from nim4.corpus.manifest import save_cuts
from nim4.corpus.units import PhonemeInventory
from nim4.stage import read_jsonl

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
STEPS = 20
PRETRAIN = {"pretrain_cr_ctc": (), "pretrain_plain_ctc": ("train.cr_weight=0",)}  # curve: settings beside those of the size ci
TUNING = {  # curve: the one it starts from, options beside the shared ones; in the order in which they are made
    "align": ("pretrain_cr_ctc", [f"--model-config={ROOT / 'local/conf/model/ci.yaml'}", f"--set=llm.name={ROOT / 'egs/mini/llm'}"]),
    "ia_sft": ("align", ["--snapshots=pretrain_cr_ctc"]),
    "joint_sft": ("ia_sft", []),
    "context_sft": ("joint_sft", [f"--entities={ROOT / 'egs/mini/words.txt'}", "--aligner=ia_sft"]),
    "phoneme_head": ("context_sft", []),
}
CURVES = [*PRETRAIN, *TUNING]
WORDS = (ROOT / "egs/mini/words.txt").read_text(encoding="utf-8").split()
PARTS = ("loss", "ctc", "cr", "accuracy", "grad_norm")
VALID = ("per", "blank_share", "entropy", "loss_streaming")
PHONES = ["b", "p", "m", "f", "d", "t", "n", "l", "a1", "ai4", "ang2", "K", "AA", "Z"]
SPLITS = {"train": 48, "dev": 6}  # utterances


def made_utterance(name, rng, writer):
    """A cut whose features are one fixed spectrum per phone, each 10 to 20 frames long, under noise: something CTC can learn."""
    phones = [PHONES[i] for i in rng.integers(0, len(PHONES), rng.integers(3, 9))]
    spectra = np.random.default_rng(7).normal(-8.0, 3.0, (len(PHONES), 80))
    rows = np.repeat([PHONES.index(phone) for phone in phones], rng.integers(10, 21, len(phones)))
    features = (spectra[rows] + rng.normal(0.0, 1.0, (len(rows), 80))).astype(np.float32)
    duration_s = len(rows) / 100
    stored = Features(
        type="kaldi-fbank",
        num_frames=len(rows),
        num_features=80,
        frame_shift=0.01,
        sampling_rate=16_000,
        start=0.0,
        duration=duration_s,
        recording_id=name,
        channels=0,
        storage_type=writer.name,
        storage_path=str(writer.storage_path),
        storage_key=writer.write(name, features),
    )
    text = "".join(WORDS[PHONES.index(phone)] for phone in phones)  # for the language model: a word for each phone
    supervision = SupervisionSegment(name, name, 0.0, duration_s, text=text, speaker="made", language="zh", custom={"phones": " ".join(phones)})
    return MonoCut(name, 0.0, duration_s, 0, [supervision], features=stored), features


def make_data(folder):
    """The products of stages 1 and 2 that training reads: manifests with features and phones, tokens.txt, cmvn.json."""
    cmvn = Cmvn()
    for split, count in SPLITS.items():
        rng = np.random.default_rng(count)
        (folder / "units").mkdir(parents=True, exist_ok=True)
        with LilcomChunkyWriter(folder / "units" / f"{split}.lca") as writer:
            made = [made_utterance(f"{split}{number:02d}", rng, writer) for number in range(count)]
        save_cuts([cut for cut, _ in made], folder / "units" / f"{split}.jsonl.gz")
        for _, features in made:
            cmvn.add(features)
    cmvn.save(folder / "cmvn.json")
    PhonemeInventory.default().save(folder / "units" / "tokens.txt")


def run_curve(name, folder):
    """Runs the stage of a curve on `make_data`, in `folder`; the losses of each step, and the last validation numbers.

    Raises CalledProcessError if it fails. A curve of TUNING needs the one it starts from, made in the same folder before.
    """
    settings = [f"train.max_steps={STEPS}", "train.log_every=1", f"train.valid_every={STEPS}", f"train.save_every={STEPS}"]
    options = ["--units=units", "--train=train", "--valid=dev", f"--out={name}", "--device=cpu"]
    if name in PRETRAIN:
        program = "03_pretrain.py"
        options += ["--cmvn=cmvn.json", f"--model-config={ROOT / 'local/conf/model/ci.yaml'}"]
        settings += PRETRAIN[name]
    else:
        (program,) = (path.name for path in (ROOT / "local").glob(f"0?_{name}.py"))
        start, more = TUNING[name]
        options += [f"--init={start}", *more]
    subprocess.run(
        [
            *(sys.executable, ROOT / "local" / program, *options, f"--train-config={ROOT / 'local/conf/train/ci.yaml'}"),
            *(f"--set={setting}" for setting in settings),
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    rows = read_jsonl(folder / name / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "train"]
    last = [row for row in rows if row["kind"] == "valid"][-1]
    curve = {part: [row[part] for row in steps] for part in PARTS if part in steps[0]}
    return {**curve, "valid": {part: last[part] for part in VALID if part in last}}


def deviation(found, golden):
    """The largest relative difference of two curves; infinite when they have not the same numbers."""
    one, other = np.hstack(flat(found)), np.hstack(flat(golden))
    if found.keys() != golden.keys() or one.shape != other.shape or not np.isfinite(one).all():
        return float("inf")
    return float(np.max(np.abs(one - other) / np.maximum(np.abs(other), 1e-3)))


def flat(curve):
    """The numbers of a curve, in a fixed order."""
    return [list(curve[part].values()) if isinstance(curve[part], dict) else curve[part] for part in sorted(curve)]


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        for curve in CURVES:
            path = FOLDER / f"{curve}.json"
            found = run_curve(curve, folder)
            moved = f"moved by at most {deviation(found, json.loads(path.read_text(encoding='utf-8'))):.1e}" if path.is_file() else "new"
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: {moved}")


if __name__ == "__main__":
    main()
