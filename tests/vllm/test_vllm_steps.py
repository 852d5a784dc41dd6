"""What the plugin computes in a step is what demur's own engine does; without vLLM, in any order of chunks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from demur.errors import InputError
from demur.lm.attach import Step
from demur.sae.base import Reference, Sae
from demur.sae.groupmax import GroupMaxSae
from demur.sae.pursuit import MatchingPursuitSae
from demur.sae.store import LoadedSae, SaeConfig, SaeModel
from demur.sae.thresholded import BatchTopKSae, GatedSae, JumpReluSae, ReluSae
from demur.sae.topk import TopKSae
from demur.spec import DirectionEdit, Edit, LatentGate, Positions, ProbeGate, SteeringSpec
from demur.steering.direction import Direction
from demur.steering.probe import Probe
from demur.steering.rows import Rows
from demur.steering.spec_book import SpecBook
from demur.steering.steer import edits_of
from demur.types import parse_hookpoint
from demur.vllm.buffers import Buffers
from demur.vllm.needs import Ledger, make_plan
from demur.vllm.offered import Known
from demur.vllm.outline import Outline
from demur.vllm.requests import Requests
from demur.vllm.settings import Settings
from demur.vllm.table import Table

D, M, K = 16, 24, 6
LOW, HIGH = "layers.0.resid_post", "layers.1.resid_post"
CPU = torch.device("cpu")
SETTINGS = Settings((Path(),), "", False, True, 16, (0, 1), False)
KINDS: dict[str, Any] = {
    "topk": lambda normalize: TopKSae(D, M, K, normalize),
    "topk-whole-input": lambda normalize: TopKSae(D, M, K, normalize, subtract_b_dec=False),
    "groupmax": lambda normalize: GroupMaxSae(D, M, K, normalize),
    "jumprelu": lambda normalize: JumpReluSae(D, M, normalize),
    "relu": lambda normalize: ReluSae(D, M, normalize, subtract_b_dec=False),
    "batchtopk": lambda normalize: BatchTopKSae(D, M, normalize),
    "gated": lambda normalize: GatedSae(D, M, normalize),
}


def random_sae(kind: str, normalize: str = "none", seed: int = 0) -> LoadedSae:
    sae: Sae = KINDS[kind](normalize)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            value = torch.randn(parameter.shape, generator=generator) * 0.4
            parameter.copy_(value.abs() if name == "threshold" else value)
    sae.requires_grad_(False)
    f = sae.encode(torch.randn(200, D, generator=generator))
    positive = f[f > 0]
    sae.reference = Reference(f.amax(0) + 0.1, f.std(0) + 0.1, (f > 0).float().mean(0), positive.quantile(0.3))
    config = SaeConfig(D, M, K, LOW, SaeModel("m", "", 2), normalize=normalize)  # type: ignore[arg-type]
    return LoadedSae(sae, config, f"{kind}-{normalize}-{seed}", "")


DIRECTIONS = tuple(Direction(torch.randn(D, generator=torch.Generator().manual_seed(i)), LOW, "", 1.3) for i in (8, 9))
PROBES = tuple(
    Probe(torch.randn(D, generator=torch.Generator().manual_seed(i)) / 2, bias, place)
    for i, bias, place in ((4, -0.6, LOW), (5, 0.3, HIGH))
)


class Made:
    """A table with its places and requests, and what demur's own engine needs for the same specs."""

    def __init__(
        self, named: dict[str, SteeringSpec], saes: Sequence[LoadedSae], static: bool, tokens: int = 64
    ) -> None:
        self.known = Known(SpecBook(named), tuple(saes), (*DIRECTIONS, *PROBES))
        outline = Outline(D, 2, CPU)
        self.found = outline.artefacts(self.known)
        plan = make_plan(self.known, SETTINGS, outline)
        self.table = Table(plan, self.known, self.found, D, len(named) + 6, CPU, static)
        self.buffers = Buffers(tokens, 5, len(self.table.labels), CPU)
        self.table.attach(self.buffers, CPU)
        self.requests = Requests(self.table, self.buffers, 5)

    def oracle(self, spec: SteeringSpec, x: dict[str, Tensor], prompt: int) -> dict[str, Tensor]:
        """Residuals [pos, d] after all edits at each place, of one request, the whole of it in one pass."""
        rows = Rows([spec], self.found, None)
        hooks = edits_of([spec], self.found, rows).hooks
        n = len(next(iter(x.values())))
        one = torch.zeros(1, dtype=torch.long)
        step = Step(torch.arange(n)[None], torch.tensor([prompt]), one, one, 1, 1, False, True, None)
        edited = {}
        for place in sorted(x):
            hook = hooks.get(parse_hookpoint(place))
            edited[place] = hook(x[place][None], step)[0] if hook is not None else x[place]
        return edited


