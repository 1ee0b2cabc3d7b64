"""A model behind a server with OpenAI's interface: vLLM, SGLang, this repository's own. Standard library only.

`endpoint: chat` sends the official prompt with the audio in it to /chat/completions; `transcriptions` sends the audio to /audio/transcriptions, which
puts a prompt of the server's own around it, so that texts may differ from the authors'. A key is taken from OPENAI_API_KEY.
"""

import base64
import json
import os
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

from asking import messages

TRIES = 4  # of a request that a busy server refuses, or whose connection breaks
WAIT_S = 1.0  # before the second one; twice as long before each further one
MAX_SAID = 300  # characters of a server's error that are kept


def load(settings):
    return Server(settings)


def clean(raw, settings):
    return " ".join(raw.split())


class Server:
    """Asks it; raises an exception that says what it answered when that is no text."""

    def __init__(self, settings):
        if not settings.get("url"):
            raise ValueError("no server is named: add --server URL, such as http://127.0.0.1:8000/v1")
        self._settings, self._url = settings, settings["url"].rstrip("/")
        try:
            self._sent(urllib.request.Request(f"{self._url}/models"))
        except ServerError as error:
            if error.code != 404:  # a server may have no list of models
                raise

    def transcribe(self, path, language):
        server = self._settings["server"]
        if server["endpoint"] == "transcriptions":
            answer = self._sent(self._upload(Path(path).read_bytes(), language))
            return {"raw": answer["text"]}
        if server["endpoint"] != "chat":
            raise ValueError(f"server.endpoint is chat or transcriptions, not {server['endpoint']!r}")
        answer = self._sent(self._question(Path(path).read_bytes(), language))
        choice = answer["choices"][0]
        return {
            "raw": choice["message"]["content"],
            "finish": choice.get("finish_reason"),
            "tokens": (answer.get("usage") or {}).get("completion_tokens"),
        }

    def _question(self, wav, language):
        server = self._settings["server"]
        audio = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav).decode(), "format": "wav"}}
        turns = messages(self._settings, language, audio)
        body = {"model": self._name(), "temperature": server["temperature"], "max_tokens": server["max_tokens"], **server["extra"]}
        if (begin := self._settings["prompt"].get("answer_begins")) and language:
            turns.append({"role": "assistant", "content": begin.replace("{language}", language)})
            body.update(add_generation_prompt=False, continue_final_message=True)
        data = json.dumps({**body, "messages": turns}).encode()
        return urllib.request.Request(f"{self._url}/chat/completions", data, {"Content-Type": "application/json"})

    def _upload(self, wav, language):
        fields = {"model": self._name(), "response_format": "json", "temperature": self._settings["server"]["temperature"]}
        if language:
            fields["language"] = language
        border = uuid.uuid4().hex
        parts = [f'--{border}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode() for key, value in fields.items()]
        head = f'--{border}\r\nContent-Disposition: form-data; name="file"; filename="clip.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        data = b"".join([*parts, head.encode(), wav, f"\r\n--{border}--\r\n".encode()])
        return urllib.request.Request(f"{self._url}/audio/transcriptions", data, {"Content-Type": f"multipart/form-data; boundary={border}"})

    def _name(self):
        return self._settings["server"]["name"] or self._settings["model"]

    def _sent(self, request):
        """The answer's JSON."""
        if key := os.environ.get("OPENAI_API_KEY"):
            request.add_header("Authorization", f"Bearer {key}")
        for number in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self._settings["server"]["timeout_s"]) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                said = " ".join(error.read().decode("utf-8", "replace").split())[:MAX_SAID]
                failure = ServerError(f"{request.full_url} answers {error.code}: {said}", error.code)
                if error.code != 429 and error.code < 500:
                    raise failure from error
            except (OSError, ValueError) as error:  # no connection, a broken one, an answer that is no JSON
                failure = ServerError(f"{request.full_url}: {error}", None)
            if number < TRIES - 1:
                time.sleep(WAIT_S * 2**number)
        raise failure


class ServerError(Exception):
    def __init__(self, message, code):
        super().__init__(message)
        self.code = code
