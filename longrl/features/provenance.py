"""Where features come from: a hash of all that decides them beside the medium and its key.

Left out is what only rounds otherwise: the kind of GPU, the version of torch, and how many ranks share a video.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from longrl.features.disk import bytes_of
from longrl.models.base import CausalFamily


def provenance(family: CausalFamily, model: nn.Module) -> str:
    """Sha256 of family class, transformers version, settings, structure and every weight of the encoders.

    Args:
        family: says which modules encode, and their settings.
        model: with the weights that encode.
    """
    import transformers

    media_encoders = family.media_encoders(model)
    told = {
        "family": f"{type(family).__module__}.{type(family).__qualname__}",
        "transformers": transformers.__version__,
        "settings": family.encoder_settings(),
        "structure": [str(module) for module in media_encoders],
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for place, module in enumerate(media_encoders):
        for name, tensor in module.state_dict().items():
            digest.update(f"\n{place} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(bytes_of(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def numerics(device: torch.device) -> str:
    """The precision in which a encoder that is called here and now would compute."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return f"{device.type}, autocast {autocast}, default {torch.get_default_dtype()}"
