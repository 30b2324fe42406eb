"""A client of OpenAI's API that runs the calculator for a chat model which vLLM serves.

.venv/bin/python docs/examples/calculator_client.py http://localhost:8000/v1 "Ivy buys 19 bags ..."
"""

from __future__ import annotations

import json
import sys
from typing import Any

from openai import OpenAI

from tasks.calculator import calculate

CALCULATOR: Any = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "The value of an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


def answer(client: OpenAI, messages: list[Any], **settings: Any) -> list[Any]:
    """What follows `messages`: of the assistant what it says and calls, then the calculator's result, and so on until
    its turn is over. `settings` go into every request."""
    model = client.models.list().data[0].id
    turn: list[Any] = []
    while True:
        reply = client.chat.completions.create(
            model=model, messages=[*messages, *turn], tools=[CALCULATOR], **settings
        ).choices[0]
        turn.append(reply.message.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
        if reply.finish_reason != "tool_calls":
            return turn
        for call in reply.message.tool_calls or []:
            result = calculate(json.loads(call.function.arguments)["expression"])
            turn.append({"role": "tool", "tool_call_id": call.id, "content": result or "not arithmetic"})


def main() -> None:
    url, question = sys.argv[1:]
    for message in answer(OpenAI(base_url=url, api_key="none"), [{"role": "user", "content": question}], temperature=0):
        calls = [call["function"]["arguments"] for call in message.get("tool_calls", [])]
        print(f"{message['role']}:", message.get("content", ""), *calls)


if __name__ == "__main__":
    main()
