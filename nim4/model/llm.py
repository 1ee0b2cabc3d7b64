"""The door to transformers: any causal language model with ChatML turns, by name or folder, e.g. Qwen/Qwen3-1.7B.

Everything else sees a plain torch module that takes embeddings, and a tokenizer. Nothing here knows about speech.
"""

import copy
import functools
import gc
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nim4.config import LlmConfig, RecipeError
from nim4.corpus.prompts import TURN_END, TURN_START
from nim4.model.checkpoint import save_weights


@dataclass(frozen=True)
class Llm:
    """A language model and its tokenizer.

    Attributes:
        model: transformers' causal model; `model.model` is its body, `model.lm_head` its output layer.
        tokenizer: transformers' tokenizer, with `<|im_start|>` and `<|im_end|>` as single tokens.
        name: the hub name or folder it was loaded from.
    """

    model: nn.Module
    tokenizer: Any
    name: str

    @property
    def dim(self) -> int:
        return self.model.config.hidden_size


def load_llm(config: LlmConfig, dtype: torch.dtype = torch.float32) -> Llm:
    """A causal language model and its tokenizer.

    Args:
        config: `name` is a folder in Hugging Face layout, or a name on the hub (fetched into the hub's own cache, safetensors only).
    Raises:
        RecipeError: if it cannot be loaded, its tokenizer has no ChatML turns, or the tokenizer has more ids than the model embeddings.
    """
    transformers = _transformers()
    where = config.name
    looks_like_path = where.startswith((".", "/", "~")) or where.count("/") != 1
    if looks_like_path and not (Path(where) / "config.json").is_file():
        found = "no config.json in it" if Path(where).is_dir() else "no such folder"
        raise RecipeError(where, expected="a language model's folder in Hugging Face layout", found=found, fix="correct --llm or llm.name")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, use_safetensors=True)
    except Exception as error:  # transformers, the hub's client and safetensors raise many kinds; the user needs the reason in one line
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise RecipeError(
            where, expected="a language model that transformers can load", found=reason, fix="correct llm.name, or fetch it first"
        ) from error
    check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings, where)
    return Llm(model, tokenizer, where)


@functools.cache
def _transformers() -> ModuleType:
    """The package. A fifth of the seconds that its import takes would be the garbage collector's, which is told to leave its objects alone."""
    gc.disable()
    try:
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (the package imports them when they are asked for)

        transformers.utils.logging.disable_progress_bar()
        return transformers
    finally:
        gc.freeze()
        gc.enable()


def check_tokenizer(tokenizer: Any, num_embeddings: int, where: str) -> None:
    """Raises RecipeError unless the tokenizer has ChatML turns as single tokens and fits the embeddings."""
    for token in (TURN_START, TURN_END):
        if tokenizer.encode(token, add_special_tokens=False) != [tokenizer.convert_tokens_to_ids(token)]:
            raise RecipeError(where, expected=f"{token} as one token", found="a tokenizer without it", fix="use a ChatML model, e.g. Qwen/Qwen3-1.7B")
    if len(tokenizer) > num_embeddings:
        raise RecipeError(
            where,
            expected=f"a tokenizer with at most {num_embeddings} ids, the model's embeddings",
            found=f"{len(tokenizer)} ids",
            fix="put the model's own tokenizer beside it",
        )


def add_lora(llm: Llm, config: LlmConfig) -> Llm:
    """The model with low-rank updates as its only trainable weights (arXiv 2106.09685); they are merged when it is saved.

    Raises RecipeError when peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("llm.lora_rank", expected="the package peft", found="none", fix="pip install peft==0.21.2") from error
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules="all-linear")
    return Llm(get_peft_model(llm.model, lora).base_model.model, llm.tokenizer, llm.name)


def save_llm(llm: Llm, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes a folder in Hugging Face layout, which other tools can load.

    Args:
        weights: the model's state dict, whole (gathered from all processes); low-rank updates are merged into it.
    """
    model = llm.model
    weights = merge_lora(model, weights)
    folder.mkdir(parents=True, exist_ok=True)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    save_weights(folder / "model.safetensors", weights, metadata={"format": "pt"})
    llm.tokenizer.save_pretrained(folder)


def link_llm(source: Path, folder: Path) -> None:
    """The unchanged language model of `source` under another stage's folder: hard links where the disk allows, else copies."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file():
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copy2(path, folder / path.name)


def merge_lora(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model with low-rank updates as those of the plain model: W + scale * B A; others are returned as they are."""
    merged: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if name != plain and name.endswith(".weight"):
            owner = name.removesuffix(".base_layer.weight")
            down, up = weights[f"{owner}.lora_A.default.weight"], weights[f"{owner}.lora_B.default.weight"]
            tensor = (tensor.float() + modules[owner].scaling["default"] * (up.float() @ down.float())).to(tensor.dtype)
        merged[plain] = tensor
    return merged


# --------------------------------------------------------------------------------------------------------------- decoding


