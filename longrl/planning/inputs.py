"""Inputs of a plan: the sizes of a model, and of the run that trains it.

Letters of this folder: N layers that attend; D hidden size; A, C widths of all query and all key heads; F width of the
MLPs that a row goes through, k of them experts; V vocabulary; G completions of S tokens behind a prompt of T tokens, n
of which are sampled and the others shown; L rows of a micro-batch on one rank.
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
from longrl.models.encode_flops import count_encoder_params
from longrl.models.lora import add_adapters
from longrl.models.planning_sizes import AudioSizes, TextSizes, VisionSizes, is_expert
from longrl.planning.shapes import build_on_meta
from longrl.strategies.sequence import HeadLayout
from longrl.strategies.whole_tensors import BUCKET_BYTES


@dataclass(frozen=True, kw_only=True)
class EncoderSizes(VisionSizes):
    """A vision encoder with its weights counted."""

    params: int
    """Of all media encoders."""
    trains: bool
    audio_params: int = 0
    """Those of them that hear."""


@dataclass(frozen=True, kw_only=True)
class ModelSizes(TextSizes):
    """A model, counted on the one that its family builds."""

    layer_params: tuple[int, ...]
    root_params: int
    """Embeddings, final norm and LM head; a shared weight counts once."""
    head_norms: bool
    """True if queries and keys are normalised per head, as in Qwen3."""
    feature_size: int = 0
    """Values of a media token's features."""
    vision_encoder: EncoderSizes | None = None
    audio_encoder: AudioSizes | None = None
    expert_params: int = 0
    """Those of `layer_params` that are experts."""
    largest_expert_weight: int = 0
    """Numbers of the largest tensor of experts, all of a layer together."""
    adapter_params: int = 0
    """Parameters of LoRA in all layers: if there are any, they alone train."""
    adapter_inputs: int = 0
    """Values per row that enter the adapters of one layer, of several kinds the one where they are most."""
    adapter_mlp_inputs: int = 0
    """Those of them that enter adapters of its MLP."""

    @property
    def text_params(self) -> int:
        """All that is sharded, except an encoder that trains."""
        return sum(self.layer_params) + self.root_params

    @property
    def used_params(self) -> float:
        """Q, parameters of all layers that a row goes through: of experts some."""
        used = self.experts_per_token / self.num_experts if self.num_experts else 1.0
        return sum(self.layer_params) - self.expert_params * (1 - used)

    def touched_params(self, num_rows: int) -> float:
        """Of the text stack, by so many rows that choose different experts, until all are chosen."""
        used = min(1.0, num_rows * self.experts_per_token / self.num_experts) if self.num_experts else 1.0
        return self.text_params - self.expert_params * (1 - used)

    @property
    def num_delta_nets(self) -> int:
        """Layers with a gated delta net."""
        return self.delta_nets.num_layers if self.delta_nets else 0

    @property
    def num_attending(self) -> int:
        """N, layers that attend."""
        return len(self.layer_params) - self.num_delta_nets

    @property
    def encoder_params(self) -> int:
        """All of the vision encoder, 0 without one."""
        return self.vision_encoder.params if self.vision_encoder else 0

    @property
    def frozen_encoder_params(self) -> int:
        """Those of an encoder that does not train."""
        return 0 if self.vision_encoder and self.vision_encoder.trains else self.encoder_params

    @property
    def query_width(self) -> int:
        """A."""
        return self.num_heads * self.head_size

    @property
    def key_width(self) -> int:
        """C."""
        return self.num_key_heads * self.head_size

    @classmethod
    def from_family(cls, family: CausalFamily) -> ModelSizes:
        """Counts the family's model on the meta device; `shapes.find_config` comes first."""
        text, vision = family.planning_sizes()
        model = build_on_meta(family)
        layers = family.layers(model)
        names = {name for layer in layers for name, _ in layer.named_parameters()}
        experts = [one.numel() for layer in layers for name, one in layer.named_parameters() if is_expert(name)]
        encoder = None
        if vision is not None:
            params, hears = count_encoder_params(family, model)
            trains = bool(family.trained_encoders(model))
            encoder = EncoderSizes(**vars(vision), params=params, trains=trains, audio_params=hears)
        layer_params = [_count_values(layer.parameters()) for layer in layers]
        other_params = _count_values(model.parameters()) - sum(layer_params)
        return cls(
            **vars(text),
            **_count_adapters(family),
            layer_params=tuple(layer_params),
            root_params=other_params - (encoder.params if encoder else 0),
            head_norms=any("q_norm" in name for name in names),
            expert_params=sum(experts),
            largest_expert_weight=max(experts, default=0),
            feature_size=family.feature_size,
            vision_encoder=encoder,
            audio_encoder=family.audio_sizes(),
        )


