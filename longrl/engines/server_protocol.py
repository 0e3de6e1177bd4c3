"""The language between `VLLMServerEngine` and `python -m longrl serve`: requests, their tensors, what a model is.

A request is what `family.engine_request` gives to `LLM.generate` in the trainer's process. It travels as JSON in which
every tensor is replaced by the hash of its content; the tensors themselves follow as safetensors, and only those that
the server lacks. So a video's features cross once, stale features cannot be meant, and nothing that is read can run
code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longrl.models.base import CausalFamily

PREFIX = "/v1/longrl"
"""Under /v1, so that vLLM's own check of the API key guards it."""
NO_VERSION = "none"
"""Of a server whose weights are random, or were half loaded."""
KEY_VARIABLE = "LONGRL_SERVER_KEY"
"""Environment variable of the API key, read by server and trainer; without it vLLM's own `VLLM_API_KEY`."""
MISSING = 409
"""HTTP status of a request whose tensors the server lacks; the answer names them."""
OTHER_VERSION = 412
"""HTTP status of a request for weights of another version than the server holds."""

_MARK = "tensor:"
_SIZES = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "tie_word_embeddings",
)
_TOWER_SIZES = ("spatial_merge_size", "temporal_patch_size", "tokens_per_second")


def api_key() -> str | None:
    """The key that requests must bring, from the environment: never on a command line, where others could read it."""
    return os.environ.get(KEY_VARIABLE) or os.environ.get("VLLM_API_KEY") or None


def pointed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON: its tensors go to `tensors`, their hashes stay.

    Args:
        value: nested dicts and lists of tensors and plain values.
        tensors: filled with {hash: tensor on the host}.
    """
    if isinstance(value, Tensor):
        value = value.detach().to("cpu").contiguous()
        name = content_id(value)
        tensors.setdefault(name, value)
        return {_MARK: name}
    if isinstance(value, Mapping):
        return {key: pointed(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return value if _plain(value) else [pointed(item, tensors) for item in value]
    return value


def resolved(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pointed` was given, from its JSON; a KeyError names a tensor that is missing."""
    if isinstance(value, dict):
        if value.keys() == {_MARK}:
            return tensors[value[_MARK]]
        return {key: resolved(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return value if _plain(value) else [resolved(item, tensors) for item in value]
    return value


def pointers(value: Any) -> set[str]:
    """Hashes of all tensors that the JSON of a request points to."""
    if isinstance(value, dict):
        return {value[_MARK]} if value.keys() == {_MARK} else set().union(*map(pointers, value.values()))
    if isinstance(value, list) and not _plain(value):
        return set().union(*map(pointers, value))
    return set()


def _plain(values: list[Any] | tuple[Any, ...]) -> bool:
    """Whether a list is token ids and the like: those of an hour's video are not walked one by one."""
    return not values or isinstance(values[0], int | float | str)


def content_id(tensor: Tensor) -> str:
    """Hash of type, shape and numbers of a contiguous tensor on the host."""
    found = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def packed(message: dict[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """A message and tensors as one safetensors file, the message being its metadata."""
    from safetensors.torch import save

    whole = {name: value if _owns_memory(value) else value.clone() for name, value in tensors.items()}
    return save(whole, metadata={"message": json.dumps(message)})


def unpacked(body: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The message and the tensors of `packed`.

    Raises:
        ValueError: the bytes are something else.
    """
    from safetensors.torch import load

    try:
        length = int.from_bytes(body[:8], "little")
        message = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["message"])
        return message, load(body)
    except Exception as error:
        raise ValueError(f"the request's body is no safetensors with a message: {error!r}") from error


def _owns_memory(tensor: Tensor) -> bool:
    """Safetensors refuses tensors that share memory, as the slices of a video's features do."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def model_sizes(family: CausalFamily) -> dict[str, Any]:
    """What trainer and server must agree on, in plain values: a server may have been started from another recipe."""
    text, vision_encoder = family.config.get_text_config(), getattr(family.config, "vision_config", None)
    sizes = {name: getattr(text, name, None) for name in _SIZES}
    sizes |= {
        f"vision {name}": getattr(vision_encoder, name, None) for name in _TOWER_SIZES if vision_encoder is not None
    }
    sizes |= {f"{kind} token": token for kind, token in family.media_token_ids().items()}
    return {**sizes, "dtype": family.dtype, "end token": family.tokenizer.eos_token_id}
