"""Tell broken text (loops, collapsed vocabulary, junk) from odd but sound text (lists, poems, code, "42").

Measures, not meanings: fluent nonsense made of real words in a sound mix passes as text, and so does a text
in which one sentence stands twice. The floors were set by looking at 28,000 answers of public instruction
sets and chat models, cut at 12 to 500 words: fewer than 1 in 1,000 lies below, and most of those do loop.
"""

import itertools
import math
import re
from collections.abc import Sequence

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:'[^\W_]+)*")
_FENCE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)", re.S)
_MARKER = re.compile(r"^[ \t]*(?:[-+*>#\u2022]+|\(?\d{1,3}[.)])[ \t]+", re.M)
_RULE = re.compile(r"^[ \t|:+_=~*.#-]*$", re.M)
_CODE_LINE = re.compile(
    r"[;{}]\s*$|^\s*(?:[})\]]|#include|import |from \w+ import|def |class |return\b|<\w|</|//|"
    r"[$@]\w|const |let |var |public |function )|\w\([^()\n]*\)[:;]?[ \t]*$|\w (?:=|==|\+=) \S",
    re.M,
)
_REPEAT = re.compile(r"(.{1,40}?)\1{2,}", re.S)
_GAP = re.compile(r"\s+(?!\w)|(?<!\w)\s+")
_RUN = re.compile(r"(\S{1,3}?)\1{5,}")
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{5,}")
_VOWEL = re.compile(r"[aeiouy\u00c0-\u024f]")
_CASE_BREAK = re.compile(r"[a-z][A-Z]|[A-Z]{2}[a-z]{3}")
# letter pairs that words of European languages do not have
_NEVER = re.compile(
    r"q[b-hj-np-tvx-z]|j[bcfghlmpqtvwxz]|v[bcfghjkmpqtwx]|w[qvxj]|x[jkrzdg]|z[jqxfr]|[bcdfghkmpt]x|"
    r"[gkptf]q|[bcfgkp]j"
)

SHORT = 12
"""Words below which only loops and symbol runs count: a short answer is not broken for being short."""
TAIL = 60
"""Words at the end that are measured on their own: a text that starts well and ends in a loop is broken."""
_TAIL_EASE = 0.85
_LEADERS = frozenset("_-=.*#~|+")  # fill-in lines, tables, contents pages
_LONGEST_LEADER = 40
_TOKENS_READ = 4000
# Share of distinct words, and of distinct word triples, below which a text of so many words is broken.
_DISTINCT = ((12, 0.40), (24, 0.34), (48, 0.27), (100, 0.20), (200, 0.13), (500, 0.07))
_TRIPLES = ((24, 0.50), (48, 0.45), (100, 0.35), (200, 0.25), (500, 0.15))


