"""Write every fixture's SAE for SAELens and sparsify with demur, where they can hold it, and what demur computes.

    python scripts/sae_fixtures/ours.py FIXTURES OUT

Each OUT/LIBRARY/VARIANT holds the SAE, `inputs.safetensors` (x) and `ours.safetensors` (latents, reconstruction).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from demur.errors import InputError
from demur.sae.formats import saelens, sparsify
from demur.sae.store import load_sae


def write(fixtures: Path, out: Path) -> None:
    for expected in sorted(fixtures.rglob("expected.safetensors")):
        with safe_open(expected, "pt") as file:
            about = json.loads(file.metadata()["about"])
        loaded = load_sae(expected.parent / about["path"], about["input_scale"])
        x = load_file(expected)["x"]
        prepared = loaded.sae.prepare(x)
        latents = loaded.sae.encode_prepared(prepared.x)
        ours = {"latents": latents, "reconstruction": prepared.restore(loaded.sae.decode(latents))}
        for writer in (saelens, sparsify):
            folder = out / writer.NAME / "-".join(expected.parent.parts[-2:])
            try:
                writer.write(folder, loaded.sae, loaded.config)
            except InputError:
                continue
            save_file({"x": x}, folder / "inputs.safetensors")
            save_file({name: value.contiguous() for name, value in ours.items()}, folder / "ours.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
