"""Nouns and files: round trips, stable hashes, whole-or-absent writes."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demur.errors import InputError, NotFoundError, StorageError
from demur.record import (
    append_jsonl,
    from_json,
    provenance,
    read_json,
    read_jsonl,
    to_json,
    whole_file,
    write_json,
)
from demur.spec import DirectionEdit, Edit, LatentGate, NamedGate, Positions, SteeringSpec, Unit
from demur.types import UNSTEERED, Completion, Message, Prompt, Run, Verdict

units: st.SearchStrategy[Unit] = st.sampled_from(["latent", "max_act", "sigma"])
values = st.floats(0, 100)
edits = st.one_of(
    st.builds(
        Edit,
        hookpoint=st.just("layers.1.resid_post"),
        sae=st.text(max_size=16),
        latents=st.lists(st.integers(0, 10**6), min_size=1, max_size=3, unique=True).map(tuple),
        value=values,
        op=st.sampled_from(["clamp", "floor", "ceil", "add"]),
        unit=units,
    ),
    st.builds(
        DirectionEdit,
        hookpoint=st.just("layers.2.resid_post"),
        direction=st.text(max_size=16),
        value=st.floats(-9, 9),
        unit=st.sampled_from(["direction", "sigma"]),
    ),
)
positions = st.builds(
    Positions, where=st.sampled_from(["all", "prompt", "last_prompt_token", "user"]), every=st.integers(1, 5)
)
gates = st.one_of(
    st.none(),
    st.builds(LatentGate, hookpoint=st.just("layers.0"), sae=st.text(), latent=st.integers(0, 9), threshold=values),
    st.builds(NamedGate, hookpoint=st.just("layers.0"), name=st.text(), positions=positions),
)
specs = st.builds(
    SteeringSpec,
    edits=st.lists(edits, max_size=3, unique_by=lambda e: getattr(e, "sae", None)).map(tuple),
    positions=positions,
    gate=gates,
    skip_first=st.booleans(),
    mode=st.sampled_from(["error_preserving", "reconstruct"]),
    exact=st.booleans(),
    system=st.text(max_size=8),
)


@given(specs)
def test_a_spec_survives_json_and_keeps_its_hash(spec: SteeringSpec) -> None:
    back = from_json(SteeringSpec, json.loads(json.dumps(to_json(spec))))
    assert back == spec
    assert back.hash == spec.hash
    assert (spec.hash == UNSTEERED) == (not spec.edits and not spec.system)
    assert replace(spec, edits=spec.edits[::-1]).hash == spec.hash


def test_the_hash_of_a_spec_is_pinned() -> None:
    spec = SteeringSpec((Edit("layers.14.resid_post", "abc", (7,), 12.0),))
    assert spec.hash == "0fbea5a584159682", "a changed hash orphans every saved completion: is that meant?"


@pytest.mark.parametrize(
    "value",
    [
        Prompt("p", (Message("user", "Hi"),), "harmful", "demur/harmful", "x", "select", "t"),
        Completion("p", "s", "text é ’", 3, "eos"),
        Verdict("p", "s", "partial", "rules/2", "because"),
        Run("study", "n", {"a": 1}, "h", "c", False, {}, {}, 0, "now", {"m": "x"}, "demur study"),
    ],
)
def test_every_noun_has_a_json_round_trip(value: object) -> None:
    assert from_json(type(value), json.loads(json.dumps(to_json(value)))) == value


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(InputError, match=r"label in v\.jsonl is 'maybe', which does not fit Verdict"):
        from_json(Verdict, {"prompt": "p", "spec": "s", "label": "maybe", "judge": "j"}, "v.jsonl")


def test_a_torn_last_line_is_cut_and_the_rest_kept(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    rows = [Completion(str(i), "s", "x", 1, "eos") for i in range(3)]
    append_jsonl(path, rows)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"prompt": "3", "sp')
    assert read_jsonl(Completion, path) == rows
    assert path.read_bytes() == whole


def test_every_character_survives_a_line(tmp_path: Path) -> None:
    rows = [Completion("1", "s", "a\u2028b\u2029c\u0085d\x0be", 1, "eos"), Completion("2", "s", "x", 1, "eos")]
    append_jsonl(tmp_path / "c.jsonl", rows)
    assert read_jsonl(Completion, tmp_path / "c.jsonl") == rows


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("{oops}\n")
    with pytest.raises(InputError, match=r"c.jsonl line 1 is damaged"):
        read_jsonl(Completion, tmp_path / "c.jsonl")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": True})

    def break_off() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        break_off()
    assert read_json(path) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.jsonl"
    append_jsonl(path, [Completion("1", "s", "x", 1, "eos")])
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="no space is left on the disk"):
        append_jsonl(path, [Completion("2", "s", "x", 1, "eos")])
    with pytest.raises(StorageError, match="no space is left on the disk"):
        write_json(tmp_path / "new.json", {})
    assert path.read_bytes() == before
    assert not (tmp_path / "new.json").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_json(tmp_path / "file" / "a.json", {})


def test_missing_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        read_json(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="not readable JSON"):
        read_json(tmp_path / "bad.json")


def test_provenance_names_versions_and_hardware() -> None:
    found = provenance()
    assert found["versions"]["torch"]
    assert found["hardware"]["cores"] == str(os.cpu_count())


def test_importing_demur_does_nothing() -> None:
    code = "import sys, demur, demur.types, demur.errors; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False False\n", "")
