"""What the contract tests know about the repository: its files, what they import, which options its programs take."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MADE_AT_RUN_TIME = {".git", ".venv", ".venv.tmp", "data", "exp", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}


@cache
def is_checkout() -> bool:
    """Whether git looks after these files; false in an unpacked archive."""
    return (ROOT / ".git").exists()


def git(*arguments: str) -> list[str]:
    """The lines that a git command prints; its exit code 1 only says that there are none."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


@cache
def source_files() -> tuple[Path, ...]:
    """Every file that is kept or about to be kept, relative to the root: what git tracks, and what it does not ignore."""
    if is_checkout():
        names = git("-c", "core.quotePath=off", "ls-files", "--cached", "--others", "--exclude-standard")
        return tuple(sorted(Path(name) for name in names if (ROOT / name).exists()))
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return tuple(sorted(path for path in found if not MADE_AT_RUN_TIME & set(path.parts)))


def files_in(*folders: str, suffix: str = ".py") -> list[Path]:
    """The source files with this ending below the folders."""
    return [path for path in source_files() if path.parts[0] in folders and path.suffix == suffix]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def last_name(function: ast.expr) -> str:
    """`load` of `torch.load`; empty when what is called has no name."""
    return getattr(function, "attr", getattr(function, "id", ""))


def imports_of(tree: ast.Module, package: str = "") -> list[tuple[str, bool]]:
    """(module, whether it is imported as soon as the file is) for every import, also those inside functions.

    `from nim4.model import ctc` gives `nim4.model` and `nim4.model.ctc`: the name may be a module. A relative import is resolved
    against `package`, and a literal given to import_module counts.
    """
    inside_functions = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(outer)
        if inner is not outer
    }
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, node.module] if node.module else above)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and last_name(node.func) in ("import_module", "__import__"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        found += [(name, id(node) not in inside_functions) for name in names]
    return found


def calls_in(tree: ast.Module, name: str) -> list[ast.Call]:
    """Every call of `name`, as a plain name or as the last part of a dotted one."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and last_name(node.func) == name]


def options_of_python(path: Path) -> dict[str, ast.Call]:
    """The `--options` that a program declares with add_argument, also by way of local/training_options.py, and the call that declares each."""
    shared = {node.name: node for node in ast.walk(tree_of(Path("local/training_options.py"))) if isinstance(node, ast.FunctionDef)}
    options = {}
    pending, seen = [tree_of(path)], set()
    while pending:
        tree = pending.pop()
        for call in calls_in(tree, "add_argument"):
            for argument in call.args:
                if isinstance(argument, ast.Constant) and str(argument.value).startswith("--"):
                    options[argument.value] = call
        used = {name for name in shared if calls_in(tree, name)} - seen
        pending += [shared[name] for name in used]
        seen |= used
    return options


def run_options() -> list[str]:
    """The options of run.sh: the assignments above the line that reads them."""
    header = (ROOT / "run.sh").read_text(encoding="utf-8").split("utils/parse_options.sh")[0]
    return ["--" + name.replace("_", "-") for name in re.findall(r"^([a-z][a-z0-9_]*)=", header, flags=re.MULTILINE)]


def run_commands() -> list[tuple[str, list[str]]]:
    """(file name, options) of every program of local/ that run.sh calls."""
    text = (ROOT / "run.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    return [
        (name, re.findall(r"--[a-z][a-z0-9-]*", rest))
        for name, rest in re.findall(r"^\s[^#\n]*\blocal/(\d\d_\w+\.py)(.*)$", text, flags=re.MULTILINE)
    ]


def stages_of_run() -> dict[int, str]:
    """Number and name of every stage in run.sh."""
    text = (ROOT / "run.sh").read_text(encoding="utf-8")
    return {int(number): name for number, name in re.findall(r"^if stage (\d+) (\w+) ", text, flags=re.MULTILINE)}


def programs() -> list[Path]:
    """The programs of local/: one for each stage."""
    return [path for path in files_in("local") if len(path.parts) == 2 and path.name[0].isdigit()]
