"""LoRA (arXiv:2106.09685) by the peft library: small trainable matrices beside the frozen weights of the text stack.

An adapted layer computes base(x) + alpha / rank * B A x, with A [rank, in] random and B [out, rank] zero at the start.
Adapters are float32 whatever the base's precision: a step of 1e-5 would be rounded away in bfloat16. Vision encoder,
embeddings and LM head have none: the encoder's features are kept from step to step, the other two share a weight, and
scoring reads it directly. Nor have experts that tokens are routed to, whose weights are no linear layers in
transformers, or a gated delta net's convolution; its projections have.

Whoever needs an ordinary model (engines, exports, the start of another run) gets base + alpha / rank * B A under the
original names, from `merged_weights`. In a base of bfloat16 a change of less than half the distance to the next number
is lost there, though not in training: of weights like a 7B model's (standard deviation 0.02, rank and alpha 32) 94%
stay as they were while the numbers in B are 1e-4, half of them at 1e-3, 6% at 1e-2.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from longrl.strategies.whole_tensors import BUCKET_BYTES, whole_tensors

if TYPE_CHECKING:
    from longrl.models.base import CausalFamily

OPTION = "model.family.init_args.lora"
ADAPTER = "default"
"""peft's name of an only adapter."""


@dataclass(frozen=True)
class LoRASettings:
    """Which layers get adapters, and how large. The policy then trains these alone, and needs no reference model."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: int = 32
    """The adapters' output counts alpha / rank times."""
    dropout: float = 0.0
    """Dropout of the adapters' input, in SFT only: in RL old and new log-probabilities would differ by chance."""
    target_modules: tuple[str, ...] | None = None
    """Last names of linear layers in the text stack, e.g. `[q_proj, v_proj]`; None is all of them."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"{OPTION}.rank must be at least 1, got {self.rank}; 8 to 64 are usual")
        if self.alpha <= 0:
            raise ValueError(f"{OPTION}.alpha must be above 0, got {self.alpha}; once or twice the rank is usual")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{OPTION}.dropout must be at least 0 and below 1, got {self.dropout}; set it to 0")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(f"{OPTION}.target_modules must name a layer, got none; leave it out to take all")

    @property
    def scaling(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank


class AdaptedFamily(Protocol):
    """A family that says what adapters its models have."""

    @property
    def lora(self) -> LoRASettings | None:
        """None is a model without adapters."""


# ---- a model with adapters ----


def add_adapters(family: CausalFamily, model: nn.Module) -> nn.Module:
    """Puts adapters into a model, in place, that change nothing yet; all else is frozen.

    The matrices A depend on the family's `init_seed` alone, so that all ranks have the same.

    Raises:
        ValueError: a target is no linear layer of the text stack, or the encoder is to be trained.
    """
    if family.trained_encoders(model):
        raise ValueError(
            f"{OPTION} trains adapters of the text stack alone, but model.family.init_args.freeze_vision_encoder is "
            f"false; set it to true, or {OPTION} to null"
        )
    return put_adapters(model, peft_config(family, model), family.init_seed)


def put_adapters(model: nn.Module, config: Any, seed: int) -> nn.Module:
    """Puts float32 adapters into a model by peft's description of them, in place; all else is frozen."""
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()
    return model


def peft_config(family: CausalFamily, model: nn.Module) -> Any:
    """The description that peft wants of the adapters in this model."""
    from peft import LoraConfig

    settings = family.lora
    assert settings is not None
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(family, model, settings.target_modules),
        base_model_name_or_path=family.model_path,
        task_type="CAUSAL_LM",
    )


def _targets(family: CausalFamily, model: nn.Module, target_names: tuple[str, ...] | None) -> str:
    """A pattern of full names: encoders have layers of the same last names (`gate_proj`)."""
    backbone = family.backbone(model)
    linear = {name.rpartition(".")[2] for name, part in backbone.named_modules() if isinstance(part, nn.Linear)}
    for name in target_names or ():
        if name not in linear:
            closest = difflib.get_close_matches(name, linear, n=1, cutoff=0.0)
            raise ValueError(
                f"{OPTION}.target_modules must name linear layers of the text stack, got {name!r}; the closest is "
                f"{closest[0]!r}, all are {', '.join(sorted(linear))}"
            )
    (prefix,) = (name for name, part in model.named_modules() if part is backbone)
    return rf"{re.escape(prefix)}\..*\.({'|'.join(sorted(target_names or linear))})"


