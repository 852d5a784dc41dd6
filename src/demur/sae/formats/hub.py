"""SAEs in a repository of the Hugging Face hub: `owner/repo`, `owner/repo/sub/path`, `owner/repo@revision/sub/path`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from demur.errors import DownloadError, NotFoundError


class Reference(NamedTuple):
    """A repository, and the path of an SAE in it."""

    repo: str
    revision: str | None
    sub: str
    """Empty for the whole repository."""


def parse(text: str) -> Reference | None:
    """The reference that `text` is, or None. A revision with a slash is written with %2F."""
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", text)
    if match is None:
        return None
    return Reference(match[1], match[2].replace("%2F", "/") if match[2] else None, (match[3] or "").strip("/"))


def files(reference: Reference) -> list[str]:
    """The names of all files of the repository; without a network, of those that an earlier download kept.

    Raises `NotFoundError` for a repository or revision that is missing, private or gated, `DownloadError` without a
    network and without a kept copy.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repo, revision, _ = reference
    try:
        info = huggingface_hub.model_info(repo, revision=revision, timeout=30)
        return [file.rfilename for file in info.siblings or []]
    except errors.GatedRepoError as error:
        raise _gated(repo) from error
    except errors.RevisionNotFoundError as error:
        raise NotFoundError(f"the hub's repository {repo} has no revision {revision!r}; check its name") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise NotFoundError(
            f"no SAE is at {repo!r}: there is no such folder or file here, and no such repository on the hub, or it is "
            "private; check the name, or run `hf auth login`"
        ) from error
    except Exception as error:  # no network has many classes: httpx's, OSError, OfflineModeIsEnabled, HfHubHTTPError
        kept = _kept(reference)
        if kept is None:
            raise _unreached(repo, error) from error
        return [file.relative_to(kept).as_posix() for file in kept.rglob("*") if file.is_file()]


def fetch(reference: Reference, sub: str, names: list[str]) -> Path:
    """Download the files `names` only, and return where `sub` is then. Raises as `files`."""
    import huggingface_hub
    from huggingface_hub import errors

    repo, revision, _ = reference
    plain = [re.sub(r"([\[*?])", r"[\1]", name) for name in names]
    try:
        root = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=plain))
    except errors.GatedRepoError as error:
        raise _gated(repo) from error
    except Exception as error:
        raise _unreached(repo, error) from error
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise DownloadError(f"{missing[0]} of the hub's repository {repo} did not arrive; run the same command again")
    return root / sub


def _kept(reference: Reference) -> Path | None:
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(reference.repo, revision=reference.revision, local_files_only=True)
    except Exception:  # the same many classes; what failed first is what the user is told
        return None
    return Path(found)


def _gated(repo: str) -> NotFoundError:
    return NotFoundError(
        f"the hub's repository {repo} is gated; accept its terms on its page, then run `hf auth login` here"
    )


def _unreached(repo: str, error: Exception) -> DownloadError:
    first = str(error).strip().splitlines()
    return DownloadError(
        f"the hub's repository {repo} could not be reached ({(first or [type(error).__name__])[0][:120]}) and no "
        "earlier download of it is kept; try again with a network, or give a local folder"
    )
