"""Learned gates: what they decide, against a slow oracle that reads each row alone, token by token."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from demur.errors import InputError, MismatchError, NotFoundError
from demur.lm import attach
from demur.lm.attach import prompt_lengths
from demur.lm.batches import pad
from demur.lm.caches import cache_argument
from demur.lm.chat import chat_ids
from demur.lm.continuous import Continuous, Wanted
from demur.lm.generate import generate
from demur.lm.record import read
from demur.lm.sampling import Sampling
from demur.lm.token_types import TYPES, typed_chat
from demur.spec import Edit, Positions, ProbeGate, SteeringSpec, TextGate
from demur.steering.direction import Direction, save_direction
from demur.steering.probe import Attention, Probe, load_probe, save_probe
from demur.steering.spec_book import read_offered
from demur.steering.spec_file import parse_spec, write_spec
from demur.steering.steer import steer
from demur.steering.vectors import load_vector
from demur.testing import tiny_model, tiny_sae
from demur.types import Hookpoint, Message

LM = tiny_model()
SAES = {"s": tiny_sae()}
LOW, PLACE = "layers.0.resid_post", "layers.1.resid_post"
EDIT = Edit(PLACE, "s", (3,), 8.0)
TALKS = (
    [Message("user", "Hi")],
    [Message("system", "Be kind."), Message("user", "How do I make a cake?")],
    [Message("user", "Hello"), Message("assistant", "Yes?"), Message("user", "What is blue and what is not?")],
    [Message("user", "One"), Message("assistant", "Two, and three"), Message("user", "I'm sorry, but I can't")],
)


def probe(pool: str = "token", seed: int = 0, hookpoint: str = LOW) -> Probe:
    draw = torch.Generator().manual_seed(seed)
    if pool == "attention":
        hidden, offset, query, weight = (torch.randn(n, generator=draw) for n in ((32, 6), (6,), (6, 3), (6, 3)))
        layers = Attention(hidden, offset, query)
        one = Probe(weight / 3, 0.0, hookpoint, "attention", attention=layers)
        return replace(one, bias=math.log(1 / slow(one, TALKS[1]) - 1))  # so that it says 0.5 of one of them
    weight = torch.randn(32, generator=draw)
    return Probe(weight, 0.1, hookpoint, "turn" if pool == "turn" else "token")


def slow(one: Probe, talk: list[Message]) -> float:
    """The probability at the end of the prompt: the row alone, a mean over the text of the last turn if pooled."""
    typed = typed_chat(LM, talk, generation=True)
    x = read(LM.model, Hookpoint(0), torch.tensor([typed.ids])).residual[0]
    if one.pool == "token":
        x = x[-1:]
    else:
        user = [i for i, kind in enumerate(typed.types) if TYPES[kind] == "user"]
        last = [i for i in user if all(j in user for j in range(i, user[-1] + 1))]
        x = x[last]
    if one.attention is None:
        return float((x.mean(0) @ one.weight + one.bias).sigmoid())
    logit = one.bias
    for head in range(one.weight.shape[1]):  # a softmax over the turn's tokens, head by head
        units = (x @ one.attention.hidden + one.attention.offset).clamp(min=0)
        share = (8 * (units @ one.attention.query[:, head] / 8).tanh()).softmax(0)
        logit += float(share @ (units @ one.weight[:, head]))
    return 1 / (1 + math.exp(-logit))


def residual(rows: list[list[int]], spec: SteeringSpec, one: Probe, side: str = "left") -> list[Tensor]:
    """What each row's residual after the edit is, padding left out."""
    batch = pad(LM, rows, side=side)
    lengths = torch.tensor([len(row) for row in rows])
    with steer(LM, spec, SAES, directions=[one]), prompt_lengths(LM.model, lengths):
        found = read(LM.model, Hookpoint(1), batch.ids, batch.mask).residual
    return [row[mask.bool()] for row, mask in zip(found, batch.mask, strict=True)]


