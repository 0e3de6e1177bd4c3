"""What a plan is made of: the sizes of a model, and of the run that trains it.

Letters of this folder: N layers; D hidden size; A, C widths of all query and all key heads; F width of the MLP;
V vocabulary; G completions of S tokens behind a prompt of T tokens; L rows of a micro-batch on one rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longrl.models.base import CausalFamily
from longrl.models.lora import add_adapters
from longrl.planning.shapes import on_meta
from longrl.strategies.sequence import HeadLayout


@dataclass(frozen=True)
class Encoder:
    """A vision transformer, windowed or not."""

    params: int
    trains: bool
    width: int
    mlp_width: int
    num_layers: int
    num_full_layers: int
    """Layers that attend over a whole temporal cell instead of a window."""
    window_patches: int
    patch_values: int
    """Numbers of a patch of pixels."""
    merge: int
    """Patches of one feature."""


@dataclass(frozen=True)
class Sizes:
    """A model, counted on the one that its family builds."""

    layer_params: tuple[int, ...]
    root_params: int
    """Embeddings, final norm and LM head; a shared weight counts once."""
    hidden: int
    num_heads: int
    num_key_heads: int
    head_size: int
    mlp_width: int
    vocabulary: int
    head_norms: bool
    """Whether queries and keys are normalised per head, as in Qwen3."""
    feature_size: int = 0
    """Numbers of a media token's features."""
    vision_encoder: Encoder | None = None
    adapter_params: int = 0
    """Of LoRA in all layers: if there are any, they alone train."""
    adapter_inputs: int = 0
    """Numbers per row that enter the adapters of one layer."""
    adapter_mlp_inputs: int = 0
    """Those of them that enter adapters of its MLP."""

    @property
    def text_params(self) -> int:
        """All that is sharded, except a encoder that trains."""
        return sum(self.layer_params) + self.root_params

    @property
    def query_width(self) -> int:
        """A."""
        return self.num_heads * self.head_size

    @property
    def key_width(self) -> int:
        """C."""
        return self.num_key_heads * self.head_size

    @classmethod
    def of(cls, family: CausalFamily) -> Sizes:
        """Counts the family's model on the meta device; `shapes.find` must have found its config.

        Raises:
            ValueError: its layers are mixtures of experts, or it hears.
        """
        if family.supports_audio:
            raise ValueError(
                f"plan counts text, images and videos, but {type(family).__name__} also has an audio encoder and reads "
                "sound; plan the vision-language model of the same size, and leave room for both"
            )
        text = family.config.get_text_config()
        if getattr(text, "num_experts", None):
            raise ValueError(
                f"plan counts layers that use all their weights for every token, but {family.model_path!r} has "
                f"{text.num_experts} experts; plan a dense model"
            )
        model = on_meta(family)
        layers, vision_encoder = family.layers(model), family.vision_encoder(model)
        names = {name for name, _ in layers[0].named_parameters()}
        in_layers = [_count(layer.parameters()) for layer in layers]
        in_tower = _count(vision_encoder.parameters()) if vision_encoder is not None else 0
        in_root = _count(model.parameters()) - sum(in_layers) - in_tower
        adapter_params, adapter_inputs, adapter_mlp_inputs = _adapters(family)
        return cls(
            layer_params=tuple(in_layers),
            root_params=in_root,
            hidden=text.hidden_size,
            num_heads=text.num_attention_heads,
            num_key_heads=text.num_key_value_heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            mlp_width=text.intermediate_size,
            vocabulary=text.vocab_size,
            head_norms=any("q_norm" in name for name in names),
            feature_size=family.feature_size,
            vision_encoder=None if vision_encoder is None else _tower(family, model, family.config.vision_config),
            adapter_params=adapter_params,
            adapter_inputs=adapter_inputs,
            adapter_mlp_inputs=adapter_mlp_inputs,
        )


