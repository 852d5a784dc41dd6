"""What the verbs that set a model beside itself under specs have in common. No torch here."""

from dataclasses import dataclass
from math import inf
from pathlib import Path

from demur.errors import InputError
from demur.verbs.model_config import ModelConfig


@dataclass(frozen=True)
class SidesConfig(ModelConfig):
    """A model, and the specs under which it is run beside the unsteered one."""

    spec: tuple[Path, ...] = ()
    """Spec files (JSON); each is a side beside the unsteered model."""
    latent: int | None = None
    """Also clamp this latent of the first SAE ..."""
    value: tuple[float, ...] = ()
    """... to each of these values, in latent units; 8 if none is given."""
    sae: tuple[str, ...] = ()
    """SAE folders that specs name by hash; the embedded SAE is known. With --latent: the SAE."""
    direction: tuple[Path, ...] = ()
    """Direction files that specs name by hash."""
    probe: tuple[Path, ...] = ()
    """Probe files of gates, as `demur gate train` writes them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", tuple(float(value) for value in self.value))
        if len(set(self.value)) < len(self.value):
            raise InputError(f"value is {', '.join(map(str, self.value))}; each may occur once")
        if self.value and self.latent is None:
            raise InputError(f"value is {list(self.value)}, but no latent was given to clamp; give --latent")
        if self.latent is not None and self.latent < 0:
            raise InputError(f"latent is {self.latent}, expected 0 or more")
        if any(not 0 <= value < inf for value in self.value):
            raise InputError(f"value is {list(self.value)}; expected numbers from 0 up, as a latent is never negative")
