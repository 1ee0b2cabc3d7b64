"""What belongs to no stage: `python -m nim4 transcribe --help`, and stream, serve, score, baseline, hotwords, entropy, corpus, encoder, export."""

import argparse
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from nim4 import stage
from nim4.baseline.__main__ import add_baseline
from nim4.config import EntropyConfig, RecipeError, VadConfig, load
from nim4.corpus.__main__ import add_corpus
from nim4.export.__main__ import add_export
from nim4.published.__main__ import add_encoder

PIECE_S = 0.1  # of audio, that `stream` hears at once
FINAL_CONTEXT = "of a stream: written from its chunks as they were heard, or from the whole segment, which is encoded again (later, fewer errors)"
VAD_SETTINGS = "how speech is told from silence and cut, see VadConfig in nim4/config/settings.py; repeatable"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nim4", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_transcribe, add_stream, add_serve, add_score, add_baseline, add_hotwords, add_entropy, add_corpus, add_encoder, add_export):
        add(commands)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    args.run(args)


def add_transcribe(commands: Any) -> None:
    about = """The text of recordings of any length, cut where nobody speaks, with the times of segments and words. What soundfile cannot read goes
    through ffmpeg, where that is installed."""
    parser = speech_parser(commands, "transcribe", about, transcribe)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="audio files")
    formats = "a JSON object per file, its text alone, or subtitles of one file"
    parser.add_argument("--format", choices=("jsonl", "txt", "srt", "vtt"), default="jsonl", help=formats)


def add_stream(commands: Any) -> None:
    about = """The text of a recording or of the microphone while it is heard, a partial text every 640 ms, and the final one. On a terminal what can
    still change is dim; elsewhere each partial is a line of seconds heard, `partial`, and the text with | before what can still change."""
    parser = speech_parser(commands, "stream", about, stream)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--wav", type=Path, help="audio file")
    source.add_argument("--mic", action="store_true", help="the default microphone, until Ctrl-C; needs the package sounddevice")
    parser.add_argument("--realtime", action="store_true", help="no faster than it was spoken")
    parser.add_argument("--final-context", choices=("chunks", "whole"), default="whole", help=FINAL_CONTEXT)


def speech_parser(commands: Any, name: str, about: str, run: Any) -> argparse.ArgumentParser:
    """A command with the options of everything that writes text."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser(name, description=about, help=re.split("[,:]", about)[0].lower(), formatter_class=defaults)
    parser.add_argument("--model", type=Path, required=True, help="model folder of stages 4 to 9")
    parser.add_argument("--hotwords", default="", help="words that may occur, separated by commas: hints to the speech LLM")
    parser.add_argument("--hotword-index", type=Path, help="folder of an index in which hints are looked up by sound")
    parser.add_argument("--no-punctuation", action="store_true", help="texts without punctuation")
    add_common(parser)
    parser.set_defaults(run=run)
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """What transcribe, stream and serve have in common at the end of their options."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the weights; auto: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=VAD_SETTINGS)


def load_speech(args: argparse.Namespace) -> tuple[Any, Any, Any, list[str]]:
    """The model of --model, its phoneme inventory, the index of --hotword-index or None, and the hints of --hotwords."""
    from nim4.decode.hotword import HotwordIndex
    from nim4.model.asr import load_speech_llm
    from nim4.train.distributed import pick_device

    model, inventory = load_speech_llm(args.model, pick_device(args.device), args.precision)
    index = HotwordIndex.load(args.hotword_index, inventory) if args.hotword_index else None
    return model, inventory, index, [word.strip() for word in args.hotwords.split(",") if word.strip()]


