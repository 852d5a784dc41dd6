"""How good an SAE is, on activations: FVU, L0, dead share, norms, firing rates. One function, used everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from demur.sae.base import Reference, Sae
from demur.sae.topk import TopKSae

_LATENTS = 1 << 21
"""Latents computed at once: 8 MB, which stays in a processor's cache between one step and the next."""
_TYPES = 256
_UNTYPED = _TYPES - 1
"""The slot of tokens whose type is not given."""
RATE_EDGES = tuple(-6 + 0.5 * i for i in range(13))
"""Edges of the histogram of firing rates, as log10 of the rate."""


class Tokens(NamedTuple):
    """Residuals to measure on."""

    x: Tensor
    """[n, d_in] raw residuals."""
    types: Tensor | None = None
    """[n] uint8 below 255: which kind of token each is; FVU is given for each kind. None: not known."""


class SaeMetrics(NamedTuple):
    """Reconstruction and sparsity over a set of tokens."""

    fvu: float
    """Fraction of variance unexplained: sum |x - x^|^2 / sum |x - mean x|^2 over all tokens."""
    l0: float
    """Mean number of active latents per token."""
    dead: float
    """Share of latents active on no token of the set; depends on how many tokens there are."""
    tokens: int
    l2_ratio: float
    """Mean over tokens of |x^| / |x|; below 1 where reconstructions shrink."""
    zero_share: float
    """Share of tokens without an active latent."""


class Rates(NamedTuple):
    """How many latents fire how often."""

    edges: tuple[float, ...]
    """`RATE_EDGES`."""
    counts: tuple[int, ...]
    """Latents with log10(firing rate) from each edge to the next; the first bin also holds rarer ones."""
    never: int
    """Latents that fired on no token."""


class Measured(NamedTuple):
    """Metrics, and what each latent did."""

    metrics: SaeMetrics
    reference: Reference
    fvu_by_type: dict[int, float]
    """FVU inside each type of token: its squared error over its variance about its own mean. NaN without variance."""
    tokens_by_type: dict[int, int]
    rates: Rates


def measure(sae: Sae, activations: Iterable[Tokens]) -> Measured:
    """Measure `sae` over batches of tokens, in one pass with float64 sums.

    Memory: one batch, and a few copies of 2^21 latents. A top-k SAE is never decoded densely.
    """
    meter = Meter(sae)
    for batch in activations:
        meter.add(batch)
    return meter.result()


