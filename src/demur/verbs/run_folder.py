"""A run folder: claimed by one process and one config, so that a run that was killed goes on to the same numbers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from demur import progress
from demur.errors import RunExistsError
from demur.record import from_json, provenance, read_json, storage, to_json, write_json
from demur.types import Run, stable_hash

SEEDLESS = ("needs",)
"""Fields of a config that change no number, and so do not make it another run."""


def config_hash(config: Any) -> str:
    """Hash of everything in the config that may change a number."""
    return stable_hash({key: value for key, value in to_json(config).items() if key not in SEEDLESS})


def new_run(kind: str, config: Any, artefacts: dict[str, str]) -> Run:
    """What is kept about a run that begins: its config, which has a name and a seed, and where and from what it is."""
    return Run(
        kind=kind,
        name=config.name,
        config=to_json(config),
        config_hash=config_hash(config),
        seed=config.seed,
        artefacts=artefacts,
        **provenance(),
    )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock: two processes in one folder would write over each other."""
    with held(
        folder / ".lock", f"{folder} is in use by another demur run; wait for it to end, or choose another --out"
    ):
        yield


@contextmanager
def held(path: Path, taken: str) -> Iterator[None]:
    """Hold the lock file `path`. Raises `RunExistsError`, saying `taken`, where another process does."""
    with storage(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RunExistsError(taken) from None
    try:
        yield
    finally:
        lock.release()


def check_folder(folder: Path, config: Any) -> None:
    """Raise `RunExistsError` when `folder` holds a run with another config, or something else."""
    path = folder / "run.json"
    if not path.exists():
        # names with a dot are ours: the lock, or what a kill left of a write
        if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
            raise RunExistsError(f"{folder} exists and is no run of demur; choose another --out folder")
        return
    found = read_json(path)
    if not isinstance(found, dict) or found.get("config_hash") != config_hash(config):
        old = found.get("config", {}) if isinstance(found, dict) else {}
        differs = [k for k, v in to_json(config).items() if k not in SEEDLESS and old.get(k) != v]
        raise RunExistsError(
            f"{folder} holds a run with other settings (it differs in {', '.join(differs) or 'its format'}); "
            "choose another --out folder, or repeat its settings to go on"
        )


def claim(folder: Path, config: Any, run: Run) -> Run:
    """Write `run.json`, or check that the run found there used the same artefacts; returns the first session's."""
    path = folder / "run.json"
    if not path.exists():
        write_json(path, run)
        return run
    check_folder(folder, config)
    found = from_json(Run, read_json(path), str(path))
    changed = [key for key, value in run.artefacts.items() if found.artefacts.get(key) != value]
    if changed or found.kind != run.kind:
        raise RunExistsError(
            f"{folder} holds a run made with another {' and '.join(changed) or 'verb'} than is there now; "
            "choose another --out folder"
        )
    return found


class Clock:
    """Seconds by step of a run, over all its sessions: `seconds.json`. `final`: the file that a finished run has."""

    def __init__(self, folder: Path, final: str) -> None:
        self._path, self._final = folder / "seconds.json", folder / final

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step of the run: announced, and its time added to the account."""
        progress.say(name)
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start)

    def add(self, name: str, seconds: float) -> None:
        """Add to the account; a finished run that is looked at again does not take longer for it."""
        if not self._final.exists():
            spent = self.seconds()
            write_json(self._path, {**spent, name: round(spent.get(name, 0.0) + seconds, 2)})

    def seconds(self) -> dict[str, float]:
        """Seconds by step so far."""
        found: dict[str, float] = read_json(self._path) if self._path.exists() else {}
        return found
