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
from demur.verbs.config import SaeEval, SaeTrain, Study, StudyConfig

ERROR, INTERRUPTED = 1, 130


@dataclass(frozen=True)
class Sae:
    """Train and measure sparse autoencoders."""

    verb: Annotated[
        Annotated[SaeTrain, tyro.conf.subcommand("train")] | Annotated[SaeEval, tyro.conf.subcommand("eval")],
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
            verb = _parse(arguments)
            _call(verb)
    except DemurError as error:
        return _fail(str(error), type(error).__name__, as_json, ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", "Interrupted", as_json, INTERRUPTED)
    return 0


def _parse(arguments: Sequence[str]) -> Study | SaeTrain | SaeEval:
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


def _parse_once(arguments: Sequence[str], study_default: Study) -> Study | SaeTrain | SaeEval:
    study = Annotated[Study, tyro.conf.subcommand("study", default=study_default)]
    sae = Annotated[Sae, tyro.conf.subcommand("sae")]
    chosen: Any = tyro.cli(
        study | sae,
        prog="demur",
        description="Steer what a language model refuses with SAE latents, and measure what it costs.",
        args=list(arguments) or ["--help"],
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return chosen.verb if isinstance(chosen, Sae) else chosen


def _call(verb: Study | SaeTrain | SaeEval) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(verb, Study):
        from demur.cli.show import show_study
        from demur.verbs.study import study

        show_study(study(verb.config, verb.out), verb.json)
    elif isinstance(verb, SaeTrain):
        from demur.cli.show import show_sae
        from demur.verbs.sae_train import sae_train

        show_sae(sae_train(verb), verb.json)
    else:
        from demur.cli.show import show_sae
        from demur.verbs.sae_eval import sae_eval

        show_sae(sae_eval(verb), verb.json)


def _fail(sentence: str, kind: str, as_json: bool, code: int) -> int:
    print(f"demur: {sentence}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": sentence, "kind": kind}))
    return code


if __name__ == "__main__":
    entry()
