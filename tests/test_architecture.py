"""Pinned contracts: which room may import which, the tree of errors, and the public names."""

import ast
import inspect
from pathlib import Path

import pytest

import demur
import demur.errors
from demur.errors import DemurError

SOURCE = Path(__file__).parents[1] / "src" / "demur"

# Lower rooms first. A room may import itself and what stands here beside it; `types`, `errors` are open to all.
MAY_IMPORT = {
    "types": set(),
    "results": set(),
    "spec": set(),
    "errors": set(),
    "progress": set(),
    "record": set(),
    "parallel": set(),
    "data": {"record"},
    "sae": {"record", "progress", "parallel"},
    "lm": {"record", "progress", "parallel"},
    "judges": set(),
    "endpoint": set(),
    # a room of its own, as it asks endpoints, which steering, that sees tokens only, has no business with
    "text_gates": {"endpoint", "lm"},
    "steering": {"sae", "lm", "record"},
    "features": {"steering", "lm", "sae", "data", "record", "progress", "endpoint"},
    "attacks": {"judges", "data"},
    "eval": {"attacks", "features", "text_gates", "steering", "judges", "lm", "sae", "data", "record", "progress"},
    "report": {"record"},
    "testing": {"lm", "sae"},
    "verbs": {
        *("report", "eval", "features", "steering", "judges", "lm", "sae", "data", "record", "progress", "parallel"),
        *("endpoint", "attacks", "text_gates"),
    },
    "serve": {"verbs", "text_gates", "steering", "lm", "sae", "record", "progress"},
    "vllm": {"steering", "lm", "sae", "record"},
    "cli": {"serve", "verbs", "report", "record", "progress"},
}
TORCH_FREE = {
    "types",
    "results",
    "spec",
    "errors",
    "progress",
    "record",
    "data",
    "judges",
    "report",
    "endpoint",
    "attacks",
}
TORCH_FREE_FILES = {
    *("sae/config.py", "verbs/config.py", "verbs/eval_config.py", "verbs/judge_config.py", "verbs/read_study.py"),
    *("verbs/attack_config.py", "verbs/serve_config.py", "verbs/sides_config.py", "cli/show_attack.py"),
    *("verbs/optimize_config.py", "verbs/optimize_space.py", "verbs/optimize_study.py", "cli/show_optimize.py"),
    *("verbs/gate_config.py", "cli/show_gate.py"),
    *("verbs/why_config.py", "cli/show_why.py"),
    *("cli/main.py", "cli/show.py", "cli/show_eval.py", "cli/show_judge.py"),
}


def imports(path: Path, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "demur":
                found |= {f"demur.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_imports_point_downward_only() -> None:
    rooms = set()
    for path in SOURCE.rglob("*.py"):
        room = room_of(path)
        if room == "__init__":
            continue
        rooms.add(room)
        for module in imports(path):
            if module.startswith("demur."):
                target = module.split(".")[1]
                allowed = {room, "types", "results", "spec", "errors", *MAY_IMPORT[room]}
                assert target in allowed, f"{path.name} in {room} imports {module}"
    assert rooms == set(MAY_IMPORT)


def test_rooms_that_need_no_torch_do_not_import_it() -> None:
    for path in SOURCE.rglob("*.py"):
        name = str(path.relative_to(SOURCE))
        if room_of(path) in TORCH_FREE or name in TORCH_FREE_FILES:
            heavy = {m for m in imports(path, top_level=True) if m.split(".")[0] in ("torch", "transformers")}
            assert not heavy, f"{name} imports {heavy}"


def test_every_error_is_a_demur_error_and_a_builtin() -> None:
    classes = [c for _, c in inspect.getmembers(demur.errors, inspect.isclass) if c is not DemurError]
    assert {c.__name__ for c in classes} == {
        "InputError",
        "NotFoundError",
        "MismatchError",
        "MissingExtraError",
        "DownloadError",
        "RunExistsError",
        "StorageError",
    }
    for error in classes:
        assert issubclass(error, DemurError)
        assert any(base.__module__ == "builtins" and base is not Exception for base in error.__mro__[1:-3])


def test_files_stay_small() -> None:
    long = [str(p.relative_to(SOURCE)) for p in SOURCE.rglob("*.py") if len(p.read_text().splitlines()) > 600]
    assert not long


def test_the_public_names_are_pinned_and_all_load() -> None:
    assert demur.__all__ == [
        "DirectionEdit",
        "Edit",
        "LatentGate",
        "Message",
        "NamedGate",
        "Positions",
        "ProbeGate",
        "Prompt",
        "SteeringSpec",
        "StudyConfig",
        "TextGate",
        "chat_ids",
        "difference_in_means",
        "generate",
        "load",
        "load_probe",
        "load_sae",
        "read_spec",
        "save_sae",
        "steer",
        "study",
        "wrap",
        "write_spec",
    ]
    for name in demur.__all__:
        assert getattr(demur, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = demur.nothing
