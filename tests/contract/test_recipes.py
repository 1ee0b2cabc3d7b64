"""A corpus is two small files, and holds facts only."""

import ast
import re

import pytest
from repository import ROOT, run_options, source_files, tree_of

from utils import corpora

RECIPES = sorted({path.parts[1] for path in source_files() if path.parts[0] == "egs" and len(path.parts) > 2})


def commands_of(recipe):
    """The lines of a recipe's run.sh that do something, continuations joined."""
    text = (ROOT / "egs" / recipe / "run.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_there_are_recipes():
    assert "mini" in RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_run_hands_its_facts_to_the_one_script(recipe):
    lines = (ROOT / "egs" / recipe / "run.sh").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 20
    last = commands_of(recipe)[-1]
    assert last.startswith("exec ")
    assert "/../../run.sh" in last
    assert last.endswith('"$@"'), "the user's options come last, so that they win"
    options = re.findall(r"(?<= )--[a-z-]+", last)
    assert not set(options) - set(run_options())
    assert f"--corpus {recipe} " in last
    assert {"--source", "--language", "--metric", "--train", "--valid", "--test"} <= set(options)


@pytest.mark.parametrize("recipe", RECIPES)
def test_prepare_defines_prepare(recipe):
    path = next(path for path in source_files() if path.as_posix() == f"egs/{recipe}/prepare.py")
    functions = {node.name: node for node in tree_of(path).body if isinstance(node, ast.FunctionDef)}
    assert "prepare" in functions, f"{path} needs prepare(source, work) -> dict of cut sets"
    assert [argument.arg for argument in functions["prepare"].args.args] in (["source", "work"], ["source", "work", "limit"])
    if "download" in functions:
        assert [argument.arg for argument in functions["download"].args.args] == ["target"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_run_says_what_the_corpus_is_how_to_get_it_and_how_it_is_scored(recipe):
    corpus = corpora.read_corpus(ROOT / "egs" / recipe / "run.sh")
    assert corpus.folder == recipe
    assert re.search(r"\d h|hours", corpus.what), "how long it is, or that this is not published"
    metric = corpus.options["metric"].upper()
    assert metric in corpus.scoring or corpus.options["test"] == "" or corpus.folder == "multi_zh_en"


def test_the_page_of_the_corpora_is_what_the_recipes_say():
    found = [corpora.read_corpus(path) for path in sorted((ROOT / "egs").glob("*/run.sh"))]
    assert (ROOT / corpora.PAGE).read_text(encoding="utf-8") == corpora.page(found), "run utils/corpora.py"
