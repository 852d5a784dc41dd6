"""Settings of `demur attack`. A sentence under each field is its help text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from demur.errors import InputError
from demur.types import SAFETY_SYSTEM_PROMPT
from demur.verbs.judge_config import JudgedBy, JudgeName
from demur.verbs.sides_config import SidesConfig


@dataclass(frozen=True)
class AttackConfig(SidesConfig):
    """Who attacks what, and how long."""

    objectives: Path | None = None
    """File of escalations (docs/attacks.md); by default demur's own eight."""
    objective: tuple[str, ...] = ()
    """Ids of those to use; empty for all."""
    seeds: int = 5
    """Independent conversations about each objective."""
    max_turns: int = 10
    """Turns of a conversation, those taken back not counted."""
    max_backtracks: int = 10
    """Refused turns that are taken back; later ones stay."""
    attacker: str = "script"
    """`script` needs no model. Else a model that writes the questions: a hub id, folder or GGUF file, or a name at
    --attacker-endpoint."""
    attacker_endpoint: str = ""
    """OpenAI-compatible endpoint of the attacker; its key, if it needs one, is read from OPENAI_API_KEY."""
    success: Literal["script", "scale", "harmbench", "llama_guard", "wildguard", "strongreject"] = "script"
    """Who says that an objective is reached. `script`: rules, for scripted escalations. `scale`: a model gives a number
    from 0 to 100, and 80 will do. Else the rubric of a judge that says whether the answer is harmful."""
    success_model: str = ""
    """The model asked; by default the one its rubric was made for, for `scale` the attacker's."""
    success_endpoint: str = ""
    """OpenAI-compatible endpoint of that model; empty: it is loaded here."""
    refusals: JudgeName = "rules"
    """Who says whether the target refused: `rules`, or the rubric that a model is asked."""
    refusals_model: str = ""
    """The model asked; by default the one its rubric was made for."""
    refusals_endpoint: str = ""
    """OpenAI-compatible endpoint of that model; empty: it is loaded here."""
    replay: Path | None = None
    """Run folder of `demur attack`: ask what stood in its unsteered conversations, with no attacker."""
    system: str = SAFETY_SYSTEM_PROMPT
    """System prompt of the target; a spec's own stands in its place. Empty: the chat template's own."""
    target_endpoint: str = ""
    """OpenAI-compatible endpoint of the target (demur serve, vLLM, any), as http://localhost:8000/v1, in place of a
    model that is loaded here; its key, if it needs one, is read from OPENAI_API_KEY."""
    target: tuple[str, ...] = ()
    """Model names that the endpoint serves, the first of them to compare the others with."""
    max_new_tokens: int = 96
    """Length limit of a reply."""
    batch_size: int = 40
    """Conversations that go on together."""
    seed: int = 0
    """Seed of intervals; conversations have seeds of their own, 0 and up."""
    name: str = "attack"
    """Name of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "max_turns", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if bool(self.target) != bool(self.target_endpoint):
            raise InputError(
                "a target endpoint and the names it serves belong together; give --target-endpoint and --target"
            )
        if len(set(self.target)) < len(self.target):
            raise InputError(f"target is {', '.join(self.target)}; each may occur once")
        if self.target and (self.spec or self.latent is not None):
            raise InputError("the endpoint steers by the names it serves; leave --spec and --latent out")
        if self.max_backtracks < 0:
            raise InputError(f"max_backtracks is {self.max_backtracks}, expected 0 or more")
        if self.attacker == "script" and self.attacker_endpoint:
            raise InputError("the scripted attacker asks no endpoint; name its model with --attacker")
        if self.success == "scale" and self.attacker == "script" and not self.success_model:
            raise InputError("a scale needs a model to give the numbers; name it with --success-model")
        if self.success == "script" and (self.success_model or self.success_endpoint):
            raise InputError("success by script asks no model; leave --success-model out, or give another --success")
        if self.success == "script" and self.attacker != "script":
            raise InputError("success by script needs the scripted attacker; give --success scale or a judge of harm")
        self.refusals_by  # noqa: B018 (checks itself)
        if self.attacker != "script" and self.replay:
            raise InputError("a replay has no attacker; leave --attacker out")

    @property
    def refusals_by(self) -> JudgedBy:
        """The judge of refusals."""
        return JudgedBy(
            self.refusals, self.refusals_model, self.refusals_endpoint, dtype=self.dtype, device=self.device
        )

    @property
    def success_by(self) -> JudgedBy:
        """The judge of harm. Raises `InputError` where success is not judged by a rubric."""
        if self.success == "script" or self.success == "scale":
            raise InputError(f"success is said by {self.success}, which is no judge of harm")
        return JudgedBy(self.success, self.success_model, self.success_endpoint, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Attack:
    """Attack a model over several turns (Crescendo), unsteered and under each spec, paired."""

    out: Path | None = None
    """Run folder; a run found there goes on. Default: `runs/NAME-HASH`."""
    json: bool = False
    """Print one JSON object on stdout."""
    config: tyro.conf.OmitArgPrefixes[AttackConfig] = AttackConfig()
    """What to do."""


@dataclass(frozen=True)
class SuffixConfig:
    """Which requests get a suffix, and how hard it is looked for."""

    suite: str = "harmful:8"
    """Requests: a suite or a file, as NAME or NAME:LIMIT."""
    data_dir: Path | None = None
    """Folder of data sets, for a suite that demur does not bring."""
    target: str = "Sure, here is how to do that:"
    """How the answer should begin."""
    steps: int = 100
    """Replacements of one token."""
    width: int = 128
    """Replacements tried at each step."""
    top: int = 128
    """Of so many tokens with the steepest gradient at each place."""
    length: int = 20
    """Tokens of a suffix."""
    system: str = SAFETY_SYSTEM_PROMPT
    """System prompt under which it is looked for."""
    split: str = "test"
    """Requests of this split, or `all`."""
    model: str = "smollm2-135m-instruct"
    """Embedded model name, hub id, local folder or GGUF file; it is not steered."""
    revision: str = ""
    """Revision of a hub model."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    device: str = "cpu"
    """Torch device: cpu or cuda."""
    seed: int = 0
    """Seed of the replacements that are tried."""

    def __post_init__(self) -> None:
        for name in ("steps", "width", "top", "length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.split not in ("test", "select", "all"):
            raise InputError(f"split is {self.split!r}, expected test, select or all")


@dataclass(frozen=True)
class Suffix:
    """Find suffixes that make the unsteered model answer harmful requests (GCG), as a suite for `demur eval`."""

    out: tyro.conf.Positional[Path]
    """JSONL file to write: every request as it is, and with its suffix; one found there goes on."""
    json: bool = False
    """Print one JSON object on stdout."""
    config: tyro.conf.OmitArgPrefixes[SuffixConfig] = SuffixConfig()
    """What to do."""
