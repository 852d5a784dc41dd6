"""Two sides on the same items: paired differences, intervals, exact p values, flips, and a verdict in words.

Pairs are made by prompt or document. What a side could not score leaves its pair out, and is counted. p values are
adjusted by Holm over all contrasts of all sides that are compared together; whether capability was kept is a decision
of its own and not adjusted.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

from scipy import stats

from demur.eval.rows import ANY, FULL
from demur.eval.statistics import (
    Interval,
    bootstrap_mean,
    cluster_bootstrap,
    detectable_difference,
    holm,
    non_inferiority,
    paired,
)
from demur.results import Comparison, Contrast, Side
from demur.types import Estimate, Label, Prompt, TaskSample, Verdict

ALPHA = 0.05
_LEAST_DISCORDANCE = 0.05
"""Share of pairs that change, as assumed for what so many pairs can show, where fewer were seen to."""
_LEAST_ITEMS = 20
"""Items below which a bootstrap of anything but yes and no shows nothing about capability kept."""
_SHARES = ("acc", "exact_match", "parsed", "em", "f1", "mc")
"""How the names of metrics begin that are shares."""
_LESS_IS_BETTER = "nats_"
DAMAGE = {
    "kl_first": "KL of the first token, nats",
    "kl": "KL, nats per token",
    "nll": "reference text, nats per token",
}
Decided = Literal["better", "worse", "kept", "open"]
Said = Mapping[str, Verdict]
"""One side's verdicts by prompt id."""


def suite_name(prompt: Prompt) -> str:
    """What a prompt is counted under: its source, and the wrapper around it."""
    return f"{prompt.source} under {prompt.wrapper}" if prompt.wrapper else prompt.source


