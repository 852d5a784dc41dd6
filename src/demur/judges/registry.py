"""The rubrics by name: the one place to add a model judge."""

from demur.errors import InputError
from demur.judges.base import Rubric
from demur.judges.rubrics.harmbench import HARMBENCH
from demur.judges.rubrics.llama_guard import LLAMA_GUARD
from demur.judges.rubrics.strongreject import STRONGREJECT
from demur.judges.rubrics.wildguard import WILDGUARD
from demur.judges.rubrics.xstest import XSTEST

RUBRICS = {rubric.name: rubric for rubric in (WILDGUARD, STRONGREJECT, XSTEST, HARMBENCH, LLAMA_GUARD)}
"""Judges of refusal first, then judges of harm."""


def find_rubric(name: str) -> Rubric:
    """The rubric called `name`. Raises `InputError`."""
    if name not in RUBRICS:
        raise InputError(f"judge is {name!r}, expected rules or one of the rubrics {', '.join(RUBRICS)}")
    return RUBRICS[name]
