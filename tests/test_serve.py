"""`demur serve`: real HTTP, the real openai client, hostile clients, and answers that are what they are alone."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from demur.errors import DemurError, InputError, MissingExtraError, NotFoundError
from demur.lm.chat import chat_ids
from demur.lm.generate import generate
from demur.lm.load import LanguageModel, load
from demur.record import read_jsonl, to_json, write_json
from demur.results import Turn
from demur.sae.store import SaeConfig, SaeModel, load_sae, save_sae
from demur.serve import run
from demur.serve.app import Server
from demur.spec import Edit, LatentGate, SteeringSpec
from demur.steering.spec_book import SpecBook, read_offered
from demur.steering.steer import steer
from demur.testing import tiny_model, tiny_sae
from demur.types import Message
from demur.verbs.attack import attack
from demur.verbs.attack_config import Attack, AttackConfig
from demur.verbs.serve_config import Serve

openai = pytest.importorskip("openai")

PLACE = "layers.1.resid_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `model`, and eight specs with their SAE in `specs`."""
    root = tmp_path_factory.mktemp("serve")
    lm = tiny_model()
    lm.model.save_pretrained(root / "model")
    lm.tokenizer.save_pretrained(root / "model")
    saved = load(str(root / "model"))
    sae = tiny_sae()
    config = SaeConfig(32, 96, 8, PLACE, SaeModel(saved.name, saved.fingerprint, saved.n_blocks))
    save_sae(root / "specs" / "sae", sae, config)
    name = load_sae(root / "specs" / "sae").hash
    for i in range(7):
        spec = SteeringSpec((Edit(PLACE, name, (i,), 4.0 + i),))
        write_json(root / "specs" / f"clamp-{i}.json", to_json(spec))
    gated = SteeringSpec((Edit(PLACE, name, (9,), 9.0),), gate=LatentGate(PLACE, name, 3, 1.0))
    write_json(root / "specs" / "gated.json", to_json(gated))
    return root


@contextmanager
def served(config: Serve) -> Iterator[tuple[Server, str]]:
    """A server in a thread of its own, and its address."""
    with run._listen(replace(config, port=0)) as listening:
        server, app = run.prepare(config)
        running = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not running.started:
                time.sleep(0.01)
            yield server, f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[Server, str]]:
    with served(Serve(model=str(folder / "model"), name="tiny", spec=(folder / "specs",), slots=16)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: tuple[Server, str]) -> Iterator[Any]:
    with openai.OpenAI(base_url=server[1] + "/v1", api_key="none", max_retries=0) as found:
        yield found


def alone(server: Server, text: str, name: str, n: int) -> tuple[list[int], str]:
    """Token ids and text of the greedy answer to a user turn."""
    lm: LanguageModel = server.engine.lm
    spec = server.book.find([name])
    with steer(lm, spec, server.engine._saes):
        ids = generate(lm, [chat_ids(lm, [Message("user", text)])], n)[0].ids
    return ids, str(lm.tokenizer.decode(ids, skip_special_tokens=True))


def said(client: Any, text: str, **kwargs: Any) -> Any:
    given = {"model": "tiny", "temperature": 0, "max_completion_tokens": 12} | kwargs
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **given)


def test_models_are_the_model_and_its_specs(server: tuple[Server, str], client: Any) -> None:
    found = {model.id: model for model in client.models.list()}
    assert set(found) == {"tiny", "gated", *(f"clamp-{i}" for i in range(7))}
    assert found["tiny"].spec == "unsteered"
    assert client.models.retrieve("clamp-3").spec == server[0].book.specs["clamp-3"].hash
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


