"""Stage 3: CR-CTC pre-training of the streaming encoder and the phoneme head, with the snapshot registry that IA-SFT consumes.

Product: a model folder (model.safetensors, config.yaml, tokens.txt) with metrics.jsonl, tensorboard/, best.safetensors,
registry.jsonl + snapshots/ (encoders that CKA says have moved, section 3.3 of the paper) and cka.png.
Started again after a kill, it goes on from the last checkpoint and ends with the same weights.
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import torch

from nim4 import stage
from nim4.config import PretrainConfig, RecipeError, as_dict, load, read_yaml
from nim4.corpus.batch import TrainBatches, eval_batches, parse_sources, phone_batches
from nim4.corpus.feats import Cmvn
from nim4.corpus.manifest import load_cuts
from nim4.corpus.noise import Noise
from nim4.corpus.units import PhonemeInventory
from nim4.model.checkpoint import WEIGHTS, count_parameters, load_into, read_weights, save_model, save_shape, with_vocab_size
from nim4.model.ctc import PhonemeModel
from nim4.train.cka import CkaMonitor, plot_registry, read_registry, take_frames
from nim4.train.cr_ctc import cr_ctc, validate
from nim4.train.distributed import Processes, processes
from nim4.train.fine_tuning import UNRECORDED, VALID_BATCH_S, read_section
from nim4.train.loop import Trainer
from nim4.train.speed import RESUMABLE

log = stage.log


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--units", type=Path, required=True, help="folder of stage 2: manifests with phonemes, tokens.txt")
    parser.add_argument("--cmvn", type=Path, nargs="+", required=True, help="cmvn.json of stage 1; several are merged")
    parser.add_argument("--train", required=True, help="training splits, e.g. 'train' or 'aishell:train librispeech:train-clean-100=0.3'")
    parser.add_argument("--valid", required=True, help="validation splits")
    parser.add_argument("--noise", default="", help="splits whose recordings are mixed into the training audio, e.g. 'musan:noise musan:music=0.5'")
    parser.add_argument("--model-config", type=Path, required=True, help="local/conf/model/*.yaml")
    parser.add_argument("--train-config", type=Path, required=True, help="local/conf/train/*.yaml; its section `pretrain` is used")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. train.cr_weight=0; may be repeated")
    parser.add_argument("--init", type=Path, help="model folder to start from instead of random weights")
    parser.add_argument("--out", type=Path, required=True, help="model folder to make")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    values = {"model": read_yaml(args.model_config), **read_section(args.train_config, "pretrain")}
    config = load(PretrainConfig, values, args.set, f"{args.model_config} + {args.train_config}")
    inventory = PhonemeInventory.load(args.units / "tokens.txt")
    config = dataclasses.replace(config, model=with_vocab_size(config.model, inventory))
    sources = parse_sources(args.train, args.units)
    valid_sources = parse_sources(args.valid, args.units)
    noise_sources = parse_sources(args.noise, args.units, "--noise") if args.noise else []
    if "=" in args.valid:
        raise RecipeError("--valid", expected="splits without weights", found=args.valid, fix="remove the = and what follows it")
    if args.init:
        check_same_tokens(args.init, inventory)
    recorded = as_dict(config)
    for name in UNRECORDED:
        recorded["train"].pop(name)
    for name in ("adaptor", "llm"):  # of later stages, in the same file
        recorded["model"].pop(name)
    output = stage.StageOutput(
        args.out,
        config={**recorded, "train_splits": args.train, "valid_splits": args.valid, "noise_splits": args.noise},
        inputs=[source.path for source in sources + valid_sources + noise_sources]
        + args.cmvn
        + [args.units / "tokens.txt"]
        + ([args.init] if args.init else []),
    )
    with processes(args.device) as peers:
        if output.is_done():
            return
        work = output.begin(resume=True, despite=RESUMABLE) if peers.is_main else output.work
        peers.barrier()
        noise = Noise(noise_sources, config.train.noise, config.train.seed) if noise_sources else None
        facts = pretrain(config, args, inventory, sources, valid_sources, noise, Cmvn.merge([Cmvn.load(path) for path in args.cmvn]), work, peers)
        if peers.is_main:
            output.finish(**facts)
            shutil.rmtree(args.out / "checkpoints")  # only now: a run killed before this line still resumes


def check_same_tokens(init: Path, inventory: PhonemeInventory) -> None:
    """Raises RecipeError when the head of the model in `init` writes other symbols: their number may agree by chance."""
    if (init / WEIGHTS).is_file() and PhonemeInventory.load(init / "tokens.txt").tokens != inventory.tokens:
        raise RecipeError(
            init / "tokens.txt", expected="the symbols of --units", found="others", fix="start from a model with the same phoneme inventory"
        )


def pretrain(
    config: PretrainConfig, args: argparse.Namespace, inventory, sources, valid_sources, noise: Noise | None, cmvn: Cmvn, work: Path, peers: Processes
) -> dict:
    """Trains in `work`; returns what done.json notes of it."""
    torch.manual_seed(config.train.seed)
    model = PhonemeModel(config.model)
    model.set_normalisation(cmvn.mean, cmvn.std)
    if args.init:
        load_into(model, read_weights(args.init / WEIGHTS), args.init / WEIGHTS)
        log.info("weights and feature normalisation from %s", args.init)
    model.to(peers.device)
    if peers.is_main:
        save_shape(work, config.model, inventory)  # now, so that alignment can start on a snapshot while this goes on
    valid_cuts = [cut for source in valid_sources for cut in load_cuts(source.path)]
    make = phone_batches(inventory)
    batches = TrainBatches(sources, phone_batches(inventory, noise), config.train, peers.rank, peers.world_size, noise)
    log.info("commit %s, torch %s, %s, %d process(es)", stage.git_commit(), torch.__version__, peers.device, peers.world_size)
    log.info(
        "encoder %s, phoneme head %s parameters; trains: both",
        count_parameters(model.encoder.parameters()),
        count_parameters(model.head.parameters()),
    )
    log.info("train: %d utterances, %.2f h; valid: %d utterances", batches.num_utterances, batches.hours, len(valid_cuts))
    log.info("noise: %s", "none (--noise), so train.noise has no effect" if noise is None else f"{noise.num_clips} clips of {args.noise}")
    monitor = CkaMonitor(
        model, take_frames(eval_batches(valid_cuts, make, VALID_BATCH_S), config.cka.max_frames), config.cka, work, config.train.max_steps
    )
    trainer = Trainer(
        model,
        cr_ctc(model.mean, config.train),
        batches,
        config.train,
        work,
        peers,
        evaluate=lambda: validate(model, eval_batches(valid_cuts, make, VALID_BATCH_S), peers.device),
        after_step=monitor.after_step,
        on_resume=monitor.resume,
        before_step=lambda step: not args.init and model.at_step(step) is not None,
    )
    numbers = trainer.run()
    if not peers.is_main:
        return {}
    save_model(work, model.state_dict(), config.model, inventory)
    stage.write_json(work / "settings.json", as_dict(config))
    plot_registry(work / "registry.jsonl", config.cka.threshold, work / "cka.png")
    triggers = sum(row.trigger for row in read_registry(work / "registry.jsonl"))
    log.info("snapshot registry: %d of %d checks fired", triggers, len(read_registry(work / "registry.jsonl")))
    return {"step": trainer.step, "parameters": sum(p.numel() for p in model.parameters()), "valid": numbers, "triggers": triggers}


if __name__ == "__main__":
    stage.run(main, "pretrain")
