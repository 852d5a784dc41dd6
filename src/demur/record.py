"""Write, read and hash what a run leaves behind. Files appear whole or not at all; JSONL is append-only.

`to_json` / `from_json` give every noun its JSON round trip (pydantic validates what comes back).
"""

import errno
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from demur.errors import InputError, NotFoundError, StorageError

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """A dataclass (or a list of them) as plain JSON types."""
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return json.loads(json.dumps(asdict(value), default=str))


def from_json(cls: type[T], value: Any, where: str = "") -> T:
    """The inverse of `to_json`. Raises `InputError` naming the field that does not fit and `where` it was read."""
    from pydantic import ValidationError

    kind: Any = cls
    try:
        checked: T = _adapter(kind).validate_python(value)
        return checked
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole value"
        place = f" in {where}" if where else ""
        wanted = getattr(cls, "__name__", cls)
        raise InputError(
            f"{field}{place} is {first['input']!r:.80}, which does not fit {wanted}: {first['msg']}"
        ) from None


@cache
def _adapter(cls: Any) -> Any:
    """One validator per type; a JSONL file asks for it once a row."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write near `path` into one sentence."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space is left on the disk for {path}; free some and run the same command again, "
                "what was finished is kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise StorageError(f"{path} cannot be written ({error.strerror}); choose another folder") from error
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well, and vanishes otherwise."""
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            try:
                yield temporary
            except Exception as error:  # safetensors has an error of its own for a full disk
                if "No space left" in str(error) or "os error 28" in str(error):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
                raise
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass or JSON value to `path`, whole or not at all."""
    data = value if isinstance(value, dict | list) else to_json(value)
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises `NotFoundError` or `InputError` with the path."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); delete it and run again") from None


def append_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Append rows in one write and force them to disk, so that a kill loses at most the row being written."""
    text = "".join(json.dumps(to_json(row), ensure_ascii=False) + "\n" for row in rows)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            start = file.tell()
            try:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, start)
                raise


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write rows to `path`, whole or not at all."""
    write_text(path, "".join(json.dumps(to_json(row), ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(cls: type[T], path: Path, mend: bool = True) -> list[T]:
    """All whole rows of a JSONL file; a torn last line (a killed write) is left out, and cut off the file.

    `mend`: cut it off. Only for whoever holds the folder's lock: to others a line may look torn that is being written.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if mend and whole < len(data):
        os.truncate(path, whole)
    rows = []
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            rows.append(from_json(cls, json.loads(line), f"{path} line {number}"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} line {number} is damaged ({error}); delete that line and run again") from None
    return rows


def json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of each line of `text` that is not blank. Raises `InputError` naming `path` and line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path} line {number} is not JSON ({error})") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance() -> dict[str, Any]:
    """Commit, dirty flag, versions and hardware of this process, as fields of `Run`."""
    return {
        **_commit(),
        "versions": _versions(),
        "hardware": {
            "machine": platform.machine(),
            "system": platform.platform(),
            "cpu": _cpu_name(),
            "cores": str(os.cpu_count()),
            **_accelerator(),
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _commit() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return {"commit": "", "dirty": False}
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "", "dirty": False}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("demur", "torch", "transformers", "tokenizers", "numpy", "lm_eval", "datasets"):
        with suppress(metadata.PackageNotFoundError):  # the last two come with an extra
            found[name] = metadata.version(name)
    return found


def _accelerator() -> dict[str, str]:
    """The CUDA device, if torch is loaded and sees one; this room does not load torch for it."""
    torch = sys.modules.get("torch")
    return {"gpu": torch.cuda.get_device_name()} if torch is not None and torch.cuda.is_available() else {}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
