"""Model folders and the safe reading and writing of weights: safetensors only, shapes checked, nothing unpickled.

A model folder holds model.safetensors, config.yaml and tokens.txt, from stage 4 on also llm/ in Hugging Face layout
(nim4/model/asr.py), and decoding needs nothing else.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from nim4.config import ModelConfig, RecipeError, as_dict, build, read_yaml
from nim4.corpus.units import PhonemeInventory
from nim4.model.ctc import PhonemeModel
from nim4.stage import atomic_write

WEIGHTS = "model.safetensors"
ADAPTOR = "adaptor."  # of the adaptor's names in model.safetensors, from stage 4 on; all others are the phoneme model's


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Named tensors as safetensors, tied ones once; the file appears only when it is whole."""
    tied = _tied(weights)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items() if name not in tied}
    content = save(kept, dict(metadata) if metadata else None)
    with atomic_write(path, "wb") as file:
        file.write(content)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises RecipeError when it is missing or broken."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            path, expected="a readable safetensors file", found=error, fix="check the folder, or run the stage that makes it again"
        ) from error


def weight_names(path: Path) -> list[str]:
    """The names in a safetensors file, without reading the tensors. Raises RecipeError when it is missing or broken."""
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise RecipeError(path, expected="a readable safetensors file", found=error, fix="check the folder, or make it again") from error


def _tied(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is another one's memory, each with the first name it has: an output layer tied to the embeddings."""
    first: dict[tuple[int, torch.Size], str] = {}
    tied = {}
    for name, tensor in weights.items():
        if tensor.numel():
            memory = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a shard
            owner = first.setdefault((memory.data_ptr(), tensor.shape), name)
            if owner != name:
                tied[name] = owner
    return tied


def load_into(module: nn.Module, weights: Mapping[str, Tensor], where: object) -> None:
    """Loads `weights` into `module`, all of them. Raises RecipeError as check_weights does."""
    check_weights(module, weights, where)
    module.load_state_dict(dict(weights), strict=False)  # what is tied may be missing, and was checked above


def check_weights(module: nn.Module, weights: Mapping[str, Tensor], where: object) -> None:
    """Raises RecipeError that names the first difference in names or shapes, unless `weights` are those of a module like this."""
    own = module.state_dict()
    tied = _tied(own)
    differences = [f"{name} is missing" for name in own if name not in weights and tied.get(name) not in weights]
    differences += [f"{name} is not part of this model" for name in weights if name not in own]
    differences += [
        f"{name} is {tuple(weights[name].shape)}, must be {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if differences:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise RecipeError(
            where,
            expected="weights of this model's size",
            found=f"{differences[0]}{more}",
            fix="use the --preset and --set model.* the weights were made with",
        )


def acoustic_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The phoneme model's part of a folder's weights."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(ADAPTOR)}


def average_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of several checkpoints' weights, summed in float64."""
    total: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in read_weights(path).items():
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    first = read_weights(paths[0])
    return {name: (tensor / len(paths)).to(first[name].dtype) for name, tensor in total.items()}


def save_model(folder: Path, weights: Mapping[str, Tensor], config: ModelConfig, inventory: PhonemeInventory) -> None:
    """Writes a model folder (or completes one that exists)."""
    save_shape(folder, config, inventory)
    save_weights(folder / WEIGHTS, weights)


def save_shape(folder: Path, config: ModelConfig, inventory: PhonemeInventory) -> None:
    """Writes what a model folder says of its model beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    inventory.save(folder / "tokens.txt")
    with atomic_write(folder / "config.yaml") as file:
        yaml.safe_dump(as_dict(config), file, sort_keys=False)


def read_model_config(folder: Path, marker: str = WEIGHTS) -> tuple[ModelConfig, PhonemeInventory]:
    """Shape and phoneme inventory of a model folder.

    Args:
        marker: the file by which the folder is known; while stage 3 still runs, it has no weights but those of snapshots.
    Raises:
        RecipeError: if the folder is not a model folder, or its parts do not fit each other.
    """
    folder = Path(folder)
    if not (folder / marker).is_file():
        found = "no such folder" if not folder.is_dir() else f"no {marker} in it"
        raise RecipeError(folder, expected="a model folder", found=found, fix="run stage 3, or correct --model / --init")
    config = build(ModelConfig, read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    inventory = PhonemeInventory.load(folder / "tokens.txt")
    if len(inventory) != config.vocab_size:
        raise RecipeError(
            folder / "tokens.txt", expected=f"{config.vocab_size} symbols", found=len(inventory), fix="restore the folder's own tokens.txt"
        )
    return config, inventory


def load_model(folder: Path, device: torch.device) -> tuple[PhonemeModel, PhonemeInventory]:
    """The phoneme model of a folder, in evaluation mode, and its inventory.

    Raises:
        RecipeError: if the folder is not a model folder, or its parts do not fit each other.
    """
    config, inventory = read_model_config(folder)
    model = PhonemeModel(config)
    load_into(model, acoustic_weights(read_weights(folder / WEIGHTS)), folder / WEIGHTS)
    return model.to(device).eval(), inventory


def load_snapshot(path: Path, device: torch.device) -> PhonemeModel:
    """The phoneme model of a snapshot of pre-training, in evaluation mode. Its config.yaml lies one folder up, or beside it.

    Raises:
        RecipeError: if either is missing, or the file does not hold the weights of a phoneme model of that size.
    """
    path = Path(path)
    config = next((folder / "config.yaml" for folder in (path.parent.parent, path.parent) if (folder / "config.yaml").is_file()), None)
    if config is None:
        raise RecipeError(path, expected="config.yaml one folder up", found="none", fix="name a file in the snapshots/ of a stage-3 folder")
    model = PhonemeModel(build(ModelConfig, read_yaml(config), str(config)))
    load_into(model, acoustic_weights(read_weights(path)), path)
    return model.to(device).eval()


def with_vocab_size(config: ModelConfig, inventory: PhonemeInventory) -> ModelConfig:
    """The config with the inventory's size filled in. Raises RecipeError when it names another size."""
    if config.vocab_size not in (0, len(inventory)):
        raise RecipeError(
            "model.vocab_size", expected=f"0 or {len(inventory)}, the size of tokens.txt", found=config.vocab_size, fix="remove the setting"
        )
    return replace(config, vocab_size=len(inventory))


def count_parameters(parameters: Iterable[Tensor]) -> str:
    """Number of parameters, readable: `621.9 M`."""
    return f"{sum(parameter.numel() for parameter in parameters) / 1e6:.1f} M"