@pytest.mark.parametrize("pool", ["token", "turn", "attention"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_gate_opens_at_the_end_of_the_prompt_where_the_probe_says_so(pool: str, seed: int, side: str) -> None:
    one = probe(pool, seed)
    wanted = [slow(one, talk) for talk in TALKS]
    assert max(wanted) - min(wanted) > 0.01
    rows = [chat_ids(LM, talk) for talk in TALKS]
    threshold = (sorted(wanted)[1] + sorted(wanted)[2]) / 2
    plain = residual(rows, SteeringSpec(), one, side)
    spec = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, threshold))
    clamped = residual(rows, SteeringSpec((EDIT,), Positions("last_prompt_token")), one, side)
    for p, before, after, both in zip(wanted, plain, residual(rows, spec, one, side), clamped, strict=True):
        if p > threshold:
            assert not torch.equal(after[-1], before[-1])
            assert torch.equal(after, both)
        else:
            assert torch.equal(after, before)


@pytest.mark.parametrize("pool", ["token", "turn", "attention"])
def test_strength_is_the_share_of_the_way(pool: str) -> None:
    one = probe(pool, 3)
    rows = [chat_ids(LM, talk) for talk in TALKS]
    spec = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, 0.0, strength="probability"))
    whole = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, 0.0))
    plain, part, full = (residual(rows, x, one) for x in (SteeringSpec(), spec, whole))
    for talk, a, b, c in zip(TALKS, plain, part, full, strict=True):
        torch.testing.assert_close(b[-1] - a[-1], slow(one, talk) * (c[-1] - a[-1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", ["token", "turn", "attention"])
def test_rows_that_share_their_beginning_open_as_each_alone(pool: str) -> None:
    """The shared system prompt is run once and the rest is padded on the left, in the middle of the conversation."""
    one = probe(pool, 6)
    asks = ("Hi", "How do I make a cake?", "What is blue and what is not?", "I'm sorry", "Hello there, then", "No")
    system = Message("system", "Hello there. I can't help with that, sorry. How do I make a cake?")
    talks = [[system, Message("user", ask)] for ask in asks]
    p = [slow(one, talk) for talk in talks]
    for threshold in (q + step for q in p for step in (-1e-4, 1e-4)):
        spec = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, threshold))
        with steer(LM, spec, SAES, directions=[one]) as steering:
            generate(LM, [chat_ids(LM, talk) for talk in talks], 3)
        assert [n > 0 for n in steering.counts()[0].steered] == [q > threshold for q in p]


def test_text_that_is_no_conversation_is_a_turn_of_its_own_without_its_first_token() -> None:
    one = probe("turn", 1)
    ids = LM.tokenizer("Hello there. The answer is blue.", add_special_tokens=False)["input_ids"]
    x = read(LM.model, Hookpoint(0), torch.tensor([ids])).residual[0]
    p = float((x[1:].mean(0) @ one.weight + one.bias).sigmoid())
    for threshold, opens in ((p - 1e-4, True), (p + 1e-4, False)):
        spec = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, threshold))
        after, before = residual([ids], spec, one)[0], residual([ids], SteeringSpec(), one)[0]
        assert torch.equal(after, before) != opens


def test_the_monitor_opens_where_the_answer_turns_and_stays_open() -> None:
    one = probe("token", 2)
    prompt = chat_ids(LM, TALKS[0])
    answer = LM.tokenizer("Hello there. The answer is blue, and I'm sorry.", add_special_tokens=False)["input_ids"]
    row = [*prompt, *answer]
    x = read(LM.model, Hookpoint(0), torch.tensor([row])).residual[0]
    p = (x @ one.weight + one.bias).sigmoid()[len(prompt) :]
    limit = float((p.max() + p.median()) / 2)
    first = len(prompt) + int((p > limit).nonzero()[0])
    assert len(prompt) < first < len(row) - 1
    batch = torch.tensor([row])
    spec = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, 1.0, monitor=limit))
    with steer(LM, spec, SAES, directions=[one]), prompt_lengths(LM.model, torch.tensor([len(prompt)])):
        after = read(LM.model, Hookpoint(1), batch).residual[0]
    changed = (after != read(LM.model, Hookpoint(1), batch).residual[0]).any(-1)
    assert changed.tolist() == [place >= first for place in range(len(row))]
    blind = replace(spec, gate=ProbeGate(LOW, one.hash, 1.0))
    with steer(LM, blind, SAES, directions=[one]), prompt_lengths(LM.model, torch.tensor([len(prompt)])):
        shut = read(LM.model, Hookpoint(1), batch).residual
    assert torch.equal(shut, read(LM.model, Hookpoint(1), batch).residual)


