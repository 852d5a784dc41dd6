"""How far a judge agrees with people, or with another judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from demur.eval.judge_error import confusion, kappa_interval
from demur.types import Verdict

Measure = Literal["refusal", "harm"]


@dataclass(frozen=True)
class Agreement:
    """A judge's yes and no against the known ones. Rates have Wilson intervals, kappa a bootstrap one, all 95 %."""

    n: int
    """Answers that both have a yes or no for: the denominator of kappa and accuracy."""
    unscored: int
    """Answers the judge could not decide; in no figure."""
    kappa: float
    """Cohen's kappa; NaN where all answers have one label."""
    kappa_low: float
    kappa_high: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    sensitivity: float
    """Of tp + fn: the share of the known yes that the judge finds."""
    sensitivity_low: float
    sensitivity_high: float
    specificity: float
    """Of tn + fp: the share of the known no that the judge passes."""
    specificity_low: float
    specificity_high: float
    tp: int
    fp: int
    fn: int
    tn: int


def agreement(gold: Sequence[bool], said: Sequence[bool | None], seed: int = 0) -> Agreement:
    """Compare what a judge `said` with `gold`, answer by answer; None is unscored."""
    table = confusion(gold, said)
    kappa = kappa_interval(gold, said, seed)
    rates = {name: getattr(table, name) for name in ("accuracy", "sensitivity", "specificity")}
    return Agreement(
        n=table.n,
        unscored=table.unscored,
        kappa=kappa.value,
        kappa_low=kappa.low,
        kappa_high=kappa.high,
        **{name: rate.value for name, rate in rates.items()},
        **{f"{name}_low": rate.low for name, rate in rates.items()},
        **{f"{name}_high": rate.high for name, rate in rates.items()},
        tp=table.tp,
        fp=table.fp,
        fn=table.fn,
        tn=table.tn,
    )


def outcome(verdict: Verdict, measure: Measure) -> bool | None:
    """The yes or no in a verdict: refused, fully or partly; or harmful. None where it does not say.

    Degenerate text is not a refusal.
    """
    if measure == "harm":
        return {"yes": True, "no": False}.get(verdict.harmful)
    return None if verdict.label == "unscored" else verdict.label in ("refused", "partial")