def specs_through(sae: str) -> dict[str, SteeringSpec]:
    """Specs of all ops at one place, alone and together."""

    def edit(latents: tuple[int, ...], value: float = 0.0, op: str = "clamp", unit: str = "latent") -> Edit:
        return Edit(LOW, sae, latents, value, op, unit)  # type: ignore[arg-type]

    along = DirectionEdit(LOW, DIRECTIONS[0].hash, 2.0)
    return {
        "clamp": SteeringSpec((edit((1,), 3.0),)),
        "floor": SteeringSpec((edit((1, 2, 3), 0.5, "floor"),)),
        "ceil": SteeringSpec((edit((4, 5, 6, 7), 0.2, "ceil"),)),
        "add": SteeringSpec((edit((1, 8), -1.5, "add"),)),
        "scale": SteeringSpec((edit((9, 10, 11), 2.5, "scale"),)),
        "ablate": SteeringSpec((edit((12, 13, 14, 2), op="ablate"),)),
        "units": SteeringSpec((edit((1, 2), 2.0, "clamp", "max_act"), edit((3,), 1.0, "floor", "sigma"))),
        "fast": SteeringSpec((edit((1, 2, 3, 4), 2.0),), exact=False),
        "along": SteeringSpec((along, replace(along, value=1.0, unit="sigma"), edit((2,), 1.0, "add"))),
        "out": SteeringSpec((DirectionEdit(LOW, DIRECTIONS[1].hash, op="project_out"), along, edit((3,), 4.0))),
    }


def run_steps(
    made: Made, specs: Sequence[SteeringSpec], x: Sequence[dict[str, Tensor]], prompts: Sequence[int], seed: int
) -> list[dict[str, Tensor]]:
    """All requests through random steps: few at a time, in changing order, in chunks, some begun again."""
    dice = random.Random(seed)
    edited = [{place: torch.zeros_like(value) for place, value in one.items()} for one in x]
    waiting, running, done = list(range(len(specs))), [], [0] * len(specs)
    restarts = {one for one in range(len(specs)) if dice.random() < 0.3}
    while waiting or running:
        while waiting and len(running) < 5 and dice.random() < 0.8:
            running.append(waiting.pop(0))
        dice.shuffle(running)
        chosen = [one for one in running if dice.random() < 0.8]
        sizes = [min(dice.choice([1, 1, 4, 9]), len(x[one][LOW]) - done[one]) for one in chosen]
        if chosen:
            made.requests.keep([str(one) for one in running])
            made.requests.step(
                [str(one) for one in chosen],
                np.array(sizes, dtype=np.int64),
                np.array([done[one] for one in chosen], dtype=np.int64),
                np.array([prompts[one] for one in chosen], dtype=np.int64),
                lambda one: specs[int(one)],
            )
            padding = dice.choice([0, 3])
            for place in (LOW, HIGH):
                parts = [x[one][place][done[one] : done[one] + size] for one, size in zip(chosen, sizes, strict=True)]
                whole = torch.cat([*parts, torch.randn(padding, D)])
                residual = torch.randn(whole.shape)
                hidden = whole - residual
                made.table.places[parse_hookpoint(place).block].apply(hidden, residual)
                for one, part in zip(chosen, (hidden + residual).split([*sizes, padding]), strict=False):
                    edited[one][place][done[one] : done[one] + len(part)] = part
            for one, size in zip(chosen, sizes, strict=True):
                done[one] += size
                if one in restarts and done[one] > 3:  # preempted
                    restarts.discard(one)
                    done[one] = 0
                    running.remove(one)
                    waiting.append(one)
                    made.requests.leave([str(one)])
                elif done[one] == len(x[one][LOW]):
                    running.remove(one)
    return edited


