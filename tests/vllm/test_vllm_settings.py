"""Settings, refusals, salts and guards of the plugin, without vLLM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import demur.vllm
import demur.vllm.op
import demur.vllm.worker
from demur.errors import InputError, MismatchError
from demur.record import to_json, write_json
from demur.sae.store import LoadedSae, SaeConfig, SaeModel
from demur.spec import Edit, LatentGate, NamedGate, Positions, ProbeGate, SteeringSpec, TextGate
from demur.steering.probe import Probe
from demur.steering.spec_book import SpecBook
from demur.testing import tiny_sae
from demur.vllm.accept import check_named, check_spec
from demur.vllm.blocks import check_model_type, find_blocks, hook
from demur.vllm.needs import make_plan
from demur.vllm.offered import Known, read_known
from demur.vllm.outline import Outline
from demur.vllm.patch import check_signature, check_version, wrap
from demur.vllm.refuse import check_config, check_parallel
from demur.vllm.request import cache_salt, read_spec_text, spec_text
from demur.vllm.settings import read_settings

PLACE = "layers.0.resid_post"
CPU = torch.device("cpu")
SAE = LoadedSae(tiny_sae(), SaeConfig(32, 96, 8, PLACE, SaeModel("m", "", 2)), "sae", "")
SPEC = SteeringSpec((Edit(PLACE, "sae", (1,), 3.0),))
KNOWN = Known(SpecBook({"a": SPEC}), (SAE,), ())


def test_nothing_is_done_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings({}) is None
    for name in ("DEMUR_SPECS", "DEMUR_INLINE", "DEMUR_DEFAULT_SPEC", "DEMUR_LOCK_SPEC"):
        monkeypatch.delenv(name, raising=False)
    demur.vllm.register()  # imports no vLLM, which may not be there


def test_settings(tmp_path: Path) -> None:
    found = read_settings({"DEMUR_SPECS": str(tmp_path), "DEMUR_LOCK_SPEC": "true", "DEMUR_BLOCKS": "3, 5"})
    assert found is not None
    assert (found.specs, found.locked, found.inline, found.blocks, found.latents) == (
        (tmp_path,),
        True,
        True,
        (3, 5),
        64,
    )
    inline = read_settings({"DEMUR_INLINE": "1", "DEMUR_INLINE_LATENTS": "8"})
    assert inline is not None
    assert (inline.specs, inline.inline, inline.latents) == ((), True, 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"DEMUR_DEFAULT_SPEC": "a"}, "DEMUR_SPECS is not"),
        ({"DEMUR_SPECS": "/nowhere/at/all"}, "does not exist"),
        ({"DEMUR_INLINE": "perhaps"}, "DEMUR_INLINE is 'perhaps', expected 1 or 0"),
        ({"DEMUR_INLINE": "1", "DEMUR_BLOCKS": "x"}, "DEMUR_BLOCKS has 'x'"),
    ],
)
def test_settings_that_are_none(given: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_settings(given)


def test_a_folder_or_default_that_cannot_be_used(tmp_path: Path) -> None:
    settings = read_settings({"DEMUR_SPECS": str(tmp_path)})
    assert settings is not None
    with pytest.raises(InputError, match=r"DEMUR_SPECS cannot be used: .*holds no spec files"):
        read_known(settings)
    write_json(tmp_path / "a.json", to_json(SPEC))
    with pytest.raises(InputError, match="DEMUR_DEFAULT_SPEC cannot be used: there is no spec 'b'; there are a, unst"):
        read_known(settings._replace(default="b"))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (replace(SPEC, system="Be kind."), "has a system prompt"),
        (SteeringSpec(system="Be kind."), "has a system prompt"),
        (replace(SPEC, mode="reconstruct"), "reconstruct mode"),
        (replace(SPEC, positions=Positions("user")), "positions are 'user'"),
        (replace(SPEC, gate=LatentGate(PLACE, "sae", 1, 1.0, positions=Positions("template"))), "gate's positions are"),
        (replace(SPEC, gate=NamedGate(PLACE, "mine")), "a function of the caller's"),
        (replace(SPEC, gate=TextGate("some/classifier")), "asks some/classifier about the conversation's text"),
        (replace(SPEC, positions=Positions("generation", half_life=3.0)), "positions have a half_life"),
        (replace(SPEC, gate=LatentGate("layers.1", "sae", 1, 1.0)), "which comes after the edit"),
        (replace(SPEC, exact=False), "needs the SAE's reference statistics"),
        (SteeringSpec((Edit(PLACE, "sae", (96,), 3.0),)), "latent 96 does not exist"),
        (SteeringSpec((Edit(PLACE, "other", (1,), 3.0),)), "wants the SAE other"),
        (SteeringSpec((Edit("layers.7", "sae", (1,), 3.0),)), "outside the model"),
        (SteeringSpec((Edit(PLACE, "sae", (1,), 3.0, unit="sigma"),)), "needs the SAE's reference statistics"),
    ],
)
def test_specs_that_cannot_be_carried_out(spec: SteeringSpec, said: str) -> None:
    found = Outline(32, 2, CPU).artefacts(KNOWN)
    with pytest.raises((InputError, MismatchError), match=said):
        check_spec(spec, found)
    with pytest.raises(InputError, match="the spec 'mine' does not fit: "):
        check_named(KNOWN._replace(book=SpecBook({"mine": spec})), found)
    check_spec(SPEC, found)


READS = {
    "token": Probe(torch.ones(32), 0.0, PLACE),
    "turn": Probe(torch.ones(32), 0.0, PLACE, "turn"),
    "latents": Probe(torch.ones(2), 0.0, PLACE, "token", "sae", (1, 2)),
    "narrow": Probe(torch.ones(5), 0.0, PLACE),
    "above": Probe(torch.ones(32), 0.0, "layers.1.resid_post"),
}


@pytest.mark.parametrize(
    ("probe", "more", "said"),
    [
        ("turn", {}, "reads a whole turn"),
        ("latents", {}, "reads 2 SAE latents"),
        ("narrow", {}, "reads 5 numbers, but the model's residual is 32 wide"),
        ("above", {}, "which comes after the edit"),
        ("token", {"strength": "probability"}, "inside vLLM a gate is open or shut"),
        ("token", {"later": 0.3}, "turns are not followed inside vLLM"),
        ("token", {"monitor": 0.9, "positions": Positions("all")}, "a monitor and positions 'all'"),
        ("token", {"positions": Positions("user")}, "gate's positions are 'user'"),
    ],
)
def test_gates_on_probes_that_cannot_be_carried_out(probe: str, more: dict[str, Any], said: str) -> None:
    known = KNOWN._replace(directions=tuple(READS.values()))
    found = Outline(32, 2, CPU).artefacts(known)
    one = READS[probe]
    with pytest.raises((InputError, MismatchError), match=said):
        check_spec(replace(SPEC, gate=ProbeGate(one.hookpoint, one.hash, 0.5, **more)), found)
    check_spec(replace(SPEC, gate=ProbeGate(PLACE, READS["token"].hash, 0.5, monitor=0.9)), found)
    with pytest.raises(MismatchError, match="wants the probe other"):
        check_spec(replace(SPEC, gate=ProbeGate(PLACE, "other", 0.5)), found)


def test_an_sae_of_another_width_and_blocks_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="width 32, but the model's are 64 wide"):
        check_spec(SPEC, Outline(64, 2, CPU).artefacts(KNOWN))
    write_json(tmp_path / "a.json", to_json(SPEC))
    settings = read_settings({"DEMUR_SPECS": str(tmp_path), "DEMUR_BLOCKS": "2"})
    assert settings is not None
    with pytest.raises(InputError, match="DEMUR_BLOCKS names block 2, but the model has blocks 0 to 1"):
        make_plan(KNOWN, settings, Outline(32, 2, CPU))
    with pytest.raises(InputError, match="no SAE that demur knows fits a model of width 33"):
        make_plan(KNOWN._replace(book=SpecBook({})), settings._replace(blocks=()), Outline(33, 2, CPU))


def test_the_spec_survives_its_way_through_the_request() -> None:
    spec = replace(SPEC, gate=LatentGate(PLACE, "sae", 2, 0.5), positions=Positions("generation", first=3))
    assert read_spec_text(spec_text(spec)) == spec
    assert read_spec_text(spec_text(SteeringSpec())) == SteeringSpec()


def test_salts_differ_where_kv_blocks_do() -> None:
    written, other = replace(SPEC, positions=Positions("generation")), SteeringSpec((Edit(PLACE, "sae", (2,), 3.0),))
    gated = replace(SPEC, gate=LatentGate(PLACE, "sae", 2, 0.5, positions=Positions("prompt")))
    assert cache_salt(SPEC, 5, None) == cache_salt(SPEC, 9, None) != cache_salt(other, 5, None)
    assert cache_salt(written, 5, None) != cache_salt(written, 9, None)
    assert cache_salt(gated, 5, None) != cache_salt(gated, 9, None)
    assert cache_salt(SPEC, 5, "mine") != cache_salt(SPEC, 5, None) != cache_salt(SPEC, 5, SPEC.hash)


def test_another_vllm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_version("0.32.1")
    with pytest.raises(MismatchError, match=r"vLLM is 0\.33\.0, but demur's plugin was made for 0\.32\.x"):
        check_version("0.33.0")
    monkeypatch.setenv("DEMUR_ANY_VLLM", "1")
    check_version("0.33.0")

    class Runner:
        def step(self, output: Any, tokens: Any, flag: bool = False) -> Any:
            return output, tokens

        def later(self, output: Any, tokens: Any, more: Any) -> Any:
            return output

    def around(inner: Any, self: Any, output: Any, tokens: Any) -> Any:
        return ("around", *inner(self, output, tokens))

    with pytest.raises(
        MismatchError, match=r"step takes \(self, output, tokens, flag\), but demur's plugin was made for"
    ):
        wrap(Runner, "step", ("self", "scheduled"), around)
    with pytest.raises(MismatchError, match="takes"):
        check_signature(Runner.later, ("self", "output", "tokens"))
    with pytest.raises(MismatchError, match="has no walk"):
        wrap(Runner, "walk", (), around)
    for _ in range(2):  # once only
        wrap(Runner, "step", ("self", "output", "tokens"), around)
    assert Runner().step(1, 2) == ("around", 1, 2)


def config(**changed: Any) -> Any:
    """A configuration with nothing in it that demur refuses, but for what is changed."""
    parallel = {"use_ubatching": False, "prefill_context_parallel_size": 1, "pipeline_parallel_size": 1}
    text = SimpleNamespace(model_type="llama")
    model = {"runner_type": "generate", "is_encoder_decoder": False, "hf_text_config": text}
    own = {"speculative_config": None, "use_v2_model_runner": False, "lora_config": None, "kv_transfer_config": None}
    parts = {"parallel_config": parallel, "model_config": model, "cache_config": {"kv_sharing_fast_prefill": False}}
    for name, value in changed.items():
        home = next((part for part in parts.values() if name in part), own)
        home[name] = value
    return SimpleNamespace(**own, **{name: SimpleNamespace(**part) for name, part in parts.items()})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"speculative_config": 1}, "speculative decoding"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"lora_config": 1}, "LoRA"),
        ({"kv_transfer_config": 1}, "KV transfer"),
        ({"use_ubatching": True}, "dual-batch"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"kv_sharing_fast_prefill": True}, "sharing of KV caches"),
        ({"runner_type": "pooling"}, "does not generate text"),
        ({"hf_text_config": SimpleNamespace(model_type="mamba")}, "type 'mamba', but demur's plugin knows"),
    ],
)
def test_configurations_that_are_refused(changed: dict[str, Any], said: str) -> None:
    check_config(config())
    with pytest.raises(InputError, match=said):
        check_config(config(**changed))


def test_gates_in_a_pipeline_are_refused() -> None:
    gated = replace(SPEC, gate=LatentGate(PLACE, "sae", 2, 0.5))
    check_parallel(SPEC, config(pipeline_parallel_size=2))
    check_parallel(gated, config())
    with pytest.raises(InputError, match="stages of a pipeline"):
        check_parallel(gated, config(pipeline_parallel_size=2))


def test_blocks_are_found_and_hooked() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class PPMissingLayer(torch.nn.Module):
        pass

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([Block(), PPMissingLayer(), Block()])
    with pytest.raises(MismatchError, match="has 0 lists of 4 transformer blocks"):
        find_blocks(model, 4)
    blocks = find_blocks(model, 3)
    assert hook(blocks, [0, 1]) == [0]
    assert type(blocks[0]).__name__ == "SteeredBlock"
    assert type(blocks[2]) is Block
    blocks[2].forward = lambda x: x
    with pytest.raises(MismatchError, match="has a forward of its own"):
        hook(blocks, [2])
    check_model_type("llama")


def test_a_start_ends_where_a_block_does_not_run_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {3: SimpleNamespace(calls=0), 5: SimpleNamespace(calls=1)}
    monkeypatch.setattr(demur.vllm.worker, "PLACES", places)
    ran: list[int] = []
    runner = SimpleNamespace(max_num_tokens=64, _dummy_run=ran.append)
    with pytest.raises(MismatchError, match="block 3 of the model ran without calling demur"):
        demur.vllm.worker._check_called(runner)
    assert ran == [16]
    runner._dummy_run = lambda tokens: setattr(places[3], "calls", 1)
    demur.vllm.worker._check_called(runner)


@pytest.mark.parametrize("shapes", [((2, 4, 8), None), ((4, 8), (4, 2)), ((1, 4, 8), (1, 4, 8))])
def test_blocks_that_return_something_else_are_refused(shapes: tuple[Any, Any]) -> None:
    demur.vllm.op.define()
    hidden, residual = (None if shape is None else torch.zeros(shape) for shape in shapes)
    with pytest.raises(MismatchError, match=r"expected \[tokens, d_model\]"):
        torch.ops.demur.steer(hidden, residual, 0)


def test_two_models_in_one_process_are_refused() -> None:
    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    demur.vllm.worker._only_one(first)
    with pytest.raises(InputError, match="a second model is loaded"):
        demur.vllm.worker._only_one(second)
    del first
    demur.vllm.worker._only_one(second)
