"""How files look: sizes, nothing unsafe, nothing unfinished, nothing of one machine, nothing hidden."""

import ast
import re

import pytest
from repository import ROOT, calls_in, files_in, git, imports_of, is_checkout, source_files, tree_of

TEXT = {".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".txt", ".cff", ".tsv", ".html", ".css", ".js", ".svg", ""}
MAX_FUNCTION_LINES = 60
MARKERS = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK"]) + r")\b")
MACHINE_PATH = re.compile(r"(?<![\w./$})~*-])/(home|root|work|mnt|nfs|Users|scratch|opt)/")
TOOL_RUBBISH = {"__pycache__/", "*.pyc", ".pytest_cache/", ".ruff_cache/", ".hypothesis/"}


def max_lines(path):
    """The size guide; None where there is none."""
    if path.as_posix() == "run.sh":
        return 220
    if path.parts[0] == "egs":
        return {"run.sh": 20, "prepare.py": 80}.get(path.name)
    if path.suffix == ".js":
        return 250
    if path.suffix == ".py":
        return {"local": 220, "nim4": 400}.get(path.parts[0])
    return None


def text_files():
    return [path for path in source_files() if path.suffix in TEXT and (ROOT / path).stat().st_size < 1_000_000 and not (ROOT / path).is_symlink()]


@pytest.mark.parametrize("path", [path for path in source_files() if max_lines(path)], ids=str)
def test_files_are_short(path):
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= max_lines(path), f"{path} has {lines} lines, the guide says {max_lines(path)}: does it hold two things?"


@pytest.mark.parametrize("path", files_in("nim4", "local", "egs", "utils"), ids=str)
def test_functions_are_short(path):
    functions = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES}
    assert not long, f"{path}: functions of more than {MAX_FUNCTION_LINES} lines"


@pytest.mark.parametrize("path", [path for path in files_in("nim4") if path.name != "__main__.py"], ids=str)
def test_the_library_neither_prints_nor_parses_options(path):
    parsers = {name.split(".")[0] for name, _ in imports_of(tree_of(path))} & {"argparse", "optparse", "click", "typer"}
    assert not parsers, f"{path} imports {parsers}: options belong to local/ and utils/"
    assert not [call.lineno for call in calls_in(tree_of(path), "print") if isinstance(call.func, ast.Name)], f"{path}: log, do not print"
    assert "sys.argv" not in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", files_in("nim4", "local", "egs", "utils", "benchmarks", "tests"), ids=str)
def test_nothing_is_loaded_that_could_run_code(path):
    unsafe = []
    for name in ("load", "loads", "unsafe_load", "full_load"):
        for call in calls_in(tree_of(path), name):
            function = ast.unparse(call.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if function == "torch.load" and keywords.get("weights_only") != "True":
                unsafe.append(f"line {call.lineno}: torch.load without weights_only=True")
            if function.split(".")[0] in ("pickle", "cloudpickle", "marshal", "yaml") or keywords.get("allow_pickle") == "True":
                unsafe.append(f"line {call.lineno}: {function}")
    assert not unsafe, path


@pytest.mark.parametrize("path", files_in("nim4", "local", "egs", "utils", "benchmarks", "tests"), ids=str)
def test_no_error_is_swallowed(path):
    handlers = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.ExceptHandler)]
    bare = [node.lineno for node in handlers if node.type is None]
    silent = [node.lineno for node in handlers if node.type and ast.unparse(node.type) in ("Exception", "BaseException") and is_empty(node.body)]
    assert not bare + silent, f"{path}: an except that hides everything"


def is_empty(body):
    return all(isinstance(node, ast.Pass | ast.Continue) for node in body)


def test_nothing_is_left_unfinished():
    assert not places(MARKERS)


def test_no_path_of_one_machine():
    assert not places(MACHINE_PATH)


def places(pattern):
    found = []
    for path in text_files():
        lines = (ROOT / path).read_text(encoding="utf-8", errors="replace").splitlines()
        found += [f"{path}:{number}: {line.strip()[:100]}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    return found


def test_no_symlinks():
    assert not [str(path) for path in source_files() if (ROOT / path).is_symlink()]


def test_ignore_rules_are_anchored():
    rules = [line.strip() for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    assert not [rule for rule in rules if not rule.lstrip("!").startswith("/") and rule not in TOOL_RUBBISH], "such a rule could hide a package"


@pytest.mark.skipif(not is_checkout(), reason="not a git checkout")
def test_ignore_rules_hide_no_source():
    assert not git("ls-files", "--cached", "--ignored", "--exclude-standard")
    folders = ["nim4", "local", "egs", "utils", "tests", "benchmarks", ".ci"]
    code = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".yaml") and "__pycache__" not in path.parts
    ]
    assert code
    assert not git("check-ignore", *(str(path.relative_to(ROOT)) for path in code))


def test_scripts_can_be_started():
    scripts = [path for path in source_files() if path.name == "run.sh" or path.as_posix() in (".ci/run", "utils/check.sh")]
    assert len(scripts) >= 3
    assert not [str(path) for path in scripts if not (ROOT / path).stat().st_mode & 0o100]
    assert not [str(path) for path in scripts if not (ROOT / path).read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")]


def test_requirements_are_exact():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("#")[0].strip() for line in lines]
    wrong = [pin for pin in pins if pin and not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin)]
    assert not wrong, "one `name==version` per line, and no index: pip follows the user's configuration"
    assert not {pin.split("==")[0] for pin in pins} & {"torchaudio", "torchvision", "torchcodec"}
