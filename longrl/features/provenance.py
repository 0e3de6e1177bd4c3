"""Where features come from: a hash of all that decides them beside the media item and its key.

Left out is what only rounds otherwise: the kind of GPU, the version of torch, and how many ranks share a video.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

from longrl.models.base import EncodesMedia


def encoder_provenance(family: EncodesMedia, model: nn.Module) -> str:
    """Sha256 of family class, transformers version, settings, structure and every weight of the encoders.

    Args:
        family: says which modules encode, and their settings.
        model: with the weights that encode.
    """
    import transformers

    media_encoders = family.media_encoders(model)
    description = {
        "family": f"{type(family).__module__}.{type(family).__qualname__}",
        "transformers": transformers.__version__,
        "settings": family.encoder_settings(),
        "structure": [str(module) for module in media_encoders],
    }
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode())
    for index, module in enumerate(media_encoders):
        for name, tensor in module.state_dict().items():
            digest.update(f"\n{index} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def encoder_precision(device: torch.device) -> str:
    """The precision in which an encoder that is called here and now would compute."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return f"{device.type}, autocast {autocast}, default {torch.get_default_dtype()}"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; those of a contiguous one on the CPU are not copied."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
