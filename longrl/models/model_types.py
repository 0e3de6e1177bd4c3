"""Which family reads a folder: `model_type` of its config.json, asked before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longrl.models.base import CausalFamily
    from longrl.models.pretrained_folder import PretrainedFolder


def shipped_families() -> tuple[type[CausalFamily], ...]:
    """The families of this package that say which models they read."""
    # Here, for each of them imports what this file is part of.
    from longrl.models.internvl import InternVLFamily
    from longrl.models.qwen2_vl import Qwen2VLFamily
    from longrl.models.qwen3_5 import Qwen3_5Family, Qwen3_5TextFamily
    from longrl.models.qwen3_omni import Qwen3OmniFamily
    from longrl.models.qwen3_vl import Qwen3VLFamily
    from longrl.models.qwen_omni import QwenOmniFamily
    from longrl.models.qwen_vl import Qwen2_5_VLFamily
    from longrl.models.text import LlamaFamily, TextFamily

    return (
        TextFamily, LlamaFamily, Qwen2VLFamily, Qwen2_5_VLFamily, Qwen3VLFamily, Qwen3_5Family, Qwen3_5TextFamily,
        QwenOmniFamily, Qwen3OmniFamily, InternVLFamily,
    )  # fmt: skip


def check_model_type(family: PretrainedFolder, config: Any) -> None:
    """Raises ValueError if a family that says what it reads is given another model, and names the one that reads it.

    Args:
        family: with `model_types`, or without.
        config: of its folder.
    """
    model_type = getattr(config, "model_type", "")
    if not family.model_types or model_type in family.model_types:
        return
    fitting = [kind for kind in shipped_families() if model_type in kind.model_types]
    remedy = "no family of longrl reads it; name another model, or write a family (docs/extend/family.md)"
    if fitting:
        path = f"{fitting[0].__module__}.{fitting[0].__qualname__}"
        remedy = f"set model.family.class_path to {path}, or name another model"
    raise ValueError(
        f"{type(family).__name__} reads models of type {' and '.join(family.model_types)}, but model.family's "
        f"model={family.model_path!r} is a {model_type}; {remedy}"
    )
