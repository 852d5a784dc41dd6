"""Config of `demur gate train`. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from demur.errors import InputError
from demur.types import SAFETY_SYSTEM_PROMPT
from demur.verbs.model_config import ModelConfig


@dataclass(frozen=True)
class GateConfig(ModelConfig):
    """What a gate's probe is trained on."""

    spec: Path | None = None
    """Spec (JSON) to be gated: where its lowest edit is, the probe reads by default, and a gated copy is written."""
    hookpoint: tuple[str, ...] = ()
    """Where the probe may read, as layers.16; of several the one that tells prompts apart best out of fold. Default:
    the lowest hookpoint of --spec, or of the SAE."""
    pool: tuple[Literal["token", "turn", "attention"], ...] = ("token",)
    """What it reads: the last token of the prompt, the mean over the last user turn, or what a small network attends to
    in that turn; of several the one that tells prompts apart best out of fold. vLLM follows `token` only."""
    inputs: Literal["residual", "latents"] = "residual"
    """Whether it reads the residual itself or SAE latents of it."""
    sae: str = "smollm2-135m-instruct"
    """The SAE: folder or embedded name. Its hookpoint is the default, and its latents are read."""
    latents: int = 32
    """Latents at most that are read, with --inputs latents."""
    harmful: tuple[str, ...] = ("twins-harmful", "harmful", "talks-harmful")
    """Suites or files of harmful prompts, each as NAME or NAME:LIMIT; of suites with a select split that one."""
    lookalike: tuple[str, ...] = ("twins-lookalike", "lookalike", "talks-lookalike")
    """Of harmless prompts that look harmful: the hard negatives."""
    benign: tuple[str, ...] = ("everyday", "plain")
    """Of plainly harmless prompts."""
    exclude: tuple[str, ...] = ()
    """Suites that will be reported on: a training prompt is left out if it, or nearly it, occurs in one."""
    report: tuple[str, ...] = ("harmful", "lookalike", "plain")
    """Suites whose test prompts say at the end how often the gate opens; nothing is chosen on them."""
    system: tuple[str, ...] = (SAFETY_SYSTEM_PROMPT, "")
    """System prompts under which every prompt is read; empty: the chat template's own."""
    false_alarms: float = 0.01
    """Share of benign prompts for which the gate may open."""
    lookalike_alarms: float = 0.1
    """Share of look-alikes for which it may open."""
    talk_alarms: float = 0.0
    """Share of look-alikes in later turns of a conversation for which it may open there, by a threshold of their own;
    0: one threshold for all."""
    monitor: float = 0.0
    """Share of the model's answers to benign prompts in which it may open while they are written; 0: not monitored."""
    strength: Literal["full", "probability"] = "full"
    """Whether a gate that opened lets edits go all of their way, or the share that the probability is."""
    data_dir: Path | None = None
    """Folder of data sets; without it, sets that demur does not bring come from the hub."""
    seed: int = 0
    """Seed of folds and intervals."""
    name: str = "gate"
    """Name of the run, and of the gated spec."""

    def __post_init__(self) -> None:
        for name in ("false_alarms", "lookalike_alarms", "talk_alarms", "monitor"):
            value = getattr(self, name)
            if not 0 <= value < 1 or (name in ("false_alarms", "lookalike_alarms") and value == 0):
                raise InputError(f"{name} is {value}, expected a share between 0 and 1, as 0.01")
        if self.latents < 1:
            raise InputError(f"latents is {self.latents}, expected at least 1")
        if not self.name or set(self.name) & set("/\\") or self.name in ("run", "seconds", "trained"):
            raise InputError(f"name is {self.name!r}, which cannot be the name of the gated spec; choose another")
        for name in ("harmful", "benign", "pool", "system"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty; give at least one")
        if self.inputs == "latents" and "attention" in self.pool:
            raise InputError("pool attention reads the residual, not latents; use token or turn, or inputs residual")
        if both := set(self.exclude) & {*self.harmful, *self.lookalike, *self.benign}:
            raise InputError(f"{sorted(both)[0]} is to be trained on and to be left out; choose one")


@dataclass(frozen=True)
class GateTrain:
    """Train a gate: a probe that tells harmful prompts from look-alikes and others, calibrated to false alarms."""

    out: Path | None = None
    """Run folder; a run found there goes on. Default: `runs/NAME-HASH`."""
    json: bool = False
    """Print one JSON object on stdout."""
    config: tyro.conf.OmitArgPrefixes[GateConfig] = GateConfig()
    """What to train on."""
