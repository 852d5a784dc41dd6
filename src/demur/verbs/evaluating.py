"""What an evaluation is about: model, specs, prompts and texts, loaded and checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from demur.data.corpus import Corpus
from demur.data.prompts import load_questions, prompts_hash, spread, take
from demur.data.suites import load_suite
from demur.data.wrappers import read_templates, wrap
from demur.errors import InputError, MismatchError
from demur.eval.complete import Completions
from demur.eval.harness import require_lm_eval
from demur.eval.measurements import Measurements
from demur.eval.saved import COMPLETIONS, MEASUREMENTS, RESULT, read_run
from demur.eval.tasks import load_tasks, members
from demur.lm.batches import Row
from demur.lm.chat import chat_ids, text_ids, with_system
from demur.lm.load import LanguageModel
from demur.record import to_json
from demur.sae.store import LoadedSae
from demur.spec import SteeringSpec, TextGate
from demur.steering.edits_at import lowest_hookpoint
from demur.steering.vectors import Vector
from demur.types import (
    Completion,
    Hookpoint,
    Intent,
    Prompt,
    Run,
    Split,
    stable_hash,
)
from demur.verbs.documents import rows as document_rows
from demur.verbs.eval_config import Eval, EvalConfig, named_limit
from demur.verbs.run_folder import Clock, check_folder, config_hash, new_run
from demur.verbs.sides import Named, load_model, read_sides

_DAMAGE_PROMPTS = 40
"""Of demur's plain prompts, those on whose unsteered answers KL is measured."""
_TEXTS, _TEXT_TOKENS = 200, 256
"""Pieces of reference text at most, and their length in tokens."""


class Task(NamedTuple):
    """A task of lm-eval to be run."""

    name: str
    group: str
    """What it was asked for as, e.g. `mmlu`."""
    limit: int
    """Documents at most; 0 for all."""


@dataclass
class Evaluating:
    """An evaluation in progress."""

    config: EvalConfig
    folder: Path
    lm: LanguageModel
    named: list[Named]
    saes: list[LoadedSae]
    directions: list[Vector]
    prompts: list[Prompt]
    """Reported on."""
    plain: list[Prompt]
    """Damage is measured on the unsteered answers to these."""
    texts: list[tuple[str, Row]]
    """Reference text as rows of token ids, each with an id."""
    tasks: list[Task]
    loaded: dict[str, Any]
    """lm-eval's task objects by name, their data read."""
    reused: list[Completion]
    """Taken over from other runs."""
    limits: dict[str, int]
    """Suites (by the source of their prompts) and tasks of which only so many items are taken."""
    clock: Clock

    @property
    def specs(self) -> list[SteeringSpec]:
        """Of all sides."""
        return [one.spec for one in self.named]

    @cached_property
    def completions(self) -> Completions:
        """All answers."""
        return Completions(self.folder / COMPLETIONS)

    @cached_property
    def measured(self) -> Measurements:
        """KL and likelihoods."""
        return Measurements(self.folder / MEASUREMENTS)

    @cached_property
    def hookpoint(self) -> Hookpoint:
        """Below it nothing differs."""
        return lowest_hookpoint(self.specs) or Hookpoint(self.lm.n_blocks - 1)

    def rows(self, prompts: Sequence[Prompt], spec: SteeringSpec) -> list[list[int]]:
        """Token ids of the conversations, with the system prompt in force under the spec."""
        return [chat_ids(self.lm, with_system(prompt, spec.system or self.config.system)) for prompt in prompts]


