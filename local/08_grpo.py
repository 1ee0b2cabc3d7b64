"""Stage 8: reinforcement learning (GRPO). Sampled transcripts are rewarded for accuracy, length and keywords (paper, section 3.5).

What trains: the language model, and by settings the encoder and the adaptor. There is no augmentation. Hints in the prompts are drawn
from --entities, the named entities that stage 7 found; without it no prompt has hints. Product: a model folder.
The log counts what a model does that games its reward; see nim4/train/alarms.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import torch

from local.training_options import noiseless_parser
from nim4 import stage
from nim4.config import GrpoConfig
from nim4.corpus.entities import read_entities, read_word_list
from nim4.corpus.keywords import Keywords, RewardExamples
from nim4.model.asr import load_speech_llm
from nim4.train.alarms import Alarms
from nim4.train.fine_tuning import TrainingRun, read_settings, training_run
from nim4.train.grpo import Policy, Reference, check_settings, grpo_loss, validate_grpo
from nim4.train.loop import Trainer
from nim4.train.roles import assign_roles


def train(run: TrainingRun, policy: Policy, config: GrpoConfig, examples: RewardExamples) -> None:
    """Trains the policy to the end, against its own copy of before."""
    torch.manual_seed(config.train.seed)
    policy.to(run.peers.device)
    reference = Reference(policy) if config.train.kl_weight > 0 else None
    trained = {"encoder": config.train.train_encoder, "adaptor": config.train.train_adaptor, "llm": True}
    assign_roles(policy, tuple(name for name, trains in trained.items() if trains), policy.config.llm)
    Trainer(
        policy,
        grpo_loss(policy, reference, config, Alarms()),
        run.batches(examples, config.train),
        config.train,
        run.work,
        run.peers,
        evaluate=lambda: validate_grpo(policy, run.valid_batches(examples), config.rewards, run.peers.device),
    ).run()


def main() -> None:
    parser = noiseless_parser(__doc__)
    parser.add_argument("--entities", type=Path, help="entities.jsonl of stage 7's folder; without it there are no hints")
    parser.add_argument("--important", type=Path, help="keywords that are always rewarded where they were said, one per line")
    args = parser.parse_args()
    config = read_settings(GrpoConfig, args, "grpo")
    check_settings(config)
    entities = Keywords(entity.text for entity in read_entities(args.entities)) if args.entities else None
    important = Keywords(read_word_list(args.important, "--important")) if args.important else None
    with training_run("grpo", args, config, [path for path in (args.init, args.entities, args.important) if path]) as run:
        if run is None:
            return
        model, inventory = load_speech_llm(args.init, torch.device("cpu"))
        policy = Policy(model)
        train(run, policy, config, RewardExamples(inventory, policy.prompt, config.keywords, config.train.seed, entities, important))
        run.save(policy, inventory, config)


if __name__ == "__main__":
    stage.run(main, "grpo")
