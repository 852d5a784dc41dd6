"""The referee against plain loops: one prompt, one spec and one ordinary forward pass under `steer` at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from demur.errors import InputError, MismatchError
from demur.features import referee as module
from demur.features.openings import Openings
from demur.features.reach import Gates
from demur.features.referee import PACK, Referee
from demur.lm.attach import prompt_lengths
from demur.lm.chat import chat_ids, text_ids
from demur.lm.load import LanguageModel
from demur.sae.store import LoadedSae, SaeConfig, SaeModel
from demur.spec import DirectionEdit, Edit, LatentGate, NamedGate, Op, Positions, ProbeGate, SteeringSpec
from demur.steering.artefacts import Artefacts
from demur.steering.direction import Direction
from demur.steering.probe import Probe
from demur.steering.steer import steer
from demur.testing import ARCHITECTURES, tiny_model, tiny_sae
from demur.types import Hookpoint, Message

LM = tiny_model()
AT = Hookpoint(1)
SAES = [
    LoadedSae(tiny_sae(seed=seed), SaeConfig(32, 96, 8, str(AT), SaeModel("tiny", "f", 3)), name, "memory")
    for seed, name in ((0, "s"), (5, "t"))
]
DIRECTION = Direction(torch.randn(32, generator=torch.Generator().manual_seed(4)), str(AT), sigma=2.0)
PROBES = [
    Probe(torch.randn(32, generator=torch.Generator().manual_seed(9)), 0.1, "layers.0.resid_post", "token"),
    Probe(torch.randn(32, generator=torch.Generator().manual_seed(6)), 0.2, "layers.0.resid_post", "turn"),
]
OPENINGS = Openings(((60,), (61, 62, 63), (61, 64), (70, 71)), (4, 3, 2, 2), 11)
HARMFUL = ("Hi", "How do I make a cake?", "What is blue?", "I can't help", "Is that so?", "Answer the user")
BENIGN = (
    ("Hello there.", "The answer is blue."), ("How?", "I"), ("Make me a cake", "How do I make that?"),
    ("Is it blue?", ""), ("What?", "That is the answer and no cake"), ("Who?", "user"),
)  # fmt: skip


def prompt(lm: LanguageModel, text: str, system: str = "Be kind.") -> list[int]:
    return chat_ids(lm, [Message("system", system), Message("user", text)])


def made(lm: LanguageModel = LM, openings: Openings = OPENINGS) -> Referee:
    harmful = [prompt(lm, text) for text in HARMFUL]
    benign = [(prompt(lm, text), text_ids(lm, answer)) for text, answer in BENIGN]
    return Referee(lm, AT, openings, harmful, benign, SAES, [DIRECTION, *PROBES])


REFEREE = made()


# --- the plain loops ------------------------------------------------------------------------------


def plain(lm: LanguageModel, spec: SteeringSpec, ids: Sequence[int], end: int) -> Tensor:
    """[pos, vocab] log-probabilities in float64; `end` tokens are prompt."""
    model: Any = lm.model
    saes = {one.hash: one.sae for one in SAES}
    ends = prompt_lengths(lm.model, torch.tensor([end]))
    with torch.no_grad(), steer(lm, spec, saes, directions=[DIRECTION, *PROBES]), ends:
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def plain_log_odds(lm: LanguageModel, spec: SteeringSpec, row: Sequence[int], openings: Openings = OPENINGS) -> float:
    total = torch.tensor(0.0, dtype=torch.float64)
    for opening in openings.tokens:
        said = plain(lm, spec, [*row, *opening], len(row))[len(row) - 1 :]
        total += torch.stack([said[i, token] for i, token in enumerate(opening)]).sum().exp()
    return float(total.logit())


def plain_kl(lm: LanguageModel, spec: SteeringSpec, row: Sequence[int], answer: Sequence[int]) -> float:
    places = slice(len(row) - 1, len(row) - 1 + max(len(answer), 1))
    base = plain(lm, SteeringSpec(), [*row, *answer], len(row))[places]
    steered = plain(lm, spec, [*row, *answer], len(row))[places]
    return float((base.exp() * (base - steered)).sum(-1).mean())


def check(referee: Referee, specs: Sequence[SteeringSpec]) -> None:
    lm = referee.lm
    odds, damage = referee.log_odds(specs), referee.damage(specs)
    assert odds.shape == (len(specs), len(HARMFUL))
    assert damage.log_odds.shape == damage.kl.shape == (len(specs), len(BENIGN))
    for s, spec in enumerate(specs):
        wanted = [plain_log_odds(lm, spec, prompt(lm, text)) for text in HARMFUL]
        assert odds[s].tolist() == pytest.approx(wanted, abs=2e-3)
        wanted = [plain_log_odds(lm, spec, prompt(lm, text)) for text, _ in BENIGN]
        assert damage.log_odds[s].tolist() == pytest.approx(wanted, abs=2e-3)
        wanted = [plain_kl(lm, spec, prompt(lm, text), text_ids(lm, answer)) for text, answer in BENIGN]
        assert damage.kl[s].tolist() == pytest.approx(wanted, abs=2e-3, rel=2e-3)


# --- specs ----------------------------------------------------------------------------------------

OPS: tuple[Op, ...] = ("clamp", "floor", "ceil", "add", "scale", "ablate")
latent_edits = st.builds(
    lambda sae, latents, value, op: Edit(str(AT), sae, tuple(latents), 0 if op == "ablate" else value, op),
    st.sampled_from(["s", "t"]),
    st.lists(st.integers(0, 95), min_size=1, max_size=4, unique=True),
    st.floats(0, 6),
    st.sampled_from(OPS),
)
direction_edits = st.one_of(
    st.builds(lambda v: DirectionEdit("layers.1", DIRECTION.hash, v), st.floats(-2, 2)),
    st.just(DirectionEdit("layers.1", DIRECTION.hash, op="project_out")),
)
specs = st.builds(
    SteeringSpec,
    st.lists(
        st.one_of(latent_edits, latent_edits, direction_edits),
        max_size=3,
        unique_by=lambda edit: getattr(edit, "sae", "direction"),
    ).map(tuple),
    skip_first=st.booleans(),
)
FEW = [
    SteeringSpec(),
    SteeringSpec((Edit(str(AT), "s", (3,), 5.0),)),
    SteeringSpec((Edit(str(AT), "s", (4, 9, 20), 2.0, "floor"), Edit("layers.1", "t", (7,), 3.0, "add"))),
    SteeringSpec((Edit(str(AT), "s", (3, 50), 0.5, "scale"),), skip_first=False),
    SteeringSpec((DirectionEdit(str(AT), DIRECTION.hash, 1.5), Edit(str(AT), "s", (11,), 4.0))),
    SteeringSpec((DirectionEdit(str(AT), DIRECTION.hash, op="project_out"),)),
    SteeringSpec((DirectionEdit(str(AT), DIRECTION.hash, -0.5, unit="sigma"),)),
]


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])  # shrinking a failure would take minutes
@given(st.lists(specs, min_size=1, max_size=3))
def test_random_specs_equal_plain_loops(mix: list[SteeringSpec]) -> None:
    check(REFEREE, mix)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_equals_plain_loops(architecture: str) -> None:
    check(made(tiny_model(architecture)), FEW if architecture == "llama" else FEW[1:5:3])


def test_openings_of_one_token_need_no_branch() -> None:
    openings = Openings(((60,), (64,)), (3, 2), 5)
    referee = made(openings=openings)
    found = referee.log_odds(FEW[1:2])[0].tolist()
    assert found == pytest.approx([plain_log_odds(LM, FEW[1], prompt(LM, t), openings) for t in HARMFUL], abs=2e-3)


# --- invariants -----------------------------------------------------------------------------------


def test_without_edits_nothing_changes() -> None:
    assert REFEREE.n_harmful == len(HARMFUL)
    assert REFEREE.n_benign == len(BENIGN)
    first = Edit(str(AT), "s", (3,), 1.0, "scale")
    odds = REFEREE.log_odds([SteeringSpec(), SteeringSpec((first,))])
    assert odds[0].tolist() == pytest.approx([plain_log_odds(LM, SteeringSpec(), prompt(LM, t)) for t in HARMFUL])
    torch.testing.assert_close(odds[1], odds[0])
    found = REFEREE.damage([SteeringSpec(), SteeringSpec((first,))])
    torch.testing.assert_close(found.kl, torch.zeros_like(found.kl), atol=1e-6, rtol=0)
    assert float(REFEREE.damage(FEW[1:]).kl.min()) > -1e-6
    for one in REFEREE.packs():
        assert torch.equal(REFEREE.edited(one, [SteeringSpec()] * 2), one.reading.residual.expand(2, -1, -1))


def test_a_batch_of_specs_is_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    odds, damage = REFEREE.log_odds(FEW), REFEREE.damage(FEW)
    for i, spec in enumerate(FEW):
        torch.testing.assert_close(REFEREE.log_odds([spec])[0], odds[i], atol=1e-4, rtol=1e-4)
        alone = REFEREE.damage([spec])
        torch.testing.assert_close(alone.kl[0], damage.kl[i], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(alone.log_odds[0], damage.log_odds[i], atol=1e-4, rtol=1e-4)
    for tokens in (1, 100_000):
        monkeypatch.setattr(module, "_TOGETHER", tokens)
        torch.testing.assert_close(REFEREE.log_odds(FEW), odds, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(REFEREE.damage(FEW).kl, damage.kl, atol=1e-4, rtol=1e-4)


def test_some_prompts_are_those_of_all() -> None:
    odds, damage = REFEREE.log_odds(FEW), REFEREE.damage(FEW)
    assert PACK < len(HARMFUL) < 2 * PACK
    assert torch.equal(REFEREE.log_odds(FEW, last=PACK), odds[:, :PACK])
    assert torch.equal(REFEREE.log_odds(FEW, PACK, len(HARMFUL)), odds[:, PACK:])
    assert torch.equal(REFEREE.log_odds(FEW, PACK), odds[:, PACK:])
    assert torch.equal(REFEREE.log_odds(FEW, 0, 2 * PACK), odds)
    assert torch.equal(REFEREE.damage(FEW, PACK).kl, damage.kl[:, PACK:])
    assert torch.equal(REFEREE.damage(FEW, last=PACK).log_odds, damage.log_odds[:, :PACK])
    assert torch.equal(made().damage(FEW, PACK).kl, damage.kl[:, PACK:])  # asked for first


def test_prompts_need_nothing_in_common() -> None:
    rows = [prompt(LM, "Hi", "Be kind."), prompt(LM, "What?", "No.")[2:], text_ids(LM, "blue")]
    found = Referee(LM, AT, OPENINGS, rows, saes=SAES).log_odds(FEW[1:3])
    for s, spec in enumerate(FEW[1:3]):
        assert found[s].tolist() == pytest.approx([plain_log_odds(LM, spec, row) for row in rows], abs=2e-3)


def test_the_output_score_looks_at_the_first_prompt() -> None:
    found = REFEREE.output_scores(FEW)
    row = prompt(LM, HARMFUL[0])
    for s, spec in enumerate(FEW):
        best = 0.0
        for opening in OPENINGS.tokens:
            said = plain(LM, spec, [*row, *opening], len(row))[len(row) - 1 :].exp()
            p = torch.stack([said[i, token] for i, token in enumerate(opening)]).prod()
            last = said[len(opening) - 1]
            rank = int((last > last[opening[-1]]).sum())
            best = max(best, float((1 - rank / len(last)) * p))
        assert float(found[s]) == pytest.approx(best, rel=5e-3)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        replace(FEW[1], gate=NamedGate("layers.0", "odd")),
        replace(FEW[1], gate=LatentGate("layers.0", "s", 3, 0.1)),
        replace(FEW[1], gate=ProbeGate("layers.0", PROBES[0].hash, 0.5, monitor=0.9)),
        replace(FEW[1], positions=Positions("user")),
        replace(FEW[1], mode="reconstruct"),
    ],
)
def test_what_does_not_follow_from_the_prompt_is_an_error(spec: SteeringSpec) -> None:
    for measure in (REFEREE.log_odds, REFEREE.damage, REFEREE.output_scores):
        with pytest.raises(InputError, match=r"last token of the prompt|lie side by side|is not there yet|reconstruct"):
            measure([FEW[1], spec])


LAST = Positions("last_prompt_token")
REACHING = [
    replace(FEW[1], positions=Positions("prompt")),
    replace(FEW[1], positions=Positions(every=2)),
    replace(FEW[1], positions=Positions("generation", first=2)),
    replace(FEW[2], positions=Positions("generation", half_life=1.5)),
    replace(FEW[1], positions=LAST),
    replace(FEW[1], gate=LatentGate("layers.1", "t", 93, 0.41, positions=LAST)),
    replace(FEW[2], gate=LatentGate("layers.0", "s", 85, 0.1, positions=LAST), skip_first=False),
    replace(FEW[1], gate=ProbeGate("layers.0", PROBES[0].hash, 0.4)),
    replace(FEW[1], gate=ProbeGate("layers.0", PROBES[1].hash, 0.5, strength="probability")),
    replace(
        FEW[1],
        positions=Positions("generation", half_life=2),
        gate=ProbeGate("layers.0", PROBES[1].hash, 0.5, strength="probability"),
    ),
]


def test_positions_and_gates_are_those_of_an_ordinary_pass() -> None:
    check(REFEREE, REACHING)
    gates = Gates(LM, Artefacts(LM.model, SAES, PROBES, {}))
    opened = [gates.opened(spec, [prompt(LM, text) for text in HARMFUL]) for spec in REACHING if spec.gate]
    # else a gate that never opens, or that nothing ever shuts, would pass
    assert all(0 < float((one > 0).float().mean()) < 1 for one in opened)


def test_what_cannot_be_measured_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"reads layers\.1\.resid_post, but an edit is at layers\.2"):
        REFEREE.log_odds([SteeringSpec((Edit("layers.2", "s", (3,), 5.0),))])
    with pytest.raises(MismatchError, match="wants the SAE nobody"):
        REFEREE.log_odds([SteeringSpec((Edit(str(AT), "nobody", (3,), 5.0),))])
    with pytest.raises(InputError, match="no prompt was given"):
        Referee(LM, AT, OPENINGS, [prompt(LM, "Hi")], saes=SAES).damage(FEW)
    with pytest.raises(InputError, match="no prompt was given"):
        REFEREE.log_odds(FEW, first=2 * PACK)
    with pytest.raises(InputError, match="no spec was given"):
        REFEREE.log_odds([])
    with pytest.raises(InputError, match="no spec was given"):
        REFEREE.damage([])
