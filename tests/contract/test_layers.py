"""Who may import whom. Imports inside functions count as well."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest
from repository import ROOT, files_in, imports_of, tree_of

BELOW = {"config": set(), "stage": {"config"}}  # what each part of nim4 may import, beside itself
BELOW["corpus"] = {"config", "stage"}
BELOW["model"] = BELOW["corpus"] | {"corpus"}
BELOW["decode"] = BELOW["model"] | {"model"}
BELOW["score"] = BELOW["decode"] | {"decode"}
BELOW["train"] = BELOW["score"] | {"score"}
BELOW["published"] = BELOW["train"] | {"train"}
BELOW["export"] = BELOW["decode"] | {"decode"}
BELOW["serve"] = BELOW["score"] | {"score"}
BELOW["export"] = BELOW["decode"] | {"decode"}
BELOW["baseline"] = BELOW["report"] = BELOW["corpus"] | {"corpus", "score"}

DOORS = {  # the only modules that may import a heavy package
    "lhotse": {"nim4/corpus/manifest.py", "nim4/corpus/feats.py", "nim4/corpus/batch.py", "nim4/corpus/noise.py"},
    "kaldi_native_fbank": {"nim4/corpus/feats.py"},
    "pypinyin": {"nim4/corpus/g2p.py"},
    "kaldialign": {"nim4/score/error_rate.py"},
    "matplotlib": {"nim4/score/plot.py"},
    "transformers": {"nim4/model/llm.py", "nim4/serve/vllm_plugin.py", "nim4/serve/vllm_model.py"},  # the last two are what vLLM makes of it
    "vllm": {"nim4/serve/vllm_client.py", "nim4/serve/vllm_plugin.py", "nim4/serve/vllm_model.py"},
}
ONE_DOOR = ["ahocorasick", "dask", "distributed", "icefall", "k2", "kaldifeat", "kaldifst", "numba", "sentencepiece", "silero_vad", "sounddevice"]
ONE_DOOR += ["praatio", "pyarrow", "tensorboard", "tn", "wetext", "whisper_normalizer"]  # whichever module it is, it is one
INSIDE = {"nim4/serve/vllm_model.py": {"vllm"}}  # imported by the package itself, when it makes our model
OPTIONAL = {"icefall", "k2", "kaldifeat", "sounddevice", "tn", "tritonclient", "vllm", "zipformer"}  # may be missing: never imported at the top
MODULES = {"pyyaml": "yaml", "pyahocorasick": "ahocorasick"}


@cache
def names_imported(path: Path) -> list[tuple[str, bool]]:
    package = ".".join(path.with_suffix("").parts[:-1])
    return imports_of(tree_of(path), package)


def test_imports_are_seen_wherever_they_stand():
    code = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    import i\n    import_module('j')\n"
    found = imports_of(ast.parse(code), "nim4.model")
    at_top = ["a.b", "c", "c.d", "nim4.model", "nim4.model.e", "nim4.f", "nim4.f.g"]
    assert sorted(found) == sorted([(name, True) for name in at_top] + [("i", False), ("j", False)])


@pytest.mark.parametrize("path", files_in("nim4"), ids=str)
def test_a_part_of_nim4_imports_only_what_is_below_it(path):
    names = [name for name, _ in names_imported(path)]
    outside = [name for name in names if name.split(".")[0] in ("local", "egs", "utils", "tests", "benchmarks")]
    assert not outside, f"{path} imports {outside}: nim4 stands alone"
    part = path.with_suffix("").parts[1]
    if part in ("__init__", "__main__"):
        return
    assert part in BELOW, f"{path}: add {part!r} to the layers, in this test and in CONTRIBUTING.md"
    used = {name.split(".")[1] for name in names if name.startswith("nim4.")} - {part, "__version__"}
    assert used <= BELOW[part], f"{path}: nim4.{part} must not import {sorted(used - BELOW[part])}"


@pytest.mark.parametrize("path", files_in("egs"), ids=str)
def test_a_corpus_imports_no_method(path):
    used = {name.split(".")[1] for name, _ in names_imported(path) if name.startswith("nim4.")}
    assert used <= {"config", "stage", "corpus"}, f"{path} imports {used}: a corpus holds facts only"
    assert not [name for name, _ in names_imported(path) if name.split(".")[0] in ("local", "egs")]


@pytest.mark.parametrize("package", [*DOORS, *ONE_DOOR])
def test_a_heavy_package_has_one_door(package):
    users = {path.as_posix() for path in files_in("nim4", "local", "utils") if any(name.split(".")[0] == package for name, _ in names_imported(path))}
    users.discard("utils/check_env.py")
    if package in DOORS:
        assert users <= DOORS[package]
    else:
        assert len(users) <= 1, f"{package} is imported by {sorted(users)}"


@pytest.mark.parametrize("path", files_in("nim4", "local", "egs", "utils"), ids=str)
def test_optional_packages_are_imported_where_they_are_used(path):
    at_top = {name.split(".")[0] for name, top in names_imported(path) if top} - INSIDE.get(path.as_posix(), set())
    assert not at_top & OPTIONAL, f"{path}: without {at_top & OPTIONAL} it could not be imported"


def test_every_import_is_pinned():
    pins = [
        line.split("==")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if "==" in line.split("#")[0]
    ]
    brought = {"triton", "triton_python_backend_utils"}  # by torch, in its CUDA builds; by the Triton server
    known = set(sys.stdlib_module_names) | OPTIONAL | brought | {"nim4", "local", "utils"} | {MODULES.get(pin, pin.replace("-", "_")) for pin in pins}
    unknown = []
    for path in files_in("nim4", "local", "egs", "utils", "tests", "benchmarks"):
        beside = {other.stem for other in files_in(path.parts[0]) if other.parent == path.parent or other.parent in path.parents}
        unknown += [f"{path}: {name}" for name, _ in names_imported(path) if name and name.split(".")[0] not in known | beside]
    assert not unknown
