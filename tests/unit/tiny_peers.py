"""Folders with tiny, random models of the classes that baselines load, with tokenizers, feature extractors and templates of the true kind."""

import importlib

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    FunAsrNanoConfig,
    FunAsrNanoForConditionalGeneration,
    FunAsrNanoProcessor,
    GlmAsrConfig,
    GlmAsrForConditionalGeneration,
    GlmAsrProcessor,
    PreTrainedTokenizerFast,
    Qwen3ASRConfig,
    Qwen3ASRForConditionalGeneration,
    Qwen3ASRProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.qwen3_asr.feature_extraction_qwen3_asr import Qwen3ASRFeatureExtractor

# imported by name: as an attribute of its package it is there only beside torchaudio
FUN_ASR_FEATURES = importlib.import_module("transformers.models.fun_asr_nano.feature_extraction_fun_asr_nano")
TURNS = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == 'audio' -%}<|audio_start|><|audio_pad|><|audio_end|>{%- elif 'text' in part -%}{{ part.text }}
{%- elif part.type == 'language' -%}[{{ part.language }}]{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
SPECIAL = {"audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def tokenizer():
    """Byte-level, with the tokens of turns and audio."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>", *SPECIAL.values()]
    made.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_end|>", extra_special_tokens=SPECIAL)


def _text(words):
    return {**TEXT, "vocab_size": len(words), "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}


def _save(model_class, config, processor, folder):
    torch.manual_seed(0)
    model = model_class(config)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def qwen3_asr(folder):
    words = tokenizer()
    audio = {"num_mel_bins": 128, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16, "output_dim": 32}
    audio["downsample_hidden_size"] = 8
    ids = {
        "audio_token_id": words.convert_tokens_to_ids(SPECIAL["audio_token"]),
        "pad_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id,
    }
    config = Qwen3ASRConfig(audio_config=audio, text_config=_text(words), **ids)
    return _save(Qwen3ASRForConditionalGeneration, config, Qwen3ASRProcessor(Qwen3ASRFeatureExtractor(), words, chat_template=TURNS), folder)


def fun_asr_nano(folder):
    words = tokenizer()
    audio = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3, "num_timestamp_prediction_layers": 1}
    adaptor = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1, "projector_hidden_size": 32}
    token = SPECIAL["audio_token"]
    config = FunAsrNanoConfig(audio_config=audio, adaptor_config=adaptor, text_config=_text(words), audio_token_id=words.convert_tokens_to_ids(token))
    processor = FunAsrNanoProcessor(FUN_ASR_FEATURES.FunAsrNanoFeatureExtractor(), words, chat_template=TURNS, audio_token=token)
    return _save(FunAsrNanoForConditionalGeneration, config, processor, folder)


def glm_asr_nano(folder):
    words = tokenizer()
    audio = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_mel_bins": 128}
    token = SPECIAL["audio_token"]
    text = {**_text(words), "num_key_value_heads": 2, "max_position_embeddings": 2048}
    config = GlmAsrConfig(audio_config=audio, text_config=text, audio_token_id=words.convert_tokens_to_ids(token))
    processor = GlmAsrProcessor(WhisperFeatureExtractor(feature_size=128), words, chat_template=TURNS, audio_token=token)
    return _save(GlmAsrForConditionalGeneration, config, processor, folder)
