"""`vllm serve` with the plugin: real HTTP, the real openai client, and starts that end with a sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm_engine import QUIET, Ask, answers, installed
from vllm_specs import World, make_world, prompts

from demur.lm.chat import chat_ids
from demur.record import to_json, write_json
from demur.spec import Positions
from demur.types import Message

if not installed():
    pytest.skip("needs vLLM", allow_module_level=True)
openai = pytest.importorskip("openai")

NEW = 10


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("serve"))


@contextmanager
def served(world: World, **settings: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as cache:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        # what `vllm serve` runs; the command itself does not start where vLLM was installed under another name
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(world.model)]
        command += ["--port", str(port)]
        command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
        command += ["--served-model-name", "tiny", "--block-size", "32", "--max-num-seqs", "32"]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("DEMUR_", "VLLM_"))}
        env = {**inherited, **QUIET, "VLLM_CACHE_ROOT": cache, "DEMUR_SPECS": str(world.specs), **settings}
        log = Path(cache) / "log"
        with log.open("w") as out:
            server = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(2400):
                if server.poll() is not None:
                    raise RuntimeError(log.read_text()[-6000:])
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=2)
                    break
                except OSError:
                    time.sleep(0.1)
            yield address
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture(scope="module")
def address(world: World) -> Iterator[str]:
    with served(world) as found:
        yield found


def client_of(address: str) -> Any:
    return openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=300)


def complete(client: Any, ids: list[int], spec: Any = None, **more: Any) -> list[int]:
    """Token ids: the tiny model's are seldom text."""
    extra: dict[str, Any] = {"vllm_xargs": {"demur_spec": spec}} if spec is not None else {}
    extra |= {"return_token_ids": True, **more.pop("extra_body", {})}
    given: dict[str, Any] = {"temperature": 0, "max_tokens": NEW, "extra_body": extra, **more}
    return written(client.completions.create(model="tiny", prompt=ids, **given).choices[0])


def written(choice: Any) -> list[int]:
    """Without the end-of-turn token, id 2."""
    return [one for one in choice.token_ids if one != 2]


def expected(world: World, ids: list[int], spec: Any) -> list[int]:
    return world.expected([Ask(ids, spec, NEW)])[0]


def test_named_inline_and_unsteered_requests_at_once(world: World, address: str) -> None:
    specs = ["clamp", "mixed", "gated", "generation", "unsteered", None, json.dumps(to_json(world.find("scale")))]
    asked = [(ids, specs[i % len(specs)]) for i, ids in enumerate(prompts(21))]
    with client_of(address) as client, ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda one: complete(client, *one), asked))
    assert said == [expected(world, ids, spec) for ids, spec in asked]


def test_chat(world: World, address: str) -> None:
    ids = chat_ids(world.lm, [Message("user", "How are you?")])
    for spec in ("clamp", "gated-prompt", "unsteered"):
        with client_of(address) as client:
            answer = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "How are you?"}],
                temperature=0,
                max_completion_tokens=NEW,
                extra_body={"vllm_xargs": {"demur_spec": spec}, "return_token_ids": True},
            )
        assert written(answer.choices[0]) == expected(world, ids, spec)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": ({"demur_spec": "nothing"}, "there is no spec 'nothing'; there are"),
    "no JSON": ({"demur_spec": "{nothing"}, "the spec is not JSON"),
    "a number": ({"demur_spec": 3}, "expected a name or an object"),
    "no such latent": ({"demur_spec": "LATENT"}, "latent 9999 does not exist"),
    "no such op": ({"demur_spec": '{"edits": [{"op": "raise"}]}'}, "op"),
    "no room at the block": ({"demur_spec": "BLOCK"}, "this server has room for"),
    "system prompt": ({"demur_spec": '{"system": "Be kind."}'}, "has a system prompt"),
    "turns": ({"demur_spec": "TURNS"}, "not followed inside"),
    "a field that is none": ({"demur": "clamp"}, "the spec's is 'demur_spec'"),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", WRONG)
