"""Zipformers trained by icefall's recipes of 2023: their checkpoints, averages of them, and the shape that fits.

A checkpoint holds tensors under `encoder_embed.` and `encoder.`, which are our Zipformer's names, and `ctc_output.1.` where it was trained
with CTC. What differs from an encoder that was trained here: features are not normalised, and behind an utterance they are log(1e-10). Features
themselves are the same (lhotse's).
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from nim4.config import RecipeError, ZipformerConfig
from nim4.model.zipformer import Zipformer
from nim4.published.checkpoint_file import PublishedEncoder, check_fits, read_checkpoint, size_of

EXPECTED = "a checkpoint of icefall's zipformer recipe"
FIX = "give epoch-N.pt or checkpoint-N.pt of a training, or the pretrained.pt that export.py makes of it: --jit 0"
PARTS = ("encoder_embed.", "encoder.")
CTC = "ctc_output.1."
POS_HEAD_DIM = 4  # the same in all recipes; tensors tell the number of heads times this
UNMASKED = ((256, 192), (512, 256), (768, 320))  # widths up to the first have so many channels that are never masked in training: icefall's sizes


def read_icefall(path: Path, avg: int = 1) -> PublishedEncoder:
    """The encoder of a checkpoint, or the average that icefall's --avg makes of it and those before.

    Raises:
        RecipeError: if it is none, has no CTC output, is no Zipformer that we can build, or a file of the average is missing.
    """
    model = averaged(path, avg)
    weights = {name: tensor.float() for name, tensor in model.items() if name.startswith(PARTS)}
    if not any(name.startswith("encoder.encoders.") for name in weights):
        found = f"tensors such as {next(iter(model), 'none')}"
        raise RecipeError(path, expected=f"{EXPECTED}: encoder.encoders.*", found=found, fix="other encoders of icefall are not taken")
    if not {CTC + "weight", CTC + "bias"} <= model.keys():
        found = "a transducer without it" if any(name.startswith("joiner.") for name in model) else "none"
        raise RecipeError(path, expected="a CTC output, ctc_output.*", found=found, fix="take a checkpoint that was trained with --use-ctc 1")
    config = _config(weights, path)
    with torch.device("meta"):
        check_fits(Zipformer(config), weights, path)
    zeros = torch.zeros(config.num_mel_bins)
    head = model[CTC + "weight"].float(), model[CTC + "bias"].float()
    return PublishedEncoder(config, weights, zeros, zeros + 1, head, read_tokens(path.with_name("tokens.txt")), _notes(config))


def _notes(config: ZipformerConfig) -> tuple[str, ...]:
    notes = [f"heads counted for icefall's {POS_HEAD_DIM} channels of position each"]
    if not config.causal:
        notes.append("it is not causal, so it cannot stream: train with train.chunk.full_prob=1, and decode with configs that do not stream")
    return tuple(notes)


def averaged(path: Path, avg: int) -> dict[str, Tensor]:
    """The model's tensors: of one checkpoint; or averaged over the `avg` epochs, or saved checkpoints, that end with it.

    Where checkpoints hold `model_avg`, icefall's running mean since the start, the mean over a range follows from its two ends, as with
    --use-averaged-model 1; else it is the mean of the `avg` checkpoints.
    """
    last = read_checkpoint(path, EXPECTED, FIX)
    if avg == 1:
        return _tensors(last, "model", path)
    files = _before(path, avg)
    if "model_avg" not in last:
        models = [_tensors(read_checkpoint(file, EXPECTED, FIX), "model", file) for file in files[:avg]]
        return {
            name: _mean([_same(model, name, tensor, file) for model, file in zip(models, files, strict=False)]) for name, tensor in models[0].items()
        }
    if len(files) <= avg:
        raise RecipeError(path, expected=f"{avg + 1} checkpoints to average over {avg}", found=len(files), fix="choose a smaller avg")
    first_path = files[avg]
    first = read_checkpoint(first_path, EXPECTED, FIX)
    try:
        period = first["average_period"]
        begin, end = (package["batch_idx_train"] // period * period for package in (first, last))
        if not begin < end:
            raise ValueError(f"batches {begin} and {end}")
        share = end / (end - begin)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        fix = "choose files of one training, the later one last"
        raise RecipeError(first_path, expected=f"average_period, and batch_idx_train before that of {path.name}", found=error, fix=fix) from error
    one, two = _tensors(first, "model_avg", first_path), _tensors(last, "model_avg", path)
    return {
        name: (tensor.double() * share + _same(one, name, tensor, first_path).double() * (1 - share)).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in two.items()
    }


def _before(path: Path, avg: int) -> list[Path]:
    """The checkpoint and those of the same kind before it, newest first; for epochs at most `avg` + 1, without a gap."""
    found = re.fullmatch(r"(epoch|checkpoint)-(\d+)\.pt", path.name)
    if avg < 1 or found is None:
        fix = "for example icefall:exp/epoch-30.pt,avg=9"
        raise RecipeError(f"{path},avg={avg}", expected="epoch-N.pt or checkpoint-N.pt, and at least 1", found=f"{path.name} and {avg}", fix=fix)
    kind, number = found[1], int(found[2])
    pattern = re.compile(rf"{kind}-(\d+)\.pt")
    numbers = sorted((int(match[1]) for match in map(pattern.fullmatch, (file.name for file in path.parent.iterdir())) if match), reverse=True)
    older = [other for other in numbers if other <= number]
    if kind == "epoch":
        older = [other for place, other in enumerate(older) if other == number - place]
    if len(older) < avg:
        missing = f"{kind}-{number - len(older)}.pt is missing" if kind == "epoch" else f"{len(older)} of them"
        raise RecipeError(path, expected=f"{avg} checkpoints that end with it", found=missing, fix="choose a smaller avg")
    return [path.with_name(f"{kind}-{other}.pt") for other in older]


def _tensors(package: dict, key: str, path: Path) -> dict[str, Tensor]:
    """The state dict under `key`, without the `module.` of a parallel training."""
    model = package.get(key)
    if not isinstance(model, dict) or not all(isinstance(tensor, Tensor) for tensor in model.values()):
        raise RecipeError(path, expected=f"{EXPECTED}: tensors under {key!r}", found=f"entries {', '.join(map(str, list(package)[:5]))}", fix=FIX)
    return {name.removeprefix("module."): tensor for name, tensor in model.items()}


def _same(model: dict[str, Tensor], name: str, like: Tensor, path: Path) -> Tensor:
    tensor = model.get(name)
    if tensor is None or tensor.shape != like.shape:
        found = f"no {name}" if tensor is None else f"{name} {tuple(tensor.shape)}"
        raise RecipeError(
            path, expected=f"the model of the other checkpoints, {name} {tuple(like.shape)}", found=found, fix="choose files of one training"
        )
    return tensor


def _mean(tensors: list[Tensor]) -> Tensor:
    if not tensors[0].is_floating_point():
        return sum(tensors) // len(tensors)
    return (sum(tensor.double() for tensor in tensors) / len(tensors)).to(tensors[0].dtype)


def _config(weights: dict[str, Tensor], path: Path) -> ZipformerConfig:
    """The shape that fits, as far as tensors tell; check_fits finds out whether it does."""
    stacks = sorted({int(name.split(".")[2]) for name in weights if name.startswith("encoder.encoders.")})
    layers = [f"encoder.encoders.{n}." + ("encoder." if f"encoder.encoders.{n}.downsample.bias" in weights else "") + "layers." for n in stacks]

    def size(name: str, axis: int = 0) -> int:
        return size_of(weights, name, axis, path, EXPECTED, FIX)

    causal = f"{layers[0]}0.conv_module1.depthwise_conv.chunkwise_conv.weight" in weights
    kernel = "0.conv_module1.depthwise_conv." + ("chunkwise_conv.weight" if causal else "weight")
    dims = tuple(size(f"{layer}0.norm.bias") for layer in layers)
    positions = [size(f"{layer}0.self_attn_weights.linear_pos.weight") for layer in layers]
    heads = tuple(channels // POS_HEAD_DIM for channels in positions)
    in_proj = size(f"{layers[0]}0.self_attn_weights.in_proj.weight")
    return ZipformerConfig(
        dims=dims,
        downsampling=tuple(len(weights.get(f"encoder.encoders.{n}.downsample.bias", (1,))) for n in stacks),
        num_layers=tuple(len({name[len(layer) :].split(".")[0] for name in weights if name.startswith(layer)}) for layer in layers),
        num_heads=heads,
        ffn_dims=tuple(size(f"{layer}0.feed_forward2.in_proj.weight") for layer in layers),
        conv_kernels=tuple(size(f"{layer}{kernel}", 2) for layer in layers),
        unmasked_dims=tuple(next((kept for limit, kept in UNMASKED if dim <= limit), UNMASKED[-1][1]) if dim >= 192 else dim for dim in dims),
        query_head_dim=(in_proj - positions[0]) // (2 * max(heads[0], 1)),
        value_head_dim=size(f"{layers[0]}0.self_attn1.in_proj.weight") // max(heads[0], 1),
        pos_head_dim=POS_HEAD_DIM,
        pos_dim=size(f"{layers[0]}0.self_attn_weights.linear_pos.weight", 1),
        causal=causal,
        subsampling_channels=tuple(size(f"encoder_embed.conv.{place}.weight") for place in (0, 4, 7)),
        pad_value=math.log(1e-10),
    )


def read_tokens(path: Path) -> tuple[str, ...] | None:
    """The symbols of a `symbol id` list in the order of their ids; None when there is no such file."""
    if not path.is_file():
        return None
    try:
        rows = [line.rsplit(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return tuple(token for _, token in sorted((int(number), token) for token, number in rows))
    except ValueError as error:
        raise RecipeError(path, expected="`symbol id` lines", found=error, fix="restore the list that belongs to the checkpoint") from error
