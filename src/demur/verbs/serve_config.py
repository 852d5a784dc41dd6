"""Settings of `demur serve`. A sentence under each field is its help text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demur.errors import InputError
from demur.verbs.model_config import ModelConfig


@dataclass(frozen=True)
class Serve(ModelConfig):
    """Serve a model with a spec for every request, in OpenAI's API."""

    name: str = ""
    """What requests call the model; empty for its own name."""
    spec: tuple[Path, ...] = ()
    """Spec files, and folders of them with their SAEs and directions; each is a model name of its own."""
    latent: int | None = None
    """Also offer clamps of this latent of the first SAE, under names as latent-957-at-8 ..."""
    value: tuple[float, ...] = ()
    """... to each of these values, in latent units; 8 if none is given."""
    sae: tuple[str, ...] = ()
    """SAE folders that specs name by hash; the embedded SAE is known. With --latent: the SAE."""
    direction: tuple[Path, ...] = ()
    """Direction files that specs name by hash."""
    probe: tuple[Path, ...] = ()
    """Probe files of gates, as `demur gate train` writes them."""
    default: str = ""
    """Name of the spec for requests that name none; empty leaves them unsteered."""
    lock: bool = False
    """Steer every request by the default spec: clients may name no other."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of them."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    slots: int = 32
    """Answers written at once."""
    room: int = 65536
    """Tokens of all answers under way together, each counted as long as the longest may get; more wait. Memory: of the
    embedded model 46 KB a token."""
    waiting: int = 256
    """Answers that may wait for a slot; more are refused (429)."""
    most_answers: int = 64
    """Answers that one request may ask for."""
    max_new_tokens: int = 1024
    """Length limit of an answer to a request that names none."""
    timeout: float = 600
    """Seconds that an answer may take, waiting included."""
    body_timeout: float = 30
    """Seconds in which a request must have arrived."""
    max_body: int = 4 << 20
    """Bytes that a request may have."""
    key: str = ""
    """API key that requests must bring; empty takes the environment's DEMUR_API_KEY, or asks for none."""

    def __post_init__(self) -> None:
        counts = {"slots": self.slots, "most_answers": self.most_answers, "max_new_tokens": self.max_new_tokens}
        counts["room"] = self.room
        for name, value in counts.items():
            if value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        if self.waiting < 0 or not 0 <= self.port < 1 << 16:
            raise InputError(f"waiting is {self.waiting} and port {self.port}; expected 0 or more, and 0 to 65535")
        if self.timeout <= 0 or self.body_timeout <= 0 or self.max_body <= 0:
            raise InputError("timeout, body_timeout and max_body must be above 0")
        if self.value and self.latent is None:
            raise InputError(f"value is {list(self.value)}, but no latent was given to clamp; give --latent")
        if self.lock and not self.default:
            raise InputError("the steering is to be locked, but there is no default spec; give --default NAME")