def begin(config: Eval, specs: Sequence[Named] | None) -> tuple[Evaluating, Run]:
    """Load everything that `config` names and try every spec; nothing is written.

    `specs`: in place of the spec files and clamps that `config` names. Raises as `load_suite`, `wrap`, `read_spec`,
    `load_sae`, `load`, `steer` and `load_tasks` do, and `RunExistsError` when the run folder holds another run.
    """
    what = config.config
    folder = config.out or run_folder(what)
    check_folder(folder, what)
    sides = read_sides(what, specs)
    named = sides.named
    prompts, limits = _prompts(what)
    split: Split = "select" if what.split == "select" else "test"
    plain = take(load_suite("plain"), split, _DAMAGE_PROMPTS) if what.damage else []
    tasks = _tasks(what)
    limits |= {task.group: task.limit for task in tasks if task.limit}
    if tasks and not what.chat and (asks := [one.label for one in named if one.spec.system]):
        raise InputError(f"{asks[0]} has a system prompt, for which tasks need the chat template; give --chat")
    if tasks and (asks := [one.label for one in named if isinstance(one.spec.gate, TextGate)]):
        raise InputError(
            f"{asks[0]} has a gate that reads what a user says, but the questions of tasks are texts to be continued, "
            "with examples in them; leave the tasks out, or the gate"
        )
    lm = load_model(what, sides)
    loaded = load_tasks([task.name for task in tasks], what.data_dir) if tasks else {}
    texts = _texts(lm, what) if what.damage else []
    run = new_run(
        "eval",
        what,
        {
            "model": lm.identity,
            "specs": ", ".join(one.spec.hash for one in named),
            "prompts": prompts_hash(prompts),
        },
    )
    going = Evaluating(
        what,
        folder,
        lm,
        named,
        sides.saes,
        sides.directions,
        prompts,
        plain,
        texts,
        tasks,
        loaded,
        [],
        limits,
        Clock(folder, RESULT),
    )
    for other in config.reuse:
        going.reused += _reused(going, other)
    return going, run


def run_folder(config: EvalConfig) -> Path:
    """The usual run folder, named after the run and its settings."""
    return Path("runs") / f"{config.name}-{config_hash(config)[:8]}"


def _prompts(config: EvalConfig) -> tuple[list[Prompt], dict[str, int]]:
    """Of every suite the prompts of the split, evenly spread to its limit, under every wrapper."""
    found: list[Prompt] = []
    limits = {}
    file, most = named_limit(config.templates)
    templates = read_templates(Path(file), most, config.seed) if file else []
    for given in config.suite:
        name, limit = named_limit(given)
        prompts = load_suite(name, config.data_dir, otherwise=cast(Intent, config.intent) if config.intent else None)
        chosen = [p for p in prompts if config.split in ("all", p.split)]
        if not chosen:
            raise InputError(f"{name} has no prompts in its {config.split} split; choose another --split, or all")
        if limit and limit < len(chosen):
            limits[chosen[0].source] = limit
            chosen = spread(chosen, limit)
        found += wrap(chosen, config.wrapper, templates)
    seen: dict[str, str] = {}
    for prompt in found:
        if prompt.id in seen:
            raise InputError(
                f"the prompt id {prompt.id!r} occurs in {seen[prompt.id]} and again in {prompt.source}; name each "
                "suite once, and give files of one name ids of their own"
            )
        seen[prompt.id] = prompt.source
    return found, limits


def _tasks(config: EvalConfig) -> list[Task]:
    if not config.task:
        return []
    require_lm_eval()
    found: dict[str, Task] = {}
    for group, limit in map(named_limit, config.task):
        for name in members(group):
            if name in found:
                raise InputError(f"task {name} is asked for twice, by {found[name].group} and by {group}; name it once")
            found[name] = Task(name, group, limit)
    return list(found.values())


def _texts(lm: LanguageModel, config: EvalConfig) -> list[tuple[str, Row]]:
    if not config.text:
        questions = load_questions()
        return [
            (f"mc/{q.id}", text_ids(lm, f"Question: {q.question}\nAnswer: {q.choices[q.answer]}", special=True))
            for q in questions
        ]
    found: list[tuple[str, Row]] = []
    for document in Corpus(config.text):
        for row in document_rows(lm, document, _TEXT_TOKENS):
            if len(row.ids) > 1:
                found.append((f"text/{stable_hash(row.ids)}/{len(found)}", row.ids))
            if len(found) == _TEXTS:
                return found
    if not found:
        raise InputError("the reference text holds no document of two tokens or more; give more text")
    return found


def _reused(going: Evaluating, folder: Path) -> list[Completion]:
    """What another run has of the same model, specs, prompts and settings."""
    other = read_run(folder)
    mine = to_json(going.config)
    if other.run.artefacts.get("model") != going.lm.identity:
        raise MismatchError(f"{folder} is a run of another model ({other.run.artefacts.get('model')})")
    for key in ("system", "max_new_tokens", "dtype"):
        if other.run.config.get(key) != mine[key]:
            raise MismatchError(
                f"{folder} was made with another {key} ({other.run.config.get(key)!r}, here {mine[key]!r}); "
                "leave it out of --reuse"
            )
    theirs = {prompt.id: prompt for prompt in other.prompts}
    same = {prompt.id for prompt in going.prompts if (has := theirs.get(prompt.id)) and has.messages == prompt.messages}
    specs = {one.spec.hash for one in going.named}
    return [one for one in other.completions if one.prompt in same and one.spec in specs]