def _count_adapters(family: CausalFamily) -> dict[str, Any]:
    """The fields of `ModelSizes` that count LoRA; none without."""
    if family.lora is None:
        return {}
    with torch.device("meta"):
        model = add_adapters(family, build_on_meta(family))
    of_layers = [
        {name: parameter.shape[1] for name, parameter in layer.named_parameters() if ".lora_A." in name}
        for layer in family.layers(model)
    ]
    inputs = max(of_layers, key=lambda widths: sum(widths.values()))
    return {
        "adapter_params": _count_values(parameter for parameter in model.parameters() if parameter.requires_grad),
        "adapter_inputs": sum(inputs.values()),
        "adapter_mlp_inputs": sum(width for name, width in inputs.items() if name.startswith("mlp.")),
    }


def _count_values(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True, kw_only=True)
class VLLMShare:
    """vLLM in the trainer's process, with the names of `VLLMEngine`."""

    device_bytes: float
    """Memory of a device."""
    gpu_memory_utilization: float = 0.45
    kv_cache_bytes: float | None = None
    max_model_len: int = 0
    media_enter_whole: bool = True
    """Of the family: media bound the largest batch from below."""
    max_num_seqs: int = 256
    enforce_eager: bool = False
    sleeps: bool = True
    ranks: int = 1
    """`tensor_parallel_size`."""


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher whose weights are on the trainer's devices."""

    sizes: ModelSizes
    weight_bytes: int
    """Size of a value in its family's `dtype`."""
    gathered_bytes: int
    """Size of a value of gathered weights and of its hidden states."""
    offload: bool = False
    keeps_hidden: bool = True
    """Hidden states of every scored row and its LM head are kept for the update."""
    top_k: int = 0
    """In their place, so many tokens of every row; 0 is neither."""


