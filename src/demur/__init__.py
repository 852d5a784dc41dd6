"""Steer what a language model refuses with sparse-autoencoder latents, and measure what it costs.

The names below load their modules when they are first used, so that importing demur costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demur.lm.chat import chat_ids as chat_ids
    from demur.lm.generate import generate as generate
    from demur.lm.load import load as load
    from demur.lm.load import wrap as wrap
    from demur.sae.store import load_sae as load_sae
    from demur.sae.store import save_sae as save_sae
    from demur.spec import Edit as Edit
    from demur.spec import SteeringSpec as SteeringSpec
    from demur.steering.steer import steer as steer
    from demur.types import Message as Message
    from demur.types import Prompt as Prompt
    from demur.verbs.config import StudyConfig as StudyConfig
    from demur.verbs.study import study as study

_HOMES = {
    "Edit": "demur.spec",
    "Message": "demur.types",
    "Prompt": "demur.types",
    "SteeringSpec": "demur.spec",
    "StudyConfig": "demur.verbs.config",
    "chat_ids": "demur.lm.chat",
    "generate": "demur.lm.generate",
    "load": "demur.lm.load",
    "load_sae": "demur.sae.store",
    "save_sae": "demur.sae.store",
    "steer": "demur.steering.steer",
    "study": "demur.verbs.study",
    "wrap": "demur.lm.load",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'demur' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