def transcribe(args: argparse.Namespace) -> None:
    """Prints the text of each file; files that cannot be read are told at the end."""
    from nim4.corpus.feats import SAMPLING_RATE_HZ, read_recording
    from nim4.decode.recordings import Transcriber, as_json, as_srt, as_vtt, full_text
    from nim4.decode.vad import check

    if args.format in ("srt", "vtt") and len(args.files) > 1:
        raise RecipeError(f"--format {args.format}", expected="one file", found=len(args.files), fix="transcribe them one by one")
    vad = load(VadConfig, {}, args.set, "--set")
    check(vad)
    model, inventory, index, given = load_speech(args)
    transcriber = Transcriber(model, inventory, hotwords=index, given=given, vad=vad, with_words=args.format != "txt")
    errors = []
    for path in args.files:
        try:
            samples = read_recording(path)
        except RecipeError as error:
            errors.append(error)
            continue
        found = transcriber.transcribe(samples)
        found = [segment.unpunctuated() for segment in found] if args.no_punctuation else found
        if args.format == "jsonl":
            hints = list(dict.fromkeys([*given, *(hint for segment in found for hint in segment.hints)]))
            row = {"file": str(path), "audio_s": round(len(samples) / SAMPLING_RATE_HZ, 3), "text": full_text(found), "hints": hints}
            print(json.dumps(row | {"segments": as_json(found)}, ensure_ascii=False), flush=True)
        else:
            print({"txt": full_text, "srt": as_srt, "vtt": as_vtt}[args.format](found), flush=True)
    if errors:
        stage.log.info("%d of %d files could not be transcribed", len(errors), len(args.files))
        for error in errors[:-1]:
            stage.log.error("%s", " ".join(str(error).split()))
        raise errors[-1]


def stream(args: argparse.Namespace) -> None:
    """Prints what a listener would see."""
    from nim4.corpus import microphone
    from nim4.decode.listening import Listener
    from nim4.decode.second_pass import rereading_of
    from nim4.decode.streaming import Recogniser
    from nim4.decode.vad import check
    from nim4.report.live_text import shown

    vad = load(VadConfig, {}, args.set, "--set")
    check(vad)
    if args.mic and args.realtime:
        raise RecipeError("--realtime", expected="--wav beside it", found="--mic", fix="leave it out: nobody speaks faster than in real time")
    pieces = microphone.listen(PIECE_S) if args.mic else microphone.play(args.wav, PIECE_S, args.realtime)
    model, _, index, given = load_speech(args)
    listener = Listener(Recogniser(model, hotwords=index, rereading=rereading_of(args.final_context)), vad, given)

    def show(update: Any) -> None:
        if args.no_punctuation and update.hypothesis is not None:
            update = replace(update, hypothesis=update.hypothesis.unpunctuated())
        print(shown(update, sys.stdout.isatty()), end="", flush=True)

    try:
        for piece in pieces:
            for update in listener.push(piece):
                show(update)
    except KeyboardInterrupt:
        if not args.mic:
            raise
    for update in listener.finish():
        show(update)


def add_serve(commands: Any) -> None:
    from nim4.serve.__main__ import LIMITS, add_parts
    from nim4.serve.limits import KEYS_VARIABLE, Limits

    about = "Recordings over HTTP and streams over a WebSocket, with the event names of OpenAI's interface: see docs/serving.md."
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser("serve", description=about, help="a server of recordings and streams", formatter_class=defaults)
    parser.add_argument("--model", type=Path, required=True, help="model folder of stages 4 to 9")
    parser.add_argument(
        "--hotword-index", type=Path, action="append", default=[], help="folder of an index that clients may name by the folder's name; repeatable"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all of this machine's")
    parser.add_argument("--port", type=int, default=8000, help="0 is any free one")
    parser.add_argument("--api-keys", type=Path, help=f"file of accepted keys, one a line; none = those of {KEYS_VARIABLE}, else no key is needed")
    parser.add_argument("--origin", action="append", default=[], help="a web page's origin that may use the server beside its own; repeatable")
    for name, about in LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=int(getattr(Limits, name)), help=about)
    parser.add_argument("--final-context", choices=("chunks", "whole"), help=f"{FINAL_CONTEXT}; none = whole, with --engine vllm chunks")
    add_parts(parser)
    add_common(parser)
    parser.set_defaults(run=serve)


