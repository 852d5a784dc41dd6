"""Specs for other tools: what is written, what is refused, and that weaker refusals are never exported."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from tiny_study import save_model
from torch import Tensor

import demur.verbs.export as verb
from demur.cli.main import main
from demur.data.prompts import load_prompts, take
from demur.errors import InputError, MismatchError, NotFoundError
from demur.lm.chat import chat_ids, with_system
from demur.lm.generate import generate
from demur.lm.hookpoints import blocks
from demur.lm.load import LanguageModel
from demur.record import to_json
from demur.sae.base import Reference
from demur.sae.store import SaeConfig, SaeModel, load_sae, save_sae
from demur.spec import DirectionEdit, Edit, LatentGate, Positions, SteeringSpec
from demur.steering.added import added_spec, added_vectors
from demur.steering.direction import Direction
from demur.steering.gguf import ControlVector, read_control_vector, write_control_vector
from demur.steering.lm_eval import read_steered, steered_entries, write_steered
from demur.steering.spec_file import write_spec
from demur.steering.steer import steer
from demur.testing import ARCHITECTURES, tiny_model, tiny_sae
from demur.types import SAFETY_SYSTEM_PROMPT, Completion, Label, Prompt, Verdict
from demur.verbs.config import Export, Steered
from demur.verbs.export import Refusals, export

SAE = tiny_sae()
SAE.reference = Reference(torch.full((96,), 3.0), torch.full((96,), 0.5), torch.zeros(96), torch.tensor(0.0))
SAES = {"s": SAE}
V = Direction(torch.arange(32.0) - 9, "layers.2.resid_post", sigma=1.5)
ADD = Edit("layers.1.resid_post", "s", (3, 40), 2.0, "add")
MANY = SteeringSpec(
    (
        ADD,
        Edit("layers.1.resid_post", "s", (5,), -0.5, "add", "max_act"),
        DirectionEdit("layers.1.resid_post", V.hash, 0.3),
        DirectionEdit("layers.2.resid_post", V.hash, -2, unit="sigma"),
    )
)
IDS = torch.tensor([[1, 9, 40, 77, 130, 12, 260, 8]])


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_model()


def hooked(lm: LanguageModel, vectors: dict[int, Tensor]) -> Tensor:
    """Logits as llama.cpp and lm-eval make them: the vector added to the block's output at every token."""

    def adds(vector: Tensor) -> Any:
        def hook(module: object, arguments: object, output: Any) -> Any:
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        return hook

    handles = [blocks(lm.model)[block].register_forward_hook(adds(vector)) for block, vector in vectors.items()]
    try:
        return lm.model(IDS).logits.detach()
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_vectors_do_what_the_spec_does(model_type: str) -> None:
    lm = tiny_model(model_type)
    vectors = added_vectors(lm.model, MANY, SAES, [V])
    assert list(vectors) == [1, 2]
    assert all(vector.shape == (32,) and vector.dtype == torch.float32 for vector in vectors.values())
    with steer(lm.model, replace(MANY, skip_first=False), SAES, directions=[V]):
        steered = lm.model(IDS).logits
    assert not torch.allclose(steered, lm.model(IDS).logits, atol=1e-2)
    torch.testing.assert_close(hooked(lm, vectors), steered, atol=1e-4, rtol=1e-4)


def test_the_arithmetic_by_hand(lm: LanguageModel) -> None:
    vectors = added_vectors(lm.model, MANY, SAES, [V])
    at_1 = 2 * SAE.W_dec[3] + 2 * SAE.W_dec[40] - 0.5 * 3.0 * SAE.W_dec[5] + 0.3 * V.vector
    torch.testing.assert_close(vectors[1], at_1)
    torch.testing.assert_close(vectors[2], -2 * 1.5 * V.vector / V.vector.norm())


