"""`demur eval`: what a steered model refuses, what it still can do, and how far it moved, beside the unsteered one.

Every step writes what it found into the run folder and is skipped when it is there, so a run that was killed goes on.
Nothing is chosen here: what is evaluated was chosen before, on other prompts.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from demur import progress
from demur.eval.compare import family, groups, is_share
from demur.eval.divergence import divergence, perplexity
from demur.eval.harness import run_tasks
from demur.eval.rows import ANY, FULL, refused_rate
from demur.eval.saved import COMPLETIONS, PROMPTS, RESULT, SAMPLES, SIDES, VERDICTS, text_hashes
from demur.eval.statistics import Interval, bootstrap_mean, rate
from demur.judges.rules import RulesJudge
from demur.lm.batches import Row
from demur.lm.chat import text_ids
from demur.record import append_jsonl, read_jsonl, to_json, write_json, write_jsonl
from demur.results import Damage, Evaluation, Side, SuiteRates, TaskScore
from demur.spec import SteeringSpec
from demur.text_gates import decide_each
from demur.types import UNSTEERED, Completion, Estimate, Message, Run, TaskSample, Verdict
from demur.verbs.compare import compare
from demur.verbs.eval_config import Compare, Eval
from demur.verbs.evaluating import Evaluating, begin
from demur.verbs.run_folder import alone, claim
from demur.verbs.sides import Named

REPRODUCE, REUSED = "reproduce.json", "reused.jsonl"
_WRITES = ("gsm8k", "truthfulqa_gen")
"""How the names of tasks begin in which text is written: under one spec at a time, as specs have nothing in common."""
_TEXTS, _CHOICES = 32, 16
"""Rows written together, and scored together in the other tasks. Contexts are long: 128 of GSM8K fill 16 GB."""


def evaluate(config: Eval, specs: Sequence[Named] | None = None) -> Evaluation:
    """Run the evaluation, which is also `evaluation.json` in the run folder, beside `report.html` and
    `reproduce.json`. `specs`: in place of the spec files and clamps that `config` names. Raises as `begin` does.
    """
    what = config.config
    start = time.monotonic()
    going, run = begin(config, specs)
    folder, named, clock = going.folder, going.named, going.clock
    with alone(folder):
        run = claim(folder, what, run)
        clock.add("load", time.monotonic() - start)
        sides = [Side(one.label, one.spec.hash, str(folder)) for one in named]
        write_json(folder / SIDES, to_json(sides))
        for one in named:
            write_json(folder / "specs" / f"{one.spec.hash}.json", one.spec)
        if not (folder / PROMPTS).exists():
            write_jsonl(folder / PROMPTS, going.prompts)
        judge = RulesJudge()
        with clock.step("answers"):
            verdicts = _answers(going, judge)
        with clock.step("damage"):
            damage = _damage(going)
        samples: list[TaskSample] = []
        if what.task:
            with clock.step("tasks"):
                samples = _tasks(going)
        result = Evaluation(
            name=what.name,
            model=run.artefacts["model"],
            judge=judge.name,
            sides=tuple(sides),
            suites=tuple(_suites(going, verdicts)),
            tasks=tuple(_scores(going, samples)),
            damage=damage,
            limits=going.limits,
            seconds=clock.seconds(),
            report=str((folder / "report.html").resolve()) if len(sides) > 1 else "",
        )
        write_json(folder / REPRODUCE, _reproducible(going, run, result, verdicts))
        write_json(folder / RESULT, result)
        if result.report:
            compare(Compare(runs=(str(folder),), out=folder / "report.html", seed=what.seed))
    return result


class _Judging:
    """Judges what has been answered, as it comes, and says how it stands."""

    def __init__(self, going: Evaluating, judge: RulesJudge) -> None:
        self._going, self._judge = going, judge
        self._path = going.folder / VERDICTS
        kept = [v for v in read_jsonl(Verdict, self._path) if v.judge == judge.name]
        self.verdicts = {(v.spec, v.prompt): v for v in kept}
        self._prompts = {prompt.id: prompt for prompt in going.prompts}

    def catch_up(self) -> None:
        """Judge every completion that has no verdict yet, and keep the verdicts."""
        new = [
            self._judge.judge(self._prompts[one.prompt], one)
            for one in self._going.completions.all()
            if one.prompt in self._prompts and (one.spec, one.prompt) not in self.verdicts
        ]
        if new:
            append_jsonl(self._path, new)
            self.verdicts |= {(v.spec, v.prompt): v for v in new}

    def note(self, spec: str) -> str:
        """The running rates of one spec, with their intervals."""
        said = []
        for intent, counts in (("harmful", FULL), ("benign", ANY)):
            labels = [v.label for (s, p), v in self.verdicts.items() if s == spec and self._prompts[p].intent == intent]
            if (r := refused_rate(labels, counts)).n:
                said.append(f"{intent} refused {r.k}/{r.n} [{100 * r.low:.0f}, {100 * r.high:.0f}] %")
        return ", ".join(said)


def _taken_over(going: Evaluating) -> list[Completion]:
    """What the first session of this run took over from others, so that the rest always forms the same batches."""
    path = going.folder / REUSED
    if not path.exists() and not (going.folder / COMPLETIONS).exists():
        write_jsonl(path, {(one.spec, one.prompt): one for one in going.reused}.values())
    elif not path.exists() and going.reused:
        progress.say("  --reuse comes too late for this run, which has answers already: nothing is taken over")
    return read_jsonl(Completion, path)


def _answers(going: Evaluating, judge: RulesJudge) -> dict[tuple[str, str], Verdict]:
    judging = _Judging(going, judge)
    config = going.config
    own = [prompt for prompt in going.plain if prompt.id not in {p.id for p in going.prompts}]
    reused = _taken_over(going)
    going.completions.add(reused)
    taken = {(one.spec, one.prompt) for one in reused}
    total = len(going.named) * len(going.prompts) + len(own)
    current = UNSTEERED
    with progress.track("answers", total, "prompts", lambda: judging.note(current)) as advance:

        def came(amount: float) -> None:
            judging.catch_up()
            advance(amount)

        for one in going.named:
            current = one.spec.hash
            wanted = [*going.prompts, *(own if current == UNSTEERED else ())]
            left = [prompt for prompt in wanted if (current, prompt.id) not in taken]
            came(len(wanted) - len(left))
            going.completions.complete(
                going.lm,
                left,
                one.spec,
                going.saes,
                config.system,
                config.max_new_tokens,
                config.batch_size,
                came,
                going.directions,
            )
    judging.catch_up()
    return judging.verdicts


def _damage(going: Evaluating) -> tuple[Damage, ...]:
    if not going.config.damage:
        return ()
    lm, specs = going.lm, going.specs
    said = going.completions.of(UNSTEERED, going.plain)
    answered = [(prompt, text_ids(lm, one.text)) for prompt, one in zip(going.plain, said, strict=True)]
    kept = [(prompt, answer) for prompt, answer in answered if answer]
    prompts = [prompt for prompt, _ in kept]
    items = [
        (prompt.id, row, answer)
        for (prompt, answer), row in zip(kept, going.rows(prompts, SteeringSpec()), strict=True)
    ]
    asked: dict[str, Sequence[Row]] = {spec.system: going.rows(prompts, spec) for spec in specs if spec.system}
    texts = going.texts
    common = (going.saes, going.measured, 8)
    with progress.track("KL", len(items) * len(specs), "texts") as advance:
        gates = decide_each(specs, [prompt.messages for prompt in prompts], lm.device)
        divergence(lm, going.hookpoint, items, specs, *common, advance, going.directions, asked, gates)
    with progress.track("perplexity", len(texts) * len(specs), "texts") as advance:
        # a text gate reads each text as if a user had sent it
        talks = [[Message("user", str(lm.tokenizer.decode(list(row), skip_special_tokens=True)))] for _, row in texts]
        gates = decide_each(specs, talks, lm.device)
        perplexity(lm, going.hookpoint, texts, specs, *common, advance, going.directions, gates)
    ids, pieces = [item[0] for item in items], [text[0] for text in texts]
    found = []
    for spec in specs:
        first, whole = (_mean(going, name, spec, ids) for name in ("kl_first", "kl"))
        loss = bootstrap_mean(going.measured.values("nll", spec.hash, pieces), going.config.seed)
        perplexed = Estimate(math.exp(loss.value), math.exp(loss.low), math.exp(loss.high), len(pieces))
        found.append(Damage(spec.hash, first, whole, perplexed))
    return tuple(found)


def _mean(going: Evaluating, name: Any, spec: SteeringSpec, ids: Sequence[str]) -> Estimate:
    values: Interval = bootstrap_mean(going.measured.values(name, spec.hash, ids), going.config.seed)
    return Estimate(*values, len(ids))


def _tasks(going: Evaluating) -> list[TaskSample]:
    """Every task under all specs, a file for each of both; what is finished is not run again."""
    found = []
    for number, task in enumerate(going.tasks, 1):
        paths = {spec: going.folder / SAMPLES / f"{task.name}@{spec.hash}.jsonl" for spec in going.specs}
        while left := [spec for spec in going.specs if not paths[spec].exists()]:
            writes = task.name.startswith(_WRITES)
            some = left[:1] if writes else left
            progress.say(f"  {task.name} ({number} of {len(going.tasks)})")
            made = run_tasks(
                going.lm,
                some,
                going.saes,
                {task.name: going.loaded[task.name]},
                limit=task.limit,
                batch_size=_TEXTS if writes else _CHOICES,
                directions=going.directions,
                chat=going.config.chat,
            )
            for spec in some:
                write_jsonl(paths[spec], [replace(one, group=task.group) for one in made if one.spec == spec.hash])
        for path in paths.values():
            found += read_jsonl(TaskSample, path)
    return found


def _scores(going: Evaluating, samples: Sequence[TaskSample]) -> list[TaskScore]:
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for sample in samples:
        values[family(sample), sample.metric, sample.spec].append(sample.value)
    return [
        TaskScore(task, metric, spec, _score(found, going.config.seed), "share" if is_share(metric) else "other")
        for (task, metric, spec), found in values.items()
    ]


def _score(values: Sequence[float], seed: int) -> Estimate:
    """Mean with its interval: Wilson's where every document is right or wrong, else by bootstrap."""
    if {0.0, 1.0}.issuperset(values):
        share = rate(int(sum(values)), len(values))
        return Estimate(share.value, share.low, share.high, len(values))
    return Estimate(*bootstrap_mean(values, seed), len(values))


