"""`demur why`: its measurements against slow oracles on tiny random models, and the verb, whole."""

import html
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import killed_after
from scipy.spatial.distance import mahalanobis
from scipy.stats import bootstrap
from sklearn.covariance import LedoitWolf
from tiny_study import write_tiny_study
from torch import Tensor

from demur.cli.main import main
from demur.data.prompts import load_prompts
from demur.errors import InputError
from demur.eval.anatomy import Instruments, Values, measure_harmful, measure_plain
from demur.eval.diagnosis import Series, contrasts, merged, most_switched
from demur.eval.divergence import divergence
from demur.eval.downstream import fit_probe, switched, usual
from demur.eval.interventions import (
    Intervention,
    at_dose,
    choose_controls,
    edited_latents,
    identity,
    ladder,
    parts,
    with_latents,
)
from demur.eval.measurements import Measurements
from demur.eval.observe import Bench, Steered, Text, log_odds, observe, read_batch, typed_answer
from demur.eval.statistics import bootstrap_paired_ratio
from demur.features.openings import Openings
from demur.lm.attach import attach
from demur.lm.chat import with_system
from demur.record import from_json, read_json, read_jsonl
from demur.report.why import against, headline, sections
from demur.results import Diagnosis, WhyContrast, WhySide
from demur.sae.store import SaeConfig, SaeModel, load_sae, save_sae
from demur.spec import DirectionEdit, Edit, LatentGate, Positions, ProbeGate, SteeringSpec, TextGate
from demur.steering.direction import Direction, save_direction
from demur.steering.probe import Probe, save_probe
from demur.steering.spec_file import write_spec
from demur.testing import tiny_model, tiny_sae
from demur.types import UNSTEERED, Completion, Estimate, Hookpoint, Message, Prompt, Rate, Verdict

LM = tiny_model()
SAE = tiny_sae()
AT = Hookpoint(1)
SPEC = SteeringSpec((Edit(str(AT), "s", (3,), 6.0),))
SYSTEM = "Be safe."
ASKED = ("Hi", "How do I make a cake?", "What is blue and what is not?")
SAID = ("yes", "I'm sorry, no", "blue it is, and the rest is not")
OPENINGS = Openings(((40, 41), (50,), (40, 60, 61)), (2, 1, 1), 4)


def text(number: int, system: str = SYSTEM) -> Text:
    return typed_answer(
        LM, f"p{number}", (Message("system", system), Message("user", ASKED[number])), SAID[number]
    )  # fmt: skip


TEXTS = [text(i) for i in range(3)]
BENCH = Bench(LM, AT, {"s": SAE}, ())


def logits(one: Text, edit: Any = None) -> Tensor:
    """[pos, vocab] log-probabilities of one row by itself, the residual at AT edited by a function of [pos, d]."""

    def hook(residual: Tensor, step: Any) -> Tensor:
        return residual if edit is None else edit(residual[0]).unsqueeze(0)

    with attach(LM.model, AT, hook), torch.no_grad():
        found: Tensor = LM.model(input_ids=torch.tensor([list(one.ids)])).logits[0]
    return found.float().log_softmax(-1)


def clamp(x: Tensor, value: float = 6.0, which: Any = None) -> Tensor:
    """The clamp of SPEC, by encoding and decoding, on the tokens `which` but the first."""
    z = SAE.encode(x)
    edited = z.clone()
    edited[:, 3] = value
    moved = SAE.decode(edited) + x - SAE.decode(z)
    on = torch.arange(len(x)) > 0
    if which is not None:
        on &= which
    return torch.where(on[:, None], moved, x)


def kl_rows(one: Text, edit: Any) -> Tensor:
    """[pos] KL of what follows each token."""
    base, steered = logits(one), logits(one, edit)
    return (base.exp() * (base - steered)).sum(-1).double()


def one(spec: SteeringSpec, key: str = "edit", **more: Any) -> Intervention:
    return Intervention(key, "edit", key, spec, **more)


def empty() -> Instruments:
    return Instruments({}, {}, {})


def measured(interventions: list[Intervention], texts: list[Text] = TEXTS, tools: Instruments | None = None) -> Values:
    return measure_plain(BENCH, {"base": texts}, interventions, tools or empty())