def test_a_spec_that_skips_the_first_token_differs_there_only(lm: LanguageModel) -> None:
    last = SteeringSpec((replace(ADD, hookpoint="layers.2.resid_post"),))
    vectors = added_vectors(lm.model, last, SAES)
    with steer(lm.model, last, SAES):
        steered = lm.model(IDS).logits
    differs = (hooked(lm, vectors) - steered).abs().amax(-1)[0]
    assert differs[0] > 1e-2
    assert differs[1:].max() < 1e-4


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (SteeringSpec(), "the spec has no edits"),
        (SteeringSpec((ADD,), system="Be safe."), "the spec has a system prompt"),
        (SteeringSpec((ADD,), gate=LatentGate("layers.0.resid_post", "s", 1, 0.5)), "the spec has a gate"),
        (SteeringSpec((ADD,), Positions("generation", first=4)), "steers positions generation, first 4"),
        (SteeringSpec((ADD,), Positions(every=2)), "steers every 2 tokens of positions all"),
        (SteeringSpec((ADD,), mode="reconstruct"), "the spec is in reconstruct mode"),
        *(
            (SteeringSpec((replace(ADD, op=op, value=0.0 if op == "ablate" else 2.0),)), f"the spec has the op {op} at")
            for op in ("clamp", "floor", "ceil", "scale", "ablate")
        ),
        (SteeringSpec((DirectionEdit("layers.1", V.hash, op="project_out"),)), "the spec has the op project_out at"),
        (SteeringSpec((ADD, replace(ADD, latents=(7,), op="clamp"))), "the spec has the op clamp at"),
        (SteeringSpec((replace(ADD, sae="normal"),)), "the SAE normal normalises each token"),
        (SteeringSpec((replace(ADD, latents=(96,)),)), "latent 96 does not exist"),
        (SteeringSpec((replace(ADD, hookpoint="layers.3.resid_post"),)), "is outside the model"),
        (SteeringSpec((replace(ADD, sae="none"),)), "the spec wants the SAE none"),
        (SteeringSpec((DirectionEdit("layers.1", "none"),)), "the spec wants the direction none"),
    ],
)
def test_what_is_no_constant_vector_is_refused(lm: LanguageModel, spec: SteeringSpec, sentence: str) -> None:
    normal = tiny_sae()
    normal.normalize = "layer_norm"
    with pytest.raises((InputError, MismatchError), match=sentence):
        added_vectors(lm.model, spec, {**SAES, "normal": normal}, [V])


def test_a_control_vector_comes_back(lm: LanguageModel, tmp_path: Path) -> None:
    vectors = added_vectors(lm.model, MANY, SAES, [V])
    path = tmp_path / "deep/refuse.gguf"
    write_control_vector(path, ControlVector(vectors, "llama", MANY.hash))
    read = read_control_vector(path)
    assert (read.model_hint, read.spec) == ("llama", MANY.hash)
    assert [path.name for path in path.parent.iterdir()] == ["refuse.gguf"]
    assert list(read.vectors) == [1, 2]
    assert all(torch.equal(read.vectors[block], vectors[block]) for block in vectors)
    spec, directions = added_spec(read.vectors, "a GGUF file")
    again = added_vectors(lm.model, spec, directions=directions)
    torch.testing.assert_close(again, vectors)
    with steer(lm.model, spec, directions=directions):
        steered = lm.model(IDS).logits
    torch.testing.assert_close(steered, hooked(lm, vectors), atol=1e-4, rtol=1e-4)


def test_a_control_vector_is_what_llama_cpp_reads(lm: LanguageModel, tmp_path: Path) -> None:
    """One-dimensional F32 tensors named direction.k with k > 0, and the keys that other writers give."""
    write_control_vector(tmp_path / "v.gguf", ControlVector({2: V.vector}, "llama"))
    reader = GGUFReader(tmp_path / "v.gguf")
    (tensor,) = reader.tensors
    assert (tensor.name, tensor.tensor_type.name, tensor.shape.tolist()) == ("direction.2", "F32", [32])
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert found == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 1,
    }


