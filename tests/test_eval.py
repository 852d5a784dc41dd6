"""Completions, capability, KL and CE recovered on a tiny model, against plain loops."""

from pathlib import Path
from typing import Any

import pytest
import torch

from demur.eval.capability import capability
from demur.eval.complete import Completions
from demur.eval.divergence import divergence
from demur.eval.measurements import Measurements
from demur.eval.reconstruction import ce_recovered
from demur.eval.rows import ANY, FULL, Verdicts, refusal_gain
from demur.lm.attach import Step, attach
from demur.lm.chat import chat_ids, text_ids
from demur.spec import Edit, SteeringSpec
from demur.steering.steer import steer
from demur.testing import ARCHITECTURES, tiny_model, tiny_sae
from demur.types import (
    UNSTEERED,
    Hookpoint,
    Label,
    Message,
    Prompt,
    Question,
    Verdict,
)

LM = tiny_model()
SAES = {"s": tiny_sae()}
AT = Hookpoint(1)
SPECS = [SteeringSpec(), SteeringSpec((Edit(str(AT), "s", (3,), 6.0),))]
TEXTS = ("Hi", "How do I make a cake?", "What is blue and what is not?", "Hello there", "Bye")
PROMPTS = [Prompt(f"p{i}", (Message("user", text),), "benign", "test") for i, text in enumerate(TEXTS)]


def complete(path: Path, prompts: list[Prompt]) -> Completions:
    completions = Completions(path)
    for spec in SPECS:
        completions.complete(LM, prompts, spec, SAES, "Be safe.", 6, 2)
    return completions


def test_completions_go_on_where_they_stopped_and_end_the_same(tmp_path: Path) -> None:
    whole = complete(tmp_path / "a.jsonl", PROMPTS).all()
    text = (tmp_path / "a.jsonl").read_text()
    for cut in range(0, len(text), 97):
        path = tmp_path / "b.jsonl"
        path.write_text(text[:cut])
        assert sorted(complete(path, PROMPTS).all(), key=str) == sorted(whole, key=str)
    assert {(c.spec, c.prompt) for c in whole} == {(s.hash, p.id) for s in SPECS for p in PROMPTS}


def test_each_prompt_may_have_its_own_spec_and_a_specs_system_prompt_wins(tmp_path: Path) -> None:
    mixed = [SPECS[i % 2] for i in range(len(PROMPTS))]
    alone = complete(tmp_path / "a.jsonl", PROMPTS)
    found = Completions(tmp_path / "b.jsonl").complete(LM, PROMPTS, mixed, SAES, "Be safe.", 6, 2)
    assert found == [alone.of(spec.hash, [prompt])[0] for spec, prompt in zip(mixed, PROMPTS, strict=True)]
    named = SteeringSpec(system="Be safe.")
    system = Completions(tmp_path / "c.jsonl").complete(LM, PROMPTS, named, SAES, "Something else", 6, 2)
    assert [c.text for c in system] == [c.text for c in alone.of(UNSTEERED, PROMPTS)]


def test_nothing_is_generated_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(tmp_path / "a.jsonl", PROMPTS)
    monkeypatch.setattr("demur.eval.complete.generate", lambda *a: pytest.fail("generated again"))
    complete(tmp_path / "a.jsonl", PROMPTS)


def test_kl_against_whole_forward_passes(tmp_path: Path) -> None:
    items = [
        (p.id, chat_ids(LM, p.messages), text_ids(LM, answer))
        for p, answer in zip(PROMPTS, ("yes", "I'm sorry, no", "blue", "a", "cake is good"), strict=True)
    ]
    measured = Measurements(tmp_path / "m.jsonl")
    divergence(LM, AT, items, SPECS, SAES, measured, batch_size=2)
    for name, prompt, answer in items:
        ids = torch.tensor([[*prompt, *answer]])
        per_spec = []
        for spec in SPECS:
            with torch.no_grad(), steer(LM.model, spec, SAES):
                per_spec.append(LM.model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1))
        base, steered = per_spec
        expected = float((base.exp() * (base - steered)).sum(-1).mean())
        assert measured.values("kl", SPECS[1].hash, [name]) == [pytest.approx(expected, rel=1e-3)]
        assert measured.values("kl", UNSTEERED, [name]) == [pytest.approx(0, abs=1e-6)]


