"""The spec: what it accepts, its file and schema, composition, directions on disk, and `demur verify`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tiny_study import save_model

import demur.steering.layer
from demur.cli.main import main
from demur.errors import InputError, NotFoundError
from demur.record import to_json
from demur.sae.store import SaeConfig, SaeModel, load_sae, save_sae
from demur.spec import DirectionEdit, Edit, LatentGate, NamedGate, Positions, SteeringSpec
from demur.steering.direction import Direction, load_direction, save_direction
from demur.steering.spec_file import parse_spec, read_spec, schema, write_spec
from demur.testing import tiny_model, tiny_sae

EDIT = Edit("layers.1", "s", (3,), 9.0)
SCHEMA = Path(__file__).parents[1] / "docs" / "spec.schema.json"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Edit("layers.1", "s", ()), "one or more different numbers"),
        (lambda: Edit("layers.1", "s", (3, 3)), "one or more different numbers"),
        (lambda: Edit("layers.1", "s", (-1,)), "one or more different numbers"),
        (lambda: Edit("layers.1", "s", (1,), float("nan")), "expected a finite number"),
        (lambda: Edit("layers.1", "s", (1,), -1.0), "never negative; give 0 or more, or use add"),
        (lambda: Edit("layers.1", "s", (1,), 2.0, "ablate"), "ablate takes no value"),
        (lambda: Edit("layers.1", "s", (1,), 2.0, "scale", "sigma"), "scale has no unit"),
        (lambda: DirectionEdit("layers.1", "d", 2.0, "project_out"), "takes no value or unit"),
        (lambda: DirectionEdit("layers.1", "d", float("inf")), "expected a finite number"),
        (lambda: Positions("prompt", first=2), "needs where = 'answer' or 'generation'"),
        (lambda: Positions(every=0), "expected at least 0 and 1"),
        (lambda: LatentGate("layers.1", "s", 1, -0.5), "expected 0 or more for both"),
        (lambda: SteeringSpec((EDIT, EDIT)), "edited twice at layers.1"),
        (
            lambda: SteeringSpec(tuple(DirectionEdit("layers.1", d, op="project_out") for d in "ab")),
            "two directions are projected out at one hookpoint",
        ),
    ],
)
def test_what_makes_no_sense_is_one_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make()


def test_specs_compose() -> None:
    one, other = SteeringSpec((EDIT,)), SteeringSpec((Edit("layers.2", "s", (4,), 1.0, "floor"),), system="Be kind.")
    both = one + other
    assert both.edits == (*one.edits, *other.edits)
    assert both.system == "Be kind."
    assert both.hash == (other + one).hash
    assert one + SteeringSpec() == one
    prompt_only = SteeringSpec(other.edits, Positions("prompt"))
    with pytest.raises(InputError, match="two specs that differ in positions"):
        one + prompt_only
    with pytest.raises(InputError, match="different system prompts"):
        other + SteeringSpec(system="Be brief.")


FULL = SteeringSpec(
    (EDIT, DirectionEdit("layers.2", "d", -1.5, unit="sigma")),
    Positions("generation", 4, 2),
    LatentGate("layers.0", "s", 5, 0.5, "max_act", Positions("prompt")),
    skip_first=False,
    mode="reconstruct",
    exact=False,
    system="Be kind.",
)


@pytest.mark.parametrize("spec", [SteeringSpec(), FULL, SteeringSpec((EDIT,), gate=NamedGate("layers.0", "mine"))])
def test_a_spec_file_is_whole_and_fits_the_schema(spec: SteeringSpec, tmp_path: Path) -> None:
    write_spec(tmp_path / "spec.json", spec)
    assert read_spec(tmp_path / "spec.json") == spec
    jsonschema.validate(json.loads((tmp_path / "spec.json").read_text()), schema())


def test_the_published_schema_is_fresh() -> None:
    assert json.loads(SCHEMA.read_text()) == schema(), "write it again: python scripts/spec_schema.py"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([], "expected an object with `edits`"),
        ({"format": "demur-spec/9"}, "this version reads 'demur-spec/1'"),
        ({"edits": [{"hookpoint": "layers.1", "sae": "s", "latents": [1], "strength": 3}]}, "strength"),
        ({"edits": [{"hookpoint": "layers.1", "latents": [1]}]}, "sae"),
        ({"edits": [{"hookpoint": "layers.1", "sae": "s", "latents": [1], "op": "boost"}]}, "op"),
        ({"edits": [{"hookpoint": "layers.1", "sae": "s", "latents": [1], "value": -1}]}, "never negative"),
        ({"positions": {"where": "somewhere"}}, "where"),
        ({"edit": []}, "edit"),
    ],
)
def test_a_wrong_spec_file_is_one_sentence_and_fails_the_schema(value: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse_spec(value)
    if "never" not in sentence:  # what a schema can say
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, schema())


def test_one_latent_may_be_written_as_latent(tmp_path: Path) -> None:
    written = {"edits": [{"hookpoint": "layers.1", "sae": "s", "latent": 3, "value": 9}]}
    assert parse_spec(written) == SteeringSpec((EDIT,))
    jsonschema.validate(written, schema())
    with pytest.raises(NotFoundError, match="does not exist"):
        read_spec(tmp_path / "none.json")


def test_a_direction_is_a_file_of_its_own(tmp_path: Path) -> None:
    direction = Direction(torch.randn(8), "layers.1.resid_post", "by hand", 0.5)
    save_direction(tmp_path / "d.safetensors", direction)
    back = load_direction(tmp_path / "d.safetensors")
    assert torch.equal(back.vector, direction.vector)
    assert (back.hash, back.method, back.sigma) == (direction.hash, "by hand", 0.5)
    with pytest.raises(InputError, match="without a standard deviation"):
        Direction(torch.ones(2), "layers.1").length("sigma")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_direction(tmp_path / "bad.safetensors")
    with pytest.raises(NotFoundError, match="does not exist"):
        load_direction(tmp_path / "none.safetensors")


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    lm = tiny_model()
    save_model(lm, tmp_path / "model")
    made_for = SaeModel(lm.name, lm.fingerprint, lm.n_blocks)
    save_sae(tmp_path / "sae", tiny_sae(), SaeConfig(32, 96, 8, "layers.1.resid_post", made_for))
    spec = SteeringSpec((Edit("layers.1", load_sae(tmp_path / "sae").hash, (3, 4), 6.0),))
    write_spec(tmp_path / "spec.json", spec)
    return ["--model", str(tmp_path / "model"), "--sae", str(tmp_path / "sae"), "--spec", str(tmp_path / "spec.json")]


def test_verify_passes_on_a_sound_engine(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    file, options = tiny[-1], tiny[:-2]
    assert main(["verify", file, *tiny]) == 1
    assert "two specs were given" in capsys.readouterr().err
    assert main(["verify", file, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert len(found["checks"]) == 7
    assert all(check["passed"] for check in found["checks"])


@pytest.mark.parametrize("gated", [False, True])
def test_verify_fails_on_a_broken_one(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, gated: bool
) -> None:
    """Also behind a gate that stays shut: what an edit does is checked without it."""
    if gated:
        spec = read_spec(Path(tiny[-1]))
        gate = LatentGate("layers.1", spec.edits[0].sae, 5, 1e9)  # type: ignore[union-attr]
        write_spec(Path(tiny[-1]), replace(spec, gate=gate))
    sound = demur.steering.layer.SaeEdits.move

    def broken(self: Any, *args: Any) -> Any:
        move = sound(self, *args)
        return move._replace(sizes=move.sizes * 1.001)

    monkeypatch.setattr(demur.steering.layer.SaeEdits, "move", broken)
    assert main(["verify", *tiny, "--json"]) == 1
    failed = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"] if not check["passed"]]
    assert failed == ["equals encode, edit, decode, add the error back (float64)"]


def test_a_schema_says_what_json_can_say() -> None:
    assert to_json(FULL)["format"] == "demur-spec/1"
    jsonschema.Draft202012Validator.check_schema(schema())
