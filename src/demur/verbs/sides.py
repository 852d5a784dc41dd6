"""The sides that a run compares: a model as it is, and under each spec that a config names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from demur import progress
from demur.errors import InputError
from demur.lm.load import LanguageModel, load
from demur.sae.store import LoadedSae, check_fits, load_sae
from demur.spec import Edit, SteeringSpec
from demur.steering.spec_file import read_spec
from demur.steering.steer import steer
from demur.steering.vectors import Vector, load_vectors
from demur.text_gates import check, opened
from demur.types import UNSTEERED
from demur.verbs.sides_config import SidesConfig

_VALUE = 8.0
"""Clamp value where none is given."""


class Named(NamedTuple):
    """A spec and what people call it."""

    label: str
    spec: SteeringSpec


class Sides(NamedTuple):
    """What the config names, read but for the model."""

    named: list[Named]
    """The unsteered model first."""
    saes: list[LoadedSae]
    directions: list[Vector]


def read_sides(config: SidesConfig, specs: Sequence[Named] | None = None) -> Sides:
    """Specs, SAEs, directions and probes; `specs` in place of the spec files and clamps that `config` names.

    Raises `InputError` for a spec that is given twice or a latent that is not there, else as `read_spec`, `load_sae`
    and `load_direction` do.
    """
    named = [Named(UNSTEERED, SteeringSpec()), *(specs if specs is not None else _read(config))]
    names = config.sae or (("smollm2-135m-instruct",) if config.latent is not None else ())
    saes = [load_sae(name) for name in names]
    if specs is None and config.latent is not None:
        named += clamps(config.latent, config.value, saes[0])
    labels = [one.label for one in named]
    named = [
        one if labels.count(one.label) == 1 else Named(f"{one.label} ({one.spec.hash[:8]})", one.spec) for one in named
    ]
    for number, one in enumerate(named):
        if one.spec.hash in [other.spec.hash for other in named[:number]]:
            raise InputError(f"{one.label} is given twice, or changes nothing; give each spec once")
    return Sides(named, saes, load_vectors(config.direction, config.probe))


def load_model(config: SidesConfig, sides: Sides) -> LanguageModel:
    """The model, under which every spec was tried. Raises as `load`, `check_fits`, `steer` and `check` do."""
    progress.say(f"loading {config.model}")
    lm = load(config.model, config.dtype, config.device, config.revision)
    for sae in sides.saes:
        check_fits(sae, lm.name, lm.fingerprint, lm.d_model, lm.n_blocks)
    for one in sides.named:
        with steer(lm, opened(one.spec), sides.saes, directions=sides.directions):
            pass
    check([one.spec for one in sides.named], lm.device)
    return lm


def _read(config: SidesConfig) -> list[Named]:
    return [Named(path.stem, read_spec(path)) for path in config.spec]


def clamps(latent: int, values: Sequence[float], sae: LoadedSae) -> list[Named]:
    """Clamps of a latent to each of `values`, or to 8 without any. Raises `InputError` if there is no such latent."""
    if latent >= sae.sae.d_sae:
        raise InputError(f"latent is {latent}, but the SAE {sae.path!r} has {sae.sae.d_sae}, numbered from 0")
    edit = [Edit(sae.config.hookpoint, sae.hash, (latent,), value) for value in values or (_VALUE,)]
    return [Named(f"latent {latent} at {one.value:g}", SteeringSpec((one,))) for one in edit]
