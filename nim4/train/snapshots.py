"""The snapshots of pre-training as stages 4 and 5 take them up: which encoder to align first, and which come after it.

The registry (nim4/train/cka.py) lists a first reference, then a trigger each time the encoder has moved, then the final snapshot.
Alignment starts on the first trigger; IA-SFT takes the later ones in order, and always ends on the last snapshot (paper, section 3.3).
"""

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from nim4.config import RecipeError
from nim4.model.checkpoint import WEIGHTS, read_weights
from nim4.stage import file_hash, write_jsonl
from nim4.train.cka import Snapshot, read_registry

log = logging.getLogger("nim4")
REGISTRY = "registry.jsonl"
Read = TypeVar("Read")


def register_only(folder: Path) -> None:
    """Writes the registry of a model folder whose encoder was trained elsewhere: its weights are the final snapshot, and the only one."""
    row = Snapshot(0, None, None, trigger=False, final=True, path=WEIGHTS, sha256=file_hash(folder / WEIGHTS))
    write_jsonl(folder / REGISTRY, [asdict(row)])


def kept_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots of a stage-3 folder that can be taken up, in order: triggers after the first reference, and the final one.

    Raises RecipeError when the folder has no registry.
    """
    rows = read_registry(folder / REGISTRY)
    if not rows:
        raise RecipeError(folder / REGISTRY, expected="the snapshots of stage 3", found="none", fix="run stage 3, or correct the folder's name")
    return [row for row in rows if row.path is not None and (row.final or (row.trigger and row.cka is not None))]


def first_snapshot(folder: Path) -> Snapshot:
    """The first trigger's snapshot, or without a trigger the final one. Raises RecipeError when there is neither."""
    snapshots = kept_snapshots(folder)
    if not snapshots:
        raise RecipeError(folder / REGISTRY, expected="a trigger or a final snapshot", found="neither", fix="let stage 3 go on, or lower its start")
    return snapshots[0]


def alignment_snapshot(folder: Path) -> Snapshot:
    """The first trigger's snapshot. Without a trigger the last snapshot is used, and the log says so."""
    first = first_snapshot(folder)
    if first.path == WEIGHTS:
        log.info("encoder: that of %s, which was trained elsewhere", folder)
    elif first.cka is None or not first.trigger:
        log.warning("no CKA trigger in %s: the last snapshot is used, step %d. A higher cka.threshold would give some", folder / REGISTRY, first.step)
    else:
        log.info("encoder: snapshot of step %d, CKA %.4f with its reference", first.step, first.cka)
    return first


def check_snapshot(folder: Path, snapshot: Snapshot) -> Path:
    """The file of a snapshot. Raises RecipeError when it is gone or is not the one that was registered."""
    path = folder / str(snapshot.path)
    if not path.is_file() or file_hash(path) != snapshot.sha256:
        found = "another file" if path.is_file() else "no such file"
        raise RecipeError(path, expected="the snapshot that registry.jsonl names", found=found, fix="restore it, or run stage 3 again")
    return path


def read_snapshot(folder: Path, snapshot: Snapshot) -> dict[str, Tensor]:
    """The weights of a snapshot. Raises RecipeError as check_snapshot does."""
    return read_weights(check_snapshot(folder, snapshot))


class SnapshotFolder:
    """Stage 3's folder while it is finished, or still being written.

    Args:
        folder: its final name. While stage 3 runs it is `folder`.tmp, which becomes `folder` at the end.
        live: whether stage 3 may still run; then the folder is looked for under both names at each reading.
    """

    def __init__(self, folder: Path, live: bool):
        self._folder, self.live = folder, live

    @property
    def path(self) -> Path:
        """Where the registry is now. Under the final name there may be an older product until the running stage 3 has finished."""
        running = self._folder.with_name(self._folder.name + ".tmp")
        return running if self.live and running.is_dir() else self._folder

    def known(self) -> list[Snapshot]:
        """See kept_snapshots."""
        return self._reading(kept_snapshots)

    def first(self) -> Snapshot:
        """See first_snapshot: the one that alignment took up."""
        return self._reading(first_snapshot)

    def for_alignment(self) -> Snapshot:
        """See alignment_snapshot."""
        return self._reading(alignment_snapshot)

    def read(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """See read_snapshot."""
        return self._reading(lambda path: read_snapshot(path, snapshot))

    def _reading(self, read: Callable[[Path], Read]) -> Read:
        """`read` of the folder; once more under its other name when it was renamed meanwhile."""
        path = self.path
        try:
            return read(path)
        except RecipeError:
            if path == self.path:
                raise
            return read(self.path)