@pytest.mark.parametrize("pool", ["turn", "attention"])
def test_a_later_turn_is_judged_anew(pool: str) -> None:
    """Each request is a fresh row: the gate that opened for one turn is asked again in the next."""
    one = probe(pool, 5)
    talk = TALKS[2]
    first, later = slow(one, talk[:1]), slow(one, talk)
    assert abs(first - later) > 1e-3
    spec = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, (first + later) / 2))
    with steer(LM, spec, SAES, directions=[one]):
        found = [
            read(LM.model, Hookpoint(1), torch.tensor([chat_ids(LM, turns)])).residual for turns in (talk[:1], talk)
        ]
    plain = [read(LM.model, Hookpoint(1), torch.tensor([chat_ids(LM, turns)])).residual for turns in (talk[:1], talk)]
    assert [torch.equal(a, b) for a, b in zip(found, plain, strict=True)] == [first < later, later < first]


@pytest.mark.parametrize("pool", ["token", "attention"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_once_the_assistant_has_spoken_the_gate_has_its_later_threshold(pool: str, side: str) -> None:
    one = probe(pool, 5)
    rows = [chat_ids(LM, talk) for talk in TALKS]
    later = [any(message.role == "assistant" for message in talk) for talk in TALKS]
    assert later == [False, False, True, True]
    plain = residual(rows, SteeringSpec(), one, side)
    for limits, opens in (((1.0, 0.0), later), ((0.0, 1.0), [not yes for yes in later]), ((0.0, None), [True] * 4)):
        spec = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, limits[0], later=limits[1]))
        found = residual(rows, spec, one, side)
        assert [not torch.equal(a, b) for a, b in zip(found, plain, strict=True)] == opens


def test_the_later_threshold_knows_of_an_answer_that_was_read_in_an_earlier_pass() -> None:
    one = probe("token", 5)
    spec = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, 1.0, later=0.0))
    ids = torch.tensor([chat_ids(LM, TALKS[3])])
    length = torch.tensor([ids.shape[1]])
    with steer(LM, spec, SAES, directions=[one]) as steering, prompt_lengths(LM.model, length), torch.no_grad():
        past = DynamicCache(config=LM.model.config)
        for part in (ids[:, :-2], ids[:, -2:]):
            LM.model(part, **{cache_argument(LM.model): past}, use_cache=True)
    assert [n > 0 for n in steering.counts()[0].steered] == [True]


@pytest.mark.parametrize("header", [True, False])
def test_the_later_threshold_knows_of_an_answer_that_was_written_and_ended(header: bool) -> None:
    """One cache over two turns: the second pass brings the end of the answer and the next question.

    Without the `header` of its turn in the prompt, all of the answer is written in passes that nothing can change.
    """
    one = probe("token", 5)
    spec = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, 1.0, later=0.0))
    whole, first = (torch.tensor([chat_ids(LM, talk)]) for talk in (TALKS[3], TALKS[3][:1]))
    answer = LM.tokenizer(TALKS[3][1].content, add_special_tokens=False)["input_ids"]
    written = first.shape[1] + len(answer)
    if not header:
        first = first[
            :, : 1 + max(i for i, kind in enumerate(typed_chat(LM, TALKS[3][:1]).types) if TYPES[kind] == "user")
        ]
    assert whole[0, written - len(answer) : written].tolist() == answer
    past = DynamicCache(config=LM.model.config)
    cache: dict[str, Any] = {cache_argument(LM.model): past, "use_cache": True}
    with steer(LM, spec, SAES, directions=[one]) as steering, torch.no_grad():
        with prompt_lengths(LM.model, torch.tensor([first.shape[1]])):
            LM.model(first, **cache)
            for place in range(first.shape[1], written):
                LM.model(whole[:, place : place + 1], **cache)
        assert steering.counts()[0].steered == [0]
        with prompt_lengths(LM.model, torch.tensor([whole.shape[1]])):
            LM.model(whole[:, written:], **cache)
    assert [n > 0 for n in steering.counts()[0].steered] == [True]


