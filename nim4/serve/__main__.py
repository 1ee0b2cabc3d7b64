"""Options of `python -m nim4 serve` that say where its parts run. See docs/deployment.md."""

import argparse

from nim4.config import RecipeError
from nim4.serve.parts import LOCAL, Parts

LIMITS = {  # of the server, that its options set
    "max_sessions": "streams at the same time",
    "max_uploads": "recordings at the same time",
    "max_upload_s": "length of a recording in seconds",
    "max_body_bytes": "size of an upload",
    "requests_per_minute": "of a key, or of an address without keys",
}


def add_parts(parser: argparse.ArgumentParser) -> None:
    """The options of a gateway; `parts_of` reads them."""
    parser.add_argument(
        "--encoder", default=LOCAL, help="local, or servers that run it: grpc://HOST:PORT, separated by commas; see docs/deployment.md"
    )
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf", help="of the language model: hf is this process, vllm needs that package")
    parser.add_argument("--engines", type=int, default=1, help="processes of vllm; where there are GPUs each has its own")


def parts_of(args: argparse.Namespace) -> Parts:
    """What the options say. Raises RecipeError for a number of engines that cannot be, and for what an engine cannot do."""
    if args.engines < 1 or (args.engines > 1 and args.engine == "hf"):
        expected = "at least 1, and no more than 1 with --engine hf"
        raise RecipeError("--engines", expected=expected, found=args.engines, fix="leave it out, or add --engine vllm")
    if args.final_context == "whole" and args.engine == "vllm":
        expected = "--engine hf, whose encoder and language model can hear a segment anew together"
        raise RecipeError("--final-context whole", expected=expected, found="--engine vllm", fix="leave one of the two out")
    return Parts(args.encoder, args.engine, args.engines, args.final_context or ("chunks" if args.engine == "vllm" else "whole"))
