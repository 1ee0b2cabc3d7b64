"""The plugin by which vLLM serves our model folders as they are; pyproject.toml names it among vllm.general_plugins.

    vllm serve DIR --config-format nim4 --tokenizer DIR/llm

vLLM calls `register` in each of its processes. What needs vLLM itself is in nim4/serve/vllm_model.py, which is imported when a model is made.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from nim4.config import RecipeError
from nim4.corpus.prompts import TURN_END, TURN_START
from nim4.model.adaptor import SpeechAdaptor
from nim4.model.asr import LLM_FOLDER, read_speech_llm_config
from nim4.model.checkpoint import ADAPTOR, WEIGHTS
from nim4.model.ctc import PhonemeModel
from nim4.serve.vllm_client import FORMAT

ARCHITECTURE = "Nim4ForConditionalGeneration"


def register() -> None:
    """Tells vLLM of the model and of the format of its folder; may be called again."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import register_config_parser
    from vllm.transformers_utils.config_parser_base import ConfigParserBase

    class FolderParser(ConfigParserBase):
        def parse(self, model: str | Path, trust_remote_code: bool, *_: Any, **__: Any) -> tuple[dict[str, Any], PretrainedConfig]:
            config = read_config(Path(model))
            return config.to_dict(), config

    AutoConfig.register(Nim4Config.model_type, Nim4Config, exist_ok=True)
    register_config_parser(FORMAT)(FolderParser)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"nim4.serve.vllm_model:{ARCHITECTURE}")


class Nim4Config(PretrainedConfig):
    """What vLLM wants to know of a speech LLM before it loads it.

    Attributes:
        text_config: of the language model.
        frame_dim: width of encoder frames.
        stack: encoder frames of one speech token.
        speech_id: that stands for speech in prompts.
    """

    model_type = "nim4_asr"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers reads it from the class)

    def __init__(self, text_config: Any = None, frame_dim: int = 0, stack: int = 1, speech_id: int = 0, **rest: Any):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config, self.frame_dim, self.stack, self.speech_id = text_config, frame_dim, stack, speech_id
        super().__init__(**rest)

    def get_text_config(self, *_: Any, **__: Any) -> PretrainedConfig:
        """The language model's."""
        return self.text_config


def read_config(folder: Path) -> Nim4Config:
    """The config of a model folder of stages 4 to 9. Raises RecipeError if it is none, or its weights are of another size than it says."""
    config, _ = read_speech_llm_config(folder)
    try:
        text = AutoConfig.from_pretrained(folder / LLM_FOLDER)
        tokenizer = AutoTokenizer.from_pretrained(folder / LLM_FOLDER)
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(folder / LLM_FOLDER, expected="a language model that transformers can load", found=reason, fix="restore it") from error
    with torch.device("meta"):
        acoustic, adaptor = PhonemeModel(config), SpeechAdaptor(config.adaptor, config.encoder.dim, text.hidden_size)
    shapes = {name: tuple(tensor.shape) for name, tensor in acoustic.state_dict().items()}
    shapes |= {ADAPTOR + name: tuple(tensor.shape) for name, tensor in adaptor.state_dict().items()}
    _check_shapes(folder / WEIGHTS, shapes)
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    return Nim4Config(
        text_config=text,
        frame_dim=config.encoder.dim,
        stack=config.adaptor.stack,
        speech_id=_spare_id(tokenizer, text.vocab_size, folder / LLM_FOLDER),
        architectures=[ARCHITECTURE],
        eos_token_id=end,
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=text.dtype,
    )


def _check_shapes(path: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise RecipeError(path, expected="a readable safetensors file", found=error, fix="restore it, or run its stage again") from error
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            what = f"{name} of shape {wanted[name]}" if name in wanted else f"no {name}"
            shape = f"one of shape {found[name]}" if name in found else "none"
            raise RecipeError(path, expected=f"{what}, as config.yaml and {LLM_FOLDER}/config.json say", found=shape, fix="restore the folder")


def _spare_id(tokenizer: Any, vocab_size: int, where: Path) -> int:
    """An id that no prompt holds before its answer: one that is no token, or a special one that is no marker of turns."""
    if len(tokenizer) < vocab_size:
        return vocab_size - 1
    markers = {tokenizer.convert_tokens_to_ids(token) for token in (TURN_START, TURN_END)}
    spare = [token for token in tokenizer.all_special_ids if token not in markers]
    if not spare:
        raise RecipeError(where, expected="an id that no text has, to stand for speech", found="none", fix="enlarge the model's embeddings by one")
    return spare[0]
