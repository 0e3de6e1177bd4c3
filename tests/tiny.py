"""Tiny models and prompts that many tests share; plain transformers forwards as oracles."""

from __future__ import annotations

import copy
import functools
import tempfile

import torch
from torch import Tensor

import tests.short_reprs  # noqa: F401
from longrl.models.internvl import InternVLFamily
from longrl.models.lora import peft_config
from longrl.models.qwen2_vl import Qwen2VLFamily
from longrl.models.qwen3_5 import Qwen3_5Family, Qwen3_5TextFamily
from longrl.models.qwen3_omni import Qwen3OmniFamily
from longrl.models.qwen3_vl import Qwen3VLFamily
from longrl.models.qwen_omni import QwenOmniFamily
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.models.text import LlamaFamily, TextFamily
from longrl.models.vila import VilaFamily
from longrl.packing.pack import Continuations, continuations
from longrl.testing import plain_forward
from longrl.testing.plain_forward import assert_same_gradients, gradients, stock_model
from longrl.testing.sample_prompts import (
    local_frames as held,
    noise_frames as frames,
    noise_sound as sound,
    random_completions,
)
from longrl.testing.tiny import (
    tiny_internvl,
    tiny_qwen2_5_vl,
    tiny_qwen2_vl,
    tiny_qwen3_5,
    tiny_qwen3_5_text,
    tiny_qwen3_omni,
    tiny_qwen3_vl,
    tiny_qwen_omni,
    tiny_text,
    tiny_vila,
)
from longrl.types import FULL_SHARD, AudioClip, Completion, Continuation, Frames, FrameShard, Prompt, Row
from tests.models.plain_vila import PlainVila

__all__ = ["assert_same_gradients", "frames", "gradients", "held", "random_completions", "sound"]


@functools.cache
def vl_folder() -> str:
    return str(tiny_qwen2_5_vl(tempfile.mkdtemp(prefix="longrl-vl-")))


@functools.cache
def qwen3_vl_folder(experts: bool = False) -> str:
    return str(tiny_qwen3_vl(tempfile.mkdtemp(prefix="longrl-qwen3-vl-"), experts=experts))


@functools.cache
def text_folder(model_type: str = "qwen2") -> str:
    return str(tiny_text(tempfile.mkdtemp(prefix="longrl-text-"), model_type))


def vl_family(**kwargs: object) -> Qwen2_5_VLFamily:
    """6 heads on 2 key heads, 2 layers; frames of 56 x 56 at most."""
    defaults = {"random_init": True, "freeze_vision_encoder": False, "max_pixels": 56 * 56, "min_pixels": 28 * 28}
    return Qwen2_5_VLFamily(vl_folder(), **{**defaults, **kwargs})


@functools.cache
def qwen2_vl_folder() -> str:
    return str(tiny_qwen2_vl(tempfile.mkdtemp(prefix="longrl-qwen2-vl-")))


def qwen2_vl_family(**kwargs: object) -> Qwen2VLFamily:
    """As `vl_family`, whose encoder has windows."""
    defaults = {"random_init": True, "freeze_vision_encoder": False, "max_pixels": 56 * 56, "min_pixels": 28 * 28}
    return Qwen2VLFamily(qwen2_vl_folder(), **{**defaults, **kwargs})


@functools.cache
def vila_folder(**values: object) -> str:
    return str(tiny_vila(tempfile.mkdtemp(prefix="longrl-vila-"), **values))


def vila_family(folder: str | None = None, **kwargs: object) -> VilaFamily:
    """A encoder of 3 layers, of which 2 run; 4 tokens and a line end for every frame of 56 x 56."""
    defaults = {"random_init": True, "freeze_vision_encoder": False, "freeze_projector": False}
    return VilaFamily(folder or vila_folder(), **{**defaults, **kwargs})


SCALES = {"image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2_scales": "56,112,168", "max_tiles": 12}
"""Of NVILA-8B, whose scales are 448,896,1344, at an eighth."""


