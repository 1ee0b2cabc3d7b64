#!/usr/bin/env python3
"""The streaming encoder and phoneme head under other runtimes: speed, memory, and errors, from samples to phones.

PyTorch as it is and compiled, ONNX Runtime in 32 and in 8 bits, sherpa-onnx in both, on the same recordings, each followed by a second of
silence, because sherpa-onnx decodes whole chunks only. RTF is seconds of computing per second of audio, features included. Memory is what a fresh
process with its libraries loaded takes in addition, at most, while it loads the model and hears a recording. Where the manifest has phones, the
phoneme error rate is counted on all of its recordings, and how many come out with the phones that PyTorch writes; the clock runs over the first few.
"""

import functools
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone
import numpy as np
import torch
from common import SEED, median_ratio, parser_for, publish, take_turns

import nim4.stage
from nim4.config import ModelConfig, RecipeError, build, read_yaml
from nim4.corpus.feats import SAMPLING_RATE_HZ, read_samples
from nim4.corpus.manifest import load_cuts
from nim4.corpus.table import spread
from nim4.corpus.units import PhonemeInventory
from nim4.decode.ctc import StreamingCtc
from nim4.export.onnx import export_streaming
from nim4.export.runtime import ExportedEncoder, quantise
from nim4.export.sherpa import export_sherpa
from nim4.model.checkpoint import count_parameters, load_model, save_model, with_vocab_size
from nim4.model.conformer import Conformer, Context
from nim4.model.ctc import PhonemeModel, collapse
from nim4.score.error_rate import edit_distance
from nim4.stage import ROOT

RUNTIMES = ("pytorch", "pytorch, compiled", "onnxruntime", "onnxruntime, int8", "sherpa-onnx", "sherpa-onnx, int8")
LEFT_MS = 2560  # of left context, or one chunk where that is longer
SILENCE_S = 1.0
TIMED = 4  # recordings

Decode = Callable[[np.ndarray], list[int]]  # samples -> ids of phones


def build_parser():
    parser = parser_for(__doc__, rounds=5)
    parser.add_argument("--model", type=Path, help="model folder of stage 3 or 9; none = random weights of --model-config")
    default = ROOT / "local/conf/model/mini.yaml"
    parser.add_argument("--model-config", type=Path, default=default, help="size of the encoder where there is no --model")
    parser.add_argument("--manifest", type=Path, nargs="*", default=[], help="manifests of stage 2, .jsonl.gz; none = noise")
    parser.add_argument("--limit", type=int, default=0, help="at most so many recordings of each manifest; 0 = all")
    parser.add_argument("--chunk-ms", type=int, nargs="+", default=[320, 640, 1280], help="sizes of chunks")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), help="those to compare; pytorch is always one")
    return parser


def decoder(runtime: str, folder: Path, context: Context, threads: int) -> Decode:
    """Loads what `prepare` left in `folder`; the returned function hears one recording as a stream."""
    torch.set_num_threads(threads)
    if runtime.startswith("pytorch"):
        model, _ = load_model(folder, torch.device("cpu"))
        if runtime.endswith("compiled"):
            model.encoder.forward_chunk = torch.compile(model.encoder.forward_chunk, dynamic=False)
        return functools.partial(by_torch, model, context)
    path = folder / f"{runtime.partition(',')[0]}{'.int8' if runtime.endswith('int8') else ''}.onnx"
    if runtime.startswith("onnxruntime"):
        encoder = ExportedEncoder(path, threads)
        return lambda samples: collapse(np.concatenate([chunk["log_probs"] for chunk in encoder.chunks(samples)]).argmax(-1).tolist())
    import sherpa_onnx

    options = {"tokens": str(folder / "tokens.txt"), "model": str(path), "num_threads": threads}
    if json.loads((folder / "kind.json").read_text()) == "conformer":
        options |= {"chunk_size": context.chunk_frames, "num_left_chunks": context.left_chunks}
        recogniser = sherpa_onnx.OnlineRecognizer.from_wenet_ctc(**options)
    else:
        recogniser = sherpa_onnx.OnlineRecognizer.from_zipformer2_ctc(**options)
    return functools.partial(by_sherpa, recogniser, PhonemeInventory.load(folder / "tokens.txt"))


@torch.inference_mode()
def by_torch(model: PhonemeModel, context: Context, samples: np.ndarray) -> list[int]:
    session = StreamingCtc(model, context)
    session.accept(samples)
    session.finish()
    return session.phones


def by_sherpa(recogniser, inventory: PhonemeInventory, samples: np.ndarray) -> list[int]:
    stream = recogniser.create_stream()
    stream.accept_waveform(SAMPLING_RATE_HZ, samples)
    stream.input_finished()
    while recogniser.is_ready(stream):
        recogniser.decode_stream(stream)
    return inventory.encode(recogniser.tokens(stream))


