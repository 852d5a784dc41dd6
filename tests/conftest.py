"""Shared by all tests: one torch thread (tiny models run slower on more), and no question asked of the hub."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

import pytest
import torch
from hypothesis import settings

REPOSITORY = Path(__file__).parents[1]

settings.register_profile("demur", deadline=None, derandomize=True)
settings.load_profile("demur")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared_data() -> Path:
    """Public data beside the checkout; the project works without it."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data here")
    return folder
