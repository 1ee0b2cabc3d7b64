"""The speech LLM inside vLLM; imported by vLLM alone, see nim4/serve/vllm_plugin.py.

    (S, D) encoder frames of a stream's chunk --------------------+
                                                                  v
    (N,) samples --features--> (T, 80) --encoder, full context--> adaptor --> embeddings at the placeholders --> language model

Both are items of vLLM's modality `audio`, told apart by their dimensions. Features are computed where requests come in, on a CPU; encoder and
adaptor run where the language model does, for many requests at once. What is streamed comes as frames, from an encoder elsewhere: vLLM keeps
nothing of a request that an encoder's caches could be tied to.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature
from vllm.config import ModelConfig, SpeechToTextConfig, VllmConfig
from vllm.config.speech_to_text import SpeechToTextParams
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP, SupportsTranscription
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo, PromptReplacement
from vllm.tokenizers import cached_tokenizer_from_config

from nim4.config import VadConfig
from nim4.corpus.feats import SAMPLING_RATE_HZ, SHIFT_SAMPLES, Fbank
from nim4.corpus.manifest import MAX_DURATION_S
from nim4.corpus.prompts import Prompt
from nim4.model.adaptor import SpeechAdaptor
from nim4.model.asr import LLM_FOLDER, read_speech_llm_config
from nim4.model.checkpoint import ADAPTOR, WEIGHTS, load_into
from nim4.model.conformer import SUBSAMPLING, encoder_lens
from nim4.model.ctc import PhonemeModel
from nim4.serve.vllm_plugin import Nim4Config

MAX_SAMPLES = round(MAX_DURATION_S * SAMPLING_RATE_HZ)
MAX_CLIP_S = round(VadConfig().max_segment_s)  # longer recordings are cut by vLLM's server where they are quietest
LANGUAGE = "language_model."

processed = Counter[str]()  # items that this process has made ready: `frames`, `samples`


class SpeechInfo(BaseProcessingInfo):
    """What vLLM asks of a model before it makes requests ready."""

    def get_hf_config(self) -> Nim4Config:
        return self.ctx.get_hf_config(Nim4Config)

    def get_data_parser(self) -> MultiModalDataParser:
        return SpeechParser(target_sr=SAMPLING_RATE_HZ, target_channels=1, audio_resample_method="scipy")

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"audio": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"audio": self.num_tokens(-(-MAX_SAMPLES // (SHIFT_SAMPLES * SUBSAMPLING)))}

    def num_tokens(self, num_frames: int) -> int:
        """Speech tokens of so many encoder frames: a tail is padded, never dropped."""
        return -(-num_frames // self.get_hf_config().stack)


class SpeechItems(ProcessorBatchItems):
    """(S, D) tensors of encoder frames, and (N,) float32 arrays of samples at 16 kHz; None for what was sent before."""

    def __init__(self, data: Sequence[Any]):
        super().__init__(data, "audio")


class SpeechParser(MultiModalDataParser):
    """Takes frames as they are, and brings anything else that vLLM knows as audio to 16 kHz."""

    def _parse_audio_data(self, data: Any) -> SpeechItems:
        items = data if isinstance(data, list) and not isinstance(next(iter(data), None), int | float) else [data]  # a list of numbers is samples
        return SpeechItems([self._parsed(item) for item in items])

    def _parsed(self, item: Any) -> Any:
        if item is None or (isinstance(item, Tensor) and item.ndim == 2):
            return item
        return super()._parse_audio_data([item]).get(0)


class SpeechDummies(BaseDummyInputsBuilder[SpeechInfo]):
    """The longest items, by which vLLM measures the memory that it needs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any = None) -> Mapping[str, Any]:
        return {"audio": [np.zeros(MAX_SAMPLES, np.float32)] * mm_counts.get("audio", 0)}