def prepare(model: PhonemeModel, inventory: PhonemeInventory, folder: Path, context: Context, runtimes: Sequence[str]) -> None:
    """What the runtimes load: the model folder, and a graph in 32 and in 8 bits for each."""
    save_model(folder, model.state_dict(), model.config, inventory)
    (folder / "kind.json").write_text(json.dumps("conformer" if isinstance(model.encoder, Conformer) else "zipformer"))
    for name, write in (("onnxruntime", export_streaming), ("sherpa-onnx", export_sherpa)):
        if any(runtime.startswith(name) for runtime in runtimes):
            write(model, folder / f"{name}.onnx", context)
            quantise(folder / f"{name}.onnx", folder / f"{name}.int8.onnx")


def memory_mb(runtime: str, folder: Path, context: Context, threads: int, samples: np.ndarray) -> float:
    """In a fresh process: the highest resident memory, less that before the model is loaded."""
    if runtime.startswith("sherpa"):
        import sherpa_onnx  # noqa: F401 - libraries are there before
    if runtime.endswith("compiled"):
        import torch._inductor.compile_fx  # noqa: F401
    before = _status_kb("VmRSS")
    decoder(runtime, folder, context, threads)(samples)
    return max(0.0, _status_kb("VmHWM") - before) / 1024


def _status_kb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def recordings(args) -> tuple[list[np.ndarray], list[list[str]]]:
    """Samples, each with silence behind, and the phones that are said; of noise there are none."""
    if not args.manifest:
        rng = np.random.default_rng(SEED)
        heard = [0.05 * rng.standard_normal(int(7.5 * SAMPLING_RATE_HZ)).clip(-3, 3).astype(np.float32)]
        phones = []
    else:
        cuts = [cut for path in args.manifest for cut in spread(list(load_cuts(path)), args.limit or sys.maxsize)]
        heard = [read_samples(cut) for cut in cuts]
        phones = [cut.supervisions[0].custom["phones"].split() for cut in cuts]
    silence = np.zeros(int(SILENCE_S * SAMPLING_RATE_HZ), np.float32)
    return [np.concatenate([samples, silence]) for samples in heard], phones


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.model is not None:
        model, inventory = load_model(args.model, torch.device("cpu"))
    else:
        inventory = PhonemeInventory.default()
        torch.manual_seed(SEED)
        config = build(ModelConfig, {"encoder": read_yaml(args.model_config).get("encoder", {})}, str(args.model_config))
        model = PhonemeModel(with_vocab_size(config, inventory)).eval()
    wrong = [size for size in args.chunk_ms if size < 40 or size % 40]
    if wrong:
        raise RecipeError("--chunk-ms", expected="multiples of 40", found=wrong[0], fix="correct it")
    runtimes = [name for name in RUNTIMES if name in ("pytorch", *args.runtimes)]
    heard, said = recordings(args)
    timed, rows = heard[:TIMED], []
    timed_s = sum(map(len, timed)) / SAMPLING_RATE_HZ
    for chunk_ms in args.chunk_ms:
        context = Context(chunk_ms // 40, max(1, LEFT_MS // chunk_ms))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(model, inventory, folder, context, runtimes)
            decoders = {runtime: decoder(runtime, folder, context, args.threads) for runtime in runtimes}
            ways = {runtime: functools.partial(hear, decode, timed) for runtime, decode in decoders.items()}
            for way in ways.values():
                way()  # compiled and warm before the clock starts
            seconds = take_turns(ways, args.rounds)
            found = {runtime: [decode(samples) for samples in heard] for runtime, decode in decoders.items()}
            for runtime in runtimes:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:  # a process each
                    held_mb = fresh.submit(memory_mb, runtime, folder, context, args.threads, timed[0]).result()
                row = {"chunk_ms": chunk_ms, "runtime": runtime, "rtf": statistics.median(seconds[runtime]) / timed_s}
                row["speed_to_pytorch"] = median_ratio(seconds["pytorch"], seconds[runtime])
                row["memory_mb"] = held_mb
                if said:
                    errors = sum(edit_distance(inventory.encode(ref), hyp) for ref, hyp in zip(said, found[runtime], strict=True))
                    row["per_percent"] = 100 * errors / sum(map(len, said))
                row["same_phones_percent"] = 100 * statistics.mean(ours == hyp for ours, hyp in zip(found["pytorch"], found[runtime], strict=True))
                rows.append(row)
    of = f"{args.model}" if args.model else f"random weights of {args.model_config.stem}"
    names = ", ".join(path.name.removesuffix(".jsonl.gz") for path in args.manifest) or "noise"
    size = f"{len(heard)} recordings ({names}), {timed_s:.0f} s timed; {of}, {model.config.encoder.kind} {count_parameters(model.parameters())}"
    publish(args, __doc__.split("\n")[0], size, rows)


def hear(decode: Decode, timed: Sequence[np.ndarray]) -> None:
    for samples in timed:
        decode(samples)


if __name__ == "__main__":
    nim4.stage.run(main, "bench")
