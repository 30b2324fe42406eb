"""vLLM finds this through the entry point group `vllm.general_plugins`, in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Serves the depth family by its own class, which is faster than vLLM's Transformers backend, and has the parser
    `fathom` turn calls of the calculator into OpenAI's."""
    from vllm import ModelRegistry
    from vllm.tool_parsers import ToolParserManager

    # by name: vLLM imports the class, and CUDA with it, only where it runs a model
    ModelRegistry.register_model("NanoChatForCausalLM", "models.vllm_nanochat:NanoChatForCausalLM")
    ToolParserManager.register_lazy_module("fathom", "corpus.tool_parser", "CalculatorParser")
