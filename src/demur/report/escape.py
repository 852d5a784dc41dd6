"""Text of other people in a terminal, in Markdown and in LaTeX: it says the same there, and does nothing."""

from collections.abc import Iterable, Sequence

_MARKDOWN = str.maketrans({char: f"\\{char}" for char in "\\`*_[]<>|~&"})
_LATEX = str.maketrans(
    {
        **{char: f"\\{char}" for char in "{}$&#%_"},
        **{char: f"${char}$" for char in "<>|"},
        **{char: f"{{{char}}}" for char in "[]*"},  # no argument of the \\ before it
        '"': "''",  # some languages of babel make an accent of it
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "→": r"$\to$",
        "\ufffd": "?",
    }
)
_RULES = {"l": "---", "c": ":-:", "r": "--:"}


def printable(text: str) -> str:
    """`text` on one line, without control characters, lone surrogates and marks that turn its direction."""
    return " ".join("".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text).split())


def markdown(text: str) -> str:
    """Printable `text` that Markdown shows as it is, in a cell of a table too."""
    return text.translate(_MARKDOWN)


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], columns: str) -> str:
    """A table of cells that are Markdown; `columns` has `l`, `c` or `r` for each."""
    rules = [_RULES[column] for column in columns]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, rules, *rows))


def latex(text: str) -> str:
    """Printable `text` that LaTeX shows as it is; letters outside ASCII are left to the reader's engine."""
    return text.translate(_LATEX).replace("--", "-{}-")
