"""A chat model that chooses names, on a server that is slow, fails, is gone or talks nonsense; its answers are never lost."""

import json
import time
from collections import Counter

import pytest
from chat_server import ChatServer, by_length

from nim4.config import RecipeError
from nim4.corpus.entity_filter import BATCH_PHRASES, AnswerCache, Endpoint, choose_by_model, read_answer

PHRASES = Counter({"周杰伦": 3, "公司": 9, "Apple Pay": 2})
NAMES = {"周杰伦": 3, "Apple Pay": 2}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def choose(server, cache, counts=PHRASES, **settings):
    return choose_by_model(counts, Endpoint(server.url, "qwen", **({"wait_s": 0.001, "timeout_s": 10.0} | settings)), cache)


def test_the_model_chooses_and_is_asked_once(tmp_path):
    with ChatServer() as server:
        assert choose(server, tmp_path / "cache.jsonl", key="secret") == NAMES
        (headers, path, body, phrases), *others = server.requests
        assert not others
        assert (path, body["model"], body["temperature"], headers["Authorization"]) == ("/v1/chat/completions", "qwen", 0, "Bearer secret")
        assert phrases == sorted(PHRASES)
        assert choose(server, tmp_path / "cache.jsonl") == NAMES
        assert choose(server, tmp_path / "cache.jsonl", PHRASES + Counter({"东方明珠": 1})) == NAMES | {"东方明珠": 1}
        assert [request[3] for request in server.requests[1:]] == [["东方明珠"]]
        assert "Authorization" not in server.requests[1][0]  # no key, no header
    assert "secret" not in (tmp_path / "cache.jsonl").read_text(encoding="utf-8")
    assert choose(server, tmp_path / "cache.jsonl") == NAMES, "the server is gone, and not needed"


def test_answers_of_another_model_do_not_count(tmp_path):
    with ChatServer() as server:
        choose(server, tmp_path / "cache.jsonl")
        other = choose_by_model(PHRASES, Endpoint(server.url, "other"), tmp_path / "cache.jsonl")
    assert (other, len(server.requests)) == (NAMES, 2)


@pytest.mark.parametrize("first", [(500, 503), (429, ConnectionError), ("no idea", "[99]"), ('{"a": 1}', "[0]")], ids=str)
def test_two_failures_and_then_an_answer(tmp_path, first):
    with ChatServer(*first) as server:
        assert choose(server, tmp_path / "cache.jsonl") == NAMES
    assert len(server.requests) == 3


def test_a_slow_server_is_asked_again(tmp_path):
    def slow(phrases):
        time.sleep(0.6)
        return "[]"

    with ChatServer(slow) as server:
        assert choose(server, tmp_path / "cache.jsonl", timeout_s=0.3) == NAMES
    assert len([request for request in server.requests if request != "left alone"]) == 2


def test_waiting_grows_between_tries(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with ChatServer(*[500] * 5) as server, pytest.raises(RecipeError):
        choose(server, tmp_path / "cache.jsonl", wait_s=1.0)
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_a_server_that_goes_away_leaves_what_it_said(tmp_path):
    counts = Counter({f"地名{number:03d}": 1 for number in range(2 * BATCH_PHRASES + 1)})
    cache = tmp_path / "cache.jsonl"
    with ChatServer(by_length, by_length, *["nonsense"] * 3) as server:
        with pytest.raises(
            RecipeError, match=r"qwen: expected a JSON array of numbers, found ValueError: the answer 'nonsense'\. Fix: start"
        ) as caught:
            choose(server, cache, counts, tries=3)
        assert "\n" not in str(caught.value)
        assert len(server.requests) == 5
        assert len(cache.read_text(encoding="utf-8").splitlines()) == 2 * BATCH_PHRASES
        assert choose(server, cache, counts, tries=3) == counts
        assert [len(request[3]) for request in server.requests[5:]] == [1]


def test_nobody_listens(tmp_path):
    with ChatServer() as server:
        pass
    with pytest.raises(RecipeError, match="Connection refused"):
        choose(server, tmp_path / "cache.jsonl", tries=2)


def test_a_refusal_is_not_asked_again(tmp_path):
    with ChatServer(401) as server, pytest.raises(RecipeError, match="HTTP 401 Unauthorized"):
        choose(server, tmp_path / "cache.jsonl")
    assert len(server.requests) == 1


def test_only_http(tmp_path):
    with pytest.raises(RecipeError, match="an http address"):
        choose_by_model(PHRASES, Endpoint("file:///etc", "qwen"), tmp_path / "cache.jsonl")


def test_a_torn_line_of_the_cache_is_dropped_and_the_rest_counts(tmp_path):
    path = tmp_path / "cache.jsonl"
    whole = json.dumps({"model": "qwen", "text": "公司", "name": True}, ensure_ascii=False) + "\n"
    path.write_text(whole + whole[:20], encoding="utf-8")
    cache = AnswerCache(path, "qwen")
    assert cache["公司"] is True
    cache.add(["丽江"], [False])
    assert AnswerCache(path, "qwen")["丽江"] is False
    path.write_text(whole + "{}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="line 2"):
        AnswerCache(path, "qwen")


def test_answers_are_read_whatever_stands_around_them():
    assert read_answer("<think>maybe [1]</think>\n```json\n[2, 3]\n```", 3) == [False, True, True]
    assert read_answer("[]", 2) == [False, False]
    for useless in ("", None, "[1, 2", '["a"]', "[4]", "[0]", "[1,,2]"):
        with pytest.raises(ValueError, match=r"answer|Expecting|Illegal"):
            read_answer(useless, 3)
