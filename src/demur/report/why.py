"""A diagnosis as one HTML page, in plain words: every sentence is written from numbers and stands by its figure.

What an interval does not support is not said: two sides differ only where the paired interval of their difference
leaves 0 out; else they "cannot be told apart". See `demur.report.page` for how the page stays closed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import acos, degrees, isfinite
from typing import NamedTuple

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from demur.report import words
from demur.report.escape import printable
from demur.report.page import asset, embed, environment, flat, policy, steps, writable
from demur.report.why_figures import DOSED, LINES, PLACED, build
from demur.results import Diagnosis, WhyContrast, WhySide
from demur.types import UNSTEERED, Estimate, Rate, Run

_NAMES = {
    "controls": "setting control latents to the same values (mean over those tried)",
    "randoms": "a push as long along a random direction (mean over those tried)",
    "means": "a push as long along the difference in means",
    "prompt": "a safety system prompt",
}
_LATENT_ROWS = 8
_KEEPS = 0.75
"""Share of the gain in refusing that counts as most of it; the interval must lie above."""


@dataclass(frozen=True)
class Section:
    """A question, its answer, and the figures that back it."""

    id: str
    heading: str
    sentences: list[str]
    figures: list[tuple[str, str]] = field(default_factory=list)
    """Id and caption."""
    key: tuple[str, ...] = ()
    """Lines that the figures have."""


class Row(NamedTuple):
    """A side as it is shown."""

    label: str
    dose: str
    kl: tuple[str, ...]
    kl_first: tuple[str, ...]
    log_odds: tuple[str, ...]
    move: tuple[str, ...]
    harmful_refused: Rate | None
    plain_refused: Rate | None
    degenerate: Rate | None
    unscored: int


class _Told:
    """A diagnosis and how to look things up in it."""

    def __init__(self, result: Diagnosis) -> None:
        self.result = result
        self.sides = {side.key: side for side in result.sides}
        self._numbers = {(one.side, one.measure, one.at): one.estimate for one in result.numbers}
        self._contrasts = {(one.measure, one.first, one.second, one.at): one for one in result.contrasts}

    def number(self, side: str, measure: str, at: str) -> Estimate | None:
        """None where it was not measured."""
        return self._numbers.get((side, measure, at))

    def contrast(self, measure: str, first: str, second: str = "edit", at: str = "answer") -> WhyContrast | None:
        """None likewise."""
        return self._contrasts.get((measure, first, second, at))

    def places(self, side: str, measure: str) -> list[str]:
        """Where it was measured, as it came."""
        return [at for one, what, at in self._numbers if (one, what) == (side, measure)]


def render(result: Diagnosis, run: Run) -> str:
    """The whole page as HTML text."""
    scripts = {"plotly": get_plotlyjs(), "page": asset("page.js")}
    plots = build(result)
    total = sum(result.seconds.values())
    html = (
        environment()
        .get_template("why.html.jinja")
        .render(
            run=run,
            result=result,
            headline=[_spaced(line) for line in headline(result)],
            sections=[section for section in sections(result) if section.sentences],
            rows=[_row(side) for side in (result.unsteered, *result.sides)],
            latents=result.latents[:_LATENT_ROWS],
            lines=LINES,
            notes=[printable(note) for note in result.notes],
            figures=plots,
            heights={name: plot["layout"]["height"] for name, plot in plots.items()},
            ranking=None,
            more_facts=[],
            steps=steps(result.seconds, total),
            total_seconds=total,
            config=flat(run.config),
            csp=policy(scripts.values()),
            css=Markup(asset("study.css")),
            scripts={name: Markup(text) for name, text in scripts.items()},
            figure_json=embed(plots),
        )
    )
    return writable(html)


def headline(result: Diagnosis) -> list[str]:
    """The diagnosis in a few sentences."""
    told, edit = _Told(result), _Told(result).sides["edit"]
    said = [
        f"{result.edits[:1].upper()}{result.edits[1:]} moves the answers to {result.plain} plain prompts by "
        f"{words.estimate_text(edit.kl)} nats per token (KL from the unsteered model)."
    ]
    was = result.unsteered
    if edit.harmful_refused and edit.plain_refused and edit.degenerate and was.harmful_refused and was.plain_refused:
        said.append(
            f"Harmful prompts refused: {words.rate_text(edit.harmful_refused)}, unsteered "
            f"{words.rate_text(was.harmful_refused)}. Plain prompts refused: {words.rate_text(edit.plain_refused)}, "
            f"unsteered {words.rate_text(was.plain_refused)}. Degenerate answers: {words.rate_text(edit.degenerate)}."
        )
    if cheapest := _cheapest(told):
        said.append(cheapest)
    if edit.kl.value == edit.kl.high == 0:
        said.append("There is no damage whose cause could be told: on these prompts the model stays as it is.")
    else:
        said.append("Where the damage comes from: " + "; ".join(_causes(told)) + ".")
    return said


def _cheapest(told: _Told) -> str:
    """The tokens whose steering alone surely does less damage and keeps most of the gain; empty where none does."""
    found = []
    for side in told.result.sides:
        damage, gain = told.contrast("kl", side.key), told.contrast("log_odds", side.key)
        if side.kind not in ("only", "but") or damage is None or gain is None or not _gains(told):
            continue
        if damage.difference.high < 0 and gain.ratio.low > _KEEPS:
            found.append((damage.ratio.value, side, damage, gain))
    if not found:
        return ""
    _, side, damage, gain = min(found, key=lambda row: row[0])
    said = (
        f"Steering {side.label} keeps {_part(gain.ratio)} of the gain in the log-odds of refusing harmful prompts at "
        f"{_part(damage.ratio)} of the damage"
    )
    if side.harmful_refused is None or side.plain_refused is None:
        return said + "; whether whole answers refuse as often was not judged."
    whole = told.sides["edit"].harmful_refused
    fewer = whole is not None and side.harmful_refused.high < whole.low
    return (
        f"{said}{', but clearly fewer whole answers refuse' if fewer else ''}: harmful prompts refused "
        f"{words.rate_text(side.harmful_refused)}, plain ones {words.rate_text(side.plain_refused)}."
    )


def _causes(told: _Told) -> list[str]:
    """Shares of the damage, a clause each; they are of different comparisons and need not add up to one."""
    found = []
    if "reconstructed" in told.sides:
        found.append("nothing is owed to the SAE's reconstruction, as its error is kept")
    elif one := told.contrast("kl", "preserving"):
        found.append(f"with the SAE's error kept it would be {_part(one.ratio)} of it")
    for other, name in (
        ("randoms", "as long a push in a random direction makes"),
        ("controls", "other latents at the same value make"),
        ("means", "as long a push along the difference in means makes"),
    ):
        if one := told.contrast("kl", other):
            found.append(f"{name} {_part(one.ratio)} of it")
    if one := told.contrast("first token", "edit"):
        found.append(f"{_part(one.ratio)} of it falls on the first token of the answer")
    alone = [one for one in told.result.contrasts if one.measure == "kl" and one.first.startswith("only ")]
    if alone:
        most = max(alone, key=lambda one: one.ratio.value)
        found.append(f"steering {most.first} tokens makes {_part(most.ratio)} of it")
    return found


def sections(result: Diagnosis) -> list[Section]:
    """All questions with their answers."""
    told = _Told(result)
    return [
        Section(
            "pushes",
            "Would any push as far do the same?",
            _pushes(told),
            [("sides", "Damage of each side"), ("pushes", "Damage against the gain in refusing")],
        ),
        Section(
            "reconstruction",
            "Is it the SAE's reconstruction?",
            _reconstruction(told),
            [("reconstruction", "With the SAE's error, without it, and without an edit")],
        ),
        Section(
            "tokens",
            "Which tokens does it come from?",
            _tokens(told),
            [("only", "Steering these tokens alone"), ("but", "Steering all but these")],
            ("tokens",),
        ),
        Section(
            "positions",
            "Where in the text does it fall?",
            _positions(told),
            [("positions", "KL by position"), ("types", "KL by type of the token predicted")],
            ("edit", "controls", "randoms", "means"),
        ),
        Section(
            "moves",
            "How far is the residual moved?",
            _moves(told),
            [
                ("ratio", "Length, by type of token"),
                ("cosine", "Direction, by type of token"),
                ("norms", "Length, by position"),
            ],
            ("edit", "controls", "randoms", "means"),
        ),
        Section(
            "distance",
            "Does the residual leave what the model is used to?",
            _distance(told),
            [("distance", "Tokens beyond 99 % of unsteered ones, by block")],
            PLACED,
        ),
        Section(
            "later",
            "What do later blocks make of it?",
            _later(told),
            [
                ("harm", "Plain prompts: how harmful they look to a probe"),
                ("refusal", "Plain prompts: how refused they look to a probe"),
                ("switched", "Latents that the edit switches"),
            ],
            PLACED,
        ),
        Section(
            "doses",
            "Does less do?",
            _doses(told),
            [
                ("dose-kl", "KL on plain prompts"),
                ("dose-odds", "Refusing, harmful prompts"),
                ("dose-harmful", "Harmful prompts refused"),
                ("dose-plain", "Plain prompts refused"),
                ("dose-degenerate", "Degenerate answers"),
            ],
            DOSED,
        ),
    ]


def against(one: WhyContrast, name: str, what: str, share: bool = True) -> str:
    """`first` against the edit: a sentence that claims what the paired interval supports, and no more.

    `share`: say what part of the edit's it is, which makes sense only where the edit surely does something.
    """
    shown = f": {_part(one.ratio)} of the edit's" if share and _known(one.ratio) else ""
    apart = f"difference {words.estimate_text(one.difference)}, {words.count(one.difference.n, 'prompt')}"
    if one.difference.low > 0:
        return f"{name} does more {what} than the edit{shown} ({apart})."
    if one.difference.high < 0:
        return f"{name} does less {what} than the edit{shown} ({apart})."
    return f"{name} and the edit cannot be told apart by {what}{shown} ({apart})."


def _pushes(told: _Told) -> list[str]:
    found = []
    for other, name in _NAMES.items():
        for measure, what in (("kl", "damage"), ("log_odds", "for refusing")):
            if one := told.contrast(measure, other):
                found.append(against(one, _upper(name), what, measure == "kl" or _gains(told)))
    members = [side for side in told.result.sides if side.kind == "control" and side.dose == 1]
    if len(members) > 1:
        low, high = min(members, key=lambda s: s.kl.value), max(members, key=lambda s: s.kl.value)
        found.append(
            f"Of {len(members)} control latents, {low.label} does least damage ({words.estimate_text(low.kl)}) and "
            f"{high.label} most ({words.estimate_text(high.kl)}): it matters which one is taken."
            if high.kl.low > low.kl.high
            else f"The {len(members)} control latents do about as much damage, from {words.estimate_text(low.kl)} to "
            f"{words.estimate_text(high.kl)}."
        )
    return found


def _reconstruction(told: _Told) -> list[str]:
    alone = told.sides.get("reconstruction")
    if alone is None:
        return []
    found = []
    other = "reconstructed" if "reconstructed" in told.sides else "edit"
    kept = "edit" if other == "reconstructed" else "preserving"
    if other == "reconstructed":
        found.append("The edit keeps the SAE's error, so none of its damage is owed to reconstruction.")
    found.append(
        f"The SAE's reconstruction in the residual's place, with no edit at all, does {words.estimate_text(alone.kl)} "
        f"nats per token; the edit within it {words.estimate_text(told.sides[other].kl)}, with the SAE's error kept "
        f"{words.estimate_text(told.sides[kept].kl)}."
    )
    if (one := told.contrast("kl", "reconstruction", other)) and isfinite(one.ratio.value):
        found.append(
            "So of the damage that the edit does in the reconstruction, as some tools carry it out, "
            f"{_part(one.ratio)} is there without any edit."
        )
    one = told.contrast("kl", "reconstruction", kept)
    if one and one.difference.low > 0:
        found.append(
            f"Reconstruction alone does {_part(one.ratio)} of the damage that the edit does with the error kept."
        )
    if one := told.contrast("kl", kept, other):
        if one.difference.high < 0:
            found.append(
                f"Keeping the error saves {words.estimate_text(_minus(one.difference))} nats per token of it "
                f"({words.count(one.difference.n, 'prompt')})."
            )
        elif one.difference.low > 0:
            found.append(
                f"Keeping the error does not help here: the damage is larger with it, by "
                f"{words.estimate_text(one.difference)}."
            )
        else:
            found.append(
                "With the error and without it the damage cannot be told apart (difference "
                f"{words.estimate_text(one.difference)}, {words.count(one.difference.n, 'prompt')})."
            )
    return found


def _tokens(told: _Told) -> list[str]:
    found = []
    for kind, how in (("only", "Steering {} tokens alone"), ("but", "Steering all but the {} tokens")):
        rows = [
            (told.contrast("kl", side.key), told.contrast("log_odds", side.key), side.key.split()[1], side)
            for side in told.result.sides
            if side.kind == kind
        ]
        some = [
            f"{how.format(name)} does {_part(damage.ratio)} of the damage"
            + (f" and {_part(gain.ratio)} of the gain in the log-odds of refusing" if gain and _gains(told) else "")
            + (
                f"; harmful prompts refused {words.rate_text(side.harmful_refused)}, plain ones "
                f"{words.rate_text(side.plain_refused)}."
                if side.harmful_refused and side.plain_refused
                else "."
            )
            for damage, gain, name, side in rows
            if damage and isfinite(damage.ratio.value)
        ]
        found += some
    if one := told.contrast("kl", "sink"):
        found.append(
            "Steering the first token of the text, an attention sink, as well "
            + (
                f"does {words.estimate_text(one.difference)} nats per token more."
                if one.difference.low > 0
                else f"does {words.estimate_text(_minus(one.difference))} nats per token less."
                if one.difference.high < 0
                else f"makes no difference that can be told ({words.estimate_text(one.difference)})."
            )
        )
    return found


def _gains(told: _Told) -> bool:
    """Whether the edit surely makes refusing likelier: only then is a share of the gain one of something."""
    return told.sides["edit"].log_odds.low > 0


def _positions(told: _Told) -> list[str]:
    edit = told.sides["edit"]
    found = [
        f"The first token of the answer moves by {words.estimate_text(edit.kl_first)} nats, all tokens by "
        f"{words.estimate_text(edit.kl)} on average."
    ]
    if (one := told.contrast("first token", "edit")) and isfinite(one.ratio.value):
        found.append(f"The first token alone holds {_part(one.ratio)} of the whole answer's damage.")
    kinds = [at for at in told.places("edit", "kl") if not at.lstrip("-").isdigit() and at != "answer"]
    if kinds:
        shown = [(kind, told.number("edit", "kl", kind)) for kind in kinds]
        found.append(
            "What the model would say at tokens of the prompt moves too: "
            + words.listed([f"{words.estimate_text(one)} at {kind} tokens" for kind, one in shown if one])
            + " (nats; of use only for where the change comes in, as the model does not write these)."
        )
    return found


def _moves(told: _Told) -> list[str]:
    kinds = told.places("edit", "ratio")
    kinds = [kind for kind in kinds if not kind.lstrip("-").isdigit()]
    found = []
    said = []
    for kind in kinds:
        ratio, cosine = told.number("edit", "ratio", kind), told.number("edit", "cosine", kind)
        if ratio and cosine and kind != "first":
            said.append(
                f"{kind} tokens {words.estimate_text(ratio)} times as long and turned by {_angle(cosine)} degrees"
            )
    if said:
        found.append(f"At {told.result.hookpoint} the edit makes the residual of {words.listed(said)}.")
    sink, rest = told.number("edit", "norm", "first"), told.number("edit", "norm", "user")
    if sink and rest and rest.value > 0:
        found.append(
            f"The first token's residual is {words.number(sink.value / rest.value)} times as long as a user token's"
            + (", and is left alone." if "sink" in told.sides else ", and is steered too.")
        )
        turned = told.number("sink", "cosine", "first")
        if turned:
            found.append(f"Steered as well, the first token turns by {_angle(turned)} degrees.")
    return found


def _angle(cosine: Estimate) -> str:
    value, low, high = (degrees(acos(max(-1.0, min(1.0, x)))) for x in (cosine.value, cosine.high, cosine.low))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _distance(told: _Told) -> list[str]:
    found = []
    for place in told.places("edit", "beyond"):
        edit, before = told.number("edit", "beyond", place), told.number(UNSTEERED, "beyond", place)
        if edit is None or before is None:
            continue
        apart = _apart(told.contrast("beyond", "edit", UNSTEERED, place))
        others = [
            f"{LINES[key][1]} {_part(one)}"
            for key in ("controls", "randoms", "means")
            if (one := told.number(key, "beyond", place))
        ]
        found.append(
            f"At {place}, {_part(edit)} of tokens are further from the usual residuals than 99 % of unsteered ones "
            f"are; unsteered, {_part(before)}{apart}" + (f"; {words.listed(others)}." if others else ".")
        )
    return found


def _apart(one: WhyContrast | None) -> str:
    """What the paired interval says of more or less, in brackets."""
    if one is None:
        return ""
    more, less = one.difference.low > 0, one.difference.high < 0
    return " (more under the edit)" if more else " (fewer under the edit)" if less else " (no difference can be told)"


def _later(told: _Told) -> list[str]:
    found = []
    asked = {"harm": "harmful prompts rather than plain ones", "refusal": "prompts that the model refuses by itself"}
    for what, name in asked.items():
        for probe in (one for one in told.result.probes if one.what == what):
            before, edit = told.number(UNSTEERED, what, probe.hookpoint), told.number("edit", what, probe.hookpoint)
            if before is None or edit is None:
                continue
            one = told.contrast(what, "edit", UNSTEERED, probe.hookpoint)
            by = ""
            if one is not None:
                clear = one.difference.low > 0 or one.difference.high < 0
                by = f", a move by {words.estimate_text(one.difference)}" if clear else ", which cannot be told apart"
            found.append(
                f"To a probe at {probe.hookpoint} that knows {name} (area under its curve "
                f"{words.number(probe.auroc, 2)} on {probe.positives} and {probe.negatives} prompts), plain prompts "
                f"stand at {words.estimate_text(before)} on its scale from 0 to 1, and under the edit at "
                f"{words.estimate_text(edit)}{by}."
            )
    for name in told.places("edit", "on"):
        on, off = told.number("edit", "on", name), told.number("edit", "off", name)
        active = told.number(UNSTEERED, "active", name) or told.number("edit", "active", name)
        if on and off and active:
            found.append(
                f"Of {name}, read again after the edit, {words.estimate_text(on)} latents per token are active that "
                f"were not, and {words.estimate_text(off)} of {words.number(active.value)} no longer are."
            )
    return found


def _doses(told: _Told) -> list[str]:
    found = []
    for side in told.result.sides:
        if side.kind != "edit" or side.dose == 1:
            continue
        damage, gain = told.contrast("kl", side.key), told.contrast("log_odds", side.key)
        if damage is None or not isfinite(damage.ratio.value):
            continue
        said = f"At {words.number(side.dose)} of the value the damage is {_part(damage.ratio)} of the whole"
        if gain and _gains(told):
            said += f", the gain in refusing {_part(gain.ratio)}"
        if side.harmful_refused and side.plain_refused:
            said += (
                f"; harmful prompts refused {words.rate_text(side.harmful_refused)}, plain ones "
                f"{words.rate_text(side.plain_refused)}"
            )
        found.append(said + ".")
    return found


def _part(one: Estimate) -> str:
    """A ratio as percent with its interval."""
    if not isfinite(one.value):
        return words.NA
    ends = f" [{words.whole(100 * one.low)}, {words.whole(100 * one.high)}]" if _known(one) else ""
    return f"{words.whole(100 * one.value)} %{ends}"


def _known(one: Estimate) -> bool:
    return all(map(isfinite, (one.value, one.low, one.high)))


def _minus(one: Estimate) -> Estimate:
    return Estimate(-one.value, -one.high, -one.low, one.n)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _spaced(text: str) -> str:
    return text.replace(" %", "\u00a0%")


def _row(side: WhySide) -> Row:
    def span(one: Estimate) -> tuple[str, ...]:
        return words.span_parts(one.value, one.low, one.high)

    return Row(
        printable(side.label),
        words.number(side.dose),
        span(side.kl),
        span(side.kl_first),
        span(side.log_odds),
        span(side.move),
        side.harmful_refused,
        side.plain_refused,
        side.degenerate,
        side.unscored,
    )


def summary(rows: Sequence[WhySide]) -> list[tuple[str, str, str, str]]:
    """Label, KL, change of log-odds, and plain prompts refused, for the terminal."""
    return [
        (
            printable(side.label) + ("" if side.dose == 1 or side.key == UNSTEERED else f" x {side.dose:g}"),
            words.estimate_text(side.kl),
            words.estimate_text(side.log_odds),
            words.rate_short(side.plain_refused) if side.plain_refused else "",
        )
        for side in rows
        if side.dose == 1 or side.kind == "edit"
    ]