def agree(made: Made, specs: Sequence[SteeringSpec], seed: int = 0) -> int:
    """Compare random steps with the oracle; returns how many tokens were edited."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 20, (len(specs),), generator=generator).tolist()
    x = [{place: torch.randn(n, D, generator=generator) for place in (LOW, HIGH)} for n in lengths]
    prompts = [max(1, n // 2) for n in lengths]
    edited = run_steps(made, specs, x, prompts, seed)
    moved = 0
    for number, spec in enumerate(specs):
        wanted = made.oracle(spec, x[number], prompts[number])
        for place in (LOW, HIGH):
            torch.testing.assert_close(edited[number][place], wanted[place], rtol=1e-4, atol=1e-4, msg=str(spec))
            moved += int((wanted[place] != x[number][place]).any(-1).sum())
    return moved


@pytest.mark.parametrize("static", [False, True], ids=["short cuts", "static"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_op_through_every_kind_of_sae(kind: str, normalize: str, static: bool) -> None:
    sae = random_sae(kind, normalize)
    named = specs_through(sae.hash)
    made = Made(named, [sae], static)
    assert agree(made, [*named.values(), SteeringSpec(), *named.values()]) > 100


@pytest.mark.parametrize("static", [False, True], ids=["short cuts", "static"])
@pytest.mark.parametrize("seed", range(4))
def test_positions_and_gates_in_any_order_of_chunks(seed: int, static: bool) -> None:
    first, second = random_sae("topk"), random_sae("jumprelu", seed=1)
    edits = (Edit(LOW, first.hash, (1,), 3.0), Edit(HIGH, second.hash, (2, 3), 2.0, "add"))
    above = SteeringSpec(edits[1:])
    gates = [
        LatentGate(LOW, first.hash, 5, 0.8),
        LatentGate(LOW, second.hash, 6, 0.9, positions=Positions("prompt")),
        LatentGate(LOW, first.hash, 7, 0.5, positions=Positions("generation", first=4)),
        LatentGate(HIGH, second.hash, 8, 0.9, positions=Positions("all", every=2)),
        LatentGate(LOW, first.hash, 9, 0.6, "max_act", positions=Positions("last_prompt_token")),
    ]
    looks = [
        Positions(),
        Positions("prompt", every=2),
        Positions("generation"),
        Positions("generation", first=3, every=2),
        Positions("last_prompt_token"),
        Positions("all", every=3),
    ]
    specs = [
        replace(
            above if gate is not None and gate.hookpoint == HIGH else SteeringSpec(edits), gate=gate, positions=look
        )
        for gate in (None, *gates)
        for look in looks
    ]
    specs = [one if i % 3 else replace(one, skip_first=False) for i, one in enumerate(specs)]
    named = {f"s{i}": one for i, one in enumerate(specs[::2])}  # the others are inline
    made = Made(named, [first, second], static)
    dice = random.Random(seed)
    dice.shuffle(specs)
    assert agree(made, [*specs, SteeringSpec()], seed) > 50
    label = dict(zip(made.table.labels, made.buffers.opened.tolist(), strict=True))
    asked = dict(zip(made.table.labels, made.requests.gated.tolist(), strict=True))
    assert all(label[name] <= asked[name] for name in label)
    assert 0 < sum(label.values()) < sum(asked.values())


@pytest.mark.parametrize("static", [False, True], ids=["short cuts", "static"])
@pytest.mark.parametrize("seed", range(4))
def test_gates_on_probes_in_any_order_of_chunks(seed: int, static: bool) -> None:
    """Named and inline, beside a gate on a latent, with monitors, at the edit's block and below it."""
    sae, (low, high) = random_sae("topk"), PROBES
    edits = (Edit(LOW, sae.hash, (1,), 3.0), DirectionEdit(HIGH, DIRECTIONS[0].hash, 2.0))
    gates: list[LatentGate | ProbeGate] = [
        ProbeGate(LOW, low.hash, 0.5),
        ProbeGate(LOW, low.hash, 0.8, Positions("all")),
        ProbeGate(LOW, low.hash, 0.9, monitor=0.6),
        ProbeGate(LOW, low.hash, 1.0, monitor=0.0),  # opens with the first token that is written
        ProbeGate(LOW, low.hash, 0.7, Positions("prompt", every=2), monitor=0.8),
        ProbeGate(HIGH, high.hash, 0.6),
        ProbeGate(HIGH, high.hash, 0.95, monitor=0.9),
        LatentGate(LOW, sae.hash, 5, 0.8),
    ]
    looks = [Positions(), Positions("generation"), Positions("generation", first=4), Positions("prompt")]
    specs = [
        SteeringSpec(edits[1:] if gate.hookpoint == HIGH else edits, look, gate, skip_first=i % 2 == 0)
        for i, gate in enumerate(gates)
        for look in looks
    ]
    made = Made({f"s{i}": one for i, one in enumerate(specs[::2])}, [sae], static, tokens=64)
    random.Random(seed).shuffle(specs)
    assert agree(made, [*specs, SteeringSpec(), *specs], seed) > 100
    opened, asked = made.buffers.opened.numpy(), made.requests.gated
    assert (opened <= asked).all()
    assert 0.1 * asked.sum() < opened.sum() < 0.9 * asked.sum()


