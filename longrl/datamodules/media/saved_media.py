"""Media of completions as plain values, for checkpoints and records of steps: all but pixels, and where those are.

A prompt's media come from its row. What a completion was shown comes from a tool's call, which nobody makes again.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import torch

from longrl.types import FrameShard, Media

MODULES = ("longrl.types", "longrl.datamodules.media.", "longrl.datamodules.loading.traces")
"""Sources are restored if their class is from here, where making one imports nothing that it names: a file that was
tampered with runs no code of others. A reward, say, would import the function that the file names."""


def saved_media(media: Media) -> dict[str, Any]:
    """A media item as plain values: numbers, texts, lists and dicts, as JSON and `torch.load(weights_only=True)` read.

    Its source is kept if it is a frozen dataclass of plain values of `MODULES`, as `FileFrames`. One that holds
    pixels, or is another's, becomes None: then the item can be scored with features that are still in a cache alone.
    """
    saved = {field.name: getattr(media, field.name) for field in dataclasses.fields(media)}
    del saved["patches"]
    try:
        saved["source"] = _plain(media.source)
    except TypeError:
        saved["source"] = None
    return {name: _plain(value) for name, value in saved.items()}


def restored_media(saved: Mapping[str, Any], shard: FrameShard | None = None) -> Media:
    """The inverse, without patches: whoever encodes it decodes its source.

    Args:
        saved: by `saved_media`, perhaps by way of JSON.
        shard: of the rank that will encode it, where another number of ranks shares media now; None is the saved one.

    Raises:
        ValueError: it is nothing that `saved_media` made.
    """
    try:
        fields = {name: _restored(value) for name, value in saved.items()}
        source = fields["source"]
        if shard is not None and source is not None and hasattr(source, "shard"):
            fields["source"] = dataclasses.replace(source, shard=shard)
        return Media(**fields, patches=torch.empty(0, 0))
    except (TypeError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(f"this is no saved media item ({type(error).__name__}: {error}): {saved}") from error


def _plain(value: Any) -> Any:
    """A value without tuples and dataclasses.

    Raises:
        TypeError: it cannot be plain, as a tensor.
    """
    if isinstance(value, float):  # or NumPy's, which is one, too
        return float(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    kind = type(value)
    if dataclasses.is_dataclass(value) and kind.__module__.startswith(MODULES):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": fields}
    raise TypeError(f"a {kind.__name__} is no plain value")


def _restored(value: Any) -> Any:
    """The inverse; lists become tuples, as frozen dataclasses have them."""
    if isinstance(value, list | tuple):
        return tuple(_restored(part) for part in value)
    if not isinstance(value, Mapping):
        return value
    if value.keys() != {"class", "fields"}:
        return {name: _restored(part) for name, part in value.items()}
    module, _, name = value["class"].partition(":")
    if not module.startswith(MODULES):
        raise ValueError(f"{value['class']} is in none of {', '.join(MODULES)}, so it is not restored")
    kind = getattr(importlib.import_module(module), name)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__.startswith(MODULES)):
        raise ValueError(f"{value['class']} is no dataclass of these, so it is not restored")
    return kind(**{name: _restored(part) for name, part in value["fields"].items()})
