"""Requests and answers of OpenAI's API, as far as they are understood here; anything else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)

_PASSED_OVER = "Accepted for the sake of clients that send it; nothing is done with it."


def _no_surrogates(text: str) -> str:
    text.encode()  # UnicodeEncodeError is a ValueError
    return text


class _FirstError(FailFast):
    """A list that is wrong is left at its first error: a body may hold a million. Unions want it hashable."""

    __hash__ = object.__hash__


_FIRST = _FirstError()
Text = Annotated[str, AfterValidator(_no_surrogates)]
Stop = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_no_surrogates)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _nothing(cls, given: Any) -> Any:
        """What is null asks for nothing, whatever it is called."""
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None or key in cls.model_fields}


class TextPart(_Strict):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], _FIRST]
    type: Literal["text", "message"] | None = Field(None, description=_PASSED_OVER)
    name: Text | None = Field(None, description=_PASSED_OVER)

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """What a stream carries besides."""

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description=_PASSED_OVER)


class ResponseFormat(_Strict):
    """Plain text is the only format; the others, which need constrained decoding, are refused."""

    type: Literal["text"]


class _Request(_Strict):
    """What both kinds of request have in common."""

    model: Text = Field(description="A name of /v1/models: the model's, or a spec's.")
    demur_spec: Text | dict[str, JsonValue] | None = Field(
        None, description="The steering of this answer: a spec's name, `unsteered`, or a whole spec."
    )
    vllm_xargs: dict[str, JsonValue] | None = Field(
        None, description="As for vLLM with demur's plugin: `demur_spec` in it is read, a whole spec as JSON text."
    )
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=-1, description="Not OpenAI's: so many likeliest tokens are drawn from; 0 for all.")
    n: int | None = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: Text | None = Field(None, description=_PASSED_OVER)
    metadata: dict[str, JsonValue] | None = Field(None, description=_PASSED_OVER)

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        for key in given or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ValueError(f"the key {key[:40]!r} is no token id")
        return given

    @property
    def specs(self) -> list[Any]:
        """What the request says about its spec, besides its model's name."""
        return [self.demur_spec, (self.vllm_xargs or {}).get("demur_spec")]

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], _FIRST] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    service_tier: Text | None = Field(None, description=_PASSED_OVER)
    safety_identifier: Text | None = Field(None, description=_PASSED_OVER)
    prompt_cache_key: Text | None = Field(None, description=_PASSED_OVER)

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The length limit asked for."""
        return self.max_completion_tokens or self.max_tokens


def _kind_of_prompt(given: Any) -> str:
    """By its first item; so that a list is tried as one thing only."""
    first = given[0] if isinstance(given, list) and given else None
    kinds = {str: "texts", int: "ids", list: "rows"}
    return kinds.get(type(first), "texts") if isinstance(given, list) else "text"


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[list[Text], _FIRST, Tag("texts")]
        | Annotated[list[int], _FIRST, Tag("ids")]
        | Annotated[list[Annotated[list[int], _FIRST]], _FIRST, Tag("rows")],
        Discriminator(_kind_of_prompt),
    ] = Field(description="One text or several, as text or as token ids.")
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = Field(False, description="The prompt cannot be sent back.")
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The length limit asked for."""
        return self.max_tokens


class Usage(BaseModel):
    """Tokens read and written, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of every token of an answer."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """The answer's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class _Answered(BaseModel):
    """What every answer says about itself."""

    id: str
    created: int
    model: str
    system_fingerprint: str = Field(description="Of model and spec; the same seed repeats only under the same one.")


class ChatAnswer(_Answered):
    """What `/v1/chat/completions` gives."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new in a turn."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """What is new in one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(_Answered):
    """An event of a streamed chat answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobs(BaseModel):
    """Of every token of a text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One text, or what is new in it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class TextAnswer(_Answered):
    """What `/v1/completions` gives, streamed or not."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A name that requests may give."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["demur"] = "demur"
    spec: str = Field(description="Hash of the spec in force, or `unsteered`.")


class Models(BaseModel):
    """All names."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """What every error gives."""

    error: ErrorDetail


class Health(BaseModel):
    """How the server does."""

    status: Literal["ok", "stopped"]
    model: str
    running: int
    waiting: int