def serve(args: argparse.Namespace) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    from nim4.decode.vad import check
    from nim4.serve import __main__ as options
    from nim4.serve import app
    from nim4.serve.limits import Limits
    from nim4.train.distributed import pick_device

    for name in options.LIMITS:
        if getattr(args, name) < 1:
            raise RecipeError(f"--{name.replace('_', '-')}", expected="at least 1", found=getattr(args, name), fix="leave it out")
    vad = load(VadConfig, {}, args.set, "--set")
    check(vad)
    limits = Limits(**{name: getattr(args, name) for name in options.LIMITS})
    model, address = (args.model, pick_device(args.device), args.precision), (args.host, args.port)
    app.serve(*model, args.hotword_index, address, args.api_keys, args.origin, limits, vad, options.parts_of(args))


def add_score(commands: Any) -> None:
    from nim4.score import comparison

    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser("score", description=comparison.ABOUT, help="error rates of any systems", formatter_class=defaults)
    comparison.add_options(parser)
    parser.set_defaults(run=lambda args: print(comparison.run(args, shlex.join(["python", "-m", "nim4", *sys.argv[1:]]))))


def add_entropy(commands: Any) -> None:
    about = """What encoder frames hold, checkpoint by checkpoint: NSE (directions used), PAI (phones a linear probe can tell) and CSAI (text
    beyond the phones), as defined in nim4/train/entropy.py. Our definitions: arXiv 2604.08003 names the measures. Writes OUT/entropy.jsonl and
    OUT/entropy.png, and prints a table."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser("entropy", description=about, help="NSE, PAI and CSAI of encoders", formatter_class=defaults)
    what = "model folders, or snapshots of a stage-3 folder (snapshots/step-*.safetensors, taken in the order of their steps)"
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=what)
    parser.add_argument("--units", type=Path, required=True, help="folder of stage 2")
    parser.add_argument("--split", default="dev", help="its split to measure on")
    parser.add_argument(
        "--reference", type=Path, required=True, help="model folder whose phoneme head aligns the split; the same for numbers to compare"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="probe settings, see EntropyConfig in nim4/config/settings.py; repeatable"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for entropy.jsonl and entropy.png")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.set_defaults(run=entropy)


def entropy(args: argparse.Namespace) -> None:
    """Measures every checkpoint on the same frames, and writes the records and the picture."""
    import torch

    from nim4.corpus.g2p import Lexicon
    from nim4.corpus.manifest import load_cuts
    from nim4.corpus.table import spread
    from nim4.model.checkpoint import load_model, load_snapshot
    from nim4.report.entropy import as_text, language_of, plot, step_of
    from nim4.train.distributed import pick_device
    from nim4.train.entropy import FixedList

    config = load(EntropyConfig, {}, args.set, "--set")
    for name in ("steps", "batch_rows", "num_seeds", "max_utterances"):
        if getattr(config, name) < 1:
            raise RecipeError(f"--set {name}", expected="at least 1", found=getattr(config, name), fix="leave it out")
    if args.out.exists() and not args.out.is_dir():
        raise RecipeError("--out", expected="a folder, or a name for one", found=f"a file, {args.out}", fix="name another")
    paths = in_order(args.checkpoints)
    device = pick_device(args.device)
    torch.set_num_threads(1)  # a probe's step is too little work to share: threads would mostly wait for each other
    reference, inventory = load_model(args.reference, device)
    cuts = spread(list(load_cuts(args.units / f"{args.split}.jsonl.gz")), config.max_utterances)
    fixed = FixedList(cuts, reference, inventory, Lexicon(language_of(args.units)), config)
    stage.log.info("%s: %d utterances, %d frames with a phone", args.split, len(fixed.spoken), fixed.num_frames)
    made_of = {"split": args.split, "units_folder": str(args.units), "reference": str(args.reference), "commit": stage.git_commit()}
    records = []
    for path in paths:
        model = load_model(path, device)[0] if path.is_dir() else load_snapshot(path, device)
        try:
            measured = fixed.measure(model)
        except ValueError as error:
            raise RecipeError(path, expected="an encoder that can be measured", found=error, fix="leave this checkpoint out") from error
        records.append({"name": str(path), "step": step_of(path), **measured, **fixed.facts(), **made_of})
        stage.log.info("%s: NSE %.3f, PAI %.3f, CSAI %.4f", path, measured["nse"], measured["pai"], measured["csai"])
    stage.write_jsonl(args.out / "entropy.jsonl", records)
    plot(records, args.out / "entropy.png")
    print(as_text(records))


def in_order(checkpoints: list[Path]) -> list[Path]:
    """The checkpoints, each once; those of one snapshots/ folder by step, as a shell's * does not sort numbers.

    Beside the snapshots lie the frames that CKA compares with, which the same * matches: they are passed over, and the log says so.
    """
    from nim4.report.entropy import step_of

    frames = [path for path in checkpoints if path.name.endswith("-reference.safetensors")]
    if frames:
        stage.log.info("passed over, no checkpoints: %s", ", ".join(path.name for path in frames))
    paths = [path for path in dict.fromkeys(checkpoints) if path not in frames]
    if not paths:
        raise RecipeError("CHECKPOINT", expected="models or snapshots", found=f"only {frames[0]}", fix="for example snapshots/step-*.safetensors")
    for path in paths:
        if not path.exists():
            raise RecipeError(path, expected="a model folder or a snapshot", found="no such file or folder", fix="correct the path")
    steps = [step_of(path) if path.is_file() else None for path in paths]
    alike = len({path.parent for path in paths}) == 1 and None not in steps
    return sorted(paths, key=step_of) if alike else paths


def add_hotwords(commands: Any) -> None:
    from nim4.corpus.hotword_list import default_jobs

    defaults = argparse.ArgumentDefaultsHelpFormatter
    about = "An index of names by sound: make one from word lists, search it, change it. Searches that go on are not disturbed by changes."
    actions = commands.add_parser("hotwords", description=about, help="build, search and change hotword indexes").add_subparsers(required=True)

    def action(name: str, help_text: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, description=help_text, help=help_text, formatter_class=defaults)
        parser.set_defaults(run=hotwords, action=name)
        if name != "build":
            parser.add_argument("index", type=Path, metavar="DIR", help="folder of an index")
        return parser

    build = action("build", "an index from word lists: a name per line, or tab-separated name, weight, tags, pronunciation")
    build.add_argument("list", type=Path, nargs="+", metavar="LIST", help="word lists, .gz and .xz too")
    build.add_argument("--out", type=Path, required=True, help="folder to make")
    build.add_argument("--units", type=Path, help="folder with the model's tokens.txt; none = the inventory of stage 2")
    build.add_argument("--tones", default="toned", help="toned; toneless: tones do not count; wildcard: a neutral tone is any")
    build.add_argument("--ordinary", type=Path, help="text without hotwords, a sentence per line: names that it has too often are never found")
    build.add_argument("--jobs", type=int, default=default_jobs(), help="processes")
    search = action("search", "the names in a text as it is read aloud, in phones, or in a recording")
    query = search.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="what is said, as text")
    query.add_argument("--phones", help="what is said, as phones of tokens.txt")
    query.add_argument("--wav", type=Path, help="what is said, as a recording; needs --model")
    search.add_argument("--model", type=Path, help="model folder whose phoneme head hears the recording")
    search.add_argument("--search", choices=("exact", "lattice"), default="lattice", help="of a recording: the best phones, or what was nearly heard")
    search.add_argument("--engine", default="trie", help="trie; ahocorasick: the paper's automaton, slow to load")
    search.add_argument("--tags", default="", help="separated by commas: only names with one of them")
    add = action("add", "names into an index")
    add.add_argument("names", nargs="*", metavar="NAME", help="names")
    add.add_argument("--list", type=Path, help="and those of a word list")
    remove = action("remove", "names out of an index")
    remove.add_argument("names", nargs="+", metavar="NAME", help="names")
    for name, help_text in (("stats", "counts of an index"), ("compact", "takes what was added and removed into the base")):
        action(name, help_text)


def hotwords(args: argparse.Namespace) -> None:
    """One action on a hotword index."""
    from nim4.corpus.hotword_list import ListReport, Name, merge_names, read_list
    from nim4.decode.hotword import HotwordIndex
    from nim4.decode.hotword_build import build_folder

    if args.action == "build":
        build_folder(args.list, args.out, units=args.units, tones=args.tones, ordinary=args.ordinary, jobs=args.jobs)
        return
    index = HotwordIndex.load(args.index, engine=getattr(args, "engine", "trie"))
    if args.action == "search":
        for hit in found_hotwords(args, index):
            for name in hit.names:
                more = [f"weight {name.weight:g}", *name.tags, *([f"cost {hit.cost:.2f}"] if hit.cost else [])]
                print(f"{hit.start}-{hit.end}\t{name.text}\t{', '.join(more)}")
    elif args.action == "stats":
        print("\n".join(f"{key}\t{value}" for key, value in index.stats().items()))
    elif args.action == "compact":
        index.compact_here()
    elif args.action == "add":
        report = ListReport()
        listed = read_list(args.list, index.inventory, report) if args.list else []
        names = [name for _, name in merge_names([*listed, *((0, Name(text)) for text in args.names)], report).values()]
        if not names:
            raise RecipeError("NAME, --list", expected="at least one name", found="none", fix="name one")
        added = index.add(names)
        report.names, report.keys = added.names, added.keys
        for reason, lines in added.skipped.items():
            report.skipped.setdefault(reason, []).extend(lines)
        index.save()
        report.log(args.index)
        if report.names < 1:
            raise RecipeError("NAME", expected="a name that can be said", found=", ".join(report.skipped), fix="correct it")
    else:
        missing = index.remove(args.names)
        index.save()
        if missing:
            raise RecipeError("NAME", expected="names of the index", found=", ".join(missing), fix="the others are removed; correct these")


def found_hotwords(args: argparse.Namespace, index: Any) -> Any:
    """The hits of what is said, in one of the three forms."""
    from nim4.corpus.g2p import Lexicon
    from nim4.decode.hotword_lattice import DEFAULT_LIMITS

    view = index.filter({tag.strip() for tag in args.tags.split(",")}) if args.tags else index
    if args.wav is None:
        phones = args.phones if args.phones is not None else Lexicon().phones(args.text)
        return view.search(index.inventory.encode(phones))
    from nim4.corpus.feats import UNREADABLE, read_samples
    from nim4.corpus.manifest import cuts_from_table
    from nim4.corpus.table import Row
    from nim4.decode.ctc import offline_log_probs
    from nim4.model.checkpoint import load_model
    from nim4.train.distributed import pick_device

    if args.model is None:
        raise RecipeError("--model", expected="the model folder that hears a recording", found="none", fix="add --model DIR")
    model, inventory = load_model(args.model, pick_device("cpu"))
    if inventory.tokens != index.inventory.tokens:
        raise RecipeError(args.index, expected="an index of the model's units", found="others", fix=f"build it with --units {args.model}")
    cuts, problems = cuts_from_table([Row("recording", args.wav, "?", "", "zh")])
    try:
        if problems:
            raise ValueError(problems[0].reason)
        (log_probs,) = offline_log_probs(model, [read_samples(cuts[0])])
    except UNREADABLE as error:
        raise RecipeError(args.wav, expected="a recording of 0.1 to 60 s", found=error, fix="correct --wav") from error
    return view.search_log_probs(log_probs, DEFAULT_LIMITS if args.search == "lattice" else None)


if __name__ == "__main__":
    stage.run(main, "nim4")
