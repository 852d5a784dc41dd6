"""The model room on tiny random models of every architecture: hookpoints, reading, resuming, generating."""

import pytest
import torch

from demur.errors import InputError
from demur.lm.attach import Step, attach
from demur.lm.batches import batches, pad
from demur.lm.chat import chat_ids, chat_text
from demur.lm.generate import generate
from demur.lm.hookpoints import block_at, blocks
from demur.lm.load import LanguageModel
from demur.lm.record import read, read_all, resume
from demur.lm.score import log_probs_from, read_padded
from demur.testing import ARCHITECTURES, tiny_model
from demur.types import Hookpoint, Message, parse_hookpoint

AT = Hookpoint(1)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(request.param)


def ids_of(lm: LanguageModel, *texts: str) -> list[list[int]]:
    return [chat_ids(lm, [Message("system", "Be safe and kind."), Message("user", text)]) for text in texts]


@pytest.mark.parametrize(
    "text",
    ["layers.12.resid_post", "layers.12", "blocks.12.hook_resid_post", "model.layers.12", "transformer.h.12", "h.12",
     "gpt_neox.layers.12", "model.layers.12.output", "12", "blocks.13.hook_resid_pre", " layers.12 "],
)  # fmt: skip
def test_every_notation_names_the_same_place(text: str) -> None:
    assert str(parse_hookpoint(text)) == "layers.12.resid_post"
    assert parse_hookpoint(str(parse_hookpoint(text))) == Hookpoint(12)


