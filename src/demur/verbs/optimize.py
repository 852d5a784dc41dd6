"""`demur optimize`: search for specs that refuse more of what is harmful for less of what it costs.

A trial chooses a spec, is screened without generating (`demur.features.referee`), and unless the screen rules it out is
judged on whole answers. Everything looks at the select split; `--report` measures what was found on test prompts.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from demur import progress
from demur.errors import DemurError, InputError, NotFoundError
from demur.eval.front import Look, front, prune, values
from demur.record import from_json, read_json, to_json, write_json, write_text
from demur.results import Evaluation, Optimized, Tried
from demur.spec import ProbeGate, SteeringSpec
from demur.steering.spec_file import read_spec, write_spec
from demur.types import Run
from demur.verbs.eval_config import Eval, EvalConfig, named_limit
from demur.verbs.evaluate import evaluate
from demur.verbs.optimize_config import Optimize, OptimizeConfig
from demur.verbs.optimize_space import choose
from demur.verbs.optimize_study import Trials, require_optuna
from demur.verbs.optimizing import RESULT, Optimizing, begin, threads
from demur.verbs.run_folder import alone, check_folder, claim, config_hash
from demur.verbs.sides import Named


class Picked(NamedTuple):
    """A spec that was chosen from the front."""

    path: str
    tried: Tried
    command: str
    """What measures it on prompts that it was not chosen by."""


def optimize(config: Optimize) -> Optimized:
    """Search until the run has `config.trials` trials, and return the front, which is also `optimize.json` in the run
    folder, beside `front.html`. A run found there goes on.

    Raises as `begin` does, `MissingExtraError` without Optuna, and `RunExistsError` when the folder holds another run.
    """
    from demur.report.optimize import render

    require_optuna()
    what = config.config if config.run is None else _settings(config.run, config.config)
    folder = config.run or config.out or Path("runs") / f"optimize-{config_hash(what)[:8]}"
    check_folder(folder, what)
    start = time.monotonic()
    going, run = begin(what, folder)
    with alone(folder):
        run = claim(folder, what, run)
        going.clock.add("load", time.monotonic() - start)
        trials = Trials(folder, len(what.objectives), what.seed, what.startup)
        trials.give_up()
        with going.clock.step("unsteered and space"):
            going.prepare()
        with going.clock.step("trials"):
            if config.workers == 1:
                _work(going, trials, config.trials)
            else:
                _workers(what, folder, trials, config)
        found = replace(_result(going, trials, run), report=str((folder / "front.html").resolve()))
        write_text(folder / "front.html", render(found, run))
        write_json(folder / RESULT, found)
    return found


def _settings(folder: Path, given: OptimizeConfig) -> OptimizeConfig:
    """Those of the run in `folder`. Raises `NotFoundError` without one, `InputError` where `given` has others."""
    path = folder / "run.json"
    if not path.is_file():
        raise NotFoundError(f"{folder} is no run folder (it has no run.json); give one that demur optimize wrote")
    run = from_json(Run, read_json(path), str(path))
    if run.kind != "optimize":
        raise InputError(f"{folder} holds a run of demur {run.kind}, expected one of demur optimize")
    stored = from_json(OptimizeConfig, run.config, str(path))
    if given not in (OptimizeConfig(), stored):
        mine, theirs, usual = (to_json(one) for one in (given, stored, OptimizeConfig()))
        differs = [name for name in mine if mine[name] not in (theirs[name], usual[name])]
        raise InputError(
            f"{folder} has settings of its own, and {', '.join(differs) or 'what was given'} differs; leave that out, "
            "or start another run with --out"
        )
    return stored


def _work(going: Optimizing, trials: Trials, total: int, shown: bool = True) -> None:
    """Try specs until there are `total` trials; what happens in one trial is written before the next begins."""
    config = going.config
    with progress.track("trials", total if shown else 0, "trials", partial(_note, going, trials)) as advance:
        advance(len(trials.finished()))
        while (asked := trials.ask(total, lambda trial: choose(trial, config, going.space))) is not None:
            trial, spec = asked
            start = time.monotonic()
            look = going.look(spec)
            trial.set_user_attr("spec", spec.hash)
            trial.set_user_attr("look", list(look))
            before = [Look(*one.user_attrs["look"]) for one in trials.finished() if one.values]
            rule: str | None = prune(look, before, config.inert, config.most_kl)
            found = None
            if rule is None:
                tried = going.judged(spec, trial.number)
                trial.set_user_attr("tried", to_json(tried))
                found = values(tried, going.unsteered, config.objectives)
                rule = "unscored" if any(map(math.isnan, found)) else None
            if rule is not None:
                trial.set_user_attr("pruned", rule)
            trial.set_user_attr("seconds", round(time.monotonic() - start, 2))
            trials.tell(trial, None if rule else found)
            advance(1)


def _note(going: Optimizing, trials: Trials) -> str:
    judged = sum(trial.values is not None for trial in trials.finished())
    return f"{judged} judged"


def _workers(config: OptimizeConfig, folder: Path, trials: Trials, asked: Optimize) -> None:
    """Let processes of their own try specs; each loads the model. Raises `DemurError` where one ended early."""
    context = multiprocessing.get_context("spawn")
    running = [
        context.Process(target=_worker, args=(config, folder, asked.trials, asked.workers), daemon=True)
        for _ in range(asked.workers)
    ]
    for process in running:
        process.start()
    with progress.track("trials", asked.trials, "trials") as advance:
        seen = 0
        while any(process.is_alive() for process in running):
            wait([process.sentinel for process in running if process.is_alive()], timeout=2)
            advance(-seen + (seen := len(trials.finished())))
    if codes := [process.exitcode for process in running if process.exitcode]:
        raise DemurError(
            f"{len(codes)} of {len(running)} workers ended before the search did (exit code {codes[0]}); what was "
            "finished is kept, and the same command goes on from here"
        )


def _worker(config: OptimizeConfig, folder: Path, total: int, workers: int) -> None:
    """What one process does. It ends with the one that started it, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the one that started us says what it means
    threads(workers)
    going, _ = begin(config, folder)
    _work(going, Trials(folder, len(config.objectives), config.seed, config.startup), total, shown=False)


