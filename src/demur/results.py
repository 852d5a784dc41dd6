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


@dataclass(frozen=True)
class Turn:
    """One question of an attack and its answer; a line of `turns.jsonl`, in the order in which they were asked."""

    objective: str
    seed: int
    spec: str
    number: int
    """From 0, turns that were taken back counted too."""
    user: str
    reply: str
    tokens: int
    """Of the reply."""
    label: Label
    """What the judge of refusals made of the reply."""
    success: bool | None
    """The objective was reached; None where that could not be scored, or where the turn was taken back."""
    taken_back: bool
    """The target refused, and the attacker took the turn out of the conversation."""
    evidence: str = ""
    """The words or the measure that decided about success."""


@dataclass(frozen=True)
class End:
    """Why a conversation ended before its last turn; a line of `ends.jsonl`."""

    objective: str
    seed: int
    spec: str
    why: Literal["asked all", "not understood", "no room"]
    """The attacker had nothing more to ask, or wrote no question; or the target's context was full."""


@dataclass(frozen=True)
class AttackSide:
    """How attacks on one side went."""

    label: str
    spec: str
    """Spec hash."""
    success: Estimate
    """Attack success rate: conversations that reached their objective / those that were scored, with a 95 % interval
    over objectives (cluster bootstrap; where all went alike, Clopper-Pearson as if each were tried once)."""
    objectives: Estimate
    """Objectives reached in at least one conversation / objectives; Clopper-Pearson."""
    unscored: int
    """Conversations that could not be scored."""
    turns_to_success: float
    """Median of the turns until an objective was reached, those taken back not counted; NaN where none was."""
    turns: float
    """Mean turns of a conversation, those taken back not counted."""
    backtracks: float
    """Mean number of turns taken back."""
    refused: Rate
    """Replies refused / scored, those to turns that were taken back too. Replies of a conversation are not independent:
    the interval is too narrow."""
    degenerate: Rate
    """Replies of broken text / scored; likewise."""


@dataclass(frozen=True)
class AttackContrast:
    """The same attacks on two sides, paired by objective and seed."""

    base: str
    steered: str
    """Labels."""
    difference: Estimate
    """Of the success rates, steered minus base, with a 95 % interval over objectives; where all of those moved alike,
    Newcombe's over conversations."""
    p: float
    """Exact sign-flip test over objectives, two-sided."""
    p_holm: float
    """Adjusted for all contrasts of the run."""
    p_conversations: float
    """Exact McNemar over conversations, as if those on one objective were independent, which they are not."""
    clusters: int
    """Objectives behind the test."""
    stopped: tuple[str, ...]
    """OBJECTIVE/SEED of conversations that succeeded on the base only."""
    let_through: tuple[str, ...]
    """Those that succeeded on the steered side only."""
    left_out: int
    """Pairs with an unscored side."""
    verdict: Literal["lower", "higher", "open"]
    line: str
    """All of it in one line of words."""


@dataclass(frozen=True)
class AttackReport:
    """The outcome of `demur attack`; `attack.json` in the run folder and what `--json` prints."""

    name: str
    model: str
    attacker: str
    refusal_judge: str
    success_judge: str
    objectives: int
    seeds: int
    max_turns: int
    max_backtracks: int
    sides: tuple[AttackSide, ...]
    """The unsteered model first."""
    contrasts: tuple[AttackContrast, ...]
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    report: str = ""
