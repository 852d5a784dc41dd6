"""The causal screen: how much clamping a latent raises the log-probability of a refusal.

The residual at the hookpoint is the same for every candidate, so it is computed once; each candidate costs one pass
over the blocks above. All candidates are screened on few prompts, the best of them on more (successive halving). A
screen ranks; the choice is made on judged generations (`demur.features.choose`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from demur.lm.batches import Padded, Row, batches, pad
from demur.lm.load import LanguageModel
from demur.lm.record import Reading
from demur.lm.score import log_probs_from, read_padded
from demur.sae.store import LoadedSae
from demur.steering.steer import steer
from demur.types import Edit, Hookpoint, LatentScore, SteeringSpec


class _Batch(NamedTuple):
    rows: Padded
    reading: Reading


class Screen:
    """The refusal log-probability of a fixed set of prompts, under any spec at one hookpoint."""

    def __init__(
        self,
        lm: LanguageModel,
        loaded: LoadedSae,
        hookpoint: Hookpoint,
        prompts: Sequence[Row],
        refusal: Row,
        batch_size: int = 16,
    ) -> None:
        """`prompts`: token ids up to where the answer begins. `refusal`: the token ids to be made likely."""
        self._lm, self._loaded, self._hookpoint, self._refusal = lm, loaded, hookpoint, list(refusal)
        rows = [[*prompt, *refusal[:-1]] for prompt in prompts]
        self._batches = []
        for chosen in batches([len(row) for row in rows], batch_size):
            padded = pad(lm, [rows[i] for i in chosen], side="left")
            self._batches.append(_Batch(padded, read_padded(lm, hookpoint, padded)))
        self._n = len(rows)
        self._unsteered = self.log_prob(SteeringSpec())

    def log_prob(self, spec: SteeringSpec) -> float:
        """Mean over prompts of the log-probability of the refusal's tokens, in nats."""
        total = 0.0
        last = len(self._refusal)
        with steer(self._lm.model, spec, {self._loaded.hash: self._loaded.sae}):
            for batch in self._batches:
                log_probs = log_probs_from(self._lm, self._hookpoint, batch.rows, batch.reading, last)
                for place, token in enumerate(self._refusal):
                    total += float(log_probs[:, place, token].cpu().double().sum())
        return total / self._n

    def score(self, latent: int, value: float) -> LatentScore:
        """Gain of the refusal's log-probability when `latent` is clamped to `value`, over unsteered."""
        edit = Edit(str(self._hookpoint), self._loaded.hash, latent, value)
        return LatentScore(latent, self.log_prob(SteeringSpec((edit,))) - self._unsteered)


def halve(scores: Sequence[LatentScore], keep: int) -> list[int]:
    """The `keep` best latents of a coarse screen, for a finer one; equals in order of their number."""
    return [score.latent for score in sorted(scores, key=lambda s: (-s.score, s.latent))[:keep]]