def test_control_vectors_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steers block 0, for which a GGUF control vector has no name"):
        ControlVector({0: V.vector, 1: V.vector})
    with pytest.raises(InputError, match="expected one shape"):
        ControlVector({1: V.vector, 2: V.vector[:4]})
    with pytest.raises(NotFoundError, match="does not exist"):
        read_control_vector(tmp_path / "none.gguf")
    whole = tmp_path / "whole.gguf"
    write_control_vector(whole, ControlVector({1: V.vector}))
    for name, data in (("empty", b""), ("text", b"no such thing" * 9), ("cut", whole.read_bytes()[:-40])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match="is not a whole GGUF file"):
            read_control_vector(tmp_path / name)
    for architecture, tensor, sentence in (
        ("llama", "direction.1", "is a GGUF file of architecture 'llama'"),
        ("controlvector", "direction.0", "holds 'direction.0' of type F32"),
        ("controlvector", "blk.1", "holds 'blk.1' of type F32"),
        ("controlvector", "", "holds no direction"),
    ):
        writer = GGUFWriter(tmp_path / "other.gguf", architecture)
        if tensor:
            writer.add_tensor(tensor, V.vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(InputError, match=sentence):
            read_control_vector(tmp_path / "other.gguf")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_lm_eval_file_comes_back_and_names_the_blocks(model_type: str, tmp_path: Path) -> None:
    lm = tiny_model(model_type)
    vectors = added_vectors(lm.model, MANY, SAES, [V])
    entries = steered_entries(lm.model, vectors)
    # where lm-eval looks for them
    modules = dict(lm.model.base_model.named_modules())
    assert [modules[name] for name in entries] == [blocks(lm.model)[block] for block in (1, 2)]
    write_steered(tmp_path / "refuse.pt", entries)
    stored = torch.load(tmp_path / "refuse.pt", weights_only=True)
    for entry, vector in zip(stored.values(), vectors.values(), strict=True):
        assert torch.equal(entry.pop("steering_vector"), vector)
        assert entry == {"action": "add", "steering_coefficient": 1.0, "bias": None}
    spec, directions = read_steered(tmp_path / "refuse.pt")
    assert not spec.skip_first
    torch.testing.assert_close(added_vectors(lm.model, spec, directions=directions), vectors)


def test_coefficients_and_older_entries_are_read(lm: LanguageModel, tmp_path: Path) -> None:
    entry = {"action": "add", "steering_coefficient": 4, "steering_vector": V.vector.bfloat16()}
    torch.save({"h.2": entry}, tmp_path / "v.pt")
    spec, directions = read_steered(tmp_path / "v.pt")
    assert spec.edits[0].hookpoint == "layers.2.resid_post"
    torch.testing.assert_close(added_vectors(lm.model, spec, directions=directions)[2], 4 * V.vector)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"layers.1": {"action": "clamp"}}, "has the action 'clamp'"),
        ({"layers.1": {"head_index": 3}}, "steers one attention head"),
        ({"layers.1": {"steering_coefficient": float("inf")}}, "has the coefficient inf"),
        ({"layers.1": {"steering_vector": torch.ones(2, 3)}}, r"has a vector of \[2, 3\]"),
        ({"layers.1": {"steering_vector": [1.0]}}, "has a vector of list"),
        ({"layers.1.mlp": {}}, "hookpoint 'layers.1.mlp' is not understood"),
        ({"layers.1": {}, "blocks.1.hook_resid_post": {}}, "names block 1 twice"),
        ({}, "holds a dict"),
        ([{"hookpoint": "layers.1"}], "holds a list"),
    ],
)
def test_other_lm_eval_files_are_refused(content: Any, sentence: str, tmp_path: Path) -> None:
    good = {"action": "add", "steering_coefficient": 1.0, "steering_vector": V.vector, "bias": None}
    if isinstance(content, dict):
        content = {name: {**good, **entry} for name, entry in content.items()}
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(InputError, match=sentence):
        read_steered(tmp_path / "v.pt")