def _tower(family: CausalFamily, model: nn.Module, vision: Any) -> Encoder:
    vision_encoder = family.vision_encoder(model)
    assert vision_encoder is not None
    windowed = hasattr(vision, "window_size")
    return Encoder(
        params=_count(vision_encoder.parameters()),
        trains=family.vision_encoder_trains(model),
        width=vision.hidden_size,
        mlp_width=vision.intermediate_size,
        num_layers=vision.depth,
        num_full_layers=len(vision.fullatt_block_indexes) if windowed else vision.depth,
        window_patches=(vision.window_size // vision.patch_size) ** 2 if windowed else 0,
        patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        merge=vision.spatial_merge_size**2,
    )


def _adapters(family: CausalFamily) -> tuple[int, int, int]:
    """(LoRA's parameters in all layers, numbers per row that enter them in one layer, in its MLP); zeros without."""
    if family.lora is None:
        return 0, 0, 0
    with torch.device("meta"):
        model = add_adapters(family, on_meta(family))
    first = family.layers(model)[0].named_parameters()
    inputs = {name: parameter.shape[1] for name, parameter in first if ".lora_A." in name}
    in_mlp = sum(width for name, width in inputs.items() if name.startswith("mlp."))
    trained = _count(parameter for parameter in model.parameters() if parameter.requires_grad)
    return trained, sum(inputs.values()), in_mlp


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True)
class Plan:
    """A run as the planner sees it; every prompt has the longest video and every completion its longest answer.

    Example:
        `Plan(Sizes.of(family), devices=8, sequence_parallel_size=8, prompt_tokens=260_000, media_tokens=259_200)`
    """

    sizes: Sizes
    devices: int = 1
    """Of the run."""
    devices_per_node: int = 8
    sequence_parallel_size: int = 1
    """Ranks that share a sequence."""
    sp_group_size: int | None = None
    """Ranks with the same prompts; None for those that share a sequence."""
    num_replicas: int = 1
    weight_bytes: int = 4
    """Of a number in the family's `dtype`: shards, gradients, optimizer, the frozen encoder."""
    gathered_bytes: int = 4
    """Of a number of gathered weights and of the residual stream: `sharding.compute_dtype`, or the family's."""
    autocast: bool = False
    """`trainer.precision` is `bf16-mixed`: matrix products in 2 bytes, from weights cast each time."""
    offload: bool = False
    gradient_checkpointing: bool = False
    offload_checkpoints: bool = False
    mlp_chunk_tokens: int | None = None
    optimizer_offload: bool = False
    moment_bytes: float | None = None
    """Of a number of one of the optimizer's moments; None for that of what trains."""
    reference: bool = False
    """Whether a reference policy is kept for the KL penalty."""
    prompts_per_batch: int = 1
    """On each team."""
    prompt_tokens: int = 1024
    """T, media and text."""
    media_tokens: int = 0
    """Features of a prompt."""
    frames: int = 0
    cell_patches: int = 0
    """Patches of a temporal cell."""
    pooled_frames: int = 1
    """Frames whose features are averaged into one behind the encoder."""
    num_generations: int = 8
    completion_tokens: int = 1024
    max_tokens_per_micro_batch: int = 16_384
    mini_batches: int = 1
    epochs: int = 1
    max_sequences: int = 256
    """`HFEngine`'s: completions decoded together."""
    prefill_chunk_tokens: int = 16_384
    """`HFEngine`'s: prompt tokens that go through the model together."""
    feature_cache_bytes: int = 1 << 30
    num_gather_chunks: int = 1
    workspace_bytes: int = 0
    """What the device needs beside tensors: CUDA context, NCCL, cuBLAS, fragmentation."""
    cuda: bool = True
    """Kernels and optimizer of CUDA; False for those of the CPU."""

    @property
    def sp_group(self) -> int:
        """Ranks with the same prompts."""
        return self.sp_group_size or self.sequence_parallel_size

    @property
    def shards(self) -> int:
        """Ranks over which one copy of the weights is spread."""
        return self.devices // self.num_replicas

    @property
    def matmul_bytes(self) -> int:
        """Of a number that enters or leaves a matrix product."""
        return min(2, self.gathered_bytes) if self.autocast else self.gathered_bytes

    @property
    def checkpoints_on_host(self) -> bool:
        """Whether layer inputs wait in host memory for the backward pass."""
        return self.gradient_checkpointing and self.offload_checkpoints

    @property
    def patches(self) -> int:
        """Patches of a prompt's media."""
        return (
            self.media_tokens
            * self.pooled_frames
            * (self.sizes.vision_encoder.merge if self.sizes.vision_encoder else 0)
        )

    @property
    def share_patches(self) -> int:
        """Patches of a prompt's media on the rank of a team that has most: whole temporal cells."""
        if not self.cell_patches:
            return 0
        return math.ceil(self.patches // self.cell_patches / self.sp_group) * self.cell_patches

    @functools.cached_property
    def heads(self) -> HeadLayout:
        """How heads are dealt to the ranks that share a sequence."""
        return HeadLayout.make(self.sizes.num_heads, self.sizes.num_key_heads, self.sequence_parallel_size)


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a step."""

    groups: int
    completions: int
    """Of each group; fewer than G if the group is split."""
    count: int
    """Micro-batches of a rank in one pass over the rollout."""
    tokens: int
    """Of all ranks that share it."""
    scored: int
    """R of all ranks that share it."""


def micro_batch(plan: Plan) -> MicroBatch:
    """What `longrl.packing.pack.pack` makes of prompts that are all alike.

    Raises:
        ValueError: a prompt with one completion is over the budget.
    """
    budget = plan.max_tokens_per_micro_batch * plan.sequence_parallel_size
    prompts = math.ceil(plan.prompts_per_batch / plan.mini_batches)
    turns = plan.sp_group // plan.sequence_parallel_size
    prompt, one, all_of_them = plan.prompt_tokens, plan.completion_tokens, plan.num_generations
    if prompt + one > budget:
        raise ValueError(
            f"a prompt of {prompt} tokens with one completion of {one} must fit into "
            f"model.max_tokens_per_micro_batch times sequence_parallel_size, got {plan.max_tokens_per_micro_batch} "
            f"times {plan.sequence_parallel_size}; raise model.max_tokens_per_micro_batch to "
            f"{needed_budget(plan)}, or lower data.video.max_frames"
        )
    groups = min(prompts, max(1, budget // (prompt + all_of_them * one)))
    completions = min(all_of_them, (budget // groups - prompt) // one)
    pieces = math.ceil(prompts / groups) * math.ceil(all_of_them / completions) * plan.mini_batches
    tokens = groups * (prompt + completions * one)
    return MicroBatch(groups, completions, math.ceil(pieces / turns), tokens, groups * completions * one)


def needed_budget(plan: Plan) -> int:
    """The least `max_tokens_per_micro_batch` with which a prompt is computed once for all its completions."""
    return math.ceil((plan.prompt_tokens + plan.num_generations * plan.completion_tokens) / plan.sequence_parallel_size)
