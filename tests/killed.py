"""A process that dies at its n-th write to disk, without dying."""

import os
from collections.abc import Callable

import pytest

import demur.record


class Killed(BaseException):
    """Stands for SIGKILL: nothing demur wrote catches it."""


def killed_after(writes: int, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `run`, and let it die when it forces the write after `writes` others to disk; fails if it ends before."""
    done, real = 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal done
        done += 1
        if done > writes:
            raise Killed
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(demur.record.os, "fsync", fsync)
        try:
            run()
        except Killed:
            return
    pytest.fail(f"it ended after only {done} writes; drop this case")
