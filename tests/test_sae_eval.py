"""`demur sae eval` on a tiny model: what it reports, typed by who wrote each token."""

import json
from pathlib import Path

import pytest
import torch
from tiny_study import save_model

from demur.cli.main import main
from demur.cli.show import show_sae
from demur.lm.batches import pad
from demur.lm.chat import chat_ids
from demur.lm.load import LanguageModel, load
from demur.lm.record import read
from demur.lm.token_types import TYPES, Typed
from demur.sae.metrics import Tokens, measure
from demur.sae.store import SaeConfig, SaeModel, load_sae, save_sae
from demur.testing import tiny_model, tiny_sae
from demur.types import Hookpoint, Message
from demur.verbs.sae_eval import Sieve, own_text, residuals


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    save_model(tiny_model(), tmp_path / "model")
    lm = load(str(tmp_path / "model"))
    made_for = SaeModel(lm.name, lm.fingerprint, lm.n_blocks)
    save_sae(tmp_path / "sae", tiny_sae(), SaeConfig(32, 96, 8, "layers.1.resid_post", made_for))
    return tmp_path / "sae"


def text_of(lm: LanguageModel, ids: list[int]) -> str:
    return str(lm.tokenizer.decode(ids))


def test_own_text_is_typed_and_answers_are_the_assistants() -> None:
    lm = tiny_model()
    rows = own_text(lm, 1)
    assert all(len(row.ids) == len(row.types) for row in rows)
    for row in rows:
        said = text_of(lm, [i for i, t in zip(row.ids, row.types, strict=True) if TYPES[t] == "user"])
        head = row.types.index(TYPES.index("assistant"))
        assert set(row.types[head:]) == {TYPES.index("assistant")}
        assert text_of(lm, row.ids[:head]).endswith(f"{said}<|im_end|>\n<|im_start|>assistant\n")
    assert sum(TYPES.index("system") in row.types for row in rows) == len(rows) / 2


def test_residuals_keep_their_types_and_massive_tokens_are_left_out() -> None:
    lm, at = tiny_model(), Hookpoint(1)
    rows = [chat_ids(lm, [Message("user", text)]) for text in ("Hi", "How do I make a cake?", "Bye")]
    numbered = [Typed(row, [n] * len(row)) for n, row in enumerate(rows)]
    sieve = Sieve()
    (found,) = residuals(lm, at, numbered, sieve)
    assert found.types is not None
    for n, row in enumerate(rows):
        residual = read(lm.model, at, pad(lm, [row], side="right").ids).residual[0]
        ordinary = residual[residual.norm(dim=-1) <= sieve._limit]
        assert found.x[found.types == n].shape == ordinary.shape
        assert (found.x[found.types == n] - ordinary).abs().max() < 1e-4
    assert sieve.seen == sum(map(len, rows))
    assert sieve.left_out == 1 - len(found.x) / sieve.seen


def test_eval_reports_every_measure_by_name(
    sae: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demur.verbs.sae_eval._PROMPTS", 1)
    assert main(["sae", "eval", str(sae), "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert {"fvu", "l0", "dead", "ce_recovered", "kl", "l2_ratio", "zero_share", "tokens"} <= set(found)
    assert found["kl"] > 0
    assert set(found["fvu_by_type"]) == {"template", "system", "user", "assistant"}
    assert sum(row["tokens"] for row in found["fvu_by_type"].values()) == found["tokens"]
    rates = found["latents_by_rate"]
    assert sum(rates["counts"]) + rates["never"] == 96
    assert rates["never"] == round(found["dead"] * 96)
    for text in ("kl  ", "fvu_by_type\n", "assistant ", "never ", "up to 1e0"):
        assert text in shown.err


def test_a_histogram_without_a_firing_latent_can_be_shown(sae: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = measure(load_sae(sae).sae, [Tokens(torch.zeros(0, 32))]).rates
    show_sae({"metrics": {"latents_by_rate": rates._asdict()}}, False)
    assert "never" in capsys.readouterr().err
