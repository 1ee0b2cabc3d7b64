"""Reports that belong to no stage: `python -m nim4 entropy --help`."""

import argparse
import re
from pathlib import Path
from typing import Any

from nim4 import stage
from nim4.config import EntropyConfig, RecipeError, load


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nim4", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_entropy(commands)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    args.run(args)


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
    from nim4.report.entropy import as_text, plot
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


def step_of(path: Path) -> int | None:
    """Training steps of a checkpoint: in a snapshot's name, in a stage's record; None where neither says."""
    if path.is_file():
        match = re.fullmatch(r"step-(\d+)\.safetensors", path.name)
        return int(match[1]) if match else None
    return stage.read_json(path / "done.json").get("step") if (path / "done.json").is_file() else None


def language_of(units: Path) -> str:
    """The language in which stage 2 read the texts. Raises RecipeError when its record does not say."""
    record = stage.read_json(units / "done.json")
    try:
        return record["made_from"]["config"]["language"]
    except (KeyError, TypeError) as error:
        raise RecipeError(
            units / "done.json", expected="the record of stage 2", found=f"no {error}", fix="give the folder of stage 2 as --units"
        ) from error


if __name__ == "__main__":
    stage.run(main, "nim4")
