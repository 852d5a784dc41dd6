"""Which model a verb runs: the first fields of its config. No torch here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """A model, and how it is loaded."""

    model: str = "smollm2-135m-instruct"
    """Embedded model name, hub id, local folder or GGUF file."""
    revision: str = ""
    """Revision of a hub model."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    device: str = "cpu"
    """Torch device: cpu, cuda, or auto to spread a large model."""
