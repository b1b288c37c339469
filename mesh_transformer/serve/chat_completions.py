# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""POST /v1/chat/completions: a chat is a completion of the prompt that the model's template makes of it, in another form."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from mesh_transformer.data.chat_template import ChatError, NoChatTemplate
from mesh_transformer.serve.completions import CompletionTask, Service, ApiFormat, check_length, check_model, start_completion
from mesh_transformer.serve.protocol import ApiError, CommonParams, ChatCompletionRequest, CompletionRequest
from mesh_transformer.serve.sample_stream import Delta, LogprobFormatter, format_chat_logprobs


@dataclasses.dataclass(frozen=True)
class ChatFormat(ApiFormat):
    """Answers are messages."""

    kind: str = "chatcmpl"
    whole_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"
    prompt_field: str = "messages"
    continues: bool = False
    show: LogprobFormatter = format_chat_logprobs

    def opening(self, index: int) -> dict[str, Any]:
        """Who speaks."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, index: int, piece: Delta) -> dict[str, Any]:
        """See ApiFormat."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": piece.logprobs, "finish_reason": piece.finish}

    def chunk(self, index: int, piece: Delta) -> dict[str, Any]:
        """See ApiFormat."""
        delta = {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": delta, "logprobs": piece.logprobs, "finish_reason": piece.finish}


@contextlib.asynccontextmanager
async def start_chat(service: Service, request: ChatCompletionRequest) -> AsyncGenerator[CompletionTask, None]:
    """A request on its way; without a limit the answer may be as long as there is room. ApiError says what cannot be granted."""
    check_model(service, request.model)
    service.engine_thread.check_capacity(request.n or 1)
    # May take long, and the event loop answers others.
    prompt, stop_tokens = await asyncio.to_thread(_encode, service, request)
    shared = {name: getattr(request, name) for name in CommonParams.model_fields}
    asked = CompletionRequest(
        prompt=prompt,
        max_tokens=request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        **shared,
    )
    wire = ChatFormat(default_tokens=service.loaded_model.config.model.seq_len, stop_tokens=stop_tokens)
    async with start_completion(service, asked, wire) as completion:
        yield completion


def _encode(service: Service, request: ChatCompletionRequest) -> tuple[list[int], list[int]]:
    """The prompt, and what ends its answer."""
    try:
        text = service.chat_template.render([message.to_template() for message in request.messages])
        check_length(service, text, "messages")
        return service.chat_template.encode(text), service.chat_template.stop_tokens
    except ChatError as error:
        code = "no_chat_template" if isinstance(error, NoChatTemplate) else "chat_template"
        raise ApiError(400, str(error), param="messages", code=code) from None
