"""The steering spec: what to do to a model, as data. Frozen, JSON-able, checked when made; standard library only.

`demur.steering.steer` carries a spec out; `demur.steering.spec_file` reads and writes it.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from demur.errors import InputError
from demur.types import UNSTEERED, stable_hash

Op = Literal["clamp", "floor", "ceil", "add", "scale", "ablate"]
Unit = Literal["latent", "max_act", "sigma"]
Where = Literal["all", "prompt", "generation", "answer", "last_prompt_token", "user", "assistant", "template"]
_COUNTED: tuple[Where, ...] = ("generation", "answer")
"""Positions that are counted from the answer's beginning."""
SPEC_FORMAT: Literal["demur-spec/1"] = "demur-spec/1"
_STRICT = {"extra": "forbid"}


_LARGEST = 3.4e38
"""About the largest number of float32."""


def _is_float32(value: float) -> bool:
    return abs(value) <= _LARGEST


@dataclass(frozen=True)
class Edit:
    """One change to one or more latents of an SAE, on every steered token.

    With f the latent's activation and v the value, the latent becomes: `clamp` v, `floor` max(f, v), `ceil`
    min(f, v), `add` f + v, `scale` v x f, `ablate` 0. `add` may take it below zero, the others may not.
    """

    hookpoint: str
    sae: str
    """Hash of the SAE."""
    latents: tuple[int, ...]
    """A single number may be given for one latent."""
    value: float = 0.0
    op: Op = "clamp"
    unit: Unit = "latent"
    """Of the value. `latent`: the SAE's own activation units. `max_act`: multiples of the latent's largest activation
    on the SAE's reference text. `sigma`: multiples of its standard deviation there. `scale` has a bare factor."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        latents = (self.latents,) if isinstance(self.latents, int) else tuple(self.latents)
        object.__setattr__(self, "latents", latents)
        object.__setattr__(self, "value", float(self.value))
        if not latents or len(set(latents)) < len(latents) or min(latents) < 0:
            raise InputError(f"latents are {list(latents)}; expected one or more different numbers from 0 up")
        if not _is_float32(self.value):
            raise InputError(f"the value of {self.op} is {self.value}, expected a finite number")
        if self.value < 0 and self.op in ("clamp", "floor", "ceil", "scale"):
            raise InputError(
                f"the value of {self.op} is {self.value:g}, but a latent is never negative; give 0 or more, or use add"
            )
        if self.op == "ablate" and self.value:
            raise InputError(f"ablate takes no value, but {self.value:g} was given; leave it out, or use clamp")
        if self.op in ("scale", "ablate") and self.unit != "latent":
            raise InputError(f"{self.op} has no unit, but {self.unit!r} was given; leave it out")


@dataclass(frozen=True)
class DirectionEdit:
    """One change along a raw direction v of the residual: `add` value x v, or `project_out` the part along v."""

    hookpoint: str
    direction: str
    """Hash of the direction."""
    value: float = 1.0
    op: Literal["add", "project_out"] = "add"
    unit: Literal["direction", "sigma"] = "direction"
    """Of the value. `direction`: multiples of the vector as stored. `sigma`: multiples of the standard deviation of
    the residual along it on the direction's reference text."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", float(self.value))
        if not _is_float32(self.value):
            raise InputError(f"the value of {self.op} is {self.value}, expected a finite number")
        if self.op == "project_out" and (self.value != 1 or self.unit != "direction"):
            raise InputError("project_out removes the whole part along the direction and takes no value or unit")


@dataclass(frozen=True)
class Positions:
    """Which tokens, by their absolute place in their row; padding never. Cached and uncached passes agree."""

    where: Where = "all"
    """`prompt`: tokens the caller gave. `generation`: tokens the model wrote. `last_prompt_token`: the one whose output
    is the first written token. `answer`: that one and all after it, whose outputs are the answer. `user`, `assistant`:
    the text of such turns. `template`: what is no turn's text."""
    first: int = 0
    """With `generation` or `answer`: only the first so many of them; 0 for all."""
    every: int = 1
    """Only every n-th: places 0, n, 2n, ... counted from the start of the row, with `generation` and `answer` from
    their first token."""
    half_life: float = 0.0
    """With `generation` or `answer`: edits move the residual by 0.5 ** (n / half_life) of their way, n being the
    token's number among them from 0; 0: all of it throughout. A gate's own positions have none."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if self.first < 0 or self.every < 1:
            raise InputError(f"first is {self.first} and every is {self.every}; expected at least 0 and 1")
        if self.first and self.where not in _COUNTED:
            raise InputError(
                f"first counts tokens of the answer and needs where = 'answer' or 'generation', but where is "
                f"{self.where!r}"
            )
        if not 0 <= self.half_life <= _LARGEST or (self.half_life and self.where not in _COUNTED):
            raise InputError(
                f"half_life is {self.half_life:g} and where {self.where!r}; expected tokens, 0 or more, and "
                "where = 'answer' or 'generation'"
            )


@dataclass(frozen=True)
class LatentGate:
    """Steer a row from the first token on at which a latent, read at `positions`, exceeds `threshold`.

    Causal: the decision about a token looks at that token and earlier ones only. The latent is read before edits at
    its own hookpoint, which may not lie above an edit's.
    """

    hookpoint: str
    sae: str
    """Hash of the SAE."""
    latent: int
    threshold: float
    unit: Unit = "latent"
    positions: Positions = Positions()

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if not _is_float32(self.threshold) or self.threshold < 0 or self.latent < 0:
            raise InputError(
                f"the gate's latent is {self.latent} and its threshold {self.threshold:g}; expected 0 or more for both"
            )


@dataclass(frozen=True)
class NamedGate:
    """Like `LatentGate`, with a function of the caller's in place of a latent: see `steer(gates=...)`."""

    hookpoint: str
    name: str
    positions: Positions = Positions()

    __pydantic_config__ = _STRICT


