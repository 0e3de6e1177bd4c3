"""Completions of a rollout server's requests by the trainer's own model: what a request means, and its tokens.

Letters: B prompts, n completions of each, S tokens of the longest one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from longrl.engines.prefix_cache import PrefixCache
from longrl.engines.sampling import LMHead, sample_tokens
from longrl.engines.vllm_turns import SAMPLED_PLACEHOLDERS
from longrl.models.base import CausalFamily
from longrl.packing.pack import pack
from longrl.types import GroupSpan, Media, MediaKind, Packed, Prompt, Row, SamplingParams


@dataclass(frozen=True)
class Ask:
    """A request as the trainer's model reads it."""

    prompt: Prompt
    features: Mapping[str, Tensor]
    """By the keys of its media."""
    sampled_placeholders: Sequence[Sequence[int]]
    """[index, token] of placeholder tokens that a policy sampled."""
    sampling: SamplingParams
    seed: int | None
    stop_token_ids: tuple[int, ...]

    @property
    def prompt_key(self) -> tuple[Any, ...]:
        """Requests of equal keys are about the same prompt: its features are one tensor then."""
        features = [(key, tensor.data_ptr()) for key, tensor in self.features.items()]
        return (*self.prompt.input_ids.tolist(), *features, *map(tuple, self.sampled_placeholders))

    @classmethod
    def read(cls, family: CausalFamily, request: Mapping[str, Any], arguments: Mapping[str, Any]) -> Ask:
        """The request of `family.engine_request`, in Qwen-VL's way if it has media, and its `sampling_arguments`."""
        features: dict[str, Tensor] = {}
        media: dict[int, Iterator[Media]] = {}
        for kind, data in request.get("multi_modal_data", {}).items():
            media[family.media_token_ids()[kind]] = iter(list(_read_media(family, kind, data, features)))
        ids: list[int] = []
        shown: list[Media] = []
        for token in request["prompt_token_ids"]:
            if token in media:
                shown.append(next(media[token]))
                ids += family.placeholder_ids(shown[-1])
            else:
                ids.append(token)
        input_ids = torch.tensor(ids)
        positions = family.position_ids(input_ids, shown)
        prompt = Prompt("request", input_ids, positions, tuple(shown), Row("request", "", ""))
        names = ("n", "max_tokens", "temperature", "top_p", "top_k")
        sampling = SamplingParams(*[arguments[name] for name in names])
        pairs = request.get(SAMPLED_PLACEHOLDERS, ())
        return cls(prompt, features, pairs, sampling, arguments["seed"], tuple(arguments["stop_token_ids"]))


def _read_media(
    family: CausalFamily, kind: MediaKind, data: Mapping[str, Tensor], features: dict[str, Tensor]
) -> Iterator[Media]:
    """The media of a kind; their features are added."""
    grids = data[f"{kind}_grid_thw"].tolist()
    seconds = data["second_per_grid_ts"].tolist() if kind == "video" else [0.0] * len(grids)
    start = 0
    for index, grid in enumerate(grids):
        item = Media(kind, torch.empty(0), tuple(grid), seconds[index], (), f"{kind} {index}")
        count = family.num_features(item)
        features[item.key] = data[f"{kind}_embeds"][start : start + count]
        start += count
        yield item


Sampled = tuple[list[int], list[float], Literal["stop", "length", "abort"]]
"""Tokens of a completion, their log-probabilities, and why it ended."""


@torch.no_grad()
def sample(
    family: CausalFamily,
    model: Any,
    asks: Sequence[Ask],
    is_wanted: Callable[[], bool] = lambda: True,
    siblings: int = 1,
) -> list[list[Sampled]]:
    """The completions of requests that are sampled together; none if nobody wants them any more.

    Args:
        family: of the model.
        model: with the weights that sample.
        asks: B of them, with one `num_generations`, temperature, `top_k` and `top_p`.
        is_wanted: asked before each token.
        siblings: so many neighbours ask about one prompt, which goes through the model once for them.
    """
    first = asks[0].sampling
    count = first.num_generations
    of_prompts = asks[::siblings]
    per_prompt = count * siblings
    max_tokens = max(ask.sampling.max_completion_tokens for ask in asks)
    uniform = torch.cat([_uniforms(ask.seed, count, max_tokens) for ask in asks])  # [B * n, S]
    most_stops = max(len(ask.stop_token_ids) for ask in asks)
    stops = [[*ask.stop_token_ids, *[-1] * (most_stops - len(ask.stop_token_ids))] for ask in asks]
    ends = torch.tensor(stops, dtype=torch.int64).repeat_interleave(count, 0)  # [B * n, most_stops]
    limits = torch.tensor([ask.sampling.max_completion_tokens for ask in asks]).repeat_interleave(count)

    # 1. Every prompt once through the model.
    packed, embeds = _embed(family, model, of_prompts)
    cache = PrefixCache(packed.spans, per_prompt, max_tokens, torch.device("cpu"))
    rows = slice(0, len(packed.input_ids))
    embeds["layer_attention"] = functools.partial(cache.prefill, rows)
    embeds["layer_recurrence"] = functools.partial(cache.prefill_recurrence, rows)
    states = family.hidden_states(model, packed.position_ids[:, None], **embeds)[0]
    last_rows = [span.stop - 1 for span in packed.spans]
    hidden = states[last_rows].repeat_interleave(per_prompt, 0)  # [B * n, D]
    starts = torch.stack([ask.prompt.position_ids.max() + 1 for ask in of_prompts])
    following = starts.repeat_interleave(per_prompt)[:, None]

    # 2. A token of every completion, until all have ended.
    lm_head = LMHead(family, model)
    layers: dict[str, Any] = {"layer_attention": cache.decode, "layer_recurrence": cache.decode_recurrence}
    tokens: list[Tensor] = []
    logps: list[Tensor] = []
    finished = torch.zeros(len(hidden), dtype=torch.bool)
    while is_wanted():
        token, logp = sample_tokens(lm_head(hidden), first, uniform[:, cache.length])
        tokens.append(token)
        logps.append(logp)
        finished |= (token[:, None] == ends).any(1) | (len(tokens) >= limits)
        if finished.all():
            return _until_their_ends(asks, torch.stack(tokens, 1), torch.stack(logps, 1))
        positions = (following + cache.length).expand(len(packed.position_ids), -1, -1)
        inputs = model.get_input_embeddings()(token)[:, None]
        hidden = family.hidden_states(model, positions, inputs_embeds=inputs, **layers)[:, 0]
        cache.length += 1
    return []


