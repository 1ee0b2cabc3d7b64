"""Who may use the server and how much: keys, origins, rates, sizes; and the one error a client's mistake raises."""

import hashlib
import hmac
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nim4.config import RecipeError

KEYS_VARIABLE = "NIM4_API_KEYS"
TENANT = "nim4.tenant"  # in the scope of a request
KEY_PROTOCOL = "openai-insecure-api-key."  # how a browser gives its key: as a subprotocol, since it cannot set headers of a WebSocket


@dataclass(frozen=True)
class Limits:
    """What one server, one session or one key may take; all values are ours.

    Attributes:
        max_body_bytes: of an upload; OpenAI's limit.
        upload_s: seconds for an upload to arrive.
        max_upload_s: length of a recording.
        max_uploads: that are read or recognised at the same time.
        max_message_bytes: of a WebSocket message.
        max_sessions: streams at the same time.
        session_s: length of a stream, seconds on the clock.
        idle_s: a stream without a message for so long ends.
        max_ahead_s: so much audio may come faster than it is spoken.
        max_behind_s: when so much audio waits to be recognised, the server has too much to do.
        max_waiting: messages of one stream that wait; more than max_behind_s of audio in pieces of 10 ms.
        stalled_s: a client that takes nothing for so long has stopped reading.
        ping_s: seconds between pings of a stream; a client that does not answer in as many is gone.
        requests_per_minute: of one key, streams counted when they begin; without keys, of one address.
        drain_s: at the server's end, what streams have to finish by themselves.
    """

    max_body_bytes: int = 25 << 20
    upload_s: float = 60.0
    max_upload_s: float = 3600.0
    max_uploads: int = 16
    max_message_bytes: int = 1 << 20
    max_sessions: int = 64
    session_s: float = 3600.0
    idle_s: float = 60.0
    max_ahead_s: float = 10.0
    max_behind_s: float = 20.0
    max_waiting: int = 5000
    stalled_s: float = 10.0
    ping_s: float = 20.0
    requests_per_minute: int = 600
    drain_s: float = 10.0


class Refused(Exception):
    """A request that is not served, as OpenAI's interface tells it.

    Args:
        status: of the HTTP answer.
        code: for programs.
        message: for people.
        param: the field that is wrong.
        retry_after_s: seconds after which it may go better.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None, retry_after_s: int | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_after_s = status, code, message, param, retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {"type": kind, "code": self.code, "message": self.message, "param": self.param}

    @property
    def headers(self) -> dict[str, str]:
        """Of the HTTP answer, beside its content's."""
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


class Busy(Exception):
    """There is too much to do, or something that is needed is not there: it may go better later."""


def read_keys(path: Path | None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The keys that are accepted: lines of a file (empty ones and # comments are passed over), or NIM4_API_KEYS, separated by commas.

    Raises:
        RecipeError: if the file or the variable is given and holds no key.
    """
    if path is None:
        if KEYS_VARIABLE not in environment:
            return []
        where, lines = KEYS_VARIABLE, environment[KEYS_VARIABLE].split(",")
    else:
        try:
            where, lines = str(path), path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(path, expected="a file of API keys", found=error, fix="correct --api-keys") from error
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise RecipeError(where, expected="at least one API key", found="none", fix="add one, or leave it out to serve without keys")
    return keys


class Gate:
    """Lets requests in.

    Args:
        keys: accepted API keys; none: no key is asked for.
        origins: web pages of other hosts that may use the server, e.g. "https://example.org".
        requests_per_minute: of one key.
        clock: seconds.
    """

    def __init__(self, keys: Iterable[str], origins: Sequence[str], requests_per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._keys = [_digest(key) for key in keys]
        self._origins, self._rate, self._clock = frozenset(origins), requests_per_minute, clock
        self._used: dict[Any, tuple[float, float]] = {}  # key or address -> requests that count, at which second

    def admit(self, headers: Mapping[str, str], address: str) -> str:
        """Counts a request, and tells whose it is: a name of the key's owner, "" where there are no keys.

        Args:
            headers: names in lower case.
            address: of the client.
        Raises:
            Refused: 403, 401 or 429.
        """
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and _host_of(origin) != headers.get("host"):
            raise Refused(403, "origin_not_allowed", "pages of this origin may not use this server: see --origin")
        owner = self._owner(headers, address)
        self._count(owner)
        return owner.hex() if self._keys else ""

    def _owner(self, headers: Mapping[str, str], address: str) -> Any:
        if not self._keys:
            return address
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            offered = [name.strip() for name in headers.get("sec-websocket-protocol", "").split(",")]
            given = next((name.removeprefix(KEY_PROTOCOL) for name in offered if name.startswith(KEY_PROTOCOL)), "")
        digest = _digest(given.strip())
        matches = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, so that the time tells nothing
        if not any(matches):
            raise Refused(401, "invalid_api_key", "no valid API key was given: send `Authorization: Bearer KEY`")
        return digest

    def _count(self, owner: Any) -> None:
        now_s = self._clock()
        used, since_s = self._used.get(owner, (0.0, now_s))
        used = max(used - (now_s - since_s) * self._rate / 60, 0.0)
        if used + 1 > self._rate:
            wait_s = int((used + 1 - self._rate) * 60 / self._rate) + 1
            raise Refused(429, "rate_limit_exceeded", f"at most {self._rate} requests a minute", retry_after_s=wait_s)
        if len(self._used) > 10_000:  # addresses come and go: those that have been quiet for a minute count nothing
            self._used = {key: value for key, value in self._used.items() if now_s - value[1] < 60}
        self._used[owner] = (used + 1, now_s)


def tenant_of(scope: Mapping[str, Any]) -> str:
    """Whose request a scope of ASGI is, as Gate.admit said."""
    return scope.get(TENANT, "")


def check_origin(origin: str) -> None:
    """Raises RecipeError for what no browser calls its origin, since no page would ever be let in by it."""
    host = _host_of(origin)
    if not host or origin not in (f"http://{host}", f"https://{host}"):
        raise RecipeError("--origin", expected="scheme and host of a page, as https://example.org", found=repr(origin), fix="correct it")


def _host_of(origin: str) -> str:
    """Its host and port; "" when it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()  # of equal length, as compare_digest wants