@pytest.mark.parametrize("name", ["unsteered", "clamp-1", "clamp-6", "gated"])
def test_an_answer_is_what_the_engine_says_alone(server: tuple[Server, str], client: Any, name: str) -> None:
    ids, text = alone(server[0], "How are you?", name, 12)
    ways: list[dict[str, Any]] = [
        {"extra_body": {"demur_spec": name}},
        {"extra_body": {"vllm_xargs": {"demur_spec": name}}},
    ]
    if name != "unsteered":
        inline = to_json(server[0].book.specs[name])
        ways += [{"model": name}, {"extra_body": {"demur_spec": inline}}]
        ways += [{"extra_body": {"vllm_xargs": {"demur_spec": json.dumps(inline)}}}]
    for way in ways:
        answer = said(client, "How are you?", **way)
        assert answer.choices[0].message.content == text
        assert answer.usage.prompt_tokens == len(chat_ids(server[0].engine.lm, [Message("user", "How are you?")]))
        assert answer.usage.completion_tokens in (len(ids), len(ids) + 1)
        assert answer.choices[0].finish_reason == ("length" if len(ids) == 12 else "stop")
        stream = said(client, "How are you?", stream=True, stream_options={"include_usage": True}, **way)
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage == answer.usage
        assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason


def test_choices_seeds_stops_and_log_probabilities(server: tuple[Server, str], client: Any) -> None:
    def texts(**kwargs: Any) -> list[str]:
        found = said(client, "Go on", temperature=1.0, n=3, **kwargs)
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
        return [choice.message.content for choice in found.choices]

    assert texts(seed=4) == texts(seed=4)
    assert len(set(texts(seed=4))) == 3
    assert texts(seed=4) != texts(seed=40)
    _, text = alone(server[0], "Go on", "clamp-2", 12)
    stop = text[4:6]
    cut = said(client, "Go on", model="clamp-2", stop=[stop, "never"])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    told = said(client, "Go on", model="clamp-2", logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert all(one.top_logprobs[0].logprob == one.logprob <= 0 for one in told)
    assert all(len(one.top_logprobs) == 3 for one in told)
    streamed = [
        c.choices[0].logprobs.content
        for c in said(client, "Go on", model="clamp-2", logprobs=True, stream=True)
        if c.choices[0].logprobs
    ]
    assert [one.logprob for some in streamed for one in some] == pytest.approx([one.logprob for one in told], abs=1e-5)


def test_text_completions(server: tuple[Server, str], client: Any) -> None:
    lm = server[0].engine.lm
    texts = ["Once upon", "The answer is"]
    rows = [lm.tokenizer(text).input_ids for text in texts]
    expected = [generate(lm, [row], 8)[0].text for row in rows]
    for prompt in (texts, rows):
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0, logprobs=2)
        assert [choice.text.strip() for choice in found.choices] == expected
        offsets = found.choices[0].logprobs.text_offset
        assert offsets[0] == 0
        assert offsets == sorted(offsets)
    stream = client.completions.create(model="tiny", prompt=texts[0], max_tokens=8, temperature=0, stream=True)
    assert "".join(event.choices[0].text for event in stream).strip() == expected[0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": "gpt-4"}, "no model 'gpt-4'"),
    ({"demur_spec": "nothing"}, "no spec 'nothing'"),
    ({"demur_spec": {"edits": [{"hookpoint": PLACE, "sae": "no", "latents": [1], "value": 1}]}}, "the SAE no"),
    ({"demur_spec": {"edits": [{"hookpoint": "nowhere", "sae": "no", "latents": [1]}]}}, "nowhere"),
    ({"demur_spec": "{broken"}, "not JSON"),
    ({"demur_spec": {"edit": []}}, "edit"),
    ({"demur_spec": "clamp-1", "model": "clamp-2"}, "two different specs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": []}, "tools is not supported"),
    ({"demur_spec": {"edits": [{"hookpoint": PLACE, "sae": "no", "latents": list(range(2000))}]}}, "256 at most"),
    ({"demur_spec": {"edits": [{"hookpoint": PLACE, "sae": "no", "latents": [1], "value": 1e300}]}}, "finite"),
    ({"demur_spec": '{"edits": ' + "9" * 5000 + "}"}, "not JSON"),
    ({"logit_bias": {"9" * 5000: 1}}, "no token id"),
    ({"messages": [1] * 1000}, "messages"),
    ({"max_completion_tokens": 10**6}, "the model reads at most 512"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, "the prompt has"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": float("nan")}, "finite"),
    ({"n": 65}, "at most 64"),
    ({"logit_bias": {"99999": 1}}, "99999"),
    ({"top_logprobs": 3}, "needs logprobs"),
    ({"stop": ""}, "stop"),
    ({"seed": 1.5}, "seed"),
]


