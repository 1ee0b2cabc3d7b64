#!/usr/bin/env python3
"""Writes docs/corpora.md, the table of the corpora, from the comments and options of egs/*/run.sh: their facts have one home.

A run.sh says in its comments, each going on in lines that begin with `#   `:

    # NAME: what it is, hours, rate. Licence: WHICH. ADDRESS        (line 2; the address may be missing)
    # Get it: how
    # Scoring: the metric, and what to know before a number is compared
"""

import argparse
import logging
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it also runs alone

import nim4.stage
from nim4.config import RecipeError

log = logging.getLogger("nim4")
ROOT = nim4.stage.ROOT
PAGE = Path("docs") / "corpora.md"
INTRODUCTION = """# Corpora

Written by `utils/corpora.py` from `egs/*/run.sh`; what is known of each corpus stands there and in its `prepare.py`. None of them but `mini`
has been run here as published: the recipes are tested on small corpora in the published layouts, and those whose layout or counts could not be
checked say so. `--language` says how text is read: dialects are labelled with Mandarin readings. `egs/<corpus>/run.sh --stop-stage 2` prepares a
corpus; stage 0 tells where the number of utterances differs from the published one (in brackets, where two sources agree on it), and

```bash
python -m nim4 corpus check data/<corpus>/manifests
```

tells of lengths, rates, characters outside the units, duplicates, and leaks between splits to train on and to test on (several folders: between
corpora, too). Corpora without a training split end with stage 2; a model is tested on them with
`egs/<corpus>/run.sh --stage 11 --stop-stage 12 --init MODEL`. How to add one: [CONTRIBUTING.md](../CONTRIBUTING.md).
"""


@dataclass(frozen=True)
class Corpus:
    """What a run.sh says."""

    folder: str
    name: str
    what: str
    licence: str
    address: str
    get: str
    scoring: str
    options: dict[str, str]
    counts: dict[str, int]


def read_corpus(path: Path) -> Corpus:
    """Raises RecipeError when a comment is missing."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments: list[str] = []
    for line in lines[1:]:
        if line.startswith("#   "):
            comments[-1] += " " + line[4:].strip()
        elif line.startswith("# "):
            comments.append(line[2:].strip())
    facts = re.fullmatch(r"(.+?): (.+)\. Licence: (.+?)\.(?: (https://\S+))?", comments[0] if comments else "")
    told = {key: next((text.removeprefix(f"{key}: ") for text in comments if text.startswith(f"{key}: ")), "") for key in ("Get it", "Scoring")}
    if facts is None or not all(told.values()):
        fix = "see the top of utils/corpora.py"
        raise RecipeError(path, expected="comments: NAME: what. Licence: which. address; Get it: how; Scoring: what", found=comments[:1], fix=fix)
    text = " ".join(line.rstrip("\\") for line in lines if not line.startswith("#"))
    options = {name: (quoted or plain) for name, quoted, plain in re.findall(r' --([a-z-]+) (?:"([^"]*)"|(\S+))', text)}
    options = {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for name, value in options.items()}
    counts = runpy.run_path(str(path.with_name("prepare.py"))).get("COUNTS", {})
    return Corpus(path.parent.name, *(part or "" for part in facts.groups()), told["Get it"], told["Scoring"], options, counts)


def splits_of(corpus: Corpus) -> str:
    """Its splits by use, as run.sh gives them."""
    parts = []
    for use in ("train", "valid", "test"):
        names = [re.sub(r"=[0-9.]+$", "", name) for name in corpus.options.get(use, "").split()]
        if any("$" in name for name in names):
            parts.append(f"{use}: see run.sh")
        elif names:
            parts.append(f"{use}: {' '.join(names)}")
    if corpus.counts:
        parts.append(f"({', '.join(f'{name} {count:,}' for name, count in corpus.counts.items())})")
    return "; ".join(parts) or "none"


def page(corpora: list[Corpus]) -> str:
    """The whole page."""
    lines = ["| corpus | what, hours | `--language` | licence | splits | get it | scoring |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for corpus in corpora:
        name = f"[{corpus.name}]({corpus.address})" if corpus.address else corpus.name
        cells = (corpus.what, corpus.options["language"], corpus.licence, splits_of(corpus), corpus.get, corpus.scoring)
        lines.append(f"| `{corpus.folder}`: {name} | " + " | ".join(re.sub(r"([|<*])", r"\\\1", cell) for cell in cells) + " |")
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.parse_args()
    corpora = [read_corpus(path) for path in sorted((ROOT / "egs").glob("*/run.sh"))]
    with nim4.stage.atomic_write(ROOT / PAGE) as file:
        file.write(page(corpora))
    log.info("%s: %d corpora", PAGE, len(corpora))


if __name__ == "__main__":
    nim4.stage.run(main, "corpora")