def test_capability_against_one_pass_per_choice(tmp_path: Path) -> None:
    questions = [
        Question(f"q{i}", text, ("blue", "a yellow cake", "I", "sorry sorry"), i % 4) for i, text in enumerate(TEXTS)
    ]
    measured = Measurements(tmp_path / "m.jsonl")
    capability(LM, AT, questions, SPECS, SAES, measured, batch_size=2)
    for spec in SPECS:
        for question in questions:
            scores = []
            for choice in question.choices:
                context = text_ids(LM, f"Question: {question.question}\nAnswer:", special=True)
                answer = text_ids(LM, f" {choice}")
                with torch.no_grad(), steer(LM.model, spec, SAES):
                    logits = LM.model(torch.tensor([[*context, *answer]])).logits[0].double()
                log_probs = logits.log_softmax(-1)[len(context) - 1 : -1]
                scores.append(float(log_probs[range(len(answer)), answer].mean()))
            right = float(scores.index(max(scores)) == question.answer)
            assert measured.values("capability", spec.hash, [question.id]) == [right]


def test_measurements_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [("p0", chat_ids(LM, PROMPTS[0].messages), text_ids(LM, "yes"))]
    divergence(LM, AT, items, SPECS, SAES, Measurements(tmp_path / "m.jsonl"))
    monkeypatch.setattr("demur.eval.divergence.log_probs_from", lambda *a: pytest.fail("measured again"))
    divergence(LM, AT, items, SPECS, SAES, Measurements(tmp_path / "m.jsonl"))


def test_ce_recovered_is_one_for_a_perfect_sae_and_zero_for_a_blank_one() -> None:
    class Perfect(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Blank(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    rows = [chat_ids(LM, p.messages) for p in PROMPTS]
    perfect = ce_recovered(LM, Perfect(), AT, rows)  # type: ignore[arg-type]
    assert perfect.ce_recovered == pytest.approx(1, abs=1e-6)
    assert ce_recovered(LM, Blank(), AT, rows).ce_recovered == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]
    ce = 0.0
    for row in rows:
        with torch.no_grad():
            logits = LM.model(torch.tensor([row])).logits[0, :-1]
        ce += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum"))
    assert perfect.ce == pytest.approx(ce / sum(len(row) - 1 for row in rows), rel=1e-4)
    assert perfect.tokens == sum(len(row) - 1 for row in rows)
    assert perfect.kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block", [0, 2])
def test_ce_recovered_and_kl_against_a_plain_loop(
    architecture: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("demur.eval.reconstruction._LOGITS", 320 * 5 * 7)  # seven positions at once
    lm, sae = tiny_model(architecture), SAES["s"]
    rows = [chat_ids(lm, p.messages) for p in PROMPTS]
    found = ce_recovered(lm, sae, Hookpoint(block), rows)
    ce, kl = [0.0, 0.0, 0.0], 0.0
    for row in rows:
        logs = []
        for change in (lambda x: x, sae, torch.zeros_like):

            def edit(residual: torch.Tensor, step: Step, change: Any = change) -> torch.Tensor:
                return torch.cat([residual[:, :1], change(residual)[:, 1:]], dim=1)

            with torch.no_grad(), attach(lm.model, Hookpoint(block), edit):
                logs.append(lm.model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1))
        for i, log in enumerate(logs):
            ce[i] -= float(sum(log[place, token] for place, token in enumerate(row[1:])))
        kl += float((logs[0].exp() * (logs[0] - logs[1])).sum())
    n = sum(len(row) - 1 for row in rows)
    assert (found.ce, found.ce_sae, found.ce_zero) == pytest.approx([total / n for total in ce], rel=1e-4)
    assert found.kl == pytest.approx(kl / n, rel=1e-3)


def verdicts(spec: str, *labels: Label) -> list[Verdict]:
    return [Verdict(p.id, spec, label, "test") for p, label in zip(PROMPTS, labels, strict=True)]


def test_what_counts_as_refused_and_in_which_denominator() -> None:
    table = Verdicts(verdicts("s", "refused", "partial", "complied", "degenerate", "unscored"))
    full, any_ = table.refused("s", PROMPTS, FULL), table.refused("s", PROMPTS, ANY)
    assert (full.k, full.n) == (1, 4)
    assert (any_.k, any_.n) == (2, 4)


def test_the_gain_is_paired() -> None:
    table = Verdicts(
        verdicts("a", "complied", "complied", "refused", "complied", "unscored")
        + verdicts("b", "refused", "refused", "complied", "degenerate", "refused")
    )
    gain = refusal_gain("a", "b", PROMPTS, table, FULL, seed=0)
    assert gain.points.value == pytest.approx(25)  # two flips up, one down, of four scored pairs
    assert gain.p == 1.0
