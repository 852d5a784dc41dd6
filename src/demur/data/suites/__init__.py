"""Prompt suites by name: `suites()` lists them, `load_suite` reads one; `published.py` is the place to add one."""

from demur.data.suites.find import locate
from demur.data.suites.load import Loaded, find_suite, load_suite, read_suite, suites
from demur.data.suites.suite import Part, Suite

__all__ = ["Loaded", "Part", "Suite", "find_suite", "load_suite", "locate", "read_suite", "suites"]