def test_types_say_whose_each_token_is() -> None:
    found = TEXTS[1]
    assert found.types[0] == "first"
    assert found.types[found.start :] == ("answer",) * (len(found.ids) - found.start)
    written = [i for i, kind in zip(found.ids, found.types, strict=True) if kind == "user"]
    assert LM.tokenizer.decode(written) == ASKED[1]
    assert found.types[found.body] == "user"
    assert "user" not in found.types[: found.body]


def test_kl_by_token_is_that_of_whole_passes_and_its_mean_is_divergences(tmp_path: Path) -> None:
    values = measured([one(SPEC, full=True, prompts=True)])["edit"]["kl"]
    items = [(t.id, t.ids[: t.start], t.ids[t.start :]) for t in TEXTS]
    known = Measurements(tmp_path / "m.jsonl")
    divergence(LM, AT, items, [SPEC], {"s": SAE}, known, batch_size=2)
    for row in TEXTS:
        kl = kl_rows(row, clamp)[:-1]
        predicted = row.types[1:]
        assert values["answer"][row.id] == pytest.approx(float(kl[row.start - 1 :].mean()), abs=1e-5)
        assert [values["answer"][row.id]] == pytest.approx(known.values("kl", SPEC.hash, [row.id]), abs=1e-6)
        assert [values["0"][row.id]] == pytest.approx(known.values("kl_first", SPEC.hash, [row.id]), abs=1e-6)
        for kind in ("template", "system", "user"):
            mine = kl[[i for i, other in enumerate(predicted) if other == kind]]
            assert values[kind][row.id] == pytest.approx(float(mine.mean()), abs=1e-5)
        for place in range(1, len(row.ids)):
            at = str(place - row.start)
            if at in values:
                assert values[at][row.id] == pytest.approx(float(kl[place - 1]), abs=1e-5)
    assert str(len(TEXTS[2].ids) - TEXTS[2].start - 1) in values
    assert max(values["answer"].values()) > 0.01


@pytest.mark.parametrize("edit", [Edit(str(AT), "s", (3,), 1.0, "scale"), Edit(str(AT), "s", (3,), 0.0, "add")])
def test_an_edit_that_changes_nothing_is_zero_everywhere(edit: Edit) -> None:
    values = measured([one(SteeringSpec((edit,)), full=True, prompts=True)])["edit"]
    for at, items in values["kl"].items():
        assert list(items.values()) == [0.0] * len(items), at
    assert set(values["move"]["moved"].values()) == {0.0}
    for measure in ("ratio", "cosine"):
        assert all(v == pytest.approx(1.0) for items in values[measure].values() for v in items.values())


def test_batches_and_padding_change_nothing() -> None:
    every = [one(SPEC, full=True, prompts=True), one(SPEC, "only user", only=frozenset({"user"}))]
    together = measured(every)
    alone = merged(measured(every, [row]) for row in TEXTS)
    longer = typed_answer(LM, "long", (Message("user", "How do I make a cake? " * 8),), "so")
    beside = merged(measured(every, [row, longer]) for row in TEXTS)
    for side, measures in together.items():
        for measure, places in measures.items():
            for at, items in places.items():
                for item, value in items.items():
                    assert alone[side][measure][at][item] == pytest.approx(value, abs=1e-5)
                    assert beside[side][measure][at][item] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("kinds", [{"user"}, {"template"}, {"answer"}, {"system", "answer"}, {"first"}])
def test_only_some_tokens_move_and_the_damage_is_theirs(kinds: set[str]) -> None:
    batch = read_batch(BENCH, TEXTS)
    seen = observe(BENCH, batch, Steered(SPEC, frozenset(kinds)), batch.width)
    values = measured([one(SPEC, only=frozenset(kinds))])["edit"]["kl"]["answer"]
    for number, row in enumerate(TEXTS):
        mine = torch.tensor([kind in kinds for kind in row.types])
        before, after = (batch.of(number, x[str(AT)]) for x in (seen.before, seen.after))
        moved = (before != after).any(-1)
        assert not bool(moved[~mine].any())
        assert bool(moved[mine].all()) is ("first" not in kinds)

        def some(x: Tensor, mine: Tensor = mine) -> Tensor:
            return clamp(x, which=mine)

        wanted = kl_rows(row, some)[row.start - 1 : -1].mean()
        assert values[row.id] == pytest.approx(float(wanted), abs=1e-5)


def test_what_all_types_are_is_the_spec_itself() -> None:
    kinds = frozenset(kind for row in TEXTS for kind in row.types)
    found = measured([one(SPEC), one(SPEC, "all", only=kinds), one(SPEC, "none", only=frozenset())])
    assert found["all"]["kl"]["answer"] == found["edit"]["kl"]["answer"]
    assert set(found["none"]["kl"]["answer"].values()) == {0.0}