@pytest.mark.parametrize("text", ["", "layers", "layers.-1", "blocks.0.hook_resid_pre", "layers.3.mlp", "head.3"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not understood"):
        parse_hookpoint(text)


def test_hookpoint_outside_the_model(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="outside the model, which has 3 blocks"):
        block_at(lm.model, Hookpoint(3))


def test_read_is_the_hidden_state_after_the_block(lm: LanguageModel) -> None:
    ids = torch.tensor([ids_of(lm, "Hello")[0]])
    states = lm.model(ids, output_hidden_states=True).hidden_states
    for block in range(lm.n_blocks - 1):  # the last entry is after the final norm
        torch.testing.assert_close(read(lm.model, Hookpoint(block), ids).residual, states[block + 1])


def test_read_all_is_read_at_every_block_and_leaves_no_hook(lm: LanguageModel) -> None:
    rows = pad(lm, ids_of(lm, "Hi", "A much longer question about cakes"), side="right")
    before = [list(block._forward_hooks) for block in blocks(lm.model)]  # transformers leaves some of its own
    every = read_all(lm.model, rows.ids, rows.mask)
    assert [list(block._forward_hooks) for block in blocks(lm.model)] == before
    assert len(every) == lm.n_blocks
    for block, residual in enumerate(every):
        assert torch.equal(residual, read(lm.model, Hookpoint(block), rows.ids, rows.mask).residual)


def test_a_reader_sees_the_unedited_residual_and_the_edit_is_not_in_place(lm: LanguageModel) -> None:
    ids = torch.tensor([ids_of(lm, "Hello")[0]])
    plain = read(lm.model, AT, ids).residual.clone()
    seen: list[torch.Tensor] = []

    def look(residual: torch.Tensor, step: Step) -> torch.Tensor:
        seen.append(residual)
        return residual

    with attach(lm.model, AT, look), attach(lm.model, AT, lambda residual, step: residual + 1):
        lm.model(ids)
    torch.testing.assert_close(seen[0], plain)


def test_resume_equals_a_whole_pass_with_and_without_an_edit(lm: LanguageModel) -> None:
    rows = pad(lm, ids_of(lm, "Hi", "A much longer question about cakes"), side="left")
    reading = read_padded(lm, AT, rows)
    positions = (rows.mask.cumsum(-1) - 1).clamp(min=0)
    for edit in (lambda residual, step: residual, lambda residual, step: residual * 1.5 + 1):
        with attach(lm.model, AT, edit):
            whole = lm.model(rows.ids, attention_mask=rows.mask, position_ids=positions, use_cache=False).logits
            part = log_probs_from(lm, AT, rows, reading, last=4)
        torch.testing.assert_close(part, whole[:, -4:].log_softmax(-1), atol=1e-5, rtol=1e-4)


def test_resume_restores_the_model_after_an_error(lm: LanguageModel) -> None:
    ids = torch.tensor([ids_of(lm, "Hello")[0]])
    before = lm.model(ids).logits
    reading = read(lm.model, AT, ids)
    with pytest.raises(RuntimeError, match="inside"), resume(lm.model, AT, reading):
        raise RuntimeError("inside")
    assert torch.equal(lm.model(ids).logits, before)
    assert all("forward" not in vars(block) for block in blocks(lm.model))


def test_resume_puts_back_what_others_had_put_in_place_of_forward() -> None:
    lm = tiny_model()
    ids = torch.tensor([ids_of(lm, "Hello")[0]])
    block = blocks(lm.model)[0]
    theirs = block.forward
    block.forward = theirs  # as accelerate does
    with resume(lm.model, AT, read(lm.model, AT, ids)):
        pass
    assert vars(block)["forward"] is theirs


def test_positions_are_absolute_with_and_without_a_cache(lm: LanguageModel) -> None:
    seen: list[list[list[int]]] = []

    def look(residual: torch.Tensor, step: Step) -> torch.Tensor:
        assert step.positions.shape == residual.shape[:2]
        seen.append(step.positions.tolist())
        return residual

    rows = ids_of(lm, "Hi", "Hello there you")
    padded = pad(lm, rows, side="left")
    with attach(lm.model, AT, look):
        lm.model.generate(
            input_ids=padded.ids,
            attention_mask=padded.mask,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
        )
    short, long = map(len, rows)
    assert seen[0] == [[-1] * (long - short) + list(range(short)), list(range(long))]
    assert seen[1:] == [[[short], [long]], [[short + 1], [long + 1]]]


def test_a_batch_with_a_shared_prefix_equals_single_rows_and_plain_hf(lm: LanguageModel) -> None:
    rows = ids_of(lm, "Hi", "How do I make a cake?", "Hello there, what is blue and what is not?")
    together = generate(lm, rows, 8)
    for row, answer in zip(rows, together, strict=True):
        assert generate(lm, [row], 8)[0] == answer
        ids = torch.tensor([row])
        plain = lm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=2,
        )
        assert plain[0, len(row) :].tolist()[: len(answer.ids)] == answer.ids


def test_greedy_whatever_the_models_own_settings_say() -> None:
    lm = tiny_model()
    row = ids_of(lm, "Hi")[0]
    before = generate(lm, [row], 8)
    for name, value in {
        "repetition_penalty": 5.0,
        "do_sample": True,
        "num_beams": 3,
        "no_repeat_ngram_size": 1,
    }.items():
        setattr(lm.model.generation_config, name, value)
    assert generate(lm, [row], 8) == before


def test_a_mask_that_says_nothing_of_padding_is_refused() -> None:
    lm = tiny_model()
    ids = torch.tensor([ids_of(lm, "Hi")[0]])
    mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
    with attach(lm.model, AT, lambda residual, step: residual), pytest.raises(InputError, match="attention mask"):
        lm.model(ids, attention_mask=mask)


def test_template_without_a_system_role(lm: LanguageModel) -> None:
    template = lm.tokenizer.chat_template
    try:
        lm.tokenizer.chat_template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + template
        )
        text = chat_text(lm, [Message("system", "Be safe."), Message("user", "Hi")])
    finally:
        lm.tokenizer.chat_template = template
    assert "Be safe.\n\nHi" in text


def test_a_model_without_a_chat_template_is_refused(lm: LanguageModel) -> None:
    template = lm.tokenizer.chat_template
    try:
        lm.tokenizer.chat_template = None
        with pytest.raises(InputError, match="no chat template"):
            chat_text(lm, [Message("user", "Hi")])
    finally:
        lm.tokenizer.chat_template = template


def test_batches_are_stable_and_sorted() -> None:
    made = batches([3, 9, 3, 5], 2)
    assert made == [[1, 3], [0, 2]]
    assert sorted(i for batch in made for i in batch) == [0, 1, 2, 3]
