"""A published encoder as a model folder, from which stages 3, 4 and 5 start as from a finished stage 3.

`icefall:FILE`, `icefall:FILE,avg=N` or `firered:FOLDER` names it. The folder has no CKA curve, and one snapshot: alignment takes it, and IA-SFT
swaps nothing.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch

from nim4.config import ModelConfig, RecipeError
from nim4.corpus.units import PhonemeInventory
from nim4.model.checkpoint import count_parameters, save_model
from nim4.model.ctc import PhonemeModel
from nim4.published.checkpoint_file import PublishedEncoder, as_setting
from nim4.published.firered import CMVN, read_firered
from nim4.published.icefall import read_icefall
from nim4.stage import StageOutput
from nim4.train.snapshots import register_only

log = logging.getLogger("nim4")


def find_encoder(spec: str) -> tuple[list[Path], Callable[[], PublishedEncoder]]:
    """The files that decide it, and what reads them. Raises RecipeError when `spec` is none, or there is nothing there."""
    found = re.fullmatch(r"(icefall|firered):(.+?)(?:,avg=(\d+))?", spec)
    if found is None or (found[1] == "firered" and found[3]):
        fix = "for example icefall:exp/epoch-30.pt,avg=9 or firered:FireRedASR-AED-L"
        raise RecipeError(f"--init-encoder {spec}", expected="icefall:FILE, icefall:FILE,avg=N or firered:FOLDER", found=repr(spec), fix=fix)
    path, avg = Path(found[2]), int(found[3] or 1)
    if not path.exists():
        raise RecipeError(f"--init-encoder {spec}", expected="a published encoder", found=f"nothing at {path}", fix="correct the path")
    if found[1] == "firered":
        folder = path if path.is_dir() else path.parent
        files = [*([path] if path.is_file() else sorted(folder.glob("*.pth.tar"))), folder / CMVN]
        return [file for file in files if file.is_file()], lambda: read_firered(path)
    files = sorted(path.parent.glob("*.pt")) if avg > 1 else [path]
    return files + [file for file in [path.with_name("tokens.txt")] if file.is_file()], lambda: read_icefall(path, avg)


def make_encoder_folder(spec: str, units: Path, out: Path, seed: int = 0) -> None:
    """Writes the model folder `out` of the encoder that `spec` names, for the phonemes of `units`.

    Args:
        seed: of the phoneme head, where it starts anew.
    Raises:
        RecipeError: if `spec` is none, or what it names cannot be taken; `out` is left as it was.
    """
    inventory = PhonemeInventory.load(units / "tokens.txt")
    files, read = find_encoder(spec)
    output = StageOutput(out, config={"encoder": spec, "seed": seed}, inputs=[*files, units / "tokens.txt"])
    if output.is_done():
        return
    encoder = read()
    torch.manual_seed(seed)
    own_head = encoder.head is not None and encoder.tokens == inventory.tokens and len(encoder.head[0]) == len(inventory)
    model = PhonemeModel(ModelConfig(encoder.config, len(inventory), head_layers=1 if own_head else 3))
    model.encoder.load_state_dict(encoder.weights)
    model.set_normalisation(encoder.mean, encoder.std)
    if own_head:
        last = model.head.layers[-1]
        last.weight.data, last.bias.data = encoder.head
    work = output.begin()
    save_model(work, model.state_dict(), model.config, inventory)
    register_only(work)
    log.info("encoder of %s: %s parameters, %s", spec, count_parameters(model.encoder.parameters()), as_setting(encoder.config))
    for note in (_about_head(encoder, own_head), *encoder.notes):
        log.info("%s", note)
    output.finish(parameters=sum(parameter.numel() for parameter in model.parameters()))


def _about_head(encoder: PublishedEncoder, own_head: bool) -> str:
    if own_head:
        return "phoneme head: its CTC output, since it writes the same symbols"
    if encoder.head is None:
        return "phoneme head: starts anew, since there is none"
    why = "no tokens.txt beside it says what its CTC output writes" if encoder.tokens is None else "its CTC output writes other symbols"
    return f"phoneme head: starts anew, since {why}"