@torch.no_grad()
def prompt_logprobs(family: CausalFamily, model: Any, ask: Ask, top_k: int) -> tuple[list[int], list[dict[int, float]]]:
    """A request's token ids, and of each but the first the log-probabilities of it and of the likeliest tokens.

    Args:
        family: of the model.
        model: with the weights.
        ask: the request.
        top_k: how many of the likeliest.
    """
    packed, embeds = _embed(family, model, [ask])
    cache = PrefixCache(packed.spans, 1, 1, torch.device("cpu"))
    embeds["layer_attention"] = functools.partial(cache.prefill, slice(0, len(packed.input_ids)))
    embeds["layer_recurrence"] = functools.partial(cache.prefill_recurrence, slice(0, len(packed.input_ids)))
    hidden = family.hidden_states(model, packed.position_ids[:, None], **embeds)[0]  # [T, D]
    logps = LMHead(family, model)(hidden[:-1]).float().log_softmax(-1)  # [T - 1, V]
    ids = ask.prompt.input_ids.clone()
    for index, token in ask.sampled_placeholders:
        ids[index] = token
    top = logps.topk(top_k) if top_k else None
    rows = []
    for row, token in enumerate(ids[1:].tolist()):
        said = {} if top is None else dict(zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True))
        rows.append(said | {token: float(logps[row, token])})
    return ids.tolist(), rows


def _embed(family: CausalFamily, model: Any, asks: Sequence[Ask]) -> tuple[Packed, dict[str, Any]]:
    """The prompts end to end, and the text stack's inputs for them."""
    prompts = []
    features: dict[str, Tensor] = {}
    for number, ask in enumerate(asks):
        media = tuple(replace(item, key=f"{number} {item.key}") for item in ask.prompt.media)
        prompts.append(replace(ask.prompt, media=media))
        features |= {f"{number} {key}": value for key, value in ask.features.items()}
    (packed,) = pack(prompts, [[] for _ in prompts], 1 << 62)
    # Placeholders that a policy sampled stand for no media: to the embedding a prompt is what a completion was shown.
    ids = packed.input_ids.clone()
    shown = torch.ones(len(ids), dtype=torch.bool)
    for ask, span in zip(asks, packed.spans, strict=True):
        for index, token in ask.sampled_placeholders:
            ids[span.start + index] = token
            shown[span.start + index] = False
    spans = tuple(GroupSpan(span.start, 1, (span.prompt_tokens - 1,)) for span in packed.spans)
    embedded = replace(packed, input_ids=ids, shown=shown, spans=spans)
    return packed, family.text_inputs(model, embedded, features)


def _uniforms(seed: int | None, count: int, length: int) -> Tensor:
    """[n, S] numbers in [0, 1); completion i is drawn with seed + i, as vLLM does it."""
    if seed is None:  # greedy
        return torch.zeros(count, length, dtype=torch.float64)
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    return torch.stack([torch.rand(length, generator=each, dtype=torch.float64) for each in generators])


def _until_their_ends(asks: Sequence[Ask], tokens: Tensor, logps: Tensor) -> list[list[Sampled]]:
    """[B * n, S] tokens and log-probabilities as completions; what follows an end was sampled for the others' sake."""
    groups = []
    count = asks[0].sampling.num_generations
    for number, ask in enumerate(asks):
        group: list[Sampled] = []
        for row in range(number * count, (number + 1) * count):
            ids = tokens[row, : ask.sampling.max_completion_tokens].tolist()
            ends = [index for index, token in enumerate(ids) if token in ask.stop_token_ids]
            ids = ids[: ends[0] + 1] if ends else ids
            group.append((ids, logps[row, : len(ids)].tolist(), "stop" if ends else "length"))
        groups.append(group)
    return groups
