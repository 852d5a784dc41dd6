"""Token ids to text while they are being written, up to where a stop string begins."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class TextStream:
    """The text of one answer, given out as soon as it is certain; the pieces together are the decoded answer.

    An unfinished character and what may be the beginning of a stop string are held back until more follows. Only the
    last few tokens are decoded each time: with those before them, as tokenizers drop spaces at the start of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        """Tokens whose text is known, then those since."""
        self._known = 0
        self._given = 0
        """Characters of their common text that were passed on."""
        self._held = ""
        self.stopped = False
        """A stop string has come; nothing more is given out."""

    def add(self, token: int) -> str:
        """What is certain now that `token` has come."""
        self._ids.append(token)
        text = self._decoded()
        certain = len(text.rstrip("�"))  # some tokenizers write one for every byte of a character so far
        self._held += text[self._given : certain]
        self._given = max(self._given, certain)
        if certain == len(text):
            self._ids = self._ids[self._known :]
            self._known = len(self._ids)
            self._given = len(self._decoded())
        return self._certain()

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        self._held += self._decoded()[self._given :]
        given = self._certain()
        return given if self.stopped else given + self._held

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _certain(self) -> str:
        """Of what is held, all that no stop string can begin in."""
        if self.stopped:
            return ""
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        keep = max((_begun(self._held, stop) for stop in self._stops), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
