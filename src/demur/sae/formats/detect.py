"""Which format a folder or file is, by the names of its files; and the one way in for all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from demur.errors import InputError, NotFoundError
from demur.record import file_sha256, to_json
from demur.sae.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    hub,
    llama_scope,
    saelens,
    sparsify,
    state_dict,
)
from demur.sae.formats.common import Opened, Place
from demur.sae.meaning import LoadedSae, build
from demur.types import stable_hash


class Format(NamedTuple):
    """One format."""

    name: str
    read: Callable[[Place, float | None], Opened]
    marks: tuple[str, ...]
    """Files that a folder of it holds, all of them."""


FORMATS = (
    Format(saelens.NAME, saelens.read, (saelens.WEIGHTS, "cfg.json")),
    Format(sparsify.NAME, sparsify.read, (sparsify.WEIGHTS, "cfg.json")),
    Format(gemma_scope.NAME, gemma_scope.read, (gemma_scope.WEIGHTS,)),
    Format(gemma_scope_2.NAME, gemma_scope_2.read, (gemma_scope_2.WEIGHTS,)),
    Format(llama_scope.NAME, llama_scope.read, ("checkpoints/final.safetensors", "hyperparams.json")),
    Format(llama_scope.NAME, llama_scope.read, (saelens.WEIGHTS, "config.json")),
    Format(dictionary_learning.NAME, dictionary_learning.read, ("ae.pt",)),
    Format(dictionary_learning.NAME, dictionary_learning.read, ("ae.safetensors",)),
)
"""Folders. A lone file is a `_FILES` or else a plain state dict."""
_FILES = (
    Format(gemma_scope.NAME, gemma_scope.read, (r".*\.npz",)),
    Format(gemma_scope_2.NAME, gemma_scope_2.read, (r"(?:.*/)?clt[^/]*/(?:[^/]*/)?[^/]*\.safetensors",)),
    Format(dictionary_learning.NAME, dictionary_learning.read, (r"(?:.*/)?ae(?:_\d+)?\.(?:pt|safetensors)",)),
    Format(state_dict.NAME, state_dict.read, (r".*(?:" + "|".join(map(re.escape, state_dict.ENDINGS)) + ")",)),
)
_BESIDE = re.compile(  # what lies beside an SAE and is none
    r"(?:.*/)?(?:optimizer|lr_scheduler|rank_|state\.|trainer_state|sparsity\.|activation|pytorch_model|model[-.])[^/]*"
)
_MOST_FILES = 20_000


def find(names: Iterable[str]) -> dict[str, Format]:
    """Every SAE among the files `names` (paths with `/`): its folder (`` for the top) or file, and its format."""
    every = set(names)
    found: dict[str, Format] = {}
    for form in FORMATS:
        for name in every:
            if name == form.marks[0] or name.endswith("/" + form.marks[0]):
                folder = name[: -len(form.marks[0])].rstrip("/")
                if all(f"{folder}/{mark}".lstrip("/") in every for mark in form.marks):
                    found.setdefault(folder, form)
    for name in sorted(every):
        inside = any(not folder or name.startswith(folder + "/") for folder in found)
        if not inside and not _BESIDE.fullmatch(name) and (form_of := of_file(name)) is not None:
            found[name] = form_of
    return dict(sorted(found.items()))


def of_file(name: str) -> Format | None:
    """The format of a lone file; None for one that holds no tensors."""
    return next((form for form in _FILES if re.fullmatch(form.marks[0], name)), None)


class Found(NamedTuple):
    """An SAE on this disk."""

    place: Place
    form: Format


def locate(name: str, local: Path, embedded: tuple[str, ...] = ()) -> Found:
    """The SAE at `local`, else in the hub's repository that `name` refers to. Raises as `load_sae`."""
    if local.exists():
        path, form = _local(local)
        return Found(Place(path, str(path.resolve())), form)
    reference = None if Path(name).parts[:1] and Path(Path(name).parts[0]).exists() else hub.parse(name)
    if reference is None:
        raise NotFoundError(
            f"no SAE is at {name!r}: expected a folder or file of {known()}, a hub reference owner/repo/path, or the "
            f"name of an embedded SAE ({', '.join(embedded) or 'none'})"
        )
    names = hub.files(reference)
    sub, form = choose(find(names), reference.sub, f"the repository {reference.repo}", names)
    path = hub.fetch(reference, sub, needed(names, sub))
    return Found(Place(path, f"{reference.repo}/{sub}".rstrip("/")), form)


