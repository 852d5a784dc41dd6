"""Configs of the verbs that evaluate, as `config` has those of the others. No torch here."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from demur.errors import InputError
from demur.types import SAFETY_SYSTEM_PROMPT
from demur.verbs.sides_config import SidesConfig


@dataclass(frozen=True)
class EvalConfig(SidesConfig):
    """What is evaluated, and on what."""

    suite: tuple[str, ...] = ("harmful", "lookalike", "plain")
    """Prompt suites (`demur suites` lists them) or files, each as NAME or NAME:LIMIT (advbench:100)."""
    intent: str = ""
    """What the prompts of a file are that does not say so itself: harmful or benign."""
    wrapper: tuple[str, ...] = ("none",)
    """Jailbreak wrappers around every prompt, as a factor: none, prefix_injection, base64, ... (docs/suites.md)"""
    templates: str = ""
    """For the wrapper inthewild: a file of jailbreak templates, as FILE or FILE:LIMIT (drawn by the seed)."""
    task: tuple[str, ...] = ()
    """lm-eval tasks (mmlu, piqa, truthfulqa_mc1, gsm8k, ...), each as NAME or NAME:LIMIT; need `demur[eval]`."""
    chat: bool = False
    """Ask tasks as conversations in the chat template, which a spec with a system prompt needs; else as plain text."""
    data_dir: Path | None = None
    """Folder of data sets; without it, sets that demur does not bring come from the hub."""
    system: str = SAFETY_SYSTEM_PROMPT
    """System prompt of every prompt of a suite; a spec's own stands in its place. Empty: the chat template's own."""
    split: str = "test"
    """Prompts of this split, or `all`."""
    max_new_tokens: int = 64
    """Length limit of an answer."""
    batch_size: int = 128
    """Prompts generated together."""
    damage: bool = True
    """Measure KL on demur's plain test prompts and perplexity on reference text."""
    text: tuple[Path, ...] = ()
    """Reference text for perplexity (JSONL as for `sae train`); by default demur's own questions with their answers."""
    seed: int = 0
    """Seed of intervals; generation is greedy."""
    name: str = "eval"
    """Name of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.split not in ("test", "select", "all"):
            raise InputError(f"split is {self.split!r}, expected test, select or all")
        if self.intent not in ("", "harmful", "benign"):
            raise InputError(f"intent is {self.intent!r}, expected harmful or benign")
        if not self.suite and not self.task:
            raise InputError("neither a suite nor a task was given; give --suite, --task or both")
        for name in ("suite", "task", "wrapper"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise InputError(f"{name} is {', '.join(map(str, given))}; each may occur once")
        for given in (*self.suite, *self.task, self.templates):
            named_limit(given)


def named_limit(given: str) -> tuple[str, int]:
    """NAME:LIMIT as name and limit; 0 without one. A colon before anything but a number belongs to the name."""
    name, colon, limit = given.rpartition(":")
    if not colon or not limit.lstrip("-").isdigit():
        return given, 0
    if int(limit) < 1:
        raise InputError(f"{given!r} has the limit {limit}, expected at least 1")
    return name, int(limit)


@dataclass(frozen=True)
class Eval:
    """Evaluate a steered model: harmful and harmless prompts refused, capability, damage; beside the unsteered one."""

    out: Path | None = None
    """Run folder; a run found there goes on. Default: `runs/NAME-HASH`."""
    reuse: tuple[Path, ...] = ()
    """Finished run folders whose completions of the same model, spec, prompt and settings are taken over."""
    json: bool = False
    """Print one JSON object on stdout."""
    config: tyro.conf.OmitArgPrefixes[EvalConfig] = EvalConfig()
    """What to evaluate."""


@dataclass(frozen=True)
class Compare:
    """Compare runs prompt by prompt: the first side is the base, every other is set against it."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders of `demur eval`; all sides of each, or one as FOLDER@LABEL (a spec hash will do)."""
    margin: float = 0.02
    """Loss of capability that counts as none, as a share (0.02: two points)."""
    judge: str = ""
    """Judge whose verdicts are compared, by its name or how it begins (wildguard); by default the first of the first
    run."""
    correct: Path | None = None
    """What `demur judge validate --json` printed for this judge: rates are also given corrected for its errors."""
    format: str = "table"
    """What is printed: table, markdown or latex."""
    out: Path | None = None
    """Page with figures and transcripts (HTML); by default `compare.html` in the last run folder."""
    seed: int = 0
    """Seed of intervals."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("no run was given; give one or more folders of demur eval")
        if not 0 < self.margin < 1:
            raise InputError(f"margin is {self.margin}, expected a share between 0 and 1, as 0.02")
        if self.format not in ("table", "markdown", "latex"):
            raise InputError(f"format is {self.format!r}, expected table, markdown or latex")


@dataclass(frozen=True)
class Reproduce:
    """Run an evaluation again from its `reproduce.json`, and say what differs."""

    file: tyro.conf.Positional[Path]
    """`reproduce.json` of a run."""
    out: Path | None = None
    """Run folder; default: `runs/NAME-HASH-again`."""
    json: bool = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True)
class Suites:
    """List the prompt suites that are known, with licence and where they come from."""

    data_dir: Path | None = None
    """Folder of data sets: say which suites are found in it."""
    json: bool = False
    """Print one JSON object on stdout."""
