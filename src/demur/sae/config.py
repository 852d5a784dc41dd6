"""Settings of SAE training. No torch here: the command line reads this file for its help."""

from dataclasses import dataclass
from typing import Literal

from demur.errors import InputError

Architecture = Literal["topk", "batchtopk", "matryoshka", "jumprelu"]
"""`topk` (Gao et al., arXiv 2406.04093), `batchtopk` (Bussmann et al., arXiv 2412.06410), `matryoshka` (nested
batch-top-k, Bussmann et al., arXiv 2503.17547), `jumprelu` (Rajamanoharan et al., arXiv 2407.14435)."""


@dataclass(frozen=True)
class Recipe:
    """How to train, whatever the size of the SAE."""

    architecture: Architecture = "topk"
    """Which latents are active: the k largest of a token (topk), of a batch on average (batchtopk, matryoshka; stored
    with the threshold they ended at), or those above thresholds that are learnt (jumprelu, k is the L0 aimed at)."""
    batch_size: int = 2048
    """Tokens per step, over all processes."""
    lr: float = 0.0
    """Peak learning rate of Adam; 0 takes 8e-4 / sqrt(d_sae / 2^14) x sqrt(2000 / steps), the root kept above 1/4."""
    warmup: float = 0.02
    """Share of the steps over which the learning rate rises from zero."""
    decay: float = 0.3
    """Share of the steps, at the end, over which it falls to zero."""
    center: Literal["mean", "median"] = "mean"
    """Where b_dec starts: the mean of the first activations, or their geometric median."""
    start: Literal["data", "random"] = "data"
    """Where decoder rows start: half a difference of two residuals and half noise, which gets far in few steps, or
    noise alone, which gets as far in many (docs/training.md)."""
    auxk: float = 0.03125
    """Weight of the auxiliary loss that revives dead latents (Gao et al., arXiv 2406.04093, appendix A.2)."""
    dead_after: int = 250_000
    """Tokens without firing after which a latent counts as dead during training."""
    prefixes: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
    """matryoshka: shares of the latents that must reconstruct on their own, rising, the last 1."""
    bandwidth: float = 0.5
    """jumprelu: width of the window in which a threshold has a gradient, in latent units."""
    sparsity: float = 1.0
    """jumprelu: weight of ((L0 / k) - 1)^2 against the FVU."""
    seed: int = 0
    """Seed of initialisation and of the order of tokens."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "dead_after"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected a share between 0 and 1")
        for name in ("lr", "auxk", "sparsity"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if not self.bandwidth > 0:
            raise InputError(f"bandwidth is {self.bandwidth}, expected more than 0")
        rising = all(a < b for a, b in zip((0.0, *self.prefixes), self.prefixes, strict=False))
        if not self.prefixes or not rising or self.prefixes[-1] != 1:
            raise InputError(f"prefixes are {self.prefixes}, expected rising shares above 0 that end with 1")


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """How to train one SAE on a stream of residuals."""

    d_sae: int = 4608
    """Number of latents."""
    k: int = 32
    """Active latents per token: exactly, on average, or aimed at, as the architecture has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d_sae", "k"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.k > self.d_sae:
            raise InputError(f"k is {self.k}, expected at most d_sae = {self.d_sae}")

    def peak_lr(self, total_steps: int) -> float:
        """The learning rate in force in a run of `total_steps`."""
        # short runs want steps as long as stability allows, long ones dictionary_learning's 2e-4 (docs/training.md)
        return self.lr or 8e-4 / (self.d_sae / 2**14) ** 0.5 * max(1 / 16, 2000 / total_steps) ** 0.5

    @property
    def ends(self) -> tuple[int, ...]:
        """Where each nested group of latents ends; one group for all but matryoshka."""
        if self.architecture != "matryoshka":
            return (self.d_sae,)
        return tuple(max(1, round(share * self.d_sae)) for share in self.prefixes)
