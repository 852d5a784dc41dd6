"""Where the files of a suite are: in a data folder, else in the hub's cache, else on the hub."""

from __future__ import annotations

from pathlib import Path

from demur.data.suites.suite import Part, Suite
from demur.errors import DownloadError, InputError, NotFoundError


def locate(part: Part, data_dir: Path | None) -> Path | None:
    """The file of `part` in `data_dir` (the file itself, its folder, or a folder of folders); None if it is not there.

    Raises `NotFoundError` for a `data_dir` that does not exist, `InputError` if several folders have the file.
    """
    if data_dir is None:
        return None
    data_dir = data_dir.expanduser()
    if data_dir.is_file():
        return data_dir if data_dir.name in {Path(name).name for name in part.files} else None
    if not data_dir.is_dir():
        raise NotFoundError(f"data folder {data_dir} does not exist; give a folder of prompt sets")
    for name in part.files:
        if (data_dir / name).is_file():
            return data_dir / name
    for name in part.files:
        found = sorted(path for path in data_dir.glob(f"*/{name}") if path.is_file())
        if len(found) > 1:
            raise InputError(f"{found[0]} and {found[1]} have one name; give the folder of one as the data folder")
        if found:
            return found[0]
    return None


def fetch(suite: Suite, part: Part, data_dir: Path | None) -> Path:
    """The file of `part`, from `data_dir` or from the hub, which is not asked where HF_HUB_OFFLINE is set.

    Raises `NotFoundError` or `DownloadError` with the licence and how to get the file.
    """
    found = locate(part, data_dir)
    if found is not None:
        return found
    if not (suite.hub and part.hub_file):
        raise NotFoundError(_how(suite, part, data_dir, "and its publishers have no copy on the hub"))
    import huggingface_hub
    from huggingface_hub import errors

    def download(kept_only: bool) -> Path:
        return Path(
            huggingface_hub.hf_hub_download(suite.hub, part.hub_file, repo_type="dataset", local_files_only=kept_only)
        )

    try:
        return download(kept_only=True)  # an evaluation is repeated on the same file
    except errors.LocalEntryNotFoundError:
        pass
    try:
        return download(kept_only=False)
    except errors.GatedRepoError as error:
        why = f"and the hub did not give you {suite.hub}"
        raise NotFoundError(_how(suite, part, data_dir, why)) from error
    except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as error:
        why = f"and the hub has no {part.hub_file} in {suite.hub} for you"
        raise NotFoundError(_how(suite, part, data_dir, why)) from error
    except Exception as error:  # no network has many classes: httpx's, OSError, LocalEntryNotFoundError
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else f"the hub could not be reached: {type(error).__name__}"
        why = f"and {suite.hub} could not be fetched ({reason})"
        raise DownloadError(_how(suite, part, data_dir, why)) from error


def _how(suite: Suite, part: Part, data_dir: Path | None, why: str) -> str:
    where = f"not in {data_dir}" if data_dir else "not here, as no --data-dir was given"
    gate = f"accept the terms on the page of {suite.hub} and run `hf auth login`, or " if suite.gated else ""
    return (
        f"{suite.title} (licence: {suite.licence}{'; gated' if suite.gated else ''}) is {where}, {why}; "
        f"{gate}put {Path(part.files[0]).name} from {suite.homepage} into a folder and give it as --data-dir"
    )
