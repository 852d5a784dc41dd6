"""`demur suffix`: adversarial suffixes found on the unsteered model, as a suite that `demur eval` runs on every side.

So their transfer to steered sides is measured like anything else: same judge, paired, with intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from demur import progress
from demur.data.prompts import spread
from demur.data.suites import load_suite
from demur.errors import InputError, RunExistsError
from demur.lm.chat import with_system
from demur.lm.gcg import gcg
from demur.lm.load import load
from demur.record import append_jsonl, read_jsonl, to_json
from demur.types import Intent, Prompt, Split, stable_hash
from demur.verbs.attack_config import Suffix
from demur.verbs.eval_config import named_limit
from demur.verbs.run_folder import held

WRAPPER = "gcg"


@dataclass(frozen=True)
class Row:
    """A line of the file: a request, as it is or with a suffix."""

    id: str
    text: str
    intent: Intent
    category: str
    split: Split
    wrapper: str
    """`gcg`, or empty for the request as it is."""
    unwrapped: str
    loss: float
    """Nats per token of the wanted beginning of the answer, under the suffix it began with or the one found."""
    settings: str
    """Hash of how it was looked for."""


@dataclass(frozen=True)
class Suffixes:
    """What `demur suffix` prints."""

    file: str
    requests: int
    start: float
    """Mean loss under the suffixes that were begun with."""
    loss: float
    """Mean loss under those that were found."""


def suffix(config: Suffix) -> Suffixes:
    """Find a suffix for every request that has none in the file yet.

    Raises as `load_suite`, `load` and `gcg` do, and `RunExistsError` for a file that was made otherwise.
    """
    what = config.config
    name, limit = named_limit(what.suite)
    prompts = [p for p in load_suite(name, what.data_dir, "harmful") if what.split in ("all", p.split)]
    if not prompts:
        raise InputError(f"{name} has no harmful prompts in its {what.split} split; choose another --split, or all")
    prompts = spread(prompts, limit)
    # two processes that write one file would find everything twice
    lock = config.out.with_name(f".{config.out.name}.lock")
    with held(lock, f"{config.out} is being written by another process; wait, or give another file"):
        return _find(config, prompts)


def _find(config: Suffix, prompts: Sequence[Prompt]) -> Suffixes:
    what = config.config
    settings = stable_hash(to_json(what))
    rows = read_jsonl(Row, config.out)
    if any(row.settings != settings for row in rows):
        raise RunExistsError(f"{config.out} was made with other settings; give another file, or repeat its settings")
    done = {row.id for row in rows}
    left = [prompt for prompt in prompts if _id(prompt, WRAPPER) not in done]
    if left:
        progress.say(f"loading {what.model}")
        lm = load(what.model, what.dtype, what.device, what.revision)
        lm.model.requires_grad_(False)
        with progress.track("suffixes", len(left) * what.steps, "steps") as advance:
            for prompt in left:
                messages = with_system(prompt, what.system)
                found = gcg(
                    lm, messages, what.target, what.steps, what.width, what.top, what.length, what.seed, advance
                )
                new = [
                    _row(prompt, "", prompt.text, found.start, settings),
                    _row(prompt, WRAPPER, f"{prompt.text} {found.text}", found.loss, settings),
                ]
                new = [row for row in new if row.id not in done]
                append_jsonl(config.out, new)
                rows += new
    starts, losses = ([row.loss for row in rows if row.wrapper == name] for name in ("", WRAPPER))
    return Suffixes(str(config.out.resolve()), len(losses), sum(starts) / len(starts), sum(losses) / len(losses))


def _id(prompt: Prompt, wrapper: str) -> str:
    return f"{prompt.id}@{wrapper}" if wrapper else prompt.id


def _row(prompt: Prompt, wrapper: str, text: str, loss: float, settings: str) -> Row:
    unwrapped = prompt.text if wrapper else ""
    return Row(
        _id(prompt, wrapper),
        text,
        "harmful",
        prompt.category,
        prompt.split,
        wrapper,
        unwrapped,
        round(loss, 4),
        settings,
    )