def adapters_off(family: AdaptedFamily, model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The model without what its adapters add: the policy that the run began with. Nothing happens without LoRA.

    A factor of zero, and not peft's own way of switching adapters off, for that makes them untrainable meanwhile, and
    FSDP2 remembers it of the first forward pass.
    """
    if family.lora is None:
        return contextlib.nullcontext()
    from peft.helpers import rescale_adapter_scale

    return rescale_adapter_scale(model, 0.0)


def refuse_dropout(settings: LoRASettings | None) -> None:
    """Raises ValueError if the policy would not give the same log-probabilities twice."""
    if settings is not None and settings.dropout:
        raise ValueError(
            f"{OPTION}.dropout must be 0 in RL, got {settings.dropout}: the ratio of new to old log-probabilities "
            "would be that of two random models; set it to 0"
        )


# ---- its weights as those of a plain model ----


def is_adapter(name: str) -> bool:
    """True for the name of a matrix A or B."""
    return ".lora_" in name


def plain_name(name: str) -> str:
    """The name of a weight in a model without adapters."""
    return name.replace(".base_layer.", ".")


def merged_weights(
    state: Mapping[str, Tensor],
    settings: LoRASettings | None,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the model without adapters that computes the same, one full tensor after the other.

    base + scaling * B A is summed in float32 and rounded once, as by peft's `merge_and_unload`.

    Args:
        state: a `state_dict`, with adapters or without, perhaps in shards; then every rank must go through.
        settings: those that the adapters were made with.
        dtype: precision of the sums; None is the base's.
        bucket_bytes: of whole tensors that are gathered together, see `whole_tensors`.
    """
    # 1. What is read: of an adapted layer the base, then A and B.
    tensors: list[Tensor] = []
    adapted: dict[str, bool] = {}
    for name, value in state.items():
        if is_adapter(name):
            continue
        tensors.append(value)
        layer = name.removesuffix(".base_layer.weight")
        adapted[name] = settings is not None and layer != name and adapter_name(layer, "A") in state
        if adapted[name]:
            tensors += [state[adapter_name(layer, matrix)] for matrix in "AB"]

    # 2. In that order, whole.
    whole = whole_tensors(tensors, bucket_bytes)
    for name, has_adapters in adapted.items():
        weight = next(whole)
        if has_adapters:
            assert settings is not None
            a = next(whole).float()
            b = next(whole).float()
            weight = (weight.float() + b @ a * settings.scaling).to(dtype or weight.dtype)
        yield plain_name(name), weight


def adapter_name(layer: str, matrix: str) -> str:
    """The name of a layer's matrix `A` or `B` in a `state_dict`."""
    return f"{layer}.lora_{matrix}.{ADAPTER}.weight"


def export_adapters(family: CausalFamily, adapters: Mapping[str, Tensor], folder: Path, base: str) -> None:
    """Writes adapters, by their names in the model, as `PeftModel.from_pretrained` reads them.

    Args:
        family: what they were put into.
        adapters: matrices A and B.
        folder: to write.
        base: folder or hub id of the weights that they belong to.
    """
    from safetensors.torch import save_file

    with torch.device("meta"):
        config = peft_config(family, family.build(weights=None))
    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    named = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value for name, value in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# ---- in a checkpoint ----


def to_checkpoint(settings: LoRASettings | None) -> dict[str, Any] | None:
    """Settings of adapters as a checkpoint holds them: without alpha nobody could merge them."""
    return None if settings is None else asdict(settings)


def from_checkpoint(saved: Mapping[str, Any]) -> LoRASettings | None:
    """The settings of a checkpoint's adapters, None if it has none."""
    return None if saved.get("lora") is None else LoRASettings(**saved["lora"])


def check_resumed(settings: LoRASettings | None, saved: Mapping[str, Any]) -> None:
    """Raises ValueError if a run goes on with other adapters than its checkpoint has."""
    before = from_checkpoint(saved)
    if before != settings:
        raise ValueError(
            f"{OPTION} must be the checkpoint's, which is {before}, got {settings}; set it so, or start a new run with "
            "model.init_from, which merges the checkpoint's adapters into the weights"
        )
