"""`demur chat`: talk with a steered model; steering can be switched for every message."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from demur.errors import DemurError, InputError
from demur.lm.attach import Edit as Hook
from demur.lm.attach import Step, attach_all
from demur.sae.base import Reader, Sae
from demur.spec import Edit, SteeringSpec
from demur.steering.artefacts import Artefacts
from demur.types import UNSTEERED, Hookpoint, Message, parse_hookpoint
from demur.verbs.config import Chat
from demur.verbs.generate import Stream, answer, conversation, try_out
from demur.verbs.steered import Loaded, load_steered

HELP = """/on       steer the following messages
/off      leave the model as it is
/latents  show, or no longer show, how active the spec's latents are on each token of an answer: what the model
          itself does there, before the spec changes it; `-` on a last token that the model has not read back
/reset    forget the conversation
/help     this list
/quit     end (so does Ctrl-D, and Ctrl-C; while an answer runs, Ctrl-C stops that answer only)"""


def chat(config: Chat) -> None:
    """Answer every line of stdin in one conversation until `/quit`, its end or Ctrl-C.

    Answers and token views go to stdout, notices to stderr. Switching the steering holds for the whole conversation as
    it is read for the next message. Raises as `load_steered`, `steer` and `chat_ids` do, before the first
    message.
    """
    loaded = load_steered(config.steered)
    try_out(loaded)
    talk = _Talk(loaded, config)
    if config.latents and not talk.reading.names:
        raise InputError("latents are to be shown, but no spec that edits latents was given; give --spec or --latent")
    people = sys.stdin.isatty() and sys.stdout.isatty()
    if people:
        with suppress(ImportError):  # line editing for input(), where the system has it
            import readline  # noqa: F401
        _note(f"{loaded.lm.name}, spec {loaded.spec.hash}; /help lists the commands")
    while True:
        try:
            line = input(f"[{talk.spec.hash}] > " if people else "").strip()
        except (EOFError, KeyboardInterrupt):
            if people:
                print()
            return
        except UnicodeDecodeError:
            raise InputError("stdin is not UTF-8 text; convert it to UTF-8 first") from None
        if line == "/quit":
            return
        if line.startswith("/"):
            _note(talk.command(line))
        elif line:
            talk.say(line)


class _Talk:
    """The conversation and what is switched on."""

    def __init__(self, loaded: Loaded, config: Chat) -> None:
        self._loaded, self._config = loaded, config
        self.reading = LatentReading(loaded)
        """Of the spec's latents, whether steering is on or off."""
        self._on = True
        self._show = config.latents
        self._turns: list[Message] = []

    @property
    def spec(self) -> SteeringSpec:
        """In force for the next message."""
        return self._loaded.spec if self._on else SteeringSpec()

    def command(self, line: str) -> str:
        """Do what a line that starts with `/` says; returns what to tell the user."""
        match line:
            case "/on" | "/off":
                self._on = line == "/on"
                if self._loaded.spec.hash == UNSTEERED:
                    return "no spec was given, so there is nothing to switch; start with --spec FILE or --latent N"
                return f"steering is on, spec {self.spec.hash}" if self._on else "steering is off"
            case "/latents":
                self._show = not self._show
                if not self.reading.names:
                    return "the spec edits no latents, so there are none to show"
                return f"latents are {'shown' if self._show else 'no longer shown'} after each answer"
            case "/reset":
                self._turns = []
                return "the conversation is forgotten"
            case "/help":
                return HELP
        return f"{line.split()[0]} is no command; /help lists them"

    def say(self, text: str) -> None:
        """Answer a message; an answer that is stopped is kept as far as it came."""
        lm = self._loaded.lm
        turns = [*self._turns, Message("user", text)]
        # a spec's system prompt is part of the spec, so the unsteered model goes without it
        system = self._loaded.system if self._on else self._config.steered.system
        stream = Stream(lm, _write)
        hooks = self.reading.begin() if self._show else {}
        sampling = self._config.sampling
        try:
            with attach_all(lm.model, hooks):  # before the spec's own edits, so that it reads what they change
                reply = answer(self._loaded, self.spec, conversation(system, turns), sampling, stream)
        except DemurError as error:  # also a text gate's classifier that does not answer
            _note(str(error))
            return
        except KeyboardInterrupt:
            _write("\n")
            _note("stopped; what was said so far is kept" if stream.text else "stopped; the message is forgotten")
            if not stream.text:
                return
        else:
            _write("\n")
            if reply.stop == "length":
                _note(f"cut off after {reply.tokens} tokens; --max-new-tokens allows more")
        self._turns = [*turns, Message("assistant", stream.text)]
        if self._show and self.reading.names:
            show_tokens(self.reading.names, self.reading.rows(lm.tokenizer.decode, stream.ids))


