"""The language between `VLLMServerEngine` and `python -m longrl serve`: requests, their tensors, what a model is.

A request is what `family.engine_request` gives to `LLM.generate` in the trainer's process. It travels as JSON in which
every tensor is replaced by the hash of its content; the tensors themselves follow as safetensors, and only those that
the server lacks. So a video's features cross once, stale features cannot be meant, and nothing that is read can run
code.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from longrl.features.provenance import tensor_bytes
from longrl.io.jsonl import parse_json
from longrl.models.base import CausalFamily

PREFIX = "/v1/longrl"
"""Under /v1, as vLLM's own routes."""
NO_VERSION = "none"
"""Version of random weights, and of ones that were half loaded."""
OWN_WEIGHTS = "own"
"""Version of the weights of the model's own folder: a server that scores for others holds them for good."""
ANY_STEP = "*"
"""Of a version `RUN:*`: whichever of the run's weights the server holds; the answer says which."""
MISSING = 409
"""HTTP status of a request whose tensors the server lacks; the answer names them."""
OTHER_VERSION = 412
"""HTTP status of a request for weights of another version than the server holds."""

SAMPLING = frozenset(
    (
        "n",
        "temperature",
        "top_p",
        "top_k",
        "max_tokens",
        "seed",
        "logprobs",
        "ignore_eos",
        "stop_token_ids",
        "detokenize",
    )
)
"""Arguments of vLLM's `SamplingParams` that a request may set: those of `sampling_arguments`."""
MAX_NAME = 1000
"""Characters of a request's name."""
MAX_COMPLETIONS = 1 << 16
"""Of one request, over all its prompts."""
EMBEDS = ("embeds", "image_embeds", "video_embeds", "prompt_embeds")
"""Keys of a request under which features stand."""

PIECE_ROWS = 1024
"""Rows of a tensor that go over as one: where features were appended to others, those stay the pieces they were."""

_MARK = "tensor:"
_NAME = re.compile(r"[0-9a-f]{32}")
_HEADS = ("num_attention_heads", "num_key_value_heads")
_TEXT_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", *_HEADS, "intermediate_size")
_VISION_SIZES = ("spatial_merge_size", "temporal_patch_size", "tokens_per_second")


