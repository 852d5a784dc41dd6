"""`demur rank`: what each method proposes as latents of refusal, and all of them together."""

from __future__ import annotations

import time
from pathlib import Path

from demur.features.proposers.union import union
from demur.record import write_json
from demur.types import LatentRanking
from demur.verbs.config import Rank
from demur.verbs.run_folder import alone, check_folder, claim, config_hash
from demur.verbs.select import begin


def rank(config: Rank) -> list[LatentRanking]:
    """A ranking by each method and, of several, by their union; also in the run folder, under `rankings/`.

    Raises as `demur.verbs.select.begin` does, and `RunExistsError` when the folder holds another run.
    """
    folder = config.out or Path("runs") / f"rank-{config.config.name}-{config_hash(config.config)[:8]}"
    check_folder(folder, config.config)
    start = time.monotonic()
    finding, run = begin("rank", config.config, folder, "rankings/union.json")
    with alone(folder):
        claim(folder, config.config, run)
        finding.clock.add("load", time.monotonic() - start)
        with finding.clock.step("propose"):
            rankings = finding.propose()
        if len(rankings) > 1:
            rankings.append(union(rankings))
            write_json(folder / "rankings" / "union.json", rankings[-1])
    return rankings