def test_nulls_and_what_clients_send_back_are_passed_over(server: tuple[Server, str]) -> None:
    back = {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None, "function_call": None}
    turns = [{"role": "user", "content": "Hi", "type": "text"}, back, {"role": "user", "content": "Hm"}]
    ask = {"model": "tiny", "messages": turns, "max_tokens": 1, "tools": None, "tool_choice": None}
    assert post(server[1], json.dumps(ask).encode())[0] == 200


@pytest.mark.parametrize(("wrong", "says"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(server: tuple[Server, str], wrong: dict[str, Any], says: str) -> None:
    good = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 2}
    status, body = post(server[1], json.dumps(good | wrong).encode())
    assert 400 <= status < 500
    assert says in body["error"]["message"]
    assert "\n" not in body["error"]["message"]
    assert post(server[1], json.dumps(good).encode())[0] == 200


def post(address: str, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    import http.client

    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None
    finally:
        connection.close()


def get(address: str, path: str) -> str:
    import urllib.request

    with urllib.request.urlopen(address + path, timeout=30) as response:
        return str(response.read().decode())


def quiet(server: Server) -> bool:
    """Wait until nothing runs."""
    for _ in range(500):
        if not server.engine.running and not server.engine.waiting:
            return True
        time.sleep(0.02)
    return False


def test_a_thousand_malformed_bodies_do_no_harm(server: tuple[Server, str], client: Any) -> None:
    import random

    rng = random.Random(0)
    good = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "Hi there"}], "max_tokens": 1}
    ).encode()
    junk: list[Any] = [None, True, -1, 1e308, "", "x", [], {}, [[]], {"a": 1}, "\ud800", 2**70]
    seen = set()
    for number in range(1000):
        body = bytearray(good)
        if number % 2:
            for _ in range(rng.randrange(1, 6)):
                place = rng.randrange(len(body))
                body[place : place + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
        else:
            value = json.loads(good)
            value[rng.choice(["model", "messages", "max_tokens", "demur_spec", "stop", "n", "seed", "stream"])] = (
                rng.choice(junk)
            )
            body = bytearray(json.dumps(value).encode())
        status, _ = post_any(server[1], bytes(body))
        seen.add(status)
        assert status == 200 or 400 <= status < 500, bytes(body)
    assert 400 in seen
    assert said(client, "And now?").choices
    assert quiet(server[0])


def post_any(address: str, body: bytes) -> tuple[int, bytes]:
    import http.client

    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_large_slow_and_vanishing_clients(folder: Path) -> None:
    config = Serve(
        model=str(folder / "model"),
        name="tiny",
        spec=(folder / "specs",),
        slots=2,
        max_body=10_000,
        body_timeout=0.5,
        waiting=2,
        most_answers=2,
    )
    with served(config) as (server, address):
        assert post(address, b" " * 20_000)[0] == 413
        host, port = address.removeprefix("http://").split(":")

        def raw(head: str, body: bytes = b"") -> socket.socket:
            connection = socket.create_connection((host, int(port)), timeout=20)
            connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
            return connection

        # a body without a length, that never ends: cut off at its limit
        with raw("Transfer-Encoding: chunked\r\nContent-Type: application/json") as endless:
            for _ in range(12):
                endless.sendall(b"3e8\r\n" + b" " * 1000 + b"\r\n")
            assert b" 413 " in endless.recv(100)
        with raw("Content-Length: 500\r\nContent-Type: application/json", b'{"model"') as slow:
            assert b" 408 " in slow.recv(100)
        with raw("Content-Length: nonsense") as wrong:
            assert b" 400 " in wrong.recv(100)
        # clients that leave: what they asked for is not written to its end
        long = {"model": "gated", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400, "stream": True}
        for stream in (True, False):
            body = json.dumps(long | {"stream": stream, "logit_bias": {"2": -100}}).encode()
            leaving = [raw(f"Content-Length: {len(body)}\r\nContent-Type: application/json", body) for _ in range(2)]
            while server.engine.running < 2:
                time.sleep(0.01)
            if stream:
                leaving[0].recv(200)
            for one in leaving:
                one.close()
            assert quiet(server)
        # and one that stays but does not read
        body = json.dumps(long).encode()
        with raw(f"Content-Length: {len(body)}\r\nContent-Type: application/json", body):
            assert quiet(server)
        assert json.loads(get(address, "/health"))["status"] == "ok"
        assert post(address, json.dumps(long | {"stream": False, "max_tokens": 3}).encode())[0] == 200


def test_too_many_and_too_slow_answers(folder: Path) -> None:
    config = Serve(model=str(folder / "model"), name="tiny", slots=1, waiting=1, timeout=0.6, most_answers=3)
    with served(config) as (server, address):
        ask: dict[str, Any] = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hi"}],
            "logit_bias": {"2": -100},
        }
        assert post(address, json.dumps(ask | {"n": 3, "max_tokens": 1}).encode())[0] == 429
        begin = time.monotonic()
        step = server.engine.lm.model.forward

        def slowly(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.05)
            return step(*args, **kwargs)

        server.engine.lm.model.forward = slowly
        status, body = post(address, json.dumps(ask | {"max_tokens": 400}).encode())
        assert status == 504, body
        assert time.monotonic() - begin < 5
        assert quiet(server)
        server.engine.lm.model.forward = step
        assert post(address, json.dumps(ask | {"max_tokens": 2}).encode())[0] == 200


