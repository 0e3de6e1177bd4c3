"""The length rule: how many tokens a prompt and its completion may have together, whoever sets the limit.

Micro-batches, engines, servers and the data module each have a limit, and an option that sets it. All of them ask here,
so that every message says the same: the lengths, the limit, its option, the value that would do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from longrl.types import Prompt, SamplingParams


@dataclass(frozen=True)
class LengthLimit:
    """A limit that is known before a run, so that rows above it are skipped instead of ending it."""

    tokens: int
    """Of a prompt and what follows it, on one rank."""
    option: str
    """That sets it, see `length_problem`."""
    longest: int = 0
    """Tokens of the longest completion that may follow; an SFT target counts with its own."""
    ranks: int = 1
    """That share a sequence."""
    of_update: bool = False
    """Of forward passes of the trainer, so of prompts, too, that nothing is sampled behind: a teacher's."""


def micro_batch_limit(max_tokens: int, degrees: Iterable[int], longest: int = 0) -> LengthLimit:
    """The limit that micro-batches of so many tokens on each rank set.

    Args:
        max_tokens: `model.max_tokens_per_micro_batch`.
        degrees: numbers of ranks that may share a sequence.
        longest: tokens of the longest completion that is sampled.
    """
    return LengthLimit(max_tokens, "model.max_tokens_per_micro_batch", longest, max(degrees), of_update=True)


def length_problem(
    name: str, prompt_tokens: int, longest: int = 0, *, limit: int | None, option: str, ranks: int = 1, remedy: str = ""
) -> str | None:
    """Says why a prompt is too long, or None if it fits.

    What follows is the caller's: an error for a prompt that is there (`check_lengths`), a warning before a run, a row
    that is skipped.

    Args:
        name: whose length it is: `prompt 'a'`.
        prompt_tokens: of the prompt, media included.
        longest: tokens of its longest completion; 0 where prompts alone are limited.
        limit: tokens on one rank; None is no limit.
        option: that sets the limit, with the one it belongs to: `max_model_len of VLLMEngine`.
        ranks: that share a sequence, each of which takes `limit` tokens.
        remedy: what helps beside a higher limit; by default shorter prompts or completions.

    Example:
        `length_problem("prompt 'a'", 7, 5, limit=10, option="max_model_len of VLLMEngine")` is
        "prompt 'a' has 7 tokens, 12 with its longest completion, above 10, the max_model_len of VLLMEngine; raise that
        to 12, or lower ..."
    """
    total = prompt_tokens + longest
    if limit is None or total <= limit * ranks:
        return None
    together = f", {total} with its longest completion" if longest else ""
    shared = f" on each of {ranks} ranks" if ranks > 1 else ""
    remedy = remedy or "lower data.max_prompt_tokens or sampling.max_completion_tokens"
    return (
        f"{name} has {prompt_tokens} tokens{together}, above {limit}{shared}, the {option}; raise that to "
        f"{-(-total // ranks)}, or {remedy}"
    )


def check_lengths(prompts: Sequence[Prompt], sampling: SamplingParams, *, limit: int, option: str) -> None:
    """Raises ValueError if a prompt with the longest completion that may follow is over an engine's limit.

    Args:
        prompts: with media placeholders expanded.
        sampling: says how long a completion may become.
        limit: of the engine.
        option: that sets it, see `length_problem`.
    """
    for prompt in prompts:
        name = f"prompt {prompt.id!r}"
        longest = sampling.max_completion_tokens
        problem = length_problem(name, len(prompt.input_ids), longest, limit=limit, option=option)
        if problem:
            raise ValueError(problem)
