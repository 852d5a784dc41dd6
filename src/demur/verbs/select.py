"""`demur select`: find the latent and value that make the model refuse, and say how sure that is.

Looks at the select split only. `found` does the work for `demur study` too, in the study's own run folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from demur import progress
from demur.data.prompts import OWN, load_prompts, prompts_hash, take
from demur.errors import InputError
from demur.eval.rows import FULL, refused_rate
from demur.features.controls import control_latent, firing_rates, matched_latents, random_direction
from demur.features.proposers import METHODS
from demur.features.sets import STEPS, grow, refine
from demur.lm.hookpoints import device_at
from demur.lm.load import load
from demur.record import from_json, read_json, to_json, write_json, write_text
from demur.sae.store import check_fits, load_sae
from demur.spec import DirectionEdit, SteeringSpec
from demur.types import Discovery, Effect, Intent, LatentRanking, Prompt, Run, Stability, parse_hookpoint
from demur.verbs.config import DiscoveryConfig, PromptFile, Select
from demur.verbs.discover import Candidate, Judged, effect, judge_spec, proposed, search, winners_share
from demur.verbs.finding import Finding
from demur.verbs.run_folder import Clock, alone, check_folder, claim, config_hash, new_run

TOP = 20
"""Latents of each method that are compared."""
CURVE = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0)
"""Values of the causal curve, in latent units."""
_CONTROLS = 4
"""Random matched latents."""
_POOL = 12
"""Latents that a set may take, best first."""
_SMALL = 0.5
"""Value of a set's latents, as a share of the winner's."""
_BY_PROMPTS = ("mean_difference", "rate_difference", "auroc", "cosine", "attribution", "probe")
"""Methods whose answer depends on the contrast prompts, so that halves of them mean something."""


def select(config: Select) -> Discovery:
    """Search, and return what was found, which is also `discovery.json` in the run folder, beside `report.html` and the
    winner's spec. A run of the same config found there goes on.

    Raises as `finding` does, and `RunExistsError` when the folder holds another run.
    """
    from demur.report.discovery import render_discovery

    folder = config.out or Path("runs") / f"select-{config.config.name}-{config_hash(config.config)[:8]}"
    check_folder(folder, config.config)
    start = time.monotonic()
    finding, run = begin("select", config.config, folder, "discovery.json")
    with alone(folder):
        run = claim(folder, config.config, run)
        finding.clock.add("load", time.monotonic() - start)
        page = folder / "report.html"
        discovery = replace(found(finding, config.set_size), report=str(page.resolve()))
        write_json(folder / "spec.json", finding.clamp(discovery.winner, discovery.value))
        write_text(page, render_discovery(discovery, run))
        write_json(folder / "discovery.json", discovery)
    return discovery


def begin(kind: str, config: DiscoveryConfig, folder: Path, final: str) -> tuple[Finding, Run]:
    """Load everything that `config` names; nothing is written.

    Raises `InputError`, `NotFoundError` or `MismatchError` when model, SAE, hookpoint or prompt files do not fit.
    """
    harmful = prompt_set("harmful", config.harmful, "harmful")
    plain = prompt_set("plain", config.plain, "benign")
    chosen = [take(prompts, "select", config.select_prompts) for prompts in (harmful, plain)]
    for prompts, file in zip(chosen, (config.harmful, config.plain), strict=True):
        if not prompts:
            raise InputError(
                f"{file.path} has no prompts in its select split; choosing and reporting need different prompts: "
                "add rows, or a `split` column with select and test"
            )
    loaded = load_sae(config.sae)
    hookpoint = parse_hookpoint(config.hookpoint or loaded.config.hookpoint)
    progress.say(f"loading {config.model}")
    lm = load(config.model, config.dtype, config.device, config.revision)
    device = device_at(lm.model, hookpoint)
    check_fits(loaded, lm.name, lm.fingerprint, lm.d_model, lm.n_blocks)
    loaded.sae.to(device)
    run = new_run(
        kind,
        config,
        {
            "model": lm.identity,
            "sae": loaded.hash,
            "harmful": prompts_hash(harmful),
            "plain": prompts_hash(plain),
        },
    )
    return Finding(config, folder, lm, loaded, hookpoint, chosen[0], chosen[1], Clock(folder, final)), run


def prompt_set(name: str, file: PromptFile, intent: Intent) -> list[Prompt]:
    """The prompts of one set; ids of a user's file get the set's name, as two files may use the same ids."""
    prompts = load_prompts(file.path, intent, file.column)
    if file.path in OWN:
        return prompts
    return [replace(p, id=f"{name}/{p.id}", source=f"{name}: {p.source}") for p in prompts]


def found(finding: Finding, set_size: int = 0) -> Discovery:
    """The whole discovery in the finding's run folder; steps that are there are not repeated."""
    path = finding.folder / "found.json"
    if not path.exists():
        write_json(path, _found(finding))
    discovery = from_json(Discovery, read_json(path), str(path))
    if not set_size:
        return discovery
    path = finding.folder / f"sets-{set_size}.json"
    if not path.exists():
        with finding.clock.step("sets"):
            effects = _sets(finding, discovery.ranking, discovery.finalists[0], set_size)
            singles = [_as_strong(finding, discovery, one) for one in effects]
        write_json(path, {"sets": to_json(effects), "singles": to_json(singles)})
    kept = {key: tuple(from_json(Effect, one, str(path)) for one in found) for key, found in read_json(path).items()}
    return replace(discovery, sets=kept["sets"], singles=kept["singles"], seconds=finding.clock.seconds())


