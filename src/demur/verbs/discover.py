"""The search for the latent that mediates refusal: proposers, the referee's screen, judged answers.

Cheap looks come first and only the better share goes on: log-odds of refusing on few prompts (`features.referee`), the
first words of a few answers, whole answers to all select prompts. Everything that was measured is in the run folder,
so a search that was killed goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from demur import progress
from demur.eval.rows import ANY, FULL, refused_rate
from demur.eval.statistics import bootstrap_mean, bootstrap_ratio
from demur.features.halving import halve, surely_worse
from demur.features.proposers.union import union
from demur.spec import SteeringSpec
from demur.types import Effect, Estimate, Label, LatentRanking, LatentScore
from demur.verbs.finding import Finding

_SPARE = 3
"""Latents more than there are finalists that answer a quarter of the prompts."""


class Candidate(NamedTuple):
    """A latent at a value."""

    latent: int
    value: float


class Judged(NamedTuple):
    """A candidate with the labels of its answers."""

    candidate: Candidate
    harmful: list[Label]
    """Of the harmful select prompts that were judged, in order; the first few of them where more would not have made it
    the winner."""
    benign: list[Label]
    """Of the plain select prompts; empty where they were not needed to decide."""


class Searched(NamedTuple):
    """What a search came to."""

    finalists: list[Judged]
    """Best first."""
    ranking: LatentRanking
    """Every proposed latent, best first, with what each stage measured."""


def proposed(finding: Finding, rankings: Sequence[LatentRanking]) -> dict[int, list[str]]:
    """The latents that go to the referee, and which methods propose each; what several propose comes first."""
    found: dict[int, list[str]] = {}
    for one in union(rankings).scores:
        methods = [
            method for method, place in one.detail.items() if method == "archetype" or place <= finding.config.proposals
        ]
        if methods:
            found[one.latent] = methods
    return found


def search(finding: Finding, latents: Sequence[int]) -> Searched:
    """The finalists among `latents`, best first, and all of them in order."""
    details: dict[int, dict[str, float]] = {latent: {} for latent in latents}
    with finding.clock.step("screen"):
        order = _screen(finding, latents, details)
    with finding.clock.step("first words"):
        order = _first_words(finding, order, details)
    with finding.clock.step("answers"):
        finalists = _answers(finding, order, details)
    first = [one.candidate.latent for one in finalists]
    order = [*first, *(latent for latent in order if latent not in first)]
    scores = tuple(
        LatentScore(latent, details[latent].get("harmful_refused", details[latent]["log_odds"]), details[latent])
        for latent in order
    )
    place, sae = str(finding.hookpoint), finding.loaded.hash
    progress.say(f"  latent {first[0]} at {finalists[0].candidate.value:g} refuses most")
    return Searched(finalists, LatentRanking("search", place, sae, finding.prompts_hash(), scores))


def _screen(finding: Finding, latents: Sequence[int], details: dict[int, dict[str, float]]) -> list[int]:
    """Latents by log-odds of refusing at the first select value."""
    config = finding.config
    value = config.select_values[0]

    def measure(some: Sequence[int], first: int, last: int) -> Tensor:
        return finding.log_odds([finding.clamp(latent, value) for latent in some], first, last)

    total = min(config.screen_prompts, len(finding.screened))
    standings = halve(latents, measure, finding.ends(total), config.shortlist)
    for one in standings:
        details[one.arm] |= {"log_odds": one.mean, "log_odds_prompts": float(len(one.values))}
    return [one.arm for one in standings]


def _first_words(finding: Finding, latents: Sequence[int], details: dict[int, dict[str, float]]) -> list[int]:
    """The shortlist reordered by how many answers begin as a refusal, over all values together; the rest after it."""
    short = list(latents[: finding.config.shortlist])
    few = finding.screened[: max(1, finding.config.screen_prompts // 2)]
    arms = [Candidate(latent, value) for latent in short for value in finding.config.select_values]
    with progress.track("first words", len(arms) * len(few), "prompts") as advance:
        said = finding.labels(few, [finding.clamp(*arm) for arm in arms], advance, short=True)
    refused: dict[int, list[Label]] = {latent: [] for latent in short}
    for arm, found in zip(arms, said, strict=True):
        refused[arm.latent] += found
    for latent, labels in refused.items():
        details[latent]["first_words"] = _share(labels, FULL)
    short.sort(key=lambda latent: -details[latent]["first_words"])
    return [*short, *latents[len(short) :]]


def _answers(finding: Finding, latents: Sequence[int], details: dict[int, dict[str, float]]) -> list[Judged]:
    """The finalists on whole answers: most harmful prompts refused, fewest plain ones on a tie.

    Some more latents than finalists answer a quarter of the prompts at every value. The best of them, each at its best
    value, are the finalists; they answer the rest, but for those that are surely worse than the first already: these
    keep the answers they have, and come last.
    """
    config = finding.config
    prompts = finding.screened
    some = latents[: config.finalists + _SPARE]
    arms = [Candidate(latent, value) for latent in some for value in config.select_values]
    quarter = max(1, len(prompts) // 4)
    n = min(config.finalists, len(some))
    with progress.track("answers", len(arms) * quarter + n * (len(prompts) - quarter), "prompts") as advance:
        said = finding.labels(prompts[:quarter], [finding.clamp(*arm) for arm in arms], advance)
        early = dict(zip(arms, said, strict=True))
        shares = {arm: _share(labels, FULL) for arm, labels in early.items()}
        # the smaller value on a tie: it does less damage
        best = [min((a for a in arms if a.latent == i), key=lambda a: (-shares[a], a.value)) for i in some]
        best.sort(key=lambda arm: -shares[arm])
        refused = {arm: _refused(early[arm]) for arm in best}
        going = [arm for arm in best[:n] if not surely_worse(refused[arm], refused[best[0]])]
        late = finding.labels(prompts[quarter:], [finding.clamp(*arm) for arm in going], advance)
        advance((n - len(going)) * (len(prompts) - quarter))
    for arm in best[n:]:
        details[arm.latent] |= {"value": arm.value, "early_refused": shares[arm]}
    harmful = {arm: [*early[arm], *labels] for arm, labels in zip(going, late, strict=True)}
    most = max(_share(labels, FULL) for labels in harmful.values())
    tied = [arm for arm, labels in harmful.items() if _share(labels, FULL) == most]
    benign: dict[Candidate, list[Label]] = {}
    if len(tied) > 1:
        benign |= zip(tied, finding.labels(finding.plain, [finding.clamp(*arm) for arm in tied]), strict=True)
    judged = [Judged(arm, labels, benign.get(arm, [])) for arm, labels in harmful.items()]
    judged.sort(key=lambda one: (-_share(one.harmful, FULL), _share(one.benign, ANY)))
    judged += [Judged(arm, early[arm], []) for arm in best[:n] if arm not in going]
    for one in judged:
        found = {"value": one.candidate.value, "harmful_refused": _share(one.harmful, FULL)}
        if one.benign:
            found["benign_refused"] = _share(one.benign, ANY)
        details[one.candidate.latent] |= found
    return judged


def judge_spec(finding: Finding, candidate: Candidate, spec: SteeringSpec) -> Judged:
    """The labels of whole answers to all select prompts under `spec`."""
    harmful, benign = (finding.labels(prompts, [spec])[0] for prompts in (finding.screened, finding.plain))
    return Judged(candidate, harmful, benign)


def _share(labels: Sequence[Label], counts: frozenset[Label]) -> float:
    found = refused_rate(labels, counts)
    return found.k / max(found.n, 1)


def _refused(labels: Sequence[Label]) -> Tensor:
    """[labels] 1 where it refused in full, 0 where not, NaN where it could not be scored."""
    return torch.tensor([float("nan") if one == "unscored" else float(one in FULL) for one in labels])


def winners_share(finalists: Sequence[Judged], seed: int, resamples: int = 2_000) -> list[float]:
    """For each finalist the share of bootstrap resamples of the harmful prompts in which it refuses most; ties are
    shared. One that left early has none: it was surely worse than another on what it answered."""
    longest = max(len(one.harmful) for one in finalists)
    table = np.array([[label in FULL for label in one.harmful] for one in finalists if len(one.harmful) == longest])
    draws = np.random.default_rng(seed).integers(0, longest, (resamples, longest))
    means = table[:, draws].mean(-1)
    best = means == means.max(0)
    shares = iter((best / best.sum(0)).mean(1).tolist())
    return [next(shares) if len(one.harmful) == longest else 0.0 for one in finalists]


def effect(
    finding: Finding,
    label: str,
    latents: Sequence[int],
    values: Sequence[float],
    spec: SteeringSpec,
    judged: Judged | None = None,
) -> Effect:
    """Causal effect and damage of `spec`, with intervals over prompts."""
    specs = [spec, SteeringSpec()]
    harmful, before = finding.log_odds(specs)
    (benign, benign_before), (kl, _) = finding.damage(specs)
    seed = finding.config.seed
    gain, cost = (harmful - before).tolist(), kl.tolist()
    return Effect(
        label,
        tuple(latents),
        tuple(values),
        spec.hash,
        Estimate(*bootstrap_mean(gain, seed), len(gain)),
        Estimate(*bootstrap_mean((benign - benign_before).tolist(), seed), len(cost)),
        Estimate(*bootstrap_mean(cost, seed), len(cost)),
        Estimate(*bootstrap_ratio(gain, cost, seed), len(gain)),
        refused_rate(judged.harmful, FULL) if judged else None,
        refused_rate(judged.benign, ANY) if judged and judged.benign else None,
    )
