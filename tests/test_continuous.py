"""Continuous batching: every answer is what it would be alone, whoever joins and leaves, under whatever spec."""

import math
import random

import pytest
import torch

from demur.errors import InputError
from demur.lm import continuous
from demur.lm.continuous import Continuous, Token, Wanted, write
from demur.lm.generate import generate
from demur.lm.load import LanguageModel
from demur.lm.sampling import Draws, Sampling, draw
from demur.lm.text_stream import TextStream
from demur.spec import Edit, LatentGate, Positions, SteeringSpec
from demur.steering.slots import steer_slots
from demur.steering.steer import steer
from demur.testing import tiny_model, tiny_sae

SAE = {"tiny": tiny_sae()}


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(request.param)


def specs() -> list[SteeringSpec]:
    def clamp(latent: int, value: float, **kwargs: object) -> SteeringSpec:
        return SteeringSpec((Edit("layers.1.resid_post", "tiny", (latent,), value),), **kwargs)  # type: ignore[arg-type]

    gate = LatentGate("layers.0.resid_post", "tiny", 3, 0.1)
    return [
        SteeringSpec(),
        clamp(3, 6),
        clamp(3, 12, positions=Positions("generation")),
        clamp(5, 9, gate=gate),
        clamp(7, 4, positions=Positions("assistant")),
        SteeringSpec(
            (Edit("layers.2.resid_post", "tiny", (1, 2), 5),), gate=LatentGate("layers.0.resid_post", "tiny", 9, 2)
        ),
    ]


def settled() -> list[SteeringSpec]:
    """Specs of which nothing may be left to do while a row is still being written."""
    found = [SteeringSpec()]
    for threshold, first in ((0.1, 0), (0.1, 2), (1.5, 0), (2.5, 4), (1e6, 0)):
        gate = LatentGate("layers.0.resid_post", "tiny", 3, threshold, positions=Positions("last_prompt_token"))
        edit = Edit("layers.1.resid_post", "tiny", (7,), 9)
        found.append(SteeringSpec((edit,), Positions("answer", first=first), gate=gate))
    return found


def prompts(n: int) -> list[list[int]]:
    rng = random.Random(n)
    return [[rng.randrange(3, 300) for _ in range(rng.randrange(1, 30))] for _ in range(n)]


def alone(lm: LanguageModel, ids: list[int], spec: SteeringSpec, n: int) -> list[int]:
    with steer(lm, spec, SAE):
        return generate(lm, [ids], n)[0].ids


@pytest.mark.parametrize("given", [specs(), settled()], ids=["all sorts", "that settle"])
def test_answers_that_come_and_go_are_what_they_are_alone(lm: LanguageModel, given: list[SteeringSpec]) -> None:
    jobs = [(ids, given[i % 6], 3 + 5 * i % 17) for i, ids in enumerate(prompts(24))]
    found: dict[int, list[int]] = {}
    rng = random.Random(0)
    with steer_slots(lm, 5, SAE) as slots:
        batch = Continuous(lm, 5)
        waiting = list(range(len(jobs)))
        of_slot: dict[int, int] = {}

        def took(tokens: list[Token]) -> None:
            for token in tokens:
                if not token.stopped:
                    found.setdefault(of_slot[token.slot], []).append(token.drawn.token)
                if token.last:
                    slots.take(token.slot)

        while waiting or batch.running:
            some = [waiting.pop(0) for _ in range(min(len(waiting), batch.free, rng.randrange(4)))]

            def wanted(number: int) -> Wanted:
                ids, spec, n = jobs[number]

                def began(slot: int) -> None:
                    slots.put(slot, spec)
                    of_slot[slot] = number

                return Wanted(ids, Sampling(n), began)

            took(batch.join([wanted(number) for number in some]))
            took(batch.step())
    assert batch.free == 5
    for number, (ids, spec, n) in enumerate(jobs):
        assert found.get(number, []) == alone(lm, ids, spec, n), number


