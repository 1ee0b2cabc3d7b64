"""Which part trains in which stage: the paper's Figure 2 as a table."""

import logging
from collections.abc import Mapping

from torch import nn

from nim4.config import LlmConfig
from nim4.model.asr import SpeechLlm
from nim4.model.checkpoint import count_parameters
from nim4.model.llm import Llm, add_lora

log = logging.getLogger("nim4")

PARTS = ("encoder", "head", "adaptor", "llm")
ROLES = {  # stage -> parts that train; all others are frozen
    "pretrain": ("encoder", "head"),
    "align": ("adaptor",),
    "ia_sft": ("adaptor", "llm"),  # the encoder is swapped, not trained
    "joint_sft": ("encoder", "adaptor", "llm"),
    "context_sft": ("encoder", "adaptor", "llm"),
    "grpo": ("encoder", "adaptor", "llm"),
    "phoneme_head": ("head",),
}


def assign_roles(model: SpeechLlm, trained: tuple[str, ...], llm: LlmConfig) -> None:
    """Lets the parts `trained` train and freezes the others. With `llm.lora_rank` the LLM trains by low-rank updates."""
    if llm.lora_rank and "llm" in trained:
        model.llm = add_lora(Llm(model.llm, model.tokenizer, llm.name), llm).model  # freezes what it wraps
    freeze_all_but({"encoder": model.acoustic.encoder, "head": model.acoustic.head, "adaptor": model.adaptor, "llm": model.llm}, trained)


def freeze_all_but(parts: Mapping[str, nn.Module], trained: tuple[str, ...]) -> None:
    """Freezes the parts that are not in `trained`, and logs the table. What a part itself has frozen stays so."""
    for name, part in parts.items():
        if name not in trained:
            part.requires_grad_(False)
        train = [parameter for parameter in part.parameters() if parameter.requires_grad]
        told = f"trains {count_parameters(train)}" if train else "frozen"
        log.info("roles: %-8s %9s parameters, %s", name, count_parameters(part.parameters()), told)
