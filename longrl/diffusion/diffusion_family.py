"""Flow models for pictures and videos: diffusers' own transformer as the policy, the rest of its pipeline frozen.

`DiffusionFamily` is the counterpart of `CausalFamily`: a light description of how prompts become conditions, latents become
frames, and a transformer tells a velocity. The transformer alone is trained, sharded and saved in checkpoints; text
encoders and autoencoder are loaded once, kept whole, and never change.

Letters: B samples, R rows of a forward pass (pairs of a sample and a step), F frames (1 for a picture). The dots stand
for the axes of a latent: [C, H, W], or [C, F, H, W] of a video.
"""

from __future__ import annotations

import abc
import functools
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from longrl.models.reading import is_local
from longrl.models.lora import ADAPTER, LoRASettings, merged, put_adapters
from longrl.strategies.sequence import SequenceParallel

OWN_WEIGHTS = "<own>"
"""`build`'s default: the weights that the family itself names."""
CPU = torch.device("cpu")
Condition = Mapping[str, Tensor]
"""What a prompt says to the transformer, by the names of its arguments; [R, ...], or of one prompt without R."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Linear layers of attention, as diffusers names them: where adapters go by default (Flow-GRPO's list)."""


class DiffusionFamily(abc.ABC):
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

    supports_sequence_parallel: ClassVar[bool] = False
    """Whether ranks can share the tokens of a sample."""
    casts_inputs: ClassVar[bool] = False
    """Sharded layers get rotary positions and times in float32, as they do without sharding."""
    pipeline_class: ClassVar[str]
    """Of diffusers."""
    transformer_class: ClassVar[str]

    def __init__(
        self,
        model: str,
        height: int = 512,
        width: int = 512,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        frozen_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
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

    # -- what a subclass says ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The transformer's layers: units of sharding."""

    @abc.abstractmethod
    def encode(self, texts: Sequence[str], device: torch.device) -> Condition:
        """Conditions of several prompts, [number of texts, ...] each, by the pipeline's own text encoders."""

    @abc.abstractmethod
    def predict(self, model: nn.Module, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """[R, ...] velocities as the transformer tells them, without guidance."""

    @abc.abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample.

        Raises:
            ValueError: the model has no samples of the wanted size.
        """

    @abc.abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """[B, ...] latents -> [B, F, 3, H, W] uint8 frames."""

    @abc.abstractmethod
    def euler(self, tokens: int) -> Any:
        """A `FlowMatchEulerDiscreteScheduler` with the pipeline's shift, and keywords for its `set_timesteps`."""

    # -- the pipeline --------------------------------------------------------------------------------------------

    @functools.cached_property
    def pipeline(self) -> Any:
        """Text encoders, tokenizers, scheduler and autoencoder: diffusers' pipeline without a transformer."""
        import diffusers

        pipeline = getattr(diffusers, self.pipeline_class).from_pretrained(
            self._folder(), transformer=None, dtype=getattr(torch, self.frozen_dtype)
        )
        for part in self.frozen_parts(pipeline):
            part.eval().requires_grad_(False)
        return pipeline

    @staticmethod
    def frozen_parts(pipeline: Any) -> list[nn.Module]:
        """Text encoders and autoencoder."""
        return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]

    def place(self, device: torch.device) -> None:
        """Moves the frozen parts to where they run."""
        for part in self.frozen_parts(self.pipeline):
            own = part is self.pipeline.vae or self.text_encoders_on == "device"
            part.to(device if own else "cpu")

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """The transformer's config."""
        return self._transformer().load_config(self._folder(), subfolder="transformer")

    def _transformer(self) -> Any:
        import diffusers

        return getattr(diffusers, self.transformer_class)

    def _folder(self) -> str:
        """Where the pipeline is.

        Raises:
            ValueError: it is meant as a folder, but is none, or one with another pipeline.
        """
        path = Path(self.model_path).expanduser()
        if is_local(self.model_path) or path.exists():
            index = path / "model_index.json"
            found = json.loads(index.read_text()).get("_class_name") if index.is_file() else None
            if found != self.pipeline_class:
                raise ValueError(
                    f"model.family.init_args.model must be a folder with a {self.pipeline_class} of diffusers, or a "
                    f"hub id, but {self.model_path!r} {_holding(path, found)}; `python -m longrl.testing.tiny_diffusion sd3 "
                    "FOLDER` (or wan) writes a tiny one"
                )
            return str(path)
        return self.model_path

    def __getstate__(self) -> dict[str, Any]:
        """Workers and copies load their own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("pipeline", "config")}

    # -- the transformer -----------------------------------------------------------------------------------------

    def build(self, weights: str | None = OWN_WEIGHTS) -> nn.Module:
        """The transformer on the CPU.

        Args:
            weights: a pipeline's folder or hub id; None for random weights; by default what the family names.
        """
        dtype, kind = getattr(torch, self.dtype), self._transformer()
        if weights is None:
            model = _cast(kind.from_config(self.config), dtype)
        else:
            folder = self._folder() if weights == OWN_WEIGHTS else weights
            model = kind.from_pretrained(folder, subfolder="transformer", dtype=dtype)
        if self.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def add_adapters(self, model: nn.Module) -> nn.Module:
        """Puts adapters into a transformer, in place, that change nothing yet; all else is frozen."""
        return put_adapters(model, self.adapter_config(model), self.init_seed)

    def adapter_config(self, model: nn.Module) -> Any:
        """The description that peft wants of the adapters in this transformer."""
        from peft import LoraConfig

        settings = self.lora
        assert settings is not None
        names = settings.target_modules or [name for name in ATTENTION if _has(model, name)]
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=[self._known(model, name) for name in names],
            base_model_name_or_path=self.model_path,
        )

    @staticmethod
    def _known(model: nn.Module, name: str) -> str:
        if not _has(model, name):
            linear = {place.split(".", 2)[-1] for place, part in model.named_modules() if isinstance(part, nn.Linear)}
            raise ValueError(
                f"model.family.init_args.lora.target_modules must name linear layers, got {name!r}; there are "
                f"{', '.join(sorted(linear))}"
            )
        return name

    def root_modules(self, model: nn.Module) -> list[nn.Module]:
        """What is sharded beside the layers, and gathered together."""
        return [model]

    def media_encoders(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """None of the transformer's parts: text encoders and autoencoder stand apart."""
        return ()

    def trained_encoders(self, model: nn.Module) -> list[nn.Module]:
        """None."""
        return []

    def share_tokens(self, model: nn.Module, sequence: SequenceParallel) -> None:
        """Lets the ranks of `sequence` share the tokens of every sample from now on.

        Raises:
            ValueError: unless a subclass says how.
        """
        raise ValueError(
            f"{type(self).__name__} cannot share a sample among {sequence.size} ranks; set sequence_parallel_size of "
            "MRSPStrategy to 1"
        )

    def forward(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, texts: Sequence[str], guidance_scale: float
    ) -> Tensor:
        """[R, ...] float32 velocities for prompts, guided if `guidance_scale` is above 1: see `velocity`."""
        condition = self.conditions.get(texts, latents.device)
        negative = None
        if guidance_scale > 1:
            negative = self.conditions.get([self.negative_prompt] * len(texts), latents.device)
        return self.velocity(model, latents, timesteps, condition, negative, guidance_scale)

    def velocity(
        self,
        model: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        condition: Condition,
        negative: Condition | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """[R, ...] float32 velocities with classifier-free guidance (arXiv:2207.12598), also where gradients flow.

        Args:
            model: the transformer.
            latents: [R, ...] float32.
            timesteps: [R].
            condition: of each row.
            negative: of each row; None is no guidance.
            guidance_scale: v = v(negative) + scale * (v(prompt) - v(negative)).
        """
        dtype = model.proj_out.weight.dtype  # that of the gathered weights, where they are sharded
        rows = {name: value.to(dtype) for name, value in condition.items()}
        latents = latents.to(dtype)
        if negative is None:
            return self.predict(model, latents, timesteps, rows).float()
        both = {name: torch.cat([negative[name].to(dtype), value]) for name, value in rows.items()}
        found = self.predict(model, torch.cat([latents] * 2), torch.cat([timesteps] * 2), both).float()
        without, led = found.chunk(2)
        return without + guidance_scale * (led - without)

    # -- sampling ------------------------------------------------------------------------------------------------

    def schedule(self, num_steps: int) -> tuple[list[float], list[float]]:
        """S + 1 sigmas from 1 to 0 and the S timesteps that the transformer is told, by diffusers' own scheduler."""
        scheduler, options = self.euler(self._num_tokens())
        scheduler.set_timesteps(num_steps, **options)
        return scheduler.sigmas.tolist(), scheduler.timesteps.tolist()

    def _num_tokens(self) -> int:
        patch = self.config["patch_size"]
        area = patch * patch if isinstance(patch, int) else patch[0] * patch[1] * patch[2]
        return functools.reduce(int.__mul__, self.latent_shape()[1:]) // area

    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes a pipeline as diffusers loads it."""
        self.save_policy(model.state_dict(), folder)

    def export_adapters(self, adapters: Mapping[str, Tensor], folder: Path, base: str) -> None:
        """Writes `pytorch_lora_weights.safetensors`, which `load_lora_weights` of a pipeline from `base` reads."""
        import diffusers

        with torch.device("meta"):
            config = self.adapter_config(self._transformer().from_config(self.config))
        config.base_model_name_or_path = base
        named = {name.replace(f".{ADAPTER}.", "."): value for name, value in adapters.items()}
        getattr(diffusers, self.pipeline_class).save_lora_weights(
            folder, transformer_lora_layers=named, transformer_lora_adapter_metadata=config.to_dict()
        )

    def save_policy(self, state: Mapping[str, Tensor], folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes a pipeline as diffusers loads it: the weights of `state`, and everything else as it was.

        Args:
            state: a transformer's `state_dict`; adapters are merged into it.
            folder: to write.
            dtype: precision of the transformer; None keeps it.
        """
        with torch.device("meta"):
            model = self._transformer().from_config(self.config)
        weights = {name: value.to(dtype or value.dtype) for name, value in merged(state, self.lora, dtype)}
        model.load_state_dict(weights, assign=True)
        self.pipeline.register_modules(transformer=model)
        try:
            self.pipeline.save_pretrained(folder)
        finally:
            self.pipeline.register_modules(transformer=None)


class ConditionCache:
    """Conditions of prompts in host memory, the least recently used given up first."""

    def __init__(self, family: DiffusionFamily, size: int) -> None:
        if size < 1:
            raise ValueError(f"model.family.init_args.cached_prompts must be at least 1, got {size}")
        self.family = family
        self.size = size
        self.num_encoded = 0
        self._kept: OrderedDict[str, Condition] = OrderedDict()

    def get(self, texts: Sequence[str], device: torch.device) -> Condition:
        """[number of texts, ...] conditions; each distinct new text is encoded once."""
        found = self.prepare(texts, device)
        return {name: torch.stack([found[text][name] for text in texts]).to(device) for name in found[texts[0]]}

    def prepare(self, texts: Sequence[str], device: torch.device) -> dict[str, Condition]:
        """The condition of each text, in host memory; `device` is where new ones are encoded."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._kept]
        found = {text: self._kept[text] for text in texts if text in self._kept}
        for text in missing:  # alone, for the last bits depend on what is encoded beside, which a resumed run lacks
            with torch.no_grad():
                encoded = self.family.encode([text], device if self.family.text_encoders_on == "device" else CPU)
            found[text] = {name: value[0].cpu().clone() for name, value in encoded.items()}
        self.num_encoded += len(missing)
        for text, condition in found.items():
            self._kept[text] = condition
            self._kept.move_to_end(text)
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels between -1 and 1, as decoders give them, as diffusers turns them into images."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def _holding(path: Path, pipeline: str | None) -> str:
    """What is wrong with a pipeline's folder."""
    if pipeline is not None:
        return f"holds a {pipeline}"
    return "has no model_index.json" if path.exists() else "does not exist"


def _cast(model: Any, dtype: torch.dtype) -> nn.Module:
    """Casts what `from_pretrained` of diffusers would cast: weights, but those that its class keeps in float32."""
    kept = set(model._keep_in_fp32_modules or ())
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point():
            value.data = value.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return model


def _has(model: nn.Module, name: str) -> bool:
    return any(place.endswith(f".{name}") and isinstance(part, nn.Linear) for place, part in model.named_modules())
