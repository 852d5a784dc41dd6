"""`with steer(lm, spec, saes):` the model runs under the spec inside the block and is itself again after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from demur.errors import InputError, MismatchError
from demur.lm.attach import Edit as Hook
from demur.lm.attach import Step, attach
from demur.lm.hookpoints import parse_hookpoint, width
from demur.sae.topk import TopKSae
from demur.steering.clamp import clamp
from demur.types import Edit, SteeringSpec


@contextmanager
def steer(model: PreTrainedModel, spec: SteeringSpec, saes: Mapping[str, TopKSae]) -> Iterator[None]:
    """Apply every edit of `spec` to `model` inside the block; `saes` maps SAE hashes to SAEs.

    Works with `generate` and with plain forward passes, cached or not. Raises `MismatchError` for an SAE that is
    not there or has another width, `InputError` for a latent or hookpoint that does not exist.
    """
    places = [parse_hookpoint(edit.hookpoint) for edit in spec.edits]
    if len(set(places)) < len(places):
        raise InputError(
            "the spec has two edits at one hookpoint, which this version cannot join; give one a hookpoint"
        )
    with ExitStack() as stack:
        for edit in spec.edits:
            sae = _check(model, edit, saes)
            hook = _hook(sae, edit, spec.skip_first)
            stack.enter_context(attach(model, parse_hookpoint(edit.hookpoint), hook))
        yield


def _check(model: PreTrainedModel, edit: Edit, saes: Mapping[str, TopKSae]) -> TopKSae:
    if edit.sae not in saes:
        raise MismatchError(f"the spec wants the SAE {edit.sae}, but only {', '.join(saes) or 'none'} is loaded")
    sae = saes[edit.sae]
    if sae.d_in != width(model):
        raise MismatchError(f"the SAE reads residuals of width {sae.d_in}, but the model's are {width(model)} wide")
    if not 0 <= edit.latent < sae.d_sae:
        raise InputError(f"latent {edit.latent} does not exist; the SAE has latents 0 to {sae.d_sae - 1}")
    return sae


def _hook(sae: TopKSae, edit: Edit, skip_first: bool) -> Hook:
    first = 1 if skip_first else 0

    def hook(residual: Tensor, step: Step) -> Tensor:
        # padding is at position -1
        return clamp(residual, sae, edit.latent, edit.value, step.positions.to(residual.device) >= first)

    return hook
