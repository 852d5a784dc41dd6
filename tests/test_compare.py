"""Contrasts and their verdicts, on tables whose answer is known."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar

from demur.eval.compare import comparisons, harms, refusals, tasks
from demur.results import Comparison, Contrast, Side
from demur.types import Intent, Label, Message, Prompt, TaskSample, Verdict

BASE, STEERED = Side("unsteered", "unsteered", "a"), Side("clamp", "1", "a")
LABELS: tuple[Label, ...] = ("refused", "partial", "complied", "degenerate", "unscored")


def prompts(n: int, intent: Intent = "harmful", wrappers: Sequence[str] = ("",)) -> list[Prompt]:
    return [
        Prompt(f"s/{i}@{w}" if w else f"s/{i}", (Message("user", str(i)),), intent, "s", wrapper=w.split("-")[0])
        for i in range(n)
        for w in wrappers
    ]


def samples(values: Sequence[float], metric: str = "acc", spec: str = "1", task: str = "piqa") -> list[TaskSample]:
    return [TaskSample(task, i, metric, value, spec, str(i), str(i)) for i, value in enumerate(values)]


def judged(contrasts: Sequence[Contrast], margin: float = 0.02) -> Comparison:
    return comparisons(BASE, [(STEERED, contrasts)], margin, "rules/2")[0]


def said(labels: dict[str, Label]) -> dict[str, Verdict]:
    return {prompt: Verdict(prompt, "1", label, "rules/2") for prompt, label in labels.items()}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=40), st.booleans())
def test_refusals_are_the_mcnemar_table(pairs: list[tuple[Label, Label]], harmful: bool) -> None:
    some = prompts(len(pairs), "harmful" if harmful else "benign")
    base, steered = ({p.id: pair[side] for p, pair in zip(some, pairs, strict=True)} for side in (0, 1))
    first = judged(refusals(some, said(base), said(steered))).contrasts[0]
    counts = {"refused"} if harmful else {"refused", "partial"}
    scored = [(a in counts, b in counts) for a, b in pairs if "unscored" not in (a, b)]
    only_first = sum(a and not b for a, b in scored)
    only_second = sum(b and not a for a, b in scored)
    assert first.base.n == first.steered.n == len(scored)
    assert first.left_out == len(pairs) - len(scored)
    flips = (len(first.won), len(first.lost))
    assert flips == ((only_second, only_first) if harmful else (only_first, only_second))
    theirs = mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue
    assert first.p == pytest.approx(min(1.0, theirs), abs=1e-12)


def test_no_refusal_is_counted_for_broken_text() -> None:
    some = prompts(30)
    broken: dict[str, Label] = {p.id: "degenerate" for p in some}
    refusing: dict[str, Label] = {p.id: "refused" for p in some}
    first, degenerate = judged(refusals(some, said(refusing), said(broken))).contrasts
    assert (first.verdict, degenerate.verdict) == ("worse", "worse")
    assert (first.steered.value, degenerate.steered.value) == (0, 1)


def test_no_p_above_a_level_ever_shows_that_capability_was_kept() -> None:
    few = [1.0, 0.0] * 25
    many = [1.0, 0.0] * 1000
    assert judged(tasks(samples(few), samples(few), 0.02)[0]).contrasts[0].verdict == "open"
    assert judged(tasks(samples(many), samples(many), 0.02)[0]).contrasts[0].verdict == "kept"


def test_a_loss_beyond_the_margin_is_worse_and_a_gain_better() -> None:
    right, half = [1.0] * 200, [1.0] * 150 + [0.0] * 50
    down = judged(tasks(samples(right), samples(half), 0.02)[0]).contrasts[0]
    up = judged(tasks(samples(half), samples(right), 0.02)[0]).contrasts[0]
    assert (down.verdict, up.verdict) == ("worse", "better")
    assert len(down.lost) == len(up.won) == 50
    assert down.difference.value == -up.difference.value == -0.25


def test_less_is_better_for_nats() -> None:
    before, after = [3.0 + 0.01 * i for i in range(60)], [3.5 + 0.011 * i for i in range(60)]
    one = judged(tasks(samples(before, "nats_per_word"), samples(after, "nats_per_word"), 0.02)[0]).contrasts[0]
    assert (one.verdict, one.kept, len(one.lost)) == ("worse", None, 60)
    assert "%" not in one.line.split("p <")[0]


def test_documents_pair_only_under_the_same_prompt() -> None:
    one, other = samples([1.0, 1.0, 0.0]), samples([1.0, 1.0, 0.0])
    other[1] = TaskSample("piqa", 1, "acc", 1.0, "1", "1", "another prompt")
    found, notes = tasks(one, other, 0.02)
    assert found[0].base.n == 2
    assert "1 documents are not on both sides" in notes[0]


def test_subjects_of_mmlu_are_one_task() -> None:
    both = samples([1.0] * 5, task="mmlu_a") + samples([0.0] * 5, task="mmlu_b")
    both = [replace(one, group="mmlu") for one in both]
    (one,), _ = tasks(both, both, 0.02)
    assert (one.what, one.base.n, one.base.value) == ("mmlu acc", 10, 0.5)


def test_templates_around_one_prompt_count_as_one_draw() -> None:
    alone = prompts(12, wrappers=("inthewild-0",))
    eight = prompts(12, wrappers=tuple(f"inthewild-{i}" for i in range(8)))
    found = []
    for some in (alone, eight):
        before: dict[str, Label] = {p.id: "complied" for p in some}
        after: dict[str, Label] = {p.id: "refused" if int(p.text) % 2 else "complied" for p in some}
        found.append(refusals(some, said(before), said(after))[0])
    one, many = found
    assert many.base.n == 8 * one.base.n
    assert many.p > 1e-3  # McNemar on 48 flips would say 1e-14
    width = [two.difference.high - two.difference.low for two in found]
    assert width[1] > 0.5 * width[0]


def test_holm_is_over_all_lines_of_a_comparison() -> None:
    some = prompts(40)
    before: dict[str, Label] = {p.id: "complied" for p in some}
    after: dict[str, Label] = {p.id: "refused" if i < 7 else "complied" for i, p in enumerate(some)}
    alone = judged(refusals(some, said(before), said(after))[:1]).contrasts[0]
    among = judged(
        refusals(some, said(before), said(after)) + tasks(samples([1.0] * 9), samples([1.0] * 9), 0.02)[0]
    ).contrasts[0]
    assert alone.p == alone.p_holm == among.p
    assert among.p_holm == pytest.approx(3 * among.p)
    assert not math.isnan(alone.detectable)


def test_templates_that_move_every_prompt_alike_are_seen() -> None:
    some = prompts(12, wrappers=("inthewild-0", "inthewild-1"))
    before: dict[str, Label] = {p.id: "complied" for p in some}
    after: dict[str, Label] = {p.id: "refused" for p in some}
    one = judged(refusals(some, said(before), said(after))).contrasts[0]
    assert (one.clusters, one.verdict) == (12, "better")
    assert one.p == pytest.approx(2 * 0.5**12)


def test_ids_with_an_at_sign_are_prompts_of_their_own() -> None:
    some = [replace(p, id=f"12@{p.text}") for p in prompts(20)]
    labels: dict[str, Label] = {p.id: "complied" for p in some}
    assert refusals(some, said(labels), said(labels))[0].clusters == 0


def test_fewer_refusals_of_benign_prompts_are_not_better_if_they_became_broken_text() -> None:
    some = prompts(40, "benign")
    before: dict[str, Label] = {p.id: "refused" if i < 20 else "complied" for i, p in enumerate(some)}
    for label, verdict in (("degenerate", "open"), ("complied", "better")):
        after: dict[str, Label] = {p.id: label if i < 20 else "complied" for i, p in enumerate(some)}  # type: ignore[misc]
        assert judged(refusals(some, said(before), said(after))).contrasts[0].verdict == verdict


@pytest.mark.parametrize("values", [[0.3, 0.4, 0.5], [0.3] * 3])
def test_a_few_unchanged_scores_show_no_capability_kept(values: list[float]) -> None:
    one = judged(tasks(samples(values, "acc"), samples(values, "acc"), 0.02)[0]).contrasts[0]
    assert (one.verdict, one.p) == ("open", 1)


def test_one_document_shows_nothing() -> None:
    (one,), _ = tasks(samples([0.7], "nats_per_byte"), samples([0.9], "nats_per_byte"), 0.02)
    assert one.p == 1
    assert "%" not in judged([one]).contrasts[0].line


def test_a_system_prompt_does_not_keep_documents_from_pairing() -> None:
    other = [replace(one, prompt_hash="") for one in samples([0.0] * 30)]
    found, notes = tasks(samples([1.0] * 30), other, 0.02)
    assert (found[0].base.n, notes) == (30, [])


def test_harm_is_counted_from_what_a_judge_of_harm_says() -> None:
    some = prompts(10)
    labels: tuple[Label, ...] = ("complied", "unscored")
    sides = [
        {p.id: Verdict(p.id, "1", labels[not harmful], "harmbench", harmful="yes" if harmful else "no") for p in some}
        for harmful in (True, False)
    ]
    sides[1][some[0].id] = Verdict(some[0].id, "1", "unscored", "harmbench")
    one = judged(harms(some, *sides)).contrasts[0]
    assert (one.base.value, one.steered.value, one.left_out, one.verdict) == (1, 0, 1, "better")
