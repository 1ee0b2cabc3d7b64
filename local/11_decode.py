"""Stage 11: hypotheses of a trained model, for each decode config and test set.

Every config is a file in local/conf/decode/; the model folder brings everything else. Product, per config and test set:
refs.jsonl (every utterance of the set), hyps.jsonl (phonemes, words on closed-vocabulary sets, seconds, errors) and for
streaming configs events.jsonl (what was shown when). Audio that cannot be read is a hypothesis with an error, and is scored as one.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import numpy as np
import torch

from nim4 import stage
from nim4.config import DecodeConfig, RecipeError, as_dict, build, nearest, read_yaml
from nim4.corpus.batch import phones_of
from nim4.corpus.feats import UNREADABLE, read_samples
from nim4.corpus.g2p import Lexicon
from nim4.corpus.manifest import load_cuts, utterances
from nim4.corpus.progress import Progress
from nim4.corpus.units import PhonemeInventory
from nim4.decode.ctc import ENCODER_FRAME_MS, StreamingCtc, offline_log_probs
from nim4.decode.lexicon import LexiconSearch, join_words
from nim4.model.checkpoint import WEIGHTS, load_model
from nim4.model.conformer import Context
from nim4.model.ctc import PhonemeModel, collapse
from nim4.score.record import hardware
from nim4.train.distributed import pick_device

log = stage.log
CONFIGS = Path(__file__).resolve().parent / "conf" / "decode"
SAMPLES_PER_MS = 16


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--units", type=Path, required=True, help="folder of stage 2: the test sets with their phonemes")
    parser.add_argument("--test", required=True, help="test sets, separated by blanks")
    parser.add_argument("--configs", default="ctc_greedy ctc_streaming", help="decode configs, by name of their file in local/conf/decode/")
    parser.add_argument("--closed", default="", help="test sets with a closed vocabulary: words are searched there")
    parser.add_argument("--lexicon", type=Path, help="the words of the closed sets, one per line")
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
    closed = check_closed(args.closed.split(), sets, args.lexicon)
    device = pick_device(args.device)
    model, inventory = load_model(args.model, device)
    search = read_lexicon(args.lexicon, inventory) if closed else None
    for name, config in configs.items():
        for test_set in sets:
            manifest = args.units / f"{test_set}.jsonl.gz"
            words = search if test_set in closed else None
            output = stage.StageOutput(
                args.out / name / test_set,
                config={"decode": as_dict(config), "words": words is not None},
                inputs=[manifest, *(args.model / file for file in (WEIGHTS, "config.yaml", "tokens.txt"))] + ([args.lexicon] if words else []),
            )
            if not output.is_done():
                decode_set(f"{name}/{test_set}", manifest, model, inventory, config, words, output, args.model)


def read_decode_config(name: str) -> DecodeConfig:
    """The decode config called `name`. Raises RecipeError that names the nearest one."""
    path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in CONFIGS.glob("*.yaml")]
        raise RecipeError(f"--configs {name}", expected="a file in local/conf/decode/", found="none of this name", fix=nearest(name, known))
    config = build(DecodeConfig, read_yaml(path), str(path))
    if config.method != "ctc_greedy":
        raise RecipeError(f"{path}: method", expected="ctc_greedy", found=config.method, fix="correct the file")
    if config.chunk_ms % ENCODER_FRAME_MS or config.chunk_ms <= 0:
        raise RecipeError(f"{path}: chunk_ms", expected=f"a multiple of {ENCODER_FRAME_MS}", found=config.chunk_ms, fix="for example 640")
    if config.left_context_chunks < 0:
        raise RecipeError(f"{path}: left_context_chunks", expected="0 or more", found=config.left_context_chunks, fix="for example 4")
    return config


def check_closed(closed: list[str], sets: list[str], lexicon: Path | None) -> set[str]:
    """The closed sets that are decoded now. Raises RecipeError when they need a word list that is not given."""
    wanted = set(closed) & set(sets)
    if wanted and lexicon is None:
        raise RecipeError("--lexicon", expected="the word list of the closed sets", found="none", fix="add --lexicon FILE, or leave out --closed")
    return wanted


def read_lexicon(path: Path, inventory: PhonemeInventory) -> LexiconSearch:
    """The words of a list with their pronunciations. Raises RecipeError when the list cannot be read."""
    try:
        words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(path, expected="a readable word list", found=error, fix="correct --lexicon") from error
    reader = Lexicon()
    return LexiconSearch({word: [inventory.encode(reader.phones(word))] for word in words})


def decode_set(name: str, manifest: Path, model: PhonemeModel, inventory, config: DecodeConfig, words, output, model_folder: Path) -> None:
    """Decodes one test set with one config and writes its folder."""
    cuts = list(load_cuts(manifest))
    work = output.begin()
    facts = utterances(cuts)
    refs = [
        {"id": fact.id, "phones": phones_of(cut), "text": fact.text, "speaker": fact.speaker, "audio_s": round(fact.duration_s, 3)}
        for fact, cut in zip(facts, cuts, strict=True)
    ]
    stage.write_jsonl(work / "refs.jsonl", refs)
    decode = stream_one_by_one(cuts, model, config) if config.streaming else decode_in_batches(cuts, model, config)
    progress = Progress(f"decoding {name}", len(cuts), "utterances")
    hyps, events, model_step = [], [], None
    for cut, log_probs, wall_s, shown, error in decode:
        started_s = time.perf_counter()
        phones = [] if error else inventory.decode(collapse(log_probs.argmax(-1).tolist()))
        text = None if words is None else "" if error else join_words(words.search(log_probs))
        wall_s += time.perf_counter() - started_s
        hyps.append(
            {"id": cut.id, "phones": " ".join(phones), "text": text, "audio_s": round(cut.duration, 3), "wall_s": round(wall_s, 5), "error": error}
        )
        for number, (t_audio_s, t_wall_s, labels) in enumerate(shown, 1):
            shown_text = " ".join(inventory.decode(labels))
            row = {
                "id": cut.id,
                "t_audio_s": round(t_audio_s, 3),
                "t_wall_s": round(t_wall_s, 4),
                "text": shown_text,
                "is_final": number == len(shown),
            }
            events.append(row)
        progress.add()
    stage.write_jsonl(work / "hyps.jsonl", sorted(hyps, key=lambda row: row["id"]))
    if config.streaming:
        stage.write_jsonl(work / "events.jsonl", events)
    failed = sum(row["error"] is not None for row in hyps)
    if failed:
        log.warning("%s: %d of %d utterances could not be decoded; their errors are in hyps.jsonl", name, failed, len(hyps))
    if (model_folder / "done.json").is_file():
        model_step = stage.read_json(model_folder / "done.json").get("step")
    output.finish(
        model=str(model_folder), model_step=model_step, hardware=hardware(torch.get_num_threads()), failed=failed, command=" ".join(sys.argv)
    )


# decoded utterance: cut, (S, V) log-probabilities, seconds of compute, [(audio heard s, clock s, phoneme ids shown)], error
Decoded = tuple[object, np.ndarray, float, list[tuple[float, float, list[int]]], str | None]


def decode_in_batches(cuts: list, model: PhonemeModel, config: DecodeConfig) -> Iterator[Decoded]:
    """Offline decoding, longest utterances first; an utterance's share of its batch's seconds is its share of the audio."""
    waiting: list[tuple[object, np.ndarray]] = []

    def flush() -> Iterator[Decoded]:
        started_s = time.perf_counter()
        rows = offline_log_probs(model, [samples for _, samples in waiting])
        wall_s = time.perf_counter() - started_s
        audio_s = sum(cut.duration for cut, _ in waiting)
        for (cut, _), log_probs in zip(waiting, rows, strict=True):
            yield cut, log_probs, wall_s * cut.duration / audio_s, [], None

    for cut in sorted(cuts, key=lambda cut: (-cut.duration, cut.id)):
        try:
            samples = read_samples(cut)
        except UNREADABLE as error:
            yield cut, np.zeros((0, 1)), 0.0, [], repr(error)
            continue
        if waiting and waiting[0][0].duration * (len(waiting) + 1) > config.batch_s:
            yield from flush()
            waiting = []
        waiting.append((cut, samples))
    if waiting:
        yield from flush()


def stream_one_by_one(cuts: list, model: PhonemeModel, config: DecodeConfig) -> Iterator[Decoded]:
    """Streaming decoding with a simulated speaker: a chunk can be decoded when it has been spoken, and compute is waited for."""
    torch.set_num_threads(1)  # a chunk is too little work to share: threads would mostly wait for each other
    context = Context(config.chunk_ms // ENCODER_FRAME_MS, config.left_context_chunks)
    piece = config.chunk_ms * SAMPLES_PER_MS
    for cut in cuts:
        try:
            samples = read_samples(cut)
        except UNREADABLE as error:
            yield cut, np.zeros((0, 1)), 0.0, [], repr(error)
            continue
        session, outputs, shown, clock_s, wall_s = StreamingCtc(model, context), [], [], 0.0, 0.0
        for start in [*range(0, len(samples), piece), None]:
            heard_s = (len(samples) if start is None else min(start + piece, len(samples))) / 1000 / SAMPLES_PER_MS
            started_s = time.perf_counter()
            outputs.append(session.finish() if start is None else session.accept(samples[start : start + piece]))
            took_s = time.perf_counter() - started_s
            wall_s, clock_s = wall_s + took_s, max(clock_s, heard_s) + took_s
            shown.append((heard_s, clock_s, list(session.phones)))
        yield cut, torch.cat(outputs).numpy(), wall_s, shown, None


if __name__ == "__main__":
    stage.run(main, "decode")
