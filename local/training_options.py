"""The options that the training programs from stage 4 on have in common."""

import argparse
from pathlib import Path


def training_parser(description: str) -> argparse.ArgumentParser:
    """The options that every training stage takes, and --noise."""
    parser = noiseless_parser(description)
    parser.add_argument("--noise", default="", help="splits whose recordings are mixed into the training audio, e.g. 'musan:noise'")
    return parser


def noiseless_parser(description: str) -> argparse.ArgumentParser:
    """The options that every training stage takes; `noise` is empty."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.set_defaults(noise="")
    parser.add_argument("--units", type=Path, required=True, help="folder of stage 2: manifests with phonemes, tokens.txt")
    parser.add_argument("--train", required=True, help="training splits, e.g. 'train' or 'aishell:train librispeech:train-clean-100=0.3'")
    parser.add_argument("--valid", required=True, help="validation splits")
    parser.add_argument("--train-config", type=Path, required=True, help="local/conf/train/*.yaml; the section of this stage is used")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting, e.g. train.max_steps=10; repeatable")
    parser.add_argument("--init", type=Path, required=True, help="model folder to start from")
    parser.add_argument("--out", type=Path, required=True, help="model folder to make")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser
