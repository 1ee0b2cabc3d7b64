"""The model of the paper's size with random weights, utterances of stated lengths, and how many operations training on them takes."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from common import SEED
from lhotse import MonoCut, Recording, SupervisionSegment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nim4.config import AdaptorConfig, ConformerConfig, GrpoTrainConfig, LlmConfig, ModelConfig, RecipeError, build, read_yaml
from nim4.corpus.batch import TextBatch
from nim4.corpus.units import PhonemeInventory
from nim4.model.asr import SpeechLlm
from nim4.model.ctc import PhonemeModel
from nim4.model.llm import Llm
from nim4.stage import ROOT
from nim4.train.roles import ROLES

PHONES_PER_S = 8.0
FRAMES_PER_S = 100
GROUP_SIZE = GrpoTrainConfig().group_size
CI_ENCODER = {"dim": 32, "num_blocks": 2, "num_heads": 2, "ffn_dim": 64, "conv_kernel": 7, "subsampling_channels": 4}
CI_LLM = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
CI_LLM |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
QWEN3_1_7B = {"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
QWEN3_1_7B |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}


class Lengths(NamedTuple):
    """An utterance: seconds of audio and ids of its transcript, the end included."""

    audio_s: float
    num_tokens: int


def draw_lengths(count: int = 2000) -> list[Lengths]:
    """What lengths.tsv holds: log-normal seconds, median 6 and sigma 0.6, between 1 and 30; about 3 ids a second, with a deviation of 0.6."""
    rng = random.Random(SEED)
    rows = []
    for _ in range(count):
        audio_s = round(min(max(rng.lognormvariate(1.7918, 0.6), 1.0), 30.0), 2)
        rows.append(Lengths(audio_s, 1 + max(round(audio_s * max(rng.gauss(3.0, 0.6), 1.0)), 1)))
    return rows


def read_lengths(path: Path) -> list[Lengths]:
    """Lines of seconds, a tab, and ids. Raises RecipeError with the line that is none."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("#"):
            try:
                audio_s, num_tokens = line.split("\t")
                rows.append(Lengths(float(audio_s), int(num_tokens)))
            except ValueError as error:
                raise RecipeError(f"{path}, line {number}", expected="seconds, a tab, ids", found=repr(line), fix="correct the line") from error
    return rows


class WordIds:
    """Stands for a tokenizer, so that prompts have about their true length: one id per word or line break."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
        return [len(word) % self.vocab_size for word in text.replace("\n", " \n ").split(" ") if word]

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.vocab_size - 1

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def make_model(size: str, device: torch.device) -> SpeechLlm:
    """Random weights on `device`; `size` is `full` (encoder 622 M, adaptor 15 M, Qwen3-1.7B) or `ci`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    is_full = size == "full"
    encoder = build(ConformerConfig, read_yaml(ROOT / "local/conf/model/nim4.yaml")["encoder"] if is_full else CI_ENCODER, "encoder")
    adaptor = AdaptorConfig() if is_full else AdaptorConfig(hidden_dim=24)
    config = ModelConfig(encoder, len(PhonemeInventory.default().tokens), adaptor=adaptor, llm=LlmConfig())
    shape = Qwen3Config(**(QWEN3_1_7B if is_full else CI_LLM), tie_word_embeddings=True, rope_theta=1e6, max_position_embeddings=4096)
    torch.manual_seed(SEED)
    with torch.device(device):
        model = SpeechLlm(PhonemeModel(config), Llm(Qwen3ForCausalLM(shape), WordIds(shape.vocab_size), "random"), config)
    return model.train()


def make_cuts(lengths: Sequence[Lengths]) -> list[MonoCut]:
    """Utterances as the samplers see them; nothing can be read from them. The text is the number of ids."""
    cuts = []
    for number, (audio_s, num_tokens) in enumerate(lengths):
        name, num_samples = f"u{number:05d}", round(16_000 * audio_s)
        recording = Recording(name, [], 16_000, num_samples, num_samples / 16_000)
        supervision = SupervisionSegment(name, name, 0.0, recording.duration, text=str(num_tokens), speaker="s", language="zh")
        cuts.append(MonoCut(name, 0.0, recording.duration, 0, [supervision], recording=recording))
    return cuts


@dataclass(frozen=True)
class RandomBatches:
    """Makes batches of noise and random ids; an utterance is always the same, in whatever batch.

    Attributes:
        hint_tokens: ids added to each prompt, as hints would be.
    """

    model: SpeechLlm
    hint_tokens: int = 0

    def __call__(self, cuts: Sequence[MonoCut], epoch: int) -> TextBatch:
        vocab_size, prompt = self.model.tokenizer.vocab_size, self.model.prompt
        features, phones, suffixes, answers = [], [], [], []
        for cut in cuts:
            generator = torch.Generator().manual_seed(SEED + int(cut.id[1:]))
            features.append(torch.randn(round(FRAMES_PER_S * cut.duration), 80, generator=generator))
            phones.append(torch.randint(2, self.model.config.vocab_size, (round(PHONES_PER_S * cut.duration),), generator=generator))
            hints = torch.randint(0, vocab_size - 1, (self.hint_tokens,), generator=generator).tolist()
            answer = torch.randint(0, vocab_size - 1, (int(cut.supervisions[0].text) - 1,), generator=generator).tolist()
            suffixes.append(hints + prompt.suffix())
            answers.append([*answer, prompt.end])
        return TextBatch(
            ids=[cut.id for cut in cuts],
            x=pad_sequence(features, batch_first=True),
            x_lens=torch.tensor([len(x) for x in features]),
            phones=pad_sequence(phones, batch_first=True),
            phone_lens=torch.tensor([len(p) for p in phones]),
            suffixes=suffixes,
            answers=answers,
            texts=[self.model.tokenizer.decode(answer[:-1], skip_special_tokens=True) for answer in answers],
        )