class SpeechProcessor(BaseMultiModalProcessor[SpeechInfo]):
    """Makes items ready for the model, and room for their embeddings in the prompt."""

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        dummies = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        dummies.prompt = [self.info.get_hf_config().speech_id] * mm_counts.get("audio", 0)
        return dummies

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        speech, is_features = [], []
        for item in hf_data["audio"]:
            is_samples = item.ndim == 1
            processed["samples" if is_samples else "frames"] += 1
            speech.append(self._features(item) if is_samples else self._checked(item))
            is_features.append(is_samples)
        return BatchFeature({"speech": speech, "is_features": torch.tensor(is_features)})

    def _features(self, samples: np.ndarray) -> Tensor:
        """(N,) samples -> (T, 80) float32."""
        if not SHIFT_SAMPLES <= len(samples) <= MAX_SAMPLES:
            raise ValueError(f"a recording must have 0.01 to {MAX_DURATION_S:g} s, not {len(samples) / SAMPLING_RATE_HZ:g} s")
        return torch.from_numpy(Fbank().extract(samples.astype(np.float32)))

    def _checked(self, frames: Tensor) -> Tensor:
        dim = self.info.get_hf_config().frame_dim
        if frames.shape[1] != dim or not len(frames):
            raise ValueError(f"encoder frames must be (S, {dim}), S at least 1, not {tuple(frames.shape)}")
        return frames

    def _get_mm_fields_config(self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]) -> Mapping[str, MultiModalFieldConfig]:
        return {"speech": MultiModalFieldConfig.batched("audio"), "is_features": MultiModalFieldConfig.batched("audio", keep_on_cpu=True)}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any) -> Sequence[PromptReplacement]:
        speech_id, data = self.info.get_hf_config().speech_id, out_mm_kwargs.get_data()
        lens = []
        for speech, is_features in zip(data.get("speech", ()), data.get("is_features", ()), strict=True):
            num_frames = encoder_lens(torch.tensor(len(speech))).item() if is_features else len(speech)
            lens.append(self.info.num_tokens(num_frames))
        return [PromptReplacement("audio", [speech_id], lambda place: [speech_id] * lens[place])]


