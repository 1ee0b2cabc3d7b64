"""Stage 6: late joint fine-tuning. Encoder, adaptor and language model train together, on the transcript alone (paper, section 3.2).

The encoder learns at `train.encoder_lr_ratio` times the rate of the others; how far it moves is measured at each validation
(`encoder_cka` in metrics.jsonl). With `train.partial_prob` some utterances are cut at a chunk boundary, so that the model knows
unfinished speech when it streams; where their words end is aligned first, and kept in word_ends.jsonl. Product: a model folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

from local.training_options import training_parser
from nim4 import stage
from nim4.config import JointSftConfig
from nim4.corpus.examples import Examples
from nim4.corpus.g2p import LANGUAGES
from nim4.model.asr import load_speech_llm
from nim4.train.drift import DriftAlarm
from nim4.train.fine_tuning import read_settings, training_run


def main() -> None:
    parser = training_parser(__doc__)
    parser.add_argument("--language", default="zh-en", choices=LANGUAGES, help="how stage 2 read digits")
    args = parser.parse_args()
    config = read_settings(JointSftConfig, args, "joint_sft")
    with training_run("joint_sft", args, config, [args.init], language=args.language) as run:
        if run is None:
            return
        model, inventory = load_speech_llm(args.init, run.peers.device)
        ends: dict[str, Sequence[tuple[int, int]]] = {}
        examples = Examples(inventory, model.prompt, config.train, ends, noise=run.noise)
        if config.train.partial_prob > 0:
            ends |= run.word_ends(config.train, examples, args.language, model.acoustic, inventory)
        alarm = DriftAlarm(model, run.valid_batches(examples), config.drift_frames, config.drift_alarm)
        run.fine_tune(model, config.train, examples, also=alarm.measure, sharded_methods=("encode",))
        run.save(model, inventory, config)


if __name__ == "__main__":
    stage.run(main, "joint_sft")
