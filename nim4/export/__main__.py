"""`python -m nim4 export`: a model folder for other runtimes. See docs/export.md."""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

from nim4 import stage
from nim4.config import RecipeError

FORMATS = ("onnx", "sherpa-onnx", "triton")


def add_export(commands: Any) -> None:
    about = """The streaming encoder and the phoneme head for another runtime: a folder with model.onnx and tokens.txt. What is written is compared
    with the model, chunk by chunk, before it gets its name."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser("export", description=about, help="the streaming encoder for another runtime", formatter_class=defaults)
    parser.add_argument("--format", choices=FORMATS, required=True, help="for ONNX Runtime, sherpa-onnx's OnlineRecognizer, or Triton")
    parser.add_argument("--model", type=Path, required=True, help="model folder of stage 3 or 9")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    sizes = "audio in a chunk; it is fixed in the graph. For triton several, with a graph for each"
    parser.add_argument("--chunk-ms", type=int, nargs="+", default=[640], help=sizes)
    parser.add_argument("--left-chunks", type=int, default=4, help="chunks before it that a chunk sees")
    parser.add_argument("--int8", action="store_true", help="and model.int8.onnx, with its weights in 8 bits")
    parser.add_argument("--fbank", choices=("inside", "outside"), default="outside", help="whether the graph takes samples, or log-Mel features")
    parser.add_argument("--opset", type=int, default=17, help="version of ONNX's operators")
    backends = "for triton: what runs the graph there, see docs/deployment.md; onnxruntime if it is left out, python is for the CPU"
    parser.add_argument("--backend", choices=("onnxruntime", "python"), help=backends)
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> None:
    """Writes --out."""
    import torch

    from nim4.export.onnx import StreamingStep, export_streaming
    from nim4.export.runtime import check_graph, quantise
    from nim4.export.sherpa import export_sherpa

    if args.format == "triton":
        to_triton(args)
        return
    if args.backend is not None:
        raise RecipeError("--backend", expected="--format triton", found=f"--format {args.format}", fix="leave it out")
    if len(args.chunk_ms) > 1:
        raise RecipeError("--chunk-ms", expected="one size", found=len(args.chunk_ms), fix="give one, or --format triton")
    context, sherpa = context_of(args.chunk_ms[0], args.left_chunks), args.format == "sherpa-onnx"
    if args.out.exists():
        raise RecipeError(args.out, expected="a new folder", found="one that exists" if args.out.is_dir() else "a file", fix="name another as --out")
    if sherpa and args.fbank == "inside":
        raise RecipeError("--fbank inside", expected="outside", found="--format sherpa-onnx, which makes the features itself", fix="leave it out")
    torch.set_num_threads(1)
    model, inventory = load(args.model)
    work = args.out.with_name(args.out.name + ".tmp")
    if work.exists():
        shutil.rmtree(work)
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise RecipeError(args.out, expected="a folder that can be made", found=error, fix="name another as --out") from error
    try:
        path, small = work / "model.onnx", work / "model.int8.onnx"
        if sherpa:
            step = export_sherpa(model, path, context, opset=args.opset)
        else:
            step = StreamingStep(model, context, fbank=args.fbank == "inside")
            export_streaming(model, path, context, fbank=args.fbank == "inside", opset=args.opset)
        tell(path, check_graph(step, path))
        if args.int8:
            quantise(path, small)
            tell(small, check_graph(step, small, tolerance=math.inf))
        inventory.save(work / "tokens.txt")
        work.rename(args.out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    stage.log.info("%s: done", args.out)


def to_triton(args: argparse.Namespace) -> None:
    """Writes --out as a model repository."""
    import torch

    from nim4.export.triton import export_triton
    from nim4.model.checkpoint import WEIGHTS
    from nim4.stage import file_hash

    fixed = {"--int8": (args.int8, False), "--fbank": (args.fbank, "outside"), "--left-chunks": (args.left_chunks, 4), "--opset": (args.opset, 17)}
    for option, (value, default) in fixed.items():
        if value != default:
            raise RecipeError(option, expected="it to be left out", found="--format triton, which has no choice of that", fix="leave it out")
    torch.set_num_threads(1)
    model, _ = load(args.model)
    export_triton(model, file_hash(args.model / WEIGHTS), args.out, args.backend or "onnxruntime", args.chunk_ms)
    stage.log.info("%s: done; start tritonserver --model-repository %s", args.out, args.out)


def context_of(chunk_ms: int, left_chunks: int) -> Any:
    """What the encoder may see, from the options. Raises RecipeError."""
    from nim4.decode.encoder import ENCODER_FRAME_MS
    from nim4.model.conformer import Context

    if chunk_ms < ENCODER_FRAME_MS or chunk_ms % ENCODER_FRAME_MS:
        raise RecipeError("--chunk-ms", expected=f"a multiple of {ENCODER_FRAME_MS}", found=chunk_ms, fix="for example 640")
    if left_chunks < 0:
        raise RecipeError("--left-chunks", expected="0 or more", found=left_chunks, fix="for example 4")
    return Context(chunk_ms // ENCODER_FRAME_MS, left_chunks)


def load(folder: Path) -> Any:
    """The phoneme model and the inventory of a folder, on the CPU. Raises RecipeError, also when it has no phoneme head."""
    import torch

    from nim4.model.checkpoint import WEIGHTS, load_model, read_model_config, weight_names

    read_model_config(folder)
    if not any(name.startswith("head.") for name in weight_names(folder / WEIGHTS)):
        fix = "name a folder of stage 3, or run stage 9, which trains the head of the last encoder"
        raise RecipeError(folder / WEIGHTS, expected="an encoder and a phoneme head", found="no head.* in it", fix=fix)
    return load_model(folder, torch.device("cpu"))


def tell(path: Path, difference: float) -> None:
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    stage.log.info("%s: %.1f MB, log-probabilities and frames differ from the model's by at most %.2g", path.name, size / 1e6, difference)