@dataclass(frozen=True)
class ProbeGate:
    """Steer a row where a learned probe says, by a probability, that what is asked is harmful; see `demur gate train`.

    The probe reads at `positions`, by default the last token of the prompt, so that it is asked again in each turn of a
    conversation. Open from there on, and never again shut in the same row. Causal, as `LatentGate` is.
    """

    hookpoint: str
    probe: str
    """Hash of the probe."""
    threshold: float
    """Probability above which the gate opens."""
    positions: Positions = Positions("last_prompt_token")
    monitor: float = 1.0
    """Also opens where the probability exceeds this at a token that the model wrote: for answers that turn harmful on
    the way. 1: what the model writes is not looked at."""
    strength: Literal["full", "probability"] = "full"
    """`probability`: edits move the residual by that share of their way, the largest one read so far."""
    later: float | None = None
    """The threshold once the assistant has spoken, so that conversations, which may turn harmful slowly, can be held
    against another one than single prompts; None: `threshold`."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        for name in ("threshold", "monitor", "later"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"the gate's {name} is {value}; expected a probability from 0 to 1")


@dataclass(frozen=True)
class TextGate:
    """Steer a row where a classifier, asked for the conversation's text before the model runs, says that it is harmful.

    `steer` sees no text and cannot decide; `demur.text_gates.decide` does, for whoever formats the prompt. It reads
    each message of the user by itself; once open, the gate stays open in the turns after.
    """

    classifier: str
    """Model of Hugging Face for text classification (a name or folder), or an OpenAI-compatible moderation endpoint, as
    `moderation:URL#MODEL`."""
    threshold: float = 0.5
    """Opens where the score of `label` exceeds it."""
    label: str = ""
    """Class or moderation category that is read; empty: of a classifier with two classes the second, of an endpoint the
    largest score of any category."""

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InputError(f"the gate's threshold is {self.threshold}; expected a score from 0 to 1")
        if not self.classifier.strip():
            raise InputError("the gate names no classifier; give a model, or moderation:URL#MODEL")


Gate = LatentGate | ProbeGate | NamedGate | TextGate


@dataclass(frozen=True)
class SteeringSpec:
    """What to do to a model: data only, no tensors. Its hash labels every output made under it.

    All edits at one hookpoint read the residual as it was before any of them, and their changes add up.
    """

    edits: tuple[Edit | DirectionEdit, ...] = ()
    positions: Positions = Positions()
    gate: Gate | None = None
    """None: always open."""
    skip_first: bool = True
    """Leave the first token alone: it is an attention sink whose activation no SAE is trained on."""
    mode: Literal["error_preserving", "reconstruct"] = "error_preserving"
    """`error_preserving`: only the edited latents move. `reconstruct`: the residual becomes the decoded code, so that
    what the SAE cannot express is lost, as in several other tools; for measuring that loss."""
    exact: bool = True
    """Whether a latent of a top-k SAE is active is decided by its rank. False: by the SAE's stored threshold, which is
    faster and wrong for a measured share of tokens."""
    system: str = ""
    """A system prompt that belongs to the spec, for whoever formats the conversation; a baseline without edits."""
    format: Literal["demur-spec/1"] = SPEC_FORMAT

    __pydantic_config__ = _STRICT

    def __post_init__(self) -> None:
        latents = Counter((e.hookpoint, e.sae, i) for e in self.edits if isinstance(e, Edit) for i in e.latents)
        if twice := [place for place, times in latents.items() if times > 1]:
            place, sae, latent = twice[0]
            raise InputError(f"latent {latent} of SAE {sae} is edited twice at {place}; edit it once")
        if getattr(getattr(self.gate, "positions", None), "half_life", 0):
            raise InputError("the gate's positions have a half_life, but a gate does not fade; leave it out there")
        outs = [e.hookpoint for e in self.edits if isinstance(e, DirectionEdit) and e.op == "project_out"]
        if len(set(outs)) < len(outs):
            raise InputError(
                "two directions are projected out at one hookpoint, which together is no projection unless they are "
                "orthogonal; put them at two hookpoints"
            )

    def __add__(self, other: "SteeringSpec") -> "SteeringSpec":
        """Both at once. Raises `InputError` when they disagree about anything but edits."""
        for name in ("positions", "gate", "skip_first", "mode", "exact"):
            if self.edits and other.edits and getattr(self, name) != getattr(other, name):
                raise InputError(
                    f"two specs that differ in {name} cannot be one; give both the same, or keep them in separate rows"
                )
        if self.system and other.system and self.system != other.system:
            raise InputError("two specs with different system prompts cannot be one; drop one of the prompts")
        main = self if self.edits else other
        return replace(main, edits=self.edits + other.edits, system=self.system or other.system)

    @property
    def hash(self) -> str:
        """Stable over processes, key order, order of edits and fields left at their default; `unsteered` for a spec
        that changes nothing."""
        if not self.edits and not self.system:
            return UNSTEERED
        value = {f.name: asdict(self)[f.name] for f in fields(self) if getattr(self, f.name) != f.default}
        gate = value.get("gate") or {}
        places = [one or {} for one in (value.get("positions"), gate.get("positions"))]
        # specs had a hash before they had these fields
        for part, name, default in [*((one, "half_life", 0) for one in places), (gate, "later", None)]:
            if name in part and part[name] == default:
                del part[name]
        value["edits"] = sorted(value.get("edits", ()), key=lambda e: json.dumps(e, sort_keys=True))
        return stable_hash(value)