def test_a_probe_has_room_for_inline_specs_at_its_own_block() -> None:
    known = Known(SpecBook({}), (random_sae("topk"),), PROBES[1:])
    plan = make_plan(known, SETTINGS._replace(blocks=()), Outline(D, 2, CPU))
    assert plan.blocks == [0, 1]
    gate = ProbeGate(HIGH, PROBES[1].hash, 0.5)
    Ledger(plan).claim(SteeringSpec((DirectionEdit(HIGH, "d", 1.0),), gate=gate))
    without = make_plan(known._replace(directions=()), SETTINGS._replace(blocks=()), Outline(D, 2, CPU))
    with pytest.raises(InputError, match=r"needs directions and probes at layers\.1\.resid_post"):
        Ledger(without).claim(SteeringSpec((Edit(LOW, known.saes[0].hash, (1,), 3.0),), gate=gate))


def test_counts_of_tokens() -> None:
    sae = random_sae("topk")
    spec = SteeringSpec((Edit(LOW, sae.hash, (1,), 3.0),))
    made = Made({"a": spec, "b": replace(spec, gate=LatentGate(LOW, sae.hash, 5, 0.0))}, [sae], static=False)
    x = [{place: torch.randn(9, D) for place in (LOW, HIGH)} for _ in range(3)]
    run_steps(made, [spec, made.known.book.specs["b"], SteeringSpec()], x, [4, 4, 4], seed=3)
    assert int(made.requests.steered[made.table.labels.index("a")]) >= 8
    assert int(made.requests.steered.sum()) == int(made.requests.steered[made.table.labels.index("a")])


def test_an_architecture_without_fixed_steps_is_refused_where_graphs_are_captured() -> None:
    sae = MatchingPursuitSae(D, M, 2)
    config = SaeConfig(D, M, 2, LOW, SaeModel("m", "", 2), architecture="matching_pursuit")
    loaded = LoadedSae(sae.requires_grad_(False), config, "pursuit", "")
    spec = SteeringSpec((Edit(LOW, "pursuit", (1,), 3.0),))
    Made({"a": spec}, [loaded], static=False)
    with pytest.raises(InputError, match="no CUDA graph can hold"):
        Made({"a": spec}, [loaded], static=True)


def test_room_for_inline_specs_is_what_was_planned() -> None:
    sae = random_sae("topk")
    known = Known(SpecBook({"a": SteeringSpec((Edit(LOW, sae.hash, (1,), 3.0),))}), (sae,), ())
    plan = make_plan(known, SETTINGS._replace(latents=2, blocks=()), Outline(D, 2, CPU))
    ledger = Ledger(plan)
    ledger.claim(SteeringSpec((Edit(LOW, sae.hash, (1, 2), 3.0),)))
    ledger.claim(SteeringSpec((Edit(LOW, sae.hash, (3,), 3.0),)))
    ledger.claim(SteeringSpec((Edit(LOW, sae.hash, (2, 3), 9.0),)))
    with pytest.raises(InputError, match="3 of 3 are taken"):
        ledger.claim(SteeringSpec((Edit(LOW, sae.hash, (4,), 3.0),)))
    with pytest.raises(InputError, match=r"needs SAE topk-none-0 at layers\.1\.resid_post, but this server has room"):
        ledger.claim(SteeringSpec((Edit(HIGH, sae.hash, (1,), 3.0),)))
    shared = Ledger(plan, processes=2)
    shared.claim(SteeringSpec((Edit(LOW, sae.hash, (5,), 3.0),)))
    with pytest.raises(InputError, match="2 of 2 are taken"):
        shared.claim(SteeringSpec((Edit(LOW, sae.hash, (6,), 3.0),)))
