# SPDX-FileCopyrightText: Mesh Transformer contributors
# SPDX-License-Identifier: Apache-2.0
"""POST /v1/chat/completions: renders messages with the chat template and completes them as the assistant's message."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from mesh_transformer.data.chat_template import ChatError, NoChatTemplate
from mesh_transformer.serve.completions import (
    ApiFormat,
    CompletionTask,
    Service,
    check_length,
    check_model,
    start_completion,
)
from mesh_transformer.serve.protocol import ApiError, ChatCompletionRequest, CommonParams, CompletionRequest
from mesh_transformer.serve.sample_stream import Delta, LogprobFormatter, format_chat_logprobs


@dataclasses.dataclass(frozen=True)
class ChatFormat(ApiFormat):
    """Response format of chat completions, in which samples are messages."""

    id_prefix: str = "chatcmpl"
    full_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"
    prompt_field: str = "messages"
    continues_prompt: bool = False
    format_logprobs: LogprobFormatter = format_chat_logprobs

    def first_chunk(self, index: int) -> dict[str, Any]:
        """Return the chunk that states the role of the message."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def full(self, index: int, output: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": output.logprobs,
            "finish_reason": output.finish_reason,
        }

    def chunk(self, index: int, delta: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": delta.logprobs,
            "finish_reason": delta.finish_reason,
        }


@contextlib.asynccontextmanager
async def start_chat(service: Service, request: ChatCompletionRequest) -> AsyncGenerator[CompletionTask, None]:
    """Start a chat completion. Without a maximum in the request or in the model's defaults, only seq_len limits the output.

    Raises ApiError for an invalid request.
    """
    check_model(service, request.model)
    service.engine_thread.check_capacity(request.n or 1)
    # In a thread, because rendering and encoding can be slow, and the event loop serves other requests.
    prompt = await asyncio.to_thread(_encode, service, request)
    shared = {name: getattr(request, name) for name in CommonParams.model_fields}
    completion_request = CompletionRequest(
        prompt=prompt,
        max_tokens=request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        **shared,
    )
    loaded = service.loaded_model
    chat_format = ChatFormat(
        default_max_tokens=loaded.config.model.seq_len, stop_tokens=loaded.defaults.chat_eos_token_ids
    )
    async with start_completion(service, completion_request, chat_format) as completion:
        yield completion


def _encode(service: Service, request: ChatCompletionRequest) -> list[int]:
    try:
        text = service.chat_template.render([message.to_template() for message in request.messages])
        check_length(service, text, "messages")
        return service.chat_template.encode(text)
    except ChatError as error:
        code = "no_chat_template" if isinstance(error, NoChatTemplate) else "chat_template"
        raise ApiError(400, str(error), param="messages", code=code) from None