def _found(finding: Finding) -> Discovery:
    clock, config = finding.clock, finding.config
    with clock.step("own refusals"):
        openings = finding.openings
    with clock.step("propose"):
        rankings = finding.propose()
    methods = proposed(finding, rankings)
    progress.say(f"  {len(methods)} latents are proposed")
    searched = search(finding, list(methods))
    best = searched.finalists[0]
    winner, value = best.candidate
    with clock.step("effects"):
        finalists = tuple(_effect_of(finding, one) for one in searched.finalists)
        curve = tuple(_at(finding, winner, v) for v in CURVE)
    with clock.step("controls"):
        controls = _controls(finding, winner, value, list(methods))
    with clock.step("stability"):
        stability = _stability(finding, rankings, winner)
    return Discovery(
        winner,
        value,
        tuple(methods[winner]),
        {one.method: _place(one, winner) for one in rankings},
        {a.method: {b.method: _common(a, b) for b in rankings} for a in rankings},
        stability,
        dict(zip((one.label for one in finalists), winners_share(searched.finalists, config.seed), strict=True)),
        len(methods),
        tuple(str(finding.lm.tokenizer.decode(list(opening))) for opening in openings.tokens),
        finalists,
        controls,
        (),
        (),
        curve,
        searched.ranking,
        clock.seconds(),
        tuple(finding.notes),
    )


def _effect_of(finding: Finding, one: Judged) -> Effect:
    latent, value = one.candidate
    return effect(finding, f"latent {latent} at {value:g}", [latent], [value], finding.clamp(latent, value), one)


def _at(finding: Finding, latent: int, value: float) -> Effect:
    return effect(finding, f"latent {latent} at {value:g}", [latent], [value], finding.clamp(latent, value))


def unrelated(finding: Finding, winner: int, related: Sequence[int]) -> int:
    """The control latent, kept in `control.json`."""
    path = finding.folder / "control.json"
    if not path.exists():
        lm, sae = finding.lm, finding.loaded.sae
        harmless = firing_rates(lm, sae, finding.hookpoint, finding.rows(finding.plain))
        harmful = firing_rates(lm, sae, finding.hookpoint, finding.rows(finding.harmful))
        control = control_latent(harmless, winner, related, harmful)
        norms = sae.W_dec.detach().float().norm(dim=1).cpu()
        drawn = torch.Generator().manual_seed(finding.config.seed)
        matched = matched_latents(harmless, norms, winner, [*related, control], _CONTROLS, drawn)
        rates = {str(i): float(harmless[i]) for i in (winner, control, *matched)}
        write_json(path, {"latent": control, "matched": matched, "firing_rates": rates})
    return int(read_json(path)["latent"])