def _suites(going: Evaluating, verdicts: dict[tuple[str, str], Verdict]) -> list[SuiteRates]:
    found = []
    for one in going.named:
        for prompts in groups(going.prompts).values():
            first = prompts[0]
            labels = [verdicts[one.spec.hash, prompt.id].label for prompt in prompts]
            scored = [label for label in labels if label != "unscored"]
            counts = FULL if first.intent == "harmful" else ANY
            said = going.completions.of(one.spec.hash, prompts)
            found.append(
                SuiteRates(
                    first.source,
                    first.intent,
                    first.wrapper,
                    one.spec.hash,
                    refused_rate(labels, counts),
                    rate(scored.count("degenerate"), len(scored)),
                    dict(Counter(labels)),
                    sum(answer.tokens for answer in said) / len(said),
                )
            )
    return found


def _reproducible(
    going: Evaluating, run: Run, result: Evaluation, verdicts: dict[tuple[str, str], Verdict]
) -> dict[str, Any]:
    """What another machine needs to do the same, and what it should find."""
    return {
        "format": "demur-reproduce/1",
        "run": to_json(run),
        "specs": [{"label": one.label, "spec": to_json(one.spec)} for one in going.named[1:]],
        "suites": to_json(result.suites),
        "tasks": to_json(result.tasks),
        "labels": {f"{spec}/{prompt}": verdict.label for (spec, prompt), verdict in verdicts.items()},
        "answers": text_hashes(one for one in going.completions.all() if (one.spec, one.prompt) in verdicts),
    }
