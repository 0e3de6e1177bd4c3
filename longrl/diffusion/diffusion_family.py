"""Models that denoise pictures and videos: diffusers' own transformer as the policy, the rest of its pipeline frozen.

`DiffusionFamily` is the counterpart of `CausalFamily`: a light description of how prompts become conditions, latents
become frames, and a transformer predicts a velocity. The transformer alone is trained, sharded and saved in
checkpoints; text encoders and autoencoder are loaded once, kept in full on every rank, and never change.

Letters: B samples, R rows of a forward pass (pairs of a sample and a step), F frames (1 for a picture). The dots stand
for the axes of a latent: [C, H, W], or [C, F, H, W] of a video.
"""

from __future__ import annotations

import abc
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from longrl.io.hub_errors import hub_errors
from longrl.io.number_ranges import COUNT, check_ranges
from longrl.io.old_hooks import OLD_HOOKS, RefusesOldHooks
from longrl.io.weight_folder import check_weight_files
from longrl.models.building import OWN_WEIGHTS
from longrl.models.lora import ADAPTER, LoRASettings, merged_weights, put_adapters
from longrl.models.pretrained_folder import is_local
from longrl.strategies.sequence import SequenceParallel
from longrl.types import Dtype

Condition = Mapping[str, Tensor]
"""A prompt as the transformer reads it, by the names of its arguments; [R, ...], or of one prompt without R."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Linear layers of attention, as diffusers names them: where adapters go by default (Flow-GRPO's list)."""


