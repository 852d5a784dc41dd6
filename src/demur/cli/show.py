"""Show what a verb returned: tables for people on stderr, one JSON object on stdout if asked."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from demur.record import to_json
from demur.types import Discovery, FeatureCard, LatentRanking, StudyResult

if TYPE_CHECKING:
    from rich.table import Table

    from demur.verbs.export import Exported
    from demur.verbs.generate import Reply
    from demur.verbs.sae_convert import Converted
    from demur.verbs.sae_inspect import Inspected
    from demur.verbs.verify import Verified


def show_json(value: Any) -> None:
    """One JSON object on stdout; numbers that are not (NaN) become null."""
    print(json.dumps(_strict(value), ensure_ascii=False, allow_nan=False))


def show_study(result: StudyResult, as_json: bool) -> None:
    """The study's table, its verdict and where the report is."""
    from demur.report.table import table, verdict_line

    _show_reported(table(result), verdict_line(result), result, as_json)


def _show_reported(table: Table, line: str, result: StudyResult | Discovery, as_json: bool) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    console.print(table)
    console.print(line, highlight=False)
    for note in result.notes:
        console.print(f"Note: {note}", highlight=False, markup=False)
    print(f"report: {result.report}", file=sys.stderr)
    if as_json:
        show_json(to_json(result))


def show_rankings(rankings: Sequence[LatentRanking], top: int, as_json: bool) -> None:
    """The first latents of each method; as JSON all of each."""
    from rich.console import Console

    from demur.report.table import ranking_table

    Console(stderr=True).print(ranking_table(rankings, top))
    if as_json:
        show_json({"rankings": to_json(list(rankings))})


def show_discovery(discovery: Discovery, as_json: bool) -> None:
    """Finalists and controls, the winner in a sentence, and what to know."""
    from demur.report.table import discovery_line, discovery_table

    _show_reported(discovery_table(discovery), discovery_line(discovery), discovery, as_json)


def show_sae(result: dict[str, Any], as_json: bool) -> None:
    """The measures of an SAE: a line each, then the tables among them."""
    _print_numbers({name: value for name, value in result["metrics"].items() if not isinstance(value, dict)})
    for name, table in result["metrics"].items():
        if name == "latents_by_rate":
            _print_rates(table)
        elif isinstance(table, dict):
            print(f"  {name}", file=sys.stderr)
            for row, values in table.items():
                cells = "   ".join(f"{column} {_number(value)}" for column, value in values.items())
                print(f"    {row:16} {cells}", file=sys.stderr)
    if as_json:
        show_json({**result["metrics"], **result})


def show_trained(saes: Sequence[dict[str, Any]], as_json: bool) -> None:
    """The measures of each SAE of a training run; as JSON one object, of the SAE or with the list `saes` of several."""
    for sae in saes:
        if len(saes) > 1:
            print(f"{sae['path']}", file=sys.stderr)
        show_sae(sae, as_json and len(saes) == 1)
    if as_json and len(saes) > 1:
        show_json({"saes": list(saes)})


def show_inspected(inspected: Inspected, as_json: bool) -> None:
    """The measures as loaded, every other reading's FVU, and what to conclude."""
    _print_numbers(inspected.metrics)
    print("  FVU of other readings", file=sys.stderr)
    for name, fvu in inspected.alternatives.items():
        print(f"    {name:28} {_number(fvu)}", file=sys.stderr)
    for sentence in inspected.sentences:
        print(f"the SAE {inspected.sae}: {sentence}", file=sys.stderr)
    if as_json:
        show_json(to_json(inspected))


def _print_numbers(values: Mapping[str, float | bool | None]) -> None:
    for name, value in values.items():
        print(f"  {name:18} {_number(value)}", file=sys.stderr)


def _number(value: float | bool | None) -> str:
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def _print_rates(rates: dict[str, Any]) -> None:
    """Histogram of firing rates, from the rarest that occurs on."""
    print("  latents by share of tokens on which they fire", file=sys.stderr)
    bins = [("never", rates["never"])]
    bins += [(f"up to 1e{edge:g}", count) for edge, count in zip(rates["edges"][1:], rates["counts"], strict=True)]
    first = next((i for i, (_, count) in enumerate(bins) if i and count), len(bins))
    most = max(max(count for _, count in bins), 1)
    for name, count in (bins[0], *bins[first:]):
        print(f"    {name:16} {count:>9,} {'#' * round(30 * count / most)}", file=sys.stderr)


