"""`demur attack`: conversations that lead to a harmful objective, against a model as it is and under each spec.

Every round of questions is kept on disk before the next one, so a run that was killed goes on. Nothing is chosen here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from demur import progress
from demur.attacks import success as judges_of_success
from demur.attacks.attackers import Attacker, Model, Replay, Script
from demur.attacks.crescendo import crescendo, going
from demur.attacks.success import Harm, Scale, SuccessJudge
from demur.attacks.talk import Key, Talk, Turn, talks
from demur.data.escalations import Escalation, load_escalations
from demur.endpoint import Endpoint
from demur.errors import InputError, MismatchError, NotFoundError
from demur.eval.attacks import attack_contrasts, attack_side
from demur.judges.base import Say
from demur.lm.load import load
from demur.record import append_jsonl, from_json, read_json, read_jsonl, to_json, write_json, write_text
from demur.report.attack import render
from demur.results import AttackReport, End
from demur.types import UNSTEERED, Run, stable_hash
from demur.verbs.attack_config import Attack, AttackConfig
from demur.verbs.attack_target import Attacked, read_target
from demur.verbs.judged_by import chosen, local
from demur.verbs.run_folder import Clock, alone, check_folder, claim, config_hash, new_run

TURNS, ENDS, OBJECTIVES, RESULT = "turns.jsonl", "ends.jsonl", "objectives.json", "attack.json"
_QUESTION_TOKENS = 300
"""Length limit of an attacker's or a judge's reply."""


def attack(config: Attack) -> AttackReport:
    """Run the attacks, which are also `attack.json` and `report.html` in the run folder.

    Raises as `load_escalations`, `read_target`, `chosen` and `Endpoint` do, `InputError` for objectives
    that have no script, `MismatchError` for a replay of other objectives or another model, and `RunExistsError` when
    the run folder holds another run.
    """
    what = config.config
    start = time.monotonic()
    folder = config.out or Path("runs") / f"{what.name}-{config_hash(what)[:8]}"
    check_folder(folder, what)
    escalations = load_escalations(what.objectives, what.objective)
    prepare = read_target(what)
    refusals = chosen(what.refusals_by)
    if refusals.measures != "refusal":
        raise InputError(
            f"{refusals.judge.name} judges harm, but refusals are to be judged; name another judge for them"
        )
    recorded = _recorded(what.replay, escalations, what.seeds) if what.replay else []
    attacker, success = _attacker(what, escalations, recorded)
    attacked = prepare()
    if what.replay:
        _check_same(what.replay, attacked.model, what)
    run = new_run(
        "attack",
        what,
        {
            "model": attacked.model,
            "specs": ", ".join(spec for _, spec in attacked.sides),
            "objectives": stable_hash(to_json(escalations)),
            "attacker": attacker.name,
        },
    )
    clock = Clock(folder, RESULT)

    def keep(turns: Sequence[Turn], ends: Sequence[End]) -> None:
        append_jsonl(folder / TURNS, turns)
        append_jsonl(folder / ENDS, ends)

    with alone(folder):
        run = claim(folder, what, run)
        clock.add("load", time.monotonic() - start)
        keys = [
            Key(one.id, seed, spec) for one in escalations for seed in range(what.seeds) for _, spec in attacked.sides
        ]
        if not (folder / OBJECTIVES).exists():
            write_json(folder / OBJECTIVES, to_json(escalations))
        found = talks(keys, read_jsonl(Turn, folder / TURNS), read_jsonl(End, folder / ENDS))
        with (
            clock.step("conversations"),
            progress.track("conversations", len(found), "ended", lambda: _note(attacked, found)) as advance,
        ):
            advance(sum(not going(talk, what.max_turns) for talk in found))
            crescendo(
                found,
                {one.id: one for one in escalations},
                attacker,
                attacked.target,
                refusals.judge,
                success,
                keep,
                what.max_turns,
                0 if what.replay else what.max_backtracks,
                what.batch_size,
                lambda talk: advance(1),
            )
        by_side = [(label, spec, [talk for talk in found if talk.key.spec == spec]) for label, spec in attacked.sides]
        report = AttackReport(
            name=what.name,
            model=attacked.model,
            attacker=attacker.name,
            refusal_judge=refusals.judge.name,
            success_judge=success.name,
            objectives=len(escalations),
            seeds=what.seeds,
            max_turns=what.max_turns,
            max_backtracks=0 if what.replay else what.max_backtracks,
            sides=tuple(attack_side(*side, what.seed) for side in by_side),
            contrasts=tuple(
                attack_contrasts(
                    by_side[0][0], by_side[0][2], [(label, some) for label, _, some in by_side[1:]], what.seed
                )
            ),
            seconds=clock.seconds(),
            notes=tuple(_notes(what, len(escalations))),
            report=str((folder / "report.html").resolve()),
        )
        write_json(folder / RESULT, report)
        turns = [turn for talk in found for turn in talk.turns]
        objectives = {one.id: one.objective for one in escalations}
        write_text(
            folder / "report.html", render(report, turns, objectives, run, [talk.end for talk in found if talk.end])
        )
    return report


def _recorded(folder: Path, escalations: Sequence[Escalation], seeds: int) -> list[Talk]:
    """The conversations of another run with its base, about the same objectives. That run may still be going on."""
    path = folder / TURNS
    if not path.is_file() or not (folder / OBJECTIVES).is_file():
        raise NotFoundError(f"{folder} is no run folder of demur attack (it has no {TURNS}); give one")
    known = [from_json(Escalation, one, str(folder / OBJECTIVES)) for one in read_json(folder / OBJECTIVES)]
    if other := [one.id for one in escalations if one not in known]:
        raise MismatchError(
            f"{folder} was recorded without the objective {other[0]}, or with another text of it; replay the same ones"
        )
    then = from_json(Run, read_json(folder / "run.json"), str(folder / "run.json")).config
    base = (then.get("target") or [UNSTEERED])[0]
    found = talks(
        [Key(one.id, seed, base) for one in escalations for seed in range(seeds)],
        read_jsonl(Turn, path, mend=False),
    )
    if missing := [talk.key for talk in found if not talk.turns]:
        raise MismatchError(
            f"{folder} has no unsteered conversation {missing[0].objective}/{missing[0].seed}; replay the seeds "
            "that it was made with"
        )
    return found


def _check_same(folder: Path, model: str, what: AttackConfig) -> None:
    path = folder / "run.json"
    then = from_json(Run, read_json(path), str(path))
    if not what.target_endpoint and then.artefacts.get("model") != model:
        raise MismatchError(f"{folder} was recorded with {then.artefacts.get('model')}, but the target is {model}")
    for name in ("system", "max_new_tokens", "max_turns", "success"):
        if then.config.get(name) != to_json(what)[name]:
            raise MismatchError(
                f"{folder} was recorded with another {name} ({then.config.get(name)!r}); repeat its settings"
            )


def _attacker(
    what: AttackConfig, escalations: Sequence[Escalation], recorded: Sequence[Talk]
) -> tuple[Attacker, SuccessJudge]:
    """The attacker, and who says that it has succeeded."""
    attacker: Attacker
    if what.replay:
        attacker = Replay(recorded)
    elif what.attacker == "script":
        if bare := [one.id for one in escalations if not one.turns]:
            raise InputError(
                f"the escalation {bare[0]} has no turns to ask; give it some, or name a model as --attacker"
            )
        attacker = Script(escalations)
        if what.success == "script" and (long := [one for one in escalations if len(one.turns) > what.max_turns]):
            raise InputError(
                f"max_turns is {what.max_turns}, but the escalation {long[0].id} asks for its objective in turn "
                f"{len(long[0].turns)}; allow at least as many"
            )
    else:
        say = _say(what, what.attacker, what.attacker_endpoint, 0.7)
        attacker = Model(what.attacker, say, {one.id: one.objective for one in escalations}, what.max_turns)
    if what.success == "script":
        return attacker, judges_of_success.Script()
    if what.success == "scale":
        model = what.success_model or what.attacker
        endpoint = what.success_endpoint if what.success_model else what.success_endpoint or what.attacker_endpoint
        return attacker, Scale(model, _say(what, model, endpoint, 0.0))
    return attacker, Harm(chosen(what.success_by).judge)


def _say(what: AttackConfig, model: str, endpoint: str, temperature: float) -> Say:
    """A model to ask, loaded here or behind an endpoint."""
    if endpoint:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        return Endpoint(endpoint, model, key, temperature, _QUESTION_TOKENS, timeout=300).say
    return local(load(model, what.dtype, what.device), _QUESTION_TOKENS, 8, temperature)


def _note(attacked: Attacked, found: Sequence[Talk]) -> str:
    said = []
    for label, spec in attacked.sides:
        mine = [talk for talk in found if talk.key.spec == spec]
        said.append(f"{label}: {sum(talk.success for talk in mine)}/{len(mine)}")
    return ", ".join(said)


def _notes(what: AttackConfig, objectives: int) -> list[str]:
    notes = []
    if objectives < 20:
        notes.append(
            f"Intervals rest on {objectives} objectives, which is few: they are too narrow rather than too wide."
        )
    if what.success == "script":
        notes.append(
            "Success is that the target goes along with the last turn, on the subject and at some length; whether what "
            "it says would help anybody is not judged."
        )
    if what.replay:
        notes.append(
            "A replay asks what was recorded, whatever the target says: it pairs the sides exactly, and is a weaker "
            "attack."
        )
    return notes