def test_counts_are_of_the_row_that_was_in_the_slot() -> None:
    lm = tiny_model()
    always = specs()[1]
    with steer_slots(lm, 2, SAE) as slots:
        batch = Continuous(lm, 2)
        batch.join([Wanted([5, 6, 7], Sampling(4), lambda slot: slots.put(slot, always))])
        for _ in range(2):
            batch.step()
        other = SteeringSpec((Edit("layers.0.resid_post", "tiny", (8,), 3.0),))
        tokens = batch.join([Wanted([9, 9], Sampling(9), lambda slot: slots.put(slot, other))])
        first = next(iter({0, 1} - {tokens[0].slot}))
        batch.step()
        # 2 of the prompt's 3 tokens (the first is left alone) and 3 written ones; the fourth is never read
        assert slots.take(first).steered == 5
        batch.drop([tokens[0].slot])
        assert slots.take(tokens[0].slot).steered == 2
        assert slots.take(tokens[0].slot).steered == 0


def test_specs_that_nobody_has_are_forgotten_and_a_wrong_one_changes_nothing() -> None:
    lm = tiny_model()
    before = lm.model(torch.tensor([[4, 5, 6]])).logits
    with steer_slots(lm, 2, SAE) as slots:
        for value in range(40):
            slots.put(0, SteeringSpec((Edit("layers.1.resid_post", "tiny", (3,), float(value)),)))
        assert len(slots._specs) <= 6
        with pytest.raises(InputError, match="latent 5000"):
            slots.put(0, SteeringSpec((Edit("layers.1.resid_post", "tiny", (5000,), 1.0),)))
        with pytest.raises(InputError, match="latent 5000"):
            slots.check(SteeringSpec((Edit("layers.1.resid_post", "tiny", (5000,), 1.0),)))
        slots.take(0)
        assert slots._specs == [SteeringSpec()]
    assert torch.equal(before, lm.model(torch.tensor([[4, 5, 6]])).logits)


def test_an_error_in_a_pass_lets_nobody_in() -> None:
    batch = Continuous(tiny_model(), 3)
    with pytest.raises(IndexError):
        batch.join([Wanted([4], Sampling(5)), Wanted([10**6], Sampling(5))])
    assert (batch.free, batch.running) == (3, 0)
    with pytest.raises(InputError, match="4 answers"):
        batch.join([Wanted([4], Sampling(5))] * 4)
    assert len(batch.join([Wanted([4], Sampling(5))] * 2)) == 2
    # also where the prompt ran, and only putting the rows side by side failed
    before = batch._mask.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous, "_beside", lambda one, two: [][0])
        for _ in range(2):
            with pytest.raises(IndexError):
                batch.join([Wanted([4, 5, 6], Sampling(5))])
    assert (batch.free, batch.running) == (1, 2)
    assert torch.equal(batch._mask, before)
    assert len(batch.join([Wanted([4], Sampling(5))])) == 1
    assert len(batch.step()) == 3


def test_a_row_without_numbers_ends_alone() -> None:
    lm = tiny_model()
    huge = SteeringSpec((Edit("layers.1.resid_post", "tiny", tuple(range(40)), 3e38, "add"),), Positions("generation"))
    with steer_slots(lm, 3, SAE) as slots:
        batch = Continuous(lm, 3)
        bad = Wanted([5, 6, 7], Sampling(9, temperature=1.0), lambda slot: slots.put(slot, huge))
        good = Wanted([8, 9], Sampling(9), lambda slot: slots.put(slot, SteeringSpec()))
        first = batch.join([bad, good])
        second = batch.step()
        assert [token.broken for token in (*first, *second)] == [False, False, True, False]
        assert batch.running == 1
        found = [first[1].drawn.token, second[1].drawn.token]
        while batch.running:
            found += [token.drawn.token for token in batch.step() if not token.stopped]
    assert found == generate(lm, [[8, 9]], 9)[0].ids


@pytest.mark.parametrize("sampling", [Sampling(9, 1e-37), Sampling(9, 1.0, top_p=1e-50), Sampling(9, 1e-50)])
def test_settings_at_the_edge_take_the_likeliest(sampling: Sampling) -> None:
    logits = torch.tensor([[1.0, 90.0, 3.0], [float("nan")] * 3])
    first, _ = draw(logits, [Draws(sampling), Draws(sampling)])
    assert first.token == 1


def test_long_padding_is_cut_off_when_long_rows_leave() -> None:
    lm = tiny_model()
    batch = Continuous(lm, 2)
    long = batch.join([Wanted([5] * 200, Sampling(50))])[0].slot
    batch.join([Wanted([6, 7], Sampling(8))])
    batch.drop([long])
    assert batch._mask.shape[1] < 10
    tokens = []
    while batch.running:
        tokens += [token.drawn.token for token in batch.step() if not token.stopped]
    assert tokens == generate(lm, [[6, 7]], 8)[0].ids[1:]


