"""A tiny model with SAEs, directions and specs of every kind, and what demur's own engine answers under them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from vllm_engine import Ask, Said

from demur.lm.attach import Step, attach
from demur.lm.embedded import fetch
from demur.lm.generate import generate
from demur.lm.load import LanguageModel, load
from demur.record import to_json, write_json
from demur.sae.base import Reference
from demur.sae.store import LoadedSae, SaeConfig, SaeModel, load_sae, save_sae
from demur.sae.thresholded import JumpReluSae
from demur.spec import DirectionEdit, Edit, LatentGate, Positions, ProbeGate, SteeringSpec
from demur.steering.direction import Direction, save_direction
from demur.steering.probe import Probe, save_probe
from demur.steering.spec_book import Offered, SpecBook, read_offered
from demur.steering.steer import steer
from demur.testing import tiny_model, tiny_sae
from demur.types import parse_hookpoint

WIDTH, BLOCKS, LATENTS = 128, 4, 384
LOW, HIGH = "layers.1.resid_post", "layers.2.resid_post"


class World(NamedTuple):
    """A model folder, a folder of specs, and both loaded."""

    root: Path
    lm: LanguageModel
    offered: Offered

    @property
    def model(self) -> Path:
        """The model's folder."""
        return self.root / "model"

    @property
    def specs(self) -> Path:
        """The specs' folder."""
        return self.root / "specs"

    def find(self, asked: object) -> SteeringSpec:
        """The spec that a request means."""
        return SpecBook(self.offered.specs).find([asked])

    def expected(self, asks: Sequence[Ask]) -> list[list[int]]:
        """What demur's own engine answers to each alone."""
        found = []
        for ask in asks:
            with steer(self.lm, self.find(ask.spec), self.offered.saes, directions=self.offered.directions):
                found.append(generate(self.lm, [list(ask.ids)], ask.n)[0].ids)
        return found


def make_world(root: Path, model_type: str = "llama") -> World:
    """In the folder `root`."""
    made = tiny_model(model_type, blocks=BLOCKS, d_model=WIDTH)
    made.model.save_pretrained(root / "model")
    made.tokenizer.save_pretrained(root / "model")
    lm = load(str(root / "model"))
    specs = root / "specs"
    top, jump = make_saes(specs, lm)
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    directions = [Direction(vector, LOW, "random", sigma=1.5) for vector in vectors]
    for i, direction in enumerate(directions):
        save_direction(specs / f"direction-{i}.safetensors", direction)
    probe = make_probe(lm)
    save_probe(specs / "probe.safetensors", probe)
    for name, spec in {**make_specs(lm, top, jump, directions), **probed_specs(top, jump, probe)}.items():
        write_json(specs / f"{name}.json", to_json(spec))
    return World(root, lm, read_offered([specs]))


def make_saes(folder: Path, lm: LanguageModel) -> tuple[LoadedSae, LoadedSae]:
    """A top-k SAE with reference statistics, and a JumpReLU SAE that normalises."""
    about = SaeModel(lm.name, lm.fingerprint, lm.n_blocks)
    top = tiny_sae(WIDTH, LATENTS, 16)
    jump = JumpReluSae(WIDTH, LATENTS, "layer_norm").requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in jump.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    jump.threshold.abs_()
    with torch.no_grad():
        f = top.encode(torch.cat([residuals(lm, ids, LOW) for ids in prompts(32)]))
    positive = torch.where(f > 0, f, torch.inf).amin(-1)
    reference = Reference(f.amax(0), f.std(0), (f > 0).float().mean(0), positive[positive.isfinite()].mean())
    top.reference = reference
    save_sae(folder / "topk", top, SaeConfig(WIDTH, LATENTS, 16, LOW, about))
    config = SaeConfig(WIDTH, LATENTS, 0, HIGH, about, architecture="jumprelu", normalize="layer_norm")
    save_sae(folder / "jump", jump, config)
    return load_sae(folder / "topk"), load_sae(folder / "jump")


