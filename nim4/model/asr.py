"""The speech LLM: encoder, adaptor and language model put together, its loss on transcripts, and its folder.

    features --encoder--> frames, 25 Hz --adaptor--> embeddings, 6.25 Hz --+
                                                                           v
                             prefix ids --embed--> [ prefix | speech | suffix | answer ] --LLM--> answer

Rows are put together from ids whose kind is known (nim4/corpus/prompts.py). For training they are padded on the right: attention is
causal, so padding needs no mask and changes nothing. For generation they are padded on the left.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nim4.config import AdaptorConfig, LlmConfig, ModelConfig, RecipeError
from nim4.corpus.prompts import Prompt
from nim4.corpus.units import PhonemeInventory
from nim4.model.adaptor import SpeechAdaptor
from nim4.model.checkpoint import ADAPTOR, WEIGHTS, acoustic_weights, load_into, read_model_config, read_weights, save_model
from nim4.model.conformer import FULL_CONTEXT, Context, encoder_lens, valid_mask
from nim4.model.ctc import PhonemeModel, frozen_in_evaluation
from nim4.model.llm import Llm, generate, load_llm, n_best, save_llm

LLM_FOLDER = "llm"
IGNORED = -100
_SPEECH = -1  # in the place of an id, where an embedding of speech comes


class SpeechLlm(nn.Module):
    """Acoustic model with its phoneme head, adaptor and language model.

    Args:
        acoustic: encoder, phoneme head and feature normalisation of stage 3.
        llm: see nim4/model/llm.py.
        config: of the folder; `adaptor` is built from it.
    """

    def __init__(self, acoustic: PhonemeModel, llm: Llm, config: ModelConfig):
        super().__init__()
        self.config = config
        self.acoustic = acoustic
        self.adaptor = SpeechAdaptor(config.adaptor, config.encoder.dim, llm.dim)
        self.llm = llm.model
        self.tokenizer = llm.tokenizer
        self.prompt = Prompt(llm.tokenizer)

    def train(self, mode: bool = True) -> "SpeechLlm":
        """Like any module's, but parts that are frozen as a whole stay in evaluation mode: without dropout."""
        super().train(mode)
        frozen_in_evaluation(self.adaptor, self.llm)
        return self

    def speech(self, x: Tensor, x_lens: Tensor, context: Context = FULL_CONTEXT) -> tuple[Tensor, Tensor]:
        """(B, T, 80) log-Mel features, (B,) lengths -> (B, A, D) embeddings and (B,) int64 lengths."""
        acoustic = self.acoustic
        with torch.set_grad_enabled(torch.is_grad_enabled() and next(acoustic.encoder.parameters()).requires_grad):
            frames, lens = acoustic.encoder(acoustic.normalise(x), x_lens, context)
        return self.adaptor(frames, lens)

    def encode(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, 80) log-Mel features, (B,) lengths -> (B, S, D) encoder frames under full context and (B,) lengths."""
        return self.acoustic.encoder(self.acoustic.normalise(x), x_lens)

    def rows(
        self, speech: Tensor, speech_lens: Tensor, suffixes: Sequence[list[int]], answers: Sequence[list[int]] | None = None, *, left: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts with the speech in place, and answers behind them.

        Args:
            speech, speech_lens: (B, A, D) and (B,), from `speech`; rows are laid out on the CPU, so lengths that are there spare a wait for the GPU.
            suffixes: ids between speech and answer, per row (Prompt.suffix).
            answers: ids after it, per row (Prompt.answer); None = nothing, for generation.
            left: pad on the left instead of the right.
        Returns:
            (B, L, D) embeddings; (B, L) int64 on the CPU, the answer's ids at their own positions and IGNORED elsewhere; (B,) int64 row lengths.
        """
        device, answers = speech.device, answers if answers is not None else [[] for _ in suffixes]
        prompts = [self.prompt.prefix + n * [_SPEECH] + own for n, own in zip(speech_lens.tolist(), suffixes, strict=True)]
        ids = _padded([prompt + own for prompt, own in zip(prompts, answers, strict=True)], 0, left)
        labels = _padded([len(prompt) * [IGNORED] + own for prompt, own in zip(prompts, answers, strict=True)], IGNORED, left)
        lens = torch.tensor([len(prompt) + len(own) for prompt, own in zip(prompts, answers, strict=True)])
        embeds = self.llm.get_input_embeddings()(_sent(ids.clamp(min=0), device))
        wanted = _sent(_places(valid_mask(speech_lens.cpu(), speech.shape[1])), device)
        spoken = speech.flatten(0, 1).index_select(0, wanted).to(embeds.dtype)
        filled = embeds.flatten(0, 1).index_copy(0, _sent(_places(ids == _SPEECH), device), spoken)
        return filled.view_as(embeds), labels, _sent(lens, device)

    def answer_logits(self, embeds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the model expects where an answer's ids stand.

        Args:
            embeds, labels: from `rows`, padded on the right.
        Returns:
            (N, V) float32 logits and (N,) int64 ids, over all answers row by row; the output layer runs on these positions alone.
        """
        hidden = self.llm.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        wanted = labels[:, 1:] != IGNORED
        places = _sent(_places(F.pad(wanted, (0, 1))), hidden.device)
        return self.llm.lm_head(hidden.flatten(0, 1).index_select(0, places)).float(), _sent(labels[:, 1:][wanted], hidden.device)

    def forward(
        self, x: Tensor, x_lens: Tensor, suffixes: Sequence[list[int]], answers: Sequence[list[int]], context: Context = FULL_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        """Teacher forcing on transcripts.

        Returns:
            () cross-entropy in nats summed over the answers' ids, and () int64, how many of them the model would have written.
        """
        lens = self.adaptor.lens(encoder_lens(x_lens)).cpu()  # read before a GPU has work to do: afterwards it would first be waited for
        logits, ids = self.answer_logits(*self.rows(self.speech(x, x_lens, context)[0], lens, suffixes, answers)[:2])
        return F.cross_entropy(logits, ids, reduction="sum"), (logits.argmax(-1) == ids).sum()

    @torch.inference_mode()
    def transcribe(
        self,
        x: Tensor,
        x_lens: Tensor,
        *,
        hints: Sequence[Sequence[str]] | None = None,
        context: Context = FULL_CONTEXT,
        num_beams: int = 1,
    ) -> list[str]:
        """Texts of a batch of features (B, T, 80), greedily or with beam search; `hints` per utterance."""
        return self.write(*self.speech(x, x_lens, context), hints=hints, num_beams=num_beams)

    @torch.inference_mode()
    def write(self, speech: Tensor, lens: Tensor, *, hints: Sequence[Sequence[str]] | None = None, num_beams: int = 1) -> list[str]:
        """Texts for what the adaptor gave: (B, A, D) embeddings and (B,) lengths."""
        rows = generate(*self._asked(speech, lens, hints), end=self.prompt.end, num_beams=num_beams)
        return [self._text_of(row) for row in rows]

    @torch.inference_mode()
    def candidates(self, speech: Tensor, lens: Tensor, num: int, *, hints: Sequence[Sequence[str]] | None = None) -> list[list[tuple[str, float]]]:
        """Like `write`, but up to `num` (at least 2) different texts per utterance with their log-probabilities, the likeliest first."""
        found: list[dict[str, float]] = []
        for row in n_best(*self._asked(speech, lens, hints), end=self.prompt.end, num=num):
            found.append({})
            for ids, log_prob in row:
                found[-1].setdefault(self._text_of(ids), log_prob)  # other tokens of the same text are less likely
        return [list(texts.items()) for texts in found]

    def _asked(self, speech: Tensor, lens: Tensor, hints: Sequence[Sequence[str]] | None) -> tuple[Llm, Tensor, Tensor, list[int]]:
        """The language model, and per utterance its prompt up to the answer, padding on the left, and the answer's limit."""
        suffixes = [self.prompt.suffix(own) for own in (hints or [()] * len(lens))]
        embeds, _, row_lens = self.rows(speech, lens, suffixes, left=True)
        return Llm(self.llm, self.tokenizer, ""), embeds, embeds.shape[1] - row_lens, [max_answer_tokens(n) for n in lens.tolist()]

    def _text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def save(self, folder: Path, weights: dict[str, Tensor], inventory: PhonemeInventory) -> None:
        """Writes a model folder.

        Args:
            weights: the state dict, whole (under FSDP2 gathered from all processes).
        """
        acoustic = {name.removeprefix("acoustic."): tensor for name, tensor in weights.items() if name.startswith(("acoustic.", ADAPTOR))}
        save_model(folder, acoustic, self.config, inventory)
        llm = {name.removeprefix("llm."): tensor for name, tensor in weights.items() if name.startswith("llm.")}
        save_llm(Llm(self.llm, self.tokenizer, ""), llm, folder / LLM_FOLDER)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`; a GPU goes on with what it is at, and takes it when its turn comes."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _padded(rows: Sequence[list[int]], fill: int, left: bool) -> Tensor:
    """(B, L) int64 on the CPU."""
    longest = max(map(len, rows))
    pads = [(longest - len(row)) * [fill] for row in rows]
    return torch.tensor([pad + row if left else row + pad for pad, row in zip(pads, rows, strict=True)])


def _places(chosen: Tensor) -> Tensor:
    """(B, L) bool on the CPU -> (N,) int64, where it is true in the flattened rows."""
    return chosen.flatten().nonzero()[:, 0]


def max_answer_tokens(speech_tokens: int) -> int:
    """Limit of an answer's length: nobody says more than 2 tokens in 160 ms for long (ours). What loops ends there."""
    return 8 + 2 * speech_tokens


def new_speech_llm(folder: Path, adaptor: AdaptorConfig, llm: LlmConfig, acoustic_weights: dict[str, Tensor]) -> tuple[SpeechLlm, PhonemeInventory]:
    """A speech LLM with a fresh adaptor.

    Args:
        folder: of stage 3, which may still be running; the encoder's shape and the phoneme inventory are taken from there.
        acoustic_weights: encoder, phoneme head and normalisation, e.g. of a snapshot in that folder.
    """
    own, inventory = read_model_config(folder, marker="config.yaml")
    config = replace(own, adaptor=adaptor, llm=llm)
    acoustic = PhonemeModel(config)
    load_into(acoustic, acoustic_weights, folder)
    return SpeechLlm(acoustic, load_llm(llm), config), inventory


def read_speech_llm_config(folder: Path) -> tuple[ModelConfig, PhonemeInventory]:
    """Shape and phoneme inventory of a speech LLM's folder. Raises RecipeError if it is not one of stages 4 to 9."""
    config, inventory = read_model_config(folder)
    if not (folder / LLM_FOLDER).is_dir():
        fix = "run stage 4, or correct --model / --init"
        raise RecipeError(folder, expected="a model folder of stage 4 or later", found="no llm/ in it", fix=fix)
    return config, inventory


def load_speech_llm(folder: Path, device: torch.device, precision: str = "fp32") -> tuple[SpeechLlm, PhonemeInventory]:
    """The speech LLM of a folder, in evaluation mode, and its phoneme inventory.

    Args:
        precision: of the weights, and of what is computed with them: fp32, bf16, or auto: bf16 on a GPU, fp32 elsewhere. Features and their
            normalisation are float32 in any case.
    Raises:
        RecipeError: if the folder is not one of stages 4 to 9, or its parts do not fit each other.
    """
    folder = Path(folder)
    config, inventory = read_speech_llm_config(folder)
    dtype = torch.bfloat16 if precision == "bf16" or (precision == "auto" and device.type == "cuda") else torch.float32
    llm = load_llm(replace(config.llm, name=str(folder / LLM_FOLDER)), dtype)
    model = SpeechLlm(PhonemeModel(config), llm, config)
    weights = read_weights(folder / WEIGHTS)
    load_into(model.acoustic, acoustic_weights(weights), folder / WEIGHTS)
    adaptor = {name.removeprefix(ADAPTOR): tensor for name, tensor in weights.items() if name.startswith(ADAPTOR)}
    load_into(model.adaptor, adaptor, folder / WEIGHTS)
    for part in (model.acoustic.encoder, model.acoustic.head, model.adaptor):
        part.to(dtype)
    return model.to(device).eval(), inventory


def model_files(folder: Path, method: str) -> list[Path]:
    """What decides the result of a decoding method (llm, or another): the folder's own files, and for llm its language model's."""
    files = [folder / name for name in (WEIGHTS, "config.yaml", "tokens.txt")]
    return files + ([folder / LLM_FOLDER / name for name in (WEIGHTS, "config.json", "tokenizer.json")] if method == "llm" else [])