def open_sae(found: Found, name: str, input_scale: float | None) -> LoadedSae:
    """Open what `locate` found for `name`. Its hash covers the format, every file read, and what was made of them."""
    place, form = found
    config, weights, files = form.read(place, input_scale)
    config = replace(config, source=f"{form.name}: {name}")
    if config.architecture == "relu":
        weights["threshold"] = torch.zeros(config.d_sae)
    sae = build(config, weights, str(place.path), config.source)
    meaning = {key: to_json(config)[key] for key in ("architecture", "k", "hookpoint", "normalize", "subtract_b_dec")}
    sums = [file_sha256(file) for file in files]
    return LoadedSae(sae, config, stable_hash([form.name, sums, meaning, input_scale]), name)


def known() -> str:
    """The formats, for a sentence."""
    return "demur, " + ", ".join(dict.fromkeys(form.name for form in (*FORMATS, *_FILES)))


def _local(path: Path) -> tuple[Path, Format]:
    if path.is_file():
        for form in FORMATS:  # the weights file of a folder
            if path.name == PurePosixPath(form.marks[0]).name:
                folder = path.parents[form.marks[0].count("/")]
                if all((folder / mark).is_file() for mark in form.marks):
                    return folder, form
        form_of = of_file(path.resolve().as_posix())
        if form_of is None:
            raise InputError(f"{path} is no file of tensors; give a folder or file of {known()}")
        return path, form_of
    names = []
    for file in path.rglob("*"):
        if file.is_file():
            names.append(file.relative_to(path).as_posix())
        if len(names) > _MOST_FILES:
            raise InputError(f"{path} holds more than {_MOST_FILES:,} files; give the folder of the SAE itself")
    sub, form = choose(find(names), "", str(path), names)
    return path / sub, form


def choose(found: dict[str, Format], wanted: str, where: str, names: Iterable[str]) -> tuple[str, Format]:
    """The SAE that `wanted` (a path inside) means: itself, or the only one below. Raises `InputError` or
    `NotFoundError`, saying what is there."""
    if wanted in found:
        return wanted, found[wanted]
    if wanted and wanted in set(names) and (form := of_file(wanted)):
        return wanted, form
    below = {sub: form for sub, form in found.items() if not wanted or sub.startswith(wanted + "/")}
    if len(below) == 1:
        return next(iter(below.items()))
    place = f"{where} at {wanted}" if wanted else where
    if below:
        some = list(below)
        shown = ", ".join(some[:5]) + (", ..." if len(some) > 5 else "")
        raise InputError(f"{place} holds {len(some)} SAEs; add one of these to the path: {shown}")
    there = sorted(name for name in names if not wanted or name.startswith(wanted))
    shown = (", ".join(there[:6]) + (", ..." if len(there) > 6 else "")) if there else "nothing"
    raise (InputError if there else NotFoundError)(
        f"{place} holds {shown}, which is no SAE that demur knows; expected a folder or file of {known()}"
    )


def needed(names: Iterable[str], sub: str) -> list[str]:
    """The files to fetch for the SAE at `sub`: its own, and the configs above it."""
    every = list(names)
    if sub in every:
        stem = sub.rsplit(".", 1)[0]
        own = {sub, f"{stem}_cfg.json"}
    else:
        marks = {mark for form in FORMATS for mark in form.marks} | {"activation_whitening.safetensors"}
        own = {name for name in every if name.removeprefix(sub).lstrip("/") in marks and name.startswith(sub)}
        own |= {name for name in every if name.endswith(".json") and str(PurePosixPath(name).parent) == (sub or ".")}
    above = {f"{folder}/config.json".removeprefix("./") for folder in PurePosixPath(sub or ".").parents}
    return sorted(name for name in every if name in own | above)
