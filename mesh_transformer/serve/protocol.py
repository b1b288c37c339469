# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""Request and response schemas: OpenAI's API with a few extensions, strictly validated."""

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mesh_transformer.sample.engine.requests import MAX_TOP_LOGPROBS

MAX_SAMPLES = 128  # per prompt
MAX_STOPS = 16
MAX_REGEX = 4096  # characters
MAX_QUOTED = 200  # characters of a request quoted in an error, so that responses stay small

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
    """Error response: HTTP status, one sentence, and the request field that it refers to."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers: dict[str, str] = {}


class StrictModel(BaseModel):
    """Base of request schemas: rejects unknown fields, numbers given as strings, and NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(StrictModel):
    """Additional content of a stream."""

    include_usage: bool = False  # send one more chunk at the end, with token counts
    include_obfuscation: bool = False  # accepted and ignored


class NamedSchema(StrictModel):
    """A named JSON schema."""

    name: Annotated[str, Field(max_length=64)] = "answer"
    description: Annotated[str, Field(max_length=2000)] | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None  # ignored: always strict


class ResponseFormat(StrictModel):
    """Form of the output: any text, any JSON object, or JSON that conforms to a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def check(self) -> "ResponseFormat":
        """Check that `type` and `json_schema` agree."""
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError('type "json_schema" requires json_schema; add it, or use type "text" or "json_object"')
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(
                f'json_schema requires type "json_schema", not "{self.type}"; change type, or remove json_schema'
            )
        return self


class CommonParams(StrictModel):
    """Parameters shared by completions and chat completions. Without `seed`, every prompt has a random seed."""

    model: Annotated[str, Field(max_length=256)] | None = None  # None, or the name of the served model
    # Default of sampling parameters: --set sample.*, else the model's generation_config.json, else OpenAI's default.
    temperature: Annotated[float, Field(ge=0.0, le=10.0)] | None = None  # OpenAI's default is 1; 0: greedy decoding
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None  # equal seeds give equal texts
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    # token id -> value added to its logit
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=1024)] | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None  # accepted and ignored
    response_format: ResponseFormat | None = None
    # extensions of OpenAI's API
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # 0: off
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] | None = None
    guided_regex: Annotated[str, Field(min_length=1, max_length=MAX_REGEX)] | None = None  # matches the full output

    @model_validator(mode="after")
    def check_shared(self) -> "CommonParams":
        """Check combinations of the shared fields."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options requires stream=true; set it, or remove stream_options")
        if self.guided_regex is not None and self.response_format and self.response_format.type != "text":
            raise ValueError("guided_regex and response_format both constrain the output; remove one of them")
        return self


class CompletionRequest(CommonParams):
    """POST /v1/completions."""

    prompt: Prompt = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # None: the model's default, else 16; 0 requires echo
    best_of: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None  # samples; the n most probable are returned
    # number of most probable tokens to list for each token; 0: only the token itself
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None  # the output begins with the prompt
    suffix: Annotated[str, Field(max_length=1000)] | None = None  # rejected: no infilling
    # extensions of OpenAI's API, for prompts that are texts
    add_special_tokens: bool | None = None  # add the special tokens of the model's files, such as <s>; None: true
    parse_special: bool | None = None  # special tokens written in the prompt become their ids; None: false

    @model_validator(mode="after")
    def check(self) -> "CompletionRequest":
        """Check combinations of fields."""
        if self.suffix:
            raise ValueError(
                "suffix is not supported: this model continues text and cannot fill in the middle; remove it"
            )
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of={self.best_of} is less than n={self.n or 1}; it must be at least n")
        if self.stream and (self.best_of or 0) > (self.n or 1):
            raise ValueError(
                f"best_of={self.best_of} greater than n={self.n or 1} cannot be streamed, because the best samples are known "
                "only at the end; set stream=false, or set best_of to n"
            )
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 requires echo, otherwise the output is empty; set echo=true")
        return self