def test_a_spec_that_cannot_be_carried_out_is_status_400(world: World, address: str, case: str, stream: bool) -> None:
    xargs, said = WRONG[case]
    raw = to_json(world.find("clamp"))
    edit = raw["edits"][0]
    made = {
        "LATENT": {"edits": [{**edit, "latents": [9999]}]},
        "BLOCK": {"edits": [{**edit, "hookpoint": "layers.0.resid_post"}]},
        "TURNS": to_json(replace(world.find("clamp"), positions=Positions("user"))),
    }
    xargs = {key: json.dumps(made[value]) if value in made else value for key, value in xargs.items()}
    with client_of(address) as client, pytest.raises(openai.BadRequestError, match=re.escape(said)):
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "How are you?"}],
            max_completion_tokens=4,
            stream=stream,
            extra_body={"vllm_xargs": xargs},
        )


def test_beams_are_refused_when_steered(address: str) -> None:
    with client_of(address) as client:
        beams = {"use_beam_search": True}
        with pytest.raises(openai.BadRequestError, match="beam search cannot be steered"):
            complete(client, [5, 6, 7], "clamp", n=2, extra_body={**beams, "vllm_xargs": {"demur_spec": "clamp"}})
        assert complete(client, [5, 6, 7], n=2, extra_body=beams)


def test_metrics(world: World, address: str) -> None:
    def read(name: str, label: str = "") -> float:
        text = urllib.request.urlopen(f"{address}/metrics", timeout=20).read().decode()
        found = re.search(rf"^{name}{re.escape(label)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    names = {
        "demur_requests_total": '{spec="clamp"}',
        "demur_tokens_steered_total": '{spec="clamp"}',
        "demur_requests_gated_total": '{spec="gated"}',
        "demur_requests_refused_total": "",
    }
    before = {name: read(name, label) for name, label in names.items()}
    opened = read("demur_gates_opened_total", '{spec="gated"}')
    with client_of(address) as client:
        ids = prompts(16)
        for one in ids:
            complete(client, one, "gated")
        complete(client, ids[0], "clamp", extra_body={"ignore_eos": True, "vllm_xargs": {"demur_spec": "clamp"}})
        with pytest.raises(openai.BadRequestError):
            complete(client, ids[0], "nothing")
    grown = {name: read(name, label) - before[name] for name, label in names.items()}
    assert grown["demur_requests_total"] == 1
    assert grown["demur_requests_gated_total"] == 16
    assert grown["demur_requests_refused_total"] >= 1
    assert NEW - 1 <= grown["demur_tokens_steered_total"] <= len(ids[0]) + NEW - 2
    assert 0 < read("demur_gates_opened_total", '{spec="gated"}') - opened < 16


def test_a_default_that_the_operator_has_locked(world: World) -> None:
    ids = prompts(1)[0]
    with served(world, DEMUR_DEFAULT_SPEC="mixed", DEMUR_LOCK_SPEC="1") as address, client_of(address) as client:
        assert complete(client, ids) == expected(world, ids, "mixed")
        assert complete(client, ids, "mixed") == expected(world, ids, "mixed")
        for other in ("clamp", "unsteered"):
            with pytest.raises(openai.BadRequestError, match="its operator has chosen"):
                complete(client, ids, other)
        with pytest.raises(openai.BadRequestError, match="beam search cannot be steered"):
            complete(client, ids, n=2, extra_body={"use_beam_search": True})


STARTS: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "bad spec": ({"DEMUR_SPECS": "BAD"}, {}, "the spec 'kind' does not fit: the spec has a system prompt"),
    "default": ({"DEMUR_DEFAULT_SPEC": "nothing"}, {}, "DEMUR_DEFAULT_SPEC cannot be used: there is no spec 'nothing'"),
    "front end": ({"VLLM_USE_RUST_FRONTEND": "1"}, {}, "VLLM_USE_RUST_FRONTEND is set"),
    "speculation": (
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "does not work with speculative decoding",
    ),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_start_that_would_steer_wrongly_ends_with_a_sentence(world: World, tmp_path: Path, case: str) -> None:
    env, engine, said = STARTS[case]
    if env.get("DEMUR_SPECS") == "BAD":
        shutil.copytree(world.specs, tmp_path / "specs")
        write_json(tmp_path / "specs" / "kind.json", to_json(replace(world.find("clamp"), system="Be kind.")))
        env = {**env, "DEMUR_SPECS": str(tmp_path / "specs")}
    given = {"DEMUR_SPECS": str(world.specs), **env}
    with pytest.raises(RuntimeError, match=re.escape(said)):
        answers(world.model, [[Ask([5, 6, 7])]], given, set(), **engine)
