"""Stage 5: iterative asynchronous fine-tuning. Adaptor and language model train; the encoder is frozen, and swapped in place for the
next snapshot of pre-training that CKA said has moved (paper, section 3.3). The schedule is told in nim4/train/ia_sft.py.

Product: a model folder whose encoder is the final snapshot, and swaps.jsonl, which says what each swap did to the loss.
With --live true stage 3 may still be running: its folder is then --snapshots with the ending .tmp, until it is finished.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import torch

from local.training_options import training_parser
from nim4 import stage
from nim4.config import IaSftConfig
from nim4.corpus.examples import Examples
from nim4.model.asr import load_speech_llm
from nim4.train.fine_tuning import read_settings, training_run
from nim4.train.ia_sft import EncoderSwaps
from nim4.train.snapshots import SnapshotFolder


def main() -> None:
    parser = training_parser(__doc__)
    parser.add_argument("--snapshots", type=Path, required=True, help="folder of stage 3, with the registry of its encoders")
    parser.add_argument("--live", choices=("true", "false"), default="false", help="stage 3 may still be running")
    parser.add_argument("--max-wait-s", type=float, default=7 * 86400.0, help="live: longest wait for stage 3's final snapshot, in seconds")
    args = parser.parse_args()
    config = read_settings(IaSftConfig, args, "ia_sft")
    folder = SnapshotFolder(args.snapshots, args.live == "true")
    inputs = [args.init] if folder.live else [args.init, args.snapshots]
    with training_run("ia_sft", args, config, inputs, live=args.live) as run:
        if run is None:
            return
        model, inventory = load_speech_llm(args.init, torch.device("cpu"))
        examples = Examples(inventory, model.prompt, config.train, noise=run.noise)
        swaps = EncoderSwaps(
            model, folder, config.swaps, config.train, run.work, run.peers, lambda: run.validate(model, examples), max_wait_s=args.max_wait_s
        )
        run.fine_tune(model, config.train, examples, **swaps.hooks)
        run.save(model, inventory, config)


if __name__ == "__main__":
    stage.run(main, "ia_sft")