def nvila_family(**kwargs: object) -> VilaFamily:
    """As NVILA-8B: a lone image is cut into tiles of three scales, a frame's one scale stands for all."""
    return vila_family(vila_folder(**SCALES, s2_resize_output_to_scale_idx=-1, projector="mlp_downsample"), **kwargs)


def qwen3_vl_family(experts: bool = False, **kwargs: object) -> Qwen3VLFamily:
    """6 heads on 2 key heads, 3 layers, features for the first 2; frames of 64 x 64 at most."""
    defaults = {"random_init": True, "freeze_vision_encoder": False, "max_pixels": 64 * 64, "min_pixels": 32 * 32}
    return Qwen3VLFamily(qwen3_vl_folder(experts), **{**defaults, **kwargs})


@functools.cache
def qwen3_5_folder(experts: bool = False) -> str:
    return str(tiny_qwen3_5(tempfile.mkdtemp(prefix="longrl-qwen3-5-"), experts=experts))


def qwen3_5_family(experts: bool = False, **kwargs: object) -> Qwen3_5Family:
    """Gated delta nets of 6 value heads on 2 key heads in 3 of 4 layers; frames of 64 x 64 at most."""
    defaults = {"random_init": True, "freeze_vision_encoder": False, "max_pixels": 64 * 64, "min_pixels": 32 * 32}
    return Qwen3_5Family(qwen3_5_folder(experts), **{**defaults, **kwargs})


@functools.cache
def qwen3_5_text_folder(experts: bool = False) -> str:
    return str(tiny_qwen3_5_text(tempfile.mkdtemp(prefix="longrl-qwen3-5-text-"), experts=experts))


def qwen3_5_text_family(experts: bool = False, **kwargs: object) -> Qwen3_5TextFamily:
    """The text stack of `qwen3_5_family`, with one position axis."""
    return Qwen3_5TextFamily(qwen3_5_text_folder(experts), **{"random_init": True, **kwargs})


@functools.cache
def qwen3_omni_folder() -> str:
    return str(tiny_qwen3_omni(tempfile.mkdtemp(prefix="longrl-qwen3-omni-")))


def qwen3_omni_family(**kwargs: object) -> Qwen3OmniFamily:
    """6 heads on 2 key heads, 3 layers of 4 experts; frames of 64 x 64 at most; sound in windows of 2 s, 26 tokens."""
    encoders = {"freeze_vision_encoder": False, "freeze_audio_encoder": False}
    defaults = {"random_init": True, **encoders, "max_pixels": 64 * 64, "min_pixels": 32 * 32}
    if "freeze_vision_encoder" in kwargs:
        kwargs.setdefault("freeze_audio_encoder", kwargs["freeze_vision_encoder"])
    return Qwen3OmniFamily(qwen3_omni_folder(), **{**defaults, **kwargs})


@functools.cache
def omni_folder() -> str:
    return str(tiny_qwen_omni(tempfile.mkdtemp(prefix="longrl-omni-")))


def omni_family(**kwargs: object) -> QwenOmniFamily:
    """6 heads on 2 key heads, 2 layers; frames of 56 x 56 at most; sound in windows of 2 s, 50 tokens."""
    encoders = {"freeze_vision_encoder": False, "freeze_audio_encoder": False}
    defaults = {"random_init": True, **encoders, "max_pixels": 56 * 56, "min_pixels": 28 * 28}
    if "freeze_vision_encoder" in kwargs:
        kwargs.setdefault("freeze_audio_encoder", kwargs["freeze_vision_encoder"])
    return QwenOmniFamily(omni_folder(), **{**defaults, **kwargs})


