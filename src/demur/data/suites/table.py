"""The tables of docs/suites.md, from the entries themselves."""

from demur.data.suites.published import SUITES
from demur.data.suites.suite import Suite
from demur.data.wrappers import IN_THE_WILD, SHEN, WRAPPERS


def render(page: str) -> str:
    """`page` with the tables between its `<!-- NAME -->` and `<!-- end -->` lines written anew."""
    for name, table in (("suites", _suites()), ("wrappers", _wrappers())):
        before, marker, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page = f"{before}{marker}{table}{end}{after}"
    return page


def _suites() -> str:
    lines = [
        "| suite | what | harmful | benign | licence | paper | file for `--data-dir` | hub |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for suite in SUITES:
        counts = (_count(suite, "harmful", suite.harmful), _count(suite, "benign", suite.benign))
        files = ", ".join(f"`{part.files[0]}`" for part in suite.parts) or "comes with demur"
        hub = f"`{suite.hub}`{' (gated)' if suite.gated else ''}" if suite.hub else ""
        title = f"[{suite.title}]({suite.homepage})" if suite.homepage else suite.title
        what = f"{title}; {suite.note}" if suite.note else title
        row = (f"`{suite.name}`", what, *counts, suite.licence, suite.paper, files, hub)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _wrappers() -> str:
    rows = [(wrapper.name, wrapper.what, wrapper.source) for wrapper in WRAPPERS]
    rows.append((IN_THE_WILD, "jailbreaks that people wrote, from a file", SHEN))
    lines = [f"| `{name}` | {what} | {source} |" for name, what, source in rows]
    return "\n".join(["| wrapper | what it does | after |", "|---|---|---|", *lines]) + "\n"


def _count(suite: Suite, intent: str, count: int | None) -> str:
    return "" if intent not in suite.intents else "?" if count is None else f"{count:,}"
