"""What stage 11 is told, checked: the decode configurations, files of local/conf/decode/, and the sets with a closed vocabulary."""

from pathlib import Path

from nim4.config import DecodeConfig, RecipeError, build, nearest, read_yaml
from nim4.corpus.manifest import check_splits
from nim4.decode.encoder import ENCODER_FRAME_MS

NGRAMS = {"ctc_greedy": ("none",), "ctc_beam": ("words", "phones"), "ctc_graph": ("none", "words", "phones"), "llm": ("none",)}
METHODS = tuple(NGRAMS)
CONFIGS = Path(__file__).resolve().parent / "conf" / "decode"


def read_decode_config(name: str) -> DecodeConfig:
    """The decode config called `name`. Raises RecipeError that names the nearest one."""
    path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in CONFIGS.glob("*.yaml")]
        raise RecipeError(f"--configs {name}", expected="a file in local/conf/decode/", found="none of this name", fix=nearest(name, known))
    config = build(DecodeConfig, read_yaml(path), str(path))
    if config.method not in METHODS:
        raise RecipeError(f"{path}: method", expected=" or ".join(METHODS), found=config.method, fix=nearest(config.method, METHODS))
    whole = config.final_context == "whole"
    if not (whole or config.final_context == "chunks") or (whole and (config.method != "llm" or not config.streaming)):
        expected = "chunks, or whole with method llm and streaming"
        raise RecipeError(f"{path}: final_context", expected=expected, found=config.final_context, fix="correct the file")
    if config.num_beams < 1 or (config.num_beams > 1 and (config.method not in ("llm", "ctc_beam") or (config.streaming and not whole))):
        expected = "1, or more with method llm or ctc_beam and whole utterances, in streams those of final_context whole"
        raise RecipeError(f"{path}: num_beams", expected=expected, found=config.num_beams, fix="correct the file")
    if not 0 <= config.ctc_weight <= 1 or (config.ctc_weight and (config.method != "llm" or config.num_beams == 1)):
        expected = "0, or up to 1 with method llm and num_beams of at least 2"
        raise RecipeError(f"{path}: ctc_weight", expected=expected, found=config.ctc_weight, fix="correct the file")
    if config.ngram not in NGRAMS[config.method]:
        expected = f"{' or '.join(NGRAMS[config.method])} with method {config.method}"
        raise RecipeError(f"{path}: ngram", expected=expected, found=config.ngram, fix="correct the file")
    if config.streaming and config.method in ("ctc_beam", "ctc_graph"):
        raise RecipeError(f"{path}: streaming", expected=f"false with method {config.method}", found="true", fix="correct the file")
    if config.hotwords not in ("none", "exact", "lattice") or (config.hotwords != "none" and (config.method != "llm" or config.max_hints < 1)):
        expected = "none, or exact or lattice with method llm and max_hints of at least 1"
        raise RecipeError(f"{path}: hotwords", expected=expected, found=f"{config.hotwords}, {config.max_hints}", fix="correct the file")
    if config.chunk_ms % ENCODER_FRAME_MS or config.chunk_ms <= 0:
        raise RecipeError(f"{path}: chunk_ms", expected=f"a multiple of {ENCODER_FRAME_MS}", found=config.chunk_ms, fix="for example 640")
    if config.speakers < 1 or (config.speakers > 1 and not config.streaming):
        raise RecipeError(f"{path}: speakers", expected="1, or more with streaming", found=config.speakers, fix="correct the file")
    if config.left_context_chunks < 0:
        raise RecipeError(f"{path}: left_context_chunks", expected="0 or more", found=config.left_context_chunks, fix="for example 4")
    return config


def check_closed(closed: list[str], sets: list[str], units: Path, lexicon: Path | None) -> set[str]:
    """The closed sets that are decoded now. Raises RecipeError when they need a word list that is not given, or one is no set of `units`."""
    check_splits("--closed", closed, units)  # whether in --test or not: run.sh gives all closed sets of a corpus
    if (wanted := set(closed) & set(sets)) and lexicon is None:
        raise RecipeError("--lexicon", expected="the word list of the closed sets", found="none", fix="add --lexicon FILE, or leave out --closed")
    return wanted