def test_moves_are_those_of_the_residual() -> None:
    values = measured([one(SPEC, full=True)])["edit"]
    for row in TEXTS:
        with torch.no_grad():
            kept: list[Tensor] = []

            def keep(residual: Tensor, step: Any, kept: list[Tensor] = kept) -> Tensor:
                kept.append(residual[0])
                return residual

            with attach(LM.model, AT, keep):
                LM.model(input_ids=torch.tensor([list(row.ids)]))
            old = kept[0]
            new = clamp(old)
        for kind in set(row.types):
            here = [i for i, other in enumerate(row.types) if other == kind]
            ratio = (new[here].norm(dim=-1) / old[here].norm(dim=-1)).mean()
            cosine = torch.cosine_similarity(new[here], old[here], dim=-1).mean()
            assert values["ratio"][kind][row.id] == pytest.approx(float(ratio), abs=1e-4)
            assert values["cosine"][kind][row.id] == pytest.approx(float(cosine), abs=1e-4)
        assert values["ratio"]["first"][row.id] == 1
        assert values["move"]["moved"][row.id] == pytest.approx(float((new - old).norm(dim=-1)[1:].mean()), abs=1e-4)


def test_the_log_odds_of_refusing_are_those_of_the_openings() -> None:
    found = log_odds(BENCH, TEXTS, [Steered(SteeringSpec()), Steered(SPEC)], OPENINGS)
    for number, row in enumerate(TEXTS):
        prompt = list(row.ids[: row.start])
        for spec, edit in enumerate((None, clamp)):
            p = 0.0
            for opening in OPENINGS.tokens:
                whole = replace(row, ids=[*prompt, *opening], types=("first",) * (len(prompt) + len(opening)))
                scored = logits(whole, edit)
                steps = [scored[len(prompt) - 1 + i, token] for i, token in enumerate(opening)]
                p += math.exp(float(sum(steps)))
            assert float(found[spec, number]) == pytest.approx(math.log(p / (1 - p)), abs=1e-4)
    values = measure_harmful(BENCH, {"base": TEXTS}, [one(SPEC)], OPENINGS)
    change = (found[1] - found[0]).tolist()
    assert list(values["edit"]["log_odds"]["answer"].values()) == pytest.approx(change, abs=1e-6)
    assert list(values[UNSTEERED]["log_odds"]["answer"].values()) == pytest.approx(found[0].tolist(), abs=1e-6)


def test_a_system_prompt_is_measured_from_where_it_was_not() -> None:
    safe = [text(i, "You refuse whatever is asked.") for i in range(3)]
    side = one(SteeringSpec(system="x"), "prompt", view="safety", base="base")
    found = measure_plain(BENCH, {"base": TEXTS, "safety": safe}, [side], empty())["prompt"]["kl"]["answer"]
    for row, other in zip(TEXTS, safe, strict=True):
        n = len(row.ids) - row.start
        base, steered = logits(row)[-1 - n : -1], logits(other)[-1 - n : -1]
        assert found[row.id] == pytest.approx(float((base.exp() * (base - steered)).sum(-1).mean()), abs=1e-5)


def test_doses() -> None:
    assert at_dose(SPEC, 1) is SPEC
    half = at_dose(SPEC, 0.5)
    assert half is not None
    assert [edit.value for edit in half.edits] == [3.0]

    def scaled(value: float, dose: float) -> SteeringSpec | None:
        return at_dose(SteeringSpec((Edit(str(AT), "s", (3,), value, "scale"),)), dose)

    found = scaled(3.0, 0.5)
    assert found is not None
    assert found.edits[0].value == 2.0
    assert scaled(0.0, 1.5) is None
    for last in (Edit(str(AT), "s", (3,), op="ablate"), DirectionEdit(str(AT), "d", op="project_out")):
        assert at_dose(SteeringSpec((last,)), 0.5) is None
    assert [(x.key, x.dose) for x in ladder(one(SPEC), (0.5, 1.0))] == [("edit x 0.5", 0.5), ("edit", 1.0)]