class Meter:
    """`measure` for batches that come one by one."""

    def __init__(self, sae: Sae) -> None:
        self._sae, self._rows = sae, max(1, _LATENTS // sae.d_sae)
        device = sae.W_dec.device
        self._shift: Tensor | None = None

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        # by type of token
        self._count, self._error, self._squares = zeros(_TYPES), zeros(_TYPES), zeros(_TYPES)
        self._total = zeros(_TYPES, sae.d_in)
        # by latent
        self._fired, self._sum, self._square_sum = zeros(sae.d_sae), zeros(sae.d_sae), zeros(sae.d_sae)
        self._largest = torch.zeros(sae.d_sae, device=device)
        # one number each
        self._ratio, self._zero, self._threshold = zeros(), zeros(), zeros()

    @torch.no_grad()
    def add(self, tokens: Tokens) -> None:
        """Count `tokens`, on the device where the SAE is."""
        kinds = torch.full((len(tokens.x),), _UNTYPED) if tokens.types is None else tokens.types.long()
        for x, types in zip(tokens.x.split(self._rows), kinds.split(self._rows), strict=True):
            if len(x):
                self._add(x.to(self._fired.device, torch.float32), types.to(self._fired.device))

    def _add(self, x: Tensor, types: Tensor) -> None:
        prepared = self._sae.prepare(x)
        rebuilt = prepared.restore(self._count_latents(prepared.x)).float()
        # sums about the first batch's mean: massive means must not eat the variance's digits
        self._shift = x.mean(0) if self._shift is None else self._shift
        centred = x - self._shift
        self._count.index_add_(0, types, torch.ones_like(types, dtype=torch.float64))
        self._error.index_add_(0, types, _square_norms(x - rebuilt))
        self._squares.index_add_(0, types, _square_norms(centred))
        for kind in types.unique().tolist():
            self._total[kind] += centred[types == kind].sum(0, dtype=torch.float64)
        self._ratio += (rebuilt.norm(dim=-1) / x.norm(dim=-1)).sum(dtype=torch.float64)

    def _count_latents(self, x: Tensor) -> Tensor:
        """Decoded residuals [n, d_in] of prepared ones; counts their latents on the way."""
        if isinstance(self._sae, TopKSae):
            sparse = self._sae.encode_sparse(x)
            values, indices = sparse.values.float(), sparse.indices.flatten()
            active, flat = values > 0, values.flatten()
            size = self._sae.d_sae
            self._fired += torch.bincount(indices, active.flatten().double(), size)
            self._sum += torch.bincount(indices, flat.double(), size)
            self._square_sum += torch.bincount(indices, flat.double().square(), size)
            self._largest.scatter_reduce_(0, indices, flat, "amax")
            smallest = values.masked_fill(~active, torch.inf).amin(-1)
            self._threshold += smallest[smallest.isfinite()].sum(dtype=torch.float64)
            self._zero += (~active.any(-1)).sum()
            return self._sae.decode_sparse(sparse)
        latents = self._sae.encode_prepared(x)
        decoded, latents = self._sae.decode(latents), latents.float()
        self._largest = torch.maximum(self._largest, latents.amax(0))
        # sums over a chunk as products with ones: several times faster than `sum`
        ones = latents.new_ones(len(latents))
        self._sum += ones @ latents
        active = latents.sign()
        self._fired += ones @ active
        self._zero += (active.amax(-1) == 0).sum()
        self._square_sum += ones @ latents.square_()
        return decoded

    def result(self) -> Measured:
        """What has been counted; NaN where nothing was."""
        count, error, squares = (total.cpu() for total in (self._count, self._error, self._squares))
        total, fired = self._total.cpu(), self._fired.cpu()
        tokens = float(count.sum())
        some = max(tokens, 1.0)
        zero = float(self._zero)
        fvu_by_type = {
            kind: _fvu(error[kind], squares[kind], total[kind], count[kind])
            for kind in count.nonzero().flatten().tolist()
            if kind != _UNTYPED
        }
        metrics = SaeMetrics(
            fvu=_fvu(error.sum(), squares.sum(), total.sum(0), count.sum()),
            l0=float(fired.sum()) / some,
            dead=float((fired == 0).double().mean()),
            tokens=int(tokens),
            l2_ratio=float(self._ratio) / tokens if tokens else float("nan"),
            zero_share=zero / some,
        )
        mean, square = self._sum.cpu() / some, self._square_sum.cpu() / some
        reference = Reference(
            max_act=self._largest.cpu(),
            sigma=(square - mean.square()).clamp(min=0).sqrt().float(),
            rate=(fired / some).float(),
            threshold=torch.tensor(float(self._threshold) / max(tokens - zero, 1.0)),
        )
        by_type = {kind: int(count[kind]) for kind in fvu_by_type}
        return Measured(metrics, reference, fvu_by_type, by_type, _rates(fired, some))


def _square_norms(x: Tensor) -> Tensor:
    return x.square().sum(-1, dtype=torch.float64)


def _fvu(error: Tensor, squares: Tensor, total: Tensor, count: Tensor) -> float:
    variance = float(squares) - float(total.square().sum()) / max(float(count), 1.0)
    return float(error) / variance if variance > 0 else float("nan")


def _rates(fired: Tensor, tokens: float) -> Rates:
    """Histogram of the latents' firing rates, from how often each fired [d_sae]."""
    logs = (fired[fired > 0] / tokens).log10()
    edges = torch.tensor(RATE_EDGES, dtype=torch.float64)
    places = (torch.bucketize(logs, edges, right=True) - 1).clamp(0, len(RATE_EDGES) - 2)
    counts = torch.bincount(places, minlength=len(RATE_EDGES) - 1)
    return Rates(RATE_EDGES, tuple(counts.tolist()), int((fired == 0).sum()))
