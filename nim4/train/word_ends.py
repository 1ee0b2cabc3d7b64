"""Where the words of the training texts end, in the text and in time: what cutting an utterance short needs (nim4/corpus/examples.py).

The phonemes of the manifest are aligned to the audio with a model's own phoneme head, and counted off word by word. An utterance whose
words cannot all be found in its text is never cut, rather than wrongly: a number is read as words that are not written.
Source: ours; the paper decodes unfinished speech (section 3.6) and does not say how that is trained.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from pathlib import Path

import torch

from nim4.corpus.batch import Batch, MonoCut, eval_batches, phone_batches, phones_of
from nim4.corpus.examples import WordEnds
from nim4.corpus.g2p import Lexicon
from nim4.corpus.progress import Progress
from nim4.corpus.units import PhonemeInventory
from nim4.corpus.word_places import Placed, place_words
from nim4.model.ctc import PhonemeModel, forced_align
from nim4.stage import read_jsonl, write_jsonl
from nim4.train.distributed import Processes

log = logging.getLogger("nim4")
BATCH_S = 60.0  # padded audio aligned at once; more no longer fits the cache of a CPU


def find_word_ends(
    cuts: Iterable[MonoCut], lexicon: Lexicon, model: PhonemeModel, inventory: PhonemeInventory, device: torch.device
) -> list[dict[str, object]]:
    """Aligns utterances; `model` is on `device`, and left in evaluation mode.

    Returns:
        for each utterance `id` and `ends`, see WordEnds; or `reason`, why it must not be cut.
    """
    rows: list[dict[str, object]] = []
    placed: dict[str, Placed] = {}
    to_align: list[MonoCut] = []
    for cut in cuts:
        text, phones = cut.supervisions[0].text or "", phones_of(cut).split()
        words = lexicon.words(text)
        ends = place_words(text, words)
        if [phone for _, read in words for phone in read] != phones:
            rows.append({"id": cut.id, "reason": "its phonemes are not those of its text"})
        elif ends is None:
            rows.append({"id": cut.id, "reason": "a word that is not written as it is read"})
        else:
            placed[cut.id] = ends
            to_align.append(cut)
    model.eval()
    progress = Progress("aligning", len(to_align), "utterances")
    for batch in eval_batches(to_align, phone_batches(inventory), BATCH_S):
        for name, last_frames in zip(batch.ids, _last_frames(batch, model, device), strict=True):
            if last_frames is None:
                rows.append({"id": name, "reason": "too short for its phonemes"})
            else:
                rows.append({"id": name, "ends": [[end, last_frames[num_phones - 1]] for end, num_phones in placed[name]]})
        progress.add(len(batch.ids))
    return rows


@torch.inference_mode()
def _last_frames(batch: Batch, model: PhonemeModel, device: torch.device) -> list[list[int] | None]:
    """The last encoder frame of each phoneme of each utterance; None where CTC does not fit."""
    log_probs, lens = model(batch.x.to(device), batch.x_lens.to(device))
    found: list[list[int] | None] = []
    for row, num_frames, phones, num_phones in zip(log_probs.cpu(), lens.tolist(), batch.phones, batch.phone_lens.tolist(), strict=True):
        try:
            found.append(forced_align(row[:num_frames].numpy(), phones[:num_phones].tolist())[:, 1].tolist())
        except ValueError:
            found.append(None)
    return found


def word_ends(
    cuts: Sequence[MonoCut], wanted: Set[str], language: str, model: PhonemeModel, inventory: PhonemeInventory, work: Path, peers: Processes
) -> WordEnds:
    """Word ends of training utterances, from `work`/word_ends.jsonl if an earlier run of the same stage left all of them there.

    Args:
        cuts: all utterances, on every process; each process aligns its share. An id that two of them have is never cut.
        wanted: ids of those to align; others are passed over.
        language: how stage 2 read the texts.
    """
    path = work / "word_ends.jsonl"
    times = Counter(cut.id for cut in cuts if cut.id in wanted)
    if not peers.from_main(path.is_file() and times.keys() <= {row["id"] for row in read_jsonl(path)}):
        own = [cut for cut in cuts if times[cut.id] == 1][peers.rank :: peers.world_size]
        shares = peers.gather(find_word_ends(own, Lexicon(language), model, inventory, peers.device))
        if peers.is_main:
            rows = [row for share in shares for row in share]
            rows += [{"id": name, "reason": "an id that two utterances have"} for name, count in times.items() if count > 1]
            write_jsonl(path, sorted(rows, key=lambda row: str(row["id"])))
        peers.barrier()
    rows = read_jsonl(path)
    reasons = Counter(row["reason"] for row in rows if "reason" in row)
    told = "".join(f"; {count} never: {reason}" for reason, count in reasons.most_common())
    log.info("word ends: %d of the %d utterances drawn for it can be cut short%s", len(rows) - sum(reasons.values()), len(rows), told)
    return {row["id"]: [(end, frame) for end, frame in row["ends"]] for row in rows if "ends" in row}
