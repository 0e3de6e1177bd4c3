"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206) as a policy: diffusers' `StableDiffusion3Pipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from longrl.diffusion.diffusion_family import Condition, DiffusionFamily, to_uint8


class SD3Family(DiffusionFamily):
    """Pictures from text; see `DiffusionFamily` for the arguments.

    Example:
        `SD3Family("stabilityai/stable-diffusion-3.5-medium", height=512, width=512, lora=LoRASettings(rank=32))`
    """

    pipeline_class = "StableDiffusion3Pipeline"
    transformer_class = "SD3Transformer2DModel"
    layer_list = "transformer_blocks"

    @override
    def encode_prompts(self, texts: Sequence[str], device: torch.device) -> Condition:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts), None, None, device=device, do_classifier_free_guidance=False,
            max_sequence_length=self.max_text_tokens,
        )  # fmt: skip
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    @override
    def latent_shape(self) -> tuple[int, ...]:
        scale = self.pipeline.vae_scale_factor
        self.check_size(scale * self.config["patch_size"])
        return self.config["in_channels"], self.height // scale, self.width // scale

    @override
    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        return to_uint8(vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0])[:, None]

    @override
    def make_scheduler(self, num_tokens: int) -> tuple[Any, dict[str, Any]]:
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        config = self.pipeline.scheduler.config
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        if not config.use_dynamic_shifting:
            return scheduler, {}
        limits = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        return scheduler, {"mu": calculate_shift(num_tokens, *limits)}
