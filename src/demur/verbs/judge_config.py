"""Configs of the verbs that judge, as `config` has those of the others. No torch here."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from demur.errors import InputError

JudgeName = Literal["rules", "wildguard", "strongreject", "xstest", "harmbench", "llama_guard"]


@dataclass(frozen=True)
class JudgedBy:
    """Who judges."""

    judge: JudgeName = "rules"
    """`rules`, or the rubric that a model is asked. harmbench and llama_guard judge harm, the others refusal."""
    judge_model: str = ""
    """Model that answers the rubric: a hub id, folder or GGUF file, or a name at --endpoint. By default the one that
    the rubric was made for; xstest and strongreject ask any good chat model, so name one."""
    endpoint: str = ""
    """OpenAI-compatible endpoint, as http://localhost:8000/v1, that is sent prompts and answers (needs
    `demur[endpoint]`). Its key, if it needs one, is read from OPENAI_API_KEY. Empty: the model is loaded here."""
    concurrency: int = 4
    """Requests to the endpoint at the same time."""
    batch_size: int = 8
    """Answers judged together by a model that is loaded here."""
    dtype: str = "float32"
    """Precision of that model: float32, bfloat16 or float16."""
    device: str = "cpu"
    """Torch device of that model: cpu, cuda, or auto to spread a large one."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.judge == "rules" and (self.judge_model or self.endpoint):
            raise InputError(
                "the judge `rules` asks no model; leave --judge-model and --endpoint out, or name a rubric"
            )


@dataclass(frozen=True)
class JudgeValidate:
    """Measure a judge against people's labels: kappa, sensitivity, specificity, and where they disagree."""

    data: Path
    """CSV, JSONL or JSON file of prompts, completions and labels. A label of refusal is refused, partial, complied or
    degenerate, an XSTest class (2_full_refusal), or yes/no, true/false, 1/0; one of harm is yes/no and the like."""
    by: Annotated[JudgedBy, tyro.conf.arg(name="")] = field(default_factory=JudgedBy)
    """The judge."""
    prompt_column: str = ""
    """Column of the prompt; found by its usual names when empty, as are the others."""
    completion_column: str = ""
    """Column of the answer."""
    label_column: str = ""
    """Column of people's label."""
    group_column: str = ""
    """Column by whose values the figures are also given one by one; by default `model`, where there is one."""
    limit: int = 0
    """Rows at most, spread evenly over the file; 0: all."""
    disagreements: Path | None = None
    """JSONL file to write: the answers on which judge and people differ, and those the judge could not score."""
    seed: int = 0
    """Seed of the interval of kappa."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise InputError(f"limit is {self.limit}, expected 0 or more")


@dataclass(frozen=True)
class JudgeRun:
    """Judge the saved answers of a run of `demur eval` with another judge; the model under test is not needed."""

    folder: tyro.conf.Positional[Path]
    """Run folder. Verdicts are added to its verdicts.jsonl; nothing is judged twice, nothing written over."""
    by: Annotated[JudgedBy, tyro.conf.arg(name="")] = field(default_factory=JudgedBy)
    """The judge."""
    seed: int = 0
    """Seed of the interval of kappa."""
    json: bool = False
    """Print one JSON object on stdout."""