@contextmanager
def grouped_attention(model: nn.Module) -> Iterator[None]:
    """Within it, heads that share keys and values read them where they are; transformers copies them to each head when there is a mask."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, _register_grouped()
    try:
        yield
    finally:
        config._attn_implementation = before


@functools.cache
def _register_grouped() -> str:
    name = "nim4_grouped"
    _transformers().AttentionInterface.register(name, _grouped)
    return name


def _grouped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Queries (B, G H, N, D), keys and values (B, H, C, D), mask (B, 1, N, C), True = may attend -> (B, N, G H, D)."""
    heads, num_new = key.shape[1], query.shape[2]
    groups = query.shape[1] // heads
    mask = attention_mask.repeat(1, 1, groups, 1)
    query = query.reshape(len(query), heads, groups * num_new, -1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.view(len(out), heads * groups, num_new, -1).transpose(1, 2).contiguous(), None


@torch.inference_mode()
def generate(
    llm: Llm,
    embeds: Tensor,
    pad_lens: Tensor,
    max_new_tokens: Sequence[int],
    *,
    end: int,
    num_beams: int = 1,
) -> list[list[int]]:
    """Continues each row greedily, or with beam search.

    Args:
        embeds: (B, L, D) float, padded on the left.
        pad_lens: (B,) int64, padded positions at the start of each row; their content is ignored.
        max_new_tokens: limit of each row.
        end: id that ends a row.
        num_beams: 1 = greedy.
    Returns:
        B lists of new ids, without `end`. A row does not depend on the others: same result alone and in a batch.
    """
    rows = _search(llm, embeds, pad_lens, max_new_tokens, end, num_beams=num_beams)
    return [cut_at(row[:limit].tolist(), end) for row, limit in zip(rows, max_new_tokens, strict=True)]


@torch.inference_mode()
def n_best(llm: Llm, embeds: Tensor, pad_lens: Tensor, max_new_tokens: Sequence[int], *, end: int, num: int) -> list[list[tuple[list[int], float]]]:
    """Like `generate`, but what a beam search ends with: `num` (at least 2) continuations per row, with log-probabilities, the best first.

    Of one that its limit cuts short, the log-probability is that of all that was written, as far as the longest limit.
    """
    options = {"num_beams": num, "num_return_sequences": num, "length_penalty": 0.0, "return_dict_in_generate": True, "output_scores": True}
    found = _search(llm, embeds, pad_lens, max_new_tokens, end, **options)
    rows = [cut_at(row[: max_new_tokens[place // num]].tolist(), end) for place, row in enumerate(found.sequences)]
    scores = found.sequences_scores.tolist()
    return [list(zip(rows[first : first + num], scores[first : first + num], strict=True)) for first in range(0, len(rows), num)]


def _search(llm: Llm, embeds: Tensor, pad_lens: Tensor, max_new_tokens: Sequence[int], end: int, **options: Any) -> Any:
    """transformers' search for what follows `embeds`, without sampling."""
    return llm.model.generate(
        inputs_embeds=embeds,
        attention_mask=(torch.arange(embeds.shape[1], device=embeds.device) >= pad_lens[:, None]).long(),
        max_new_tokens=max(max_new_tokens),
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=end,
        pad_token_id=end,
        **options,
    )


def cut_at(ids: list[int], end: int) -> list[int]:
    """The ids before the first `end`."""
    return ids[: ids.index(end)] if end in ids else ids


def fork(cache: Any) -> Any:
    """Keys and values that grow, or are cut, on their own; what they hold so far is shared with `cache`."""
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]  # a layer grows by concatenation, never in place
    return forked


def read(model: nn.Module, embeds: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Appends one row to keys and values.

    Args:
        embeds: (1, N, D), N at least 1.
        cache: transformers' keys and values of what stands before; None = nothing.
    Returns:
        (1, N, D) hidden states, and the same cache, or the new one.
    """
    out = model.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    return out.last_hidden_state, out.past_key_values


@dataclass(frozen=True)
class Written:
    """An answer, and what it cost.

    Attributes:
        ids: without the end of the turn.
        accepted: ids of the draft that it begins with.
        tokens_read: that the model has read, the drafted ones that it did not accept included.
        passes: of the model.
    """

    ids: list[int]
    accepted: int
    tokens_read: int
    passes: int


def writing(drop: Callable[[int], None], ids: Sequence[int], draft: Sequence[int], limit: int, end: int) -> Generator[Any, list[int], Written]:
    """The greedy answer behind `ids`: a draft is read together with them, and holds as far as greedy writing agrees with it.

    The draft changes how many passes the answer takes, not the answer: in fp32 on a CPU it is that of `generate`.

    Args:
        drop: forgets so many of the last tokens that were read.
        ids: at least one.
        draft: what the answer may begin with, e.g. an earlier one.
        limit: of the answer's tokens, at least 1.
        end: id that ends it.
    Yields:
        ids to be read next, and behind how many of the last of them the model's first choice is wanted, which is to be sent.
    Source: verification as in speculative decoding (arXiv 2211.17192), with an earlier answer in the place of a draft model: ours.
    """
    draft = list(draft[:limit])
    best = yield [*ids, *draft], len(draft) + 1
    accepted = next((place for place, token in enumerate(draft) if token != best[place]), len(draft))
    drop(len(draft) - accepted)
    written, passes = [*draft[:accepted], best[accepted]], 1
    while written[-1] != end and len(written) < limit:
        written += yield written[-1:], 1
        passes += 1
    return Written(cut_at(written[:limit], end), accepted, len(ids) + len(draft) + passes - 1, passes)