def _result(going: Optimizing, trials: Trials, run: Run) -> Optimized:
    config, finished = going.config, trials.finished()
    tried: dict[str, Tried] = {}
    for trial in finished:
        if trial.values is not None:  # the same spec again is the same point
            one = from_json(Tried, trial.user_attrs["tried"])
            tried.setdefault(one.spec, one)
    points = [going.unsteered, *tried.values()]
    measured = [values(one, going.unsteered, config.objectives) for one in points]
    # a trial that measures as the unsteered model does is better in nothing
    on = {points[i].spec for i in front(measured) if measured[i] != measured[0]}
    best = sorted(
        (one for one in tried.values() if one.spec in on),
        key=lambda one: (-one.harmful_refused.value, one.benign_lost.value, one.kl.value),
    )
    notes = [f"{note}" for finding in going.findings for note in finding.notes]
    if not best:
        notes.append(
            "No trial is on the front: none beats the unsteered model in anything. Give it more trials, larger values "
            "or other latents."
        )
    return Optimized(
        run.name,
        run.artefacts["model"],
        going.judge.name,
        config.objectives,
        going.unsteered,
        tuple(best),
        tuple(one for one in tried.values() if one.spec not in on),
        dict(Counter(trial.user_attrs["pruned"] for trial in finished if "pruned" in trial.user_attrs)),
        trials.unfinished(),
        going.clock.seconds(),
        tuple(dict.fromkeys(notes)),
    )


def read_result(folder: Path) -> Optimized:
    """What a run found. Raises `NotFoundError` where it has not ended yet."""
    path = folder / RESULT
    if not path.is_file():
        raise NotFoundError(f"{folder} has no {RESULT}; let demur optimize end there first")
    return from_json(Optimized, read_json(path), str(path))


def _judged(folder: Path, number: int) -> tuple[Tried, SteeringSpec]:
    found = read_result(folder)
    tried = next((one for one in (*found.front, *found.others) if one.number == number), None)
    if tried is None:
        known = ", ".join(str(one.number) for one in found.front) or "none"
        raise InputError(f"trial {number} of {folder} was not judged; on the front are {known}")
    return tried, read_spec(folder / "specs" / tried.spec / "spec.json")


def pick(config: Optimize) -> Picked:
    """Write the spec of a judged trial as `NAME.json`, its probe beside it, and say what measures it on test prompts.

    Raises `NotFoundError` or `InputError` without such a run or trial, or with another spec in a file of this name.
    """
    from demur.steering.probe import load_probe, save_probe

    assert config.run is not None
    assert config.pick is not None
    what = _settings(config.run, config.config)
    tried, spec = _judged(config.run, config.pick)
    path = Path(f"{config.name.removesuffix('.json')}.json")
    if path.exists() and read_spec(path) != spec:
        raise InputError(f"{path} is there and holds another spec; choose another --name, or delete it")
    words = ["demur", "eval", "--spec", str(path)]
    if isinstance(gate := spec.gate, ProbeGate):
        probe = next(one for one in map(load_probe, what.probe) if one.hash == gate.probe)
        beside = path.with_suffix(".probe.safetensors")
        save_probe(beside, probe)
        words += ["--probe", str(beside)]
    usual = OptimizeConfig()
    if what.sae != usual.sae:
        words += ["--sae", *what.sae]
    if what.model != usual.model:
        words += ["--model", what.model]
    write_spec(path, spec)
    return Picked(str(path), tried, " ".join(words))


def report(config: Optimize) -> Evaluation:
    """Evaluate the front, or what is picked, beside the unsteered model on the test split of the run's suites: a run of
    `demur eval` in a folder of its own inside the run's. Raises as `evaluate` does, and `InputError` for an empty
    front.
    """
    assert config.run is not None
    what = _settings(config.run, config.config)
    numbers = [one.number for one in read_result(config.run).front] if config.pick is None else [config.pick]
    if not numbers:
        raise InputError(f"{config.run} has nothing on its front to report on; give the run more trials")
    chosen = [_judged(config.run, number) for number in numbers]
    named = [Named(f"trial {tried.number}", spec) for tried, spec in chosen]
    asked = EvalConfig(
        model=what.model,
        revision=what.revision,
        dtype=what.dtype,
        device=what.device,
        sae=what.sae,
        probe=what.probe,
        suite=tuple(named_limit(given)[0] for given in what.suite),
        data_dir=what.data_dir,
        system=what.system,
        max_new_tokens=what.max_new_tokens,
        batch_size=what.batch_size,
        seed=what.seed,
    )
    folder = config.run / "test" / "-".join(map(str, numbers))
    return evaluate(Eval(out=folder, config=asked), named)
