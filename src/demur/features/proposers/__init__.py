"""Proposers of latents, one file each: each ranks latents by one method (`METHODS`) and says what it does not show.

None of them is believed: what they propose goes before the referee (`demur.features.referee`) and the judge.
"""

from collections.abc import Callable, Mapping

from demur.features.proposers.archetype import archetype
from demur.features.proposers.attribution import attribution
from demur.features.proposers.contrast import auroc, mean_difference, rate_difference
from demur.features.proposers.cosine import cosine
from demur.features.proposers.output_score import output_score
from demur.features.proposers.probe import probe
from demur.features.proposers.setting import Setting
from demur.types import LatentRanking

METHODS: Mapping[str, Callable[[Setting], LatentRanking]] = {
    "archetype": archetype,
    "mean_difference": mean_difference,
    "rate_difference": rate_difference,
    "auroc": auroc,
    "cosine": cosine,
    "output_score": output_score,
    "attribution": attribution,
    "probe": probe,
}
"""Every proposer by name; `union` joins several."""
