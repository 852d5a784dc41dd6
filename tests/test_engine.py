"""The steering engine against the float64 oracle, and its invariants over models, specs, paddings and batch mixes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from demur.errors import InputError, MismatchError
from demur.lm.attach import Step, attach, prompt_lengths
from demur.lm.batches import pad
from demur.lm.chat import chat_ids
from demur.lm.generate import generate
from demur.lm.load import LanguageModel
from demur.lm.record import read
from demur.sae.base import Normalize, Reference, Sae
from demur.sae.thresholded import KINDS, GatedSae, JumpReluSae
from demur.sae.topk import TopKSae
from demur.spec import DirectionEdit, Edit, LatentGate, NamedGate, Op, Positions, ProbeGate, SteeringSpec, Unit, Where
from demur.steering.direction import Direction, difference_in_means
from demur.steering.layer import DirectionEdits, SaeEdits
from demur.steering.oracle import expected
from demur.steering.probe import Probe
from demur.steering.steer import steer
from demur.testing import ARCHITECTURES, tiny_model, tiny_sae
from demur.types import Hookpoint, Message

AT = Hookpoint(1)
WIDTH = 32
ALL_KINDS = ("topk", *KINDS)
OPS: tuple[Op, ...] = ("clamp", "floor", "ceil", "add", "scale", "ablate")
SAES: dict[str, Sae] = {"s": tiny_sae(), "t": tiny_sae(seed=5)}


def random_sae(kind: str, seed: int = 0, normalize: Normalize = "none", subtract: bool = True, d: int = WIDTH) -> Sae:
    sae: Sae = TopKSae(d, 96, 8, normalize, subtract) if kind == "topk" else KINDS[kind](d, 96, normalize, subtract)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.2))
    x = torch.randn(400, d, generator=generator) * 2 + 1
    f = sae.encode(x).detach()
    sae.reference = Reference(f.amax(0) + 0.1, f.std(0) + 0.1, (f > 0).float().mean(0), torch.tensor(0.9))
    return sae.requires_grad_(False)


def relative(got: Tensor, target: Tensor) -> float:
    return float((got.double() - target.double()).norm() / target.double().norm())


latents = st.lists(st.integers(0, 95), min_size=1, max_size=6, unique=True)


@settings(max_examples=60)
@given(
    st.sampled_from(ALL_KINDS),
    st.sampled_from(["none", "layer_norm", "constant_norm"]),
    st.booleans(),
    st.lists(st.sampled_from(OPS), min_size=1, max_size=6),
    latents,
    st.floats(0, 9),
    st.sampled_from(["latent", "max_act", "sigma"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_every_op_unit_and_kind_equals_the_oracle(
    kind: str,
    normalize: Normalize,
    subtract: bool,
    ops: list[Op],
    chosen: list[int],
    value: float,
    unit: Unit,
    reconstruct: bool,
    seed: int,
) -> None:
    sae = random_sae(kind, seed, normalize, subtract)
    bare = ("scale", "ablate")
    edits = tuple(
        Edit(str(AT), "s", (latent,), 0 if op == "ablate" else value, op, "latent" if op in bare else unit)
        for latent, op in zip(chosen, ops, strict=False)
    )
    spec = SteeringSpec(edits, mode="reconstruct" if reconstruct else "error_preserving")
    x = torch.randn(13, WIDTH, generator=torch.Generator().manual_seed(seed)) * 2 + 1
    group = SaeEdits(sae, "s", [list(edits)], True, [reconstruct])
    which, on = torch.zeros(1, dtype=torch.long), torch.ones(13, 1, dtype=torch.bool)
    got = x + group.move(x, which, on).sizes @ group.rows
    lost = group.lost(x, which, on)
    got = got if lost is None else got + lost
    wanted = expected(x, spec, AT, {"s": sae})
    assert wanted.decidable.any()
    assert relative(got[wanted.decidable], wanted.residual[wanted.decidable]) < 1e-5


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_kinds_encode_and_reconstruct_by_their_definition(kind: str, normalize: Normalize) -> None:
    sae = random_sae(kind, 3, normalize)
    for token in torch.randn(20, WIDTH) * 2 + 1:
        scale = {
            "none": torch.tensor(1.0),
            "layer_norm": token.std() + 1e-5,
            "constant_norm": token.norm() / WIDTH**0.5,
        }[normalize]
        shift = token.mean() if normalize == "layer_norm" else torch.tensor(0.0)
        x = (token - shift) / scale
        p = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        if isinstance(sae, TopKSae):
            limit = p.sort(descending=True).values[sae.k - 1]
            f = torch.where(p >= limit, p, 0).clamp(min=0)
        elif isinstance(sae, GatedSae):
            magnitude = ((x - sae.b_dec) @ sae.W_enc) * sae.r_mag.exp() + sae.b_mag
            f = torch.where(p > 0, magnitude, 0).clamp(min=0)
        else:
            assert isinstance(sae, JumpReluSae)
            f = torch.where(p > sae.threshold, p, 0).clamp(min=0)
        torch.testing.assert_close(sae.encode(token), f, atol=1e-5, rtol=1e-4)
        decoded = (f @ sae.W_dec + sae.b_dec) * scale + shift
        torch.testing.assert_close(sae(token), decoded, atol=1e-4, rtol=1e-4)


def test_the_fast_threshold_path_is_what_it_says_and_asks_for_statistics() -> None:
    sae = random_sae("topk")
    x = torch.randn(50, WIDTH) * 2 + 1
    p = sae.preactivations(x)[:, [4, 7]]
    fast = sae.reader([4, 7], exact=False)(x, torch.ones(50, 2, dtype=torch.bool))
    torch.testing.assert_close(fast, torch.where(p >= 0.9, p, 0), atol=1e-5, rtol=1e-5)
    sae.reference = None
    with pytest.raises(InputError, match="demur sae measure"):
        sae.reader([4], exact=False)
    with pytest.raises(InputError, match="the unit max_act needs the SAE's reference statistics"):
        sae.in_units([4], 1.0, "max_act")


def test_directions_add_and_project_out() -> None:
    x = torch.randn(9, WIDTH)
    one = Direction(torch.randn(WIDTH), str(AT), sigma=0.5)
    for edit in (
        DirectionEdit(str(AT), one.hash, 2.0),
        DirectionEdit(str(AT), one.hash, -1.5, unit="sigma"),
        DirectionEdit(str(AT), one.hash, op="project_out"),
    ):
        group = DirectionEdits({one.hash: one}, [[edit]], torch.device("cpu"))
        move = group.move(x, torch.zeros(1, dtype=torch.long), torch.ones(9, 1, dtype=torch.bool))
        got = x + move.sizes @ group.rows
        wanted = expected(x, SteeringSpec((edit,)), AT, {}, [one])
        assert relative(got, wanted.residual) < 1e-5
    unit = torch.nn.functional.normalize(one.vector, dim=0)
    assert float((got @ unit).abs().max()) < 1e-5
    means = difference_in_means(x[:4] + 3, x[4:], str(AT))
    torch.testing.assert_close(means.vector, x[:4].mean(0) + 3 - x[4:].mean(0))


# --- in a model -----------------------------------------------------------------------------------

LM = tiny_model()
TEXTS = ("Hi", "How do I make a cake?", "Hello there, what is blue and what is not?", "I'm sorry, but I can't")


def rows_of(lm: LanguageModel, count: int = 4) -> list[list[int]]:
    return [chat_ids(lm, [Message("system", "Be kind."), Message("user", text)]) for text in TEXTS[:count]]


def written(lm: LanguageModel, rows: list[list[int]], spec: Any, tokens: int = 6, **changes: Any) -> list[list[int]]:
    batch = pad(lm, rows, side="left")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, **changes}
    model: Any = lm.model
    with steer(lm, spec, SAES, directions=DIRECTIONS, gates=GATES), torch.no_grad():
        ids = model.generate(input_ids=batch.ids, attention_mask=batch.mask, pad_token_id=lm.pad_id, **options)
    found: list[list[int]] = ids[:, batch.ids.shape[1] :].tolist()
    return found


def fires_on_odd_tokens(residual: Tensor, step: Step) -> Tensor:
    assert step.ids is not None
    return step.ids % 7 == 3


DIRECTION = Direction(torch.randn(WIDTH, generator=torch.Generator().manual_seed(4)), str(AT), sigma=2.0)
# logits of both signs, so that gates open for some tokens and rows and not for others
PROBES = [
    Probe(torch.randn(WIDTH, generator=torch.Generator().manual_seed(6)) / 4, 0.0, "layers.0.resid_post"),
    Probe(torch.randn(WIDTH, generator=torch.Generator().manual_seed(7)), 0.0, "layers.0.resid_post", pool="turn"),
    Probe(torch.tensor([1.0, -1.0, 2.0]), -0.2, "layers.0.resid_post", "turn", sae="t", latents=(1, 2, 4)),
]
DIRECTIONS = [DIRECTION, *PROBES]
GATES = {"odd": fires_on_odd_tokens}
WHERES: tuple[Where, ...] = ("all", "prompt", "generation", "last_prompt_token", "user", "assistant", "template")

blocks = st.integers(0, 2)
edits_in_models = st.one_of(
    st.builds(
        lambda block, sae, latents, value, op: Edit(
            f"layers.{block}", sae, tuple(latents), 0 if op == "ablate" else value, op
        ),
        blocks,
        st.sampled_from(["s", "t"]),
        latents,
        st.floats(0, 12),
        st.sampled_from(OPS),
    ),
    st.builds(lambda block, v: DirectionEdit(f"layers.{block}", DIRECTION.hash, v), blocks, st.floats(-4, 4)),
)
positions = st.one_of(
    st.builds(Positions, st.sampled_from(WHERES), every=st.integers(1, 3)),
    st.builds(Positions, st.just("generation"), st.integers(1, 3)),
)
gates = st.one_of(
    st.none(),
    st.none(),
    st.builds(LatentGate, st.just("layers.0"), st.just("t"), st.integers(0, 9), st.floats(0, 1), positions=positions),
    st.builds(NamedGate, st.just("layers.0"), st.just("odd"), positions),
    st.builds(
        ProbeGate,
        st.just("layers.0"),
        st.sampled_from([probe.hash for probe in PROBES]),
        st.floats(0.2, 0.8),
        st.one_of(st.just(Positions("last_prompt_token")), positions),
        monitor=st.sampled_from([1.0, 0.6]),
        strength=st.sampled_from(["full", "probability"]),
    ),
)
specs = st.builds(
    SteeringSpec,
    st.lists(edits_in_models, min_size=1, max_size=3, unique_by=lambda edit: (edit.hookpoint, type(edit))).map(tuple),
    positions,
    gates,
    st.booleans(),
)


@settings(max_examples=50)
@given(st.lists(st.one_of(st.none(), specs), min_size=4, max_size=4))
def test_each_row_of_a_batch_is_steered_as_if_it_were_alone(mix: list[SteeringSpec | None]) -> None:
    rows = rows_of(LM)
    together = written(LM, rows, mix)
    assert together == [written(LM, [row], one or SteeringSpec())[0] for row, one in zip(rows, mix, strict=True)]
    with steer(LM, mix, SAES, directions=DIRECTIONS, gates=GATES):
        ours = [answer.ids for answer in generate(LM, rows, 6)]
    for mine, theirs in zip(ours, together, strict=True):
        assert mine == theirs[: len(mine)]


@settings(max_examples=50)
@given(specs)
def test_cached_generation_equals_uncached_for_every_position_and_gate(spec: SteeringSpec) -> None:
    rows = rows_of(LM, 3)
    assert written(LM, rows, spec) == written(LM, rows, spec, use_cache=False)


@settings(max_examples=20)
@given(specs)
def test_a_static_cache_and_a_prompt_in_chunks_change_nothing(spec: SteeringSpec) -> None:
    rows = rows_of(LM, 3)
    plain = written(LM, rows, spec)
    assert written(LM, rows, spec, cache_implementation="static") == plain
    assert written(LM, rows, spec, prefill_chunk_size=5) == plain


def test_a_compiled_model_is_steered_alike() -> None:
    lm = tiny_model(seed=3)
    ids = torch.tensor([rows_of(lm)[1]])
    spec = SteeringSpec((Edit("layers.1", "s", (3,), 8.0), Edit("layers.2", "t", (5, 6), 4.0, "floor")))
    compiled: Any = torch.compile(lm.model, backend="eager")
    with torch.no_grad():
        before = compiled(ids).logits
        with steer(lm, spec, SAES):
            plain = lm.model(ids).logits
            assert torch.allclose(compiled(ids).logits, plain, atol=1e-5)
        assert torch.allclose(compiled(ids).logits, before, atol=1e-5)
    assert not torch.allclose(before, plain, atol=1e-2)


def test_a_model_with_blocks_kept_on_disk_is_steered_alike(tmp_path: Path) -> None:
    lm = tiny_model()
    lm.model.save_pretrained(tmp_path / "model")
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    ids = torch.tensor([rows_of(lm)[1]])
    spec = SteeringSpec((Edit("layers.1", "s", (3, 40), 8.0),))
    with torch.no_grad():
        with steer(lm, spec, SAES):
            plain = lm.model(ids).logits
        with steer(spread, spec, SAES):
            assert torch.equal(spread(ids).logits, plain)


def test_beams_and_samples_carry_their_rows_spec() -> None:
    rows = rows_of(LM, 3)
    mix = [SteeringSpec((Edit("layers.1", "s", (latent,), 9.0),)) for latent in (3, 40)]
    specs = [mix[0], None, mix[1]]
    for options in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        each = options.get("num_return_sequences", 1)
        together = written(LM, rows, specs, **options)
        alone = [written(LM, [row], one or SteeringSpec(), **options) for row, one in zip(rows, specs, strict=True)]
        assert together == [ids for group in alone for ids in group]
        assert len(together) == 3 * each
    # a sample of a model so steered that one token has all the probability is that token
    torch.manual_seed(0)
    cold = {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 2, "top_k": 0}
    sampled = written(LM, rows, specs, **cold)
    greedy = written(LM, rows, specs)
    assert sampled == [ids for ids in greedy for _ in range(2)]

    def gated(where: Where) -> SteeringSpec:
        return SteeringSpec(mix[0].edits, gate=LatentGate("layers.0", "s", 3, 0.1, positions=Positions(where)))

    with pytest.raises(InputError, match="cannot follow beams"):
        written(LM, rows, gated("generation"), num_beams=2)
    assert written(LM, rows, gated("prompt"), num_beams=2)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_is_steered_exactly_and_in_bfloat16_closely(kind: str) -> None:
    lm = tiny_model(kind)
    spec = SteeringSpec((Edit("layers.1", "s", (3, 17), 6.0), DirectionEdit("layers.1", DIRECTION.hash, 0.5)))
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        lm.model.to(dtype)
        batch = pad(lm, rows_of(lm), side="left")
        before, after = residuals(lm, spec, batch.ids, batch.mask)
        where = (batch.mask.cumsum(-1) > 1) & (batch.mask == 1)
        wanted = expected(before[where].float(), spec, AT, SAES, DIRECTIONS)
        assert relative(after[where][wanted.decidable], wanted.residual[wanted.decidable]) < limit
        assert torch.equal(before[~where], after[~where])


def residuals(lm: LanguageModel, spec: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []

    def look(residual: Tensor, step: Step) -> Tensor:
        seen.append(residual.clone())
        return residual

    with (
        torch.no_grad(),
        attach(lm.model, AT, look),
        steer(lm, spec, SAES, directions=DIRECTIONS, gates=GATES),
        attach(lm.model, AT, look),
    ):
        lm.model(ids, attention_mask=mask)
    return seen[0], seen[1]


def changed(spec: SteeringSpec, ids: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
    if lengths is None:
        before, after = residuals(LM, spec, ids, mask)
    else:
        with prompt_lengths(LM.model, lengths):
            before, after = residuals(LM, spec, ids, mask)
    return (before != after).any(-1)


def test_positions_name_the_tokens_they_say() -> None:
    row = rows_of(LM)[1]
    ids = torch.tensor([row])
    n, prompt = len(row), len(row) - 6
    edit = (Edit("layers.1", "s", (3,), 9.0),)

    def found(looks: Positions, skip_first: bool = False) -> list[int]:
        where = changed(SteeringSpec(edit, looks, skip_first=skip_first), ids, lengths=torch.tensor([prompt]))
        return where[0].nonzero().flatten().tolist()

    everything = list(range(n))
    assert found(Positions()) == everything
    assert found(Positions(), skip_first=True) == everything[1:]
    assert found(Positions(every=3)) == everything[::3]
    assert found(Positions("prompt")) == everything[:prompt]
    assert found(Positions("generation")) == everything[prompt:]
    assert found(Positions("generation", first=2)) == everything[prompt : prompt + 2]
    assert found(Positions("generation", every=2)) == everything[prompt::2]
    assert found(Positions("last_prompt_token")) == [prompt - 1]
    assert found(Positions("answer")) == everything[prompt - 1 :]
    assert found(Positions("answer", first=3)) == everything[prompt - 1 : prompt + 2]
    assert found(Positions("answer", every=2)) == everything[prompt - 1 :: 2]


def test_a_gate_is_causal_and_padding_on_the_right_cannot_open_it() -> None:
    row = rows_of(LM)[1]
    sae = SAES["t"]
    active = sae.encode(read(LM.model, Hookpoint(0), torch.tensor([row])).residual[0])
    largest = active.argmax(0)
    # a latent whose largest activation comes in the middle
    latent = next(i for i in range(96) if 3 < largest[i] < len(row) - 3 and active[:, i].max() > 0)
    opens = int(largest[latent])
    gate = LatentGate("layers.0", "t", latent, float(active[:, latent].max()) * 0.999)
    spec = SteeringSpec((Edit("layers.1", "s", (3,), 9.0),), gate=gate)
    assert changed(spec, torch.tensor([row]))[0].tolist() == [place >= opens for place in range(len(row))]
    shut = SteeringSpec(spec.edits, gate=LatentGate("layers.0", "t", latent, float(active[:, latent].max()) * 1.01))
    assert not changed(shut, torch.tensor([row])).any()
    # whatever stands behind a row, told as padding or not, its own tokens are steered alike
    behind = torch.tensor([row + [5] * 4, row + row[:4]])
    mask = torch.tensor([[1] * len(row) + [0] * 4] * 2)
    for one in (None, mask):
        assert changed(spec, behind, one)[:, : len(row)].tolist() == [[place >= opens for place in range(len(row))]] * 2
    assert not changed(spec, behind, mask)[:, len(row) :].any()


def test_a_gate_starts_afresh_with_every_call() -> None:
    opening, other = [5, 3, 10, 9], [5, 4, 9, 9]  # 3 and 10 open it, being 3 modulo 7
    spec = SteeringSpec((Edit("layers.1", "s", (3,), 9.0),), gate=NamedGate("layers.0", "odd"))
    model: Any = LM.model
    with steer(LM, spec, SAES, gates=GATES) as steering, torch.no_grad():
        model(torch.tensor([opening]))
        first = steering.counts()[0].changed
        model(torch.tensor([other]))
        assert steering.counts()[0].changed == first == [3]


def test_counts_are_those_of_the_rows() -> None:
    rows = rows_of(LM, 3)
    edit = Edit("layers.1", "s", (3,), 9.0)
    specs = [SteeringSpec((edit,)), None, SteeringSpec((Edit("layers.1", "s", (3, 4), 2.0),), Positions("generation"))]
    batch = pad(LM, rows, side="left")
    model: Any = LM.model
    with steer(LM, specs, SAES) as steering, torch.no_grad():
        model.generate(
            input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=5, min_new_tokens=5, do_sample=False,
            pad_token_id=LM.pad_id,
        )  # fmt: skip
    three, four = steering.counts()
    # the last written token is never read back
    assert three.steered == [len(rows[0]) - 1 + 4, 0, 4]
    assert four.steered == [0, 0, 4]
    assert three.changed == three.steered
    norm = float(SAES["s"].W_dec[3].norm())
    assert 0 < three.mean_norm[0] <= 9 * norm + 1e-4
    assert three.mean_norm[1] == 0
    same = [answer.ids for answer in generate(LM, rows, 5)]
    with steer(LM, specs[0] or SteeringSpec(), SAES) as shared:
        generate(LM, rows, 5)
    assert [count > len(row) for count, row in zip(shared.counts()[0].steered, rows, strict=True)] == [True] * 3
    assert same == [answer.ids for answer in generate(LM, rows, 5)]


def test_what_cannot_be_steered_is_one_sentence() -> None:
    edit = Edit("layers.1", "s", (3,), 9.0)
    ids = torch.tensor([rows_of(LM)[0]])

    def run(spec: Any, model: Any = LM, **more: Any) -> None:
        with steer(model, spec, SAES, directions=DIRECTIONS, **more):
            LM.model(ids)

    with pytest.raises(InputError, match="2 specs were given, one for each row, but the batch has 1 rows"):
        run([SteeringSpec((edit,)), None])
    with pytest.raises(InputError, match="no spec was given"):
        run([])
    with pytest.raises(InputError, match=r"comes after the edit at layers\.1"):
        run(SteeringSpec((edit,), gate=LatentGate("layers.2", "s", 1, 0.5)))
    with pytest.raises(InputError, match="wants the gate 'odd', but none was given"):
        run(SteeringSpec((edit,), gate=NamedGate("layers.0", "odd")))
    with pytest.raises(InputError, match="need the chat template; give steer a LanguageModel"):
        run(SteeringSpec((edit,), Positions("user")), LM.model)
    with pytest.raises(InputError, match="two SAEs at layers"):
        run(SteeringSpec((edit, Edit("layers.1", "t", (3,), 1.0)), mode="reconstruct"))
    with pytest.raises(MismatchError, match="wants the direction nobody"):
        run(SteeringSpec((DirectionEdit("layers.1", "nobody"),)))
    sae = random_sae("relu")
    assert sae.reference is not None
    sae.reference.max_act[3] = 0
    with pytest.raises(InputError, match="latent 3 never fired"):
        sae.in_units([3], 1.0, "max_act")


def test_rows_under_few_specs_share_their_beginning_and_equal_single_rows() -> None:
    """Each spec's rows have what all rows begin with in common; gates, turns and counts follow every row."""
    asks = ("Hi", "How do I make a cake?", "What is blue?", "I'm sorry", "Hello there, the answer")
    system = Message("system", "Hello there. I can't help with that, sorry. How do I make a cake?")
    rows = [chat_ids(LM, [system, Message("user", text)]) for text in asks]
    clamp = SteeringSpec((Edit("layers.1", "s", (3, 5), value=6),))
    gate = LatentGate("layers.1", "s", 7, 0.01, positions=Positions("user"))
    gated = SteeringSpec((Edit("layers.1", "s", (9,), value=8),), positions=Positions("user"), gate=gate)
    specs = [clamp, gated, None, clamp, gated]
    alone: list[list[int]] = []
    counted: dict[str, list[tuple[int, int]]] = {}
    for row, spec in zip(rows, specs, strict=True):
        with steer(LM, spec or SteeringSpec(), SAES) as steering:
            alone.append(generate(LM, [row], 12)[0].ids)
        for slot in steering.counts():
            counted.setdefault(slot.name, []).append((slot.steered[0], slot.changed[0]))
    with steer(LM, specs, SAES) as steering:
        together = [answer.ids for answer in generate(LM, rows, 12)]
    assert together == alone
    for slot in steering.counts():
        found = [pair for pair in zip(slot.steered, slot.changed, strict=True) if pair != (0, 0)]
        assert found == [pair for pair in counted[slot.name] if pair != (0, 0)]
