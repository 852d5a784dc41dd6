"""The study behind a search: Optuna's trials in `journal.jsonl`, shared by any number of processes.

Optuna (Akiba et al., arXiv 1907.10902) keeps the trials and proposes the next ones by multi-objective TPE (Ozaki et
al., JAIR 2022). A killed process leaves at most a torn last line and a trial that never ends; both are put right here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock

from demur.errors import MissingExtraError
from demur.types import stable_hash

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

T = TypeVar("T")
JOURNAL = "journal.jsonl"


def require_optuna() -> None:
    """Raises `MissingExtraError` without Optuna."""
    if find_spec("optuna") is None:
        raise MissingExtraError("Optuna is not installed; run `pip install 'demur[optimize]'`")


class _Lock:
    """Optuna's lock around a write: the kernel lets go of it when its process dies, and what that left is mended."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, FileLock(path.with_name(f".{path.name}.lock"))

    def acquire(self) -> bool:
        """Wait for the lock, then cut off a line that a killed process has not finished."""
        self._lock.acquire()
        with self._path.open("rb") as file:
            if not file.seek(0, os.SEEK_END) or file.seek(-1, os.SEEK_END) < 0 or file.read(1) == b"\n":
                return True
        data = self._path.read_bytes()
        os.truncate(self._path, data.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let go."""
        self._lock.release()


class Trials:
    """The trials of a run folder."""

    def __init__(self, folder: Path, objectives: int, seed: int, startup: int) -> None:
        """Raises `MissingExtraError` without Optuna."""
        require_optuna()
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = folder / JOURNAL
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        lock: Any = _Lock(path)
        with _held(lock):  # mends the file before it is read
            pass
        self._folder, self._seed, self._startup = folder, seed, startup
        self._study: Study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path), lock)),
            study_name="demur",
            directions=["minimize"] * objectives,
            load_if_exists=True,
        )

    def finished(self) -> list[FrozenTrial]:
        """Judged and pruned trials, by number."""
        return [trial for trial in self._all() if trial.state.name in ("COMPLETE", "PRUNED")]

    def unfinished(self) -> int:
        """Trials whose process was killed."""
        return sum(trial.state.name == "FAIL" for trial in self._all())

    def give_up(self) -> None:
        """Mark as failed what no process works on any more. Only for whoever knows that there is no other process."""
        from optuna.trial import TrialState

        for trial in self._all():
            if not trial.state.is_finished():
                self._study.tell(trial.number, state=TrialState.FAIL)

    def ask(self, total: int, choose: Callable[[Trial], T]) -> tuple[Trial, T] | None:
        """The next trial with what it chose, or None where `total` are finished or under way.

        The seed of a trial follows from how many went before it, so that a run which was killed draws the same.
        """
        from optuna.samplers import TPESampler

        with FileLock(self._folder / ".ask.lock"):
            going = sum(trial.state.name != "FAIL" for trial in self._all())
            if going >= total:
                return None
            seed = int(stable_hash([self._seed, going]), 16) % 2**32
            self._study.sampler = TPESampler(n_startup_trials=self._startup, multivariate=True, seed=seed)
            trial = self._study.ask()
            return trial, choose(trial)

    def tell(self, trial: Trial, values: Sequence[float] | None) -> None:
        """The objectives of a trial; None: it was pruned."""
        from optuna.trial import TrialState

        if values is None:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, list(values))

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)


@contextmanager
def _held(lock: _Lock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
