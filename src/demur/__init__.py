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
    from demur.spec import DirectionEdit as DirectionEdit
    from demur.spec import Edit as Edit
    from demur.spec import LatentGate as LatentGate
    from demur.spec import NamedGate as NamedGate
    from demur.spec import Positions as Positions
    from demur.spec import ProbeGate as ProbeGate
    from demur.spec import SteeringSpec as SteeringSpec
    from demur.spec import TextGate as TextGate
    from demur.steering.direction import difference_in_means as difference_in_means
    from demur.steering.probe import load_probe as load_probe
    from demur.steering.spec_file import read_spec as read_spec
    from demur.steering.spec_file import write_spec as write_spec
    from demur.steering.steer import steer as steer
    from demur.types import Message as Message
    from demur.types import Prompt as Prompt
    from demur.verbs.config import StudyConfig as StudyConfig
    from demur.verbs.study import study as study

_HOMES = {
    "DirectionEdit": "demur.spec",
    "Edit": "demur.spec",
    "LatentGate": "demur.spec",
    "NamedGate": "demur.spec",
    "ProbeGate": "demur.spec",
    "Positions": "demur.spec",
    "difference_in_means": "demur.steering.direction",
    "read_spec": "demur.steering.spec_file",
    "write_spec": "demur.steering.spec_file",
    "Message": "demur.types",
    "Prompt": "demur.types",
    "SteeringSpec": "demur.spec",
    "StudyConfig": "demur.verbs.config",
    "TextGate": "demur.spec",
    "chat_ids": "demur.lm.chat",
    "generate": "demur.lm.generate",
    "load": "demur.lm.load",
    "load_probe": "demur.steering.probe",
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
