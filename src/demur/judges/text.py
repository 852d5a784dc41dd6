"""Read a completion the way the rules need it: plain lower-case sentences, with quotes and code blanked.

Does not translate, stem or correct spelling.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import NamedTuple

_QUOTES = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u2032\u00b4", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"')
    | dict.fromkeys("\u2010\u2011", "-")
    | dict.fromkeys("\u2012\u2013\u2014\u2015", " - ")
    | {"\u00a0": " ", "\u2022": "-", "\u25cf": "-", "\u2026": "..."}
)
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_SPECIAL = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|</?s>|\[/?inst\]|<</?sys>>|<(?:bos|eos|pad|unk|mask|(?:end|start)_of_turn)>", re.I
)
_ROLE = re.compile(r"^\s*(?:assistant|ai|model|bot|chatbot|answer|response)\s*:\s*", re.I)

_BLOCK = r"think|thinking|thought|thoughts|reason|reasoning|reflection|scratchpad|analysis"
_CLOSED_BLOCK = re.compile(rf"<({_BLOCK})>.*?</\1>|\u25c1think\u25b7.*?\u25c1/think\u25b7", re.I | re.S)
_BLOCK_END = re.compile(rf"</(?:{_BLOCK})>|\u25c1/think\u25b7|<\|channel\|>\s*final\s*<\|message\|>", re.I)
_BLOCK_START = re.compile(rf"<(?:{_BLOCK})>|\u25c1think\u25b7|<\|channel\|>\s*(?:analysis|commentary)", re.I)

_FENCE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)", re.S)
_SPAN = re.compile(r"`[^`\n]{1,200}`")
_DOUBLE = re.compile(r'"[^"\n]{1,600}"')
_SINGLE = re.compile(r"(?<![\w'])'(?=\w)[^\n]{2,300}?(?<=[\w.,!?])'(?!\w)")
_OPEN_QUOTE = re.compile(r'(?<=[\w,:(] )"[^"\n]*$', re.M)
_LETTER_BODY = re.compile(
    r"(?:(?<=\n)|(?<=^))(?:subject:|dear (?!user|friend|human|sir|madam|customer|reader))[^\n]*\n.*",
    re.I | re.S,
)
_SPEECH = re.compile(
    r"^(?!note|warning|answer|assistant|response|disclaimer|important|instead)([a-z][\w. ']{0,24}): \S.*$",
    re.I | re.M,
)

_SPACES = re.compile(r"[^\S\n]+")
_BULLET = re.compile(r"^[ \t]*[*+](?=[ \t])", re.M)
_HEADING = re.compile(r"^[ \t]*(?:#{1,6}|>+)[ \t]*", re.M)
_EMPHASIS = re.compile(r"\*+|~~|(?<!\w)_+|_+(?!\w)")
_ALPHA = re.compile(r"[^\W\d_]")

_ITEM = re.compile(r"\s*(?:-|\(?\d{1,3}[.)](?!\d)|[a-h][.)]|step \d{1,2}[:.]?)\s*(?=\S)")
_STOP = re.compile(r"[.!?]+[\"')\]]*(?=\s)")
_ABBREVIATION = re.compile(r"(?:\b(?:mr|mrs|ms|dr|prof|st|vs|etc|approx|jr|sr|[a-z])|\b(?:e\.g|i\.e|u\.s))\.$")


class Visible(NamedTuple):
    """What a reader sees of a completion."""

    text: str
    """The answer without reasoning blocks and special tokens; case and layout as written."""
    unfinished: bool
    """A reasoning block was opened and never closed."""
    reasoned: bool
    """A reasoning block was taken out."""


@dataclass(frozen=True)
class Sentence:
    """One sentence or list item, lower case, quotes and code blanked."""

    text: str
    item: bool
    """It stands in a line with a bullet or a number."""
    words: int


def visible(text: str) -> Visible:
    """Take out special tokens and reasoning blocks (`<think>` and its kin), also one with only an end."""
    rest = _CLOSED_BLOCK.sub("", text)
    reasoned = rest != text
    ends = list(_BLOCK_END.finditer(rest))
    if ends:
        rest, reasoned = rest[ends[-1].end() :], True
    start = _BLOCK_START.search(rest)
    if start:
        rest, reasoned = rest[: start.start()], True
    rest = _INVISIBLE.sub("", _SPECIAL.sub("", rest))
    return Visible(rest.strip(), start is not None, reasoned)


def plain(text: str) -> str:
    """Straight quotes, no markdown marks, lower case; code and what others say keep length, not letters.

    Blanked are code, quoted speech, the body of a letter and the lines of a dialogue between two or more:
    their letters become `x`, so word counts survive and no phrase matches inside. A reply wrapped in quotes
    as a whole is unwrapped.
    """
    text = unicodedata.normalize("NFKC", text.translate(_QUOTES)).translate(_QUOTES)
    text = _SPACES.sub(" ", re.sub(r"(?<=\w)`(?=\w)", "'", text))
    text = _SPAN.sub(_blank, _FENCE.sub(_blank, text))
    text = _EMPHASIS.sub("", _HEADING.sub("", _BULLET.sub("-", text)))
    text = _unwrap(_ROLE.sub("", text.strip()))
    if not text.startswith("{"):  # an answer as JSON is all quotes
        text = _OPEN_QUOTE.sub(_blank, _SINGLE.sub(_blank, _DOUBLE.sub(_blank, text)))
    text = _LETTER_BODY.sub(_blank, text)
    if len({match.group(1) for match in _SPEECH.finditer(text)}) > 1:
        text = _SPEECH.sub(_blank, text)
    return text.lower()


def sentences(text: str) -> list[Sentence]:
    """Split `plain` text at line ends and full stops; common abbreviations do not end a sentence."""
    found: list[Sentence] = []
    for line in text.splitlines():
        marker = _ITEM.match(line)
        body = line[marker.end() :] if marker else line
        start = 0
        for stop in _STOP.finditer(body):
            if _ABBREVIATION.search(body, max(0, stop.start() - 12), stop.start() + 1):
                continue
            _add(found, body[start : stop.end()], marker is not None)
            start = stop.end()
        _add(found, body[start:], marker is not None)
    return found


def _add(found: list[Sentence], piece: str, item: bool) -> None:
    words = piece.split()
    if any(c.isalnum() for c in piece):
        found.append(Sentence(" ".join(words), item, len(words)))


def _blank(match: re.Match[str]) -> str:
    return _ALPHA.sub("x", match.group().replace("`", " "))


def _unwrap(text: str) -> str:
    """Drop the quotes of a reply that is quoted from its first to its last character, or never closed."""
    if text.startswith('"') and text.find('"', 1) in (-1, len(text) - 1):
        return text.strip('"').strip()
    return text