@dataclass(frozen=True)
class Plan:
    """A run as the planner sees it; every prompt has the longest video and every completion its longest answer.

    With `rollout.environment` every completion is shown all that it may be, and all of that is media that no other
    completion asked for.

    Example:
        `Plan(ModelSizes.from_family(family), devices=8, sequence_parallel_size=8, prompt_tokens=260_000)`
    """

    sizes: ModelSizes
    devices: int = 1
    """Number of them in the run."""
    devices_per_node: int = 8
    sequence_parallel_size: int = 1
    """Ranks that share a sequence."""
    sp_group_size: int | None = None
    """Ranks with the same prompts; None for those that share a sequence."""
    num_replicas: int = 1
    weight_bytes: int = 4
    """Size of a value in the family's `dtype`: shards, gradients, optimizer, the frozen encoder."""
    gathered_bytes: int = 4
    """Size of a value of gathered weights and of the residual stream: `sharding.compute_dtype`, or the family's."""
    autocast: bool = False
    """`trainer.precision` is `bf16-mixed`: matrix products in 2 bytes, from weights cast each time."""
    offload: bool = False
    gradient_checkpointing: bool = False
    offload_checkpoints: bool = False
    mlp_chunk_tokens: int | None = None
    optimizer_offload: bool = False
    moment_bytes: float | None = None
    """Size of a value of one of the optimizer's moments; None for that of what trains."""
    reference: bool = False
    """True if a reference policy is kept."""
    pairs: bool = False
    """Completions are the two answers of pairs, which need it for more than a penalty."""
    moving_reference: bool = False
    """True if it is one that follows the policy."""
    statistics_passes: int = 0
    """Scoring passes for what the objective reads of tokens; one of them gives the old log-probabilities, too."""
    teachers: tuple[PlannedTeacher, ...] = ()
    """`model.teacher`, those on these devices."""
    fp32_lm_head: bool = False
    """`model.algorithm.fp32_lm_head`."""
    prompts_per_batch: int = 1
    """Prompts of each sequence-parallel group."""
    eval_prompts: int = 1
    """The same of a batch of validation."""
    resamples: bool = False
    """True if a step may draw further prompts, which are encoded while the engine is awake."""
    prompt_tokens: int = 1024
    """T, media and text."""
    media_tokens: int = 0
    """Features of what is seen of a prompt."""
    sound_tokens: int = 0
    """Features of what is heard of it."""
    sound_together: int | None = None
    """Of which so many are encoded at once; None for all of a rank."""
    frames: int = 0
    spatial_patches: int = 0
    """Patches of one temporal patch: height times width of the grid."""
    encoded_together: int | None = None
    """Temporal patches, or pools of them, that the encoder reads in one call; None for all."""
    pooled_frames: int = 1
    """Frames whose features are averaged into one behind the encoder, or temporal patches of several frames."""
    encoded_patches: int | None = None
    """Patches of a prompt's media; None is what its features are made of, where pooling in time alone is counted."""
    cell_patches: int | None = None
    """Patches that are pooled in time and stay on one rank; None is `spatial_patches`."""
    num_generations: int = 8
    completion_tokens: int = 1024
    """S, sampled and shown."""
    observed_tokens: int = 0
    """Those of them that it is shown between its turns."""
    max_tokens_per_micro_batch: int = 16_384
    mini_batches: int = 1
    epochs: int = 1
    vllm: VLLMShare | None = None
    """vLLM on the trainer's devices; without it the trainer's own model generates, unless another process does."""
    bucket_bytes: int = BUCKET_BYTES
    """Weights that are gathered in one message for an engine of its own."""
    generates_elsewhere: bool = False
    """Completions come from another process, on other devices."""
    max_sequences: int | None = 256
    """`HFEngine`'s: completions decoded together; None for as many as fit, of one prompt at least."""
    prefill_chunk_tokens: int = 16_384
    """`HFEngine`'s: prompt tokens that go through the model together."""
    feature_cache_bytes: int = 1 << 30
    num_gather_chunks: int = 1
    workspace_bytes: int = 0
    """Memory that the device needs beside tensors: CUDA context, NCCL, cuBLAS, fragmentation."""
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
        """Size of a value that enters or leaves a matrix product."""
        return min(2, self.gathered_bytes) if self.autocast else self.gathered_bytes

    @property
    def encoder_bytes(self) -> int:
        """Size of a value in the encoder and in its features."""
        return min(self.weight_bytes, self.gathered_bytes) if self.sizes.frozen_encoder_params else self.weight_bytes

    @property
    def num_engines(self) -> int:
        """Engines of a sequence-parallel group: one on every rank, or vLLM's over several."""
        return max(1, self.sp_group // (self.vllm.ranks if self.vllm else 1))

    @property
    def local_prompts(self) -> int:
        """Prompts of a batch that one engine samples completions of."""
        return max(1, math.ceil(self.prompts_per_batch / self.num_engines))

    @property
    def rank_completions(self) -> int:
        """Completions of a prompt that one engine samples: all, unless there are more engines than prompts."""
        if self.prompts_per_batch >= self.num_engines:
            return self.num_generations
        shared = math.ceil(self.prompts_per_batch * self.num_generations / self.num_engines)
        return min(self.num_generations, shared)

    @property
    def sampled_tokens(self) -> int:
        """Tokens of a completion that the policy samples: n."""
        return self.completion_tokens - self.observed_tokens

    @property
    def crop_tokens(self) -> int:
        """Features of what the completions of a prompt are shown; of a model that sees nothing none."""
        return self.num_generations * self.observed_tokens if self.media_tokens else 0

    @property
    def encoded_videos(self) -> float:
        """Videos as long as the prompt's that are encoded for it: its own, and the crops of its completions."""
        return 1 + (self.crop_tokens / self.media_tokens if self.media_tokens else 0.0)

    @property
    def checkpoints_on_host(self) -> bool:
        """True if layer inputs wait in host memory for the backward pass."""
        return self.gradient_checkpointing and self.offload_checkpoints

    @property
    def feature_tokens(self) -> int:
        """Features of a prompt's media."""
        return self.media_tokens + self.sound_tokens

    @property
    def patches(self) -> int:
        """Patches of a prompt's media."""
        if self.encoded_patches is not None:
            return self.encoded_patches
        merge = self.sizes.vision_encoder.merge if self.sizes.vision_encoder else 0
        return round(self.media_tokens * self.pooled_frames * merge)

    @property
    def local_patches(self) -> int:
        """Patches of a prompt's media on the rank that has most: no temporal patch is shared, and no pool of them."""
        if not self.spatial_patches:
            return 0
        return math.ceil(self.patches // self.shared_patches / self.sp_group) * self.shared_patches

    @property
    def shared_patches(self) -> int:
        """Patches of the piece of a video that no two ranks share, and that no two calls of the encoder do."""
        return self.cell_patches or self.spatial_patches

    @functools.cached_property
    def delta_heads(self) -> HeadLayout:
        """The same of gated delta nets' value heads."""
        delta = self.sizes.delta_nets
        assert delta is not None, "no layer has one"
        return HeadLayout.make(delta.num_heads, delta.num_key_heads, self.sequence_parallel_size)

    @functools.cached_property
    def heads(self) -> HeadLayout:
        """How heads are dealt to the ranks that share a sequence."""
        return HeadLayout.make(self.sizes.num_heads, self.sizes.num_key_heads, self.sequence_parallel_size)
