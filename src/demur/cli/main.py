"""`demur`: read the command line, call one verb, show what it returns.

People read stderr; with `--json` stdout carries one object and nothing else. Errors that demur raises on purpose
become one sentence and exit code 1; an interrupt exits with 130 and loses nothing that was written.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any

import tyro

from demur import progress
from demur.errors import DemurError
from demur.verbs.attack_config import Attack, Suffix
from demur.verbs.config import (
    Chat,
    Export,
    Generate,
    Latent,
    Rank,
    SaeConvert,
    SaeEval,
    SaeInspect,
    SaeMeasure,
    SaeTrain,
    Select,
    Study,
    StudyConfig,
    Verify,
)
from demur.verbs.eval_config import Compare, Eval, Reproduce, Suites
from demur.verbs.gate_config import GateTrain
from demur.verbs.judge_config import JudgeRun, JudgeValidate
from demur.verbs.optimize_config import Optimize
from demur.verbs.serve_config import Serve
from demur.verbs.why_config import Why

ERROR, INTERRUPTED = 1, 130
_GOES_ON = {
    *("study", "rank", "select", "optimize", "why", "gate", "eval", "judge", "reproduce", "attack", "suffix", "sae"),
}
"""Verbs that go on from where they were interrupted."""


@dataclass(frozen=True)
class Sae:
    """Train, measure, check and convert sparse autoencoders."""

    verb: Annotated[
        Annotated[SaeTrain, tyro.conf.subcommand("train")]
        | Annotated[SaeEval, tyro.conf.subcommand("eval")]
        | Annotated[SaeMeasure, tyro.conf.subcommand("measure")]
        | Annotated[SaeInspect, tyro.conf.subcommand("inspect")]
        | Annotated[SaeConvert, tyro.conf.subcommand("convert")],
        tyro.conf.arg(name=""),
    ]


@dataclass(frozen=True)
class Judge:
    """Judge the saved answers of a run again (`demur judge FOLDER`), or measure a judge against people."""

    verb: Annotated[
        Annotated[JudgeRun, tyro.conf.subcommand("run")] | Annotated[JudgeValidate, tyro.conf.subcommand("validate")],
        tyro.conf.arg(name=""),
    ]


def entry() -> None:
    """Console script."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads us has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ERROR
    sys.exit(code)


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; usage errors leave through SystemExit(2), as argparse does."""
    if list(arguments) == ["--version"]:
        print(metadata.version("demur"))
        return 0
    as_json = "--json" in arguments
    try:
        with progress.shown():
            return _call(_parse(arguments))
    except DemurError as error:
        return _fail(str(error), type(error).__name__, as_json, ERROR)
    except KeyboardInterrupt:
        goes_on = _GOES_ON & set(arguments)
        rest = "the same command goes on from here" if goes_on and "validate" not in arguments else "nothing was kept"
        return _fail(f"interrupted; {rest}", "Interrupted", as_json, INTERRUPTED)


def _parse(arguments: Sequence[str]) -> Any:
    """Parse; a study is parsed again on top of its study file and of `--quick`, so that options override both."""
    verb = _parse_once(arguments, Study())
    if isinstance(verb, Study) and (verb.file or verb.quick):
        config = StudyConfig()
        if verb.file:
            from demur.verbs.read_study import read_study

            config = read_study(verb.file)
        again = _parse_once(arguments, Study(config=config.quick() if verb.quick else config))
        assert isinstance(again, Study)
        verb = again
    return verb


def _parse_once(arguments: Sequence[str], study_default: Study) -> Any:
    study = Annotated[Study, tyro.conf.subcommand("study", default=study_default)]
    generate = Annotated[Generate, tyro.conf.subcommand("generate")]
    chat = Annotated[Chat, tyro.conf.subcommand("chat")]
    verify = Annotated[Verify, tyro.conf.subcommand("verify")]
    export = Annotated[Export, tyro.conf.subcommand("export")]
    rank = Annotated[Rank, tyro.conf.subcommand("rank")]
    select = Annotated[Select, tyro.conf.subcommand("select")]
    latent = Annotated[Latent, tyro.conf.subcommand("latent")]
    why = Annotated[Why, tyro.conf.subcommand("why")]
    optimize = Annotated[Optimize, tyro.conf.subcommand("optimize")]
    evaluate = Annotated[Eval, tyro.conf.subcommand("eval")]
    compare = Annotated[Compare, tyro.conf.subcommand("compare")]
    reproduce = Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    suites = Annotated[Suites, tyro.conf.subcommand("suites")]
    judge = Annotated[Judge, tyro.conf.subcommand("judge")]
    gate = Annotated[GateTrain, tyro.conf.subcommand("gate")]
    attack = Annotated[Attack, tyro.conf.subcommand("attack")]
    suffix = Annotated[Suffix, tyro.conf.subcommand("suffix")]
    serve = Annotated[Serve, tyro.conf.subcommand("serve")]
    sae = Annotated[Sae, tyro.conf.subcommand("sae")]
    chosen: Any = tyro.cli(
        study
        | rank
        | select
        | latent
        | why
        | optimize
        | evaluate
        | compare
        | reproduce
        | suites
        | judge
        | gate
        | attack
        | suffix
        | generate
        | chat
        | serve
        | verify
        | export
        | sae,
        prog="demur",
        description="Steer what a language model refuses with SAE latents, and measure what it costs.",
        args=_spelled_out(arguments) or ["--help"],
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return chosen.verb if isinstance(chosen, Sae | Judge) else chosen


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """`demur judge FOLDER` is short for `demur judge run FOLDER`: tyro has no default for a subcommand with a place."""
    words = list(arguments)
    if words[:2] == ["gate", "train"]:
        del words[1]  # the only thing that is done to a gate; a union of one is none to tyro
    if words[:1] == ["judge"] and words[1:] and words[1] not in ("run", "validate", "-h", "--help"):
        words.insert(1, "run")
    return words


def _call(verb: Any) -> int:
    """Run the verb and return the exit code; each imports what it needs, so that the help of none waits for torch."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from demur.cli import show, show_eval, show_judge

    match verb:
        case Study():
            from demur.verbs.study import study

            show.show_study(study(verb.config, verb.out), verb.json)
        case SaeTrain():
            from demur.verbs.sae_train import sae_train

            show.show_trained(sae_train(verb), verb.json)
        case SaeEval():
            from demur.verbs.sae_eval import sae_eval

            show.show_sae(sae_eval(verb), verb.json)
        case SaeMeasure():
            from demur.verbs.sae_measure import sae_measure

            show.show_sae(sae_measure(verb), verb.json)
        case SaeInspect():
            from demur.verbs.sae_inspect import sae_inspect

            inspected = sae_inspect(verb)
            show.show_inspected(inspected, verb.json)
            return 0 if inspected.fits else ERROR
        case SaeConvert():
            from demur.verbs.sae_convert import sae_convert

            show.show_converted(sae_convert(verb), verb.json)
        case Generate():
            from demur.verbs.generate import generate

            show.show_answers(generate(verb), verb.json)
        case Chat():
            from demur.verbs.chat import chat

            chat(verb)
        case Verify():
            from demur.verbs.verify import verify

            verified = verify(verb)
            show.show_checks(verified, verb.json)
            return 0 if verified.passed else ERROR
        case Export():
            from demur.verbs.export import export

            show.show_export(export(verb), verb.json)
        case Rank():
            from demur.verbs.rank import rank

            show.show_rankings(rank(verb), verb.top, verb.json)
        case Select():
            from demur.verbs.select import select

            show.show_discovery(select(verb), verb.json)
        case Latent():
            from demur.verbs.latent import latent

            show.show_cards(latent(verb), verb.json)
        case Optimize():
            from demur.cli import show_optimize
            from demur.verbs import optimize as search

            if verb.name:
                show_optimize.show_picked(search.pick(verb), verb.json and not verb.report)
            if verb.report:
                show_eval.show_evaluation(search.report(verb), verb.json)
            elif verb.pick is None:
                show_optimize.show_optimized(search.optimize(verb), verb.json)
        case Why():
            from demur.cli.show_why import show_why
            from demur.verbs.why import why

            show_why(why(verb), verb.json)
        case Eval():
            from demur.verbs.evaluate import evaluate

            show_eval.show_evaluation(evaluate(verb), verb.json)
        case Compare():
            from demur.verbs.compare import compare

            show_eval.show_compared(compare(verb), verb.format, verb.json)
        case Reproduce():
            from demur.verbs.reproduce import reproduce

            show_eval.show_reproduced(reproduce(verb), verb.json)
        case Suites():
            from demur.verbs.suites import suites

            show_eval.show_suites(suites(verb), verb.json)
        case JudgeRun():
            from demur.verbs.judge import judge_run

            show_judge.show_judged(judge_run(verb), verb.json)
        case JudgeValidate():
            from demur.verbs.judge_validate import judge_validate

            show_judge.show_validation(judge_validate(verb), verb.json)
        case GateTrain():
            from demur.cli.show_gate import show_gate
            from demur.verbs.gate_train import gate_train

            show_gate(gate_train(verb), verb.json)
        case Attack():
            from demur.cli.show_attack import show_attack
            from demur.verbs.attack import attack

            show_attack(attack(verb), verb.json)
        case Suffix():
            from demur.cli.show_attack import show_suffixes
            from demur.verbs.suffix import suffix

            show_suffixes(suffix(verb), verb.json)
        case Serve():
            from demur.serve.run import serve

            serve(verb)
    return 0


def _fail(sentence: str, kind: str, as_json: bool, code: int) -> int:
    print(f"demur: {sentence}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": sentence, "kind": kind}))
    return code


if __name__ == "__main__":
    entry()
