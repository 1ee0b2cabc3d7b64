"""What the stages after pre-training do alike: settings, output folder, processes, data, the saved model.

Each program in local/ says what its stage is about; this is the plumbing below it.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from nim4.config import Config, OptimConfig, RecipeError, SftConfig, as_dict, load, read_yaml
from nim4.corpus.batch import MakeBatch, Source, TrainBatches, eval_batches, parse_sources
from nim4.corpus.examples import Examples, WordEnds
from nim4.corpus.manifest import load_cuts
from nim4.corpus.noise import Noise
from nim4.corpus.units import PhonemeInventory
from nim4.model.asr import SpeechLlm
from nim4.model.ctc import PhonemeModel
from nim4.stage import StageOutput, git_commit, read_json, write_json
from nim4.train.distributed import Processes, processes, whole_weights
from nim4.train.loop import Trainer
from nim4.train.roles import ROLES, assign_roles
from nim4.train.sft import sft_loss, validate_sft
from nim4.train.speed import RESUMABLE
from nim4.train.word_ends import word_ends

log = logging.getLogger("nim4")
VALID_BATCH_S = 120.0  # audio per validation batch
UNRECORDED = ("num_workers", "log_every")  # settings that cannot change the result


def read_section(path: Path, name: str) -> dict:
    """One section of a YAML file. Raises RecipeError when it is missing: defaults in its place would be another training."""
    section = read_yaml(path).get(name)
    if not isinstance(section, dict):
        raise RecipeError(f"{path}: {name}", expected="a group of settings", found=repr(section), fix="see the files in local/conf/train/")
    return section


class Options(Protocol):
    """What the library needs of a training program's options (local/training_options.py)."""

    units: Path
    train: str
    valid: str
    noise: str
    train_config: Path
    set: list[str]
    out: Path
    device: str


def read_settings(cls: type[Config], args: Options, section: str, more: Mapping[str, Any] | None = None) -> Config:
    """The settings of a stage: its section of --train-config, `more` from other files, and --set on top."""
    return load(cls, {**(more or {}), **read_section(args.train_config, section)}, args.set, f"{args.train_config}: {section}")


@dataclass(frozen=True)
class TrainingRun:
    """One run of a training stage, between the opening of its output folder and its end."""

    name: str
    work: Path
    peers: Processes
    sources: Sequence[Source]
    valid_cuts: list
    noise: Noise | None

    def batches(self, make: MakeBatch, config: OptimConfig) -> TrainBatches:
        """The training data of this process."""
        batches = TrainBatches(self.sources, make, config, self.peers.rank, self.peers.world_size, self.noise)
        log.info("train: %d utterances, %.2f h; valid: %d utterances", batches.num_utterances, batches.hours, len(self.valid_cuts))
        return batches

    def valid_batches(self, make: MakeBatch) -> Iterator:
        """The validation data, whole on every process."""
        return eval_batches(self.valid_cuts, make, VALID_BATCH_S)

    def validate(self, model: SpeechLlm, examples: Examples) -> dict[str, float]:
        """Validation numbers, see validate_sft."""
        return validate_sft(model, self.valid_batches(examples), self.peers.device)

    def word_ends(self, config: SftConfig, examples: Examples, language: str, model: PhonemeModel, inventory: PhonemeInventory) -> WordEnds:
        """Where words end in the utterances that `examples` will cut short in the steps of `config`.

        Args:
            language, model, inventory: see nim4/train/word_ends.py.
        """
        batches = TrainBatches(self.sources, examples, config, self.peers.rank, self.peers.world_size, self.noise)
        wanted = examples.cut_ids(batches.planned(config.max_steps))
        return word_ends(batches.cuts, wanted, language, model, inventory, self.work, self.peers)

    def fine_tune(
        self, model: SpeechLlm, config: SftConfig, examples: Examples, also: Callable[[], dict[str, float]] = dict, **hooks: Any
    ) -> Trainer:
        """Trains the parts that have a role in this stage on transcripts, to the end.

        Args:
            also: measures more numbers at each validation.
            hooks: go to the Trainer.
        """
        torch.manual_seed(config.seed)
        assign_roles(model, ROLES[self.name], model.config.llm)
        model.to(self.peers.device)
        trainer = Trainer(
            model,
            sft_loss(model.acoustic.mean, config),
            self.batches(examples, config),
            config,
            self.work,
            self.peers,
            evaluate=lambda: self.validate(model, examples) | also(),
            lr_ratios={"acoustic.encoder.": config.encoder_lr_ratio, "llm.": config.llm_lr_ratio},
            **hooks,
        )
        trainer.run()
        return trainer

    def save(self, model: SpeechLlm, inventory: PhonemeInventory, settings: Any) -> None:
        """Writes the model folder and the resolved settings; to be called on all processes."""
        weights = whole_weights(model)
        if self.peers.is_main:
            model.save(self.work, weights, inventory)
            self.save_settings(settings)

    def save_settings(self, settings: Any) -> None:
        """Writes the resolved settings beside the weights."""
        write_json(self.work / "settings.json", as_dict(settings))


@contextmanager
def training_run(name: str, args: Options, settings: Any, inputs: Sequence[Path] = (), **options: str) -> Iterator[TrainingRun | None]:
    """Opens the output folder and joins the processes; yields None when there is nothing to do. Left without an error, it records the stage.

    Args:
        name: of the stage, as in ROLES.
        settings: decide the content, with the splits.
        inputs: files and folders that decide it too, besides the manifests.
        options: of this stage alone, that decide it too.
    """
    sources, valid_sources = parse_sources(args.train, args.units), parse_sources(args.valid, args.units)
    if "=" in args.valid:
        raise RecipeError("--valid", expected="splits without weights", found=args.valid, fix="remove the = and what follows it")
    noise_sources = parse_sources(args.noise, args.units, "--noise") if args.noise else []
    recorded = as_dict(settings)
    for field in UNRECORDED:
        recorded["train"].pop(field)
    output = StageOutput(
        args.out,
        config={**recorded, "train_splits": args.train, "valid_splits": args.valid, "noise_splits": args.noise, **options},
        inputs=[source.path for source in sources + valid_sources + noise_sources] + [args.units / "tokens.txt", *inputs],
    )
    with processes(args.device) as peers:
        if output.is_done():
            yield None
            return
        work = output.begin(resume=True, despite=RESUMABLE) if peers.is_main else output.work
        peers.barrier()
        log.info("commit %s, torch %s, %s, %d process(es)", git_commit(), torch.__version__, peers.device, peers.world_size)
        noise = Noise(noise_sources, settings.train.noise, settings.train.seed) if noise_sources else None
        log.info("noise: %s", "none (--noise), so train.noise has no effect" if noise is None else f"{noise.num_clips} clips of {args.noise}")
        yield TrainingRun(name, work, peers, sources, [cut for source in valid_sources for cut in load_cuts(source.path)], noise)
        if peers.is_main:
            output.finish(**read_final(work))
            shutil.rmtree(args.out / "checkpoints", ignore_errors=True)  # only now: a run killed before this line still resumes


def read_final(work: Path) -> dict[str, Any]:
    """What done.json notes of the training: its last step and validation numbers."""
    final = read_json(work / "final.json")
    return {"step": final["step"], "valid": final["valid"]}
