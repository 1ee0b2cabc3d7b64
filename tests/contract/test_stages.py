"""One stage, one number: run.sh, local/, README; and programs that take the options they are given."""

import ast
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from repository import ROOT, options_of_python, programs, run_commands, run_options, stages_of_run

OTHER_WORDS = {  # a word that means the same as the one that is used everywhere
    "--output": "--out",
    "--output-dir": "--out",
    "--out-dir": "--out",
    "--checkpoint": "--init or --model",
    "--init-from": "--init",
    "--resume-from": "--init",
    "--num-jobs": "--jobs",
    "--nj": "--jobs",
    "--random-seed": "--seed",
    "--use-cuda": "--device",
    "--gpu": "--device",
    "--override": "--set",
}
MAX_OPTIONS = 20


def readme_stages():
    """Number -> row of the README's stage table, the one whose first column is headed N, # or Stage."""
    rows, inside = {}, False
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.lstrip().startswith("|"):
            inside = False
        elif cells[0].lower() in ("n", "#", "stage"):
            inside = True
        elif inside and cells[0].isdigit():
            rows[int(cells[0])] = line
    return rows


def test_files_of_local_are_the_stages_of_run():
    files = {int(path.name[:2]): path.stem[3:] for path in programs()}
    assert all(re.fullmatch(r"\d\d_[a-z][a-z_]*", path.stem) for path in programs())
    assert len(files) == len(programs()), "two programs share a number"
    assert stages_of_run() == files


def test_every_stage_calls_its_own_program():
    assert sorted(name for name, _ in run_commands()) == sorted(path.name for path in programs())


def test_readme_table_is_the_stages_of_run():
    rows = readme_stages()
    assert sorted(rows) == sorted(stages_of_run())
    assert not [row for number, row in rows.items() if f"{number:02d}_{stages_of_run()[number]}.py" not in row]


def test_run_gives_only_options_that_its_programs_take():
    unknown = []
    for path in programs():
        given = [option for name, options in run_commands() if name == path.name for option in options]
        unknown += [f"{path} {option}" for option in given if option not in options_of_python(path)]
    assert not unknown


def test_run_uses_every_option_it_takes():
    header, body = (ROOT / "run.sh").read_text(encoding="utf-8").split("utils/parse_options.sh")
    body += (ROOT / "utils" / "stage.sh").read_text(encoding="utf-8")
    names = [option[2:].replace("-", "_") for option in run_options()]
    assert len(names) > 10
    assert not [name for name in names if not re.search(rf"\$\{{?[#!]?{name}\b|for option in .*\b{name}\b", body)], "taken and then ignored"
    undescribed = [line for line in header.splitlines() if re.match(r"[a-z][a-z0-9_]*=", line) and " # " not in line]
    assert not undescribed, "the comment is what --help prints"


@pytest.mark.parametrize("path", programs(), ids=str)
def test_options_are_named_alike(path):
    options = options_of_python(path)
    assert "--out" in options
    assert not [option for option in options if not re.fullmatch(r"--[a-z0-9]+(-[a-z0-9]+)*", option)], "--kebab-case"
    assert not {option: OTHER_WORDS[option] for option in options if option in OTHER_WORDS}, "another word is used everywhere else"
    assert len(options) <= MAX_OPTIONS, "more than that belongs into a settings file"
    keywords = {option: {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords} for option, call in options.items()}
    assert not [option for option, given in keywords.items() if "help" not in given]
    assert not [option for option, given in keywords.items() if "store_" in given.get("action", "")], "a switch takes true or false"


@pytest.fixture(scope="module")
def help_texts(tmp_path_factory):
    """What `python local/NN_name.py --help` prints, started from elsewhere and without path.sh."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def ask(path):
        command = [sys.executable, str(ROOT / path), "--help"]
        return path, subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False, timeout=120)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(pool.map(ask, programs()))


@pytest.mark.parametrize("path", programs(), ids=str)
def test_every_program_runs_alone(path, help_texts):
    answer = help_texts[path]
    assert answer.returncode == 0, answer.stderr
    missing = [option for option in options_of_python(path) if option not in answer.stdout]
    assert not missing, answer.stdout
    assert "(default: " in answer.stdout
