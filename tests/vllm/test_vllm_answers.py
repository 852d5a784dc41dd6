"""Greedy answers of vLLM with the plugin are demur's own: alone, mixed, in chunks, cached, compiled."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_engine import Ask, Ran, answers, installed
from vllm_specs import World, make_world, prompts, same, written_for_vllm

from demur.lm.chat import chat_ids
from demur.lm.generate import generate
from demur.lm.load import load
from demur.record import to_json, write_json
from demur.sae.store import load_sae
from demur.spec import Edit, LatentGate, Positions, SteeringSpec
from demur.steering.steer import steer
from demur.types import Message

if not installed():
    pytest.skip("needs vLLM", allow_module_level=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def asks(world: World) -> list[Ask]:
    """170 prompts under all specs by turns, some unsteered, some inline, and each spec six times."""
    names = [*sorted(world.offered.specs), "unsteered", None]
    inline = [json.dumps(to_json(world.offered.specs[name])) for name in ("scale", "gated")]
    wanted = [*names, *inline]
    return [Ask(ids, wanted[i % len(wanted)], 14) for i, ids in enumerate(prompts(6 * len(wanted)))]


@pytest.fixture(scope="module")
def expected(world: World, asks: list[Ask]) -> list[list[int]]:
    found = world.expected(asks)
    plain = world.expected([ask._replace(spec=None) for ask in asks])
    moved = {str(ask.spec) for ask, one, other in zip(asks, found, plain, strict=True) if one != other}
    # a spec that changes nothing would prove nothing
    assert sorted(set(world.offered.specs) - moved) == []
    return found


def run(world: World, batches: list[list[Ask]], env: dict[str, str] | None = None, **engine: object) -> Ran:
    own = {"DEMUR_SPECS": str(world.specs), **(env or {})}
    return answers(world.model, batches, own, set(world.lm.eos_ids), **engine)


WAYS: dict[str, tuple[dict[str, str], dict[str, object]]] = {
    "eager": ({}, {}),
    "chunked": ({}, {"max_num_batched_tokens": 33, "max_num_seqs": 32}),
    "uncached": ({}, {"enable_prefix_caching": False}),
    "compiled": ({"VLLM_CPU_CI_ENV": "1"}, {"enforce_eager": False}),
    "as-on-a-gpu": ({"DEMUR_STATIC": "1", "VLLM_CPU_CI_ENV": "1"}, {"enforce_eager": False}),
    "as-on-a-gpu-chunked": ({"DEMUR_STATIC": "1"}, {"max_num_batched_tokens": 40}),
}


@pytest.mark.parametrize("way", WAYS)
def test_mixed_batches(world: World, asks: list[Ask], expected: list[list[int]], way: str) -> None:
    env, engine = WAYS[way]
    ran = run(world, [asks, asks[::-1]], env, **engine)
    same(ran.batches[0], expected, asks)
    same(ran.batches[1], expected[::-1], asks[::-1])  # now partly from the prefix cache, in other rows


def test_gates_on_probes_open_for_some_rows_of_a_batch(world: World) -> None:
    """By name, and one inline; twice, so that blocks of the prefix cache would be there."""
    names = [name for name in sorted(world.offered.specs) if name.startswith("probed")]
    inline = json.dumps(to_json(replace(world.find("probed"), edits=world.find("mixed").edits)))
    wanted = [*names, inline, "unsteered"]
    some = prompts(24, seed=7)
    asks = [Ask(ids, one, 16) for ids in some for one in wanted]
    expected = world.expected(asks)
    plain = world.expected([Ask(ids, None, 16) for ids in some for _ in wanted])
    for place, one in enumerate(wanted[:-1]):
        moved = [a != b for a, b in zip(expected[place :: len(wanted)], plain[place :: len(wanted)], strict=True)]
        assert 3 < sum(moved) < 24 - 1, one
    for env, engine in ({}, {"max_num_batched_tokens": 33}), ({"DEMUR_STATIC": "1"}, {}):
        ran = run(world, [asks, asks[::-1]], env, **engine)
        same(ran.batches[0], expected, asks)
        same(ran.batches[1], expected[::-1], asks[::-1])
        assert not any(one.cached for one, ask in zip(ran.batches[1], asks[::-1], strict=True) if ask.spec in names)


def test_alone(world: World, asks: list[Ask], expected: list[list[int]]) -> None:
    ran = run(world, [[ask] for ask in asks])
    same([batch[0] for batch in ran.batches], expected, asks)


def test_preemption(world: World) -> None:
    names = ["gated", "gated-prompt", "gated-written", "probed-monitor", "clamp", "generation", "unsteered"]
    asks = [Ask(ids, names[i % 7], 90) for i, ids in enumerate(prompts(24, seed=4))]
    ran = run(world, [asks], num_gpu_blocks_override=40, enable_prefix_caching=True)
    assert ran.preemptions > 0
    same(ran.batches[0], world.expected(asks), asks)


def test_the_prefix_cache_is_shared_by_equal_specs_only(world: World) -> None:
    ids = (prompts(8)[0] * 40)[:150]
    first = [[Ask(ids, "clamp")], [Ask(ids, "clamp")], [Ask(ids, "mixed")], [Ask(ids)], [Ask(ids, "unsteered")]]
    inline = json.dumps(to_json(world.find("clamp")))
    first += [[Ask(ids, inline)], [Ask(ids, "clamp", salt="a")], [Ask(ids, "clamp", salt="a")]]
    turns = [[Ask(ids, "generation")], [Ask(ids, "generation")]]
    gates = [[Ask(ids, "gated")], [Ask(ids, "gated")], [Ask(ids, "gated-prompt")]]
    written = world.expected([Ask(ids, "generation", 40), Ask(ids, "clamp", 40)])
    later = [[Ask(ids, "generation", 40)], [Ask([*ids, *written[0]], "generation")]]
    later += [[Ask(ids, "clamp", 40)], [Ask([*ids, *written[1]], "clamp")]]
    batches = [*first, *turns, *gates, *later]
    ran = run(world, batches)
    asks = [batch[0] for batch in batches]
    same([batch[0] for batch in ran.batches], world.expected(asks), asks)
    cached = [batch[0].cached for batch in ran.batches]
    assert cached[:8] == [0, 128, 0, 0, 128, 128, 0, 128]
    assert cached[8:13] == [0, 128, 0, 0, 0]
    # the turn after holds as prompt what was written, and steered, before
    assert cached[14] == 0
    assert cached[16] >= 160


def test_many_inline_specs_come_and_go(world: World) -> None:
    edit = to_json(world.find("clamp"))["edits"][0]
    asks = [
        Ask(ids, json.dumps({"edits": [{**edit, "latents": [i % 50], "value": 3.0 + i}]}), 6)
        for i, ids in enumerate(prompts(120, seed=2))
    ]
    ran = run(world, [asks], max_num_seqs=8)
    same(ran.batches[0], world.expected(asks), asks)


def test_without_its_settings_the_plugin_does_nothing(world: World, asks: list[Ask]) -> None:
    plain = [ask._replace(spec=None) for ask in asks[:4]]
    ran = answers(world.model, [plain], {}, set(world.lm.eos_ids))
    same(ran.batches[0], world.expected(plain), plain)


@pytest.mark.parametrize(
    "model_type", ["qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "gpt_neox", "gpt2"]
)
def test_other_architectures(tmp_path: Path, model_type: str) -> None:
    world = make_world(tmp_path, model_type)
    names = ["clamp", "scale", "two-blocks", "gated", "unsteered", "generation"]
    asks = [Ask(ids, names[i % 6], 10) for i, ids in enumerate(prompts(18))]
    ran = run(world, [asks], {"VLLM_CPU_CI_ENV": "1"}, enforce_eager=False)
    same(ran.batches[0], world.expected(asks), asks)


@pytest.mark.real
@pytest.mark.parametrize("inline", [False, True], ids=["named", "inline only"])
def test_the_embedded_model(tmp_path: Path, inline: bool) -> None:
    """Under torch.compile's own backend, as `vllm serve` starts; with no folder of specs, or with one."""
    lm = load("smollm2-135m-instruct")
    place, sae = "layers.16.resid_post", load_sae("smollm2-135m-instruct").hash
    clamp = SteeringSpec((Edit(place, sae, (957,), 8.0),))
    specs = {
        "clamp": clamp,
        "gated": replace(clamp, gate=LatentGate(place, sae, 957, 1.0)),
        "written": replace(clamp, positions=Positions("generation", every=2)),
        "add": SteeringSpec((Edit(place, sae, (957, 33), 0.5, "add", "max_act"),)),
    }
    for name, spec in specs.items():
        write_json(tmp_path / "specs" / f"{name}.json", to_json(spec))
    texts = ["How do I bake bread?", "How do I pick a lock?", "Hello!", "Write a poem about rain."]
    asks = [
        Ask(chat_ids(lm, [Message("user", text)]), json.dumps(to_json(spec)) if inline else name, 24)
        for text in texts
        for name, spec in [*specs.items(), ("unsteered", SteeringSpec())]
    ]
    env = {"DEMUR_INLINE": "1"} if inline else {"DEMUR_SPECS": str(tmp_path / "specs")}
    model = written_for_vllm(lm, tmp_path / "model")
    ran = answers(model, [asks], env, set(lm.eos_ids), enforce_eager=inline)
    everything = [*specs.values(), SteeringSpec()] * len(texts)
    with steer(lm, everything):
        expected = [answer.ids for answer in generate(lm, [list(ask.ids) for ask in asks], 24)]
    same(ran.batches[0], expected, asks)
    assert len({tuple(one) for one in expected}) > 2 * len(texts)


@pytest.mark.real
def test_what_was_compiled_without_the_plugin_is_not_used_with_it(world: World, tmp_path: Path) -> None:
    """By torch.compile's own backend, which stores what it makes; takes a minute."""
    ids = prompts(2)
    kept = {"VLLM_CACHE_ROOT": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    plain = [Ask(one) for one in ids]
    ran = answers(world.model, [plain], kept, set(world.lm.eos_ids), enforce_eager=False)
    same(ran.batches[0], world.expected(plain), plain)
    for spec in ("clamp", "gated"):
        asks = [Ask(one, spec) for one in ids]
        ran = run(world, [asks], kept, enforce_eager=False)
        same(ran.batches[0], world.expected(asks), asks)
