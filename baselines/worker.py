"""The program that runs inside a baseline's own environment: it loads the adapter and answers one clip after the other.

The parent starts it as `python worker.py REQUESTS REPLIES`, two file descriptors of pipes that carry JSON lines, so that whatever a library prints
goes to the log and disturbs nothing. The first request says what to load: {"adapter", "backend", "settings"}; its answer is {"ready"} or {"error"}.
Each further one is {"number", "path", "language"} and is answered with the same number and `raw`, `text`, `seconds` and what else the adapter tells,
or with `error`.

Standard library only, and Python 3.9 will do: the environment has none of our packages.
"""

import importlib.util
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path

MAX_ERROR = 500  # characters of an exception that are kept


def load_module(path):
    """The Python file at `path`; it can import what lies beside this file."""
    path = Path(path)
    spec = importlib.util.spec_from_file_location("baseline_" + path.parent.name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(error):
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_ERROR]


def answered(model, clean, settings, request):
    """The answer to one request."""
    started_s = time.perf_counter()
    answer = {}
    try:
        answer = dict(model.transcribe(request["path"], request["language"]))
        answer["seconds"] = round(time.perf_counter() - started_s, 4)
        if not isinstance(answer.get("raw"), str):
            raise TypeError(f"the adapter gave no text but {answer.get('raw')!r:.80}")
        answer["text"] = clean(answer["raw"], settings)
        json.dumps(answer)
    except Exception as error:
        raw = answer.get("raw")
        kept = {"raw": raw} if isinstance(raw, str) else {}
        return {**kept, "seconds": round(time.perf_counter() - started_s, 4), "error": told(error)}
    return answer


def received(descriptor):
    """A queue of the requests. When the parent is gone the process ends, in the middle of a clip if the model lets Python run."""
    requests = queue.Queue()

    def read():
        with os.fdopen(descriptor, encoding="utf-8") as lines:
            for line in lines:
                requests.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return requests


def main():
    requests_fd, replies_fd = int(sys.argv[1]), int(sys.argv[2])
    for descriptor in (requests_fd, replies_fd):
        os.set_inheritable(descriptor, False)
    requests = received(requests_fd)

    def reply(answer):
        # a tokenizer's half of a surrogate pair is no UTF-8: it becomes "?"
        os.write(replies_fd, (json.dumps(answer, ensure_ascii=False) + "\n").encode("utf-8", "replace"))

    what = requests.get()
    try:
        adapter = load_module(what["adapter"])
        backend = load_module(what["backend"]) if what["backend"] else adapter
        model = backend.load(what["settings"])
    except Exception as error:
        import traceback

        traceback.print_exc()
        reply({"error": told(error)})
        return
    reply({"ready": True})
    while True:
        request = requests.get()
        reply({**answered(model, adapter.clean, what["settings"], request), "number": request["number"]})


if __name__ == "__main__":
    main()
