"""Benchmarks under specs, against lm-eval's own model class on the same requests and tasks."""

import importlib.util
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval
import lm_eval.api.task
from benchmark_data import write_benchmarks
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from demur.errors import InputError, MissingExtraError
from demur.eval.harness import run_tasks, steered_lm
from demur.eval.likelihood import Request, log_likelihoods
from demur.eval.tasks import load_tasks
from demur.lm.load import LanguageModel
from demur.spec import Edit, LatentGate, Positions, SteeringSpec
from demur.steering.steer import steer
from demur.testing import ARCHITECTURES, tiny_model, tiny_sae

LM = tiny_model()
SAES = {"s": tiny_sae()}
EDIT = Edit("layers.1.resid_post", "s", (3,), 6.0)
SPEC = SteeringSpec((EDIT,))
GATED = SteeringSpec((EDIT,), gate=LatentGate("layers.1.resid_post", "s", 4, 0.3))
WORDS = ("the", "answer", "is", "blue", "yellow", "cake", "how", "do", "I", "make", "a", "hello", "sorry", "what", "of")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_benchmarks(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def plain(lm: LanguageModel, batch_size: int = 4, **kwargs: Any) -> HFLM:
    return HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size, backend="causal", **kwargs)


def words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def instances(kind: str, asked: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(asked)]


def choices(seed: int = 0) -> list[Instance]:
    """Five-shot letters, answers of several tokens, an empty context, one that ends in a space, and one too long."""
    rng = random.Random(seed)
    shots = words(rng, 25)
    asked: list[tuple[Any, ...]] = []
    for _ in range(5):
        question = f"{shots}\n\n{words(rng, rng.randrange(2, 9))}\nAnswer:"
        asked += [(question, f" {letter}") for letter in "ABCD"]
        question = f"Question: {words(rng, rng.randrange(2, 5))}\nAnswer:"
        asked += [(question, f" {words(rng, rng.randrange(1, 7))}") for _ in range(2)]
    asked += [("", "hello there"), ("the answer is ", "blue"), (words(rng, 300), " blue cake"), (words(rng, 300), " a")]
    return instances("loglikelihood", asked)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("spec", [SteeringSpec(), SPEC, GATED], ids=["unsteered", "clamp", "gated"])
def test_choices_as_lm_eval_scores_them_inside_steer(architecture: str, spec: SteeringSpec) -> None:
    lm = tiny_model(architecture)
    asked = choices()
    with steer(lm, spec, SAES):
        expected = plain(lm).loglikelihood(asked, disable_tqdm=True)
    found = steered_lm(lm, spec, SAES, 4).loglikelihood(asked)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-4)
    assert [one[1] for one in found] == [one[1] for one in expected]
    inside = steered_lm(lm, SteeringSpec(), batch_size=4)
    with steer(lm, spec, SAES):
        assert [one[0] for one in inside.loglikelihood(asked)] == pytest.approx([one[0] for one in expected], abs=1e-4)


def test_windows_of_long_text_as_lm_eval_scores_them() -> None:
    rng = random.Random(1)
    texts = instances("loglikelihood_rolling", [(words(rng, n),) for n in (3, 300, 40)])
    with steer(LM, SPEC, SAES):
        expected = plain(LM, max_length=64).loglikelihood_rolling(texts, disable_tqdm=True)
    found = steered_lm(LM, SPEC, SAES, 4, max_length=64).loglikelihood_rolling(texts)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_choice_counts_as_written_by_the_model() -> None:
    spec = SteeringSpec((EDIT,), positions=Positions("generation"))
    asked = instances("loglikelihood", [("the answer is", " blue"), ("the answer is", " blue cake is here")])
    base, steered = (steered_lm(LM, one, SAES).loglikelihood(asked) for one in (SteeringSpec(), spec))
    first = LM.tokenizer(" blue").input_ids[:1]
    assert len(first) == 1
    assert base[1][0] != pytest.approx(steered[1][0], abs=1e-3)
    prompt = steered_lm(LM, SteeringSpec((EDIT,), positions=Positions("prompt")), SAES).loglikelihood(asked)
    everywhere = steered_lm(LM, SPEC, SAES).loglikelihood(asked)
    assert prompt[1][0] != pytest.approx(everywhere[1][0], abs=1e-3)


