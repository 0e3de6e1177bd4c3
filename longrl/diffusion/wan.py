"""Wan 2.1 for text to video (arXiv:2503.20314) as a policy: diffusers' `WanPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.diffusion.diffusion_family import Condition, DiffusionFamily, to_uint8
from longrl.diffusion.wan_sequence_parallel import shard_tokens
from longrl.io.number_ranges import COUNT, check_ranges
from longrl.strategies.sequence import SequenceParallel


class WanFamily(DiffusionFamily):
    """Videos from text; see `DiffusionFamily` for the other arguments.

    Args:
        model: folder or hub id of a pipeline.
        height: of frames, in pixels.
        width: of frames, in pixels.
        num_frames: of a video, 4 n + 1; 81 are 5 s at Wan's 16 frames per second.
        max_text_tokens: Wan was trained with 512.
        **kwargs: of `DiffusionFamily`.

    Example:
        `WanFamily("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", height=240, width=416, num_frames=33)`
    """

    supports_sequence_parallel = True
    pipeline_class = "WanPipeline"
    transformer_class = "WanTransformer3DModel"
    layer_list = "blocks"

    def __init__(
        self,
        model: str,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        max_text_tokens: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, height, width, max_text_tokens=max_text_tokens, **kwargs)
        self.num_frames = num_frames
        check_ranges(self, "model.family.init_args.", num_frames=COUNT)

    @override
    def encode_prompts(self, texts: Sequence[str], device: torch.device) -> Condition:
        embeds, _ = self.pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=self.max_text_tokens, device=device
        )
        return {"encoder_hidden_states": embeds}

    @override
    def latent_shape(self) -> tuple[int, ...]:
        scale = self.pipeline.vae_scale_factor_spatial
        time_scale = self.pipeline.vae_scale_factor_temporal
        _, patch_size, _ = self.config["patch_size"]
        self.check_size(scale * patch_size)
        if self.num_frames < 1 or self.num_frames % time_scale != 1:
            raise ValueError(
                f"model.family.init_args.num_frames must be one above a multiple of {time_scale}, got "
                f"{self.num_frames}; {max(0, self.num_frames // time_scale) * time_scale + 1} is near"
            )
        num_frames = (self.num_frames - 1) // time_scale + 1  # the first frame has a latent of its own
        return self.config["in_channels"], num_frames, self.height // scale, self.width // scale

    @override
    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean = latents.new_tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)  # [1, C, 1, 1, 1]
        std = latents.new_tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        videos = vae.decode((latents * std + mean).to(vae.device, vae.dtype), return_dict=False)[0]
        return to_uint8(videos).transpose(1, 2).contiguous()

    @override
    def make_scheduler(self, num_tokens: int) -> tuple[Any, dict[str, Any]]:
        """The pipeline's own, UniPC in what is released: its sigmas and times alone are read.

        UniPC's steps look back at earlier ones, which a policy's may not: longrl/diffusion/steps.py takes them.
        """
        scheduler = self.pipeline.scheduler
        return scheduler.from_config(scheduler.config), {}

    @override
    def denoising_schedule(self, num_steps: int) -> tuple[list[float], list[float]]:
        sigmas, timesteps = super().denoising_schedule(num_steps)
        # UniPC begins at 1 - 1e-6 to take a logarithm; 1 - sigma of that would give the first step endless noise.
        return [round(sigmas[0], 5), *sigmas[1:]], timesteps

    @override
    def shard_tokens(self, model: nn.Module, sequence: SequenceParallel) -> None:
        shard_tokens(model, sequence)
