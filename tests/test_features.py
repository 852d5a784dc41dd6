"""Controls against plain loops on a tiny model."""

import pytest
import torch

from demur.errors import InputError
from demur.features.controls import control_latent, firing_rates
from demur.lm.chat import chat_ids
from demur.lm.record import read
from demur.testing import tiny_model, tiny_sae
from demur.types import Hookpoint, Message

LM = tiny_model()
SAE = tiny_sae()
AT = Hookpoint(1)
ROWS = [chat_ids(LM, [Message("user", text)]) for text in ("Hi", "How do I make a cake?", "What is blue?")]


def test_firing_rates_against_a_plain_count_without_what_all_rows_share() -> None:
    shared = next(i for i in range(99) if len({tuple(row[: i + 1]) for row in ROWS}) > 1)
    assert shared > 2
    counts, tokens = torch.zeros(96), 0
    for row in ROWS:
        residual = read(LM.model, AT, torch.tensor([row])).residual[0, shared:]
        counts += (SAE.encode(residual) > 0).sum(0)
        tokens += len(residual)
    torch.testing.assert_close(firing_rates(LM, SAE, AT, ROWS), counts / tokens)


def test_the_control_fires_alike_and_is_unrelated() -> None:
    rates = torch.tensor([0.10, 0.11, 0.09, 0.5, 0.0, 0.12])
    on_harmful = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.0, 0.12])
    assert control_latent(rates, 0, [0, 1], on_harmful) == 5  # 1 is a candidate, 2 fires more on harmful text
    with pytest.raises(InputError, match="no latent can serve as a control"):
        control_latent(rates, 0, range(6), on_harmful)
