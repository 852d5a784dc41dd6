"""Load what the verbs that steer have in common: model, spec, SAEs and directions."""

from __future__ import annotations

from typing import NamedTuple

from demur.errors import InputError
from demur.lm.load import LanguageModel, load
from demur.sae.store import LoadedSae, check_fits, load_sae
from demur.spec import Edit, SteeringSpec
from demur.steering.spec_file import read_spec
from demur.steering.vectors import Vector, load_vectors
from demur.verbs.config import Steered


class Loaded(NamedTuple):
    """A model and what to do to it."""

    lm: LanguageModel
    spec: SteeringSpec
    saes: list[LoadedSae]
    directions: list[Vector]
    system: str


def load_steered(config: Steered, need_spec: bool = False) -> Loaded:
    """Load everything that `config` names. Raises as `load`, `load_sae`, `read_spec` and `check_fits` do.

    The spec is read first, so that a wrong one fails before a large model is loaded.
    """
    if need_spec and config.spec is None and config.latent is None:
        raise InputError("no spec was given; give --spec FILE, or --latent N")
    spec = SteeringSpec() if config.spec is None else read_spec(config.spec)
    if config.system and spec.system and config.system != spec.system:
        raise InputError("the spec has a system prompt of its own and --system gives another; leave one of them out")
    saes = [load_sae(path) for path in config.sae]
    directions = load_vectors(config.direction, config.probe)
    if config.latent is not None:
        sae = saes[0] if saes else load_sae("smollm2-135m-instruct")
        saes = saes or [sae]
        spec = SteeringSpec((Edit(sae.config.hookpoint, sae.hash, (config.latent,), config.value),))
    lm = load(config.model, config.dtype, config.device, config.revision)
    for sae in saes:
        check_fits(sae, lm.name, lm.fingerprint, lm.d_model, lm.n_blocks)
    return Loaded(lm, spec, saes, directions, config.system or spec.system)
