"""Stage 7: context fine-tuning. Prompts get hints, names that are said and names that only sound like them (paper, context SFT).

Everything trains, at a small rate; the longer half of each split comes more often (`train.long_weight`). Which phrases are names is
settled first, from the training transcripts: by rules and a word list (nim4/corpus/entities.py), or by a chat model behind an
OpenAI-compatible server, whose answers are kept in --entity-cache: with all of them there, the server is not needed again. Its key is read
from the environment variable OPENAI_API_KEY. Product: a model folder, and entities.jsonl (text, count, phones), which stage 8 reads.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

from local.training_options import training_parser
from nim4 import stage
from nim4.config import ContextSftConfig, EntityConfig, RecipeError
from nim4.corpus.entities import Entity, candidates, choose_by_rule, collect_phrases, read_entities, read_word_list, save_entities, with_phones
from nim4.corpus.entity_filter import Endpoint, choose_by_model
from nim4.corpus.examples import Examples
from nim4.corpus.g2p import LANGUAGES, Lexicon
from nim4.corpus.hints import Hints
from nim4.corpus.manifest import load_cuts
from nim4.model.asr import load_speech_llm
from nim4.model.checkpoint import load_model
from nim4.train.fine_tuning import TrainingRun, read_settings, training_run

log = logging.getLogger("nim4")
ENTITIES = "entities.jsonl"


def build_parser() -> argparse.ArgumentParser:
    parser = training_parser(__doc__)
    parser.add_argument("--language", default="zh-en", choices=LANGUAGES, help="how stage 2 read digits")
    parser.add_argument("--entities", type=Path, default=None, help="names, one per line; they count as such wherever they are said")
    parser.add_argument(
        "--entity-endpoint", default=None, help="OpenAI-compatible server that chooses the other names, e.g. http://localhost:8000/v1"
    )
    parser.add_argument("--entity-model", default=None, help="chat model to ask there")
    parser.add_argument("--entity-cache", type=Path, default=None, help="file of its answers; none = entity_cache.jsonl beside --out")
    parser.add_argument("--aligner", type=Path, default=None, help="model folder that finds words' ends for train.partial_prob; none = --init")
    return parser


def find_entities(args: argparse.Namespace, config: EntityConfig, listed: list[str], run: TrainingRun) -> list[Entity]:
    """The entities of the training transcripts, from the work folder if an earlier run of the same stage left them there."""
    path = run.work / ENTITIES
    if run.peers.is_main and not path.is_file():
        paths = dict.fromkeys(source.path for source in run.sources)
        found = collect_phrases((cut.supervisions[0].text or "" for each in paths for cut in load_cuts(each)), listed)
        if args.entity_endpoint:
            endpoint = Endpoint(args.entity_endpoint, args.entity_model, os.environ.get("OPENAI_API_KEY", ""))
            cache = args.entity_cache or args.out.parent / "entity_cache.jsonl"
            chosen = found.listed + choose_by_model(candidates(found, config), endpoint, cache)
        else:
            chosen = choose_by_rule(found, config)
        save_entities(with_phones(chosen, listed, Lexicon(args.language)), path)
    while not path.is_file():  # no barrier: asking a server may outlast its time limit
        time.sleep(1.0)
    entities = read_entities(path)
    if not entities:
        raise RecipeError(path, expected="at least one entity", found="none", fix="give --entities, or lower entities.min_count")
    first = ", ".join(f"{entity.text} {entity.count}" for entity in entities[:10])
    log.info("%d entities; the most frequent: %s", len(entities), first)
    return entities


def main() -> None:
    args = build_parser().parse_args()
    config = read_settings(ContextSftConfig, args, "context_sft")
    if (args.entity_endpoint is None) != (args.entity_model is None):
        raise RecipeError("--entity-endpoint", expected="--entity-model with it", found="only one of the two", fix="give both or none")
    listed = read_word_list(args.entities) if args.entities else []
    inputs = [args.init, *(path for path in (args.entities, args.aligner) if path)]
    with training_run("context_sft", args, config, inputs, language=args.language, entity_model=args.entity_model or "") as run:
        if run is None:
            return
        hints = Hints(find_entities(args, config.entities, listed, run), config.hints)
        model, inventory = load_speech_llm(args.init, run.peers.device)
        ends: dict[str, Sequence[tuple[int, int]]] = {}
        examples = Examples(inventory, model.prompt, config.train, ends, hints, run.noise)
        if config.train.partial_prob > 0:
            aligner = load_model(args.aligner, run.peers.device) if args.aligner else (model.acoustic, inventory)
            ends |= run.word_ends(config.train, examples, args.language, *aligner)
        run.fine_tune(model, config.train, examples)
        run.save(model, inventory, config)


if __name__ == "__main__":
    stage.run(main, "context_sft")
