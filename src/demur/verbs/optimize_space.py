"""What a search may try, and how a trial's choices become a spec; `space.json` in the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from demur.spec import Edit, LatentGate, Positions, ProbeGate, SteeringSpec
from demur.types import parse_hookpoint
from demur.verbs.optimize_config import OptimizeConfig

_LAST = Positions("last_prompt_token")
_STEP = 0.25
"""Of clamp values, in latent units: finer ones cannot be told apart on a few dozen prompts."""


class Trial(Protocol):
    """Makes choices and remembers them; `optuna.Trial` is one."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...


@dataclass(frozen=True)
class Layer:
    """What one SAE offers."""

    hookpoint: str
    sae: str
    """Hash of the SAE."""
    latents: tuple[int, ...]
    """Latents that may be clamped."""
    gates: dict[int, float]
    """Latents that may gate, each with its largest activation at the last token of the harmful prompts."""


@dataclass(frozen=True)
class ProbeAt:
    """A probe that may gate."""

    hookpoint: str
    probe: str
    """Hash of the probe."""


@dataclass(frozen=True)
class Space:
    """All that may be tried."""

    layers: tuple[Layer, ...]
    probes: tuple[ProbeAt, ...]


def choose(trial: Trial, config: OptimizeConfig, space: Space) -> SteeringSpec:
    """The spec of a trial: layer, latents with values, positions, gate. What does not apply is not asked for."""
    layer = space.layers[_index(trial, "layer", [one.hookpoint for one in space.layers])]
    at = f"{layer.hookpoint} " if len(space.layers) > 1 else ""
    values: dict[int, float] = {}
    low, high = config.values
    for number in range(1, _int(trial, "latents", config.set_size) + 1):
        latent = layer.latents[_index(trial, f"{at}latent {number}", layer.latents)]
        value = trial.suggest_float(f"value {number}", low, high, step=_STEP if high - low > _STEP else None)
        values.setdefault(latent, value)  # one latent twice is one latent
    edits = tuple(Edit(layer.hookpoint, layer.sae, (latent,), round(v, 4)) for latent, v in sorted(values.items()))
    return SteeringSpec(edits, _positions(trial, config), _gate(trial, config, layer, space, at))


def _positions(trial: Trial, config: OptimizeConfig) -> Positions:
    where = config.positions[_index(trial, "positions", config.positions)]
    if where == "first":
        return Positions("answer", first=_int(trial, "first", config.max_new_tokens, log=True))
    if where == "half_life":
        return Positions("answer", half_life=float(_int(trial, "half_life", config.max_new_tokens, log=True)))
    return Positions(where)


def _gate(trial: Trial, config: OptimizeConfig, layer: Layer, space: Space, at: str) -> LatentGate | ProbeGate | None:
    block = parse_hookpoint(layer.hookpoint).block
    probes = [one for one in space.probes if parse_hookpoint(one.hookpoint).block <= block]
    offered = {"none": True, "latent": bool(layer.gates), "probe": bool(probes)}
    kinds = [kind for kind in config.gates if offered[kind]] or ["none"]
    kind = kinds[_index(trial, f"{at}gate", kinds)]
    if kind == "latent":
        latents = list(layer.gates)
        latent = latents[_index(trial, f"{at}gate latent", latents)]
        share = trial.suggest_float("gate share", 0.0, 0.95)
        return LatentGate(layer.hookpoint, layer.sae, latent, _short(share * layer.gates[latent]), positions=_LAST)
    if kind == "probe":
        one = probes[_index(trial, f"{at}probe", [one.probe for one in probes])]
        threshold = _short(trial.suggest_float("threshold", 0.01, 0.99))
        soft = bool(_index(trial, "strength", ["full", "probability"]))
        return ProbeGate(one.hookpoint, one.probe, threshold, _LAST, strength="probability" if soft else "full")
    return None


def _index(trial: Trial, name: str, choices: Any) -> int:
    """A choice among several, by its index; the only one where there is no more."""
    words = [str(one) for one in choices]
    return words.index(str(trial.suggest_categorical(name, words))) if len(words) > 1 else 0


def _int(trial: Trial, name: str, most: int, log: bool = False) -> int:
    return trial.suggest_int(name, 1, most, log=log) if most > 1 else 1


def _short(number: float) -> float:
    """Three significant digits, so that a spec can be read."""
    return float(f"{number:.3g}")


def words(spec: SteeringSpec) -> str:
    """The spec in a line: `latent 957 at 8 (layers.16), first 4 written tokens, if probe 1a2b3c4d > 0.6`."""
    edits = [edit for edit in spec.edits if isinstance(edit, Edit)]
    blocks = sorted({parse_hookpoint(edit.hookpoint).block for edit in edits})
    parts = [
        " + ".join(f"latent {', '.join(map(str, edit.latents))} at {edit.value:g}" for edit in edits)
        + f" (block {', '.join(map(str, blocks))})"
    ]
    positions = spec.positions
    tokens = "written token" if positions.where == "generation" else f"{positions.where} token"
    if positions.first:
        parts.append(f"first {positions.first} {tokens}{'s' * (positions.first > 1)}")
    elif positions.half_life:
        parts.append(f"{tokens}s, half-life {positions.half_life:g}")
    elif positions.where != "all":
        parts.append(f"{tokens}s")
    gate = spec.gate
    if isinstance(gate, LatentGate):
        parts.append(f"if latent {gate.latent} > {gate.threshold:g}")
    elif isinstance(gate, ProbeGate):
        by = ", by probability" if gate.strength == "probability" else ""
        parts.append(f"if probe {gate.probe[:8]} > {gate.threshold:g}{by}")
    return ", ".join(parts)
