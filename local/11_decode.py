"""Stage 11: hypotheses of a trained model, for each decode config and test set.

Every config is a file in local/conf/decode/; the model folder brings everything else. Product, per config and test set:
refs.jsonl (every utterance of the set), hyps.jsonl (seconds, errors, and phonemes and on closed-vocabulary sets words from CTC, or
text from the speech LLM) and for streaming configs events.jsonl (what was shown when). Streams are simulated in real time: a chunk can be
decoded when it has been spoken, and compute is waited for, that on the chunks of others who speak at once too (nim4/decode/speakers.py).
Audio that cannot be read is a hypothesis with an error, and is scored as one.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import numpy as np
import torch

from local.decode_config import check_closed, read_decode_config
from nim4 import stage
from nim4.config import DecodeConfig, RecipeError, as_dict
from nim4.corpus.batch import phones_of
from nim4.corpus.manifest import MonoCut, load_cuts, utterances
from nim4.corpus.progress import Progress
from nim4.corpus.units import PhonemeInventory
from nim4.decode.beam import BeamSearch, ngram_files
from nim4.decode.ctc import offline_log_probs, stream_cuts
from nim4.decode.encoder import context_of
from nim4.decode.graph import GraphSearch
from nim4.decode.hotword import HotwordIndex, index_files
from nim4.decode.lexicon import LexiconSearch, join_words
from nim4.decode.offline import decode_cuts, llm_cuts
from nim4.decode.processes import processes_of_one_thread
from nim4.decode.rescoring import CtcRescorer
from nim4.decode.spoken_cuts import stream_llm_cuts
from nim4.model.asr import SpeechLlm, load_speech_llm, model_files
from nim4.model.checkpoint import load_model, read_model_config
from nim4.model.ctc import PhonemeModel, collapse
from nim4.score.record import hardware
from nim4.train.distributed import pick_device


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--units", type=Path, required=True, help="folder of stage 2: the test sets with their phonemes")
    parser.add_argument("--test", required=True, help="test sets, separated by blanks")
    parser.add_argument("--configs", default="ctc_greedy ctc_streaming", help="decode configs, by name of their file in local/conf/decode/")
    parser.add_argument("--closed", default="", help="sets of --units with a closed vocabulary, in --test or not: words are searched there")
    parser.add_argument("--lexicon", type=Path, help="the words of the closed sets, one per line")
    parser.add_argument("--arpa", type=Path, help="n-gram of configs with `ngram`; without it words.arpa or phones.arpa of --units, by stage 2")
    parser.add_argument("--hotwords", default="", help="words that may occur, separated by commas: hints to the speech LLM for every utterance")
    parser.add_argument("--hotword-index", type=Path, help="folder of stage 10, in which configs with `hotwords` look up hints")
    parser.add_argument("--out", type=Path, required=True, help="folder to make OUT/<config>/<test set> in")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    configs = {name: read_decode_config(name) for name in args.configs.split()}
    sets = args.test.split()
    if not configs:
        raise RecipeError("--configs", expected="at least one decode config", found="none", fix="for example --configs ctc_greedy")
    if not sets:
        raise RecipeError("--test", expected="at least one test set", found="none", fix="for example --test test")
    closed = check_closed(args.closed.split(), sets, args.units, args.lexicon)
    hotwords = [word.strip() for word in args.hotwords.split(",") if word.strip()]
    if hotwords and all(config.method != "llm" for config in configs.values()):
        raise RecipeError("--hotwords", expected="a decode config of the speech LLM", found=args.configs, fix="for example --configs offline")
    inventory = read_model_config(args.model)[1]
    search = LexiconSearch.of_file(args.lexicon, inventory) if closed else None
    decoders = Decoders(args.model, pick_device(args.device), search, hotwords, args.hotword_index)
    ngrams = ngram_files(configs, args.arpa, args.units)
    for name, config in configs.items():
        for test_set in sets:
            manifest = args.units / f"{test_set}.jsonl.gz"
            is_ctc = config.method != "llm"
            words = config.method == "ctc_greedy" and test_set in closed
            output = stage.StageOutput(
                args.out / name / test_set,
                config={"decode": as_dict(config), "words": words} | ({} if is_ctc else {"hotwords": hotwords}),
                inputs=[
                    manifest,
                    *model_files(args.model, config.method),
                    *([args.lexicon] if words else []),
                    *ngrams[name],
                    *index_files(config.hotwords, args.hotword_index),
                ],
            )
            if not output.is_done():
                cuts = list(load_cuts(manifest))
                decoders.load(config, ngrams[name])
                decoded = decoders.ctc(cuts, config, words) if is_ctc else decoders.llm(cuts, config)
                write_set(f"{name}/{test_set}", cuts, decoded, config, output, args.model)


@dataclass(frozen=True)
class Outcome:
    """What a decoder made of one utterance."""

    cut: MonoCut
    phones: list[str] | None  # None = this decoder gives none
    text: str | None
    wall_s: float
    shown: Sequence[tuple[float, float, str, int | None]]  # streaming: audio heard in s, clock in s, what was shown, characters that stay
    error: str | None
    hints: list[str] | None = None  # that were found for it; None = nothing was looked up


class Decoders:
    """The ways to decode, over one model folder; each part of it is loaded when it is first needed."""

    def __init__(self, folder: Path, device: torch.device, search: LexiconSearch | None, hotwords: list[str], index: Path | None):
        self._folder, self._device, self._search, self._hotwords, self._index_folder = folder, device, search, hotwords, index
        self._num_processes = processes_of_one_thread(device)
        self._searches: dict[DecodeConfig, BeamSearch | GraphSearch] = {}

    @cached_property
    def _phoneme_model(self) -> tuple[PhonemeModel, PhonemeInventory]:
        return load_model(self._folder, self._device)

    @cached_property
    def _speech_llm(self) -> SpeechLlm:
        return load_speech_llm(self._folder, self._device)[0]

    @cached_property
    def _index(self) -> HotwordIndex:
        return HotwordIndex.load(self._index_folder, read_model_config(self._folder)[1])

    def load(self, config: DecodeConfig, ngram: list[Path]) -> None:
        """Loads what a config needs, so that a damaged folder is told before anything is written, and no worker process loads it."""
        _ = self._speech_llm if config.method == "llm" else self._phoneme_model
        if config.method == "ctc_beam" and config not in self._searches:
            self._searches[config] = BeamSearch.of_config(config, self._phoneme_model[1], *ngram)
        if config.method == "ctc_graph" and config not in self._searches:
            self._searches[config] = GraphSearch.of_config(config, self._phoneme_model[1], *ngram, device=self._device)
        _ = self._index if config.hotwords != "none" else None

    def ctc(self, cuts: list[MonoCut], config: DecodeConfig, words: bool) -> Iterator[Outcome]:
        """Phonemes, and words where the config has an n-gram of them, or words of the lexicon are asked for."""
        model, inventory = self._phoneme_model
        wide, words = self._searches.get(config), words or config.ngram == "words"

        def read_out(log_probs: np.ndarray) -> tuple[list[str], str | None]:
            if wide is not None:
                ids, found = wide.search(log_probs)
                return inventory.decode(ids), join_words(found) if words else None
            phones = inventory.decode(collapse(log_probs.argmax(-1).tolist()))
            return phones, join_words(self._search.search(log_probs)) if words else None

        def decode(recordings: Sequence[np.ndarray]) -> list[tuple[list[str], str | None]]:
            return [read_out(log_probs) for log_probs in offline_log_probs(model, recordings)]

        if config.streaming:
            rows = stream_cuts(cuts, model, context_of(config), read_out, self._num_processes, config.speakers)
        else:
            rows = decode_cuts(cuts, config.batch_s, decode, self._num_processes)
        for row in rows:
            phones, text = row.result or ([], "" if words else None)
            shown = [(heard_s, clock_s, " ".join(inventory.decode(labels)), None) for heard_s, clock_s, labels in row.shown]
            yield Outcome(row.cut, phones, text, row.wall_s, shown, row.error)

    def llm(self, cuts: list[MonoCut], config: DecodeConfig) -> Iterator[Outcome]:
        """Text of the speech LLM, from whole recordings or streams."""
        index = self._index if config.hotwords != "none" else None
        rescorer = CtcRescorer(read_model_config(self._folder)[1], config.ctc_weight) if config.ctc_weight else None
        decode = stream_llm_cuts if config.streaming else llm_cuts
        for row in decode(self._speech_llm, cuts, config, self._hotwords, index, self._num_processes, rescorer):
            text, hints = row.result or (None, None)
            yield Outcome(row.cut, None, text, row.wall_s, row.shown, row.error, hints)


def write_set(
    name: str, cuts: list[MonoCut], decoded: Iterator[Outcome], config: DecodeConfig, output: stage.StageOutput, model_folder: Path
) -> None:
    """Decodes one test set with one config and writes its folder."""
    work = output.begin()
    refs = [
        {"id": fact.id, "phones": phones_of(cut), "text": fact.text, "speaker": fact.speaker, "audio_s": round(fact.duration_s, 3)}
        for fact, cut in zip(utterances(cuts), cuts, strict=True)
    ]
    stage.write_jsonl(work / "refs.jsonl", refs)
    progress = Progress(f"decoding {name}", len(cuts), "utterances")
    hyps, events = [], []
    for row in decoded:
        phones = None if row.phones is None else " ".join(row.phones)
        facts = {"audio_s": round(row.cut.duration, 3), "wall_s": round(row.wall_s, 5), "error": row.error}
        hyps.append({"id": row.cut.id, "phones": phones, "text": row.text, **facts} | ({} if row.hints is None else {"hints": row.hints}))
        for number, (audio_s, clock_s, text, settled) in enumerate(row.shown, 1):
            times = {"t_audio_s": round(audio_s, 4), "t_wall_s": round(clock_s, 4)}
            stays = {} if settled is None else {"settled_chars": settled}
            events.append({"id": row.cut.id, **times, "text": text, **stays, "is_final": number == len(row.shown)})
        progress.add()
    stage.write_jsonl(work / "hyps.jsonl", sorted(hyps, key=lambda row: row["id"]))
    if config.streaming:
        stage.write_jsonl(work / "events.jsonl", events)
    failed = sum(row["error"] is not None for row in hyps)
    if failed:
        stage.log.warning("%s: %d of %d utterances could not be decoded; their errors are in hyps.jsonl", name, failed, len(hyps))
    record = stage.read_json(model_folder / "done.json") if (model_folder / "done.json").is_file() else {}
    output.finish(
        model=str(model_folder),
        model_step=record.get("step"),
        hardware=hardware(torch.get_num_threads()) + (f", {config.speakers} speakers at once" if config.speakers > 1 else ""),
        failed=failed,
        command=" ".join(sys.argv),
    )


if __name__ == "__main__":
    stage.run(main, "decode")
