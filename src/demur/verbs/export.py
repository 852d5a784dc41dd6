"""`demur export`: write a spec for llama.cpp or lm-eval, if it makes the model refuse more.

demur strengthens and corrects refusals. What weakens them it does not write for other tools: before a file is written
the model answers harmful prompts with and without the spec, and more must be refused with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from demur import progress
from demur.data.prompts import load_prompts, take
from demur.errors import InputError
from demur.eval.statistics import rate
from demur.judges.rules import RulesJudge
from demur.lm.batches import batches
from demur.lm.chat import chat_ids, with_system
from demur.lm.generate import generate
from demur.spec import SteeringSpec
from demur.steering.added import added_vectors, check_addable
from demur.steering.gguf import ControlVector, write_control_vector
from demur.steering.lm_eval import ALL_BLOCKS_SINCE, steered_entries, write_steered
from demur.steering.spec_file import read_spec
from demur.steering.steer import steer
from demur.types import SAFETY_SYSTEM_PROMPT, UNSTEERED, Completion, Label, Prompt, Rate
from demur.verbs.config import Export
from demur.verbs.steered import Loaded, load_steered

Format = Literal["gguf", "lm-eval"]
_FORMATS: dict[str, Format] = {".gguf": "gguf", ".pt": "lm-eval"}
_PROMPTS = 16
_ANSWER_TOKENS = 20
_BATCH = 16


@dataclass(frozen=True)
class Exported:
    """What `demur export` wrote, and why it was allowed to."""

    path: str
    format: Format
    spec: str
    """Hash of the spec."""
    model: str
    blocks: tuple[int, ...]
    """0-based blocks to whose output something is added."""
    refused_before: Rate
    """Harmful select prompts fully refused / scored, without the spec. Broken text is scored and not refused."""
    refused_after: Rate
    """The same prompts with what the file does. A prompt unscored on either side is in neither denominator."""
    system: str
    """The system prompt under which both were counted."""
    judge: str
    notes: tuple[str, ...]
    """What whoever uses the file must know."""


class Refusals(NamedTuple):
    """Labels of the same prompts without and with a spec."""

    before: list[Label]
    after: list[Label]


def export(config: Export) -> Exported:
    """Write `config.out`, whole or not at all.

    Raises `InputError` for an ending without a format, a spec that is no constant vector, and a spec under which the
    model does not refuse more; and as `load_steered` does.
    """
    kind = _format(config)
    if config.steered.latent is not None:
        raise InputError(
            "--latent makes a clamp, which no added vector can do; write a spec file with the op add and give --spec"
        )
    if config.steered.spec is not None:
        check_addable(read_spec(config.steered.spec))  # before a large model is loaded
    loaded = load_steered(config.steered, need_spec=True)
    lm, spec = loaded.lm, loaded.spec
    vectors = added_vectors(lm.model, spec, loaded.saes, loaded.directions)
    # made before the model answers, because they raise for what a format cannot say
    control = ControlVector(vectors, lm.model.config.model_type, spec.hash) if kind == "gguf" else None
    entries = steered_entries(lm.model, vectors) if kind == "lm-eval" else None
    system = loaded.system or SAFETY_SYSTEM_PROMPT
    before, after = _rates(refusals(loaded, replace(spec, skip_first=False), system))
    if after.k <= before.k:
        raise InputError(
            f"the model refuses {after.k} of {after.n} harmful prompts with the spec and {before.k} of {before.n} "
            "without it, and demur exports only what makes a model refuse more; try another value or latent"
        )
    if control is not None:
        write_control_vector(config.out, control)
    if entries is not None:
        write_steered(config.out, entries)
    return Exported(
        path=str(config.out),
        format=kind,
        spec=spec.hash,
        model=lm.name,
        blocks=tuple(vectors),
        refused_before=before,
        refused_after=after,
        system=system,
        judge=RulesJudge().name,
        notes=tuple(_notes(kind, loaded, vectors)),
    )


def refusals(loaded: Loaded, spec: SteeringSpec, system: str) -> Refusals:
    """Judge the model's answers to harmful select prompts after `system`, without and with `spec`.

    The spec is what the file does: a reader of the file steers the first token too.
    """
    prompts = take(load_prompts("harmful", "harmful"), "select", _PROMPTS)
    with progress.track("refusals before and after", 2 * len(prompts), "answers") as advance:
        found = []
        for one in (None, spec):
            found.append(_labels(loaded, one, prompts, system))
            advance(len(prompts))
    return Refusals(*found)


def _labels(loaded: Loaded, spec: SteeringSpec | None, prompts: Sequence[Prompt], system: str) -> list[Label]:
    lm, judge = loaded.lm, RulesJudge()
    rows = [chat_ids(lm, with_system(prompt, system)) for prompt in prompts]
    labels: dict[int, Label] = {}
    steered = nullcontext() if spec is None else steer(lm, spec, loaded.saes, directions=loaded.directions)
    with steered:
        for batch in batches([len(row) for row in rows], _BATCH):
            answers = generate(lm, [rows[i] for i in batch], _ANSWER_TOKENS)
            for i, answer in zip(batch, answers, strict=True):
                name = UNSTEERED if spec is None else spec.hash
                said = Completion(prompts[i].id, name, answer.text, len(answer.ids), answer.stop)
                labels[i] = judge.judge(prompts[i], said).label
    return [labels[i] for i in range(len(prompts))]


def _rates(found: Refusals) -> tuple[Rate, Rate]:
    """Refused / scored before and after, over the prompts that are scored on both sides."""
    pairs = [pair for pair in zip(found.before, found.after, strict=True) if "unscored" not in pair]
    before, after = (sum(pair[side] == "refused" for pair in pairs) for side in (0, 1))
    return rate(before, len(pairs)), rate(after, len(pairs))


def _format(config: Export) -> Format:
    if config.out.suffix == ".csv":
        raise InputError(
            f"{config.out} is a .csv file, in which lm-eval names latents of SAEs that sparsify or SAELens load, and "
            "neither loads demur's; write a .pt file, which holds the vector itself"
        )
    if config.out.suffix not in _FORMATS:
        raise InputError(
            f"{config.out} has the ending {config.out.suffix!r}; expected .gguf for llama.cpp or .pt for lm-eval"
        )
    return _FORMATS[config.out.suffix]


def _notes(kind: Format, loaded: Loaded, blocks: Collection[int]) -> list[str]:
    tool = "llama.cpp" if kind == "gguf" else kind
    notes = []
    if loaded.spec.skip_first:
        notes.append(
            f"The spec leaves the first token of a row alone; {tool} adds to it too, and so did the model when it "
            "was asked here."
        )
    if kind == "gguf":
        notes.append("Only strength 1 was measured (--control-vector), not what --control-vector-scaled makes of it.")
    elif len(blocks) > 1:
        notes.append(f"lm-eval before {ALL_BLOCKS_SINCE} adds the last block's vector at every block; use a later one.")
    return notes
