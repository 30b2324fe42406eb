"""The API's engine where vLLM is installed: vLLM's own, and its own handlers of chats and completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

from corpus.tokenizers import META_FILE
from models.hf import read_spec
from models.vllm_engine import engine_settings
from models.vllm_plugin import register
from serving.protocol import MOST_LOGPROBS, Answer, ApiError, ChatRequest, CompletionRequest
from serving.speaker import Voice


class VLLMApi:
    """The model in `directory`, as `name`. `open` comes first, in the event loop that asks."""

    def __init__(self, directory: Path, name: str, on_gpu: bool) -> None:
        self.voice = Voice(directory)
        self._directory, self._name, self._on_gpu = directory, name, on_gpu

    async def open(self) -> None:
        from starlette.datastructures import State
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        register()  # a worker may run this package's files without its entry points
        ours = (self._directory / META_FILE).is_file()
        flags = ["--enable-auto-tool-choice", "--tool-call-parser", "fathom"] if ours else []
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
        args.model, args.served_model_name, args.max_logprobs = str(self._directory), [self._name], MOST_LOGPROBS
        for name, value in engine_settings(read_spec(self._directory), self._on_gpu).items():
            setattr(args, name, value)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
        self._engine = AsyncLLM.from_vllm_config(config, stat_loggers=[RayPrometheusStatLogger])
        self._state: Any = State()
        await init_app_state(self._engine, self._state, args, await self._engine.get_supported_tasks())
        prompt: Any = {"prompt_token_ids": [self.voice.text.bos]}
        # What vLLM cannot compute, such as heads of an odd size, it raises at the first request only: so one token is
        # sampled for that error, which ends the replica's start.
        async for _ in self._engine.generate(prompt, SamplingParams(max_tokens=1), "first"):
            pass

    async def check(self) -> None:
        await self._engine.check_health()

    def close(self) -> None:
        self._engine.shutdown()

    async def chat(self, request: ChatRequest) -> Answer:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        async def ask() -> Any:
            asked = ChatCompletionRequest.model_validate(request.fields())
            return await self._state.openai_serving_chat.create_chat_completion(asked)

        return await _answered(ask())

    async def complete(self, request: CompletionRequest) -> Answer:
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest as VLLMRequest

        # as ids, since vLLM would take a text that spells a special token for that token
        prompts = [self.voice.encoded(prompt) for prompt in request.prompts]

        async def ask() -> Any:
            asked = VLLMRequest.model_validate(
                request.fields() | {"prompt": prompts, "stop_token_ids": [self.voice.text.bos]}
            )
            return await self._state.openai_serving_completion.create_completion(asked)

        return await _answered(ask())


async def _answered(asking: Awaitable[Any]) -> Answer:
    """What vLLM's handler gives, with its errors as ours."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    try:
        result = await asking
    except Exception as error:  # vLLM's own server tells which are the client's
        result = create_error_response(error)
    if isinstance(result, AsyncIterator):
        return result
    if (fault := getattr(result, "error", None)) is not None:
        too_long = "context length" in fault.message
        code = "context_length_exceeded" if too_long else None
        raise ApiError(fault.code, fault.message, code, fault.param)
    answer: dict[str, Any] = result.model_dump()
    return answer
