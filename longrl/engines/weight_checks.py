"""Weights that a server is given, compared with its model by names and shapes before any tensor is read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from longrl.engines.vllm_extension import INDEX
from longrl.engines.weight_buckets import DTYPES, Listed
from longrl.models.base import CausalFamily

MAX_INDEX_BYTES = 1 << 20
FILE_NAME = re.compile(r"[0-9]{5,9}\.safetensors")
FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
"""Precisions that vLLM turns into its own, by their names in a file and in torch."""
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""The engine's name of a weight -> its shape, and its precision in the engine."""


def expected_weights(family: CausalFamily) -> Shapes:
    """What `engine_weights` hands over of a family's model, without a byte of it."""
    with torch.device("meta"):
        state = family.build(weights=None).state_dict()
    expected = {}
    for name, weight in state.items():
        engine_name = family.engine_weight(name)
        if engine_name is not None:
            tensor = family.engine_tensor(name, weight)
            expected[engine_name] = tuple(tensor.shape), tensor.dtype
    return expected


def listed_weights(expected: Shapes) -> list[Listed]:
    """The weights of `expected_weights`, in the order of `engine_weights`."""
    return [Listed(name, shape, dtype) for name, (shape, dtype) in expected.items()]


def check_listed(order: Any, expected: Shapes) -> list[Listed]:
    """The weights that an order lists as [[name, shape, dtype], ...].

    Raises:
        ValueError: they are not a model's, all of them and nothing else.
    """
    listed: list[Listed] = []
    problems: list[str] = []
    items: list[Any] = order if isinstance(order, list) else [order]
    for item in items:
        try:
            name, shape, dtype = item
            listed.append(Listed(str(name), tuple(map(int, shape)), DTYPES[dtype]))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"weights must be listed as [name, shape, dtype], got {str(item)[:100]}") from error
        problems += _compare(listed[-1].name, listed[-1].shape, dtype, expected)
    found = [each.name for each in listed]
    problems += [f"{name!r} is there twice" for name, count in Counter(found).items() if count > 1]
    _refuse("what was announced", problems, expected.keys() - set(found))
    return listed


def check_weights(folder: Path, expected: Shapes) -> None:
    """Raises ValueError if a folder of `write_shards` does not hold a model's weights, all of them and nothing else.

    Only headers are read. A file that is not in the folder itself, a name twice, a torn file are refused too.
    """
    from safetensors import SafetensorError, safe_open

    found: set[str] = set()
    problems: list[str] = []
    for file in list_files(folder):
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # no mapping
                    part = tensors.get_slice(name)
                    shape, dtype = tuple(part.get_shape()), part.get_dtype()
                    problems += _compare(name, shape, dtype, expected)
                    problems += [f"{name!r} is there twice"] * (name in found)
                    found.add(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / file} is no whole safetensors file ({error}); write the weights again"
            ) from error
    _refuse(str(folder), problems, expected.keys() - found)


def _refuse(source: str, problems: Sequence[str], missing: set[str]) -> None:
    problems = [*problems, *(f"{name!r} is missing" for name in sorted(missing))]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{source} does not hold the weights of the server's model: {'; '.join(problems[:3])}{more}; start server "
            "and trainer with the same config"
        )


def list_files(folder: Path) -> list[str]:
    """Names of the files that a folder's index lists."""
    try:
        with (folder / INDEX).open("rb") as file:
            listed = json.loads(file.read(MAX_INDEX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX} cannot be read ({error}); write the weights again") from error
    names = listed if isinstance(listed, list) else [listed]
    for name in names:
        if not isinstance(name, str) or FILE_NAME.fullmatch(name) is None or (folder / name).is_symlink():
            raise ValueError(
                f"{folder / INDEX} must list files of that folder like 00000.safetensors, has {str(name)[:100]!r}"
            )
    return names


def _compare(name: str, shape: tuple[int, ...], dtype: str, expected: Shapes) -> list[str]:
    if name not in expected:
        return [f"{name[:200]!r} is no weight of it"]
    wanted, precision = expected[name]
    if shape != wanted:
        return [f"{name!r} is {list(shape)} instead of {list(wanted)}"]
    if precision.is_floating_point != (dtype in FLOATS):
        return [f"{name!r} is of {dtype}, which is another kind of numbers"]
    return []