def test_an_error_in_the_model_breaks_off_answers_and_not_the_server(folder: Path) -> None:
    with served(Serve(model=str(folder / "model"), name="tiny")) as (server, address):
        ask: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
        step = server.engine.lm.model.forward

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("out of memory")

        server.engine.lm.model.forward = broken
        status, body = post(address, json.dumps(ask).encode())
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert "RuntimeError" in body["error"]["message"]
        server.engine.lm.model.forward = step
        assert post(address, json.dumps(ask).encode())[0] == 200


def test_a_spec_that_breaks_the_numbers_breaks_no_other_answer(server: tuple[Server, str], client: Any) -> None:
    name = server[0].engine._saes[0].hash
    edit = {"hookpoint": PLACE, "sae": name, "latents": list(range(40)), "value": 3e38, "op": "add"}
    spec = {"edits": [edit], "positions": {"where": "generation"}}
    _, text = alone(server[0], "Tell me", "clamp-1", 60)

    def hostile() -> None:
        for _ in range(6):
            with pytest.raises(openai.BadRequestError, match="no numbers"):
                said(client, "Hi", temperature=1.0, logit_bias={"2": -100}, extra_body={"demur_spec": spec})

    beside = threading.Thread(target=hostile)
    beside.start()
    for _ in range(4):
        assert said(client, "Tell me", model="clamp-1", max_completion_tokens=60).choices[0].message.content == text
    beside.join()
    assert quiet(server[0])
    assert len(server[0].engine._steering._specs) == 9  # type: ignore[union-attr]


def test_long_answers_wait_for_room(folder: Path) -> None:
    with served(Serve(model=str(folder / "model"), name="tiny", slots=8, room=300)) as (server, address):
        ask = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "logit_bias": {"2": -100}}
        body = json.dumps(ask | {"max_tokens": 100, "n": 6}).encode()
        most = []
        step = server.engine.lm.model.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            most.append(server.engine.running)
            return step(*args, **kwargs)

        server.engine.lm.model.forward = watched
        status, answer = post(address, body)
        assert (status, len(answer["choices"])) == (200, 6)
        assert max(most) == 2