class DiffusionFamily(RefusesOldHooks, abc.ABC):
    """A diffusers pipeline whose transformer is trained.

    Args:
        model: folder or hub id of a pipeline.
        height: of pictures, in pixels.
        width: of pictures, in pixels.
        dtype: precision of the transformer.
        frozen_dtype: precision of text encoders and autoencoder.
        init_seed: of new adapters.
        negative_prompt: what classifier-free guidance leads away from.
        max_text_tokens: longer prompts are cut off, as by the pipeline itself.
        cached_prompts: how many prompts' conditions are kept in host memory; text encoders never change.
        text_encoders_on: `device` keeps them beside the transformer, `cpu` in host memory, where they also run.
        gradient_checkpointing: recompute layers in the backward pass.
        lora: train adapters of the attention layers and nothing else; `target_modules` names others.
    """

    _old_hooks = OLD_HOOKS["diffusion family"]
    supports_sequence_parallel: ClassVar[bool] = False
    """True if ranks can share the tokens of a sample."""
    casts_inputs: ClassVar[bool] = False
    """Sharded layers get rotary positions and times in float32, as they do without sharding."""
    pipeline_class: ClassVar[str]
    """The name of diffusers' class."""
    transformer_class: ClassVar[str]
    layer_list: ClassVar[str]
    """Attribute of the transformer that holds its layers."""

    def __init__(
        self,
        model: str,
        height: int = 512,
        width: int = 512,
        dtype: Dtype = "float32",
        frozen_dtype: Dtype = "float32",
        init_seed: int = 0,
        negative_prompt: str = "",
        max_text_tokens: int = 256,
        cached_prompts: int = 4096,
        text_encoders_on: Literal["device", "cpu"] = "device",
        gradient_checkpointing: bool = False,
        lora: LoRASettings | None = None,
    ) -> None:
        self.model_path = model
        self.height = height
        self.width = width
        self.dtype = dtype
        self.frozen_dtype = frozen_dtype
        self.init_seed = init_seed
        self.negative_prompt = negative_prompt
        self.max_text_tokens = max_text_tokens
        self.text_encoders_on = text_encoders_on
        self.gradient_checkpointing = gradient_checkpointing
        self.lora = lora
        self.conditions = ConditionCache(self, cached_prompts)
        check_ranges(self, "model.family.init_args.", height=COUNT, width=COUNT, max_text_tokens=COUNT)

    # -- what a subclass says ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def encode_prompts(self, texts: Sequence[str], device: torch.device) -> Condition:
        """Conditions of several prompts, [number of texts, ...] each, by the pipeline's own text encoders."""

    @abc.abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one sample.

        Raises:
            ValueError: the model has no samples of the size that the options ask for.
        """

    @abc.abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """[B, ...] latents -> [B, F, 3, H, W] uint8 frames."""

    @abc.abstractmethod
    def make_scheduler(self, num_tokens: int) -> tuple[Any, dict[str, Any]]:
        """A scheduler with the pipeline's sigmas and timesteps, and keywords for its `set_timesteps`.

        Args:
            num_tokens: that the transformer makes of a latent.
        """

    # -- the pipeline --------------------------------------------------------------------------------------------

    @functools.cached_property
    def pipeline(self) -> Any:
        """Text encoders, tokenizers, scheduler and autoencoder: diffusers' pipeline without a transformer."""
        folder, precision = self._folder(), getattr(torch, self.frozen_dtype)
        with hub_errors(folder):
            pipeline = _diffusers_class(self.pipeline_class).from_pretrained(folder, transformer=None, dtype=precision)
        for part in _frozen_parts(pipeline):
            part.eval().requires_grad_(False)
        return pipeline

    def move_frozen_parts(self, device: torch.device) -> None:
        """Moves text encoders and autoencoder to where they run."""
        for part in _frozen_parts(self.pipeline):
            is_on_device = part is self.pipeline.vae or self.text_encoders_on == "device"
            part.to(device if is_on_device else "cpu")

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The transformer's config."""
        folder = self._folder()
        with hub_errors(folder):
            return _diffusers_class(self.transformer_class).load_config(folder, subfolder="transformer")

    def _folder(self) -> str:
        """Where the pipeline is.

        Raises:
            ValueError: it is meant as a folder, but is none, or one with another pipeline.
        """
        path = Path(self.model_path).expanduser()
        if not is_local(self.model_path) and not path.exists():
            return self.model_path
        index = path / "model_index.json"
        pipeline = json.loads(index.read_text()).get("_class_name") if index.is_file() else None
        if pipeline == self.pipeline_class:
            return str(path)
        if pipeline is not None:
            problem = f"holds a {pipeline}"
        else:
            problem = "has no model_index.json" if path.exists() else "does not exist"
        raise ValueError(
            f"model.family.init_args.model must be a folder with a {self.pipeline_class} of diffusers, or a hub id, "
            f"but {self.model_path!r} {problem}; `python -m longrl.testing.tiny_diffusion sd3 FOLDER` (or wan) writes "
            "a tiny one"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Workers and copies load their own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("pipeline", "config")}

    # -- the transformer -----------------------------------------------------------------------------------------

    def build(self, weights: str | None = OWN_WEIGHTS) -> nn.Module:
        """The transformer on the CPU.

        Args:
            weights: a pipeline's folder or hub id; None for random weights; by default what the family names.
        """
        dtype = getattr(torch, self.dtype)
        transformer_type = _diffusers_class(self.transformer_class)
        if weights is None:
            model = transformer_type.from_config(self.config)
            _cast_like_diffusers(model, dtype)
        else:
            folder = self._folder() if weights == OWN_WEIGHTS else weights
            check_weight_files(Path(folder) / "transformer")
            with hub_errors(folder):
                model = transformer_type.from_pretrained(folder, subfolder="transformer", dtype=dtype)
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def add_adapters(self, model: nn.Module) -> nn.Module:
        """Puts adapters into a transformer, in place, that change nothing yet; all else is frozen."""
        return put_adapters(model, self._adapter_config(model), self.init_seed)

    def _adapter_config(self, model: nn.Module) -> Any:
        """The description that peft reads of the adapters in this transformer.

        Raises:
            ValueError: a target is no linear layer.
        """
        from peft import LoraConfig

        settings = self.lora
        assert settings is not None
        linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
        targets = settings.target_modules or ATTENTION
        known = [target for target in targets if any(name.endswith(f".{target}") for name in linear)]
        if settings.target_modules and len(known) < len(targets):
            unknown = next(target for target in targets if target not in known)
            names = sorted({name.split(".", 2)[-1] for name in linear})
            raise ValueError(
                f"model.family.init_args.lora.target_modules must name linear layers, got {unknown!r}; there are "
                f"{', '.join(names)}"
            )
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=known,
            base_model_name_or_path=self.model_path,
        )

    # -- how it is sharded: see longrl.strategies.fsdp.ShardableFamily --------------------------------------------

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The transformer's layers: units of sharding."""
        return list(model.get_submodule(self.layer_list).children())

    def root_modules(self, model: nn.Module) -> list[nn.Module]:
        """Modules that are sharded beside the layers, and gathered together."""
        return [model]

    def model_parts(self, model: nn.Module) -> dict[str, Sequence[nn.Module]]:
        """Parts whose gradients are measured apart: the model is one."""
        return {}

    def media_encoders(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """None of the transformer's parts: text encoders and autoencoder stand apart."""
        return ()

    def trained_encoders(self, model: nn.Module) -> list[nn.Module]:
        """None."""
        return []

    def shard_tokens(self, model: nn.Module, sequence: SequenceParallel) -> None:
        """Lets the ranks of `sequence` share the tokens of every sample from now on.

        Raises:
            ValueError: unless a subclass says how.
        """
        raise ValueError(
            f"{type(self).__name__} cannot share a sample among {sequence.size} ranks; set sequence_parallel_size of "
            "MRSPStrategy to 1"
        )

    def check_size(self, multiple: int) -> None:
        """Raises ValueError if height or width is no multiple of what the model works in."""
        for option, size in (("height", self.height), ("width", self.width)):
            if size < multiple or size % multiple:
                raise ValueError(
                    f"model.family.init_args.{option} must be a multiple of {multiple}, got {size}; "
                    f"{max(1, size // multiple) * multiple} is near"
                )

    # -- velocities ----------------------------------------------------------------------------------------------

    def forward(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, texts: Sequence[str], guidance_scale: float = 1.0
    ) -> Tensor:
        """[R, ...] float32 velocities with classifier-free guidance (arXiv:2207.12598), also where gradients flow.

        Args:
            model: the transformer.
            latents: [R, ...] float32.
            timesteps: [R].
            texts: R prompts.
            guidance_scale: v = v(negative) + scale * (v(prompt) - v(negative)); 1 is no guidance.
        """
        # 1. In the precision of the weights, where they are sharded that of the gathered ones.
        dtype = model.get_parameter("proj_out.weight").dtype
        latents = latents.to(dtype)
        condition = {name: value.to(dtype) for name, value in self.conditions.get(texts, latents.device).items()}
        if guidance_scale <= 1:
            return self._predict_velocity(model, latents, timesteps, condition).float()

        # 2. Negative and own prompts in one forward pass of 2 R rows.
        negative = self.conditions.get([self.negative_prompt] * len(texts), latents.device)
        both = {name: torch.cat([negative[name].to(dtype), value]) for name, value in condition.items()}
        velocities = self._predict_velocity(model, torch.cat([latents] * 2), torch.cat([timesteps] * 2), both).float()
        unguided, conditional = velocities.chunk(2)  # [R, ...] each
        return unguided + guidance_scale * (conditional - unguided)

    def _predict_velocity(self, model: nn.Module, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """[R, ...] velocities of the transformer itself."""
        return model(hidden_states=latents, timestep=timesteps, **condition, return_dict=False)[0]

    def denoising_schedule(self, num_steps: int) -> tuple[list[float], list[float]]:
        """S + 1 sigmas from 1 to 0 and the transformer's S timesteps, by the pipeline's scheduler."""
        patch = self.config["patch_size"]
        patch_area = patch * patch if isinstance(patch, int) else math.prod(patch)
        scheduler, options = self.make_scheduler(math.prod(self.latent_shape()[1:]) // patch_area)
        scheduler.set_timesteps(num_steps, **options)
        return scheduler.sigmas.tolist(), scheduler.timesteps.tolist()

    # -- exporting -----------------------------------------------------------------------------------------------

    def export(self, model: nn.Module, folder: str | Path) -> None:
        """Writes a pipeline as diffusers loads it: this transformer, adapters merged, and all else as it was."""
        with torch.device("meta"):
            transformer = _diffusers_class(self.transformer_class).from_config(self.config)
        transformer.load_state_dict(dict(merged_weights(model.state_dict(), self.lora)), assign=True)
        self.pipeline.register_modules(transformer=transformer)
        try:
            self.pipeline.save_pretrained(folder)
        finally:
            self.pipeline.register_modules(transformer=None)

    def export_adapters(self, adapters: Mapping[str, Tensor], folder: Path, base: str) -> None:
        """Writes `pytorch_lora_weights.safetensors`, which `load_lora_weights` of a pipeline from `base` reads."""
        with torch.device("meta"):
            config = self._adapter_config(_diffusers_class(self.transformer_class).from_config(self.config))
        config.base_model_name_or_path = base
        named = {name.replace(f".{ADAPTER}.", "."): value for name, value in adapters.items()}
        _diffusers_class(self.pipeline_class).save_lora_weights(
            folder, transformer_lora_layers=named, transformer_lora_adapter_metadata=config.to_dict()
        )


class ConditionCache:
    """Conditions of prompts in host memory, the least recently used given up first."""

    def __init__(self, family: DiffusionFamily, size: int) -> None:
        if size < 1:
            raise ValueError(f"model.family.init_args.cached_prompts must be at least 1, got {size}")
        self.family = family
        self.size = size
        self.num_encoded = 0

    def get(self, texts: Sequence[str], device: torch.device) -> Condition:
        """[number of texts, ...] conditions; each distinct new text is encoded once."""
        conditions = self.prepare(texts, device)
        names = conditions[texts[0]]
        return {name: torch.stack([conditions[text][name] for text in texts]).to(device) for name in names}

    def prepare(self, texts: Sequence[str], device: torch.device) -> dict[str, Condition]:
        """The condition of each text, in host memory; `device` is where new ones are encoded."""
        if self.family.text_encoders_on == "cpu":
            device = torch.device("cpu")
        return {text: self._encode(text, device) for text in dict.fromkeys(texts)}

    @functools.cached_property
    def _encode(self) -> Callable[[str, torch.device], Condition]:
        @functools.lru_cache(self.size)
        @torch.no_grad()
        def encode(text: str, device: torch.device) -> Condition:
            # Alone, for the last bits depend on what is encoded beside, which a resumed run lacks.
            encoded = self.family.encode_prompts([text], device)
            self.num_encoded += 1
            return {name: value[0].cpu().clone() for name, value in encoded.items()}

        return encode

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_encode"}


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels between -1 and 1, as decoders give them, as diffusers turns them into images."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def _diffusers_class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def _frozen_parts(pipeline: Any) -> list[nn.Module]:
    """Text encoders and autoencoder."""
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


def _cast_like_diffusers(model: Any, dtype: torch.dtype) -> None:
    """Casts what `from_pretrained` of diffusers would cast: weights, but those that its class keeps in float32."""
    in_float32 = set(model._keep_in_fp32_modules or ())
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point():
            value.data = value.data.to(torch.float32 if in_float32 & set(name.split(".")) else dtype)