@MULTIMODAL_REGISTRY.register_processor(SpeechProcessor, info=SpeechInfo, dummy_inputs=SpeechDummies)
class Nim4ForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP, SupportsTranscription):
    """Encoder, adaptor and language model of a model folder.

    Attributes:
        counts: what it has done since it was loaded: tokens that the language model read (in a CUDA graph padding included), calls of adaptor
            and encoder, items of both.
    """

    supported_languages = {"zh": "Chinese", "en": "English"}  # noqa: RUF012 (vLLM reads it from the class)
    allow_patterns_overrides = [WEIGHTS]  # noqa: RUF012 (likewise: of the folder itself)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        config, _ = read_speech_llm_config(Path(model_config.model))
        text = model_config.hf_config.text_config
        self.counts = Counter[str]()
        self._where = model_config.model
        llm_folder = f"{model_config.model}/{LLM_FOLDER}"
        self.secondary_weights = [DefaultModelLoader.Source(llm_folder, revision=None, prefix=LANGUAGE)]
        with self._mark_tower_model(vllm_config, "audio"):
            self.acoustic = PhonemeModel(config).float()
            self.adaptor = SpeechAdaptor(config.adaptor, config.encoder.dim, text.hidden_size).to(model_config.dtype)
            self.acoustic.encoder.to(model_config.dtype)  # features and their normalisation are float32 in any case
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=text, prefix=maybe_prefix(prefix, "language_model"), architectures=text.architectures
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """There is no text that stands for speech: prompts are made of ids."""
        return None

    def embed_multimodal(self, **data: Any) -> list[Tensor]:
        """Embeddings of items, (A, D) each: `speech`, of (S, D) frames or (T, 80) features, and which of them `is_features`."""
        speech, is_features = data.get("speech"), data.get("is_features")
        if speech is None:
            return []
        flags = is_features.flatten().tolist()
        frames = [x for x, own in zip(speech, flags, strict=True) if not own]
        features = [x for x, own in zip(speech, flags, strict=True) if own]
        adapted, encoded = iter(self._adapted(frames)), iter(self._encoded(features))
        return [next(encoded if own else adapted) for own in flags]

    def _adapted(self, frames: Sequence[Tensor]) -> list[Tensor]:
        """(S, D) encoder frames -> (A, D) embeddings, of each."""
        if not frames:
            return []
        self.counts.update(adaptor_calls=1, adapted_items=len(frames))
        weight = self.adaptor.up.weight
        lens = torch.tensor([len(x) for x in frames], device=weight.device)
        padded = pad_sequence([x.to(weight.device, weight.dtype) for x in frames], batch_first=True)
        embeds, lens = self.adaptor(padded, lens)
        return [row[:length] for row, length in zip(embeds, lens.tolist(), strict=True)]

    def _encoded(self, features: Sequence[Tensor]) -> list[Tensor]:
        """(T, 80) features of whole recordings -> (A, D) embeddings, of each."""
        if not features:
            return []
        self.counts.update(encoder_calls=1, encoded_items=len(features))
        device = self.acoustic.mean.device
        lens = torch.tensor([len(x) for x in features], device=device)
        padded = pad_sequence([x.to(device, torch.float32) for x in features], batch_first=True)
        frames, lens = self.acoustic.encoder(self.acoustic.normalise(padded), lens)
        return self._adapted([row[:length] for row, length in zip(frames, lens.tolist(), strict=True)])

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Hidden states of the tokens of a pass, as vLLM's models have it."""
        self.counts["tokens"] += positions.shape[-1]
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """(N, D) hidden states -> (N, V)."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes the tensors of the folder's two files; those of the first in our own shapes, those of the language model as vLLM has them."""
        ours: dict[str, Tensor] = {}

        def of_the_language_model() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(LANGUAGE):
                    yield name, tensor
                else:
                    ours[name] = tensor

        loaded = AutoWeightsLoader(self).load_weights(of_the_language_model())
        adaptor = {name.removeprefix(ADAPTOR): tensor for name, tensor in ours.items() if name.startswith(ADAPTOR)}
        load_into(self.adaptor, adaptor, self._where)
        load_into(self.acoustic, {name: tensor for name, tensor in ours.items() if not name.startswith(ADAPTOR)}, self._where)
        return loaded | {f"adaptor.{name}" for name in adaptor} | {f"acoustic.{name}" for name, _ in self.acoustic.named_parameters()}

    # ------------------------------------------------------------------------------------------- /v1/audio/transcriptions

    @classmethod
    def get_speech_to_text_config(cls, model_config: ModelConfig, task_type: str) -> SpeechToTextConfig:
        """How vLLM's server reads and cuts recordings."""
        return SpeechToTextConfig(max_audio_clip_s=MAX_CLIP_S, sample_rate=SAMPLING_RATE_HZ)

    @classmethod
    def get_generation_prompt(cls, stt_params: SpeechToTextParams) -> dict[str, Any]:
        """The prompt of one clip; `hotwords`, or else `prompt`, are hints: texts between commas."""
        if stt_params.task_type != "transcribe":
            raise ValueError("this model transcribes, it does not translate")
        from nim4.serve.limits import Refused
        from nim4.serve.settings import hints_of  # here, since numba comes with it, beside which vLLM's workers on a CPU do not start

        try:
            hints = hints_of(stt_params.hotwords or stt_params.request_prompt or "")
        except Refused as refused:
            raise ValueError(refused.message) from refused
        prompt = Prompt(cached_tokenizer_from_config(stt_params.model_config))
        ids = [*prompt.prefix, stt_params.model_config.hf_config.speech_id, *prompt.suffix(hints)]
        return {"prompt_token_ids": ids, "multi_modal_data": {"audio": (stt_params.audio, stt_params.stt_config.sample_rate)}}

    @classmethod
    def get_num_audio_tokens(cls, audio_duration_s: float, stt_config: SpeechToTextConfig, model_config: ModelConfig) -> int:
        """Speech tokens of so many seconds, for the server's accounts."""
        frames = audio_duration_s * SAMPLING_RATE_HZ / (SHIFT_SAMPLES * SUBSAMPLING)
        return -(-round(frames) // model_config.hf_config.stack)


class WorkerCounts:
    """Lets an engine's owner ask the model for its counts, in whichever process it is."""

    def nim4_counts(self) -> dict[str, int]:
        """The model's counts."""
        return dict(self.model_runner.get_model().counts)