def test_code_and_damage_in_lm_eval_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "v.pt"
    with pytest.raises(NotFoundError, match="does not exist"):
        read_steered(path)
    buffer = io.BytesIO()
    torch.save({"layers.1": V.vector}, buffer)
    evil = io.BytesIO()
    torch.save({"layers.1": Malicious()}, evil)
    for data in (b"", b"text", buffer.getvalue()[:-60], pickle.dumps(Malicious()), evil.getvalue()):
        path.write_bytes(data)
        with pytest.raises(InputError, match="is not a file of tensors and plain values"):
            read_steered(path)
    torch.save({"layers.1": V.vector}, path)
    with pytest.raises(InputError, match="is no entry of lm-eval's"):
        read_steered(path)
    assert "never run" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, lm: LanguageModel) -> Path:
    """A model folder, an SAE folder and specs."""
    folder = tmp_path_factory.mktemp("export")
    save_model(lm, folder / "model")
    save_sae(folder / "sae", SAE, SaeConfig(32, 96, 8, "layers.1.resid_post", SaeModel(lm.name, lm.fingerprint, 3)))
    edit = replace(ADD, sae=load_sae(folder / "sae").hash)
    for name, spec in {
        "add": SteeringSpec((edit,)),
        "two": SteeringSpec((edit, replace(edit, hookpoint="layers.2.resid_post")), skip_first=False),
        "first": SteeringSpec((replace(edit, hookpoint="layers.0.resid_post"),)),
        "clamp": SteeringSpec((replace(edit, op="clamp"),)),
    }.items():
        write_spec(folder / f"{name}.json", spec)
    return folder


def asked(folder: Path, out: Path, spec: str = "add", model: str = "", system: str = "") -> Export:
    steered = Steered(
        model=model or str(folder / "model"), spec=folder / f"{spec}.json", sae=(str(folder / "sae"),), system=system
    )
    return Export(out, steered)


def counted(monkeypatch: pytest.MonkeyPatch, before: list[Label], after: list[Label]) -> None:
    monkeypatch.setattr(verb, "refusals", lambda *arguments: Refusals(before, after))


STRONGER: tuple[list[Label], list[Label]] = (
    ["refused", "complied", "complied", "unscored"],
    ["refused", "refused", "partial", "refused"],
)


def test_a_stronger_spec_is_exported(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch, *STRONGER)
    done = export(asked(folder, tmp_path / "v.gguf"))
    assert (done.format, done.blocks) == ("gguf", (1,))
    assert done.system == SAFETY_SYSTEM_PROMPT
    # the prompt that is unscored before is in neither denominator; a partial refusal is none
    assert (done.refused_before.k, done.refused_before.n) == (1, 3)
    assert (done.refused_after.k, done.refused_after.n) == (2, 3)
    assert "first token" in done.notes[0]
    assert "--control-vector" in done.notes[1]
    read = read_control_vector(tmp_path / "v.gguf")
    assert (read.model_hint, read.spec) == ("llama", done.spec)
    assert json.loads(json.dumps(to_json(done)))["blocks"] == [1]

    done = export(asked(folder, tmp_path / "v.pt", "two", system="Be kind."))
    assert (done.format, done.blocks, done.system) == ("lm-eval", (1, 2), "Be kind.")
    assert done.notes == ("lm-eval before 0.4.9.2 adds the last block's vector at every block; use a later one.",)
    assert len(read_steered(tmp_path / "v.pt").directions) == 2


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (["refused", "complied"], ["refused", "complied"], "1 of 2 harmful prompts with the spec and 1 of 2 without"),
        (["refused", "refused"], ["complied", "refused"], "1 of 2 harmful prompts with the spec and 2 of 2 without"),
        (["complied", "complied"], ["degenerate", "degenerate"], "refuses 0 of 2 harmful prompts with the spec"),
        (["complied", "complied"], ["partial", "complied"], "refuses 0 of 2 harmful prompts with the spec"),
        (["unscored", "complied"], ["refused", "complied"], "refuses 0 of 1 harmful prompts with the spec"),
        (["unscored"], ["unscored"], "refuses 0 of 0 harmful prompts with the spec"),
    ],
)
@pytest.mark.parametrize("out", ["v.gguf", "v.pt"])
def test_what_does_not_refuse_more_is_not_exported(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: list[Label],
    after: list[Label],
    sentence: str,
    out: str,
) -> None:
    counted(monkeypatch, before, after)
    with pytest.raises(InputError, match=sentence):
        export(asked(folder, tmp_path / "new" / out))
    assert not list(tmp_path.iterdir())


