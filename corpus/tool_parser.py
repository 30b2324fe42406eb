"""A model's calls of the calculator as the `tool_calls` of OpenAI's API: for vLLM's server, which alone imports this.

The server is started with `--enable-auto-tool-choice --tool-call-parser fathom`. What the client computes comes back as
a message of the role tool, which the chat template writes into the turn of the assistant, which then goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.tool_parsers.abstract_tool_parser import ToolParser

from corpus.chat_template import CALCULATORS

START, END, TURN_END = "<|python_start|>", "<|python_end|>", "<|assistant_end|>"


class CalculatorParser(ToolParser):  # type: ignore[misc]
    """Calls go to the client's tool of one of the names that chats have for the calculator, with the expression as its
    first parameter; for a client without one nothing is parsed.

    The text that comes here has the token that ended it, as a call that was cut off is none. So a stop string of the
    client's own stays in it, too.
    """

    supports_required_and_named = False  # the model cannot be made to call
    engine_based_streaming = True  # of a stream comes only what is new, and `finish_streaming` at its end

    def __init__(self, tokenizer: Any, tools: list[Any] | None = None) -> None:
        super().__init__(tokenizer, tools)
        if END not in self.vocab:
            raise RuntimeError(f"the tokenizer has no {END}: the parser fathom is for models that Fathom trained")
        functions = [getattr(tool, "function", tool) for tool in self.tools]  # of the chat API, else the responses API
        self.calculator = next((function for function in functions if function.name in CALCULATORS), None)
        self.streamed, self.shown = "", 0  # the text so far, and how many of its characters the client has

    def adjust_request(self, request: Any) -> Any:
        if self._parses(request):
            request.skip_special_tokens = False
            request.include_stop_str_in_output = True
            request.stop_token_ids = [*(request.stop_token_ids or []), self.vocab[END]]
        return request

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        text, call = self._parsed(model_output) if self._parses(request) else (model_output, None)
        calls = [] if call is None else [ToolCall(function=call)]
        return ExtractedToolCallInformation(tools_called=bool(calls), tool_calls=calls, content=text)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        """What is new before a call."""
        if not self._parses(request):
            return DeltaMessage(content=delta_text)
        self.streamed += delta_text
        return self._show(self.streamed.partition(START)[0].removesuffix(TURN_END).removesuffix(END))

    def finish_streaming(self) -> DeltaMessage | None:
        """The call, or what looked like one."""
        text, call = self._parsed(self.streamed)
        message = self._show(text)
        if call is None:
            return message
        function = DeltaFunctionCall(name=call.name, arguments=call.arguments)
        made = DeltaToolCall(index=0, id=ToolCall(function=call).id, type="function", function=function)
        return DeltaMessage(content=message and message.content, tool_calls=[made])

    def _parses(self, request: Any) -> bool:
        return self.calculator is not None and request.tool_choice != "none"

    def _show(self, text: str) -> DeltaMessage | None:
        new, self.shown = text[self.shown :], max(self.shown, len(text))
        return DeltaMessage(content=new) if new else None

    def _parsed(self, text: str) -> tuple[str, FunctionCall | None]:
        """What is said before the call that `text` ends with, and the call; all of it where it ends otherwise."""
        before, start, expression = text.removesuffix(END).rpartition(START)
        if self.calculator is None or not start or not text.endswith(END):
            return text.removesuffix(END).removesuffix(TURN_END), None
        parameters = (self.calculator.parameters or {}).get("properties") or {"expression": {}}
        arguments = json.dumps({next(iter(parameters)): expression}, ensure_ascii=False)
        return before, FunctionCall(name=self.calculator.name, arguments=arguments)
