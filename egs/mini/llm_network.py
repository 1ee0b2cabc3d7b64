"""The network of egs/mini's language model, Qwen3 in shape, and all settings that it is made with."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


@dataclass(frozen=True)
class MiniLlmConfig:
    """Everything that decides the weights; ours throughout, the paper's LLM is Qwen3-1.7B."""

    num_grammar: int = 16_000  # phrases drawn from the grammar; it has 16,782 different ones, most of them rare
    num_joins: int = 16_000  # random joins: there a language model has nothing to know, and should know that; with 6,000 it guessed
    vocab_size: int = 2_500  # at most; the text has fewer
    dim: int = 192
    num_layers: int = 4
    num_heads: int = 3
    num_kv_heads: int = 1
    head_dim: int = 64
    ffn_dim: int = 512
    plain: float = 0.15  # share of documents without a prompt; the following are shares of those with one
    spoken: float = 0.7  # the pronunciation stands where speech will
    hints: float = 0.3
    partial: float = 0.3
    steps: int = 5_000
    batch: int = 128  # documents
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 1


def build_model(config: MiniLlmConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained model."""
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(config.seed)
    return Qwen3ForCausalLM(shape)
