"""Log-probabilities of given tokens by a server's own weights: what a teacher says of what a policy sampled.

A request is prompt and completion as one vLLM prompt, of which the last `count` tokens are scored. Completions of one
prompt share its keys and values through vLLM's prefix cache. vLLM leaves that cache alone where log-probabilities of
prompts are asked for, since the rows of cached tokens have none; here only rows behind the prompt are read, so the
cache is used, and a request whose cached part reaches into its completion is computed once more without it.

Letters: S tokens of a completion, k of the likeliest.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longrl.engines import server_protocol as protocol
from longrl.engines.vllm_turns import SAMPLED_PLACEHOLDERS

MAX_TOP = 4096
"""Likeliest tokens that may be asked for."""
KINDS = {"version": str, "requests": str, "tensors": list, "counts": list, "top_k": int}


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
    if not all(type(count) is int and count > 0 for count in message["counts"]):
        raise ValueError(f"counts of a message must be positive, got {message['counts'][:5]}")


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

    async def score(self, request: dict[str, Any], count: int, top_k: int) -> dict[str, Any]:
        """What the server says of a request's last tokens.

        Args:
            request: prompt and completion, as `family.engine_request` gives it.
            count: S.
            top_k: k.

        Returns:
            `logprobs` [S]; `top_ids` and `top_logprobs` [S][k]; `read`, the share of the prompt that was computed.

        Raises:
            ValueError: vLLM returns none for such a request.
        """
        if SAMPLED_PLACEHOLDERS in request:
            request = await self._render(request)
        output = await self._ask(request, top_k, uses_cache=True)
        length = len(output.prompt_token_ids or ())
        read = length - (output.num_cached_tokens or 0)
        if (output.num_cached_tokens or 0) > length - count - 1:  # rows that predict the completion are missing
            output = await self._ask(request, top_k, uses_cache=False)
            read = length
        rows = output.prompt_logprobs
        if rows is None or length <= count:
            raise ValueError(
                f"vLLM gives no log-probabilities of the last {count} of {length} prompt tokens; of prompts with "
                "embeddings it has none"
            )
        pairs = zip(output.prompt_token_ids[-count:], rows[-count:], strict=True)
        return {**_fields(list(pairs), top_k), "read": max(0.0, read - count) / (length - count)}

    async def _ask(self, request: dict[str, Any], top_k: int, uses_cache: bool) -> Any:
        """VLLM's answer to a request for one token, which it cannot do without, and for those before it."""
        params = {
            "n": 1,
            "max_tokens": 1,
            "temperature": 0.0,
            "detokenize": False,
            "prompt_logprobs": top_k,
            "skip_reading_prefix_cache": not uses_cache,
        }
        name = f"score-{uuid.uuid4().hex}"
        outputs = [output async for output in self._engine.generate(request, self._sampling(params), name)]
        return outputs[-1]


def _fields(pairs: Sequence[tuple[int, Mapping[int, Any]]], top_k: int) -> dict[str, Any]:
    """Log-probabilities as JSON can hold them; vLLM gives each token's beside those of the likeliest."""
    top = [sorted(row.items(), key=lambda item: -item[1].logprob)[:top_k] for _, row in pairs]
    return {
        "logprobs": [row[token].logprob for token, row in pairs],
        "top_ids": [[token for token, _ in row] for row in top],
        "top_logprobs": [[said.logprob for _, said in row] for row in top],
    }