def written_for_vllm(lm: LanguageModel, folder: Path) -> Path:
    """The embedded model with its embeddings under the name that vLLM looks for."""
    shutil.copytree(fetch().folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: value.clone() for name, value in lm.model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def residuals(lm: LanguageModel, ids: Sequence[int], place: str) -> torch.Tensor:
    """[pos, d_model] at a hookpoint."""
    seen: list[torch.Tensor] = []

    def read(residual: torch.Tensor, step: Step) -> torch.Tensor:
        seen.append(residual[0])
        return residual

    with torch.no_grad(), attach(lm.model, parse_hookpoint(place), read):
        lm.model(torch.tensor([list(ids)]))
    return seen[0]


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 3 to 70 tokens, without special ones."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 71, (n,), generator=generator).tolist()
    return [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]


def make_specs(
    lm: LanguageModel, top: LoadedSae, jump: LoadedSae, directions: Sequence[Direction]
) -> dict[str, SteeringSpec]:
    """Every op, unit, kind of position and gate that the plugin carries out."""
    with torch.no_grad():
        f = torch.stack([top.sae.encode(residuals(lm, ids, LOW))[1:].amax(0) for ids in prompts(32)])
    often = (f > 0).float().mean(0).argsort(descending=True)[:12].tolist()
    a, b, c = (int(latent) for latent in often[:3])
    # opens for about half of the prompts
    gate_latent = int(((f > 0).float().mean(0) - 0.9).abs().argmin())
    threshold = float(f[:, gate_latent].quantile(0.4))
    strong = float(f.max())

    def edit(latents: int | tuple[int, ...], value: float, op: str = "clamp", **more: object) -> Edit:
        return Edit(LOW, top.hash, latents, value, op, **more)  # type: ignore[arg-type]

    def through_jump(latents: tuple[int, ...], value: float, op: str) -> Edit:
        return Edit(HIGH, jump.hash, latents, value, op)  # type: ignore[arg-type]

    one = edit(7, strong)
    gate = LatentGate(LOW, top.hash, gate_latent, threshold)
    found = {
        "clamp": SteeringSpec((one,)),
        "floor": SteeringSpec((edit((a, b), strong / 2, "floor"),)),
        "ceil": SteeringSpec((edit((a, b, c), 0.2, "ceil"),), skip_first=False),
        "add": SteeringSpec((edit((11, 12), strong / 2, "add"),)),
        "scale": SteeringSpec((edit((a, b, c), 3.0, "scale"),)),
        "ablate": SteeringSpec((edit(tuple(map(int, often[:6])), 0.0, "ablate"),)),
        "mixed": SteeringSpec((one, edit((a,), 2.0, "scale"), edit((b,), strong / 3, "add"))),
        "units": SteeringSpec((edit((a, b), 1.5, "clamp", unit="max_act"), edit((c,), 4.0, "add", unit="sigma"))),
        "fast": SteeringSpec((edit((a, b), strong / 2),), exact=False),
        "jump": SteeringSpec((through_jump((3, 4), 6.0, "clamp"), through_jump((5,), 2.0, "scale"))),
        "two-blocks": SteeringSpec((one, through_jump((9,), 5.0, "clamp"))),
        "direction": SteeringSpec((DirectionEdit(LOW, directions[0].hash, 3.0),)),
        "sigma": SteeringSpec((DirectionEdit(HIGH, directions[1].hash, 9.0, unit="sigma"),)),
        "project": SteeringSpec((DirectionEdit(LOW, directions[0].hash, 1.0, "project_out"), one)),
        "prompt": SteeringSpec((one,), Positions("prompt")),
        "generation": SteeringSpec((one,), Positions("generation")),
        "last": SteeringSpec((edit(7, 2 * strong),), Positions("last_prompt_token")),
        "first": SteeringSpec((one,), Positions("generation", first=3)),
        "every": SteeringSpec((one,), Positions("all", every=3), skip_first=False),
        "every-written": SteeringSpec((one,), Positions("generation", every=2)),
    }
    gated = found["clamp"]
    found["gated"] = replace(gated, gate=gate)
    found["gated-prompt"] = replace(gated, gate=replace(gate, positions=Positions("prompt")))
    found["gated-written"] = replace(gated, gate=replace(gate, threshold=0.0, positions=Positions("generation")))
    found["gated-above"] = replace(found["jump"], gate=replace(gate, positions=Positions("prompt", every=2)))
    found["gated-answer"] = replace(found["generation"], gate=replace(gate, positions=Positions("prompt")))
    return found


def make_probe(lm: LanguageModel) -> Probe:
    """Says yes at the end of half of the prompts."""
    ends = torch.stack([residuals(lm, ids, LOW)[-1] for ids in prompts(32)])
    weight = torch.randn(WIDTH, generator=torch.Generator().manual_seed(6))
    logits = ends @ weight
    weight, logits = weight / logits.std(), logits / logits.std()
    return Probe(weight, -float(logits.median()), LOW)


def probed_specs(top: LoadedSae, jump: LoadedSae, probe: Probe) -> dict[str, SteeringSpec]:
    """Gates on a probe: at the end of the prompt, in all of it, while the answer is written, below the edit."""
    edit = Edit(LOW, top.hash, (7,), 10.0)
    gate = ProbeGate(LOW, probe.hash, 0.5)
    everywhere = replace(gate, threshold=0.8, positions=Positions())
    return {
        "probed": SteeringSpec((edit,), gate=gate),
        "probed-answer": SteeringSpec((edit,), Positions("generation"), gate),
        "probed-all": SteeringSpec((edit,), gate=everywhere),
        "probed-monitor": SteeringSpec((edit,), gate=replace(gate, threshold=0.9, monitor=0.9)),
        "probed-above": SteeringSpec((Edit(HIGH, jump.hash, (3, 4), 6.0),), gate=gate),
    }


def same(said: Sequence[Said], expected: Sequence[Sequence[int]], asks: Sequence[Ask]) -> None:
    """Fail, naming the requests, unless every answer is what was expected."""
    wrong = [
        f"{number} under {ask.spec!r} ({len(ask.ids)} tokens): {one.ids or one.error} for {list(other)}"
        for number, (one, other, ask) in enumerate(zip(said, expected, asks, strict=True))
        if one.error or one.ids != list(other)
    ]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(asks)} differ", *wrong[:12]])