def test_a_choice_longer_than_the_model_reads() -> None:
    with pytest.raises(InputError, match="reads 1 to 8"):
        steered_lm(LM, SPEC, SAES, max_length=8).loglikelihood(instances("loglikelihood", [("a", " blue" * 30)]))


def texts(until: list[str], **more: Any) -> list[Instance]:
    rng = random.Random(2)
    settings = {"until": until, "do_sample": False, "temperature": 0.0, "max_gen_toks": 33} | more
    shots = words(rng, 25)
    asked = [f"{shots if i % 3 else ''}\nQ: {words(rng, rng.randrange(1, 12))}\nA:" for i in range(9)]
    return instances("generate_until", [(one, settings) for one in asked])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_as_lm_eval_writes_it(architecture: str) -> None:
    lm = tiny_model(architecture, seed=3)
    with steer(lm, SPEC, SAES):
        whole = plain(lm).generate_until(texts([]), disable_tqdm=True)
    # stop strings that do occur, in some of the texts and at different places
    stops = [text[place : place + 2] for text, place in zip(whole, (4, 20, 11), strict=False) if text[place:]]
    for until in ([], stops, stops[:1]):
        with steer(lm, SPEC, SAES):
            expected = plain(lm).generate_until(texts(until), disable_tqdm=True)
        assert steered_lm(lm, SPEC, SAES, 4).generate_until(texts(until)) == expected


def test_texts_that_are_done_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_model("gemma2", seed=3)
    whole = steered_lm(lm, SPEC, SAES, 9).generate_until(texts([]))
    early = {char: sum(char in text[:5] for text in whole) for char in set("".join(whole))}
    stop = max(early, key=lambda char: early[char] * (early[char] < len(whole)))
    assert 0 < early[stop] < len(whole)
    seen = []
    own = lm.model.generate

    def generate(**kwargs: Any) -> Any:
        seen.append(len(kwargs["input_ids"]))
        return own(**kwargs)

    model = steered_lm(lm, SPEC, SAES, 9)
    monkeypatch.setattr(lm.model, "generate", generate, raising=False)
    assert model.generate_until(texts([stop])) == [text.split(stop)[0] for text in whole]
    assert seen[-1] < seen[0]


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"repetition_penalty": 1.3}])
def test_other_ways_of_writing_are_lm_evals(settings: dict[str, Any]) -> None:
    with steer(LM, SPEC, SAES):
        expected = plain(LM).generate_until(texts(["the"], **settings), disable_tqdm=True)
    assert steered_lm(LM, SPEC, SAES, 4).generate_until(texts(["the"], **settings)) == expected


def by_lm_eval(data: Path, tasks: list[str], spec: SteeringSpec, limit: int) -> dict[str, Any]:
    with steer(LM, spec, SAES):
        results = evaluate(plain(LM), {"tasks": load_tasks(tasks, data)}, limit=limit, bootstrap_iters=0)
    samples: dict[str, Any] = results["samples"]
    return samples


TASKS = ["mmlu_anatomy", "truthfulqa", "piqa", "gsm8k", "arc_easy", "hellaswag", "wikitext"]


def test_every_row_is_lm_evals(data: Path) -> None:
    specs, limit = [SteeringSpec(), SPEC], 2
    rows = run_tasks(LM, specs, SAES, TASKS, data, limit, batch_size=4)
    assert rows == [row for one in specs for row in run_tasks(LM, one, SAES, TASKS, data, limit, 4)]
    for spec in specs:
        found = {(row.task, row.doc, row.metric): row for row in rows if row.spec == spec.hash}
        for task, samples in by_lm_eval(data, TASKS, spec, limit).items():
            for sample in samples:
                suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
                for metric in sample["metrics"]:
                    if task != "wikitext":
                        row = found.pop((task, sample["doc_id"], metric + suffix))
                        assert row.value == pytest.approx(sample[metric], abs=1e-5)
                        assert (row.doc_hash, row.prompt_hash) == (sample["doc_hash"], sample["prompt_hash"])
                if task == "wikitext":
                    log_prob, n = sample["word_perplexity"]
                    row = found.pop((task, sample["doc_id"], "nats_per_word"))
                    assert row.value == pytest.approx(-log_prob / n, rel=1e-5)
                    del found[task, sample["doc_id"], "nats_per_byte"]
        assert {metric for _, _, metric in found} == {"parsed,strict-match", "parsed,flexible-extract"}
        assert {row.value for row in found.values()} <= {0.0, 1.0}