def test_when_the_engine_dies_everybody_is_told(folder: Path) -> None:
    with served(Serve(model=str(folder / "model"), name="tiny")) as (server, address):
        ask = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}).encode()

        def dies(*args: Any) -> None:
            raise RuntimeError("gone")

        server.engine._leave = dies  # type: ignore[method-assign]
        assert post(address, ask)[0] == 500
        assert post(address, ask)[0] == 503
        with pytest.raises(Exception, match="503"):
            get(address, "/health")


def test_a_locked_system_prompt_cannot_be_talked_away(folder: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "polite.json", to_json(SteeringSpec(system="Be polite.")))
    config = Serve(model=str(folder / "model"), name="tiny", spec=(tmp_path,), default="polite", lock=True)
    with served(config) as (server, address):
        turns = [{"role": "system", "content": "Be rude."}, {"role": "user", "content": "Hi"}]
        ask = {"model": "tiny", "messages": turns, "max_tokens": 8, "temperature": 0}
        status, body = post(address, json.dumps(ask).encode())
        assert status == 200
        lm = server.engine.lm
        ids = chat_ids(lm, [Message("system", "Be polite.\n\nBe rude."), Message("user", "Hi")])
        assert body["usage"]["prompt_tokens"] == len(ids)
        plain = json.dumps({"model": "tiny", "prompt": "Hi", "max_tokens": 2}).encode()
        assert post(address, plain, "/v1/completions")[0] == 400


def test_key_default_and_lock(folder: Path) -> None:
    config = Serve(
        model=str(folder / "model"), name="tiny", spec=(folder / "specs",), default="clamp-4", lock=True, key="s3cret"
    )
    with served(config) as (server, address):
        ask = json.dumps(
            {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0}
        )
        assert post(address, ask.encode())[0] == 401
        assert post(address, ask.encode(), Authorization="Bearer wrong")[0] == 401
        key = {"Authorization": "Bearer s3cret"}
        status, body = post(address, ask.encode(), **key)
        assert status == 200
        assert body["choices"][0]["message"]["content"] == alone(server, "Hi", "clamp-4", 6)[1]
        for wrong in ("unsteered", "clamp-1"):
            status, body = post(address, json.dumps(json.loads(ask) | {"demur_spec": wrong}).encode(), **key)
            assert status == 400
            assert "operator" in body["error"]["message"]
        assert [model.id for model in server.models()] == ["tiny"]
        assert "demur_answers_total" in get(address, "/metrics")


def test_metrics_count_tokens_and_gates(server: tuple[Server, str], client: Any) -> None:
    def counted(line: str) -> float:
        found = [x for x in get(server[1], "/metrics").splitlines() if x.startswith(line)]
        return float(found[0].split()[-1]) if found else 0.0

    steered, written = 'demur_tokens_steered_total{spec="clamp-5"}', 'demur_tokens_written_total{spec="clamp-5"}'
    before = counted(steered), counted(written)
    answer = said(client, "Count", model="clamp-5")
    read = answer.usage.prompt_tokens - 1 + answer.usage.completion_tokens - 1
    assert quiet(server[0])
    assert (counted(steered) - before[0], counted(written) - before[1]) == (read, answer.usage.completion_tokens)
    opened, shut = (f'demur_gates_total{{opened="{told}",spec="gated"}}' for told in ("yes", "no"))
    before = counted(opened), counted(shut)
    said(client, "Count", model="gated")
    assert quiet(server[0])
    after = counted(opened) - before[0], counted(shut) - before[1]
    with steer(server[0].engine.lm, server[0].book.specs["gated"], server[0].engine._saes) as steering:
        generate(server[0].engine.lm, [chat_ids(server[0].engine.lm, [Message("user", "Count")])], 12)
    fired = sum(steering.counts()[0].steered) > 0
    assert after == ((1, 0) if fired else (0, 1))