def show_converted(converted: Converted, as_json: bool) -> None:
    """What was written, how close it is, and what must be known."""
    for note in converted.notes:
        print(f"Note: {note}", file=sys.stderr)
    print(
        f"{converted.to} SAE ({converted.architecture}, {converted.hookpoint or 'hookpoint unknown'}): "
        f"{converted.path}; read back, it differs by {converted.difference:.1e} of the largest value at most, over "
        f"{converted.tokens} random residuals",
        file=sys.stderr,
    )
    if as_json:
        show_json(to_json(converted))


def show_answers(answers: Sequence[Reply], as_json: bool) -> None:
    """The answers of `generate` as one object, under the spec of the last; for people they were streamed already."""
    if as_json:
        rows = [{key: value for key, value in to_json(answer).items() if key != "model"} for answer in answers]
        show_json({"model": answers[0].model, "spec": answers[-1].spec, "answers": rows})


def show_export(exported: Exported, as_json: bool) -> None:
    """What the export was allowed for, what to know about the file, and where it is."""
    before, after = exported.refused_before, exported.refused_after
    print(
        f"harmful prompts refused: {before.k} of {before.n} without the spec, {after.k} of {after.n} with it",
        file=sys.stderr,
    )
    for note in exported.notes:
        print(f"Note: {note}", file=sys.stderr)
    print(f"{exported.format} file: {exported.path}", file=sys.stderr)
    if as_json:
        show_json(to_json(exported))


def show_cards(cards: Sequence[FeatureCard], as_json: bool) -> None:
    """A few lines on each card; as JSON one object, the card itself or the list `cards` of several."""
    for card in cards:
        show_card(card)
    if as_json:
        show_json(to_json(cards[0]) if len(cards) == 1 else {"cards": to_json(list(cards))})


def show_card(card: FeatureCard) -> None:
    """Where the latent fires, what it says, what clamping it does, and where the page is."""
    lines = [
        f"latent {card.latent}: active on {card.active:,} of {card.tokens:,} tokens, {card.max_activation:.3g} at most"
    ]
    if card.description:
        lines.append(f"described by {card.description_model} (machine-written): {card.description}")
    rates = (f"{one.type} {100 * one.active / one.tokens:.2g} %" for one in card.firing)
    lines.append(f"by token type: {', '.join(rates)}")
    lines += [f"at {card.examples[0].activations[card.examples[0].peak]:.3g}: {_around(card)}"] if card.examples else []
    lines.append(f"says: {' '.join(repr(one.token) for one in card.promoted[:8])}")
    lines += [
        f"clamped to {point.value:g}: refusal log-odds {point.harmful:+.2f} on harmful prompts, {point.benign:+.2f} on "
        f"plain ones; KL {point.kl:.2g}"
        for point in card.curve[:1] + card.curve[-1:]
    ]
    lines += [f"Note: {note}" for note in card.notes]
    lines.append(f"page: {card.report}")
    print("\n  ".join(lines), file=sys.stderr)


def _around(card: FeatureCard) -> str:
    """The strongest example, shortened, its token in brackets."""
    example = card.examples[0]
    before, after = "".join(example.tokens[: example.peak])[-40:], "".join(example.tokens[example.peak + 1 :])[:20]
    return repr(f"{before}[{example.tokens[example.peak]}]{after}")


def show_checks(verified: Verified, as_json: bool) -> None:
    """Each check with what was measured, and the verdict."""
    for check in verified.checks:
        print(f"  {'passed' if check.passed else 'FAILED'}  {check.name}: {check.measured}", file=sys.stderr)
    verdict = "is applied as it says" if verified.passed else "is NOT applied as it says"
    print(f"the spec {verified.spec} {verdict} on {verified.model}", file=sys.stderr)
    if as_json:
        show_json(to_json(verified))


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return value
