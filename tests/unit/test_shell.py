"""The shell side: options, stages, paths, and the environment that is made when there is none.

A pretended `python` writes down what it is started with, so that whole runs take a fraction of a second.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from utils import check_env

ROOT = Path(__file__).resolve().parent.parent.parent

PYTHON = r"""#!/usr/bin/env bash
# Writes down its arguments. FAIL: exit 7 when one of them contains it. UNSUITABLE: the environment check fails outside .venv.
(IFS='|'; printf '%s\n' "$*" >>"$CALLS")
[ -z "${FAIL:-}" ] || [[ "$*" != *"$FAIL"* ]] || { echo "the reason it failed"; exit 7; }
case "$1" in
  --version) echo "Python 3.11.0" ;;
  utils/check_env.py) [ -z "${UNSUITABLE:-}" ] || [[ $0 == .venv/* ]] || { echo "torch is 2.5.0"; exit 1; } ;;
  -m)
    [ "$2" != venv ] || { mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && : >"$3/pyvenv.cfg"; }
    [ "$2" != pytest ] || echo "3 passed in 0.10s"
    ;;
  utils/compare.py) echo "the table" ;;
esac
"""

DEMO = """#!/usr/bin/env bash
# A demonstration.
set -euo pipefail
stop_stage=12       # last stage
name="a b"          # what it is called
verbose=false       # true: say more
set=()              # KEY=VALUE
. "$(dirname "${BASH_SOURCE[0]}")/utils/parse_options.sh"
later=1
printf '%s\\n' "$stop_stage" "$name" "$verbose" "${#set[@]}" ${set[@]+"${set[@]}"}
"""


@pytest.fixture
def repository(tmp_path):
    """The shell files of this repository, in a folder with spaces in its name, and the pretended Python in bin/."""
    root = tmp_path / "a folder  with spaces"
    for name in ("run.sh", "path.sh", "requirements.txt", "egs/mini/run.sh", "egs/musan/run.sh"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "utils", root / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("local/conf/model/mini.yaml", "local/conf/train/mini.yaml", "egs/mini/words.txt", "egs/mini/audio/a.tar", "demo.sh"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "demo.sh").write_text(DEMO)
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3.11"):
        (tmp_path / "bin" / name).write_text(PYTHON)
        (tmp_path / "bin" / name).chmod(0o755)
    return root


def start(root, *command, cwd=None, **environment):
    """Runs a command in the repository; with an active environment unless `VIRTUAL_ENV=""` is given."""
    settings = {"PATH": f"{root.parent}/bin:{os.environ['PATH']}", "CALLS": str(root.parent / "calls"), "HOME": str(root.parent)}
    settings |= {"VIRTUAL_ENV": str(root.parent / "bin")} | environment
    return subprocess.run([str(part) for part in command], cwd=cwd or root, env=settings, capture_output=True, text=True, check=False, timeout=60)


def calls(root, containing="local/"):
    """The arguments of every start of the pretended Python whose arguments contain a text."""
    path = root.parent / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split("|") for line in lines if containing in line]


def value_of(arguments, option):
    return arguments[arguments.index(option) + 1]


# ------------------------------------------------------------------------------------------------------------ parse_options


def demo(root, *arguments):
    return start(root, "bash", root / "demo.sh", *arguments)


def test_options_replace_the_values_above_them(repository):
    assert demo(repository).stdout.splitlines() == ["12", "a b", "false", "0"]
    done = demo(repository, "--stop-stage", "3", "--name=c = d", "--verbose", "true", "--stop_stage=4", "--name", "-1")
    assert done.stdout.splitlines() == ["4", "-1", "true", "0"], done.stderr


def test_a_list_is_added_to(repository):
    assert demo(repository, "--set", "a.b=1", "--set=c=x y").stdout.splitlines() == ["12", "a b", "false", "2", "a.b=1", "c=x y"]


def test_values_are_not_run(repository):
    value = '$(touch pwned) `touch pwned` "; touch pwned; \\ * $HOME'
    assert demo(repository, "--name", value, "--set", value).stdout.splitlines()[1::3] == [value, value]
    assert not list(repository.rglob("pwned"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stpo-stage", "3"], "did you mean --stop-stage?"),
        (["--stop", "3"], "did you mean --stop-stage?"),
        (["--quite-another", "3"], "known are: --stop-stage --name --verbose --set"),
        (["--later", "3"], "--later: expected a known option"),
        (["--name"], "--name: expected a value, found nothing"),
        (["--name", "--verbose", "true"], "--name: expected a value, found --verbose"),
        (["--verbose", "yes"], "--verbose: expected true or false, found 'yes'"),
        (["--verbose", ""], "--verbose: expected true or false, found ''"),
        (["stray"], "stray: expected an option"),
        (["-n", "3"], "-n: expected an option"),
        (["--"], "--: expected a known option"),
        (["--_script", "3"], "--_script: expected a known option"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(repository, arguments, message):
    done = demo(repository, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_is_the_header(repository):
    done = demo(repository, "--name", "x", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("A demonstration.\n\nOptions")
    lines = [line.split(None, 1) for line in done.stdout.splitlines()[3:]]
    assert lines == [
        ["--stop-stage", "last stage (default: 12)"],
        ["--name", "what it is called (default: x)"],
        ["--verbose", "true: say more (default: false)"],
        ["--set", "KEY=VALUE (repeatable)"],
        ["--help", "this text"],
    ]


# -------------------------------------------------------------------------------------------------------------- run and stage


def test_plain_run_is_mini_from_anywhere(repository):
    done = start(repository, repository / "run.sh", cwd="/")
    assert done.returncode == 0, done.stderr
    programs = [arguments[0] for arguments in calls(repository)]
    trained = ("03_pretrain", "04_align", "05_ia_sft", "06_joint_sft", "07_context_sft", "08_grpo", "09_phoneme_head")
    others = ("10_hotwords", "11_decode", "12_score", "13_report")
    assert programs == [f"local/{name}.py" for name in ("00_prepare", "01_fbank", "02_units", *trained, *others)]
    prepare, fbank, units, pretrain, *tuned, _, decode, score, report = calls(repository)
    assert value_of(report, "--score") == value_of(score, "--out") == "exp/mini/base/12_score"
    folders = [f"exp/mini/base/{int(name[:2])}{name[2:]}" for name in trained]
    assert [value_of(call, "--out") for call in (pretrain, *tuned)] == folders
    assert [value_of(call, "--init") for call in tuned] == folders[:-1]
    assert value_of(tuned[1], "--snapshots") == folders[0]
    assert value_of(decode, "--model") == folders[-1]
    assert value_of(prepare, "--source") == "egs/mini/audio"
    assert value_of(prepare, "--out") == "data/mini/manifests"
    assert value_of(pretrain, "--train").startswith("train_words=")
    assert value_of(fbank, "--cmvn-splits") == value_of(units, "--train-splits") == "train_words train_phrases train_sent train_an4"
    assert value_of(pretrain, "--noise") == "noise"
    assert value_of(pretrain, "--model-config") == "local/conf/model/mini.yaml"
    assert value_of(decode, "--lexicon") == "egs/mini/words.txt"
    assert value_of(score, "--metric") == "mer"
    assert not {"--set", "--limit", "--jobs", "--executor", "--aligner"} & {word for arguments in calls(repository) for word in arguments}
    assert "--init" not in pretrain
    assert done.stdout.splitlines()[-1] == "the table"
    assert "run stage 3 pretrain: CR-CTC" in done.stderr
    assert "run stage 12 score: done in " in done.stderr


def test_a_corpus_of_noise_alone_ends_before_training(repository):
    done = start(repository, repository / "egs" / "musan" / "run.sh", "--source", ".")
    assert done.returncode == 0, done.stderr
    assert [arguments[0] for arguments in calls(repository)] == [f"local/{name}.py" for name in ("00_prepare", "01_fbank", "02_units")]
    _, fbank, units = calls(repository)
    assert value_of(fbank, "--cmvn-splits") == value_of(units, "--train-splits") == ""


def test_a_mixture_gives_the_data_stages_their_own_corpus_only(repository):
    done = start(repository, repository / "run.sh", "--train", "aishell:train mini:train_words=2 train_an4")
    assert done.returncode == 0, done.stderr
    _, fbank, units, pretrain, *_ = calls(repository)
    assert value_of(pretrain, "--train") == "aishell:train mini:train_words=2 train_an4"
    assert value_of(fbank, "--cmvn-splits") == value_of(units, "--train-splits") == "train_words train_an4"


def test_options_of_the_user_win_and_reach_their_stage(repository):
    options = [
        "--tag",
        "plain tag",
        "--set",
        "train.cr_weight=0",
        "--set=a.b=x y",
        "--set=align.train.max_steps=3",
        "--limit",
        "5",
        "--jobs=2",
        "--valid",
        "dev dev_sent",
        "--launch",
        "python -m torchrun",
    ]
    done = start(repository, repository / "egs" / "mini" / "run.sh", *options, "--stop-stage", "4", cwd=repository.parent)
    assert done.returncode == 0, done.stderr
    prepare, fbank, _, pretrain, align = calls(repository)
    assert align[-1] == "--set=train.max_steps=3"
    assert align[:3] == ["-m", "torchrun", "local/04_align.py"]
    assert value_of(prepare, "--limit") == "5"
    assert value_of(fbank, "--jobs") == "2"
    assert pretrain[:3] == ["-m", "torchrun", "local/03_pretrain.py"]
    assert pretrain[-2:] == ["--set=train.cr_weight=0", "--set=a.b=x y"]
    assert value_of(pretrain, "--valid") == "dev dev_sent"
    assert value_of(pretrain, "--out") == "exp/mini/plain tag/3_pretrain"
    assert "the table" not in done.stdout


def test_paths_are_seen_from_where_the_user_stands(repository):
    elsewhere = repository.parent / "else where"
    for name in ("corpus", "data", "exp", "model"):
        (elsewhere / name).mkdir(parents=True)
    start(repository, repository / "run.sh", "--source", "corpus", "--stop-stage", "0", cwd=elsewhere)
    start(repository, repository / "run.sh", "--only", "11", "--init", "model", "--exp-dir", "new", "--data-dir=../mine", cwd=elsewhere)
    prepare, decode = calls(repository)
    assert value_of(prepare, "--source") == str(elsewhere / "corpus")
    assert value_of(prepare, "--out") == "data/mini/manifests", "the folder named data beside the user is not meant"
    assert value_of(decode, "--model") == str(elsewhere / "model")
    assert value_of(decode, "--out") == str(elsewhere / "new" / "mini" / "base" / "11_decode")
    assert value_of(decode, "--units") == str(repository.parent / "mine" / "mini" / "units")


def test_init_is_for_the_first_training_stage(repository):
    start(repository, repository / "run.sh", "--stage", "6", "--init", "exp/mini/base/4_align", "--tag", "no_ia_sft")
    joint, context, grpo, head, _, decode, *_ = calls(repository)
    assert value_of(joint, "--init") == "exp/mini/base/4_align"
    before = ["6_joint_sft", "7_context_sft", "8_grpo"]
    assert [value_of(call, "--init") for call in (context, grpo, head)] == [f"exp/mini/no_ia_sft/{name}" for name in before]
    assert value_of(decode, "--model") == "exp/mini/no_ia_sft/9_phoneme_head"


@pytest.mark.parametrize(
    ("stage", "given", "snapshots"),
    [("4", [], "exp/mini/base/encoder"), ("4", ["--snapshots", "mine"], "mine"), ("3", [], "exp/mini/base/3_pretrain")],
)
def test_a_published_encoder_is_what_the_first_training_stage_starts_from(repository, tmp_path, stage, given, snapshots):
    (tmp_path / "exp").mkdir()
    spec = ["--init-encoder", "icefall:exp/epoch-9.pt,avg=3"]
    start(repository, repository / "run.sh", "--stage", stage, "--stop-stage", "5", *spec, *given, cwd=tmp_path)
    (encoder,) = calls(repository, containing="|encoder|")
    assert encoder[2:] == ["encoder", f"icefall:{tmp_path / 'exp/epoch-9.pt,avg=3'}", "--units", "data/mini/units", "--out", "exp/mini/base/encoder"]
    first, *_, ia_sft = calls(repository)
    assert value_of(first, "--init") == "exp/mini/base/encoder"
    assert value_of(ia_sft, "--snapshots") == snapshots


def test_decoding_takes_the_last_model_that_was_trained(repository):
    for name in ("3_pretrain", "6_joint_sft"):
        (repository / "exp/mini/base" / name).mkdir(parents=True)
        (repository / "exp/mini/base" / name / "done.json").write_text("{}")
    (repository / "exp/mini/base/5_ia_sft").mkdir()
    start(repository, repository / "run.sh", "--only", "11")
    start(repository, repository / "run.sh", "--only", "7")
    start(repository, repository / "run.sh", "--only", "7", "--init", "exp/mini/base/4_align")
    decode, context, elsewhere = calls(repository)
    assert value_of(decode, "--model") == "exp/mini/base/6_joint_sft"
    assert value_of(context, "--aligner") == "exp/mini/base/5_ia_sft"
    assert "--aligner" not in elsewhere


def test_decoding_looks_hints_up_in_the_index_that_is_there(repository, tmp_path):
    start(repository, repository / "run.sh", "--only", "11")
    done = start(repository, repository / "run.sh", "--only", "10", "--hotword-list", "")
    assert "no --hotword-list, so no index" in done.stderr
    start(repository, repository / "run.sh", "--only", "10", "--hotword-list", "names.txt", "--jobs", "3")
    (repository / "exp/mini/base/10_hotwords").mkdir(parents=True)
    (repository / "exp/mini/base/10_hotwords/done.json").write_text("{}")
    start(repository, repository / "run.sh", "--only", "11")
    without, build, decode = calls(repository)
    assert "--hotword-index" not in without
    assert (value_of(build, "--list"), value_of(build, "--jobs")) == ("names.txt", "3")
    assert value_of(build, "--out") == value_of(decode, "--hotword-index") == "exp/mini/base/10_hotwords"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "14"], "--stage 14: expected a stage that exists, found 14. Fix: one of 0 1 2 3 4 5 6 7 8 9 10 11 12 13"),
        (["--only", "15"], "one of 0 1 2 3 4 5 6 7 8 9 10 11 12 13"),
        (["--only", "x"], "--only: expected the number of a stage"),
        (["--stop-stage", ""], "--stop-stage: expected the number of a stage"),
        (["--stage", "3", "--stop-stage", "2"], "--stop-stage: expected a number from --stage 3 on"),
        (["--corpus", "minni"], "did you mean mini?"),
        (["--corpus", ""], "--corpus: expected a folder of egs/"),
        (["--preset", "min"], "did you mean mini?"),
        (["--only", "12", "--set", "a=b"], "--set a=b: expected a stage that is run, found stage 3 pretrain"),
        (["--stop-stage", "7", "--set", "grpo.a=b"], "--set grpo.a=b: expected a stage that is run, found stage 8 grpo"),
        (["--only", "2", "--init", "x"], "--init: expected a stage that trains or decodes"),
        (["--stage", "5", "--init-encoder", "firered:x"], "--init-encoder: expected stage 3 or 4 as the first that trains, found '5 ia_sft'"),
        (["--stage", "4", "--init", "x", "--init-encoder", "firered:x"], "--init-encoder: expected no --init, found 'x'"),
        (["--download", "yes"], "--download: expected true or false"),
    ],
)
def test_nothing_runs_after_a_mistake(repository, arguments, message):
    done = start(repository, repository / "run.sh", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert calls(repository) == []


def test_a_corpus_without_a_language_does_not_go_round_in_circles(repository):
    (repository / "egs" / "mini" / "run.sh").write_text('#!/usr/bin/env bash\nexec "$(dirname "$0")/../../run.sh" --corpus mini "$@"\n')
    done = start(repository, repository / "run.sh")
    assert done.returncode == 2
    assert "egs/mini/run.sh: expected --language, found none" in done.stderr


def test_a_failed_stage_ends_the_run_and_says_how_to_go_on(repository):
    done = start(repository, repository / "run.sh", "--stage", "1", "--tag", "my tag", FAIL="local/02")
    assert done.returncode == 7
    assert [arguments[0] for arguments in calls(repository)] == ["local/01_fbank.py", "local/02_units.py"]
    last = done.stderr.splitlines()[-1]
    assert "run ERROR stage 2 units: failed with code 7 after " in last
    command = last.split("Go on with: ")[1]
    assert command == r"./run.sh --tag my\ tag --stage 2"

    away = start(repository, repository / "run.sh", "--only", "2", cwd="/", FAIL="local/02")
    command = away.stderr.splitlines()[-1].split("Go on with: ")[1]
    again = start(repository, "bash", "-c", command, cwd="/")
    assert again.returncode == 0, again.stderr
    assert calls(repository)[-1][0] == "local/02_units.py"


def test_a_failed_corpus_script_says_how_to_go_on(repository):
    done = start(repository, repository / "egs" / "mini" / "run.sh", "--stage=3", FAIL="local/03")
    command = done.stderr.splitlines()[-1].split("Go on with: ")[1]
    assert start(repository, "bash", "-c", command, cwd=repository).returncode == 0
    assert [arguments[0] for arguments in calls(repository)][1:3] == ["local/03_pretrain.py", "local/04_align.py"]
    assert calls(repository)[0] == calls(repository)[1]


def test_path_can_be_sourced_by_hand(repository):
    command = f'. "{repository}/path.sh"; . "{repository}/path.sh"; echo "$PWD"; echo "$PYTHONPATH"; false; echo "still here"'
    done = start(repository, "bash", "-c", command, cwd="/", CDPATH="/usr", PYTHONPATH="/other")
    assert done.stdout.splitlines() == [str(repository), f"{repository}:/other", "still here"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "fails", "code", "last_line", "num_runs"),
    [
        ([], "", 0, "3 passed in 0.10s", 3),
        (["--fast"], "", 0, "3 passed in 0.10s", 3),
        ([], "ruff format", 7, "1 failed in ", 2),
        ([], "pytest", 7, "the reason it failed", 3),
    ],
)
def test_check_ends_with_the_line_of_pytest(repository, arguments, fails, code, last_line, num_runs):
    (repository / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", repository / ".ci" / "run")
    done = start(repository, repository / ".ci" / "run", *arguments, cwd="/", FAIL=fails)
    assert done.returncode == code
    assert done.stdout.splitlines()[-1].startswith(last_line)
    runs = calls(repository, "-m|")
    assert len(runs) == num_runs
    assert ("--ignore=tests/recipe" in runs[-1]) == bool(arguments)


# ---------------------------------------------------------------------------------------------------------------- environment


def prepare(root, **environment):
    return start(root, root / "run.sh", "--only", "0", **environment)


def installs(root):
    return len(calls(root, "pip|install"))


def test_a_suitable_environment_is_used_as_it_is(repository):
    done = prepare(repository)
    assert done.returncode == 0, done.stderr
    assert not (repository / ".venv").exists()
    assert "setup" not in done.stderr


def test_an_environment_is_made_once_and_brought_up_to_date(repository):
    first = prepare(repository, VIRTUAL_ENV="", UNSUITABLE="1")
    assert first.returncode == 0, first.stderr
    assert "making .venv" in first.stderr
    assert (repository / ".venv" / ".complete").exists()
    assert not (repository / ".venv.tmp").exists()
    assert prepare(repository, VIRTUAL_ENV="", UNSUITABLE="1").stderr.count("setup") == 0
    assert installs(repository) == 1
    (repository / ".venv" / "kept").touch()
    with (repository / "requirements.txt").open("a") as file:
        file.write("another==1.0\n")
    changed = prepare(repository, VIRTUAL_ENV="", UNSUITABLE="1")
    assert "requirements.txt has changed" in changed.stderr
    assert installs(repository) == 2
    assert (repository / ".venv" / "kept").exists()


def test_an_unsuitable_environment_is_named_and_not_used(repository):
    done = prepare(repository, UNSUITABLE="1")
    assert done.returncode == 0, done.stderr
    assert f"the active environment {repository.parent}/bin is not used, .venv is: torch is 2.5.0" in done.stderr
    assert installs(repository) == 1


def test_a_failed_installation_is_shown_and_made_again(repository):
    done = prepare(repository, VIRTUAL_ENV="", UNSUITABLE="1", FAIL="pip install")
    assert done.returncode == 2
    assert "the reason it failed" in done.stderr
    assert "setup ERROR installing failed with code 7" in done.stderr
    assert not (repository / ".venv" / ".complete").exists()
    assert not (repository / ".venv.tmp").exists()
    assert calls(repository) == []
    (repository / ".venv" / "half").touch()
    again = prepare(repository, VIRTUAL_ENV="", UNSUITABLE="1")
    assert again.returncode == 0, again.stderr
    assert "starting again" in again.stderr
    assert not (repository / ".venv" / "half").exists()


def test_an_environment_of_the_users_own_is_never_removed(repository):
    (repository / ".venv" / "bin").mkdir(parents=True)
    (repository / ".venv" / "pyvenv.cfg").touch()
    shutil.copy(repository.parent / "bin" / "python", repository / ".venv" / "bin" / "python")
    refused = prepare(repository, VIRTUAL_ENV="", UNSUITABLE="1", FAIL="check_env")
    assert refused.returncode == 2
    assert "or remove .venv so that it is made for you" in refused.stderr
    assert (repository / ".venv" / "pyvenv.cfg").exists()
    assert prepare(repository, VIRTUAL_ENV="", UNSUITABLE="1").returncode == 0
    assert installs(repository) == 0


def test_a_moved_environment_is_made_again(repository):
    assert prepare(repository, VIRTUAL_ENV="", UNSUITABLE="1").returncode == 0
    moved = repository.rename(repository.parent / "moved")
    done = prepare(moved, VIRTUAL_ENV="", UNSUITABLE="1")
    assert "was made in another folder" in done.stderr
    assert installs(moved) == 2


def test_without_python_one_line_says_what_to_install(repository):
    for name in ("python", "python3", "python3.11", "python3.12"):
        (repository.parent / "bin" / name).write_text("#!/usr/bin/env bash\nexit 127\n")
        (repository.parent / "bin" / name).chmod(0o755)
    done = prepare(repository, VIRTUAL_ENV="")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "expected Python 3.11 or 3.12, found none. Fix: install one" in done.stderr


@pytest.mark.parametrize(
    ("installed", "accepted"),
    [("2.13.0", True), ("2.13.0+cpu", True), ("2.11.2+cu126", True), ("2.10.0", False), ("2.14.0", False)],
)
def test_a_range_of_torch_is_accepted(installed, accepted):
    torch, numpy = (check_env.Package(name, "2.13.0", "", "") for name in ("torch", "numpy"))
    assert check_env.accepts(torch, installed) == accepted
    assert check_env.accepts(numpy, installed) == (installed.partition("+")[0] == "2.13.0")


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_check_env_names_what_is_missing(repository, quick):
    (repository / "requirements.txt").write_text("# pins\nno-such-package==1.0  # nothing\npytest==0.1  # tests\n")
    done = start(repository, sys.executable, repository / "utils" / "check_env.py", *quick)
    assert done.returncode == 1
    assert "no-such-package" in done.stdout
    assert f"is {pytest.__version__}, pinned is 0.1" in done.stdout
    assert ("Fix: python -m pip install no-such-package==1.0" in done.stdout) == (not quick)
    (repository / "requirements.txt").write_text(f"pytest=={pytest.__version__}  # tests\n")
    assert start(repository, sys.executable, repository / "utils" / "check_env.py", *quick).returncode == 0


def test_a_lock_left_by_a_killed_run_is_taken_over(repository):
    (repository / ".venv.tmp").mkdir()
    (repository / ".venv.tmp" / "pid").write_text("999999999")
    done = prepare(repository, VIRTUAL_ENV="", UNSUITABLE="1")
    assert done.returncode == 0, done.stderr
    assert "waiting" not in done.stderr
