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
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from longrl.features.provenance import tensor_bytes
from longrl.models.base import CausalFamily

PREFIX = "/v1/longrl"
"""Under /v1, so that vLLM's own check of the API key guards it."""
NO_VERSION = "none"
"""Version of random weights, and of ones that were half loaded."""
KEY_VARIABLE = "LONGRL_SERVER_KEY"
"""Environment variable of the API key, read by server and trainer; without it vLLM's own `VLLM_API_KEY`."""
MISSING = 409
"""HTTP status of a request whose tensors the server lacks; the answer names them."""
OTHER_VERSION = 412
"""HTTP status of a request for weights of another version than the server holds."""

_MARK = "tensor:"
_HEADS = ("num_attention_heads", "num_key_value_heads")
_TEXT_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", *_HEADS, "intermediate_size")
_VISION_SIZES = ("spatial_merge_size", "temporal_patch_size", "tokens_per_second")


def api_key() -> str | None:
    """The key that requests must bring, from the environment: never on a command line, where others could read it."""
    return os.environ.get(KEY_VARIABLE) or os.environ.get("VLLM_API_KEY") or None


def dump_requests(requests: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> str:
    """Requests as JSON in which tensors are hashes of their content.

    Args:
        requests: nested dicts and lists of tensors and plain values.
        tensors: filled with {hash: tensor on the host}.
    """

    def replace_tensor(value: Any) -> dict[str, str]:
        if not isinstance(value, Tensor):
            raise TypeError(f"a request holds tensors and plain values, got {type(value).__name__}")
        tensor = value.detach().to("cpu").contiguous()
        content = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
        content.update(tensor_bytes(tensor))
        tensors.setdefault(content.hexdigest(), tensor)
        return {_MARK: content.hexdigest()}

    return json.dumps(requests, default=replace_tensor)


def load_requests(text: str, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The requests that `dump_requests` was given, from its JSON; a KeyError names a tensor that is missing."""
    return json.loads(text, object_hook=lambda item: tensors[item[_MARK]] if item.keys() == {_MARK} else item)


def pack_message(message: dict[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """A message and tensors as one safetensors file, the message being its metadata."""
    from safetensors.torch import save

    # safetensors refuses tensors that share memory, as the slices of a video's features do
    shared = {name for name, tensor in tensors.items() if tensor.untyped_storage().nbytes() != tensor.nbytes}
    separate = {name: tensor.clone() if name in shared else tensor for name, tensor in tensors.items()}
    return save(separate, metadata={"message": json.dumps(message)})


def unpack_message(body: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The message and the tensors of `pack_message`.

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


def model_sizes(family: CausalFamily) -> dict[str, Any]:
    """Facts that trainer and server agree on, in plain values: a server may have been started from another recipe."""
    text = family.config.get_text_config()
    vision_encoder = getattr(family.config, "vision_config", None)
    sizes = {name: getattr(text, name, None) for name in (*_TEXT_SIZES, "tie_word_embeddings")}
    if vision_encoder is not None:
        sizes |= {f"vision {name}": getattr(vision_encoder, name, None) for name in _VISION_SIZES}
    sizes |= {f"{kind} token": token for kind, token in family.media_token_ids().items()}
    sizes["LM head in float32"] = family.fp32_lm_head
    return {**sizes, "dtype": family.dtype, "end tokens": list(family.end_token_ids)}
