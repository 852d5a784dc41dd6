"""Config of `demur optimize`. No torch here."""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal, get_args

import tyro

from demur.errors import InputError
from demur.results import Objective
from demur.types import SAFETY_SYSTEM_PROMPT
from demur.verbs.eval_config import named_limit
from demur.verbs.model_config import ModelConfig

Where = Literal["all", "prompt", "generation", "answer", "first", "half_life"]
GateKind = Literal["none", "latent", "probe"]


@dataclass(frozen=True)
class OptimizeConfig(ModelConfig):
    """What is searched, and on what. All prompts are of the select split."""

    sae: tuple[str, ...] = ("smollm2-135m-instruct",)
    """SAEs, each at its own hookpoint: several let the search choose the layer."""
    probe: tuple[Path, ...] = ()
    """Probe files that may gate, as `demur gate train` writes them."""
    latents: tuple[int, ...] = ()
    """Latents to choose from; without any, those proposed that raise the refusal log-odds most, for each SAE."""
    pool: int = 8
    """How many are found."""
    gate_latents: tuple[int, ...] = ()
    """Latents that may gate; without any, those that tell harmful from plain prompts best are found for each SAE."""
    gate_pool: int = 4
    """How many are found."""
    set_size: int = 2
    """Latents clamped together at most."""
    values: tuple[float, float] = (1, 12)
    """Clamp values from ... to ..., in latent units."""
    positions: tuple[Where, ...] = get_args(Where)
    """Tokens that may be steered: all, the prompt, what the model writes, or the answer, which is the prompt's last
    token and what the model writes (all of it, the first few tokens, or fading with a half-life)."""
    gates: tuple[GateKind, ...] = get_args(GateKind)
    """None, a latent or a probe over a threshold at the last token of the prompt."""
    objectives: tuple[Objective, ...] = ("harmful", "benign", "kl")
    """What is weighed up: harmful prompts refused, benign ones lost (refused or broken), KL, capability. Everything is
    measured and shown in any case."""
    suite: tuple[str, ...] = ("harmful:24", "lookalike:24", "plain:24")
    """Prompt suites (`demur suites` lists them) or files, each as NAME or NAME:LIMIT."""
    data_dir: Path | None = None
    """Folder of data sets; without it, sets that demur does not bring come from the hub."""
    damage_prompts: int = 16
    """Demur's own plain prompts on whose unsteered answers KL is measured."""
    questions: int = 40
    """Multiple-choice questions at most; 0 for all."""
    system: str = SAFETY_SYSTEM_PROMPT
    """System prompt of every conversation; empty for the chat template's own."""
    max_new_tokens: int = 28
    """Length limit of an answer; also the most for `first` and `half_life`."""
    batch_size: int = 128
    """Prompts generated together."""
    screen_prompts: int = 8
    """Harmful prompts, and as many benign ones, on which a spec is screened before anything is generated."""
    inert: float = 0.1
    """A spec that raises the refusal log-odds of harmful prompts by less, in nats, is pruned: it does nothing."""
    most_kl: float = 1.5
    """A spec that moves screened answers further, in nats per token, is pruned: it breaks them."""
    startup: int = 20
    """Trials drawn at random before those that are modelled (TPE)."""
    seed: int = 0
    """Seed of the search and of intervals; generation is greedy."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(float(value) for value in self.values))
        for name in (
            "pool",
            "gate_pool",
            "set_size",
            "max_new_tokens",
            "batch_size",
            "screen_prompts",
            "startup",
            "damage_prompts",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("sae", "positions", "gates", "objectives", "suite"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise InputError(f"{name} is {', '.join(map(str, given)) or 'empty'}, expected one or more, each once")
        low, high = self.values
        if not 0 < low <= high < inf:
            raise InputError(f"values are {low:g} {high:g}; expected the least and the largest, above 0")
        for name in ("latents", "gate_latents"):
            given = getattr(self, name)
            if len(set(given)) < len(given) or min(given, default=0) < 0:
                raise InputError(f"{name} are {list(given)}; expected different numbers from 0 up")
            if given and len(self.sae) > 1:
                raise InputError(
                    f"{name} were given, but there are {len(self.sae)} SAEs, whose numbers mean different latents; "
                    "leave them out, or give one SAE"
                )
        if len(self.objectives) < 2:
            raise InputError(f"objectives is {self.objectives[0]} alone, expected two or more to weigh up")
        if self.gates == ("probe",) and not self.probe:
            raise InputError("gates is probe, but no probe was given; give --probe FILE, which demur gate train writes")
        if self.questions < 0 or self.inert < 0 or self.most_kl <= 0:
            raise InputError(
                f"questions is {self.questions}, inert {self.inert:g} and most_kl {self.most_kl:g}; expected 0 or "
                "more, and most_kl above 0"
            )
        for given in self.suite:
            named_limit(given)


@dataclass(frozen=True)
class Optimize:
    """Search for specs that weigh refusing harmful prompts against over-refusal and damage; you choose one."""

    run: tyro.conf.Positional[Path | None] = None
    """Run folder to go on with, to pick from or to report on; its settings are taken from there."""
    trials: int = 100
    """Trials that the run has in the end: a run that has 100 gets 50 more with `--trials 150`."""
    workers: int = 1
    """Processes that try specs. One, with its seed, always tries the same; several do not."""
    out: Path | None = None
    """Run folder of a new run; a run of the same settings found there goes on. Default: `runs/optimize-HASH`."""
    pick: int | None = None
    """Trial of the run to write as a spec file; nothing is searched."""
    name: str = ""
    """With --pick: the file, as NAME for `NAME.json`."""
    report: bool = False
    """Evaluate the front, or what is picked, on test prompts, which nothing was chosen by; nothing is searched."""
    json: bool = False
    """Print one JSON object on stdout."""
    config: tyro.conf.OmitArgPrefixes[OptimizeConfig] = OptimizeConfig()
    """What is searched."""

    def __post_init__(self) -> None:
        for name in ("trials", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if (self.pick is not None or self.report) and self.run is None:
            raise InputError("pick and report need a run; give its folder: demur optimize FOLDER")
        if (self.pick is not None) != bool(self.name) and not (self.pick is not None and self.report):
            raise InputError("pick needs a trial and a name, as --pick 12 --name strict")
        if self.run is not None and self.out is not None:
            raise InputError(f"both the run {self.run} and --out {self.out} were given; give one of them")
