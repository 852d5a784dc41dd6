"""A language model behind any OpenAI-compatible endpoint, through the official client (extra `demur[endpoint]`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from demur.errors import InputError, MissingExtraError, NotFoundError
from demur.types import Message

if TYPE_CHECKING:
    import openai

_One = TypeVar("_One")
_Found = TypeVar("_Found")
_SAID = 200
"""Characters of what an endpoint says about an error."""
# an error about this one text, not about how we ask: too long, or stopped by the provider's own filter
_ONE_TEXT = re.compile(r"content.?(?:filter|policy|management)|context.?(?:length|size|window)|maximum context", re.I)


@dataclass(frozen=True)
class Endpoint:
    """A model at an address. Raises `InputError` for an address or a key that cannot be one."""

    url: str
    """What stands before `/chat/completions`, as http://localhost:11434/v1."""
    model: str
    api_key: str = field(default="", repr=False)
    """Sent to `url` alone: no redirect is followed."""
    temperature: float | None = 0.0
    """None: the endpoint's default."""
    max_tokens: int | None = None
    """Length of a reply at most; None: the endpoint's default."""
    concurrency: int = 4
    """Requests on their way at the same time."""
    timeout: float = 60
    """Seconds for one try. The client tries again after a lost connection, a 429 or a 5xx."""

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise InputError(f"endpoint is {self.url!r}, expected an address as http://localhost:11434/v1")
        if not self.model:
            raise InputError(f"no model is named for the endpoint {self.url}; name one that it serves")
        if not self.api_key.isascii() or not (self.api_key or " ").isprintable():
            raise InputError("OPENAI_API_KEY holds characters that no key has; set it anew")
        if self.concurrency < 1:
            raise InputError(f"concurrency is {self.concurrency}, expected at least 1")

    def say(
        self,
        asked: Sequence[str | Sequence[Message]],
        advance: Callable[[float], None] = lambda amount: None,
    ) -> list[str]:
        """The reply to each, in order: to conversations as chat, to strings as text to be continued as it stands.

        An empty reply is one without text, or a text that the endpoint takes no reply to, as too long or filtered.
        Strings go to `/completions`, which must not put a chat template around them (vLLM and llama.cpp do not, Ollama
        does). Raises `MissingExtraError` without the client, `NotFoundError` where nothing answers, `InputError` for
        any other error and for what is no reply. The first error ends all.
        """
        return self._each(self._reply, asked, advance)

    def moderate(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """The score of every category for each text, in order, from `/moderations`.

        Raises as `say`, also for a text that the endpoint does not take.
        """
        return self._each(self._scores, texts, lambda amount: None)

    def _each(
        self,
        ask: Callable[[openai.OpenAI, _One, dict[str, Any]], _Found],
        asked: Sequence[_One],
        advance: Callable[[float], None],
    ) -> list[_Found]:
        try:
            import openai
        except ImportError:
            raise MissingExtraError("openai is not installed; run `pip install 'demur[endpoint]'`") from None
        if not asked:
            return []
        # the address gets this key and nothing else of the environment, such as an organisation
        headers: dict[str, Any] = {"OpenAI-Organization": openai.omit, "OpenAI-Project": openai.omit}
        if not self.api_key:
            headers["Authorization"] = openai.omit
        with (
            openai.OpenAI(
                base_url=self.url,
                api_key=self.api_key or "none",  # the client wants one; it is not sent
                timeout=self.timeout,
                http_client=openai.DefaultHttpxClient(follow_redirects=False),
            ) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            replies = []
            for reply in pool.map(lambda one: ask(client, one, headers), asked):
                replies.append(reply)
                advance(1)
        return replies

    def _reply(self, client: openai.OpenAI, one: str | Sequence[Message], headers: dict[str, Any]) -> str:
        """One reply, or the error in a sentence."""
        import openai

        where = f"{self.url.rstrip('/')}/{'completions' if isinstance(one, str) else 'chat/completions'}"
        no_reply = InputError(f"{where} answers without a text in its choices; is it OpenAI-compatible?")
        settings: dict[str, Any] = {"model": self.model, "extra_headers": headers}
        settings |= {"temperature": self.temperature} if self.temperature is not None else {}
        settings |= {"max_tokens": self.max_tokens} if self.max_tokens is not None else {}
        made: Any  # an endpoint may answer anything
        try:
            if isinstance(one, str):
                made = client.completions.create(prompt=one, **settings)
            else:
                turns: Any = [{"role": turn.role, "content": turn.content} for turn in one]
                made = client.chat.completions.create(messages=turns, **settings)
        except openai.APIStatusError as error:
            said = " ".join(error.response.text.split())
            if error.status_code in (400, 413, 422) and _ONE_TEXT.search(said):
                return ""
            raise self._refused(where, error) from None
        except openai.APIConnectionError as error:
            raise NotFoundError(
                f"{where} does not answer ({error.__cause__ or error}); check --endpoint, or leave it out"
            ) from None
        except (openai.OpenAIError, ValueError):
            raise no_reply from None
        try:
            text = made.choices[0].text if isinstance(one, str) else made.choices[0].message.content
        except (AttributeError, LookupError, TypeError):
            raise no_reply from None
        if not isinstance(text, str | None):
            raise no_reply
        return (text or "").strip()

    def _scores(self, client: openai.OpenAI, text: str, headers: dict[str, Any]) -> dict[str, float]:
        """Of one text, or the error in a sentence."""
        import openai

        where = f"{self.url.rstrip('/')}/moderations"
        no_scores = InputError(f"{where} answers without category_scores in its results; is it OpenAI-compatible?")
        try:
            raw = client.moderations.with_raw_response.create(model=self.model, input=text, extra_headers=headers)
            made = raw.http_response.json()["results"][0]["category_scores"]
            # not by the client's own type, which has OpenAI's categories only
            found = {str(name): float(score) for name, score in made.items() if score is not None}
        except openai.APIStatusError as error:
            raise self._refused(where, error) from None
        except openai.APIConnectionError as error:
            raise NotFoundError(f"{where} does not answer ({error.__cause__ or error}); check the address") from None
        except (openai.OpenAIError, ValueError, AttributeError, LookupError, TypeError):
            raise no_scores from None
        if not found:
            raise no_scores
        return found

    def _refused(self, where: str, error: openai.APIStatusError) -> InputError:
        said = " ".join(error.response.text.split())
        said = said.replace(self.api_key, "***") if self.api_key else said
        return InputError(
            f"{where} answers {error.status_code} to {self.model!r}: {said[:_SAID] or error.response.reason_phrase}"
        )