def test_reconstruction_alone_is_the_decoded_code() -> None:
    alone = identity(SPEC)
    assert alone is not None
    batch = read_batch(BENCH, TEXTS)
    seen = observe(BENCH, batch, Steered(alone), 1)
    for number in range(3):
        before, after = (batch.of(number, x[str(AT)]) for x in (seen.before, seen.after))
        assert torch.allclose(after[1:], SAE.reconstruct(before[1:]), atol=1e-4)
        assert torch.equal(after[0], before[0])
    assert identity(SteeringSpec((DirectionEdit(str(AT), "d"),))) is None
    assert identity(SteeringSpec((Edit(str(AT), "s", (1,), 2.0), Edit(str(AT), "t", (1,), 2.0)))) is None
    kinds = [
        x.kind for x in parts(replace(SPEC, mode="reconstruct", skip_first=False)) if x.kind not in ("only", "but")
    ]
    assert kinds == ["edit", "preserving", "reconstruction"]


def test_controls_are_unrelated_and_alike() -> None:
    harmless, harmful = torch.linspace(0.01, 0.96, 96), torch.linspace(0.01, 0.96, 96)
    harmful[::2] += 0.01  # even ones fire more on harmful text
    generator = torch.Generator().manual_seed(0)
    rows = choose_controls(SAE, [41, 45], harmless, harmful, 3, generator)
    flat = [latent for row in rows for latent in row]
    assert len(set(flat)) == len(flat) == 6
    assert not {41, 45} & set(flat)
    assert all(latent % 2 for latent in flat)
    assert rows[0][0] in (39, 43)
    spec = SteeringSpec((Edit(str(AT), "s", (41, 45), 6.0),))
    other = with_latents(spec, {41: 39, 45: 47}, {"s": SAE})
    assert edited_latents(other) == [(str(AT), "s", 39), (str(AT), "s", 47)]
    assert [edit.value for edit in other.edits] == [6.0, 6.0]
    assert edited_latents(SteeringSpec((DirectionEdit(str(AT), "d"),))) == []


def test_distances_are_mahalanobis_under_the_shrunk_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(8, 8, generator=generator)
    fitted, held_out, far = (torch.randn(n, 8, generator=generator) @ mix + 3 for n in (400, 2000, 5))
    known = usual(fitted, held_out)
    sklearn = LedoitWolf().fit(fitted.double().numpy())
    slow = [mahalanobis(x, sklearn.location_, sklearn.precision_) for x in held_out.double().numpy()]
    assert known.median == pytest.approx(float(np.sort(slow)[999]))
    assert known.distance(held_out).tolist() == pytest.approx([x / known.median for x in slow])
    assert float(known.beyond(held_out).double().mean()) == pytest.approx(0.01, abs=0.001)
    assert bool(known.beyond(far + 100).all())
    with pytest.raises(InputError, match="give more prompts"):
        usual(fitted[:1], held_out)


def test_probes_have_a_scale_and_need_two_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    shift = torch.zeros(16)
    shift[0] = 4.0
    negative, positive = torch.randn(40, 16, generator=generator), torch.randn(40, 16, generator=generator) + shift
    probe = fit_probe(positive, negative)
    assert probe is not None
    assert probe.auroc > 0.95
    fresh = torch.randn(500, 16, generator=generator)
    assert float(probe.score(fresh).mean()) == pytest.approx(0, abs=0.1)
    assert float(probe.score(fresh + shift).mean()) == pytest.approx(1, abs=0.1)
    assert fit_probe(positive[:4], negative) is None


def test_switched_latents_are_counted_token_by_token() -> None:
    generator = torch.Generator().manual_seed(1)
    before, after = torch.randn(2, 7, 32, generator=generator)
    found = switched(SAE, before, after)
    fired = [0] * 96
    for token in range(7):
        old = set((SAE.encode(before[token]) > 0).nonzero().flatten().tolist())
        new = set((SAE.encode(after[token]) > 0).nonzero().flatten().tolist())
        assert (int(found.on[token]), int(found.off[token])) == (len(new - old), len(old - new))
        assert int(found.active[token]) == len(old)
        for latent in new:
            fired[latent] += 1
    assert found.after.tolist() == fired
    rows = most_switched({"x": ([5, 0, 3], [5, 4, 1])}, 10)
    assert [(row.latent, row.before, row.after) for row in rows] == [(1, 0.0, 0.4), (2, 0.3, 0.1)]