def omni_prompts(family: QwenOmniFamily, shard: FrameShard = FULL_SHARD) -> list[Prompt]:
    """Videos with a longer and a shorter track, an image and a sound in one prompt; a sound alone; text alone."""

    def clip(count: int, name: str, seconds: float) -> list[Frames | AudioClip]:
        return [held(frames(count, 60, 90, name), shard), sound(seconds, f"{name} track", True, shard)]

    media = [*clip(6, "v1", 5.3), sound(1.53, "beep", shard=shard), held(frames(1, 40, 40, "i", "image"), shard)]
    media += clip(9, "v2", 3.1)
    return [
        family.render(row("mixed"), "What <video> and <audio> is <image> then <video>?", media),
        family.render(row("sound"), "What?", [sound(6.77, "long", shard=shard)]),
        family.render(row("text"), "no media here"),
    ]


@functools.cache
def internvl_folder(model_type: str = "qwen3") -> str:
    return str(tiny_internvl(tempfile.mkdtemp(prefix="longrl-internvl-"), model_type=model_type))


def internvl_family(model_type: str = "qwen3", **kwargs: object) -> InternVLFamily:
    """6 heads on 2 key heads, 3 layers; 4 tokens for a frame, and for each tile of an image: up to 4 and all of it."""
    defaults = {"random_init": True, "freeze_vision_encoder": False, "freeze_projector": False, "max_tiles": 4}
    return InternVLFamily(internvl_folder(model_type), **{**defaults, **kwargs})


def internvl_prompts(family: InternVLFamily, shard: FrameShard = FULL_SHARD) -> list[Prompt]:
    """A video between images of one tile, three and four with their thumbnails, of odd sizes; one video; text only."""
    media = [frames(1, 40, 40, "i1", "image"), frames(5, 60, 90, "v1"), frames(1, 150, 47, "i3", "image")]
    media += [frames(1, 120, 121, "i4", "image"), frames(2, 87, 113, "v2")]
    return [
        family.render(
            row("mixed"),
            "Is <image>like <video> or <image><image>then <video>?",
            [held(item, shard, 1) for item in media],
        ),
        family.render(row("video"), "What?", [held(frames(6, 60, 60, "v3"), shard, 1)]),
        family.render(row("text"), "no media here"),
    ]


def internvl_media_inputs(prompt: Prompt) -> dict[str, Tensor]:
    """Tiles of images and frames in one tensor, as InternVL's own forward takes them."""
    if not prompt.media:
        return {}
    return {"pixel_values": torch.cat([item.patches for item in prompt.media]).unflatten(1, (3, 56, 56))}


def text_family(model_type: str = "qwen2", **kwargs: object) -> TextFamily:
    return TextFamily(text_folder(model_type), **{"random_init": True, **kwargs})


LLAMA_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
"""Of Llama 3.1 and later: frequencies stretched beyond what it was first trained on, here 64 positions."""


@functools.cache
def llama_folder() -> str:
    return str(tiny_text(tempfile.mkdtemp(prefix="longrl-llama-"), "llama", rope_parameters=LLAMA_ROPE))


def llama_family(**kwargs: object) -> LlamaFamily:
    return LlamaFamily(llama_folder(), **{"random_init": True, **kwargs})


def row(name: str = "a", answer: str = "A", **kwargs: object) -> Row:
    return Row(id=name, problem="Which?\nA. one\nB. two\nC. three\nD. four", answer=answer, **kwargs)


def mixed_prompts(family: Qwen2_5_VLFamily | VilaFamily, shard: FrameShard = FULL_SHARD) -> list[Prompt]:
    """Two videos and an image in one prompt, one video, and text only; all of different length."""
    cell = family.temporal_patch_size
    media = [frames(5, 60, 90, "v1"), frames(1, 40, 40, "i1", "image"), frames(8, 87, 113, "v2")]
    media = [held(item, shard, cell) for item in media]
    return [
        family.render(row("mixed"), "What comes <video> and <image> then <video>?", media),
        family.render(row("video"), "What?", [held(frames(6, 60, 60, "v3"), shard, cell)]),
        family.render(row("text"), "no media here"),
    ]


def plain_model(model: torch.nn.Module, family: TextFamily) -> torch.nn.Module:
    """The same weights in a stock transformers model with eager attention, and VILA's parts joined by hand."""
    if isinstance(family, VilaFamily):
        return PlainVila.of(model, family)
    return stock_model(model, family)


