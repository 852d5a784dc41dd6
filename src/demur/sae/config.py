"""Settings of SAE training. No torch here: the command line reads this file for its help."""

from dataclasses import dataclass

from demur.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """How to train a top-k SAE on a stream of residuals."""

    d_sae: int = 4608
    """Number of latents."""
    k: int = 32
    """Active latents per token."""
    batch_size: int = 2048
    """Tokens per step."""
    epochs: int = 4
    """Passes over the stored activations."""
    lr: float = 0.0
    """Peak learning rate of Adam; 0 takes 2e-4 / sqrt(d_sae / 2^14) x 2."""
    warmup: float = 0.02
    """Share of the steps over which the learning rate rises from zero."""
    decay: float = 0.3
    """Share of the steps, at the end, over which it falls to zero."""
    auxk: float = 0.03125
    """Weight of the auxiliary loss that revives dead latents (Gao et al., 2406.04093, appendix A.2)."""
    dead_after: int = 250_000
    """Tokens without firing after which a latent counts as dead during training."""
    seed: int = 0
    """Seed of initialisation and of the order of tokens."""

    def __post_init__(self) -> None:
        for name in ("d_sae", "k", "batch_size", "epochs", "dead_after"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.k > self.d_sae:
            raise InputError(f"k is {self.k}, expected at most d_sae = {self.d_sae}")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected a share between 0 and 1")
        if self.lr < 0 or self.auxk < 0:
            raise InputError("lr and auxk must not be negative")

    @property
    def peak_lr(self) -> float:
        """The learning rate in force."""
        return self.lr or 4e-4 / (self.d_sae / 2**14) ** 0.5