class Reader:
    """A judge that takes every other text for a refusal, and remembers what it was asked."""

    name = "test/1"
    seen: list[tuple[str, Completion]]

    def judge(self, prompt: Prompt, completion: Completion) -> Verdict:
        self.seen.append((prompt.intent + prompt.split, completion))
        return Verdict(prompt.id, completion.spec, "refused" if len(self.seen) > 16 else "complied", self.name)


def test_the_model_answers_with_and_without_what_the_file_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Reader.seen = []
    monkeypatch.setattr(verb, "RulesJudge", Reader)
    done = export(asked(folder, tmp_path / "v.pt"))
    assert (done.refused_before.k, done.refused_after.k, done.refused_after.n, done.judge) == (0, 16, 16, "test/1")
    assert {kind for kind, _ in Reader.seen} == {"harmfulselect"}
    before, after = Reader.seen[:16], Reader.seen[16:]
    assert [one.prompt for _, one in before] == [one.prompt for _, one in after]
    assert {one.spec for _, one in before} == {"unsteered"}
    # what a reader of the file does, the first token included
    spec, directions = read_steered(tmp_path / "v.pt")
    lm = tiny_model()
    prompts = take(load_prompts("harmful", "harmful"), "select", 16)
    rows = {p.id: chat_ids(lm, with_system(p, SAFETY_SYSTEM_PROMPT)) for p in prompts}
    assert set(rows) == {one.prompt for _, one in after}
    _, one = after[0]
    with steer(lm, spec, directions=directions):
        assert generate(lm, [rows[one.prompt]], 20)[0].text == one.text
    assert [one.text for _, one in before] != [one.text for _, one in after]


def test_random_text_is_no_refusal(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"refuses 0 of \d+ harmful prompts with the spec and 0 of"):
        export(asked(folder, tmp_path / "v.gguf"))
    assert not list(tmp_path.iterdir())


def test_mistakes_are_told_before_a_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    for out, spec, sentence in (
        ("v.csv", "add", "neither loads demur's; write a .pt file"),
        ("v.safetensors", "add", r"has the ending '.safetensors'; expected .gguf for llama.cpp or .pt for lm-eval"),
        ("v.gguf", "clamp", "the spec has the op clamp"),
    ):
        with pytest.raises(InputError, match=sentence):
            export(asked(folder, tmp_path / out, spec, model="no/such/model"))
    with pytest.raises(InputError, match="--latent makes a clamp"):
        export(Export(tmp_path / "v.gguf", Steered(model="no/such/model", latent=3)))
    with pytest.raises(InputError, match="no spec was given"):
        export(Export(tmp_path / "v.gguf", Steered(model="no/such/model")))


def test_what_a_format_cannot_say_is_told_before_the_model_answers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "refusals", lambda *arguments: pytest.fail("asked the model"))
    with pytest.raises(InputError, match="block 0, for which a GGUF control vector has no name"):
        export(asked(folder, tmp_path / "v.gguf", "first"))
    counted(monkeypatch, *STRONGER)
    assert export(asked(folder, tmp_path / "v.pt", "first")).blocks == (0,)


def test_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--model", str(folder / "model"), "--sae", str(folder / "sae")]
    words += ["--spec", str(folder / "add.json"), "--out", str(tmp_path / "v.gguf")]
    counted(monkeypatch, *STRONGER)
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["refused_after"]["k"] == 2
    assert "harmful prompts refused: 1 of 3 without the spec, 2 of 3 with it" in said.err
    assert f"gguf file: {tmp_path / 'v.gguf'}" in said.err
    (tmp_path / "v.gguf").unlink()
    counted(monkeypatch, *reversed(STRONGER))
    assert main(words) == 1
    assert "exports only what makes a model refuse more" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