def test_an_answer_is_counted_before_it_is_handed_over(
    server: tuple[Server, str], client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = server[0].engine._metrics
    count = metrics.answer

    def late(*told: Any) -> None:
        time.sleep(0.3)
        count(*told)

    def written() -> float:
        name, spec = "demur_tokens_written_total", {"spec": "clamp-5"}
        return metrics._all.get_sample_value(name, spec) or 0.0

    monkeypatch.setattr(metrics, "answer", late)
    before = written()
    answer = said(client, "Count", model="clamp-5")
    assert written() - before == answer.usage.completion_tokens


def test_64_streams_under_8_specs_are_neither_crossed_nor_lost(server: tuple[Server, str]) -> None:
    import resource

    names = ["unsteered", *(f"clamp-{i}" for i in range(6)), "gated"]
    asked = [(f"Question {i % 16}", names[i % 8]) for i in range(64)]
    expected = {pair: alone(server[0], *pair, 20)[1] for pair in asked}

    async def everything() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server[1] + "/v1", api_key="none", max_retries=0, timeout=120) as client:

            async def one(text: str, name: str) -> str:
                stream = await client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": text}],
                    stream=True,
                    temperature=0,
                    max_completion_tokens=20,
                    extra_body={"demur_spec": name},
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(*pair) for pair in asked))

    assert asyncio.run(everything()) == [expected[pair] for pair in asked]
    assert quiet(server[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(4):
        assert asyncio.run(everything()) == [expected[pair] for pair in asked]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 40_000, f"{grown} KB more"


def test_the_schema_holds_under_generated_requests(server: tuple[Server, str]) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_url(server[1] + "/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 6
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=25,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def holds(case: Any) -> None:
            # a well-formed request may still name a model that is not there
            case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=60)

        holds()
    assert quiet(server[0])


def test_folders_of_specs_are_read_whole_or_refused(folder: Path, tmp_path: Path) -> None:
    offered = read_offered([folder / "specs"])
    assert len(offered.specs) == 8
    assert [sae.hash for sae in offered.saes] == [load_sae(folder / "specs" / "sae").hash]
    with pytest.raises(InputError, match="holds no spec files"):
        read_offered([tmp_path])
    with pytest.raises(InputError, match="two specs"):
        read_offered([folder / "specs", folder / "specs" / "gated.json"])
    write_json(tmp_path / "a b.json", to_json(SteeringSpec()))
    with pytest.raises(InputError, match="rename the file"):
        read_offered([tmp_path])
    with pytest.raises(NotFoundError, match="no spec 'x'"):
        SpecBook({}, "x")


def test_what_cannot_be_served_is_said_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(folder / "model")
    with pytest.raises(InputError, match="give --default"):
        Serve(lock=True)
    with pytest.raises(NotFoundError, match="no spec 'x'"):
        run.prepare(Serve(model=model, default="x"))
    write_json(tmp_path / "wrong.json", to_json(SteeringSpec((Edit("layers.9.resid_post", "0", (1,), 2.0),))))
    with pytest.raises(DemurError, match="'wrong'"):
        run.prepare(Serve(model=model, spec=(tmp_path,)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="choose another --port"):
            run.serve(Serve(model=model, port=taken.getsockname()[1]))
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"demur\[serve\]"):
        run.serve(Serve(model=model))


def test_attacks_reach_what_is_served(server: tuple[Server, str], tmp_path: Path) -> None:
    served_names = ("tiny", "clamp-3")
    what = AttackConfig(
        objective=("stalking",), seeds=2, max_new_tokens=4, target_endpoint=f"{server[1]}/v1", target=served_names
    )
    report = attack(Attack(tmp_path / "run", config=what))
    assert tuple(side.label for side in report.sides) == served_names
    replies = {(t.spec, t.user): t.reply for t in read_jsonl(Turn, tmp_path / "run" / "turns.jsonl") if t.number == 0}
    for (name, user), said_there in replies.items():
        lm = server[0].engine.lm
        spec = server[0].book.find([None if name == "tiny" else name])
        with steer(lm, spec, server[0].engine._saes):
            row = chat_ids(lm, [Message("system", what.system), Message("user", user)])
            assert said_there == generate(lm, [row], 4)[0].text
