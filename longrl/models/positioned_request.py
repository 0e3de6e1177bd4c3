"""A prompt for a vLLM that takes features together with their positions (`longrl.models.qwen_omni_vllm`)."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longrl.models.base import rows_between
from longrl.types import Prompt


def positioned_request(
    media_tokens: Mapping[str, int], prompt: Prompt, features: Mapping[str, Tensor]
) -> dict[str, Any]:
    """One placeholder for every run of equal ones, its rows, and the positions from the run before to its end.

    And those of two tokens more: the marks behind a track share one; from there on text advances by one. Ids of
    items tell apart where they stand, as positions do.

    Args:
        media_tokens: placeholder token of each kind.
        prompt: at the positions that its tokens have.
        features: by media key, [N, D].
    """
    kinds = {token: kind for kind, token in media_tokens.items()}
    rows = {kind: [features[item.key] for item in prompt.media if item.kind == kind] for kind in kinds.values()}
    compact: list[int] = []
    items: dict[str, list[dict[str, Any]]] = {}
    done = dict.fromkeys(rows, 0)  # rows of each kind behind us
    index = 0  # of the run's first token
    before = 0  # where the run before it ended
    for token, run in itertools.groupby(prompt.input_ids.tolist()):
        length = len(list(run))
        index += length
        if token not in kinds:
            compact += [token] * length
            continue
        compact.append(token)
        kind = kinds[token]
        first = done[kind]
        done[kind] += length
        item = {
            "embeds": torch.cat(rows_between(rows[kind], first, done[kind])),
            "positions": prompt.position_ids[:, before : index + 2].T,
            "first": first,
        }
        items.setdefault(kind, []).append(item)
        before = index
    request: dict[str, Any] = {"prompt_token_ids": compact}
    if items:
        request["multi_modal_data"] = {kind: _stacked(kind, parts) for kind, parts in items.items()}
        request["multi_modal_uuids"] = {}
    for kind, parts in items.items():
        keys = [item.key for item in prompt.media if item.kind == kind]
        ends = list(itertools.accumulate(map(len, rows[kind])))
        names = []
        for part in parts:  # of items up to its own: those that a completion is shown later change no name
            first, count = part["first"], len(part["embeds"])
            known = keys[: bisect.bisect_left(ends, first + count) + 1]
            names.append(f"{known} {first} {count} {part['positions'].tolist()}")
        request["multi_modal_uuids"][kind] = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    return request


def _stacked(kind: str, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Items of a kind as `longrl.models.qwen_omni_vllm` cuts them."""
    return {
        f"{kind}_embeds": torch.cat([item["embeds"] for item in items]),
        f"{kind}_counts": torch.tensor([len(item["embeds"]) for item in items]),
        f"{kind}_positions": torch.cat([item["positions"] for item in items]),
        f"{kind}_reach": torch.tensor([len(item["positions"]) for item in items]),
    }