def dump_requests(requests: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> str:
    """Requests as JSON in which tensors are hashes of the content of their pieces.

    Args:
        requests: nested dicts and lists of tensors and plain values.
        tensors: filled with {hash: tensor on the host}.
    """

    def replace_tensor(value: Any) -> dict[str, list[str]]:
        if not isinstance(value, Tensor):
            raise TypeError(f"a request holds tensors and plain values, got {type(value).__name__}")
        tensor = value.detach().to("cpu").contiguous()
        pieces = tensor.split(PIECE_ROWS) if tensor.dim() else (tensor,)
        names = _known_names(value)
        if names is None:
            names = [content_name(piece) for piece in pieces]
            _note_names(value, names)
        for name, piece in zip(names, pieces, strict=True):
            tensors.setdefault(name, piece)
        return {_MARK: names}

    return json.dumps(requests, default=replace_tensor)


_names_of: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""tensor -> (its version, names of its pieces): completions of a prompt share its features, and each is asked for anew
behind every cut."""
_names_lock = threading.Lock()


def _known_names(tensor: Tensor) -> list[str] | None:
    """The names that it was given before, unless it was written to since; inference tensors do not say."""
    if tensor.is_inference():
        return None
    with _names_lock:
        version, names = _names_of.get(tensor, (None, None))
    return names if version == tensor._version else None


def _note_names(tensor: Tensor, names: list[str]) -> None:
    if tensor.is_inference():
        return
    with _names_lock:
        _names_of[tensor] = (tensor._version, names)


def content_name(tensor: Tensor) -> str:
    """The hash of a contiguous CPU tensor's content, which is its name."""
    content = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    content.update(tensor_bytes(tensor))
    return content.hexdigest()


def load_requests(
    text: str,
    tensors: Mapping[str, Tensor],
    width: int | None = None,
    joined: MutableMapping[tuple[str, ...], Tensor] | None = None,
) -> list[dict[str, Any]]:
    """The requests that `dump_requests` was given, from its JSON.

    Args:
        text: of `dump_requests`.
        tensors: {hash: tensor}.
        width: size of a feature; None is any.
        joined: tensors by the names of their pieces, which others were given; gets new ones.

    Raises:
        ValueError: the text is something else, a tensor is missing, or features have another width.
    """
    known = {} if joined is None else joined

    def put_tensor(item: dict[str, Any]) -> Any:
        if item.keys() != {_MARK}:
            return item
        names = tuple(item[_MARK])
        if len(names) == 1:
            return tensors[names[0]]
        whole = known.get(names)
        if whole is None:
            whole = torch.cat([tensors[name] for name in names])
            known[names] = whole
        return whole

    try:
        parse_json(text)  # not nested without end
        requests = json.loads(text, object_hook=put_tensor)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:  # of pieces that are not one tensor's, too
        raise ValueError(f"the requests are no JSON with the tensors of the message: {error!r}"[:500]) from error
    if not isinstance(requests, list) or not all(isinstance(request, dict) for request in requests):
        raise ValueError("the requests must be a list of mappings")
    for name, features in _features_in(requests):
        if width is not None and (
            features.dim() != 2 or features.shape[1] != width or not features.is_floating_point()
        ):
            raise ValueError(
                f"{name} is [{', '.join(map(str, features.shape))}] of {features.dtype}, but the model's features are "
                f"[N, {width}]; start server and trainer with the same config"
            )
    return requests


def _features_in(value: Any) -> Iterator[tuple[str, Tensor]]:
    """The features of requests and their keys."""
    if isinstance(value, list):
        for item in value:
            yield from _features_in(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if isinstance(item, Tensor):
                if name in EMBEDS:
                    yield name, item
            else:
                yield from _features_in(item)


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
        ValueError: the bytes are something else, or a tensor is not what its name says.
    """
    from safetensors.torch import load

    try:
        length = int.from_bytes(body[:8], "little")
        message = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["message"])
        tensors = load(body)
    except Exception as error:
        raise ValueError(f"the request's body is no safetensors with a message: {error!r}"[:500]) from error
    for name, tensor in tensors.items():
        if name != content_name(tensor):
            raise ValueError(f"tensor {name[:40]!r} of the request is not what its name says; send it again")
    return message, tensors


def check_message(message: Any) -> None:
    """Raises ValueError if a message of `generate` has other fields, types or options than the trainer's have."""
    kinds = {"version": str, "requests": str, "tensors": list, "params": list}
    optional = {"sender": str, "names": list}
    if not isinstance(message, dict) or not kinds.keys() <= message.keys() <= kinds.keys() | optional.keys():
        raise ValueError(f"a message must have {', '.join(kinds)}, and may have {', '.join(optional)}")
    for name, kind in (kinds | optional).items():
        if name in message and not isinstance(message[name], kind):
            raise ValueError(f"{name} of a message must be a {kind.__name__}, got a {type(message[name]).__name__}")
    for name in message.get("names", ()):
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise ValueError(f"names of a message must be texts of at most {MAX_NAME} characters")
    check_tensor_names(message["tensors"])
    for params in message["params"]:
        others = sorted(map(str, params.keys() - SAMPLING)) if isinstance(params, dict) else ["no mapping"]
        if others:
            raise ValueError(f"params of a message may have {', '.join(sorted(SAMPLING))}; got {others[0][:40]!r}")
    counts = [params.get("n", 1) for params in message["params"]]
    if not all(type(count) is int and count > 0 for count in counts) or sum(counts) > MAX_COMPLETIONS:
        raise ValueError(
            f"n of params must be positive, and {MAX_COMPLETIONS} at most over all prompts, got {counts[:5]}"
        )


def check_tensor_names(names: Sequence[Any]) -> None:
    """Raises ValueError if names of tensors are no hashes."""
    for name in names:
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise ValueError(f"tensors of a message must be hashes of 32 digits, got {str(name)[:40]!r}")


def run_of(version: str) -> str:
    """The run of a version RUN:STEP, "" of one that names none."""
    return version.rpartition(":")[0]


def step_of(version: str) -> int:
    """The step of a version RUN:STEP.

    Raises:
        ValueError: it has none.
    """
    return int(version.rpartition(":")[2])


def is_asked(version: str, asked: str) -> bool:
    """Whether weights are those that were asked for, by their version or as those of any step of the run.

    Weights without the adapters that belong to them are of no step.
    """
    run, _, step = version.rpartition(":")
    return version == asked or (step.isdecimal() and asked == f"{run}:{ANY_STEP}")


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
