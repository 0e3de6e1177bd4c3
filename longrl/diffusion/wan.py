"""Wan 2.1 for text to video (arXiv:2503.20314) as a policy: diffusers' `WanPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.diffusion.diffusion_family import Condition, DiffusionFamily, to_uint8
from longrl.diffusion.wan_sequence_parallel import share_tokens
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

    @override
    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)

    @override
    def encode(self, texts: Sequence[str], device: torch.device) -> Condition:
        found, _ = self.pipeline.encode_prompt(
            list(texts), do_classifier_free_guidance=False, max_sequence_length=self.max_text_tokens, device=device
        )
        return {"encoder_hidden_states": found}

    @override
    def predict(self, model: nn.Module, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return model(hidden_states=latents, timestep=timesteps, **condition, return_dict=False)[0]

    @override
    def latent_shape(self) -> tuple[int, ...]:
        pipeline, (_, patch, _) = self.pipeline, self.config["patch_size"]
        multiple = pipeline.vae_scale_factor_spatial * patch
        for name, size in (("height", self.height), ("width", self.width)):
            if size < multiple or size % multiple:
                raise ValueError(
                    f"model.family.init_args.{name} must be a multiple of {multiple}, got {size}; "
                    f"{max(1, size // multiple) * multiple} is near"
                )
        cell = pipeline.vae_scale_factor_temporal
        if self.num_frames < 1 or self.num_frames % cell != 1:
            raise ValueError(
                f"model.family.init_args.num_frames must be one above a multiple of {cell}, got {self.num_frames}; "
                f"{max(0, self.num_frames // cell) * cell + 1} is near"
            )
        scale = pipeline.vae_scale_factor_spatial
        frames = (self.num_frames - 1) // cell + 1
        return self.config["in_channels"], frames, self.height // scale, self.width // scale

    @override
    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        videos = vae.decode((latents * std + mean).to(vae.device, vae.dtype), return_dict=False)[0]
        return to_uint8(videos).transpose(1, 2).contiguous()

    @override
    def euler(self, tokens: int) -> Any:
        """Wan is released with UniPC, whose steps look back at earlier ones; a policy's may not, so it is Euler's."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = self.pipeline.scheduler.config
        shift = config["flow_shift"] if "flow_shift" in config else config["shift"]
        return FlowMatchEulerDiscreteScheduler(shift=shift, num_train_timesteps=config["num_train_timesteps"]), {}

    @override
    def share_tokens(self, model: nn.Module, sequence: SequenceParallel) -> None:
        share_tokens(model, sequence)