def _controls(finding: Finding, winner: int, value: float, related: Sequence[int]) -> tuple[Effect, ...]:
    control = unrelated(finding, winner, related)
    matched = [int(i) for i in read_json(finding.folder / "control.json")["matched"]]
    effects = [
        effect(finding, f"unrelated latent {control} at {value:g}", [control], [value], finding.clamp(control, value))
    ]
    effects += [
        effect(finding, f"random latent {i} at {value:g}", [i], [value], finding.clamp(i, value)) for i in matched
    ]
    sae = finding.loaded.sae
    length = value * float(sae.W_dec[winner].detach().float().norm())
    generator = torch.Generator().manual_seed(finding.config.seed)
    direction = random_direction(sae.d_in, length, str(finding.hookpoint), generator)
    spec = SteeringSpec((DirectionEdit(str(finding.hookpoint), direction.hash),))
    finding.referee.add(direction)
    effects.append(effect(finding, "random direction", [], [], spec))
    return tuple(effects)


def _sets(finding: Finding, ranking: LatentRanking, single: Effect, size: int) -> tuple[Effect, ...]:
    """A greedy set at small values, and the same refined: both as far towards refusing as the single latent is."""
    referee = finding.referee
    spec = finding.clamp(single.latents, single.values)
    target = float(referee.log_odds([spec]).mean())
    pool = [score.latent for score in ranking.scores[:_POOL]]
    price = max(single.efficiency.value, 0.0)
    value = single.values[0] * _SMALL
    with progress.track("sets", size * len(pool) + STEPS, "specs") as advance:
        grown = grow(referee, finding.clamp, pool, value, size, target, price, advance)
        last = grown[-1]
        refined = refine(referee, finding.loaded.sae, last.latents, last.values, target, advance)
    effects = []
    for name, values in (("greedy", last.values), ("refined", refined)):
        made = finding.clamp(last.latents, values)
        label = f"{name} set of {len(values)}"
        write_json(finding.folder / "specs" / f"{made.hash}.json", made)
        judged = judge_spec(finding, Candidate(last.latents[0], values[0]), made)
        effects.append(effect(finding, label, last.latents, values, made, judged))
    return tuple(effects)


def _as_strong(finding: Finding, discovery: Discovery, some: Effect) -> Effect:
    """The winner at the smallest whole value at which it refuses as large a share of harmful select prompts as `some`;
    at its own value where none smaller does."""
    assert some.harmful_refused is not None
    for value in (*map(float, range(1, math.ceil(discovery.value))), discovery.value):
        judged = judge_spec(finding, Candidate(discovery.winner, value), finding.clamp(discovery.winner, value))
        if refused_rate(judged.harmful, FULL).value >= some.harmful_refused.value:
            break
    label = f"latent {discovery.winner} at {value:g}"
    return effect(finding, label, [discovery.winner], [value], finding.clamp(discovery.winner, value), judged)


def _stability(finding: Finding, rankings: Sequence[LatentRanking], winner: int) -> dict[str, Stability]:
    """The methods again on either half of the prompts, every other one."""
    again = [one.method for one in rankings if one.method in _BY_PROMPTS]
    path = finding.folder / "halves.json"
    if not path.exists() and again and min(len(finding.harmful), len(finding.plain)) >= 4:
        settings = [finding.setting(slice(start, None, 2)) for start in (0, 1)]
        halves = {method: [to_json(METHODS[method](setting)) for setting in settings] for method in again}
        write_json(path, halves)
    elif not path.exists():
        return {}
    stored = read_json(path)
    found = {}
    for method in again:
        one, other = (from_json(LatentRanking, half, str(path)) for half in stored[method])
        found[method] = Stability(_common(one, other), (_place(one, winner), _place(other, winner)))
    return found


def _place(ranking: LatentRanking, latent: int) -> int:
    return next((place for place, score in enumerate(ranking.scores, 1) if score.latent == latent), 0)


def _common(one: LatentRanking, other: LatentRanking) -> float:
    """Share of the first latents that two rankings have in common."""
    tops = [{score.latent for score in ranking.scores[:TOP]} for ranking in (one, other)]
    return len(tops[0] & tops[1]) / max(min(map(len, tops)), 1)
