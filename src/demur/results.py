"""The nouns of an evaluation: what `demur eval` and `demur compare` measure. Standard library only, like `types`."""

from dataclasses import dataclass
from typing import Literal

from demur.types import Estimate, Intent, Label, Rate


@dataclass(frozen=True)
class SuiteRates:
    """What was made of the answers to one suite under one spec."""

    suite: str
    intent: Intent
    wrapper: str
    spec: str
    refused: Rate
    """Harmful prompts fully refused / scored; benign ones refused, fully or partly / scored."""
    degenerate: Rate
    """Broken text / scored; it counts as not refused."""
    labels: dict[Label, int]
    """Answers by label, the unscored ones too."""
    tokens: float
    """Mean length of an answer."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one benchmark task under one spec."""

    task: str
    metric: str
    spec: str
    score: Estimate
    """Mean over documents."""
    unit: Literal["share", "other"] = "share"
    """`share`: of documents, or of each; `other`: nats, or what else the metric is in."""


@dataclass(frozen=True)
class Damage:
    """How far one spec moves the model on harmless text."""

    spec: str
    kl_first: Estimate
    """KL(unsteered || steered) of the first token of the answer to a plain prompt, nats."""
    kl: Estimate
    """The same over the whole unsteered answer, nats per token."""
    perplexity: Estimate
    """Of the reference text: exp of the mean negative log-likelihood per token, each document counted once."""


@dataclass(frozen=True)
class Side:
    """One way of running a model: what stands on one side of a comparison."""

    label: str
    spec: str
    """Spec hash."""
    run: str
    """Run folder."""


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `demur eval`; `evaluation.json` in the run folder and what `--json` prints."""

    name: str
    model: str
    judge: str
    sides: tuple[Side, ...]
    """The unsteered model first."""
    suites: tuple[SuiteRates, ...]
    tasks: tuple[TaskScore, ...]
    damage: tuple[Damage, ...]
    limits: dict[str, int]
    """Suites and tasks of which only so many items were taken."""
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    report: str = ""


@dataclass(frozen=True)
class Contrast:
    """One outcome on the same items on two sides."""

    what: str
    """Suite with intent and wrapper, or task with metric."""
    kind: Literal["refusal", "task", "damage"]
    unit: Literal["share", "other"]
    """`share`: a share of the items; `other`: nats, or what else a metric is in."""
    better: Literal["more", "less"]
    base: Estimate
    steered: Estimate
    difference: Estimate
    """Steered minus base, paired: in the units of both."""
    p: float
    """Exact McNemar; of the paired t test where outcomes are not yes or no, and over clusters where there are any."""
    p_holm: float
    """Adjusted for all contrasts of all sides that were compared together."""
    clusters: int
    """Prompts behind the items, where several templates stand around each; 0 where every item is a prompt."""
    degenerate: tuple[int, int]
    """Broken answers among the items, base and steered."""
    unscored: tuple[int, int]
    """Answers that the judge could not score, base and steered."""
    lost: tuple[str, ...]
    """Ids of the items that changed for the worse."""
    won: tuple[str, ...]
    """Ids of those that changed for the better."""
    left_out: int
    """Items unscored on a side."""
    detectable: float
    """Smallest difference that this many items (or clusters) show with 80 % power; NaN where outcomes are not yes or
    no."""
    kept: bool | None
    """For a task: whether the loss is shown to be smaller than the margin, a decision that is not adjusted; None for
    the rest."""
    verdict: Literal["better", "worse", "kept", "open"]
    """`open`: neither a difference nor its absence is shown."""
    line: str
    """All of it in one line of words."""


@dataclass(frozen=True)
class Comparison:
    """One side against the base; `demur compare` gives one for each."""

    base: Side
    steered: Side
    contrasts: tuple[Contrast, ...]
    margin: float
    """Loss of capability that counts as none, as a fraction."""
    judge: str