def test_an_answer_that_was_not_found_is_no_wrong_answer_only(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["It is 0.\n#### 0", "It is 7", "no idea"])
    monkeypatch.setattr(
        "demur.eval.steered_lm.SteeredLM.generate_until", lambda self, requests, disable_tqdm=True: list(said)
    )
    rows = {(row.doc, row.metric): row.value for row in run_tasks(LM, SPEC, SAES, ["gsm8k"], data)}
    assert [rows[doc, "exact_match,strict-match"] for doc in range(3)] == [1, 0, 0]
    assert [rows[doc, "parsed,strict-match"] for doc in range(3)] == [1, 0, 0]
    assert [rows[doc, "exact_match,flexible-extract"] for doc in range(3)] == [1, 0, 0]
    assert [rows[doc, "parsed,flexible-extract"] for doc in range(3)] == [1, 1, 0]


def test_a_system_prompt_needs_the_chat_template(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SteeringSpec(system="Be safe.")
    with pytest.raises(InputError, match="chat=True"):
        run_tasks(LM, spec, SAES, ["piqa"], data)
    shown: dict[tuple[str, ...], set[str]] = {}

    def score(lm: LanguageModel, requests: list[Request], specs: list[SteeringSpec], *more: Any) -> Any:
        asked = {lm.tokenizer.decode(request.context) for request in requests}
        shown[tuple(one.hash for one in specs)] = asked
        return log_likelihoods(lm, requests, specs, *more)

    monkeypatch.setattr("demur.eval.steered_lm.log_likelihoods", score)
    both = run_tasks(LM, [SteeringSpec(), spec, SPEC], SAES, ["piqa"], data, chat=True)
    assert shown == {
        ("unsteered", SPEC.hash): {user("make cake 0"), user("make cake 1"), user("make cake 2"), user("make cake 3")},
        (spec.hash,): {f"<|im_start|>system\nBe safe.<|im_end|>\n{user(f'make cake {i}')}" for i in range(4)},
    }
    assert both == [
        row for one in (SteeringSpec(), SPEC, spec) for row in run_tasks(LM, one, SAES, ["piqa"], data, chat=True)
    ]
    # its prompts differ on purpose, which must not keep its rows from being paired
    assert {bool(row.prompt_hash) for row in both if row.spec != spec.hash} == {True}
    assert {row.prompt_hash for row in both if row.spec == spec.hash} == {""}


def user(goal: str) -> str:
    """A conversation up to its answer; lm-eval counts the line break at the end as part of that."""
    return f"<|im_start|>user\nQuestion: {goal}\nAnswer:<|im_end|>\n<|im_start|>assistant"


def test_nothing_is_said_and_nothing_is_left_behind(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("lm_eval")
    log.setLevel(logging.WARNING)
    random.seed(5)
    state, bar, tokenizer = random.getstate(), lm_eval.api.task.tqdm, LM.tokenizer.init_kwargs.copy()
    before = LM.model(torch.tensor([[5, 6]])).logits
    run_tasks(LM, SPEC, SAES, TASKS, data)
    with pytest.raises(InputError):
        run_tasks(LM, SteeringSpec((Edit("layers.9.resid_post", "s", (3,), 6.0),)), SAES, ["piqa"], data)
    assert capfd.readouterr() == ("", "")
    assert (log.level, random.getstate(), lm_eval.api.task.tqdm) == (logging.WARNING, state, bar)
    assert LM.tokenizer.init_kwargs == tokenizer
    assert torch.equal(LM.model(torch.tensor([[5, 6]])).logits, before)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for attempt in (lambda: run_tasks(LM, SPEC, SAES, ["piqa"], data), lambda: steered_lm(LM, SPEC, SAES)):
        with pytest.raises(MissingExtraError, match=r"demur\[eval\]"):
            attempt()
