"""Whether a row fits: its text, before anything is decoded or tokenized, and its prompt with the answers behind it."""

from __future__ import annotations

from collections.abc import Sequence

from longrl.packing.lengths import LengthLimit, length_problem
from longrl.types import Prompt, Row, UnusableSample

LONGEST_TOKEN = 256
"""Characters of a token, at most: vocabularies have runs of 128 blanks."""
SHORTER = "take fewer frames or smaller ones"


def check_characters(row: Row, own: LengthLimit | None, limits: Sequence[LengthLimit], *, with_trace: bool) -> None:
    """Raises UnusableSample for a text that is too long whatever its tokens are: to make them takes minutes.

    Args:
        row: to be rendered.
        own: the data's limit of prompts.
        limits: of the update and the engine.
        with_trace: the row's trace is taught.
    """
    most = [limit.tokens * limit.ranks for limit in (*limits, *([own] if own else []))]
    texts = [row.problem, *(part.get("text", "") for message in row.messages for part in message["content"])]
    for message in row.trace if with_trace else ():
        content = message["content"]
        texts += [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    num_characters = sum(map(len, texts))
    num_tokens = num_characters // LONGEST_TOKEN
    if most and num_tokens > min(most):
        raise UnusableSample(
            None,
            f"its text has {num_characters} characters, at least {num_tokens} tokens: more than {min(most)}, the limit "
            "of prompts; shorten it, or leave the row out",
        )


def check_length(prompt: Prompt, own: LengthLimit | None, limits: Sequence[LengthLimit]) -> None:
    """Raises UnusableSample for a prompt that is too long with the answers that the data brings, or that are sampled.

    Args:
        prompt: of a row.
        own: the data's limit of prompts.
        limits: of the update and the engine.
    """
    num_tokens = len(prompt.input_ids)
    if own is not None and num_tokens > own.tokens:
        raise UnusableSample(None, _too_long(num_tokens, 0, own))
    num_target_tokens = sum(len(answer.token_ids) for answer in prompt.targets)  # a pair is never split
    for limit in limits:
        longest = max(limit.longest, num_target_tokens)
        if num_tokens + longest > limit.tokens * limit.ranks:
            raise UnusableSample(None, _too_long(num_tokens, longest, limit))


def _too_long(num_prompt_tokens: int, longest: int, limit: LengthLimit) -> str:
    """Why a prompt and what follows it do not fit."""
    problem = length_problem(
        "its prompt", num_prompt_tokens, longest, limit=limit.tokens, option=limit.option, ranks=limit.ranks,
        remedy=f"{SHORTER}, or shorter completions" if longest else SHORTER,
    )  # fmt: skip
    assert problem is not None, "the caller has compared them"
    return problem
