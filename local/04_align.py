"""Stage 4: alignment. The adaptor learns to speak to the language model; encoder and language model are frozen (paper, section 3.2).

The encoder is the snapshot at stage 3's first CKA trigger: alignment starts while pre-training goes on. Product: a model folder, whose
llm/ is the language model as it was taken up.
With --live true it can start beside a running stage 3, as in the paper, as soon as there is a trigger.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import torch

from local.training_options import training_parser
from nim4 import stage
from nim4.config import AlignConfig, read_yaml
from nim4.corpus.examples import Examples
from nim4.model.asr import new_speech_llm
from nim4.train.fine_tuning import read_settings, training_run
from nim4.train.snapshots import SnapshotFolder


def main() -> None:
    parser = training_parser(__doc__)
    parser.add_argument("--model-config", type=Path, required=True, help="local/conf/model/*.yaml; its sections adaptor and llm are used")
    parser.add_argument(
        "--live", choices=("true", "false"), default="false", help="stage 3 may still be running; its folder is then --init with .tmp"
    )
    args = parser.parse_args()
    shape = read_yaml(args.model_config)
    config = read_settings(AlignConfig, args, "align", {name: shape[name] for name in ("adaptor", "llm") if name in shape})
    folder = SnapshotFolder(args.init, args.live == "true")
    snapshot = folder.for_alignment()
    with training_run("align", args, config, [] if folder.live else [args.init], encoder=str(snapshot.sha256)) as run:
        if run is None:
            return
        torch.manual_seed(config.train.seed)  # the adaptor begins at random
        model, inventory = new_speech_llm(folder.path, config.adaptor, config.llm, folder.read(snapshot))
        run.fine_tune(model, config.train, Examples(inventory, model.prompt, config.train, noise=run.noise))
        run.save(model, inventory, config)


if __name__ == "__main__":
    stage.run(main, "align")
