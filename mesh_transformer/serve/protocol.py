# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""What clients may ask, strictly typed, and the shape of what they get: OpenAI's wire format and a few extensions."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mesh_transformer.sample.engine.requests import MAX_TOP_LOGPROBS

MAX_SAMPLES = 128  # of one prompt
MAX_STOPS = 16
MOST_REGEX = 4096  # characters
MAX_QUOTED = 200  # characters of a client's own words at most in an error, so that answers stay small

Texts = Annotated[list[str], Field(min_length=1, max_length=2048, fail_fast=True)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=2048, fail_fast=True)]
Prompt = str | Texts | Tokens | TokenLists
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class ApiError(Exception):
    """A request that is not granted: HTTP status, one sentence, and which field it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {}


class StrictModel(BaseModel):
    """No field that is not known, no number written as a text, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(StrictModel):
    """What a stream ends with."""

    include_usage: bool = False  # one more chunk, with the numbers of tokens
    include_obfuscation: bool = False  # accepted; nothing is padded


class NamedSchema(StrictModel):
    """A JSON schema under a name."""

    name: Annotated[str, Field(max_length=64)] = "answer"
    description: Annotated[str, Field(max_length=2000)] | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # it always is


class ResponseFormat(StrictModel):
    """What the answer must be: any text, any JSON object, or JSON that a schema admits."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def check(self) -> "ResponseFormat":
        """A schema comes with its type."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with type "json_schema": give both or neither')
        return self


class CommonParams(StrictModel):
    """What completions and chats share. Without `seed` every prompt draws its own."""

    model: Annotated[str, Field(max_length=256)] | None = None  # the one that is served, if given
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] | None = None  # None: 1; 0: greedy
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None  # equal seeds draw equal texts
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=1024)] | None = None  # token id -> added to its logit
    user: Annotated[str, Field(max_length=1000)] | None = None  # accepted and not kept
    response_format: ResponseFormat | None = None
    # beyond OpenAI's
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # 0: off
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    guided_regex: Annotated[str, Field(min_length=1, max_length=MOST_REGEX)] | None = None  # the whole text matches it

    @model_validator(mode="after")
    def check_shared(self) -> "CommonParams":
        """Rules across these fields."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        if self.guided_regex is not None and self.response_format and self.response_format.type != "text":
            raise ValueError("guided_regex and response_format both constrain the answer: give one")
        return self


class CompletionRequest(CommonParams):
    """POST /v1/completions."""

    prompt: Prompt = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # None: 16, or as many as fit; 0 only with echo
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None  # drawn, of which the n likeliest are answered
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None  # likeliest tokens shown at each place
    echo: bool | None = None  # the prompt is part of the text
    suffix: Annotated[str, Field(max_length=1000)] | None = None  # refused: models here do not fill in

    @model_validator(mode="after")
    def check(self) -> "CompletionRequest":
        """Rules across fields."""
        if self.suffix:
            raise ValueError("suffix is not supported: this model continues texts, it does not fill in")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("best_of must be at least n")
        if self.stream and (self.best_of or 0) > (self.n or 1):
            raise ValueError("best_of greater than n cannot be streamed: the best are known at the end only")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 needs echo: there would be nothing to answer")
        return self


class TextPart(StrictModel):
    """A part of a message; there are no others than text."""

    type: Literal["text"]
    text: str


class Message(StrictModel):
    """What somebody said. An answer's message can be sent back as it came; models here call no tools."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=2048)]  # parts: a line each
    name: Annotated[str, Field(max_length=64)] | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def to_template(self) -> dict[str, str]:
        """What templates know of it."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        named = {"role": self.role, "content": content, "name": self.name}
        return {name: text for name, text in named.items() if text is not None}


class ChatCompletionRequest(CommonParams):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2048, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # None: as many as fit
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # its older name
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None  # likeliest tokens shown at each place
    tools: list[Any] | None = None  # refused: answers are text

    @model_validator(mode="after")
    def check(self) -> "ChatCompletionRequest":
        """Rules across fields."""
        if self.tools:
            raise ValueError("tools are not supported: this server answers with text")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the older name of max_completion_tokens: give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self


class CompleteRequest(StrictModel):
    """POST /complete, as mesh-transformer-jax's device_serve.py took it."""

    context: str
    top_p: Annotated[float, Field(gt=0.0, le=1.0)]
    temp: Annotated[float, Field(ge=0.0, le=10.0)]


class CompleteResponse(BaseModel):
    """What it gave."""

    completion: str


class Logprobs(BaseModel):
    """Token by token, natural logarithms in the model's own distribution; offsets count characters of the answer's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One sample."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Usage(BaseModel):
    """Tokens read, every prompt once, and drawn, those of stop strings and of rejected samples included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """The answer, or one chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatLogprob(BaseModel):
    """A token, its natural logarithm in the model's own distribution, and its bytes, if it has any."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ChatLogprob):
    """One that was drawn."""

    top_logprobs: list[ChatLogprob]


class ChatLogprobs(BaseModel):
    """Token by token."""

    content: list[ChatTokenLogprob]


class ResponseMessage(BaseModel):
    """What the model says; `refusal` is there for clients that look for it."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One sample."""

    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletionResponse(BaseModel):
    """The answer. In its stream, of chat.completion.chunk, choices have `delta` for `message`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """One model; the fields from max_model_len on are extensions."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    n_vocab: int
    step: int
    defaults: dict[str, Any]


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """What is wrong, in words; `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The envelope of every error."""

    error: ErrorBody


class HealthResponse(BaseModel):
    """Whether requests are answered at once, and if not, why."""

    status: Literal["ok", "compiling", "draining", "failed"]
    reason: str | None = None


def describe_validation_errors(errors: list[Any], known: Mapping[str, Any]) -> tuple[str, str | None]:
    """One sentence for what pydantic found wrong in a body, which it never quotes at length, and the field's name."""
    # What is there but wrong says more than what is missing, and in a union a value out of bounds more than a wrong type.
    error = min(errors, key=lambda error: (error["type"] == "missing", error["type"].endswith("_type")))
    place = [str(part) for part in error["loc"] if part != "body"]
    names = [part for part in place if part in known] or place[:1]
    if error["type"] == "extra_forbidden":
        names = place[-1:]
    elif place[:1] == ["messages"]:
        names = place[:3]  # such as messages.0.role; what follows is which type of several was tried
    field = ".".join(names)[:MAX_QUOTED] or None
    message = str(error["msg"]).removeprefix("Value error, ")[: 2 * MAX_QUOTED]
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(names[-1][:MAX_QUOTED], known, n=1, cutoff=0.6)
        message = "no such field" + (f"; did you mean {near[0]}?" if near else "")
    if field == "prompt" or (names[:1] == ["prompt"]):
        message = "a text, a list of texts, a list of token ids or a list of such lists is wanted, none of them empty"
        field = "prompt"
    return (f"{field}: {message}" if field else message), field
