"""`python -m nim4 encoder`: a published encoder as a model folder. See docs/published_encoders.md."""

import argparse
from pathlib import Path
from typing import Any


def add_encoder(commands: Any) -> None:
    about = """A published encoder as a model folder, from which stages 3, 4 and 5 start: a Zipformer with CTC of icefall's, or an average of its
    checkpoints; or the encoder of FireRedASR. Checkpoints are read without running what they hold."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser("encoder", description=about, help="a published encoder as a model folder", formatter_class=defaults)
    parser.add_argument("encoder", metavar="ENCODER", help="icefall:FILE, icefall:FILE,avg=N or firered:FOLDER")
    parser.add_argument("--units", type=Path, required=True, help="folder of stage 2: the phonemes that the model will write")
    parser.add_argument("--seed", type=int, default=0, help="of the phoneme head, where it starts anew")
    parser.add_argument("--out", type=Path, required=True, help="model folder to make")
    parser.set_defaults(run=encoder)


def encoder(args: argparse.Namespace) -> None:
    """Writes --out."""
    from nim4.published.encoder_folder import make_encoder_folder

    make_encoder_folder(args.encoder, args.units, args.out, args.seed)
