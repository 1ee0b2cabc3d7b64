"""Commands in the documentation are commands that exist."""

import re
import shlex

import pytest
from repository import ROOT, options_of_python, run_options, source_files, stages_of_run

PAGES = [path for path in source_files() if path.suffix == ".md"]
CHECK_OPTIONS = ["--fast", "--help"]


def commands_in(text):
    """The words of every command in the ```bash blocks that starts a program of ours, from the program's name on."""
    commands = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for words in split_commands(shlex.split(line, comments=True)):
                start = next((place for place, word in enumerate(words) if re.search(r"\.(py|sh)$|\.ci/run$", word)), None)
                if start is not None:
                    commands.append(words[start:])
    return commands


def split_commands(words):
    commands = [[]]
    for word in words:
        if word in ("&&", "||", "|", ";", ">", "then", "do"):
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def options_known_to(program):
    path = ROOT / program
    if program.endswith("run.sh"):
        return [*run_options(), "--help"]
    if program in ("utils/check.sh", ".ci/run"):
        return CHECK_OPTIONS
    return [*options_of_python(path), "--help"] if program.endswith(".py") else []


def test_commands_are_found():
    text = "```bash\ncd x && ./run.sh --only 3 \\\n  --tag plain  # a comment --no\npip install x\n```\n"
    assert commands_in(text) == [["./run.sh", "--only", "3", "--tag", "plain"]]


def test_readme_shows_the_two_commands():
    programs = {words[0].removeprefix("./") for words in commands_in((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert {"run.sh", "utils/check.sh"} <= programs


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_exist(page):
    wrong = []
    for program, *words in commands_in((ROOT / page).read_text(encoding="utf-8")):
        name = program.removeprefix("./")
        shown_as_example = name.endswith("run.sh") and ("$" in name or page.name == "CONTRIBUTING.md")  # a corpus that the reader adds
        if not shown_as_example and not (ROOT / name).is_file():
            wrong.append(f"{program} does not exist")
            continue
        given = [word.partition("=")[0] for word in words if word.startswith("--")]
        wrong += [f"{program} has no {option}" for option in given if option not in options_known_to(name)]
        stages = [words[place + 1] for place, word in enumerate(words[:-1]) if word in ("--stage", "--only")]
        wrong += [f"{program}: no stage {number}" for number in stages if number.isdigit() and int(number) not in stages_of_run()]
    assert not wrong
