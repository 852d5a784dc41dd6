"""Numbers and fields as words: the one place where the report room turns a measurement into text.

Nothing here fails on an empty rate or a NaN: both become `n/a`.
"""

import ast
import inspect
import itertools
import math
import textwrap
from collections.abc import Sequence

from demur.types import Estimate, Rate

NA = "n/a"


def finite(x: float) -> float | None:
    """`x`, or None where JSON and figures must show a gap (NaN, infinity)."""
    return x if math.isfinite(x) else None


def number(x: float, digits: int = 3) -> str:
    """A plain number with `digits` significant digits; whole numbers whole."""
    if not math.isfinite(x):
        return NA
    return f"{x:.0f}" if x == round(x) and abs(x) < 1e15 else f"{x:.{digits}g}"


def whole(x: float) -> int:
    """`x` rounded, halves away from 0, as a reader would: 62.5 is 63."""
    return math.floor(abs(x) + 0.5) * (1 if x > 0 else -1)


def signed(x: float) -> str:
    """Points with their sign, rounded: `+63`, `-4`, `0`."""
    if not math.isfinite(x):
        return NA
    return f"{whole(x):+d}" if whole(x) else "0"


def percent(rate: Rate) -> str:
    """`90 %`. A rate that is neither none nor all never rounds to 0 or 100."""
    if not rate.n:
        return NA
    value = 100 * rate.value
    if 0 < rate.k < rate.n and not 0.5 <= value < 99.5:
        return f"{min(max(value, 0.1), 99.9):.1f} %"
    return f"{whole(value)} %"


def rate_parts(rate: Rate) -> tuple[str, ...]:
    """Percent, `(k/n)` and the interval in percent; no interval where there is none."""
    parts: tuple[str, ...] = (percent(rate), f"({rate.k}/{rate.n})")
    if rate.n and math.isfinite(rate.low) and math.isfinite(rate.high):
        parts += (f"[{whole(100 * rate.low)}, {whole(100 * rate.high)}]",)
    return parts


def rate_text(rate: Rate) -> str:
    """`90 % (43/48) [78, 96]`."""
    return " ".join(rate_parts(rate))


def rate_short(rate: Rate) -> str:
    """`90 % (43/48)`."""
    return " ".join(rate_parts(rate)[:2])


def span_parts(x: float, low: float, high: float) -> tuple[str, ...]:
    """A number and its interval to the same decimals, at least two: `0.42`, `[0.38, 0.47]`."""
    if not math.isfinite(x):
        return (NA,)
    decimals = max(2, 1 - math.floor(math.log10(abs(x)))) if x else 0
    parts: tuple[str, ...] = (f"{x:.{decimals}f}",)
    if math.isfinite(low) and math.isfinite(high):
        parts += (f"[{low:.{decimals}f}, {high:.{decimals}f}]",)
    return parts


def p_text(p: float) -> str:
    """`p = 0.012`, `p < 0.001` or `p n/a`."""
    if not math.isfinite(p):
        return f"p {NA}"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def p_cell(p: float) -> str:
    """The same for a table whose heading says p."""
    return NA if not math.isfinite(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def share(x: float) -> str:
    """A fraction as `45 %`; one that is neither none nor all never rounds to 0 or 100."""
    if not math.isfinite(x):
        return NA
    if 0 < x < 1 and not 0.005 <= x < 0.995:
        return f"{min(max(100 * x, 0.1), 99.9):.1f} %"
    return f"{whole(100 * x)} %"


def estimate_text(estimate: Estimate) -> str:
    """`0.42 [0.38, 0.47]`."""
    return " ".join(span_parts(estimate.value, estimate.low, estimate.high))


def count(n: int, noun: str) -> str:
    """`1 latent`, `3 latents`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def points(before: Rate, after: Rate) -> float:
    """Change in percentage points; NaN when either side is empty."""
    return 100 * (after.value - before.value)


def duration(seconds: float) -> str:
    """`41.3 s`, `12 min 5 s`, `3 h 7 min`."""
    if not math.isfinite(seconds):
        return NA
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def field_docs(cls: type) -> dict[str, str]:
    """The sentence under each field of a dataclass, read from its source; empty where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, SyntaxError):
        return {}
    assert isinstance(tree.body[0], ast.ClassDef)
    docs = {}
    body = tree.body[0].body
    for field, below in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            docs[field.target.id] = " ".join(below.value.value.split())
    return docs
