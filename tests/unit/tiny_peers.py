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
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeProcessor,
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


def tokenizer(more=None):
    """Byte-level, with the tokens of turns and audio, and others by the names that a processor has for them."""
    marks = {**SPECIAL, **(more or {})}
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>", *marks.values()]
    made.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_end|>", extra_special_tokens=marks)


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


def qwen3_omni(folder, video_processor):
    """Its thinker alone, of 4 experts.

    Args:
        video_processor: Qwen2VLVideoProcessor(), which is there only beside torchvision, or what stands in for it.
    """
    from transformers import Qwen2VLImageProcessorPil  # the others' environments have no Pillow

    vision_tokens = {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    words = tokenizer({"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", **vision_tokens})
    audio = {"num_mel_bins": 128, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16, "output_dim": 32}
    audio["downsample_hidden_size"] = 8
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "interleaved": True}
    text = {**_text(words), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "rope_parameters": rotary}
    ids = {f"{kind}_token_id": words.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("audio", "image", "video")}
    ids |= {f"{kind}_start_token_id": words.convert_tokens_to_ids(f"<|{kind}_start|>") for kind in ("audio", "vision")}
    thinker = {"audio_config": audio, "vision_config": vision, "text_config": text, **ids}
    config = Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    features = WhisperFeatureExtractor(feature_size=128)
    processor = Qwen3OmniMoeProcessor(Qwen2VLImageProcessorPil(), video_processor, features, words, chat_template=TURNS)
    return _save(Qwen3OmniMoeForConditionalGeneration, config, processor, folder)