# ------------------------------------------------------------------------------------------------------------ what a batch costs


def matrix_parameters(*modules: nn.Module) -> int:
    """Weights that take part in products: of two dimensions or more."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters() if parameter.ndim > 1)


def row_lens(model: SpeechLlm, batch: TextBatch) -> Tensor:
    """(B,) int64, tokens of each row of the language model: prefix, speech, suffix, answer."""
    speech = model.adaptor.lens((batch.x_lens + 3) // 4)
    text = [len(model.prompt.prefix) + len(s) + len(a) for s, a in zip(batch.suffixes, batch.answers, strict=True)]
    return speech + torch.tensor(text)


def llm_tokens(model: SpeechLlm, stage: str, batch: TextBatch) -> float:
    """Tokens that the language model must read in a step on `batch`: those of the rows.

    In GRPO those of the prompts, once; and of each of the G answers twice: sampled, and in the update. The reference's are not counted.
    """
    tokens, answers = float(row_lens(model, batch).sum()), sum(map(len, batch.answers))
    return tokens - answers + 2 * GROUP_SIZE * answers if stage == "grpo" else tokens


def tokens_in_rows(model: SpeechLlm, stage: str, batch: TextBatch, *, apart: bool) -> tuple[float, float]:
    """Tokens of the language model, in stage 3 feature frames, that a way computes on `batch`; and with the padding around them.

    Args:
        apart: GRPO reads each prompt once and appends all answers; False = whole rows, once per answer to sample and once to train.
    """
    if stage == "pretrain":
        return _padded(batch.x_lens)
    lens = row_lens(model, batch)
    if stage != "grpo":
        return _padded(lens)
    answer_lens = torch.tensor([len(answer) for answer in batch.answers])
    prompts, answers, rows = _padded(lens - answer_lens), _padded(answer_lens), _padded(lens)
    times = (1, 2 * GROUP_SIZE, 0) if apart else (GROUP_SIZE, GROUP_SIZE, GROUP_SIZE)
    real, padded = (sum(count * part[i] for count, part in zip(times, (prompts, answers, rows), strict=True)) for i in (0, 1))
    return real, padded


def _padded(lens: Tensor) -> tuple[float, float]:
    return float(lens.sum()), float(len(lens) * lens.max())


@functools.cache
def _costs(stage: str) -> dict[str, int]:
    """Operations per parameter and frame: 2 forward; 4 where only a gradient passes; 6 where weights train too."""
    trained = ROLES[stage]
    order = ["encoder", "adaptor", "llm"]
    first = next((part for part in order if part in trained), "llm")
    return {part: 6 if part in trained else 4 if order.index(part) > order.index(first) else 2 for part in order}


def model_flops(model: SpeechLlm, stage: str, batch: TextBatch) -> float:
    """Floating-point operations that training on `batch` needs: real frames and tokens only, no padding, nothing computed twice.

    2, 4 or 6 per weight and frame (see _costs), the attention of the language model, and its output layer on the answers' ids. Left out: the
    encoder's attention (below 1 % of the encoder), norms, and the optimiser. Both views of CR-CTC count. In GRPO the forward pass of the
    reference counts, and of each answer the sampling; its last id is never read, and its first follows from the prompt, which is read once.
    """
    acoustic, shape = model.acoustic, model.llm.config
    frames = float(((batch.x_lens + 3) // 4).sum())
    encoder = frames * matrix_parameters(acoustic.encoder)
    if stage == "pretrain":
        return 2 * (6 * encoder + 6 * frames * matrix_parameters(acoustic.head))
    lens, cost = row_lens(model, batch).double(), _costs(stage)
    adaptor = float(model.adaptor.lens((batch.x_lens + 3) // 4).sum()) * matrix_parameters(model.adaptor)
    weights, vocab = matrix_parameters(model.llm.model.layers), shape.vocab_size * shape.hidden_size
    pair = shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers  # 2 products of L^2 / 2 pairs

    def body(ends: Tensor, starts: Tensor) -> float:
        return float((ends - starts).sum()) * weights + float((ends * ends - starts * starts).sum()) * pair

    if stage != "grpo":
        llm = body(lens, torch.zeros_like(lens)) + sum(map(len, batch.answers)) * vocab
        return cost["encoder"] * encoder + cost["adaptor"] * adaptor + cost["llm"] * llm
    ends = lens - 1
    prompts = lens - torch.tensor([len(answer) for answer in batch.answers])
    read = encoder + adaptor + body(prompts, torch.zeros_like(prompts)) + len(lens) * vocab
    answers = GROUP_SIZE * (body(ends, prompts) + float((ends - prompts).sum()) * vocab)
    return (6 + 2) * read + (2 + 6 + 2) * answers
