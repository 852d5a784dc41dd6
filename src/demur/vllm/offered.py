"""What the operator offers: named specs, SAEs and directions, read once in each process."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from demur.errors import DemurError, InputError
from demur.sae.store import LoadedSae, embedded_saes
from demur.steering.spec_book import Offered, SpecBook, read_offered
from demur.steering.vectors import Vector
from demur.vllm.settings import Settings


class Known(NamedTuple):
    """Specs by name, and what they and inline specs may name."""

    book: SpecBook
    saes: tuple[LoadedSae, ...]
    """In the folders, and those that ship with demur."""
    directions: tuple[Vector, ...]


@cache
def read_known(settings: Settings) -> Known:
    """Read it. Raises `InputError` and its kin naming the setting."""
    try:
        found = read_offered(settings.specs) if settings.specs else Offered({}, [], [])
    except DemurError as error:
        raise InputError(f"DEMUR_SPECS cannot be used: {error}") from error
    try:
        book = SpecBook(found.specs, settings.default, settings.locked)
    except DemurError as error:
        raise InputError(f"DEMUR_DEFAULT_SPEC cannot be used: {error}") from error
    shipped = embedded_saes().values()
    for sae in (*found.saes, *shipped):
        sae.sae.requires_grad_(False)
    return Known(book, (*found.saes, *shipped), tuple(found.directions))
