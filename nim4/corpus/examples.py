"""Utterances as the language model is taught them: prompt, transcript, and for streaming also speech that is not finished.

What chance decides about an utterance follows from (seed, epoch, its id) alone, so a run resumes exactly, with any number of workers.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields

from nim4.config import RecipeError, SftConfig
from nim4.corpus.batch import Batch, Cut, TextBatch, collate, disturb_of
from nim4.corpus.manifest import MonoCut
from nim4.corpus.noise import Fate, Noise
from nim4.corpus.prompts import Prompt
from nim4.corpus.units import PhonemeInventory

SUBSAMPLING = 4  # feature frames per encoder frame

# per utterance, for each word or character in order: (where it ends in the text, the last encoder frame of its phonemes)
WordEnds = Mapping[str, Sequence[tuple[int, int]]]
# (text, source of chance) -> the hints of an utterance
DrawHints = Callable[[str, random.Random], list[str]]


class Examples:
    """Makes the batches of stages 4 to 8.

    Args:
        inventory: of the phonemes, which the manifests bring.
        prompt: of the language model's tokenizer.
        config: `seed`, `partial_prob` and `partial_chunk_frames` count.
        word_ends: needed when `partial_prob` is above 0; it may be filled later, see `cut_ids`.
        hints: draws an utterance's hints; None = no utterance has any.
        noise: what is mixed into the speech; None = nothing.
    Raises:
        RecipeError: when utterances are to be cut in a stage that brings no word ends.
    """

    def __init__(
        self,
        inventory: PhonemeInventory,
        prompt: Prompt,
        config: SftConfig,
        word_ends: WordEnds | None = None,
        hints: DrawHints | None = None,
        noise: Noise | None = None,
    ):
        if word_ends is None and config.partial_prob > 0:
            raise RecipeError("train.partial_prob", expected="0 in this stage", found=config.partial_prob, fix="set it in a later stage")
        self._inventory, self._prompt, self._config = inventory, prompt, config
        self._word_ends, self._hints, self._noise = word_ends, hints, noise

    def __call__(self, cuts: Sequence[MonoCut], epoch: int) -> TextBatch:
        """The batch of `cuts` in an epoch; in epoch -1, that of validation, speech is whole and there are no hints."""
        whole = collate(cuts, self._inventory, disturb_of(self._noise, epoch))
        x_lens, suffixes, answers, texts = whole.x_lens.clone(), [], [], []
        for row, cut in enumerate(cuts):
            text, partial, hints = cut.supervisions[0].text or "", False, []
            if epoch >= 0:
                rng, fate, text, hints, is_cut = self._drawn(cut, epoch)
                if is_cut:
                    shift = 0 if fate is None else -(-fate.left_frames // SUBSAMPLING)
                    x_lens[row], text, partial = self._cut_short(cut.id, int(x_lens[row]), text, shift, rng)
            suffixes.append(self._prompt.suffix(hints, partial=partial))
            answers.append(self._prompt.answer(text))
            texts.append(text)
        parts = {field.name: getattr(whole, field.name) for field in fields(Batch)}
        x = whole.x[:, : int(x_lens.max())].clone()
        for row, num_frames in enumerate(x_lens.tolist()):
            x[row, num_frames:] = 0.0
        parts |= {"x": x, "x_lens": x_lens}
        return TextBatch(**parts, suffixes=suffixes, answers=answers, texts=texts)

    def cut_ids(self, planned: Iterable[tuple[int, Cut]]) -> set[str]:
        """Of (epoch, utterance) pairs to come, the ids of those that will be cut short: what `word_ends` has to know."""
        cut_short = {cut.id for epoch, cut in planned if self._drawn(cut, epoch)[-1]}
        return cut_short | set(map(_original_id, cut_short))

    def _drawn(self, cut: Cut, epoch: int) -> tuple[random.Random, Fate | None, str, list[str], bool]:
        """What chance decides: (where more is drawn from, what the noise does, text, hints, whether the utterance is cut short)."""
        rng = random.Random(f"{self._config.seed} {epoch} {cut.id} example")
        fate = self._noise.fate(epoch, cut.id) if self._noise else None
        text = (cut.supervisions[0].text or "") if fate is None or fate.is_speech else ""
        hints = self._hints(text, rng) if self._hints else []
        return rng, fate, text, hints, rng.random() < self._config.partial_prob

    def _cut_short(self, name: str, num_frames: int, text: str, shift: int, rng: random.Random) -> tuple[int, str, bool]:
        """Speech up to a chunk boundary, and the words whose phonemes are over one frame before it; whole when there is no boundary.

        `shift`: encoder frames by which silence at the start has moved the words.
        """
        chunk = self._config.partial_chunk_frames
        num_boundaries = (num_frames - 1) // (SUBSAMPLING * chunk)
        known = self._word_ends or {}
        ends = known.get(name, known.get(_original_id(name)))
        if num_boundaries == 0 or ends is None:
            return num_frames, text, False
        boundary = chunk * rng.randint(1, num_boundaries)
        spoken = [where for where, last_frame in ends if last_frame + shift <= boundary - 2]
        return SUBSAMPLING * boundary, text[: spoken[-1]] if spoken and text else "", True


def _original_id(name: str) -> str:
    """Of a second copy, the id of the utterance, see TrainBatches; of others their own, unless it looks like a copy's."""
    return re.sub(r"-again\d+$", "", name)
