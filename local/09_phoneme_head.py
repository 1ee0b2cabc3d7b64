"""Stage 9: the phoneme head of retrieval, trained by CTC on the frozen encoder of stage 8, from stage 3's head (paper, section 3.5).

Encoder training after stage 3 has moved the frames away from the head. Product: the complete model folder that decoding uses from here
on; what does not change is taken over from --init, the language model by hard links.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

from local.training_options import training_parser
from nim4 import stage
from nim4.config import PhonemeHeadConfig
from nim4.corpus.batch import phone_batches
from nim4.model.asr import LLM_FOLDER, read_speech_llm_config
from nim4.model.checkpoint import ADAPTOR, WEIGHTS, load_model, read_weights, save_model
from nim4.model.llm import link_llm
from nim4.train.cr_ctc import cr_ctc, validate
from nim4.train.fine_tuning import read_settings, training_run
from nim4.train.loop import Trainer
from nim4.train.roles import ROLES, freeze_all_but


def main() -> None:
    args = training_parser(__doc__).parse_args()
    config = read_settings(PhonemeHeadConfig, args, "phoneme_head")
    model_config, inventory = read_speech_llm_config(args.init)
    with training_run("phoneme_head", args, config, [args.init]) as run:
        if run is None:
            return
        model, _ = load_model(args.init, run.peers.device)
        freeze_all_but({"encoder": model.encoder, "head": model.head}, ROLES["phoneme_head"])
        make = phone_batches(inventory)
        trainer = Trainer(
            model,
            cr_ctc(model.mean, config.train),
            run.batches(phone_batches(inventory, run.noise), config.train),
            config.train,
            run.work,
            run.peers,
            evaluate=lambda: validate(model, run.valid_batches(make), run.peers.device),
        )
        trainer.run()
        if run.peers.is_main:
            adaptor = {name: tensor for name, tensor in read_weights(args.init / WEIGHTS).items() if name.startswith(ADAPTOR)}
            save_model(run.work, model.state_dict() | adaptor, model_config, inventory)
            link_llm(args.init / LLM_FOLDER, run.work / LLM_FOLDER)
            run.save_settings(config)


if __name__ == "__main__":
    stage.run(main, "head")
