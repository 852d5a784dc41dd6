"""The endpoint client against a server on localhost: what is sent, how replies are ordered, errors as sentences."""

import builtins
import threading
import time
from typing import Any

import pytest
from fake_endpoint import Request, endpoint, saying

from demur.endpoint import Endpoint
from demur.errors import DemurError, InputError, MissingExtraError, NotFoundError
from demur.types import Message


def user(text: str) -> list[Message]:
    return [Message("system", "Be brief."), Message("user", text)]


def test_conversations_go_to_chat_and_strings_as_they_stand() -> None:
    asked: list[Request] = []
    steps: list[float] = []
    with endpoint(lambda r: (200, saying(f" re: {r.text}\n")), asked) as url:
        replies = Endpoint(url + "/", "some-model", "secret", max_tokens=7, concurrency=1).say(
            [user("one"), "<|user|>\ntwo\n"], steps.append
        )
    assert replies == ["re: one", "re: <|user|>\ntwo"]
    assert steps == [1, 1]
    chat, raw = asked
    settings = {"model": "some-model", "temperature": 0.0, "max_tokens": 7}
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    assert (chat.path, chat.body) == ("/v1/chat/completions", settings | {"messages": turns})
    assert (raw.path, raw.body) == ("/v1/completions", settings | {"prompt": "<|user|>\ntwo\n"})
    assert {one.headers["authorization"] for one in asked} == {"Bearer secret"}
    assert "secret" not in repr(Endpoint(url, "m", "secret"))


def test_replies_keep_their_order_whatever_the_order_they_come_in() -> None:
    together = most = 0
    lock = threading.Lock()

    def late_first(request: Request) -> tuple[int, bytes]:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.02 * (12 - int(request.text)) % 0.1)
        with lock:
            together -= 1
        return 200, saying(request.text)

    with endpoint(late_first, []) as url:
        assert Endpoint(url, "m", concurrency=3).say([str(i) for i in range(12)]) == [str(i) for i in range(12)]
        assert Endpoint(url, "m").say([]) == []
    assert 1 < most <= 3


def test_nothing_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "private")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    asked: list[Request] = []
    with endpoint(lambda _: (200, saying("ok")), asked) as url:
        assert Endpoint(url, "m", temperature=None).say(["a", user("b")]) == ["ok", "ok"]
    assert all("authorization" not in one.headers for one in asked)
    assert not [one for one in asked if "private" in one.headers.values()]
    assert not {"temperature", "max_tokens"} & set(asked[0].body)


@pytest.mark.parametrize(
    ("status", "reply", "says"),
    [
        (401, b"wrong key secret\n", r"/v1/chat/completions answers 401 to 'm': wrong key \*\*\*$"),
        (500, b"", "answers 500 to 'm': Internal Server Error"),
        (400, b'{"error": {"message": "no such parameter"}}', "no such parameter"),
        (302, b"", "answers 302"),
        (200, b"not json", "without a text"),
        (200, b"[]", "without a text"),
        (200, b'{"choices": []}', "without a text"),
        (200, b'{"choices": [{"message": {"content": ["a"]}}]}', "without a text"),
    ],
)
def test_an_error_is_a_sentence_without_the_key(status: int, reply: bytes, says: str) -> None:
    asked: list[Request] = []
    location = "/elsewhere" if status == 302 else ""
    with endpoint(lambda _: (status, reply), asked, location) as url, pytest.raises(InputError, match=says) as raised:
        Endpoint(url, "m", "secret").say([user("a")])
    assert "secret" not in str(raised.value)
    assert [one.path for one in asked] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "reply",
    [
        b'{"error": {"message": "This model\'s maximum context length is 4096 tokens"}}',
        b'{"error": {"code": "content_filter", "message": "The response was filtered"}}',
    ],
)
def test_a_text_that_cannot_be_replied_to_has_an_empty_reply(reply: bytes) -> None:
    with endpoint(lambda r: (400, reply) if r.text == "b" else (200, saying(None)), []) as url:
        assert Endpoint(url, "m").say([user("a"), user("b")]) == ["", ""]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"url": "file:///etc/passwd"}, InputError, "expected an address"),
        ({"model": ""}, InputError, "no model"),
        ({"api_key": "bad\nkey"}, InputError, "OPENAI_API_KEY"),
        ({"concurrency": 0}, InputError, "concurrency is 0"),
        ({}, NotFoundError, r"http://127.0.0.1:9/v1/completions does not answer \(.*refused"),
    ],
)
def test_an_endpoint_that_is_none_is_a_sentence(arguments: dict[str, Any], error: type[DemurError], says: str) -> None:
    with pytest.raises(error, match=says):
        Endpoint(**{"url": "http://127.0.0.1:9/v1", "model": "m", **arguments}).say(["a"])


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "openai":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"demur\[endpoint\]"):
        Endpoint("http://127.0.0.1:9/v1", "m").say(["a"])
