"""Edits that fade: `Positions.half_life` against a hand-written hook, cached and uncached, alone and in a batch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from demur.errors import InputError
from demur.lm.attach import prompt_lengths
from demur.lm.generate import generate
from demur.sae.store import LoadedSae, SaeConfig, SaeModel
from demur.spec import Edit, LatentGate, Positions, SteeringSpec, Where
from demur.steering.artefacts import Artefacts
from demur.steering.steer import steer
from demur.testing import tiny_model, tiny_sae
from demur.vllm.accept import check_spec

LM = tiny_model()
MODEL: Any = LM.model
SAE = tiny_sae()
SAES = [LoadedSae(SAE, SaeConfig(32, 96, 8, "layers.1.resid_post", SaeModel("tiny", "f", 3)), "s", "memory")]
ROW = [1, 70, 71, 72, 73, 74, 75, 76]
PROMPT = 3


def fading(half_life: float, value: float = 9.0, where: Where = "generation") -> SteeringSpec:
    edit = Edit("layers.1", "s", (5,), value, "add")
    return SteeringSpec((edit,), Positions(where, half_life=half_life))


def by_hand(half_life: float, value: float = 9.0, first: int = PROMPT) -> Tensor:
    """Log-probabilities of an ordinary pass whose block 1 is moved by 0.5 ** (n / half_life) of the edit from token
    `first` on."""
    share = torch.tensor([0.5 ** ((i - first) / half_life) if i >= first else 0.0 for i in range(len(ROW))])

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        moved = value * share.unsqueeze(-1) * SAE.W_dec[5]
        return (output[0] + moved, *output[1:]) if isinstance(output, tuple) else output + moved

    handle = MODEL.model.layers[1].register_forward_hook(hook)
    try:
        with torch.no_grad():
            found: Tensor = MODEL(torch.tensor([ROW])).logits[0].log_softmax(-1)
            return found
    finally:
        handle.remove()


def steered(spec: SteeringSpec) -> Tensor:
    with torch.no_grad(), steer(LM, spec, SAES), prompt_lengths(MODEL, torch.tensor([PROMPT])):
        found: Tensor = MODEL(torch.tensor([ROW])).logits[0].log_softmax(-1)
        return found


@pytest.mark.parametrize("half_life", [0.5, 1, 7])
def test_an_edit_fades_by_its_half_life(half_life: float) -> None:
    assert torch.allclose(steered(fading(half_life)), by_hand(half_life), atol=1e-4)
    assert not torch.allclose(by_hand(half_life), steered(fading(0)), atol=1e-2)  # else the test would say nothing
    answer = by_hand(half_life, first=PROMPT - 1)
    assert torch.allclose(steered(fading(half_life, where="answer")), answer, atol=1e-4)
    assert not torch.allclose(answer, by_hand(half_life), atol=1e-2)


def test_with_a_cache_and_in_a_batch_it_is_the_same() -> None:
    others = [fading(2), SteeringSpec(), fading(0, 4.0), fading(9)]
    rows = [ROW[:PROMPT], ROW[:5], ROW[:4], ROW[:PROMPT]]
    with steer(LM, others, SAES):
        together = [one.ids for one in generate(LM, rows, 8)]
    for spec, row, ids in zip(others, rows, together, strict=True):
        written: list[int] = []
        while len(written) < 8 and not (written and written[-1] in LM.eos_ids):
            with torch.no_grad(), steer(LM, spec, SAES), prompt_lengths(MODEL, torch.tensor([len(row)])):
                written.append(int(MODEL(torch.tensor([[*row, *written]]), use_cache=False).logits[0, -1].argmax()))
        assert ids == [token for token in written if token not in LM.eos_ids]


def test_specs_keep_the_hash_that_they_had() -> None:
    edit = Edit("layers.1", "s", (3,), 9.0)
    gate = LatentGate("layers.0", "s", 5, 0.5, "max_act", Positions("prompt"))
    specs = [
        SteeringSpec((edit,)),
        SteeringSpec((edit,), Positions("generation", 4, 2)),
        SteeringSpec((edit,), Positions("prompt"), gate),
    ]
    # as made by the commit before half_life
    assert [one.hash for one in specs] == ["b3e9d5d5096870d9", "a7fcda441f02f860", "8911a253053a13fa"]
    assert replace(specs[1], positions=Positions("generation", 4, 2, 3.0)).hash != specs[1].hash


def test_where_it_makes_no_sense_is_one_sentence() -> None:
    for positions in ({"half_life": 2.0}, {"where": "generation", "half_life": -1.0}):
        with pytest.raises(InputError, match="half_life is"):
            Positions(**positions)  # type: ignore[arg-type]
    edit = Edit("layers.1", "s", (3,), 9.0)
    with pytest.raises(InputError, match="a gate does not fade"):
        SteeringSpec((edit,), gate=LatentGate("layers.0", "s", 5, 0.5, positions=Positions("generation", half_life=2)))
    with pytest.raises(InputError, match="a half_life, which vLLM does not follow"):
        check_spec(fading(2), Artefacts(MODEL, SAES, (), {}))
