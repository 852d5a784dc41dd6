"""Write the SAE fixtures anew with the real libraries, let them open what demur writes, and run the tests on both.

    python scripts/sae_fixtures/check.py [--update]

Works in a temporary folder; `--update` also replaces tests/fixtures/saes. Each library has an environment of its own,
installed on first use (scripts/peer_environment.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMITTED = ROOT / "tests/fixtures/saes"
SCRIPTS = (
    ("saelens", "by_saelens.py"),
    ("saelens", "published.py"),
    ("sparsify", "by_sparsify.py"),
    ("dictionary_learning", "by_dictionary_learning.py"),
)
WRITTEN = (("saelens", "by_saelens.py"), ("sparsify", "by_sparsify.py"))


def peer(name: str) -> str:
    command = [sys.executable, str(ROOT / "scripts/peer_environment.py"), name]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1]


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


def check(work: Path, update: bool) -> int:
    fixtures, written, reopened = work / "saes", work / "written", work / "reopened"
    for name, script in SCRIPTS:
        run(peer(name), HERE / script, fixtures)
    if update:
        shutil.rmtree(COMMITTED, ignore_errors=True)
        shutil.copytree(fixtures, COMMITTED)
    run(sys.executable, HERE / "ours.py", fixtures, written)
    for name, script in WRITTEN:
        run(peer(name), HERE / script, reopened, "--reopen", written / name)
    told = {"DEMUR_SAE_FIXTURES": fixtures, "DEMUR_SAE_WRITTEN": written, "DEMUR_SAE_REOPENED": reopened}
    tests = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests/test_sae_formats.py")]
    return subprocess.run(tests, env={**os.environ, **{key: str(value) for key, value in told.items()}}).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="replace tests/fixtures/saes")
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(check(Path(temporary), parser.parse_args().update))