class TokenRow(NamedTuple):
    """One token of an answer."""

    text: str
    acts: list[float | None]
    """Activation of each latent; None for a token that the model wrote last and has not read."""


class _Column(NamedTuple):
    """Latents of one edit, and what was read of them."""

    sae: Sae
    reader: Reader
    latents: tuple[int, ...]
    acts: dict[int, list[float]]
    """Place of a token in the answer to activations."""


class LatentReading:
    """Reads a spec's latents on the tokens of an answer, as they are before the spec edits them at their hookpoint."""

    def __init__(self, loaded: Loaded) -> None:
        """Raises as `steer` does for an SAE or latent that is not there."""
        found = Artefacts(loaded.lm.model, loaded.saes, (), {})
        self._columns: list[_Column] = []
        self._places: dict[Hookpoint, list[_Column]] = {}
        names = []
        for edit in loaded.spec.edits:
            if isinstance(edit, Edit):
                place = parse_hookpoint(edit.hookpoint)
                sae = found.sae(edit.sae, place, edit.latents)
                column = _Column(sae, sae.reader(edit.latents, loaded.spec.exact), edit.latents, {})
                self._columns.append(column)
                self._places.setdefault(place, []).append(column)
                names += [f"latent {latent} at {place}" for latent in edit.latents]
        self.names = tuple(names)
        """One for each latent, in the order of the spec."""

    def begin(self) -> Mapping[Hookpoint, Hook]:
        """Forget the last answer; returns what to attach while the next one is made, before `steer`."""
        for column in self._columns:
            column.acts.clear()
        return {place: partial(_read, columns) for place, columns in self._places.items()}

    def rows(self, decode: Callable[[int], object], ids: Sequence[int]) -> list[TokenRow]:
        """The tokens `ids` of the answer with what was read on them."""
        rows = []
        for place, token in enumerate(ids):
            acts: list[float | None] = []
            for column in self._columns:
                acts += column.acts.get(place) or [None] * len(column.latents)
            rows.append(TokenRow(str(decode(token)), acts))
        return rows


def _read(columns: Sequence[_Column], residual: Tensor, step: Step) -> Tensor:
    """Note the latents on tokens that the model wrote; the residual [1, pos, d_model] goes on as it came."""
    places = step.positions[0] - step.prompt_lengths[0]
    written = places >= 0
    if bool(written.any()):
        x = residual[0, written.to(residual.device)]
        for column in columns:
            wanted = torch.ones(len(x), len(column.latents), dtype=torch.bool, device=x.device)
            acts = column.reader(column.sae.prepare(x).x, wanted) + 0.0  # readers may say -0.0
            column.acts.update(zip(places[written].tolist(), acts.tolist(), strict=True))
    return residual


def show_tokens(names: Sequence[str], rows: Sequence[TokenRow]) -> None:
    """Show on stdout how active each latent is on each token: shaded text on a terminal, else a line per token."""
    if not sys.stdout.isatty():
        print("\t".join(["token", *names]))
        for row in rows:
            print("\t".join([repr(row.text), *("-" if act is None else f"{act:.3f}" for act in row.acts)]))
        return
    console = Console(file=sys.stdout, highlight=False)
    for number, name in enumerate(names):
        acts = [row.acts[number] or 0.0 for row in rows]
        peak = max(acts, default=0.0)
        line = Text(f"{name}, at most {peak:.3g}: ", style="dim")
        for row, act in zip(rows, acts, strict=True):
            text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in row.text)
            line.append(text, style=_shade(act / peak) if act else "not dim")
            if act:  # shades need a colour terminal, numbers do not
                line.append(f"({act:.3g})")
        console.print(line)


def _shade(share: float) -> str:
    """Darker for more of the peak, black on yellow to red."""
    return f"not dim black on rgb(255,{round(225 - 130 * share)},{round(120 - 60 * share)})"


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
