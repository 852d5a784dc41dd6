"""`demur sae measure`: what each latent does on text, stored with the SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demur.sae.metrics import measure
from demur.sae.store import load_sae, own_folder, write_reference
from demur.verbs.config import SaeMeasure
from demur.verbs.documents import some_rows
from demur.verbs.sae_eval import Sieve, residuals, with_its_model


def sae_measure(config: SaeMeasure) -> dict[str, Any]:
    """Measure each latent's largest activation, standard deviation and firing rate on text; store them with the SAE.

    The units `max_act` and `sigma` of a spec and its fast threshold path rest on these. The SAE's weights stay as they
    are, its hash changes, and with it which specs it fits. Raises as `load_sae`, `load` and `check_fits` do.
    """
    own_folder(config.sae)
    loaded, lm, hookpoint = with_its_model(config.sae, config.model, config.device)
    rows = some_rows(lm, config.data, config.context, config.max_tokens, config.seed)
    measured = measure(loaded.sae, residuals(lm, hookpoint, rows, Sieve()))
    write_reference(Path(loaded.path), measured.reference)
    return {
        "sae": loaded.path,
        "hash_before": loaded.hash,
        "hash": load_sae(config.sae).hash,
        "metrics": {
            **measured.metrics._asdict(),
            "threshold": float(measured.reference.threshold),
            "latents_silent": float((measured.reference.max_act == 0).float().mean()),
        },
    }