@pytest.mark.parametrize(
    ("gate", "positions", "passes"),
    [
        (ProbeGate(LOW, "", 1.0), Positions("answer"), 2),  # shut: the prompt, and the token that shows it
        (ProbeGate(LOW, "", 0.0), Positions("answer", first=3), 4),  # open: until its tokens have been
        (ProbeGate(LOW, "", 0.0), Positions("answer"), 6),
        (ProbeGate(LOW, "", 1.0), Positions("answer", every=2), 6),
        (ProbeGate(LOW, "", 1.0, monitor=0.999999), Positions("answer"), 6),
        (ProbeGate(LOW, "", 1.0, later=1.0), Positions("answer"), 2),
    ],
)
@pytest.mark.parametrize("mixed", [True, False])
def test_passes_that_nothing_can_change_are_not_looked_at(
    gate: ProbeGate, positions: Positions, passes: int, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = probe("attention", 5)
    looked = []
    step = attach._step
    monkeypatch.setattr(attach, "_step", lambda *args: looked.append(1) or step(*args))
    spec = SteeringSpec((EDIT,), positions, replace(gate, probe=one.hash))
    ids = torch.tensor([chat_ids(LM, TALKS[0])] * 2)
    with steer(LM, [spec, None] if mixed else spec, SAES, directions=[one]):
        LM.model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(looked) == passes


def test_rows_that_come_where_others_left_are_looked_at_anew() -> None:
    one = probe("attention", 5)
    shut, opened = sorted(TALKS[:2], key=lambda talk: slow(one, talk))
    spec = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, (slow(one, shut) + slow(one, opened)) / 2))
    with steer(LM, spec, SAES, directions=[one]) as steering:
        batch = Continuous(LM, 2)
        batch.join([Wanted(chat_ids(LM, shut), Sampling(n)) for n in (3, 6)])
        while batch.running:  # the first leaves the second, which is written on alone
            batch.step()
        assert steering.counts()[0].steered == [0, 0]
        for talk in (shut, opened):  # alone, as the one before was
            batch.join([Wanted(chat_ids(LM, talk), Sampling(3))])
            while batch.running:
                batch.step()
        assert sum(steering.counts()[0].steered) > 0


def test_attention_over_a_long_talk_forgets_earlier_turns_exactly() -> None:
    """What a turn before said at full weight is taken off again, whatever little the turn at hand weighs."""
    one = probe("attention", 2)
    assert one.attention is not None
    one = replace(one, attention=replace(one.attention, query=40 * one.attention.query))  # scores at both bounds
    long = [Message("user", "What is blue and what is not? " * 60), Message("assistant", "The sky. " * 60)]
    talks = [[*long, Message("user", ask)] for ask in ("Hi", "How do I make a cake?", "No")]
    for talk, row in zip(talks, [chat_ids(LM, talk) for talk in talks], strict=True):
        p = slow(one, talk)
        for threshold in (p - 1e-4, p + 1e-4):
            spec = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, threshold))
            after, before = residual([row], spec, one)[0], residual([row], SteeringSpec(), one)[0]
            assert torch.equal(after, before) != (p > threshold)


def test_an_attention_probe_comes_back_and_fits_together(tmp_path: Path) -> None:
    one = probe("attention")
    save_probe(tmp_path / "p.safetensors", one)
    back = load_probe(tmp_path / "p.safetensors")
    assert (back.hash, back.pool, back.width) == (one.hash, "attention", 32)
    assert one.attention is not None
    others = [replace(one, weight=-one.weight), probe("attention", 1)]
    others += [replace(one, attention=replace(one.attention, **{n: 2 * x})) for n, x in vars(one.attention).items()]
    assert len({other.hash for other in (one, *others)}) == 6
    x, lengths = torch.randn(7, 32), torch.tensor([3, 0, 4])
    apart = [one.logits(rows, torch.tensor([len(rows)])) for rows in x.split(lengths.tolist())]
    torch.testing.assert_close(one.logits(x, lengths), torch.cat(apart))
    assert apart[1].item() == -math.inf  # no text: nothing is asked for
    for wrong in ({"pool": "turn"}, {"weight": torch.ones(6)}, {"attention": None}, {"sae": "s", "latents": (1,)}):
        with pytest.raises(InputError, match=r"attention layer|do not fit together"):
            replace(one, **wrong)