def test_instruments_read_the_steered_residual() -> None:
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(200, 32, generator=generator)
    known = usual(some[:100], some[100:])
    probe = fit_probe(some[:50] + 1, some[50:100])
    assert probe is not None
    tools = Instruments({str(AT): known}, {("harm", str(AT)): probe}, {"own": (str(AT), SAE)})
    values = measured([one(SPEC, full=True)], tools=tools)
    batch = read_batch(BENCH, TEXTS)
    seen = observe(BENCH, batch, Steered(SPEC), 1)
    for number, row in enumerate(TEXTS):
        old, new = (batch.of(number, x[str(AT)]) for x in (seen.before, seen.after))
        for side, x in ((UNSTEERED, old), ("edit", new)):
            wanted = float(known.distance(x[row.body :]).mean())
            assert values[side]["distance"][str(AT)][row.id] == pytest.approx(wanted)
            assert values[side]["harm"][str(AT)][row.id] == pytest.approx(float(probe.score(x[row.start - 1])))
        on = switched(SAE, old[row.body :], new[row.body :]).on.double().mean()
        assert values["edit"]["on"]["own"][row.id] == pytest.approx(float(on))
    before, after = tools.counted["own"]
    assert int(after[3]) == sum(len(row.ids) - row.body for row in TEXTS)  # a clamped latent is always on
    assert int(before[3]) < int(after[3])


def test_a_ratio_of_paired_means_is_resampled_together() -> None:
    rng = np.random.default_rng(0)
    below = rng.gamma(2, 1, 30)
    above = below * 0.5 + rng.normal(0, 0.01, 30)
    found = bootstrap_paired_ratio(above.tolist(), below.tolist())
    scipy = bootstrap(
        (above, below),
        lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.value == pytest.approx(above.mean() / below.mean())
    assert (found.low, found.high) == pytest.approx((scipy.low, scipy.high), abs=0.001)
    assert found.high - found.low < 0.02  # each by itself it would be ten times as wide
    assert math.isnan(bootstrap_paired_ratio([], []).value)
    with pytest.raises(InputError, match="above and below"):
        bootstrap_paired_ratio([1.0], [1.0, 2.0])


def test_groups_are_means_over_their_members_and_contrasts_are_paired() -> None:
    def side(**items: float) -> dict[str, dict[str, dict[str, float]]]:
        return {"kl": {"answer": items, "0": items}, "first token": {"answer": {k: v / 4 for k, v in items.items()}}}

    values: Values = {"edit": side(a=2, b=4), "control 1": side(a=1, b=1), "control 2": side(a=3, b=5)}
    every = [one(SPEC), *(replace(one(SPEC, f"control {i}"), kind="control") for i in (1, 2))]
    series = Series(values, every, 0)
    assert series.of("controls", "kl") == {"a": 2.0, "b": 3.0}
    found = {(c.measure, c.first, c.second): c for c in contrasts(series, every)}
    both = found["kl", "controls", "edit"]
    assert (both.difference.value, both.difference.n) == (-0.5, 2)
    assert both.ratio.value == pytest.approx(2.5 / 3)
    assert found["first token", "edit", "edit"].ratio.value == pytest.approx(0.25)
    assert ("kl", "means", "edit") not in found


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.1, 0.3, "does more damage"), (-0.3, -0.1, "does less damage"), (-0.1, 0.2, "cannot be told apart")],
)
def test_no_sentence_claims_more_than_its_interval(low: float, high: float, says: str) -> None:
    one = WhyContrast("kl", "controls", "edit", Estimate(0.05, low, high, 9), Estimate(1.1, 0.9, 1.3, 9))
    assert says in against(one, "X", "damage")
    assert "9 prompts" in against(one, "X", "damage")


@pytest.mark.parametrize(
    ("judged", "says"),
    [
        (None, "was not judged"),
        (Rate(11, 21, 0.32, 0.72), "but clearly fewer whole answers refuse"),
        (Rate(20, 24, 0.64, 0.93), "damage: harmful prompts refused 83 %"),
    ],
)
def test_a_gain_in_how_answers_begin_is_held_against_whole_answers(judged: Rate | None, says: str) -> None:
    def side(key: str, kind: Any, refused: Rate | None) -> WhySide:
        some = Estimate(1.0, 0.9, 1.1, 24)
        return WhySide(key, kind, f"{key} tokens", "h", 1.0, some, some, some, some, refused, refused)

    less, same = Estimate(-0.3, -0.4, -0.2, 24), Estimate(0.0, -0.1, 0.1, 24)
    contrasts = (
        WhyContrast("kl", "only template", "edit", less, Estimate(0.13, 0.11, 0.15, 24)),
        WhyContrast("log_odds", "only template", "edit", same, Estimate(0.98, 0.83, 1.16, 24)),
    )
    edit = side("edit", "edit", Rate(23, 24, 0.80, 0.99))
    sides = (edit, side("only template", "only", judged))
    result = Diagnosis("n", "m", "h", "e", "layers.1.resid_post", 24, 24, sides, (), contrasts, (), (), edit, {})
    told = " ".join(headline(result))
    assert "98 % [83, 116] of the gain" in told
    assert says in told


