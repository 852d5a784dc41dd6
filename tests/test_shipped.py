"""Specs that ship with demur: each is found by its name, and finds what it names."""

from pathlib import Path

import pytest

from demur.errors import NotFoundError
from demur.sae.store import embedded_saes
from demur.spec import Edit, ProbeGate
from demur.steering.shipped import shipped_probes, shipped_specs
from demur.steering.spec_file import read_spec


def test_every_shipped_spec_finds_its_sae_and_its_probe() -> None:
    assert shipped_specs()
    for name, path in shipped_specs().items():
        spec = read_spec(Path(name))
        assert spec == read_spec(path)
        assert spec.edits
        assert all(edit.sae in embedded_saes() for edit in spec.edits if isinstance(edit, Edit))
        assert isinstance(spec.gate, ProbeGate)
        probe = shipped_probes()[spec.gate.probe]
        assert probe.hookpoint == spec.gate.hookpoint
        assert probe.card["gate"]["threshold"] == spec.gate.threshold
        assert (path.parent / "card.md").read_text(encoding="utf-8").startswith(f"# Gate {probe.hash}")


def test_a_file_of_that_name_comes_first_and_an_unknown_name_is_no_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(iter(shipped_specs()))
    (tmp_path / name).write_text('{"format": "demur-spec/1", "edits": []}')
    assert not read_spec(Path(name)).edits
    with pytest.raises(NotFoundError, match="nothing-of-that-name"):
        read_spec(Path("nothing-of-that-name"))
