"""Stage 4: alignment. The adaptor learns to speak to the language model; encoder and language model are frozen (paper, section 3.2).

The encoder is the snapshot at stage 3's first CKA trigger: alignment starts while pre-training goes on. Product: a model folder, whose
llm/ is the language model as it was taken up.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

from local.training_options import training_parser
from nim4 import stage
from nim4.config import AlignConfig, read_yaml
from nim4.corpus.examples import Examples
from nim4.model.asr import new_speech_llm
from nim4.train.fine_tuning import read_settings, training_run
from nim4.train.snapshots import alignment_snapshot, read_snapshot


def main() -> None:
    parser = training_parser(__doc__)
    parser.add_argument("--model-config", type=Path, required=True, help="local/conf/model/*.yaml; its sections adaptor and llm are used")
    args = parser.parse_args()
    shape = read_yaml(args.model_config)
    config = read_settings(AlignConfig, args, "align", {name: shape[name] for name in ("adaptor", "llm") if name in shape})
    snapshot = alignment_snapshot(args.init)
    with training_run("align", args, config, [args.init]) as run:
        if run is None:
            return
        model, inventory = new_speech_llm(args.init, config.adaptor, config.llm, read_snapshot(args.init, snapshot))
        run.fine_tune(model, config.train, Examples(inventory, model.prompt, config.train, noise=run.noise))
        run.save(model, inventory, config)


if __name__ == "__main__":
    stage.run(main, "align")
