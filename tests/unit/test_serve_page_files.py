"""The web page as it is sent: types, headers, caching; that it needs nothing from elsewhere, and no key."""

import re
import urllib.error
import urllib.request

import pytest
from running_server import RunningServer

from nim4.serve.web_page import FOLDER, INDEX, POLICY, TYPES, read_page

NAMES = sorted(path.name for path in FOLDER.iterdir())
ELSEWHERE = re.compile(r"(?:https?:|wss?:)?//[\w.-]+\.\w+|\bdata:|@import|url\(")


def ask(server, path, method="GET", **headers):
    """(status, headers, body)"""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.mark.parametrize("name", NAMES)
def test_each_file_has_its_type_and_is_asked_for_again(server, name):
    path = "/" if name == INDEX else f"/page/{name}"
    status, headers, body = ask(server, path)
    assert (status, body) == (200, (FOLDER / name).read_bytes())
    assert headers["content-type"] == TYPES[(FOLDER / name).suffix]
    assert headers["cache-control"] == "no-cache"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].split("; ") == [f"{what} {where}" for what, where in POLICY.items()]
    assert ask(server, path, if_none_match=f'"other", W/{headers["etag"]}')[::2] == (304, b"")
    assert ask(server, path, if_none_match='"other"')[0] == 200
    assert ask(server, path, "HEAD")[::2] == (200, b"")


def test_the_policy_lets_nothing_in():
    assert POLICY["default-src"] == "'none'"
    assert set(POLICY.values()) <= {"'none'", "'self'", "'script'"}, "nothing inline, nothing evaluated, no other host"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_named_that_lies_elsewhere(name):
    text = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not ELSEWHERE.findall(text)


def test_every_file_is_used_and_there():
    """By the page, or by a module that it loads."""
    used = {INDEX}
    for name in NAMES:
        text = (FOLDER / name).read_text(encoding="utf-8")
        used |= set(re.findall(r'(?:src|href)="page/([^"]+)"', text)) | set(re.findall(r'(?:from |URL\()"(?:\./)?([\w-]+\.js)"', text))
    assert sorted(used) == NAMES


def test_nothing_else_is_served(server):
    for path in ("/page/", "/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py", "/index.html"):
        status, headers, body = ask(server, path)
        assert (status, headers["content-type"]) == (404, "application/json")
        assert b"not_found" in body
    assert ask(server, "/", "POST")[0] == 405


def test_what_is_not_of_the_page_is_left_out(tmp_path, monkeypatch):
    for name in (INDEX, "main.js", "main.js~", ".DS_Store"):
        (tmp_path / name).write_text("x")
    monkeypatch.setattr("nim4.serve.web_page.FOLDER", tmp_path)
    assert sorted(read_page()) == [INDEX, "main.js"]


def test_the_page_needs_no_key_but_what_it_asks_does(model):
    with RunningServer(model, keys=("secret",)) as server:
        assert ask(server, "/")[0] == ask(server, "/page/main.js")[0] == 200
        assert ask(server, "/v1/about")[0] == 401
        assert ask(server, "/v1/about", authorization="Bearer secret")[0] == 200
        assert ask(server, "/", origin="http://example.org")[1]["access-control-allow-origin"] is None


def test_what_the_server_says_about_itself(server):
    with server.stream():
        status, headers, body = ask(server, "/v1/about")
    assert (status, headers["cache-control"]) == (200, "no-store")
    assert b'"free_streams":63' in body
    assert b'"indexes":[]' in body