class TextPart(StrictModel):
    """A content part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class RequestMessage(StrictModel):
    """A message of a chat. Messages of responses are also valid; tool calls are not supported."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=2048)]  # parts are joined by line ends
    name: Annotated[str, Field(max_length=64)] | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def to_template(self) -> dict[str, str]:
        """Return the fields that chat templates use."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        named = {"role": self.role, "content": content, "name": self.name}
        return {name: text for name, text in named.items() if text is not None}


class ChatCompletionRequest(CommonParams):
    """POST /v1/chat/completions."""

    messages: Annotated[list[RequestMessage], Field(min_length=1, max_length=2048, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # None: the model's default, else up to seq_len
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # older name of max_completion_tokens
    logprobs: bool | None = None
    # number of most probable tokens to list for each token
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[Any] | None = None  # rejected: no tool calls

    @model_validator(mode="after")
    def check(self) -> "ChatCompletionRequest":
        """Check combinations of fields."""
        if self.tools:
            raise ValueError("tools are not supported, because this server generates only text; remove them")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the older name of max_completion_tokens; give only one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs; set logprobs=true")
        return self


class CompleteRequest(StrictModel):
    """POST /complete: the request format of mesh-transformer-jax's device_serve.py."""

    context: str
    top_p: Annotated[float, Field(gt=0.0, le=1.0)]
    temp: Annotated[float, Field(ge=0.0, le=10.0)]


class CompleteResponse(BaseModel):
    """Response of POST /complete."""

    completion: str


class Logprobs(BaseModel):
    """Natural log-probabilities in the unmodified distribution of the model; offsets count characters of the output."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One sample of a completion."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Usage(BaseModel):
    """Token counts. Each prompt counts once; generated tokens include those of stop strings and discarded samples."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """A completion, or one chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatLogprob(BaseModel):
    """A token, its natural log-probability in the unmodified distribution of the model, and its bytes, if any."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ChatLogprob):
    """A generated token with the most probable tokens at its position."""

    top_logprobs: list[ChatLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of each generated token."""

    content: list[ChatTokenLogprob]


class ResponseMessage(BaseModel):
    """Message of the model; `refusal` is always null."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One sample of a chat completion."""

    index: int
    message: ResponseMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletionResponse(BaseModel):
    """A chat completion. The choices of a stream's chunks (chat.completion.chunk) have `delta` instead of `message`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A served model. The fields from max_model_len on are extensions of OpenAI's API."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    n_vocab: int
    step: int
    defaults: dict[str, Any]


class ModelList(BaseModel):
    """The list of models, which has one entry."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """Description of an error; `param` is the request field that it refers to."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every error response."""

    error: ErrorBody


class HealthResponse(BaseModel):
    """Readiness of the server, and the reason if it is not ready."""

    status: Literal["ok", "compiling", "draining", "failed"]
    reason: str | None = None


def describe_validation_errors(errors: list[Any], known: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return one sentence for pydantic's errors in a request body, and the name of the field.

    Quotations of the request are at most MAX_QUOTED characters long.
    """
    # An invalid value is more informative than a missing field, and in a union a bound more than a wrong type.
    error = min(errors, key=lambda error: (error["type"] == "missing", error["type"].endswith("_type")))
    path = [str(part) for part in error["loc"] if part != "body"]
    names = [part for part in path if part in known] or path[:1]
    if error["type"] == "extra_forbidden":
        names = path[-1:]
    elif path[:1] == ["messages"]:
        names = path[:3]  # such as messages.0.role; the rest names the member of a union
    field = ".".join(names)[:MAX_QUOTED] or None
    message = str(error["msg"]).removeprefix("Value error, ")[: 2 * MAX_QUOTED]
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(names[-1][:MAX_QUOTED], known, n=1, cutoff=0.6)
        message = "unknown field; " + (f"did you mean {near[0]}?" if near else "remove it")
    if field == "prompt" or (names[:1] == ["prompt"]):
        message = "must be a text, a list of texts, a list of token ids, or a list of lists of token ids; no list may be empty"
        field = "prompt"
    quoted = "" if field == "prompt" else _quote_input(error)  # an element of `prompt` may differ from the given value
    return (f"{field}{quoted}: {message}" if field else message), field


def _quote_input(error: Any) -> str:
    """Return "=VALUE" for the invalid value of pydantic's error, or "" for a large number or a value that is not a scalar."""
    value = error.get("input")
    is_quoted = isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**64)
    quoted = json.dumps(value) if isinstance(value, bool) else repr(value)
    return f"={quoted}"[:MAX_QUOTED] if is_quoted and error["type"] != "extra_forbidden" else ""
