"""Discovery against plain loops on a tiny model."""

import pytest
import torch

from demur.errors import InputError
from demur.features.archetype import candidates, usual_refusal
from demur.features.choose import Tried, rank_finalists
from demur.features.control import control_latent, firing_rates
from demur.features.screen import rank_screened
from demur.lm.chat import chat_ids, text_ids
from demur.lm.record import read
from demur.sae.store import LoadedSae, SaeConfig, SaeModel
from demur.testing import tiny_model, tiny_sae
from demur.types import Hookpoint, LatentRanking, LatentScore, Message

LM = tiny_model()
SAE = tiny_sae()
AT = Hookpoint(1)
LOADED = LoadedSae(SAE, SaeConfig(32, 96, 8, str(AT), SaeModel("tiny", "f", 3)), "s", "memory")
ROWS = [chat_ids(LM, [Message("user", text)]) for text in ("Hi", "How do I make a cake?", "What is blue?")]
REFUSAL = text_ids(LM, "I'm sorry, but I can't")


def test_candidates_are_the_latents_active_on_two_refusal_tokens() -> None:
    found = candidates(LM, LOADED, AT, ROWS[0], REFUSAL)
    residual = read(LM.model, AT, torch.tensor([[*ROWS[0], *REFUSAL]])).residual[0, len(ROWS[0]) :]
    active = [[i for i in range(96) if float(SAE.encode(token)[i]) > 0] for token in residual]
    counts = {i: sum(i in tokens for tokens in active) for i in range(96)}
    assert {s.latent: s.score for s in found.scores} == {i: n for i, n in counts.items() if n >= 2}
    assert [s.score for s in found.scores] == sorted((s.score for s in found.scores), reverse=True)


def test_no_candidate_is_an_error() -> None:
    with pytest.raises(InputError, match="no latent is active on 2 tokens"):
        candidates(LM, LOADED, AT, ROWS[0], REFUSAL[:1])


def test_the_screen_orders_by_refusals_and_keeps_the_proposed_order_among_equals() -> None:
    found = LatentRanking("archetype", str(AT), "s", "p", tuple(LatentScore(i, 9.0 - i, {"a": 1.0}) for i in range(4)))
    ranking = rank_screened(found, {0: 0.25, 1: 1.0, 3: 0.25}, "q")
    assert [score.latent for score in ranking.scores] == [1, 0, 3]
    assert ranking.scores[0] == LatentScore(1, 1.0, {"screen": 1.0, "refusal_tokens": 8.0, "a": 1.0})
    assert ranking.prompts == "q"


def test_the_usual_refusal_is_the_most_frequent_first_sentence() -> None:
    said = ["I can't help. Sorry.", "No.", "I can't help. Ask me something else.", "I won't. No."]
    assert usual_refusal(said) == "I can't help."
    assert usual_refusal([*said[1:2], "I won't."]) == "No."
    assert usual_refusal([]) == ""


def test_finalists_come_first_by_their_effect_and_ties_go_to_the_screen() -> None:
    screened = LatentRanking(
        "m", str(AT), "s", "p", tuple(LatentScore(i, 10.0 - i, {"screen": 10.0 - i}) for i in range(5))
    )
    ranking = rank_finalists(screened, [Tried(0, 0.5, 0.1), Tried(1, 0.9, 0.4), Tried(2, 0.9, 0.4), Tried(3, 0.9, 0.3)])
    assert [s.latent for s in ranking.scores] == [3, 1, 2, 0, 4]
    assert ranking.scores[0].detail == {"screen": 7.0, "harmful_refused": 0.9, "benign_refused": 0.3}


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