def test_draws_follow_their_distribution_and_their_own_seed() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])

    def drawn(sampling: Sampling, n: int = 1, beside: int = 0) -> list[int]:
        rows = [Draws(sampling), *(Draws(Sampling(9, 1.0, seed=i)) for i in range(beside))]
        return [draw(logits.repeat(1 + beside, 1), rows)[0].token for _ in range(n)]

    n = 4000
    counts = torch.bincount(torch.tensor(drawn(Sampling(9, 1.0, seed=1), n)), minlength=4) / n
    assert torch.allclose(counts, logits.softmax(-1), atol=0.03)
    cold = torch.bincount(torch.tensor(drawn(Sampling(9, 0.5, seed=1), n)), minlength=4) / n
    assert torch.allclose(cold, (logits / 0.5).softmax(-1), atol=0.03)
    assert set(drawn(Sampling(9, 1.0, top_k=2, seed=1), 300)) == {0, 1}
    # 0.64 and 0.24 reach 0.8 together
    assert set(drawn(Sampling(9, 1.0, top_p=0.8, seed=1), 300)) == {0, 1}
    assert set(drawn(Sampling(9, 1.0, top_p=1e-6, seed=1), 50)) == {0}
    assert set(drawn(Sampling(9, 0.0), 5)) == {0}
    assert drawn(Sampling(9, 1.0, seed=7), 20) == drawn(Sampling(9, 1.0, seed=7), 20, beside=5)
    assert drawn(Sampling(9, 1.0, seed=7), 20) != drawn(Sampling(9, 1.0, seed=8), 20)


def test_bias_penalties_and_log_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    row = Draws(Sampling(9, logit_bias={2: 5.0}, frequency_penalty=2.0, presence_penalty=2.0, top_logprobs=2))
    tokens = [draw(logits.clone(), [row])[0] for _ in range(4)]
    # 5 | 5 - 4 = 1 and 2 | 2 - 4 | 5 - 4 = 1, 2 - 4, 1
    assert [one.token for one in tokens] == [2, 0, 1, 2]
    expected = logits.log_softmax(-1)[0]
    assert tokens[0].logprob == pytest.approx(float(expected[2]))
    assert [token for token, _ in tokens[0].top] == [0, 1]
    assert math.isclose(tokens[0].top[0][1], float(expected[0]), rel_tol=1e-6)


@pytest.mark.parametrize("stops", [(), ("END",), ("xyz", "ä!")])
def test_text_comes_as_it_is_written_up_to_a_stop_string(stops: tuple[str, ...]) -> None:
    tokenizer = tiny_model().tokenizer
    text = "Héllo wörld 🙂 xy, ENx ä? ENDnothing ä! more"
    stream = TextStream(tokenizer, stops)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.append(stream.add(token))
        assert not any(stop in "".join(pieces) for stop in stops)
    pieces.append(stream.end())
    ends = [text.find(stop) for stop in stops if stop in text]
    assert "".join(pieces) == text[: min(ends, default=len(text))]
    assert stream.stopped == bool(ends)
    assert "�" not in "".join(pieces)


def test_bytes_that_are_no_characters_come_out_as_they_are_decoded() -> None:
    tokenizer = tiny_model().tokenizer
    rng = random.Random(5)
    for _ in range(200):
        ids = [rng.randrange(3, len(tokenizer)) for _ in range(rng.randrange(1, 12))]
        stream = TextStream(tokenizer)
        assert "".join([*map(stream.add, ids), stream.end()]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_characters_of_a_byte_fallback_vocabulary_come_whole() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "h": 1, "i": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    inner = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    text = "hi😀é🙂hi"
    ids = tokenizer(text).input_ids
    stream = TextStream(tokenizer)
    pieces = [*map(stream.add, ids), stream.end()]
    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert all("�" not in piece for piece in pieces)


def test_answers_are_drawn_apart_and_in_order() -> None:
    lm = tiny_model()
    rows = prompts(7)
    assert write(lm, rows, Sampling(8), 3) == [generate(lm, [row], 8)[0].ids for row in rows]
    drawn = write(lm, [rows[0]] * 6, Sampling(8, 1.0), 3)
    assert len({tuple(ids) for ids in drawn}) > 1