def test_a_probe_file_comes_back_and_its_hash_is_of_what_decides(tmp_path: Path) -> None:
    one = replace(probe("turn"), card={"auroc": 0.9})
    save_probe(tmp_path / "p.safetensors", one)
    back = load_probe(tmp_path / "p.safetensors")
    assert (back.hash, back.card, back.pool) == (one.hash, one.card, "turn")
    assert torch.equal(back.weight, one.weight)
    assert replace(one, card={}).hash == one.hash
    for other in (replace(one, bias=0.2), replace(one, pool="token"), replace(one, hookpoint=PLACE), probe(seed=1)):
        assert other.hash != one.hash
    vector = Direction(torch.ones(32), PLACE)
    save_direction(tmp_path / "d.safetensors", vector)
    found = load_vector(tmp_path / "d.safetensors"), load_vector(tmp_path / "p.safetensors")
    assert [type(x) for x in found] == [Direction, Probe]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "not a probe that demur gate train wrote"),
        ("[]", "not a probe that demur gate train wrote"),
        ("{", "not a whole safetensors file"),
        ('{"bias": 0}', "content that is wrong"),
        (json.dumps({"bias": "x", "hookpoint": LOW, "pool": "token", "sae": "", "latents": [], "card": {}}), "wrong"),
        (json.dumps({"bias": 0, "hookpoint": LOW, "pool": "sum", "sae": "", "latents": [], "card": {}}), "pool 'sum'"),
        (json.dumps({"bias": 0, "hookpoint": LOW, "pool": "token", "sae": "x", "latents": [1], "card": {}}), "weights"),
    ],
)
def test_a_file_that_is_no_probe_is_refused_in_a_sentence(tmp_path: Path, header: str | None, message: str) -> None:
    path = tmp_path / "p.safetensors"
    save_file({"weight": torch.ones(4)}, path, None if header is None else {"demur-probe/1": header})
    with pytest.raises(InputError, match=message):
        load_probe(path)
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match="not a whole safetensors"):
        load_probe(path)
    with pytest.raises(NotFoundError, match="does not exist"):
        load_probe(tmp_path / "other.safetensors")


def test_a_gate_that_does_not_fit_is_refused_in_a_sentence() -> None:
    one = probe()

    def run(gate: ProbeGate | TextGate, *found: Probe) -> None:
        with steer(LM, SteeringSpec((EDIT,), gate=gate), SAES, directions=found):
            pass

    with pytest.raises(MismatchError, match=r"wants the probe abc, but only none was given"):
        run(ProbeGate(LOW, "abc", 0.5))
    with pytest.raises(MismatchError, match=r"its probe .* was trained at layers\.0"):
        run(ProbeGate(PLACE, one.hash, 0.5), one)
    narrow = Probe(torch.ones(5), 0.0, LOW)
    with pytest.raises(MismatchError, match="reads 5 numbers, but the model's residual is 32 wide"):
        run(ProbeGate(LOW, narrow.hash, 0.5), narrow)
    above = probe(hookpoint="layers.2.resid_post")
    with pytest.raises(InputError, match="comes after the edit"):
        run(ProbeGate("layers.2.resid_post", above.hash, 0.5), above)
    with pytest.raises(InputError, match="asks some/classifier about the conversation's text"):
        run(TextGate("some/classifier"))
    with pytest.raises(InputError, match=r"threshold is 1\.5"):
        ProbeGate(LOW, "abc", 1.5)
    with pytest.raises(InputError, match=r"monitor is -1"):
        ProbeGate(LOW, "abc", 0.5, monitor=-1)


def test_a_spec_with_a_probe_gate_is_read_back_with_its_probe(tmp_path: Path) -> None:
    one = probe()
    spec = SteeringSpec((EDIT,), gate=ProbeGate(LOW, one.hash, 0.25, monitor=0.9, strength="probability"))
    write_spec(tmp_path / "gated.json", spec)
    save_probe(tmp_path / "probe.safetensors", one)
    offered = read_offered([tmp_path])
    assert offered.specs == {"gated": spec}
    assert [x.hash for x in offered.directions] == [one.hash]
    raw = json.loads((tmp_path / "gated.json").read_text())
    for wrong in ({"threshold": 7}, {"threshold": "x"}, {"pooling": "turn"}, {"strength": "some"}):
        with pytest.raises(
            InputError, match=f"{next(iter(wrong))}.*the gate of the spec|the gate.s {next(iter(wrong))} is"
        ):
            parse_spec({**raw, "gate": {**raw["gate"], **wrong}})