def peft_model(model: torch.nn.Module, family: TextFamily) -> torch.nn.Module:
    """The same weights and adapters in a stock transformers model inside peft's own `PeftModel`."""
    from peft import get_peft_model

    plain = family.auto_class().from_config(copy.deepcopy(family.config), attn_implementation="eager").to(model.dtype)
    made = get_peft_model(plain, peft_config(family, plain))
    made.load_state_dict({f"base_model.model.{name}": value for name, value in model.state_dict().items()})
    return made


def separate_logps(plain: torch.nn.Module, prompts: list[Prompt], completions: Continuations) -> Tensor:
    """[N] float64 log-probabilities, one ordinary forward with pixels per completion."""
    inputs = plain_forward.qwen_media_inputs
    if isinstance(plain, PlainVila):
        inputs = vila_media_inputs
    elif plain.config.model_type == "internvl":  # in a PeftModel, too
        inputs = internvl_media_inputs
    return plain_forward.separate_logps(plain, prompts, completions, inputs)


def vila_media_inputs(prompt: Prompt) -> dict[str, object]:
    return {"media": prompt.media}


# ---- mixtures of experts ----


def answers_with_experts(
    prompts: list[Prompt], completions: Continuations, shape: tuple[int, int], num_experts: int, seed: int = 5
) -> list[list[Completion]]:
    """Completions with random experts [M, k] = `shape` for every token that an engine reads, prompts' included.

    Of what completions were shown the engine does not say.
    """
    generator = torch.Generator().manual_seed(seed)
    layers, top_k = shape

    def chosen(num_tokens: int) -> Tensor:
        scores = torch.rand(num_tokens, layers, num_experts, generator=generator)
        return scores.topk(top_k).indices.to(torch.int16)

    def answer(one: Continuation, of_prompt: Tensor | None) -> Completion:
        experts = chosen(max(len(one.token_ids) - 1, 0))
        if one.sampled is not None:
            experts[~one.sampled[:-1]] = -1
        fields = {name: getattr(one, name) for name in ("token_ids", "sampled", "position_ids", "media")}
        told = {"experts": experts, "prompt_experts": of_prompt}
        return Completion(**fields, logprobs=torch.zeros(one.num_sampled), text="", finish_reason="stop", **told)

    groups = []
    for prompt, group in zip(prompts, continuations(completions), strict=True):
        experts = [chosen(len(prompt.input_ids)), *[None] * (len(group) - 1)]
        groups.append([answer(one, of_prompt) for one, of_prompt in zip(group, experts, strict=True)])
    return groups


def force_experts(plain: torch.nn.Module, prompts: list[Prompt], groups: list[list[Completion]]) -> None:
    """Has a plain model use the given experts in its next forward passes, one for each completion with tokens in order.

    Router by router, by hand: the weights are the softmax of the logits at these experts, divided by their sum. Where
    -1 is given a router chooses.
    """
    tables = []
    for group in groups:
        for answer in group:
            if len(answer.token_ids):
                last = torch.zeros_like(group[0].prompt_experts[:1]) + torch.arange(group[0].prompt_experts.shape[2])
                tables.append(torch.cat([group[0].prompt_experts, answer.experts, last]).long())
    remaining = iter(tables)
    routers = [module for module in plain.modules() if type(module).__name__.endswith("TopKRouter")]
    table: list[Tensor] = []

    def forced(layer: int, router: torch.nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ router.weight.T
        given = table[0][:, layer]
        experts = torch.where(given < 0, logits.topk(given.shape[1]).indices, given)
        exponentials = logits.exp().gather(1, experts)
        return logits, exponentials / exponentials.sum(1, keepdim=True), experts

    plain.register_forward_pre_hook(lambda *_: table.__setitem__(slice(None), [next(remaining)]))
    for layer, router in enumerate(routers):
        router.forward = functools.partial(forced, layer, router)
