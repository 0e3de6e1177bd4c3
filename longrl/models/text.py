"""The text-only families: Qwen2, Qwen2.5 and Qwen3; Llama."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import override

from longrl.models.base import CausalFamily


class TextFamily(CausalFamily):
    """A Qwen2, Qwen2.5 or Qwen3 language model without sliding windows.

    Others need hooks of their own: they scale or cap logits, add a bias to them, or name their layers' kinds otherwise.

    Example:
        `TextFamily(model="Qwen/Qwen3-1.7B", dtype="bfloat16", chat_template_kwargs={"enable_thinking": False})`
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen2", "qwen3")  # Qwen2.5's is qwen2

    @override
    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    @override
    def backbone(self, model: Any) -> Any:
        return model.model


class LlamaFamily(TextFamily):
    """A Llama 2 or 3 language model (arXiv:2407.21783).

    Templates of Llama 3.2 say today's date unless `chat_template_kwargs` has a `date_string`.

    Example:
        `LlamaFamily(model="meta-llama/Llama-3.2-1B-Instruct", chat_template_kwargs={"date_string": "26 Jul 2024"})`
    """

    model_types = ("llama",)
