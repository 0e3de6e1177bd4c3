"""Whether one model can score what another one writes: tokens with equal ids, and the same ones that end an answer."""

from __future__ import annotations

from longrl.models.reading import RendersPrompts

NUM_SHOWN = 3
"""Tokens in the message."""


def check_same_tokens(policy: RendersPrompts, teacher: RendersPrompts) -> None:
    """Raises ValueError unless the teacher has every token of the policy under the same id; it may have more.

    Heads may have different numbers of rows: those behind the tokens are padding.

    Args:
        policy: writes.
        teacher: scores what is written.
    """
    ours = policy.tokenizer.get_vocab()
    theirs = teacher.tokenizer.get_vocab()
    folders = f"{policy.model_path!r} (the policy) and {teacher.model_path!r} (the teacher)"
    remedy = "use a teacher of the policy's model series, or rewards in its place"
    differing = {token: number for token, number in ours.items() if theirs.get(token) != number}
    if differing:
        first = sorted(differing, key=differing.__getitem__)[:NUM_SHOWN]
        shown = ", ".join(f"{token!r} is {ours[token]} and {theirs.get(token, 'missing')}" for token in first)
        raise ValueError(
            f"model.teacher needs the policy's tokenizer, but {len(differing)} of {len(ours)} tokens of {folders} "
            f"differ: {shown}; {remedy}"
        )
    unknown = [number for number in policy.end_token_ids if number not in teacher.end_token_ids]
    if unknown:
        raise ValueError(
            f"model.teacher needs the policy's end tokens, but of {folders} the first ends answers with "
            f"{list(policy.end_token_ids)} and the second with {list(teacher.end_token_ids)}; {remedy}, or correct "
            "eos_token_id in the teacher's generation_config.json"
        )