def degenerate(text: str) -> str:
    """The measure that shows `text` to be broken, with its value, or an empty string.

    Looks, in this order, for: runs of a symbol, no words at all, a phrase said over and over, too few
    different words or word triples (whole text and last `TAIL` words), and letters that no word has. List
    markers and ruled lines never count; code counts only when it loops for most of its length.
    """
    if not text.strip():
        return "empty"
    symbols = _symbol_runs(text)
    if symbols:
        return symbols
    prose = _FENCE.sub(" ", text)
    words = _words(prose)
    if (len(words) < SHORT and prose != text) or _is_code(prose):
        return _loops(_words(text), reach=0.6, to_end=False)
    return (
        _loops(words, reach=0.3, to_end=True)
        or _collapse(words, "", 1.0)
        or _collapse(words[-TAIL:], "tail ", _TAIL_EASE)
        or _junk(prose)
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(_MARKER.sub("", text).lower().replace("\u2019", "'"))


def _is_code(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(bool(_CODE_LINE.search(line)) for line in lines) > 0.5 * len(lines)


def _symbol_runs(text: str) -> str:
    body = _GAP.sub("", _RULE.sub("", text)) or _GAP.sub("", text)
    repeated = 0
    for match in _RUN.finditer(body):
        length = len(match.group())
        if set(match.group(1)) <= _LEADERS and length <= _LONGEST_LEADER:
            continue
        repeated += length
        if length >= 12 and match.end() >= len(body) - 1:
            return f"ends in {length} x '{match.group(1)}'"
    if repeated >= 12 and repeated / len(body) >= 0.3:
        return f"symbol runs {repeated / len(body):.2f} of the text"
    drawn = "```" in text and len(set(body)) > 4
    if not drawn and not any(c.isalnum() for c in body) and not all(_is_emoji(c) for c in body):
        return f"no words, {len(body)} symbols"
    bad = body.count("\ufffd")
    if bad >= 4 and bad / len(body) >= 0.1:
        return f"unreadable characters {bad / len(body):.2f} of the text"
    return ""


def _is_emoji(char: str) -> bool:
    code = ord(char)
    return 0x2190 <= code < 0x2C00 or code >= 0x1F000 or code in (0x200D, 0xFE0F)


def _loops(words: Sequence[str], reach: float, to_end: bool) -> str:
    """A word or phrase over and over, for `reach` of the text or, with `to_end`, up to its end."""
    ids: dict[str, int] = {}
    coded = "".join(chr(0x10000 + ids.setdefault(word, len(ids))) for word in words[:_TOKENS_READ])
    names = list(ids)
    looped = 0
    for match in _REPEAT.finditer(coded):
        unit, covered = len(match.group(1)), len(match.group())
        phrase = [names[ord(c) - 0x10000] for c in match.group(1)]
        if covered < 6:
            continue
        if all(word.isdigit() for word in phrase) and covered < max(24, 0.8 * len(coded)):
            continue  # a column of numbers
        looped += covered
        ends = to_end and len(coded) - match.end() <= unit and covered >= max(8, 4 * unit)
        if ends or looped / len(coded) >= reach:
            return f"loop '{' '.join(phrase)[:40]}' x{covered // unit}"
    return ""


def _collapse(words: Sequence[str], where: str, ease: float) -> str:
    """Few different words, or few different triples of words, for a text of this length."""
    named = [word for word in words if len(word) > 1 and not word.isdigit()]
    count = len(named)
    if count < SHORT or count < len(words) / 2:
        return ""
    share = len(set(named)) / count
    if share < ease * _floor(_DISTINCT, count):
        return f"{where}distinct words {share:.2f} of {count}"
    triples = set(zip(named, named[1:], named[2:], strict=False))
    share = len(triples) / (count - 2)
    if share < ease * _floor(_TRIPLES, count):
        return f"{where}distinct triples {share:.2f} of {count - 2}"
    return ""


def _junk(prose: str) -> str:
    """Keyboard noise and token soup: letters that no word has, scripts and cases mixed inside words."""
    words = re.findall(r"(?<![#@\w])[^\W\d_]{2,}", prose)
    if len(words) < SHORT:
        return ""
    share = sum(_is_odd(word) for word in words) / len(words)
    return f"non-words {share:.2f} of {len(words)}" if share >= 0.5 else ""


def _is_odd(word: str) -> bool:
    if not word.isascii():
        return len({_script(c) for c in word}) > 1
    if word.isupper() and len(word) <= 6:
        return False  # an acronym
    low = word.lower()
    return bool(
        len(word) > 28
        or (len(word) >= 4 and not _VOWEL.search(low))
        or _CONSONANTS.search(low)
        or _NEVER.search(low)
        or _CASE_BREAK.search(word)
    )


def _script(char: str) -> str:
    code = ord(char)
    if code < 0x370 or 0x1E00 <= code < 0x1F00:
        return "latin"  # combining marks go with what they sit on
    if code < 0x400 or 0x1F00 <= code < 0x2000:
        return "greek"
    if code < 0x530:
        return "cyrillic"
    if 0x3000 <= code < 0xA000 or 0xAC00 <= code < 0xD7B0 or code >= 0xF900:
        return "cjk"
    return str(code >> 8)


def _floor(table: Sequence[tuple[int, float]], count: int) -> float:
    """Interpolate `table` over the logarithm of the length; flat outside it."""
    if count <= table[0][0]:
        return table[0][1]
    for (low, a), (high, b) in itertools.pairwise(table):
        if count <= high:
            return a + (b - a) * math.log(count / low) / math.log(high / low)
    return table[-1][1]
