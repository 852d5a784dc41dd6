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


WhyKind = Literal[
    "edit",
    "reconstructed",
    "preserving",
    "reconstruction",
    "sink",
    "only",
    "but",
    "control",
    "random",
    "means",
    "prompt",
]
"""What a spec is set beside to learn where its damage comes from. `reconstructed`: the spec in the reconstruction.
`preserving`: with the SAE's error kept. `reconstruction`: no edit but that. `sink`: the first token too. `only`, `but`:
tokens of one type alone, or all others. `control`: other latents. `random`, `means`: a push as long along a random
direction, or the difference in means. `prompt`: a safety system prompt."""


@dataclass(frozen=True)
class WhySide:
    """One thing that was done to the model. Estimates are means over prompts."""

    key: str
    kind: WhyKind
    label: str
    spec: str
    """Spec hash; where tokens of a type alone are steered, of the spec that answers were generated under, if any."""
    dose: float
    """Times the spec's values, or the length of the push."""
    kl: Estimate
    """KL(unsteered || steered) over the unsteered answers to plain prompts, nats per token."""
    kl_first: Estimate
    """The same of the answer's first token."""
    log_odds: Estimate
    """Change of the log-odds that the answer to a harmful prompt begins as one of the model's own refusals; NaN where
    it never refuses by itself."""
    move: Estimate
    """Mean length of the residual's move on tokens that it moves, at the lowest hookpoint; NaN where not looked at."""
    harmful_refused: Rate | None = None
    """Harmful prompts fully refused / scored; None where no answers were asked for."""
    plain_refused: Rate | None = None
    """Plain prompts refused, fully or partly / scored."""
    degenerate: Rate | None = None
    """Answers of broken text / scored, both sets."""
    unscored: int = 0


@dataclass(frozen=True)
class WhyNumber:
    """One measurement of one side: `kl`, `ratio` and `cosine` by token type or position; `beyond` and `distance` by
    hookpoint; `harm` and `refusal` by hookpoint; `on`, `off` and `active` by SAE."""

    side: str
    """Key of the side, or `unsteered`."""
    measure: str
    at: str
    """A token type, a position counted from the answer's first token, a hookpoint, or an SAE."""
    estimate: Estimate


@dataclass(frozen=True)
class WhyContrast:
    """One measurement of two sides on the same prompts."""

    measure: str
    first: str
    second: str
    """Keys of sides; `controls` and `randoms` are the means over those of a kind."""
    difference: Estimate
    """First minus second, paired."""
    ratio: Estimate
    """Mean of the first over mean of the second, resampled together."""
    at: str = "answer"
    """Where it was measured, as of a `WhyNumber`."""


@dataclass(frozen=True)
class WhyProbe:
    """A linear probe and how well it tells its classes apart on select prompts that it was not fitted to."""

    what: str
    """`harm`: harmful from plain prompts. `refusal`: prompts that the unsteered model refuses from others."""
    hookpoint: str
    auroc: float
    positives: int
    negatives: int


@dataclass(frozen=True)
class WhyLatent:
    """A latent that the edit switches on or off."""

    sae: str
    latent: int
    before: float
    """Share of tokens on which it is active, unsteered."""
    after: float


@dataclass(frozen=True)
class Diagnosis:
    """The outcome of `demur why`; `why.json` in the run folder and what `--json` prints."""

    name: str
    model: str
    spec: str
    """Spec hash."""
    edits: str
    """What the spec does, in words."""
    hookpoint: str
    """The lowest one that is edited."""
    plain: int
    """Plain test prompts behind the estimates; those with an empty answer are left out."""
    harmful: int
    """Harmful test prompts."""
    sides: tuple[WhySide, ...]
    numbers: tuple[WhyNumber, ...]
    contrasts: tuple[WhyContrast, ...]
    probes: tuple[WhyProbe, ...]
    latents: tuple[WhyLatent, ...]
    """Those that switch most."""
    unsteered: WhySide
    """The model as it is."""
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    report: str = ""


Objective = Literal["harmful", "benign", "kl", "capability"]
"""What a search may weigh up: harmful prompts refused, benign ones lost, KL, capability."""


@dataclass(frozen=True)
class Tried:
    """What one spec of a search did on select prompts; `optimize.json` lists those of the front."""

    number: int
    """Of the trial; -1 for the unsteered model."""
    label: str
    """The spec in words."""
    spec: str
    """Spec hash."""
    harmful_refused: Rate
    """Harmful prompts fully refused / scored."""
    benign_refused: Rate
    """Benign prompts, look-alikes among them, refused, fully or partly / scored."""
    benign_degenerate: Rate
    """Benign prompts answered with broken text / scored."""
    benign_lost: Rate
    """Both together: a search that counted refusals alone would take broken text for an answer."""
    degenerate: Rate
    """Broken text / scored, over all prompts; never a refusal."""
    unscored: int
    """Completions that the judge could not score; in no denominator."""
    kl: Estimate
    """KL(unsteered || steered) over the unsteered answers to plain prompts, nats per token."""
    capability: Rate
    """Multiple-choice questions answered right."""


@dataclass(frozen=True)
class Optimized:
    """The outcome of `demur optimize`; `optimize.json` in the run folder and what `--json` prints."""

    name: str
    model: str
    judge: str
    objectives: tuple[Objective, ...]
    unsteered: Tried
    front: tuple[Tried, ...]
    """Judged trials that no other, and not the unsteered model, is as good as in every objective and better in one;
    most harmful prompts refused first."""
    others: tuple[Tried, ...]
    """The other judged trials."""
    pruned: dict[str, int]
    """Trials that the screen stopped before anything was generated, by rule."""
    unfinished: int
    """Trials whose process was killed; they were tried again under other numbers."""
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    report: str = ""
