"""The snapshots of pre-training as stages 4 and 5 take them up: which encoder to align first, and which come after it.

The registry (nim4/train/cka.py) lists a first reference, then a trigger each time the encoder has moved, then the final snapshot.
Alignment starts on the first trigger; IA-SFT takes the later ones in order, and always ends on the last snapshot (paper, section 3.3).
"""

import logging
from pathlib import Path

from torch import Tensor

from nim4.config import RecipeError
from nim4.model.checkpoint import read_weights
from nim4.stage import file_hash
from nim4.train.cka import Snapshot, read_registry

log = logging.getLogger("nim4")
REGISTRY = "registry.jsonl"


def kept_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots of a stage-3 folder that can be taken up: triggers after the first reference, and the final one.

    Raises RecipeError when the folder has no registry.
    """
    rows = read_registry(folder / REGISTRY)
    if not rows:
        raise RecipeError(folder / REGISTRY, expected="the snapshots of stage 3", found="none", fix="run stage 3, or give its folder as --init")
    return [row for row in rows if row.path is not None and (row.final or (row.trigger and row.cka is not None))]


def alignment_snapshot(folder: Path) -> Snapshot:
    """The first trigger's snapshot. Without a trigger the last snapshot is used, and the log says so."""
    snapshots = kept_snapshots(folder)
    if not snapshots:
        raise RecipeError(folder / REGISTRY, expected="a trigger or a final snapshot", found="neither", fix="let stage 3 go on, or lower its start")
    first = snapshots[0]
    if first.final and not first.trigger:
        log.warning("no CKA trigger in %s: the last snapshot is used, step %d. A higher cka.threshold would give some", folder / REGISTRY, first.step)
    else:
        log.info("encoder: snapshot of step %d, CKA %.4f with its reference", first.step, first.cka)
    return first


def read_snapshot(folder: Path, snapshot: Snapshot) -> dict[str, Tensor]:
    """The weights of a snapshot. Raises RecipeError when the file is gone or is not the one that was registered."""
    path = folder / str(snapshot.path)
    if not path.is_file() or file_hash(path) != snapshot.sha256:
        found = "another file" if path.is_file() else "no such file"
        raise RecipeError(path, expected="the snapshot that registry.jsonl names", found=found, fix="restore it, or run stage 3 again")
    return read_weights(path)
