"""Lists the packages that the recipe needs or can use: version, what for, and the line that installs a missing one.

Needs nothing but Python itself. Exit code 1 when a required package is missing, has another version than requirements.txt pins,
or cannot be imported. `--quick` compares versions without importing, and says only what is wrong.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
# where the module's name is not the package's
MODULES = {
    "pyyaml": "yaml",
    "sherpa-onnx-core": "sherpa_onnx",
    "pyahocorasick": "ahocorasick",
    "pytest-xdist": "xdist",
    "opentelemetry-api": "opentelemetry",
    "WeTextProcessing": "tn",
}
TORCH_RANGE = ((2, 11), (2, 13))  # first and last minor version that is accepted


@dataclass(frozen=True)
class Package:
    """One line of the list; `version` is empty for an optional package, of which any will do."""

    name: str
    version: str
    purpose: str
    install: str

    @property
    def module(self) -> str:
        return MODULES.get(self.name, self.name.replace("-", "_"))


# The first two have wheels; the others have none for the pinned torch: they are built from source, against the torch that is installed.
OPTIONAL = (
    Package("sounddevice", "", "python -m nim4 stream --mic", "python -m pip install sounddevice"),
    Package("WeTextProcessing", "", "python -m nim4 score --engine WeTextProcessing", "python -m pip install WeTextProcessing==1.2.0"),
    Package("vllm", "", "streams on vLLM, see docs/vllm.md", "utils/check_vllm.sh --install"),
    Package("k2", "", "decode config ctc_graph", "python -m pip install --no-build-isolation git+https://github.com/k2-fsa/k2"),
    Package(
        "kaldifeat", "", "features in batches, on a GPU", "python -m pip install --no-build-isolation git+https://github.com/csukuangfj/kaldifeat"
    ),
    Package(
        "icefall",
        "",
        "tests compare with it; its checkpoints are read without it",
        "python -m pip install --no-deps git+https://github.com/k2-fsa/icefall",
    ),
    Package(
        "tritonclient",
        "",
        "python -m nim4 serve --encoder grpc://HOST:PORT, see docs/deployment.md",
        "python -m pip install --no-deps tritonclient==2.73.0 python-rapidjson==1.25",
    ),
)


def required_packages(path: Path) -> list[Package]:
    """The `name==version  # purpose` lines of a requirements file."""
    packages = []
    for line in path.read_text(encoding="utf-8").splitlines():
        pin, _, purpose = line.partition("#")
        if pin.strip():
            name, _, version = pin.strip().partition("==")
            packages.append(Package(name, version, purpose.strip(), f"python -m pip install {pin.strip()}"))
    return packages


def accepts(package: Package, installed: str) -> bool:
    """Whether an installed version will do: the pinned one, whatever its build (`2.13.0+cpu`), or a torch in the range."""
    release = installed.partition("+")[0]
    if package.name == "torch" and release != package.version:
        return TORCH_RANGE[0] <= tuple(int(part) for part in release.split(".")[:2]) <= TORCH_RANGE[1]
    return not package.version or release == package.version


def find_problem(package: Package, *, import_it: bool) -> str:
    """What is wrong with an installed package, in a few words; empty when nothing is."""
    try:
        installed = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
    if not accepts(package, installed):
        return f"is {installed}, pinned is {package.version}"
    if importlib.util.find_spec(package.module) is None:
        return "has no files"
    if import_it:
        try:
            importlib.import_module(package.module)
        except Exception as error:  # a broken package may raise anything, and it is reported
            return f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def print_list(packages: list[Package] | tuple[Package, ...]) -> int:
    """Prints one line for each package; returns how many are not as they should be."""
    problems = 0
    for package in packages:
        problem = find_problem(package, import_it=True)
        problems += bool(problem)
        if problem:
            print(f"  {package.name:<20} {problem} ({package.purpose})\n  {'':<20} Fix: {package.install}")
        else:
            print(f"  {package.name:<20} {importlib.metadata.version(package.name):<14} {package.purpose}", flush=True)
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="compare versions only, print only what is wrong")
    args = parser.parse_args()
    required = required_packages(REQUIREMENTS)
    if args.quick:
        wrong = [f"{package.name} {problem}" for package in required if (problem := find_problem(package, import_it=False))]
        if wrong:
            print("; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
        sys.exit(1 if wrong else 0)
    print(f"Python {sys.version.split()[0]} in {sys.prefix}\nrequired (requirements.txt)")
    missing = print_list(required)
    print("optional: the recipe runs without them")
    print_list(OPTIONAL)
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
