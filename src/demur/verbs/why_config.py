"""Config of `demur why`, as `config` has those of the other verbs. No torch here."""

from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Annotated

import tyro

from demur.errors import InputError
from demur.types import SAFETY_SYSTEM_PROMPT
from demur.verbs.config import Steered


@dataclass(frozen=True)
class WhyConfig(Steered):
    """Which spec is diagnosed, and how much is measured."""

    system: str = SAFETY_SYSTEM_PROMPT
    """System prompt of every conversation, steered or not; the spec's own stands in its place on the steered side.
    Empty: the chat template's own."""
    prompts: int = 24
    """Plain test prompts, and as many harmful ones; at most 84 of each."""
    max_new_tokens: int = 28
    """Length limit of an answer."""
    doses: tuple[float, ...] = (0.25, 0.5, 1, 1.5)
    """Parts of the edit's value for the dose response; 1 is always measured."""
    control: tuple[int, ...] = ()
    """Unrelated latents of the spec's SAE to clamp instead; by default chosen by firing rate, for a spec of one latent
    or of several."""
    controls: int = 4
    """How many are chosen."""
    random: int = 3
    """Random directions to push along instead."""
    second_sae: str = ""
    """SAE of a later block: which of its latents switch on or off. Without one, probes alone look downstream."""
    answers: bool = True
    """Let the model answer at every dose, so that refused and degenerate shares are known; half of the time."""
    batch_size: int = 128
    """Prompts answered together."""
    seed: int = 0
    """Seed of random directions, of the choice of controls, and of intervals; generation is greedy."""
    name: str = "why"
    """Name of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "doses", tuple(sorted({1.0, *map(float, self.doses)})))
        for name, least in (("prompts", 2), ("max_new_tokens", 1), ("controls", 1), ("random", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if any(not 0 < dose < inf for dose in self.doses):
            raise InputError(f"doses are {list(self.doses)}, expected numbers above zero")
        if len(set(self.control)) < len(self.control) or any(latent < 0 for latent in self.control):
            raise InputError(f"control is {list(self.control)}, expected different numbers from 0 up")
        if self.latent is not None and self.latent in self.control:
            raise InputError(f"latent {self.latent} is its own control; give other latents")


@dataclass(frozen=True)
class Why:
    """Diagnose a spec: where the damage that it does to harmless answers comes from, as one page."""

    file: tyro.conf.Positional[Path | None] = None
    """Spec file, as --spec."""
    out: Path | None = None
    """Run folder; a run found there goes on. Default: `runs/NAME-HASH`."""
    json: bool = False
    """Print one JSON object on stdout."""
    config: Annotated[WhyConfig, tyro.conf.arg(name="")] = field(default_factory=WhyConfig)
    """Model, spec, and what is measured."""

    def __post_init__(self) -> None:
        if self.file is not None and (self.config.spec is not None or self.config.latent is not None):
            given = self.config.spec if self.config.spec is not None else f"--latent {self.config.latent}"
            raise InputError(f"two specs were given, {self.file} and {given}; give one")
