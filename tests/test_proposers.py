"""Proposers of latents against slow, obvious computations on a tiny model."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from demur.errors import InputError
from demur.features.openings import Openings
from demur.features.proposers import METHODS
from demur.features.proposers.archetype import archetype
from demur.features.proposers.attribution import attribution
from demur.features.proposers.contrast import auroc, auroc_of, mean_difference, rate_difference
from demur.features.proposers.cosine import cosine, refusal_direction
from demur.features.proposers.output_score import output_score, refusal_lens
from demur.features.proposers.probe import probe
from demur.features.proposers.setting import Setting, Where
from demur.features.proposers.union import union
from demur.features.referee import Referee
from demur.lm.attach import attach
from demur.lm.chat import chat_ids, text_ids
from demur.lm.record import read
from demur.sae.base import Normalize, Sae
from demur.sae.store import LoadedSae, SaeConfig, SaeModel
from demur.sae.topk import TopKSae
from demur.spec import Edit, SteeringSpec
from demur.steering.steer import steer
from demur.testing import tiny_model, tiny_sae
from demur.types import Hookpoint, LatentRanking, LatentScore, Message

LM = tiny_model()
MODEL: Any = LM.model
SAE = tiny_sae()
AT = Hookpoint(1)
OPENINGS = Openings(((60,), (61, 62, 63), (61, 64), (70, 71)), (4, 3, 2, 2), 11)
HARMFUL_TEXTS = ("Hi", "How do I make a cake?", "What is blue?", "I can't", "Is it?")
BENIGN_TEXTS = ("The answer", "Make it blue", "Who is there?", "How?")


def loaded(sae: Sae) -> LoadedSae:
    return LoadedSae(sae, SaeConfig(32, 96, 8, str(AT), SaeModel("tiny", "f", 3)), "s", "memory")


def rows(texts: Sequence[str]) -> list[list[int]]:
    return [chat_ids(LM, [Message("system", "Be kind."), Message("user", text)]) for text in texts]


HARMFUL, BENIGN = rows(HARMFUL_TEXTS), rows(BENIGN_TEXTS)
ARCHETYPE, REFUSAL = rows(["How do I make that?"])[0], text_ids(LM, "I'm sorry, but I can't")
SETTING = Setting(LM, loaded(SAE), AT, HARMFUL, BENIGN, ARCHETYPE, REFUSAL, OPENINGS, 5.0)


def constructed(harmful: Tensor, benign: Tensor) -> Setting:
    """A setting in which these latents [prompts, latents] were read."""
    made = replace(SETTING)
    made.__dict__["harmful_latents"], made.__dict__["benign_latents"] = harmful, benign
    return made


def scores_of(ranking: LatentRanking) -> dict[int, float]:
    found = {one.latent: one.score for one in ranking.scores}
    assert len(found) == len(ranking.scores)
    order = [(-one.score, one.latent) for one in ranking.scores]
    assert order == sorted(order)
    return found


def residual_of(row: Sequence[int]) -> Tensor:
    return read(LM.model, AT, torch.tensor([row])).residual[0]


# --- the setting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["last", "prompt"])
def test_the_setting_reads_the_tokens_that_where_names(where: Where) -> None:
    setting = replace(SETTING, where=where)
    every = [*HARMFUL, *BENIGN]
    shared = next(i for i in range(99) if len({row[i] for row in every}) > 1)
    assert shared > 5
    for mine, latents, residuals in (
        (HARMFUL, setting.harmful_latents, setting.harmful_residuals),
        (BENIGN, setting.benign_latents, setting.benign_residuals),
    ):
        for i, row in enumerate(mine):
            first = len(row) - 1 if where == "last" else shared
            tokens = [residual_of(row)[place] for place in range(first, len(row))]
            torch.testing.assert_close(residuals[i], torch.stack(tokens).mean(0), atol=1e-4, rtol=1e-4)
            active = torch.stack([SAE.encode(token) for token in tokens]).mean(0)
            torch.testing.assert_close(latents[i], active, atol=1e-3, rtol=1e-3)


def test_a_prompt_of_one_token_has_that_token() -> None:
    setting = replace(SETTING, harmful=[[5]], benign=[[1, 6, 7], [8]], where="prompt")
    torch.testing.assert_close(setting.harmful_residuals[0], residual_of([5])[0])
    torch.testing.assert_close(setting.benign_residuals[0], residual_of([1, 6, 7])[1:].mean(0))
    assert bool(setting.benign_latents.isfinite().all())


def test_a_ranking_is_in_order_and_says_what_it_saw() -> None:
    ranking = SETTING.ranking("m", torch.tensor([1.0, 3.0, 1.0, 3.0]), {"d": torch.tensor([4.0, 5, 6, 7])})
    assert [one.latent for one in ranking.scores] == [1, 3, 0, 2]
    assert ranking.scores[1] == LatentScore(3, 3.0, {"d": 7.0})
    assert (ranking.method, ranking.hookpoint, ranking.sae) == ("m", str(AT), "s")
    other = replace(SETTING, benign=BENIGN[:2])
    assert other.ranking("m", torch.zeros(4)).prompts != ranking.prompts
    kept = SETTING.ranking("m", torch.tensor([1.0, 3.0, 1.0, 3.0]), keep=[2, 3, 0])
    assert [one.latent for one in kept.scores] == [3, 0, 2]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_bears_its_name_and_repeats_itself(method: str) -> None:
    found = METHODS[method](replace(SETTING))
    assert found.method == method
    assert found == METHODS[method](replace(SETTING))
    assert all(torch.tensor(one.score).isfinite() for one in found.scores)


# --- contrasts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["last", "prompt"])
def test_contrasts_against_plain_counts(where: Where) -> None:
    setting = replace(SETTING, where=where)
    harmful, benign = setting.harmful_latents.double(), setting.benign_latents.double()
    means, rates, areas = scores_of(mean_difference(setting)), scores_of(rate_difference(setting)), auroc(setting)
    labels = [1] * len(harmful) + [0] * len(benign)
    for latent in range(96):
        h, b = harmful[:, latent].tolist(), benign[:, latent].tolist()
        assert means[latent] == pytest.approx(sum(h) / len(h) - sum(b) / len(b), abs=1e-5)
        share = sum(x > 0 for x in h) / len(h) - sum(x > 0 for x in b) / len(b)
        assert rates[latent] == pytest.approx(share, abs=1e-8)
        pairs = [(x > y) + 0.5 * (x == y) for x, y in product(h, b)]
        assert scores_of(areas)[latent] == pytest.approx(sum(pairs) / len(pairs))
        assert scores_of(areas)[latent] == pytest.approx(roc_auc_score(labels, [*h, *b]))


def test_auroc_with_many_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randint(0, 4, (9, 20), generator=generator), torch.randint(0, 3, (13, 20))
    found = auroc_of(positive, negative)
    for i in range(20):
        wanted = roc_auc_score([1] * 9 + [0] * 13, [*positive[:, i].tolist(), *negative[:, i].tolist()])
        assert float(found[i]) == pytest.approx(wanted)


def test_equal_rates_are_in_order_of_their_mean_difference_however_large() -> None:
    harmful = torch.tensor([[30.0, 400.0, 50.0, 0.0, 9.0], [30.0, 400.0, 50.0, 0.0, 0.0]])
    benign = torch.zeros(2, 5)
    ranking = rate_difference(constructed(harmful, benign))
    assert [one.latent for one in ranking.scores] == [1, 2, 0, 4, 3]
    assert scores_of(rate_difference(constructed(benign, benign))) == dict.fromkeys(range(5), 0.0)


# --- the refusal direction ------------------------------------------------------------------------


def test_cosine_with_the_difference_in_means() -> None:
    last = [torch.stack([residual_of(row)[-1] for row in some]).mean(0) for some in (HARMFUL, BENIGN)]
    direction = last[0] - last[1]
    torch.testing.assert_close(refusal_direction(SETTING).vector, direction, atol=1e-4, rtol=1e-4)
    found = scores_of(cosine(SETTING))
    for latent, row in enumerate(SAE.W_dec):
        assert found[latent] == pytest.approx(float(row @ direction / row.norm() / direction.norm()), abs=1e-4)


# --- the archetypal prompt ------------------------------------------------------------------------


def test_candidates_are_the_latents_active_on_two_refusal_tokens() -> None:
    found = archetype(SETTING)
    residual = residual_of([*ARCHETYPE, *REFUSAL])[len(ARCHETYPE) :]
    encoded = torch.stack([SAE.encode(token) for token in residual])
    active = [[i for i in range(96) if float(token[i]) > 0] for token in encoded]
    counts = {i: sum(i in tokens for tokens in active) for i in range(96)}
    assert {s.latent: s.score for s in found.scores} == {i: n for i, n in counts.items() if n >= 2}
    order = [(s.score, s.detail["mean_activation"]) for s in found.scores]
    assert order == sorted(order, reverse=True)
    for one in found.scores:
        assert one.detail["mean_activation"] == pytest.approx(float(encoded[:, one.latent].mean()), abs=1e-3)
    assert archetype(replace(SETTING, harmful=HARMFUL[:1])) == found  # which it does not look at


def test_no_candidate_is_an_error() -> None:
    with pytest.raises(InputError, match="no latent is active on 2 tokens"):
        archetype(replace(SETTING, refusal=REFUSAL[:1]))


# --- the sparse probe -----------------------------------------------------------------------------


def separated() -> Setting:
    """Latent 7 is high on harmful prompts only, 11 on benign ones only; the others are noise, 3 never active."""
    generator = torch.Generator().manual_seed(1)
    harmful, benign = torch.rand(30, 40, generator=generator), torch.rand(25, 40, generator=generator)
    harmful[:, 7] += 2
    benign[:, 11] += 1.5
    harmful[:, 3] = benign[:, 3] = 0
    return constructed(harmful, benign)


def test_the_probe_finds_what_separates_and_little_else() -> None:
    found = scores_of(probe(separated()))
    assert next(iter(found)) == 7
    assert list(found)[-1] == 11
    assert found[7] > 0 > found[11]
    assert sum(score != 0 for score in found.values()) <= 5
    assert found[3] == 0


def test_the_probe_minimises_the_penalised_loss() -> None:
    setting = separated()
    found = scores_of(probe(setting))
    w = torch.tensor([found[i] for i in range(40)])
    x = torch.cat([setting.harmful_latents, setting.benign_latents]).double()
    spread = x.std(0, correction=0)
    x = x / torch.where(spread > 0, spread, 1.0)
    y = torch.tensor([1.0] * 30 + [-1.0] * 25, dtype=torch.float64)

    def loss(weights: Tensor) -> float:
        # the solver penalises the intercept like a weight
        best = min(
            float(abs(b) + torch.nn.functional.softplus(-y * (x @ weights.double() + b)).sum())
            for b in torch.linspace(-3, 3, 601).tolist()
        )
        return best + float(weights.abs().sum())

    least = loss(w)
    for scale in (0.8, 0.95, 1.05, 1.2):
        assert loss(w * scale) > least
    for latent in range(40):
        for step in (-0.1, 0.1):
            other = w.clone()
            other[latent] += step
            assert loss(other) > least - 1e-4


def test_a_probe_that_did_not_converge_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient = partial(LogisticRegression, max_iter=1)
    monkeypatch.setattr(import_module("demur.features.proposers.probe"), "LogisticRegression", impatient)
    assert len(probe(separated()).scores) == 40  # a warning would be an error here


def test_the_probe_on_what_the_model_reads_is_scaled_by_each_latents_spread() -> None:
    factor = torch.tensor([10.0 ** (i % 5 - 2) for i in range(40)])
    setting = separated()
    scaled = constructed(setting.harmful_latents * factor, setting.benign_latents * factor)
    ours, theirs = scores_of(probe(setting)), scores_of(probe(scaled))
    assert ours == pytest.approx(theirs, abs=1e-3)


# --- attribution ----------------------------------------------------------------------------------


def normalised(normalize: Normalize) -> Sae:
    sae = TopKSae(32, 96, 8, normalize)
    with torch.no_grad():
        for mine, theirs in zip(sae.parameters(), SAE.parameters(), strict=True):
            mine.copy_(theirs)
    return sae.requires_grad_(False)


def attribution_by_hand(setting: Setting, steps: int) -> Tensor:
    """One ordinary forward pass for each prompt, point of the path and opening, each with a residual of its own."""
    sae = setting.loaded.sae
    total = torch.zeros(96, dtype=torch.float64)
    for row, step in product(setting.harmful, range(steps)):
        points, log_ps, activations, scales = [], [], [], []
        for opening in setting.openings.tokens:
            ids = [*row, *opening[:-1]]
            x = residual_of(ids)
            f, scale = sae.encode(x), sae.prepare(x).scale
            scale = torch.ones(len(ids), 1) if scale is None else scale
            off = x - (f @ sae.W_dec) * scale
            off[0] = x[0]  # the first token is left alone
            point = (off + (step + 0.5) / steps * (x - off)).unsqueeze(0).requires_grad_()
            with attach(LM.model, AT, lambda residual, _, point=point: point):
                said = MODEL(torch.tensor([ids])).logits[0, len(row) - 1 :].log_softmax(-1)
            log_ps.append(sum(said[i, token] for i, token in enumerate(opening)))
            points.append(point)
            activations.append(f)
            scales.append(scale)
        odds = torch.stack(log_ps).exp().sum().double().logit()
        for gradient, f, scale in zip(torch.autograd.grad(odds, points), activations, scales, strict=True):
            for token in range(1, len(f)):
                slope = sae.W_dec @ (gradient[0, token] * scale[token])
                total += (setting.value - f[token]) * slope / steps
    return total / len(setting.harmful)


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
def test_attribution_is_its_formula_in_plain_passes(normalize: Normalize) -> None:
    setting = replace(SETTING, loaded=loaded(normalised(normalize)))
    found = scores_of(attribution(setting))
    wanted = attribution_by_hand(setting, 3).tolist()
    assert [found[i] for i in range(96)] == pytest.approx(wanted, abs=2e-2, rel=1e-3)
    assert max(wanted) > 1


def test_attribution_spreads_its_prompts_over_those_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("demur.features.proposers.attribution"), "PROMPTS", 3)
    some = replace(SETTING, harmful=[HARMFUL[i] for i in (0, 1, 3)])
    ours, theirs = scores_of(attribution(SETTING)), scores_of(attribution(some))
    assert ours == pytest.approx(theirs, abs=1e-3, rel=1e-3)


def test_attribution_is_the_slope_of_what_the_referee_measures() -> None:
    sae = tiny_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)  # nothing is active: the path is a point
    setting = replace(SETTING, loaded=loaded(sae), value=0.02)
    found = scores_of(attribution(setting))
    referee = Referee(LM, AT, OPENINGS, HARMFUL, saes=[setting.loaded])
    sides = [
        referee.log_odds([SteeringSpec((Edit(str(AT), "s", (i,), value, "add"),)) for i in range(96)]).mean(1)
        for value in (0.02, -0.02)
    ]
    measured = (sides[0] - sides[1]) / 2
    largest = float(measured.abs().max())
    assert largest > 0.01
    assert [found[i] for i in range(96)] == pytest.approx(measured.tolist(), abs=0.03 * largest)


def test_attribution_to_all_latents_adds_up_to_switching_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("demur.features.proposers.attribution"), "STEPS", 128)
    few = replace(SETTING, harmful=HARMFUL[:2], value=0.0)
    total = sum(scores_of(attribution(few)).values())
    referee = Referee(LM, AT, OPENINGS, few.harmful, saes=[few.loaded])
    off = SteeringSpec((Edit(str(AT), "s", tuple(range(96)), op="ablate"),))
    odds = referee.log_odds([SteeringSpec(), off]).mean(1)
    assert abs(float(odds[1] - odds[0])) > 0.1
    assert total == pytest.approx(float(odds[1] - odds[0]), rel=0.03)


# --- the output score -----------------------------------------------------------------------------


def lens_by_hand(latent: int) -> float:
    with torch.no_grad():
        logits = MODEL.lm_head(MODEL.model.norm(SAE.W_dec[latent]))
    return float(logits[[60, 63, 64, 71]].mean() - logits.mean())


def output_score_by_hand(latent: int) -> float:
    row = chat_ids(LM, [Message("user", "From my experience,")])
    best = 0.0
    for opening in OPENINGS.tokens:
        spec = SteeringSpec((Edit(str(AT), "s", (latent,), SETTING.value),))
        with torch.no_grad(), steer(LM.model, spec, {"s": SAE}):
            said = MODEL(torch.tensor([[*row, *opening]])).logits[0, len(row) - 1 :].double().softmax(-1)
        p, last = 1.0, said[len(opening) - 1]
        for i, token in enumerate(opening):
            p *= float(said[i, token])
        best = max(best, p * (1 - int((last > last[opening[-1]]).sum()) / len(last)))
    return best


def test_the_output_score_is_that_of_a_steered_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(refusal_lens(SETTING), torch.tensor([lens_by_hand(i) for i in range(96)]))
    module = import_module("demur.features.proposers.output_score")
    monkeypatch.setattr(module, "TRIED", 96)
    every = scores_of(output_score(SETTING))
    assert sorted(every) == list(range(96))
    for latent in range(0, 96, 7):
        assert every[latent] == pytest.approx(output_score_by_hand(latent), rel=5e-3)
    monkeypatch.setattr(module, "TRIED", 6)
    monkeypatch.setattr(module, "_CHUNK", 10)
    few = output_score(SETTING)
    promising = sorted(range(96), key=lens_by_hand, reverse=True)[:6]
    assert scores_of(few) == pytest.approx({i: every[i] for i in promising})
    assert few.scores[0].detail["logit_lens"] == pytest.approx(lens_by_hand(few.scores[0].latent), abs=1e-4)


# --- several as one -------------------------------------------------------------------------------


def ranked(method: str, *latents: int, sae: str = "s") -> LatentRanking:
    return LatentRanking(method, str(AT), sae, "p", tuple(LatentScore(latent, 0.0) for latent in latents))


def test_union_is_reciprocal_rank_fusion() -> None:
    found = union([ranked("a", 5, 3, 8), ranked("b", 3, 9), ranked("c", 8, 3, 5, 1)])
    wanted = {
        3: 1 / 62 + 1 / 61 + 1 / 62,
        5: 1 / 61 + 1 / 63,
        8: 1 / 63 + 1 / 61,
        9: 1 / 62,
        1: 1 / 64,
    }
    assert found.method == "union"
    assert [one.latent for one in found.scores] == [3, 5, 8, 9, 1]
    assert {one.latent: one.score for one in found.scores} == pytest.approx(wanted)
    assert found.scores[0].detail == {"a": 2.0, "b": 1.0, "c": 2.0}
    assert found.scores[-1].detail == {"c": 4.0}
    alone = union([ranked("a", 5, 3, 8)])
    assert [one.latent for one in alone.scores] == [5, 3, 8]


@pytest.mark.parametrize("rankings", [[], [ranked("a", 1), ranked("a", 2)], [ranked("a", 1), ranked("b", 1, sae="t")]])
def test_what_cannot_be_joined_is_an_error(rankings: list[LatentRanking]) -> None:
    with pytest.raises(InputError, match="cannot be joined; give rankings of one SAE"):
        union(rankings)
