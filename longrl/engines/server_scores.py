"""Log-probabilities of given tokens by a server's own weights: what a teacher says of what a policy sampled.

A request is prompt and completion as one vLLM prompt, of which the last `count` tokens are scored. Completions of one
prompt share its keys and values through vLLM's prefix cache. vLLM leaves that cache alone where log-probabilities of
prompts are asked for, since the rows of cached tokens have none; here only rows behind the prompt are read, so the
cache is used. The first completion of a prompt goes alone, then the others find it there. Where the cached part reaches
into a completion, because another one begins alike, the missing rows are the other's; what nobody else was asked about
is computed once more without the cache.

Letters: S tokens of a completion, k of the likeliest.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longrl.engines import server_protocol as protocol
from longrl.engines.vllm_turns import SAMPLED_PLACEHOLDERS

TopRow = Mapping[int, Any]
"""{token: vLLM's log-probability} of a row: of the token that follows, and of the likeliest."""
LEAST_TOP = 20
"""Of the likeliest that vLLM is asked for, so that rows of completions that begin alike can be shared."""
MAX_TOP = 4096
"""Likeliest tokens that may be asked for."""
KINDS = {"version": str, "requests": str, "tensors": list, "counts": list, "groups": list, "top_k": int}


def check_score_message(message: Any) -> None:
    """Raises ValueError if a message of `score` has other fields, types or values than the trainer's have."""
    if not isinstance(message, dict) or message.keys() != KINDS.keys():
        raise ValueError(f"a message about scores must have {', '.join(KINDS)} and nothing else")
    for name, kind in KINDS.items():
        if type(message[name]) is not kind:
            raise ValueError(f"{name} of a message must be a {kind.__name__}, got a {type(message[name]).__name__}")
    protocol.check_tensor_names(message["tensors"])
    if not 0 <= message["top_k"] <= MAX_TOP:
        raise ValueError(f"top_k of a message must be 0 to {MAX_TOP}, got {message['top_k']}")
    for name in ("counts", "groups"):
        if not all(type(count) is int and count > 0 for count in message[name]):
            raise ValueError(f"{name} of a message must be positive, got {message[name][:5]}")
    if sum(message["groups"]) != len(message["counts"]):
        raise ValueError(f"groups of a message must be of all {len(message['counts'])} requests")


class ServerScores:
    """Scores requests by vLLM's `AsyncLLM`.

    Args:
        engine: vLLM's.
        render: makes of a request what the engine takes, placeholders that were sampled included.
        sampling: makes vLLM's sampling parameters of plain values.
    """

    def __init__(self, engine: Any, render: Callable[..., Any], sampling: Callable[[dict[str, Any]], Any]) -> None:
        self._engine = engine
        self._render = render
        self._sampling = sampling

    async def score(
        self, requests: Sequence[dict[str, Any]], counts: Sequence[int], groups: Iterable[int], top_k: int
    ) -> list[dict[str, Any]]:
        """What the server says of the last tokens of each request.

        Args:
            requests: prompts with a completion each, as `family.engine_request` gives them.
            counts: S of each.
            groups: numbers of neighbouring requests with one prompt.
            top_k: k.

        Returns:
            Of each `logprobs` [S]; `top_ids` and `top_logprobs`, S lists of k; `read`, the share of its prompt that was
            computed.

        Raises:
            ValueError: vLLM gives none for such a request.
        """
        pairs = iter(list(zip(requests, counts, strict=True)))
        parts = [[next(pairs) for _ in range(size)] for size in groups]
        scored = await asyncio.gather(*[self._score_group(part, top_k) for part in parts])
        return [fields for of_group in scored for fields in of_group]

    async def _score_group(self, pairs: Sequence[tuple[dict[str, Any], int]], top_k: int) -> list[dict[str, Any]]:
        rendered = [(await self._rendered(request), count) for request, count in pairs]
        answers = [await self._ask(*rendered[0], top_k)]
        answers += await asyncio.gather(*[self._ask(*pair, top_k) for pair in rendered[1:]])
        share_rows(answers)
        for index, (request, count) in enumerate(rendered):
            if None in answers[index].rows:
                answers[index] = await self._ask(request, count, top_k, uses_cache=False)
        return [_fields(answer, top_k) for answer in answers]

    async def _rendered(self, request: dict[str, Any]) -> dict[str, Any]:
        return await self._render(request) if SAMPLED_PLACEHOLDERS in request else request

    async def _ask(self, request: dict[str, Any], count: int, top_k: int, uses_cache: bool = True) -> ScoredTokens:
        """VLLM's answer to a request for one token, which it cannot do without, and for those before it."""
        params = {
            "n": 1,
            "max_tokens": 1,
            "temperature": 0.0,
            "detokenize": False,
            "prompt_logprobs": max(top_k, LEAST_TOP),
            "skip_reading_prefix_cache": not uses_cache,
        }
        name = f"score-{uuid.uuid4().hex}"
        outputs = [output async for output in self._engine.generate(request, self._sampling(params), name)]
        return scored_tokens(outputs[-1], count)


@dataclass
class ScoredTokens:
    """What vLLM has said of the last tokens of a request."""

    ids: Sequence[int]
    """[S]."""
    rows: list[TopRow | None]
    """[S], None where a row was cached."""
    read: float
    """Share of the prompt that was computed."""


def scored_tokens(output: Any, count: int) -> ScoredTokens:
    """The last `count` tokens of a `vllm.RequestOutput`.

    Raises:
        ValueError: it has no log-probabilities.
    """
    length = len(output.prompt_token_ids or ())
    if output.prompt_logprobs is None or length <= count:
        raise ValueError(
            f"vLLM gives no log-probabilities of the last {count} of {length} prompt tokens; of prompts with "
            "embeddings it has none"
        )
    # Tokens behind the first that was computed have a row; one of vLLM's model runners leaves others out, one has any
    # numbers there.
    cached = output.num_cached_tokens or 0
    num_missing = max(0, cached + 1 - (length - count))
    found = output.prompt_logprobs[len(output.prompt_logprobs) - (count - num_missing) :]
    rows = [*[None] * num_missing, *found]
    return ScoredTokens(output.prompt_token_ids[-count:], rows, max(0, length - count - cached) / (length - count))


def share_rows(answers: Sequence[ScoredTokens]) -> None:
    """Gives rows that were cached those of other completions of the prompt that begin alike.

    The token behind the last cached one may be another: it is among the likeliest of the other's row, or has none.
    """
    if not any(None in answer.rows for answer in answers):
        return
    known: dict[bytes, dict[int, Any]] = {}
    names = [_prefix_names(answer.ids) for answer in answers]
    for own, answer in zip(names, answers, strict=True):
        for name, row in zip(own, answer.rows, strict=True):
            if row is not None:
                known.setdefault(name, {}).update(row)
    for own, answer in zip(names, answers, strict=True):
        for index, (name, token) in enumerate(zip(own, answer.ids, strict=True)):
            if answer.rows[index] is None and token in known.get(name, ()):
                answer.rows[index] = known[name]


def _prefix_names(ids: Iterable[int]) -> list[bytes]:
    """Of each token a name of all before it."""
    names = []
    content = hashlib.blake2b(digest_size=16)
    for token in ids:
        names.append(content.digest())
        content.update(token.to_bytes(8, "little"))
    return names


def _fields(answer: ScoredTokens, top_k: int) -> dict[str, Any]:
    """Log-probabilities as JSON can hold them; vLLM gives each token's beside those of the likeliest."""
    rows = [row for row in answer.rows if row is not None]
    top = [sorted(row.items(), key=lambda item: -item[1].logprob)[:top_k] for row in rows]
    return {
        "logprobs": [row[token].logprob for token, row in zip(answer.ids, rows, strict=True)],
        "top_ids": [[token for token, _ in row] for row in top],
        "top_logprobs": [[said.logprob for _, said in row] for row in top],
        "read": answer.read,
    }