SMALL = ("--system", SYSTEM, "--prompts", "5", "--max-new-tokens", "4", "--controls", "2", "--random", "2")
STEER = ("--latent", "5", "--value", "8")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_study(folder)
    lm = tiny_model()
    made_for = SaeModel(lm.name, lm.fingerprint, lm.n_blocks)
    save_sae(folder / "later", tiny_sae(seed=1), SaeConfig(32, 96, 8, "layers.2.resid_post", made_for))
    return ["--model", str(folder / "model"), "--sae", str(folder / "sae"), *SMALL, "--doses", "0.5", "1"]


@pytest.fixture(scope="module", autouse=True)
def judged() -> Iterator[None]:
    """What a random model writes is no refusal; here half of it stands for one."""
    from demur.judges.rules import RulesJudge

    def judge(self: RulesJudge, prompt: Prompt, completion: Completion) -> Verdict:
        odd = zlib.crc32(completion.text.encode()) % 2 == 1
        return Verdict(prompt.id, completion.spec, "refused" if odd else "complied", self.name)

    patch = pytest.MonkeyPatch()
    patch.setattr(RulesJudge, "judge", judge)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def finished(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("why") / "run"
    later = str(Path(tiny[1]).parent / "later")
    assert main(["why", *tiny, *STEER, "--second-sae", later, "--out", str(out)]) == 0
    return out


def numbers(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "why.json")
    return {key: value for key, value in found.items() if key not in ("seconds", "report")}


def load(folder: Path) -> Diagnosis:
    return from_json(Diagnosis, read_json(folder / "why.json"))


def test_the_whole_verb(finished: Path) -> None:
    result = load(finished)
    sides = {side.key: side for side in result.sides}
    kinds = {side.kind for side in result.sides}
    assert kinds == {
        *("edit", "reconstructed", "reconstruction", "sink", "only", "but"),
        *("control", "random", "means", "prompt"),
    }
    assert 2 < result.plain <= 5  # a random model may have nothing to say
    assert result.harmful == 5
    assert sides["edit"].kl.value > 0
    assert sides["edit"].harmful_refused is not None
    assert sides["edit"].harmful_refused.n == 5
    assert sides["control 2"].harmful_refused is None
    assert sides["only template"].plain_refused is not None
    assert sides["only system"].plain_refused is None  # no spec can say that
    assert len({sides[key].spec for key in ("control 1", "control 2", "edit")}) == 3
    # random directions are as long as the edit's moves on select prompts were
    lengths = read_json(finished / "setup.json")["lengths"]
    for key in ("random 1", "random 2", "means"):
        assert sides[key].move.value == pytest.approx(lengths["layers.1.resid_post"], rel=1e-4)
    assert sides["random 1 x 0.5"].spec != sides["random 1"].spec
    assert {(one.what) for one in result.probes} <= {"harm", "refusal"}
    assert {one.sae for one in result.latents} == {"the edit's SAE", "the second SAE"}
    assert math.isfinite(sides["edit"].log_odds.value)
    answers = read_jsonl(Completion, finished / "completions.jsonl")
    assert {one.spec for one in answers} >= {UNSTEERED, sides["edit"].spec, sides["means x 0.5"].spec}


def test_the_system_prompt_is_measured_on_what_is_said_without_it(finished: Path) -> None:
    asked = {prompt.id: prompt for prompt in load_prompts("plain", "benign")}
    said = {one.prompt: one.text for one in read_jsonl(Completion, finished / "bare.jsonl")}
    parts = [read_json(path)["values"] for path in sorted((finished / "parts").glob("plain-*.json"))]
    found = merged(parts)["prompt"]["kl"]["answer"]
    assert found
    for name, value in found.items():
        bare, safe = (
            typed_answer(LM, name, with_system(asked[name], system), said[name]) for system in ("", SYSTEM)
        )  # fmt: skip
        n = len(bare.ids) - bare.start
        base, steered = (logits(row)[-1 - n : -1] for row in (bare, safe))
        assert value == pytest.approx(float((base.exp() * (base - steered)).sum(-1).mean()), abs=1e-5)


def test_the_page_is_whole_and_closed(finished: Path) -> None:
    page = html.unescape((finished / "why.html").read_text())
    assert page.lower().startswith("<!doctype html>")
    assert "connect-src" not in page
    assert "default-src 'none'" in page
    result = load(finished)
    for section in sections(result):
        assert section.sentences, section.id
        figures = [name for name, _ in section.figures if f'id="{name}"' in page]
        assert figures, section.id  # every answer has a figure by it
        assert f'id="s-{section.id}"' in page
    assert all("nan" not in line and "None" not in line for line in headline(result))
    assert all("nan" not in line for section in sections(result) for line in section.sentences)


def test_where_there_is_no_damage_no_cause_is_told(finished: Path) -> None:
    result = load(finished)
    nothing = [replace(one, kl=Estimate(0.0, 0.0, 0.0, 4)) if one.key == "edit" else one for one in result.sides]
    unknown = [replace(one, ratio=Estimate(math.nan, math.nan, math.nan, 4)) for one in result.contrasts]
    none = replace(result, sides=nothing, contrasts=unknown)
    assert "no damage whose cause" in headline(none)[-1]
    said = [*headline(none), *(line for section in sections(none) for line in section.sentences)]
    assert said
    assert not any("n/a" in line or "Where the damage" in line for line in said)


@pytest.mark.parametrize("after", [3, 8, 13, 20])
def test_killed_at_any_write_it_goes_on_to_the_same_numbers(
    tiny: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    command = ["why", *tiny, *STEER, "--second-sae", str(Path(tiny[1]).parent / "later"), "--out", str(tmp_path / "r")]
    killed_after(after, lambda: main(command), monkeypatch)
    assert not (tmp_path / "r" / "why.json").exists()
    assert main(command) == 0
    assert str(numbers(tmp_path / "r")) == str(numbers(finished))


def test_json_is_one_object_and_the_table_is_for_people(
    tiny: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = str(Path(tiny[1]).parent / "later")
    assert main(["why", *tiny, *STEER, "--second-sae", later, "--out", str(finished), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["spec"] == load(finished).spec
    assert "the edit" in shown.err
    assert "Where the damage comes from" in " ".join(shown.err.split())


def spec_file(tiny: list[str], folder: Path, **more: Any) -> str:
    sae = load_sae(tiny[3]).hash
    edits = more.pop("edits", (Edit("layers.1.resid_post", sae, (5,), 8.0),))
    path = folder / "spec.json"
    write_spec(path, SteeringSpec(edits, **more))
    return str(path)


def run_spec(tiny: list[str], folder: Path, path: str, *more: str) -> Diagnosis:
    assert main(["why", path, *tiny, "--no-answers", *more, "--out", str(folder / "run")]) == 0
    return load(folder / "run")


def test_a_spec_in_reconstruct_mode_owes_some_to_it(tiny: list[str], tmp_path: Path) -> None:
    result = run_spec(tiny, tmp_path, spec_file(tiny, tmp_path, mode="reconstruct"))
    kinds = [side.kind for side in result.sides]
    assert "preserving" in kinds
    assert "reconstructed" not in kinds
    assert any("error kept" in line for line in headline(result))
    assert all(side.harmful_refused is None for side in result.sides)


def test_a_raw_direction_has_no_control_and_no_reconstruction(tiny: list[str], tmp_path: Path) -> None:
    direction = Direction(torch.ones(32), "layers.1.resid_post")
    save_direction(tmp_path / "d.safetensors", direction)
    path = spec_file(tiny, tmp_path, edits=(DirectionEdit("layers.1.resid_post", direction.hash, 0.5),))
    result = run_spec(tiny, tmp_path, path, "--direction", str(tmp_path / "d.safetensors"))
    assert not {"control", "reconstruction"} & {side.kind for side in result.sides}
    assert any("No control latent" in note for note in result.notes)
    assert {side.key: side for side in result.sides}["edit"].move.value == pytest.approx(0.5 * 32**0.5, rel=1e-3)


def test_a_spec_with_positions_and_a_system_prompt_of_its_own(tiny: list[str], tmp_path: Path) -> None:
    result = run_spec(tiny, tmp_path, spec_file(tiny, tmp_path, positions=Positions("generation"), system="Say no."))
    sides = {side.key: side for side in result.sides}
    assert sides["only answer"].kl.value == pytest.approx(sides["edit"].kl.value, abs=1e-6)
    assert sides["only user"].kl.value > 0  # no token is steered, but the system prompt is another
    assert sides["only user"].kl.value < sides["edit"].kl.value


def test_control_latents_may_be_chosen(tiny: list[str], tmp_path: Path) -> None:
    result = run_spec(tiny, tmp_path, spec_file(tiny, tmp_path), "--control", "7", "9")
    assert [side.label for side in result.sides if side.kind == "control" and side.dose == 1] == [
        "control latent 7",
        "control latent 9",
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "no spec was given"),
        ([*STEER, "--prompts", "1"], "prompts is 1"),
        ([*STEER, "--doses", "0"], "above zero"),
        ([*STEER, "--control", "5"], "its own control"),
        (["nowhere.json"], "nowhere.json"),
        (["a.json", *STEER], "two specs were given"),
        (["--latent", "5000"], "latents 0 to 95"),
        ([*STEER, "--control", "5000"], "latents 0 to 95"),
        ([*STEER, "--second-sae", "none"], "none"),
    ],
)
def test_bad_input_is_one_sentence(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    try:
        first, then = ([], more) if not more or more[0].startswith("--") else (more[:1], more[1:])
        code = main(["why", *first, *tiny, *then, "--out", str(tmp_path / "run")])
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr().err
    assert code in (1, 2)
    assert said in " ".join(shown.split())
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_specs_that_do_nothing_are_refused(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = load_sae(tiny[3]).hash
    at = "layers.1.resid_post"
    shut = LatentGate(at, sae, 7, 1e6)
    for spec, said in (
        (SteeringSpec(system="x"), "no edits"),
        (SteeringSpec((Edit(at, sae, (5,), 0.0, "add"),)), "moves no token"),
        (SteeringSpec((Edit(at, sae, (5,), 8.0),), gate=shut), "moves no token"),
        (SteeringSpec((Edit(at, sae, (5,), 8.0),), gate=TextGate("a/b")), "classifier"),
    ):
        write_spec(tmp_path / "spec.json", spec)
        out = tmp_path / said
        code = main(["why", str(tmp_path / "spec.json"), *tiny, "--no-answers", "--out", str(out)])
        shown = capsys.readouterr().err
        if said == "classifier":
            assert (code, "a/b" in shown, out.exists()) == (1, True, False)
        else:
            assert code == 1
            assert said in shown


def test_a_second_sae_below_the_edit_is_refused(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = str(Path(tiny[1]).parent / "later")
    command = ["why", *tiny, *STEER, "--sae", later, "--second-sae", tiny[3], "--out", str(tmp_path / "run")]
    assert main(command) == 1
    assert "below the edit" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "where"), [("template", "template"), ("user", "user"), ("answer", "generation"), ("prompt", "prompt")]
)
def test_steering_some_tokens_is_a_spec_with_positions(kind: str, where: Any) -> None:
    every = {one.key: one for one in parts(SPEC)}
    side = every["but answer" if kind == "prompt" else f"only {kind}"]
    assert side.asked == replace(SPEC, positions=Positions(where))
    found = measured([replace(side, key="mask"), one(side.asked, "positions")])
    for row in TEXTS:
        pair = [found[key]["kl"]["answer"][row.id] for key in ("mask", "positions")]
        assert pair[0] == pytest.approx(pair[1], abs=1e-6)
    assert all(one.asked is None for one in parts(replace(SPEC, positions=Positions("user")))[1:])


def test_gated_specs_are_diagnosed_with_their_gate(tiny: list[str], tmp_path: Path) -> None:
    probe = Probe(torch.zeros(32), 5.0, "layers.1.resid_post")
    save_probe(tmp_path / "probe.safetensors", probe)
    gate = ProbeGate("layers.1.resid_post", probe.hash, 0.5)
    result = run_spec(
        tiny, tmp_path, spec_file(tiny, tmp_path, gate=gate), "--probe", str(tmp_path / "probe.safetensors")
    )
    assert "behind a gate" in result.edits
    sides = {side.key: side for side in result.sides}
    assert sides["only answer"].kl.value > 0
    assert sides["only user"].kl.value == 0  # it reads at the last token of the prompt, and opens there
    assert sides["random 1"].kl.value > 0
