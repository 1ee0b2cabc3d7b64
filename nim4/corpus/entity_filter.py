"""A language model that keeps the names among phrases, over an OpenAI-compatible server; its answers are kept in a file.

Source: the paper filters phrases with Qwen3-30B-A3B-Instruct (context SFT); the question's wording is ours.
"""

import http.client
import itertools
import json
import logging
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nim4.config import RecipeError
from nim4.corpus.progress import Progress

log = logging.getLogger("nim4")

BATCH_PHRASES = 40
QUESTION = (
    "Below are phrases from speech transcripts, one per line with a number. Which of them are names: of persons, places and points of interest, "
    "songs, films, books, programmes and games, products, brands, companies, organisations, or other proper nouns? "
    "Answer with a JSON array of the numbers of the names and nothing else, for example [2, 5]; [] if there is none.\n\n"
)
RETRIED = (408, 409, 425, 429)  # HTTP codes below 500 that may be gone at the next try


@dataclass(frozen=True)
class Endpoint:
    """A chat model behind an OpenAI-compatible server.

    Attributes:
        url: base address, e.g. http://localhost:8000/v1.
        model: its name there.
        key: sent as bearer token when not empty; never logged.
        timeout_s: longest silence of the server.
        tries: per request.
        wait_s: before the second try; twice as long before each further one.
    """

    url: str
    model: str
    key: str = ""
    timeout_s: float = 120.0
    tries: int = 5
    wait_s: float = 1.0

    def names_among(self, phrases: Sequence[str]) -> list[bool]:
        """Whether each phrase is a name. Raises RecipeError when no try brings a usable answer."""
        for number in range(self.tries):
            try:
                return self._ask(phrases)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code not in RETRIED:
                    break
            except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, a timeout, a torn or a useless answer
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if number + 1 < self.tries:
                log.warning("%s: %s; trying again in %.0f s", self.url, reason, self.wait_s * 2**number)
                time.sleep(self.wait_s * 2**number)
        fix = "start the server, or correct --entity-endpoint and --entity-model; the same command then goes on from the answers already there"
        raise RecipeError(f"{self.url}, model {self.model}", expected="a JSON array of numbers", found=reason, fix=fix)

    def _ask(self, phrases: Sequence[str]) -> list[bool]:
        listed = "\n".join(f"{number}. {phrase}" for number, phrase in enumerate(phrases, 1))
        body = {"model": self.model, "messages": [{"role": "user", "content": QUESTION + listed}], "temperature": 0}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            answer = json.loads(response.read())
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"no message in {str(answer)[:100]}") from error
        return read_answer(content, len(phrases))


def read_answer(content: object, num_phrases: int) -> list[bool]:
    """Whether each phrase is named in a model's answer: its last JSON array of numbers, whatever stands around it.

    Raises:
        ValueError: if there is none, or it has a number that no phrase has.
    """
    arrays = re.findall(r"\[[\d\s,]*\]", content if isinstance(content, str) else "")
    numbers = json.loads(arrays[-1]) if arrays else None
    if numbers is None or not all(1 <= number <= num_phrases for number in numbers):
        raise ValueError(f"the answer {str(content)[:100]!r}")
    return [number in numbers for number in range(1, num_phrases + 1)]


class AnswerCache:
    """What a model said of phrases, kept as lines of JSON: model, text, name. A line that a kill has torn is dropped.

    Args:
        path: of the file, which need not exist.
        model: only its answers count; others' stay in the file.
    """

    def __init__(self, path: Path, model: str):
        self._path, self._model = Path(path), model
        self._answers: dict[str, bool] = {}
        kept = self._path.read_bytes() if self._path.is_file() else b""
        whole = kept[: kept.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), 1):
            try:
                row = json.loads(line)
                if row["model"] == model:
                    self._answers[row["text"]] = bool(row["name"])
            except (ValueError, KeyError, TypeError) as error:
                where = f"{path}, line {number}"
                raise RecipeError(where, expected="an object with model, text and name", found=repr(error), fix="remove the line") from error
        if len(whole) < len(kept):
            self._path.write_bytes(whole)

    def __contains__(self, text: str) -> bool:
        return text in self._answers

    def __getitem__(self, text: str) -> bool:
        return self._answers[text]

    def add(self, texts: Sequence[str], names: Sequence[bool]) -> None:
        """Keeps the answers of one request, all or none."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"model": self._model, "text": text, "name": name} for text, name in zip(texts, names, strict=True)]
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self._answers.update(zip(texts, names, strict=True))


def choose_by_model(counts: Counter[str], endpoint: Endpoint, cache_path: Path) -> Counter[str]:
    """The phrases that the model calls names; it is asked about those only that are not in the cache.

    Raises:
        RecipeError: if it cannot be asked; what it has said is in the cache by then.
    """
    if not endpoint.url.startswith(("http://", "https://")):
        raise RecipeError(f"--entity-endpoint {endpoint.url}", expected="an http address", found=endpoint.url, fix="e.g. http://localhost:8000/v1")
    cache = AnswerCache(cache_path, endpoint.model)
    missing = sorted(phrase for phrase in counts if phrase not in cache)
    log.info("%d phrases, of which %d are answered in %s", len(counts), len(counts) - len(missing), cache_path)
    progress = Progress(f"asking {endpoint.model}", len(missing), "phrases")
    for batch in _batches(missing):
        cache.add(batch, endpoint.names_among(batch))
        progress.add(len(batch))
    return Counter({phrase: count for phrase, count in counts.items() if cache[phrase]})


def _batches(phrases: Sequence[str]) -> Iterator[list[str]]:
    remaining = iter(phrases)
    while batch := list(itertools.islice(remaining, BATCH_PHRASES)):
        yield batch