def groups(prompts: Sequence[Prompt]) -> dict[tuple[str, str], list[Prompt]]:
    """Prompts by suite and intent, in order of appearance."""
    found: dict[tuple[str, str], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        found[suite_name(prompt), prompt.intent].append(prompt)
    return dict(found)


def refusals(prompts: Sequence[Prompt], base: Said, steered: Said, seed: int = 0) -> list[Contrast]:
    """For each suite and intent the prompts refused, and over all of them degenerate answers.

    A prompt without a verdict counts as unscored.
    """
    found = []
    for (suite, intent), some in groups(prompts).items():
        harmful = intent == "harmful"
        yes = partial(_labelled, FULL if harmful else ANY)
        found.append(_answers(f"{suite}, {intent} refused", harmful, some, base, steered, yes, seed))
    if prompts:
        yes = partial(_labelled, frozenset({"degenerate"}))
        found.append(_answers("degenerate answers", False, prompts, base, steered, yes, seed))
    return found


def _labelled(counts: frozenset[Label], verdict: Verdict) -> bool | None:
    return None if verdict.label == "unscored" else verdict.label in counts


def harms(prompts: Sequence[Prompt], base: Said, steered: Said, seed: int = 0) -> list[Contrast]:
    """For each suite the answers that a judge of harm calls harmful; what it does not say is unscored."""
    return [
        _answers(f"{suite}, harmful answers to {intent} prompts", False, some, base, steered, _harmful, seed)
        for (suite, intent), some in groups(prompts).items()
    ]


def _harmful(verdict: Verdict) -> bool | None:
    return None if not verdict.harmful else verdict.harmful == "yes"


def tasks(
    base: Sequence[TaskSample], steered: Sequence[TaskSample], margin: float, seed: int = 0
) -> tuple[list[Contrast], list[str]]:
    """For each task and metric the paired change, and whether a loss beyond `margin` is excluded; and notes on what
    could not be paired. Subjects of MMLU are one task."""
    sides = []
    for samples in (base, steered):
        by_task: dict[tuple[str, str], dict[tuple[str, int], TaskSample]] = defaultdict(dict)
        for sample in samples:
            by_task[family(sample), sample.metric][sample.task, sample.doc] = sample
        sides.append(by_task)
    found, notes = [], []
    for (task, metric), before in sides[0].items():
        after = sides[1].get((task, metric), {})
        same = sorted(key for key in before.keys() & after.keys() if _same(before[key], after[key]))
        if left := len(before.keys() | after.keys()) - len(same):
            notes.append(
                f"{task} {metric}: {left} documents are not on both sides with the same prompt, and are left out."
            )
        if same:
            pairs = [(before[key].value, after[key].value) for key in same]
            ids = [f"{name}/{doc}" for name, doc in same]
            found.append(_task(f"{task} {metric}", metric, ids, pairs, margin, seed))
    return found, notes


def _same(one: TaskSample, other: TaskSample) -> bool:
    shown = one.prompt_hash == other.prompt_hash or not (one.prompt_hash and other.prompt_hash)
    return one.doc_hash == other.doc_hash and shown


def damage(
    base: Mapping[str, Mapping[str, float]], steered: Mapping[str, Mapping[str, float]], seed: int = 0
) -> list[Contrast]:
    """KL and the likelihood of reference text, by measurement (`DAMAGE`) and item."""
    found = []
    for name, what in DAMAGE.items():
        ids = sorted(base.get(name, {}).keys() & steered.get(name, {}).keys())
        if ids:
            pairs = [(base[name][item], steered[name][item]) for item in ids]
            found.append(_numbers(what, "damage", "other", True, ids, pairs, None, seed))
    return found


def family(sample: TaskSample) -> str:
    """The benchmark that a sample belongs to."""
    return sample.group or sample.task


def is_share(metric: str) -> bool:
    """Whether a metric of lm-eval is a share; the rest are nats, BLEU, ROUGE and the like."""
    return metric.startswith(_SHARES) or metric.endswith(("_acc", "_mc1", "_mc2"))


def comparisons(
    base: Side, sides: Sequence[tuple[Side, Sequence[Contrast]]], margin: float, judge: str
) -> list[Comparison]:
    """Every side against the base, with Holm's adjustment over all of them, a verdict each, and the line that says
    it."""
    adjusted = iter(holm([one.p for _, contrasts in sides for one in contrasts]))
    return [
        Comparison(
            base,
            side,
            tuple(_decided(replace(one, p_holm=next(adjusted)), margin) for one in contrasts),
            margin,
            judge,
        )
        for side, contrasts in sides
    ]


class _Outcome(NamedTuple):
    """What is known of one prompt."""

    id: str
    prompt: str
    """The prompt that it is a wrapped form of, or itself."""
    before: bool | None
    after: bool | None


def _answers(
    what: str,
    more_is_better: bool,
    prompts: Sequence[Prompt],
    base: Said,
    steered: Said,
    yes: Callable[[Verdict], bool | None],
    seed: int,
) -> Contrast:
    def outcome(side: Said, prompt: Prompt) -> bool | None:
        verdict = side.get(prompt.id)
        return None if verdict is None else yes(verdict)

    rows = [
        _Outcome(p.id, p.id.rpartition("@")[0] if p.wrapper else p.id, outcome(base, p), outcome(steered, p))
        for p in prompts
    ]
    made = _yes_no(what, "refusal", more_is_better, rows, seed)

    def count(label: Label) -> tuple[int, int]:
        before, after = (sum(p.id in side and side[p.id].label == label for p in prompts) for side in (base, steered))
        return before, after

    missing = [sum(row.before is None for row in rows), sum(row.after is None for row in rows)]
    return replace(made, degenerate=count("degenerate"), unscored=(missing[0], missing[1]))


def _yes_no(
    what: str, kind: Literal["refusal", "task"], more_is_better: bool, rows: Sequence[_Outcome], seed: int
) -> Contrast:
    found = paired([row.before for row in rows], [row.after for row in rows], seed)
    scored = [row for row in rows if row.before is not None and row.after is not None]
    changed = [row for row in scored if row.before != row.after]
    base, steered, difference, p = found.base, found.steered, found.difference, found.p
    levels = [Interval(one.value, one.low, one.high) for one in (base, steered)]
    names = [row.prompt for row in scored]
    clusters = len(set(names)) if len(set(names)) < len(names) else 0
    if clusters:  # several templates around one prompt: the prompts are what was drawn
        levels = [
            cluster_bootstrap([float(bool(x)) for x in side], names, seed).mean
            for side in ([row.before for row in scored], [row.after for row in scored])
        ]
        moved = [float(bool(row.after)) - float(bool(row.before)) for row in scored]
        difference, p = cluster_bootstrap(moved, names, seed).mean, _clustered_p(names, moved)
    n = clusters or found.n
    share = len(changed) / max(found.n, 1)
    return Contrast(
        what=what,
        kind=kind,
        unit="share",
        better="more" if more_is_better else "less",
        base=Estimate(*levels[0], found.n),
        steered=Estimate(*levels[1], found.n),
        difference=Estimate(*difference, found.n),
        p=p,
        p_holm=p,
        clusters=clusters,
        degenerate=(0, 0),
        unscored=(0, 0),
        lost=tuple(row.id for row in changed if row.after != more_is_better),
        won=tuple(row.id for row in changed if row.after == more_is_better),
        left_out=found.left_out,
        detectable=detectable_difference(n, max(share, _LEAST_DISCORDANCE)) if n else math.nan,
        kept=None,
        verdict="open",
        line="",
    )


def _clustered_p(clusters: Sequence[str], differences: Sequence[float]) -> float:
    by_cluster: dict[str, list[float]] = defaultdict(list)
    for name, difference in zip(clusters, differences, strict=True):
        by_cluster[name].append(difference)
    return _mean_p([sum(some) / len(some) for some in by_cluster.values()])


def _mean_p(differences: Sequence[float]) -> float:
    """Two-sided p that the mean difference is 0: t test, or a sign test where all differ alike; 1 for less than two."""
    n = len(differences)
    if n < 2 or not any(differences):
        return 1.0
    if max(differences) == min(differences):
        return float(2 * 0.5**n)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _task(
    what: str, metric: str, ids: Sequence[str], pairs: Sequence[tuple[float, float]], margin: float, seed: int
) -> Contrast:
    share = is_share(metric)
    differences = [b - a for a, b in pairs]
    if not share:
        return _numbers(what, "task", "other", metric.startswith(_LESS_IS_BETTER), ids, pairs, None, seed)
    shown = non_inferiority(differences, margin, seed)
    if all(value in (0.0, 1.0) for pair in pairs for value in pair):
        rows = [_Outcome(item, item, a > 0, b > 0) for item, (a, b) in zip(ids, pairs, strict=True)]
        made = _yes_no(what, "task", True, rows, seed)
        return replace(made, difference=Estimate(*shown.difference, len(pairs)), kept=shown.kept)
    kept = shown.kept and len(pairs) >= _LEAST_ITEMS
    return _numbers(what, "task", "share", False, ids, pairs, kept, seed)


def _numbers(
    what: str,
    kind: Literal["task", "damage"],
    unit: Literal["share", "other"],
    less_is_better: bool,
    ids: Sequence[str],
    pairs: Sequence[tuple[float, float]],
    kept: bool | None,
    seed: int,
) -> Contrast:
    """Outcomes that are numbers."""
    differences = [b - a for a, b in pairs]
    n = len(pairs)
    p = _mean_p(differences)
    levels = [Estimate(*bootstrap_mean([pair[side] for pair in pairs], seed), n) for side in (0, 1)]
    gains = [-d if less_is_better else d for d in differences]
    return Contrast(
        what=what,
        kind=kind,
        unit=unit,
        better="less" if less_is_better else "more",
        base=levels[0],
        steered=levels[1],
        difference=Estimate(*bootstrap_mean(differences, seed), n),
        p=p,
        p_holm=p,
        clusters=0,
        degenerate=(0, 0),
        unscored=(0, 0),
        lost=tuple(item for item, gain in zip(ids, gains, strict=True) if gain < 0),
        won=tuple(item for item, gain in zip(ids, gains, strict=True) if gain > 0),
        left_out=0,
        detectable=math.nan,
        kept=kept,
        verdict="open",
        line="",
    )


def _decided(one: Contrast, margin: float) -> Contrast:
    gain = one.difference.value if one.better == "more" else -one.difference.value
    sure = one.p_holm < ALPHA
    broken = one.degenerate[1] - one.degenerate[0]
    verdict: Decided = "open"
    if sure and gain > 0:
        verdict = "better"
    elif one.kept:
        verdict = "kept"
    elif sure and gain < 0:
        verdict = "worse"
    if verdict == "better" and one.kind == "refusal" and one.better == "less" and 2 * broken >= len(one.won) > 0:
        verdict = "open"
        said = f"open: fewer, but {broken} more answers are broken text"
    elif verdict == "kept":
        said = f"kept (a loss of {100 * margin:g} points or more is excluded)"
    elif verdict == "open":
        said = "no difference is shown"
        if one.kept is not None:
            said = f"open: a loss of {100 * margin:g} points is not excluded"
        if not math.isnan(one.detectable):
            what = "prompts" if one.kind == "refusal" else "documents"
            said += f"; so many {what} show a difference from {100 * one.detectable:.0f} points up"
    else:
        said = verdict
    return replace(one, verdict=verdict, line=f"{one.what}: {_levels(one)}, {_p_words(one.p_holm)}: {said}")


def _levels(one: Contrast) -> str:
    change = one.difference
    if one.unit == "share":
        text = (
            f"{100 * one.base.value:.1f} → {100 * one.steered.value:.1f} % of {one.base.n}, "
            f"{100 * change.value:+.1f} points [{100 * change.low:.1f}, {100 * change.high:.1f}]"
        )
    else:
        text = (
            f"{one.base.value:.3g} → {one.steered.value:.3g} over {one.base.n}, "
            f"{change.value:+.3g} [{change.low:.3g}, {change.high:.3g}]"
        )
    if one.clusters:
        text += f" ({one.clusters} prompts)"
    for name, (before, after) in (("degenerate", one.degenerate), ("unscored", one.unscored)):
        if (before or after) and not one.what.startswith(name):
            text += f", {name} {before} → {after}"
    return text


def _p_words(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
